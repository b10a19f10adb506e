//! Mean keys of a model, from which its keys are told apart: what makes few bits enough for keys with large constant channels.
//!
//! A model whose key projection has a bias (Qwen2), and many without one, gives every key of a head about the same large vector before
//! rotation. A format that shares one scale among the elements of a row then spends its codes on what all rows have in common.
//! With means, a sealed block holds `k - RoPE(mean)` and every read adds the same back. One mean a model, not a sequence: blocks stay
//! what any sequence may share.

use std::ops::Range;
use std::path::Path;

use kv_cache_actors::dropping::Positions;
use kv_cache_actors::format::RowFormat;
use kv_cache_actors::geometry::{Geometry, Rope, RopeLayout};
use serde::{Deserialize, Serialize};

use crate::backend::cpu::codec::{Kernels, RowCentres, finite_max};
use crate::error::BuildError;

/// Bytes that the turns of all blocks of the longest sequence may take: of 134 M tokens in blocks of 32, keys of 128 dims.
const TABLE_BYTES_MOST: u64 = 2 << 30;

/// Mean keys of a model before rotation, `[layers, kv_heads, key_dim]`: a small file, made once from any text by
/// [`KeyMeansBuilder`] and named by [`Quantisation::key_means`](crate::Quantisation::key_means).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyMeans {
    layers: u32,
    kv_heads: u32,
    key_dim: u32,
    /// How the keys were rotated.
    rope: Option<Rope>,
    /// Tokens that they are the mean of.
    tokens: u64,
    means: Vec<f32>,
}

impl KeyMeans {
    /// Reads a file that [`KeyMeans::save`] has written.
    ///
    /// # Errors
    /// [`BuildError::KeyMeans`]: the file cannot be read, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, BuildError> {
        let path = path.as_ref();
        let failed = |reason: String| BuildError::KeyMeans { file: path.display().to_string(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let means: KeyMeans = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
        let expected = [means.layers, means.kv_heads, means.key_dim].map(|n| n as usize);
        if expected.iter().try_fold(1usize, |all, n| all.checked_mul(*n)) != Some(means.means.len()) {
            return Err(failed(format!("{} numbers for {expected:?}", means.means.len())));
        }
        if let Some(at) = means.means.iter().position(|mean| !mean.is_finite()) {
            return Err(failed(format!("number {at} is {}", means.means[at])));
        }
        Ok(means)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`BuildError::KeyMeans`]: it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), BuildError> {
        let path = path.as_ref();
        let written = serde_json::to_string(self)
            .map_err(|error| error.to_string())
            .and_then(|text| std::fs::write(path, text).map_err(|error| error.to_string()));
        written.map_err(|reason| BuildError::KeyMeans { file: path.display().to_string(), reason })
    }

    /// The mean of one head of a layer, before rotation; none if there is no such head.
    pub fn mean(&self, layer: u32, head: u32) -> Option<&[f32]> {
        let (at, dim) = (layer as usize * self.kv_heads as usize + head as usize, self.key_dim as usize);
        (head < self.kv_heads).then(|| self.means.get(at * dim..(at + 1) * dim)).flatten()
    }

    /// All of them, as part of what makes a block what it is.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.means.iter().flat_map(|mean| mean.to_le_bytes()).collect()
    }
}

/// Gathers the mean keys of a model from what it computes on some text: a few thousand tokens are plenty.
///
/// ```
/// use kv_cache::{ElementType, Geometry, KeyMeansBuilder};
///
/// let geometry = Geometry::new(1, 1, 4, ElementType::F16);
/// let mut means = KeyMeansBuilder::new(&geometry)?;
/// // Keys of two tokens of layer 0, as the model would append them: `[tokens, kv_heads, key_dim]`.
/// means.add(0, 0, &[1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0, 0.0]);
/// let means = means.finish()?;
/// assert_eq!(means.mean(0, 0), Some(&[2.0, 2.0, 2.0, 2.0][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct KeyMeansBuilder {
    layers: u32,
    kv_heads: u32,
    key_dim: u32,
    rope: Option<Rope>,
    sums: Vec<f64>,
    /// Of each layer.
    tokens: Vec<u64>,
}

