//! Blocks that are found by prompts: publishing them, keeping them while nobody holds them, and making room of them.
//!
//! A published block is in the prefix index and in the evictor, and its content is final. Its parent is published as well, and stays for
//! as long as it does: a prompt that finds it has found all before it.

use super::blocks::BlockStore;
use crate::block::{BlockId, BlockKey};
use crate::events::BlockEvent;
use crate::eviction::Touch;
use crate::index::PrefixIndex;
use crate::pool::{Pool, SizeClass};
use crate::slot::FilledSlot;
use crate::stats::CoreCounters;

/// Victims looked at that readers have just pinned, before evicting is given up.
const PINNED_VICTIMS_MAX: usize = 16;

/// Whether raw slots can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// They are vacant.
    Now,
    /// They will be when blocks have moved that are about to.
    Soon,
    /// Not even if everything goes that may.
    Never,
}

/// Where a block comes from.
pub(super) struct Origin {
    /// The block before it.
    pub(super) parent: Option<BlockId>,
    /// Number of what it has in common with all blocks of its sequence.
    pub(super) root: u32,
}

/// What can be done with a block that has just become full.
pub(super) enum Published {
    /// It is in the index now, or remains its sequence's alone.
    Itself,
    /// The same content is cached already: the sequence is to hold that block, and does.
    Twin(BlockId),
}

impl BlockStore {
    /// Lets prompts find a full block of this key that a sequence has just filled.
    pub(super) fn publish_key(
        &mut self,
        id: BlockId,
        key: &BlockKey,
        origin: Origin,
        touch: (u32, u32),
        counters: &mut CoreCounters,
    ) -> Published {
        let Origin { parent, root } = origin;
        let touch = self.touched(touch);
        if let Some(twin) = self.index.find(key) {
            // Somebody else who holds ours keeps it.
            if self.get(id).refs > 1 || self.get(twin).class == SizeClass::Host {
                return Published::Itself;
            }
            self.retain(twin);
            self.evictor.touch(twin, touch);
            counters.blocks_deduplicated += 1;
            return Published::Twin(twin);
        }
        // Nobody would find it behind a parent that is not found.
        if parent.is_none_or(|parent| self.get(parent).published) {
            self.index.insert(id, key);
            let identity = u64::from_le_bytes(std::array::from_fn(|at| key.0[at]));
            self.evictor.insert(id, parent, identity, touch);
            self.parents[id.0 as usize] = parent.unwrap_or(BlockId::DROPPED);
            self.roots[id.0 as usize] = root;
            self.get_mut(id).published = true;
            let parent = parent.and_then(|parent| self.key(parent));
            let (shard, key, tier) = (self.shard, *key, self.get(id).class.tier());
            self.tell(BlockEvent::Stored { shard, key, parent, tier });
        }
        Published::Itself
    }

    /// A prompt has found the block, or goes on where its lease ended: its sequence holds it from now on.
    pub(super) fn hold_found(&mut self, id: BlockId, touch: (u32, u32)) {
        let touch = self.touched(touch);
        self.retain(id);
        self.evictor.touch(id, touch);
    }

    /// `(blocks before it, blocks of the prompt)`, now.
    fn touched(&self, (depth, request_blocks): (u32, u32)) -> Touch {
        Touch { now_ms: self.now_ms, depth, request_blocks }
    }

    /// Whether prompts find the block.
    pub(super) fn is_published(&self, id: BlockId) -> bool {
        self.blocks.get(id.0 as usize).is_some_and(|block| block.published)
    }

    /// The number of a published block's root.
    pub(super) fn root(&self, id: BlockId) -> u32 {
        self.roots[id.0 as usize]
    }

    /// For those who match prompts.
    pub fn index(&self) -> &PrefixIndex {
        self.index.reader()
    }

    /// The published block of this key.
    pub(super) fn find_key(&self, key: &BlockKey) -> Option<BlockId> {
        self.index.find(key)
    }

    /// No prompt finds the block from now on, nor what comes behind it.
    pub(super) fn withdraw(&mut self, id: BlockId) {
        if self.is_published(id) {
            self.withdraw_all(|store, block| store.is_behind(block, id));
        }
    }

