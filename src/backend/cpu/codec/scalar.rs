//! The portable kernels: one element at a time, real divisions, no tricks.
//!
//! They are the definition that every other variant has to meet byte for byte, so they are written to be
//! compared with the text in the [module documentation](super), not to be fast.

use half::{bf16, f16};

use super::{ElementType, SCALE_FLOOR_F16, SCALE_FLOOR_F32, finite_max};

/// See [`Kernels::copy_rows`](super::Kernels::copy_rows).
pub(super) fn copy_rows(
    element: ElementType,
    src: &[u8],
    src_stride: usize,
    dst: &mut [u8],
    dst_stride: usize,
    row_bytes: usize,
    rows: usize,
) -> bool {
    let mut finite = true;
    for row in 0..rows {
        let from = &src[row * src_stride..][..row_bytes];
        dst[row * dst_stride..][..row_bytes].copy_from_slice(from);
        finite &= all_finite(element, from);
    }
    finite
}

/// `int8` by its definition: see [`Kernels::encode`](super::Kernels::encode).
pub(super) fn int8_encode(
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let coder =
        |scale: f32| move |x: f32| ((x / scale).round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned();
    encode_scaled(element, dim, src, codes, scales, 127.0, coder)
}

/// See [`Kernels::decode`](super::Kernels::decode).
pub(super) fn int8_decode(
    element: ElementType,
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    decode_scaled(element, dim, codes, scales, dst, dst_stride, |code| f32::from(code.cast_signed()));
}

/// Rows as a byte an element under one scale a row, which brings the largest magnitude to `most`. `coder` makes of a stored scale
/// what gives an element its code.
pub(super) fn encode_scaled<C: Fn(f32) -> u8>(
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
    most: f32,
    coder: impl Fn(f32) -> C,
) -> bool {
    let rows = src.chunks_exact(dim * element.bytes()).zip(codes.chunks_exact_mut(dim));
    let mut finite = true;
    for ((row, codes), stored) in rows.zip(scales.chunks_exact_mut(element.scale_bytes())) {
        if !all_finite(element, row) {
            finite = false;
            write_scale(element, 0.0, stored);
            codes.fill(0);
            continue;
        }
        let abs_max = (0..dim).fold(0.0f32, |max, i| max.max(read(element, row, i).abs()));
        let code_of = coder(write_scale(element, abs_max / most, stored));
        for (i, code) in codes.iter_mut().enumerate() {
            *code = code_of(read(element, row, i));
        }
    }
    finite
}

/// The inverse of [`encode_scaled`]: `value` of each code, times the scale.
pub(super) fn decode_scaled(
    element: ElementType,
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
    value: impl Fn(u8) -> f32,
) {
    let rows = codes.chunks_exact(dim).zip(scales.chunks_exact(element.scale_bytes()));
    for (row, (codes, stored)) in rows.enumerate() {
        let scale = read_scale(element, stored);
        let out = &mut dst[row * dst_stride..][..dim * element.bytes()];
        for (code, out) in codes.iter().zip(out.chunks_exact_mut(element.bytes())) {
            write(element, finite(element, value(*code) * scale), out);
        }
    }
}

/// Saturated to the finite range of the element type.
pub(super) fn finite(element: ElementType, value: f32) -> f32 {
    let max = finite_max(element);
    // `min` first: it turns a NaN into `max`, as the vector instructions do.
    value.min(max).max(-max)
}

/// Rounds `ideal` to the stored type, applies the floor, stores it, and returns what was stored.
fn write_scale(element: ElementType, ideal: f32, stored: &mut [u8]) -> f32 {
    match element {
        ElementType::F16 => {
            let scale = f16::from_f32(ideal).max(SCALE_FLOOR_F16);
            stored.copy_from_slice(&scale.to_le_bytes());
            scale.to_f32()
        }
        ElementType::Bf16 | ElementType::F32 => {
            let scale = ideal.max(SCALE_FLOOR_F32);
            stored.copy_from_slice(&scale.to_le_bytes());
            scale
        }
    }
}

/// The stored scale of one row.
fn read_scale(element: ElementType, stored: &[u8]) -> f32 {
    match element {
        ElementType::F16 => f16::from_le_bytes([stored[0], stored[1]]).to_f32(),
        ElementType::Bf16 | ElementType::F32 => {
            f32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]])
        }
    }
}

/// Element `i` of `row`.
pub(super) fn read(element: ElementType, row: &[u8], i: usize) -> f32 {
    let at = &row[i * element.bytes()..];
    match element {
        ElementType::F16 => f16::from_le_bytes([at[0], at[1]]).to_f32(),
        ElementType::Bf16 => bf16::from_le_bytes([at[0], at[1]]).to_f32(),
        ElementType::F32 => f32::from_le_bytes([at[0], at[1], at[2], at[3]]),
    }
}

/// Rounds `value`, half to even, into `out`.
pub(super) fn write(element: ElementType, value: f32, out: &mut [u8]) {
    match element {
        ElementType::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        ElementType::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        ElementType::F32 => out.copy_from_slice(&value.to_le_bytes()),
    }
}

/// Whether no element of `row` is NaN or infinite.
pub(super) fn all_finite(element: ElementType, row: &[u8]) -> bool {
    (0..row.len() / element.bytes()).all(|i| read(element, row, i).is_finite())
}
