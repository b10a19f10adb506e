//! The policies, what each of them does for one request, and how a run over all requests is timed.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use kv_cache::EvictionPolicy;

use crate::clairvoyant::Clairvoyant;
use crate::shard::Shard;
use crate::whole::{Stored, Whole};
use crate::workload::{Planned, Workload};

/// One thread's way into the cache that is replayed against.
pub(crate) trait Driver: Send {
    /// Runs one request from its match to its release, and returns how many of its leading blocks were cached.
    ///
    /// Its keys are chained: equal keys have equal parents. Its time never decreases. Every block is held until the request
    /// ends, and there is room for it.
    fn request(&mut self, request: &Planned) -> usize;
}

/// What decides which block goes when room is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Policy {
    /// Learned online: the default of a cache.
    Auto,
    /// Least recently used.
    Lru,
    /// Least frequently used.
    Lfu,
    /// Segmented LRU.
    Slru,
    /// Knows all requests to come: of the blocks without a cached child, the one that is used again last. Index only.
    Clairvoyant,
}

impl Policy {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Policy::Auto => "auto",
            Policy::Lru => "lru",
            Policy::Lfu => "lfu",
            Policy::Slru => "slru",
            Policy::Clairvoyant => "clairvoyant",
        }
    }

    /// The policy of the cache's that it is.
    fn of_cache(self) -> Option<EvictionPolicy> {
        match self {
            Policy::Auto => Some(EvictionPolicy::Auto),
            Policy::Lru => Some(EvictionPolicy::Lru),
            Policy::Lfu => Some(EvictionPolicy::Lfu),
            Policy::Slru => Some(EvictionPolicy::Slru),
            Policy::Clairvoyant => None,
        }
    }

    /// How many threads can run with this policy.
    pub(crate) fn threads(self, asked: u16, index_only: bool) -> u16 {
        // The future is one order of requests, and a whole cache has threads of its own.
        if self == Policy::Clairvoyant || !index_only { 1 } else { asked }
    }
}

/// How requests are dealt to threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Deal {
    /// Each thread has its share from the start, every N-th request, and gets through it as fast as it can.
    RoundRobin,
    /// Each thread takes the next request when it is done with one: no thread falls behind the order of the trace.
    Next,
}

/// How a case is run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup<'a> {
    pub(crate) policy: Policy,
    pub(crate) capacity_blocks: u32,
    pub(crate) threads: u16,
    pub(crate) deal: Deal,
    /// Only decide: no keys and values move.
    pub(crate) index_only: bool,
    /// How whole caches store blocks.
    pub(crate) stored: &'a Stored,
}

impl Setup<'_> {
    /// An empty cache, and one driver of it for each thread: a shard each.
    fn open(&self, workload: &Workload) -> anyhow::Result<Vec<Box<dyn Driver>>> {
        let Setup { policy, capacity_blocks, threads, .. } = *self;
        let Some(of_cache) = policy.of_cache() else {
            return Ok(vec![Box::new(Clairvoyant::new(&workload.requests, capacity_blocks as usize))]);
        };
        if !self.index_only {
            return Ok(vec![Box::new(Whole::new(
                of_cache,
                capacity_blocks,
                workload.longest(),
                self.stored,
            )?)]);
        }
        let shard =
            |_| Box::new(Shard::new(of_cache, capacity_blocks / u32::from(threads))) as Box<dyn Driver>;
        Ok((0..threads).map(shard).collect())
    }
}

/// One run over all requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    pub(crate) wall: Duration,
    pub(crate) hit_blocks: usize,
}

/// The round with the median time, each with an empty cache.
///
/// # Errors
/// A cache that cannot be built.
pub(crate) fn median(workload: &Workload, setup: &Setup<'_>, rounds: u16) -> anyhow::Result<Round> {
    let one = |_| Ok(run(workload, setup.deal, &mut setup.open(workload)?));
    let mut rounds: Vec<Round> = (0..rounds.max(1)).map(one).collect::<anyhow::Result<_>>()?;
    rounds.sort_by_key(|round| round.wall);
    Ok(rounds[rounds.len() / 2])
}

/// Runs all requests, each driver on a thread of its own with one request at a time.
fn run(workload: &Workload, deal: Deal, drivers: &mut [Box<dyn Driver>]) -> Round {
    let threads = drivers.len();
    let (start, dealt) = (&Barrier::new(threads + 1), &AtomicUsize::new(0));
    let share = |first: usize, driver: &mut Box<dyn Driver>| {
        let (mut hits, mut own) = (0, first);
        start.wait();
        loop {
            if deal == Deal::Next {
                own = dealt.fetch_add(1, Relaxed);
            }
            let Some(request) = workload.requests.get(own) else { return hits };
            hits += driver.request(request);
            own += threads;
        }
    };
    thread::scope(|scope| {
        let share = &share;
        let shares: Vec<_> = drivers
            .iter_mut()
            .enumerate()
            .map(|(first, driver)| scope.spawn(move || share(first, driver)))
            .collect();
        start.wait();
        let begun = Instant::now();
        let hit_blocks = shares.into_iter().map(|share| share.join().expect("a driver panicked")).sum();
        Round { wall: begun.elapsed(), hit_blocks }
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::workload::Selection;

    /// Counts requests, and blocks as hits.
    struct Counting(&'static AtomicUsize);

    impl Driver for Counting {
        fn request(&mut self, request: &Planned) -> usize {
            self.0.fetch_add(1, Relaxed);
            request.keys.len()
        }
    }

    #[test]
    fn each_request_runs_once_however_many_threads_there_are() {
        static REQUESTS: AtomicUsize = AtomicUsize::new(0);
        let workload =
            Workload::read(Path::new("tests/data/mooncake_small.jsonl"), Selection::All, 1, 0).unwrap();
        let cases = [1, 3, 64].into_iter().flat_map(|n| [(n, Deal::RoundRobin), (n, Deal::Next)]);
        for (threads, deal) in cases {
            REQUESTS.store(0, Relaxed);
            let mut drivers: Vec<Box<dyn Driver>> =
                (0..threads).map(|_| Box::new(Counting(&REQUESTS)) as _).collect();
            assert_eq!(run(&workload, deal, &mut drivers).hit_blocks, workload.blocks());
            assert_eq!(REQUESTS.load(Relaxed), workload.requests.len());
        }
    }
}
