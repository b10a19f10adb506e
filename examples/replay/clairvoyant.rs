//! Eviction with the future known (Belady 1966), under the rules that a prefix cache has.
//!
//! Every block that is asked for is inserted, held blocks stay, and a child never outlives its parent: so of the blocks that
//! are neither held nor have a cached child, the one that is used again last goes. A parent is used no later than its
//! children, so that the rule about children rarely stands in the way.

use std::collections::{BTreeSet, HashMap};

use kv_cache_actors::block::BlockKey;

use crate::driver::Driver;
use crate::workload::Planned;

/// Stands for a next request that does not come.
const NEVER: u32 = u32::MAX;

/// A distinct block of the workload, cached or not.
#[derive(Debug, Default)]
struct Block {
    cached: bool,
    /// The block before it; none for the first of a prompt.
    parent: Option<u32>,
    /// Children that are cached.
    children: u32,
    /// Numbers of the requests to come that use it, the next one last.
    uses: Vec<u32>,
}

impl Block {
    fn next_use(&self) -> u32 {
        self.uses.last().copied().unwrap_or(NEVER)
    }
}

/// A cache of `capacity` blocks that knows all requests to come.
#[derive(Debug)]
pub(crate) struct Clairvoyant {
    capacity: usize,
    cached: usize,
    numbers: HashMap<BlockKey, u32>,
    blocks: Vec<Block>,
    /// Cached blocks that are not held and have no cached child: next use, number.
    leaves: BTreeSet<(u32, u32)>,
    /// The request's blocks; kept for its allocation.
    chain: Vec<u32>,
}

impl Clairvoyant {
    /// An empty cache, to be asked for `requests`, one after the other.
    pub(crate) fn new(requests: &[Planned], capacity: usize) -> Self {
        let (mut numbers, mut blocks) = (HashMap::new(), Vec::<Block>::new());
        for (request, planned) in (0..).zip(requests) {
            let mut parent = None;
            for key in &planned.keys {
                let number = *numbers.entry(*key).or_insert(blocks.len() as u32);
                if number as usize == blocks.len() {
                    blocks.push(Block { parent, ..Block::default() });
                }
                blocks[number as usize].uses.push(request);
                parent = Some(number);
            }
        }
        blocks.iter_mut().for_each(|block| block.uses.reverse());
        Clairvoyant { capacity, cached: 0, numbers, blocks, leaves: BTreeSet::new(), chain: Vec::new() }
    }

    fn block(&mut self, number: u32) -> &mut Block {
        &mut self.blocks[number as usize]
    }

    /// Makes room for one block. `tip` is the last block that is held; the held ones before it have a cached child.
    fn evict(&mut self, tip: Option<u32>) {
        let (_, number) = self.leaves.pop_last().expect("a request has more blocks than the cache");
        self.cached -= 1;
        let block = self.block(number);
        block.cached = false;
        let Some(parent) = block.parent else { return };
        let left = self.block(parent);
        left.children -= 1;
        if left.children == 0 && Some(parent) != tip {
            let next_use = left.next_use();
            self.leaves.insert((next_use, parent));
        }
    }

    /// Adds a block after `tip`, the last one that is held.
    fn insert(&mut self, number: u32, tip: Option<u32>) {
        if self.cached == self.capacity {
            self.evict(tip);
        }
        self.cached += 1;
        self.block(number).cached = true;
        if let Some(parent) = tip {
            self.block(parent).children += 1;
        }
    }
}

impl Driver for Clairvoyant {
    fn request(&mut self, request: &Planned) -> usize {
        let mut chain = std::mem::take(&mut self.chain);
        chain.clear();
        chain.extend(request.keys.iter().map(|key| self.numbers[key]));
        let hits = chain.iter().take_while(|number| self.blocks[**number as usize].cached).count();

        let mut tip = hits.checked_sub(1).map(|last| chain[last]);
        if let Some(held) = tip {
            let next_use = self.block(held).next_use();
            self.leaves.remove(&(next_use, held));
        }
        for &number in &chain[hits..] {
            self.insert(number, tip);
            tip = Some(number);
        }

        for &number in &chain {
            self.block(number).uses.pop();
        }
        if let Some(released) = tip.filter(|tip| self.blocks[*tip as usize].children == 0) {
            let next_use = self.block(released).next_use();
            self.leaves.insert((next_use, released));
        }
        self.chain = chain;
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block's key, from the path of letters that leads to it.
    fn keys(path: &str) -> Vec<BlockKey> {
        let key = |end: usize| {
            let mut key = [0; 32];
            key[..=end].copy_from_slice(&path.as_bytes()[..=end]);
            BlockKey(key)
        };
        (0..path.len()).map(key).collect()
    }

    /// The hits of each request.
    fn hits(capacity: usize, paths: &[&str]) -> Vec<usize> {
        let requests: Vec<Planned> =
            paths.iter().map(|path| Planned { time_ms: 0, hash_ids: Vec::new(), keys: keys(path) }).collect();
        let mut cache = Clairvoyant::new(&requests, capacity);
        let hits = requests.iter().map(|request| cache.request(request)).collect();
        assert!(cache.blocks.iter().all(|block| block.uses.is_empty()));
        assert_eq!(cache.cached, cache.blocks.iter().filter(|block| block.cached).count());
        assert!(cache.cached <= capacity);
        hits
    }

    #[test]
    fn what_is_used_last_goes_first() {
        // LRU would let go of "ab" for "d".
        assert_eq!(hits(3, &["ab", "c", "d", "ab", "d"]), [0, 0, 0, 2, 1]);
        // Of "b" and "c", "b" comes back later.
        assert_eq!(hits(2, &["b", "c", "d", "c", "d", "b"]), [0, 0, 0, 1, 1, 0]);
    }

    #[test]
    fn a_block_is_inserted_even_if_it_never_comes_back() {
        assert_eq!(hits(2, &["ab", "xy", "ab"]), [0, 0, 0]);
        assert_eq!(hits(2, &["ab", "x", "ab"]), [0, 0, 1]);
    }

    #[test]
    fn a_child_goes_before_its_parent() {
        // For "d" only "abc" can go, and for "e" then "d", which never comes back.
        assert_eq!(hits(3, &["abc", "d", "e", "abc"]), [0, 0, 0, 2]);
        // Two branches: the one that is used again stays, with the trunk.
        assert_eq!(hits(4, &["abc", "abd", "e", "abd", "abc"]), [0, 2, 0, 3, 2]);
    }

    #[test]
    fn what_a_request_holds_stays() {
        // "a" is matched and held while "c" and "d" come in; it has no other child by then.
        assert_eq!(hits(3, &["ab", "acd", "a"]), [0, 1, 1]);
        // Matched whole, then released: it is a leaf again.
        assert_eq!(hits(2, &["ab", "ab", "xy", "xy"]), [0, 2, 0, 2]);
    }

    #[test]
    fn with_room_for_all_a_prefix_is_cached_once_it_was_seen() {
        assert_eq!(hits(9, &["abc", "abd", "x", "abdz", "xa", "abc"]), [0, 2, 0, 3, 1, 3]);
    }
}
