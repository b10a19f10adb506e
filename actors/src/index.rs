//! The prefix index of a shard: which block holds the content that a key names.
//!
//! Anybody looks up inline, without a lock and without a message; the shard's device thread alone changes it. What a look-up ends with
//! is **pinned before it is compared**: a pinned block keeps its key, so a block that has changed hands in between shows another
//! key and is let go again. Whoever holds the pin holds a [`Lease`]; a block is evicted only at zero pins, and never before those that
//! continue it: so the pin of a run's last block holds all of it.
//!
//! A look-up writes to nothing that another thread writes to: pins are notes in a stripe (`pins`) of the thread's own, and the table stays
//! alive through that stripe's count. So look-ups of one prompt by many threads do not meet, wherever it ends.
//!
//! The table is an array of buckets, one cache line each, with a count of the entries that found their bucket full and
//! went on to the next (as in Facebook's F14): entries never move, so a look-up beside a change sees each of them or not.

mod pins;

use pins::{Pin, Stripes};

use crate::block::{BlockId, BlockKey};
use crate::sync::lock_free::{Arc, AtomicU64, Ordering, loom_fence};

/// Entries of a bucket. With the count they fill a cache line.
const BUCKET_ENTRIES: usize = 7;
const BUCKET_WORDS: usize = BUCKET_ENTRIES + 1;

/// Bits of a bucket's entries.
const ALL_ENTRIES: u64 = (1 << BUCKET_ENTRIES) - 1;

/// The part of a bucket's `ways` that counts.
const PASSED_ON: u64 = (1 << 32) - 1;

/// The part of an entry that names a block.
const BLOCK: u64 = (1 << 32) - 1;

/// `fingerprint << 32 | block + 1`; 0 is vacant.
#[derive(Debug)]
#[repr(align(64))]
struct Bucket {
    entries: [AtomicU64; BUCKET_ENTRIES],
    /// `taken << 32 | passed on`: a bit for each entry that is not vacant, and how many entries that belong here, or in a bucket before, lie
    /// further on. The writer changes it beside the entries; it alone asks what is taken.
    ways: AtomicU64,
}

/// What the table knows of a block, in one cache line.
#[derive(Debug)]
#[repr(align(64))]
struct Entry {
    /// 1 while the block can be found.
    published: AtomicU64,
    /// Where its entry is, in words of the buckets. The writer's own.
    place: AtomicU64,
    /// Pins for which no stripe had room.
    pins: AtomicU64,
    /// Words that can be read while they are written: whoever reads them has pinned the block, and then they are not.
    key: [AtomicU64; 4],
}

#[derive(Debug)]
struct Table {
    /// By block number.
    blocks: Box<[Entry]>,
    buckets: Box<[Bucket]>,
    /// Bits of a key that place it. Fewer in tests, where everything shall collide.
    hash_mask: u64,
}

impl Bucket {
    /// A bit for each entry that has this fingerprint (in place), or is vacant if that is zero. Without a branch for each: which places of a
    /// bucket are taken cannot be foretold, and a wrong guess costs more than all seven entries.
    #[inline]
    fn alike(&self, fingerprint: u64) -> u32 {
        let bit = |(at, entry): (usize, &AtomicU64)| {
            u32::from(entry.load(Ordering::Relaxed) & !BLOCK == fingerprint) << at
        };
        self.entries.iter().enumerate().map(bit).fold(0, |bits, bit| bits | bit)
    }

    /// Whether entries that belong here may lie further on.
    #[inline]
    fn has_passed_on(&self) -> bool {
        self.ways.load(Ordering::Relaxed) & PASSED_ON != 0
    }

    /// A bit for each entry that is vacant. For the writer.
    #[inline]
    fn vacant(&self) -> u64 {
        !(self.ways.load(Ordering::Relaxed) >> 32) & ALL_ENTRIES
    }

    #[inline]
    fn change_ways(&self, change: impl Fn(u64) -> u64) {
        // Nobody else writes.
        self.ways.store(change(self.ways.load(Ordering::Relaxed)), Ordering::Relaxed);
    }
}

