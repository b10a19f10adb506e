//! `r4`, `r3`, `r2`: rotated rows and codebooks for a normal distribution. The definition; see the [module documentation](super).

use half::bf16;

use super::ElementType;
use super::scalar::{all_finite, finite, read, write};

/// Elements that are rotated together, at most.
pub(super) const GROUP_MAX: usize = 256;

/// Elements that are rotated together: the largest power of two that divides `dim`, up to [`GROUP_MAX`].
pub(super) const fn group(dim: usize) -> usize {
    let group = 1 << dim.trailing_zeros();
    if group < GROUP_MAX { group } else { GROUP_MAX }
}

/// Whether element `i` of a row changes its sign before the transform: the bits of the fraction of π, over and over.
const SIGNS: [u32; 8] =
    [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344, 0xA409_3822, 0x299F_31D0, 0x082E_FA98, 0xEC4E_6C89];

pub(super) const fn flips(i: usize) -> bool {
    SIGNS[i / 32 % 8] >> (i % 32) & 1 == 1
}

/// The positive halves of the codebooks: the values that leave the least squared error of a standard normal variable.
pub(super) const BOOK2: [f32; 2] = [0.4528, 1.5104];
pub(super) const BOOK3: [f32; 4] = [0.2451, 0.7560, 1.3439, 2.1519];
pub(super) const BOOK4: [f32; 8] = [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326];

pub(super) const fn book(bits: usize) -> &'static [f32] {
    match bits {
        2 => &BOOK2,
        3 => &BOOK3,
        _ => &BOOK4,
    }
}

/// Between which magnitudes one value of the codebook ends and the next begins.
pub(super) fn middle(book: &[f32], i: usize) -> f32 {
    (book[i] + book[i + 1]) * 0.5
}

pub(super) fn encode(
    bits: usize,
    element: ElementType,
    dim: usize,
    src: &[u8],
    codes: &mut [u8],
    factors: &mut [u8],
) -> bool {
    let row_bytes = (dim * bits).div_ceil(8);
    let mut rotated = vec![0.0; dim];
    let mut all = true;
    let rows = src.chunks_exact(dim * element.bytes()).zip(codes.chunks_exact_mut(row_bytes));
    for ((row, codes), factor) in rows.zip(factors.chunks_exact_mut(2)) {
        codes.fill(0);
        if all_finite(element, row) {
            let down = load(element, row, &mut rotated);
            let ideal = choose(bits, &mut rotated, codes) * down.recip();
            write_factor(ideal, factor);
        } else {
            all = false;
            write_factor(0.0, factor);
        }
    }
    all
}

/// Loads a row with its signs changed, and returns by which power of two it was multiplied, so that no square overflows.
fn load(element: ElementType, row: &[u8], into: &mut [f32]) -> f32 {
    let down = match element {
        ElementType::F16 => 1.0,
        ElementType::Bf16 | ElementType::F32 => {
            let abs_max = (0..into.len()).fold(0.0f32, |max, i| max.max(read(element, row, i).abs()));
            power_below(abs_max).recip()
        }
    };
    for (i, to) in into.iter_mut().enumerate() {
        let x = read(element, row, i) * down;
        *to = if flips(i) { -x } else { x };
    }
    down
}

/// The power of two at or below `x`, between 2^-126 and 2^126.
fn power_below(x: f32) -> f32 {
    f32::from_bits((x.to_bits() & 0x7F80_0000).clamp(1 << 23, 253 << 23))
}

/// Rotates the row in `y`, chooses its codes, and returns its factor.
fn choose(bits: usize, y: &mut [f32], codes: &mut [u8]) -> f32 {
    let (dim, group) = (y.len(), group(y.len()));
    y.chunks_exact_mut(group).for_each(transform);
    let square = sum(dim, group, |i| (y[i], y[i]));
    if square == 0.0 {
        return 0.0;
    }
    let book = book(bits);
    let to_unit = (dim as f32 / square).sqrt();
    let mut chosen = vec![0.0; dim];
    for (i, y) in y.iter().enumerate() {
        let u = y * to_unit;
        let magnitude = (1..book.len()).filter(|m| u.abs() > middle(book, m - 1)).count();
        let negative = *y < 0.0;
        put(codes, bits, i, magnitude as u8 | u8::from(negative) << (bits - 1));
        chosen[i] = if negative { -book[magnitude] } else { book[magnitude] };
    }
    let dot = sum(dim, group, |i| (y[i], chosen[i]));
    let length = sum(dim, group, |i| (chosen[i], chosen[i]));
    // The transform has multiplied lengths by the square root of `group`.
    dot / length * root(group).recip()
}

