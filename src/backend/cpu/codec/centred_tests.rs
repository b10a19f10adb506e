//! Centres of rows: every kernel set against the written definition, pair by pair, byte for byte.

use half::{bf16, f16};
use kv_cache_actors::geometry::RopeLayout;
use proptest::prelude::*;

use super::tests::{Chance, bytes_of};
use super::{ElementType, Kernels, RowCentres, finite_max};

const ELEMENTS: [ElementType; 3] = [ElementType::F16, ElementType::Bf16, ElementType::F32];
const LAYOUTS: [RopeLayout; 2] = [RopeLayout::HalfSplit, RopeLayout::Interleaved];

fn value_of(element: ElementType, bytes: &[u8]) -> f32 {
    match element {
        ElementType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        ElementType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        ElementType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    }
}

/// What centres borrow.
#[derive(Debug)]
struct Case {
    element: ElementType,
    rows: usize,
    mean: Vec<f32>,
    turn: Vec<[f32; 2]>,
    row_turns: [Vec<f32>; 2],
    layout: RopeLayout,
}

impl Case {
    /// Means of up to `largest`, and a zero here and there; any turns.
    fn new(
        element: ElementType,
        (rows, dim, pairs): (usize, usize, usize),
        layout: RopeLayout,
        largest: f32,
        chance: &mut Chance,
    ) -> Case {
        let mut turn = || (100.0 * chance.unit()).sin_cos();
        let block: Vec<[f32; 2]> = (0..pairs).map(|_| turn().into()).collect();
        let (sin, cos) = (0..rows * pairs).map(|_| turn()).unzip();
        let mean =
            (0..dim).map(|_| if chance.bits().is_multiple_of(9) { 0.0 } else { largest * chance.unit() });
        Case { element, rows, mean: mean.collect(), turn: block, row_turns: [cos, sin], layout }
    }

    fn centres(&self) -> RowCentres<'_> {
        RowCentres {
            rows: self.rows,
            mean: &self.mean,
            turn: &self.turn,
            row_turns: self.row_turns.each_ref().map(|of_all| &of_all[..]),
            layout: self.layout,
        }
    }

    fn row_bytes(&self) -> usize {
        self.mean.len() * self.element.bytes()
    }

    /// By the text, pair by pair, to elements `to`, from `element`.
    /// `zero` is what is added first.
    fn moved(&self, (sign, zero): (f32, f32), [element, to]: [ElementType; 2], rows: &[u8]) -> Vec<u8> {
        let (pairs, max) = (self.turn.len(), finite_max(to));
        let kept = |x: f32, sum: f32| if x.is_finite() { sum.max(-max).min(max) } else { x };
        let mut out = Vec::new();
        for (row, bytes) in rows.chunks(self.mean.len() * element.bytes()).enumerate() {
            let mut x: Vec<f32> = bytes
                .chunks(element.bytes())
                .map(|x| value_of(element, x))
                .map(|x| if x.is_finite() { x + zero } else { x })
                .collect();
            for pair in 0..pairs {
                let (first, second) = match self.layout {
                    RopeLayout::HalfSplit => (pair, pairs + pair),
                    RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                };
                let [x_mean, y_mean] = [first, second].map(|at| self.mean[at]);
                let [cos, sin] = self.turn[pair];
                let (p, q) = (sign * (x_mean * cos - y_mean * sin), sign * (x_mean * sin + y_mean * cos));
                let [cos, sin] = self.row_turns.each_ref().map(|of_all| of_all[row * pairs + pair]);
                let (a, b) = (x[first], x[second]);
                x[first] = kept(a, (-q).mul_add(sin, p.mul_add(cos, a)));
                x[second] = kept(b, p.mul_add(sin, q.mul_add(cos, b)));
            }
            for (x, mean) in x.iter_mut().zip(&self.mean).skip(2 * pairs) {
                *x = kept(*x, *x + sign * mean);
            }
            out.extend(x.iter().flat_map(|x| bytes_of(to, *x)));
        }
        out
    }

    /// Every kernel set, from and to odd addresses, to each type; `gap` bytes between rows in place.
    fn check(&self, rows: &[u8], gap: usize) {
        let row_bytes = self.row_bytes();
        let stride = row_bytes + gap;
        let mut src = vec![0xEE];
        src.extend_from_slice(rows);
        let floats = rows.chunks(self.element.bytes()).map(|x| value_of(self.element, x));
        let floats: Vec<u8> = floats.flat_map(f32::to_le_bytes).collect();
        for kernels in Kernels::candidates() {
            let what = format!("{}: {self:?}", kernels.name());
            for to in ELEMENTS {
                let bytes = rows.len() / self.element.bytes() * to.bytes();
                let (elements, mut less) = ([self.element, to], vec![0xEE; bytes + 2]);
                kernels.subtract_centres(elements, &self.centres(), &src[1..], &mut less[1..=bytes]);
                assert!(
                    less[1..=bytes] == self.moved((-1.0, -0.0), elements, rows),
                    "subtracted to {to:?}, {what}"
                );
                assert_eq!([less[0], less[bytes + 1]], [0xEE; 2]);

                let (row_bytes, expected) =
                    (self.mean.len() * to.bytes(), self.moved((1.0, 0.0), [ElementType::F32, to], &floats));
                let mut more = vec![0xEE; 1 + self.rows * (row_bytes + gap)];
                kernels.add_centres(to, &self.centres(), &floats, &mut more[1..], row_bytes + gap);
                for (got, expected) in more[1..].chunks(row_bytes + gap).zip(expected.chunks(row_bytes)) {
                    assert!(got[..row_bytes] == *expected, "added to {to:?}, {what}");
                    assert!(got[row_bytes..].iter().all(|byte| *byte == 0xEE), "wrote between rows");
                }
            }

            let mut more = vec![0xEE; 1 + self.rows * stride];
            for (to, row) in more[1..].chunks_mut(stride).zip(rows.chunks(row_bytes)) {
                to[..row_bytes].copy_from_slice(row);
            }
            kernels.add_centres_in_place(self.element, &self.centres(), &mut more[1..], stride);
            let expected = self.moved((1.0, -0.0), [self.element; 2], rows);
            for (got, expected) in more[1..].chunks(stride).zip(expected.chunks(row_bytes)) {
                assert!(got[..row_bytes] == *expected, "added, {what}");
                assert!(got[row_bytes..].iter().all(|byte| *byte == 0xEE), "wrote between rows");
            }
        }
    }

    /// Elements that tell centres apart from anything else: near them, far from them, and all bit patterns.
    fn rows(&self, chance: &mut Chance, wild: bool) -> Vec<u8> {
        let max = finite_max(self.element);
        let largest = self.mean.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let mut element = |_| match chance.bits() % 16 {
            0 => bytes_of(self.element, -0.0),
            1 => bytes_of(self.element, chance.unit() * 1e-7),
            2 if wild => bytes_of(self.element, max.copysign(chance.unit())),
            3 if wild => chance.bits().to_le_bytes()[..self.element.bytes()].to_vec(),
            4 if wild => bytes_of(self.element, f32::INFINITY.copysign(chance.unit())),
            _ => bytes_of(self.element, 2.0 * largest * chance.unit()),
        };
        (0..self.rows * self.mean.len()).flat_map(&mut element).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_set_moves_rows_as_the_definition_does(
        element in proptest::sample::select(&ELEMENTS[..]),
        layout in proptest::sample::select(&LAYOUTS[..]),
        (dim, pairs) in prop_oneof![1usize..300, (1usize..10).prop_map(|n| 32 * n)]
            .prop_flat_map(|dim| (Just(dim), prop_oneof![Just(dim / 2), 0..=dim / 2])),
        rows in 0usize..6,
        largest in prop_oneof![Just(0.0f32), Just(1.0), Just(100.0), Just(60_000.0), Just(3e37)],
        wild in any::<bool>(),
        gap in 0usize..40,
        seed in 1u64..,
    ) {
        let mut chance = Chance(seed);
        let case = Case::new(element, (rows, dim, pairs), layout, largest, &mut chance);
        case.check(&case.rows(&mut chance, wild), gap);
    }
}

