//! The arithmetic of the CPU backend: row copies and the `int8` codec, on bytes.
//!
//! What lives here turns bytes into other bytes and knows nothing of blocks, pages or sequences. Everything is
//! little endian, nothing needs an alignment, and every kernel set yields **the same bytes** for the same input:
//! which one runs is a matter of speed alone.
//!
//! # The `int8` format
//!
//! A row is the `dim` elements of one (token, head). All arithmetic is IEEE f32, all rounding half to even.
//!
//! - Scale: `s = max|x| / 127`, rounded to the stored type (f16 for f16 data, f32 for bf16 and f32), then raised to
//!   the floor of that type if it is below: the smallest positive f16, 2^-24, or 2^-100 in f32. The floor keeps a
//!   row of zeros from dividing by zero and intermediate values from underflowing.
//! - Code: `q = clamp(round(x / s), -127, 127)`, where `x / s` is the correctly rounded quotient by the *stored*
//!   scale.
//! - Value: `q · s`, saturated to the finite range of the element type (127 × 516 overflows f16), rounded to it.
//!
//! The error of a value is at most `s / 2`, plus the rounding to the element type, plus 127 times what rounding
//! took from the scale. The last is below `s / 16` except in f16 rows whose scale is subnormal (`max|x| < 2^-7`),
//! where it grows to 64 · 2^-24: still less than 4e-6, but all of a row that is as small as that.
//!
//! A row with a NaN or an infinity gets zero codes and the floor scale, and the encoder answers `false`. The
//! finite check is part of the same read as the encoding or the copy.
//!
//! # Stores
//!
//! All stores are ordinary ones. Non-temporal stores were measured: on buffers far beyond the caches they change
//! nothing for the encoder and make the decoder up to 1.2 times faster, but make f32 decoding into a cached
//! destination 3 times slower; and what was decoded is read next.
//!
//! # Safety
//!
//! 1. A [`Kernels`] value that holds functions for an instruction set is made only after the CPU was found to have
//!    it. Fields are private and never change.
//! 2. Vector loads and stores go through the few helpers at the end of each instruction set's file. These take
//!    bounds-checked slices or arrays and use the unaligned forms.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use half::f16;
use kv_cache_actors::geometry::ElementType;

/// The least scale of f16 rows, 2^-24: the smallest positive f16.
const SCALE_FLOOR_F16: f16 = f16::from_bits(1);

/// The least scale of bf16 and f32 rows, 2^-100.
const SCALE_FLOOR_F32: f32 = f32::from_bits((127 - 100) << 23);

/// The largest finite value of an element type.
const fn finite_max(element: ElementType) -> f32 {
    match element {
        ElementType::F16 => 65504.0,
        ElementType::Bf16 => f32::from_bits(0x7F7F_0000),
        ElementType::F32 => f32::MAX,
    }
}

/// `(element, src, src_stride, dst, dst_stride, row_bytes, rows)`
type CopyRows = unsafe fn(ElementType, &[u8], usize, &mut [u8], usize, usize, usize) -> bool;
/// `(element, dim, src, codes, scales)`, `dim > 0`
type Int8Encode = unsafe fn(ElementType, usize, &[u8], &mut [u8], &mut [u8]) -> bool;
/// `(element, dim, codes, scales, dst, dst_stride)`, `dim > 0`
type Int8Decode = unsafe fn(ElementType, usize, &[u8], &[u8], &mut [u8], usize);

/// A set of kernels for one instruction set. All sets yield identical bytes.
///
/// ```
/// use kv_cache::ElementType;
/// use kv_cache::codec::Kernels;
///
/// // One row of two f32.
/// let row: Vec<u8> = [1.0f32, -127.0].iter().flat_map(|x| x.to_le_bytes()).collect();
/// let (mut codes, mut scale) = ([0; 2], [0; 4]);
/// assert!(Kernels::best().int8_encode(ElementType::F32, 2, &row, &mut codes, &mut scale));
/// assert_eq!(codes, [1, 0x81]);
/// assert_eq!(f32::from_le_bytes(scale), 1.0);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    name: &'static str,
    copy_rows: CopyRows,
    int8_encode: Int8Encode,
    int8_decode: Int8Decode,
}

impl Kernels {
    /// The portable kernels: the definition, and slow.
    pub fn scalar() -> Self {
        Self {
            name: "scalar",
            copy_rows: scalar::copy_rows,
            int8_encode: scalar::int8_encode,
            int8_decode: scalar::int8_decode,
        }
    }

    /// The kernel sets this CPU can run: scalar first, the one that should be fastest last.
    pub fn candidates() -> Vec<Self> {
        #[allow(unused_mut, reason = "other architectures have the scalar set only")]
        let mut candidates = vec![Self::scalar()];
        #[cfg(target_arch = "x86_64")]
        if avx2::is_available() {
            // Invariant 1 holds by the condition.
            candidates.push(Self {
                name: "avx2",
                copy_rows: avx2::copy_rows,
                int8_encode: avx2::int8_encode,
                int8_decode: avx2::int8_decode,
            });
        }
        candidates
    }

    /// The kernel set to use by the features of the CPU alone: the same on every run.
    pub fn best() -> Self {
        Self::candidates().pop().unwrap_or_else(Self::scalar)
    }

    /// The kernel set that is fastest on a small sample. Takes about a millisecond.
    pub fn tuned() -> Self {
        Self::candidates().into_iter().min_by_key(Self::sample_time).unwrap_or_else(Self::scalar)
    }

