//! `r4`, `r3` and `r2` with AVX-512: 16 rows at a time, one in each lane, as in the
//! [AVX2 kernels](super::avx2_rotated).
//!
//! The transform is done in two passes over a batch, four levels and then the others, with up to 16 elements in registers; dims whose
//! groups have fewer than 32 elements go to the AVX2 kernels. The transposes at the ends are of 16-bit elements where these are such, half
//! the work of floats.
//!
//! The code of a place is looked up, whatever the size of the book.

use std::arch::x86_64::*;

use super::ElementType;
use super::avx2::{
    BF16, F16, F32, element_bytes, load_full, load_half, padded, prefetch_ahead, saturation, store_full,
};
use super::avx2_rotated;
use super::avx512::{
    floats, halves, load, load_floats, load_wide, parts, prefetch, saturated, store, store_floats, store_wide,
};
use super::rotated::{self, NEAR, WHOLE, flips, group, root};

/// See [`rotated::encode`].
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn encode(
    bits: usize,
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    factors: &mut [u8],
) -> bool {
    match (bits, element) {
        _ if !is_wide(dim) => avx2_rotated::encode(bits, element, dim, src, codes, factors),
        (4, ElementType::F16) => encode_dim::<4, F16>(dim, src, codes, factors),
        (4, ElementType::Bf16) => encode_dim::<4, BF16>(dim, src, codes, factors),
        (4, ElementType::F32) => encode_dim::<4, F32>(dim, src, codes, factors),
        (3, ElementType::F16) => encode_dim::<3, F16>(dim, src, codes, factors),
        (3, ElementType::Bf16) => encode_dim::<3, BF16>(dim, src, codes, factors),
        (3, ElementType::F32) => encode_dim::<3, F32>(dim, src, codes, factors),
        (_, ElementType::F16) => encode_dim::<2, F16>(dim, src, codes, factors),
        (_, ElementType::Bf16) => encode_dim::<2, BF16>(dim, src, codes, factors),
        (_, ElementType::F32) => encode_dim::<2, F32>(dim, src, codes, factors),
    }
}

/// See [`rotated::decode`].
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
pub(super) fn decode(
    bits: usize,
    element: ElementType,
    dim: usize,
    codes: &[u8],
    factors: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    match (bits, element) {
        _ if !is_wide(dim) => avx2_rotated::decode(bits, element, dim, codes, factors, dst, dst_stride),
        (4, ElementType::F16) => decode_dim::<4, F16>(dim, codes, factors, dst, dst_stride),
        (4, ElementType::Bf16) => decode_dim::<4, BF16>(dim, codes, factors, dst, dst_stride),
        (4, ElementType::F32) => decode_dim::<4, F32>(dim, codes, factors, dst, dst_stride),
        (3, ElementType::F16) => decode_dim::<3, F16>(dim, codes, factors, dst, dst_stride),
        (3, ElementType::Bf16) => decode_dim::<3, BF16>(dim, codes, factors, dst, dst_stride),
        (3, ElementType::F32) => decode_dim::<3, F32>(dim, codes, factors, dst, dst_stride),
        (_, ElementType::F16) => decode_dim::<2, F16>(dim, codes, factors, dst, dst_stride),
        (_, ElementType::Bf16) => decode_dim::<2, BF16>(dim, codes, factors, dst, dst_stride),
        (_, ElementType::F32) => decode_dim::<2, F32>(dim, codes, factors, dst, dst_stride),
    }
}

/// Rows are done in batches of this many.
const LANES: usize = 16;

/// Elements whose codes are written and read together.
const STEP: usize = 32;

fn is_wide(dim: usize) -> bool {
    dim.is_multiple_of(STEP)
}

/// The sign bit of each element that changes its sign.
const FLIPS: [i32; 256] = {
    let mut bits = [0; 256];
    let mut i = 0;
    while i < 256 {
        bits[i] = if flips(i) { i32::MIN } else { 0 };
        i += 1;
    }
    bits
};

/// The sign bit of element `i` in every lane if it changes its sign.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn flip(i: usize) -> __m512i {
    _mm512_set1_epi32(FLIPS[i % FLIPS.len()])
}

