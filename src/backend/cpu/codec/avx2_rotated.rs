//! `r4`, `r3` and `r2` with AVX2: 8 rows at a time, one in each lane.
//!
//! So a vector is one element of 8 rows: every sum, difference and comparison of the definition is one instruction for 8 rows, in
//! the order of the definition, with no shuffle but for the transposes at the ends. The codes of 8 elements of a row are one
//! word of its lane. A batch of fewer rows than 8 does its last row over.

use std::arch::x86_64::*;

use half::bf16;

use super::ElementType;
use super::avx2::{
    BF16, F16, F32, element_bytes, lanes, load_full, load_half, prefetch_ahead, saturation, store_full,
    store_half,
};
use super::rotated::{self, NEAR, WHOLE, flips, group, root};

/// See [`rotated::encode`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn encode(
    bits: usize,
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    factors: &mut [u8],
) -> bool {
    if group(dim) < 8 {
        return rotated::encode(bits, element, dim, src, codes, factors);
    }
    match (bits, element) {
        (4, ElementType::F16) => encode_rows::<4, F16>(dim, src, codes, factors),
        (4, ElementType::Bf16) => encode_rows::<4, BF16>(dim, src, codes, factors),
        (4, ElementType::F32) => encode_rows::<4, F32>(dim, src, codes, factors),
        (3, ElementType::F16) => encode_rows::<3, F16>(dim, src, codes, factors),
        (3, ElementType::Bf16) => encode_rows::<3, BF16>(dim, src, codes, factors),
        (3, ElementType::F32) => encode_rows::<3, F32>(dim, src, codes, factors),
        (_, ElementType::F16) => encode_rows::<2, F16>(dim, src, codes, factors),
        (_, ElementType::Bf16) => encode_rows::<2, BF16>(dim, src, codes, factors),
        (_, ElementType::F32) => encode_rows::<2, F32>(dim, src, codes, factors),
    }
}

/// See [`rotated::decode`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode(
    bits: usize,
    element: ElementType,
    dim: usize,
    codes: &[u8],
    factors: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    if group(dim) < 8 {
        return rotated::decode(bits, element, dim, codes, factors, dst, dst_stride);
    }
    match (bits, element) {
        (4, ElementType::F16) => decode_rows::<4, F16>(dim, codes, factors, dst, dst_stride),
        (4, ElementType::Bf16) => decode_rows::<4, BF16>(dim, codes, factors, dst, dst_stride),
        (4, ElementType::F32) => decode_rows::<4, F32>(dim, codes, factors, dst, dst_stride),
        (3, ElementType::F16) => decode_rows::<3, F16>(dim, codes, factors, dst, dst_stride),
        (3, ElementType::Bf16) => decode_rows::<3, BF16>(dim, codes, factors, dst, dst_stride),
        (3, ElementType::F32) => decode_rows::<3, F32>(dim, codes, factors, dst, dst_stride),
        (_, ElementType::F16) => decode_rows::<2, F16>(dim, codes, factors, dst, dst_stride),
        (_, ElementType::Bf16) => decode_rows::<2, BF16>(dim, codes, factors, dst, dst_stride),
        (_, ElementType::F32) => decode_rows::<2, F32>(dim, codes, factors, dst, dst_stride),
    }
}

/// Rows are done in batches of this many.
const LANES: usize = 8;

