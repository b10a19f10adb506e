//! Splits elements into what an entropy coder can shorten and what it cannot.
//!
//! A payload is a byte, 0 for a block as it is or 1, and then: of each head in order its bias (not of `int8` codes) and the bits that stay
//! as they are; the coded symbols of all keys; those of all values. The bias is the mean exponent of a head: exponents are coded
//! as differences from it, so that heads and layers of different spread share their tables.

use super::coder::{self, Alphabet, Decoder};
use super::input::Input;
use super::{ColdError, Element, Shape};

const AS_IT_IS: u8 = 0;
const SPLIT: u8 = 1;

/// Appends the payload of a block.
pub(super) fn encode(element: Element, shape: &Shape, block: &[u8], out: &mut Vec<u8>) {
    let (first, bytes) = (out.len(), element.bytes());
    out.push(SPLIT);
    let mut symbols = [const { Vec::new() }; 2];
    for plane in shape.planes() {
        let symbols = &mut symbols[plane.kind];
        let heads = &block[plane.first * bytes..][..shape.kv_heads as usize * plane.head * bytes];
        for head in heads.chunks_exact(plane.head * bytes) {
            match element {
                Element::F16 => split_f16(head, symbols, out),
                Element::Bf16 => split_bf16(head.chunks_exact(2).map(u16_of), symbols, out),
                Element::F32 => {
                    split_bf16(head.chunks_exact(4).map(|x| u16_of(&x[2..])), symbols, out);
                    out.extend(head.chunks_exact(4).flat_map(|x| [x[0], x[1]]));
                }
                Element::Int8 => symbols.extend(head.iter().map(|code| u16::from(code ^ 0x80))),
            }
        }
    }
    let alphabet = alphabet(element);
    for (symbols, dim) in symbols.iter().zip([shape.key_dim, shape.value_dim]) {
        let dim = dim as usize;
        coder::encode(&alphabet, shape.tokens as usize * dim, dim, symbols, out);
    }
    if out.len() - first > block.len() {
        out.truncate(first);
        out.push(AS_IT_IS);
        out.extend_from_slice(block);
    }
}

/// Writes the block of a payload. `out` is as long as the shape says.
pub(super) fn decode(
    element: Element,
    shape: &Shape,
    payload: &[u8],
    out: &mut [u8],
) -> Result<(), ColdError> {
    let mut input = Input::new(payload);
    let way = input.byte()?;
    input.within("the way of storing", usize::from(way), usize::from(AS_IT_IS)..=usize::from(SPLIT))?;
    if way == AS_IT_IS {
        out.copy_from_slice(input.take(out.len())?);
        return input.finish();
    }
    let heads = shape.kv_heads as usize;
    // Behind as many bytes as `take_bits` takes for all heads.
    let plain = shape.planes().map(|plane| heads * plain_bytes(element, plane.head)).sum();
    let mut plain = Input::new(input.take(plain)?);
    let mut decoders = Vec::with_capacity(2);
    for dim in [shape.key_dim, shape.value_dim] {
        let some = dim > 0 && !out.is_empty();
        decoders.push(some.then(|| Decoder::new(alphabet(element), dim as usize, &mut input)).transpose()?);
    }
    let mut symbols = Vec::new();
    for plane in shape.planes() {
        let Some(decoder) = &mut decoders[plane.kind] else { continue };
        symbols.resize(plane.head, 0);
        let bytes = element.bytes();
        let out = &mut out[plane.first * bytes..][..heads * plane.head * bytes];
        for head in out.chunks_exact_mut(plane.head * bytes) {
            decoder.plane(&mut symbols);
            let plain = plain.take(plain_bytes(element, plane.head))?;
            match element {
                Element::F16 => join_f16(&symbols, plain, head),
                Element::Bf16 => {
                    join_bf16(&symbols, plain, head.chunks_exact_mut(2));
                }
                Element::F32 => {
                    let (upper, lower) = plain.split_at(plain.len() - 2 * plane.head);
                    join_bf16(&symbols, upper, head.chunks_exact_mut(4).map(|x| &mut x[2..]));
                    for (x, lower) in head.chunks_exact_mut(4).zip(lower.chunks_exact(2)) {
                        x[..2].copy_from_slice(lower);
                    }
                }
                Element::Int8 => {
                    head.iter_mut().zip(&symbols).for_each(|(code, symbol)| *code = *symbol as u8 ^ 0x80);
                }
            }
        }
    }
    for decoder in decoders.into_iter().flatten() {
        decoder.finish(&input)?;
    }
    input.finish()
}

/// Bytes of a head that are not coded.
const fn plain_bytes(element: Element, elements: usize) -> usize {
    match element {
        Element::F16 => 1 + elements,
        Element::Bf16 => 1 + 7 * elements.div_ceil(8),
        Element::F32 => 1 + 7 * elements.div_ceil(8) + 2 * elements,
        Element::Int8 => 0,
    }
}

