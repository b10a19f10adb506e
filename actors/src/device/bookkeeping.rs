//! A shard's blocks without its device: the real index, pool and eviction policy, and no bytes of keys and values.
//!
//! For replaying traces of requests: which blocks a policy keeps, and what it costs to keep account of them.

use super::blocks::BlockStore;
use super::cached::{Origin, Published};
use crate::block::{BlockId, BlockKey};
use crate::eviction::EvictionPolicy;
use crate::format::{BlockFormat, KeepRaw};
use crate::geometry::{ElementType, Geometry};
use crate::index::PrefixIndex;
use crate::pool::{Pool, PoolLayout, SLOT_ALIGN_BYTES};
use crate::stats::CoreCounters;

/// The blocks of a shard that has no device.
#[derive(Debug)]
pub struct Bookkeeping {
    blocks: BlockStore,
    reader: PrefixIndex,
    counters: CoreCounters,
    /// Blocks of the request under way.
    held: Vec<BlockId>,
}

/// A request for more blocks than there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request of {blocks} blocks, and room for {capacity_blocks}; give the cache at least as many")]
pub struct TooManyBlocks {
    /// Blocks of the request.
    pub blocks: usize,
    /// Blocks that there are.
    pub capacity_blocks: usize,
}

impl Bookkeeping {
    /// Room for `capacity_blocks` blocks, all vacant.
    pub fn new(capacity_blocks: usize, policy: EvictionPolicy) -> Self {
        let layout = Geometry::new(1, 1, 1, ElementType::F32)
            .block_tokens(1)
            .layout()
            .expect("a geometry of one element a token works");
        let slots = (1..=16).rev().find(|slots| capacity_blocks.is_multiple_of(*slots)).unwrap_or(1);
        let slot = SLOT_ALIGN_BYTES;
        let pool = PoolLayout {
            raw_slot_bytes: slot,
            sealed_slot_bytes: slot,
            colder_slot_bytes: [0; 2],
            scratch_slots: 0,
            chunk_bytes: slots * slot,
            chunks: capacity_blocks / slots,
            has_sealed_class: false,
            host_slots: 0,
        };
        let mut blocks = BlockStore::new(
            Pool::new(pool),
            0,
            &layout,
            BlockFormat::RAW.into(),
            KeepRaw::default(),
            policy,
            64,
        );
        blocks.open_owner(0, Default::default());
        Bookkeeping {
            reader: blocks.index().clone(),
            blocks,
            counters: CoreCounters::default(),
            held: Vec::new(),
        }
    }

    /// Finds blocks, as callers do beside the thread that runs requests.
    pub fn index(&self) -> &PrefixIndex {
        &self.reader
    }

    /// What has happened so far.
    pub fn counters(&self) -> &CoreCounters {
        &self.counters
    }

    /// Runs one request from beginning to end, as a sequence does that is opened with a prompt of these blocks, computes what is not
    /// cached, and closes: match, allocate, register, release. Returns how many blocks were cached.
    ///
    /// # Errors
    /// [`TooManyBlocks`], with nothing changed.
    pub fn request(&mut self, now_ms: u64, keys: &[BlockKey]) -> Result<usize, TooManyBlocks> {
        let Bookkeeping { blocks, reader, counters, held } = self;
        let capacity_blocks = blocks.pool().layout().raw_slots();
        if keys.len() > capacity_blocks {
            return Err(TooManyBlocks { blocks: keys.len(), capacity_blocks });
        }
        blocks.now_ms = now_ms;
        let request_blocks = keys.len() as u32;
        // Before the search: each of its steps waits for the one before.
        blocks.warm(keys);
        let lease = reader.lease(keys);
        held.extend(blocks.leased(&lease));
        (0..).zip(held.iter()).for_each(|(depth, &block)| blocks.hold_found(block, (depth, request_blocks)));
        let hits = held.len();
        drop(lease);
        for (depth, key) in (hits as u32..).zip(&keys[hits..]) {
            let room = blocks.raw_available(1) > 0 || blocks.evict_one(counters);
            debug_assert!(room, "what the request does not hold can go");
            let block = blocks.create(0, depth as usize, false).id;
            let origin = Origin { parent: held.last().copied(), root: 0, has_extra: false };
            match blocks.publish_key(block, key, origin, (depth, request_blocks), counters) {
                Published::Itself => {
                    blocks.complete(block, counters);
                    held.push(block);
                }
                Published::Twin(twin) => {
                    blocks.release(block);
                    held.push(twin);
                }
            }
        }
        held.drain(..).rev().for_each(|block| blocks.release(block));
        counters.prefix_blocks_asked += keys.len() as u64;
        counters.prefix_blocks_hit += hits as u64;
        Ok(hits)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    fn keys(numbers: impl IntoIterator<Item = u32>) -> Vec<BlockKey> {
        numbers.into_iter().map(|number| BlockKey(*blake3::hash(&number.to_le_bytes()).as_bytes())).collect()
    }

    #[test]
    fn requests_find_what_was_registered_and_evict_the_oldest() {
        let mut shard = Bookkeeping::new(6, EvictionPolicy::Lru);
        assert_eq!(shard.request(0, &keys(0..4)), Ok(0));
        assert_eq!(shard.request(1, &keys(0..4)), Ok(4));
        assert_eq!(shard.request(2, &keys([0, 1, 9])), Ok(2));
        // Two vacant blocks are left after these five, and one more is needed: the end of the chain that was used first goes.
        assert_eq!(shard.request(3, &keys([20, 21])), Ok(0));
        assert_eq!(shard.request(4, &keys(0..4)), Ok(3));
        assert_eq!(shard.index().lease(&keys([0, 1, 9])).blocks(), 2);
        let error = TooManyBlocks { blocks: 7, capacity_blocks: 6 };
        assert_eq!(shard.request(5, &keys(30..37)), Err(error));
        assert_eq!(shard.counters().prefix_blocks_hit, 4 + 2 + 3);
    }
}
