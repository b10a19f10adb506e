//! The `int8` and `fp8` kernels for AVX-512 (F, BW, DQ, VL and VBMI): 64 elements a step, 8 rows' scales at a time.
//!
//! Quotients of `int8` are those of the [AVX2 kernels](super::avx2), whose documentation says why their bytes are those of the definition, but
//! for f32: two corrections by the remainder instead of a division. The first leaves a quotient that is off by less than a unit of
//! its last place, and by Markstein's theorem the second makes it the correctly rounded one.
//!
//! An e4m3 code counts units of 2^(e-3), `e` being the exponent of the number or -6 if that is more: 8 to 15 of them, or fewer in the
//! subnormal numbers. An addition of 2^(e+20) leaves that count in the lowest bits, rounded half to even; the exponents below `e` make
//! 8 codes each. Decoding makes an f16 of the code's fields, which is 2^-8 of the number.

use std::arch::x86_64::*;

use half::f16;

use super::avx2::{
    BF16, F16, F32, element_bytes, lanes, load_full, prefetch_ahead, read_scale, saturation, scale_bytes,
    write_scales,
};
use super::{ElementType, fp8};

/// Whether this CPU can run the functions of this module.
pub(super) fn is_available() -> bool {
    super::avx2::is_available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vbmi")
}

/// See [`Kernels::int8_encode`](super::Kernels::int8_encode).
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn int8_encode(
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    encode_any::<false>(element, dim, src, codes, scales)
}

/// See [`fp8::encode`].
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn fp8_encode(
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    encode_any::<true>(element, dim, src, codes, scales)
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_any<const FP8: bool>(
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    match (element, dim) {
        (ElementType::F16, 64) => encode::<F16, FP8, 64>(dim, src, codes, scales),
        (ElementType::F16, 128) => encode::<F16, FP8, 128>(dim, src, codes, scales),
        (ElementType::F16, _) => encode::<F16, FP8, 0>(dim, src, codes, scales),
        (ElementType::Bf16, 64) => encode::<BF16, FP8, 64>(dim, src, codes, scales),
        (ElementType::Bf16, 128) => encode::<BF16, FP8, 128>(dim, src, codes, scales),
        (ElementType::Bf16, _) => encode::<BF16, FP8, 0>(dim, src, codes, scales),
        (ElementType::F32, 64) => encode::<F32, FP8, 64>(dim, src, codes, scales),
        (ElementType::F32, 128) => encode::<F32, FP8, 128>(dim, src, codes, scales),
        (ElementType::F32, _) => encode::<F32, FP8, 0>(dim, src, codes, scales),
    }
}

#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode<const E: u8, const FP8: bool, const DIM: usize>(
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
        let (s, wrong) = write_scales::<E>(&maxima, if FP8 { fp8::MAX } else { 127.0 }, stored);
        let (scales, inverses) = (lanes(s), lanes(_mm256_div_ps(_mm256_set1_ps(1.0), s)));
        let rows = src.chunks_exact(row_bytes).zip(codes.chunks_exact_mut(dim));
        for ((row, codes), (s, r)) in rows.zip(scales.iter().zip(&inverses)) {
            // An f16 scale that is subnormal may be rounded so far down that codes need a limit.
            let clamp = E == F16 && !FP8 && *s < f16::MIN_POSITIVE.to_f32_const();
            let (s, r) = (_mm512_set1_ps(*s), _mm512_set1_ps(*r));
            // Rows are read twice, the second time from the L1 cache: meanwhile no miss would keep the hardware's own prefetches going.
            prefetch_ahead(row);
            prefetch_ahead(codes);
            if clamp {
                encode_row::<E, FP8, true>(row, codes, s, r)
            } else {
                encode_row::<E, FP8, false>(row, codes, s, r)
            }
        }
        if wrong != 0 {
            finite = false;
            let rows = codes.chunks_exact_mut(dim).enumerate();
            rows.filter(|(i, _)| wrong >> i & 1 == 1).for_each(|(_, codes)| codes.fill(0));
        }
    }
    finite
}

/// The lanes' largest magnitudes, as integers.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn row_max<const E: u8>(row: &[u8]) -> __m128i {
    let mut max = _mm512_setzero_si512();
    let (groups, tail) = row.as_chunks::<64>();
    for group in groups {
        max = abs_max::<E>(max, load(group));
    }
    if !tail.is_empty() {
        max = abs_max::<E>(max, load_some(tail));
    }
    let (low, high) = (_mm512_castsi512_si256(max), _mm512_extracti64x4_epi64::<1>(max));
    let max = if E == F32 { _mm256_max_epu32(low, high) } else { _mm256_max_epu16(low, high) };
    let (low, high) = (_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    if E == F32 { _mm_max_epu32(low, high) } else { _mm_max_epu16(low, high) }
}