impl KeyMeansBuilder {
    /// For a model of this geometry, whose [`Rope`] says how keys are rotated.
    ///
    /// # Errors
    /// [`crate::ConfigError`] for a geometry that no cache would take.
    pub fn new(geometry: &Geometry) -> Result<Self, crate::ConfigError> {
        geometry.layout()?;
        let group = &geometry.groups[0];
        let (layers, kv_heads, key_dim) = (group.layers, group.kv_heads, group.key_dim);
        let sums = vec![0.0; layers as usize * kv_heads as usize * key_dim as usize];
        let (rope, tokens) = (group.rope.clone(), vec![0; layers as usize]);
        Ok(KeyMeansBuilder { layers, kv_heads, key_dim, rope, sums, tokens })
    }

    /// Adds keys of one layer, rotated, of consecutive tokens from `position` on: `[tokens, kv_heads, key_dim]`. What is left over of
    /// an incomplete token, or of a layer that does not exist, is not looked at.
    pub fn add(&mut self, layer: u32, position: u32, keys: &[f32]) {
        let Some(tokens) = self.tokens.get_mut(layer as usize) else { return };
        let (heads, dim) = (self.kv_heads as usize, self.key_dim as usize);
        let sums = &mut self.sums[layer as usize * heads * dim..][..heads * dim];
        for (at, token) in keys.chunks_exact(heads * dim).enumerate() {
            *tokens += 1;
            // Back by the angle that it was rotated by.
            let turns = self.rope.as_ref().map(|rope| turns(rope, f64::from(position) + at as f64));
            for (key, sums) in token.chunks_exact(dim).zip(sums.chunks_exact_mut(dim)) {
                let mut key: Vec<f64> = key.iter().copied().map(f64::from).collect();
                if let (Some(rope), Some(turns)) = (&self.rope, &turns) {
                    unrotate(rope, turns, &mut key);
                }
                sums.iter_mut().zip(key).for_each(|(sum, x)| *sum += x);
            }
        }
    }

    /// The means. Those of layers of which nothing was added are 0, which changes nothing.
    ///
    /// # Errors
    /// Nothing was added, or what was is not finite.
    pub fn finish(self) -> Result<KeyMeans, KeyMeansError> {
        let KeyMeansBuilder { layers, kv_heads, key_dim, rope, sums, tokens } = self;
        let per_layer = kv_heads as usize * key_dim as usize;
        let mean = |(at, sum): (usize, &f64)| (sum / tokens[at / per_layer].max(1) as f64) as f32;
        let means: Vec<f32> = sums.iter().enumerate().map(mean).collect();
        if let Some(at) = means.iter().position(|mean| !mean.is_finite()) {
            return Err(KeyMeansError::NotFinite { layer: (at / per_layer) as u32 });
        }
        let tokens = tokens.iter().copied().max().unwrap_or_default();
        if tokens == 0 {
            return Err(KeyMeansError::NoKeys);
        }
        Ok(KeyMeans { layers, kv_heads, key_dim, rope, tokens, means })
    }
}

/// Why there are no mean keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyMeansError {
    /// Nothing was added.
    #[error("there are no keys to take the mean of: add some of every layer")]
    NoKeys,
    /// A key that was added is not finite, or they are too large for a mean.
    #[error(
        "the mean of the keys of layer {layer} is not finite: leave out keys that are not, and compute in a wider type"
    )]
    NotFinite {
        /// Which layer.
        layer: u32,
    },
}

/// A key of one head before rotation, from what it is behind its `turns`.
pub(crate) fn unrotate(rope: &Rope, turns: &[(f64, f64)], key: &mut [f64]) {
    // Both the key and the turns have the scale.
    let length = f64::from(rope.attention_scale) * f64::from(rope.attention_scale);
    for (pair, (cos, sin)) in turns.iter().enumerate() {
        let (a, b) = dims_of(rope.layout, turns.len(), pair);
        let (x, y) = (key[a], key[b]);
        (key[a], key[b]) = ((x * cos + y * sin) / length, (y * cos - x * sin) / length);
    }
}

/// Cosine and sine of every pair at a position, both times the scale of the attention.
pub(crate) fn turns(rope: &Rope, position: f64) -> Vec<(f64, f64)> {
    let scale = f64::from(rope.attention_scale);
    let turn = |freq: &f32| {
        let (sin, cos) = (position * f64::from(*freq)).sin_cos();
        (cos * scale, sin * scale)
    };
    rope.inv_freq.iter().map(turn).collect()
}