impl Entry {
    /// Whoever has pinned the block before is seen from now on, and whoever pins it from now on sees that it is gone.
    #[inline]
    fn withdraw(&self) {
        self.published.store(0, Ordering::SeqCst);
        loom_fence();
    }

    #[inline]
    fn key_words(&self) -> [u64; 4] {
        std::array::from_fn(|at| self.key[at].load(Ordering::Relaxed))
    }
}

/// The numbers of the bits that are set.
fn set_bits(mut bits: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let at = bits.trailing_zeros() as usize;
        (bits != 0).then(|| bits &= bits - 1)?;
        Some(at)
    })
}

/// Where a key that was not found goes, until the next change.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Vacancy {
    /// Where its look-up begins.
    bucket: usize,
    fingerprint: u64,
}

fn words(key: &BlockKey) -> [u64; 4] {
    bytemuck::pod_read_unaligned(&key.0)
}

fn zeroed<T>(count: usize, zero: impl Fn() -> T) -> Box<[T]> {
    (0..count).map(|_| zero()).collect()
}

impl Table {
    fn new(blocks: usize, hash_bits: u32) -> Self {
        let zero = || AtomicU64::new(0);
        // Filled to a fifth and up to three sevenths: hardly a look-up goes on beyond its first bucket.
        let buckets = blocks.div_ceil(3).next_power_of_two();
        Table {
            blocks: zeroed(blocks, || Entry {
                published: zero(),
                place: zero(),
                pins: zero(),
                key: std::array::from_fn(|_| zero()),
            }),
            buckets: zeroed(buckets, || Bucket { entries: std::array::from_fn(|_| zero()), ways: zero() }),
            hash_mask: u64::MAX >> (64 - hash_bits.clamp(1, 64)),
        }
    }

    /// The bucket where a key's look-up begins, and its fingerprint in place. The key is a keyed hash already.
    #[inline]
    fn place(&self, words: &[u64; 4]) -> (usize, u64) {
        let bucket = (words[0] & self.hash_mask) as usize & (self.buckets.len() - 1);
        (bucket, (words[1] & self.hash_mask) << 32)
    }

    fn after(&self, bucket: usize) -> usize {
        (bucket + 1) & (self.buckets.len() - 1)
    }

    /// The entries that may be of a key: blocks to look at more closely, in order, until `found` says so.
    fn search<T>(&self, key: &[u64; 4], mut found: impl FnMut(BlockId) -> Option<T>) -> Option<T> {
        let (mut bucket, fingerprint) = self.place(key);
        for _ in 0..self.buckets.len() {
            let here = &self.buckets[bucket];
            for at in set_bits(here.alike(fingerprint)) {
                let entry = here.entries[at].load(Ordering::Relaxed);
                // It may have changed since, or be vacant where the fingerprint is zero.
                if entry as u32 != 0
                    && entry & !BLOCK == fingerprint
                    && let Some(answer) = found(BlockId(entry as u32 - 1))
                {
                    return Some(answer);
                }
            }
            if !here.has_passed_on() {
                break;
            }
            bucket = self.after(bucket);
        }
        None
    }

    fn entry(&self, block: BlockId) -> &Entry {
        &self.blocks[block.0 as usize]
    }

    #[inline]
    fn has_key(&self, block: BlockId, key: &[u64; 4]) -> bool {
        self.blocks[block.0 as usize]
            .key
            .iter()
            .zip(key)
            .all(|(word, key)| word.load(Ordering::Relaxed) == *key)
    }

    /// A block with this key, as things are.
    #[inline]
    fn find(&self, key: &[u64; 4]) -> Option<BlockId> {
        self.search(key, |block| self.has_key(block, key).then_some(block))
    }

    /// False if no block has this key; true may be wrong, once in billions of times.
    #[inline]
    fn may_have(&self, key: &[u64; 4]) -> bool {
        self.search(key, |_| Some(())).is_some()
    }
}

