//! The naive model: a sequence is its tokens' bytes, layer by layer, and a codec is ten lines of arithmetic.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Debug;
use std::ops::Range;

use kv_cache::half::{bf16, f16};
use kv_cache::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Elements that share their scales in `int4` and `int2`.
const GROUP: usize = 32;

/// An element type, with what the tests need of it.
pub trait Number: Element + PartialEq + Debug {
    const MAX: f32;
    /// Largest relative error of rounding to it.
    const ROUNDING: f32;
    const NAN: Self;
    const INFINITY: Self;
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
    /// As a scale is stored: rounded, and above the floor.
    fn scale(ideal: f32) -> f32;
}

impl Number for f16 {
    const MAX: f32 = 65504.0;
    const ROUNDING: f32 = 1.0 / 2048.0;
    const NAN: Self = f16::NAN;
    const INFINITY: Self = f16::INFINITY;
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn scale(ideal: f32) -> f32 {
        f16::from_f32(ideal).max(f16::from_bits(1)).to_f32()
    }
}

impl Number for bf16 {
    const MAX: f32 = 3.389_531_4e38;
    const ROUNDING: f32 = 1.0 / 256.0;
    const NAN: Self = bf16::NAN;
    const INFINITY: Self = bf16::INFINITY;
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn scale(ideal: f32) -> f32 {
        ideal.max(2f32.powi(-100))
    }
}

impl Number for f32 {
    const MAX: f32 = f32::MAX;
    const ROUNDING: f32 = f32::EPSILON;
    const NAN: Self = f32::NAN;
    const INFINITY: Self = f32::INFINITY;
    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn scale(ideal: f32) -> f32 {
        ideal.max(2f32.powi(-100))
    }
}