/// `max(max, |x|)` on bit patterns.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn abs_max<const E: u8>(max: __m512i, x: __m512i) -> __m512i {
    if E == F32 {
        _mm512_max_epu32(max, _mm512_and_si512(x, _mm512_set1_epi32(0x7FFF_FFFF)))
    } else {
        _mm512_max_epu16(max, _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF)))
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_row<const E: u8, const FP8: bool, const CLAMP: bool>(
    row: &[u8],
    codes: &mut [u8],
    s: __m512,
    r: __m512,
) {
    let (groups, codes_tail) = codes.as_chunks_mut::<64>();
    let mut from = row.chunks_exact(64 * element_bytes(E));
    for (from, to) in from.by_ref().zip(groups) {
        store(to, if FP8 { encode_64_fp8::<E>(from, r) } else { encode_64::<E, CLAMP>(from, s, r) });
    }
    if !codes_tail.is_empty() {
        let mut padded = [0; 256];
        padded[..from.remainder().len()].copy_from_slice(from.remainder());
        let from = &padded[..64 * element_bytes(E)];
        store_some(
            codes_tail,
            if FP8 { encode_64_fp8::<E>(from, r) } else { encode_64::<E, CLAMP>(from, s, r) },
        );
    }
}

/// The codes of 64 elements, given the scale `s` and `r = 1/s` in every lane.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_64<const E: u8, const CLAMP: bool>(from: &[u8], s: __m512, r: __m512) -> __m512i {
    let corrected = |q, x| _mm512_fmadd_ps(_mm512_fnmadd_ps(q, s, x), r, q);
    // Integers whose low bytes are the codes: 768 is a multiple of 256.
    let q: [_; 4] = std::array::from_fn(|i| match E {
        F16 => {
            let x = _mm512_cvtph_ps(load_full(from, i));
            let q = _mm512_cvtps_epi32(_mm512_fmadd_ps(x, r, _mm512_set1_ps(768.0)));
            if CLAMP {
                _mm512_max_epi32(
                    _mm512_min_epi32(q, _mm512_set1_epi32(768 + 127)),
                    _mm512_set1_epi32(768 - 127),
                )
            } else {
                q
            }
        }
        BF16 => {
            // Even and odd elements of 32 apart: a bf16 is the upper half of an f32.
            let x = load_wide(from, i / 2);
            let x = match i % 2 {
                0 => _mm512_slli_epi32::<16>(x),
                _ => _mm512_and_si512(x, _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed())),
            };
            let x = _mm512_castsi512_ps(x);
            _mm512_cvtps_epi32(corrected(_mm512_mul_ps(x, r), x))
        }
        _ => {
            let x = _mm512_castsi512_ps(load_wide(from, i));
            _mm512_cvtps_epi32(corrected(corrected(_mm512_mul_ps(x, r), x), x))
        }
    });
    let (low, high) = (_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    let bytes = _mm512_mask_blend_epi8(0xAAAA_AAAA_AAAA_AAAA, low, _mm512_slli_epi16::<8>(high));
    _mm512_permutexvar_epi8(load(if E == BF16 { &BY_TWO } else { &BY_FOUR }), bytes)
}

/// Where the packs of [`encode_64`], which work in each 128-bit part apart, have left each element.
const BY_FOUR: [u8; 64] = places(false);
/// The same with even and odd elements apart.
const BY_TWO: [u8; 64] = places(true);

const fn places(even_and_odd: bool) -> [u8; 64] {
    let mut places = [0; 64];
    let mut i = 0;
    while i < 64 {
        let (vector, lane) = if even_and_odd { (i / 32 * 2 + i % 2, i % 32 / 2) } else { (i / 16, i % 16) };
        let word = lane / 4 * 8 + vector % 2 * 4 + lane % 4;
        places[i] = (2 * word + vector / 2) as u8;
        i += 1;
    }
    places
}

