//! The kernels for AVX2, FMA and F16C: 32 elements a step, 8 rows' scales at a time.
//!
//! # How the bytes stay those of the definition
//!
//! *f16.* Instead of `x / s` this computes `t = fma(x, 1/s, 768)` and rounds `t` to an integer. Around 768 an f32
//! counts in steps of 2^-14, so `t` is `768 + x/s` snapped to that grid. Both `x` and `s` have 11-bit mantissas:
//! `x/s` is a tie `k + 1/2` exactly, or at least 2^-13 away from one. The rounded reciprocal moves it by less than
//! 2^-16, so a tie snaps back to the tie (768 is even: half-to-even decides as it would at 0) and everything else
//! stays on its side.
//!
//! *bf16.* Markstein's sequence: `q0 = x·r` with `r = 1/s`, then one correction by the remainder,
//! `fma(fma(-q0, s, x), r, q0)`. Where `x/s` is tiny the remainder may underflow, and the code is 0 all the same.
//!
//! *f32.* Real divisions: 8 elements in about 5 cycles hide behind the memory they wait for.
//!
//! The tests try every f16 value with every f16 scale it can meet, and every bf16 value with every bf16 maximum.
//!
//! # Why 8 rows at a time
//!
//! From the maximum to the first code is a chain of two divisions and half a dozen shuffles and conversions, about
//! 100 cycles, while encoding 64 elements takes 20. One vector does the chain for 8 rows at once; the second read
//! of the rows comes from the L1 cache.

use std::arch::x86_64::*;

use super::{ElementType, SCALE_FLOOR_F32, finite_max};

// Element types as const parameters: one copy of the code for each, with no branch inside.
pub(super) const F16: u8 = 0;
pub(super) const BF16: u8 = 1;
pub(super) const F32: u8 = 2;

pub(super) const fn element_bytes(e: u8) -> usize {
    if e == F32 { 4 } else { 2 }
}

pub(super) const fn scale_bytes(e: u8) -> usize {
    if e == F16 { 2 } else { 4 }
}

/// The largest finite magnitude as an integer.
pub(super) const fn largest_bits(e: u8) -> i32 {
    match e {
        F16 => 0x7BFF,
        BF16 => 0x7F7F,
        _ => 0x7F7F_FFFF,
    }
}

