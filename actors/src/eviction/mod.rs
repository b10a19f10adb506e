//! Eviction: which cached block goes first when room is needed.
//!
//! The [`Evictor`] knows the forest of cached blocks, who of them is held, and asks a policy to rank the *candidates*:
//! blocks that nobody holds and that no cached block continues. So a child never outlives its parent, whatever the policy
//! says. One file a policy; a policy sees candidates come and go, and names the first to evict.
//!
//! Nothing here knows keys, slots or bytes. No clock, no random numbers, no hash maps: the same calls give the same victims.
//!
//! Every block comes through here several times. What few of them need, hints and reserves and readers in the way, is in functions that are not
//! inlined, so that the others pass by with a look at a flag.

mod auto;
mod lfu;
mod lru;
mod queue;
mod ranking;
mod retention;
mod slru;
mod tenants;

pub use retention::Retention;

use ranking::Ranking;
use retention::Kept;
use tenants::Tenants;

use crate::block::BlockId;

/// Which block goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EvictionPolicy {
    /// Learns from hits and misses what to keep.
    #[default]
    Auto,
    /// The block that was let go of longest ago.
    Lru,
    /// The block that is used least often; old uses count for less.
    Lfu,
    /// Least recently used, but blocks that were used again go after those that never were.
    Slru,
}

/// Where a block stands in the request that touches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// The time, in milliseconds. Only differences count; time that goes backwards counts as standing still.
    pub now_ms: u64,
    /// Blocks before it.
    pub depth: u32,
    /// Blocks of the request's prompt, known when it opens. Generated blocks have a depth that is not less.
    pub request_blocks: u32,
}

/// No block.
const NONE: u32 = u32::MAX;

const CACHED: u8 = 1;
const HELD: u8 = 2;
/// Named as victim, but somebody was reading it: set aside for a while.
const PASSED: u8 = 4;
/// Has a priority of its own: ordered by it, not by the policy.
const KEPT: u8 = 8;
/// A candidate of a protected tenant that has come up as victim: out of the ranking.
const PARKED: u8 = 16;

/// Parked blocks that go back to the ranking per victim.
const RETURNS: usize = 4;

/// What is known of a cached block, whatever the policy. Aligned, so that none lies across two cache lines.
#[derive(Debug, Clone)]
#[repr(align(32))]
struct Node {
    /// Its neighbours in the one list that it is in, or (in `prev`) its place in the one heap.
    prev: u32,
    next: u32,
    parent: u32,
    /// Cached blocks that continue it.
    children: u32,
    /// When it was last let go of, counted in uses of any block: no two blocks share one.
    used: u64,
    /// Index of its tenant.
    tenant: u32,
    flags: u8,
    /// The policy's own: which of its lists the block is in.
    list: u8,
}

const VACANT: Node =
    Node { prev: NONE, next: NONE, parent: NONE, children: 0, used: 0, tenant: 0, flags: 0, list: 0 };

impl Node {
    /// Whether one of these flags is set.
    fn is(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// Not held, and no cached block continues it.
    fn is_candidate(&self) -> bool {
        self.flags & (CACHED | HELD) == CACHED && self.children == 0
    }
}

/// The cached blocks of a shard, and the order in which they are evicted.
#[derive(Debug)]
pub struct Evictor {
    nodes: Vec<Node>,
    ranking: Ranking,
    kept: Kept,
    tenants: Tenants,
    /// Victims that could not go. None of them is in the ranking.
    passed: queue::List,
    /// Uses so far.
    uses: u64,
    /// The latest time heard of.
    now_ms: u64,
    cached: usize,
    unheld: usize,
}

impl Evictor {
    /// An evictor for blocks with numbers below `blocks`, none of them cached.
    pub fn new(policy: EvictionPolicy, blocks: usize) -> Self {
        Evictor {
            nodes: vec![VACANT; blocks],
            ranking: Ranking::new(policy, blocks),
            passed: queue::List::default(),
            kept: Kept::default(),
            tenants: Tenants::new(blocks),
            uses: 0,
            now_ms: 0,
            cached: 0,
            unheld: 0,
        }
    }