/// The `fp8` codes of 64 elements, given `r = 1/s` in every lane.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_64_fp8<const E: u8>(from: &[u8], r: __m512) -> __m512i {
    let code = |i| {
        let x = match E {
            F32 => _mm512_castsi512_ps(load_wide(from, i)),
            _ => floats::<E>(load_full(from, i)),
        };
        let y = _mm512_mul_ps(x, r);
        let size = _mm512_range_ps::<0b10_10>(y, _mm512_set1_ps(fp8::MAX));
        let power = _mm512_and_si512(_mm512_castps_si512(size), _mm512_set1_epi32(0x7F80_0000));
        let power = _mm512_max_epi32(power, _mm512_set1_epi32(fp8::NORMAL.to_bits().cast_signed()));
        // 7/8 of the power are 56 units: with 8 for every exponent from 0 on, and not from -6, they are 256 too many.
        let units = _mm512_fmadd_ps(_mm512_castsi512_ps(power), _mm512_set1_ps(1_048_576.0 + 7.0), size);
        let code = _mm512_add_epi32(_mm512_castps_si512(units), _mm512_srli_epi32::<20>(power));
        let sign = _mm512_srli_epi32::<24>(_mm512_castps_si512(y));
        _mm512_or_si512(code, _mm512_and_si512(sign, _mm512_set1_epi32(0x80)))
    };
    // The lowest byte of each lane.
    let two = |i| _mm512_mask_blend_epi8(0x2222_2222_2222_2222, code(i), _mm512_slli_epi32::<8>(code(i + 1)));
    let bytes = _mm512_mask_blend_epi16(0xAAAA_AAAA, two(0), _mm512_slli_epi32::<16>(two(2)));
    _mm512_permutexvar_epi8(load(&BY_LANE), bytes)
}

const BY_LANE: [u8; 64] = {
    let mut places = [0; 64];
    let mut i = 0;
    while i < 64 {
        places[i] = (i % 16 * 4 + i / 16) as u8;
        i += 1;
    }
    places
};

/// See [`Kernels::int8_decode`](super::Kernels::int8_decode).
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn int8_decode(
    element: ElementType,
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    match element {
        ElementType::F16 => decode::<F16, false>(dim, codes, scales, dst, dst_stride),
        ElementType::Bf16 => decode::<BF16, false>(dim, codes, scales, dst, dst_stride),
        ElementType::F32 => decode::<F32, false>(dim, codes, scales, dst, dst_stride),
    }
}

/// See [`fp8::decode`].
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn fp8_decode(
    element: ElementType,
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    match element {
        ElementType::F16 => decode::<F16, true>(dim, codes, scales, dst, dst_stride),
        ElementType::Bf16 => decode::<BF16, true>(dim, codes, scales, dst, dst_stride),
        ElementType::F32 => decode::<F32, true>(dim, codes, scales, dst, dst_stride),
    }
}