/// Looks keys up. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PrefixIndex {
    shard: u16,
    table: Arc<Table>,
    stripes: Arc<Stripes>,
}

impl PrefixIndex {
    /// Finds the longest run of `keys` from the first on that is cached, and pins it.
    ///
    /// A block stays for as long as one that continues it. So where one is found all before it are, which lets the end of the run be searched
    /// for in steps that halve, and its last block alone is pinned and compared.
    pub fn lease(&self, keys: &[BlockKey]) -> Lease {
        let mut run = keys.partition_point(|key| self.table.may_have(&words(key)));
        // What was found a moment ago may have gone, or had but the fingerprint.
        while run > 0 {
            let last = self.pin(&words(&keys[run - 1]));
            if last.is_some() {
                return Lease { shard: self.shard, last, blocks: run };
            }
            run -= 1;
        }
        Lease { shard: self.shard, last: None, blocks: 0 }
    }

    fn pin(&self, key: &[u64; 4]) -> Option<Pin> {
        let stripe = self.stripes.own();
        self.table.search(key, |block| Pin::new(stripe, block).filter(|_| self.table.has_key(block, key)))
    }
}

/// A cached prefix, pinned: its blocks stay what they are until it is dropped, which never waits.
#[derive(Debug)]
#[must_use]
pub struct Lease {
    shard: u16,
    /// Its last block. Those before it cannot go before it.
    last: Option<Pin>,
    blocks: usize,
}

impl Lease {
    /// The shard that the blocks are on.
    pub fn shard(&self) -> u16 {
        self.shard
    }

    /// How many blocks they are.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The last of them.
    pub fn last(&self) -> Option<BlockId> {
        self.last.as_ref().map(Pin::block)
    }
}

/// Changes the index. The device thread has the only one.
#[derive(Debug)]
pub struct IndexWriter(PrefixIndex);

impl Drop for IndexWriter {
    /// Nothing is found on a shard that is gone.
    fn drop(&mut self) {
        for block in &self.0.table.blocks {
            block.published.store(0, Ordering::Release);
        }
    }
}

impl IndexWriter {
    /// An empty index for blocks numbered below `blocks`. Keys are placed by `hash_bits` of their bits: 64, but for tests.
    pub fn new(shard: u16, blocks: usize, hash_bits: u32) -> Self {
        let table = Arc::new(Table::new(blocks, hash_bits));
        let stripes = Arc::new(Stripes::new(&table));
        IndexWriter(PrefixIndex { shard, table, stripes })
    }

    /// For those who look up.
    pub fn reader(&self) -> &PrefixIndex {
        &self.0
    }

    /// The block with this key, not pinned: it stays until this thread removes it.
    pub fn find(&self, key: &BlockKey) -> Option<BlockId> {
        self.0.table.find(&words(key))
    }

    /// The block with this key, or where a block with this key can be inserted.
    #[inline]
    pub fn find_or_vacancy(&self, key: &BlockKey) -> Result<BlockId, Vacancy> {
        let (table, key) = (&*self.0.table, words(key));
        let (bucket, fingerprint) = table.place(&key);
        let here = &table.buckets[bucket];
        // Most often nothing is like it, and nothing has been passed on from here.
        if (here.alike(fingerprint) != 0 || here.has_passed_on())
            && let Some(block) = table.find(&key)
        {
            return Ok(block);
        }
        Err(Vacancy { bucket, fingerprint })
    }

    /// Gives a block its key. The block is not found, and nobody has it pinned.
    #[inline]
    pub fn set_key(&mut self, block: BlockId, key: &BlockKey) {
        let entry = self.0.table.entry(block);
        debug_assert_eq!(entry.published.load(Ordering::Relaxed), 0);
        for (word, key) in entry.key.iter().zip(words(key)) {
            word.store(key, Ordering::Relaxed);
        }
    }

    /// The key that a block was given last.
    pub fn key(&self, block: BlockId) -> BlockKey {
        BlockKey(bytemuck::cast(self.0.table.entry(block).key_words()))
    }

