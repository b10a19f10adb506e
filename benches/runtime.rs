//! What the runtime costs on top of moving bytes: a decode step, ten thousand waiting tasks, one idle task, and many sequences.
//!
//! `cargo bench --bench runtime` prints criterion's estimates and then a table of ratios, each measured within this run
//! against the plain thing beside it: the same copies without a runtime, or a bare channel round trip.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use kv_cache::half::f16;
use kv_cache::{BatchCacheOperations, Cache, ElementType, Format, Geometry, OpenOptions, Sequence};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

const LAYERS: usize = 4;
const HEADS: usize = 2;
const DIM: usize = 64;
const STEP_SEQUENCES: usize = 256;
/// Elements of one token's keys (or values) over all layers.
const TOKEN: usize = LAYERS * HEADS * DIM;

fn main() {
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    // `cargo test` runs benches too, with `--test`: once each, without the table.
    let testing = std::env::args().any(|argument| argument == "--test");
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    if std::env::var_os("ONLY").is_none() {
        criterion_step(&mut criterion, &tokio);
    }
    criterion.final_summary();
    let only = std::env::var("ONLY").unwrap_or_default();
    // ONLY=tasks, step or sequences: that part alone, for a profiler.
    if only == "tasks" {
        many_tasks(&tokio);
    } else if only == "step" {
        decode_step(&tokio);
    } else if only == "sequences" {
        many_sequences(&tokio);
    } else if !testing {
        println!("\n{:<64} {:>14} {:>14} {:>8}", "what", "ours", "beside it", "ratio");
        decode_step(&tokio);
        many_tasks(&tokio);
        idle_task(&tokio);
        many_sequences(&tokio);
    }
}

fn row(what: &str, ours: Duration, beside: Duration) {
    let ratio = ours.as_secs_f64() / beside.as_secs_f64();
    println!("{what:<64} {ours:>14.2?} {beside:>14.2?} {ratio:>7.2}x");
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn geometry() -> Geometry {
    Geometry::new(LAYERS as u32, HEADS as u32, DIM as u32, ElementType::F16)
}

async fn cache(sequences: usize, tokens_each: usize) -> Cache {
    let bytes = 2 * TOKEN * 2 * tokens_each.next_multiple_of(32);
    Cache::builder(geometry())
        .memory_bytes_per_device((sequences * bytes) as u64 * 5 / 4 + (64 << 20))
        .sealed_format(Format::Int8)
        .build()
        .await
        .expect("a cache")
}

async fn open(cache: &Cache, count: usize) -> Vec<Sequence> {
    let mut sequences = Vec::with_capacity(count);
    for _ in 0..count {
        sequences.push(cache.open("bench", OpenOptions::default()).await.expect("a sequence"));
    }
    sequences
}

fn step_batch(sequences: &[Sequence], keys: &[f16], values: &[f16]) -> BatchCacheOperations {
    let mut batch = BatchCacheOperations::new().reserve_bytes(sequences.len() * TOKEN * 4);
    for (index, sequence) in sequences.iter().enumerate() {
        let range = index * TOKEN..(index + 1) * TOKEN;
        batch = batch.append(sequence, &[index as u32], &keys[range.clone()], &values[range]);
    }
    batch
}

fn step_input() -> (Vec<f16>, Vec<f16>) {
    let element = |i: usize| f16::from_f32((i % 251) as f32 / 100.0 - 1.0);
    ((0..STEP_SEQUENCES * TOKEN).map(element).collect(), (0..STEP_SEQUENCES * TOKEN).map(element).collect())
}

fn criterion_step(criterion: &mut Criterion, tokio: &Runtime) {
    let (keys, values) = step_input();
    let cache = tokio.block_on(cache(STEP_SEQUENCES, 4096));
    criterion.bench_function("decode_step_256x4x2x64_f16", |bencher| {
        let mut sequences = tokio.block_on(open(&cache, STEP_SEQUENCES));
        let mut steps = 0;
        bencher.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for _ in 0..iterations {
                if steps == 4096 {
                    sequences = tokio.block_on(open(&cache, STEP_SEQUENCES));
                    steps = 0;
                }
                steps += 1;
                let started = Instant::now();
                let results = tokio.block_on(cache.submit(step_batch(&sequences, &keys, &values)));
                spent += started.elapsed();
                assert!(results.expect("submitted").iter().all(Result::is_ok));
            }
            spent
        });
    });
}

/// The copies of a step without a runtime: caller to arena, arena to rows of the slab, keys and values.
struct BareStep {
    arena: Vec<f16>,
    slab: Vec<f16>,
}

