//! The formats beside `int8`, and what all have in common: an independent f64 reference, bounds, and bytes that nobody wrote.

use half::{bf16, f16};
use kv_cache_actors::format::{Format, GROUP, RowFormat};
use kv_cache_actors::geometry::Plane;
use proptest::prelude::*;

use super::{ElementType, Kernels};

const ELEMENTS: [ElementType; 3] = [ElementType::F16, ElementType::Bf16, ElementType::F32];
const ROTATED: [Format; 3] = [Format::R4, Format::R3, Format::R2];

fn sealed() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().filter(|format| *format != Format::Raw)
}

fn bytes_of(element: ElementType, values: &[f32]) -> Vec<u8> {
    let bytes = |value: &f32| match element {
        ElementType::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        ElementType::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        ElementType::F32 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

fn values_of(element: ElementType, bytes: &[u8]) -> Vec<f64> {
    let value = |bytes: &[u8]| match element {
        ElementType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        ElementType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        ElementType::F32 => f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
    };
    bytes.chunks(element.bytes()).map(value).collect()
}

/// Rows of values.
fn encode(
    kernels: Kernels,
    format: Format,
    element: ElementType,
    dim: usize,
    rows: &[u8],
) -> (bool, Vec<u8>, Vec<u8>) {
    encode_rows(kernels, RowFormat { format, element, plane: Plane::Value, dim }, rows)
}

fn encode_rows(kernels: Kernels, of: RowFormat, rows: &[u8]) -> (bool, Vec<u8>, Vec<u8>) {
    let count = rows.len() / (of.dim * of.element.bytes());
    let mut codes = vec![0xEE; count * of.row_bytes()];
    let mut scales = vec![0xEE; of.scales_bytes(count)];
    let finite = kernels.encode(of, rows, &mut codes, &mut scales);
    (finite, codes, scales)
}

fn decode(
    kernels: Kernels,
    format: Format,
    element: ElementType,
    dim: usize,
    codes: &[u8],
    scales: &[u8],
) -> Vec<u8> {
    decode_rows(kernels, RowFormat { format, element, plane: Plane::Value, dim }, 0, codes, scales)
}

fn decode_rows(kernels: Kernels, of: RowFormat, skip: usize, codes: &[u8], scales: &[u8]) -> Vec<u8> {
    let (dim, element) = (of.dim, of.element);
    let stride = (dim + 1) * element.bytes();
    let mut out = vec![0xEE; codes.len() / of.row_bytes() * stride];
    kernels.decode(of, skip, codes, scales, &mut out, stride);
    let row = |row: &[u8]| {
        assert!(row[dim * element.bytes()..].iter().all(|byte| *byte == 0xEE), "wrote between rows");
        row[..dim * element.bytes()].to_vec()
    };
    out.chunks(stride).flat_map(row).collect()
}

/// The rotation as a matrix, worked out from the definition: row `i`, column `j` of each group.
fn rotation(dim: usize, i: usize, j: usize) -> f64 {
    let mut group = 1;
    while group < 256 && dim.is_multiple_of(2 * group) {
        group *= 2;
    }
    if i / group != j / group {
        return 0.0;
    }
    let negative = ((i % group) & (j % group)).count_ones() % 2 == 1;
    // The fraction of π in hexadecimal.
    const PI: [u32; 8] =
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89];
    let flipped = (PI[j / 32 % 8] >> (j % 32)) & 1 == 1;
    let sign = if negative ^ flipped { -1.0 } else { 1.0 };
    sign / (group as f64).sqrt()
}

fn rotate(x: &[f64], back: bool) -> Vec<f64> {
    let dim = x.len();
    let at = |i, j| if back { rotation(dim, j, i) } else { rotation(dim, i, j) };
    (0..dim).map(|i| (0..dim).map(|j| at(i, j) * x[j]).sum()).collect()
}

/// The positive half of a codebook: each magnitude, and where it begins.
fn book(format: Format) -> &'static [(f64, f64)] {
    match format {
        Format::R4 => &[
            (0.1304, 0.0),
            (0.3911, 0.2622),
            (0.6518, 0.5244),
            (0.9323, 0.7866),
            (1.2545, 1.0925),
            (1.6179, 1.4421),
            (2.0644, 1.8354),
            (2.7350, 2.4035),
        ],
        Format::R3 => &[(0.2401, 0.0), (0.7501, 0.49), (1.3446, 1.05), (2.1537, 1.75)],
        _ => &[(0.4528, 0.0), (1.5104, 0.9816)],
    }
}

