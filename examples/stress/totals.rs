//! The figures of a run, as one JSON object and as text.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use serde::Serialize;

use crate::histogram::Counts;
use crate::page::grouped;
use crate::recorder::{Gauges, Recorder};
use crate::replay::ReplayTotals;
use crate::session::{Leaks, Setup};

/// Everything that is reported. Field names are the JSON's.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Totals {
    pub(crate) mode: &'static str,
    pub(crate) seed: u64,
    pub(crate) format: String,
    pub(crate) shards: u16,
    pub(crate) geometry: String,
    pub(crate) memory_bytes: u64,
    /// Tasks that carried the load; in a replay, one a request.
    pub(crate) tasks: usize,
    /// Asked for in a synthetic run; requests in a replay.
    pub(crate) sequences: u64,
    pub(crate) peak_open: u64,
    /// Most sequences that were open at once and held a sealed block.
    pub(crate) peak_open_with_sealed_blocks: u64,
    /// Answered operations of the whole run.
    pub(crate) operations: u64,
    pub(crate) cancelled: u64,
    /// Times that a full cache made the load wait or give up a sequence.
    pub(crate) backpressure: u64,
    pub(crate) errors: u64,
    pub(crate) mismatches: u64,
    pub(crate) leaked_blocks: u64,
    pub(crate) leaked_permits: u64,
    pub(crate) leaked_sequences: u64,
    /// The measured part, which rates and percentiles are about.
    pub(crate) seconds: f64,
    /// The whole run, filling and the last check included.
    pub(crate) wall_seconds: f64,
    pub(crate) operations_per_second: f64,
    pub(crate) append_tokens: u64,
    pub(crate) append_tokens_per_second: f64,
    /// Tokens of one layer that were read and compared.
    pub(crate) checked_tokens: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) queue_wait_p50_us: f64,
    pub(crate) queue_wait_p99_us: f64,
    /// Operations in a batch, on average.
    pub(crate) batch_mean: f64,
    pub(crate) batches: u64,
    pub(crate) seals: u64,
    /// Full blocks of the prompts that sequences were opened with, those of them that were cached, and their share.
    pub(crate) prefix_blocks_asked: u64,
    pub(crate) prefix_blocks_hit: u64,
    pub(crate) prefix_hit_ratio: f64,
    /// Blocks that were computed although another sequence had them cached by then.
    pub(crate) blocks_deduplicated: u64,
    /// Cached blocks that made way.
    pub(crate) evictions: u64,
    pub(crate) interrupted: bool,
    pub(crate) by_kind: BTreeMap<&'static str, KindTotals>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub(crate) replay: Option<ReplayTotals>,
    /// The first unexpected errors and mismatches, in words.
    pub(crate) messages: Vec<String>,
}

/// The measured part of one kind of operation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct KindTotals {
    pub(crate) operations: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

impl KindTotals {
    fn of(counts: &Counts) -> Self {
        let (p50_us, p99_us) = (counts.quantile_us(0.50), counts.quantile_us(0.99));
        KindTotals { operations: counts.total(), p50_us, p99_us }
    }
}

/// What the totals are made of beside the recorder's counts.
pub(crate) struct Run<'a> {
    pub(crate) setup: &'a Setup,
    pub(crate) tasks: usize,
    pub(crate) sequences: u64,
    pub(crate) wall_seconds: f64,
    pub(crate) interrupted: bool,
    pub(crate) replay: Option<ReplayTotals>,
    pub(crate) gauges: Gauges,
    pub(crate) leaks: Leaks,
}

impl Totals {
    pub(crate) fn new(run: Run<'_>, recorder: &Recorder) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let measured = recorder.measured();
        let all = KindTotals::of(&measured.all);
        let gauges = run.gauges;
        Totals {
            mode: if run.replay.is_some() { "trace" } else { "synthetic" },
            seed: run.setup.seed,
            format: run.setup.format.to_string(),
            shards: run.setup.shards,
            geometry: run.setup.shape.to_string(),
            memory_bytes: run.setup.memory_bytes,
            tasks: run.tasks,
            sequences: run.sequences,
            peak_open: recorder.open_peak(),
            peak_open_with_sealed_blocks: recorder.with_sealed().1,
            operations: recorder.operations(),
            cancelled: recorder.cancelled.load(Relaxed),
            backpressure: recorder.backpressure.load(Relaxed),
            errors: recorder.errors.load(Relaxed),
            mismatches: recorder.mismatches.load(Relaxed),
            leaked_blocks: run.leaks.blocks,
            leaked_permits: run.leaks.permits,
            leaked_sequences: run.leaks.sequences,
            seconds: measured.seconds,
            wall_seconds: run.wall_seconds,
            operations_per_second: all.operations as f64 / measured.seconds,
            append_tokens: recorder.append_tokens.load(Relaxed),
            append_tokens_per_second: measured.append_tokens as f64 / measured.seconds,
            checked_tokens: recorder.read_tokens.load(Relaxed),
            p50_us: all.p50_us,
            p99_us: all.p99_us,
            queue_wait_p50_us: gauges.queue_wait_us.0,
            queue_wait_p99_us: gauges.queue_wait_us.1,
            batch_mean: gauges.batched_operations as f64 / gauges.batches.max(1) as f64,
            batches: gauges.batches,
            seals: gauges.seals,
            prefix_blocks_asked: gauges.prefix_blocks_asked,
            prefix_blocks_hit: gauges.prefix_blocks_hit,
            prefix_hit_ratio: gauges.prefix_blocks_hit as f64 / gauges.prefix_blocks_asked.max(1) as f64,
            blocks_deduplicated: gauges.blocks_deduplicated,
            evictions: gauges.evictions,
            interrupted: run.interrupted,
            by_kind: measured
                .kinds
                .iter()
                .map(|(kind, counts)| (kind.name(), KindTotals::of(counts)))
                .collect(),
            replay: run.replay,
            messages: recorder.messages(),
        }
    }

