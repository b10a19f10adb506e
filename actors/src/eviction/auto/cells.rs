//! The candidates by class and age, each cell a list.

use super::age::{Ages, STEPS};
use super::rank::{CELLS, Order};
use super::{Info, Node};
use crate::eviction::queue::List;

/// Cells that are looked at for blocks that have got older, per victim. Blocks get older slowly.
const LOOKS: usize = 8;

const WORDS: usize = CELLS.div_ceil(64);

#[derive(Debug, Default)]
struct Cell {
    list: List,
    /// When the first of the list gets too old for the cell.
    due: u32,
}

/// Candidates. Each list is by last use, the oldest first, but for blocks that became candidates late: they go to the nearer end.
#[derive(Debug)]
pub(super) struct Cells {
    cells: Vec<Cell>,
    /// A bit for each cell that is not empty, by place in the order.
    filled: [u64; WORDS],
    /// The place where each cell stands.
    place: Vec<u16>,
    look: usize,
}

impl Cells {
    pub(super) fn new() -> Self {
        Cells {
            cells: (0..CELLS).map(|_| Cell::default()).collect(),
            filled: [0; WORDS],
            place: (0..CELLS as u16).collect(),
            look: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.cells[..]) + size_of_val(&self.place[..]) + size_of::<Self>()
    }

    /// Whether there are candidates of this class.
    pub(super) fn has(&self, class: usize) -> bool {
        self.cells[class * STEPS..(class + 1) * STEPS].iter().any(|cell| cell.list.front().is_some())
    }

    /// Takes over a new order.
    pub(super) fn reorder(&mut self, order: &Order) {
        self.filled = [0; WORDS];
        for (cell, place) in self.place.iter_mut().enumerate() {
            *place = order.place(cell) as u16;
            if self.cells[cell].list.front().is_some() {
                self.filled[usize::from(*place) / 64] |= 1 << (*place % 64);
            }
        }
    }

    /// Takes all candidates out.
    pub(super) fn drain(&mut self, nodes: &mut [Node]) -> Vec<u32> {
        let mut all = Vec::new();
        for cell in &mut self.cells {
            while let Some(block) = cell.list.pop_front(nodes) {
                all.push(block);
            }
        }
        self.filled = [0; WORDS];
        all
    }

    pub(super) fn enter(&mut self, nodes: &mut [Node], info: &mut [Info], block: u32, now: u32, ages: &Ages) {
        let Info { used, class, .. } = info[block as usize];
        let age = now.wrapping_sub(used);
        let step = ages.step(age);
        let number = usize::from(class) * STEPS + step;
        info[block as usize].cell = number as u16;
        let cell = &mut self.cells[number];
        let is_newest = cell.list.back().is_none_or(|back| now.wrapping_sub(info[back as usize].used) >= age);
        if is_newest && cell.list.front().is_some() {
            cell.list.push_back(nodes, block);
            return;
        }
        cell.list.push_front(nodes, block);
        cell.due = used.wrapping_add(ages.end(step));
        let place = usize::from(self.place[number]);
        self.filled[place / 64] |= 1 << (place % 64);
    }

    pub(super) fn leave(&mut self, nodes: &mut [Node], info: &[Info], block: u32, ages: &Ages) {
        let number = usize::from(info[block as usize].cell);
        let cell = &mut self.cells[number];
        let was_front = cell.list.front() == Some(block);
        cell.list.remove(nodes, block);
        if !was_front {
            return;
        }
        match cell.list.front() {
            Some(front) => cell.due = info[front as usize].used.wrapping_add(ages.end(number % STEPS)),
            None => {
                let place = usize::from(self.place[number]);
                self.filled[place / 64] &= !(1 << (place % 64));
            }
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
        self.look_around(nodes, info, now, order, ages);
        loop {
            let word = self.filled.iter().position(|word| *word != 0)?;
            let number = order.cell(word * 64 + self.filled[word].trailing_zeros() as usize);
            if !self.grow_older(nodes, info, number, now, ages) {
                let list = &self.cells[number].list;
                return if order.rises(number) { list.back() } else { list.front() };
            }
        }
    }

    /// Lets blocks of the next few cells get older.
    fn look_around(&mut self, nodes: &mut [Node], info: &mut [Info], now: u32, order: &Order, ages: &Ages) {
        let (mut looks, mut words) = (0, 0);
        while looks < LOOKS && words <= WORDS {
            let (word, bit) = (self.look / 64, self.look % 64);
            let ahead = self.filled[word] & (!0 << bit);
            if ahead == 0 {
                self.look = (word + 1) % WORDS * 64;
                words += 1;
                continue;
            }
            let place = word * 64 + ahead.trailing_zeros() as usize;
            self.grow_older(nodes, info, order.cell(place), now, ages);
            self.look = (place + 1) % (WORDS * 64);
            looks += 1;
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
        if number % STEPS + 1 == STEPS {
            return false;
        }
        let mut any = false;
        while let Some(front) = self.cells[number].list.front() {
            // Not yet due: less than half of the counter's range ahead.
            if (self.cells[number].due.wrapping_sub(now).wrapping_sub(1) as i32) >= 0 {
                break;
            }
            self.leave(nodes, info, front, ages);
            self.enter(nodes, info, front, now, ages);
            any = true;
            if usize::from(info[front as usize].cell) == number {
                break;
            }
        }
        any
    }
}
