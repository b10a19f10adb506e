//! What a cache tells about itself.

use kv_cache_actors::stats::{BatchSizes, CoreCounters, Latencies, Percentiles};
use serde::Serialize;

use crate::ErrorKind;
use crate::runtime::Runtime;

/// A snapshot of a cache. Each shard's part is as of its last batch.
///
/// Beside it, spans and events go to `tracing` under these targets, which are part of the interface:
///
/// | target | spans | events |
/// |---|---|---|
/// | `kv_cache::runtime` | `build`, `shutdown` | an operation that was answered with another's outcome |
/// | `kv_cache::devices` | | which devices and kernels were chosen, and why |
/// | `kv_cache::device` | `batch` (shard, operations, submissions), `seal` (shard) | |
/// | `kv_cache::transfer` | | a transfer actor starts |
/// | `kv_cache::cuda` | | kernels replaced by plain ones, a device that is lost |
/// | `kv_cache::router` | | routing trouble |
/// | `kv_cache::reply` | | submissions dropped unanswered |
/// | `kv_cache::supervisor` | | how actors end |
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Open sequences.
    pub sequences_open: usize,
    /// Committed tokens of all open sequences; forks count the tokens that they share.
    pub tokens: u64,
    /// Operations in flight, waiting ones not included.
    pub jobs_in_flight: u64,
    /// Bytes that they carry.
    pub bytes_in_flight: u64,
    /// Counters and gauges of all shards together.
    pub total: CoreCounters,
    /// Failed operations by kind, without the kinds that have not occurred.
    pub errors: Vec<(ErrorKind, u64)>,
    /// Operations that reached a shard together.
    pub batch_sizes: BatchSizes,
    /// From submission to the device actor.
    pub queue_wait: Percentiles,
    /// From the device actor to the answers of a batch.
    pub batch_service: Percentiles,
    /// Every shard by itself.
    pub shards: Vec<ShardReport>,
}

/// One shard of [`Stats`].
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ShardReport {
    /// Its number.
    pub shard: u16,
    /// Why it is lost, if it is.
    pub lost: Option<String>,
    /// Its counters and gauges.
    pub counters: CoreCounters,
    /// Messages in its mailbox.
    pub mailbox_depth: u64,
    /// Launches on its copy lanes.
    pub transfers_in_flight: u64,
}

impl Stats {
    pub(crate) fn collect(runtime: &Runtime) -> Stats {
        let in_flight = runtime.submitter.permits.used();
        let mut stats = Stats {
            sequences_open: runtime.directory.len(),
            tokens: runtime.tokens.used(),
            jobs_in_flight: in_flight.jobs,
            bytes_in_flight: in_flight.bytes,
            ..Stats::default()
        };
        let (mut queue_wait, mut service) = (Latencies::default(), Latencies::default());
        for (shard, view) in runtime.views.iter().enumerate() {
            let shared = view.stats.lock();
            queue_wait.merge(&shared.queue_wait);
            service.merge(&shared.service);
            stats.batch_sizes.merge(&shared.batch_sizes);
            let lost = runtime.supervisor.lost(shard as u16);
            // What a lost shard held is gone; what it had counted still happened.
            let counters = if lost.is_some() { shared.counters.without_gauges() } else { shared.counters };
            stats.total.add(&counters);
            stats.shards.push(ShardReport {
                shard: shard as u16,
                lost: lost.map(|error| error.to_string()),
                counters,
                mailbox_depth: shared.mailbox_depth,
                transfers_in_flight: shared.transfers_in_flight,
            });
        }
        stats.queue_wait = queue_wait.percentiles();
        stats.batch_service = service.percentiles();
        let refused = runtime.submitter.refusals.counts();
        let counts =
            stats.total.errors.into_iter().zip(refused).map(|(of_shards, refused)| of_shards + refused);
        let counted = ErrorKind::ALL.into_iter().zip(counts);
        stats.errors = counted.filter(|(_, count)| *count > 0).collect();
        stats
    }
}
