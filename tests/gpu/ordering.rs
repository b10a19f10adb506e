//! Order between the caller's stream and the cache, without the host waiting for either.
//!
//! What the caller's stream has not produced yet is NaN, and what it has overwritten is NaN again: a cache that reads too early or
//! too late answers `NotFinite`, or gives wrong bytes back. A kernel that takes its time stands in front of everything that is produced.

use std::pin::pin;
use std::task::{Context, Waker};

use kv_cache::half::f16;
use kv_cache::*;

use crate::common::{Rig, Tokens, geometry, within};
use crate::device::{DELAY_MS, Device, Shared, rig};

/// 8 KiB a token.
const SHAPE: (u32, u32, u32, u32, u32) = (32, 2, 8, 128, 128);

/// Keys and values that the caller's stream produces late, in memory that it uses again and again.
struct Late {
    produced: [Shared<f16>; 2],
    shown: [Shared<f16>; 2],
}

impl Late {
    fn new(device: &Device, elements: usize) -> Late {
        let pair = || [device.memory(elements), device.memory(elements)];
        Late { produced: pair(), shown: pair() }
    }

    /// Puts the tokens' tensors on the stream, behind a delay. Until they are there, NaN is.
    fn produce(&mut self, device: &Device, tokens: &Tokens<f16>) {
        for (memory, elements) in self.produced.iter_mut().zip([&tokens.keys, &tokens.values]) {
            *memory = device.memory_of(elements);
        }
        self.spoil(device);
        device.delay(DELAY_MS);
        for (to, from) in self.shown.iter().zip(&self.produced) {
            device.copy(to, from);
        }
    }

    fn spoil(&self, device: &Device) {
        self.shown.iter().for_each(|memory| device.fill(memory, f16::NAN));
    }

    fn append(&self, device: &Device, sequence: &Sequence, tokens: &Tokens<f16>) -> BatchCacheOperations {
        let [keys, values] = self.shown.each_ref().map(|memory| memory.tensor(device));
        BatchCacheOperations::new().device_memory(device.point()).append_device(
            sequence,
            &tokens.ids,
            &keys,
            &values,
        )
    }
}

async fn rig_and_late(tokens: u32) -> Option<(Device, Rig<f16>, Late)> {
    let (device, rig) = rig::<f16>(Format::Int8, geometry(SHAPE, ElementType::F16), |b| b).await?;
    let late = Late::new(&device, (tokens * 2 * 8 * 128) as usize);
    Some((device, rig, late))
}

#[tokio::test]
async fn the_cache_waits_for_the_producer_and_the_producer_for_the_cache() {
    // Small, and as large as what goes over a copy lane from host memory: device tensors never do.
    for tokens in [1, 20, 200] {
        let Some((device, rig, mut late)) = rig_and_late(tokens).await else { return };
        let (sequence, mut model) = (rig.open().await, rig.model());
        for _ in 0..3 {
            let new = rig.tokens(tokens);
            late.produce(&device, &new);
            let step = rig.cache.enqueue(late.append(&device, &sequence, &new)).await.unwrap();
            if let Some(point) = step.point() {
                point.wait(&device.stream).unwrap();
            }
            late.spoil(&device);
            let outcome = step.done().await.unwrap().remove(0);
            model.push(&new);
            assert!(
                matches!(outcome, Ok(Outcome::Appended { committed }) if committed == model.len()),
                "{outcome:?}"
            );
        }
        rig.check(&sequence, &model).await;
        device.stream.synchronize().unwrap();
        drop(sequence);
        rig.finish().await;
    }
}

