//! The order in which candidates go: one of the policies.

use super::auto::Auto;
use super::lfu::Lfu;
use super::lru::Lru;
use super::slru::Slru;
use super::{EvictionPolicy, Node, Touch};

/// A policy and its candidates. Which one is asked for several times a block: it has a byte of its own, not a niche.
#[derive(Debug)]
#[repr(u8)]
pub(super) enum Ranking {
    Auto(Box<Auto>),
    Lru(Lru),
    Lfu(Lfu),
    Slru(Slru),
}

impl Ranking {
    pub(super) fn new(policy: EvictionPolicy, blocks: usize) -> Self {
        match policy {
            EvictionPolicy::Auto => Ranking::Auto(Box::new(Auto::new(blocks))),
            EvictionPolicy::Lru => Ranking::Lru(Lru::default()),
            EvictionPolicy::Lfu => Ranking::Lfu(Lfu::new(blocks)),
            EvictionPolicy::Slru => Ranking::Slru(Slru::new(blocks)),
        }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        match self {
            Ranking::Auto(auto) => auto.bytes(),
            _ => 0,
        }
    }

    pub(super) fn set_capacity(&mut self, nodes: &mut [Node], blocks: usize) {
        if let Ranking::Auto(auto) = self {
            auto.set_capacity(nodes, blocks);
        }
    }

    /// A block is cached.
    #[inline]
    pub(super) fn inserted(&mut self, nodes: &[Node], block: u32, identity: u64, touch: Touch) {
        match self {
            Ranking::Auto(auto) => auto.inserted(nodes, block, identity, touch),
            Ranking::Lru(_) => (),
            Ranking::Lfu(lfu) => lfu.inserted(block),
            Ranking::Slru(slru) => slru.inserted(block),
        }
    }

    /// A request has matched a block. If it is a candidate, it keeps its place: it is about to be held.
    #[inline]
    pub(super) fn touched(&mut self, block: u32, touch: Touch) {
        match self {
            Ranking::Auto(auto) => auto.touched(block, touch),
            Ranking::Lru(_) => (),
            Ranking::Lfu(lfu) => lfu.touched(block),
            Ranking::Slru(slru) => slru.touched(block),
        }
    }

    /// A block has become a candidate.
    #[inline]
    pub(super) fn enter(&mut self, nodes: &mut [Node], block: u32) {
        match self {
            Ranking::Auto(auto) => auto.enter(nodes, block),
            Ranking::Lru(lru) => lru.enter(nodes, block),
            Ranking::Lfu(lfu) => lfu.enter(nodes, block),
            Ranking::Slru(slru) => slru.enter(nodes, block),
        }
    }

    /// A block is no candidate any more.
    #[inline]
    pub(super) fn leave(&mut self, nodes: &mut [Node], block: u32) {
        match self {
            Ranking::Auto(auto) => auto.leave(nodes, block),
            Ranking::Lru(lru) => lru.leave(nodes, block),
            Ranking::Lfu(lfu) => lfu.leave(nodes, block),
            Ranking::Slru(slru) => slru.leave(nodes, block),
        }
    }

    /// The candidate to evict first.
    #[inline]
    pub(super) fn first(&mut self, nodes: &mut [Node]) -> Option<u32> {
        match self {
            Ranking::Auto(auto) => auto.first(nodes),
            Ranking::Lru(lru) => lru.first(nodes),
            Ranking::Lfu(lfu) => lfu.first(),
            Ranking::Slru(slru) => slru.first(nodes),
        }
    }

    /// A block, no candidate any more, is not cached any more.
    #[inline]
    pub(super) fn removed(&mut self, block: u32) {
        match self {
            Ranking::Auto(auto) => auto.removed(block),
            Ranking::Lru(_) | Ranking::Slru(_) => (),
            Ranking::Lfu(lfu) => lfu.removed(block),
        }
    }
}