/// What a row decodes to by the definition, in f64 and without any rounding.
fn reference(format: Format, x: &[f64]) -> Vec<f64> {
    let y = rotate(x, false);
    let square = y.iter().map(|y| y * y).sum::<f64>();
    if square == 0.0 {
        return vec![0.0; x.len()];
    }
    let unit = (x.len() as f64 / square).sqrt();
    let nearest = |y: &f64| {
        let u = y * unit;
        let c = book(format).iter().rev().find(|(_, begin)| u.abs() >= *begin).unwrap().0;
        c.copysign(u)
    };
    let c = y.iter().map(nearest).collect::<Vec<_>>();
    let dot = y.iter().zip(&c).map(|(y, c)| y * c).sum::<f64>();
    let factor = dot / c.iter().map(|c| c * c).sum::<f64>();
    rotate(&c.iter().map(|c| c * factor).collect::<Vec<_>>(), true)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

fn length(a: &[f64]) -> f64 {
    a.iter().map(|a| a * a).sum::<f64>().sqrt()
}

/// A sum of uniforms is near enough to a normal variable.
fn normal_row(seed: u64, dim: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut unit = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..dim).map(|_| (0..12).map(|_| unit()).sum()).collect()
}

/// The error of long rows of noise is that of the codebook, for any dim that is rotated, and outliers change nothing.
#[test]
fn rotated_rows_lose_what_their_codebook_loses() {
    for (format, expected) in ROTATED.into_iter().zip([0.0095, 0.0346, 0.118]) {
        for dim in [64, 80, 128, 256] {
            for outlier in [1.0f32, 50.0] {
                let (mut lost, mut all) = (0.0, 0.0);
                for seed in 0..200 {
                    let mut row = normal_row(seed, dim);
                    row[seed as usize % dim] *= outlier;
                    let bytes = bytes_of(ElementType::F32, &row);
                    let (finite, codes, scales) =
                        encode(Kernels::scalar(), format, ElementType::F32, dim, &bytes);
                    assert!(finite);
                    let back = decode(Kernels::scalar(), format, ElementType::F32, dim, &codes, &scales);
                    let (x, back) = (values_of(ElementType::F32, &bytes), values_of(ElementType::F32, &back));
                    lost += distance(&x, &back).powi(2);
                    all += length(&x).powi(2);
                }
                let share = lost / all;
                // Groups of 16 (dim 80) are less normal when one element stands out.
                let most = if dim == 80 && outlier > 1.0 { 3.0 } else { 1.25 };
                assert!(share < most * expected, "{format} {dim} {outlier}: {share} of {expected}");
                assert!(
                    share > 0.5 * expected || outlier > 1.0,
                    "{format} {dim}: {share}, too good to be true"
                );
            }
        }
    }
}

/// A row whose answer can be worked out by hand: a constant becomes one element after an unsigned transform, so its rotation
/// is a row of signs' sums; with one element alone the rotation is constant but for signs.
#[test]
fn a_single_element_comes_back_whole() {
    for format in ROTATED {
        for element in ELEMENTS {
            let mut row = [0.0f32; 64];
            row[5] = 3.0;
            let bytes = bytes_of(element, &row);
            let (_, codes, scales) = encode(Kernels::scalar(), format, element, 64, &bytes);
            let back = values_of(element, &decode(Kernels::scalar(), format, element, 64, &codes, &scales));
            // All of |u| is 1, so all codes have one magnitude, and the factor makes good what it misses: only its rounding shows.
            assert!((back[5] - 3.0).abs() < 3.0 * 0.006, "{format} {element:?}: {}", back[5]);
            assert!(back.iter().enumerate().all(|(i, x)| i == 5 || *x == 0.0), "{format} {element:?}");
        }
    }
}