/// The common head dims have loops of known length.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_dim<const BITS: usize, const E: u8>(
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    factors: &mut [u8],
) -> bool {
    match dim {
        64 => encode_rows::<BITS, E, 64>(dim, src, codes, factors),
        128 => encode_rows::<BITS, E, 128>(dim, src, codes, factors),
        _ => encode_rows::<BITS, E, 0>(dim, src, codes, factors),
    }
}

#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_rows<const BITS: usize, const E: u8, const DIM: usize>(
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    factors: &mut [u8],
) -> bool {
    let dim = if DIM == 0 { dim } else { DIM };
    let (raw_bytes, code_bytes) = (LANES * element_bytes(E) * dim, LANES * dim * BITS / 8);
    let zero = _mm512_setzero_ps();
    // On the stack where `DIM` says how much: calls are of few rows where keys have centres.
    let (mut of_dim, mut units_of_dim, mut of_any) = ([zero; DIM], [zero; 32], Vec::new());
    let (y, units) = if DIM == 0 {
        of_any.resize(dim + dim / 4, zero);
        of_any.split_at_mut(dim)
    } else {
        (&mut of_dim[..], &mut units_of_dim[..DIM / 4])
    };
    let mut finite = true;
    let mut batch = |src: &[u8], codes: &mut [u8], factors: &mut [u8]| {
        prefetch_ahead(codes);
        finite &= encode_batch::<BITS, E, DIM>(y, units, src, codes, factors);
    };
    let batches = src.chunks(raw_bytes).zip(codes.chunks_mut(code_bytes)).zip(factors.chunks_mut(LANES * 2));
    for ((src, codes), factors) in batches {
        if src.len() == raw_bytes {
            batch(src, codes, factors);
            continue;
        }
        // The last rows, and zeros.
        let (mut all, mut all_codes, mut all_factors) =
            (vec![0; raw_bytes], vec![0; code_bytes], [0; LANES * 2]);
        all[..src.len()].copy_from_slice(src);
        batch(&all, &mut all_codes, &mut all_factors);
        codes.copy_from_slice(&all_codes[..codes.len()]);
        factors.copy_from_slice(&all_factors[..factors.len()]);
    }
    finite
}

/// Encodes 16 rows. `units` has room for two sums of each 8 elements.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn encode_batch<const BITS: usize, const E: u8, const DIM: usize>(
    y: &mut [__m512],
    units: &mut [__m512],
    src: &[u8],
    codes: &mut [u8],
    factors: &mut [u8],
) -> bool {
    let dim = if DIM == 0 { y.len() } else { DIM };
    let src = &src[..LANES * element_bytes(E) * dim];
    let (y, codes) = (&mut y[..dim], &mut codes[..LANES * dim * BITS / 8]);
    let one = _mm512_set1_ps(1.0);
    let max = load_rows::<E, DIM, false>(src, y, one);
    last_levels(y);
    let mut square = square_of(y, units);
    let (mut power, far) = (one, !near(square));
    if E != F16 && far != 0 {
        // All go again, those that are near as they are.
        power = _mm512_mask_mov_ps(one, far, power_below(max));
        load_rows::<E, DIM, true>(src, y, _mm512_div_ps(one, power));
        last_levels(y);
        square = square_of(y, units);
    }
    let (ideal, zero) = choose::<BITS, DIM>(y, square, units, codes);
    let mut factor = [0.0; LANES];
    store_floats(&mut factor, _mm512_mul_ps(ideal, power));
    let wrong = _mm512_cmpgt_epu32_mask(_mm512_castps_si512(max), _mm512_set1_epi32(0x7F7F_FFFF));
    let nothing = wrong | zero;
    let stored = codes.chunks_exact_mut(dim * BITS / 8).zip(factors.chunks_exact_mut(2));
    for (lane, ((codes, stored), factor)) in stored.zip(factor).enumerate() {
        let none = nothing >> lane & 1 == 1;
        if none {
            codes.fill(0);
        }
        rotated::write_factor(if none { 0.0 } else { factor }, stored);
    }
    wrong == 0
}

