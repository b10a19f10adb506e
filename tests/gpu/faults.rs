//! A GPU that is too small, and one that is lost.

use std::process::Command;

use cudarc::driver::LaunchConfig;
use kv_cache::half::f16;
use kv_cache::*;

use crate::common::{PATIENCE, Rig, eventually, geometry, within};
use crate::device::{DELAY_MS, Device, rig};

const SHAPE: (u32, u32, u32, u32, u32) = (32, 2, 2, 64, 48);
/// Set in the process that loses its GPU.
const LOSE: &str = "KV_CACHE_TEST_LOSES_ITS_GPU";
const DONE: &str = "everything else served on";

#[tokio::test]
async fn a_budget_that_does_not_fit() {
    let Some(_device) = Device::open() else { return };
    let budget = 1u64 << 42;
    let builder = Cache::builder(Geometry::new(32, 8, 128, ElementType::F16)).devices(Devices::cuda(1));
    let error = builder.memory_bytes_per_device(budget).build().await.unwrap_err();
    let told = error.to_string();
    let BuildError::Memory { requested_bytes, available_bytes, missing_bytes } = error else {
        panic!("{told}")
    };
    assert!(requested_bytes <= budget && requested_bytes > budget / 2, "{told}");
    assert!(available_bytes > 0 && available_bytes < budget / 2, "{told}");
    assert_eq!(missing_bytes, requested_bytes - available_bytes, "{told}");
    assert!(told.contains(&missing_bytes.to_string()) && told.contains("memory_bytes_per_device"), "{told}");
    // Nothing is left behind: one that fits is built after it.
    let builder = Cache::builder(Geometry::new(1, 1, 16, ElementType::F16)).devices(Devices::cuda(1));
    let cache = builder.memory_bytes_per_device(1 << 20).build().await.unwrap();
    assert!(cache.shutdown(PATIENCE).await.drained);
}

#[tokio::test]
async fn more_gpus_than_there_are() {
    let Some(_device) = Device::open() else { return };
    let builder = Cache::builder(Geometry::new(1, 1, 16, ElementType::F16)).devices(Devices::cuda(1000));
    let error = builder.memory_bytes_per_device(1 << 20).build().await.unwrap_err();
    assert!(matches!(&error, BuildError::Device { device, .. } if device == "1000 GPUs"), "{error}");
}

/// An error that ends the context ends every cache on it, so this runs in a process of its own.
#[test]
fn a_kernel_that_traps() {
    if let Err(reason) = Devices::gpus_found() {
        println!("skipped: {reason}");
        return;
    }
    for lose in ["idle", "busy"] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "faults::in_a_process_of_its_own", "--nocapture", "--test-threads=1"])
            .env(LOSE, lose)
            .output()
            .unwrap();
        let text =
            [child.stdout, child.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(child.status.success() && text.contains(DONE), "{lose}: {}\n{text}", child.status);
    }
}

fn check_lost(error: &Error) {
    let Error::ShardLost { shard: 0, reason } = error else { panic!("{error:?}") };
    assert!(reason.contains("CUDA_ERROR"), "{reason}");
}

/// Does nothing unless [`a_kernel_that_traps`] has started it.
#[tokio::test]
async fn in_a_process_of_its_own() {
    let Ok(lose) = std::env::var(LOSE) else { return };
    let Some((device, gpu)) = rig::<f16>(Format::Int8, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let cpu = Cache::builder(geometry(SHAPE, ElementType::F16)).devices(Devices::cpu(1));
    let cpu = cpu.memory_bytes_per_device(8 << 20).sealed_format(Format::Int8).build().await.unwrap();
    let (mut rows, mut on_cpu_model) = (Vec::new(), gpu.model());
    for tokens in [3, 40, 70] {
        rows.push(gpu.filled(tokens).await);
    }
    let on_cpu = cpu.open("tenant", OpenOptions::default()).await.unwrap();
    let view = rows[0].0.view(0).unwrap();
    let new = gpu.tokens(40);
    // Busy: an append that waits for the stream on which the kernel fails is on the cache's queue by then.
    let [keys, values] = device.upload_tokens(&new);
    let mut flying = None;
    if lose == "busy" {
        device.delay(DELAY_MS);
    }
    let kernel = device.kernel("fail");
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the kernel takes nothing, and touches no memory.
    unsafe { device.stream.launch_builder(&kernel).launch(config) }.unwrap();
    if lose == "busy" {
        let batch = BatchCacheOperations::new().device_memory(device.point());
        let batch = batch.append_device(&rows[0].0, &new.ids, &keys, &values);
        flying = Some(gpu.cache.try_enqueue(batch).map_err(|(_, error)| error).unwrap());
    }
    if let Some(flying) = flying {
        let answer = within("an append in flight", async { flying.await?.done().await }).await;
        match answer {
            Ok(mut results) => check_lost(&results.remove(0).unwrap_err()),
            Err(error) => check_lost(&error),
        }
    }
    assert!(device.stream.synchronize().is_err(), "the kernel has not failed");
    for (sequence, _) in &rows {
        let read = within("a read", sequence.read::<f16>(0, 0..1)).await;
        check_lost(&read.unwrap_err());
        check_lost(
            &within("an append", sequence.append(&new.ids, &new.keys, &new.values)).await.unwrap_err(),
        );
        check_lost(&sequence.view(0).unwrap_err());
        check_lost(&gpu.cache.device_block_table(&[sequence], 0).unwrap_err());
    }
    check_lost(&within("an open", gpu.cache.open("tenant", OpenOptions::default())).await.unwrap_err());
    let told = gpu.cache.stats().shards[0].lost.clone().unwrap();
    assert!(told.contains("CUDA_ERROR"), "{told}");
    // What was borrowed stays borrowed; its bytes cannot be had any more.
    let block = view.blocks().next().unwrap();
    assert!(matches!(block.keys::<f16>(0), Err(Error::Device(_))));
    on_cpu.append(&new.ids, &new.keys, &new.values).await.unwrap();
    on_cpu_model.push(&new);
    let (keys, values) = on_cpu.read::<f16>(1, 0..40).await.unwrap();
    on_cpu_model.compare(1, 0..40, &keys, &values, Format::Int8);
    drop((view, rows, on_cpu));
    ends(gpu).await;
    assert!(within("shutting down", cpu.shutdown(PATIENCE)).await.drained);
    // One that is built now says why it cannot be.
    let builder = Cache::builder(geometry(SHAPE, ElementType::F16)).devices(Devices::cuda(1));
    let error = builder.memory_bytes_per_device(1 << 20).build().await.unwrap_err();
    assert!(error.to_string().contains("CUDA_ERROR"), "{error}");
    println!("{DONE}");
}

async fn ends(rig: Rig<f16>) {
    eventually("permits", || {
        let stats = rig.cache.stats();
        stats.jobs_in_flight + stats.bytes_in_flight + stats.tokens == 0 && stats.sequences_open == 0
    })
    .await;
    let report = within("shutting down", rig.cache.shutdown(PATIENCE)).await;
    assert!(report.drained && report.running.is_empty(), "{report:?}");
    let lost = |(name, exit): &(ActorName, Exit)| match (name, exit) {
        (ActorName::Device(0), Exit::DeviceLost(reason)) => reason.contains("CUDA_ERROR"),
        _ => false,
    };
    assert!(report.exits.iter().any(lost), "{report:?}");
}
