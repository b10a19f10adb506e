//! What happened, counted while it happens: operations and latencies by kind, errors, and samples over time.
//!
//! Every task counts into the same atomics: relaxed, because the figures are read as a whole only after the tasks ended
//! and are trends before that.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::histogram::{Counts, Histogram};

/// Kinds of operation that are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Open,
    Append,
    Stage,
    Commit,
    Read,
    Fork,
    Truncate,
    Move,
}

impl Kind {
    pub(crate) const ALL: [Kind; 8] = [
        Kind::Open,
        Kind::Append,
        Kind::Stage,
        Kind::Commit,
        Kind::Read,
        Kind::Fork,
        Kind::Truncate,
        Kind::Move,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Open => "open",
            Kind::Append => "append",
            Kind::Stage => "stage",
            Kind::Commit => "commit",
            Kind::Read => "read",
            Kind::Fork => "fork",
            Kind::Truncate => "truncate",
            Kind::Move => "move",
        }
    }
}

/// What the cache says about itself, in the terms of this program.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Gauges {
    pub(crate) sequences_open: u64,
    pub(crate) blocks_raw: u64,
    pub(crate) blocks_sealed: u64,
    /// Bytes of the raw and of the sealed blocks in use.
    pub(crate) raw_bytes: u64,
    pub(crate) sealed_bytes: u64,
    pub(crate) permits_in_use: u64,
    /// Batches carried out so far, and operations in them.
    pub(crate) batches: u64,
    pub(crate) batched_operations: u64,
    pub(crate) seals: u64,
    /// Full blocks of prompts, and those that were cached.
    pub(crate) prefix_blocks_asked: u64,
    pub(crate) prefix_blocks_hit: u64,
    pub(crate) blocks_deduplicated: u64,
    pub(crate) evictions: u64,
    /// Median and 99th percentile of the wait in queues, microseconds.
    pub(crate) queue_wait_us: (f64, f64),
}

impl Gauges {
    pub(crate) fn blocks_used(&self) -> u64 {
        self.blocks_raw + self.blocks_sealed
    }
}

/// One point of the plots.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sample {
    /// Seconds since the start, at the end of the interval.
    pub(crate) at_s: f64,
    pub(crate) operations_per_second: f64,
    pub(crate) append_tokens_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) raw_bytes: f64,
    pub(crate) sealed_bytes: f64,
    pub(crate) batch_mean: f64,
    pub(crate) sequences_open: f64,
}

/// Samples kept; beyond, two become one and the interval doubles.
const SAMPLES_MAX: usize = 400;
/// Messages of unexpected errors and mismatches that are kept.
const MESSAGES_MAX: usize = 20;

struct Series {
    samples: Vec<Sample>,
    interval: Duration,
    last_at: Instant,
    last_counts: Counts,
    last_tokens: u64,
    last_gauges: Gauges,
}

/// The part of the run that rates and latencies are about.
#[derive(Clone)]
pub(crate) struct Measured {
    pub(crate) seconds: f64,
    pub(crate) append_tokens: u64,
    pub(crate) all: Counts,
    pub(crate) kinds: Vec<(Kind, Counts)>,
}

struct Measuring {
    from: Instant,
    tokens_before: u64,
    ended: Option<Measured>,
}

