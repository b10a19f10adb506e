//! The synthetic load: fill the cache with sequences, then do everything to them at once for a while.
//!
//! First every worker opens its sequences, and all wait until each sequence holds a sealed block: only then are all of
//! them open at once *and* compressed, which is what the run claims. Then the measured part begins.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::content::Shape;
use crate::session::{self, Leaks, Session};
use crate::stop::Stop;
use crate::worker::{BLOCKS_MAX, Load, Worker};

/// What the workers are to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Fill,
    Churn,
    Finish,
}

/// Bytes with which `sequences` sequences never fill the cache: each at its longest with no block sealed, and one more
/// block each for forks, seals under way and what was closed a moment ago. What is cached fills it in time, and makes way.
pub(crate) fn memory_bytes(shape: &Shape, sequences: usize, shards: u32) -> u64 {
    let bytes = sequences as u64 * u64::from(BLOCKS_MAX + 1) * shape.block_bytes();
    // Forks stay on their parent's shard, so shards do not fill evenly; and slabs are cut into chunks.
    let uneven = if shards > 1 { bytes / 4 } else { 0 };
    bytes + uneven + u64::from(shards) * 2048 * shape.block_bytes()
}

/// Runs the load for `duration` over `sequences` sequences in `tasks` tasks. Returns what stayed in use at the end.
pub(crate) async fn run(
    session: &Session,
    sequences: usize,
    tasks: usize,
    shared_prefix_tokens: u32,
    duration: Duration,
    stop: &Stop,
) -> Leaks {
    let load = Arc::new(Load {
        cache: session.cache.clone(),
        recorder: session.recorder.clone(),
        shape: session.setup.shape,
        format: session.setup.format,
        seed: session.setup.seed,
        shared_prefix_tokens,
    });
    let (phase, phases) = watch::channel(Phase::Fill);
    let (filled, mut all_filled) = mpsc::channel::<()>(1);
    let mut workers = JoinSet::new();
    for task in 0..tasks {
        // Spreads the remainder: no two workers differ by more than one sequence.
        let share = sequences * (task + 1) / tasks - sequences * task / tasks;
        let worker = Worker::new(load.clone(), task as u64, share);
        workers.spawn(work(worker, phases.clone(), filled.clone()));
    }
    drop((filled, phases));

    let bar = session::bar(sequences as u64, "sequences");
    let recorder = session.recorder.clone();
    let watcher = session.watch(bar.clone(), move |bar, _| {
        let (now, peak) = recorder.with_sealed();
        bar.set_position(now);
        bar.set_message(format!("filling, {peak} with sealed blocks"));
    });
    tokio::select! {
        // Nothing is ever sent: the channel closes when the last worker has filled its sequences.
        _ = all_filled.recv() => {}
        () = stop.requested() => {}
    }
    watcher.abort();
    bar.finish_and_clear();

    session.recorder.start_measuring();
    let begun = Instant::now();
    let bar = session::bar(duration.as_secs(), "s");
    let watcher = session.watch(bar.clone(), move |bar, sample| {
        bar.set_position(begun.elapsed().as_secs());
        bar.set_message(format!(
            "{:.0} operations/s, p99 {:.1} ms, {:.0} a batch",
            sample.operations_per_second,
            sample.p99_us / 1e3,
            sample.batch_mean
        ));
    });
    phase.send_replace(Phase::Churn);
    tokio::select! {
        () = tokio::time::sleep(duration) => {}
        () = stop.requested() => {}
    }
    phase.send_replace(Phase::Finish);
    session.recorder.stop_measuring();
    bar.set_message("reading everything once more");
    while let Some(ended) = workers.join_next().await {
        if let Err(panic) = ended {
            session.recorder.error(|| format!("a worker did not end well: {panic}"));
        }
    }
    watcher.abort();
    bar.finish_and_clear();
    session.leaks().await
}

async fn work(mut worker: Worker, mut phases: watch::Receiver<Phase>, filled: mpsc::Sender<()>) {
    worker.fill(|| *phases.borrow() == Phase::Finish).await;
    drop(filled);
    // An error means that the driver is gone, and this task with it.
    let _ = phases.wait_for(|phase| *phase != Phase::Fill).await;
    while *phases.borrow_and_update() == Phase::Churn {
        worker.step().await;
    }
    worker.finish().await;
}
