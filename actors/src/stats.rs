//! Statistics: counters that the cores keep, and the snapshot of a shard that anybody may read.

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::error::ErrorKind;
use crate::sync::{Mutex, MutexGuard, lock};

/// What a device core counts. Gauges say what is; the others only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CoreCounters {
    /// Operations taken in.
    pub operations: u64,
    /// Launches handed to lanes.
    pub launches: u64,
    /// Launches that a lane failed.
    pub failed_launches: u64,
    /// Tokens committed.
    pub tokens_committed: u64,
    /// Bytes appended or staged.
    pub bytes_in: u64,
    /// Bytes read.
    pub bytes_out: u64,
    /// Blocks sealed.
    pub seals: u64,
    /// Sealed blocks re-encoded to a smaller format, since memory was short.
    pub recodes: u64,
    /// Seals that failed.
    pub seal_failures: u64,
    /// Times that sealing stopped for lack of a sealed slot.
    pub seal_stalls: u64,
    /// Raw blocks moved to make a chunk vacant for sealed slots.
    pub blocks_moved: u64,
    /// Sealed blocks moved to another tier.
    pub tier_moves: u64,
    /// Bytes of these blocks.
    pub bytes_moved: u64,
    /// Sequences made by forking.
    pub forks: u64,
    /// Blocks copied because somebody else still needed them as they were.
    pub copies_on_write: u64,
    /// Slots zeroed because they had held another tenant's bytes.
    pub slots_zeroed: u64,
    /// Times that token dropping moved a window.
    pub window_moves: u64,
    /// Tokens dropped by their scores.
    pub tokens_dropped: u64,
    /// Full blocks of the prompts that sequences were opened with.
    pub prefix_blocks_asked: u64,
    /// Of those, blocks that were cached.
    pub prefix_blocks_hit: u64,
    /// Tokens that prompts have found, those of blocks that match in part included.
    pub prefix_tokens_hit: u64,
    /// Blocks that a sequence computed and another had cached before: one copy was kept.
    pub blocks_deduplicated: u64,
    /// Cached blocks that made way.
    pub evictions: u64,
    /// Failed operations by [`ErrorKind`].
    pub errors: [u64; ErrorKind::ALL.len()],
    /// Gauge: open sequences.
    pub sequences: u64,
    /// Gauge: raw blocks that the slab could hold.
    pub blocks_total: u64,
    /// Gauge: raw blocks that can be had and are not reserved.
    pub blocks_free: u64,
    /// Gauge: blocks that exist.
    pub blocks_used: u64,
    /// Gauge: of those, blocks that no sequence holds: they are kept for a prompt to find, and make way for others.
    pub blocks_cached: u64,
    /// Gauge: slab bytes of those.
    pub bytes_cached: u64,
    /// Gauge: blocks in the sealed format, or re-encoded since.
    pub blocks_sealed: u64,
    /// Gauge: of those, blocks in the slab that were re-encoded.
    pub blocks_colder: u64,
    /// Gauge: full blocks that wait to be sealed, or are being encoded.
    pub blocks_waiting_to_seal: u64,
    /// Gauge: slots freed while somebody still looked at them.
    pub slots_quarantined: u64,
    /// Gauge: slots of the host tier in use.
    pub blocks_host: u64,
    /// Gauge: slab bytes in use.
    pub bytes_used: u64,
}

impl CoreCounters {
    /// What has happened, without what is.
    pub fn without_gauges(self) -> Self {
        CoreCounters {
            sequences: 0,
            blocks_total: 0,
            blocks_free: 0,
            blocks_used: 0,
            blocks_cached: 0,
            bytes_cached: 0,
            blocks_sealed: 0,
            blocks_colder: 0,
            blocks_waiting_to_seal: 0,
            slots_quarantined: 0,
            blocks_host: 0,
            bytes_used: 0,
            ..self
        }
    }

