//! What the sequences hold: keys and values that anybody can compute again from a seed, and the check of what was read.
//!
//! A *token seed* (64 bits) decides all rows of a token. It follows from the token's id and from all ids before it, as keys and values
//! of a model do: sequences with equal beginnings may share them, and nothing else is equal. A row takes one hash; its
//! elements are a few 16-bit operations each, so that compilers vectorise them and the generator never dominates.
//! The hash also decides the largest magnitude of the row, which makes the bound of lossy formats exact, not a guess.

use std::fmt;

use half::f16;
use kv_cache::Format;

use crate::mix::mix;

/// Bits of an f16 that hold the mantissa.
const MANTISSA_BITS: u16 = 10;
/// Largest relative error of rounding to f16: half a unit in the last place.
const F16_ROUNDING: f32 = 1.0 / 2048.0;

/// A number that follows from who does something, and where.
pub(crate) fn number(seed: u64, origin: u64, position: u32) -> u64 {
    mix(seed ^ mix(origin.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(position)))
}

/// The seed of a token with this id behind a token with the seed `before`.
pub(crate) fn seed_behind(before: u64, id: u32) -> u64 {
    mix(before.wrapping_add(0x9E37_79B9_7F4A_7C15) ^ mix(u64::from(id) + 1))
}

/// The seeds of tokens with these ids, behind a token with the seed `before`.
pub(crate) fn seeds_behind(before: u64, ids: &[u32]) -> Vec<u64> {
    let next = |seed: &mut u64, id: &u32| {
        *seed = seed_behind(*seed, *id);
        Some(*seed)
    };
    ids.iter().scan(before, next).collect()
}

/// The shape of one token, and how its rows are laid out in tensors: `[layers, tokens, kv_heads, head_dim]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Layers.
    pub(crate) layers: u32,
    /// Key/value heads of a layer.
    pub(crate) kv_heads: u32,
    /// Elements of a head.
    pub(crate) head_dim: u32,
    /// Tokens in a block.
    pub(crate) block_tokens: u32,
}

impl Shape {
    /// Bytes of one raw block.
    pub(crate) fn block_bytes(&self) -> u64 {
        u64::from(self.layers * 2 * self.kv_heads) * u64::from(self.head_dim * self.block_tokens) * 2
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { layers, kv_heads, head_dim, block_tokens } = self;
        write!(f, "{layers} layers × {kv_heads} heads × {head_dim} dims f16, {block_tokens} tokens a block")
    }
}

#[derive(Debug, Clone, Copy)]
enum Plane {
    Keys,
    Values,
}

/// One row, `[head_dim]`: everything that decides its elements.
struct Row {
    multiplier: u16,
    increment: u16,
    peak_at: usize,
    peak_bits: u16,
}

impl Row {
    fn new(shape: &Shape, token_seed: u64, layer: u32, plane: Plane, head: u32) -> Self {
        let row = (layer * 2 + plane as u32) * shape.kv_heads + head;
        let hash = mix(token_seed ^ u64::from(row + 1).wrapping_mul(0xD1B5_4A32_D192_ED03));
        // Exponents 13 to 16 mean a peak between 0.25 and 8: rows differ in scale, none comes near f16's limits.
        let peak_exponent = 13 + (hash >> 32 & 3) as u16;
        Row {
            multiplier: hash as u16 | 1,
            increment: (hash >> 16) as u16,
            peak_at: ((hash >> 34 & 0xFFFF) as usize * shape.head_dim as usize) >> 16,
            peak_bits: peak_exponent << MANTISSA_BITS
                | (hash >> 50 & 0x3FF) as u16
                | (hash >> 60 << 15) as u16,
        }
    }

    /// Every element but the peak lies one to four powers of two under the peak's, with a random sign.
    fn fill(&self, out: &mut [f16]) {
        let exponent = (self.peak_bits >> MANTISSA_BITS & 0x1F) - 1;
        for (dim, element) in out.iter_mut().enumerate() {
            let mut bits = (dim as u16).wrapping_mul(self.multiplier).wrapping_add(self.increment);
            bits = (bits ^ bits >> 7).wrapping_mul(0x9E3B);
            bits ^= bits >> 8;
            *element =
                f16::from_bits(bits & 0x83FF | (exponent - (bits >> MANTISSA_BITS & 3)) << MANTISSA_BITS);
        }
        out[self.peak_at] = f16::from_bits(self.peak_bits);
    }

    fn peak(&self) -> f32 {
        f16::from_bits(self.peak_bits & 0x7FFF).to_f32()
    }
}

/// How far what is read may lie from what was written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bound {
    /// Format of the sealed blocks.
    pub(crate) format: Format,
    /// Tokens from here on have never been in a sealed block: they read back bit for bit.
    pub(crate) exact_from: u32,
    /// How often tokens may have been decoded and encoded again (a truncation reopens a sealed block).
    pub(crate) reencoded: u32,
}