#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode<const E: u8, const FP8: bool>(
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let rows = codes.chunks_exact(dim).zip(scales.chunks_exact(scale_bytes(E)));
    for (row, (codes, stored)) in rows.enumerate() {
        let s = read_scale::<E>(stored);
        let out = &mut dst[row * dst_stride..][..dim * element_bytes(E)];
        prefetch_ahead(codes);
        prefetch_ahead(out);
        // No code has more than 128, or 480. False for NaN.
        if s.abs() < saturation::<E>() / 512.0 {
            decode_row::<E, FP8, false>(codes, _mm512_set1_ps(s), out);
        } else {
            decode_row::<E, FP8, true>(codes, _mm512_set1_ps(s), out);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_row<const E: u8, const FP8: bool, const SATURATE: bool>(codes: &[u8], s: __m512, out: &mut [u8]) {
    let (groups, codes_tail) = codes.as_chunks::<32>();
    let mut to = out.chunks_exact_mut(32 * element_bytes(E));
    for (from, to) in groups.iter().zip(to.by_ref()) {
        decode_32::<E, FP8, SATURATE>(load_full(from, 0), s, |i, v| store_wide(to, i, v));
    }
    if !codes_tail.is_empty() {
        let codes = _mm512_castsi512_si256(load_some(codes_tail));
        let mut parts = to.into_remainder().chunks_mut(64);
        decode_32::<E, FP8, SATURATE>(codes, s, |_, v| {
            parts.next().into_iter().for_each(|part| store_some(part, v))
        });
    }
}

/// Decodes 32 codes, given the scale `s` in every lane, and gives `put` one vector of elements after the other.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_32<const E: u8, const FP8: bool, const SATURATE: bool>(
    codes: __m256i,
    s: __m512,
    mut put: impl FnMut(usize, __m512i),
) {
    let scaled = |number| {
        let product = _mm512_mul_ps(number, s);
        if SATURATE { saturated::<E>(product) } else { product }
    };
    if E == BF16 && !FP8 {
        // Even and odd elements apart.
        let q = _mm512_cvtepi8_epi16(codes);
        let even = rounded(scaled(_mm512_cvtepi32_ps(_mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(q)))));
        let odd = rounded(scaled(_mm512_cvtepi32_ps(_mm512_srai_epi32::<16>(q))));
        put(0, _mm512_mask_blend_epi16(0xAAAA_AAAA, _mm512_srli_epi32::<16>(even), odd));
        return;
    }
    let [low, high] = if FP8 {
        // The sign stays where it is, the rest goes down to where f16 has it.
        let signed = _mm512_srai_epi16::<1>(_mm512_slli_epi16::<8>(_mm512_cvtepu8_epi16(codes)));
        let numbers = _mm512_and_si512(signed, _mm512_set1_epi16(0xBFFF_u16.cast_signed()));
        parts(numbers).map(|numbers| scaled(_mm512_mul_ps(_mm512_cvtph_ps(numbers), _mm512_set1_ps(256.0))))
    } else {
        [_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes)]
            .map(|codes| scaled(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))))
    };
    if E == F32 {
        put(0, _mm512_castps_si512(low));
        put(1, _mm512_castps_si512(high));
    } else {
        put(0, _mm512_inserti64x4::<1>(_mm512_castsi256_si512(halves::<E>(low)), halves::<E>(high)));
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn load(from: &[u8; 64]) -> __m512i {
    // SAFETY: invariant 2: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn store(to: &mut [u8; 64], value: __m512i) {
    // SAFETY: invariant 2: the array has room for 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) }
}

/// The `i`th 64 bytes of `from`.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn load_wide(from: &[u8], i: usize) -> __m512i {
    let from = &from[64 * i..][..64];
    // SAFETY: invariant 2: the slice has 64 bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// To the `i`th 64 bytes of `to`.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn store_wide(to: &mut [u8], i: usize, value: __m512i) {
    let to = &mut to[64 * i..][..64];
    // SAFETY: invariant 2: the slice has room for 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) }
}

/// Up to 64 bytes, and zeros after them.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn load_some(from: &[u8]) -> __m512i {
    // SAFETY: invariant 2: the mask has the bytes of the slice alone.
    unsafe { _mm512_maskz_loadu_epi8(first(from.len()), from.as_ptr().cast()) }
}

/// As many of the bytes as there is room for.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn store_some(to: &mut [u8], value: __m512i) {
    // SAFETY: invariant 2: the mask has the bytes of the slice alone.
    unsafe { _mm512_mask_storeu_epi8(to.as_mut_ptr().cast(), first(to.len()), value) }
}

/// Saturated to the finite numbers of the element type.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn saturated<const E: u8>(value: __m512) -> __m512 {
    // `min` answers its second operand for a NaN.
    let max = saturation::<E>();
    _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(max)), _mm512_set1_ps(-max))
}

/// Rounded half to even to bf16, in the upper half of each lane; the lower is of no use.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn rounded(value: __m512) -> __m512i {
    let bits = _mm512_castps_si512(value);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd)
}

/// 16 elements of a 16-bit type.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn floats<const E: u8>(halves: __m256i) -> __m512 {
    match E {
        F16 => _mm512_cvtph_ps(halves),
        _ => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))),
    }
}

/// The inverse of [`floats`]: rounds half to even.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn halves<const E: u8>(x: __m512) -> __m256i {
    match E {
        F16 => _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x),
        _ => _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded(x))),
    }
}

/// The lower and the upper half.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn parts(x: __m512i) -> [__m256i; 2] {
    [_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x)]
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn load_floats(from: &[f32; 16]) -> __m512 {
    _mm512_castsi512_ps(load(bytemuck::cast_ref(from)))
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn store_floats(to: &mut [f32; 16], value: __m512) {
    store(bytemuck::cast_mut(to), _mm512_castps_si512(value));
}

/// Asks for the cache line `at` bytes from the beginning of `from`, if there is such a line.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn prefetch(from: &[u8], at: usize) {
    #[allow(
        unused_unsafe,
        reason = "some compilers of the range that is supported have it as an unsafe function"
    )]
    // SAFETY: a prefetch is allowed at every address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(at).cast())
    }
}

/// A mask of the first `count` bytes, of 64 at most.
const fn first(count: usize) -> u64 {
    if count < 64 { (1 << count) - 1 } else { u64::MAX }
}