#[target_feature(enable = "avx2,fma,f16c")]
fn encode_rows<const BITS: usize, const E: u8>(
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    factors: &mut [u8],
) -> bool {
    let (row_bytes, code_bytes) = (dim * element_bytes(E), dim * BITS / 8);
    let zero = _mm256_setzero_ps();
    let (mut y, mut units) = (vec![zero; dim], vec![zero; dim / 4]);
    let mut finite = true;
    let batches = src.chunks(LANES * row_bytes).zip(codes.chunks_mut(LANES * code_bytes));
    for ((src, codes), factors) in batches.zip(factors.chunks_mut(LANES * 2)) {
        let rows = factors.len() / 2;
        let row = std::array::from_fn(|lane| &src[lane.min(rows - 1) * row_bytes..][..row_bytes]);
        let one = _mm256_set1_ps(1.0);
        let max = load_rows::<E, false>(row, one, &mut y);
        y.chunks_exact_mut(group(dim)).for_each(|y| transform(y));
        let mut square = square_of(&y, &mut units);
        let (mut power, near) = (one, near(square));
        if E != F16 && _mm256_movemask_ps(near) != 0xFF {
            // All go again, those that are near as they are.
            power = _mm256_blendv_ps(power_below(max), one, near);
            load_rows::<E, true>(row, _mm256_div_ps(one, power), &mut y);
            y.chunks_exact_mut(group(dim)).for_each(|y| transform(y));
            square = square_of(&y, &mut units);
        }
        let (ideal, zero) = choose::<BITS>(&y, square, &mut units, codes, rows);
        let ideal = lanes(_mm256_mul_ps(ideal, power));
        let wrong = _mm256_cmpgt_epi32(max, _mm256_set1_epi32(0x7F7F_FFFF));
        let wrong = _mm256_movemask_ps(_mm256_castsi256_ps(wrong)).cast_unsigned();
        finite &= wrong & ((1 << rows) - 1) == 0;
        let nothing = wrong | zero;
        for (lane, factor) in factors.chunks_exact_mut(2).enumerate() {
            let none = nothing >> lane & 1 == 1;
            if none {
                codes[lane * code_bytes..][..code_bytes].fill(0);
            }
            rotated::write_factor(if none { 0.0 } else { ideal[lane] }, factor);
        }
    }
    finite
}

/// Loads 8 rows, signs changed, one in each lane of `y`, times `scale` if they are `SCALED`; the lanes' largest magnitudes, without the
/// scale, as integers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_rows<const E: u8, const SCALED: bool>(
    rows: [&[u8]; LANES],
    scale: __m256,
    y: &mut [__m256],
) -> __m256i {
    let magnitude = _mm256_set1_epi32(0x7FFF_FFFF);
    let mut max = _mm256_setzero_si256();
    for (eighth, y) in y.chunks_exact_mut(8).enumerate() {
        let loaded = std::array::from_fn(|lane| load_8::<E>(rows[lane], eighth));
        for (i, x) in transposed(loaded).into_iter().enumerate() {
            max = _mm256_max_epu32(max, _mm256_and_si256(_mm256_castps_si256(x), magnitude));
            let x = if SCALED { _mm256_mul_ps(x, scale) } else { x };
            y[i] = flip_if(x, flips(8 * eighth + i));
        }
    }
    max
}

/// Which sums of squares are those of rows that are rotated as they are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn near(square: __m256) -> __m256 {
    _mm256_and_ps(
        _mm256_cmp_ps::<_CMP_GE_OQ>(square, _mm256_set1_ps(*NEAR.start())),
        _mm256_cmp_ps::<_CMP_LE_OQ>(square, _mm256_set1_ps(*NEAR.end())),
    )
}

/// What other rows are divided by, whose largest magnitudes are `max`. Its reciprocal is exact.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn power_below(max: __m256i) -> __m256 {
    let exponent = _mm256_and_si256(max, _mm256_set1_epi32(0x7F80_0000));
    let exponent = _mm256_min_epi32(exponent, _mm256_set1_epi32(253 << 23));
    _mm256_castsi256_ps(_mm256_max_epi32(exponent, _mm256_set1_epi32(1 << 23)))
}

/// The sums of the squares of 8 rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn square_of(y: &[__m256], units: &mut [__m256]) -> __m256 {
    let squares = &mut units[..y.len() / 8];
    for (y, square) in y.chunks_exact(8).zip(&mut *squares) {
        let first = _mm256_mul_ps(y[0], y[0]);
        *square = y[1..].iter().fold(first, |all, y| _mm256_fmadd_ps(*y, *y, all));
    }
    total(squares, group(y.len()))
}