    /// Adds all of `other`, gauges included: the state of two shards together.
    pub fn add(&mut self, other: &CoreCounters) {
        let CoreCounters {
            operations,
            launches,
            failed_launches,
            tokens_committed,
            bytes_in,
            bytes_out,
            seals,
            recodes,
            seal_failures,
            seal_stalls,
            blocks_moved,
            tier_moves,
            bytes_moved,
            forks,
            copies_on_write,
            slots_zeroed,
            window_moves,
            tokens_dropped,
            prefix_blocks_asked,
            prefix_blocks_hit,
            prefix_tokens_hit,
            blocks_deduplicated,
            evictions,
            errors,
            sequences,
            blocks_total,
            blocks_free,
            blocks_used,
            blocks_cached,
            bytes_cached,
            blocks_sealed,
            blocks_colder,
            blocks_waiting_to_seal,
            slots_quarantined,
            blocks_host,
            bytes_used,
        } = other;
        self.operations += operations;
        self.launches += launches;
        self.failed_launches += failed_launches;
        self.tokens_committed += tokens_committed;
        self.bytes_in += bytes_in;
        self.bytes_out += bytes_out;
        self.seals += seals;
        self.recodes += recodes;
        self.seal_failures += seal_failures;
        self.seal_stalls += seal_stalls;
        self.blocks_moved += blocks_moved;
        self.tier_moves += tier_moves;
        self.bytes_moved += bytes_moved;
        self.forks += forks;
        self.copies_on_write += copies_on_write;
        self.slots_zeroed += slots_zeroed;
        self.window_moves += window_moves;
        self.tokens_dropped += tokens_dropped;
        self.prefix_blocks_asked += prefix_blocks_asked;
        self.prefix_blocks_hit += prefix_blocks_hit;
        self.prefix_tokens_hit += prefix_tokens_hit;
        self.blocks_deduplicated += blocks_deduplicated;
        self.evictions += evictions;
        self.errors.iter_mut().zip(errors).for_each(|(mine, theirs)| *mine += theirs);
        self.sequences += sequences;
        self.blocks_total += blocks_total;
        self.blocks_free += blocks_free;
        self.blocks_used += blocks_used;
        self.blocks_cached += blocks_cached;
        self.bytes_cached += bytes_cached;
        self.blocks_sealed += blocks_sealed;
        self.blocks_colder += blocks_colder;
        self.blocks_waiting_to_seal += blocks_waiting_to_seal;
        self.slots_quarantined += slots_quarantined;
        self.blocks_host += blocks_host;
        self.bytes_used += bytes_used;
    }
}

/// 50th, 95th and 99th percentile, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half of all are at most this.
    pub p50_us: f64,
    /// 95 % are at most this.
    pub p95_us: f64,
    /// 99 % are at most this.
    pub p99_us: f64,
}

/// Durations in nanoseconds, to two digits, up to a minute.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

const LATENCY_MAX_NS: u64 = 60_000_000_000;

impl Default for Latencies {
    fn default() -> Self {
        Latencies(Histogram::new_with_bounds(1, LATENCY_MAX_NS, 2).expect("constant bounds are valid"))
    }
}

impl Latencies {
    /// Records one duration.
    pub fn record_ns(&mut self, ns: u64) {
        self.0.saturating_record(ns.clamp(1, LATENCY_MAX_NS));
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Latencies) {
        // Equal bounds, so it cannot fail.
        let _ = self.0.add(&other.0);
    }

    /// Percentiles of what was recorded; zeros if nothing was.
    pub fn percentiles(&self) -> Percentiles {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        if self.0.is_empty() {
            return Percentiles::default();
        }
        Percentiles { p50_us: at(0.5), p95_us: at(0.95), p99_us: at(0.99) }
    }
}

/// Sizes of batches, by power of two: entry `i` counts batches of `2^i ..= 2^(i+1) - 1` operations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BatchSizes {
    /// Batches.
    pub batches: u64,
    /// Operations in them.
    pub operations: u64,
    /// Batches per power of two.
    pub by_power_of_two: [u64; 24],
}

impl BatchSizes {
    pub(crate) fn record(&mut self, operations: u64) {
        if operations > 0 {
            self.batches += 1;
            self.operations += operations;
            self.by_power_of_two[(operations.ilog2() as usize).min(23)] += 1;
        }
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &BatchSizes) {
        self.batches += other.batches;
        self.operations += other.operations;
        for (mine, theirs) in self.by_power_of_two.iter_mut().zip(&other.by_power_of_two) {
            *mine += theirs;
        }
    }

    /// Operations per batch.
    pub fn mean(&self) -> f64 {
        if self.batches == 0 { 0.0 } else { self.operations as f64 / self.batches as f64 }
    }
}

/// The state of one shard as its device actor last published it, after each batch.
#[derive(Debug, Clone, Default)]
pub struct ShardStats {
    /// What the core counted.
    pub counters: CoreCounters,
    /// Operations that came to the device actor together.
    pub batch_sizes: BatchSizes,
    /// From submission to the device actor.
    pub queue_wait: Latencies,
    /// From the device actor to the answer.
    pub service: Latencies,
    /// Messages in the device actor's mailbox.
    pub mailbox_depth: u64,
    /// Launches on the copy lanes.
    pub transfers_in_flight: u64,
}

/// A [`ShardStats`] shared between the actor that writes it and those who read it.
#[derive(Debug, Default)]
pub struct SharedStats(Mutex<ShardStats>);

impl SharedStats {
    /// Locks it. Copy out what is needed: the device thread writes it after each batch.
    pub fn lock(&self) -> MutexGuard<'_, ShardStats> {
        lock(&self.0)
    }
}