/// Where it stands decides which instructions meet it.
#[test]
fn exceptions_are_met_wherever_they_stand() {
    let mut chance = Chance(5);
    for (element, layout) in ELEMENTS.into_iter().flat_map(|element| LAYOUTS.map(|layout| (element, layout)))
    {
        for (dim, pairs) in [(7, 2), (80, 40), (96, 16), (128, 64)] {
            let case = Case::new(element, (1, dim, pairs), layout, finite_max(element) / 4.0, &mut chance);
            let row = case.rows(&mut chance, false);
            let max = finite_max(element);
            for (at, x) in (0..dim).flat_map(|at| {
                [max, -max, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN].map(|x| (at, x))
            }) {
                let mut row = row.clone();
                row[at * element.bytes()..][..element.bytes()].copy_from_slice(&bytes_of(element, x));
                case.check(&row, 0);
            }
        }
    }
}

/// Every element of 16 bits, the NaNs among them, and sums beside the largest number.
#[test]
fn every_element_of_16_bits() {
    let mut chance = Chance(6);
    for (element, layout) in ELEMENTS[..2].iter().flat_map(|element| LAYOUTS.map(|layout| (*element, layout)))
    {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for largest in [0.0, 1e-6, 3.0, finite_max(element) / 1024.0] {
            let case = Case::new(element, (512, 128, 48), layout, largest, &mut chance);
            case.check(&all, 0);
        }
    }
}

#[test]
fn what_is_not_finite_stays_and_the_rest_is_limited() {
    let centres =
        RowCentres { rows: 1, mean: &[-60_000.0; 8], turn: &[], row_turns: [&[]; 2], layout: LAYOUTS[0] };
    let row = [60_000.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -60_000.0, 5_519.0, 5_520.0, -0.0];
    let row: Vec<u8> = row.iter().flat_map(|x| bytes_of(ElementType::F16, *x)).collect();
    for kernels in Kernels::candidates() {
        let mut less = [0; 16];
        kernels.subtract_centres([ElementType::F16; 2], &centres, &row, &mut less);
        let less: Vec<f32> = less.chunks(2).map(|x| value_of(ElementType::F16, x)).collect();
        assert_eq!(less[0], 65_504.0);
        assert!(less[1].is_nan());
        assert_eq!(less[2..5], [f32::INFINITY, f32::NEG_INFINITY, 0.0]);
        assert_eq!(less[5..], [65_504.0, 65_504.0, 60_000.0]);
    }
}

#[test]
#[should_panic(expected = "the turns are not [rows, pairs]")]
fn refuses_turns_of_other_rows() {
    let turns = [&[1.0; 3][..], &[0.0; 4]];
    let centres =
        RowCentres { rows: 2, mean: &[1.0; 4], turn: &[[1.0, 0.0]; 2], row_turns: turns, layout: LAYOUTS[0] };
    Kernels::best().add_centres_in_place(ElementType::F32, &centres, &mut [0; 32], 16);
}

#[test]
#[should_panic(expected = "a row lies outside dst")]
fn refuses_rows_outside() {
    let centres = RowCentres { rows: 2, mean: &[1.0; 4], turn: &[], row_turns: [&[]; 2], layout: LAYOUTS[0] };
    Kernels::best().add_centres_in_place(ElementType::F32, &centres, &mut [0; 31], 16);
}