impl BareStep {
    fn new(steps: usize) -> Self {
        BareStep { arena: Vec::new(), slab: vec![f16::ZERO; STEP_SEQUENCES * TOKEN * 2 * steps] }
    }

    fn run(&mut self, step: usize, steps: usize, keys: &[f16], values: &[f16]) {
        // A fresh arena per step, as a batch has.
        self.arena = Vec::with_capacity(STEP_SEQUENCES * TOKEN * 2);
        for sequence in 0..STEP_SEQUENCES {
            self.arena.extend_from_slice(&keys[sequence * TOKEN..(sequence + 1) * TOKEN]);
            self.arena.extend_from_slice(&values[sequence * TOKEN..(sequence + 1) * TOKEN]);
        }
        for (row, source) in self.arena.chunks_exact(DIM).enumerate() {
            let target = (row * steps + step) * DIM;
            self.slab[target..target + DIM].copy_from_slice(source);
        }
        black_box(&self.slab);
    }
}

/// A decode step of `STEP_SEQUENCES` appends as one batch: an append a sequence, and all at once over shared tensors.
fn decode_step(tokio: &Runtime) {
    step_of(tokio, "append", step_batch);
    step_of(tokio, "append_each", |sequences, keys, values| {
        let all: Vec<&Sequence> = sequences.iter().collect();
        let token_ids: Vec<u32> = (0..STEP_SEQUENCES as u32).collect();
        BatchCacheOperations::new().append_each(&all, &token_ids, keys, values)
    });
}

fn step_of(tokio: &Runtime, name: &str, batch: impl Fn(&[Sequence], &[f16], &[f16]) -> BatchCacheOperations) {
    const STEPS: usize = 512;
    let (keys, values) = step_input();
    let mut ours = Vec::new();
    let mut sealing = Vec::new();
    let mut bare = Vec::new();
    let cache = tokio.block_on(cache(STEP_SEQUENCES, 2 * STEPS));
    let sequences = tokio.block_on(open(&cache, STEP_SEQUENCES));
    let mut copies = BareStep::new(32);
    for step in 0..STEPS {
        let started = Instant::now();
        let results = tokio.block_on(cache.submit(batch(&sequences, &keys, &values))).expect("submitted");
        let spent = started.elapsed();
        assert!(results.iter().all(Result::is_ok));
        drop(results);
        ours.push(spent);
        // Every 32nd step fills all blocks; the seals run behind it.
        if step % 32 == 0 && step > 0 {
            sealing.push(spent);
        }
        let started = Instant::now();
        copies.run(step % 32, 32, &keys, &values);
        bare.push(started.elapsed());
    }
    let mean = ours.iter().sum::<Duration>() / STEPS as u32;
    let bare = median(bare);
    row(&format!("decode step, 256 × {name}, mean of all steps / bare copies"), mean, bare);
    row("  the step behind which all 256 blocks seal / bare copies", median(sealing), bare);
    let per_append = mean.saturating_sub(bare).as_nanos() as f64 / STEP_SEQUENCES as f64;
    println!("{:<64} {per_append:>11.0} ns   (reach: 1000 ns)", "  runtime per append on top of the copies");
}

/// A thread that answers oneshots from an mpsc channel: the least that a request to another thread can cost.
fn echo() -> mpsc::Sender<oneshot::Sender<u32>> {
    let (sender, mut receiver) = mpsc::channel::<oneshot::Sender<u32>>(1 << 16);
    std::thread::spawn(move || {
        while let Some(reply) = receiver.blocking_recv() {
            let _ = reply.send(1);
        }
    });
    sender
}

