//! The Llama and Qwen2 decoders: candle multiplies the matrices, on the CPU or on a GPU, and everything between them is written out here, for the CPU.
//!
//! What a row computes depends on that row alone, whatever else is in the step, as far as the matrix products do not choose another
//! order of summation for another number of rows.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use kv_cache::{ElementType, Geometry, Rope, RopeLayout};
use rayon::prelude::*;

use super::attention::{Shape, attend};
use super::{Chunk, KeysValues};

/// How weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// As 8-bit blocks, and activations are rounded to 8 bits for the products too: fast, for serving. Blocks of kinds for which candle
    /// has no fast product (`Q4_1`, `Q5_0`, `Q5_1`) are read into `Q8_0`.
    Quantised,
    /// As f32: what rounding to 8 bits would hide shows, for measuring.
    Single,
}

/// Kinds of models: the same layers, but for the two things below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// SmolLM2 too.
    Llama,
    /// Queries, keys and values have a bias. That of the keys is large, which is what makes such a model hard on storage formats.
    Qwen2,
}

impl Architecture {
    const ALL: [Architecture; 2] = [Architecture::Llama, Architecture::Qwen2];

    /// As GGUF files call it.
    fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
        }
    }

    /// Which dims of a head rotate together. What makes GGUF files permutes the rows of Llama's matrices, and leaves Qwen2's as they were.
    fn rope_layout(self) -> RopeLayout {
        match self {
            Architecture::Llama => RopeLayout::Interleaved,
            Architecture::Qwen2 => RopeLayout::HalfSplit,
        }
    }
}

/// What a model is shaped like.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub name: String,
    pub layers: usize,
    pub embedding: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub context_tokens: usize,
    pub rope_base: f32,
    pub norm_epsilon: f32,
}

/// Which rows of logits a step is to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// Those behind the last token of each chunk.
    Last,
    /// Those behind the last token of some of the chunks.
    LastOf(&'a [bool]),
    /// Those behind every token.
    All,
}

/// Logits: `[rows, vocab]`.
#[derive(Debug, Clone)]
pub struct Logits {
    values: Vec<f32>,
    vocab: usize,
}

impl Logits {
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.vocab..(row + 1) * self.vocab]
    }

    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.vocab)
    }
}

/// The most likely token.
pub fn greedy(logits: &[f32]) -> u32 {
    let best = |best: (usize, f32), (at, x): (usize, &f32)| if *x > best.1 { (at, *x) } else { best };
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), best).0 as u32
}

struct Layer {
    attention_norm: Vec<f32>,
    query: Projection,
    key: Projection,
    value: Projection,
    output: QMatMul,
    mlp_norm: Vec<f32>,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

/// What makes queries, keys or values.
struct Projection {
    matrix: QMatMul,
    /// Of no elements, where the model has none.
    bias: Vec<f32>,
}

/// A model that was loaded.
pub struct Model {
    config: ModelConfig,
    embeddings: QTensor,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: QMatMul,
    inv_freq: Vec<f32>,
    /// Where the matrices are.
    device: Device,
}

impl Model {
    /// Reads a GGUF file of a Llama or a Qwen2 model, tied or not, and keeps its matrices on `device`.
    ///
    /// # Errors
    /// If the file cannot be read, is no such model, or lacks a tensor; those of the device.
    pub fn load(path: &Path, weights: Weights, device: &Device) -> anyhow::Result<Model> {
        let file = File::open(path).with_context(|| format!("cannot open the model {}", path.display()))?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file)
            .with_context(|| format!("{} is no GGUF file that can be read", path.display()))?;
        let config = ModelConfig::read(&content)?;
        let mut tensors = Tensors { content: &content, config: &config, file, weights, device };
        let layers = (0..config.layers).map(|layer| tensors.layer(layer)).collect::<anyhow::Result<_>>()?;
        let norm = tensors.vector("output_norm.weight", config.embedding)?;
        // Embeddings and head are often one matrix.
        let head = ["output.weight", "token_embd.weight"].into_iter().find(|name| tensors.has(name));
        let head = tensors.matrix(head.unwrap_or("output.weight"))?;
        let embeddings = tensors.read("token_embd.weight", &Device::Cpu)?;
        let inv_freq = (0..config.head_dim / 2)
            .map(|i| config.rope_base.powf(-2.0 * i as f32 / config.head_dim as f32))
            .collect();
        Ok(Model { embeddings, layers, norm, head, inv_freq, device: device.clone(), config })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What a cache for it is shaped like.
    pub fn geometry(&self, element: ElementType) -> Geometry {
        let config = &self.config;
        let (layers, kv_heads, dim) = (config.layers as u32, config.kv_heads as u32, config.head_dim as u32);
        let mut geometry = Geometry::new(layers, kv_heads, dim, element);
        geometry.groups[0].rope = Some(Rope {
            inv_freq: self.inv_freq.clone(),
            rotary_dims: dim,
            layout: config.architecture.rope_layout(),
            attention_scale: 1.0,
        });
        geometry
    }