    /// How many blocks the cache holds at most; bounds what is remembered of evicted ones.
    pub fn set_capacity(&mut self, blocks: usize) {
        self.ranking.set_capacity(&mut self.nodes, blocks);
    }

    /// A block is cached from now on, held by the sequence that made it. `identity` is the same whenever the same content is
    /// cached again. A parent that is not cached counts as none.
    #[inline]
    pub fn insert(
        &mut self,
        block: BlockId,
        parent: Option<BlockId>,
        identity: u64,
        tenant: u32,
        touch: Touch,
    ) {
        debug_assert!(!self.contains(block), "a block is cached once");
        self.advance(touch.now_ms);
        let parent = parent.filter(|parent| *parent != block && self.contains(*parent));
        if let Some(parent) = parent {
            self.leave(parent.0);
            self.nodes[parent.0 as usize].children += 1;
        }
        self.uses += 1;
        let tenant = self.tenants.inserted(tenant);
        self.nodes[block.0 as usize] = Node {
            tenant,
            parent: parent.map_or(NONE, |parent| parent.0),
            flags: CACHED | HELD,
            used: self.uses,
            ..VACANT
        };
        self.cached += 1;
        self.ranking.inserted(&self.nodes, block.0, identity, touch);
    }

    /// A request has matched the block.
    #[inline]
    pub fn touch(&mut self, block: BlockId, touch: Touch) {
        debug_assert!(self.contains(block));
        self.advance(touch.now_ms);
        self.ranking.touched(block.0, touch);
    }

    /// Nobody held the block, now somebody does.
    #[inline]
    pub fn hold(&mut self, block: BlockId) {
        debug_assert!(self.contains(block) && !self.nodes[block.0 as usize].is(HELD));
        self.leave(block.0);
        self.nodes[block.0 as usize].flags |= HELD;
        self.unheld -= 1;
    }

    /// The last holder of the block has let go. Best called for the blocks of a sequence from its end to its start.
    #[inline]
    pub fn release(&mut self, block: BlockId, now_ms: u64) {
        self.uses += 1;
        self.nodes[block.0 as usize].used = self.uses;
        self.put_back(block, now_ms);
    }

    /// As [`Evictor::release`], of a block that nobody has used meanwhile.
    #[inline]
    pub fn put_back(&mut self, block: BlockId, now_ms: u64) {
        debug_assert!(self.contains(block) && self.nodes[block.0 as usize].is(HELD));
        self.advance(now_ms);
        let node = &mut self.nodes[block.0 as usize];
        node.flags &= !HELD;
        self.unheld += 1;
        if node.is_candidate() {
            self.enter(block.0);
        }
    }

    /// How long the block should stay compared to others, until it is removed or told otherwise. A child still never
    /// outlives its parent: what continues a block goes before it.
    pub fn set_retention(&mut self, block: BlockId, retention: Retention) {
        debug_assert!(self.contains(block));
        let now_ms = self.now_ms;
        self.prioritize(block.0, |kept| kept.set(block.0, retention, now_ms));
    }

    /// Whether the tenant is at or under its reserve: [`Evictor::victim`] names none of its blocks, [`Evictor::victim_of`] does.
    pub fn protect(&mut self, tenant: u32, is_protected: bool) {
        self.tenants.protect(tenant, is_protected);
    }

    /// Blocks of this tenant will have to go for each other: [`Evictor::victim_of`] will ask for them. Best said before it has any.
    pub fn order(&mut self, tenant: u32) {
        self.tenants.order(&self.nodes, tenant);
    }

