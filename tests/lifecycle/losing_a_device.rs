//! Devices that are lost, and actors that panic.

use super::*;

fn is_lost(error: &Error, shard: u16, reason: &str) -> bool {
    matches!(error, Error::ShardLost { shard: s, reason: r } if *s == shard && &**r == reason)
}

/// Asks until the shard is known to be lost.
async fn lost(cache: &Cache, shard: u16) {
    eventually("losing the shard", || cache.stats().shards[shard as usize].lost.is_some()).await;
}

#[tokio::test]
async fn its_sequences_fail_with_the_reason_and_others_serve_on() {
    let reason = "the bus is on fire";
    for drill in 0..3u16 {
        let rig = rig(1, |b| b.configure(|c| c.max_total_tokens = 100)).await;
        let mut rows = Vec::new();
        for _ in 0..6 {
            rows.push(rig.filled(7).await);
        }
        let view = rows.iter().find(|(s, _)| s.id().shard() == drill).unwrap().0.view(0).unwrap();
        rig.cache.faults().lose_device(drill, reason);
        lost(&rig.cache, drill).await;
        let new = rig.tokens(2);
        for (sequence, model) in &mut rows {
            if sequence.id().shard() != drill {
                rig.append(sequence, model, 2).await;
                rig.check(sequence, model).await;
                continue;
            }
            let told = |error: Error| assert!(is_lost(&error, drill, reason), "{error:?}");
            told(sequence.append(&new.ids, &new.keys, &new.values).await.unwrap_err());
            told(sequence.stage(0, new.keys_of(0), new.values_of(0)).await.unwrap_err());
            told(sequence.commit(&new.ids).await.unwrap_err());
            told(sequence.read::<Numbers>(0, 0..1).await.unwrap_err());
            told(sequence.truncate(0).await.unwrap_err());
            told(sequence.fork().await.unwrap_err());
            told(sequence.view(0).unwrap_err());
            told(rig.cache.block_table(&[sequence], 0).unwrap_err());
        }
        // A batch over all of them: each operation has its own answer.
        let batch = rows
            .iter()
            .fold(BatchCacheOperations::new(), |batch, (sequence, _)| batch.read(sequence, 0, 0..1));
        let results = within("a batch", rig.cache.submit(batch)).await.unwrap();
        for ((sequence, _), result) in rows.iter().zip(results) {
            match result {
                Ok(_) => assert_ne!(sequence.id().shard(), drill),
                Err(error) => assert!(is_lost(&error, drill, reason), "{error:?}"),
            }
        }
        // New sequences avoid it, and what its sequences held of the common limits is free again.
        for _ in 0..6 {
            let sequence = rig.open().await;
            assert_ne!(sequence.id().shard(), drill);
            rows.push((sequence, rig.model()));
        }
        let stats = rig.cache.stats();
        assert_eq!(stats.tokens, 4 * 9);
        assert_eq!(stats.sequences_open, 10);
        let free = 100 - stats.tokens as u32;
        assert!(rig.cache.can_admit(free) && !rig.cache.can_admit(free + 1));
        let told = stats.shards[drill as usize].lost.clone().unwrap();
        assert!(told.contains(reason), "{told}");
        assert_eq!(view.tokens(), 7, "what was borrowed stays");
        drop(rows);
        eventually("closing", || rig.cache.stats().sequences_open == 0).await;
        let stats = rig.cache.stats();
        assert_eq!((stats.tokens, stats.jobs_in_flight, stats.bytes_in_flight), (0, 0, 0));
        let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
        assert!(report.drained && report.running.is_empty(), "{report:?}");
        for (name, exit) in report.exits {
            match (name, exit) {
                (ActorName::Device(shard), Exit::DeviceLost(told)) => {
                    assert_eq!((shard, told.as_str()), (drill, reason));
                }
                (_, exit) => assert_eq!(exit, Exit::Finished, "{name}"),
            }
        }
    }
}