fn many_tasks(tokio: &Runtime) {
    const TASKS: usize = 10_000;
    const ROUNDS: usize = 20;
    let small = Geometry::new(1, 1, 16, ElementType::F16);
    let cache = tokio.block_on(async {
        let builder = Cache::builder(small).memory_bytes_per_device(192 << 20).sealed_format(Format::Int8);
        builder.build().await.expect("a cache")
    });
    let sequences: Vec<Arc<Sequence>> =
        tokio.block_on(open(&cache, TASKS)).into_iter().map(Arc::new).collect();
    let echo = echo();
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        bare.push(tokio.block_on(async {
            let started = Instant::now();
            let tasks: Vec<_> = (0..TASKS)
                .map(|_| {
                    let echo = echo.clone();
                    tokio::spawn(async move {
                        for _ in 0..ROUNDS {
                            let (reply, answer) = oneshot::channel();
                            echo.send(reply).await.expect("the echo lives");
                            answer.await.expect("answered");
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.expect("no panic");
            }
            started.elapsed() / (TASKS * ROUNDS) as u32
        }));
        ours.push(tokio.block_on(async {
            let started = Instant::now();
            let tasks: Vec<_> = sequences
                .iter()
                .cloned()
                .map(|sequence| {
                    tokio::spawn(async move {
                        let row = [f16::ONE; 16];
                        for _ in 0..ROUNDS {
                            sequence.append(&[1], &row, &row).await.expect("appended");
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.expect("no panic");
            }
            started.elapsed() / (TASKS * ROUNDS) as u32
        }));
    }
    row("10,000 tasks, one awaited append each / bare round trip (≤ 2x)", median(ours), median(bare));
    println!("  mean batch {:.0} operations", cache.stats().batch_sizes.mean());
}

fn idle_task(tokio: &Runtime) {
    const ROUNDS: usize = 2000;
    let small = Geometry::new(1, 1, 16, ElementType::F16);
    let cache = tokio.block_on(async {
        let builder = Cache::builder(small).memory_bytes_per_device(64 << 20).sealed_format(Format::Int8);
        builder.build().await.expect("a cache")
    });
    let echo = echo();
    let (ours, bare) = tokio.block_on(async {
        let sequence = Arc::new(cache.open("bench", OpenOptions::default()).await.expect("a sequence"));
        // On a worker, as a server's tasks are.
        tokio::spawn(async move {
            let row = [f16::ONE; 16];
            let (mut ours, mut bare) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let started = Instant::now();
                sequence.append(&[1], &row, &row).await.expect("appended");
                ours.push(started.elapsed());
                let started = Instant::now();
                let (reply, answer) = oneshot::channel();
                echo.send(reply).await.expect("the echo lives");
                answer.await.expect("answered");
                bare.push(started.elapsed());
            }
            (median(ours), median(bare))
        })
        .await
        .expect("no panic")
    });
    row("one task alone / bare round trip (≤ 4x)", ours, bare);
}

/// The cost of one operation with ever more sequences open: what the runtime adds must not grow with them. The copies do
/// grow (they go to memory that the caches no longer hold): the same copies without a runtime are measured beside each
/// count and taken off.
fn many_sequences(tokio: &Runtime) {
    const BATCHES: usize = 300;
    const BATCH: usize = 100;
    const DIM: usize = 16;
    const BLOCK: usize = 16;
    let small = Geometry::new(1, 1, DIM as u32, ElementType::F16).block_tokens(BLOCK as u32);
    let mut least = None;
    for count in [100usize, 1_000, 10_000, 100_000] {
        let spread = |next: usize| (next + 7919) % count;
        let (ours, bare) = tokio.block_on(async {
            let cache = Cache::builder(small.clone())
                .memory_bytes_per_device((count as u64 * 4096).max(64 << 20))
                .sealed_format(Format::Int8)
                .build()
                .await
                .expect("a cache");
            let sequences = open(&cache, count).await;
            let row = [f16::ONE; DIM];
            let mut slab = vec![f16::ZERO; count * BLOCK * DIM * 2];
            let (mut ours, mut bare) = (Vec::new(), Vec::new());
            for round in 0..9 {
                // One token each to sequences spread over all, in batches of 100.
                let mut next = round;
                let started = Instant::now();
                for _ in 0..BATCHES {
                    let mut batch = BatchCacheOperations::new().reserve_bytes(BATCH * DIM * 4);
                    for _ in 0..BATCH {
                        next = spread(next);
                        batch = batch.append(&sequences[next], &[1], &row, &row);
                    }
                    assert!(cache.submit(batch).await.expect("submitted").iter().all(Result::is_ok));
                }
                ours.push(started.elapsed() / (BATCHES * BATCH) as u32);
                let mut next = round;
                let started = Instant::now();
                for _ in 0..BATCHES {
                    for _ in 0..BATCH {
                        next = spread(next);
                        for plane in 0..2 {
                            let target = ((next * 2 + plane) * BLOCK + round) * DIM;
                            slab[target..target + DIM].copy_from_slice(&row);
                        }
                    }
                    black_box(&mut slab);
                }
                bare.push(started.elapsed() / (BATCHES * BATCH) as u32);
                if count < BATCHES * BATCH {
                    let cut =
                        sequences.iter().fold(BatchCacheOperations::new(), |batch, s| batch.truncate(s, 0));
                    cache.submit(cut).await.expect("submitted");
                }
            }
            (median(ours), median(bare))
        });
        let runtime = ours.saturating_sub(bare);
        let beside = *least.get_or_insert(runtime);
        row(
            &format!("append with {count:>6} sequences open, less copies / with 100 (≤ 1.5x)"),
            runtime,
            beside,
        );
    }
}
