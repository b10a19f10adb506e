//! Decode steps: a token for each of many sequences as one call.

use kv_cache::half::{bf16, f16};
use kv_cache::*;

use crate::common::geometry;
use crate::device::{OnDevice, enqueue, rig};

const SEQUENCES: usize = 40;

fn committed(result: &Result<Outcome, Error>) -> u32 {
    match result {
        Ok(Outcome::Appended { committed }) => *committed,
        other => panic!("{other:?}"),
    }
}

/// Steps over device memory, each row of which is checked by itself.
async fn from_device_memory<E: OnDevice>(format: Format, shape: (u32, u32, u32, u32, u32)) {
    // Room for all blocks while none is sealed yet, however slow the device.
    let roomy = |builder: CacheBuilder| builder.memory_bytes_per_device(64 << 20);
    let Some((device, rig)) = rig::<E>(format, geometry(shape, E::TYPE), roomy).await else { return };
    let (mut sequences, mut models) = (Vec::new(), Vec::new());
    for at in 0..SEQUENCES as u32 {
        let (sequence, model) = rig.filled(at % (rig.block() + 1)).await;
        sequences.push(sequence);
        models.push(model);
    }
    let all: Vec<&Sequence> = sequences.iter().collect();
    for round in 0..rig.block() as usize + 2 {
        let mut step = rig.tokens(SEQUENCES as u32);
        // Another row each round, in its first layer.
        let bad = round * 7 % SEQUENCES;
        step.values[bad * rig.layout.kv_heads * rig.layout.value_dim] = E::NAN;
        let [keys, values] = device.upload_tokens(&step);
        let batch = BatchCacheOperations::new()
            .device_memory(device.point())
            .append_each_device(&all, &step.ids, &keys, &values);
        for (at, (result, model)) in enqueue(&rig.cache, batch).await.iter().zip(&mut models).enumerate() {
            if at == bad {
                assert_eq!(result.as_ref().unwrap_err(), &Error::NotFinite, "round {round}");
            } else {
                model.push(&step.token(at));
                assert_eq!(committed(result), model.len(), "round {round}, row {at}");
            }
        }
    }
    for (sequence, model) in sequences.iter().zip(&models) {
        rig.check(sequence, model).await;
    }
    drop(sequences);
    rig.finish().await;
}

#[tokio::test]
async fn whole_vectors_from_device_memory() {
    from_device_memory::<f16>(Format::Int8, (32, 3, 2, 64, 48)).await;
}

#[tokio::test]
async fn odd_rows_from_device_memory() {
    from_device_memory::<bf16>(Format::Int8, (5, 2, 3, 7, 16)).await;
}

/// The rows of one step go to the device in several parts.
#[tokio::test]
async fn a_step_larger_than_the_ring() {
    let narrow = |builder: CacheBuilder| builder.configure(|c| c.pinned_memory_bytes = 3 << 20);
    // 128 KiB a token.
    let Some((_, rig)) =
        rig::<f16>(Format::Raw, geometry((4, 32, 8, 128, 128), ElementType::F16), narrow).await
    else {
        return;
    };
    let mut sequences = Vec::new();
    for _ in 0..SEQUENCES {
        sequences.push(rig.filled(1).await);
    }
    let all: Vec<&Sequence> = sequences.iter().map(|(sequence, _)| sequence).collect();
    for bad in [0, 17, SEQUENCES - 1] {
        let mut step = rig.tokens(SEQUENCES as u32);
        step.keys[bad * 8 * 128] = f16::NAN;
        let batch = BatchCacheOperations::new().append_each(&all, &step.ids, &step.keys, &step.values);
        let results = rig.cache.submit(batch).await.unwrap();
        for (at, result) in results.iter().enumerate() {
            assert_eq!(result.as_ref().err(), (at == bad).then_some(&Error::NotFinite), "row {at}");
        }
        let batch = BatchCacheOperations::new();
        let batch =
            all.iter().fold(batch, |batch, sequence| batch.read(*sequence, 31, 1..2).truncate(*sequence, 1));
        let results = rig.cache.submit(batch).await.unwrap();
        for (at, result) in results.into_iter().step_by(2).enumerate() {
            let Ok(Outcome::Read(read)) = result else {
                assert_eq!(at, bad);
                continue;
            };
            let (keys, values) = read.into_elements::<f16>().unwrap();
            let token = step.token(at);
            assert!(keys == token.keys_of(31) && values == token.values_of(31), "row {at}");
        }
    }
    drop(sequences);
    rig.finish().await;
}