impl Bound {
    /// The format's own error for a row whose largest magnitude is `peak`: `(absolute, relative to what is read)`.
    ///
    /// int8: codes are rounded to half a step, the step itself is rounded to f16, and so is the decoded product.
    /// Encoding again may move the step by one unit in its last place, which moves each element with it.
    fn of_row(&self, peak: f32) -> (f32, f32) {
        let step = peak / 127.0;
        let roundings = (1 + 3 * self.reencoded).min(100);
        (0.5 * step * (1.0 + 2.0 * F16_ROUNDING) + 1e-5, F16_ROUNDING * roundings as f32)
    }
}

/// The first element that was not what was written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Mismatch {
    /// A tensor has the wrong number of elements.
    Length { expected: usize, got: usize },
    /// An element is out of bounds.
    Element { layer: u32, plane: &'static str, position: u32, head: u32, dim: usize, expected: f32, got: f32 },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Length { expected, got } => write!(f, "{got} elements read, {expected} expected"),
            Mismatch::Element { layer, plane, position, head, dim, expected, got } => write!(
                f,
                "layer {layer} {plane} token {position} head {head} dim {dim}: {got} read, {expected} written"
            ),
        }
    }
}

/// Writes the keys and values of one layer of the tokens `seeds`: `[tokens, kv_heads, head_dim]` each, appended.
pub(crate) fn push_layer(
    shape: &Shape,
    layer: u32,
    seeds: &[u64],
    keys: &mut Vec<f16>,
    values: &mut Vec<f16>,
) {
    let dim = shape.head_dim as usize;
    for (plane, out) in [(Plane::Keys, keys), (Plane::Values, values)] {
        let start = out.len();
        out.resize(start + seeds.len() * shape.kv_heads as usize * dim, f16::ZERO);
        for (heads, &seed) in out[start..].chunks_exact_mut(shape.kv_heads as usize * dim).zip(seeds) {
            for (head, row) in (0..).zip(heads.chunks_exact_mut(dim)) {
                Row::new(shape, seed, layer, plane, head).fill(row);
            }
        }
    }
}

/// The keys and values of all layers of the tokens `seeds`: `[layers, tokens, kv_heads, head_dim]` each.
pub(crate) fn all_layers(shape: &Shape, seeds: &[u64]) -> (Vec<f16>, Vec<f16>) {
    let elements = seeds.len() * (shape.layers * shape.kv_heads * shape.head_dim) as usize;
    let (mut keys, mut values) = (Vec::with_capacity(elements), Vec::with_capacity(elements));
    for layer in 0..shape.layers {
        push_layer(shape, layer, seeds, &mut keys, &mut values);
    }
    (keys, values)
}

/// Checks what was read of one layer, from token `first` on, against the tokens `seeds`.
pub(crate) fn check_layer(
    shape: &Shape,
    layer: u32,
    first: u32,
    seeds: &[u64],
    (keys, values): (&[f16], &[f16]),
    bound: &Bound,
) -> Result<(), Mismatch> {
    let dim = shape.head_dim as usize;
    let expected_len = seeds.len() * shape.kv_heads as usize * dim;
    let mut expected = vec![f16::ZERO; dim];
    for (plane, name, got) in [(Plane::Keys, "keys", keys), (Plane::Values, "values", values)] {
        if got.len() != expected_len {
            return Err(Mismatch::Length { expected: expected_len, got: got.len() });
        }
        for (index, got) in got.chunks_exact(dim).enumerate() {
            let token = index / shape.kv_heads as usize;
            let (position, head) = (first + token as u32, index as u32 % shape.kv_heads);
            let row = Row::new(shape, seeds[token], layer, plane, head);
            row.fill(&mut expected);
            let exact = bound.format == Format::Raw || position >= bound.exact_from;
            let (absolute, relative) = if exact { (0.0, 0.0) } else { bound.of_row(row.peak()) };
            if let Some(dim) = first_outside(&expected, got, absolute, relative) {
                let (expected, got) = (widen(expected[dim]), widen(got[dim]));
                return Err(Mismatch::Element { layer, plane: name, position, head, dim, expected, got });
            }
        }
    }
    Ok(())
}

fn first_outside(expected: &[f16], got: &[f16], absolute: f32, relative: f32) -> Option<usize> {
    let outside = |want: f16, got: f16| {
        let (want, got) = (widen(want), widen(got));
        (want - got).abs() > absolute + relative * got.abs()
    };
    // Nearly always there is none: count first, without a branch in the loop, and look for it only then.
    let count: u32 = expected.iter().zip(got).map(|(&want, &got)| u32::from(outside(want, got))).sum();
    (count != 0).then(|| expected.iter().zip(got).position(|(&want, &got)| outside(want, got)).unwrap_or(0))
}