    /// The block to evict next: nobody holds it and no cached block continues it. It stays where it is until
    /// [`Evictor::remove`]. None if there is no such block, or all of them are of protected tenants or have been
    /// [passed](Evictor::pass) in turn.
    #[inline]
    pub fn victim(&mut self, now_ms: u64) -> Option<BlockId> {
        self.advance(now_ms);
        while let Some(block) = self.kept.due(self.now_ms) {
            let now_ms = self.now_ms;
            self.prioritize(block, |kept| kept.change(block, now_ms));
        }
        for _ in 0..RETURNS {
            if !self.unpark() {
                break;
            }
        }
        self.unprotected().or_else(|| self.last_resort()).map(BlockId)
    }

    /// A victim where the ranking names none.
    #[cold]
    fn last_resort(&mut self) -> Option<u32> {
        while self.unpark() {}
        let victim = self.unprotected();
        if victim.is_none() {
            // The caller stops here; whoever asks next may find them free to go.
            while self.recall() {}
        }
        victim
    }

    /// Blocks that will most often come up as victims when this one has gone, one after the other: its parent, if nothing else continues
    /// that, or else the candidate behind it.
    #[inline]
    pub fn likely_after(&self, victim: BlockId) -> impl Iterator<Item = BlockId> {
        // Some orders are taken from their end.
        let is_last = self.nodes[victim.0 as usize].next == NONE;
        let (mut block, mut listed) = (victim.0, victim.0);
        std::iter::from_fn(move || {
            let parent = self.nodes[block as usize].parent;
            block = if parent != NONE && self.nodes[parent as usize].children == 1 {
                parent
            } else {
                let Node { prev, next, .. } = self.nodes[listed as usize];
                listed = if is_last { prev } else { next };
                listed
            };
            // Links of blocks that are in no list mean something else.
            ((block as usize) < self.nodes.len()).then_some(BlockId(block))
        })
        .fuse()
    }

    /// The block of the tenant to evict next, protected or not: the one that was let go of longest ago.
    pub fn victim_of(&mut self, tenant: u32, now_ms: u64) -> Option<BlockId> {
        self.advance(now_ms);
        self.order(tenant);
        let victim = self.tenants.first(tenant);
        if victim.is_none() {
            while self.recall() {}
        }
        victim.map(BlockId)
    }

    /// The victim cannot go now, since somebody has just begun to read it: others are named first. It comes back when a block
    /// or two have gone, or when there are no others.
    pub fn pass(&mut self, block: BlockId, now_ms: u64) {
        self.advance(now_ms);
        let node = &self.nodes[block.0 as usize];
        if node.is_candidate() && !node.is(PASSED) {
            self.leave(block.0);
            self.nodes[block.0 as usize].flags |= PASSED;
            self.passed.push_back(&mut self.nodes, block.0);
        }
    }

    /// The block is evicted, or freed. No cached block continues it.
    #[inline]
    pub fn remove(&mut self, block: BlockId, now_ms: u64) {
        debug_assert!(self.contains(block) && self.nodes[block.0 as usize].children == 0);
        self.advance(now_ms);
        self.leave(block.0);
        self.ranking.removed(block.0);
        let node = &mut self.nodes[block.0 as usize];
        let (parent, tenant, is_kept, is_held) = (node.parent, node.tenant, node.is(KEPT), node.is(HELD));
        *node = VACANT;
        self.tenants.removed(tenant);
        if is_kept {
            self.kept.removed(block.0);
        }
        self.cached -= 1;
        self.unheld -= usize::from(!is_held);
        if parent != NONE {
            let node = &mut self.nodes[parent as usize];
            node.children -= 1;
            if node.is_candidate() {
                self.enter(parent);
            }
        }
        self.recall();
    }

    /// Whether the block is cached.
    pub fn contains(&self, block: BlockId) -> bool {
        self.nodes.get(block.0 as usize).is_some_and(|node| node.is(CACHED))
    }

    /// Cached blocks.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Cached blocks that nobody holds. All of them can be evicted, leaves first, unless a block in use continues them.
    pub fn unheld(&self) -> usize {
        self.unheld
    }

    /// Bytes of metadata, but for retention hints and the heap of candidates that come late.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        size_of_val(&self.nodes[..]) + self.tenants.bytes() + self.ranking.bytes()
    }

