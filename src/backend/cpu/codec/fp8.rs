//! `fp8`: e4m3 floats under one scale a row. The definition; see the [module documentation](super).

use super::ElementType;
use super::scalar::{decode_scaled, encode_scaled};

/// The largest e4m3 number.
pub(super) const MAX: f32 = 448.0;
/// Below it e4m3 numbers are multiples of [`STEP`].
pub(super) const NORMAL: f32 = 1.0 / 64.0;
const STEP: f32 = 1.0 / 512.0;

pub(super) fn encode(
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let coder = |scale: f32| {
        let inverse = 1.0 / scale;
        move |x: f32| to_e4m3(x * inverse)
    };
    encode_scaled(element, dim, src, codes, scales, MAX, coder)
}

pub(super) fn decode(
    element: ElementType,
    dim: usize,
    codes: &[u8],
    scales: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    decode_scaled(element, dim, codes, scales, dst, dst_stride, from_e4m3);
}

/// The nearest e4m3 number, ties to even, at most 448.
pub(crate) fn to_e4m3(x: f32) -> u8 {
    let magnitude = x.abs();
    let code = if magnitude < NORMAL {
        // 8 steps are the least normal number, whose code is 8.
        (magnitude / STEP).round_ties_even() as u32
    } else {
        // Drops 20 of 23 bits of the mantissa; a carry goes into the exponent, whose bias is 7 instead of 127.
        let bits = magnitude.to_bits();
        let rounded = (bits + 0x7_FFFF + (bits >> 20 & 1)) >> 20;
        (rounded - ((127 - 7) << 3)).min(0x7E)
    };
    (code as u8) | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// The code that stands for no number is taken as the next one, 480.
fn from_e4m3(code: u8) -> f32 {
    // As an f32 of the same fields it is too small by 2^120, also where it is subnormal.
    let magnitude = f32::from_bits(u32::from(code & 0x7F) << 20) * f32::from_bits((127 + 120) << 23);
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sign, 4 bits of exponent, 3 of mantissa, worked out from the definition.
    fn value(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match exponent {
            0 => mantissa / 8.0 * 2f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_code_has_its_value_and_comes_back() {
        for code in 0..=255u8 {
            assert_eq!(f64::from(from_e4m3(code)), value(code), "{code:#x}");
            if code & 0x7F != 0x7F {
                assert_eq!(to_e4m3(from_e4m3(code)), code);
            }
        }
    }

    #[test]
    fn numbers_in_between_go_to_the_nearest_and_halves_to_the_even_one() {
        for code in 0..0x7Eu8 {
            let (low, high) = (from_e4m3(code), from_e4m3(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code & 1 == 0 { code } else { code + 1 };
            assert_eq!(to_e4m3(middle), even, "between {low} and {high}");
            assert_eq!(to_e4m3(middle.next_down()), code);
            assert_eq!(to_e4m3(middle.next_up()), code + 1);
            assert_eq!(to_e4m3(-middle), even | 0x80);
        }
        assert_eq!(to_e4m3(1e30), 0x7E);
        assert_eq!(to_e4m3(-0.0), 0x80);
    }
}