/// Loads 16 rows, signs changed, one in each lane of `y`, times `scale` if they are `SCALED`, and does the first levels of the transform.
/// Returns the lanes' largest magnitudes: of what is not finite, if there is any.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn load_rows<const E: u8, const DIM: usize, const SCALED: bool>(
    src: &[u8],
    y: &mut [__m512],
    scale: __m512,
) -> __m512 {
    let dim = if DIM == 0 { y.len() } else { DIM };
    let (y, src, row_parts) = (&mut y[..dim], &src[..LANES * element_bytes(E) * dim], dim / 16);
    let (mut max, mut max_of_f32) = (_mm256_setzero_si256(), _mm512_setzero_si512());
    for (part, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // The lines of the next rows, one after the other. Rows of f32 are mostly differences, which lie near, and end soon.
        if E != F32 {
            (0..8).for_each(|i| prefetch(src, src.len() + (8 * part + i) * 64));
        }
        let changed = |i: usize, x: __m512| {
            let x = _mm512_castps_si512(if SCALED { _mm512_mul_ps(x, scale) } else { x });
            _mm512_castsi512_ps(_mm512_xor_si512(x, flip(16 * part + i)))
        };
        if E == F32 {
            let row = |lane| _mm512_castsi512_ps(load_wide(src, lane * row_parts + part));
            let loaded = transposed_floats(std::array::from_fn(row));
            for x in loaded {
                max_of_f32 = _mm512_max_epu32(max_of_f32, _mm512_castps_si512(_mm512_abs_ps(x)));
            }
            *y = std::array::from_fn(|i| changed(i, loaded[i]));
        } else {
            let loaded = transposed(std::array::from_fn(|lane| load_full(src, lane * row_parts + part)));
            for x in loaded {
                max = _mm256_max_epu16(max, _mm256_and_si256(x, _mm256_set1_epi16(0x7FFF)));
            }
            *y = std::array::from_fn(|i| changed(i, floats::<E>(loaded[i])));
        }
        levels(y);
    }
    if E == F32 { _mm512_castsi512_ps(max_of_f32) } else { floats::<E>(max) }
}

/// Which sums of squares are those of rows that are rotated as they are.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn near(square: __m512) -> u16 {
    _mm512_cmp_ps_mask::<_CMP_GE_OQ>(square, _mm512_set1_ps(*NEAR.start()))
        & _mm512_cmp_ps_mask::<_CMP_LE_OQ>(square, _mm512_set1_ps(*NEAR.end()))
}

/// What other rows are divided by, whose largest magnitudes are `max`. Its reciprocal is exact.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn power_below(max: __m512) -> __m512 {
    let exponent = _mm512_and_si512(_mm512_castps_si512(max), _mm512_set1_epi32(0x7F80_0000));
    let exponent = _mm512_min_epi32(exponent, _mm512_set1_epi32(253 << 23));
    _mm512_castsi512_ps(_mm512_max_epi32(exponent, _mm512_set1_epi32(1 << 23)))
}

/// The sums of the squares of 16 rows.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn square_of(y: &[__m512], units: &mut [__m512]) -> __m512 {
    let squares = &mut units[..y.len() / 8];
    for (y, square) in y.as_chunks::<8>().0.iter().zip(&mut *squares) {
        let first = _mm512_mul_ps(y[0], y[0]);
        *square = y[1..].iter().fold(first, |all, y| _mm512_fmadd_ps(*y, *y, all));
    }
    total(squares, group(y.len()))
}

