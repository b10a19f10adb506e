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
}

impl<'a> Moves<'a> {
    /// The cosines and the sines of a row.
    #[inline]
    pub(super) fn turns(&self, row: usize) -> [&'a [f32]; 2] {
        let [cos, sin] = self.turns;
        let of_row = row * self.pairs..(row + 1) * self.pairs;
        [&cos[of_row.clone()], &sin[of_row]]
    }

    /// What element `i` of a row becomes. What is no number stays so, for the check of the encoder.
    fn moved(&self, element: ElementType, row: usize, i: usize, x: f32) -> f32 {
        if !x.is_finite() {
            return x;
        }
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
        let max = finite_max(element);
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
pub(super) fn behind_turn(centres: &RowCentres, sign: f32, then: impl FnOnce(&Moves)) {
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
    then(&Moves { rows, mean: turned, pairs, layout, turns });
}

/// See [`Kernels::subtract_centres`](super::Kernels::subtract_centres): from the rows of `src`, one after the other, or from
/// those of `dst` themselves if there is none.
pub(super) fn move_rows(
    element: ElementType,
    centres: &RowCentres,
    sign: f32,
    src: Option<&[u8]>,
    dst: &mut [u8],
    dst_stride: usize,
) {
    behind_turn(centres, sign, |moves| move_each(element, moves, src, dst, dst_stride));
}

fn move_each(element: ElementType, moves: &Moves, src: Option<&[u8]>, dst: &mut [u8], dst_stride: usize) {
    let (dim, row_bytes) = (moves.mean.len(), moves.mean.len() * element.bytes());
    for row in 0..moves.rows {
        let to = &mut dst[row * dst_stride..][..row_bytes];
        match src {
            Some(src) => {
                move_some::<true>(element, moves, row, 0..dim, &src[row * row_bytes..][..row_bytes], to);
            }
            None => move_some::<false>(element, moves, row, 0..dim, &[], to),
        }
    }
}

/// Some elements of a row, which `from` has, or `to` itself.
#[inline(never)]
pub(super) fn move_some<const COPY: bool>(
    element: ElementType,
    moves: &Moves,
    row: usize,
    some: Range<usize>,
    from: &[u8],
    to: &mut [u8],
) {
    for i in some {
        let moved = moves.moved(element, row, i, read(element, if COPY { from } else { to }, i));
        write(element, moved, &mut to[i * element.bytes()..][..element.bytes()]);
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
            element: ElementType,
            centres: &RowCentres,
            sign: f32,
            src: Option<&[u8]>,
            dst: &mut [u8],
            dst_stride: usize,
        ) {
            behind_turn(centres, sign, |moves| match element {
                ElementType::F16 => move_all::<F16>(moves, src, dst, dst_stride),
                ElementType::Bf16 => move_all::<BF16>(moves, src, dst, dst_stride),
                ElementType::F32 => move_all::<F32>(moves, src, dst, dst_stride),
            });
        }

        /// The common head dims, if all of their elements turn, have loops of known length.
        #[inline]
        #[target_feature(enable = $features)]
        fn move_all<const E: u8>(moves: &Moves, src: Option<&[u8]>, dst: &mut [u8], dst_stride: usize) {
            let pairs = if moves.mean.len() == 2 * moves.pairs { moves.pairs } else { 0 };
            match (src, pairs) {
                (Some(src), 32) => move_each::<E, true, 32>(moves, src, dst, dst_stride),
                (Some(src), 64) => move_each::<E, true, 64>(moves, src, dst, dst_stride),
                (Some(src), _) => move_each::<E, true, 0>(moves, src, dst, dst_stride),
                (None, 32) => move_each::<E, false, 32>(moves, &[], dst, dst_stride),
                (None, 64) => move_each::<E, false, 64>(moves, &[], dst, dst_stride),
                (None, _) => move_each::<E, false, 0>(moves, &[], dst, dst_stride),
            }
        }

        /// Moves rows, from `src` to `dst` or where they are. `PAIRS` are all that there is, or it is 0 for any.
        #[target_feature(enable = $features)]
        fn move_each<const E: u8, const COPY: bool, const PAIRS: usize>(
            moves: &Moves,
            src: &[u8],
            dst: &mut [u8],
            dst_stride: usize,
        ) {
            let (dim, pairs) = if PAIRS == 0 { (moves.mean.len(), moves.pairs) } else { (2 * PAIRS, PAIRS) };
            let (row_bytes, pairs_bytes) = (dim * element_bytes(E), 2 * pairs * element_bytes(E));
            let (rotated, constant) = moves.mean[..dim].split_at(2 * pairs);
            for row in 0..moves.rows {
                let from = if COPY { &src[row * row_bytes..][..row_bytes] } else { src };
                let to = &mut dst[row * dst_stride..][..row_bytes];
                if COPY {
                    prefetch_ahead(from);
                } else {
                    // These rows were decoded right before, and the decoder asks for as many: half as many more, or memory rests now.
                    prefetch_l2(to, AHEAD + moves.rows * dst_stride / 2);
                }
                let (from_pairs, from_constant) = from.split_at(if COPY { pairs_bytes } else { 0 });
                let (to_pairs, to_constant) = to.split_at_mut(pairs_bytes);
                let [cos, sin] = moves.turns(row);
                let turns = [&cos[..pairs], &sin[..pairs]];
                let by_definition =
                    |some, to: &mut [u8]| move_some::<COPY>(element(E), moves, row, some, from, to);
                if moves.layout == RopeLayout::HalfSplit {
                    let done = halves_apart::<E, COPY, PAIRS>(rotated, turns, from_pairs, to_pairs);
                    if done < pairs {
                        by_definition(done..pairs, to_pairs);
                        by_definition(pairs + done..2 * pairs, to_pairs);
                    }
                } else {
                    let done = neighbours::<E, COPY, PAIRS>(rotated, turns, from_pairs, to_pairs);
                    if done < 2 * pairs {
                        by_definition(done..2 * pairs, to_pairs);
                    }
                }
                let done = unturned::<E, COPY>(constant, from_constant, to_constant);
                if done < constant.len() {
                    by_definition(2 * pairs + done..dim, to);
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use by_steps;
