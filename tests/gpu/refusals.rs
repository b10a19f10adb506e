//! Device tensors that cannot be what the caller means: typed errors, and nothing has changed.

use cudarc::driver::sys;
use kv_cache::cuda::{DeviceTensor, StreamPoint};
use kv_cache::half::f16;
use kv_cache::*;

use crate::common::geometry;
use crate::device::{enqueue, enqueue_all, rig};

const SHAPE: (u32, u32, u32, u32, u32) = (32, 2, 2, 64, 48);

fn is_unsupported<T: std::fmt::Debug>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Unsupported { .. }))
}

#[tokio::test]
async fn shapes_and_elements() {
    let Some((device, rig)) = rig::<f16>(Format::Int8, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let (sequence, mut model) = rig.filled(5).await;
    let tokens = rig.tokens(2);
    let [keys, values] = device.upload_tokens(&tokens);
    let singles: Vec<f32> = tokens.keys.iter().map(|x| x.to_f32()).collect();
    let singles = device.upload(&singles);
    let batch = BatchCacheOperations::new()
        .device_memory(device.point())
        .append_device(&sequence, &tokens.ids, &keys.slice(0..keys.len() - 1), &values)
        .append_device(&sequence, &tokens.ids, &keys, &values.slice(0..0))
        .append_device(&sequence, &tokens.ids, &values, &keys)
        .append_device(&sequence, &tokens.ids, &singles, &values)
        .append_device(&sequence, &[], &keys, &values)
        .stage_device(&sequence, 2, 2, &keys.slice(0..256), &values.slice(0..192))
        .stage_device(&sequence, 0, 2, &keys, &values)
        .append_device(&sequence, &tokens.ids, &keys, &values);
    let results = enqueue(&rig.cache, batch).await;
    assert!(matches!(results[0], Err(Error::Shape { plane: Plane::Key, .. })), "{:?}", results[0]);
    assert!(
        matches!(results[1], Err(Error::Shape { plane: Plane::Value, bytes: 0, .. })),
        "{:?}",
        results[1]
    );
    assert!(matches!(results[2], Err(Error::Shape { .. })), "{:?}", results[2]);
    assert!(
        matches!(results[3], Err(Error::ElementType { given: ElementType::F32, expected: ElementType::F16 })),
        "{:?}",
        results[3]
    );
    assert!(matches!(results[4], Err(Error::Empty | Error::Shape { .. })), "{:?}", results[4]);
    assert_eq!(results[5].as_ref().unwrap_err(), &Error::Layer { layer: 2, layers: 2 });
    assert!(matches!(results[6], Err(Error::Shape { .. })), "{:?}", results[6]);
    assert!(matches!(results[7], Ok(Outcome::Appended { committed: 7 })), "{:?}", results[7]);
    model.push(&tokens);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

#[tokio::test]
async fn no_point_and_another_device() {
    let Some((device, rig)) = rig::<f16>(Format::Int8, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let (sequence, mut model) = rig.filled(5).await;
    let tokens = rig.tokens(2);
    let [keys, values] = device.upload_tokens(&tokens);
    // Before a point is named, an operation is refused; the others of the batch work.
    let batch = BatchCacheOperations::new().append_device(&sequence, &tokens.ids, &keys, &values).append(
        &sequence,
        &tokens.ids,
        &tokens.keys,
        &tokens.values,
    );
    let results = enqueue(&rig.cache, batch).await;
    assert!(is_unsupported(&results[0]), "{:?}", results[0]);
    model.push(&tokens);
    // The same through `submit`.
    let batch = BatchCacheOperations::new().append_device(&sequence, &tokens.ids, &keys, &values);
    let results = rig.cache.submit(batch).await.unwrap();
    assert!(is_unsupported(&results[0]), "{:?}", results[0]);
    rig.check(&sequence, &model).await;
    // A sequence in host memory.
    let builder = Cache::builder(geometry(SHAPE, ElementType::F16)).devices(Devices::cpu(1));
    let other = builder.memory_bytes_per_device(4 << 20).build().await.unwrap();
    let stranger = other.open("tenant", OpenOptions::default()).await.unwrap();
    let batch = BatchCacheOperations::new()
        .device_memory(device.point())
        .append_device(&stranger, &tokens.ids, &keys, &values)
        .append(&stranger, &tokens.ids, &tokens.keys, &tokens.values);
    let results = enqueue(&other, batch).await;
    assert!(is_unsupported(&results[0]), "{:?}", results[0]);
    assert!(matches!(results[1], Ok(Outcome::Appended { committed: 2 })), "{:?}", results[1]);
    drop(sequence);
    rig.finish().await;
}

#[tokio::test]
async fn addresses_outside_of_an_allocation() {
    let Some((device, rig)) = rig::<f16>(Format::Raw, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let on_host = [f16::ZERO; 64];
    let memory = device.memory::<f16>(64);
    for (address, elements) in [
        (on_host.as_ptr() as u64, 64),
        (0, 1),
        (memory.address, 1 << 40),
        (memory.address, usize::MAX),
        (u64::MAX, 2),
    ] {
        // SAFETY: nothing is done with it.
        let refused = unsafe { DeviceTensor::from_raw::<f16>(address, elements) };
        assert!(is_unsupported(&refused), "{address:#x}, {elements}: {refused:?}");
    }
    // SAFETY: as above.
    assert_eq!(unsafe { DeviceTensor::from_raw::<f16>(memory.address, 64) }.unwrap().len(), 64);
    rig.finish().await;
}

/// A stream that is being captured is refused, and neither capture nor stream are spoilt by the question.
#[tokio::test]
async fn a_stream_that_is_being_captured() {
    let Some((device, rig)) = rig::<f16>(Format::Int8, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    device.stream.begin_capture(mode).unwrap();
    let refused = StreamPoint::record(&device.stream);
    assert!(is_unsupported(&refused), "{refused:?}");
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    drop(device.stream.end_capture(flags).unwrap());
    let (sequence, mut model) = (rig.open().await, rig.model());
    let tokens = rig.tokens(3);
    let [keys, values] = device.upload_tokens(&tokens);
    let batch = BatchCacheOperations::new().device_memory(device.point());
    enqueue_all(&rig.cache, batch.append_device(&sequence, &tokens.ids, &keys, &values)).await;
    model.push(&tokens);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}