/// The dims that pair number `pair` of `pairs` rotates.
pub(crate) fn dims_of(layout: RopeLayout, pairs: usize, pair: usize) -> (usize, usize) {
    match layout {
        RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
        RopeLayout::HalfSplit => (pair, pair + pairs),
    }
}

/// Whether keys are rotated alike, as far as a file of the one's frequencies can tell.
fn turn_alike(rope: &Rope, other: &Rope) -> bool {
    let near = |a: f32, b: f32| (a - b).abs() <= 1e-6 * a.abs().max(b.abs());
    rope.rotary_dims == other.rotary_dims
        && rope.inv_freq.len() == other.inv_freq.len()
        && rope.layout == other.layout
        && near(rope.attention_scale, other.attention_scale)
        && rope.inv_freq.iter().zip(&other.inv_freq).all(|(a, b)| near(*a, *b))
}

/// The means as a device uses them: where the mean key lies at any position of any block.
///
/// The centre of a key is its head's mean, rotated as the key was: by the turn of the block that it was written to, once for all keys of a head in it, and then by
/// that of its place there. Where tokens were dropped by their scores it may be in another block by now, at another place: its position counts. The [codec](crate::backend::cpu::codec) has the arithmetic: every device finds the same numbers.
#[derive(Debug)]
pub(crate) struct Centres {
    kv_heads: usize,
    key_dim: usize,
    block_tokens: usize,
    /// Pairs that rotate; the dims behind them do not.
    pub(crate) pairs: usize,
    pub(crate) layout: RopeLayout,
    /// `[layers, kv_heads, key_dim]`
    pub(crate) means: Vec<f32>,
    /// `[blocks, pairs]`, cosine and sine.
    pub(crate) block_turns: Vec<[f32; 2]>,
    /// `[block_tokens, pairs]`, the cosines and the sines.
    pub(crate) token_turns: [Vec<f32>; 2],
}

impl Centres {
    /// For sequences of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// In words, if the means are those of another geometry, or too large for its elements, or the tables would be too large.
    pub(crate) fn new(means: &KeyMeans, geometry: &Geometry, max_tokens: u32) -> Result<Centres, String> {
        let group = &geometry.groups[0];
        let (of_means, of_cache) =
            ([means.layers, means.kv_heads, means.key_dim], [group.layers, group.kv_heads, group.key_dim]);
        if of_means != of_cache {
            return Err(format!(
                "they are of [layers, kv_heads, key_dim] {of_means:?}, the cache of {of_cache:?}: calibrate this model"
            ));
        }
        let rotated_alike = match (&means.rope, &group.rope) {
            (Some(rope), Some(of_cache)) => turn_alike(rope, of_cache),
            (rope, of_cache) => rope.is_none() && of_cache.is_none(),
        };
        if !rotated_alike {
            return Err("keys were rotated in another way than `rope` of the cache's geometry says when they were made: calibrate this model".to_owned());
        }
        let pairs = group.rope.as_ref().map_or(0, |rope| rope.inv_freq.len());
        let table_bytes = u64::from(max_tokens).div_ceil(u64::from(geometry.block_tokens))
            * pairs as u64
            * size_of::<[f32; 2]>() as u64;
        if table_bytes > TABLE_BYTES_MOST {
            return Err(format!(
                "max_tokens = {max_tokens} wants a table of {table_bytes} bytes, of {TABLE_BYTES_MOST} at most: use fewer, or larger blocks"
            ));
        }
        let table = |positions: &mut dyn Iterator<Item = u64>, rope: &Rope| -> Vec<[f32; 2]> {
            positions
                .flat_map(|position| turns(rope, position as f64))
                .map(|(cos, sin)| [cos as f32, sin as f32])
                .collect()
        };
        let block_tokens = u64::from(geometry.block_tokens);
        let (block_turns, token_turns) = match &group.rope {
            None => Default::default(),
            Some(rope) => {
                let blocks = u64::from(max_tokens).div_ceil(block_tokens);
                // The scale is in the block's turn, and must not be there twice.
                let unscaled = Rope { attention_scale: 1.0, ..rope.clone() };
                let starts = &mut (0..blocks).map(|block| block * block_tokens);
                let of_tokens = table(&mut (0..block_tokens), &unscaled);
                (table(starts, rope), [0, 1].map(|part| of_tokens.iter().map(|turn| turn[part]).collect()))
            }
        };
        let centres = Centres {
            kv_heads: group.kv_heads as usize,
            key_dim: group.key_dim as usize,
            block_tokens: geometry.block_tokens as usize,
            pairs,
            layout: group.rope.as_ref().map_or(RopeLayout::Interleaved, |rope| rope.layout),
            means: means.means.clone(),
            block_turns,
            token_turns,
        };
        let (most, room) = (centres.bound(), finite_max(group.element) / 2.0);
        // A key and its centre are both in range then. What they differ by may be up to half as large again: if it is, it is cut to what the
        // element type has, in the formats that do not hold it in f32.
        if most > room {
            return Err(format!(
                "a mean key may be as large as {most:e} where it stands, of {room:e} at most in {:?}: calibrate this model",
                group.element
            ));
        }
        Ok(centres)
    }

