//! Every kernel set against hand-computed answers, an independent f64 reference, and the scalar set byte for byte.

use half::{bf16, f16};

use kv_cache_actors::format::RowFormat;
use kv_cache_actors::geometry::Plane;

use super::{ElementType, Format, Kernels, SCALE_FLOOR_F32};

const ELEMENTS: [ElementType; 3] = [ElementType::F16, ElementType::Bf16, ElementType::F32];
const DIMS: [usize; 8] = [1, 3, 8, 64, 80, 128, 129, 256];

/// xorshift64*: enough chance for a test, and the same on every run.
pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        self.bits() % n
    }

    /// Uniform in [-1, 1).
    pub(super) fn unit(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Rounds to the element type.
pub(super) fn bytes_of(element: ElementType, value: f32) -> Vec<u8> {
    match element {
        ElementType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        ElementType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        ElementType::F32 => value.to_le_bytes().to_vec(),
    }
}

fn row_of(element: ElementType, values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| bytes_of(element, *value)).collect()
}

/// The element or scale in `bytes`, decoded from the bits by the book.
fn exact(bytes: &[u8], exponent_bits: u32) -> f64 {
    let bits = bytes.iter().rev().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
    let width = bytes.len() as u32 * 8;
    let mantissa_bits = width - 1 - exponent_bits;
    let (mantissa, rest) = (bits & ((1 << mantissa_bits) - 1), bits >> mantissa_bits);
    let exponent = (rest & ((1 << exponent_bits) - 1)) as i32;
    let sign = if bits >> (width - 1) == 1 { -1.0 } else { 1.0 };
    let bias = (1 << (exponent_bits - 1)) - 1 + mantissa_bits as i32;
    let hidden = if exponent == 0 { 0 } else { 1 << mantissa_bits };
    sign * (hidden + mantissa) as f64 * 2f64.powi(exponent.max(1) - bias)
}

fn exact_element(element: ElementType, bytes: &[u8]) -> f64 {
    exact(bytes, if element == ElementType::F16 { 5 } else { 8 })
}

/// `value` rounded, half to even, to `digits` binary digits, with `exponent_min` that of the least normal.
fn rounded(value: f64, digits: i32, exponent_min: i32) -> f64 {
    let exponent = ((value.abs().to_bits() >> 52) as i32 - 1023).max(exponent_min);
    let unit = 2f64.powi(exponent - digits + 1);
    (value / unit).round_ties_even() * unit
}

/// What one row encodes to by the definition, in f64: codes, scale, and the decoded values.
fn reference(element: ElementType, row: &[u8]) -> (Vec<i8>, f64, Vec<f64>) {
    let values: Vec<f64> = row.chunks(element.bytes()).map(|x| exact_element(element, x)).collect();
    let abs_max = values.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    // A quotient of two f32, rounded to f64 and then to f32, is the f32 quotient: 53 >= 2 · 24 + 2.
    let ideal = rounded(abs_max / 127.0, 24, -126);
    let scale = match element {
        ElementType::F16 => rounded(ideal, 11, -14).max(2f64.powi(-24)),
        _ => ideal.max(2f64.powi(-100)),
    };
    let code = |x: &f64| rounded(x / scale, 24, -126).round_ties_even().clamp(-127.0, 127.0) as i8;
    let codes: Vec<i8> = values.iter().map(code).collect();
    let (digits, exponent_min, max) = match element {
        ElementType::F16 => (11, -14, 65504.0),
        ElementType::Bf16 => (8, -126, f64::from(bf16::MAX)),
        ElementType::F32 => (24, -126, f64::from(f32::MAX)),
    };
    let decode =
        |q: &i8| rounded(rounded(f64::from(*q) * scale, 24, -126).clamp(-max, max), digits, exponent_min);
    let decoded = codes.iter().map(decode).collect();
    (codes, scale, decoded)
}