/// Chooses the codes of 16 rows, and returns the factors, and a bit for each row of zeros.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn choose<const BITS: usize, const DIM: usize>(
    y: &[__m512],
    square: __m512,
    units: &mut [__m512],
    codes: &mut [u8],
) -> (__m512, u16) {
    let dim = if DIM == 0 { y.len() } else { DIM };
    let (y, codes, group) = (&y[..dim], &mut codes[..LANES * dim * BITS / 8], group(dim));
    let (dots, lengths) = units.split_at_mut(dim / 8);
    let unit = _mm512_mul_ps(near_inverse_root(square), _mm512_set1_ps(rotated::book(BITS).share(dim)));
    let nearest = nearest::<BITS>();
    let parts = y.as_chunks::<8>().0.iter().zip(dots.iter_mut().zip(&mut *lengths));
    let mut words = [_mm512_setzero_si512(); 4];
    for (eighth, (y, (dot_of_unit, length_of_unit))) in parts.enumerate() {
        let mut word = _mm512_setzero_si512();
        let (mut dot, mut length) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for (i, &y) in y.iter().enumerate() {
            let (code, c) = nearest(y, unit);
            word = _mm512_or_si512(word, _mm512_sllv_epi32(code, _mm512_set1_epi32((BITS * i) as i32)));
            (dot, length) = match i {
                0 => (_mm512_mul_ps(y, c), _mm512_mul_ps(c, c)),
                _ => (_mm512_fmadd_ps(y, c, dot), _mm512_fmadd_ps(c, c, length)),
            };
        }
        (*dot_of_unit, *length_of_unit) = (dot, length);
        words[eighth % 4] = word;
        if eighth % 4 == 3 {
            write_words::<BITS>(words, codes, dim * BITS / 8, eighth / 4);
        }
    }
    let factor = _mm512_div_ps(total(dots, group), total(lengths, group));
    let factor = _mm512_mul_ps(factor, _mm512_set1_ps(root(group).recip()));
    (factor, _mm512_cmpeq_ps_mask(square, _mm512_setzero_ps()))
}

/// The sum of the definition, of the sums of units of 8.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn total(units: &mut [__m512], group: usize) -> __m512 {
    let mut total = None;
    for units in units.chunks_exact_mut(group / 8) {
        let mut count = units.len();
        while count > 1 {
            count /= 2;
            (0..count).for_each(|i| units[i] = _mm512_add_ps(units[i], units[count + i]));
        }
        total = Some(total.map_or(units[0], |total| _mm512_add_ps(total, units[0])));
    }
    total.unwrap_or(_mm512_setzero_ps())
}

/// See [`rotated::near_inverse_root`].
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn near_inverse_root(x: __m512) -> __m512 {
    let half = _mm512_mul_ps(x, _mm512_set1_ps(0.5));
    let first =
        _mm512_sub_epi32(_mm512_set1_epi32(0x5F37_5A86), _mm512_srli_epi32::<1>(_mm512_castps_si512(x)));
    (0..2).fold(_mm512_castsi512_ps(first), |root, _| {
        _mm512_mul_ps(root, _mm512_fnmadd_ps(_mm512_mul_ps(half, root), root, _mm512_set1_ps(1.5)))
    })
}

/// The magnitude's code of each place, counted from zero.
const fn codes_of_places(book: &rotated::Book) -> [[u8; 64]; 2] {
    let mut codes = [[0; 64]; 2];
    let mut place = 0;
    while place < 128 {
        let mut i = 0;
        while i < book.begins.len() {
            codes[place / 64][place % 64] += (place as i32 >= book.begins[i]) as u8;
            i += 1;
        }
        place += 1;
    }
    codes
}

/// What gives the code of the value nearest to `y`, of a row of which `unit` makes shares, and the value.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn nearest<const BITS: usize>() -> impl Fn(__m512, __m512) -> (__m512i, __m512) {
    let codes = const { &codes_of_places(rotated::book(BITS)) };
    let (near, far) = (load(&codes[0]), load(&codes[1]));
    let book = load_floats(const { &rotated::book(BITS).values(true) });
    let (places, zero) = (rotated::book(BITS).places, rotated::book(BITS).zero());
    move |y, unit| {
        let share = _mm512_fmadd_ps(y, unit, _mm512_set1_ps(0.5));
        let share = _mm512_max_ps(_mm512_min_ps(share, _mm512_set1_ps(1.0)), _mm512_setzero_ps());
        let place = _mm512_fmadd_ps(share, _mm512_set1_ps(places as f32), _mm512_set1_ps(WHOLE));
        let place = _mm512_sub_epi32(_mm512_castps_si512(place), _mm512_set1_epi32(zero));
        let negative = _mm512_srai_epi32::<31>(place);
        let magnitude = _mm512_permutex2var_epi8(near, _mm512_xor_si512(place, negative), far);
        // Of the bytes but the lowest nothing is minded; the sign's bit is in front of the magnitude's.
        let sign = _mm512_set1_epi32(1 << (BITS - 1));
        let code = _mm512_ternarylogic_epi32::<0xF8>(magnitude, negative, sign);
        (code, _mm512_permutexvar_ps(code, book))
    }
}