/// Codes and scale of one row.
pub fn int8_encode<E: Number>(row: &[E]) -> (Vec<i8>, f32) {
    let most = row.iter().fold(0f32, |most, x| most.max(x.to_f32().abs()));
    let scale = E::scale(most / 127.0);
    let code = |x: &E| (x.to_f32() / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
    (row.iter().map(code).collect(), scale)
}

/// What codes and a scale stand for.
pub fn int8_decode<E: Number>(codes: &[i8], scale: f32) -> Vec<E> {
    codes.iter().map(|&code| E::from_f32((f32::from(code) * scale).clamp(-E::MAX, E::MAX))).collect()
}

/// A row after it was stored as `int8`.
pub fn through_int8<E: Number>(row: &[E]) -> Vec<E> {
    let (codes, scale) = int8_encode(row);
    int8_decode(&codes, scale)
}

/// A row after it was stored in `format`. Formats other than `int8` go through the library's own scalar codec, which its unit tests
/// hold against a reference.
pub fn through<E: Number>(format: Format, row: &[E]) -> Vec<E> {
    match format {
        Format::Raw => return row.to_vec(),
        Format::Int8 => return through_int8(row),
        _ => {}
    }
    let of = RowFormat { format, element: E::TYPE, plane: Plane::Value, dim: row.len() };
    through_codec(of, row)
}

/// Rows that share their scales after they were stored.
fn through_codec<E: Number>(of: RowFormat, rows: &[E]) -> Vec<E> {
    let (kernels, count) = (kv_cache::codec::Kernels::scalar(), rows.len() / of.dim);
    let mut codes = vec![0; count * of.row_bytes()];
    let mut scales = vec![0; of.scales_bytes(count)];
    assert!(kernels.encode(of, bits(rows), &mut codes, &mut scales));
    let mut out = rows.to_vec();
    let row_bytes = of.dim * size_of::<E>();
    kernels.decode(of, 0, &codes, &scales, bytemuck::cast_slice_mut(&mut out), row_bytes);
    out
}

fn bits<E: Number>(row: &[E]) -> &[u8] {
    bytemuck::cast_slice(row)
}

/// By head, the group of tokens that was looked at last and its keys, stored once.
type Groups<E> = RefCell<HashMap<usize, (usize, Option<Vec<E>>)>>;

/// Keys and values of some tokens: `[layers, tokens, kv_heads, dim]`.
#[derive(Clone, Debug)]
pub struct Tokens<E> {
    pub layout: BlockLayout,
    pub ids: Vec<u32>,
    pub keys: Vec<E>,
    pub values: Vec<E>,
}

impl<E: Number> Tokens<E> {
    /// Rows of every kind: ordinary, zero, constant, tiny, and as large as the type goes.
    pub fn generate(layout: BlockLayout, tokens: usize, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut plane = |dim: usize| {
            let mut elements = Vec::with_capacity(layout.layers * tokens * layout.kv_heads * dim);
            for _ in 0..layout.layers * tokens * layout.kv_heads {
                let most = match rng.random_range(0..16) {
                    0 => 0.0,
                    1 => E::MAX,
                    2 => 1e-6,
                    _ => rng.random_range(0.5f32..8.0),
                };
                let constant = rng.random_range(0..16) == 0;
                let one = E::from_f32(rng.random_range(-1.0f32..1.0) * most);
                let mut next = || E::from_f32(rng.random_range(-1.0f32..1.0) * most);
                elements.extend((0..dim).map(|_| if constant { one } else { next() }));
            }
            elements
        };
        let (keys, values) = (plane(layout.key_dim), plane(layout.value_dim));
        let ids = (0..tokens).map(|_| rng.random()).collect();
        Tokens { layout, ids, keys, values }
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Tokens whose keys and values follow from their ids and from all ids before them, as a model computes them: sequences that share
    /// have equal content where they have equal ids. `also` stands for whatever else decides: the adapter, an image.
    pub fn computed(layout: BlockLayout, ids: &[u32], also: u64) -> Self {
        let mut chain = also;
        let token = |id: &u32| {
            // FNV-1a, four bytes at once.
            chain = (chain ^ u64::from(*id) ^ 0xCBF2_9CE4_8422_2325).wrapping_mul(0x0000_0100_0000_01B3);
            Self::generate(layout, 1, chain)
        };
        let each: Vec<Self> = ids.iter().map(token).collect();
        let layers = || (0..layout.layers as u32).flat_map(|layer| each.iter().map(move |one| (one, layer)));
        let keys = layers().flat_map(|(one, layer)| one.keys_of(layer)).copied().collect();
        let values = layers().flat_map(|(one, layer)| one.values_of(layer)).copied().collect();
        Tokens { layout, ids: ids.to_vec(), keys, values }
    }

    /// One of the tokens.
    #[allow(dead_code, reason = "not every test binary takes tokens apart")]
    pub fn token(&self, at: usize) -> Self {
        self.slice(at..at + 1)
    }

    /// Some of the tokens.
    #[allow(dead_code, reason = "not every test binary takes tokens apart")]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let of = |elements: &[E], dim: usize| {
            let token = self.layout.kv_heads * dim;
            let layers = elements.chunks_exact(self.len() * token);
            layers.flat_map(|layer| &layer[range.start * token..range.end * token]).copied().collect()
        };
        let (keys, values) = (of(&self.keys, self.layout.key_dim), of(&self.values, self.layout.value_dim));
        Tokens { layout: self.layout, ids: self.ids[range.clone()].to_vec(), keys, values }
    }

    /// `[tokens, kv_heads, key_dim]` of one layer.
    pub fn keys_of(&self, layer: u32) -> &[E] {
        let len = self.len() * self.layout.kv_heads * self.layout.key_dim;
        &self.keys[layer as usize * len..][..len]
    }

    /// `[tokens, kv_heads, value_dim]` of one layer.
    pub fn values_of(&self, layer: u32) -> &[E] {
        let len = self.len() * self.layout.kv_heads * self.layout.value_dim;
        &self.values[layer as usize * len..][..len]
    }
}

/// What a sequence must contain.
#[derive(Clone, Debug)]
pub struct Model<E> {
    layout: BlockLayout,
    tokens: u32,
    /// Per layer, `[tokens, kv_heads, dim]`.
    keys: Vec<Vec<E>>,
    values: Vec<Vec<E>>,
    /// Of groups of keys that were cut: how far apart their channels' elements were each time, summed, `[kv_heads, key_dim]`. They may
    /// have been stored together in a format whose scales they share.
    spans: HashMap<(usize, usize), Vec<f32>>,
}

impl<E: Number> Model<E> {
    pub fn new(layout: BlockLayout) -> Self {
        Model {
            layout,
            tokens: 0,
            keys: vec![Vec::new(); layout.layers],
            values: vec![Vec::new(); layout.layers],
            spans: HashMap::new(),
        }
    }

    pub fn len(&self) -> u32 {
        self.tokens
    }