    fn advance(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
    }

    /// Ranks a block that has become a candidate.
    #[inline]
    fn enter(&mut self, block: u32) {
        self.tenants.enter(&self.nodes, block);
        self.rank(block);
    }

    #[inline]
    fn rank(&mut self, block: u32) {
        match self.nodes[block as usize].is(KEPT) {
            true => self.kept.enter(&mut self.nodes, block),
            false => self.ranking.enter(&mut self.nodes, block),
        }
    }

    #[inline]
    fn unrank(&mut self, block: u32) {
        match self.nodes[block as usize].is(PARKED | KEPT) {
            true => self.unrank_special(block),
            false => self.ranking.leave(&mut self.nodes, block),
        }
    }

    /// As [`Evictor::unrank`], of a candidate that is not in the ranking.
    #[inline(never)]
    fn unrank_special(&mut self, block: u32) {
        let node = &mut self.nodes[block as usize];
        if node.is(PARKED) {
            node.flags &= !PARKED;
            self.tenants.unpark(&mut self.nodes, block);
        } else {
            self.kept.leave(&mut self.nodes, block);
        }
    }

    /// Takes a block out of whatever order it is in, if it is a candidate.
    #[inline]
    fn leave(&mut self, block: u32) {
        if self.nodes[block as usize].is_candidate() {
            self.leave_order(block);
        }
    }

    #[inline(never)]
    fn leave_order(&mut self, block: u32) {
        match self.nodes[block as usize].is(PASSED) {
            true => self.leave_passed(block),
            false => {
                self.unrank(block);
                self.tenants.leave(&self.nodes, block);
            }
        }
    }

    #[inline(never)]
    fn leave_passed(&mut self, block: u32) {
        self.nodes[block as usize].flags &= !PASSED;
        self.passed.remove(&mut self.nodes, block);
    }

    /// Changes the priority of a block; the change says whether it has one of its own.
    fn prioritize(&mut self, block: u32, change: impl FnOnce(&mut Kept) -> bool) {
        let is_ranked = {
            let node = &self.nodes[block as usize];
            node.is_candidate() && !node.is(PASSED)
        };
        if is_ranked {
            self.unrank(block);
        }
        let is_kept = change(&mut self.kept);
        let node = &mut self.nodes[block as usize];
        node.flags = if is_kept { node.flags | KEPT } else { node.flags & !KEPT };
        if is_ranked {
            self.rank(block);
        }
    }

    /// The first to go that is not of a protected tenant; parks those that are.
    #[inline]
    fn unprotected(&mut self) -> Option<u32> {
        loop {
            let block = match self.kept.first() {
                Some((true, block)) => block,
                kept => self.ranking.first(&mut self.nodes).or(kept.map(|(_, block)| block))?,
            };
            if !self.tenants.is_protected(&self.nodes, block) {
                return Some(block);
            }
            self.park(block);
        }
    }

    #[inline(never)]
    fn park(&mut self, block: u32) {
        self.unrank(block);
        self.nodes[block as usize].flags |= PARKED;
        self.tenants.park(&mut self.nodes, block);
    }

    /// Ranks a parked block again. False if there is none that may go.
    #[inline]
    fn unpark(&mut self) -> bool {
        self.tenants.are_returning() && self.unpark_one()
    }

    #[inline(never)]
    fn unpark_one(&mut self) -> bool {
        let Some(block) = self.tenants.returning(&mut self.nodes) else { return false };
        self.nodes[block as usize].flags &= !PARKED;
        self.rank(block);
        true
    }

    /// Ranks the block that was passed longest ago again. False if there is none.
    #[inline]
    fn recall(&mut self) -> bool {
        self.passed.front().is_some_and(|block| self.recall_one(block))
    }

    #[inline(never)]
    fn recall_one(&mut self, block: u32) -> bool {
        self.leave_passed(block);
        self.enter(block);
        true
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod model;
#[cfg(all(test, not(any(loom, shuttle))))]
mod replay;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