/// Steps are submitted ahead of the device, and all of them use the same memory.
#[tokio::test]
async fn steps_under_way_keep_their_order() {
    const STEPS: usize = 70;
    let Some((device, rig)) = rig::<f16>(Format::Raw, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let (a, b) = (rig.open().await, rig.open().await);
    let memory = device.memory::<f16>(2 * 8 * 128);
    let tensor = memory.tensor(&device);
    device.delay(DELAY_MS);
    let mark = |step: usize| f16::from_f32(step as f32 + 1.0);
    let mut results = Vec::new();
    for step in 0..STEPS {
        device.fill(&memory, mark(step));
        let batch = BatchCacheOperations::new()
            .device_memory(device.point())
            .append_device(&a, &[step as u32], &tensor, &tensor)
            .append_device(&b, &[step as u32], &tensor, &tensor);
        let enqueued = rig.cache.try_enqueue(batch).map_err(|(_, error)| error).unwrap().await.unwrap();
        if let Some(point) = enqueued.point() {
            point.wait(&device.stream).unwrap();
        }
        device.fill(&memory, f16::NAN);
        results.push(enqueued);
    }
    for enqueued in results {
        for result in enqueued.done().await.unwrap() {
            assert!(matches!(result, Ok(Outcome::Appended { .. })), "{result:?}");
        }
    }
    for sequence in [&a, &b] {
        for layer in 0..2 {
            let (keys, values) = sequence.read::<f16>(layer, 0..STEPS as u32).await.unwrap();
            for elements in [keys, values] {
                for (step, token) in elements.chunks(8 * 128).enumerate() {
                    assert!(
                        token.iter().all(|x| *x == mark(step)),
                        "layer {layer}, step {step}: {}",
                        token[0]
                    );
                }
            }
        }
    }
    device.stream.synchronize().unwrap();
    drop((a, b));
    rig.finish().await;
}

/// A dropped future loses the result and nothing else; the cache keeps the tensors that it was given.
#[tokio::test]
async fn futures_dropped_at_once() {
    let Some((device, rig, mut late)) = rig_and_late(40).await else { return };
    for how in 0..4 {
        let (sequence, mut model) = rig.filled(3).await;
        let new = rig.tokens(40);
        late.produce(&device, &new);
        // Tensors of their own, which nobody but the batch keeps.
        let own = [device.memory::<f16>(new.keys.len()), device.memory::<f16>(new.values.len())];
        own.iter().for_each(|memory| device.fill(memory, f16::NAN));
        late.shown.iter().zip(&own).for_each(|(from, to)| device.copy(to, from));
        let [keys, values] = own.each_ref().map(|memory| memory.tensor(&device));
        let batch = BatchCacheOperations::new().device_memory(device.point());
        let batch = batch.append_device(&sequence, &new.ids, &keys, &values);
        drop((own, keys, values));
        match how {
            // Submitted, and never polled.
            0 => drop(rig.cache.try_enqueue(batch).map_err(|(_, error)| error).unwrap()),
            // Polled once, which submits.
            1 => {
                let future = pin!(rig.cache.enqueue(batch));
                let _ = future.poll(&mut Context::from_waker(Waker::noop()));
            }
            // On the queue, and nobody waits for it to be done.
            2 => drop(rig.cache.enqueue(batch).await.unwrap()),
            _ => {
                let future = pin!(rig.cache.enqueue(batch).await.unwrap().done());
                let _ = future.poll(&mut Context::from_waker(Waker::noop()));
            }
        }
        // Whatever was freed too early is used again.
        let others = [device.memory::<f16>(new.keys.len()), device.memory::<f16>(new.values.len())];
        others.iter().for_each(|memory| device.fill(memory, f16::NAN));
        model.push(&new);
        // Behind the append in the sequence's order.
        within("a read", sequence.read::<f16>(0, 0..model.len())).await.unwrap();
        rig.check(&sequence, &model).await;
        device.stream.synchronize().unwrap();
    }
    // Never polled, so never submitted: nothing happens.
    let (sequence, model) = rig.filled(3).await;
    let new = rig.tokens(40);
    late.produce(&device, &new);
    drop(rig.cache.enqueue(late.append(&device, &sequence, &new)));
    rig.check(&sequence, &model).await;
    device.stream.synchronize().unwrap();
    drop(sequence);
    rig.finish().await;
}

/// Reads into device memory are done behind the point, and begin behind the caller's.
#[tokio::test]
async fn a_read_waits_for_whoever_used_the_memory_before() {
    let Some((device, rig, _)) = rig_and_late(1).await else { return };
    let (sequence, model) = rig.filled(100).await;
    let memory = [device.memory::<f16>(100 * 8 * 128), device.memory::<f16>(100 * 8 * 128)];
    device.delay(DELAY_MS);
    // What a read that came too early had written is overwritten by this.
    memory.iter().for_each(|memory| device.fill(memory, f16::NAN));
    let [keys, values] = memory.each_ref().map(|memory| memory.tensor(&device));
    let batch = BatchCacheOperations::new().device_memory(device.point());
    // SAFETY: the stream is done with the memory at the batch's point, and reads it behind the step's.
    let batch = unsafe { batch.read_device(&sequence, 1, 0..100, &keys, &values) };
    let step = rig.cache.enqueue(batch).await.unwrap();
    if let Some(point) = step.point() {
        point.wait(&device.stream).unwrap();
    }
    let [keys, values] = memory.each_ref().map(|memory| device.download(memory));
    step.done().await.unwrap().remove(0).unwrap();
    model.compare(1, 0..100, &keys, &values, Format::Int8);
    drop(sequence);
    rig.finish().await;
}