    /// Withdraws every published block of which `which` is true. With a block go those behind it.
    pub(super) fn withdraw_all(&mut self, which: impl Fn(&Self, BlockId) -> bool) -> usize {
        let published = self.blocks.iter().filter(|(_, block)| block.published);
        let mut chosen: Vec<(usize, BlockId)> = published
            .map(|(number, _)| BlockId(number as u32))
            .filter(|&block| which(self, block))
            .map(|block| (self.ancestors(block).count(), block))
            .collect();
        // Children first.
        chosen.sort_unstable_by(|a, b| b.cmp(a));
        for &(_, block) in &chosen {
            self.index.hide(block);
            self.tell_removed(block);
            self.evictor.remove(block, self.now_ms);
            let entry = self.get_mut(block);
            entry.published = false;
            if entry.refs == 0 {
                match self.index.is_pinned(block) {
                    true => self.limbo.push(block),
                    false => self.free(block),
                }
            }
        }
        chosen.len()
    }

    fn tell(&mut self, event: BlockEvent) {
        if self.is_heard {
            self.events.push(event);
        }
    }

    fn tell_removed(&mut self, block: BlockId) {
        if let Some(key) = self.key(block) {
            self.tell(BlockEvent::Removed { shard: self.shard, key });
        }
    }

    /// A block has come to another tier.
    pub(super) fn tell_moved(&mut self, block: BlockId) {
        if let Some(key) = self.key(block)
            && self.is_published(block)
        {
            let (shard, tier) = (self.shard, self.get(block).class.tier());
            self.tell(BlockEvent::Moved { shard, key, tier });
        }
    }

    /// The published blocks before a published block, from the nearest on.
    fn ancestors(&self, block: BlockId) -> impl Iterator<Item = BlockId> {
        let parent_of = |block: &BlockId| {
            let parent = self.parents[block.0 as usize];
            (parent != BlockId::DROPPED).then_some(parent)
        };
        std::iter::successors(parent_of(&block), parent_of)
    }

    fn is_behind(&self, block: BlockId, ancestor: BlockId) -> bool {
        block == ancestor || self.ancestors(block).any(|before| before == ancestor)
    }

    /// Frees the block that is worth least. False if none can go.
    pub(super) fn evict_one(&mut self, counters: &mut CoreCounters) -> bool {
        for _ in 0..PINNED_VICTIMS_MAX {
            let Some(victim) = self.evictor.victim(self.now_ms) else { return false };
            if self.index.try_remove(victim) {
                self.tell_removed(victim);
                self.evictor.remove(victim, self.now_ms);
                self.get_mut(victim).published = false;
                self.free(victim);
                counters.evictions += 1;
                return true;
            }
            self.evictor.pass(victim, self.now_ms);
        }
        false
    }

    /// Sees to it that `wanted` raw slots can be had, at the cost of what nobody holds.
    ///
    /// Cached blocks mostly lie in sealed slots. Enough of them go to empty a chunk, and what is left in the emptiest one moves over into the
    /// others: with [`Room::Soon`] it is for the caller to launch these moves ([`BlockStore::next_move`]).
    pub(super) fn make_room(&mut self, wanted: usize, counters: &mut CoreCounters) -> Room {
        if self.raw_available(wanted) >= wanted {
            return Room::Now;
        }
        // What cannot be done evicts nothing.
        if wanted > self.pool.raw_available() + self.evictor.unheld() {
            return Room::Never;
        }
        // Chunks change class here, and sealing may find what it lacked.
        self.seal_stalled = false;
        loop {
            if self.pool.draining_class() == Some(SizeClass::Sealed) {
                if !self.pool.draining_waits_for_readers() {
                    return Room::Soon;
                }
                // Nobody knows for how long: another chunk, then.
                self.pool.stop_draining();
            } else if self.evictor.unheld() > 0 {
                // A raw chunk that is being emptied takes the slots away that are looked for.
                self.pool.stop_draining();
            }
            if self.pool.raw_available() >= wanted {
                return Room::Now;
            }
            if !self.pool.start_draining(SizeClass::Sealed) && !self.evict_one(counters) {
                return Room::Never;
            }
        }
    }

    /// A slot to seal into. What is cached makes way for it before raw slots do, so that a write finds some.
    pub(super) fn sealed_slot(&mut self, tenant: u32, counters: &mut CoreCounters) -> Option<FilledSlot> {
        let chunk = self.pool.layout().slots_per_chunk(SizeClass::Raw);
        let kept_raw = self.pool.layout().raw_slots() / 32 + chunk;
        let spares_chunk = |pool: &Pool| pool.raw_available() >= kept_raw && pool.has_vacant_chunk();
        while !self.pool.has_sealed_vacancy() && !spares_chunk(&self.pool) && self.evict_one(counters) {}
        self.pool.take_sealed(tenant)
    }
}
