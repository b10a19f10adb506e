//! Keys and values that follow from a stamp.
//!
//! A model of a cache that kept every element would spend its time copying. Here a token *is* a stamp, and the elements of
//! each of its rows follow from it. Two more properties make comparisons exact and leaks visible:
//!
//! - a row is odd integers up to ±127, at least one of them ±127, times `2^tenant`: its `int8` scale is exactly `2^tenant`,
//!   so sealing and reopening change nothing;
//! - the power of two in an element says which tenant wrote it.

use super::rng::mix;
use crate::geometry::{BlockLayout, Plane};

/// Most tenants that elements can tell apart.
pub const TENANTS_MAX: u32 = 8;

/// Dims up to which rows are made here.
pub const DIM_MAX: usize = 16;

/// Names one row: `(token, layer, plane, head)` of one write.
fn row_seed(stamp: u64, layer: usize, plane: Plane, head: usize) -> u64 {
    let place = (layer as u64) << 16 | (head as u64) << 8 | u64::from(plane == Plane::Value);
    mix(stamp ^ mix(place.wrapping_add(0x51_7C_C1_B7_27_22_0A_95)))
}

/// Fills one row of `out.len()` elements, at most [`DIM_MAX`].
pub fn fill_row(stamp: u64, tenant: u32, layer: usize, plane: Plane, head: usize, out: &mut [f32]) {
    let mut bits = row_seed(stamp, layer, plane, head);
    let unit = (1u32 << tenant) as f32;
    let largest = (bits >> 57) as usize % out.len();
    for (i, element) in out.iter_mut().enumerate() {
        if i == 7 {
            bits = mix(bits);
        }
        let code = (bits >> (8 * (i % 7))) as i8 | 1;
        let code = if i == largest { if code < 0 { -127 } else { 127 } } else { code };
        *element = f32::from(code) * unit;
    }
}

/// Appends the tensor `[layers, tokens, kv_heads, dim]` of `plane` for the tokens with these stamps.
pub fn push_tensor(
    out: &mut Vec<f32>,
    layout: &BlockLayout,
    plane: Plane,
    layers: std::ops::Range<usize>,
    tenant: u32,
    stamps: impl Iterator<Item = u64> + Clone,
) {
    let dim = layout.dim(plane);
    for layer in layers {
        for stamp in stamps.clone() {
            for head in 0..layout.kv_heads {
                let start = out.len();
                out.resize(start + dim, 0.0);
                fill_row(stamp, tenant, layer, plane, head, &mut out[start..]);
            }
        }
    }
}

/// A value that is not finite; a NaN says who wrote it.
pub fn not_finite(tenant: u32, choice: u64) -> f32 {
    match choice % 3 {
        0 => f32::INFINITY,
        1 => f32::NEG_INFINITY,
        _ => f32::from_bits(0x7FC0_0000 | tenant),
    }
}

/// Which tenant wrote an element; none for zero and infinity, which say nothing.
pub fn tenant_of(element: f32) -> Option<u32> {
    if element.is_nan() {
        return Some(element.to_bits() & 0xFFFF);
    }
    (element != 0.0 && element.is_finite()).then(|| (element.abs() as u32).trailing_zeros())
}

/// The first token and head whose rows are not what their stamps say, in a tensor `[tokens, kv_heads, dim]` of one layer.
pub fn first_difference(
    tensor: &[f32],
    layout: &BlockLayout,
    plane: Plane,
    layer: usize,
    tenant: u32,
    stamps: &[u64],
) -> Option<(usize, usize)> {
    let dim = layout.dim(plane);
    if tensor.len() != stamps.len() * layout.kv_heads * dim {
        return Some((0, 0));
    }
    let mut rows = tensor.chunks_exact(dim);
    let mut expected = [0.0; DIM_MAX];
    for (token, &stamp) in stamps.iter().enumerate() {
        for (head, row) in (0..layout.kv_heads).zip(&mut rows) {
            fill_row(stamp, tenant, layer, plane, head, &mut expected[..dim]);
            if row != &expected[..dim] {
                return Some((token, head));
            }
        }
    }
    None
}
