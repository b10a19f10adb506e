//! Centres of rows with AVX2, FMA and F16C: 8 elements a step, and as many of their fellows where these lie apart.
//!
//! # How the bytes stay those of the definition
//!
//! A sum whose rounded value is finite needs neither of the definition's exceptions. Its element was finite: what is not makes no
//! finite sum. And the limit would change nothing: what lies above the largest number and is not rounded to infinity is rounded to
//! that number. So one look at the results tells whether a step is done; if it is not, the definition does it, on
//! elements that have not been written to yet.
//!
//! The rounding to bf16 is one of integers, and could carry a NaN beyond all bits. Those that arise here have zeros where the carry
//! would begin: they come from a bf16 or are the one that operations make.

use std::arch::x86_64::*;

use super::avx2::{BF16, F16, F32, element_bytes, load_full, load_half, store_full, store_half};
use super::centred::{Moves, move_some};
use super::{ElementType, RopeLayout};

/// Elements of a vector.
const STEP: usize = 8;

/// See [`centred::move_rows`](super::centred::move_rows).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn move_rows(
    element: ElementType,
    moves: &Moves,
    src: Option<&[u8]>,
    dst: &mut [u8],
    dst_stride: usize,
) {
    match element {
        ElementType::F16 => move_all::<F16>(moves, src, dst, dst_stride),
        ElementType::Bf16 => move_all::<BF16>(moves, src, dst, dst_stride),
        ElementType::F32 => move_all::<F32>(moves, src, dst, dst_stride),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn move_all<const E: u8>(moves: &Moves, src: Option<&[u8]>, dst: &mut [u8], dst_stride: usize) {
    let row_bytes = moves.mean.len() * element_bytes(E);
    match src {
        Some(src) => {
            for row in 0..moves.rows {
                let from = &src[row * row_bytes..][..row_bytes];
                move_row::<E, true>(moves, row, from, &mut dst[row * dst_stride..][..row_bytes]);
            }
        }
        None => {
            for row in 0..moves.rows {
                move_row::<E, false>(moves, row, &[], &mut dst[row * dst_stride..][..row_bytes]);
            }
        }
    }
}

/// Moves a row, from `from` to `to` or where it is.
#[target_feature(enable = "avx2,fma,f16c")]
fn move_row<const E: u8, const COPY: bool>(moves: &Moves, row: usize, from: &[u8], to: &mut [u8]) {
    let (dim, pairs) = (moves.mean.len(), moves.pairs);
    let (rotated, constant) = moves.mean.split_at(2 * pairs);
    let [cos, sin] = moves.turns(row);
    let by_definition = |some, to: &mut [u8]| move_some::<COPY>(element(E), moves, row, some, from, to);
    match moves.layout {
        RopeLayout::HalfSplit => {
            let (p, q) = rotated.split_at(pairs);
            let whole = pairs - pairs % STEP;
            for at in (0..whole).step_by(STEP) {
                let (p, q) = (floats(p, at), floats(q, at));
                let (cos, sin) = (floats(cos, at), floats(sin, at));
                let [x, y] = [at, pairs + at].map(|at| elements::<E>(if COPY { from } else { to }, at));
                let x = _mm256_fnmadd_ps(q, sin, _mm256_fmadd_ps(p, cos, x));
                let y = _mm256_fmadd_ps(p, sin, _mm256_fmadd_ps(q, cos, y));
                if !put_two::<E>(to, [at, pairs + at], [x, y]) {
                    by_definition(at..at + STEP, to);
                    by_definition(pairs + at..pairs + at + STEP, to);
                }
            }
            by_definition(whole..pairs, to);
            by_definition(pairs + whole..2 * pairs, to);
        }
        RopeLayout::Interleaved => {
            let whole = 2 * pairs - 2 * pairs % STEP;
            // Each element has the numbers of its pair, and the first of a pair the sine's negative.
            let twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
            let negative = _mm256_castsi256_ps(_mm256_set1_epi64x(0x8000_0000));
            for at in (0..whole).step_by(STEP) {
                let [cos, sin] = [cos, sin].map(|of_pairs| {
                    let four = load_half(bytemuck::cast_slice(&of_pairs[at / 2..][..4]), 0);
                    let four = _mm256_castps128_ps256(_mm_castsi128_ps(four));
                    _mm256_permutevar8x32_ps(four, twice)
                });
                let mean = floats(rotated, at);
                let fellows = _mm256_permute_ps::<0b10_11_00_01>(mean);
                let x = elements::<E>(if COPY { from } else { to }, at);
                let x = _mm256_fmadd_ps(mean, cos, x);
                let x = _mm256_fmadd_ps(fellows, _mm256_xor_ps(sin, negative), x);
                if !put::<E>(to, at, x) {
                    by_definition(at..at + STEP, to);
                }
            }
            by_definition(whole..2 * pairs, to);
        }
    }
    let whole = constant.len() - constant.len() % STEP;
    for at in (0..whole).step_by(STEP) {
        let mean = floats(constant, at);
        let at = 2 * pairs + at;
        let x = elements::<E>(if COPY { from } else { to }, at);
        if !put::<E>(to, at, _mm256_add_ps(x, mean)) {
            by_definition(at..at + STEP, to);
        }
    }
    by_definition(2 * pairs + whole..dim, to);
}

pub(super) const fn element(e: u8) -> ElementType {
    match e {
        F16 => ElementType::F16,
        BF16 => ElementType::Bf16,
        _ => ElementType::F32,
    }
}

/// The floats from number `at` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats(from: &[f32], at: usize) -> __m256 {
    _mm256_castsi256_ps(load_full(bytemuck::cast_slice(&from[at..][..STEP]), 0))
}

/// The elements from number `at` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn elements<const E: u8>(from: &[u8], at: usize) -> __m256 {
    let from = &from[at * element_bytes(E)..][..STEP * element_bytes(E)];
    match E {
        F16 => _mm256_cvtph_ps(load_half(from, 0)),
        BF16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_half(from, 0)))),
        _ => _mm256_castsi256_ps(load_full(from, 0)),
    }
}

