//! Centres of rows with AVX-512: 16 elements a step, and as many of their fellows where these lie apart; the last step may have fewer.
//!
//! The [AVX2 kernels](super::avx2_centred) say why the bytes are those of the definition.

use std::arch::x86_64::*;

use super::avx2::{AHEAD, BF16, F16, F32, element_bytes, load_full, prefetch_ahead, prefetch_l2, store_full};
use super::avx2_centred::element;
use super::avx512::{self, halves, load_some, load_wide, store_some, store_wide};
use super::centred::{Moves, behind_turn, by_steps, move_some};
use super::{ElementType, RopeLayout, RowCentres};

/// Elements of a vector.
const STEP: usize = 16;

by_steps!("avx512vl,avx512dq,avx512vbmi");

/// Moves pairs whose halves lie apart, and returns how many: what is left is for the definition.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn halves_apart<const FROM: u8, const TO: u8, const COPY: bool, const PAIRS: usize>(
    zero: f32,
    mean: &[f32],
    [cos, sin]: [&[f32]; 2],
    from: &[u8],
    to: &mut [u8],
) -> usize {
    let pairs = if PAIRS == 0 { cos.len() } else { PAIRS };
    let (p, q) = mean.split_at(pairs);
    let (x_to, y_to) = to.split_at_mut(pairs * element_bytes(TO));
    let (x_from, y_from) = from.split_at(if COPY { pairs * element_bytes(FROM) } else { 0 });
    let mut at = 0;
    while at < pairs {
        let x = signless::<FROM, COPY>(elements::<FROM>(if COPY { x_from } else { x_to }, at), zero);
        let y = signless::<FROM, COPY>(elements::<FROM>(if COPY { y_from } else { y_to }, at), zero);
        let (p, q, cos, sin) = (floats(p, at), floats(q, at), floats(cos, at), floats(sin, at));
        let x = rounded::<TO>(_mm512_fnmadd_ps(q, sin, _mm512_fmadd_ps(p, cos, x)));
        let y = rounded::<TO>(_mm512_fmadd_ps(p, sin, _mm512_fmadd_ps(q, cos, y)));
        if !all_finite::<TO>(x, y) {
            return at;
        }
        put::<TO>(x_to, at, x);
        put::<TO>(y_to, at, y);
        at += STEP;
    }
    pairs
}

/// [`halves_apart`], for pairs of neighbours: returns how many elements it has moved.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn neighbours<const FROM: u8, const TO: u8, const COPY: bool, const PAIRS: usize>(
    zero: f32,
    mean: &[f32],
    [cos, sin]: [&[f32]; 2],
    from: &[u8],
    to: &mut [u8],
) -> usize {
    // Each element has the numbers of its pair, and the first of a pair the sine's negative.
    let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let negative = _mm512_castsi512_ps(_mm512_set1_epi64(0x8000_0000));
    let count = if PAIRS == 0 { mean.len() } else { 2 * PAIRS };
    let mut at = 0;
    while at < count {
        let x = signless::<FROM, COPY>(elements::<FROM>(if COPY { from } else { to }, at), zero);
        let cos = _mm512_permutexvar_ps(twice, floats(cos, at / 2));
        let sin = _mm512_permutexvar_ps(twice, floats(sin, at / 2));
        let mean = floats(mean, at);
        let fellows = _mm512_permute_ps::<0b10_11_00_01>(mean);
        let x = _mm512_fmadd_ps(mean, cos, x);
        let x = rounded::<TO>(_mm512_fmadd_ps(fellows, _mm512_xor_ps(sin, negative), x));
        if !all_finite::<TO>(x, x) {
            return at;
        }
        put::<TO>(to, at, x);
        at += STEP;
    }
    count
}

/// [`halves_apart`], for elements that do not turn.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn unturned<const FROM: u8, const TO: u8, const COPY: bool>(
    zero: f32,
    mean: &[f32],
    from: &[u8],
    to: &mut [u8],
) -> usize {
    let mut at = 0;
    while at < mean.len() {
        let x = signless::<FROM, COPY>(elements::<FROM>(if COPY { from } else { to }, at), zero);
        let x = rounded::<TO>(_mm512_add_ps(x, floats(mean, at)));
        if !all_finite::<TO>(x, x) {
            return at;
        }
        put::<TO>(to, at, x);
        at += STEP;
    }
    mean.len()
}

/// With `zero` added where that may change something: see [`Moves::zero`].
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn signless<const FROM: u8, const COPY: bool>(x: __m512, zero: f32) -> __m512 {
    if COPY && FROM == F32 { _mm512_add_ps(x, _mm512_set1_ps(zero)) } else { x }
}

/// The floats from number `at` on, and zeros where there are no more.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn floats(from: &[f32], at: usize) -> __m512 {
    let from: &[u8] = bytemuck::cast_slice(&from[at..]);
    _mm512_castsi512_ps(if from.len() >= 64 { load_wide(from, 0) } else { load_some(from) })
}

/// The elements from number `at` on, and zeros where there are no more.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn elements<const E: u8>(from: &[u8], at: usize) -> __m512 {
    let from = &from[at * element_bytes(E)..];
    let whole = from.len() >= STEP * element_bytes(E);
    match E {
        F32 => _mm512_castsi512_ps(if whole { load_wide(from, 0) } else { load_some(from) }),
        _ if whole => avx512::floats::<E>(load_full(from, 0)),
        _ => avx512::floats::<E>(_mm512_castsi512_si256(load_some(from))),
    }
}

/// Rounded to elements, which are the lower half if they have 16 bits.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn rounded<const E: u8>(x: __m512) -> __m512i {
    if E == F32 { _mm512_castps_si512(x) } else { _mm512_castsi256_si512(halves::<E>(x)) }
}

/// Writes elements from number `at` on, as many as there is room for.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn put<const E: u8>(to: &mut [u8], at: usize, x: __m512i) {
    let to = &mut to[at * element_bytes(E)..];
    if to.len() < STEP * element_bytes(E) {
        store_some(to, x);
    } else if E == F32 {
        store_wide(to, 0, x);
    } else {
        store_full(to, 0, _mm512_castsi512_si256(x));
    }
}

/// Whether no element of two vectors is beyond the largest.
#[inline]
#[target_feature(enable = "avx512vl,avx512dq,avx512vbmi")]
fn all_finite<const E: u8>(x: __m512i, y: __m512i) -> bool {
    if E == F32 {
        let twice = _mm512_max_epu32(_mm512_add_epi32(x, x), _mm512_add_epi32(y, y));
        return _mm512_cmpge_epu32_mask(twice, _mm512_set1_epi32(0xFF00_0000_u32.cast_signed())) == 0;
    }
    let (x, y) = (_mm512_castsi512_si256(x), _mm512_castsi512_si256(y));
    let twice = _mm256_max_epu16(_mm256_add_epi16(x, x), _mm256_add_epi16(y, y));
    let infinity = if E == F16 { 0xF800_u16 } else { 0xFF00 };
    _mm256_cmpge_epu16_mask(twice, _mm256_set1_epi16(infinity.cast_signed())) == 0
}
