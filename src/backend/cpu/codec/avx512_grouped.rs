//! `int4` and `int2` of 16-bit elements with AVX-512, 32 elements a step: a group of a row of values, or 32 channels of the keys of 32
//! tokens.
//!
//! The arithmetic is that of the definition, but for three things that give the same bytes:
//!
//! - The least and the largest of a group are found among the elements' bits: integers order as the numbers do once the magnitude
//!   bits of negative ones are flipped. What is not finite lies beyond all numbers at either end, so the ends tell that too.
//! - A group of values decodes to no more numbers than there are codes: all are computed once, and looked up.
//! - Keys are not saturated where no channel can need it.
//!
//! What the [AVX2 kernels](super::avx2_grouped) leave to the definition is left to it here too, and f32 to them.

use std::arch::x86_64::*;

use kv_cache_actors::format::{Format, GROUP, RowFormat};
use kv_cache_actors::geometry::Plane;

use super::ElementType;
use super::avx2::{
    BF16, F16, largest_bits, load_full, load_half, padded, prefetch_ahead, saturation, store_full, store_half,
};
use super::avx2_grouped::{self, element, is_wide};
use super::avx512::{
    floats, halves, load, load_floats, load_some, load_wide, parts, prefetch, saturated, store, store_floats,
    store_some,
};
use super::grouped::{self, floor, most};

/// Groups of values that are done together: one in each lane while steps are computed.
const LANES: usize = 16;

/// The longest row of keys: see [`is_wide`].
const DIM_MAX: usize = 256;

/// See [`grouped::encode`].
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn encode(rows: RowFormat, src: &[u8], codes: &mut [u8], scales: &mut [u8]) -> bool {
    match (rows.format, rows.element) {
        _ if !is_wide(rows) => grouped::encode(rows, src, codes, scales),
        (_, ElementType::F32) => avx2_grouped::encode(rows, src, codes, scales),
        (Format::Int4, ElementType::F16) => encode_rows::<4, F16>(rows, src, codes, scales),
        (Format::Int4, ElementType::Bf16) => encode_rows::<4, BF16>(rows, src, codes, scales),
        (_, ElementType::F16) => encode_rows::<2, F16>(rows, src, codes, scales),
        (_, ElementType::Bf16) => encode_rows::<2, BF16>(rows, src, codes, scales),
    }
}

/// See [`grouped::decode`].
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn decode(
    rows: RowFormat,
    skip: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    match (rows.format, rows.element) {
        _ if !is_wide(rows) => grouped::decode(rows, skip, codes, scales, dst, dst_stride),
        (_, ElementType::F32) => avx2_grouped::decode(rows, skip, codes, scales, dst, dst_stride),
        (Format::Int4, ElementType::F16) => decode_rows::<4, F16>(rows, skip, codes, scales, dst, dst_stride),
        (Format::Int4, ElementType::Bf16) => {
            decode_rows::<4, BF16>(rows, skip, codes, scales, dst, dst_stride)
        }
        (_, ElementType::F16) => decode_rows::<2, F16>(rows, skip, codes, scales, dst, dst_stride),
        (_, ElementType::Bf16) => decode_rows::<2, BF16>(rows, skip, codes, scales, dst, dst_stride),
    }
}

#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
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
        .chunks(at_once * 2 * rows.dim)
        .zip(codes.chunks_mut(at_once * rows.row_bytes()))
        .zip(scales.chunks_mut(rows.scales_bytes(at_once)));
    let places = Places::new(rows.groups());
    let mut all = true;
    for ((src, codes), scales) in sets {
        let finite = match rows.plane {
            Plane::Key => encode_keys::<BITS, E>(rows.dim, src, codes, scales),
            Plane::Value => encode_values::<BITS, E>(&places, src, codes, scales),
        };
        all &= finite || grouped::encode(rows, src, codes, scales);
    }
    all
}

/// Bits of 16-bit floats as integers of the same order, and such integers as bits.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn ordered(x: __m512i) -> __m512i {
    _mm512_xor_si512(x, _mm512_and_si512(_mm512_srai_epi16::<15>(x), _mm512_set1_epi16(0x7FFF)))
}

/// Whether no end of a range of [`ordered`] bits lies beyond the numbers.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn are_finite<const E: u8>(low: __m512i, high: __m512i) -> bool {
    let most = largest_bits(E) as i16;
    let above = _mm512_cmpgt_epi16_mask(high, _mm512_set1_epi16(most));
    (above | _mm512_cmplt_epi16_mask(low, _mm512_set1_epi16(!most))) == 0
}

/// What the elements of 16 groups are told apart by: half the least element, and one over half the step as it is stored.
#[derive(Clone, Copy)]
struct Steps {
    half_least: __m512,
    inverse: __m512,
}

