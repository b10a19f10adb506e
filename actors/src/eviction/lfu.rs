//! Least frequently used, aged (LFU with dynamic ageing; Arlitt et al., "Evaluating content management techniques for Web
//! proxy caches", 2000): a block counts its uses on top of what the last evicted block had reached, so that one that was
//! popular long ago does not stay for good.

use super::Node;
use super::queue::Heap;

/// Candidates by uses, then by last use.
#[derive(Debug)]
pub(super) struct Lfu {
    uses: Vec<Uses>,
    candidates: Heap,
    /// What the last evicted block had reached.
    floor: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    count: u32,
    /// The count on top of the floor of its time.
    rank: u32,
}

impl Lfu {
    pub(super) fn new(blocks: usize) -> Self {
        Lfu { uses: vec![Uses::default(); blocks], candidates: Heap::default(), floor: 0 }
    }

    pub(super) fn inserted(&mut self, block: u32) {
        self.uses[block as usize] = Uses { count: 1, rank: self.floor.saturating_add(1) };
    }

    pub(super) fn touched(&mut self, block: u32) {
        let uses = &mut self.uses[block as usize];
        uses.count = uses.count.saturating_add(1);
        uses.rank = self.floor.saturating_add(uses.count);
    }

    pub(super) fn enter(&mut self, nodes: &mut [Node], block: u32) {
        let rank = u64::from(self.uses[block as usize].rank);
        // The last use decides among equals; 2^40 uses take weeks, and then only the order of equals is off.
        let key = rank << 40 | nodes[block as usize].used & ((1 << 40) - 1);
        self.candidates.push(nodes, key, block);
    }

    pub(super) fn leave(&mut self, nodes: &mut [Node], block: u32) {
        self.candidates.remove(nodes, block);
    }

    pub(super) fn first(&self) -> Option<u32> {
        self.candidates.first().map(|(_, block)| block)
    }

    pub(super) fn removed(&mut self, block: u32) {
        self.floor = self.floor.max(self.uses[block as usize].rank);
    }
}