    /// The name of the instruction set.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Copies `rows` rows of `row_bytes` bytes: row `i` from `i * src_stride` in `src` to `i * dst_stride` in
    /// `dst`. Strides are bytes.
    ///
    /// Returns whether every element copied is finite; the bytes are copied either way.
    ///
    /// # Panics
    /// If `row_bytes` is not a whole number of elements, if a row lies outside its buffer, or if the rows of `dst`
    /// overlap.
    #[allow(clippy::too_many_arguments, reason = "two strided views and their shape")]
    pub fn copy_rows(
        &self,
        element: ElementType,
        src: &[u8],
        src_stride: usize,
        dst: &mut [u8],
        dst_stride: usize,
        row_bytes: usize,
        rows: usize,
    ) -> bool {
        assert!(row_bytes.is_multiple_of(element.bytes()), "row_bytes is not a whole number of elements");
        assert!(holds_rows(src.len(), src_stride, row_bytes, rows), "a row lies outside src");
        assert!(holds_rows(dst.len(), dst_stride, row_bytes, rows), "a row lies outside dst");
        assert!(rows < 2 || dst_stride >= row_bytes, "rows of dst overlap");
        // SAFETY: invariant 1.
        unsafe { (self.copy_rows)(element, src, src_stride, dst, dst_stride, row_bytes, rows) }
    }

    /// Encodes rows to `int8`, in one pass.
    ///
    /// - `src`: `[rows, dim]` elements, finite ones if the result is to be of use
    /// - `codes`: `[rows, dim]` signed bytes
    /// - `scales`: `[rows]`, [`ElementType::scale_bytes`] each; its length says how many rows there are
    ///
    /// Returns whether every element is finite.
    ///
    /// # Panics
    /// If the lengths of the three slices do not agree.
    pub fn int8_encode(
        &self,
        element: ElementType,
        dim: usize,
        src: &[u8],
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> bool {
        let rows = scales.len() / element.scale_bytes();
        assert!(scales.len() == rows * element.scale_bytes(), "scales is not a whole number of scales");
        assert!(rows.checked_mul(dim) == Some(codes.len()), "codes is not [rows, dim]");
        assert!(codes.len().checked_mul(element.bytes()) == Some(src.len()), "src is not [rows, dim]");
        assert!(dim > 0, "dim is 0");
        // SAFETY: invariant 1.
        unsafe { (self.int8_encode)(element, dim, src, codes, scales) }
    }

    /// Decodes `int8` rows: the inverse of [`int8_encode`](Self::int8_encode), but for the rows of `dst`, which
    /// begin `dst_stride` bytes apart. What lies between them is left alone.
    ///
    /// Any bytes decode to finite values: a scale that is no number acts like one that is too large.
    ///
    /// # Panics
    /// If the lengths of `codes` and `scales` do not agree, or if the rows of `dst` lie outside it or overlap.
    pub fn int8_decode(
        &self,
        element: ElementType,
        dim: usize,
        codes: &[u8],
        scales: &[u8],
        dst: &mut [u8],
        dst_stride: usize,
    ) {
        let rows = scales.len() / element.scale_bytes();
        let row_bytes = dim.saturating_mul(element.bytes());
        assert!(scales.len() == rows * element.scale_bytes(), "scales is not a whole number of scales");
        assert!(rows.checked_mul(dim) == Some(codes.len()), "codes is not [rows, dim]");
        assert!(holds_rows(dst.len(), dst_stride, row_bytes, rows), "a row lies outside dst");
        assert!(rows < 2 || dst_stride >= row_bytes, "rows of dst overlap");
        assert!(dim > 0, "dim is 0");
        // SAFETY: invariant 1.
        unsafe { (self.int8_decode)(element, dim, codes, scales, dst, dst_stride) }
    }

    /// The shortest of a few times that a round trip of 32 f16 rows takes, within a third of a millisecond.
    fn sample_time(&self) -> Duration {
        const ROWS: usize = 32;
        const DIM: usize = 128;
        let row_bytes = DIM * ElementType::F16.bytes();
        // Values in [1, 2), every mantissa.
        let src: Vec<u8> =
            (0..ROWS * DIM).flat_map(|i| (0x3C00 | (i as u16 & 0x3FF)).to_le_bytes()).collect();
        let mut codes = vec![0; ROWS * DIM];
        let mut scales = vec![0; ROWS * ElementType::F16.scale_bytes()];
        let mut dst = vec![0; src.len()];

        let begin = Instant::now();
        let mut shortest = Duration::MAX;
        // The first round warms caches and clocks up, so at least two.
        for round in 0..16 {
            let start = Instant::now();
            self.int8_encode(ElementType::F16, DIM, &src, &mut codes, &mut scales);
            self.int8_decode(ElementType::F16, DIM, &codes, &scales, &mut dst, row_bytes);
            shortest = shortest.min(start.elapsed());
            if round > 0 && begin.elapsed() > Duration::from_micros(300) {
                break;
            }
        }
        shortest
    }
}

/// Whether `rows` rows of `row_bytes`, `stride` apart, lie within `len` bytes.
fn holds_rows(len: usize, stride: usize, row_bytes: usize, rows: usize) -> bool {
    let Some(last) = rows.checked_sub(1) else { return true };
    last.checked_mul(stride).and_then(|at| at.checked_add(row_bytes)).is_some_and(|end| end <= len)
}
