//! Shared prefixes: 256 sequences open with a prompt of 2,048 tokens that is cached (8 heads × 128, f16, one layer), beside prefilling it.

use std::time::Instant;

use anyhow::{Context, ensure};
use kv_cache::half::f16;
use kv_cache::{BatchCacheOperations, Cache, Devices, ElementType, Format, Geometry, OpenOptions, Outcome};

use crate::table::{Table, median};

const SEQUENCES: usize = 256;
const PROMPT_TOKENS: usize = 2048;
const BLOCK: usize = 32;
const HEADS: usize = 8;
const DIM: usize = 128;
/// Rounds of 256 opens; the first one warms up.
const ROUNDS: usize = 9;

pub(crate) fn measure(table: &mut Table, devices: Devices) -> anyhow::Result<()> {
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // On a worker, as a server's tasks are.
    let mut figures = tokio.block_on(async { tokio::spawn(run(devices)).await })??;
    let prefill = median(&mut figures.prefill_us);
    table.group(&format!(
        "a prompt of 2,048 tokens, 8 heads × 128, f16, one layer, on {devices:?}; medians over 256 sequences"
    ));
    table.row("prefilling it, from host memory", prefill, "µs", None);
    for (what, times) in [
        ("opening with it cached, one after the other", &mut figures.open_us),
        ("opening with it cached, 256 as one batch, each", &mut figures.batch_us),
    ] {
        let open = median(times);
        table.row(what, open, "µs", Some((open / prefill, "of prefilling it")));
    }
    table.row("closing one of them", median(&mut figures.close_us), "µs", None);
    table.row("blocks found by each", figures.found as f64, "", None);
    Ok(())
}

struct Figures {
    prefill_us: Vec<f64>,
    open_us: Vec<f64>,
    batch_us: Vec<f64>,
    close_us: Vec<f64>,
    found: usize,
}

fn passed(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e6
}

async fn run(devices: Devices) -> anyhow::Result<Figures> {
    let cache = Cache::builder(Geometry::new(1, HEADS as u32, DIM as u32, ElementType::F16))
        .devices(devices)
        .memory_bytes_per_device(1 << 30)
        .sealed_format(Format::Int8)
        .build()
        .await
        .context("a cache")?;
    let rows: Vec<f16> =
        (0..PROMPT_TOKENS * HEADS * DIM).map(|i| f16::from_f32((i % 251) as f32 * 0.01 - 1.0)).collect();
    let ids: Vec<u32> = (0..PROMPT_TOKENS as u32).collect();
    // A question behind it: all of the prompt's blocks may be found.
    let question = [&ids[..], &[7]].concat();
    let options = || OpenOptions::default().prompt(&question);
    let mut prefill_us = Vec::new();
    for _ in 0..SEQUENCES {
        // Shares nothing, so it has to be computed whole.
        let sequence = cache.open("bench", OpenOptions::default()).await?;
        let started = Instant::now();
        sequence.append(&ids, &rows, &rows).await?;
        prefill_us.push(passed(started));
        sequence.close().await?;
    }
    let first = cache.open("bench", options()).await?;
    ensure!(first.is_empty(), "{} tokens of the prompt are cached before anybody computed it", first.len());
    first.append(&ids, &rows, &rows).await?;
    first.close().await?;

    let (mut open_us, mut batch_us, mut close_us) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut sequences = Vec::with_capacity(SEQUENCES);
        for _ in 0..SEQUENCES {
            let started = Instant::now();
            sequences.push(cache.open("bench", options()).await?);
            if round > 0 {
                open_us.push(passed(started));
            }
        }
        ensure!(sequences.iter().all(|s| s.len() as usize == PROMPT_TOKENS), "not all of it was found");
        for sequence in sequences {
            let started = Instant::now();
            sequence.close().await?;
            if round > 0 {
                close_us.push(passed(started));
            }
        }
        let started = Instant::now();
        let batch =
            (0..SEQUENCES).fold(BatchCacheOperations::new(), |batch, _| batch.open("bench", options()));
        let results = cache.submit(batch).await?;
        if round > 0 {
            batch_us.push(passed(started) / SEQUENCES as f64);
        }
        for result in results {
            let Outcome::Opened(sequence) = result? else { continue };
            ensure!(sequence.len() as usize == PROMPT_TOKENS, "not all of it was found");
        }
    }
    ensure!(cache.stats().total.evictions == 0, "the prompt had to make way");
    Ok(Figures { prefill_us, open_us, batch_us, close_us, found: PROMPT_TOKENS / BLOCK })
}
