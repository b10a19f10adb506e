//! `int4` and `int2` with AVX2, 32 elements a step: a group of a row of values, or 32 channels of the keys of 32 tokens.
//!
//! The arithmetic is that of the definition, operation by operation. Groups with elements that are not finite, which are rare, and
//! dims that are no multiple of 32 go to the definition itself.

use std::arch::x86_64::*;

use kv_cache_actors::format::{Format, GROUP, RowFormat};
use kv_cache_actors::geometry::Plane;

use super::ElementType;
use super::avx2::{
    BF16, F16, F32, element_bytes, lanes, load_half, padded, prefetch_ahead, saturation, store_full,
    store_half,
};
use super::avx2_rotated::{halves, load_8, store_8};
use super::grouped::{self, floor, most};

/// Groups of values that are done together: one in each lane while steps are computed.
const LANES: usize = 8;

/// See [`grouped::encode`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn encode(rows: RowFormat, src: &[u8], codes: &mut [u8], scales: &mut [u8]) -> bool {
    if !is_wide(rows) {
        return grouped::encode(rows, src, codes, scales);
    }
    match (rows.format, rows.element) {
        (Format::Int4, ElementType::F16) => encode_rows::<4, F16>(rows, src, codes, scales),
        (Format::Int4, ElementType::Bf16) => encode_rows::<4, BF16>(rows, src, codes, scales),
        (Format::Int4, ElementType::F32) => encode_rows::<4, F32>(rows, src, codes, scales),
        (_, ElementType::F16) => encode_rows::<2, F16>(rows, src, codes, scales),
        (_, ElementType::Bf16) => encode_rows::<2, BF16>(rows, src, codes, scales),
        (_, ElementType::F32) => encode_rows::<2, F32>(rows, src, codes, scales),
    }
}

/// See [`grouped::decode`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode(
    rows: RowFormat,
    skip: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    if !is_wide(rows) {
        return grouped::decode(rows, skip, codes, scales, dst, dst_stride);
    }
    match (rows.format, rows.element) {
        (Format::Int4, ElementType::F16) => decode_rows::<4, F16>(rows, skip, codes, scales, dst, dst_stride),
        (Format::Int4, ElementType::Bf16) => {
            decode_rows::<4, BF16>(rows, skip, codes, scales, dst, dst_stride)
        }
        (Format::Int4, ElementType::F32) => decode_rows::<4, F32>(rows, skip, codes, scales, dst, dst_stride),
        (_, ElementType::F16) => decode_rows::<2, F16>(rows, skip, codes, scales, dst, dst_stride),
        (_, ElementType::Bf16) => decode_rows::<2, BF16>(rows, skip, codes, scales, dst, dst_stride),
        (_, ElementType::F32) => decode_rows::<2, F32>(rows, skip, codes, scales, dst, dst_stride),
    }
}

pub(super) fn is_wide(rows: RowFormat) -> bool {
    rows.dim.is_multiple_of(GROUP) && rows.dim <= LANES * GROUP
}

#[target_feature(enable = "avx2,fma,f16c")]
fn encode_rows<const BITS: usize, const E: u8>(
    rows: RowFormat,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let at_once = match rows.plane {
        Plane::Key => GROUP,
        Plane::Value => LANES / rows.groups(),
    };
    let sets = src
        .chunks(at_once * rows.dim * element_bytes(E))
        .zip(codes.chunks_mut(at_once * rows.row_bytes()))
        .zip(scales.chunks_mut(rows.scales_bytes(at_once)));
    let mut all = true;
    for ((src, codes), scales) in sets {
        let finite = match rows.plane {
            Plane::Key => encode_keys::<BITS, E>(rows.dim, src, codes, scales),
            Plane::Value => encode_values::<BITS, E>(rows.groups(), src, codes, scales),
        };
        all &= finite || grouped::encode(rows, src, codes, scales);
    }
    all
}