/// Whether this CPU can run the functions of this module.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// See [`Kernels::copy_rows`](super::Kernels::copy_rows).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn copy_rows(
    element: ElementType,
    src: &[u8],
    src_stride: usize,
    dst: &mut [u8],
    dst_stride: usize,
    row_bytes: usize,
    rows: usize,
) -> bool {
    // Contiguous on both sides: one long row.
    let contiguous = src_stride == row_bytes && dst_stride == row_bytes;
    let (row_bytes, rows) = if contiguous { (row_bytes * rows, 1) } else { (row_bytes, rows) };
    match element {
        ElementType::F16 => copy::<F16>(src, src_stride, dst, dst_stride, row_bytes, rows),
        ElementType::Bf16 => copy::<BF16>(src, src_stride, dst, dst_stride, row_bytes, rows),
        ElementType::F32 => copy::<F32>(src, src_stride, dst, dst_stride, row_bytes, rows),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn copy<const E: u8>(
    src: &[u8],
    src_stride: usize,
    dst: &mut [u8],
    dst_stride: usize,
    row_bytes: usize,
    rows: usize,
) -> bool {
    let mut max = _mm256_setzero_si256();
    for row in 0..rows {
        let from = &src[row * src_stride..][..row_bytes];
        let to = &mut dst[row * dst_stride..][..row_bytes];
        let (groups, from_tail) = from.as_chunks::<128>();
        let (groups_to, to_tail) = to.as_chunks_mut::<128>();
        for (from, to) in groups.iter().zip(groups_to) {
            max = copy_parts::<E, 4>(max, from, to);
        }
        // No loop over single vectors: the compiler would make it a call of memcpy and a second read.
        if from_tail.len() & 64 != 0 {
            max = copy_parts::<E, 2>(max, from_tail, to_tail);
        }
        if from_tail.len() & 32 != 0 {
            let at = from_tail.len() & 64;
            max = copy_parts::<E, 1>(max, &from_tail[at..], &mut to_tail[at..]);
        }
        if from_tail.len() & 31 == 0 {
            continue;
        }
        // Rows are mostly of 32 bytes and more: the last 32 again is cheaper than a tail of odd length.
        if let (Some(from), Some(to)) = (from.last_chunk::<32>(), to.last_chunk_mut::<32>()) {
            max = copy_parts::<E, 1>(max, from, to);
        } else {
            max = abs_max::<E>(max, load(&padded(from)));
            to.copy_from_slice(from);
        }
    }
    let wrong = if E == F32 {
        _mm256_cmpgt_epi32(max, _mm256_set1_epi32(largest_bits(E)))
    } else {
        _mm256_cmpgt_epi16(max, _mm256_set1_epi16(largest_bits(E) as i16))
    };
    _mm256_testz_si256(wrong, wrong) == 1
}

/// Copies the first `N` vectors and returns `max(max, |x|)`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn copy_parts<const E: u8, const N: usize>(max: __m256i, from: &[u8], to: &mut [u8]) -> __m256i {
    let x: [__m256i; N] = std::array::from_fn(|i| load_full(from, i));
    x.iter().enumerate().for_each(|(i, x)| store_full(to, i, *x));
    x.iter().fold(max, |max, x| abs_max::<E>(max, *x))
}

/// See [`Kernels::int8_encode`](super::Kernels::int8_encode).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn int8_encode(
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    // The common head dims have loops of known length.
    match (element, dim) {
        (ElementType::F16, 64) => encode::<F16, 64>(dim, src, codes, scales),
        (ElementType::F16, 128) => encode::<F16, 128>(dim, src, codes, scales),
        (ElementType::F16, _) => encode::<F16, 0>(dim, src, codes, scales),
        (ElementType::Bf16, 64) => encode::<BF16, 64>(dim, src, codes, scales),
        (ElementType::Bf16, 128) => encode::<BF16, 128>(dim, src, codes, scales),
        (ElementType::Bf16, _) => encode::<BF16, 0>(dim, src, codes, scales),
        (ElementType::F32, 64) => encode::<F32, 64>(dim, src, codes, scales),
        (ElementType::F32, 128) => encode::<F32, 128>(dim, src, codes, scales),
        (ElementType::F32, _) => encode::<F32, 0>(dim, src, codes, scales),
    }
}

/// Encodes 8 rows at a time. `DIM` is `dim`, or 0 for any.
#[target_feature(enable = "avx2,fma,f16c")]
fn encode<const E: u8, const DIM: usize>(
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let dim = if DIM == 0 { dim } else { DIM };
    let row_bytes = dim * element_bytes(E);
    let mut finite = true;
    let batches = src.chunks(8 * row_bytes).zip(codes.chunks_mut(8 * dim));
    for ((src, codes), stored) in batches.zip(scales.chunks_mut(8 * scale_bytes(E))) {
        let mut maxima = [_mm_setzero_si128(); 8];
        for (row, max) in src.chunks_exact(row_bytes).zip(&mut maxima) {
            *max = row_max::<E>(row);
        }
        let (s, wrong) = write_scales::<E>(&maxima, 127.0, stored);
        let (scales, inverses) = (lanes(s), lanes(_mm256_div_ps(_mm256_set1_ps(1.0), s)));
        let rows = src.chunks_exact(row_bytes).zip(codes.chunks_exact_mut(dim));
        for ((row, codes), (s, r)) in rows.zip(scales.iter().zip(&inverses)) {
            prefetch_ahead(row);
            prefetch_ahead(codes);
            encode_row::<E>(row, codes, _mm256_set1_ps(*s), _mm256_set1_ps(*r));
        }
        if wrong != 0 {
            finite = false;
            let rows = codes.chunks_exact_mut(dim).enumerate();
            rows.filter(|(i, _)| wrong >> i & 1 == 1).for_each(|(_, codes)| codes.fill(0));
        }
    }
    finite
}

/// The lanes' largest magnitudes, as integers: for floats these order as the values do, NaN above infinity.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn row_max<const E: u8>(row: &[u8]) -> __m128i {
    let mut max = _mm256_setzero_si256();
    let (groups, tail) = row.as_chunks::<32>();
    for group in groups {
        max = abs_max::<E>(max, load(group));
    }
    if !tail.is_empty() {
        max = abs_max::<E>(max, load(&padded(tail)));
    }
    let (low, high) = (_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    if E == F32 { _mm_max_epu32(low, high) } else { _mm_max_epu16(low, high) }
}