#[tokio::test]
async fn what_is_in_flight_is_answered() {
    for setup in [1, 3] {
        for round in 0..20 {
            let rig = rig(setup, |b| b.max_in_flight(32, 1 << 20)).await;
            let mut rows = Vec::new();
            for _ in 0..6 {
                rows.push(rig.filled(3).await);
            }
            let (rows, mut models): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
            let new = rig.tokens(6);
            let all = rows.iter().fold(BatchCacheOperations::new(), |batch, sequence| {
                batch.append(sequence, &new.ids, &new.keys, &new.values)
            });
            let together = rig.cache.try_submit(all).unwrap_or_else(|_| panic!("permits are free"));
            let mut alone: Vec<_> =
                rows.iter().map(|sequence| Box::pin(sequence.read::<Numbers>(1, 0..3))).collect();
            let mut poll = |future: &mut Pin<Box<_>>| {
                let _ = Future::poll(Pin::as_mut(future), &mut Context::from_waker(Waker::noop()));
            };
            alone.iter_mut().for_each(&mut poll);
            for _ in 0..round {
                tokio::task::yield_now().await;
                std::thread::yield_now();
            }
            rig.cache.faults().lose_device(0, "gone");
            // A shard that had answered before is no error; hanging or another reason is.
            match within("a batch in flight", together).await {
                Ok(results) => {
                    for ((sequence, model), result) in rows.iter().zip(&mut models).zip(results) {
                        match result {
                            Ok(_) => model.push(&new),
                            Err(error) => {
                                assert!(
                                    sequence.id().shard() == 0 && is_lost(&error, 0, "gone"),
                                    "{error:?}"
                                );
                            }
                        }
                    }
                }
                Err(error) => assert!(is_lost(&error, 0, "gone") && setup == 3, "{error:?}"),
            }
            for (sequence, read) in rows.iter().zip(alone) {
                if let Err(error) = within("a read in flight", read).await {
                    assert!(sequence.id().shard() == 0 && is_lost(&error, 0, "gone"), "{error:?}");
                }
            }
            lost(&rig.cache, 0).await;
            for (sequence, model) in
                rows.iter().zip(&models).filter(|(sequence, _)| sequence.id().shard() != 0)
            {
                rig.check(sequence, model).await;
            }
            drop(rows);
            eventually("permits", || {
                let stats = rig.cache.stats();
                stats.jobs_in_flight + stats.bytes_in_flight + stats.tokens == 0
            })
            .await;
            let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
            assert!(report.drained && report.running.is_empty(), "{report:?}");
        }
    }
}

#[tokio::test]
async fn all_of_them() {
    let rig = rig(1, |b| b.max_sequences(9)).await;
    let (sequence, _) = rig.filled(3).await;
    for shard in 0..3 {
        rig.cache.faults().lose_device(shard, "power cut");
        lost(&rig.cache, shard).await;
    }
    // More often than there are sequences: an open that fails keeps nothing.
    for _ in 0..20 {
        let open = within("an open", rig.cache.open("tenant", OpenOptions::default())).await;
        assert!(matches!(open.unwrap_err(), Error::ShardLost { reason, .. } if &*reason == "power cut"));
    }
    let error = within("a read", sequence.read::<Numbers>(0, 0..1)).await.unwrap_err();
    assert!(is_lost(&error, sequence.id().shard(), "power cut"), "{error:?}");
    assert!(!rig.cache.can_admit(1));
    drop(sequence);
    let stats = rig.cache.stats();
    assert_eq!(
        (stats.sequences_open, stats.jobs_in_flight, stats.bytes_in_flight, stats.tokens),
        (0, 0, 0, 0)
    );
    let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained, "{report:?}");
    assert_eq!(rig.cache.open("tenant", OpenOptions::default()).await.unwrap_err(), Error::Closed);
}

/// Losing a shard that does not exist, or twice: the first reason stays.
#[tokio::test]
async fn twice() {
    let rig = rig(1, |b| b).await;
    rig.cache.faults().lose_device(7, "no such shard");
    rig.cache.faults().lose_device(2, "first");
    rig.cache.faults().lose_device(2, "second");
    lost(&rig.cache, 2).await;
    assert!(rig.cache.stats().shards[2].lost.as_ref().unwrap().contains("first"));
    assert!(rig.cache.stats().shards[..2].iter().all(|shard| shard.lost.is_none()));
    let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained, "{report:?}");
}

/// A logic fault takes its shard along, not the process.
#[tokio::test]
async fn an_actor_that_panics() {
    let rig = rig(1, |b| b).await;
    let mut rows = Vec::new();
    for _ in 0..6 {
        rows.push(rig.filled(7).await);
    }
    rig.cache.faults().panic_device(1);
    lost(&rig.cache, 1).await;
    for (sequence, model) in &mut rows {
        match sequence.id().shard() {
            1 => match within("a read", sequence.read::<Numbers>(0, 0..1)).await.unwrap_err() {
                Error::ShardLost { shard: 1, reason } => assert!(reason.contains("panic"), "{reason}"),
                other => panic!("{other:?}"),
            },
            _ => {
                rig.append(sequence, model, 3).await;
                rig.check(sequence, model).await;
            }
        }
    }
    assert_eq!(rig.cache.stats().tokens, 4 * 10);
    drop(rows);
    let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained && report.running.is_empty(), "{report:?}");
    let panicked = |(name, exit): &(ActorName, Exit)| matches!(exit, Exit::Panicked(_)).then_some(*name);
    let panicked: Vec<_> = report.exits.iter().filter_map(panicked).collect();
    assert_eq!(panicked, [ActorName::Device(1)]);
}