/// The values of the codes, over and over.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn book<const BITS: usize>() -> __m512 {
    load_floats(const { &rotated::book(BITS).values(false) })
}

/// Writes the codes of the `step`th 32 elements of 16 rows, of which each word has 8.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn write_words<const BITS: usize>(words: [__m512i; 4], codes: &mut [u8], code_bytes: usize, step: usize) {
    for (i, four) in words_of_rows(words).into_iter().enumerate() {
        let mut bytes = [0; 64];
        store(&mut bytes, _mm512_shuffle_epi8(four, packed::<BITS>(false)));
        for (part, bytes) in bytes.as_chunks::<16>().0.iter().enumerate() {
            codes[(4 * part + i) * code_bytes + 4 * BITS * step..][..4 * BITS]
                .copy_from_slice(&bytes[..4 * BITS]);
        }
    }
}

/// The inverse of [`write_words`].
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn read_words<const BITS: usize>(codes: &[u8], code_bytes: usize, step: usize) -> [__m512i; 4] {
    let at = 4 * BITS * step;
    words_of_rows(std::array::from_fn(|i| read_rows::<BITS>(&codes[i * code_bytes + at..], 4 * code_bytes)))
}

/// The codes of 32 elements of four rows, `apart` bytes apart.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn read_rows<const BITS: usize>(codes: &[u8], apart: usize) -> __m512i {
    let row = |i: usize| {
        let bytes = &codes[i * apart..][..4 * BITS];
        match BITS {
            4 => load_half(bytes, 0),
            3 => _mm_set_epi64x(
                i64::from_le_bytes(padded(&bytes[8..])),
                i64::from_le_bytes(padded(&bytes[..8])),
            ),
            _ => _mm_cvtsi64_si128(i64::from_le_bytes(padded(bytes))),
        }
    };
    let four = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(row(0)), row(1));
    let four = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(four, row(2)), row(3));
    _mm512_shuffle_epi8(four, packed::<BITS>(true))
}

/// Four words of each of 16 rows, with the rows in lanes, become rows of four words: the `i`th vector has rows `i`, `4 + i`, `8 + i`
/// and `12 + i`. Once more undoes it.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn words_of_rows([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// Where the bytes of four words of 128 bits come from when those in use are packed, or put apart again.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn packed<const BITS: usize>(apart: bool) -> __m512i {
    let places = const { [packed_places(BITS, false), packed_places(BITS, true)] };
    load(&places[usize::from(apart)])
}

const fn packed_places(bits: usize, apart: bool) -> [u8; 64] {
    let mut places = [0; 64];
    let mut i = 0;
    while i < 64 {
        let of = i % 16;
        let from = if apart { of / 4 * bits + of % 4 } else { of / bits * 4 + of % bits };
        places[i] = (from % 16) as u8;
        i += 1;
    }
    places
}

