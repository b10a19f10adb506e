//! Few levels an element, entropy-coded.
//!
//! A payload is a step (bf16) of each token, keys and values of each layer in turn, then the coded levels of all keys, then those of all
//! values. One step for all heads of a layer: rounding then adds the same noise everywhere, and the coder spends its bits where
//! there is something to say.

use half::bf16;
use kv_cache_actors::geometry::ElementType;

use super::coder::{self, Alphabet, Decoder};
use super::input::Input;
use super::{Codec, ColdError, Plane, Shape};
use crate::backend::cpu::codec::{finite_max, load_row, store_row};

/// Appends the payload of a block of floats.
pub(super) fn encode(
    codec: Codec,
    element: ElementType,
    shape: &Shape,
    block: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), ColdError> {
    let levels = codec.levels();
    let mut symbols = [const { Vec::new() }; 2];
    let mut rows = Vec::new();
    for plane in shape.planes() {
        load(element, shape, &plane, block, &mut rows)?;
        let steps = steps(shape, &plane, levels, &rows);
        out.extend(steps.iter().flat_map(|step| step.to_le_bytes()));
        let to = &mut symbols[plane.kind];
        for (row, step) in rows.chunks_exact(plane.dim).zip(steps.iter().cycle()) {
            let step = step.to_f32();
            to.extend(row.iter().map(|x| level(*x, step, levels)));
        }
    }
    for (symbols, dim) in symbols.iter().zip([shape.key_dim, shape.value_dim]) {
        let dim = dim as usize;
        coder::encode(&alphabet(levels), shape.tokens as usize * dim, dim, symbols, out);
    }
    Ok(())
}

/// Writes the block of a payload. `out` is as long as the shape says.
pub(super) fn decode(
    codec: Codec,
    element: ElementType,
    shape: &Shape,
    payload: &[u8],
    out: &mut [u8],
) -> Result<(), ColdError> {
    let (levels, tokens, heads) = (codec.levels(), shape.tokens as usize, shape.kv_heads as usize);
    let mut input = Input::new(payload);
    let mut steps = Input::new(input.take(2 * tokens * shape.planes().count())?);
    let mut decoders = Vec::with_capacity(2);
    for dim in [shape.key_dim, shape.value_dim] {
        let some = dim > 0 && !out.is_empty();
        decoders.push(some.then(|| Decoder::new(alphabet(levels), dim as usize, &mut input)).transpose()?);
    }
    let (mut symbols, mut values) = (Vec::new(), Vec::new());
    // The last level may lie above the largest element, by the rounding of the step.
    let most = finite_max(element);
    for plane in shape.planes() {
        let Some(decoder) = &mut decoders[plane.kind] else { continue };
        symbols.resize(plane.head, 0);
        let bytes = element.bytes();
        let steps = steps.take(2 * tokens)?;
        let out = &mut out[plane.first * bytes..][..heads * plane.head * bytes];
        for head in out.chunks_exact_mut(plane.head * bytes) {
            decoder.plane(&mut symbols);
            let rows = symbols.chunks_exact(plane.dim).zip(head.chunks_exact_mut(plane.dim * bytes));
            for ((symbols, row), step) in rows.zip(steps.chunks_exact(2)) {
                let step = bf16::from_le_bytes([step[0], step[1]]).to_f32();
                values.clear();
                let value = |symbol: &u16| (f32::from(*symbol) - f32::from(levels)) * step;
                values.extend(symbols.iter().map(|symbol| value(symbol).clamp(-most, most)));
                store_row(element, &values, row);
            }
        }
    }
    for decoder in decoders.into_iter().flatten() {
        decoder.finish(&input)?;
    }
    input.finish()
}

fn alphabet(levels: u16) -> Alphabet {
    Alphabet::new(2 * levels + 1, |symbol| symbol as u8)
}

pub(super) fn level(x: f32, step: f32, levels: u16) -> u16 {
    /// What is added to this has no room for fractions: they are rounded, half to even.
    const ROUND: f32 = 12_582_912.0;
    let most = f32::from(levels);
    (((x / step).clamp(-most, most) + ROUND) - ROUND + most) as u16
}

/// Of each token, what the largest magnitude of all its heads is the last level of; never zero.
fn steps(shape: &Shape, plane: &Plane, levels: u16, rows: &[f32]) -> Vec<bf16> {
    let mut largest = vec![0f32; shape.tokens as usize];
    for head in rows.chunks_exact(plane.head) {
        for (row, largest) in head.chunks_exact(plane.dim).zip(&mut largest) {
            *largest = row.iter().fold(*largest, |largest, x| largest.max(x.abs()));
        }
    }
    largest.into_iter().map(|largest| step(largest, levels)).collect()
}

/// What `largest` is the last level of.
pub(super) fn step(largest: f32, levels: u16) -> bf16 {
    // In the range where a product with a level is still a finite number, and a quotient one.
    bf16::from_f32(largest / f32::from(levels)).max(bf16::MIN_POSITIVE)
}

/// The elements of a plane as single floats.
pub(super) fn load(
    element: ElementType,
    shape: &Shape,
    plane: &Plane,
    block: &[u8],
    rows: &mut Vec<f32>,
) -> Result<(), ColdError> {
    let elements = shape.kv_heads as usize * plane.head;
    rows.resize(elements, 0.0);
    load_row(element, &block[plane.first * element.bytes()..][..elements * element.bytes()], rows);
    match rows.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(ColdError::NotFinite { at: plane.first + at, bits: rows[at].to_bits() }),
        None => Ok(()),
    }
}