pub(super) fn decode(
    bits: usize,
    element: ElementType,
    dim: usize,
    codes: &[u8],
    factors: &[u8],
    dst: &mut [u8],
    dst_stride: usize,
) {
    let (row_bytes, group, book) = ((dim * bits).div_ceil(8), group(dim), book(bits));
    let mut rotated = vec![0.0; dim];
    let rows = codes.chunks_exact(row_bytes).zip(factors.chunks_exact(2));
    for (row, (codes, factor)) in rows.enumerate() {
        for (i, y) in rotated.iter_mut().enumerate() {
            let code = get(codes, bits, i);
            let c = book[usize::from(code) & (book.len() - 1)];
            *y = if code >> (bits - 1) & 1 == 1 { -c } else { c };
        }
        rotated.chunks_exact_mut(group).for_each(transform);
        let scale = read_factor(factor) * root(group).recip();
        let out = &mut dst[row * dst_stride..][..dim * element.bytes()];
        for (i, out) in out.chunks_exact_mut(element.bytes()).enumerate() {
            let x = rotated[i] * scale;
            write(element, finite(element, if flips(i) { -x } else { x }), out);
        }
    }
}

/// The Hadamard transform without its factor: sums and differences of elements 1, 2, 4, … apart.
fn transform(y: &mut [f32]) {
    let mut apart = 1;
    while apart < y.len() {
        for pair in y.chunks_exact_mut(2 * apart) {
            let (low, high) = pair.split_at_mut(apart);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        apart *= 2;
    }
}

/// Elements whose products are added one after the other; a group that is smaller is one unit.
const UNIT: usize = 8;

/// The sum of the products of the `factors` of all elements: inside a unit one after the other, fused; inside a group neighbouring
/// units first, then neighbours of those, …; the groups one after the other.
fn sum(dim: usize, group: usize, factors: impl Fn(usize) -> (f32, f32)) -> f32 {
    let unit = group.min(UNIT);
    let of_unit = |first: usize| {
        let (a, b) = factors(first);
        (first + 1..first + unit).map(&factors).fold(a * b, |all, (a, b)| a.mul_add(b, all))
    };
    let mut level = [0.0; GROUP_MAX];
    let of_group = |first: usize| {
        let mut count = group / unit;
        level.iter_mut().take(count).enumerate().for_each(|(at, to)| *to = of_unit(first + at * unit));
        while count > 1 {
            count /= 2;
            (0..count).for_each(|i| level[i] = level[2 * i] + level[2 * i + 1]);
        }
        level[0]
    };
    (0..dim).step_by(group).map(of_group).reduce(|all, next| all + next).unwrap_or_default()
}

pub(super) fn root(group: usize) -> f32 {
    (group as f32).sqrt()
}

/// Code `i` of a row: bits `i * bits` and up of its bytes, the least significant first.
pub(super) fn put(codes: &mut [u8], bits: usize, i: usize, code: u8) {
    let (byte, shift) = (i * bits / 8, i * bits % 8);
    let wide = u16::from(code) << shift;
    codes[byte] |= wide as u8;
    if shift + bits > 8 {
        codes[byte + 1] |= (wide >> 8) as u8;
    }
}

pub(super) fn get(codes: &[u8], bits: usize, i: usize) -> u8 {
    let (byte, shift) = (i * bits / 8, i * bits % 8);
    let high = if shift + bits > 8 { codes[byte + 1] } else { 0 };
    let wide = u16::from(codes[byte]) | u16::from(high) << 8;
    (wide >> shift) as u8 & ((1 << bits) - 1)
}

/// Rounds a factor to bf16, which has the range of all element types: an f16 would not hold that of a row near its largest numbers.
pub(super) fn write_factor(ideal: f32, stored: &mut [u8]) {
    stored.copy_from_slice(&bf16::from_f32(ideal.min(bf16::MAX.to_f32())).to_le_bytes());
}

fn read_factor(stored: &[u8]) -> f32 {
    bf16::from_le_bytes([stored[0], stored[1]]).to_f32()
}
