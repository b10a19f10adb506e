//! `r4`, `r3`, `r2`: rotated rows and codebooks for a normal distribution. The definition; see the [module documentation](super).

use std::ops::RangeInclusive;

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

/// The positive half of a codebook, and where its values end.
pub(super) struct Book {
    magnitudes: &'static [f32],
    /// Places of a whole codebook, an odd number, the two outermost counted as half a place each: two meet at zero.
    pub(super) places: i32,
    /// How wide a place is, in units of the standard deviation.
    width: f32,
    /// At which place, counted from zero, each value but the first begins.
    pub(super) begins: &'static [i32],
}

/// The values that leave the least squared error of a standard normal variable if one ends and the next begins where places do. Such
/// ends cost 0.2, 0.1 and 0 % of it, and make finding the nearest value one multiplication and one look-up.
static BOOK2: Book = Book { magnitudes: &[0.4528, 1.5104], places: 3, width: 0.9816, begins: &[1] };
static BOOK3: Book =
    Book { magnitudes: &[0.2401, 0.7501, 1.3446, 2.1537], places: 51, width: 0.07, begins: &[7, 15, 25] };
static BOOK4: Book = Book {
    magnitudes: &[0.1304, 0.3911, 0.6518, 0.9323, 1.2545, 1.6179, 2.0644, 2.7350],
    places: 111,
    width: 0.0437,
    begins: &[6, 12, 18, 25, 33, 42, 55],
};

pub(super) const fn book(bits: usize) -> &'static Book {
    match bits {
        2 => &BOOK2,
        3 => &BOOK3,
        _ => &BOOK4,
    }
}

/// What is added to this has no room for a fraction, and is rounded to the nearest integer.
pub(super) const WHOLE: f32 = 8_388_608.0;

impl Book {
    /// Codes of magnitudes; those after them are of the same with a minus.
    const fn half(&self) -> usize {
        self.magnitudes.len()
    }

    /// The value of a code.
    pub(super) const fn value(&self, code: usize) -> f32 {
        let magnitude = self.magnitudes[code % self.half()];
        if code & self.half() == 0 { magnitude } else { -magnitude }
    }

    /// The value of a code with the code for its lowest bits: a table of these is one of codes too. Factors are chosen for them.
    pub(super) const fn marked(&self, code: usize) -> f32 {
        let mask = 2 * self.half() as u32 - 1;
        f32::from_bits(self.value(code).to_bits() & !mask | code as u32 & mask)
    }

    /// The values of codes, over and over if there is room for more, marked or as they are.
    pub(super) const fn values<const N: usize>(&self, marked: bool) -> [f32; N] {
        let mut values = [0.0; N];
        let mut code = 0;
        while code < N {
            values[code] = if marked { self.marked(code) } else { self.value(code) };
            code += 1;
        }
        values
    }

    /// The largest value, or a little more.
    pub(super) const fn largest(&self) -> f32 {
        self.magnitudes[self.half() - 1] * 1.01
    }

    /// By what the reciprocal of a row's length is multiplied, to make of its elements shares of all places.
    pub(super) fn share(&self, dim: usize) -> f32 {
        (dim as f32).sqrt() / (self.places as f32 * self.width)
    }

    /// What is taken from the bits of a place on top of [`WHOLE`] to count from zero.
    pub(super) const fn zero(&self) -> i32 {
        WHOLE.to_bits().cast_signed() + (self.places + 1) / 2
    }

    /// The code for the element `y` of a row of which `unit` makes shares.
    fn nearest(&self, y: f32, unit: f32) -> usize {
        let share = y.mul_add(unit, 0.5).clamp(0.0, 1.0);
        let from_zero = share.mul_add(self.places as f32, WHOLE).to_bits().cast_signed() - self.zero();
        // Places below zero are counted the other way.
        let (negative, from_zero) = (from_zero < 0, from_zero ^ from_zero >> 31);
        let magnitude = self.begins.iter().filter(|begin| from_zero >= **begin).count();
        magnitude + if negative { self.half() } else { 0 }
    }
}

/// One over the root of `x`, a normal number, but for some millionths: two steps of Newton's method from what half the exponent gives.
fn near_inverse_root(x: f32) -> f32 {
    let first = f32::from_bits(0x5F37_5A86 - (x.to_bits() >> 1));
    let half = x * 0.5;
    (0..2).fold(first, |root, _| root * (-(half * root)).mul_add(root, 1.5))
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
            let mut square = rotate(element, row, 1.0, &mut rotated);
            let mut power = 1.0;
            if !is_near(element, square) {
                let abs_max = (0..dim).fold(0.0f32, |max, i| max.max(read(element, row, i).abs()));
                power = power_below(abs_max);
                square = rotate(element, row, power.recip(), &mut rotated);
            }
            write_factor(choose(bits, &rotated, square, codes) * power, factor);
        } else {
            all = false;
            write_factor(0.0, factor);
        }
    }
    all
}

/// Rotates a row times `scale`, and returns the sum of its squares.
fn rotate(element: ElementType, row: &[u8], scale: f32, y: &mut [f32]) -> f32 {
    for (i, y) in y.iter_mut().enumerate() {
        let x = read(element, row, i) * scale;
        *y = if flips(i) { -x } else { x };
    }
    let (dim, group) = (y.len(), group(y.len()));
    y.chunks_exact_mut(group).for_each(transform);
    sum(dim, group, |i| (y[i], y[i]))
}

/// Between these a sum of squares is far from overflow and underflow, and so is each of them.
pub(super) const NEAR: RangeInclusive<f32> = power(-80)..=power(100);

const fn power(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

/// Whether a row whose squares add up to this is rotated as it is. Those of f16 always are.
fn is_near(element: ElementType, square: f32) -> bool {
    element == ElementType::F16 || NEAR.contains(&square)
}

/// What other rows are divided by, whose largest magnitude is `x`: the power of two at or below it, between 2^-126 and 2^126.
fn power_below(x: f32) -> f32 {
    f32::from_bits((x.to_bits() & 0x7F80_0000).clamp(1 << 23, 253 << 23))
}

/// Chooses the codes of a rotated row, and returns its factor. `square` is the sum of its squares.
fn choose(bits: usize, y: &[f32], square: f32, codes: &mut [u8]) -> f32 {
    let (dim, group) = (y.len(), group(y.len()));
    if square == 0.0 {
        return 0.0;
    }
    let book = book(bits);
    let unit = near_inverse_root(square) * book.share(dim);
    let mut chosen = vec![0.0; dim];
    for (i, y) in y.iter().enumerate() {
        let code = book.nearest(*y, unit);
        put(codes, bits, i, code as u8);
        chosen[i] = book.marked(code);
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
            *y = book.value(usize::from(get(codes, bits, i)));
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

/// The sum of the products of the `factors` of all elements: inside a unit one after the other, fused; inside a group each unit of the
/// first half and its fellow of the second, then the same of those, …; the groups one after the other.
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
            (0..count).for_each(|i| level[i] += level[count + i]);
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
