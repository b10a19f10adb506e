//! `GET /metrics`: what the `metrics` facade has collected, and the cache's own statistics, as Prometheus text.

use std::sync::{Mutex, OnceLock, PoisonError};

use kv_cache::{Cache, CoreCounters};
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::{figures, occupancy};

/// From half a millisecond to a minute.
const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// A process has one recorder. An embedder who has one already leaves this out.
static RECORDER: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Installs the recorder, once.
pub(crate) fn install() {
    let recorder = RECORDER.get_or_init(|| {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
            .and_then(|builder| builder.set_buckets(COUNTS));
        let installed = builder.and_then(PrometheusBuilder::install_recorder);
        installed.inspect_err(|error| tracing::warn!(%error, "there will be no metrics")).ok()
    });
    if recorder.is_some() {
        figures::describe();
    }
}

/// The text. The cache keeps its own counters: they are copied when somebody asks. One at a time: a process has one recorder, and with two
/// servers in it one's text would have the other's figures.
pub(crate) fn render(cache: &Cache) -> String {
    static TURN: Mutex<()> = Mutex::new(());
    let Some(recorder) = RECORDER.get().and_then(Option::as_ref) else { return String::new() };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let stats = cache.stats();
    gauge!("kv_cache_sequences_open").set(stats.sequences_open as f64);
    gauge!("kv_cache_tokens").set(stats.tokens as f64);
    gauge!("kv_cache_jobs_in_flight").set(stats.jobs_in_flight as f64);
    gauge!("kv_cache_bytes_in_flight").set(stats.bytes_in_flight as f64);
    for (kind, count) in &stats.errors {
        counter!("kv_cache_errors_total", "kind" => format!("{kind:?}")).absolute(*count);
    }
    for shard in &stats.shards {
        let number = shard.shard.to_string();
        gauge!("kv_cache_shard_lost", "shard" => number.clone()).set(if shard.lost.is_some() {
            1.0
        } else {
            0.0
        });
        gauge!("kv_cache_mailbox_depth", "shard" => number.clone()).set(shard.mailbox_depth as f64);
        gauge!("kv_cache_transfers_in_flight", "shard" => number.clone())
            .set(shard.transfers_in_flight as f64);
        copy_counters(&number, &shard.counters);
    }
    recorder.run_upkeep();
    recorder.render()
}

fn copy_counters(shard: &str, counters: &CoreCounters) {
    for (state, blocks) in occupancy::blocks(counters) {
        gauge!("kv_cache_blocks", "shard" => shard.to_owned(), "state" => state).set(blocks as f64);
    }
    gauge!("kv_cache_bytes_used", "shard" => shard.to_owned()).set(counters.bytes_used as f64);
    let totals = [
        ("kv_cache_operations_total", counters.operations),
        ("kv_cache_tokens_committed_total", counters.tokens_committed),
        ("kv_cache_seals_total", counters.seals),
        ("kv_cache_prefix_blocks_asked_total", counters.prefix_blocks_asked),
        ("kv_cache_prefix_blocks_hit_total", counters.prefix_blocks_hit),
        ("kv_cache_prefix_tokens_hit_total", counters.prefix_tokens_hit),
        ("kv_cache_blocks_deduplicated_total", counters.blocks_deduplicated),
        ("kv_cache_evictions_total", counters.evictions),
    ];
    for (name, total) in totals {
        counter!(name, "shard" => shard.to_owned()).absolute(total);
    }
}
