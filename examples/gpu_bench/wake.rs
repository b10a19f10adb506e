//! How soon a task runs again once its transfer is done: 10,000 tasks with one awaited read each over the transfer actor's lanes,
//! beside 10,000 tasks that a bare thread answers by a oneshot.

use std::time::Instant;

use kv_cache::half::f16;
use kv_cache::{BatchCacheOperations, Cache, Devices, ElementType, Format, Geometry, OpenOptions, Sequence};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::table::{Table, quantile};

const TASKS: usize = 10_000;
const ROUNDS: usize = 10;
const DIM: usize = 64;

pub(crate) fn measure(table: &mut Table) -> anyhow::Result<()> {
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (mut ours, mut bare) = tokio.block_on(async {
        let cache = Cache::builder(Geometry::new(1, 1, DIM as u32, ElementType::F16))
            .devices(Devices::cuda(1))
            .memory_bytes_per_device(512 << 20)
            .sealed_format(Format::Int8)
            .configure(|c| c.copy_lane_min_bytes = 1)
            .build()
            .await?;
        let mut sequences = Vec::with_capacity(TASKS);
        for _ in 0..TASKS {
            sequences.push(cache.open("bench", OpenOptions::default()).await?);
        }
        let row = [f16::ONE; DIM];
        let fill =
            sequences.iter().fold(BatchCacheOperations::new(), |batch, s| batch.append(s, &[1], &row, &row));
        for result in cache.submit(fill).await? {
            result?;
        }
        anyhow::Ok((reads(sequences).await?, echoes().await?))
    })?;
    table.group("10,000 tasks with one transfer in flight each: from the call until the task runs again");
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let (ours, bare) = (quantile(&mut ours, share), quantile(&mut bare, share));
        table.row(
            &format!("awaited read, {name}"),
            ours,
            "µs",
            Some((ours / bare, "of a bare oneshot, reach 2")),
        );
        table.row(&format!("oneshot answered by a bare thread, {name}"), bare, "µs", None);
    }
    Ok(())
}

fn passed(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e6
}

/// What every task measured.
async fn all(tasks: Vec<JoinHandle<anyhow::Result<Vec<f64>>>>) -> anyhow::Result<Vec<f64>> {
    let mut all = Vec::with_capacity(TASKS * ROUNDS);
    for task in tasks {
        all.extend(task.await??);
    }
    Ok(all)
}

/// Latencies of awaited reads.
async fn reads(sequences: Vec<Sequence>) -> anyhow::Result<Vec<f64>> {
    let tasks: Vec<_> = sequences
        .into_iter()
        .map(|sequence| {
            tokio::spawn(async move {
                let mut times = Vec::with_capacity(ROUNDS);
                for _ in 0..ROUNDS {
                    let started = Instant::now();
                    sequence.read::<f16>(0, 0..1).await?;
                    times.push(passed(started));
                }
                anyhow::Ok(times)
            })
        })
        .collect();
    all(tasks).await
}

/// Latencies of oneshots that another thread answers at once.
async fn echoes() -> anyhow::Result<Vec<f64>> {
    let (sender, mut receiver) = mpsc::channel::<oneshot::Sender<()>>(1 << 16);
    std::thread::spawn(move || {
        while let Some(reply) = receiver.blocking_recv() {
            let _ = reply.send(());
        }
    });
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut times = Vec::with_capacity(ROUNDS);
                for _ in 0..ROUNDS {
                    let started = Instant::now();
                    let (reply, answer) = oneshot::channel();
                    sender.send(reply).await?;
                    answer.await?;
                    times.push(passed(started));
                }
                anyhow::Ok(times)
            })
        })
        .collect();
    all(tasks).await
}