/// `max(max, |x|)` on bit patterns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn abs_max<const E: u8>(max: __m256i, x: __m256i) -> __m256i {
    if E == F32 {
        _mm256_max_epu32(max, _mm256_and_si256(x, _mm256_set1_epi32(0x7FFF_FFFF)))
    } else {
        _mm256_max_epu16(max, _mm256_and_si256(x, _mm256_set1_epi16(0x7FFF)))
    }
}

/// Reduces the maxima of 8 rows, which scales bring to `most`, stores as many scales as `stored` has room for, and returns all 8, with a
/// bit set for every row that has an element which is not finite (its scale is the floor).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn write_scales<const E: u8>(m: &[__m128i; 8], most: f32, stored: &mut [u8]) -> (__m256, u32) {
    // A transpose that takes the maximum of the halves at each step.
    let (max, wrong) = if E == F32 {
        let two = |a, b| _mm_max_epu32(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
        let four = |a, b| _mm_max_epu32(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
        let low = four(two(m[0], m[1]), two(m[2], m[3]));
        let high = four(two(m[4], m[5]), two(m[6], m[7]));
        let max = _mm256_set_m128i(high, low);
        let wrong = _mm256_cmpgt_epi32(max, _mm256_set1_epi32(largest_bits(E)));
        let max = _mm256_andnot_si256(wrong, max);
        (_mm256_castsi256_ps(max), _mm256_movemask_ps(_mm256_castsi256_ps(wrong)))
    } else {
        let two = |a, b| _mm_max_epu16(_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
        let four = |a, b| _mm_max_epu16(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
        let low = four(two(m[0], m[1]), two(m[2], m[3]));
        let high = four(two(m[4], m[5]), two(m[6], m[7]));
        let max = _mm_max_epu16(_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
        let wrong = _mm_cmpgt_epi16(max, _mm_set1_epi16(largest_bits(E) as i16));
        let max = _mm_andnot_si128(wrong, max);
        let wide = if E == F16 {
            _mm256_cvtph_ps(max)
        } else {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(max)))
        };
        (wide, _mm_movemask_epi8(_mm_packs_epi16(wrong, _mm_setzero_si128())))
    };
    let ideal = _mm256_div_ps(max, _mm256_set1_ps(most));
    let (s, bytes) = if E == F16 {
        // Positive f16 order as integers, and the floor is the integer 1.
        let s = _mm_max_epi16(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(ideal), _mm_set1_epi16(1));
        (_mm256_cvtph_ps(s), _mm256_castsi128_si256(s))
    } else {
        let s = _mm256_max_ps(ideal, _mm256_set1_ps(SCALE_FLOOR_F32));
        (s, _mm256_castps_si256(s))
    };
    let mut all = [0; 32];
    store(&mut all, bytes);
    let all = &all[..8 * scale_bytes(E)];
    if stored.len() == all.len() {
        stored.copy_from_slice(all);
    } else {
        stored.copy_from_slice(&all[..stored.len()]);
    }
    (s, wrong.cast_unsigned())
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn encode_row<const E: u8>(row: &[u8], codes: &mut [u8], s: __m256, r: __m256) {
    let (groups, codes_tail) = codes.as_chunks_mut::<32>();
    let mut from = row.chunks_exact(32 * element_bytes(E));
    for (from, to) in from.by_ref().zip(groups) {
        store(to, encode_32::<E>(from, s, r));
    }
    if !codes_tail.is_empty() {
        let from: [u8; 128] = padded(from.remainder());
        let mut to = [0; 32];
        store(&mut to, encode_32::<E>(&from[..32 * element_bytes(E)], s, r));
        codes_tail.copy_from_slice(&to[..codes_tail.len()]);
    }
}

/// The codes of 32 elements, given the scale `s` and `r = 1/s` in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn encode_32<const E: u8>(from: &[u8], s: __m256, r: __m256) -> __m256i {
    // The packs work in each 128-bit half apart: a permutation at the end puts things in order.
    let by_four = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let codes = match E {
        F16 => {
            let offset = 768;
            let q = |i| {
                let x = _mm256_cvtph_ps(load_half(from, i));
                _mm256_cvtps_epi32(_mm256_fmadd_ps(x, r, _mm256_set1_ps(f32::from(offset))))
            };
            let off = _mm256_set1_epi16(offset);
            let low = _mm256_sub_epi16(_mm256_packs_epi32(q(0), q(1)), off);
            let high = _mm256_sub_epi16(_mm256_packs_epi32(q(2), q(3)), off);
            _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), by_four)
        }
        BF16 => {
            let q = |bits| {
                let x = _mm256_castsi256_ps(bits);
                let q0 = _mm256_mul_ps(x, r);
                _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_fnmadd_ps(q0, s, x), r, q0))
            };
            // Even and odd elements apart: a bf16 is the upper half of an f32.
            let q_16 = |i| {
                let x = load_full(from, i);
                let even = q(_mm256_slli_epi32::<16>(x));
                let odd = q(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed())));
                _mm256_blend_epi16::<0b1010_1010>(even, _mm256_slli_epi32::<16>(odd))
            };
            _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(q_16(0), q_16(1)))
        }
        _ => {
            let q = |i| _mm256_cvtps_epi32(_mm256_div_ps(_mm256_castsi256_ps(load_full(from, i)), s));
            let (low, high) = (_mm256_packs_epi32(q(0), q(1)), _mm256_packs_epi32(q(2), q(3)));
            _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), by_four)
        }
    };
    // The packs saturate, so only -128 is left to clamp.
    _mm256_max_epi8(codes, _mm256_set1_epi8(-127))
}