/// f16 to f32 as two integer operations and a multiplication, which vectorise on every machine.
///
/// The exponent is moved into place and its bias corrected by 2^112, exactly, subnormals included. Infinities and NaN
/// become 65536 and more, which is far outside of every bound here.
fn widen(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    f32::from_bits((bits & 0x8000) << 16 | (bits & 0x7FFF) << 13) * f32::from_bits((112 + 127) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, head_dim: 32, block_tokens: 32 };

    fn seeds(tokens: u32) -> Vec<u64> {
        seeds_behind(7, &(0..tokens).collect::<Vec<_>>())
    }

    /// Encodes and decodes one row as FORMATS.md says.
    fn int8_round_trip(row: &mut [f16]) {
        let peak = row.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
        let scale = f16::from_f32(peak / 127.0).to_f32();
        for x in row {
            let code = (x.to_f32() / scale).round_ties_even().clamp(-127.0, 127.0);
            *x = f16::from_f32(code * scale);
        }
    }

    fn check(
        seeds: &[u64],
        keys: &[f16],
        values: &[f16],
        format: Format,
        reencoded: u32,
    ) -> Result<(), Mismatch> {
        let bound = Bound { format, exact_from: u32::MAX, reencoded };
        check_layer(&SHAPE, 1, 0, seeds, (keys, values), &bound)
    }

    #[test]
    fn the_peak_is_the_largest_magnitude_and_all_is_finite() {
        for seed in seeds(2000) {
            let row = Row::new(&SHAPE, seed, 1, Plane::Values, 1);
            let mut out = [f16::ZERO; 32];
            row.fill(&mut out);
            let largest = out.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
            assert_eq!(largest, row.peak());
            assert!(out.iter().all(|x| x.is_normal()));
            assert!(out.iter().all(|&x| widen(x) == x.to_f32()));
        }
        assert_eq!(widen(f16::from_bits(0x0001)), f16::from_bits(0x0001).to_f32());
        assert_eq!(widen(f16::from_bits(0x8000)), 0.0);
        assert!(widen(f16::NAN) >= 65536.0);
    }

    #[test]
    fn int8_stays_inside_the_bound_and_uses_most_of_it() {
        let seeds = seeds(20_000);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        push_layer(&SHAPE, 1, &seeds, &mut keys, &mut values);
        let written = keys.clone();
        for pass in 0..4 {
            keys.chunks_exact_mut(32).for_each(int8_round_trip);
            values.chunks_exact_mut(32).for_each(int8_round_trip);
            assert_eq!(check(&seeds, &keys, &values, Format::Int8, pass), Ok(()));
        }
        let worst = written.chunks_exact(32).zip(keys.chunks_exact(32)).map(|(want, got)| {
            let peak = want.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
            want.iter().zip(got).map(|(w, g)| (w.to_f32() - g.to_f32()).abs()).fold(0.0, f32::max)
                / (peak / 127.0)
        });
        assert!(worst.fold(0.0, f32::max) > 0.49, "a bound that nothing comes near would not test much");
    }

    #[test]
    fn content_follows_from_all_ids_so_far() {
        let seeds = seeds_behind(1, &[5, 6, 5, 6]);
        assert_eq!(seeds_behind(seeds[1], &[5, 6]), seeds[2..]);
        let all = [&seeds[..], &seeds_behind(2, &[5, 6]), &seeds_behind(1, &[6, 6])].concat();
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn a_wrong_element_token_layer_or_length_is_found() {
        let seeds = seeds(64);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        push_layer(&SHAPE, 1, &seeds, &mut keys, &mut values);
        assert_eq!(check(&seeds, &keys, &values, Format::Raw, 0), Ok(()));
        for format in [Format::Raw, Format::Int8] {
            assert!(check(&seeds, &values, &keys, format, 0).is_err(), "planes swapped");
            assert!(
                check(&seeds[1..], &keys[64..], &values[..values.len() - 64], format, 0).is_err(),
                "shifted"
            );
            assert!(check(&seeds[1..], &keys, &values, format, 0).is_err(), "too long");
            let mut poisoned = keys.clone();
            poisoned[77] = f16::NAN;
            assert!(check(&seeds, &poisoned, &values, format, 0).is_err(), "NaN");
        }
        let mut off_by_one = keys.clone();
        off_by_one[5] = f16::from_bits(off_by_one[5].to_bits() ^ 1);
        assert!(check(&seeds, &off_by_one, &values, Format::Raw, 0).is_err());
        assert_eq!(check(&seeds, &off_by_one, &values, Format::Int8, 0), Ok(()));
    }
}
