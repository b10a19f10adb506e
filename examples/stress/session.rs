//! The cache of one run: opened from the options, watched while the load is on, and searched for leaks at the end.
//!
//! The only file here that reads the cache's statistics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use kv_cache::{Cache, Devices, ElementType, Exit, Format, Geometry, Invalidate, Stats};
use tokio::task::JoinHandle;

use crate::content::Shape;
use crate::recorder::{Gauges, Recorder, Sample};

/// How long closing sequences and returning permits may take before what is left counts as leaked.
const SETTLE_MAX: Duration = Duration::from_secs(10);
const SHUTDOWN_MAX: Duration = Duration::from_secs(10);
const SAMPLE_EVERY: Duration = Duration::from_millis(50);

/// What a cache is opened with.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) shape: Shape,
    pub(crate) format: Format,
    pub(crate) devices: Devices,
    pub(crate) shards: u16,
    /// Bytes of all shards together.
    pub(crate) memory_bytes: u64,
    /// Sequences that may be open at once.
    pub(crate) sequences_max: usize,
    pub(crate) seed: u64,
}

/// A cache under load.
pub(crate) struct Session {
    pub(crate) cache: Cache,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) setup: Setup,
}

/// What was still in use when nothing should have been.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Leaks {
    pub(crate) blocks: u64,
    pub(crate) permits: u64,
    pub(crate) sequences: u64,
}

impl Session {
    pub(crate) async fn open(setup: Setup) -> anyhow::Result<Self> {
        let Shape { layers, kv_heads, head_dim, block_tokens } = setup.shape;
        let geometry = Geometry::new(layers, kv_heads, head_dim, ElementType::F16).block_tokens(block_tokens);
        let cache = Cache::builder(geometry)
            .devices(setup.devices)
            .memory_bytes_per_device(setup.memory_bytes / u64::from(setup.shards))
            .sealed_format(setup.format)
            .max_sequences(setup.sequences_max)
            // Room for some of the sealed blocks: moves there are refused now and then, too.
            .configure(|c| c.host_tier_bytes_per_device = setup.memory_bytes / u64::from(8 * setup.shards))
            .build()
            .await
            .context("the cache cannot be opened")?;
        Ok(Session { cache, recorder: Arc::new(Recorder::new()), setup })
    }

    pub(crate) fn gauges(&self) -> Gauges {
        gauges(&self.cache.stats(), &self.setup.shape)
    }

    /// Takes samples and moves `bar` until the handle is aborted. `progress` says how far the load is.
    pub(crate) fn watch(
        &self,
        bar: ProgressBar,
        progress: impl Fn(&ProgressBar, &Sample) + Send + 'static,
    ) -> JoinHandle<()> {
        let (cache, recorder, shape) = (self.cache.clone(), self.recorder.clone(), self.setup.shape);
        tokio::spawn(async move {
            loop {
                let sample = recorder.sample(gauges(&cache.stats(), &shape));
                progress(&bar, &sample);
                tokio::time::sleep(SAMPLE_EVERY).await;
            }
        })
    }

    /// Waits until everything is given back, what is cached as well, or long enough to call the rest leaked. Every sequence must be
    /// closed.
    pub(crate) async fn leaks(&self) -> Leaks {
        let deadline = Instant::now() + SETTLE_MAX;
        loop {
            // Again and again: what was cancelled may be carried out until the last sequence has closed, and be cached then.
            if let Err(error) = self.cache.invalidate(Invalidate::All).await {
                self.recorder.error(|| format!("what is cached cannot be given up: {error}"));
            }
            let now = self.gauges();
            let leaks = Leaks {
                blocks: now.blocks_used(),
                permits: now.permits_in_use,
                sequences: now.sequences_open,
            };
            let clean = leaks.blocks == 0 && leaks.permits == 0 && leaks.sequences == 0;
            if clean || Instant::now() > deadline {
                return leaks;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Ends the cache. An actor that did not end, or not well, counts as an error.
    pub(crate) async fn shutdown(&self) {
        let report = self.cache.shutdown(SHUTDOWN_MAX).await;
        let ended_well = report.exits.iter().all(|(_, exit)| *exit == Exit::Finished);
        if !report.drained || !ended_well {
            self.recorder.error(|| format!("the shutdown did not go well: {report:?}"));
        }
    }
}

/// The bar on standard error; hidden where that is not a terminal.
pub(crate) fn bar(length: u64, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let template = format!("{{elapsed:>4}} {{wide_bar}} {{pos}}/{{len}} {unit}  {{msg}}");
    bar.set_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Sums over the shards.
fn gauges(stats: &Stats, shape: &Shape) -> Gauges {
    let core = &stats.total;
    let blocks_raw = core.blocks_used - core.blocks_sealed;
    let raw_bytes = blocks_raw * shape.block_bytes();
    Gauges {
        sequences_open: stats.sequences_open as u64,
        blocks_raw,
        blocks_sealed: core.blocks_sealed,
        raw_bytes,
        sealed_bytes: core.bytes_used.saturating_sub(raw_bytes),
        permits_in_use: stats.jobs_in_flight,
        batches: stats.batch_sizes.batches,
        batched_operations: stats.batch_sizes.operations,
        seals: core.seals,
        prefix_blocks_asked: core.prefix_blocks_asked,
        prefix_blocks_hit: core.prefix_blocks_hit,
        blocks_deduplicated: core.blocks_deduplicated,
        evictions: core.evictions,
        queue_wait_us: (stats.queue_wait.p50_us, stats.queue_wait.p99_us),
    }
}
