//! Segmented least recently used (Karedla et al., "Caching strategies to improve disk system performance", 1994): blocks that
//! were used once go before blocks that were used again, and the latter keep at most a share of the cache to themselves.

use super::Node;
use super::queue::Queue;

/// The share of the candidates that used-again blocks have to themselves, in hundredths.
const PROTECTED_PERCENT: usize = 80;

/// Candidates that were used once, and those that were used again, by last use.
#[derive(Debug)]
pub(super) struct Slru {
    /// Uses of each block since it was cached or demoted: one, or more than one.
    again: Vec<bool>,
    probation: Queue,
    protected: Queue,
}

const PROTECTED: u8 = 0x80;

impl Slru {
    pub(super) fn new(blocks: usize) -> Self {
        Slru { again: vec![false; blocks], probation: Queue::default(), protected: Queue::default() }
    }

    pub(super) fn inserted(&mut self, block: u32) {
        self.again[block as usize] = false;
    }

    pub(super) fn touched(&mut self, block: u32) {
        self.again[block as usize] = true;
    }

    pub(super) fn enter(&mut self, nodes: &mut [Node], block: u32) {
        if self.again[block as usize] {
            self.protected.push(nodes, block);
            nodes[block as usize].list |= PROTECTED;
        } else {
            self.probation.push(nodes, block);
        }
        let most = (self.probation.len() + self.protected.len()) * PROTECTED_PERCENT / 100;
        if self.protected.len() > most.max(1) {
            self.demote(nodes);
        }
    }

    fn demote(&mut self, nodes: &mut [Node]) {
        if let Some(oldest) = self.protected.first(nodes) {
            self.leave(nodes, oldest);
            self.again[oldest as usize] = false;
            self.probation.push(nodes, oldest);
        }
    }

    pub(super) fn leave(&mut self, nodes: &mut [Node], block: u32) {
        let node = &mut nodes[block as usize];
        let protected = node.list & PROTECTED != 0;
        node.list &= !PROTECTED;
        if protected { self.protected.remove(nodes, block) } else { self.probation.remove(nodes, block) }
    }

    pub(super) fn first(&self, nodes: &[Node]) -> Option<u32> {
        self.probation.first(nodes).or_else(|| self.protected.first(nodes))
    }
}