struct Encoded {
    finite: bool,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

fn int8(element: ElementType, dim: usize) -> RowFormat {
    RowFormat { format: Format::Int8, element, plane: Plane::Value, dim }
}

/// Encodes from and to odd addresses, and checks that nothing around the outputs changes.
fn encode(kernels: Kernels, element: ElementType, dim: usize, src: &[u8]) -> Encoded {
    let rows = src.len() / element.bytes() / dim;
    let mut shifted = vec![0xEE; 1];
    shifted.extend_from_slice(src);
    let mut codes = vec![0xEE; rows * dim + 4];
    let mut scales = vec![0xEE; rows * element.scale_bytes() + 4];
    let (codes_end, scales_end) = (codes.len() - 1, scales.len() - 1);
    let (codes_out, scales_out) = (&mut codes[3..codes_end], &mut scales[3..scales_end]);
    let finite = kernels.encode(int8(element, dim), &shifted[1..], codes_out, scales_out);
    assert_eq!((&codes[..3], codes[codes_end]), (&[0xEE; 3][..], 0xEE));
    assert_eq!((&scales[..3], scales[scales_end]), (&[0xEE; 3][..], 0xEE));
    Encoded { finite, codes: codes[3..codes_end].to_vec(), scales: scales[3..scales_end].to_vec() }
}

/// Decodes to rows 3 elements too far apart, at an odd address; all of the destination.
fn decode(kernels: Kernels, element: ElementType, dim: usize, codes: &[u8], scales: &[u8]) -> Vec<u8> {
    let stride = (dim + 3) * element.bytes();
    let mut dst = vec![0xEE; codes.len() / dim * stride + 1];
    kernels.decode(int8(element, dim), 0, codes, scales, &mut dst[1..], stride);
    for row in dst[1..].chunks(stride) {
        assert!(row[dim * element.bytes()..].iter().all(|byte| *byte == 0xEE), "wrote between rows");
    }
    dst
}

/// Rows of all kinds: plain, any finite bits, ties, powers of two, tiny, huge, sparse, one value.
fn adversarial_row(chance: &mut Chance, element: ElementType, dim: usize) -> Vec<u8> {
    let kind = chance.below(9);
    let exponent_span = if element == ElementType::F16 { 15 } else { 120 };
    let power = 2f32.powi(chance.below(2 * exponent_span).cast_signed() - exponent_span.cast_signed());
    let scale = match chance.below(3) {
        0 => power,
        1 => power * (1.0 + chance.unit().abs()),
        // A mantissa of ones.
        _ => f32::from_bits(power.to_bits() | 0x7F_FFFF),
    };
    let mut values: Vec<f32> = (0..dim)
        .map(|_| match kind {
            0 | 1 => chance.unit() * scale,
            2 | 3 => (chance.below(254) as f32 - 126.5) * scale,
            4 => (chance.below(508) as f32 - 253.5) * 0.25 * scale,
            5 => chance.unit() * 2f32.powi(-(chance.below(60).cast_signed()) - 90),
            6 => chance.unit() * f32::MAX,
            7 => [0.0, -0.0, scale, -scale][chance.below(4) as usize],
            _ => f32::from_bits(chance.bits()),
        })
        .collect();
    if matches!(kind, 2..=4) {
        values[chance.below(dim as u32) as usize] = 127.0 * scale;
    }
    let finite = |x: &f32| exact_element(element, &bytes_of(element, *x)).abs() <= f64::from(max_of(element));
    values
        .iter()
        .flat_map(|x| if finite(x) { bytes_of(element, *x) } else { bytes_of(element, 1.5) })
        .collect()
}

fn max_of(element: ElementType) -> f32 {
    super::finite_max(element)
}

#[test]
fn known_answers() {
    for kernels in Kernels::candidates() {
        // 254 / 127 = 2: ties at odd values go to the even code.
        let values = [254.0, 1.0, 3.0, 5.0, -1.0, -3.0, 2.0, -254.0, 0.0, -0.0, 0.5, 1.5];
        let codes = [127, 0, 2, 2, 0, -2, 1, -127, 0, 0, 0, 1].map(|q: i8| q.cast_unsigned());
        for element in ELEMENTS {
            let encoded = encode(kernels, element, values.len(), &row_of(element, &values));
            assert!(encoded.finite);
            assert_eq!(encoded.codes, codes, "{} {element:?}", kernels.name());
            let scale = if element == ElementType::F16 { vec![0x00, 0x40] } else { vec![0, 0, 0, 0x40] };
            assert_eq!(encoded.scales, scale);
            let decoded = decode(kernels, element, values.len(), &encoded.codes, &encoded.scales);
            let expected = [254.0, 0.0, 4.0, 4.0, 0.0, -4.0, 2.0, -254.0, 0.0, 0.0, 0.0, 2.0];
            assert_eq!(decoded[1..=values.len() * element.bytes()], row_of(element, &expected));
        }

        // 65504 / 127 = 515.78 rounds up to 516 = 0x6008, and 127 · 516 = 65532 saturates to 65504.
        let row = row_of(ElementType::F16, &[65504.0, -65504.0]);
        let encoded = encode(kernels, ElementType::F16, 2, &row);
        assert_eq!((&encoded.codes[..], &encoded.scales[..]), (&[127, 0x81][..], &[0x08, 0x60][..]));
        assert_eq!(decode(kernels, ElementType::F16, 2, &encoded.codes, &encoded.scales)[1..5], row);

        // Zeros meet the floors: f16 bits 1, and f32 exponent field 27.
        let encoded = encode(kernels, ElementType::F16, 3, &[0; 6]);
        assert_eq!((encoded.codes, encoded.scales), (vec![0; 3], vec![1, 0]));
        for element in [ElementType::Bf16, ElementType::F32] {
            let encoded = encode(kernels, element, 3, &vec![0x00; 3 * element.bytes()]);
            assert_eq!((encoded.codes, encoded.scales), (vec![0; 3], vec![0, 0, 0x80, 0x0D]));
        }

        // 190 · 2^-24 / 127 = 1.496 · 2^-24 rounds to a scale of 2^-24: the code clamps.
        let encoded = encode(kernels, ElementType::F16, 2, &[190, 0, 190, 0x80]);
        assert_eq!((encoded.codes, encoded.scales), (vec![127, 0x81], vec![1, 0]));
    }
}

#[test]
fn meets_the_f64_reference_and_the_error_bound() {
    let mut chance = Chance(1);
    for element in ELEMENTS {
        for dim in DIMS {
            for _ in 0..60 {
                let row = adversarial_row(&mut chance, element, dim);
                let (codes, scale, decoded) = reference(element, &row);
                for kernels in Kernels::candidates() {
                    let encoded = encode(kernels, element, dim, &row);
                    assert!(encoded.finite);
                    let got: Vec<i8> = encoded.codes.iter().map(|code| code.cast_signed()).collect();
                    assert_eq!(got, codes, "{} {element:?} {dim} {row:?}", kernels.name());
                    let stored = exact(&encoded.scales, if element == ElementType::F16 { 5 } else { 8 });
                    assert_eq!(stored, scale);

                    let out = decode(kernels, element, dim, &encoded.codes, &encoded.scales);
                    let out = out[1..=dim * element.bytes()].chunks(element.bytes());
                    let got: Vec<f64> = out.map(|x| exact_element(element, x)).collect();
                    assert_eq!(got, decoded, "{} {element:?} {dim}", kernels.name());
                }
                let values = row.chunks(element.bytes()).map(|x| exact_element(element, x));
                let (eps, lost) = match element {
                    ElementType::F16 => (2f64.powi(-11), scale / 16.0 + 64.0 * 2f64.powi(-24)),
                    ElementType::Bf16 => (2f64.powi(-8), scale / 1e4),
                    ElementType::F32 => (2f64.powi(-24), scale / 1e4),
                };
                for (x, y) in values.zip(decoded) {
                    let bound = scale / 2.0 + eps * y.abs() + lost;
                    assert!((x - y).abs() <= bound, "{element:?}: {x} became {y}, scale {scale}");
                }
            }
        }
    }
}

#[test]
fn every_set_yields_the_scalar_bytes() {
    let mut chance = Chance(2);
    for element in ELEMENTS {
        for dim in DIMS {
            for round in 0..40 {
                // Up to 19 rows: whole batches, parts of one, and both.
                let rows = 1 + round % 19;
                let mut src: Vec<u8> =
                    (0..rows).flat_map(|_| adversarial_row(&mut chance, element, dim)).collect();
                if round % 4 == 3 {
                    // Any bits at all: NaN and infinities among them.
                    src.iter_mut().for_each(|byte| *byte = chance.bits() as u8);
                }
                let expected = encode(Kernels::scalar(), element, dim, &src);
                // Any codes, -128 too, and any scales, negative, infinite and NaN too.
                let hostile_codes: Vec<u8> = expected.codes.iter().map(|_| chance.bits() as u8).collect();
                let hostile_scales: Vec<u8> = expected.scales.iter().map(|_| chance.bits() as u8).collect();
                for kernels in Kernels::candidates() {
                    let got = encode(kernels, element, dim, &src);
                    let label = format!("{} {element:?} {rows} x {dim}", kernels.name());
                    assert_eq!(got.finite, expected.finite, "{label}");
                    assert_eq!(got.scales, expected.scales, "{label}");
                    assert_eq!(got.codes, expected.codes, "{label}");
                    for (codes, scales) in [
                        (&got.codes, &got.scales),
                        (&hostile_codes, &hostile_scales),
                        (&hostile_codes, &got.scales),
                    ] {
                        let expected = decode(Kernels::scalar(), element, dim, codes, scales);
                        assert_eq!(decode(kernels, element, dim, codes, scales), expected, "{label}");
                    }
                }
            }
        }
    }
}

/// Every value of a 16-bit type with every row maximum it can share a row with, above a thousandth of it.
///
/// This is what the SIMD shortcuts for the quotient rest on. The quotients here are real divisions, rounded by
/// adding 1.5 · 2^23, which unlike `round_ties_even` the compiler can vectorise for any x86-64.
fn every_pair(element: ElementType, infinity: u16) {
    let value = |bits: u16| exact_element(element, &bits.to_le_bytes()) as f32;
    let values: Vec<f32> = (0..infinity).map(value).collect();
    let span = 10 * if element == ElementType::F16 { 1024 } else { 128 };
    let sets: Vec<Kernels> = Kernels::candidates().into_iter().skip(1).collect();
    let (mut src, mut expected) = (vec![0u8; 2 * span], vec![0u8; span]);
    let (mut codes, mut scales) = (vec![0u8; span], [0u8; 4]);
    let scales = &mut scales[..element.scale_bytes()];
    for (max, sign) in (1..infinity).flat_map(|max| [(max, 0), (max, 0x8000)]) {
        let least = (max + 1).saturating_sub(span as u16);
        let count = usize::from(max - least) + 1;
        src.fill(0);
        for (bits, out) in (least..=max).zip(src.chunks_exact_mut(2)) {
            out.copy_from_slice(&(bits | sign).to_le_bytes());
        }
        let ideal = values[usize::from(max)] / 127.0;
        let scale = match element {
            ElementType::F16 => f16::from_f32(ideal).max(f16::from_bits(1)).to_f32(),
            _ => ideal.max(SCALE_FLOOR_F32),
        };
        expected.fill(0);
        let factor = if sign == 0 { 1 } else { -1 };
        for (x, code) in values[usize::from(least)..=usize::from(max)].iter().zip(&mut expected) {
            let magic = 12_582_912.0f32;
            let q = ((x / scale + magic) - magic) as i32;
            *code = (factor * q.min(127)) as u8;
        }
        for kernels in &sets {
            assert!(kernels.encode(int8(element, span), &src, &mut codes, scales));
            assert!(codes[..count] == expected[..count], "{} {element:?} max {max:#x}", kernels.name());
        }
    }
}

#[test]
fn every_f16_value_with_every_f16_maximum() {
    every_pair(ElementType::F16, 0x7C00);
}

#[test]
fn every_bf16_value_with_every_bf16_maximum() {
    every_pair(ElementType::Bf16, 0x7F80);
}

/// Elements of f32 that are a few units of their last place from the middle between two codes.
#[test]
fn f32_quotients_beside_a_half() {
    let mut chance = Chance(4);
    for _ in 0..2000 {
        let max = f32::from_bits(chance.below(0x7F80_0000 - (1 << 23)) + (1 << 23));
        let scale = (max / 127.0).max(SCALE_FLOOR_F32);
        let halves = (0..127).map(|k| (k as f32 + 0.5) * scale);
        let beside =
            |x: f32| (-3..=3).map(move |off: i32| f32::from_bits(x.to_bits().wrapping_add_signed(off)));
        let row: Vec<f32> = halves.flat_map(beside).filter(|x| x.abs() <= max).chain([max]).collect();
        let src = row_of(ElementType::F32, &row);
        let expected = encode(Kernels::scalar(), ElementType::F32, row.len(), &src);
        for kernels in Kernels::candidates() {
            let got = encode(kernels, ElementType::F32, row.len(), &src);
            assert_eq!(got.codes, expected.codes, "{} largest {max:e}", kernels.name());
        }
    }
}

#[test]
fn finds_what_is_not_finite_wherever_it_is() {
    for element in ELEMENTS {
        for dim in [1, 3, 8, 17, 64, 80, 129] {
            let good = row_of(element, &vec![max_of(element); 3 * dim]);
            for kernels in Kernels::candidates() {
                let expected = encode(kernels, element, dim, &good);
                assert!(expected.finite);
                let mut dst = vec![0; good.len()];
                let row_bytes = dim * element.bytes();
                let copy = |src: &[u8], dst: &mut [u8]| {
                    kernels.copy_rows(element, src, row_bytes, dst, row_bytes, row_bytes, 3)
                };
                assert!(copy(&good, &mut dst));
                for at in dim..2 * dim {
                    for wrong in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        let mut src = good.clone();
                        src[at * element.bytes()..][..element.bytes()]
                            .copy_from_slice(&bytes_of(element, wrong));
                        let got = encode(kernels, element, dim, &src);
                        assert!(!got.finite, "{} {element:?} {dim} {at}", kernels.name());
                        // The rows beside it are as they were; its own is zeros.
                        assert_eq!(got.codes[..dim], expected.codes[..dim]);
                        assert_eq!(got.codes[2 * dim..], expected.codes[2 * dim..]);
                        assert!(got.codes[dim..2 * dim].iter().all(|code| *code == 0));
                        assert!(!copy(&src, &mut dst), "{} {element:?} {dim} {at}", kernels.name());
                        assert_eq!(dst, src);
                    }
                }
            }
        }
    }
}