    /// Nothing went wrong and nothing was left behind.
    pub(crate) fn is_clean(&self) -> bool {
        let wrong = self.errors + self.mismatches;
        wrong + self.leaked_blocks + self.leaked_permits + self.leaked_sequences == 0
    }

    /// Name and value of everything but the kinds, as text for people.
    pub(crate) fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![
            ("geometry", self.geometry.clone()),
            ("format", self.format.clone()),
            ("shards", self.shards.to_string()),
            ("memory", mib(self.memory_bytes)),
            ("seed", self.seed.to_string()),
            ("tasks", grouped(self.tasks as u64)),
            ("sequences", grouped(self.sequences)),
            ("peak open", grouped(self.peak_open)),
            ("peak open with sealed blocks", grouped(self.peak_open_with_sealed_blocks)),
            ("operations", grouped(self.operations)),
            ("cancelled", grouped(self.cancelled)),
            ("backpressure", grouped(self.backpressure)),
            ("errors", grouped(self.errors)),
            ("mismatches", grouped(self.mismatches)),
            ("leaked blocks", grouped(self.leaked_blocks)),
            ("leaked permits", grouped(self.leaked_permits)),
            ("leaked sequences", grouped(self.leaked_sequences)),
            ("measured", format!("{:.1} s of {:.1} s", self.seconds, self.wall_seconds)),
            ("operations per second", grouped(self.operations_per_second as u64)),
            ("appended tokens", grouped(self.append_tokens)),
            ("appended tokens per second", grouped(self.append_tokens_per_second as u64)),
            ("checked tokens", grouped(self.checked_tokens)),
            ("latency p50", micros(self.p50_us)),
            ("latency p99", micros(self.p99_us)),
            ("queue wait p50", micros(self.queue_wait_p50_us)),
            ("queue wait p99", micros(self.queue_wait_p99_us)),
            (
                "operations in a batch",
                format!("{:.1} on average, {} batches", self.batch_mean, grouped(self.batches)),
            ),
            ("seals", grouped(self.seals)),
            (
                "prefix blocks found",
                format!(
                    "{} of {}, {:.1} %",
                    grouped(self.prefix_blocks_hit),
                    grouped(self.prefix_blocks_asked),
                    100.0 * self.prefix_hit_ratio
                ),
            ),
            ("blocks deduplicated", grouped(self.blocks_deduplicated)),
            ("evictions", grouped(self.evictions)),
        ];
        if let Some(replay) = &self.replay {
            rows.extend([
                ("trace", replay.trace.clone()),
                ("speed", format!("{} ×", replay.speed)),
                (
                    "requests",
                    format!("{} of {}", grouped(replay.requests_completed), grouped(replay.requests)),
                ),
                ("prefill tokens", grouped(replay.prefill_tokens)),
                ("prompt tokens found", grouped(replay.found_tokens)),
                ("decode tokens", grouped(replay.decode_tokens)),
                ("peak concurrent", grouped(replay.peak_concurrent)),
                ("waits for admission", grouped(replay.admission_waits)),
                ("behind the clock at the end", format!("{:.1} s", replay.last_arrival_late_seconds)),
            ]);
        }
        if self.interrupted {
            rows.push(("interrupted", "by Ctrl-C".into()));
        }
        rows
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.rows() {
            writeln!(f, "{name:<30}{value}")?;
        }
        writeln!(f, "\n{:<12}{:>14}{:>12}{:>12}", "operation", "count", "p50", "p99")?;
        for (name, kind) in self.by_kind.iter().filter(|(_, kind)| kind.operations > 0) {
            let (p50, p99) = (micros(kind.p50_us), micros(kind.p99_us));
            writeln!(f, "{name:<12}{:>14}{p50:>12}{p99:>12}", grouped(kind.operations))?;
        }
        self.messages.iter().try_for_each(|message| writeln!(f, "! {message}"))
    }
}

/// Microseconds in the unit that reads best.
pub(crate) fn micros(us: f64) -> String {
    let mut out = String::new();
    let _ = match us {
        us if us < 1e3 => write!(out, "{us:.1} µs"),
        us if us < 1e6 => write!(out, "{:.2} ms", us / 1e3),
        us => write!(out, "{:.2} s", us / 1e6),
    };
    out
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([3.0, 4500.0, 2.5e6].map(micros), ["3.0 µs", "4.50 ms", "2.50 s"]);
    }
}