/// The least and the largest elements of groups, lane by lane, and whether all that went into them is finite.
#[derive(Clone, Copy)]
struct Range {
    low: __m256,
    high: __m256,
    /// No number once anything was not finite.
    check: __m256,
}

impl Range {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn none() -> Range {
        Range { low: _mm256_set1_ps(f32::MAX), high: _mm256_set1_ps(f32::MIN), check: _mm256_setzero_ps() }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add(&mut self, x: __m256) {
        self.low = _mm256_min_ps(self.low, x);
        self.high = _mm256_max_ps(self.high, x);
        self.check = _mm256_fmadd_ps(x, _mm256_setzero_ps(), self.check);
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn is_finite(&self) -> bool {
        _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.check, self.check)) == 0
    }
}

/// What the elements of 8 groups are told apart by: half the least element, and one over half the step as it is stored.
#[derive(Clone, Copy)]
struct Steps {
    half_least: __m256,
    inverse: __m256,
}

/// Stores the least elements and steps of 8 groups.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn write_steps<const BITS: usize, const E: u8>(
    low: __m256,
    high: __m256,
    leasts: &mut [u8],
    steps: &mut [u8],
) -> Steps {
    let element = element::<E>();
    // One zero, whichever of the two the least element was.
    let least = _mm256_add_ps(low, _mm256_setzero_ps());
    let half = _mm256_set1_ps(0.5);
    let half_least = _mm256_mul_ps(half, least);
    let ideal = _mm256_div_ps(_mm256_fmsub_ps(half, high, half_least), _mm256_set1_ps(0.5 * most(BITS)));
    store_8::<E>(steps, 0, _mm256_max_ps(ideal, _mm256_set1_ps(floor(element))));
    store_8::<E>(leasts, 0, least);
    let half_step = _mm256_mul_ps(half, load_8::<E>(steps, 0));
    Steps { half_least, inverse: _mm256_div_ps(_mm256_set1_ps(1.0), half_step) }
}

/// Keys of 32 tokens. If false nothing of it is of use.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn encode_keys<const BITS: usize, const E: u8>(
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let (row, row_codes, bytes) = (dim * element_bytes(E), dim * BITS / 8, 8 * element_bytes(E));
    let (leasts, steps) = scales.split_at_mut(row);
    for wide in 0..dim / GROUP {
        let mut range = [Range::none(); 4];
        for src in src.chunks_exact(row) {
            range.iter_mut().enumerate().for_each(|(i, range)| range.add(load_8::<E>(src, 4 * wide + i)));
        }
        if !range.iter().all(|range| range.is_finite()) {
            return false;
        }
        let four = std::array::from_fn(|i| {
            let at = (4 * wide + i) * bytes;
            let (leasts, steps) = (&mut leasts[at..at + bytes], &mut steps[at..at + bytes]);
            write_steps::<BITS, E>(range[i].low, range[i].high, leasts, steps)
        });
        for (src, codes) in src.chunks_exact(row).zip(codes.chunks_exact_mut(row_codes)) {
            let x = std::array::from_fn(|i| load_8::<E>(src, 4 * wide + i));
            encode_32::<BITS>(x, &four, &mut codes[4 * BITS * wide..][..4 * BITS]);
        }
    }
    true
}

