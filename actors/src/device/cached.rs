//! Blocks that are found by prompts: publishing them, keeping them while nobody holds them, and making room of them.
//!
//! A published block is in the prefix index and in the evictor, and its content is final. Its parent is published as well, and stays for
//! as long as it does: a prompt that finds it has found all before it.

use std::ops::Range;

use smallvec::SmallVec;

use super::blocks::BlockStore;
use crate::block::{Block, BlockId, BlockKey, BlockState};
use crate::error::Error;
use crate::events::BlockEvent;
use crate::eviction::{Retention, Touch};
use crate::index::{Lease, PrefixIndex};
use crate::limits::TenantLimits;
use crate::pool::{Pool, SizeClass};
use crate::sequence::RetentionHint;
use crate::slot::FilledSlot;
use crate::stats::CoreCounters;

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

/// Victims on the device that are left alone while one in host memory is looked for.
const VICTIMS_LOOKED_PAST_MAX: usize = 256;

/// Victims whose data is loaded at once.
const WARM_VICTIMS: usize = 16;

/// Blocks of a shard from which on that pays: what is known of fewer, some 300 bytes each, is in the processor's nearer caches.
pub(super) const WARM_BLOCKS_MIN: usize = 16_384;

/// Blocks that are looked at for one that matches in part.
const SIBLINGS_MAX: usize = 16;

/// Where a block comes from.
pub(super) struct Origin {
    /// The block before it.
    pub(super) parent: Option<BlockId>,
    /// Number of what it has in common with all blocks of its sequence.
    pub(super) root: u32,
    /// Some of its tokens have more identity than their ids.
    pub(super) has_extra: bool,
}

/// What can be done with a block that has just become full.
pub(super) enum Published {
    /// It is in the index now, or remains its sequence's alone.
    Itself,
    /// The same content is cached already: the sequence is to hold that block, and does.
    Twin(BlockId),
}

impl BlockStore {
    /// Gives a block its key that a sequence has just filled, and lets prompts find it.
    #[inline]
    pub(super) fn publish_key(
        &mut self,
        id: BlockId,
        key: &BlockKey,
        origin: Origin,
        touch: (u32, u32),
        counters: &mut CoreCounters,
    ) -> Published {
        let Origin { parent, root, has_extra } = origin;
        let touch = self.touched(touch);
        self.index.set_key(id, key);
        let block = self.get_mut(id);
        (block.has_key, block.has_extra) = (true, has_extra);
        let tenant = block.tenant;
        match self.index.find_or_vacancy(key) {
            Ok(twin) => return self.twin_found(id, twin, touch, counters),
            // Nobody would find it behind a parent that is not found.
            Err(_) if parent.is_some_and(|parent| !self.get(parent).published) => return Published::Itself,
            Err(vacancy) => self.index.insert_at(id, vacancy),
        }
        self.get_mut(id).published = true;
        let identity = u64::from_le_bytes(std::array::from_fn(|at| key.0[at]));
        self.evictor.insert(id, parent, identity, tenant, touch);
        self.lineage.insert(id, parent, root);
        if self.is_heard {
            self.tell_stored(id, parent, key);
        }
        Published::Itself
    }

    /// The content of a block that has just become full is cached already.
    fn twin_found(
        &mut self,
        id: BlockId,
        twin: BlockId,
        touch: Touch,
        counters: &mut CoreCounters,
    ) -> Published {
        // Somebody else who holds ours keeps it.
        if self.get(id).refs > 1 || self.get(twin).class == SizeClass::Host {
            return Published::Itself;
        }
        self.hold_cached(twin, touch);
        counters.blocks_deduplicated += 1;
        Published::Twin(twin)
    }

    /// The blocks of a leased prefix, in order. None if they have been withdrawn since.
    ///
    /// Pinned, the last is what it was, and those before it are there.
    pub(super) fn leased(&self, lease: &Lease) -> SmallVec<[BlockId; 6]> {
        let last = lease.last().filter(|&last| lease.shard() == self.shard && self.is_published(last));
        let before = last.into_iter().flat_map(|last| self.lineage.ancestors(last));
        let mut blocks: SmallVec<_> = last.into_iter().chain(before).collect();
        blocks.reverse();
        blocks
    }

