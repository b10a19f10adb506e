//! Rows less their centres, and with them again, by the definition: one element at a time, which needs no other of its row.

use std::ops::Range;

use super::scalar::{read, write};
use super::{ElementType, RopeLayout, finite_max};

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

/// See [`Kernels::subtract_centres`](super::Kernels::subtract_centres): from the rows of `src`, one after the other, or from
/// those of `dst` themselves if there is none.
pub(super) fn move_rows(
    element: ElementType,
    moves: &Moves,
    src: Option<&[u8]>,
    dst: &mut [u8],
    dst_stride: usize,
) {
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