    /// From now on its key, which nobody else has, finds `block`.
    #[cfg(test)]
    fn insert(&mut self, block: BlockId) {
        let (bucket, fingerprint) = self.0.table.place(&self.0.table.entry(block).key_words());
        self.insert_at(block, Vacancy { bucket, fingerprint });
    }

    /// From now on the block's key, for which this is the vacancy, finds it.
    #[inline]
    pub fn insert_at(&mut self, block: BlockId, vacancy: Vacancy) {
        let table = &*self.0.table;
        let Vacancy { mut bucket, fingerprint } = vacancy;
        let mut here = &table.buckets[bucket];
        // More than twice as many places as blocks, so one is vacant.
        while here.vacant() == 0 {
            here.change_ways(|ways| ways + 1);
            bucket = table.after(bucket);
            here = &table.buckets[bucket];
        }
        let at = here.vacant().trailing_zeros() as usize;
        here.change_ways(|ways| ways | 1 << 32 << at);
        let of_block = table.entry(block);
        of_block.place.store((bucket * BUCKET_WORDS + at) as u64, Ordering::Relaxed);
        // Release: whoever sees this sees the key.
        of_block.published.store(1, Ordering::Release);
        here.entries[at].store(fingerprint | u64::from(block.0 + 1), Ordering::Release);
    }

    /// Whether somebody holds a lease on the block, which is not found any more or never was.
    #[inline]
    pub fn is_pinned(&self, block: BlockId) -> bool {
        self.has_pinned(block, self.0.table.entry(block))
    }

    #[inline]
    fn has_pinned(&self, block: BlockId, entry: &Entry) -> bool {
        // In the order of all accesses, as everything here; and whoever let go of it has read what he wanted.
        entry.pins.load(Ordering::SeqCst) != 0 || self.0.stripes.have(block)
    }

    /// Removes a block that nobody has pinned. False, with nothing changed, if somebody has.
    #[inline]
    pub fn try_remove(&mut self, block: BlockId) -> bool {
        let entry = self.0.table.entry(block);
        entry.withdraw();
        if self.has_pinned(block, entry) {
            entry.published.store(1, Ordering::Release);
            return false;
        }
        self.remove_entry(block, entry);
        true
    }

    /// Removes a block whoever has it pinned: nobody finds it any more. Its number stays taken until [`IndexWriter::is_pinned`] says no.
    pub fn hide(&mut self, block: BlockId) {
        let entry = self.0.table.entry(block);
        entry.withdraw();
        self.remove_entry(block, entry);
    }

    /// Loads what finding or inserting the key will need. For many keys in a row, so that the waits for memory are one.
    #[inline]
    pub fn warm(&self, key: &BlockKey) {
        let table = &*self.0.table;
        let (bucket, _) = table.place(&words(key));
        std::hint::black_box(table.buckets[bucket].ways.load(Ordering::Relaxed));
    }

    /// Loads what removing the blocks will need.
    #[inline]
    pub fn warm_removals(&self, blocks: &[BlockId]) {
        let table = &*self.0.table;
        let place = |block: &BlockId| table.entry(*block).place.load(Ordering::Relaxed) as usize;
        // All of the blocks first, then all of the buckets: the waits for each kind are one.
        std::hint::black_box(blocks.iter().map(place).fold(0, |all, place| all | place));
        let ways = |block| table.buckets[place(block) / BUCKET_WORDS].ways.load(Ordering::Relaxed);
        std::hint::black_box(blocks.iter().map(ways).fold(0, |all, ways| all | ways));
    }