/// The least elements and the steps of 16 groups as they are stored, given the ends of their ranges.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn steps<const BITS: usize, const E: u8>(low: __m256i, high: __m256i) -> (__m256i, __m256i, Steps) {
    // One zero, whichever of the two the least element was.
    let least = _mm512_add_ps(floats::<E>(low), _mm512_setzero_ps());
    let half = _mm512_set1_ps(0.5);
    let half_least = _mm512_mul_ps(half, least);
    let span = _mm512_fmsub_ps(half, floats::<E>(high), half_least);
    let ideal = _mm512_div_ps(span, _mm512_set1_ps(0.5 * most(BITS)));
    let step = halves::<E>(_mm512_max_ps(ideal, _mm512_set1_ps(floor(element::<E>()))));
    let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), _mm512_mul_ps(half, floats::<E>(step)));
    (halves::<E>(least), step, Steps { half_least, inverse })
}

/// Keys of 32 tokens. If false nothing of it is of use.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_keys<const BITS: usize, const E: u8>(
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let all = dim / GROUP;
    // As many neighbours as registers have room for: memory is best read in one go.
    let fours = (0..all / 4).all(|four| encode_channels::<BITS, E, 4>(dim, 4 * four, src, codes, scales));
    fours && (all / 4 * 4..all).all(|wide| encode_channels::<BITS, E, 1>(dim, wide, src, codes, scales))
}

/// `N` times 32 channels of the keys of 32 tokens, from the `wide`th 32 on. If false nothing of it is of use.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_channels<const BITS: usize, const E: u8, const N: usize>(
    dim: usize,
    wide: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let (row, row_codes) = (2 * dim, dim * BITS / 8);
    let (leasts, steps_to) = scales.split_at_mut(row);
    let (mut low, mut high) = ([_mm512_set1_epi16(i16::MAX); N], [_mm512_set1_epi16(i16::MIN); N]);
    for src in src.chunks_exact(row) {
        for i in 0..N {
            let x = ordered(load_wide(src, wide + i));
            (low[i], high[i]) = (_mm512_min_epi16(low[i], x), _mm512_max_epi16(high[i], x));
        }
    }
    let mut of = [[Steps { half_least: _mm512_setzero_ps(), inverse: _mm512_setzero_ps() }; 2]; N];
    for (i, of) in of.iter_mut().enumerate() {
        if !are_finite::<E>(low[i], high[i]) {
            return false;
        }
        let (low, high) = (parts(ordered(low[i])), parts(ordered(high[i])));
        for (part, of) in of.iter_mut().enumerate() {
            let (least, step, steps) = steps::<BITS, E>(low[part], high[part]);
            store_full(leasts, 2 * (wide + i) + part, least);
            store_full(steps_to, 2 * (wide + i) + part, step);
            *of = steps;
        }
    }
    for (src, codes) in src.chunks_exact(row).zip(codes.chunks_exact_mut(row_codes)) {
        for (i, of) in of.iter().enumerate() {
            // A line of the next keys.
            prefetch(src, GROUP * row + 64 * (wide + i));
            encode_32::<BITS, E>(src, wide + i, of, &mut codes[4 * BITS * (wide + i)..][..4 * BITS]);
        }
    }
    true
}

/// Where the least elements and the steps of some rows of values lie: those of a row one after the other.
struct Places {
    /// To how they are stored, from 16 least elements and 16 steps; and back.
    stored: [u16; 2 * LANES],
    apart: [u16; 2 * LANES],
}

impl Places {
    fn new(groups: usize) -> Places {
        let (mut stored, mut apart) = ([0; 2 * LANES], [0; 2 * LANES]);
        for group in 0..LANES / groups * groups {
            let (row, column) = (group / groups, group % groups);
            let least = row * 2 * groups + column;
            stored[least] = group as u16;
            stored[least + groups] = (LANES + group) as u16;
            apart[group] = least as u16;
            apart[LANES + group] = (least + groups) as u16;
        }
        Places { stored, apart }
    }
}

