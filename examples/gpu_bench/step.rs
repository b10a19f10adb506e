//! A decode step through the public API: 256 sequences append one token each (8 heads × 128, f16) as one batch.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::Context;
use cudarc::driver::DevicePtr;
use kv_cache::cuda::{DeviceTensor, StreamPoint};
use kv_cache::half::f16;
use kv_cache::{BatchCacheOperations, Cache, Devices, ElementType, Format, Geometry, OpenOptions, Sequence};

use crate::table::{Table, median};

const SEQUENCES: usize = 256;
const HEADS: usize = 8;
const DIM: usize = 128;
/// Elements of one token's keys, or values.
const TOKEN: usize = HEADS * DIM;
/// Elements of the keys, or values, of a step of one layer.
const HALF: usize = SEQUENCES * TOKEN;
const TOKEN_IDS: [u32; SEQUENCES] = [1; SEQUENCES];
const BLOCK: usize = 32;
/// Rounds of 32 steps, of one layer and of as many as models have; the first one warms up.
const ROUNDS: usize = 33;
const LAYERS: usize = 32;
const ROUNDS_OF_LAYERS: usize = 9;

pub(crate) fn measure(table: &mut Table) -> anyhow::Result<()> {
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    table.group(
        "decode step: 256 sequences append one token, 8 heads × 128, f16, one layer; medians of 32 rounds",
    );
    // On a worker, as a server's tasks are.
    let steps = tokio.block_on(async { tokio::spawn(from_host()).await })??;
    steps.print(table, "from host memory", 200.0);
    let mut steps = tokio.block_on(async { tokio::spawn(from_lent(Format::Int8)).await })??;
    let int8 = median(&mut steps.whole_us);
    steps.print(table, "from lent pinned memory", 120.0);
    let of = |format| -> anyhow::Result<f64> {
        let steps = tokio.block_on(async { tokio::spawn(from_lent(format)).await })?;
        Ok(median(&mut steps?.whole_us))
    };
    let raw = of(Format::Raw)?;
    for (format, whole) in [
        (Format::Raw, raw),
        (Format::Int8, int8),
        (Format::Int4, of(Format::Int4)?),
        (Format::R4, of(Format::R4)?),
    ] {
        let what = format!("from lent pinned memory, {format}, seals included, a step");
        table.row(&what, whole, "µs", Some((whole / raw, "of raw, reach 1.10")));
    }
    let steps = tokio.block_on(async { tokio::spawn(from_device(1, 0)).await })??;
    steps.print(table, "from device memory, each awaited until done", 40.0);
    let steps = tokio.block_on(async { tokio::spawn(from_device(1, 2)).await })??;
    steps.print(table, "from device memory, back to back", 40.0);
    table.group("the same, 32 layers");
    let steps = tokio.block_on(async { tokio::spawn(from_device(LAYERS, 2)).await })??;
    steps.print(table, "from device memory, back to back", 40.0);
    Ok(())
}

/// Times of rounds of 32 steps.
struct Steps {
    rounds: usize,
    started: Instant,
    done: usize,
    times: Vec<f64>,
    /// Mean of the 32 steps of each round.
    mean_us: Vec<f64>,
    /// The step that fills all blocks.
    filling_us: Vec<f64>,
    /// From the start of that step until all 256 blocks are sealed.
    sealed_us: Vec<f64>,
    /// From the start of a round until all its blocks are sealed, a step.
    whole_us: Vec<f64>,
}

impl Steps {
    fn new(rounds: usize) -> Self {
        let [times, mean_us, filling_us, sealed_us, whole_us] = [const { Vec::new() }; 5];
        Steps { rounds, started: Instant::now(), done: 0, times, mean_us, filling_us, sealed_us, whole_us }
    }

    /// Begins a step, or says that there were enough.
    fn next(&mut self) -> bool {
        self.started = Instant::now();
        self.done < self.rounds * BLOCK
    }

    /// Whether the step that has begun is the last before all blocks seal.
    fn is_last_of_round(&self) -> bool {
        (self.done + 1).is_multiple_of(BLOCK)
    }

    /// Ends a step, and after the last of a round waits until all blocks are sealed.
    fn end(&mut self, cache: &Cache) {
        let passed = |started: Instant| started.elapsed().as_secs_f64() * 1e6;
        self.times.push(passed(self.started));
        self.done += 1;
        if !self.done.is_multiple_of(BLOCK) {
            return;
        }
        let sealed = self.done / BLOCK * SEQUENCES;
        while cache.stats().total.seals < sealed as u64 {
            std::hint::spin_loop();
        }
        let times = std::mem::take(&mut self.times);
        if self.done > BLOCK {
            let sealed = passed(self.started);
            self.sealed_us.push(sealed);
            let before = times[..BLOCK - 1].iter().sum::<f64>();
            self.whole_us.push((before + sealed) / BLOCK as f64);
            self.mean_us.push(times.iter().sum::<f64>() / BLOCK as f64);
            self.filling_us.push(times[BLOCK - 1]);
        }
    }