/// Sums and differences of elements 1, 2, 4, … apart.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn levels<const N: usize>(x: &mut [__m512; N]) {
    butterflies::<N, 1>(x);
    if N > 2 {
        butterflies::<N, 2>(x);
    }
    if N > 4 {
        butterflies::<N, 4>(x);
    }
    if N > 8 {
        butterflies::<N, 8>(x);
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn butterflies<const N: usize, const APART: usize>(x: &mut [__m512; N]) {
    for pair in 0..N / 2 {
        let i = pair / APART * 2 * APART + pair % APART;
        let (a, b) = (x[i], x[i + APART]);
        // The difference is rounded once, as by a subtraction, but some CPUs have other units for it than for sums. (With the rounding
        // spelt out, or the compiler makes a subtraction of it.)
        let difference = _mm512_fnmadd_round_ps::<NEAREST>(b, _mm512_set1_ps(1.0), a);
        (x[i], x[i + APART]) = (_mm512_add_ps(a, b), difference);
    }
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// The levels of the transform beyond the first four.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn last_levels(y: &mut [__m512]) {
    match group(y.len()) / 16 {
        16 => levels_apart::<16>(y),
        8 => levels_apart::<8>(y),
        4 => levels_apart::<4>(y),
        _ => levels_apart::<2>(y),
    }
}

/// As [`levels`], of elements 16, 32, … apart, in groups of `16 * N`.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn levels_apart<const N: usize>(y: &mut [__m512]) {
    for group in y.as_chunks_mut::<16>().0.as_chunks_mut::<N>().0 {
        let group = group.as_flattened_mut();
        for at in 0..16 {
            let mut x = std::array::from_fn(|i| group[16 * i + at]);
            levels::<N>(&mut x);
            (0..N).for_each(|i| group[16 * i + at] = x[i]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_dim<const BITS: usize, const E: u8>(
    dim: usize,
    codes: &[u8],
    factors: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    match dim {
        64 => decode_rows::<BITS, E, 64>(dim, codes, factors, dst, dst_stride),
        128 => decode_rows::<BITS, E, 128>(dim, codes, factors, dst, dst_stride),
        _ => decode_rows::<BITS, E, 0>(dim, codes, factors, dst, dst_stride),
    }
}

#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_rows<const BITS: usize, const E: u8, const DIM: usize>(
    dim: usize,
    codes: &[u8],
    factors: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let dim = if DIM == 0 { dim } else { DIM };
    let (row_bytes, code_bytes) = (element_bytes(E) * dim, LANES * dim * BITS / 8);
    let zero = _mm512_setzero_ps();
    // As for the encoder.
    let (mut of_dim, mut elements_of_dim) = ([zero; DIM], [[0; 4 * LANES]; DIM]);
    let (mut of_any, mut elements_of_any) = (Vec::new(), Vec::new());
    let (y, all) = if DIM == 0 {
        of_any.resize(dim, zero);
        elements_of_any.resize(LANES * row_bytes, 0);
        (&mut of_any[..], &mut elements_of_any[..])
    } else {
        (&mut of_dim[..], &mut elements_of_dim.as_flattened_mut()[..LANES * row_bytes])
    };
    let batches = codes.chunks(code_bytes).zip(factors.chunks(LANES * 2));
    for (batch, (codes, factors)) in batches.enumerate() {
        let dst = &mut dst[batch * LANES * dst_stride..];
        prefetch_ahead(codes);
        // A line of each row at a time: all at once would be more than can be under way.
        // As for the encoder, f32 lies near.
        let ahead = |step: usize| {
            let rows = if E == F32 { 0 } else { factors.len() / 2 };
            for row in 0..rows {
                prefetch_ahead(&dst[row * dst_stride + 2 * STEP * step..][..2 * STEP]);
            }
        };
        if codes.len() == code_bytes {
            decode_batch::<BITS, E, DIM>(y, codes, factors, all, ahead);
        } else {
            // The last rows, and zeros.
            let (mut all_codes, mut all_factors) = (vec![0; code_bytes], [0; LANES * 2]);
            all_codes[..codes.len()].copy_from_slice(codes);
            all_factors[..factors.len()].copy_from_slice(factors);
            decode_batch::<BITS, E, DIM>(y, &all_codes, &all_factors, all, ahead);
        }
        // Rows are written whole: memory minds parts of 16 rows in turns.
        for (lane, row) in all.chunks_exact(row_bytes).enumerate().take(factors.len() / 2) {
            dst[lane * dst_stride..][..row_bytes].copy_from_slice(row);
        }
    }
}

/// Decodes 16 rows, one after the other, and calls `ahead` with each step.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn decode_batch<const BITS: usize, const E: u8, const DIM: usize>(
    y: &mut [__m512],
    codes: &[u8],
    factors: &[u8],
    out: &mut [u8],
    ahead: impl Fn(usize),
) {
    let dim = if DIM == 0 { y.len() } else { DIM };
    let (y, codes) = (&mut y[..dim], &codes[..LANES * dim * BITS / 8]);
    let out = &mut out[..LANES * element_bytes(E) * dim];
    let book = book::<BITS>();
    for (step, y) in y.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
        ahead(step);
        let words = read_words::<BITS>(codes, dim * BITS / 8, step);
        for (y, words) in y.as_chunks_mut::<16>().0.iter_mut().zip(words.as_chunks::<2>().0) {
            *y = std::array::from_fn(|i| {
                // The look-up minds the lowest four bits.
                let code = _mm512_srlv_epi32(words[i / 8], _mm512_set1_epi32((BITS * (i % 8)) as i32));
                _mm512_permutexvar_ps(code, book)
            });
            levels(y);
        }
    }
    last_levels(y);
    let scale =
        _mm512_mul_ps(floats::<BF16>(load_full(factors, 0)), _mm512_set1_ps(root(group(dim)).recip()));
    // No element is larger than the sum of its group's values. False for NaN.
    let limit = saturation::<E>() / (group(dim) as f32 * rotated::book(BITS).largest());
    let within = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(scale), _mm512_set1_ps(limit));
    if within == u16::MAX {
        write_rows::<E, DIM, false>(y, scale, out);
    } else {
        write_rows::<E, DIM, true>(y, scale, out);
    }
}

