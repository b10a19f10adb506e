//! The blocks of a shard: reference counts, places, token ids, and the queue of blocks to seal. What is shared by prefix and kept when
//! nobody holds it is in [`super::cached`].

use std::collections::{HashMap, VecDeque};

use slab::Slab;

use super::cached::WARM_BLOCKS_MIN;
use super::lineage::Lineage;
use super::recent::Windows;
use super::recode::Recodable;
use crate::block::{Block, BlockId, BlockKey, BlockState, Place, Places};
use crate::dropping::{Compacted, Positions};
use crate::events::BlockEvent;
use crate::eviction::{EvictionPolicy, Evictor};
use crate::format::{BlockFormat, KeepRaw, Ladder};
use crate::geometry::BlockLayout;
use crate::index::IndexWriter;
use crate::limits::Ledger;
use crate::memory::{Purpose, Step};
use crate::pool::{Pool, SizeClass};
use crate::slot::{FilledSlot, SlotId, SlotPin};
use crate::stats::CoreCounters;

/// Blocks and the slots that they are in. Aligned, so that shards of different threads share no cache line, nor two that are fetched together.
#[derive(Debug)]
#[repr(align(128))]
pub struct BlockStore {
    pub(super) blocks: Slab<Block>,
    pub(super) pool: Pool,
    pub(super) places: Places,
    /// Token ids of every block, `block_tokens` each, by block number.
    token_ids: Vec<u32>,
    /// Where the tokens stand of full blocks of sequences that were thinned out, if it is not where the block's place says and steps have to know. All of
    /// them are private.
    positions: HashMap<BlockId, Positions>,
    layout: BlockLayout,
    pub(super) formats: Ladder,
    pub(super) recodable: Recodable,
    pub(super) windows: Windows,
    pub(super) keep_raw: KeepRaw,
    /// Full blocks that may be sealed. Some may have been cut or freed since; whatever has their number now is sealed if it is full.
    to_seal: VecDeque<BlockId>,
    /// Blocks that are being encoded.
    sealing: usize,
    /// No sealed slot could be had; nothing changes until a slot is freed.
    pub(super) seal_stalled: bool,
    /// The device did not carry out the seal that landed last.
    seals_fail: bool,
    /// The block in each slot.
    owners: Vec<BlockId>,
    /// Blocks per state that the statistics tell apart.
    sealed_blocks: u64,
    pub(super) index: IndexWriter,
    pub(super) evictor: Evictor,
    pub(super) lineage: Lineage,
    /// Whether there may be so many blocks that what evicting them needs is better loaded ahead.
    pub(super) warms_victims: bool,
    /// Blocks to evict yet of which most is in the processor's caches, if so.
    pub(super) victims_warmed: usize,
    /// Blocks that nobody holds and that the index has forgotten while somebody had them pinned.
    pub(super) limbo: Vec<BlockId>,
    /// The bytes that everybody's blocks take, and may.
    pub(super) ledger: Ledger,
    /// What has become of published blocks, if anybody wants to know.
    pub(super) events: Vec<BlockEvent>,
    pub(super) is_heard: bool,
    pub(super) shard: u16,
    /// What time it is, for those who rank blocks by age.
    pub(super) now_ms: u64,
}

/// A seal that has its slot.
#[derive(Debug)]
pub(crate) struct SealPlan {
    block: BlockId,
    slot: FilledSlot,
    format: BlockFormat,
    positions: Positions,
    from_offset: usize,
    to_offset: usize,
}

impl SealPlan {
    pub(super) fn step(&self, flight: usize) -> Step {
        let SealPlan { format, from_offset, to_offset, .. } = *self;
        let positions = self.positions.clone();
        Step::Seal { flight, format, positions, from_offset, to_offset }
    }

    pub(super) fn into_purpose(self) -> Purpose {
        Purpose::Seal { block: self.block, slot: self.slot }
    }
}