    fn print(mut self, table: &mut Table, what: &str, reach_us: f64) {
        let mean = median(&mut self.mean_us);
        table.row(
            &format!("{what}, mean of 32 steps"),
            mean,
            "µs",
            Some((mean / reach_us, &format!("of {reach_us} µs"))),
        );
        table.row(
            &format!("{what}, the step that fills all 256 blocks"),
            median(&mut self.filling_us),
            "µs",
            None,
        );
        table.row(
            &format!("{what}, from then until all are sealed"),
            median(&mut self.sealed_us),
            "µs",
            None,
        );
    }
}

async fn open(layers: usize, format: Format) -> anyhow::Result<(Cache, Vec<Sequence>)> {
    let cache = Cache::builder(Geometry::new(layers as u32, HEADS as u32, DIM as u32, ElementType::F16))
        .devices(Devices::cuda(1))
        .memory_bytes_per_device(if layers == 1 { 4 << 30 } else { 12 << 30 })
        .sealed_format(format)
        // Every block, whatever its format.
        .configure(|c| (c.quantisation.raw_sinks, c.quantisation.raw_window_blocks) = (Some(false), Some(0)))
        .build()
        .await
        .context("a cache on the GPU")?;
    let mut sequences = Vec::new();
    for _ in 0..SEQUENCES {
        sequences.push(cache.open("bench", OpenOptions::default()).await?);
    }
    Ok((cache, sequences))
}

/// Keys and behind them values, `[layers, sequences, kv_heads, dim]`.
fn rows(layers: usize) -> Vec<f16> {
    (0..2 * layers * HALF).map(|i| f16::from_f32((i % 251) as f32 * 0.01 - 1.0)).collect()
}

async fn from_host() -> anyhow::Result<Steps> {
    let (cache, sequences) = open(1, Format::Int8).await?;
    let (rows, all) = (rows(1), sequences.iter().collect::<Vec<_>>());
    let mut steps = Steps::new(ROUNDS);
    while steps.next() {
        let batch = cache.batch(2 * rows.len()).append_each(&all, &TOKEN_IDS, &rows[..HALF], &rows[HALF..]);
        submit(&cache, batch).await?;
        steps.end(&cache);
    }
    Ok(steps)
}

/// The model has left its rows in memory that the cache lends: filling it is not the cache's time.
async fn from_lent(format: Format) -> anyhow::Result<Steps> {
    let (cache, sequences) = open(1, format).await?;
    let (rows, all) = (rows(1), sequences.iter().collect::<Vec<_>>());
    let mut steps = Steps::new(ROUNDS);
    loop {
        let mut batch = cache.batch(2 * rows.len());
        let region = batch.region::<f16>(rows.len())?;
        batch.fill(&region).copy_from_slice(&rows);
        if !steps.next() {
            return Ok(steps);
        }
        let batch =
            batch.append_each_region(&all, &TOKEN_IDS, &region.slice(0..HALF), &region.slice(HALF..2 * HALF));
        submit(&cache, batch).await?;
        steps.end(&cache);
    }
}

async fn submit(cache: &Cache, batch: BatchCacheOperations) -> anyhow::Result<()> {
    for result in cache.submit(batch).await? {
        result?;
    }
    Ok(())
}

/// The rows lie in device memory behind a point of the model's stream, and the stream waits for the cache to have read them.
///
/// `ahead`: so many steps are submitted before the first of them is known to be on the queue, as a server does that enqueues
/// its model's kernels ahead of the device.
async fn from_device(layers: usize, ahead: usize) -> anyhow::Result<Steps> {
    let (cache, sequences) = open(layers, Format::Int8).await?;
    let stream = cudarc::driver::CudaContext::new(0)?.new_stream()?;
    let bits: Vec<u16> = rows(layers).iter().map(|x| x.to_bits()).collect();
    let memory = stream.clone_htod(&bits)?;
    stream.synchronize()?;
    let (address, _guard) = memory.device_ptr(&stream);
    // SAFETY: `memory` outlives the cache, and nobody writes to it.
    let tensor = unsafe { DeviceTensor::from_raw::<f16>(address, bits.len())? };
    let mut steps = Steps::new(if layers == 1 { ROUNDS } else { ROUNDS_OF_LAYERS });
    let half = bits.len() / 2;
    let (keys, values) = (tensor.slice(0..half), tensor.slice(half..2 * half));
    let all: Vec<_> = sequences.iter().collect();
    let mut outstanding = VecDeque::new();
    while steps.next() {
        let batch = BatchCacheOperations::new()
            .device_memory(StreamPoint::record(&stream)?)
            .append_each_device(&all, &TOKEN_IDS, &keys, &values);
        let step = cache.try_enqueue(batch).map_err(|(_, error)| error)?;
        outstanding.push_back(Box::pin(step));
        let most = if steps.is_last_of_round() { 0 } else { ahead };
        while outstanding.len() > most {
            if let Some(step) = outstanding.pop_front() {
                let step = step.await?;
                if let Some(point) = step.point() {
                    point.wait(&stream)?;
                }
                for result in step.done().await? {
                    result?;
                }
            }
        }
        steps.end(&cache);
    }
    Ok(steps)
}