/// Writes the lanes of `y` times `scale`, signs changed back, as rows.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn write_rows<const E: u8, const DIM: usize, const SATURATE: bool>(
    y: &[__m512],
    scale: __m512,
    out: &mut [u8],
) {
    let dim = if DIM == 0 { y.len() } else { DIM };
    let (y, out, row_parts) = (&y[..dim], &mut out[..LANES * element_bytes(E) * dim], dim / 16);
    let signed = [scale, _mm512_mul_ps(scale, _mm512_set1_ps(-1.0))];
    for (part, y) in y.as_chunks::<16>().0.iter().enumerate() {
        let scaled = |i: usize| {
            let x = _mm512_mul_ps(y[i], signed[usize::from(flips(16 * part + i))]);
            if SATURATE { saturated::<E>(x) } else { x }
        };
        if E == F32 {
            for (lane, x) in transposed_floats(std::array::from_fn(scaled)).into_iter().enumerate() {
                store_wide(out, lane * row_parts + part, _mm512_castps_si512(x));
            }
            continue;
        }
        let x = transposed(std::array::from_fn(|i| halves::<E>(scaled(i))));
        for (lane, x) in x.into_iter().enumerate() {
            store_full(out, lane * row_parts + part, x);
        }
    }
}

/// 16 rows of 16 floats to columns.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn transposed_floats(x: [__m512; 16]) -> [__m512; 16] {
    // Parts of columns 0, 4, 8 and 12 lie in one vector, and so on: they are to come together.
    let mut of_four = [[_mm512_setzero_ps(); 4]; 4];
    for (columns, rows) in of_four.iter_mut().zip(x.as_chunks::<4>().0) {
        *columns = columns_of_four(*rows);
    }
    let mut columns = x;
    for i in 0..4 {
        let [a, b, c, d] = [of_four[0][i], of_four[1][i], of_four[2][i], of_four[3][i]];
        let ab = [_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b)];
        let cd = [_mm512_shuffle_f32x4::<0b10_00_10_00>(c, d), _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d)];
        columns[i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab[0], cd[0]);
        columns[i + 4] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab[1], cd[1]);
        columns[i + 8] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab[0], cd[0]);
        columns[i + 12] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab[1], cd[1]);
    }
    columns
}

/// Within each 128-bit part: four rows to four columns.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn columns_of_four([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    let low = [_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d))];
    let high = [_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d))];
    [
        _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1])),
        _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1])),
        _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1])),
        _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1])),
    ]
}

/// 16 rows of 16 words to columns.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn transposed(x: [__m256i; 16]) -> [__m256i; 16] {
    // Quarters of 8 by 8, so placed that their transposes are where they belong: then each 128-bit part is on its own.
    let quarters = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    let x: [_; 8] = std::array::from_fn(|i| {
        let (a, b) = (_mm512_castsi256_si512(x[i]), _mm512_castsi256_si512(x[i + 8]));
        _mm512_permutex2var_epi64(a, quarters, b)
    });
    let two = |i: usize, high: bool| match high {
        false => _mm512_unpacklo_epi16(x[i], x[i + 1]),
        true => _mm512_unpackhi_epi16(x[i], x[i + 1]),
    };
    let four = |i: usize, pair: usize| {
        let (a, b) = (two(i, pair >= 2), two(i + 2, pair >= 2));
        if pair.is_multiple_of(2) { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
    };
    let columns: [_; 8] = std::array::from_fn(|i| {
        let (a, b) = (four(0, i / 2), four(4, i / 2));
        parts(if i % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) })
    });
    std::array::from_fn(|i| columns[i % 8][i / 8])
}