/// See [`Kernels::int8_decode`](super::Kernels::int8_decode).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn int8_decode(
    element: ElementType,
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    match (element, dim) {
        (ElementType::F16, 64) => decode::<F16, 64>(dim, codes, scales, dst, dst_stride),
        (ElementType::F16, 128) => decode::<F16, 128>(dim, codes, scales, dst, dst_stride),
        (ElementType::F16, _) => decode::<F16, 0>(dim, codes, scales, dst, dst_stride),
        (ElementType::Bf16, 64) => decode::<BF16, 64>(dim, codes, scales, dst, dst_stride),
        (ElementType::Bf16, 128) => decode::<BF16, 128>(dim, codes, scales, dst, dst_stride),
        (ElementType::Bf16, _) => decode::<BF16, 0>(dim, codes, scales, dst, dst_stride),
        (ElementType::F32, 64) => decode::<F32, 64>(dim, codes, scales, dst, dst_stride),
        (ElementType::F32, 128) => decode::<F32, 128>(dim, codes, scales, dst, dst_stride),
        (ElementType::F32, _) => decode::<F32, 0>(dim, codes, scales, dst, dst_stride),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn decode<const E: u8, const DIM: usize>(
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let dim = if DIM == 0 { dim } else { DIM };
    let rows = codes.chunks_exact(dim).zip(scales.chunks_exact(scale_bytes(E)));
    for (row, (codes, stored)) in rows.enumerate() {
        let s = read_scale::<E>(stored);
        let out = &mut dst[row * dst_stride..][..dim * element_bytes(E)];
        prefetch_ahead(codes);
        prefetch_ahead(out);
        // False for NaN.
        if s.abs() < saturation::<E>() / 128.0 {
            decode_row::<E, false>(codes, _mm256_set1_ps(s), out);
        } else {
            decode_row::<E, true>(codes, _mm256_set1_ps(s), out);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn read_scale<const E: u8>(stored: &[u8]) -> f32 {
    if E == F16 {
        let bits = u16::from_le_bytes([stored[0], stored[1]]);
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    } else {
        f32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]])
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn decode_row<const E: u8, const SATURATE: bool>(codes: &[u8], s: __m256, out: &mut [u8]) {
    let (groups, codes_tail) = codes.as_chunks::<32>();
    let mut to = out.chunks_exact_mut(32 * element_bytes(E));
    for (from, to) in groups.iter().zip(to.by_ref()) {
        decode_32::<E, SATURATE>(from, s, to);
    }
    if !codes_tail.is_empty() {
        let mut out = [0; 128];
        decode_32::<E, SATURATE>(&padded(codes_tail), s, &mut out[..32 * element_bytes(E)]);
        let to = to.into_remainder();
        to.copy_from_slice(&out[..to.len()]);
    }
}

/// Decodes 32 codes, given the scale `s` in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn decode_32<const E: u8, const SATURATE: bool>(from: &[u8; 32], s: __m256, to: &mut [u8]) {
    let value = |q| {
        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(q), s);
        if SATURATE {
            // `min` answers its second operand for a NaN.
            let max = saturation::<E>();
            _mm256_max_ps(_mm256_min_ps(product, _mm256_set1_ps(max)), _mm256_set1_ps(-max))
        } else {
            product
        }
    };
    for i in 0..2 {
        let q = load_half(from, i);
        if E == BF16 {
            // Even and odd elements apart, rounded half to even in the upper half of each lane.
            let round = |value| {
                let bits = _mm256_castps_si256(value);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd)
            };
            let q = _mm256_cvtepi8_epi16(q);
            let even = round(value(_mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(q))));
            let odd = round(value(_mm256_srai_epi32::<16>(q)));
            store_full(to, i, _mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(even), odd));
            continue;
        }
        let low = value(_mm256_cvtepi8_epi32(q));
        let high = value(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(q)));
        if E == F16 {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high);
            store_full(to, i, _mm256_set_m128i(high, low));
        } else {
            store_full(to, 2 * i, _mm256_castps_si256(low));
            store_full(to, 2 * i + 1, _mm256_castps_si256(high));
        }
    }
}

