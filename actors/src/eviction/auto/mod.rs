//! `auto`: learns from the load itself which blocks are used again, and when.
//!
//! * [`hazard`] follows a sample of all uses and learns the chance of another use, by the *class* of the use (what is known of
//!   the block when it happens) and by its age.
//! * [`rank`] turns chances into an order: the uses to expect per block and unit of time, if the block is kept as long as
//!   that pays (the Gittins index). Where blocks come back after a pause, this evicts fresh blocks before those whose time is
//!   about to come; where nothing is used again but what is used often, it keeps that.
//! * [`cells`] keeps the candidates by class and age, so that an order of a few thousand cells orders all of them.
//! * [`ghosts`] remembers how often blocks were used that are not cached any more.
//!
//! Time is counted in uses of any block. So nothing depends on clocks, and an age says what it costs to wait that long.
//! Counters of 32 bits wrap: a block that lies idle for 2^32 uses counts as fresh again.

mod age;
mod cells;
mod ghosts;
mod hazard;
mod rank;

use cells::Cells;
use ghosts::Ghosts;
use hazard::Hazard;
use rank::Order;

use super::{NONE, Node, Touch};
use age::Ages;

/// Classes of uses: `count (4) × known share of the request (3) × last block of its request or not (2) × length of the request (4)`.
const CLASSES: usize = 96;

/// Of a chain, one in so many blocks is remembered when it is evicted; those that follow it are taken to be like it.
const GHOST_EVERY: u32 = 4;

const OPEN: u8 = 1;
const REMEMBERED: u8 = 2;

/// What is known of a cached block.
#[derive(Debug, Clone, Copy, Default)]
struct Info {
    /// When it was last used.
    used: u32,
    /// Of its identity.
    print: u32,
    /// Where it is among the candidates.
    cell: u16,
    /// The class of its last use.
    class: u8,
    /// Its uses, those before it was last evicted included, up to 4.
    count: u8,
    /// Its uses before it was last evicted, as far as remembered.
    before: u8,
    flags: u8,
    /// Blocks of the request up to here that had been used before, as far as remembered.
    known: u16,
}

/// The learner and the candidates.
#[derive(Debug)]
pub(super) struct Auto {
    info: Vec<Info>,
    /// Uses so far.
    now: u32,
    ages: Ages,
    hazard: Hazard,
    order: Order,
    cells: Cells,
    ghosts: Ghosts,
}

impl Auto {
    pub(super) fn new(blocks: usize) -> Self {
        let ages = Ages::new(blocks);
        let hazard = Hazard::new(blocks);
        let mut auto = Auto {
            info: vec![Info::default(); blocks],
            now: 0,
            order: Order::new(),
            cells: Cells::new(),
            ghosts: Ghosts::new(blocks),
            ages,
            hazard,
        };
        auto.order.rank(auto.hazard.chances(), |_| true, &auto.ages);
        auto.cells.reorder(&auto.order);
        auto
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let learner = self.hazard.bytes() + self.order.bytes() + self.cells.bytes();
        size_of_val(&self.info[..]) + self.ghosts.bytes() + learner
    }

    /// Bounds what is remembered. What has been learned of other ages than the new ones is forgotten.
    pub(super) fn set_capacity(&mut self, nodes: &mut [Node], blocks: usize) {
        self.ghosts = Ghosts::new(blocks);
        self.ages = Ages::new(blocks);
        self.hazard = Hazard::new(blocks);
        self.order.rank(self.hazard.chances(), |_| true, &self.ages);
        let candidates = self.cells.drain(nodes);
        self.cells.reorder(&self.order);
        candidates.into_iter().for_each(|block| self.enter(nodes, block));
    }

    pub(super) fn inserted(&mut self, nodes: &[Node], block: u32, identity: u64, touch: Touch) {
        self.now = self.now.wrapping_add(1);
        let print = fingerprint(identity);
        self.hazard.used_again(print, self.now, &self.ages);
        let remembered = touch.depth.is_multiple_of(GHOST_EVERY);
        let parent = match nodes[block as usize].parent {
            NONE => Info::default(),
            parent => self.info[parent as usize],
        };
        let before = if remembered { self.ghosts.take(print) } else { parent.before };
        let known = parent.known.saturating_add(u16::from(before > 0));
        let count = (before + 1).min(4);
        let flags = if remembered { REMEMBERED } else { 0 };
        self.info[block as usize] = Info { print, count, before, flags, known, ..Info::default() };
        self.used(block, touch);
    }

    pub(super) fn touched(&mut self, block: u32, touch: Touch) {
        self.now = self.now.wrapping_add(1);
        let info = &mut self.info[block as usize];
        info.count = (info.count + 1).min(4);
        // What comes after a block that is still here is not known to have been here.
        info.before = 0;
        // It was found, and so were those before it.
        info.known = u16::try_from(touch.depth).unwrap_or(u16::MAX).saturating_add(1);
        if info.flags & OPEN != 0 {
            info.flags &= !OPEN;
            self.hazard.used_again(info.print, self.now, &self.ages);
        }
        self.used(block, touch);
    }

    fn used(&mut self, block: u32, touch: Touch) {
        let info = &mut self.info[block as usize];
        let class = class(info.count, info.known, touch);
        info.class = class;
        info.used = self.now;
        if self.hazard.is_sampled(self.now) {
            info.flags |= OPEN;
            self.hazard.follow(info.print, class, self.now, &self.ages);
            if self.hazard.learn(self.now, &self.ages) {
                let (hazard, cells) = (&self.hazard, &self.cells);
                self.order.rank(
                    hazard.chances(),
                    |class| hazard.knows(class) || cells.has(class),
                    &self.ages,
                );
                self.cells.reorder(&self.order);
            }
        }
    }

    pub(super) fn enter(&mut self, nodes: &mut [Node], block: u32) {
        self.cells.enter(nodes, &mut self.info, block, self.now, &self.ages);
    }

    pub(super) fn leave(&mut self, nodes: &mut [Node], block: u32) {
        self.cells.leave(nodes, &self.info, block, self.now, &self.ages);
    }

    pub(super) fn first(&mut self, nodes: &mut [Node]) -> Option<u32> {
        self.cells.first(nodes, &mut self.info, self.now, &self.order, &self.ages)
    }

    pub(super) fn removed(&mut self, block: u32) {
        let info = self.info[block as usize];
        if info.flags & REMEMBERED != 0 {
            self.ghosts.remember(info.print, info.count);
        }
    }
}

/// 32 bits of an identity, mixed: identities need not be random.
fn fingerprint(identity: u64) -> u32 {
    let mixed = (identity ^ identity >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 32) as u32
}

/// What a use says about the next one. All of it is known when the block is used.
///
/// What share of the request was used before tells a conversation that goes on, and is about to do so again, from one that begins.
fn class(count: u8, known: u16, touch: Touch) -> u8 {
    let last = touch.depth.saturating_add(1) >= touch.request_blocks;
    let length = match touch.request_blocks {
        0..=8 => 0,
        9..=32 => 1,
        33..=64 => 2,
        _ => 3,
    };
    let (known, all) = (u64::from(known), u64::from(touch.request_blocks));
    // Up to a half, up to four fifths, more.
    let share = u8::from(known * 2 > all) + u8::from(known * 5 > all * 4);
    (count.clamp(1, 4) - 1) + 4 * share + 12 * u8::from(!last) + 24 * length
}