/// The squares of a row of one element add up to a power of two: on both sides of where rows begin to be scaled.
#[test]
fn rows_at_the_border_of_being_scaled() {
    for (format, element) in ROTATED
        .into_iter()
        .flat_map(|format| [ElementType::Bf16, ElementType::F32].map(|element| (format, element)))
    {
        for border in [2f32.powi(-43), 2f32.powi(47)] {
            for x in [border.next_down(), border, border.next_up(), border * 0.996, border * 1.008] {
                let mut row = [0.0f32; 2 * 64];
                (row[5], row[64 + 63]) = (x, -x);
                let bytes = bytes_of(element, &row);
                let expected = encode(Kernels::scalar(), format, element, 64, &bytes);
                let back = values_of(
                    element,
                    &decode(Kernels::scalar(), format, element, 64, &expected.1, &expected.2),
                );
                assert!(
                    (back[5] / f64::from(x) - 1.0).abs() < 0.01,
                    "{format} {element:?} {x:e}: {:e}",
                    back[5]
                );
                for kernels in Kernels::candidates() {
                    assert_eq!(
                        encode(kernels, format, element, 64, &bytes),
                        expected,
                        "{} {x:e}",
                        kernels.name()
                    );
                }
            }
        }
    }
}

#[test]
fn zeros_stay_zeros_and_bad_rows_are_told() {
    for kernels in Kernels::candidates() {
        for format in sealed() {
            for element in ELEMENTS {
                let zeros = bytes_of(element, &[0.0; 2 * 64]);
                let (finite, codes, scales) = encode(kernels, format, element, 64, &zeros);
                assert!(finite);
                let back = values_of(element, &decode(kernels, format, element, 64, &codes, &scales));
                assert!(back.iter().all(|x| *x == 0.0), "{} {format} {element:?}", kernels.name());
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut row = normal_row(1, 2 * 64);
                    row[100] = bad;
                    let (finite, codes, scales) =
                        encode(kernels, format, element, 64, &bytes_of(element, &row));
                    assert!(!finite, "{} {format} {element:?} {bad}", kernels.name());
                    let back = values_of(element, &decode(kernels, format, element, 64, &codes, &scales));
                    assert!(back.iter().all(|x| x.is_finite()));
                    // Element 36 of the second row: with it goes what shares its scale.
                    let lost = if format.is_grouped() { 96..128 } else { 64..128 };
                    assert!(back[lost].iter().all(|x| *x == 0.0), "what is bad is stored as zeros");
                }
            }
        }
    }
}

/// With 448 in the row the scale is 1, and elements are what codes are chosen for.
#[test]
fn fp8_beside_the_middles_between_codes() {
    let value = |code: u8| f32::from_bits(u32::from(code) << 20) * f32::from_bits((127 + 120) << 23);
    let beside = |x: f32| [x, x.next_down(), x.next_up(), -x, -x.next_down(), -x.next_up()];
    let middles = (0..0x7E).flat_map(|code| beside((value(code) + value(code + 1)) / 2.0));
    let row: Vec<f32> = middles
        .chain((0..0x7F).flat_map(|code| beside(value(code))))
        .map(|x| x.clamp(-448.0, 448.0))
        .collect();
    let bytes = bytes_of(ElementType::F32, &row);
    let expected = encode(Kernels::scalar(), Format::Fp8, ElementType::F32, row.len(), &bytes);
    assert_eq!(expected.2, 1.0f32.to_le_bytes());
    for kernels in Kernels::candidates() {
        assert_eq!(
            encode(kernels, Format::Fp8, ElementType::F32, row.len(), &bytes),
            expected,
            "{}",
            kernels.name()
        );
    }
}

