//! Least recently used: the candidate that was let go of longest ago.

use super::Node;
use super::queue::Queue;

/// Candidates by last use.
#[derive(Debug, Default)]
pub(super) struct Lru(Queue);

impl Lru {
    #[inline]
    pub(super) fn enter(&mut self, nodes: &mut [Node], block: u32) {
        self.0.push(nodes, block);
    }

    #[inline]
    pub(super) fn leave(&mut self, nodes: &mut [Node], block: u32) {
        self.0.remove(nodes, block);
    }

    #[inline]
    pub(super) fn first(&self, nodes: &[Node]) -> Option<u32> {
        self.0.first(nodes)
    }
}