/// Chooses the codes of `rows` rows, and returns the factors, and a bit for each row of zeros. `units` has room for two sums of each 8
/// elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn choose<const BITS: usize>(
    y: &[__m256],
    square: __m256,
    units: &mut [__m256],
    codes: &mut [u8],
    rows: usize,
) -> (__m256, u32) {
    let (dim, group) = (y.len(), group(y.len()));
    let code_bytes = dim * BITS / 8;
    let (dots, lengths) = units.split_at_mut(dim / 8);
    let unit = _mm256_mul_ps(near_inverse_root(square), _mm256_set1_ps(rotated::book(BITS).share(dim)));
    let parts = y.chunks_exact(8).zip(dots.iter_mut().zip(&mut *lengths));
    for (eighth, (y, (dot_of_unit, length_of_unit))) in parts.enumerate() {
        let mut word = _mm256_setzero_si256();
        let (mut dot, mut length) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for (i, &y) in y.iter().enumerate() {
            let (code, c) = nearest::<BITS>(y, unit);
            word = _mm256_or_si256(word, _mm256_sllv_epi32(code, _mm256_set1_epi32((BITS * i) as i32)));
            (dot, length) = match i {
                0 => (_mm256_mul_ps(y, c), _mm256_mul_ps(c, c)),
                _ => (_mm256_fmadd_ps(y, c, dot), _mm256_fmadd_ps(c, c, length)),
            };
        }
        (*dot_of_unit, *length_of_unit) = (dot, length);
        let words = lanes(_mm256_castsi256_ps(word));
        for (lane, word) in words.iter().take(rows).enumerate() {
            let at = lane * code_bytes + eighth * BITS;
            codes[at..at + BITS].copy_from_slice(&word.to_bits().to_le_bytes()[..BITS]);
        }
    }
    let factor = _mm256_div_ps(total(dots, group), total(lengths, group));
    let factor = _mm256_mul_ps(factor, _mm256_set1_ps(root(group).recip()));
    let zero = _mm256_cmp_ps::<_CMP_EQ_OQ>(square, _mm256_setzero_ps());
    (factor, _mm256_movemask_ps(zero).cast_unsigned())
}

/// See [`rotated::near_inverse_root`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn near_inverse_root(x: __m256) -> __m256 {
    let half = _mm256_mul_ps(x, _mm256_set1_ps(0.5));
    let first = _mm256_srli_epi32::<1>(_mm256_castps_si256(x));
    let first = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(0x5F37_5A86), first));
    (0..2).fold(first, |root, _| {
        _mm256_mul_ps(root, _mm256_fnmadd_ps(_mm256_mul_ps(half, root), root, _mm256_set1_ps(1.5)))
    })
}

/// The code of the value nearest to `y`, of a row of which `unit` makes shares, and the value.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nearest<const BITS: usize>(y: __m256, unit: __m256) -> (__m256i, __m256) {
    let of = const { rotated::book(BITS) };
    let share = _mm256_fmadd_ps(y, unit, _mm256_set1_ps(0.5));
    let share = _mm256_max_ps(_mm256_min_ps(share, _mm256_set1_ps(1.0)), _mm256_setzero_ps());
    let place = _mm256_fmadd_ps(share, _mm256_set1_ps(of.places as f32), _mm256_set1_ps(WHOLE));
    let place = _mm256_sub_epi32(_mm256_castps_si256(place), _mm256_set1_epi32(of.zero()));
    let negative = _mm256_srai_epi32::<31>(place);
    let place = _mm256_xor_si256(place, negative);
    let from = |begin| _mm256_cmpgt_epi32(place, begin);
    let begin = |i: usize| of.begins[i.min(of.begins.len() - 1)] - 1;
    let bit = |mask, bit| _mm256_and_si256(mask, _mm256_set1_epi32(bit));
    let (low, high) = (|i| _mm256_set1_epi32(begin(i)), from(_mm256_set1_epi32(begin(of.begins.len() / 2))));
    let magnitude = match BITS {
        4 => {
            // Halves the book three times; the last begin is looked up.
            let second = from(_mm256_blendv_epi8(low(1), low(5), high));
            let four = _mm256_or_si256(bit(high, 4), bit(second, 2));
            let lasts = _mm256_setr_epi32(
                begin(0),
                begin(0),
                begin(2),
                begin(2),
                begin(4),
                begin(4),
                begin(6),
                begin(6),
            );
            let third = from(_mm256_permutevar8x32_epi32(lasts, four));
            _mm256_or_si256(four, bit(third, 1))
        }
        3 => {
            let second = from(_mm256_blendv_epi8(low(0), low(2), high));
            _mm256_or_si256(bit(high, 2), bit(second, 1))
        }
        _ => bit(high, 1),
    };
    let sign = 1 << (BITS - 1);
    let code = _mm256_or_si256(magnitude, bit(negative, sign));
    (code, looked_up(const { rotated::book(BITS).values(true) }, magnitude, bit(negative, i32::MIN | sign)))
}

