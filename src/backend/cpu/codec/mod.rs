//! The arithmetic of the CPU backend: row copies and the codecs of the sealed formats, on bytes.
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
//! # The `fp8` format
//!
//! As `int8`, with e4m3 floats (sign, 4 bits of exponent, 3 of mantissa) for codes: `s = max|x| / 448`, stored with the same floor;
//! the code is the e4m3 number nearest to `x · (1 / s)`, both operations rounded, ties to even, at most 448. The code of "no number"
//! is never written, and read as 480.
//!
//! # The formats `r4`, `r3` and `r2`
//!
//! A row is rotated, so that its elements look like a normal variable whatever they were, and then each element is replaced by the
//! nearest of the 16, 8 or 4 values that leave the least squared error of such a variable (Lloyd and Max). The idea is that of
//! PolarQuant and TurboQuant (Zandieh et al. 2025, arXiv 2504.19874).
//!
//! - Rotation: some elements change their sign (fixed bits, those of π), then the Hadamard transform runs over groups of the
//!   largest power of two that divides `dim`, at most 256: sums and differences of elements 1 apart, then 2 apart, and so on.
//! - Sums of products go over 8 elements one after the other, fused; of those sums each of the first half of a group is added to its fellow
//!   of the second half, and so on until one is left; groups one after the other.
//! - Rows of bf16 and f32 whose `Σy²` is not between 2^-80 and 2^100 (it overflows, or what it is made of is lost) are divided by the power of two
//!   at or below `max|x|`, between 2^-126 and 2^126, and rotated again.
//! - Unit: what makes of `y` a share of all places is `√dim / (places · width)`, rounded, times one over the root of `Σy²`: two steps of Newton's
//!   method, `r · (1.5 - (Σy² / 2 · r) · r)` with one rounding for what is in brackets, from the number whose bits are `0x5F375A86` less half of
//!   those of `Σy²`.
//! - Place: places are of equal width: 111 of 0.0437, 51 of 0.07 or 3 of 0.9816 standard deviations, and one more, since the two outermost are cut in
//!   half. Two meet at zero. `y · unit + ½`, fused and kept between 0 and 1, is the share of all places that is below; times their number (111, 51, 3),
//!   rounded to the nearest integer (even if there are two), it is the place, counted from 0.
//! - Code: each value of the codebook has some places, so that it is the nearest to all that lies there but for a part of the outermost of
//!   them. Its lower bits count magnitudes from the smallest, its highest bit is set below zero. Element `i` has the bits from `i · bits` of the row's bytes,
//!   least significant first. (Looking a place up is one multiplication and one load; with ends of values that fall between places it would be twice as
//!   much. They cost 0.2 % of the error with 4 bits, and the values are those that leave the least with such ends.)
//! - Factor: `Σyc / Σc²` by the square root of the group's length, and times the power of two: the length that leaves the least
//!   error. (Of `c` the lowest bits are its code here: then one table has both.) Stored as bf16: eight digits are a hundredth of what the codes lose, and f16 could not hold the factors of the largest
//!   f16 rows. (Rows of bf16 and f32 that are longer than 1e36 have factors beyond bf16 too, and are cut off.) A row of zeros has the factor 0.
//! - Value: the codebook's values, transformed back, times the factor by the root of the group's length, signs changed back,
//!   saturated and rounded to the element type.
//!
//! Every row is as exact as its own length allows, whatever its outliers; what the rotation cannot mend is a row that is a large
//! constant plus a small signal: the error is a share of the whole length (0.95 % of its square with 4 bits, 3.5 % with 3, 12 % with 2).
//! A dim that is odd is not rotated at all.
//!
//! # The formats `int4` and `int2`
//!
//! A group is stored as its least element `m`, a step `s` and a code for each element (KIVI: Liu et al. 2024, arXiv 2402.02750). In
//! keys a group is one channel of 32 consecutive tokens of a head, in values 32 neighbours of a row, the last of which may be fewer.
//! With `n` = 15 or 3:
//!
//! - `m` is exact, in the element type; `s = h(max) / (n/2)`, rounded to the element type, at least the floor of `int8` scales.
//!   `h(x) = x/2 - m/2`, fused: the halves, since a group may span more than there are numbers for.
//! - Code: `round(min(h(x) · (1 / (s/2)), n))`, each operation rounded. Element `i` has the bits from `i · bits` of the row's bytes.
//! - Value: `q · s + m`, fused, saturated and rounded to the element type.
//!
//! The error of a value is at most `s / 2`, plus the rounding to the element type, plus `n` times what rounding took from the step.
//! A group with a NaN or an infinity gets zeros and the floor step.
//!
//! # Centres
//!
//! Rows may be stored as what they differ from their centres by. All rows of a head have the same centre but for two turns, which
//! turn pairs `(x, y)` of elements: one that all rows have in common, and one of each row.
//!
//! - The first makes of the mean's pairs `p = x·cos - y·sin` and `q = x·sin + y·cos`, each operation rounded.
//! - The second is part of the sum: a row's first element `a` of a pair becomes `fma(-q, sin, fma(p, cos, a))`, its second `b` becomes
//!   `fma(p, sin, fma(q, cos, b))`; elements in no pair have the mean added. To subtract, the signs of `p`, `q` and the mean are changed before.
//! - Where rows have been decoded to f32 to have their centres added, a zero has lost its sign before.
//! - The sum is limited to the finite range of a type and rounded to it: of f32 when centres are taken off for the rotated formats, which code numbers of
//!   that type then and decode to it; of the elements otherwise. What is not finite stays as it is.
//!
//! # Stores
//!
//! All stores are ordinary ones. Non-temporal stores were measured: on buffers far beyond the caches they change
//! nothing for the encoder and make the decoder up to 1.2 times faster, but make f32 decoding into a cached
//! destination 3 times slower; and what was decoded is read next. Instead, the lines that are written are asked for ahead.
//!
//! # Safety
//!
//! 1. A [`Kernels`] value that holds functions for an instruction set is made only after the CPU was found to have
//!    it. Fields are private and never change.
//! 2. Vector loads and stores go through the few helpers at the end of each instruction set's file. These take
//!    bounds-checked slices or arrays and use the unaligned forms.

