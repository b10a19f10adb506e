//! Eviction: which cached block goes first when room is needed.
//!
//! The [`Evictor`] knows the forest of cached blocks, who of them is held, and asks a policy to rank the *candidates*:
//! blocks that nobody holds and that no cached block continues. So a child never outlives its parent, whatever the policy
//! says. One file a policy; a policy sees candidates come and go, and names the first to evict.
//!
//! Nothing here knows keys, slots or bytes. No clock, no random numbers, no hash maps: the same calls give the same victims.

mod lru;
mod queue;

use lru::Lru;

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

/// What is known of a cached block, whatever the policy.
#[derive(Debug, Clone)]
struct Node {
    /// Its neighbours in the one list that it is in, or (in `prev`) its place in the one heap.
    prev: u32,
    next: u32,
    parent: u32,
    /// Cached blocks that continue it.
    children: u32,
    /// When it was last let go of, counted in uses of any block: no two blocks share one.
    used: u64,
    flags: u8,
    /// The policy's own: which of its lists the block is in.
    list: u8,
}

const VACANT: Node = Node { prev: NONE, next: NONE, parent: NONE, children: 0, used: 0, flags: 0, list: 0 };

impl Node {
    fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
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
    ranking: Lru,
    /// Victims that could not go. None of them is in the ranking.
    passed: queue::List,
    /// Uses so far.
    uses: u64,
    cached: usize,
    unheld: usize,
}

impl Evictor {
    /// An evictor for blocks with numbers below `blocks`, none of them cached.
    pub fn new(policy: EvictionPolicy, blocks: usize) -> Self {
        let _ = policy;
        Evictor {
            nodes: vec![VACANT; blocks],
            ranking: Lru::default(),
            passed: queue::List::default(),
            uses: 0,
            cached: 0,
            unheld: 0,
        }
    }

    /// How many blocks the cache holds at most; bounds what is remembered of evicted ones.
    pub fn set_capacity(&mut self, blocks: usize) {
        let _ = blocks;
    }

    /// A block is cached from now on, held by the sequence that made it. `identity` is the same whenever the same content is
    /// cached again. A parent that is not cached counts as none.
    pub fn insert(&mut self, block: BlockId, parent: Option<BlockId>, identity: u64, touch: Touch) {
        debug_assert!(!self.contains(block), "a block is cached once");
        let _ = (identity, touch);
        let parent = parent.filter(|parent| *parent != block && self.contains(*parent));
        if let Some(parent) = parent {
            self.leave(parent.0);
            self.nodes[parent.0 as usize].children += 1;
        }
        self.uses += 1;
        self.nodes[block.0 as usize] = Node {
            parent: parent.map_or(NONE, |parent| parent.0),
            flags: CACHED | HELD,
            used: self.uses,
            ..VACANT
        };
        self.cached += 1;
    }

    /// A request has matched the block.
    pub fn touch(&mut self, block: BlockId, touch: Touch) {
        let _ = (block, touch);
    }

    /// Nobody held the block, now somebody does.
    pub fn hold(&mut self, block: BlockId) {
        debug_assert!(self.contains(block) && !self.nodes[block.0 as usize].is(HELD));
        self.leave(block.0);
        self.nodes[block.0 as usize].flags |= HELD;
        self.unheld -= 1;
    }

    /// The last holder of the block has let go. Best called for the blocks of a sequence from its end to its start.
    pub fn release(&mut self, block: BlockId, now_ms: u64) {
        debug_assert!(self.contains(block) && self.nodes[block.0 as usize].is(HELD));
        let _ = now_ms;
        self.uses += 1;
        let node = &mut self.nodes[block.0 as usize];
        node.flags &= !HELD;
        node.used = self.uses;
        self.unheld += 1;
        if node.is_candidate() {
            self.ranking.enter(&mut self.nodes, block.0);
        }
    }

    /// The block to evict next: nobody holds it and no cached block continues it. It stays where it is until
    /// [`Evictor::remove`]. None if there is no such block, or all of them have been [passed](Evictor::pass) in turn.
    pub fn victim(&mut self, now_ms: u64) -> Option<BlockId> {
        let _ = now_ms;
        let first = self.ranking.first(&self.nodes).map(BlockId);
        if first.is_none() {
            // The caller stops here; whoever asks next may find them free to go.
            while self.recall() {}
        }
        first
    }

    /// The victim cannot go now, since somebody has just begun to read it: others are named first. It comes back when a block
    /// or two have gone, or when there are no others.
    pub fn pass(&mut self, block: BlockId, now_ms: u64) {
        let _ = now_ms;
        let node = &self.nodes[block.0 as usize];
        if node.is_candidate() && !node.is(PASSED) {
            self.leave(block.0);
            self.nodes[block.0 as usize].flags |= PASSED;
            self.passed.push_back(&mut self.nodes, block.0);
        }
    }

    /// The block is evicted, or freed. No cached block continues it.
    pub fn remove(&mut self, block: BlockId, now_ms: u64) {
        let _ = now_ms;
        debug_assert!(self.contains(block) && self.nodes[block.0 as usize].children == 0);
        self.leave(block.0);
        let node = std::mem::replace(&mut self.nodes[block.0 as usize], VACANT);
        self.cached -= 1;
        self.unheld -= usize::from(!node.is(HELD));
        if node.parent != NONE {
            let parent = &mut self.nodes[node.parent as usize];
            parent.children -= 1;
            if parent.is_candidate() {
                self.ranking.enter(&mut self.nodes, node.parent);
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

    /// Takes a candidate out of whatever order it is in.
    fn leave(&mut self, block: u32) {
        let node = &mut self.nodes[block as usize];
        if node.is(PASSED) {
            node.flags &= !PASSED;
            self.passed.remove(&mut self.nodes, block);
        } else if node.is_candidate() {
            self.ranking.leave(&mut self.nodes, block);
        }
    }

    /// Ranks the block that was passed longest ago again. False if there is none.
    fn recall(&mut self) -> bool {
        let Some(block) = self.passed.pop_front(&mut self.nodes) else { return false };
        self.nodes[block as usize].flags &= !PASSED;
        self.ranking.enter(&mut self.nodes, block);
        true
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