    #[inline]
    fn remove_entry(&self, block: BlockId, of_block: &Entry) {
        let table = &*self.0.table;
        let place = of_block.place.load(Ordering::Relaxed) as usize;
        let (bucket, at) = (place / BUCKET_WORDS, place % BUCKET_WORDS);
        let here = &table.buckets[bucket];
        let entry = &here.entries[at];
        assert_eq!(entry.load(Ordering::Relaxed) as u32, block.0 + 1, "a published block is in the table");
        entry.store(0, Ordering::Relaxed);
        here.change_ways(|ways| ways & !(1 << 32 << at));
        // After the entry: whoever still needs the way finds it.
        let (mut before, _) = table.place(&of_block.key_words());
        while before != bucket {
            table.buckets[before].change_ways(|ways| ways - 1);
            before = table.after(before);
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::testing::Rng;

    fn key(number: u64) -> BlockKey {
        BlockKey(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    /// Random changes against a map; with few bits of hash everything collides, and nothing wrong is found.
    #[test]
    fn the_index_is_a_map_however_keys_collide() {
        for hash_bits in [64, 8, 1] {
            let mut rng = Rng::new(u64::from(hash_bits));
            let blocks = 300;
            let mut index = IndexWriter::new(0, blocks, hash_bits);
            let mut model: HashMap<u64, BlockId> = HashMap::new();
            let mut free: Vec<u32> = (0..blocks as u32).collect();
            for _ in 0..20_000 {
                let number = rng.below(600) as u64;
                match model.get(&number).copied() {
                    Some(block) => {
                        assert_eq!(index.find(&key(number)), Some(block));
                        let lease = index.reader().lease(&[key(number), key(number ^ 1)]);
                        // Nothing here continues anything: only the last of a run counts.
                        match model.get(&(number ^ 1)) {
                            Some(other) => assert_eq!((lease.blocks(), lease.last()), (2, Some(*other))),
                            None => assert_eq!((lease.blocks(), lease.last()), (1, Some(block))),
                        }
                        drop(lease);
                        let lease = index.reader().lease(&[key(number)]);
                        assert!(!index.try_remove(block), "it is pinned");
                        drop(lease);
                        assert!(index.try_remove(block));
                        model.remove(&number);
                        free.push(block.0);
                    }
                    None => {
                        assert_eq!(index.find(&key(number)), None);
                        assert_eq!(index.reader().lease(&[key(number)]).blocks(), 0);
                        if let Some(block) = free.pop() {
                            index.set_key(BlockId(block), &key(number));
                            index.insert(BlockId(block));
                            model.insert(number, BlockId(block));
                        }
                    }
                }
            }
            for (number, block) in model {
                assert_eq!(index.find(&key(number)), Some(block));
                index.hide(block);
                assert_eq!(index.find(&key(number)), None);
            }
            let ways = index.0.table.buckets.iter().map(|bucket| bucket.ways.load(Ordering::Relaxed));
            assert_eq!(ways.sum::<u64>(), 0, "an empty table has no ways left in it");
        }
    }

    #[test]
    fn a_hidden_block_is_not_found_and_stays_pinned() {
        let mut index = IndexWriter::new(3, 8, 64);
        index.set_key(BlockId(5), &key(1));
        index.insert(BlockId(5));
        let lease = index.reader().lease(&[key(1)]);
        assert_eq!((lease.shard(), lease.blocks(), lease.last()), (3, 1, Some(BlockId(5))));
        index.hide(BlockId(5));
        assert!(index.is_pinned(BlockId(5)));
        assert_eq!(index.reader().lease(&[key(1)]).blocks(), 0);
        drop(lease);
        assert!(!index.is_pinned(BlockId(5)));
        index.set_key(BlockId(5), &key(2));
        index.insert(BlockId(5));
        assert_eq!(index.find(&key(2)), Some(BlockId(5)));
    }

    /// More leases than a stripe has room for, let go of in any order: the block stays until the last of them has gone.
    #[test]
    fn every_lease_counts_however_many_there_are() {
        let mut rng = Rng::new(3);
        let mut index = IndexWriter::new(0, 2, 64);
        for block in [0, 1] {
            index.set_key(BlockId(block), &key(u64::from(block)));
            index.insert(BlockId(block));
        }
        for leases in [1, 8, 9, 40] {
            let lease = |block: u64| index.reader().lease(&[key(block)]);
            let mut held: Vec<Lease> = (0..leases).map(|at| lease(at % 2)).collect();
            while let Some(last) = held.len().checked_sub(1) {
                for block in [0, 1].map(BlockId) {
                    let is_held = held.iter().any(|lease| lease.last() == Some(block));
                    assert_eq!(index.is_pinned(block), is_held);
                    assert_eq!(index.try_remove(block), !is_held);
                    if !is_held {
                        index.insert(block);
                    }
                }
                drop(held.swap_remove(rng.below(last + 1)));
            }
        }
    }

    /// Readers beside a writer that keeps changing what is where: whatever they find has the key that they asked for.
    #[test]
    fn what_is_pinned_has_the_key() {
        let (blocks, keys) = (16u32, 64u64);
        let mut index = IndexWriter::new(0, blocks as usize, 2);
        let reader = index.reader().clone();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|seed| {
                    let (reader, stop) = (reader.clone(), &stop);
                    scope.spawn(move || {
                        let (mut rng, mut hits) = (Rng::new(seed), 0u64);
                        while !stop.load(Ordering::Relaxed) {
                            let asked = key(rng.below(keys as usize) as u64);
                            let lease = reader.lease(&[asked]);
                            if let Some(block) = lease.last() {
                                for _ in 0..8 {
                                    assert!(reader.table.has_key(block, &words(&asked)));
                                }
                                hits += 1;
                            }
                        }
                        hits
                    })
                })
                .collect();
            let mut rng = Rng::new(9);
            let mut held: Vec<Option<u64>> = vec![None; blocks as usize];
            for _ in 0..200_000 {
                let block = rng.below(blocks as usize);
                match held[block] {
                    Some(_) => {
                        if index.try_remove(BlockId(block as u32)) {
                            held[block] = None;
                        }
                    }
                    None => {
                        let number = rng.below(keys as usize) as u64;
                        if !held.contains(&Some(number)) {
                            index.set_key(BlockId(block as u32), &key(number));
                            index.insert(BlockId(block as u32));
                            held[block] = Some(number);
                        }
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
            let hits: u64 = readers.into_iter().map(|reader| reader.join().expect("no reader panics")).sum();
            assert!(hits > 0);
        });
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::thread;

    /// A reader looks for a key while the writer gives the block another: whatever it has pinned has the key that it asked for, and no pin is
    /// lost. The one note that there is in this build may be taken by another lease: then the pin is in the block's word.
    fn reader_beside_writer(is_note_taken: bool) {
        let (first, second, other) = (BlockKey([1; 32]), BlockKey([3; 32]), BlockKey([5; 32]));
        let block = BlockId(0);
        // No bits of hash: all keys are looked for in the same place.
        let mut index = IndexWriter::new(0, 2, 1);
        index.set_key(block, &first);
        index.insert(block);
        let taken = is_note_taken.then(|| {
            index.set_key(BlockId(1), &other);
            index.insert(BlockId(1));
            index.reader().lease(&[other])
        });
        assert_eq!(taken.is_some(), taken.as_ref().is_some_and(|lease| lease.last() == Some(BlockId(1))));
        let reader = index.reader().clone();
        let looking = thread::spawn(move || {
            let lease = reader.lease(&[first]);
            if let Some(block) = lease.last() {
                assert!(reader.table.has_key(block, &words(&first)));
            }
        });
        if index.try_remove(block) {
            index.set_key(block, &second);
            index.insert(block);
            assert_eq!(index.find(&second), Some(block));
        }
        looking.join().unwrap();
        assert!(!index.is_pinned(block));
        assert!(index.try_remove(block));
    }

    /// `RUSTFLAGS="--cfg loom" cargo test -p kv-cache-actors --lib --release loom`
    #[test]
    fn what_is_noted_keeps_its_key() {
        loom::model(|| reader_beside_writer(false));
    }

    #[test]
    fn what_is_counted_keeps_its_key() {
        loom::model(|| reader_beside_writer(true));
    }
}