mod centred;
pub(crate) mod fp8;
mod grouped;
mod rotated;
mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_centred;
#[cfg(target_arch = "x86_64")]
mod avx2_grouped;
#[cfg(target_arch = "x86_64")]
mod avx2_rotated;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_centred;
#[cfg(target_arch = "x86_64")]
mod avx512_grouped;
#[cfg(target_arch = "x86_64")]
mod avx512_rotated;

#[cfg(test)]
mod centred_tests;

#[cfg(test)]
mod format_tests;

#[cfg(test)]
mod known_answers;

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use kv_cache_actors::format::{Format, RowFormat};
use kv_cache_actors::geometry::{ElementType, Plane, RopeLayout};

/// The least scale of f16 rows, 2^-24: the smallest positive f16.
const SCALE_FLOOR_F16: f16 = f16::from_bits(1);

/// The least scale of bf16 and f32 rows, 2^-100.
const SCALE_FLOOR_F32: f32 = f32::from_bits((127 - 100) << 23);

/// The largest finite value of an element type.
pub(crate) const fn finite_max(element: ElementType) -> f32 {
    match element {
        ElementType::F16 => 65504.0,
        ElementType::Bf16 => f32::from_bits(0x7F7F_0000),
        ElementType::F32 => f32::MAX,
    }
}

/// A row of elements as f32, however it is aligned.
pub(crate) fn load_row(element: ElementType, bytes: &[u8], row: &mut [f32]) {
    match element {
        ElementType::F32 => bytemuck::cast_slice_mut(row).copy_from_slice(bytes),
        ElementType::F16 => halves::<f16>(bytes, row, |halves, row| halves.convert_to_f32_slice(row)),
        ElementType::Bf16 => halves::<bf16>(bytes, row, |halves, row| halves.convert_to_f32_slice(row)),
    }
}