/// Rows are done some at a time: whole batches, parts of one, and both, with a bad element in the second.
#[test]
fn batches_of_rows_agree() {
    for (format, element) in sealed().flat_map(|format| ELEMENTS.map(|element| (format, element))) {
        for (dim, rows) in [32, 64, 80, 96, 128, 256, 512]
            .into_iter()
            .flat_map(|dim| [1, 15, 16, 17, 35].map(|rows| (dim, rows)))
        {
            let mut numbers = normal_row(rows as u64, rows * dim);
            if let Some(number) = numbers.get_mut(17 * dim + 3) {
                *number = f32::NAN;
            }
            let bytes = bytes_of(element, &numbers);
            let expected = encode(Kernels::scalar(), format, element, dim, &bytes);
            assert_eq!(expected.0, rows < 18);
            let values = decode(Kernels::scalar(), format, element, dim, &expected.1, &expected.2);
            for kernels in Kernels::candidates() {
                let label = format!("{} {format} {element:?} {rows} x {dim}", kernels.name());
                assert!(encode(kernels, format, element, dim, &bytes) == expected, "{label}");
                assert!(decode(kernels, format, element, dim, &expected.1, &expected.2) == values, "{label}");
            }
        }
    }
}

fn element() -> impl Strategy<Value = ElementType> {
    prop::sample::select(ELEMENTS.to_vec())
}

fn format() -> impl Strategy<Value = Format> {
    prop::sample::select(sealed().collect::<Vec<_>>())
}

/// Finite numbers of all sizes that the element type has, zeros and the largest among them.
fn number(element: ElementType) -> BoxedStrategy<f32> {
    let max = match element {
        ElementType::F16 => 65504.0,
        ElementType::Bf16 => bf16::MAX.to_f32(),
        ElementType::F32 => f32::MAX,
    };
    prop_oneof![
        6 => -1.0f32..1.0,
        1 => prop::num::f32::NORMAL.prop_map(move |x| x.clamp(-max, max)),
        1 => prop::num::f32::SUBNORMAL,
        1 => prop::sample::select(vec![0.0, -0.0, max, -max]),
    ]
    .boxed()
}

