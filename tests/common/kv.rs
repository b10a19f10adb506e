//! Keys and values that a real model has computed: `tests/data/kv.safetensors` holds layers 2, 14 and 27 of SmolLM2-135M over the first 128
//! tokens of the Brown corpus, in f32.
//!
//! ```text
//! cargo run --release --example quality -- --dump-kv tests/data/kv.safetensors --layers 2,14,27 --tokens 128
//! ```

use std::path::Path;

use anyhow::{Context, ensure};
use half::{bf16, f16};
use kv_cache::codec::Kernels;
use kv_cache::cold::{Element, Shape};
use kv_cache::{ElementType, Format, Plane, RowFormat};
use serde_json::Value;

/// Tokens of a block.
pub(crate) const BLOCK_TOKENS: usize = 32;

/// What `quality --dump-kv` has written.
pub(crate) struct Kv {
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    /// Of each layer keys and values, `[tokens, heads, dim]`.
    pub(crate) layers: Vec<[Vec<f32>; 2]>,
}

impl Kv {
    /// # Errors
    /// If the file cannot be read, or holds something else.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Kv> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let (len, rest) = bytes.split_first_chunk().context("no header")?;
        let header = rest.get(..u64::from_le_bytes(*len) as usize).context("a short header")?;
        let data = &rest[header.len()..];
        let header: serde_json::Map<String, Value> = serde_json::from_slice(header)?;
        let number = |value: &Value| value.as_u64().map(|n| n as usize);
        let tensor = |name: &str| -> anyhow::Result<(Vec<usize>, Vec<f32>)> {
            let entry = &header[name];
            ensure!(entry["dtype"] == "F32", "{name} is {}", entry["dtype"]);
            let shape = entry["shape"].as_array().context("no shape")?.iter().filter_map(number).collect();
            let [first, end] = [0, 1].map(|at| number(&entry["data_offsets"][at]));
            let bytes =
                data.get(first.context("no offset")?..end.context("no offset")?).context("cut short")?;
            Ok((shape, bytes.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect()))
        };
        let layer = |name: &String| name.strip_prefix("layers.")?.strip_suffix(".keys")?.parse().ok();
        let mut numbers = header.keys().filter_map(layer).collect::<Vec<u32>>();
        numbers.sort_unstable();
        let mut kv = Kv { tokens: 0, heads: 0, dim: 0, layers: Vec::new() };
        for number in numbers {
            let (shape, keys) = tensor(&format!("layers.{number}.keys"))?;
            let (_, values) = tensor(&format!("layers.{number}.values"))?;
            let [tokens, heads, dim] = shape[..] else { anyhow::bail!("a shape of {shape:?}") };
            ensure!(
                keys.len() == tokens * heads * dim && values.len() == keys.len(),
                "{} numbers",
                keys.len()
            );
            (kv.tokens, kv.heads, kv.dim) = (tokens, heads, dim);
            kv.layers.push([keys, values]);
        }
        ensure!(!kv.layers.is_empty(), "no layers");
        Ok(kv)
    }

    /// The file that lies beside the tests.
    ///
    /// # Errors
    /// As [`Kv::read`].
    pub(crate) fn fixture() -> anyhow::Result<Kv> {
        Kv::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/kv.safetensors"))
    }

    /// Full blocks, as they lie in slots: raw in floats, the codes of sealed ones in `Int8`.
    pub(crate) fn blocks(&self, element: Element) -> Vec<Vec<u8>> {
        (0..self.tokens / BLOCK_TOKENS).map(|block| self.block(element, block)).collect()
    }

    /// Of one block.
    pub(crate) fn shape(&self) -> Shape {
        let [layers, kv_heads, dim] = [self.layers.len(), self.heads, self.dim].map(|n| n as u32);
        Shape { layers, kv_heads, tokens: BLOCK_TOKENS as u32, key_dim: dim, value_dim: dim }
    }

    fn block(&self, element: Element, block: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for tensor in self.layers.iter().flatten() {
            for head in 0..self.heads {
                let rows = (0..BLOCK_TOKENS).flat_map(|token| {
                    let row = ((block * BLOCK_TOKENS + token) * self.heads + head) * self.dim;
                    &tensor[row..row + self.dim]
                });
                match element {
                    Element::F32 => bytes.extend(rows.flat_map(|x| x.to_le_bytes())),
                    Element::Bf16 => bytes.extend(rows.flat_map(|x| bf16::from_f32(*x).to_le_bytes())),
                    Element::F16 => bytes.extend(rows.flat_map(|x| f16::from_f32(*x).to_le_bytes())),
                    Element::Int8 => {
                        let raw = rows.flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect::<Vec<_>>();
                        let (format, plane) = (Format::Int8, Plane::Value);
                        let rows = RowFormat { format, element: ElementType::F16, plane, dim: self.dim };
                        let at = bytes.len();
                        bytes.resize(at + raw.len() / 2, 0);
                        let mut scales = vec![0; rows.scales_bytes(BLOCK_TOKENS)];
                        assert!(Kernels::tuned().encode(rows, &raw, &mut bytes[at..], &mut scales));
                    }
                }
            }
        }
        bytes
    }
}