    /// A prompt has found the block, or goes on where its lease ended: its sequence holds it from now on.
    #[inline]
    pub(super) fn hold_found(&mut self, id: BlockId, touch: (u32, u32)) {
        let touch = self.touched(touch);
        self.hold_cached(id, touch);
    }

    /// One more sequence holds a published block.
    #[inline]
    fn hold_cached(&mut self, id: BlockId, touch: Touch) {
        self.evictor.touch(id, touch);
        self.retain(id);
        if self.is_recoded() {
            self.found_again(id);
        }
    }

    /// `(blocks before it, blocks of the prompt)`, now.
    fn touched(&self, (depth, request_blocks): (u32, u32)) -> Touch {
        Touch { now_ms: self.now_ms, depth, request_blocks }
    }

    /// Whether prompts find the block.
    pub(super) fn is_published(&self, id: BlockId) -> bool {
        self.blocks.get(id.0 as usize).is_some_and(|block| block.published)
    }

    /// The block behind `parent` that begins with the most of `token_ids`, at least one, and how many, if its bytes can be copied as
    /// they are. Its tokens have no identity beside their ids.
    pub(super) fn find_partial(
        &self,
        parent: Option<BlockId>,
        root: u32,
        token_ids: &[u32],
    ) -> Option<(BlockId, usize)> {
        if !self.sealed_format().is_raw() {
            // Most are sealed: a decoded copy is its sequence's alone, and so is all that comes behind it.
            return None;
        }
        let in_common = |block: BlockId| {
            let pairs = self.token_ids(block).iter().zip(token_ids);
            (block, pairs.take_while(|(mine, wanted)| mine == wanted).count())
        };
        let children = self.lineage.children(parent, root).take(SIBLINGS_MAX);
        let plain =
            children.filter(|&block| !self.get(block).has_extra && self.get(block).class != SizeClass::Host);
        plain.map(in_common).filter(|(_, tokens)| *tokens > 0).max_by_key(|(_, tokens)| *tokens)
    }

