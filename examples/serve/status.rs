//! `GET /status`: what the page shows, as JSON.

use kv_cache::ShardReport;
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::occupancy::{self, Occupancy};

/// Everything as of now, and the samples that came after number `since`.
pub(crate) fn json(app: &App, since: u64) -> Value {
    let stats = app.cache.stats();
    let config = app.cache.config();
    let state = app.figures.lock().clone();
    let total = &stats.total;
    let hit_rate = (total.prefix_blocks_asked > 0)
        .then(|| total.prefix_blocks_hit as f64 / total.prefix_blocks_asked as f64);
    let element = config.geometry.groups.first().map(|group| format!("{:?}", group.element).to_lowercase());
    let shards: Vec<Value> = stats.shards.iter().map(|report| shard(app, report)).collect();
    json!({
        "model": app.model,
        "uptime_s": app.started.elapsed().as_secs_f32(),
        "complaints": app.complaints(),
        "limits": {
            "context_tokens": app.context_tokens,
            "running": app.running_max,
            "waiting": app.places_max as usize - app.running_max,
        },
        "requests": {
            "waiting": state.waiting, "running": state.running, "parked": state.parked,
            "finished": state.finished, "ended_otherwise": state.ended_otherwise,
            "preemptions": state.preemptions, "parkings": state.parkings,
        },
        "steps": state.steps,
        "tokens_generated": state.tokens_out,
        "cache": {
            "block_tokens": config.geometry.block_tokens,
            "element": element,
            "sealed_format": app.sealed_format.name(),
            "sequences": stats.sequences_open,
            "tokens": stats.tokens,
            "jobs_in_flight": stats.jobs_in_flight,
            "bytes_in_flight": stats.bytes_in_flight,
            "prefix_blocks_asked": total.prefix_blocks_asked,
            "prefix_blocks_hit": total.prefix_blocks_hit,
            "prefix_tokens_hit": total.prefix_tokens_hit,
            "hit_rate": hit_rate,
            "evictions": total.evictions,
            "queue_wait": stats.queue_wait,
            "batch_service": stats.batch_service,
            "batches": stats.batch_sizes.batches,
            "batch_sizes": stats.batch_sizes.by_power_of_two,
            "errors": stats.errors,
        },
        "shards": shards,
        "samples": app.history.since(since),
    })
}

fn shard(app: &App, report: &ShardReport) -> Value {
    let counters = &report.counters;
    let blocks: Map<String, Value> = occupancy::blocks(counters)
        .into_iter()
        .map(|(state, blocks)| (state.into(), blocks.into()))
        .collect();
    json!({
        "shard": report.shard,
        "lost": report.lost,
        "occupancy": Occupancy::of(counters, app.cache.config()),
        "blocks": blocks,
        "sequences": counters.sequences,
        "operations": counters.operations,
        "seals": counters.seals,
        "waiting_to_seal": counters.blocks_waiting_to_seal,
        "evictions": counters.evictions,
        "mailbox_depth": report.mailbox_depth,
        "transfers_in_flight": report.transfers_in_flight,
    })
}