fn u16_of(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// Symbols as contexts. Of floats those of 16 octaves on either side of the bias and of zero are told apart: that is all of f16.
fn alphabet(element: Element) -> Alphabet {
    match element {
        Element::F16 => Alphabet::new(256, |symbol| (symbol >> 2) as u8),
        Element::Bf16 | Element::F32 => Alphabet::new(512, |symbol| match symbol {
            0..256 => (symbol.clamp(112, 143) - 112) as u8,
            _ => (symbol.clamp(368, 399) - 368 + 32) as u8,
        }),
        Element::Int8 => Alphabet::new(256, |symbol| (symbol >> 3) as u8),
    }
}

fn mean(exponents: impl ExactSizeIterator<Item = u8>) -> u8 {
    let count = exponents.len() as u64;
    ((exponents.map(u64::from).sum::<u64>() + count / 2) / count.max(1)) as u8
}

/// Sign and magnitude of `bits` bits as one number that is in order: the most negative is 0.
const fn ordered(negative: bool, magnitude: u16, bits: u32) -> u16 {
    if negative { (1 << bits) - 1 - magnitude } else { (1 << bits) + magnitude }
}

const fn sign_and_magnitude(ordered: u16, bits: u32) -> (u16, u16) {
    match ordered >> bits {
        0 => (1, (1 << bits) - 1 - ordered),
        _ => (0, ordered - (1 << bits)),
    }
}

/// The bias; 7 bits of mantissa an element, 8 elements in 7 bytes. Symbols are the sign and how far the exponent is from the bias.
fn split_bf16(head: impl ExactSizeIterator<Item = u16> + Clone, symbols: &mut Vec<u16>, out: &mut Vec<u8>) {
    let bias = mean(head.clone().map(|x| (x >> 7) as u8));
    out.push(bias);
    symbols.extend(head.clone().map(|x| {
        let exponent = ((x >> 7) as u8).wrapping_sub(bias).wrapping_add(128);
        ordered(x >> 15 == 1, u16::from(exponent), 8)
    }));
    let mut eight = [0u8; 8];
    let mut filled = 0;
    for x in head {
        eight[filled] = x as u8 & 0x7F;
        filled += 1;
        if filled == 8 {
            out.extend_from_slice(&seven(eight));
            filled = 0;
        }
    }
    if filled > 0 {
        eight[filled..].fill(0);
        out.extend_from_slice(&seven(eight));
    }
}

fn join_bf16<'a>(symbols: &[u16], plain: &[u8], out: impl Iterator<Item = &'a mut [u8]>) {
    let (bias, mantissas) = (plain[0], &plain[1..]);
    let mut out = out;
    for (symbols, seven) in symbols.chunks(8).zip(mantissas.chunks_exact(7)) {
        let mantissas = eight(seven);
        for ((symbol, mantissa), out) in symbols.iter().zip(mantissas).zip(out.by_ref()) {
            let (sign, exponent) = sign_and_magnitude(*symbol, 8);
            let exponent = (exponent as u8).wrapping_add(bias).wrapping_sub(128);
            let x = sign << 15 | u16::from(exponent) << 7 | u16::from(mantissa);
            out.copy_from_slice(&x.to_le_bytes());
        }
    }
}

/// The bias; the lower byte of each element. Symbols are the sign, how far the exponent is from the bias, and two bits of mantissa.
fn split_f16(head: &[u8], symbols: &mut Vec<u16>, out: &mut Vec<u8>) {
    let bias = mean(head.chunks_exact(2).map(|x| x[1] >> 2 & 31));
    out.push(bias);
    symbols.extend(head.chunks_exact(2).map(|x| {
        let exponent = (x[1] >> 2).wrapping_sub(bias).wrapping_add(16) & 31;
        ordered(x[1] >> 7 == 1, u16::from(exponent << 2 | x[1] & 3), 7)
    }));
    out.extend(head.chunks_exact(2).map(|x| x[0]));
}

fn join_f16(symbols: &[u16], plain: &[u8], out: &mut [u8]) {
    let (bias, lower) = (plain[0], &plain[1..]);
    for ((symbol, lower), out) in symbols.iter().zip(lower).zip(out.chunks_exact_mut(2)) {
        let (sign, magnitude) = sign_and_magnitude(*symbol, 7);
        let exponent = (magnitude as u8 >> 2).wrapping_add(bias).wrapping_sub(16) & 31;
        out.copy_from_slice(&[*lower, (sign as u8) << 7 | exponent << 2 | magnitude as u8 & 3]);
    }
}

/// Eight numbers of 7 bits in 7 bytes.
fn seven(eight: [u8; 8]) -> [u8; 7] {
    let x = u64::from_le_bytes(eight);
    let x = x & 0x007F_007F_007F_007F | (x & 0x7F00_7F00_7F00_7F00) >> 1;
    let x = x & 0x0000_3FFF_0000_3FFF | (x & 0x3FFF_0000_3FFF_0000) >> 2;
    let x = x & 0x0000_0000_0FFF_FFFF | (x & 0x0FFF_FFFF_0000_0000) >> 4;
    let mut seven = [0; 7];
    seven.copy_from_slice(&x.to_le_bytes()[..7]);
    seven
}

fn eight(seven: &[u8]) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..7].copy_from_slice(seven);
    let x = u64::from_le_bytes(bytes);
    let x = x & 0x0000_0000_0FFF_FFFF | (x & 0x00FF_FFFF_F000_0000) << 4;
    let x = x & 0x0000_3FFF_0000_3FFF | (x & 0x0FFF_C000_0FFF_C000) << 2;
    let x = x & 0x007F_007F_007F_007F | (x & 0x3F80_3F80_3F80_3F80) << 1;
    x.to_le_bytes()
}
