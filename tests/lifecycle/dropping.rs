//! Handles that outlive each other.

use super::*;

/// Threads of actors of shards with this number, in this process.
fn threads(shard: u16) -> usize {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 };
    let names = [format!("kv-device-{shard}"), format!("kv-transfer-{shard}")];
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
    };
    // The system cuts names off after 15 bytes.
    let cut = |name: &str| name.chars().take(15).collect::<String>();
    tasks.filter_map(name).filter(|name| names.iter().any(|n| cut(n) == name.trim())).count()
}

#[tokio::test]
async fn a_sequence_keeps_the_cache_alive_and_the_last_handle_ends_it() {
    // So many shards as no other test has: its threads can be told from those of others.
    let rig = rig(0, |b| b.devices(Devices::cpu(8))).await;
    let (sequence, mut model) = rig.filled(7).await;
    let (layout, cache) = (rig.layout, rig.cache);
    assert!(threads(7) > 0 || !std::path::Path::new("/proc/self/task").exists());
    drop(cache);
    let new = Tokens::<Numbers>::generate(layout, 6, 99);
    assert_eq!(within("an append", sequence.append(&new.ids, &new.keys, &new.values)).await, Ok(13));
    model.push(&new);
    let fork = sequence.fork().await.unwrap();
    drop(sequence);
    let view = fork.view(1).unwrap();
    let (keys, values) = within("a read", fork.read::<Numbers>(1, 0..13)).await.unwrap();
    model.compare(1, 0..13, &keys, &values, Format::Int8);
    drop(fork);
    eventually("ending the threads", || threads(7) == 0).await;
    // A view outlives even that.
    assert_eq!(view.tokens(), 13);
    assert!(view.blocks().all(|block| block.values::<Numbers>(1).is_ok()));
}

/// A handle that outlives the runtime that the router ran on: typed errors, and no hang.
#[test]
fn the_runtime_goes_first() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (rig, sequence, new) = runtime.block_on(async {
        let rig = rig(1, |b| b).await;
        let (sequence, _) = rig.filled(3).await;
        let new = rig.tokens(1);
        (rig, sequence, new)
    });
    drop(runtime);
    let second = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    second.block_on(async {
        let append = sequence.append(&new.ids, &new.keys, &new.values);
        assert_eq!(within("an append", append).await, Err(Error::Closed));
        let open = rig.cache.open("tenant", OpenOptions::default());
        assert_eq!(within("an open", open).await.unwrap_err(), Error::Closed);
        assert!(!rig.cache.can_admit(1), "it will never take anything any more");
        assert_eq!(sequence.view(0).unwrap_err(), Error::Closed);
        let stats = rig.cache.stats();
        assert_eq!((stats.jobs_in_flight, stats.bytes_in_flight), (0, 0));
        let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
        assert!(report.drained && report.running.is_empty(), "{report:?}");
    });
}

/// Nobody waits any more, but the work that was submitted is done.
#[tokio::test]
async fn a_batch_whose_caller_has_gone_takes_effect() {
    let rig = rig(0, |b| b).await;
    let (sequence, mut model) = rig.filled(1).await;
    let new = rig.tokens(5);
    let batch = BatchCacheOperations::new()
        .append(&sequence, &new.ids, &new.keys, &new.values)
        .fork(&sequence, 4)
        .open("tenant", OpenOptions::default());
    let Ok(results) = rig.cache.try_submit(batch) else { panic!("permits are free") };
    drop(results);
    eventually("the append", || sequence.len() == 6).await;
    model.push(&new);
    eventually("closing what nobody wants", || rig.cache.stats().sequences_open == 1).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

/// A waker that is never called again, as of a task that was forgotten, holds nobody up.
#[tokio::test]
async fn a_forgotten_future_holds_nobody_up() {
    struct Ignore;
    impl Wake for Ignore {
        fn wake(self: Arc<Self>) {}
    }
    let rig = rig(0, |b| b.max_in_flight(2, 1 << 20)).await;
    let (sequence, model) = rig.filled(5).await;
    let mut forgotten = Box::pin(sequence.read::<Numbers>(0, 0..5));
    let waker = Waker::from(Arc::new(Ignore));
    assert!(forgotten.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    for _ in 0..5 {
        within("others", rig.check(&sequence, &model)).await;
    }
    drop(forgotten);
    drop(sequence);
    rig.finish().await;
}
