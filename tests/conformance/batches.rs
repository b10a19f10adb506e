//! Many operations as one message.

use std::collections::HashSet;
use std::task::{Context, Waker};

use kv_cache::*;

use crate::common::{Number, Rig, combos, eventually};

crate::conformance!(combos:
    a_batch_mixes_everything,
    one_bad_operation_fails_alone,
    operations_that_come_together_are_one_batch,
    an_empty_batch_is_answered,
    closed_and_unknown_sequences_are_answered,
);

fn ok(result: Result<Outcome, Error>) -> Outcome {
    result.unwrap()
}

fn elements<E: Number>(outcome: Outcome) -> (Vec<E>, Vec<E>) {
    match outcome {
        Outcome::Read(read) => read.into_elements().unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn a_batch_mixes_everything<E: Number>(rig: Rig<E>) {
    let shards = rig.cache.stats().shards.len();
    let mut open = BatchCacheOperations::new();
    for _ in 0..7 {
        open = open.open("tenant", OpenOptions::default());
    }
    let opened = rig.cache.submit(open).await.unwrap();
    let mut rows: Vec<_> = opened
        .into_iter()
        .map(|opened| match ok(opened) {
            Outcome::Opened(sequence) => (sequence, rig.model()),
            other => panic!("{other:?}"),
        })
        .collect();
    let on: HashSet<u16> = rows.iter().map(|(sequence, _)| sequence.id().shard()).collect();
    assert_eq!(on.len(), shards, "a burst of opens spreads over the shards");
    // Round after round over all of them, interleaved, so that order per sequence shows.
    let last = rig.layers() - 1;
    let mut batch = BatchCacheOperations::new().reserve_bytes(1 << 16);
    let mut reads = Vec::new();
    let mut at = 0;
    for round in 0..3 {
        for (sequence, model) in &mut rows {
            let (new, draft) = (rig.tokens(rig.block() + round), rig.tokens(2));
            batch = batch.append_at(&*sequence, model.len(), &new.ids, None, &new.keys, &new.values);
            model.push(&new);
            for layer in 0..rig.layers() {
                batch = batch.stage(&*sequence, layer, 2, draft.keys_of(layer), draft.values_of(layer));
            }
            batch = batch.commit(&*sequence, &draft.ids[..1]);
            model.push_some(&draft, 1);
            batch = batch.read(&*sequence, last, 0..model.len());
            at += 3 + rig.layout.layers;
            reads.push((at - 1, model.clone()));
            batch = batch.truncate(&*sequence, model.len() - 1);
            model.truncate(model.len() - 1);
            at += 1;
        }
    }
    for (sequence, _) in &rows {
        batch = batch.fork(sequence, 2);
    }
    assert_eq!(batch.len(), at + rows.len());
    let mut results: Vec<_> = rig.cache.submit(batch).await.unwrap().into_iter().map(Some).collect();
    assert_eq!(results.len(), at + rows.len());
    for (place, model) in reads {
        let (keys, values) = elements::<E>(ok(results[place].take().unwrap()));
        model.compare(last, 0..model.len(), &keys, &values, rig.format);
    }
    for ((_, model), result) in rows.iter().zip(results.drain(at..)) {
        let Outcome::Forked(forks) = ok(result.unwrap()) else { panic!("not a fork") };
        assert_eq!(forks.len(), 2);
        rig.check(&forks[1], model).await;
    }
    assert!(results.iter().flatten().all(Result::is_ok));
    for (sequence, model) in &rows {
        rig.check(sequence, model).await;
    }
    drop(rows);
    rig.finish().await;
}

async fn one_bad_operation_fails_alone<E: Number>(rig: Rig<E>) {
    let (a, mut model_a) = rig.filled(2).await;
    let (b, mut model_b) = rig.filled(1).await;
    let (good, mut nan) = (rig.tokens(rig.block()), rig.tokens(rig.block()));
    nan.keys[0] = E::NAN;
    let layers = rig.layers();
    let batch = BatchCacheOperations::new()
        .append(&a, &nan.ids, &nan.keys, &nan.values)
        .append(&b, &good.ids, &good.keys, &good.values)
        .append(&a, &good.ids[1..], &good.keys, &good.values)
        .read(&a, layers, 0..1)
        .append(&a, &good.ids, &good.keys, &good.values)
        .read(&a, 0, 0..2 + rig.block())
        .read(&a, 0, 0..3 + rig.block())
        .truncate(&b, 1 << 30)
        .stage(&b, 0, 1, good.keys_of(0), &good.values_of(0)[1..])
        .read(&b, 0, 0..1 + rig.block());
    let results = rig.cache.submit(batch).await.unwrap();
    model_a.push(&good);
    model_b.push(&good);
    let errors: Vec<_> = results.iter().map(|result| result.as_ref().err()).collect();
    assert_eq!(errors[0], Some(&Error::NotFinite));
    assert!(matches!(errors[2], Some(Error::Shape { .. } | Error::Empty)), "{:?}", errors[2]);
    assert_eq!(errors[3], Some(&Error::Layer { layer: layers, layers }));
    let (range, visible) = (0..3 + rig.block(), 2 + rig.block());
    assert_eq!(errors[6], Some(&Error::TokenRange { range, visible }));
    assert_eq!(errors[7], Some(&Error::TokenRange { range: 0..1 << 30, visible: 1 + rig.block() }));
    assert!(matches!(errors[8], Some(Error::Shape { .. })), "{:?}", errors[8]);
    let mut results = results;
    let (keys, values) = elements::<E>(ok(results.remove(9)));
    model_b.compare(0, 0..model_b.len(), &keys, &values, rig.format);
    let (keys, values) = elements::<E>(ok(results.remove(5)));
    model_a.compare(0, 0..model_a.len(), &keys, &values, rig.format);
    assert!(
        matches!(results[1], Ok(Outcome::Appended { .. }))
            && matches!(results[4], Ok(Outcome::Appended { .. }))
    );
    rig.check(&a, &model_a).await;
    rig.check(&b, &model_b).await;
    let stats = rig.stats().await;
    let count = |kind| stats.errors.iter().find(|(k, _)| *k == kind).map_or(0, |(_, count)| *count);
    assert_eq!((count(ErrorKind::NotFinite), count(ErrorKind::InvalidInput)), (1, 5));
    drop((a, b));
    rig.finish().await;
}

/// Every caller sends before the router has run: what they sent reaches a shard as one batch.
async fn operations_that_come_together_are_one_batch<E: Number>(rig: Rig<E>) {
    let mut rows = Vec::new();
    for _ in 0..8 {
        rows.push(rig.filled(1).await);
    }
    let mut on: Vec<u16> = rows.iter().map(|(sequence, _)| sequence.id().shard()).collect();
    on.sort_unstable();
    on.dedup();
    // Opens and first appends, as many as that. A shard publishes after it has answered.
    let published = async |operations| {
        eventually("publishing", || rig.cache.stats().batch_sizes.operations == operations).await;
        rig.cache.stats().batch_sizes.batches
    };
    let before = published(16).await;
    let new = rig.tokens(1);
    {
        let mut waiting: Vec<_> = rows
            .iter()
            .map(|(sequence, _)| Box::pin(sequence.append(&new.ids, &new.keys, &new.values)))
            .collect();
        for future in &mut waiting {
            let mut context = Context::from_waker(Waker::noop());
            assert!(future.as_mut().poll(&mut context).is_pending());
        }
        for future in waiting {
            assert_eq!(future.await.unwrap(), 2);
        }
    }
    let batches = published(24).await - before;
    assert_eq!(batches, on.len() as u64, "one batch on each shard that has some of the appends");
    for (sequence, model) in &mut rows {
        model.push(&new);
        rig.check(sequence, model).await;
    }
    drop(rows);
    rig.finish().await;
}

async fn an_empty_batch_is_answered<E: Number>(rig: Rig<E>) {
    let batch = BatchCacheOperations::new();
    assert!(batch.is_empty());
    assert!(rig.cache.submit(batch).await.unwrap().is_empty());
    let Ok(future) = rig.cache.try_submit(BatchCacheOperations::new()) else { panic!("refused") };
    assert!(future.await.unwrap().is_empty());
    rig.finish().await;
}

async fn closed_and_unknown_sequences_are_answered<E: Number>(rig: Rig<E>) {
    let (a, _) = rig.filled(3).await;
    let (b, mut model) = rig.filled(3).await;
    let closed = a.id();
    let new = rig.tokens(1);
    let results = rig
        .cache
        .submit(BatchCacheOperations::new().close(&a).read(&a, 0, 0..1).close(&a).append(
            &b,
            &new.ids,
            &new.keys,
            &new.values,
        ))
        .await
        .unwrap();
    assert!(matches!(results[0], Ok(Outcome::Closed)));
    assert_eq!(results[1].as_ref().unwrap_err(), &Error::ClosedSequence(closed));
    assert_eq!(results[2].as_ref().unwrap_err(), &Error::ClosedSequence(closed));
    model.push(&new);
    // The handle of a sequence that a batch has closed says so, and does no harm when it goes.
    assert_eq!(a.append(&new.ids, &new.keys, &new.values).await, Err(Error::ClosedSequence(closed)));
    assert_eq!(a.read::<E>(0, 0..0).await, Err(Error::ClosedSequence(closed)));
    assert_eq!(a.stage(0, new.keys_of(0), new.values_of(0)).await, Err(Error::ClosedSequence(closed)));
    assert_eq!(a.commit(&new.ids).await, Err(Error::ClosedSequence(closed)));
    assert_eq!(a.truncate(0).await, Err(Error::ClosedSequence(closed)));
    assert_eq!(a.fork().await.unwrap_err(), Error::ClosedSequence(closed));
    assert_eq!(a.close().await, Err(Error::ClosedSequence(closed)));
    // The id stays dead when its place in the table is taken again.
    let (c, _) = rig.filled(1).await;
    let mut numbers = vec![closed.as_u64(), 0xFFFF_FFFF_FFFF_FFFF, 7, 3 << 28, 9 << 48];
    numbers.retain(|number| ![b.id().as_u64(), c.id().as_u64()].contains(number));
    for number in numbers {
        let id = SequenceId::from_u64(number);
        let batch = BatchCacheOperations::new()
            .append(id, &new.ids, &new.keys, &new.values)
            .stage(id, 0, 1, new.keys_of(0), new.values_of(0))
            .commit(id, &[1])
            .read(id, 0, 0..1)
            .fork(id, 1)
            .truncate(id, 0)
            .close(id);
        for result in rig.cache.submit(batch).await.unwrap() {
            let error = result.unwrap_err();
            let dead = if id == closed { Error::ClosedSequence(id) } else { Error::UnknownSequence(id) };
            assert_eq!(error, dead);
        }
    }
    rig.check(&b, &model).await;
    drop((b, c));
    rig.finish().await;
}