/// Some rows of values, of `groups` groups each. If false nothing of it is of use.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn encode_values<const BITS: usize, const E: u8>(
    groups: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let mut range = [Range::none(); LANES];
    for (src, range) in src.chunks_exact(GROUP * element_bytes(E)).zip(&mut range) {
        (0..4).for_each(|i| range.add(load_8::<E>(src, i)));
    }
    if !range.iter().all(|range| range.is_finite()) {
        return false;
    }
    let low = reduced(range.map(|range| range.low), |a, b| _mm256_min_ps(a, b));
    let high = reduced(range.map(|range| range.high), |a, b| _mm256_max_ps(a, b));
    let (mut leasts, mut steps) = ([0; 32], [0; 32]);
    let eight = write_steps::<BITS, E>(low, high, &mut leasts, &mut steps);
    let row = groups * element_bytes(E);
    for (at, scales) in scales.chunks_exact_mut(2 * row).enumerate() {
        scales[..row].copy_from_slice(&leasts[at * row..][..row]);
        scales[row..].copy_from_slice(&steps[at * row..][..row]);
    }
    let (half_least, inverse) = (lanes(eight.half_least), lanes(eight.inverse));
    let inputs = src.chunks_exact(GROUP * element_bytes(E)).zip(codes.chunks_exact_mut(4 * BITS));
    for (at, (src, codes)) in inputs.enumerate() {
        let of = Steps { half_least: _mm256_set1_ps(half_least[at]), inverse: _mm256_set1_ps(inverse[at]) };
        let x = [load_8::<E>(src, 0), load_8::<E>(src, 1), load_8::<E>(src, 2), load_8::<E>(src, 3)];
        encode_32::<BITS>(x, &[of; 4], codes);
    }
    true
}

/// The least (or largest) lane of each of 8 vectors.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn reduced(v: [__m256; 8], pick: impl Fn(__m256, __m256) -> __m256) -> __m256 {
    let two = |a, b| pick(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let four = |a, b| {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        let (low, high) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
        pick(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
    };
    let low = four(two(v[0], v[1]), two(v[2], v[3]));
    let high = four(two(v[4], v[5]), two(v[6], v[7]));
    pick(_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
}

/// The codes of 32 elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn encode_32<const BITS: usize>(x: [__m256; 4], steps: &[Steps; 4], codes: &mut [u8]) {
    let q = |i: usize| {
        let half = _mm256_fmsub_ps(_mm256_set1_ps(0.5), x[i], steps[i].half_least);
        let off = _mm256_mul_ps(half, steps[i].inverse);
        _mm256_cvtps_epi32(_mm256_min_ps(off, _mm256_set1_ps(most(BITS))))
    };
    // The packs work in each 128-bit half apart: a permutation puts things in order.
    let (low, high) = (_mm256_packs_epi32(q(0), q(1)), _mm256_packs_epi32(q(2), q(3)));
    let by_four = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), by_four);
    if BITS == 4 {
        let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
        let packed = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi16(pairs, pairs));
        store_half(codes, 0, _mm256_castsi256_si128(packed));
    } else {
        let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0401));
        let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x0010_0001));
        let packed = _mm256_packs_epi32(fours, fours);
        let packed = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi16(packed, packed));
        let eight = _mm_shuffle_epi32::<0b10_00>(_mm256_castsi256_si128(packed));
        codes.copy_from_slice(&_mm_cvtsi128_si64(eight).to_le_bytes());
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn decode_rows<const BITS: usize, const E: u8>(
    rows: RowFormat,
    skip: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    if E != F32 && rows.plane == Plane::Value {
        return decode_values::<BITS, E>(rows, codes, scales, dst, dst_stride);
    }
    let (row, row_codes) = (rows.dim * element_bytes(E), rows.row_bytes());
    let part = GROUP * element_bytes(E);
    let count = codes.len() / row_codes;
    let (mut from, mut skip) = (0, skip);
    for scales in scales.chunks_exact(rows.scale_bytes()) {
        // The rows of these scales.
        let until = count.min(from + rows.scale_rows() - skip);
        let (leasts, steps) = scales.split_at(scales.len() / 2);
        for wide in 0..rows.dim / GROUP {
            let four: [_; 4] = std::array::from_fn(|i| match rows.plane {
                Plane::Key => (load_8::<E>(leasts, 4 * wide + i), load_8::<E>(steps, 4 * wide + i)),
                Plane::Value => (spread::<E>(leasts, wide), spread::<E>(steps, wide)),
            });
            for at in from..until {
                let codes = &codes[at * row_codes + 4 * BITS * wide..][..4 * BITS];
                let out = &mut dst[at * dst_stride..][..row];
                prefetch_ahead(&out[wide * part..][..part]);
                for (i, code) in codes_of::<BITS>(codes).into_iter().enumerate() {
                    let (least, step) = four[i];
                    store_8::<E>(out, 4 * wide + i, value_of::<E>(code, step, least));
                }
            }
        }
        (from, skip) = (until, 0);
    }
}