/// Some rows of values. If false nothing of it is of use.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_values<const BITS: usize, const E: u8>(
    places: &Places,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let mut x = [_mm512_setzero_si512(); LANES];
    for (src, x) in src.chunks_exact(2 * GROUP).zip(&mut x) {
        *x = ordered(load_wide(src, 0));
    }
    let low = reduced(&x, |a, b| _mm512_min_epi16(a, b));
    let high = reduced(&x, |a, b| _mm512_max_epi16(a, b));
    if !are_finite::<E>(low, high) {
        return false;
    }
    let [low, high] = [low, high].map(|end| _mm512_castsi512_si256(ordered(end)));
    let (least, step, of) = steps::<BITS, E>(low, high);
    let stored = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(least), step);
    store_some(scales, _mm512_permutexvar_epi16(load(bytemuck::cast_ref(&places.stored)), stored));
    let (mut half_least, mut inverse) = ([0.0; LANES], [0.0; LANES]);
    store_floats(&mut half_least, of.half_least);
    store_floats(&mut inverse, of.inverse);
    let inputs = src.chunks_exact(2 * GROUP).zip(codes.chunks_exact_mut(4 * BITS));
    for ((src, codes), (half_least, inverse)) in inputs.zip(half_least.iter().zip(&inverse)) {
        let of = Steps { half_least: _mm512_set1_ps(*half_least), inverse: _mm512_set1_ps(*inverse) };
        // As far ahead as a few batches: each is read twice.
        prefetch(src, 4096);
        encode_32::<BITS, E>(src, 0, &[of, of], codes);
    }
    true
}

/// The least (or largest) word of each of 16 vectors, in the first 16 words; some of them over and over in the others.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn reduced(x: &[__m512i; LANES], pick: impl Fn(__m512i, __m512i) -> __m512i) -> __m512i {
    let two = |i| pick(_mm512_unpacklo_epi16(x[i], x[i + 1]), _mm512_unpackhi_epi16(x[i], x[i + 1]));
    let four = |i| {
        let (a, b) = (two(i), two(i + 2));
        pick(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
    };
    let eight = |i| {
        let (a, b) = (four(i), four(i + 4));
        pick(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
    };
    // Each 128-bit part has something of 8 vectors.
    let (a, b) = (eight(0), eight(8));
    let half = pick(_mm512_shuffle_i64x2::<0b10_00_10_00>(a, b), _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b));
    pick(_mm512_shuffle_i64x2::<0b11_01_10_00>(half, half), _mm512_shuffle_i64x2::<0b10_00_11_01>(half, half))
}

/// The codes of the `i`th 32 elements.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_32<const BITS: usize, const E: u8>(src: &[u8], i: usize, of: &[Steps; 2], codes: &mut [u8]) {
    let q = |part: usize| {
        let x = floats::<E>(load_full(src, 2 * i + part));
        let half = _mm512_fmsub_ps(_mm512_set1_ps(0.5), x, of[part].half_least);
        let off = _mm512_mul_ps(half, of[part].inverse);
        _mm512_cvtps_epi32(_mm512_min_ps(off, _mm512_set1_ps(most(BITS))))
    };
    // The pack works in each 128-bit part apart, so places are looked up at the end. A pair of codes becomes an integer.
    let pairs = _mm512_madd_epi16(_mm512_packs_epi32(q(0), q(1)), _mm512_set1_epi32(1 | 1 << (16 + BITS)));
    if BITS == 4 {
        let packed = _mm512_permutexvar_epi8(load(&PAIRS), pairs);
        store_half(codes, 0, _mm512_castsi512_si128(packed));
    } else {
        let fours = _mm512_or_si512(pairs, _mm512_srli_epi64::<28>(pairs));
        let packed = _mm512_permutexvar_epi8(load(&FOURS), fours);
        codes.copy_from_slice(&_mm_cvtsi128_si64(_mm512_castsi512_si128(packed)).to_le_bytes());
    }
}

/// Where [`encode_32`] has left the bytes of 16 pairs of codes, and of 8 times four.
const PAIRS: [u8; 64] = {
    let mut from = [0; 64];
    let mut i = 0;
    while i < 16 {
        from[i] = (i % 8 / 2 * 16 + i / 8 * 8 + i % 2 * 4) as u8;
        i += 1;
    }
    from
};
const FOURS: [u8; 64] = {
    let mut from = [0; 64];
    let mut i = 0;
    while i < 8 {
        from[i] = (i % 4 * 16 + i / 4 * 8) as u8;
        i += 1;
    }
    from
};