/// Of the values of codes, those of magnitudes, with more bits set.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn looked_up(values: [f32; 8], magnitude: __m256i, bits: __m256i) -> __m256 {
    let [a, b, c, d, e, f, g, h] = values;
    let values = _mm256_setr_ps(a, b, c, d, e, f, g, h);
    _mm256_or_ps(_mm256_permutevar8x32_ps(values, magnitude), _mm256_castsi256_ps(bits))
}

/// The sum of the definition, of the sums of units of 8.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn total(units: &mut [__m256], group: usize) -> __m256 {
    let mut total = None;
    for units in units.chunks_exact_mut(group / 8) {
        let mut count = units.len();
        while count > 1 {
            count /= 2;
            (0..count).for_each(|i| units[i] = _mm256_add_ps(units[i], units[count + i]));
        }
        total = Some(total.map_or(units[0], |total| _mm256_add_ps(total, units[0])));
    }
    total.unwrap_or(_mm256_setzero_ps())
}

/// The transform of one group: three levels at a time while there are three.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transform(y: &mut [__m256]) {
    let mut apart = 1;
    while apart * 8 <= y.len() {
        for block in y.chunks_exact_mut(apart * 8) {
            for at in 0..apart {
                let mut x: [__m256; 8] = std::array::from_fn(|i| block[at + i * apart]);
                butterflies(&mut x, 1);
                butterflies(&mut x, 2);
                butterflies(&mut x, 4);
                x.into_iter().enumerate().for_each(|(i, x)| block[at + i * apart] = x);
            }
        }
        apart *= 8;
    }
    while apart < y.len() {
        for pair in y.chunks_exact_mut(2 * apart) {
            let (low, high) = pair.split_at_mut(apart);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (_mm256_add_ps(*a, *b), _mm256_sub_ps(*a, *b));
            }
        }
        apart *= 2;
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn butterflies(x: &mut [__m256; 8], apart: usize) {
    for i in (0..8).filter(|i| i & apart == 0) {
        let (a, b) = (x[i], x[i + apart]);
        (x[i], x[i + apart]) = (_mm256_add_ps(a, b), _mm256_sub_ps(a, b));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn decode_rows<const BITS: usize, const E: u8>(
    dim: usize,
    codes: &[u8],
    factors: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let (row_bytes, code_bytes, group) = (dim * element_bytes(E), dim * BITS / 8, group(dim));
    let (max, min) = (_mm256_set1_ps(saturation::<E>()), _mm256_set1_ps(-saturation::<E>()));
    let mut y = vec![_mm256_setzero_ps(); dim];
    let batches = codes.chunks(LANES * code_bytes).zip(factors.chunks(LANES * 2));
    for (batch, (codes, factors)) in batches.enumerate() {
        let rows = factors.len() / 2;
        for (eighth, y) in y.chunks_exact_mut(8).enumerate() {
            let word = |lane: usize| {
                let at = lane.min(rows - 1) * code_bytes + eighth * BITS;
                let mut word = [0; 4];
                word[..BITS].copy_from_slice(&codes[at..at + BITS]);
                i32::from_le_bytes(word)
            };
            let words =
                _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7));
            for (i, y) in y.iter_mut().enumerate() {
                // The code's highest bit becomes the sign, the others an index.
                let code = _mm256_srlv_epi32(words, _mm256_set1_epi32((BITS * i) as i32));
                let sign = _mm256_sllv_epi32(code, _mm256_set1_epi32(32 - BITS as i32));
                let sign = _mm256_and_si256(sign, _mm256_set1_epi32(i32::MIN));
                let magnitude = _mm256_and_si256(code, _mm256_set1_epi32((1 << (BITS - 1)) - 1));
                *y = looked_up(const { rotated::book(BITS).values(false) }, magnitude, sign);
            }
        }
        y.chunks_exact_mut(group).for_each(|y| transform(y));
        let factor = |lane: usize| {
            let at = 2 * lane.min(rows - 1);
            bf16::from_le_bytes([factors[at], factors[at + 1]]).to_f32()
        };
        let scale = _mm256_setr_ps(
            factor(0),
            factor(1),
            factor(2),
            factor(3),
            factor(4),
            factor(5),
            factor(6),
            factor(7),
        );
        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(root(group).recip()));
        let dst = &mut dst[batch * LANES * dst_stride..];
        (0..rows).for_each(|row| prefetch_ahead(&dst[row * dst_stride..][..row_bytes]));
        for (eighth, y) in y.chunks_exact(8).enumerate() {
            let x = std::array::from_fn(|i| {
                let x = flip_if(_mm256_mul_ps(y[i], scale), flips(8 * eighth + i));
                // `min` answers its second operand for a NaN.
                _mm256_max_ps(_mm256_min_ps(x, max), min)
            });
            for (lane, x) in transposed(x).into_iter().take(rows).enumerate() {
                store_8::<E>(&mut dst[lane * dst_stride..][..row_bytes], eighth, x);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn flip_if(x: __m256, flips: bool) -> __m256 {
    if flips { _mm256_xor_ps(x, _mm256_set1_ps(-0.0)) } else { x }
}

/// Rows to columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transposed(x: [__m256; 8]) -> [__m256; 8] {
    let low = |i: usize| _mm256_unpacklo_ps(x[i], x[i + 1]);
    let high = |i: usize| _mm256_unpackhi_ps(x[i], x[i + 1]);
    let (l, h) = ([low(0), low(2), low(4), low(6)], [high(0), high(2), high(4), high(6)]);
    let fours = |two: [__m256; 4], i: usize| {
        (
            _mm256_shuffle_ps::<0b01_00_01_00>(two[i], two[i + 1]),
            _mm256_shuffle_ps::<0b11_10_11_10>(two[i], two[i + 1]),
        )
    };
    let ((a0, a1), (a2, a3)) = (fours(l, 0), fours(h, 0));
    let ((b0, b1), (b2, b3)) = (fours(l, 2), fours(h, 2));
    let first = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
    let second = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
    [
        first(a0, b0),
        first(a1, b1),
        first(a2, b2),
        first(a3, b3),
        second(a0, b0),
        second(a1, b1),
        second(a2, b2),
        second(a3, b3),
    ]
}

/// The `i`th 8 elements of a row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load_8<const E: u8>(row: &[u8], i: usize) -> __m256 {
    if E == F32 {
        return _mm256_castsi256_ps(load_full(row, i));
    }
    let halves = load_half(row, i);
    match E {
        F16 => _mm256_cvtph_ps(halves),
        _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store_8<const E: u8>(row: &mut [u8], i: usize, x: __m256) {
    match E {
        F32 => store_full(row, i, _mm256_castps_si256(x)),
        _ => store_half(row, i, halves::<E>(x)),
    }
}

/// As elements of a 16-bit type, rounded half to even.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn halves<const E: u8>(x: __m256) -> __m128i {
    if E == F16 {
        return _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
    }
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    let upper = _mm256_srli_epi32::<16>(rounded);
    let packed = _mm256_packus_epi32(upper, upper);
    _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b10_00>(packed))
}