/// Values of a 16-bit type. A group has no more of them than there are codes: they are computed once, and looked up by their bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn decode_values<const BITS: usize, const E: u8>(
    rows: RowFormat,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let numbers =
        [_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)];
    let inputs = codes.chunks_exact(rows.row_bytes()).zip(scales.chunks_exact(rows.scale_bytes()));
    for (row, (codes, scales)) in inputs.enumerate() {
        let (leasts, steps) = scales.split_at(scales.len() / 2);
        let out = &mut dst[row * dst_stride..][..2 * rows.dim];
        prefetch_ahead(out);
        for (group, codes) in codes.chunks_exact(4 * BITS).enumerate() {
            let (least, step) = (spread::<E>(leasts, group), spread::<E>(steps, group));
            let [a, b] = numbers.map(|numbers| {
                let codes = _mm256_and_si256(numbers, _mm256_set1_epi32((1 << BITS) - 1));
                halves::<E>(value_of::<E>(codes, step, least))
            });
            let byte = _mm_set1_epi16(0xFF);
            let low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
            let high = _mm_packus_epi16(_mm_srli_epi16::<8>(a), _mm_srli_epi16::<8>(b));
            let [first, last] = code_bytes::<BITS>(codes);
            let codes = _mm256_set_m128i(last, first);
            let low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), codes);
            let high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(high), codes);
            // Each 128-bit half has 16 elements, of which these take the first 8 and the others.
            let (a, b) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
            store_full(out, 2 * group, _mm256_permute2x128_si256::<0x20>(a, b));
            store_full(out, 2 * group + 1, _mm256_permute2x128_si256::<0x31>(a, b));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn value_of<const E: u8>(code: __m256i, step: __m256, least: __m256) -> __m256 {
    let value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), step, least);
    // `min` answers its second operand for a NaN.
    let max = saturation::<E>();
    _mm256_max_ps(_mm256_min_ps(value, _mm256_set1_ps(max)), _mm256_set1_ps(-max))
}

/// Element `i` in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn spread<const E: u8>(of: &[u8], i: usize) -> __m256 {
    let bytes = &of[i * element_bytes(E)..][..element_bytes(E)];
    if E == F32 {
        return _mm256_set1_ps(f32::from_le_bytes(padded(bytes)));
    }
    let bits = u16::from_le_bytes(padded(bytes));
    match E {
        F16 => _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))),
        _ => _mm256_set1_ps(f32::from_bits(u32::from(bits) << 16)),
    }
}

/// 32 codes as integers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn codes_of<const BITS: usize>(codes: &[u8]) -> [__m256i; 4] {
    let [low, high] = code_bytes::<BITS>(codes);
    [
        _mm256_cvtepu8_epi32(low),
        _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(low)),
        _mm256_cvtepu8_epi32(high),
        _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(high)),
    ]
}

/// 32 codes as bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn code_bytes<const BITS: usize>(codes: &[u8]) -> [__m128i; 2] {
    if BITS == 4 {
        let (bytes, mask) = (load_half(codes, 0), _mm_set1_epi8(15));
        let (even, odd) = (_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask));
        [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)]
    } else {
        let (bytes, mask) = (_mm_cvtsi64_si128(i64::from_le_bytes(padded(codes))), _mm_set1_epi8(3));
        let first =
            _mm_unpacklo_epi8(_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16::<2>(bytes), mask));
        let second = _mm_unpacklo_epi8(
            _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask),
            _mm_and_si128(_mm_srli_epi16::<6>(bytes), mask),
        );
        [_mm_unpacklo_epi16(first, second), _mm_unpackhi_epi16(first, second)]
    }
}

pub(super) const fn element<const E: u8>() -> ElementType {
    match E {
        F16 => ElementType::F16,
        BF16 => ElementType::Bf16,
        _ => ElementType::F32,
    }
}