#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_rows<const BITS: usize, const E: u8>(
    rows: RowFormat,
    skip: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    match rows.plane {
        Plane::Key => decode_keys::<BITS, E>(rows, skip, codes, scales, dst, dst_stride),
        Plane::Value => decode_values::<BITS, E>(rows, codes, scales, dst, dst_stride),
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_keys<const BITS: usize, const E: u8>(
    rows: RowFormat,
    skip: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let (row, row_codes) = (2 * rows.dim, rows.row_bytes());
    let count = codes.len() / row_codes;
    let (mut least, mut step) = ([0.0; DIM_MAX], [0.0; DIM_MAX]);
    let (least, step) = (&mut least[..rows.dim], &mut step[..rows.dim]);
    let (mut from, mut skip) = (0, skip);
    for scales in scales.chunks_exact(rows.scale_bytes()) {
        // The rows of these scales.
        let until = count.min(from + GROUP - skip);
        let mut within = u16::MAX;
        let channels = least.as_chunks_mut::<16>().0.iter_mut().zip(step.as_chunks_mut::<16>().0);
        for (i, (least, step)) in channels.enumerate() {
            let m = floats::<E>(load_full(&scales[..row], i));
            let s = floats::<E>(load_full(&scales[row..], i));
            store_floats(least, m);
            store_floats(step, s);
            let end = _mm512_fmadd_ps(_mm512_abs_ps(s), _mm512_set1_ps(most(BITS)), _mm512_abs_ps(m));
            // False for NaN.
            within &= _mm512_cmplt_ps_mask(end, _mm512_set1_ps(saturation::<E>()));
        }
        for at in from..until {
            let codes = &codes[at * row_codes..][..row_codes];
            let out = &mut dst[at * dst_stride..][..row];
            prefetch_ahead(out);
            if within == u16::MAX {
                decode_key::<BITS, E, false>(codes, least, step, out);
            } else {
                decode_key::<BITS, E, true>(codes, least, step, out);
            }
        }
        (from, skip) = (until, 0);
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_key<const BITS: usize, const E: u8, const SATURATE: bool>(
    codes: &[u8],
    least: &[f32],
    step: &[f32],
    out: &mut [u8],
) {
    let ends = least.as_chunks::<16>().0.iter().zip(step.as_chunks::<16>().0);
    for ((codes, (least, step)), out) in
        codes.chunks_exact(2 * BITS).zip(ends).zip(out.as_chunks_mut::<32>().0)
    {
        // Code `i` begins at bit `i * BITS`; the look-up minds the lowest four bits.
        let all = if BITS == 4 {
            _mm512_set1_epi64(i64::from_le_bytes(padded(codes)))
        } else {
            _mm512_set1_epi32(i32::from_le_bytes(padded(codes)))
        };
        let q = _mm512_multishift_epi64_epi8(load(const { &shifts(4, BITS, 16) }), all);
        let q = _mm512_permutexvar_ps(q, numbers::<BITS>());
        let value = _mm512_fmadd_ps(q, load_floats(step), load_floats(least));
        store_full(out, 0, halves::<E>(if SATURATE { saturated::<E>(value) } else { value }));
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_values<const BITS: usize, const E: u8>(
    rows: RowFormat,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let (row_codes, groups) = (rows.row_bytes(), rows.groups());
    let at_once = LANES / groups;
    let places = Places::new(groups);
    let batches = codes.chunks(at_once * row_codes).zip(scales.chunks(at_once * rows.scale_bytes()));
    for (batch, (codes, scales)) in batches.enumerate() {
        let apart = _mm512_permutexvar_epi16(load(bytemuck::cast_ref(&places.apart)), load_some(scales));
        let (mut least, mut step) = ([0.0; LANES], [0.0; LANES]);
        store_floats(&mut least, floats::<E>(parts(apart)[0]));
        store_floats(&mut step, floats::<E>(parts(apart)[1]));
        let mut ends = least.iter().zip(&step);
        for (at, codes) in codes.chunks_exact(row_codes).enumerate() {
            let out = &mut dst[(batch * at_once + at) * dst_stride..][..2 * rows.dim];
            prefetch_ahead(out);
            let inputs = codes.chunks_exact(4 * BITS).zip(ends.by_ref());
            for ((codes, (least, step)), out) in inputs.zip(out.as_chunks_mut::<64>().0) {
                let value = _mm512_fmadd_ps(numbers::<BITS>(), _mm512_set1_ps(*step), _mm512_set1_ps(*least));
                let table = _mm512_broadcast_i64x4(halves::<E>(saturated::<E>(value)));
                // Four codes in every 64 bits; the look-up minds the lowest five bits, and the table is there twice.
                let fours = if BITS == 4 {
                    _mm512_cvtepu16_epi64(load_half(codes, 0))
                } else {
                    _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(padded(codes))))
                };
                let q = _mm512_multishift_epi64_epi8(load(const { &shifts(2, BITS, 4) }), fours);
                store(out, _mm512_permutexvar_epi16(q, table));
            }
        }
    }
}

/// How far down to shift for the code of each lane, in the lowest of the lane's `bytes`: every `count` lanes share their 64 bits, or
/// have them alike.
const fn shifts(bytes: usize, bits: usize, count: usize) -> [u8; 64] {
    let mut shifts = [0; 64];
    let mut lane = 0;
    while lane < 64 / bytes {
        shifts[lane * bytes] = (lane % count * bits) as u8;
        lane += 1;
    }
    shifts
}

/// Codes as numbers, over and over.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn numbers<const BITS: usize>() -> __m512 {
    let codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << BITS) - 1)))
}