    /// No centre is larger, wherever it stands.
    pub(crate) fn bound(&self) -> f32 {
        let most = |all: &mut dyn Iterator<Item = f32>| all.fold(0.0, f32::max);
        let mean = most(&mut self.means.iter().map(|x| x.abs()));
        // A turn of a pair is no longer than the turn is, and that of a block has the scale of the rotation in it.
        let turn = most(&mut self.block_turns.iter().map(|[cos, sin]| cos.hypot(*sin)));
        1.01 * std::f32::consts::SQRT_2 * mean * turn.max(1.0)
    }

    /// Encodes rows, one after the other, less their centres. True if all is finite. See [`Kernels::encode`].
    pub(crate) fn encode(
        &self,
        kernels: Kernels,
        keys: &Keys,
        of: RowFormat,
        rows: &[u8],
        [codes, scales]: [&mut [u8]; 2],
        scratch: &mut Scratch,
    ) -> bool {
        let differences = of.of_differences();
        let elements = [of.element, differences.element];
        let [from, to] = elements.map(|element| of.dim * element.bytes());
        let less = scratch.get(keys.tokens.len() * to);
        self.runs(keys, |first, centres| {
            let of_run = first..first + centres.rows;
            let (src, dst) = (of_run.start * from..of_run.end * from, of_run.start * to..of_run.end * to);
            kernels.subtract_centres(elements, centres, &rows[src], &mut less[dst]);
        });
        kernels.encode(differences, less, codes, scales)
    }

    /// Decodes rows that begin `stride` bytes apart, with their centres: the inverse of [`Centres::encode`]. See [`Kernels::decode`].
    #[expect(clippy::too_many_arguments, reason = "those of a codec, and what is its own")]
    pub(crate) fn decode(
        &self,
        kernels: Kernels,
        keys: &Keys,
        of: RowFormat,
        skip: usize,
        [codes, scales]: [&[u8]; 2],
        rows: &mut [u8],
        stride: usize,
        scratch: &mut Scratch,
    ) {
        let differences = of.of_differences();
        if !of.format.is_rotated() {
            kernels.decode(of, skip, codes, scales, rows, stride);
            return self.runs(keys, |first, centres| {
                kernels.add_centres_in_place(of.element, centres, &mut rows[first * stride..], stride);
            });
        }
        let row = of.dim * differences.element.bytes();
        let less = scratch.get(keys.tokens.len() * row);
        kernels.decode(differences, skip, codes, scales, less, row);
        self.runs(keys, |first, centres| {
            let src = &less[first * row..(first + centres.rows) * row];
            kernels.add_centres(of.element, centres, src, &mut rows[first * stride..], stride);
        });
    }

    /// Calls `then` with the centres of all rows, in order, and which is the first: at once of those whose tokens follow each other as they would in
    /// a block of their own.
    fn runs(&self, keys: &Keys, mut then: impl FnMut(usize, &RowCentres)) {
        match keys.positions {
            Positions::Contiguous(first) => {
                debug_assert!(first.is_multiple_of(self.block_tokens as u32), "no block begins at {first}");
                then(0, &self.of(keys, *first as usize / self.block_tokens, keys.tokens.clone()));
            }
            Positions::PerToken(each) => {
                let block = |position: u32| position as usize / self.block_tokens;
                let is_next = |a: &u32, b: &u32| a + 1 == *b && block(*a) == block(*b);
                let mut done = 0;
                for run in each[keys.tokens.clone()].chunk_by(is_next) {
                    let token = run[0] as usize % self.block_tokens;
                    then(done, &self.of(keys, block(run[0]), token..token + run.len()));
                    done += run.len();
                }
            }
        }
    }