/// A move that has its slot.
#[derive(Debug)]
pub(crate) struct MovePlan {
    block: BlockId,
    slot: FilledSlot,
    from_offset: usize,
    to_offset: usize,
    /// Of a sealed block; a raw one is copied as such.
    sealed_bytes: Option<usize>,
}

impl MovePlan {
    pub(super) fn step(&self) -> Step {
        let MovePlan { from_offset, to_offset, sealed_bytes, .. } = *self;
        match sealed_bytes {
            None => Step::Copy { from_offset, to_offset },
            Some(bytes) => Step::Transfer { from_offset, to_offset, bytes },
        }
    }

    pub(super) fn into_purpose(self) -> Purpose {
        Purpose::Move { block: self.block, slot: self.slot }
    }
}

/// A new raw block.
pub(super) struct NewBlock {
    pub(super) id: BlockId,
    /// Zero the slot first: its bytes may be another tenant's.
    pub(super) must_zero: bool,
}

impl BlockStore {
    /// No blocks, of shard number `shard`. See [`CoreConfig::index_hash_bits`](super::CoreConfig::index_hash_bits).
    pub(super) fn new(
        pool: Pool,
        shard: u16,
        layout: &BlockLayout,
        formats: Ladder,
        keep_raw: KeepRaw,
        policy: EvictionPolicy,
        index_hash_bits: u32,
    ) -> Self {
        let blocks = pool.layout().slot_ids_all_tiers();
        BlockStore {
            blocks: Slab::with_capacity(blocks),
            places: Places::new(blocks, formats),
            token_ids: vec![0; blocks * layout.block_tokens],
            positions: HashMap::new(),
            layout: *layout,
            formats,
            recodable: Recodable::new(pool.layout()),
            windows: Windows::new(&keep_raw, &formats, blocks),
            keep_raw,
            to_seal: VecDeque::new(),
            sealing: 0,
            seal_stalled: false,
            seals_fail: false,
            owners: vec![BlockId::DROPPED; blocks],
            sealed_blocks: 0,
            index: IndexWriter::new(shard, blocks, index_hash_bits),
            evictor: Evictor::new(policy, blocks),
            lineage: Lineage::new(blocks),
            ledger: Ledger::default(),
            events: Vec::new(),
            is_heard: false,
            shard,
            limbo: Vec::new(),
            warms_victims: blocks >= WARM_BLOCKS_MIN,
            victims_warmed: 0,
            now_ms: 0,
            pool,
        }
    }

    pub(super) fn sealed_format(&self) -> BlockFormat {
        self.formats.sealed()
    }

