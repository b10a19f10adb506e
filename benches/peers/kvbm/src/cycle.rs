//! What is timed: match → allocate → register → release, for one request after the other.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ValueEnum;
use kvbm_logical::manager::{FrequencyTrackingCapacity, LineageEviction};
use kvbm_logical::{BlockManager, BlockRegistry, SequenceHash};

use crate::trace::{BLOCK_TOKENS, Workload};

/// Which block of the peer's inactive pool goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Backend {
    /// First in, first out.
    Hashmap,
    /// Least recently released.
    Lru,
    /// Four LRU lists by frequency in a TinyLFU sketch.
    MultiLru,
    /// Leaves first, by when they were inserted: the peer's default.
    Lineage,
    /// Leaves first, by when they became leaves.
    LineageFifo,
}

impl Backend {
    pub fn policy(self) -> &'static str {
        match self {
            Backend::Hashmap => "kvbm-hashmap",
            Backend::Lru => "kvbm-lru",
            Backend::MultiLru => "kvbm-multi_lru",
            Backend::Lineage => "kvbm-lineage",
            Backend::LineageFifo => "kvbm-lineage_fifo",
        }
    }

    fn manager(self, capacity_blocks: usize) -> anyhow::Result<Manager> {
        let registry = match self {
            // The one backend that asks for counts; it would only cost the others time.
            Backend::MultiLru => {
                let tracker = FrequencyTrackingCapacity::default().create_tracker();
                BlockRegistry::builder().frequency_tracker(tracker).build()
            }
            _ => BlockRegistry::builder().build(),
        };
        let builder = BlockManager::builder().block_count(capacity_blocks).block_size(BLOCK_TOKENS);
        let builder = match self {
            Backend::Hashmap => builder.with_hashmap_backend(),
            Backend::Lru => builder.with_lru_backend(),
            Backend::MultiLru => builder.with_multi_lru_backend(),
            Backend::Lineage => builder.with_lineage_backend_eviction(LineageEviction::Tick),
            Backend::LineageFifo => builder.with_lineage_backend_eviction(LineageEviction::Fifo),
        };
        builder.registry(registry).build().context("kvbm-logical refuses the configuration")
    }
}

/// In which order a request lets go of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReleaseOrder {
    /// The last block first, so that what is shared least goes first.
    Tail,
    /// As they stand in the list.
    Head,
}

/// The tier that the blocks pretend to be in.
#[derive(Clone)]
struct Tier;

type Manager = BlockManager<Tier>;

/// One run over all requests with a fresh cache.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    pub wall: Duration,
    pub hit_blocks: usize,
    /// Requests that found too few free blocks because other threads held them, and began anew.
    pub retries: usize,
}

/// How requests are dealt to threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Deal {
    /// Each thread has its share from the start, every N-th request, and gets through it as fast as it can.
    RoundRobin,
    /// Each thread takes the next request when it is done with one: no thread falls behind the order of the trace.
    Next,
}

/// How a case is run.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub capacity_blocks: usize,
    pub threads: usize,
    pub deal: Deal,
    pub release: ReleaseOrder,
}

/// Runs all requests on threads that share one manager; each thread has one request at a time.
pub fn round(workload: &Workload, backend: Backend, setup: &Setup) -> anyhow::Result<Round> {
    let &Setup { threads, deal, .. } = setup;
    let manager = backend.manager(setup.capacity_blocks)?;
    let (start, dealt) = (Barrier::new(threads + 1), AtomicUsize::new(0));
    let share = |first: usize| {
        let (mut hits, mut retries, mut own) = (0, 0, first);
        start.wait();
        loop {
            if deal == Deal::Next {
                own = dealt.fetch_add(1, Relaxed);
            }
            let Some(hashes) = workload.requests.get(own) else { return (hits, retries) };
            own += threads;
            loop {
                match request(&manager, hashes, setup.release) {
                    Some(found) => break hits += found,
                    None => retries += 1,
                }
                thread::yield_now();
            }
        }
    };
    thread::scope(|scope| {
        let share = &share;
        let shares: Vec<_> = (0..threads).map(|first| scope.spawn(move || share(first))).collect();
        start.wait();
        let begun = Instant::now();
        let mut round = Round { wall: Duration::ZERO, hit_blocks: 0, retries: 0 };
        for share in shares {
            let (hits, retries) = share.join().expect("a replaying thread panicked");
            round.hit_blocks += hits;
            round.retries += retries;
        }
        round.wall = begun.elapsed();
        Ok(round)
    })
}

/// One request; how many of its leading blocks were cached, or `None` if too few blocks were free.
fn request(manager: &Manager, hashes: &[SequenceHash], order: ReleaseOrder) -> Option<usize> {
    let mut held = manager.match_blocks(hashes);
    let hits = held.len();
    let missing = &hashes[hits..];
    let blank = manager.allocate_blocks(missing.len())?;
    let staged = blank.into_iter().zip(missing).map(|(block, hash)| {
        block.stage(*hash, BLOCK_TOKENS).expect("blocks have the size that the manager was built with")
    });
    held.extend(manager.register_blocks(staged.collect()));
    match order {
        ReleaseOrder::Tail => while held.pop().is_some() {},
        ReleaseOrder::Head => drop(held),
    }
    Some(hits)
}