    /// The number of a published block's root.
    pub(super) fn root(&self, id: BlockId) -> u32 {
        self.lineage.root(id)
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
            self.withdraw_all(|_, block| block == id);
        }
    }

    /// Withdraws every published block of which `which` is true. With a block go those behind it.
    pub(super) fn withdraw_all(&mut self, which: impl Fn(&Self, BlockId) -> bool) -> usize {
        let published = self.blocks.iter().filter(|(_, block)| block.published);
        let blocks: Vec<BlockId> = published.map(|(number, _)| BlockId(number as u32)).collect();
        let mut by_depth: Vec<_> = self.lineage.depths(&blocks).into_iter().zip(blocks).collect();
        by_depth.sort_unstable();
        let mut goes = vec![false; self.blocks.capacity()];
        for &(_, block) in &by_depth {
            let before = self.lineage.ancestors(block).next();
            let with_parent = before.is_some_and(|parent| goes[parent.0 as usize]);
            goes[block.0 as usize] = with_parent || which(self, block);
        }
        let mut chosen = 0;
        // Children first.
        for (_, block) in by_depth.into_iter().rev().filter(|(_, block)| goes[block.0 as usize]) {
            chosen += 1;
            self.index.hide(block);
            self.tell_removed(block);
            self.evictor.remove(block, self.now_ms);
            self.lineage.remove(block);
            let entry = self.get_mut(block);
            entry.published = false;
            let &mut Block { refs, tenant, class, .. } = entry;
            if refs == 0 {
                self.count_cached(tenant, class, -1);
                self.free_unpinned(block);
            }
        }
        chosen
    }

    fn tell(&mut self, event: BlockEvent) {
        if self.is_heard {
            self.events.push(event);
        }
    }

    fn tell_stored(&mut self, block: BlockId, parent: Option<BlockId>, key: &BlockKey) {
        let parent = parent.and_then(|parent| self.key(parent));
        let (shard, key, tier) = (self.shard, *key, self.get(block).class.tier());
        self.tell(BlockEvent::Stored { shard, key, parent, tier });
    }

    fn tell_removed(&mut self, block: BlockId) {
        if self.is_heard
            && let Some(key) = self.key(block)
        {
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

    /// Frees the block that is worth least to the device. False if none can go.
    #[inline]
    pub(super) fn evict_one(&mut self, counters: &mut CoreCounters) -> bool {
        let mut in_host = None;
        while let Some(victim) = self.evictor.victim(self.now_ms) {
            if self.get(victim).class == SizeClass::Host {
                in_host.get_or_insert(victim);
                self.evictor.pass(victim, self.now_ms);
            } else if self.try_evict(victim, counters) {
                return true;
            }
        }
        // It takes none of the device's memory, but what comes before it may, and cannot go before it.
        in_host.is_some_and(|victim| self.try_evict(victim, counters))
    }

    /// Frees a block for an owner who wants so many raw slots: one of his own if it is his quota that he lacks. False if none can go.
    pub(super) fn evict_one_for(&mut self, owner: u32, wanted: usize, counters: &mut CoreCounters) -> bool {
        let within_quota = self.beyond_quota(owner, wanted).is_none();
        within_quota && self.evict_one(counters) || self.evict_one_of(owner, counters)
    }

    /// Evicts one of an owner's, protected or not. False if there is none, or somebody has just pinned it.
    fn evict_one_of(&mut self, owner: u32, counters: &mut CoreCounters) -> bool {
        let victim = self.evictor.victim_of(owner, self.now_ms);
        victim.is_some_and(|victim| self.try_evict(victim, counters))
    }

    /// Counts the bytes of an owner's block that nobody holds as evictable (1), or no more (-1).
    #[inline]
    pub(super) fn count_cached(&mut self, owner: u32, class: SizeClass, sign: i64) {
        if class != SizeClass::Host {
            self.ledger.change_cached(owner, sign * self.pool.slot_bytes(class) as i64);
        }
    }

    /// Loads what publishing blocks under these keys will need.
    pub(super) fn warm(&self, keys: &[BlockKey]) {
        keys.iter().for_each(|key| self.index.warm(key));
    }

    /// Loads what evicting this block and those that come after it will need, all of it at once. They mostly come one after the other, and
    /// each waits for what it needs, since others see what becomes of it in a certain order.
    fn warm_victims(&mut self, victim: BlockId) {
        let (mut victims, mut count) = ([victim; WARM_VICTIMS], 1);
        for (place, after) in victims[1..].iter_mut().zip(self.evictor.likely_after(victim)) {
            *place = after;
            count += 1;
        }
        let victims = &victims[..count];
        self.index.warm_removals(victims);
        let slot = |block: &BlockId| self.blocks.get(block.0 as usize).map(|block| block.slot.id());
        let of_slots = victims.iter().filter_map(slot).map(|slot| self.pool.warm(slot));
        std::hint::black_box(of_slots.fold(0, |all, slot| all | slot));
        std::hint::black_box(
            victims.iter().map(|block| self.lineage.root(*block)).fold(0, |all, root| all | root),
        );
        self.victims_warmed = victims.len();
    }

    /// Evicts a victim, unless somebody has just pinned it.
    #[inline]
    fn try_evict(&mut self, victim: BlockId, counters: &mut CoreCounters) -> bool {
        if self.warms_victims {
            if self.victims_warmed == 0 {
                self.warm_victims(victim);
            }
            self.victims_warmed -= 1;
        }
        let free = self.index.try_remove(victim);
        if free {
            self.tell_removed(victim);
            self.evictor.remove(victim, self.now_ms);
            self.lineage.remove(victim);
            let block = self.blocks.remove(victim.0 as usize);
            self.count_cached(block.tenant, block.class, -1);
            self.free_removed(block);
            counters.evictions += 1;
        } else {
            self.evictor.pass(victim, self.now_ms);
        }
        free
    }

    /// A new owner, with the next number.
    pub(super) fn open_owner(&mut self, number: u32, limits: TenantLimits) {
        let is_protected = self.ledger.open(limits);
        if is_protected {
            self.evictor.protect(number, true);
        }
        if limits.quota_bytes.is_some() || is_protected {
            self.evictor.order(number);
        }
    }

    /// Counts `slots` more slots of this class as its owner's. What lies in host memory counts as nothing.
    #[inline]
    pub(super) fn charge(&mut self, owner: u32, class: SizeClass, slots: i64) {
        if class == SizeClass::Host || slots == 0 {
            return;
        }
        let bytes = slots * self.pool.slot_bytes(class) as i64;
        if let Some(protected) = self.ledger.change(owner, bytes) {
            self.evictor.protect(owner, protected);
            if !protected {
                self.unstall();
            }
        }
    }

    /// Bytes that an owner's blocks take too many for him to have so many raw slots more.
    fn missing_of_quota_bytes(&self, owner: u32, wanted: usize) -> u64 {
        let needed = (wanted * self.pool.layout().raw_slot_bytes) as u64;
        let quota = self.ledger.quota_bytes(owner).unwrap_or(u64::MAX);
        (self.ledger.used_bytes(owner) + needed).saturating_sub(quota)
    }

    /// Why an owner may not have so many raw slots more, if it is his quota.
    pub(super) fn beyond_quota(&self, owner: u32, wanted: usize) -> Option<Error> {
        let needed_bytes = (wanted * self.pool.layout().raw_slot_bytes) as u64;
        let quota_bytes = self.ledger.quota_bytes(owner)?;
        let used_bytes = self.ledger.used_bytes(owner);
        let beyond = self.ledger.quota_left_bytes(owner)? < needed_bytes;
        beyond.then_some(Error::TenantQuota { needed_bytes, used_bytes, quota_bytes })
    }

    /// Raw slots that are to be vacant for an owner to have `wanted`: what is promised to others stays.
    pub(super) fn with_promises(&self, owner: u32, wanted: usize) -> usize {
        let raw_slot = self.pool.layout().raw_slot_bytes as u64;
        wanted + self.ledger.promised_to_others_bytes(owner).div_ceil(raw_slot) as usize
    }

    /// Whether an owner can have so many raw slots as things are.
    pub(super) fn has_room(&mut self, owner: u32, wanted: usize) -> bool {
        let to_be_vacant = self.with_promises(owner, wanted);
        wanted == 0
            || self.raw_available(to_be_vacant) >= to_be_vacant && self.beyond_quota(owner, wanted).is_none()
    }

    /// Bytes of slots that may be free for an owner once all has gone that may: of what sequences hold a part becomes free, at most all of it.
    fn freeable_bytes(&self, owner: u32) -> u64 {
        match self.may_make_room() {
            true => self.ledger.cached_bytes().max(self.pool.sealed_bytes()),
            false => self.ledger.evictable_bytes(owner),
        }
    }

    /// Whether an owner who lacks so many raw slots may have them once full blocks have been sealed that wait for it, or are about to be.
    pub(super) fn seals_may_suffice(&mut self, owner: u32, wanted: usize) -> bool {
        let from_seals = self.blocks_to_seal();
        let to_be_vacant = self.with_promises(owner, wanted);
        from_seals > 0
            && self.beyond_quota(owner, wanted).is_none()
            && to_be_vacant <= self.pool.raw_available_without(self.freeable_bytes(owner)) + from_seals
    }

    /// Sees to it that an owner can have `wanted` raw slots, at the cost of what nobody holds.
    ///
    /// For his quota his own blocks are re-encoded, and then go.
    ///
    /// Cached blocks mostly lie in sealed slots. Enough of them are re-encoded to a smaller format, or go, to empty a chunk, and what is left in
    /// the emptiest one moves over into the others: with [`Room::Soon`] it is for the caller to launch these moves ([`BlockStore::next_move`]).
    pub(super) fn make_room(&mut self, owner: u32, wanted: usize, counters: &mut CoreCounters) -> Room {
        if self.has_room(owner, wanted) {
            return Room::Now;
        }
        // What cannot be done evicts nothing.
        let raw_slot = self.pool.layout().raw_slot_bytes as u64;
        if let Some(left) = self.ledger.quota_left_bytes(owner)
            && wanted as u64 * raw_slot > left + self.ledger.cached_bytes_of(owner)
        {
            // What flights hold may be cached when they have landed, and is smaller then.
            let fits = self.ledger.quota_bytes(owner).is_none_or(|quota| wanted as u64 * raw_slot <= quota);
            return if fits && self.ledger.flights_of(owner) > 0 { Room::Soon } else { Room::Never };
        }
        let to_be_vacant = self.with_promises(owner, wanted);
        let nothing_goes = self.evictor.unheld() == 0
            && !self.may_make_room()
            && !self.pool.draining_class().is_some_and(SizeClass::is_sealed);
        if nothing_goes || to_be_vacant > self.pool.raw_available_without(self.freeable_bytes(owner)) {
            return Room::Never;
        }
        while self.beyond_quota(owner, wanted).is_some() {
            if self.recode_for_quota(owner, self.missing_of_quota_bytes(owner, wanted)) {
                return Room::Soon;
            }
            match self.evictor.victim_of(owner, self.now_ms) {
                Some(victim) => self.try_evict(victim, counters),
                None if self.ledger.flights_of(owner) > 0 => return Room::Soon,
                None => return Room::Never,
            };
        }
        // Chunks change class here, and sealing may find what it lacked.
        self.seal_stalled = false;
        loop {
            if self.pool.draining_class().is_some_and(SizeClass::is_sealed) {
                if !self.pool.draining_waits_for_readers() {
                    return Room::Soon;
                }
                // Nobody knows for how long: another chunk, then.
                self.stop_draining();
            } else if self.evictor.unheld() > 0 {
                // A raw chunk that is being emptied takes the slots away that are looked for.
                self.stop_draining();
            }
            if self.pool.raw_available() >= to_be_vacant {
                return Room::Now;
            }
            if self.start_draining_sealed() {
                continue;
            }
            if self.recode_for_room(false, counters) {
                return Room::Soon;
            }
            // His own are not protected from himself.
            if !self.evict_one(counters) && !self.evict_one_of(owner, counters) {
                // What has made way for others to be re-encoded may do.
                return if self.pool.raw_available() >= to_be_vacant { Room::Now } else { Room::Never };
            }
        }
    }

    /// Tells the evictor what a sequence's owner knows of a published block whose first token is at `position`.
    pub(super) fn set_retention(
        &mut self,
        id: BlockId,
        hints: &[(Range<u32>, RetentionHint)],
        position: u32,
    ) {
        let Some((_, hint)) = hints.iter().find(|(positions, _)| positions.contains(&position)) else {
            return;
        };
        if self.is_published(id) {
            let until_ms = hint.ttl_ms.map(|ttl| self.now_ms.saturating_add(ttl));
            let RetentionHint { priority, decay, .. } = *hint;
            self.evictor.set_retention(id, Retention { priority, until_ms, decay });
        }
    }

    /// Whether flights will make slots of the chunk vacant that is being emptied, or fill them with blocks that can be moved.
    pub(super) fn draining_is_under_way(&self) -> bool {
        let Some(class) = self.pool.draining_class() else { return false };
        self.pool.draining().filter(|slot| !self.pool.is_quarantined(*slot)).any(|slot| {
            let block = self.block_in(slot, class);
            // None yet: what is sealed or moved into it lands.
            block.is_none_or(|block| block.moving_to.is_some() || block.state == BlockState::Sealing)
        })
    }

    /// Makes room for `wanted` blocks in the host tier, at the cost of cached blocks that lie there.
    pub(super) fn make_host_room(&mut self, wanted: usize, counters: &mut CoreCounters) {
        let mut looked_past = 0;
        while self.pool.host_available() < wanted && looked_past < VICTIMS_LOOKED_PAST_MAX {
            let Some(victim) = self.evictor.victim(self.now_ms) else { return };
            if self.get(victim).class == SizeClass::Host {
                looked_past += usize::from(!self.try_evict(victim, counters));
            } else {
                self.evictor.pass(victim, self.now_ms);
                looked_past += 1;
            }
        }
    }

    /// A slot to seal into. What is cached makes way for it before raw slots do, so that a write finds some.
    pub(super) fn sealed_slot(&mut self, tenant: u32, counters: &mut CoreCounters) -> Option<FilledSlot> {
        let chunk = self.pool.layout().slots_per_chunk(SizeClass::Raw);
        let kept_raw = self.pool.layout().raw_slots() / 32 + chunk;
        let spares_chunk = |pool: &Pool| pool.raw_available() >= kept_raw && pool.has_vacant_chunk();
        while !self.pool.has_vacancy(SizeClass::Sealed) && !spares_chunk(&self.pool) {
            let is_coming = self.recode_for_room(false, counters);
            if self.pool.has_vacancy(SizeClass::Sealed) {
                // Of a chunk that is being emptied no more.
                break;
            }
            if is_coming {
                return None;
            }
            if !self.evict_one(counters) {
                break;
            }
        }
        self.pool.take_sealed(SizeClass::Sealed, tenant)
    }
}