/// Everything that is counted.
pub(crate) struct Recorder {
    started: Instant,
    all: Histogram,
    kinds: [Histogram; Kind::ALL.len()],
    /// Operations before [`Recorder::start_measuring`], which clears the histograms.
    operations_before: AtomicU64,
    measuring: Mutex<Measuring>,
    pub(crate) append_tokens: AtomicU64,
    pub(crate) read_tokens: AtomicU64,
    /// Futures dropped before they were done.
    pub(crate) cancelled: AtomicU64,
    /// Times that a full cache was answered by waiting or by making room.
    pub(crate) backpressure: AtomicU64,
    pub(crate) closed: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) mismatches: AtomicU64,
    /// Sequences that are open and hold a sealed block, now and at most.
    with_sealed: AtomicU64,
    with_sealed_peak: AtomicU64,
    open: AtomicU64,
    open_peak: AtomicU64,
    messages: Mutex<Vec<String>>,
    series: Mutex<Series>,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        let all = Histogram::new();
        let series = Series {
            samples: Vec::new(),
            interval: Duration::from_millis(100),
            last_at: now,
            last_counts: all.counts(),
            last_tokens: 0,
            last_gauges: Gauges::default(),
        };
        Recorder {
            started: now,
            all,
            kinds: std::array::from_fn(|_| Histogram::new()),
            operations_before: AtomicU64::new(0),
            measuring: Mutex::new(Measuring { from: now, tokens_before: 0, ended: None }),
            append_tokens: AtomicU64::new(0),
            read_tokens: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            backpressure: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            mismatches: AtomicU64::new(0),
            with_sealed: AtomicU64::new(0),
            with_sealed_peak: AtomicU64::new(0),
            open: AtomicU64::new(0),
            open_peak: AtomicU64::new(0),
            messages: Mutex::new(Vec::new()),
            series: Mutex::new(series),
        }
    }

    /// Leaves what came before (filling the cache) out of the latencies and rates; totals keep it.
    pub(crate) fn start_measuring(&self) {
        let before = self.all.counts().total();
        self.operations_before.fetch_add(before, Relaxed);
        self.all.clear();
        self.kinds.iter().for_each(Histogram::clear);
        let tokens_before = self.append_tokens.load(Relaxed);
        *lock(&self.measuring) = Measuring { from: Instant::now(), tokens_before, ended: None };
        lock(&self.series).last_counts = self.all.counts();
    }

    /// Ends the measured part: what follows (the last check of everything, closing) counts in the totals only.
    pub(crate) fn stop_measuring(&self) {
        let measured = self.measured();
        lock(&self.measuring).ended = Some(measured);
    }

    /// The measured part, until now if it has not ended.
    pub(crate) fn measured(&self) -> Measured {
        let measuring = lock(&self.measuring);
        measuring.ended.clone().unwrap_or_else(|| Measured {
            seconds: measuring.from.elapsed().as_secs_f64(),
            append_tokens: self.append_tokens.load(Relaxed) - measuring.tokens_before,
            all: self.all.counts(),
            kinds: Kind::ALL.map(|kind| (kind, self.kinds[kind as usize].counts())).into(),
        })
    }

    /// One operation that was answered, well or not.
    pub(crate) fn operation(&self, kind: Kind, took: Duration) {
        let ns = took.as_nanos().min(u128::from(u64::MAX)) as u64;
        self.all.record(ns);
        self.kinds[kind as usize].record(ns);
    }

    /// An error that nothing in the program provoked.
    pub(crate) fn error(&self, message: impl FnOnce() -> String) {
        self.errors.fetch_add(1, Relaxed);
        self.keep(message);
    }

    /// Something read that was not what had been written.
    pub(crate) fn mismatch(&self, message: impl FnOnce() -> String) {
        self.mismatches.fetch_add(1, Relaxed);
        self.keep(message);
    }

    fn keep(&self, message: impl FnOnce() -> String) {
        let mut messages = lock(&self.messages);
        if messages.len() < MESSAGES_MAX {
            messages.push(message());
        }
    }

    pub(crate) fn sequence_opened(&self) {
        let open = self.open.fetch_add(1, Relaxed) + 1;
        self.open_peak.fetch_max(open, Relaxed);
    }

    pub(crate) fn sequence_closed(&self) {
        self.open.fetch_sub(1, Relaxed);
        self.closed.fetch_add(1, Relaxed);
    }

    /// A sequence now holds a sealed block, and did not before.
    pub(crate) fn sealed_gained(&self) {
        let now = self.with_sealed.fetch_add(1, Relaxed) + 1;
        self.with_sealed_peak.fetch_max(now, Relaxed);
    }

    /// A sequence is about to lose its last sealed block.
    pub(crate) fn sealed_lost(&self) {
        self.with_sealed.fetch_sub(1, Relaxed);
    }

    pub(crate) fn open_now(&self) -> u64 {
        self.open.load(Relaxed)
    }

    pub(crate) fn open_peak(&self) -> u64 {
        self.open_peak.load(Relaxed)
    }

    pub(crate) fn with_sealed(&self) -> (u64, u64) {
        (self.with_sealed.load(Relaxed), self.with_sealed_peak.load(Relaxed))
    }

    pub(crate) fn operations(&self) -> u64 {
        self.operations_before.load(Relaxed) + self.all.counts().total()
    }

    /// When the measured part began, on the time line of the samples.
    pub(crate) fn measured_from_s(&self) -> f64 {
        (lock(&self.measuring).from - self.started).as_secs_f64()
    }

    pub(crate) fn messages(&self) -> Vec<String> {
        lock(&self.messages).clone()
    }

    pub(crate) fn samples(&self) -> Vec<Sample> {
        lock(&self.series).samples.clone()
    }

    /// Adds a sample if it is time for one, and returns the latest.
    pub(crate) fn sample(&self, gauges: Gauges) -> Sample {
        let mut series = lock(&self.series);
        let (now, seconds) = (Instant::now(), series.last_at.elapsed().as_secs_f64());
        if now - series.last_at < series.interval {
            return series.samples.last().copied().unwrap_or_default();
        }
        let (counts, tokens) = (self.all.counts(), self.append_tokens.load(Relaxed));
        let fresh = counts.since(&series.last_counts);
        let batches = gauges.batches.saturating_sub(series.last_gauges.batches);
        let batched = gauges.batched_operations.saturating_sub(series.last_gauges.batched_operations);
        let sample = Sample {
            at_s: (now - self.started).as_secs_f64(),
            operations_per_second: fresh.total() as f64 / seconds,
            append_tokens_per_second: (tokens - series.last_tokens) as f64 / seconds,
            p50_us: fresh.quantile_us(0.50),
            p99_us: fresh.quantile_us(0.99),
            raw_bytes: gauges.raw_bytes as f64,
            sealed_bytes: gauges.sealed_bytes as f64,
            batch_mean: batched as f64 / batches.max(1) as f64,
            sequences_open: gauges.sequences_open as f64,
        };
        series.samples.push(sample);
        (series.last_at, series.last_counts, series.last_tokens) = (now, counts, tokens);
        series.last_gauges = gauges;
        if series.samples.len() >= SAMPLES_MAX {
            series.samples = series.samples.chunks(2).map(merge).collect();
            series.interval *= 2;
        }
        sample
    }
}

