//! Who calls: many tasks at once, threads without async, two caches side by side; and what deterministic mode makes of it.

use std::task::{Context, Poll, Waker};

use kv_cache::*;

use crate::common::{Combo, Rig, SETUPS, geometry, within};

fn small(setup: usize, element: ElementType) -> Combo {
    Combo {
        setup: &SETUPS[setup],
        format: Format::Int8.into(),
        geometry: geometry((5, 2, 2, 16, 8), element),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_tasks_at_once() {
    for setup in 0..SETUPS.len() {
        let combo = small(setup, ElementType::F16);
        let Some(builder) = combo.builder() else { continue };
        // So few permits that tasks have to wait for them.
        let rig = std::sync::Arc::new(Rig::<half::f16>::new(&combo, builder.max_in_flight(8, 1 << 14)).await);
        let tasks: Vec<_> = (0..32)
            .map(|task| {
                let rig = rig.clone();
                tokio::spawn(async move {
                    let (sequence, mut model) = rig.filled(1).await;
                    for step in 0..12 {
                        rig.append(&sequence, &mut model, 1 + (step + task) % 3).await;
                    }
                    rig.check(&sequence, &model).await;
                    let fork = sequence.fork().await.unwrap();
                    drop(sequence);
                    rig.append(&fork, &mut model, 2).await;
                    rig.check(&fork, &model).await;
                })
            })
            .collect();
        for task in tasks {
            within("a task", task).await.unwrap();
        }
        let stats = rig.cache.stats();
        assert_eq!(stats.errors, vec![]);
        assert!(
            stats.batch_sizes.batches > 0
                && stats.queue_wait.p50_us > 0.0
                && stats.batch_service.p99_us > 0.0
        );
        within("finishing", std::sync::Arc::into_inner(rig).unwrap().finish()).await;
    }
}

#[test]
fn threads_without_async() {
    let combo = small(1, ElementType::Bf16);
    let Some(builder) = combo.builder() else { return };
    let cache = builder.build_blocking().unwrap();
    let layout = combo.geometry.layout().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let cache = cache.clone();
            scope.spawn(move || {
                use crate::common::{Model, Tokens};
                let sequence = cache.open("tenant", OpenOptions::default()).unwrap();
                let mut model = Model::new(layout);
                for step in 0..20 {
                    let new = Tokens::<half::bf16>::generate(layout, 3, thread << 32 | step);
                    sequence.append(&new.ids, &new.keys, &new.values).unwrap();
                    model.push(&new);
                }
                let fork = sequence.fork().unwrap();
                let new = Tokens::<half::bf16>::generate(layout, 1, thread << 32 | 99);
                for layer in 0..2 {
                    sequence.stage(layer, new.keys_of(layer), new.values_of(layer)).unwrap();
                }
                assert_eq!(sequence.commit(&new.ids).unwrap(), 61);
                sequence.truncate(60).unwrap();
                for sequence in [&sequence, &fork] {
                    let (keys, values) = sequence.read(1, 0..60).unwrap();
                    model.compare(1, 0..60, &keys, &values, Format::Int8);
                    assert_eq!(sequence.sequence().len(), 60);
                }
                let batch =
                    BatchCacheOperations::new().read(sequence.sequence(), 0, 59..60).close(fork.sequence());
                let results = cache.submit(batch).unwrap();
                assert!(results.iter().all(Result::is_ok));
            });
        }
    });
    let report = cache.shutdown(crate::common::PATIENCE).unwrap();
    assert!(report.drained && report.running.is_empty(), "{report:?}");
    assert_eq!(cache.open("tenant", OpenOptions::default()).unwrap_err(), Error::Closed);
    let stats = cache.cache().stats();
    assert_eq!((stats.jobs_in_flight, stats.bytes_in_flight), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_beside_async_tasks() {
    let combo = small(0, ElementType::F32);
    let Some(builder) = combo.builder() else { return };
    let rig = Rig::<f32>::new(&combo, builder).await;
    let blocking = rig.cache.blocking();
    let new = rig.tokens(7);
    let copy = new.clone();
    let thread = std::thread::spawn(move || {
        let sequence = blocking.open("tenant", OpenOptions::default()).unwrap();
        sequence.append(&copy.ids, &copy.keys, &copy.values).unwrap();
        sequence.read::<f32>(1, 0..7).unwrap()
    });
    let (sequence, model) = rig.filled(9).await;
    let joined = tokio::task::spawn_blocking(move || thread.join().unwrap());
    let (keys, values) = within("the thread", joined).await.unwrap();
    let mut expected = rig.model();
    expected.push(&new);
    expected.compare(1, 0..7, &keys, &values, Format::Int8);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

#[tokio::test]
async fn two_caches_side_by_side() {
    let (a, b) = (small(1, ElementType::F32), small(0, ElementType::F16));
    let (Some(build_a), Some(build_b)) = (a.builder(), b.builder()) else { return };
    let (a, b) = (Rig::<f32>::new(&a, build_a).await, Rig::<half::f16>::new(&b, build_b).await);
    let ((seq_a, mut model_a), (seq_b, mut model_b)) = (a.filled(11).await, b.filled(13).await);
    for _ in 0..6 {
        a.append(&seq_a, &mut model_a, 3).await;
        b.append(&seq_b, &mut model_b, 4).await;
    }
    a.check(&seq_a, &model_a).await;
    assert_eq!((a.cache.stats().tokens, b.cache.stats().tokens), (29, 37));
    drop(seq_a);
    within("finishing the first", a.finish()).await;
    b.append(&seq_b, &mut model_b, 4).await;
    b.check(&seq_b, &model_b).await;
    drop(seq_b);
    within("finishing the second", b.finish()).await;
}

/// A script of operations whose outcome shows in bytes, places and ids (less the number of the cache in their highest byte).
async fn script(rig: &Rig<f32>) -> Vec<(u64, u32, BlockFormat, usize, Vec<u8>)> {
    let mut rows = Vec::new();
    for _ in 0..9 {
        rows.push(rig.filled(rig.block() + 2).await);
    }
    for round in 0..6u32 {
        let mut batch = BatchCacheOperations::new();
        for (at, (sequence, _)) in rows.iter().enumerate() {
            let new = rig.tokens(1 + (round + at as u32) % 7);
            batch = batch.append(sequence, &new.ids, &new.keys, &new.values);
            if (round as usize + at).is_multiple_of(4) {
                batch = batch.truncate(sequence, rig.block() + round);
            }
        }
        assert!(rig.cache.submit(batch).await.unwrap().iter().all(Result::is_ok));
        rows.remove(round as usize % rows.len()).0.close().await.unwrap();
        let fork = rows[0].0.fork().await.unwrap();
        rows.push((fork, rows[0].1.clone()));
    }
    // The next operation finds everything sealed.
    rig.poke().await;
    let mut found = Vec::new();
    for (sequence, _) in &rows {
        let table = rig.cache.block_table(&[sequence], 1).unwrap();
        let view = sequence.view(1).unwrap();
        let stored = super::views::look::<f32>(&rig.layout, &view).stored;
        let blocks = table.sequences[0].blocks.iter();
        found.extend(blocks.map(|b| {
            (sequence.id().as_u64() << 8, b.first_token, b.format, b.slot_offset_bytes, stored.clone())
        }));
    }
    found
}

/// The same submissions give the same ids, places and bytes.
#[tokio::test]
async fn deterministic_mode_repeats_itself() {
    for shards in [1, 3] {
        let mut runs = Vec::new();
        for _ in 0..2 {
            let combo = small(2, ElementType::F32);
            let Some(builder) = combo.builder() else { return };
            let rig = Rig::<f32>::new(&combo, builder.devices(Devices::cpu(shards))).await;
            runs.push(within("the script", script(&rig)).await);
        }
        assert!(runs[0].iter().any(|(_, _, format, ..)| *format == Format::Int8));
        assert!(runs[0] == runs[1], "{:?}\n{:?}", runs[0], runs[1]);
    }
}

/// New sequences go to the shard with the least load, whatever way others have closed.
#[tokio::test]
async fn placement_stays_even() {
    let combo = small(1, ElementType::F16);
    let Some(builder) = combo.builder() else { return };
    // Deterministic: the load is what the router itself has counted.
    let rig = Rig::<half::f16>::new(&combo, builder.deterministic(true)).await;
    let per_shard = |open: &[Sequence]| {
        let mut counts = [0; 3];
        open.iter().for_each(|sequence| counts[sequence.id().shard() as usize] += 1);
        counts
    };
    let mut open = Vec::new();
    for _ in 0..12 {
        open.push(rig.open().await);
    }
    assert_eq!(per_shard(&open), [4, 4, 4]);
    // Closed by hand, and then dropped; by a batch; and refused.
    for _ in 0..2 {
        let at = open.iter().position(|sequence| sequence.id().shard() == 0).unwrap();
        open.remove(at).close().await.unwrap();
    }
    let at = open.iter().position(|sequence| sequence.id().shard() == 1).unwrap();
    let batch = BatchCacheOperations::new().close(&open[at]).close(&open[at]).close(&open[at]);
    rig.cache.submit(batch).await.unwrap();
    drop(open.remove(at));
    rig.poke().await;
    assert_eq!(per_shard(&open), [2, 3, 4]);
    for even in 4..8 {
        while open.len() < 3 * even {
            open.push(rig.open().await);
        }
        assert_eq!(per_shard(&open), [even; 3]);
    }
    drop(open);
    within("finishing", rig.finish()).await;
}

/// A future is lazy, and one that was never polled has done nothing.
#[tokio::test]
async fn nothing_happens_before_the_first_poll() {
    let combo = small(0, ElementType::F16);
    let Some(builder) = combo.builder() else { return };
    let rig = Rig::<half::f16>::new(&combo, builder).await;
    let (sequence, model) = rig.filled(3).await;
    let new = rig.tokens(1);
    drop(sequence.append(&new.ids, &new.keys, &new.values));
    let mut cut = Box::pin(sequence.truncate(1));
    assert!(matches!(cut.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Pending));
    drop(cut);
    rig.poke().await;
    assert_eq!(sequence.len(), 1, "polled once: it takes effect");
    let mut model = model;
    model.truncate(1);
    rig.check(&sequence, &model).await;
    drop(sequence);
    within("finishing", rig.finish()).await;
}
