//! Centres of rows with AVX2, FMA and F16C: 8 elements a step, and as many of their fellows where these lie apart.
//!
//! # How the bytes stay those of the definition
//!
//! A sum whose rounded value is finite needs neither of the definition's exceptions. Its element was finite: what is not makes no
//! finite sum. And the limit would change nothing: what lies above the largest number and is not rounded to infinity is rounded to
//! that number. So one look at the results tells whether a step is done; if it is not, the definition does the rest of the row, on
//! elements that have not been written to yet.
//!
//! The rounding to bf16 is one of integers, and could carry a NaN beyond all bits. Those that arise here have zeros where the carry
//! would begin: they come from a bf16 or are the one that operations make.

use std::arch::x86_64::*;

use super::avx2::{
    AHEAD, BF16, F16, F32, element_bytes, load_full, load_half, prefetch_ahead, prefetch_l2, store_full,
    store_half,
};
use super::centred::{Moves, behind_turn, by_steps, move_some};
use super::{ElementType, RopeLayout, RowCentres};

/// Elements of a vector.
const STEP: usize = 8;

by_steps!("avx2,fma,f16c");

/// Moves pairs whose halves lie apart, and returns how many: what is left is for the definition.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves_apart<const FROM: u8, const TO: u8, const COPY: bool, const PAIRS: usize>(
    zero: f32,
    mean: &[f32],
    [cos, sin]: [&[f32]; 2],
    from: &[u8],
    to: &mut [u8],
) -> usize {
    let (p, q) = mean.split_at(if PAIRS == 0 { cos.len() } else { PAIRS });
    let [from_step, to_step] = [FROM, TO].map(|e| STEP * element_bytes(e));
    let (x_to, y_to) = to.split_at_mut(p.len() * element_bytes(TO));
    let (x_from, y_from) = from.split_at(if COPY { p.len() * element_bytes(FROM) } else { 0 });
    let steps_to = x_to.chunks_exact_mut(to_step).zip(y_to.chunks_exact_mut(to_step));
    let steps = floats(p).iter().zip(floats(q)).zip(floats(cos)).zip(floats(sin)).zip(steps_to);
    let mut done = 0;
    for (step, ((((p, q), cos), sin), (x_to, y_to))) in steps.enumerate() {
        let bytes = step * from_step..(step + 1) * from_step;
        let x =
            signless::<FROM, COPY>(elements::<FROM>(if COPY { &x_from[bytes.clone()] } else { x_to }), zero);
        let y = signless::<FROM, COPY>(elements::<FROM>(if COPY { &y_from[bytes] } else { y_to }), zero);
        let (p, q, cos, sin) = (load_floats(p), load_floats(q), load_floats(cos), load_floats(sin));
        let x = _mm256_fnmadd_ps(q, sin, _mm256_fmadd_ps(p, cos, x));
        let y = _mm256_fmadd_ps(p, sin, _mm256_fmadd_ps(q, cos, y));
        if !put_two::<TO>(x_to, x, y_to, y) {
            break;
        }
        done += STEP;
    }
    done
}

/// [`halves_apart`], for pairs of neighbours: returns how many elements it has moved.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn neighbours<const FROM: u8, const TO: u8, const COPY: bool, const PAIRS: usize>(
    zero: f32,
    mean: &[f32],
    [cos, sin]: [&[f32]; 2],
    from: &[u8],
    to: &mut [u8],
) -> usize {
    let [from_step, to_step] = [FROM, TO].map(|e| STEP * element_bytes(e));
    let mean = &mean[..if PAIRS == 0 { mean.len() } else { 2 * PAIRS }];
    // Each element has the numbers of its pair, and the first of a pair the sine's negative.
    let twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    let of_pairs = |four: &[f32; STEP / 2]| {
        let four = _mm256_castsi128_si256(load_half(bytemuck::cast_slice(four), 0));
        _mm256_permutevar8x32_ps(_mm256_castsi256_ps(four), twice)
    };
    let negative = _mm256_castsi256_ps(_mm256_set1_epi64x(0x8000_0000));
    let turns = cos.as_chunks().0.iter().zip(sin.as_chunks().0);
    let mut done = 0;
    for ((mean, (cos, sin)), to) in floats(mean).iter().zip(turns).zip(to.chunks_exact_mut(to_step)) {
        let x = signless::<FROM, COPY>(
            elements::<FROM>(if COPY { &from[done * element_bytes(FROM)..][..from_step] } else { to }),
            zero,
        );
        let (mean, cos, sin) = (load_floats(mean), of_pairs(cos), of_pairs(sin));
        let fellows = _mm256_permute_ps::<0b10_11_00_01>(mean);
        let x = _mm256_fmadd_ps(mean, cos, x);
        if !put::<TO>(to, _mm256_fmadd_ps(fellows, _mm256_xor_ps(sin, negative), x)) {
            break;
        }
        done += STEP;
    }
    done
}

