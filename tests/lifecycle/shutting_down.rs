//! Orderly ends.

use super::*;

#[tokio::test]
async fn what_is_in_flight_is_answered_first() {
    let rig = rig(1, |b| b.max_in_flight(64, 1 << 20)).await;
    let mut rows = Vec::new();
    for _ in 0..6 {
        rows.push(rig.filled(3).await);
    }
    let (rows, mut models): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
    let new = rig.tokens(6);
    let mut waiting: Vec<_> =
        rows.iter()
            .map(|sequence| {
                let batch = BatchCacheOperations::new()
                    .append(sequence, &new.ids, &new.keys, &new.values)
                    .read(sequence, 1, 0..9);
                rig.cache.try_submit(batch).unwrap_or_else(|_| panic!("permits are free"))
            })
            .collect();
    let mut late = Box::pin(rows[0].read::<Numbers>(0, 0..1));
    let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained && report.running.is_empty(), "{report:?}");
    assert_eq!(report.abandoned_operations, 0);
    for (model, results) in models.iter_mut().zip(waiting.drain(..)) {
        let mut results = within("an answer", results).await.unwrap();
        assert!(matches!(results[0], Ok(Outcome::Appended { committed: 9 })), "{results:?}");
        let Ok(Outcome::Read(read)) = results.remove(1) else { panic!() };
        model.push(&new);
        let (keys, values) = read.into_elements::<Numbers>().unwrap();
        model.compare(1, 0..9, &keys, &values, Format::Int8);
    }
    assert_eq!(within("a late caller", &mut late).await, Err(Error::Closed));
    // Everybody is named, and ended in peace.
    let mut names: Vec<String> = report.exits.iter().map(|(name, _)| name.to_string()).collect();
    names.sort();
    let shards = ["kv-device-0", "kv-device-1", "kv-device-2"].map(String::from);
    let transfers = ["kv-transfer-0", "kv-transfer-1", "kv-transfer-2"].map(String::from);
    assert_eq!(names, [&shards[..], &["kv-router".into()], &transfers[..]].concat());
    assert!(report.exits.iter().all(|(_, exit)| *exit == Exit::Finished), "{report:?}");
}

#[tokio::test]
async fn callers_who_wait_for_permits_are_refused() {
    let rig = rig(0, |b| b.max_in_flight(1, 1 << 20)).await;
    let (sequence, _) = rig.filled(1).await;
    let mut waiting: Vec<_> = (0..4).map(|_| Box::pin(sequence.read::<Numbers>(0, 0..1))).collect();
    for future in &mut waiting {
        assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained, "{report:?}");
    let mut results = Vec::new();
    for future in waiting {
        results.push(within("a caller", future).await);
    }
    assert!(results[0].is_ok(), "it had its permit");
    assert!(results[1..].iter().all(|result| *result == Err(Error::Closed)), "{results:?}");
}

#[tokio::test]
async fn twice_and_from_two_handles() {
    let rig = rig(0, |b| b).await;
    let sequence = rig.open().await;
    let other = rig.cache.clone();
    let (a, b) = tokio::join!(rig.cache.shutdown(PATIENCE), other.shutdown(PATIENCE));
    assert!(a.drained && b.drained);
    let again = within("shutting down again", rig.cache.shutdown(Duration::ZERO)).await;
    assert!(again.drained && again.running.is_empty(), "nothing is left to wait for: {again:?}");
    assert_eq!(again.exits, a.exits);
    drop(sequence);
}

#[tokio::test]
async fn a_deadline_of_zero() {
    let rig = rig(0, |b| b).await;
    let (sequence, _) = rig.filled(2).await;
    let new = rig.tokens(1);
    let append = sequence.append(&new.ids, &new.keys, &new.values);
    let mut append = Box::pin(append);
    assert!(append.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    let report = within("no time at all", rig.cache.shutdown(Duration::ZERO)).await;
    // How far it has come by then is a matter of luck, but it says so.
    assert!(report.abandoned_operations <= 1, "{report:?}");
    assert!(!report.drained || report.running.is_empty() && report.abandoned_operations == 0, "{report:?}");
    // It was sent before the stop, so it is answered all the same; nobody is left hanging.
    assert_eq!(within("the append", append).await, Ok(3));
    assert_eq!(sequence.read::<Numbers>(0, 0..1).await, Err(Error::Closed));
    let report = within("the rest", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained && report.running.is_empty() && report.abandoned_operations == 0, "{report:?}");
}

/// Cancelled, it can be called again; new work stays refused.
#[tokio::test]
async fn a_shutdown_that_is_cancelled() {
    let rig = rig(0, |b| b).await;
    let sequence = rig.open().await;
    {
        let mut shutdown = Box::pin(rig.cache.shutdown(PATIENCE));
        assert!(shutdown.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    assert_eq!(sequence.truncate(0).await, Err(Error::Closed));
    let report = within("again", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained, "{report:?}");
}