    /// The pool of slots.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn pool_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Where blocks are, for readers outside of the device thread.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Blocks that exist.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether no block exists.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub(super) fn get(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    pub(super) fn get_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.0 as usize]
    }

    #[cfg(any(test, feature = "testing"))]
    pub(super) fn try_get(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id.0 as usize)
    }

    #[cfg(any(test, feature = "testing"))]
    pub(super) fn iter(&self) -> impl Iterator<Item = (BlockId, &Block)> {
        self.blocks.iter().map(|(number, block)| (BlockId(number as u32), block))
    }

    pub(super) fn key(&self, id: BlockId) -> Option<BlockKey> {
        let has_key = self.blocks.get(id.0 as usize)?.has_key;
        has_key.then(|| self.index.key(id))
    }

    /// Where the block's bytes begin in the slab.
    pub(super) fn offset(&self, id: BlockId) -> usize {
        let block = self.get(id);
        self.pool.offset_bytes(block.class, block.slot.id())
    }

    pub(super) fn format(&self, id: BlockId) -> BlockFormat {
        self.get(id).format(&self.formats)
    }

    /// Bytes of the block as it is stored.
    pub(super) fn stored_bytes(&self, id: BlockId) -> usize {
        self.format(id).block_bytes(&self.layout)
    }

    pub(super) fn block_tokens(&self) -> usize {
        self.layout.block_tokens
    }

    /// Where the block's tokens stand, if it is full: those of others may stand elsewhere when they are.
    pub(super) fn positions(&self, id: BlockId) -> Positions {
        let block = self.get(id);
        let each = if block.private && !self.positions.is_empty() { self.positions.get(&id) } else { None };
        each.cloned()
            .unwrap_or_else(|| Positions::of_block(None, block.index as usize, self.layout.block_tokens))
    }

    /// The block at place `at` of a sequence is full, which may have been thinned out and may have had tokens cut off since.
    pub(super) fn set_positions(&mut self, id: BlockId, compacted: Option<&Compacted>, at: usize) {
        if compacted.is_none() && self.positions.is_empty() {
            return;
        }
        debug_assert!(
            compacted.is_none() || self.get(id).private,
            "what is behind dropped tokens has no key"
        );
        let block_tokens = self.layout.block_tokens;
        let positions = Positions::of_block(compacted, at, block_tokens);
        if positions == Positions::of_block(None, at, block_tokens) {
            self.positions.remove(&id);
        } else {
            self.positions.insert(id, positions);
        }
    }

    /// Keeps the bytes of a block in place until the pin is dropped.
    pub(super) fn pin(&self, id: BlockId) -> Option<SlotPin> {
        let slot = &self.get(id).slot;
        self.pool.table().pin(slot.id(), slot.generation())
    }

    /// Checks that positions that are kept are of private blocks that exist.
    ///
    /// # Errors
    /// Of which one it is not.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn audit_positions(&self) -> Result<(), String> {
        let stray = |id: &&BlockId| !self.try_get(**id).is_some_and(|block| block.private);
        self.positions.keys().find(stray).map_or(Ok(()), |id| Err(format!("{id:?} has positions")))
    }

    /// Loads what a write to token `at` of the block will need.
    pub(super) fn touch(&self, id: BlockId, at: usize) -> u32 {
        let Some(block) = self.blocks.get(id.0 as usize) else { return 0 };
        block.refs.wrapping_add(self.token_ids[id.0 as usize * self.layout.block_tokens + at])
    }

    /// Whether the block has no key and never will.
    pub(super) fn is_private(&self, id: BlockId) -> bool {
        id == BlockId::DROPPED || self.get(id).private
    }

    /// Whether a write may go straight into the block.
    pub(super) fn is_writable(&mut self, id: BlockId) -> bool {
        let block = self.get(id);
        if block.refs > 1 || block.moving_to.is_some() || block.state != BlockState::Open || block.published {
            return false;
        }
        // A view taken before tokens were cut off still shows them, and the write would change them under its eyes.
        if block.rewound && !self.is_pinned(id) {
            self.get_mut(id).rewound = false;
        }
        !self.get(id).rewound
    }

    pub(super) fn is_pinned(&self, id: BlockId) -> bool {
        self.pool.table().is_pinned(&self.get(id).slot)
    }

    /// Raw slots that can be had without touching reservations, after a look at what readers have let go.
    #[inline]
    pub(super) fn raw_available(&mut self, wanted: usize) -> usize {
        if self.pool.raw_available() < wanted && self.waits_for_readers() {
            self.reclaim();
        }
        self.pool.raw_available()
    }

    /// Gives back raw slots that were set aside: sealing may have had to wait for them.
    pub(super) fn unreserve(&mut self, owner: u32, slots: usize) {
        self.pool.unreserve_raw(slots);
        self.charge(owner, SizeClass::Raw, -(slots as i64));
        if slots > 0 {
            self.unstall();
        }
    }

    /// A new raw block at place `index` of a sequence, held once. The caller has made sure that there is a slot for it.
    #[inline]
    pub(super) fn create(&mut self, tenant: u32, index: usize, private: bool) -> NewBlock {
        let taken =
            self.pool.take_raw(tenant).expect("a raw slot is vacant: the operation counted them first");
        let id = BlockId(self.blocks.insert(Block {
            slot: taken.slot,
            class: SizeClass::Raw,
            state: BlockState::Open,
            rung: 0,
            past: 0,
            queued: 0,
            refs: 1,
            tenant,
            index: index as u32,
            private,
            has_key: false,
            has_extra: false,
            published: false,
            rewound: false,
            writing: false,
            moving_to: None,
        }) as u32);
        self.publish(id);
        self.charge(tenant, SizeClass::Raw, 1);
        NewBlock { id, must_zero: taken.must_zero }
    }

    /// Lets readers outside of the device thread find the block where it is now.
    #[inline]
    pub(super) fn publish(&mut self, id: BlockId) {
        let block = &self.blocks[id.0 as usize];
        self.owners[block.slot.id().0 as usize] = id;
        self.places.publish(id, block);
    }

    /// The block in a slot of this class. None if it is vacant, or the target of a flight.
    pub(super) fn block_in(&self, slot: SlotId, class: SizeClass) -> Option<&Block> {
        let block = self.blocks.get(self.owners[slot.0 as usize].0 as usize)?;
        (block.slot.id() == slot && block.class == class).then_some(block)
    }

    #[inline]
    pub(super) fn retain(&mut self, id: BlockId) {
        let block = self.get_mut(id);
        block.refs += 1;
        let &mut Block { refs, tenant, class, .. } = block;
        if refs == 1 {
            self.evictor.hold(id);
            self.count_cached(tenant, class, -1);
        }
    }

    /// Lets go of a block. The last holder frees its slot, unless a prompt may find it: then it stays until its slot is needed.
    #[inline]
    pub(super) fn release(&mut self, id: BlockId) {
        self.release_from(id, false);
    }

    /// As [`BlockStore::release`], of a flight: `is_unused` if nobody has used the block meanwhile, so that it is not younger than before.
    #[inline]
    pub(super) fn release_from(&mut self, id: BlockId, is_unused: bool) {
        if id == BlockId::DROPPED {
            return;
        }
        let block = self.get_mut(id);
        block.refs -= 1;
        if block.refs > 0 {
            return;
        }
        let &mut Block { published, tenant, class, .. } = block;
        if published {
            match is_unused {
                true => self.evictor.put_back(id, self.now_ms),
                false => self.evictor.release(id, self.now_ms),
            }
            self.count_cached(tenant, class, 1);
            self.seal_stalled = false;
            if self.is_recoded() {
                self.let_go(id);
            }
            if self.keep_raw.window_blocks > 0 {
                // In nobody's window any more.
                self.leaves_window(id);
            }
        } else {
            self.free_unpinned(id);
        }
    }

    /// A flight takes the block: closing its sequences must not free the slot that is being read.
    pub(super) fn take_off(&mut self, id: BlockId) {
        self.retain(id);
        let owner = self.get(id).tenant;
        self.ledger.change_flights(owner, 1);
    }

    /// The flight has landed. See [`BlockStore::release_from`].
    pub(super) fn land(&mut self, id: BlockId, is_unused: bool) {
        let owner = self.get(id).tenant;
        self.ledger.change_flights(owner, -1);
        self.release_from(id, is_unused);
    }

    /// Frees a block that nobody holds, and that is in no index: at once, or when nobody has it pinned any more.
    pub(super) fn free_unpinned(&mut self, id: BlockId) {
        match self.index.is_pinned(id) {
            true => self.limbo.push(id),
            false => self.free(id),
        }
    }

    /// Frees a block that nobody holds or has pinned, and that is in no index.
    #[inline]
    pub(super) fn free(&mut self, id: BlockId) {
        let block = self.blocks.remove(id.0 as usize);
        if block.private && !self.positions.is_empty() {
            self.positions.remove(&id);
        }
        self.free_removed(block);
    }

    /// As [`BlockStore::free`], of a block that is not among the others any more.
    #[inline]
    pub(super) fn free_removed(&mut self, block: Block) {
        if block.state == BlockState::Sealed {
            self.sealed_blocks -= 1;
        }
        self.charge(block.tenant, block.class, -1);
        self.free_slot(block.class, block.slot);
    }

    /// The block's slot may hold anything, another tenant's bytes included: a launch that was to overwrite it has failed.
    pub(super) fn spoil(&mut self, id: BlockId) {
        let slot = self.get(id).slot.id();
        self.pool.spoil(slot);
    }

    #[inline]
    pub(super) fn free_slot(&mut self, class: SizeClass, slot: FilledSlot) {
        self.pool.free(class, slot);
        self.unstall();
    }

    /// Slots may be had where there were none.
    #[inline]
    pub(super) fn unstall(&mut self) {
        (self.seal_stalled, self.recodable.stalled) = (false, false);
    }

    /// Whether something is free but for readers.
    pub(super) fn waits_for_readers(&self) -> bool {
        self.pool.quarantined() > 0 || !self.limbo.is_empty()
    }

    /// Frees slots that were freed under a reader's eyes and that nobody looks at any more.
    pub(super) fn reclaim(&mut self) {
        for id in std::mem::take(&mut self.limbo) {
            self.free_unpinned(id);
        }
        let before = self.pool.quarantined();
        if before > 0 {
            self.pool.reclaim();
            // What is still looked at makes no room to seal.
            if self.pool.quarantined() < before {
                self.unstall();
            }
        }
    }

    /// Blocks that were pinned are so no more: sealing may find one to evict.
    pub(super) fn pins_dropped(&mut self) {
        self.unstall();
    }

    /// Leaves the chunk that is being emptied to its class, with its vacancies.
    pub(super) fn stop_draining(&mut self) {
        if self.pool.draining_class().is_some() {
            self.pool.stop_draining();
            self.unstall();
        }
    }

    /// Writes have landed: blocks that had to stay where they were may be moved now.
    pub(super) fn resume_draining(&mut self) {
        if self.pool.draining_class() == Some(SizeClass::Raw) {
            self.seal_stalled = false;
        }
    }

    /// Token ids of a block, `block_tokens` of them.
    pub(super) fn token_ids(&self, id: BlockId) -> &[u32] {
        &self.token_ids[id.0 as usize * self.layout.block_tokens..][..self.layout.block_tokens]
    }

    pub(super) fn set_token_ids(&mut self, id: BlockId, at: usize, ids: &[u32]) {
        self.token_ids[id.0 as usize * self.layout.block_tokens + at..][..ids.len()].copy_from_slice(ids);
    }

    /// Tokens of `from` are copied to a block that is being made.
    pub(super) fn inherit_past(&mut self, from: BlockId, to: BlockId) {
        let past = self.get(from).been_through();
        let block = self.get_mut(to);
        block.past = block.past.max(past);
        self.publish(to);
    }

    pub(super) fn copy_token_ids(&mut self, from: BlockId, to: BlockId) {
        let from = from.0 as usize * self.layout.block_tokens;
        self.token_ids
            .copy_within(from..from + self.layout.block_tokens, to.0 as usize * self.layout.block_tokens);
    }

    /// Every token of the block is committed. It is sealed once it [leaves the window](Self::leaves_window) of its sequence.
    #[inline]
    pub(super) fn complete(&mut self, id: BlockId, counters: &mut CoreCounters) {
        let raw_is_sealed = self.sealed_format().is_raw();
        let block = self.get_mut(id);
        if raw_is_sealed {
            block.state = BlockState::Sealed;
            self.sealed_blocks += 1;
            counters.seals += 1;
            self.places.publish(id, self.get(id));
        } else {
            block.state = BlockState::Full;
        }
    }

    /// A full block is so far from the end of a sequence that it need not stay raw on its account.
    pub(super) fn leaves_window(&mut self, id: BlockId) {
        if id == BlockId::DROPPED {
            return;
        }
        let block = self.get(id);
        let is_sink = block.index < self.keep_raw.sinks;
        if block.state == BlockState::Full && !is_sink {
            self.to_seal.push_back(id);
        }
    }

    /// Opens a full raw block to writing again: tokens were cut off it.
    pub(super) fn reopen_raw(&mut self, id: BlockId) {
        // Whoever still has it pinned counts on what it holds.
        let is_pinned = self.index.is_pinned(id);
        let block = self.get_mut(id);
        block.rewound = true;
        if block.state == BlockState::Full && !block.published && !is_pinned {
            block.state = BlockState::Open;
            block.has_key = false;
        }
    }

    /// Whether a full block waits and a slot may be had for it.
    pub(super) fn wants_to_seal(&self) -> bool {
        !self.to_seal.is_empty() && !self.seal_stalled
    }

    /// Full blocks that wait to be sealed.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn to_seal(&self) -> usize {
        let waits = |id: &&BlockId| self.try_get(**id).is_some_and(|block| block.state == BlockState::Full);
        self.to_seal.iter().filter(waits).count()
    }

    /// Whether blocks are being sealed.
    pub(super) fn is_sealing(&self) -> bool {
        self.sealing > 0
    }

    /// Blocks that are being sealed, or wait for it, at most: a raw slot comes of each. None while the device does not carry seals out.
    pub(super) fn blocks_to_seal(&self) -> usize {
        if self.seals_fail { 0 } else { self.waiting_to_seal() }
    }

    fn waiting_to_seal(&self) -> usize {
        self.to_seal.len() + self.sealing
    }

    /// The next full block with a slot to seal it into.
    pub(super) fn next_seal(&mut self, counters: &mut CoreCounters) -> Option<SealPlan> {
        while let Some(&id) = self.to_seal.front() {
            let block = self.blocks.get(id.0 as usize);
            if block.is_none_or(|block| block.state != BlockState::Full) {
                self.to_seal.pop_front();
                continue;
            }
            if block.is_some_and(|block| block.moving_to.is_some()) {
                // It comes first again once it has landed.
                self.seal_stalled = true;
                return None;
            }
            let tenant = self.get(id).tenant;
            self.take_off(id);
            let Some(slot) = self.sealed_slot(tenant, counters) else {
                self.land(id, false);
                self.seal_stalled = true;
                counters.seal_stalls += 1;
                return None;
            };
            self.to_seal.pop_front();
            let from_offset = self.offset(id);
            let to_offset = self.pool.layout().offset_bytes(SizeClass::Sealed, slot.id());
            self.get_mut(id).state = BlockState::Sealing;
            self.sealing += 1;
            let (format, positions) = (self.sealed_format(), self.positions(id));
            return Some(SealPlan { block: id, slot, format, positions, from_offset, to_offset });
        }
        None
    }

    /// The next block to move out of the chunk that is being emptied, and where to. When sealing has stalled, a raw chunk is emptied for
    /// sealed slots.
    pub(super) fn next_move(&mut self, counters: &mut CoreCounters) -> Option<MovePlan> {
        if !self.pool.draining_class().is_some_and(SizeClass::is_sealed) {
            if self.to_seal.is_empty() || !self.seal_stalled {
                return None;
            }
            self.pool.start_draining(SizeClass::Raw);
        }
        let class = self.pool.draining_class()?;
        let movable = |&slot: &SlotId| {
            self.block_in(slot, class).is_some_and(|block| {
                !block.writing && block.moving_to.is_none() && block.state != BlockState::Sealing
            })
        };
        let from = self.pool.draining().find(movable)?;
        let id = self.owners[from.0 as usize];
        let tenant = self.get(id).tenant;
        let slot = match class {
            SizeClass::Raw => self.pool.take_raw(tenant)?.slot,
            _ => self.pool.take_vacancy(class, tenant)?,
        };
        counters.blocks_moved += 1;
        let from_offset = self.offset(id);
        let to_offset = self.pool.layout().offset_bytes(class, slot.id());
        self.get_mut(id).moving_to = Some(class);
        self.take_off(id);
        let sealed_bytes = (class != SizeClass::Raw).then(|| self.stored_bytes(id));
        Some(MovePlan { block: id, slot, from_offset, to_offset, sealed_bytes })
    }

    /// Takes back a move, and says whether the device carried it out.
    pub(super) fn land_move(&mut self, id: BlockId, slot: FilledSlot, moved: bool) {
        let block = self.get_mut(id);
        block.moving_to = None;
        let class = block.class;
        if moved {
            let old = std::mem::replace(&mut block.slot, slot);
            self.publish(id);
            self.free_slot(class, old);
        } else {
            self.pool.spoil(slot.id());
            self.free_slot(class, slot);
        }
        if class.is_sealed() {
            self.sealed_anew(id);
        }
        self.land(id, false);
    }

    /// Takes back a seal: `Some(finite)` if the device carried it out.
    pub(super) fn land_seal(
        &mut self,
        id: BlockId,
        slot: FilledSlot,
        sealed: Option<bool>,
        counters: &mut CoreCounters,
    ) {
        self.sealing -= 1;
        self.seals_fail = sealed.is_none();
        match sealed {
            Some(true) => {
                counters.seals += 1;
                self.sealed_blocks += 1;
                let block = self.get_mut(id);
                block.state = BlockState::Sealed;
                block.class = SizeClass::Sealed;
                let owner = block.tenant;
                let raw = std::mem::replace(&mut block.slot, slot);
                self.publish(id);
                self.free_slot(SizeClass::Raw, raw);
                self.charge(owner, SizeClass::Raw, -1);
                self.charge(owner, SizeClass::Sealed, 1);
                self.sealed_anew(id);
            }
            Some(false) => {
                // Appending checks every element, so memory has changed under us, or what keys are told apart from is no number: keep the raw bytes.
                counters.seal_failures += 1;
                self.get_mut(id).state = BlockState::Unsealable;
                self.publish(id);
                self.withdraw(id);
                self.get_mut(id).has_key = false;
                self.free_slot(SizeClass::Sealed, slot);
            }
            None => {
                counters.seal_failures += 1;
                self.get_mut(id).state = BlockState::Full;
                self.to_seal.push_back(id);
                self.pool.spoil(slot.id());
                self.free_slot(SizeClass::Sealed, slot);
            }
        }
        self.land(id, false);
    }

    /// Where a block is, as published.
    pub fn place(&self, id: BlockId) -> Option<Place> {
        self.places.get(id)
    }

    pub(super) fn gauges(&self, counters: &mut CoreCounters) {
        counters.blocks_total = self.pool.layout().raw_slots() as u64;
        counters.blocks_free = self.pool.raw_available() as u64;
        counters.blocks_used = self.blocks.len() as u64;
        counters.blocks_cached = self.evictor.unheld() as u64;
        counters.bytes_cached = self.ledger.cached_bytes();
        counters.blocks_sealed = self.sealed_blocks;
        counters.blocks_waiting_to_seal = self.waiting_to_seal() as u64;
        counters.slots_quarantined = self.pool.quarantined() as u64;
        counters.blocks_host = self.pool.used(SizeClass::Host) as u64;
        counters.blocks_colder =
            (self.pool.used(SizeClass::Colder) + self.pool.used(SizeClass::Coldest)) as u64;
        let in_slab = SizeClass::ALL.into_iter().filter(|class| *class != SizeClass::Host);
        let used = |class| (self.pool.used(class) * self.pool.layout().slot_bytes(class)) as u64;
        counters.bytes_used = in_slab.map(used).sum();
    }
}