    pub fn push(&mut self, tokens: &Tokens<E>) {
        self.push_some(tokens, tokens.len() as u32);
    }

    /// Adds the first `count` tokens.
    pub fn push_some(&mut self, tokens: &Tokens<E>, count: u32) {
        let count = count as usize * self.layout.kv_heads;
        for layer in 0..self.layout.layers {
            let (keys, values) = (tokens.keys_of(layer as u32), tokens.values_of(layer as u32));
            self.keys[layer].extend_from_slice(&keys[..count * self.layout.key_dim]);
            self.values[layer].extend_from_slice(&values[..count * self.layout.value_dim]);
        }
        self.tokens += (count / self.layout.kv_heads) as u32;
    }

    pub fn truncate(&mut self, tokens: u32) {
        let (cut, inside) = (tokens as usize / GROUP, tokens as usize % GROUP);
        self.spans.retain(|(_, group), _| *group < cut + usize::from(inside > 0));
        for layer in 0..if inside > 0 { self.layout.layers } else { 0 } {
            let spans = self.spans_of(layer, cut);
            let sums = self.spans.entry((layer, cut)).or_insert_with(|| vec![0.0; spans.len()]);
            sums.iter_mut().zip(spans).for_each(|(sum, span)| *sum += span);
        }
        self.tokens = self.tokens.min(tokens);
        let heads = self.tokens as usize * self.layout.kv_heads;
        self.keys.iter_mut().for_each(|layer| layer.truncate(heads * self.layout.key_dim));
        self.values.iter_mut().for_each(|layer| layer.truncate(heads * self.layout.value_dim));
    }

    /// `[tokens, kv_heads, dim]` of a range.
    pub fn rows(&self, plane: Plane, layer: u32, range: Range<u32>) -> &[E] {
        let per_token = self.layout.kv_heads * self.layout.dim(plane);
        let all = match plane {
            Plane::Key => &self.keys[layer as usize],
            Plane::Value => &self.values[layer as usize],
        };
        &all[range.start as usize * per_token..range.end as usize * per_token]
    }

    /// How far apart the elements of each channel of a group of tokens are, `[kv_heads, key_dim]`.
    fn spans_of(&self, layer: usize, group: usize) -> Vec<f32> {
        let channels = self.layout.kv_heads * self.layout.key_dim;
        let tokens = group * GROUP..((group + 1) * GROUP).min(self.tokens as usize);
        let keys = &self.keys[layer][tokens.start.min(tokens.end) * channels..tokens.end * channels];
        let span = |channel: usize| {
            let of = keys.iter().skip(channel).step_by(channels).map(|x| x.to_f32());
            of.clone().fold(f32::MIN, f32::max) - of.fold(f32::MAX, f32::min)
        };
        (0..channels).map(|channel| if keys.is_empty() { 0.0 } else { span(channel) }).collect()
    }

    /// Keys of a group and head, stored once, if the group is whole.
    fn keys_through(&self, format: Format, layer: usize, group: usize, head: usize) -> Option<Vec<E>> {
        let (dim, heads, first) = (self.layout.key_dim, self.layout.kv_heads, group * GROUP);
        if first + GROUP > self.tokens as usize {
            return None;
        }
        let row = |token: usize| &self.keys[layer][(token * heads + head) * dim..][..dim];
        let rows = (first..first + GROUP).flat_map(row).copied().collect::<Vec<_>>();
        let of = RowFormat { format, element: E::TYPE, plane: Plane::Key, dim };
        Some(through_codec(of, &rows))
    }

    /// Whether a key of a grouped format is as it was written and, if `sealed`, stored once. Where its group was cut meanwhile nobody knows
    /// what it was stored with, so there it is only as near as that lets it be.
    fn is_key(
        &self,
        format: Format,
        at: (usize, usize, usize),
        written: &[E],
        read: &[E],
        sealed: bool,
        groups: &Groups<E>,
    ) -> bool {
        let (layer, token, head) = at;
        if !sealed && bits(written) == bits(read) {
            return true;
        }
        let mut groups = groups.borrow_mut();
        let (group, once) = groups.entry(head).or_insert((usize::MAX, None));
        if *group != token / GROUP {
            (*group, *once) = (token / GROUP, self.keys_through(format, layer, token / GROUP, head));
        }
        let dim = self.layout.key_dim;
        if once.as_ref().is_some_and(|once| bits(&once[token % GROUP * dim..][..dim]) == bits(read)) {
            return true;
        }
        let Some(sums) = self.spans.get(&(layer, token / GROUP)) else { return false };
        let most = if format == Format::Int4 { 15.0 } else { 3.0 };
        let (spans, channels) = (self.spans_of(layer, token / GROUP), head * self.layout.key_dim..);
        let of_group = sums[channels.clone()].iter().zip(&spans[channels]);
        of_group.zip(written.iter().zip(read)).all(|((sum, span), (written, read))| {
            let off = (f64::from(written.to_f32()) - f64::from(read.to_f32())).abs();
            // Each time half a step of what the group spanned then, errors included.
            let (sum, span) = (f64::from(*sum), f64::from(*span));
            off <= 1.3 * (2.0 * sum + span) / most + 1e-6
        })
    }