fn halves<T: bytemuck::Pod>(bytes: &[u8], row: &mut [f32], convert: impl Fn(&[T], &mut [f32])) {
    let mut aligned = [T::zeroed(); 64];
    for (bytes, row) in bytes.chunks(2 * aligned.len()).zip(row.chunks_mut(aligned.len())) {
        let aligned = &mut aligned[..row.len()];
        bytemuck::cast_slice_mut(aligned).copy_from_slice(bytes);
        convert(aligned, row);
    }
}

/// The inverse of [`load_row`]: rounds half to even.
pub(crate) fn store_row(element: ElementType, row: &[f32], bytes: &mut [u8]) {
    match element {
        ElementType::F32 => bytes.copy_from_slice(bytemuck::cast_slice(row)),
        ElementType::F16 => to_halves::<f16>(row, bytes, |halves, row| halves.convert_from_f32_slice(row)),
        ElementType::Bf16 => to_halves::<bf16>(row, bytes, |halves, row| halves.convert_from_f32_slice(row)),
    }
}

fn to_halves<T: bytemuck::Pod>(row: &[f32], bytes: &mut [u8], convert: impl Fn(&mut [T], &[f32])) {
    let mut aligned = [T::zeroed(); 64];
    for (bytes, row) in bytes.chunks_mut(2 * aligned.len()).zip(row.chunks(aligned.len())) {
        let aligned = &mut aligned[..row.len()];
        convert(aligned, row);
        bytes.copy_from_slice(bytemuck::cast_slice(aligned));
    }
}

/// `(element, src, src_stride, dst, dst_stride, row_bytes, rows)`
type CopyRows = unsafe fn(ElementType, &[u8], usize, &mut [u8], usize, usize, usize) -> bool;
/// `(element, dim, src, codes, scales)`, `dim > 0`
type ScaledEncode = unsafe fn(ElementType, usize, &[u8], &mut [u8], &mut [u8]) -> bool;
/// `(element, dim, codes, scales, dst, dst_stride)`, `dim > 0`
type ScaledDecode = unsafe fn(ElementType, usize, &[u8], &[u8], &mut [u8], usize);

/// `(bits, element, dim, src, codes, factors)`, `dim > 0`
type RotatedEncode = unsafe fn(usize, ElementType, usize, &[u8], &mut [u8], &mut [u8]) -> bool;
/// `(bits, element, dim, codes, factors, dst, dst_stride)`, `dim > 0`
type RotatedDecode = unsafe fn(usize, ElementType, usize, &[u8], &[u8], &mut [u8], usize);

/// `(rows, src, codes, scales)`
type GroupedEncode = unsafe fn(RowFormat, &[u8], &mut [u8], &mut [u8]) -> bool;
/// `(rows, skip, codes, scales, dst, dst_stride)`
type GroupedDecode = unsafe fn(RowFormat, usize, &[u8], &[u8], &mut [u8], usize);

/// `(elements of src and dst, centres, sign, src, dst, dst_stride)`
type MoveRows = unsafe fn([ElementType; 2], &RowCentres, f32, Option<&[u8]>, &mut [u8], usize);

/// What rows of one head are told apart from: a mean, turned as the rows were.
///
/// [`Kernels::subtract_centres`] and [`Kernels::add_centres`] say what becomes of rows.
#[derive(Clone, Copy, Debug)]
pub struct RowCentres<'a> {
    /// How many rows there are.
    pub rows: usize,
    /// `[dim]`: the mean before any turn. Finite numbers.
    pub mean: &'a [f32],
    /// `[pairs]`: cosine and sine of the turn that all rows have in common. The dims behind those of the pairs do not turn.
    pub turn: &'a [[f32; 2]],
    /// `[rows, pairs]`: the cosines and the sines of the turns that rows have of their own.
    pub row_turns: [&'a [f32]; 2],
    /// Which elements are a pair.
    pub layout: RopeLayout,
}