pub(super) const fn saturation<const E: u8>() -> f32 {
    finite_max(match E {
        F16 => ElementType::F16,
        BF16 => ElementType::Bf16,
        _ => ElementType::F32,
    })
}

/// `bytes` and zeros after them.
#[inline]
pub(super) fn padded<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut all = [0; N];
    all[..bytes.len()].copy_from_slice(bytes);
    all
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn lanes(v: __m256) -> [f32; 8] {
    let mut lanes = [0.0; 8];
    // SAFETY: invariant 2: the array has room for 32 bytes.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), v) };
    lanes
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(from: &[u8; 32]) -> __m256i {
    // SAFETY: invariant 2: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [u8; 32], value: __m256i) {
    // SAFETY: invariant 2: the array has room for 32 bytes.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
}

/// The `i`th 16 bytes of `from`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load_half(from: &[u8], i: usize) -> __m128i {
    let from = &from[16 * i..][..16];
    // SAFETY: invariant 2: the slice has 16 bytes.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}

/// The `i`th 32 bytes of `from`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load_full(from: &[u8], i: usize) -> __m256i {
    let from = &from[32 * i..][..32];
    // SAFETY: invariant 2: the slice has 32 bytes.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

/// To the `i`th 16 bytes of `to`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store_half(to: &mut [u8], i: usize, value: __m128i) {
    let to = &mut to[16 * i..][..16];
    // SAFETY: invariant 2: the slice has room for 16 bytes.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), value) }
}

/// To the `i`th 32 bytes of `to`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store_full(to: &mut [u8], i: usize, value: __m256i) {
    let to = &mut to[32 * i..][..32];
    // SAFETY: invariant 2: the slice has room for 32 bytes.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
}

/// So many bytes before they are read or written, rows are asked for.
pub(super) const AHEAD: usize = 8 << 10;

/// [`prefetch_l2`] of what lies [`AHEAD`].
///
/// Rows that are written need it most: a store waits until its line has been read, and the hardware's own prefetches end with each page.
/// Calls are often of one head alone, so what is asked for is mostly of a later one. Where there is none it is no more than `rows` are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn prefetch_ahead(rows: &[u8]) {
    prefetch_l2(rows, AHEAD);
}

/// Asks for the cache lines `ahead` bytes behind those of `rows`, as far as the second nearest cache.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn prefetch_l2(rows: &[u8], ahead: usize) {
    for at in (0..rows.len()).step_by(64) {
        #[allow(
            unused_unsafe,
            reason = "some compilers of the range that is supported have it as an unsafe function"
        )]
        // SAFETY: a prefetch is allowed at every address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(rows.as_ptr().wrapping_add(ahead + at).cast());
        }
    }
}
