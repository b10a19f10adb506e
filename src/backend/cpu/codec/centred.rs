//! Rows less their centres, and with them again, by the definition: one element at a time, which needs no other of its row.

use std::ops::Range;

use super::scalar::{read, write};
use super::{ElementType, RopeLayout, RowCentres, finite_max};

/// [`RowCentres`](super::RowCentres) behind the turn that all rows have in common, with the sign of what is to be done.
#[derive(Clone, Copy)]
pub(super) struct Moves<'a> {
    pub(super) rows: usize,
    /// `[dim]`
    pub(super) mean: &'a [f32],
    pub(super) pairs: usize,
    pub(super) layout: RopeLayout,
    /// `[rows, pairs]`, the cosines and the sines.
    pub(super) turns: [&'a [f32]; 2],
    /// Added to every element before: 0, which takes the sign of a zero, or -0, which changes nothing.
    pub(super) zero: f32,
}

impl<'a> Moves<'a> {
    /// The cosines and the sines of a row.
    #[inline]
    pub(super) fn turns(&self, row: usize) -> [&'a [f32]; 2] {
        let [cos, sin] = self.turns;
        let of_row = row * self.pairs..(row + 1) * self.pairs;
        [&cos[of_row.clone()], &sin[of_row]]
    }

    /// What element `i` of a row becomes, for elements `to` that it is rounded to. What is no number stays so, for the check of the encoder.
    fn moved(&self, to: ElementType, row: usize, i: usize, x: f32) -> f32 {
        if !x.is_finite() {
            return x;
        }
        let x = x + self.zero;
        let sum = if i < 2 * self.pairs {
            let (pair, fellow) = match self.layout {
                RopeLayout::Interleaved => (i / 2, i ^ 1),
                RopeLayout::HalfSplit => (i % self.pairs, (i + self.pairs) % (2 * self.pairs)),
            };
            let [cos, sin] = self.turns(row).map(|of_row| of_row[pair]);
            let sin = if i < fellow { -sin } else { sin };
            self.mean[fellow].mul_add(sin, self.mean[i].mul_add(cos, x))
        } else {
            x + self.mean[i]
        };
        let max = finite_max(to);
        sum.clamp(-max, max)
    }
}

/// Room for the means of most heads, from the beginning of a cache line on: no vector of theirs lies in two.
#[repr(align(64))]
struct Room([f32; 256]);

/// Calls `then` with what `centres` are behind the turn that all rows have in common, times `sign`.
///
/// A part of its callers, so that it is made of their instructions: a head of a block has few rows to share this.
#[inline(always)]
pub(super) fn behind_turn(centres: &RowCentres, sign: f32, src: Option<&[u8]>, then: impl FnOnce(&Moves)) {
    let RowCentres { rows, mean, turn, row_turns: turns, layout } = *centres;
    let (mut few, mut many) = (Room([0.0; 256]), Vec::new());
    let turned = match few.0.get_mut(..mean.len()) {
        Some(few) => few,
        None => {
            many.resize(mean.len(), 0.0);
            &mut many[..]
        }
    };
    let pairs = turn.len();
    let (rotated, constant) = turned.split_at_mut(2 * pairs);
    let (mean, of_constant) = mean.split_at(2 * pairs);
    let by =
        |[cos, sin]: [f32; 2], [x, y]: [f32; 2]| [sign * (x * cos - y * sin), sign * (x * sin + y * cos)];
    match layout {
        RopeLayout::HalfSplit => {
            let ((x, y), (p, q)) = (mean.split_at(pairs), rotated.split_at_mut(pairs));
            for i in 0..pairs {
                [p[i], q[i]] = by(turn[i], [x[i], y[i]]);
            }
        }
        RopeLayout::Interleaved => {
            let (pairs, from) = (rotated.as_chunks_mut().0, mean.as_chunks().0);
            pairs.iter_mut().zip(from).zip(turn).for_each(|((pair, from), turn)| *pair = by(*turn, *from));
        }
    }
    constant.iter_mut().zip(of_constant).for_each(|(to, mean)| *to = sign * mean);
    let zero = if sign > 0.0 && src.is_some() { 0.0 } else { -0.0 };
    then(&Moves { rows, mean: turned, pairs, layout, turns, zero });
}

/// See [`Kernels::subtract_centres`](super::Kernels::subtract_centres): from the rows of `src`, one after the other, or from
/// those of `dst` themselves if there is none, which are of one type then.
pub(super) fn move_rows(
    elements: [ElementType; 2],
    centres: &RowCentres,
    sign: f32,
    src: Option<&[u8]>,
    dst: &mut [u8],
    dst_stride: usize,
) {
    behind_turn(centres, sign, src, |moves| move_each(elements, moves, src, dst, dst_stride));
}

pub(super) fn move_each(
    elements: [ElementType; 2],
    moves: &Moves,
    src: Option<&[u8]>,
    dst: &mut [u8],
    dst_stride: usize,
) {
    let dim = moves.mean.len();
    let [from_bytes, to_bytes] = elements.map(|element| dim * element.bytes());
    for row in 0..moves.rows {
        let to = &mut dst[row * dst_stride..][..to_bytes];
        match src {
            Some(src) => {
                move_some::<true>(elements, moves, row, 0..dim, &src[row * from_bytes..][..from_bytes], to);
            }
            None => move_some::<false>(elements, moves, row, 0..dim, &[], to),
        }
    }
}

/// Some elements of a row, which `from` has, or `to` itself.
#[inline(never)]
pub(super) fn move_some<const COPY: bool>(
    [element, of_to]: [ElementType; 2],
    moves: &Moves,
    row: usize,
    some: Range<usize>,
    from: &[u8],
    to: &mut [u8],
) {
    for i in some {
        let moved = moves.moved(of_to, row, i, read(element, if COPY { from } else { to }, i));
        write(of_to, moved, &mut to[i * of_to.bytes()..][..of_to.bytes()]);
    }
}