/// A set of kernels for one instruction set. All sets yield identical bytes.
///
/// ```
/// use kv_cache::codec::Kernels;
/// use kv_cache::{ElementType, Format, Plane, RowFormat};
///
/// // One row of two f32.
/// let rows = RowFormat { format: Format::Int8, element: ElementType::F32, plane: Plane::Key, dim: 2 };
/// let row: Vec<u8> = [1.0f32, -127.0].iter().flat_map(|x| x.to_le_bytes()).collect();
/// let (mut codes, mut scale) = ([0; 2], [0; 4]);
/// assert!(Kernels::best().encode(rows, &row, &mut codes, &mut scale));
/// assert_eq!(codes, [1, 0x81]);
/// assert_eq!(f32::from_le_bytes(scale), 1.0);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    name: &'static str,
    copy_rows: CopyRows,
    int8_encode: ScaledEncode,
    int8_decode: ScaledDecode,
    fp8_encode: ScaledEncode,
    fp8_decode: ScaledDecode,
    rotated_encode: RotatedEncode,
    rotated_decode: RotatedDecode,
    grouped_encode: GroupedEncode,
    grouped_decode: GroupedDecode,
    move_rows: MoveRows,
}

impl Kernels {
    /// The portable kernels: the definition, and slow.
    pub fn scalar() -> Self {
        Self {
            name: "scalar",
            copy_rows: scalar::copy_rows,
            int8_encode: scalar::int8_encode,
            int8_decode: scalar::int8_decode,
            fp8_encode: fp8::encode,
            fp8_decode: fp8::decode,
            rotated_encode: rotated::encode,
            rotated_decode: rotated::decode,
            grouped_encode: grouped::encode,
            grouped_decode: grouped::decode,
            move_rows: centred::move_rows,
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
                fp8_encode: fp8::encode,
                fp8_decode: fp8::decode,
                rotated_encode: avx2_rotated::encode,
                rotated_decode: avx2_rotated::decode,
                grouped_encode: avx2_grouped::encode,
                grouped_decode: avx2_grouped::decode,
                move_rows: avx2_centred::move_rows,
            });
        }
        #[cfg(target_arch = "x86_64")]
        if avx512::is_available() {
            // Invariant 1 holds by the condition.
            candidates.push(Self {
                name: "avx512",
                copy_rows: avx2::copy_rows,
                int8_encode: avx512::int8_encode,
                int8_decode: avx512::int8_decode,
                fp8_encode: avx512::fp8_encode,
                fp8_decode: avx512::fp8_decode,
                rotated_encode: avx512_rotated::encode,
                rotated_decode: avx512_rotated::decode,
                grouped_encode: avx512_grouped::encode,
                grouped_decode: avx512_grouped::decode,
                move_rows: avx512_centred::move_rows,
            });
        }
        candidates
    }

    /// The kernel set to use by the features of the CPU alone: the same on every run.
    pub fn best() -> Self {
        Self::candidates().pop().unwrap_or_else(Self::scalar)
    }

    /// The kernel set that is fastest on small samples. Takes about two milliseconds.
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

    /// Encodes rows, in one pass.
    ///
    /// - `src`: `[rows, dim]` elements, finite ones if the result is to be of use; a multiple of [`RowFormat::scale_rows`]
    /// - `codes`: `[rows]`, [`RowFormat::row_bytes`] each
    /// - `scales`: [`RowFormat::scale_bytes`] for each `scale_rows` rows
    ///
    /// Returns whether every element is finite.
    ///
    /// # Panics
    /// If the lengths of the three slices do not agree, or if the format is [`Format::Raw`], which has no codes.
    pub fn encode(&self, rows: RowFormat, src: &[u8], codes: &mut [u8], scales: &mut [u8]) -> bool {
        let RowFormat { format, element, dim, .. } = rows;
        let count = check_rows(rows, 0, codes, scales);
        assert!(count.checked_mul(dim * element.bytes()) == Some(src.len()), "src is not [rows, dim]");
        assert!(count.is_multiple_of(rows.scale_rows()), "rows that share their scales are encoded together");
        match format {
            // SAFETY: invariant 1.
            Format::Int8 => unsafe { (self.int8_encode)(element, dim, src, codes, scales) },
            // SAFETY: invariant 1.
            Format::Fp8 => unsafe { (self.fp8_encode)(element, dim, src, codes, scales) },
            // SAFETY: invariant 1.
            Format::Int4 | Format::Int2 => unsafe { (self.grouped_encode)(rows, src, codes, scales) },
            // SAFETY: invariant 1.
            _ => unsafe {
                (self.rotated_encode)(format.code_bits(element), element, dim, src, codes, scales)
            },
        }
    }

    /// Decodes rows: the inverse of [`encode`](Self::encode), but for the rows of `dst`, which begin `dst_stride` bytes
    /// apart. What lies between them is left alone.
    ///
    /// `codes` may begin and end in the middle of rows that share their scales: `skip` of those come before the first, so it is 0 but for
    /// keys in `int4` and `int2`.
    ///
    /// Any bytes decode to finite values: a scale that is no number acts like one that is too large.
    ///
    /// # Panics
    /// If the lengths of `codes` and `scales` do not agree, if the rows of `dst` lie outside it or overlap, or if the format is
    /// [`Format::Raw`].
    pub fn decode(
        &self,
        rows: RowFormat,
        skip: usize,
        codes: &[u8],
        scales: &[u8],
        dst: &mut [u8],
        dst_stride: usize,
    ) {
        let RowFormat { format, element, dim, .. } = rows;
        let count = check_rows(rows, skip, codes, scales);
        let row_bytes = dim.saturating_mul(element.bytes());
        assert!(holds_rows(dst.len(), dst_stride, row_bytes, count), "a row lies outside dst");
        assert!(count < 2 || dst_stride >= row_bytes, "rows of dst overlap");
        match format {
            // SAFETY: invariant 1.
            Format::Int8 => unsafe { (self.int8_decode)(element, dim, codes, scales, dst, dst_stride) },
            // SAFETY: invariant 1.
            Format::Fp8 => unsafe { (self.fp8_decode)(element, dim, codes, scales, dst, dst_stride) },
            // SAFETY: invariant 1.
            Format::Int4 | Format::Int2 => unsafe {
                (self.grouped_decode)(rows, skip, codes, scales, dst, dst_stride)
            },
            // SAFETY: invariant 1.
            _ => unsafe {
                let bits = format.code_bits(element);
                (self.rotated_decode)(bits, element, dim, codes, scales, dst, dst_stride)
            },
        }
    }

    /// Writes to `dst` what the rows of `src`, as many as there are centres, differ from these by; both are `[rows, dim]`, of the two types.
    ///
    /// What is not finite stays as it is; all else stays finite.
    ///
    /// # Panics
    /// If the lengths of the slices do not agree.
    pub fn subtract_centres(
        &self,
        elements: [ElementType; 2],
        centres: &RowCentres,
        src: &[u8],
        dst: &mut [u8],
    ) {
        let row_bytes = centres.mean.len().saturating_mul(elements[1].bytes());
        self.move_rows(elements, centres, -1.0, Some(src), dst, row_bytes);
    }

    /// Writes the rows of `src`, `[rows, dim]` f32, with their centres to `dst`, where they begin `stride` bytes apart: the inverse of
    /// [`subtract_centres`](Self::subtract_centres), but for rounding; zeros of `src` have no sign. What lies between the rows is left alone.
    ///
    /// # Panics
    /// If the lengths of the slices do not agree, or if the rows lie outside `dst` or overlap.
    pub fn add_centres(
        &self,
        element: ElementType,
        centres: &RowCentres,
        src: &[u8],
        dst: &mut [u8],
        stride: usize,
    ) {
        self.move_rows([ElementType::F32, element], centres, 1.0, Some(src), dst, stride);
    }

    /// [`add_centres`](Self::add_centres) to rows where they are, whose zeros have signs.
    ///
    /// # Panics
    /// As there.
    pub fn add_centres_in_place(
        &self,
        element: ElementType,
        centres: &RowCentres,
        rows: &mut [u8],
        stride: usize,
    ) {
        self.move_rows([element; 2], centres, 1.0, None, rows, stride);
    }

    fn move_rows(
        &self,
        elements: [ElementType; 2],
        centres: &RowCentres,
        sign: f32,
        src: Option<&[u8]>,
        dst: &mut [u8],
        dst_stride: usize,
    ) {
        let RowCentres { rows, mean, turn, row_turns, .. } = *centres;
        let (dim, pairs) = (mean.len(), turn.len());
        let [from_bytes, row_bytes] = elements.map(|element| dim.saturating_mul(element.bytes()));
        assert!(
            src.is_none_or(|src| rows.checked_mul(from_bytes) == Some(src.len())),
            "src is not [rows, dim]"
        );
        assert!(pairs <= dim / 2, "more pairs than elements");
        let turns = rows.checked_mul(pairs);
        assert!(row_turns.iter().all(|of| Some(of.len()) == turns), "the turns are not [rows, pairs]");
        assert!(holds_rows(dst.len(), dst_stride, row_bytes, rows), "a row lies outside dst");
        assert!(rows < 2 || dst_stride >= row_bytes, "rows of dst overlap");
        // SAFETY: invariant 1.
        unsafe { (self.move_rows)(elements, centres, sign, src, dst, dst_stride) }
    }

    /// The shortest of a few times that round trips of 32 f16 rows take in the formats whose kernels differ most, within a fifth of a
    /// millisecond each.
    fn sample_time(&self) -> Duration {
        const ROWS: usize = 32;
        const DIM: usize = 128;
        let row_bytes = DIM * ElementType::F16.bytes();
        // Values in [1, 2), every mantissa.
        let src: Vec<u8> =
            (0..ROWS * DIM).flat_map(|i| (0x3C00 | (i as u16 & 0x3FF)).to_le_bytes()).collect();
        let mut dst = vec![0; src.len()];

        let mut time_of = |format| {
            let rows = RowFormat { format, element: ElementType::F16, plane: Plane::Value, dim: DIM };
            let mut codes = vec![0; ROWS * rows.row_bytes()];
            let mut scales = vec![0; rows.scales_bytes(ROWS)];
            let begin = Instant::now();
            let mut shortest = Duration::MAX;
            // The first round warms caches and clocks up, so at least two.
            for round in 0..16 {
                let start = Instant::now();
                self.encode(rows, &src, &mut codes, &mut scales);
                self.decode(rows, 0, &codes, &scales, &mut dst, row_bytes);
                shortest = shortest.min(start.elapsed());
                if round > 0 && begin.elapsed() > Duration::from_micros(200) {
                    break;
                }
            }
            shortest
        };
        [Format::Int8, Format::Int4, Format::R4].into_iter().map(&mut time_of).sum()
    }
}

/// How many rows there are, `skip` of those that share the first scales left out.
fn check_rows(rows: RowFormat, skip: usize, codes: &[u8], scales: &[u8]) -> usize {
    assert!(rows.format != Format::Raw, "raw rows have no codes");
    assert!(rows.dim > 0, "dim is 0");
    assert!(skip < rows.scale_rows(), "rows are skipped whose scales are not needed");
    let count = codes.len() / rows.row_bytes();
    assert!(codes.len() == count * rows.row_bytes(), "codes is not a whole number of rows");
    assert!(scales.len() == rows.scales_bytes(skip + count), "scales are not those of the rows");
    count
}

/// Whether `rows` rows of `row_bytes`, `stride` apart, lie within `len` bytes.
fn holds_rows(len: usize, stride: usize, row_bytes: usize, rows: usize) -> bool {
    let Some(last) = rows.checked_sub(1) else { return true };
    last.checked_mul(stride).and_then(|at| at.checked_add(row_bytes)).is_some_and(|end| end <= len)
}