    /// Of the head, where tokens of a block of any sequence lie that nothing was dropped from.
    fn of(&self, keys: &Keys, block: usize, tokens: Range<usize>) -> RowCentres<'_> {
        let mean = (keys.layer * self.kv_heads + keys.head) * self.key_dim;
        let turn = block * self.pairs;
        let of_tokens = tokens.start * self.pairs..tokens.end * self.pairs;
        RowCentres {
            rows: tokens.len(),
            mean: &self.means[mean..mean + self.key_dim],
            turn: &self.block_turns[turn..turn + self.pairs],
            row_turns: self.token_turns.each_ref().map(|of_all| &of_all[of_tokens.clone()]),
            layout: self.layout,
        }
    }
}

/// Scratch for rows on their way to or from a codec, kept for the next ones.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Vec<u8>);

impl Scratch {
    /// So many bytes, whatever they are, from the beginning of a cache line on.
    fn get(&mut self, bytes: usize) -> &mut [u8] {
        const LINE: usize = 64;
        if self.0.len() < bytes + LINE - 1 {
            self.0.resize(bytes + LINE - 1, 0);
        }
        let line = self.0.as_ptr().align_offset(LINE);
        &mut self.0[line..][..bytes]
    }
}

/// Keys of one head in one block.
#[derive(Debug, Clone)]
pub(crate) struct Keys<'a> {
    pub(crate) layer: usize,
    pub(crate) head: usize,
    /// Of the block's tokens.
    pub(crate) positions: &'a Positions,
    /// Of the block.
    pub(crate) tokens: Range<usize>,
}

#[cfg(test)]
mod tests {
    use kv_cache_actors::geometry::ElementType;

    use super::*;

    /// Rows less their centres, in their own type.
    fn subtract(centres: &Centres, keys: &Keys, element: ElementType, rows: &[u8], to: &mut [u8]) {
        let row = centres.key_dim * element.bytes();
        centres.runs(keys, |first, of_run| {
            let bytes = first * row..(first + of_run.rows) * row;
            Kernels::best().subtract_centres([element; 2], of_run, &rows[bytes.clone()], &mut to[bytes]);
        });
    }

    /// Rows of f32 with their centres, `stride` bytes apart.
    fn add(centres: &Centres, keys: &Keys, rows: &mut [u8], stride: usize) {
        centres.runs(keys, |first, of_run| {
            let rows = &mut rows[first * stride..];
            Kernels::best().add_centres_in_place(ElementType::F32, of_run, rows, stride);
        });
    }

    /// Keys of a head that are its mean, rotated by the definition, in f64.
    fn rotated(mean: &[f64], rope: &Rope, position: u32) -> Vec<f64> {
        let mut key = mean.to_vec();
        for (pair, freq) in rope.inv_freq.iter().enumerate() {
            let (a, b) = match rope.layout {
                RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                RopeLayout::HalfSplit => (pair, pair + rope.inv_freq.len()),
            };
            let (sin, cos) = (f64::from(position) * f64::from(*freq)).sin_cos();
            let scale = f64::from(rope.attention_scale);
            (key[a], key[b]) =
                (scale * (mean[a] * cos - mean[b] * sin), scale * (mean[a] * sin + mean[b] * cos));
        }
        key
    }

    fn geometry(rope: Option<Rope>) -> Geometry {
        let mut geometry = Geometry::new(2, 3, 10, ElementType::F32).block_tokens(4);
        geometry.groups[0].rope = rope;
        geometry
    }

