//! The candidates by class and age, each cell a list.

use super::age::{Ages, STEPS};
use super::rank::{CELLS, Order};
use super::{Info, Node};
use crate::eviction::queue::List;

/// Cells that are looked at for blocks that have got older, per victim: their times alone, many at once. Blocks get older slowly.
const LOOKS: usize = 112;
/// Of these, so many in one comparison or two of vectors.
const AT_ONCE: usize = 16;
const _: () = assert!(CELLS.is_multiple_of(LOOKS) && LOOKS.is_multiple_of(AT_ONCE));

/// As far ahead as times are looked at.
const FAR: u32 = 1 << 31;

/// Of bits of cells. There is a bit for each of them in turn.
const WORDS: usize = CELLS.div_ceil(64);
const _: () = assert!(WORDS <= 64);

/// Candidates. Each list is by last use, the oldest first, but for blocks that became candidates late: they go to the nearer end.
#[derive(Debug)]
pub(super) struct Cells {
    cells: Vec<List>,
    /// When the first of each list gets too old for its cell. If there is none, or no end of the cell, any time.
    due: Vec<u32>,
    /// A bit for each cell that is not empty, by place in the order.
    filled: [u64; WORDS],
    /// A bit for each of these words that is not zero.
    words: u64,
    /// The place where each cell stands.
    place: Vec<u16>,
    look: usize,
}

impl Cells {
    pub(super) fn new() -> Self {
        Cells {
            cells: (0..CELLS).map(|_| List::default()).collect(),
            due: vec![FAR; CELLS],
            filled: [0; WORDS],
            words: 0,
            place: (0..CELLS as u16).collect(),
            look: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.cells[..])
            + size_of_val(&self.due[..])
            + size_of_val(&self.place[..])
            + size_of::<Self>()
    }

    /// Whether there are candidates of this class.
    pub(super) fn has(&self, class: usize) -> bool {
        self.cells[class * STEPS..(class + 1) * STEPS].iter().any(|list| list.front().is_some())
    }

    /// Takes over a new order.
    pub(super) fn reorder(&mut self, order: &Order) {
        (self.filled, self.words) = ([0; WORDS], 0);
        for cell in 0..CELLS {
            self.place[cell] = order.place(cell) as u16;
            if self.cells[cell].front().is_some() {
                self.fill(cell);
            }
        }
    }

    fn fill(&mut self, cell: usize) {
        let (word, bit) = (self.place[cell] / 64, self.place[cell] % 64);
        self.filled[usize::from(word)] |= 1 << bit;
        self.words |= 1 << word;
    }

    fn clear(&mut self, cell: usize) {
        let (word, bit) = (self.place[cell] / 64, self.place[cell] % 64);
        self.filled[usize::from(word)] &= !(1 << bit);
        if self.filled[usize::from(word)] == 0 {
            self.words &= !(1 << word);
        }
    }

    /// The first place from `place` on whose cell is not empty.
    fn filled_from(&self, place: usize) -> Option<usize> {
        let (word, bit) = (place / 64, place % 64);
        let here = self.filled.get(word)? & (!0 << bit);
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        // Shifted twice: a shift by 64 is none.
        let after = self.words & (!0 << word << 1);
        let word = after.trailing_zeros() as usize;
        (after != 0).then(|| word * 64 + self.filled[word].trailing_zeros() as usize)
    }

    /// When a block that was last used at this time gets too old for a cell. The last step has no end.
    fn end_of(number: usize, used: u32, now: u32, ages: &Ages) -> u32 {
        match number % STEPS + 1 {
            STEPS => now.wrapping_add(FAR),
            _ => used.wrapping_add(ages.end(number % STEPS)),
        }
    }

    /// Takes all candidates out.
    pub(super) fn drain(&mut self, nodes: &mut [Node]) -> Vec<u32> {
        let mut all = Vec::new();
        for list in &mut self.cells {
            while let Some(block) = list.pop_front(nodes) {
                all.push(block);
            }
        }
        (self.filled, self.words) = ([0; WORDS], 0);
        all
    }

    pub(super) fn enter(&mut self, nodes: &mut [Node], info: &mut [Info], block: u32, now: u32, ages: &Ages) {
        let Info { used, class, .. } = info[block as usize];
        let age = now.wrapping_sub(used);
        let step = ages.step(age);
        let number = usize::from(class) * STEPS + step;
        info[block as usize].cell = number as u16;
        let list = &mut self.cells[number];
        if let Some(back) = list.back() {
            if now.wrapping_sub(info[back as usize].used) >= age {
                return list.push_back(nodes, block);
            }
        } else {
            self.fill(number);
        }
        self.cells[number].push_front(nodes, block);
        self.due[number] = Self::end_of(number, used, now, ages);
    }

    pub(super) fn leave(&mut self, nodes: &mut [Node], info: &[Info], block: u32, now: u32, ages: &Ages) {
        let number = usize::from(info[block as usize].cell);
        let list = &mut self.cells[number];
        let was_front = list.front() == Some(block);
        list.remove(nodes, block);
        if !was_front {
            return;
        }
        match list.front() {
            Some(front) => self.due[number] = Self::end_of(number, info[front as usize].used, now, ages),
            None => self.clear(number),
        }
    }

    /// The candidate of the least index.
    pub(super) fn first(
        &mut self,
        nodes: &mut [Node],
        info: &mut [Info],
        now: u32,
        order: &Order,
        ages: &Ages,
    ) -> Option<u32> {
        self.look_around(nodes, info, now, ages);
        loop {
            let number = order.cell(self.filled_from(0)?);
            if !self.grow_older(nodes, info, number, now, ages) {
                let list = &self.cells[number];
                return if order.rises(number) { list.back() } else { list.front() };
            }
        }
    }

    /// Lets blocks of the next few cells get older.
    fn look_around(&mut self, nodes: &mut [Node], info: &mut [Info], now: u32, ages: &Ages) {
        let first = self.look;
        self.look = if first + LOOKS == CELLS { 0 } else { first + LOOKS };
        let later = now.wrapping_add(1);
        for first in (first..first + LOOKS).step_by(AT_ONCE) {
            let cells = first..first + AT_ONCE;
            // As `is_due` says, of all of them: the upper bit of any.
            let any = self.due[cells.clone()].iter().fold(0, |bits, due| bits | due.wrapping_sub(later));
            if any >> 31 == 0 {
                continue;
            }
            for number in cells {
                if is_due(self.due[number], now) && !self.grow_older(nodes, info, number, now, ages) {
                    // It is empty.
                    self.due[number] = now.wrapping_add(FAR);
                }
            }
        }
    }

    /// Moves blocks on that are too old for their cell. False if there were none.
    fn grow_older(
        &mut self,
        nodes: &mut [Node],
        info: &mut [Info],
        number: usize,
        now: u32,
        ages: &Ages,
    ) -> bool {
        let mut any = false;
        while is_due(self.due[number], now)
            && let Some(front) = self.cells[number].front()
        {
            self.leave(nodes, info, front, now, ages);
            self.enter(nodes, info, front, now, ages);
            any = true;
            if usize::from(info[front as usize].cell) == number {
                break;
            }
        }
        any
    }
}

/// Whether a time has come, if it is not [`FAR`] off.
fn is_due(due: u32, now: u32) -> bool {
    (due.wrapping_sub(now).wrapping_sub(1) as i32) < 0
}