/// [`halves_apart`], for elements that do not turn.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unturned<const FROM: u8, const TO: u8, const COPY: bool>(
    zero: f32,
    mean: &[f32],
    from: &[u8],
    to: &mut [u8],
) -> usize {
    let [from_step, to_step] = [FROM, TO].map(|e| STEP * element_bytes(e));
    let mut done = 0;
    for (mean, to) in floats(mean).iter().zip(to.chunks_exact_mut(to_step)) {
        let x = signless::<FROM, COPY>(
            elements::<FROM>(if COPY { &from[done * element_bytes(FROM)..][..from_step] } else { to }),
            zero,
        );
        if !put::<TO>(to, _mm256_add_ps(x, load_floats(mean))) {
            break;
        }
        done += STEP;
    }
    done
}

/// With `zero` added where that may change something: see [`Moves::zero`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn signless<const FROM: u8, const COPY: bool>(x: __m256, zero: f32) -> __m256 {
    if COPY && FROM == F32 { _mm256_add_ps(x, _mm256_set1_ps(zero)) } else { x }
}

pub(super) const fn element(e: u8) -> ElementType {
    match e {
        F16 => ElementType::F16,
        BF16 => ElementType::Bf16,
        _ => ElementType::F32,
    }
}

/// Whole vectors.
fn floats(all: &[f32]) -> &[[f32; STEP]] {
    all.as_chunks().0
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_floats(from: &[f32; STEP]) -> __m256 {
    _mm256_castsi256_ps(load_full(bytemuck::cast_slice(from), 0))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn elements<const E: u8>(from: &[u8]) -> __m256 {
    match E {
        F16 => _mm256_cvtph_ps(load_half(from, 0)),
        BF16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_half(from, 0)))),
        _ => _mm256_castsi256_ps(load_full(from, 0)),
    }
}

/// Writes elements if all of them are finite.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put<const E: u8>(to: &mut [u8], x: __m256) -> bool {
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
fn put_two<const E: u8>(x_to: &mut [u8], x: __m256, y_to: &mut [u8], y: __m256) -> bool {
    if E == F32 {
        let (x, y) = (_mm256_castps_si256(x), _mm256_castps_si256(y));
        let finite = none(_mm256_or_si256(not_finite::<E>(x), not_finite::<E>(y)));
        if finite {
            store_full(x_to, 0, x);
            store_full(y_to, 0, y);
        }
        return finite;
    }
    let bits = halves::<E>(x, y);
    let finite = none(not_finite::<E>(bits));
    if finite {
        store_half(x_to, 0, _mm256_castsi256_si128(bits));
        store_half(y_to, 0, _mm256_extracti128_si256::<1>(bits));
    }
    finite
}

/// Two vectors rounded half to even to a 16-bit type, one behind the other.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves<const E: u8>(low: __m256, high: __m256) -> __m256i {
    if E == F16 {
        let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low);
        let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high);
        return _mm256_set_m128i(high, low);
    }
    let rounded = |x| {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        _mm256_srli_epi32::<16>(rounded)
    };
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(rounded(low), rounded(high)))
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