#[test]
fn copies_rows_between_strides() {
    let mut chance = Chance(3);
    for kernels in Kernels::candidates() {
        for element in ELEMENTS {
            for row_bytes in [0, 4, 12, 32, 36, 64, 100, 128, 256, 516] {
                for (gap_src, gap_dst, rows) in [(0, 0, 5), (4, 0, 4), (0, 3, 3), (7, 9, 1), (1, 1, 0)] {
                    let (src_stride, dst_stride) = (row_bytes + gap_src, row_bytes + gap_dst);
                    let src: Vec<u8> = (0..rows * src_stride).map(|_| chance.bits() as u8 & 0x3B).collect();
                    let mut dst = vec![0xEE; rows * dst_stride + 1];
                    let to = &mut dst[1..];
                    assert!(kernels.copy_rows(element, &src, src_stride, to, dst_stride, row_bytes, rows));
                    for row in 0..rows {
                        let (from, to) = (&src[row * src_stride..], &dst[1 + row * dst_stride..]);
                        assert_eq!(from[..row_bytes], to[..row_bytes]);
                        assert!(to[row_bytes..dst_stride].iter().all(|byte| *byte == 0xEE));
                    }
                }
            }
        }
    }
}

#[test]
fn no_rows_is_no_work() {
    for kernels in Kernels::candidates() {
        assert!(kernels.encode(int8(ElementType::F16, 64), &[], &mut [], &mut []));
        kernels.decode(int8(ElementType::F16, 64), 0, &[], &[], &mut [], 128);
    }
}

#[test]
#[should_panic(expected = "a row lies outside dst")]
fn refuses_a_destination_that_is_too_short() {
    Kernels::best().decode(int8(ElementType::F16, 64), 0, &[0; 128], &[0; 4], &mut [0; 255], 128);
}

#[test]
#[should_panic(expected = "src is not [rows, dim]")]
fn refuses_lengths_that_do_not_agree() {
    Kernels::best().encode(int8(ElementType::F16, 4), &[0; 6], &mut [0; 4], &mut [0; 2]);
}

#[test]
fn chooses_among_the_candidates() {
    let names: Vec<&str> = Kernels::candidates().iter().map(Kernels::name).collect();
    assert_eq!(names[0], "scalar");
    assert_eq!(Some(&Kernels::best().name()), names.last());
    assert!(names.contains(&Kernels::tuned().name()));
}
