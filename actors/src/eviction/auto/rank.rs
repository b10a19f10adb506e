//! From chances to an order of cells.
//!
//! The index of a cell is that of Gittins ("Bandit processes and dynamic allocation indices", 1979): over all ages up to
//! which a block could be kept, the best ratio of the chance that it is used by then to the time that it is expected to take
//! up. Evicting the least index is optimal for blocks that do not depend on each other, if chances are right.

use super::CLASSES;
use super::age::{Ages, STEPS};

/// A class and a step of ages.
pub(super) const CELLS: usize = CLASSES * STEPS;

/// Cells by index.
#[derive(Debug)]
pub(super) struct Order {
    index: Vec<f32>,
    /// Cells, least index first.
    cells: Vec<u16>,
    /// Where each cell stands in `cells`.
    place: Vec<u16>,
    keys: Vec<u64>,
}

impl Order {
    pub(super) fn new() -> Self {
        let all: Vec<u16> = (0..CELLS as u16).collect();
        Order { index: vec![0.0; CELLS], cells: all.clone(), place: all, keys: Vec::with_capacity(CELLS) }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.index[..]) + 2 * size_of_val(&self.cells[..]) + 8 * self.keys.capacity()
    }

    pub(super) fn cell(&self, place: usize) -> usize {
        usize::from(self.cells[place])
    }

    pub(super) fn place(&self, cell: usize) -> usize {
        usize::from(self.place[cell])
    }

    /// Whether a block of this cell becomes worth more as it gets older.
    pub(super) fn rises(&self, cell: usize) -> bool {
        cell % STEPS + 1 < STEPS && self.index[cell + 1] > self.index[cell]
    }

    /// Orders the cells by the chance that a block of the cell is used before it leaves the cell by age. Classes that are
    /// not in use keep the index that they had.
    pub(super) fn rank(&mut self, chances: &[f32], in_use: impl Fn(usize) -> bool, ages: &Ages) {
        let widths: [f32; STEPS] = std::array::from_fn(|step| ages.width(step));
        for class in (0..CLASSES).filter(|class| in_use(*class)) {
            let cells = class * STEPS..(class + 1) * STEPS;
            index(&chances[cells.clone()], &widths, &mut self.index[cells]);
        }
        self.keys.clear();
        // Not negative, so that the bits are in the order of the numbers.
        let keys =
            self.index.iter().enumerate().map(|(cell, index)| u64::from(index.to_bits()) << 16 | cell as u64);
        self.keys.extend(keys);
        self.keys.sort_unstable();
        for (place, key) in self.keys.iter().enumerate() {
            let cell = (key & 0xFFFF) as u16;
            self.cells[place] = cell;
            self.place[usize::from(cell)] = place as u16;
        }
    }
}

/// From the last step to the first: what comes next is kept in runs whose ratios fall, and a step joins the runs that raise its own.
fn index(chances: &[f32], widths: &[f32; STEPS], index: &mut [f32]) {
    // Uses and time to expect in each step, as seen from the first one. Tiny in the last steps: chances multiply.
    let mut unused = 1.0f64;
    let steps: [(f64, f64); STEPS] = std::array::from_fn(|step| {
        let chance = f64::from(chances[step]);
        // Who is used in this step is so halfway through it.
        let expected = (unused * chance, unused * f64::from(widths[step]) * (1.0 - 0.5 * chance));
        unused *= 1.0 - chance;
        expected
    });
    let (mut runs, mut count) = ([(0.0, 0.0); STEPS], 0);
    for (from, (mut uses, mut time)) in steps.into_iter().enumerate().rev() {
        // Ratios, compared without dividing.
        while count > 0
            && let (more, longer) = runs[count - 1]
            && more * time > uses * longer
        {
            (uses, time, count) = (uses + more, time + longer, count - 1);
        }
        runs[count] = (uses, time);
        count += 1;
        index[from] = (uses / time) as f32;
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_worth_most_just_before_its_time() {
        let ages = Ages::new(1000);
        let mut chances = vec![0.001; CELLS];
        chances[10] = 0.5;
        let mut order = Order::new();
        order.rank(&chances, |_| true, &ages);
        assert!((0..10).all(|cell| order.rises(cell)) && !order.rises(10));
        assert!(order.place(10) > order.place(9) && order.place(9) > order.place(11));
        // A class with the same chance in every step goes by last use; four steps are equally long.
        assert!((STEPS + 1..2 * STEPS - 4).all(|cell| order.place(cell) > order.place(cell + 4)));
    }
}