/// Two neighbouring samples as one: rates and levels on average, the tail as the worse of both.
fn merge(pair: &[Sample]) -> Sample {
    let mean = |of: fn(&Sample) -> f64| pair.iter().map(of).sum::<f64>() / pair.len() as f64;
    Sample {
        at_s: pair[pair.len() - 1].at_s,
        operations_per_second: mean(|s| s.operations_per_second),
        append_tokens_per_second: mean(|s| s.append_tokens_per_second),
        p50_us: mean(|s| s.p50_us),
        p99_us: pair.iter().map(|s| s.p99_us).fold(0.0, f64::max),
        raw_bytes: mean(|s| s.raw_bytes),
        sealed_bytes: mean(|s| s.sealed_bytes),
        batch_mean: mean(|s| s.batch_mean),
        sequences_open: mean(|s| s.sequences_open),
    }
}

/// A panicking task must not take the report with it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measuring_starts_afresh_and_totals_go_on() {
        let recorder = Recorder::new();
        recorder.operation(Kind::Open, Duration::from_millis(500));
        recorder.start_measuring();
        recorder.operation(Kind::Read, Duration::from_micros(10));
        assert_eq!(recorder.operations(), 2);
        recorder.stop_measuring();
        recorder.operation(Kind::Read, Duration::from_secs(1));
        assert!(recorder.measured().all.quantile_us(1.0) < 11.0);
        assert_eq!(recorder.operations(), 3);
    }
}