    /// One step: computes the chunks' tokens, all layers, over `kv`.
    ///
    /// # Errors
    /// Those of candle, and whatever `kv` says.
    pub fn forward(
        &self,
        chunks: &[Chunk<'_>],
        kv: &mut impl KeysValues,
        wanted: Wanted<'_>,
    ) -> anyhow::Result<Logits> {
        let config = &self.config;
        let ids = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect::<Vec<_>>();
        ensure!(!ids.is_empty(), "a step of no tokens");
        if let Some(id) = ids.iter().find(|id| **id as usize >= config.vocab) {
            bail!("token {id} is not one of the model's {}", config.vocab);
        }
        let positions =
            chunks.iter().flat_map(|chunk| (0..chunk.tokens.len() as u32).map(|at| chunk.position + at));
        let angles = self.angles(positions);
        let embedded = self.embeddings.embedding(&Tensor::new(ids.as_slice(), &Device::Cpu)?)?;
        let mut x = embedded.flatten_all()?.to_vec1::<f32>()?;
        for (at, layer) in self.layers.iter().enumerate() {
            let normed = self.normed(&x, &layer.attention_norm)?;
            let mut queries = layer.query.of(&normed)?;
            let mut keys = layer.key.of(&normed)?;
            let values = layer.value.of(&normed)?;
            let layout = config.architecture.rope_layout();
            rotate(&mut queries, &angles, config.heads, config.head_dim, layout);
            rotate(&mut keys, &angles, config.kv_heads, config.head_dim, layout);
            kv.put(at, &keys, &values);
            let attended = self.attention(at, chunks, &queries, kv)?;
            add(&mut x, &product(&layer.output, &self.tensor(attended, config.heads * config.head_dim)?)?);

            let normed = self.normed(&x, &layer.mlp_norm)?;
            let mut hidden = product(&layer.gate, &normed)?;
            let up = product(&layer.up, &normed)?;
            hidden.iter_mut().zip(&up).for_each(|(gate, up)| *gate = *gate / (1.0 + (-*gate).exp()) * up);
            let width = hidden.len() / ids.len();
            add(&mut x, &product(&layer.down, &self.tensor(hidden, width)?)?);
        }
        let rows = wanted_rows(chunks, wanted, &x, config.embedding);
        if rows.is_empty() {
            return Ok(Logits { values: Vec::new(), vocab: config.vocab });
        }
        let values = product(&self.head, &self.normed(&rows, &self.norm)?)?;
        Ok(Logits { values, vocab: config.vocab })
    }

    /// `[rows, heads, dim]` of all chunks: a task for each chunk and KV head, if they are worth it.
    fn attention(
        &self,
        layer: usize,
        chunks: &[Chunk<'_>],
        queries: &[f32],
        kv: &impl KeysValues,
    ) -> anyhow::Result<Vec<f32>> {
        let config = &self.config;
        let (heads, dim, group) = (config.heads, config.head_dim, config.heads / config.kv_heads);
        let mut first = 0;
        let mut tasks = Vec::with_capacity(chunks.len() * config.kv_heads);
        for (at, chunk) in chunks.iter().enumerate() {
            tasks.extend((0..config.kv_heads).map(|head| (at, head, first, chunk.tokens.len())));
            first += chunk.tokens.len();
        }
        let run = |&(chunk, head, first, tokens): &(usize, usize, usize, usize)| {
            let mut of_head = Vec::with_capacity(tokens * group * dim);
            for row in first..first + tokens {
                let at = (row * heads + head * group) * dim;
                of_head.extend_from_slice(&queries[at..at + group * dim]);
            }
            let mut out = vec![0.0; of_head.len()];
            attend(&kv.runs(layer, chunk, head)?, &of_head, Shape { tokens, group, dim }, &mut out);
            anyhow::Ok(out)
        };
        let work =
            chunks.iter().map(|chunk| chunk.tokens.len() * (chunk.position as usize + 16)).sum::<usize>();
        let done = match work < PARALLEL_FROM {
            true => tasks.iter().map(run).collect::<anyhow::Result<Vec<_>>>()?,
            false => tasks.par_iter().map(run).collect::<anyhow::Result<Vec<_>>>()?,
        };
        let mut out = vec![0.0; queries.len()];
        for ((_, head, first, tokens), of_head) in tasks.iter().zip(done) {
            for (row, from) in (*first..first + tokens).zip(of_head.chunks_exact(group * dim)) {
                let at = (row * heads + head * group) * dim;
                out[at..at + group * dim].copy_from_slice(from);
            }
        }
        Ok(out)
    }

    /// Cosines and sines of every row's position: `[rows, dim / 2]` pairs.
    fn angles(&self, positions: impl Iterator<Item = u32>) -> Vec<(f32, f32)> {
        let of_row = |position: u32| {
            let angle = move |inv_freq: &f32| {
                let angle = position as f32 * inv_freq;
                (angle.cos(), angle.sin())
            };
            self.inv_freq.iter().map(angle)
        };
        positions.flat_map(of_row).collect()
    }

    fn normed(&self, x: &[f32], weight: &[f32]) -> anyhow::Result<Tensor> {
        let mut out = Vec::with_capacity(x.len());
        for row in x.chunks_exact(weight.len()) {
            let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            let scale = 1.0 / (mean + self.config.norm_epsilon).sqrt();
            out.extend(row.iter().zip(weight).map(|(x, weight)| x * scale * weight));
        }
        self.tensor(out, weight.len())
    }

    fn tensor(&self, rows: Vec<f32>, width: usize) -> anyhow::Result<Tensor> {
        let count = rows.len() / width;
        Ok(Tensor::from_vec(rows, (count, width), &self.device)?)
    }
}

/// From how many pairs of tokens attention is done by several threads: below, waking them takes longer.
const PARALLEL_FROM: usize = 256;

impl ModelConfig {
    fn read(content: &Content) -> anyhow::Result<ModelConfig> {
        let find = |key: &str| {
            content.metadata.get(key).with_context(|| format!("the model's metadata has no {key}"))
        };
        let named = find("general.architecture")?.to_string()?;
        let known = Architecture::ALL.into_iter().find(|known| known.name() == named);
        let architecture = known.with_context(|| {
            let known = Architecture::ALL.map(Architecture::name).join(" and ");
            format!("the model is of architecture {named}; only {known} are known here")
        })?;
        let of_kind = |key: &str| format!("{named}.{key}");
        let number = |key: &str| anyhow::Ok(find(&of_kind(key))?.to_u32()? as usize);
        let heads = number("attention.head_count")?;
        let embedding = number("embedding_length")?;
        let name = content.metadata.get("general.name").and_then(|name| name.to_string().ok());
        let vocab = find("tokenizer.ggml.tokens").and_then(|tokens| Ok(tokens.to_vec()?.len()))?;
        let float = |value: &Value| value.to_f32();
        let config = ModelConfig {
            architecture,
            name: name.cloned().unwrap_or_else(|| named.clone()),
            layers: number("block_count")?,
            embedding,
            heads,
            kv_heads: number("attention.head_count_kv")?,
            head_dim: number("rope.dimension_count").unwrap_or(embedding / heads.max(1)),
            vocab,
            context_tokens: number("context_length")?,
            rope_base: content.metadata.get(&of_kind("rope.freq_base")).map_or(Ok(10_000.0), float)?,
            norm_epsilon: float(find(&of_kind("attention.layer_norm_rms_epsilon"))?)?,
        };
        ensure!(
            config.kv_heads > 0 && heads.is_multiple_of(config.kv_heads) && heads * config.head_dim > 0,
            "the model has {heads} heads of {} dims over {} KV heads",
            config.head_dim,
            config.kv_heads
        );
        Ok(config)
    }
}

/// The tensors of a GGUF file.
struct Tensors<'a> {
    content: &'a Content,
    config: &'a ModelConfig,
    file: BufReader<File>,
    weights: Weights,
    /// Where matrices go.
    device: &'a Device,
}

impl Tensors<'_> {
    fn layer(&mut self, layer: usize) -> anyhow::Result<Layer> {
        let name = |name: &str| format!("blk.{layer}.{name}");
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm.weight"), self.config.embedding)?,
            query: self.projection(&name("attn_q"), self.config.heads)?,
            key: self.projection(&name("attn_k"), self.config.kv_heads)?,
            value: self.projection(&name("attn_v"), self.config.kv_heads)?,
            output: self.matrix(&name("attn_output.weight"))?,
            mlp_norm: self.vector(&name("ffn_norm.weight"), self.config.embedding)?,
            gate: self.matrix(&name("ffn_gate.weight"))?,
            up: self.matrix(&name("ffn_up.weight"))?,
            down: self.matrix(&name("ffn_down.weight"))?,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    fn read(&mut self, name: &str, device: &Device) -> anyhow::Result<QTensor> {
        let Some(info) = self.content.tensor_infos.get(name) else { bail!("the model has no tensor {name}") };
        let blocks = info.shape.elem_count() / info.ggml_dtype.block_size();
        let size = blocks.saturating_mul(info.ggml_dtype.type_size()) as u64;
        let end = self.content.tensor_data_offset.saturating_add(info.offset).saturating_add(size);
        let bytes = self.file.get_ref().metadata()?.len();
        ensure!(end <= bytes, "the model's file is cut: {name} ends at byte {end} of {bytes}");
        let tensor = self.content.tensor(&mut self.file, name, device);
        tensor.with_context(|| format!("the model's tensor {name} cannot be read"))
    }

    /// One of so many elements.
    fn vector(&mut self, name: &str, elements: usize) -> anyhow::Result<Vec<f32>> {
        let tensor = self.read(name, &Device::Cpu)?;
        let vector = tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        ensure!(
            vector.len() == elements,
            "the model's {name} has {} elements instead of {elements}",
            vector.len()
        );
        Ok(vector)
    }

    /// One that makes so many heads.
    fn projection(&mut self, name: &str, heads: usize) -> anyhow::Result<Projection> {
        let (bias, elements) = (format!("{name}.bias"), heads * self.config.head_dim);
        Ok(Projection {
            matrix: self.matrix(&format!("{name}.weight"))?,
            bias: if self.has(&bias) { self.vector(&bias, elements)? } else { Vec::new() },
        })
    }

    fn matrix(&mut self, name: &str) -> anyhow::Result<QMatMul> {
        let tensor = self.read(name, self.device)?;
        Ok(match (self.weights, tensor.dtype()) {
            (Weights::Single, _) => QMatMul::Tensor(tensor.dequantize(self.device)?),
            (Weights::Quantised, GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1)
                if self.device.is_cpu() =>
            {
                let single = tensor.dequantize(&Device::Cpu)?;
                QMatMul::from_qtensor(QTensor::quantize(&single, GgmlDType::Q8_0)?)?
            }
            (Weights::Quantised, _) => QMatMul::from_qtensor(tensor)?,
        })
    }
}

impl Projection {
    fn of(&self, rows: &Tensor) -> anyhow::Result<Vec<f32>> {
        let mut out = product(&self.matrix, rows)?;
        if !self.bias.is_empty() {
            out.chunks_exact_mut(self.bias.len()).for_each(|row| add(row, &self.bias));
        }
        Ok(out)
    }
}

fn product(matrix: &QMatMul, rows: &Tensor) -> anyhow::Result<Vec<f32>> {
    Ok(matrix.forward(rows)?.flatten_all()?.to_vec1()?)
}

/// Rotates the pairs of every head: `[rows, heads, dim]`.
fn rotate(rows: &mut [f32], angles: &[(f32, f32)], heads: usize, dim: usize, layout: RopeLayout) {
    let of_rows = rows.chunks_exact_mut(heads * dim).zip(angles.chunks_exact(dim / 2));
    for (row, angles) in of_rows {
        for head in row.chunks_exact_mut(dim) {
            for (pair, (cos, sin)) in angles.iter().enumerate() {
                let (first, second) = match layout {
                    RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                    RopeLayout::HalfSplit => (pair, pair + dim / 2),
                };
                let (a, b) = (head[first], head[second]);
                (head[first], head[second]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn wanted_rows(chunks: &[Chunk<'_>], wanted: Wanted<'_>, x: &[f32], width: usize) -> Vec<f32> {
    if wanted == Wanted::All {
        return x.to_vec();
    }
    let mut end = 0;
    let mut rows = Vec::with_capacity(chunks.len() * width);
    for (at, chunk) in chunks.iter().enumerate() {
        end += chunk.tokens.len() * width;
        let is_wanted = match wanted {
            Wanted::LastOf(chunks) => chunks.get(at).copied().unwrap_or_default(),
            _ => true,
        };
        if is_wanted {
            rows.extend_from_slice(&x[end - width..end]);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A turn of the plane as a product of complex numbers, in f64: `(a + bi)·e^(iφ)`, with `φ = position · base^(-2·pair/dim)`.
    fn turned(a: f64, b: f64, position: u32, pair: usize, dim: usize, base: f64) -> (f64, f64) {
        let angle = f64::from(position) / base.powf(2.0 * pair as f64 / dim as f64);
        let (re, im) = (angle.cos(), angle.sin());
        (a * re - b * im, a * im + b * re)
    }

    /// As Hugging Face has it for Qwen2: `x·cos + rotate_half(x)·sin`, where the cosines of one half are repeated for the other.
    #[test]
    fn half_split_rotation_is_that_of_rotate_half() {
        let (heads, dim, base) = (2, 8, 1e6_f64);
        let positions = [0u32, 1, 5, 1000];
        let x = (0..positions.len() * heads * dim)
            .map(|i| ((i * 37 % 23) as f32 - 11.0) / 4.0)
            .collect::<Vec<_>>();
        let frequency = |i: usize| base.powf(-2.0 * (i % (dim / 2)) as f64 / dim as f64);
        let angles = positions.iter().flat_map(|position| {
            (0..dim / 2).map(move |pair| (f64::from(*position) * frequency(pair)) as f32)
        });
        let angles = angles.map(|angle| (angle.cos(), angle.sin())).collect::<Vec<_>>();
        let mut rotated = x.clone();
        rotate(&mut rotated, &angles, heads, dim, RopeLayout::HalfSplit);
        for (row, position) in positions.iter().enumerate() {
            for head in 0..heads {
                let at = (row * heads + head) * dim;
                let half = |i: usize| if i < dim / 2 { -x[at + i + dim / 2] } else { x[at + i - dim / 2] };
                for i in 0..dim {
                    let angle = f64::from(*position) * frequency(i);
                    let expected = f64::from(x[at + i]) * angle.cos() + f64::from(half(i)) * angle.sin();
                    assert!((f64::from(rotated[at + i]) - expected).abs() < 1e-4, "{position} {head} {i}");
                }
            }
        }
    }

    #[test]
    fn both_layouts_turn_the_pairs_that_they_name() {
        let (dim, base, position) = (6, 1e4_f64, 7u32);
        let x = [1.0f32, -2.0, 3.0, 0.5, 4.0, -1.5];
        let angle = |pair: usize| f64::from(position) / base.powf(2.0 * pair as f64 / dim as f64);
        let angles =
            (0..dim / 2).map(|pair| (angle(pair).cos() as f32, angle(pair).sin() as f32)).collect::<Vec<_>>();
        for (layout, pairs) in [
            (RopeLayout::Interleaved, [(0, 1), (2, 3), (4, 5)]),
            (RopeLayout::HalfSplit, [(0, 3), (1, 4), (2, 5)]),
        ] {
            let mut rotated = x;
            rotate(&mut rotated, &angles, 1, dim, layout);
            for (pair, (a, b)) in pairs.into_iter().enumerate() {
                let expected = turned(x[a].into(), x[b].into(), position, pair, dim, base);
                let got = (f64::from(rotated[a]), f64::from(rotated[b]));
                assert!(
                    (got.0 - expected.0).abs() < 1e-5 && (got.1 - expected.1).abs() < 1e-5,
                    "{layout:?} {pair}"
                );
            }
        }
    }

    /// A GGUF file of no tensors.
    fn gguf(metadata: &[(&str, Value)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = metadata.iter().map(|(key, value)| (*key, value)).collect::<Vec<_>>();
        candle_core::quantized::gguf_file::write(&mut file.as_file(), &metadata, &[]).unwrap();
        file
    }

    fn refusal(path: &Path) -> String {
        match Model::load(path, Weights::Single, &Device::Cpu) {
            Ok(_) => panic!("{} was taken for a model", path.display()),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn what_is_no_model_is_refused_by_its_reason() {
        let text = |text: &str| Value::String(text.into());
        let said = refusal(gguf(&[("general.architecture", text("mamba"))]).path());
        assert!(said.contains("architecture mamba; only llama and qwen2"), "{said}");
        let said = refusal(gguf(&[("general.architecture", text("qwen2"))]).path());
        assert!(said.contains("no qwen2.attention.head_count"), "{said}");
        let heads = [
            ("general.architecture", text("qwen2")),
            ("qwen2.attention.head_count", Value::U32(14)),
            ("qwen2.attention.head_count_kv", Value::U32(3)),
            ("qwen2.embedding_length", Value::U32(896)),
            ("qwen2.block_count", Value::U32(1)),
            ("qwen2.context_length", Value::U32(64)),
            ("qwen2.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
            ("tokenizer.ggml.tokens", Value::Array(vec![text("a")])),
        ];
        let said = refusal(gguf(&heads).path());
        assert!(said.contains("14 heads of 64 dims over 3 KV heads"), "{said}");
        let mut heads = heads;
        heads[2].1 = Value::U32(2);
        let said = refusal(gguf(&heads).path());
        assert!(said.contains("no tensor blk.0.attn_norm.weight"), "{said}");
        let said = refusal(Path::new("Cargo.toml"));
        assert!(said.contains("Cargo.toml is no GGUF file"), "{said}");
    }

    #[test]
    fn a_file_that_ends_within_a_tensor_is_called_cut() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = |text: &str| Value::String(text.into());
        let metadata = [
            ("general.architecture", text("llama")),
            ("llama.attention.head_count", Value::U32(1)),
            ("llama.attention.head_count_kv", Value::U32(1)),
            ("llama.embedding_length", Value::U32(8)),
            ("llama.block_count", Value::U32(1)),
            ("llama.context_length", Value::U32(64)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
            ("tokenizer.ggml.tokens", Value::Array(vec![text("a")])),
        ];
        let metadata = metadata.iter().map(|(key, value)| (*key, value)).collect::<Vec<_>>();
        let norm = Tensor::ones(8, candle_core::DType::F32, &Device::Cpu).unwrap();
        let norm = QTensor::quantize(&norm, GgmlDType::F32).unwrap();
        candle_core::quantized::gguf_file::write(
            &mut file.as_file(),
            &metadata,
            &[("blk.0.attn_norm.weight", &norm)],
        )
        .unwrap();
        let said = refusal(file.path());
        assert!(said.contains("no tensor blk.0.attn_q.weight"), "the norm is whole: {said}");
        let bytes = file.as_file().metadata().unwrap().len();
        file.as_file().set_len(bytes - 4).unwrap();
        let said = refusal(file.path());
        assert!(said.contains("file is cut: blk.0.attn_norm.weight ends at byte"), "{said}");
    }
}