fn row() -> impl Strategy<Value = (ElementType, usize, Vec<f32>)> {
    let dims = vec![1usize, 3, 7, 8, 16, 24, 64, 80, 96, 128, 192, 256, 384];
    (element(), prop::sample::select(dims)).prop_flat_map(|(element, dim)| {
        let numbers = prop::collection::vec(number(element), 2 * dim);
        (Just(element), Just(dim), numbers)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Every kernel set gives the bytes of the scalar one.
    #[test]
    fn kernel_sets_agree((element, dim, row) in row(), format in format()) {
        let bytes = bytes_of(element, &row);
        let expected = encode(Kernels::scalar(), format, element, dim, &bytes);
        let values = decode(Kernels::scalar(), format, element, dim, &expected.1, &expected.2);
        for kernels in Kernels::candidates() {
            let encoded = encode(kernels, format, element, dim, &bytes);
            prop_assert_eq!(&encoded, &expected, "{} {}", kernels.name(), format);
            let decoded = decode(kernels, format, element, dim, &encoded.1, &encoded.2);
            prop_assert_eq!(&decoded, &values, "{} {}", kernels.name(), format);
        }
    }

    /// Rotated rows decode to what the definition gives without rounding, but for codes that are as near to one value as to the next.
    #[test]
    fn rotated_rows_are_as_good_as_the_reference((element, dim, row) in row(), which in 0..3usize) {
        let format = ROTATED[which];
        let bytes = bytes_of(element, &row);
        let (finite, codes, scales) = encode(Kernels::scalar(), format, element, dim, &bytes);
        prop_assert!(finite);
        let back = values_of(element, &decode(Kernels::scalar(), format, element, dim, &codes, &scales));
        for (x, back) in values_of(element, &bytes).chunks(dim).zip(back.chunks(dim)) {
            // Longer rows than bf16 has factors for are cut off.
            if length(x) > 1e36 {
                continue;
            }
            let best = distance(x, &reference(format, x));
            // The factor has 8 binary digits, so that it is off by 2^-8 of itself at most, and every element is rounded once more to
            // those of its type; below the least normal number of that type there are none to speak of.
            let (digits, least) = match element {
                ElementType::F16 => (11, 1e-6),
                ElementType::Bf16 => (8, 1e-38),
                ElementType::F32 => (24, 1e-38),
            };
            let rounding = (2f64.powi(-8) + 2f64.powi(-digits)) * 1.01 * length(x) + least * dim as f64;
            prop_assert!(
                distance(x, back) <= best * 1.001 + rounding,
                "{} {:?} {}: {} instead of {}, of {}", format, element, dim, distance(x, back), best, length(x)
            );
        }
    }

    /// `fp8` is off by a sixteenth of a number, or by a step of the least ones.
    #[test]
    fn fp8_is_within_its_bound((element, dim, row) in row()) {
        let bytes = bytes_of(element, &row);
        let (finite, codes, scales) = encode(Kernels::scalar(), Format::Fp8, element, dim, &bytes);
        prop_assert!(finite);
        let back = values_of(element, &decode(Kernels::scalar(), Format::Fp8, element, dim, &codes, &scales));
        for (x, back) in values_of(element, &bytes).chunks(dim).zip(back.chunks(dim)) {
            let most = x.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            // An f16 scale that is subnormal is off by up to half of the least one.
            let step = most / 448.0 / 1024.0 + if element == ElementType::F16 { 448.0 * 2f64.powi(-25) } else { 2f64.powi(-100) };
            for (x, back) in x.iter().zip(back) {
                prop_assert!((x - back).abs() <= x.abs() / 15.9 + step, "{x} became {back}, largest {most}");
            }
        }
    }

    /// Bytes that nobody encoded decode to finite numbers, in every format and alike in every kernel set.
    #[test]
    fn random_bytes_decode(element in element(), format in format(), dim in 1usize..300, seed in any::<u64>()) {
        let mut state = seed | 1;
        let mut byte = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (state >> 56) as u8
        };
        let codes = (0..3 * format.row_bytes(element, dim)).map(|_| byte()).collect::<Vec<_>>();
        let of = RowFormat { format, element, plane: Plane::Value, dim };
        let scales = (0..of.scales_bytes(3)).map(|_| byte()).collect::<Vec<_>>();
        let expected = decode(Kernels::scalar(), format, element, dim, &codes, &scales);
        prop_assert!(values_of(element, &expected).iter().all(|x| x.is_finite()));
        for kernels in Kernels::candidates() {
            prop_assert_eq!(&decode(kernels, format, element, dim, &codes, &scales), &expected);
        }
    }

    /// Groups of keys and values are as the definition says, by every kernel set, and any run of rows decodes by itself.
    #[test]
    fn grouped_rows_are_those_of_the_reference((of, numbers, run) in grouped()) {
        let bytes = bytes_of(of.element, &numbers);
        let rows = numbers.len() / of.dim;
        let expected = encode_rows(Kernels::scalar(), of, &bytes);
        prop_assert!(expected.0);
        let x = values_of(of.element, &bytes);
        let back = values_of(of.element, &decode_rows(Kernels::scalar(), of, 0, &expected.1, &expected.2));
        for (at, (x_at, back)) in x.iter().zip(&back).enumerate() {
            let (row, column) = (at / of.dim, at % of.dim);
            let group: Vec<f64> = match of.plane {
                Plane::Key => (row / GROUP * GROUP..(row / GROUP + 1) * GROUP).map(|row| x[row * of.dim + column]).collect(),
                Plane::Value => {
                    let first = column / GROUP * GROUP;
                    x[row * of.dim + first..row * of.dim + of.dim.min(first + GROUP)].to_vec()
                }
            };
            let (low, high) = group.iter().fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
            let most = if of.format == Format::Int4 { 15.0 } else { 3.0 };
            // Half a step, what rounding took from the step for the largest code, and rounding of the value.
            let (digits, tiny): (f64, f64) = match of.element {
                ElementType::F16 => (11.0, 2f64.powi(-24)),
                ElementType::Bf16 => (8.0, 2f64.powi(-100)),
                ElementType::F32 => (24.0, 2f64.powi(-100)),
            };
            let step = (high - low) / most;
            let bound = step * (0.5 + most * 2f64.powf(-digits)) * 1.0001
                + x_at.abs().max(back.abs()) * 2f64.powf(-digits.min(22.0)) + (most + 1.0) * tiny;
            prop_assert!((x_at - back).abs() <= bound, "{of:?} {row} {column}: {x_at} became {back}, of {low} to {high}");
        }
        for kernels in Kernels::candidates() {
            let encoded = encode_rows(kernels, of, &bytes);
            prop_assert_eq!(&encoded, &expected, "{} {:?}", kernels.name(), of);
            let (first, end) = (run.0 % rows, run.0 % rows + 1 + run.1 % (rows - run.0 % rows));
            let (skip, row) = (first % of.scale_rows(), of.row_bytes());
            let sets = first / of.scale_rows()..end.div_ceil(of.scale_rows());
            let scales = &expected.2[sets.start * of.scale_bytes()..sets.end * of.scale_bytes()];
            let some = decode_rows(kernels, of, skip, &expected.1[first * row..end * row], scales);
            prop_assert_eq!(values_of(of.element, &some), &back[first * of.dim..end * of.dim]);
        }
    }

    /// A number that is none among others costs its own group.
    #[test]
    fn a_bad_element_costs_its_group((of, mut numbers, (at, _)) in grouped()) {
        let at = at % numbers.len();
        let before = encode_rows(Kernels::scalar(), of, &bytes_of(of.element, &numbers));
        numbers[at] = f32::NAN;
        let bytes = bytes_of(of.element, &numbers);
        let expected = encode_rows(Kernels::scalar(), of, &bytes);
        prop_assert!(!expected.0);
        let decode = |(_, codes, scales): &(bool, Vec<u8>, Vec<u8>)| {
            values_of(of.element, &decode_rows(Kernels::scalar(), of, 0, codes, scales))
        };
        let (row, column) = (at / of.dim, at % of.dim);
        for (at, (before, after)) in decode(&before).into_iter().zip(decode(&expected)).enumerate() {
            let is_lost = match of.plane {
                Plane::Key => at % of.dim == column && at / of.dim / GROUP == row / GROUP,
                Plane::Value => at / of.dim == row && at % of.dim / GROUP == column / GROUP,
            };
            prop_assert_eq!(after, if is_lost { 0.0 } else { before });
        }
        for kernels in Kernels::candidates() {
            prop_assert_eq!(&encode_rows(kernels, of, &bytes), &expected, "{} {:?}", kernels.name(), of);
        }
    }

    /// Keys that nobody encoded.
    #[test]
    fn random_grouped_keys_decode(element in element(), int4 in any::<bool>(), dim in 1usize..200, seed in any::<u64>()) {
        let format = if int4 { Format::Int4 } else { Format::Int2 };
        let of = RowFormat { format, element, plane: Plane::Key, dim };
        let mut state = seed | 1;
        let mut byte = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (state >> 56) as u8
        };
        let codes = (0..40 * of.row_bytes()).map(|_| byte()).collect::<Vec<_>>();
        let scales = (0..of.scales_bytes(5 + 40)).map(|_| byte()).collect::<Vec<_>>();
        let expected = decode_rows(Kernels::scalar(), of, 5, &codes, &scales);
        prop_assert!(values_of(element, &expected).iter().all(|x| x.is_finite()));
        for kernels in Kernels::candidates() {
            prop_assert_eq!(&decode_rows(kernels, of, 5, &codes, &scales), &expected);
        }
    }
}

fn grouped() -> impl Strategy<Value = (RowFormat, Vec<f32>, (usize, usize))> {
    let formats = prop::sample::select(vec![Format::Int4, Format::Int2]);
    let dims = prop::sample::select(vec![1usize, 7, 24, 32, 64, 80, 96, 128, 256, 288]);
    let planes = prop::sample::select(Plane::BOTH.to_vec());
    (formats, element(), planes, dims).prop_flat_map(|(format, element, plane, dim)| {
        let of = RowFormat { format, element, plane, dim };
        let rows = if plane == Plane::Key { 2 * GROUP } else { 5 };
        // All numbers, or all of one size, so that steps are of it too.
        let any = prop::collection::vec(number(element), rows * dim);
        let alike = prop::collection::vec(-3.0f32..5.0, rows * dim);
        (Just(of), prop_oneof![any, alike], (any_place(), any_place()))
    })
}

fn any_place() -> impl Strategy<Value = usize> {
    0usize..10_000
}