/// Writes elements from number `at` on if all of them are finite.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put<const E: u8>(to: &mut [u8], at: usize, x: __m256) -> bool {
    let to = &mut to[at * element_bytes(E)..][..STEP * element_bytes(E)];
    let bits = if E == F32 { _mm256_castps_si256(x) } else { halves::<E>(x, _mm256_setzero_ps()) };
    let finite = none(not_finite::<E>(bits));
    if finite && E == F32 {
        store_full(to, 0, bits);
    } else if finite {
        store_half(to, 0, _mm256_castsi256_si128(bits));
    }
    finite
}

/// [`put`] in two places, with one look at both.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put_two<const E: u8>(to: &mut [u8], at: [usize; 2], x: [__m256; 2]) -> bool {
    let [first, second] = at.map(|at| at * element_bytes(E)..(at + STEP) * element_bytes(E));
    if E == F32 {
        let [low, high] = x.map(|x| _mm256_castps_si256(x));
        let finite = none(_mm256_or_si256(not_finite::<E>(low), not_finite::<E>(high)));
        if finite {
            store_full(&mut to[first], 0, low);
            store_full(&mut to[second], 0, high);
        }
        return finite;
    }
    let bits = halves::<E>(x[0], x[1]);
    let finite = none(not_finite::<E>(bits));
    if finite {
        store_half(&mut to[first], 0, _mm256_castsi256_si128(bits));
        store_half(&mut to[second], 0, _mm256_extracti128_si256::<1>(bits));
    }
    finite
}

/// Two vectors rounded half to even to a 16-bit type, one behind the other.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves<const E: u8>(low: __m256, high: __m256) -> __m256i {
    if E == F16 {
        let [low, high] = [low, high].map(|x| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        return _mm256_set_m128i(high, low);
    }
    let [low, high] = [low, high].map(|x| {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        _mm256_srli_epi32::<16>(rounded)
    });
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high))
}

/// All bits of the elements that have the exponent of infinity.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn not_finite<const E: u8>(bits: __m256i) -> __m256i {
    if E == F32 {
        let exponent = _mm256_set1_epi32(0x7F80_0000);
        _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), exponent)
    } else {
        let exponent = _mm256_set1_epi16(if E == F16 { 0x7C00 } else { 0x7F80 });
        _mm256_cmpeq_epi16(_mm256_and_si256(bits, exponent), exponent)
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn none(mask: __m256i) -> bool {
    _mm256_testz_si256(mask, mask) == 1
}