/// [`move_rows`] for an instruction set, of what its file has: `halves_apart`, `neighbours` and `unturned` move a row's elements by whole
/// steps, and say how many are done; the definition does the rest.
#[cfg(target_arch = "x86_64")]
macro_rules! by_steps {
    ($features:literal) => {
        /// See [`centred::move_rows`](super::centred::move_rows).
        #[target_feature(enable = $features)]
        pub(super) fn move_rows(
            elements: [ElementType; 2],
            centres: &RowCentres,
            sign: f32,
            src: Option<&[u8]>,
            dst: &mut [u8],
            dst_stride: usize,
        ) {
            use ElementType as T;
            behind_turn(centres, sign, src, |moves| match (elements, src) {
                ([T::F16, T::F16], Some(src)) => move_all::<F16, F16, true>(moves, src, dst, dst_stride),
                ([T::F16, T::F16], None) => move_all::<F16, F16, false>(moves, &[], dst, dst_stride),
                ([T::Bf16, T::Bf16], Some(src)) => move_all::<BF16, BF16, true>(moves, src, dst, dst_stride),
                ([T::Bf16, T::Bf16], None) => move_all::<BF16, BF16, false>(moves, &[], dst, dst_stride),
                ([T::F32, T::F32], Some(src)) => move_all::<F32, F32, true>(moves, src, dst, dst_stride),
                ([T::F32, T::F32], None) => move_all::<F32, F32, false>(moves, &[], dst, dst_stride),
                ([T::F16, T::F32], Some(src)) => move_all::<F16, F32, true>(moves, src, dst, dst_stride),
                ([T::Bf16, T::F32], Some(src)) => move_all::<BF16, F32, true>(moves, src, dst, dst_stride),
                ([T::F32, T::F16], Some(src)) => move_all::<F32, F16, true>(moves, src, dst, dst_stride),
                ([T::F32, T::Bf16], Some(src)) => move_all::<F32, BF16, true>(moves, src, dst, dst_stride),
                _ => super::centred::move_each(elements, moves, src, dst, dst_stride),
            });
        }

        /// The common head dims, if all of their elements turn, have loops of known length.
        #[inline]
        #[target_feature(enable = $features)]
        fn move_all<const FROM: u8, const TO: u8, const COPY: bool>(
            moves: &Moves,
            src: &[u8],
            dst: &mut [u8],
            dst_stride: usize,
        ) {
            match if moves.mean.len() == 2 * moves.pairs { moves.pairs } else { 0 } {
                32 => move_each::<FROM, TO, COPY, 32>(moves, src, dst, dst_stride),
                64 => move_each::<FROM, TO, COPY, 64>(moves, src, dst, dst_stride),
                _ => move_each::<FROM, TO, COPY, 0>(moves, src, dst, dst_stride),
            }
        }

        /// Moves rows, from `src` to `dst` or where they are. `PAIRS` are all that there is, or it is 0 for any.
        #[target_feature(enable = $features)]
        fn move_each<const FROM: u8, const TO: u8, const COPY: bool, const PAIRS: usize>(
            moves: &Moves,
            src: &[u8],
            dst: &mut [u8],
            dst_stride: usize,
        ) {
            let (dim, pairs) = if PAIRS == 0 { (moves.mean.len(), moves.pairs) } else { (2 * PAIRS, PAIRS) };
            let [(from_row, from_pairs), (to_row, to_pairs)] =
                [FROM, TO].map(|e| (dim * element_bytes(e), 2 * pairs * element_bytes(e)));
            let (rotated, constant) = moves.mean[..dim].split_at(2 * pairs);
            for row in 0..moves.rows {
                let from = if COPY { &src[row * from_row..][..from_row] } else { src };
                let to = &mut dst[row * dst_stride..][..to_row];
                if COPY && FROM == F32 && TO != F32 {
                    // What was decoded lies near, and ends soon.
                    prefetch_ahead(to);
                } else if COPY {
                    prefetch_ahead(from);
                } else {
                    // These rows were decoded right before, and the decoder asks for as many: half as many more, or memory rests now.
                    prefetch_l2(to, AHEAD + moves.rows * dst_stride / 2);
                }
                let (from_pairs, from_constant) = from.split_at(if COPY { from_pairs } else { 0 });
                let (to_pairs, to_constant) = to.split_at_mut(to_pairs);
                let [cos, sin] = moves.turns(row);
                let turns = [&cos[..pairs], &sin[..pairs]];
                let by_definition = |some, to: &mut [u8]| {
                    move_some::<COPY>([FROM, TO].map(element), moves, row, some, from, to)
                };
                if moves.layout == RopeLayout::HalfSplit {
                    let done = halves_apart::<FROM, TO, COPY, PAIRS>(
                        moves.zero, rotated, turns, from_pairs, to_pairs,
                    );
                    if done < pairs {
                        by_definition(done..pairs, to_pairs);
                        by_definition(pairs + done..2 * pairs, to_pairs);
                    }
                } else {
                    let done =
                        neighbours::<FROM, TO, COPY, PAIRS>(moves.zero, rotated, turns, from_pairs, to_pairs);
                    if done < 2 * pairs {
                        by_definition(done..2 * pairs, to_pairs);
                    }
                }
                let done = unturned::<FROM, TO, COPY>(moves.zero, constant, from_constant, to_constant);
                if done < constant.len() {
                    by_definition(2 * pairs + done..dim, to);
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use by_steps;