    fn ropes() -> Vec<Rope> {
        let rope = |layout, rotary_dims, attention_scale| Rope {
            inv_freq: (0..rotary_dims / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / 10.0)).collect(),
            rotary_dims,
            layout,
            attention_scale,
        };
        vec![
            rope(RopeLayout::Interleaved, 10, 1.0),
            rope(RopeLayout::HalfSplit, 10, 1.0),
            rope(RopeLayout::HalfSplit, 6, 1.25),
        ]
    }

    #[test]
    fn keys_that_are_the_mean_are_centred_to_nothing_wherever_they_stand() {
        for rope in ropes() {
            let geometry = geometry(Some(rope.clone()));
            let mean = |layer: u32, head: u32| -> Vec<f64> {
                (0..10).map(|dim| f64::from(layer * 31 + head * 7 + dim) - 20.0).collect()
            };
            let keys = |layer, token: u32| -> Vec<f32> {
                (0..3).flat_map(|head| rotated(&mean(layer, head), &rope, token)).map(|x| x as f32).collect()
            };
            let mut builder = KeyMeansBuilder::new(&geometry).unwrap();
            for layer in 0..2 {
                for chunk in [0..50, 50..131] {
                    let all: Vec<f32> = chunk.clone().flat_map(|token| keys(layer, token)).collect();
                    builder.add(layer, chunk.start, &all);
                }
            }
            let means = builder.finish().unwrap();
            for (got, expected) in means.mean(1, 2).unwrap().iter().zip(mean(1, 2)) {
                assert!((f64::from(*got) - expected).abs() < 1e-4, "{got} {expected}");
            }
            let centres = Centres::new(&means, &geometry, 4001).unwrap();
            for position in [0, 4, 96, 4000] {
                for (layer, head) in [(0, 0), (1, 2)] {
                    let tokens = 1..4;
                    let rows: Vec<f32> = tokens
                        .clone()
                        .flat_map(|token| keys(layer, position + token)[10 * head..10 * (head + 1)].to_vec())
                        .collect();
                    let positions = &Positions::Contiguous(position);
                    let which = Keys { layer: layer as usize, head, positions, tokens: 1..4 };
                    let mut bytes = vec![0; size_of_val(&rows[..])];
                    subtract(&centres, &which, ElementType::F32, bytemuck::cast_slice(&rows), &mut bytes);
                    let left: Vec<f32> = bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
                    assert!(left.iter().all(|x| x.abs() < 1e-3), "{position}: {left:?}");
                    add(&centres, &which, &mut bytes, 40);
                    for (got, x) in bytes.chunks_exact(4).zip(&rows) {
                        let got: f32 = bytemuck::pod_read_unaligned(got);
                        assert!((got - x).abs() < 1e-5 * x.abs().max(1.0), "{got} {x}");
                    }
                }
            }
        }
    }

    #[test]
    fn tokens_put_together_are_centred_where_they_stood() {
        for rope in ropes() {
            let geometry = geometry(Some(rope.clone()));
            let mean: Vec<f64> = (0..10).map(|dim| f64::from(dim) * 7.0 - 30.0).collect();
            let mut builder = KeyMeansBuilder::new(&geometry).unwrap();
            let of_all: Vec<f32> = rotated(&mean, &rope, 0).iter().map(|x| *x as f32).collect();
            builder.add(0, 0, &of_all.repeat(3));
            let centres = Centres::new(&builder.finish().unwrap(), &geometry, 4001).unwrap();
            let element = ElementType::F32;
            // Blocks are of four tokens: some of one, over a border, and far apart.
            let each = [6, 7, 8, 4000];
            let rows: Vec<f32> =
                each.iter().flat_map(|at| rotated(&mean, &rope, *at)).map(|x| x as f32).collect();
            let bytes: &[u8] = bytemuck::cast_slice(&rows);
            let positions = Positions::PerToken(each.into());
            for tokens in [0..4, 1..3, 3..4] {
                let keys = Keys { layer: 0, head: 1, positions: &positions, tokens: tokens.clone() };
                let bytes = &bytes[tokens.start * 40..tokens.end * 40];
                let mut left = vec![0; bytes.len()];
                subtract(&centres, &keys, element, bytes, &mut left);
                for x in left.chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>) {
                    assert!(x.abs() < 1e-3, "{tokens:?}: {x}");
                }
                // With room between them, back to where they were.
                let mut apart = vec![0; tokens.len() * 56];
                apart
                    .chunks_exact_mut(56)
                    .zip(left.chunks_exact(40))
                    .for_each(|(to, row)| to[..40].copy_from_slice(row));
                add(&centres, &keys, &mut apart, 56);
                for (got, row) in apart.chunks_exact(56).zip(bytes.chunks_exact(40)) {
                    let off = |(a, b): (&[u8], &[u8])| {
                        (bytemuck::pod_read_unaligned::<f32>(a) - bytemuck::pod_read_unaligned::<f32>(b))
                            .abs()
                    };
                    let most = got.chunks_exact(4).zip(row.chunks_exact(4)).map(off).fold(0.0, f32::max);
                    assert!(most < 1e-3, "{tokens:?}: off by {most}");
                    assert!(got[40..].iter().all(|byte| *byte == 0));
                }
            }
            // Those of a block as it was written are the same to the bit.
            for (positions, first) in [([96, 97, 98, 99], 96), ([4000, 4001, 4002, 4003], 4000)] {
                let [mut by_each, mut by_first] = [vec![0; 160], vec![0; 160]];
                for (positions, to) in [
                    (Positions::PerToken(positions.into()), &mut by_each),
                    (Positions::Contiguous(first), &mut by_first),
                ] {
                    let keys = Keys { layer: 0, head: 2, positions: &positions, tokens: 0..4 };
                    subtract(&centres, &keys, element, bytes, to);
                }
                assert_eq!(by_each, by_first);
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_so_and_what_is_large_stays_finite() {
        let geometry = Geometry::new(1, 1, 4, ElementType::F16);
        let mut builder = KeyMeansBuilder::new(&geometry).unwrap();
        builder.add(0, 0, &[-20000.0, 1.0, 1.0, 1.0]);
        let centres = Centres::new(&builder.finish().unwrap(), &geometry, 100).unwrap();
        let row = [60000.0, f32::NAN, f32::INFINITY, 1.0].map(half::f16::from_f32);
        let mut bytes = [0; 8];
        let keys = Keys { layer: 0, head: 0, positions: &Positions::Contiguous(64), tokens: 3..4 };
        subtract(&centres, &keys, ElementType::F16, bytemuck::cast_slice(&row), &mut bytes);
        let row: Vec<half::f16> = bytes.chunks_exact(2).map(bytemuck::pod_read_unaligned).collect();
        assert_eq!(row[0], half::f16::MAX);
        assert!(row[1].is_nan());
        assert_eq!((row[2], row[3]), (half::f16::INFINITY, half::f16::ZERO));
    }

    #[test]
    fn files_come_back_as_they_were_and_wrong_ones_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("means.json");
        let mut builder = KeyMeansBuilder::new(&geometry(None)).unwrap();
        builder.add(1, 0, &(0..60).map(|x| x as f32 / 7.0).collect::<Vec<_>>());
        let means = builder.finish().unwrap();
        means.save(&path).unwrap();
        assert_eq!(KeyMeans::load(&path).unwrap(), means);
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            KeyMeans::load(&path).unwrap_err().to_string()
        };
        let of = |numbers: &str| {
            format!(r#"{{"layers":1,"kv_heads":1,"key_dim":2,"rope":null,"tokens":5,"means":{numbers}}}"#)
        };
        assert!(refused(&of("[1.0]")).contains("1 numbers for [1, 1, 2]"));
        assert!(refused(&of("[1.0, 1e99]")).contains("means.json"));
        assert!(refused("{").contains("means.json"));
        assert!(KeyMeans::load(folder.path().join("none")).is_err());
        let other = Geometry::new(1, 1, 4, ElementType::F16);
        assert!(Centres::new(&means, &other, 10).unwrap_err().contains("[2, 3, 10]"));
    }

    #[test]
    fn means_that_no_model_has_are_refused() {
        let one = |geometry: &Geometry, key: [f32; 10]| {
            let mut builder = KeyMeansBuilder::new(geometry).unwrap();
            builder.add(0, 0, &key.repeat(3));
            builder.finish()
        };
        let [interleaved, half_split, in_part] = ropes().try_into().unwrap();
        let rotated = geometry(Some(half_split.clone()));
        assert_eq!(KeyMeansBuilder::new(&rotated).unwrap().finish(), Err(KeyMeansError::NoKeys));
        assert_eq!(one(&rotated, [f32::NAN; 10]), Err(KeyMeansError::NotFinite { layer: 0 }));
        let means = one(&rotated, [2.0; 10]).unwrap();
        Centres::new(&means, &rotated, 1000).unwrap();
        let other = Rope { inv_freq: vec![0.5; 5], ..half_split };
        for rope in [Some(interleaved), Some(in_part), Some(other), None] {
            let refused = Centres::new(&means, &geometry(rope), 1000).unwrap_err();
            assert!(refused.contains("rotated in another way"), "{refused}");
        }
        assert!(Centres::new(&means, &rotated, u32::MAX).unwrap_err().contains("max_tokens = 4294967295"));
        let mut of_halves = rotated.clone();
        of_halves.groups[0].element = ElementType::F16;
        let large = one(&rotated, [30_000.0; 10]).unwrap();
        Centres::new(&large, &rotated, 1000).unwrap();
        assert!(Centres::new(&large, &of_halves, 1000).unwrap_err().contains("at most in F16"));
    }
}