    /// Every row is as it was written, byte for byte, or (in a lossy format) has been through the codec: once when its block
    /// was sealed, once more each time that its block was reopened and sealed again.
    pub fn compare(
        &self,
        layer: u32,
        range: Range<u32>,
        keys: &[E],
        values: &[E],
        format: impl Into<BlockFormat>,
    ) {
        let (block, groups) = (format.into(), Groups::default());
        self.compare_with(layer, range, keys, values, |plane, at, written, read| {
            let format = block.of(&self.layout, layer as usize, plane);
            if plane == Plane::Key && format.is_grouped() {
                return self.is_key(format, at, written, read, false, &groups);
            }
            let times = if format == Format::Raw { 0 } else { 4 };
            let mut row = written.to_vec();
            (0..=times).any(|time| {
                if time > 0 {
                    row = through(format, &row);
                }
                bits(&row) == bits(read)
            })
        });
    }

    /// Every row has been sealed exactly once.
    pub fn compare_sealed(
        &self,
        layer: u32,
        range: Range<u32>,
        keys: &[E],
        values: &[E],
        format: impl Into<BlockFormat>,
    ) {
        let (block, groups) = (format.into(), Groups::default());
        self.compare_with(layer, range, keys, values, |plane, at, written, read| {
            let format = block.of(&self.layout, layer as usize, plane);
            if plane == Plane::Key && format.is_grouped() {
                return self.is_key(format, at, written, read, true, &groups);
            }
            bits(&through(format, written)) == bits(read)
        });
    }

    /// Every row is as it was written, or has been through some formats, one after the other from the first. Returns how many rows had been through
    /// so many: those of none, those of the first, ….
    pub fn compare_down(
        &self,
        layer: u32,
        range: Range<u32>,
        keys: &[E],
        values: &[E],
        formats: &[Format],
    ) -> Vec<usize> {
        let counts = RefCell::new(vec![0; formats.len() + 1]);
        self.compare_with(layer, range, keys, values, |_, _, written, read| {
            let mut row = written.to_vec();
            for rung in 0..=formats.len() {
                if bits(&row) == bits(read) {
                    counts.borrow_mut()[rung] += 1;
                    return true;
                }
                if let Some(format) = formats.get(rung) {
                    row = through(*format, &row);
                }
            }
            false
        });
        counts.into_inner()
    }

    /// Every row is as it was written.
    pub fn compare_exact(&self, layer: u32, range: Range<u32>, keys: &[E], values: &[E]) {
        self.compare_with(layer, range, keys, values, |_, _, written, read| bits(written) == bits(read));
    }

    fn compare_with(
        &self,
        layer: u32,
        range: Range<u32>,
        keys: &[E],
        values: &[E],
        same: impl Fn(Plane, (usize, usize, usize), &[E], &[E]) -> bool,
    ) {
        for (plane, read) in [(Plane::Key, keys), (Plane::Value, values)] {
            let (written, dim) = (self.rows(plane, layer, range.clone()), self.layout.dim(plane));
            assert_eq!(read.len(), written.len(), "elements of {plane:?} tokens {range:?}");
            for (row, (written, read)) in written.chunks(dim).zip(read.chunks(dim)).enumerate() {
                let token = range.start as usize + row / self.layout.kv_heads;
                let head = row % self.layout.kv_heads;
                assert!(
                    same(plane, (layer as usize, token, head), written, read),
                    "{plane:?} of layer {layer}, token {token}, head {head}:\nwritten {written:?}\nread    {read:?}"
                );
            }
        }
    }
}
