//! Operations on tensors in device memory, alone and among operations on host tensors.

use kv_cache::half::{bf16, f16};
use kv_cache::*;

use crate::common::{Tokens, geometry};
use crate::device::{OnDevice, enqueue, enqueue_all, rig};

const SHAPE: (u32, u32, u32, u32, u32) = (32, 3, 2, 64, 48);
/// Rows that are no whole vectors.
const ODD_SHAPE: (u32, u32, u32, u32, u32) = (5, 2, 3, 7, 16);

fn committed(outcome: &Outcome) -> u32 {
    match outcome {
        Outcome::Appended { committed } | Outcome::Committed { committed } => *committed,
        other => panic!("{other:?}"),
    }
}

/// One batch with a prefill and single tokens from device memory, and everything else from the host.
async fn a_mixed_batch<E: OnDevice>(format: Format, shape: (u32, u32, u32, u32, u32)) {
    let Some((device, rig)) = rig::<E>(format, geometry(shape, E::TYPE), |b| b).await else { return };
    let (a, mut a_model) = (rig.open().await, rig.model());
    let (b, mut b_model) = rig.filled(7).await;
    let (prefill, one, some, more) =
        (rig.tokens(2 * rig.block() + 3), rig.tokens(1), rig.tokens(3), rig.tokens(1));
    let [prefill_keys, prefill_values] = device.upload_tokens(&prefill);
    let [one_keys, one_values] = device.upload_tokens(&one);
    let batch = BatchCacheOperations::new()
        .device_memory(device.point())
        .append_device(&a, &prefill.ids, &prefill_keys, &prefill_values)
        .append(&b, &some.ids, &some.keys, &some.values)
        .append_device(&a, &one.ids, &one_keys, &one_values)
        .append(&a, &more.ids, &more.keys, &more.values)
        .append_device(&b, &one.ids, &one_keys, &one_values)
        .read(&b, 1, 0..11)
        .fork(&a, 1)
        .truncate(&b, 9);
    let mut outcomes = enqueue_all(&rig.cache, batch).await;
    [&prefill, &one, &more].into_iter().for_each(|tokens| a_model.push(tokens));
    [&some, &one].into_iter().for_each(|tokens| b_model.push(tokens));
    let lengths = outcomes[..5].iter().map(committed).collect::<Vec<_>>();
    let prefilled = prefill.len() as u32;
    assert_eq!(lengths, [prefilled, 10, prefilled + 1, prefilled + 2, 11]);
    let Outcome::Forked(forks) = outcomes.remove(6) else { panic!() };
    let Outcome::Read(read) = outcomes.remove(5) else { panic!() };
    let (keys, values) = read.into_elements::<E>().unwrap();
    b_model.compare(1, 0..11, &keys, &values, format);
    b_model.truncate(9);
    for sequence in [&a, &forks[0]] {
        rig.check(sequence, &a_model).await;
    }
    rig.check(&b, &b_model).await;
    rig.sealed(&a).await;
    rig.check(&a, &a_model).await;
    drop((a, b, forks));
    rig.finish().await;
}

#[tokio::test]
async fn prefill_and_single_tokens_among_host_operations() {
    for format in [Format::Raw, Format::Int8] {
        for shape in [SHAPE, ODD_SHAPE] {
            a_mixed_batch::<f16>(format, shape).await;
            a_mixed_batch::<bf16>(format, shape).await;
            a_mixed_batch::<f32>(format, shape).await;
        }
    }
}

/// As a server decodes: the tensors of a step are one piece of memory, of which each sequence has a slice.
async fn decode<E: OnDevice>() {
    let Some((device, rig)) = rig::<E>(Format::Int8, geometry((32, 1, 2, 64, 64), E::TYPE), |b| b).await
    else {
        return;
    };
    let mut rows = Vec::new();
    for tokens in [0, 1, 31, 32, 33] {
        rows.push(rig.filled(tokens).await);
    }
    for _ in 0..40 {
        let step: Vec<Tokens<E>> = rows.iter().map(|_| rig.tokens(1)).collect();
        let all: Vec<E> =
            step.iter().flat_map(|tokens| [&tokens.keys[..], &tokens.values].concat()).collect();
        let (all, per_token) = (device.upload(&all), 2 * 64);
        let mut batch = BatchCacheOperations::new().device_memory(device.point());
        for (at, ((sequence, model), tokens)) in rows.iter_mut().zip(&step).enumerate() {
            let start = 2 * at * per_token;
            let keys = all.slice(start..start + per_token);
            let values = all.slice(start + per_token..start + 2 * per_token);
            batch = batch.append_device(&*sequence, &tokens.ids, &keys, &values);
            model.push(tokens);
        }
        enqueue_all(&rig.cache, batch).await;
    }
    for (sequence, model) in &rows {
        rig.check(sequence, model).await;
    }
    drop(rows);
    rig.finish().await;
}

#[tokio::test]
async fn steps_of_many_sequences() {
    decode::<f16>().await;
    decode::<bf16>().await;
}

/// Slices at odd elements: no vector loads there.
#[tokio::test]
async fn tensors_at_any_address() {
    let Some((device, rig)) = rig::<f16>(Format::Raw, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let (sequence, mut model) = (rig.open().await, rig.model());
    for shift in [1, 3, 7] {
        let tokens = rig.tokens(35);
        let shifted = |elements: &[f16]| {
            let padded = [&vec![f16::NAN; shift], elements, &[f16::NAN]].concat();
            device.upload(&padded).slice(shift..shift + elements.len())
        };
        let (keys, values) = (shifted(&tokens.keys), shifted(&tokens.values));
        let batch = BatchCacheOperations::new().device_memory(device.point());
        enqueue_all(&rig.cache, batch.append_device(&sequence, &tokens.ids, &keys, &values)).await;
        model.push(&tokens);
    }
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn staged<E: OnDevice>() {
    let Some((device, rig)) = rig::<E>(Format::Int8, geometry(SHAPE, E::TYPE), |b| b).await else { return };
    let (sequence, mut model) = rig.filled(3).await;
    for tokens in [1, 70] {
        let new = rig.tokens(tokens);
        let [keys, values] = device.upload_tokens(&new);
        let mut batch = BatchCacheOperations::new().device_memory(device.point());
        for layer in 0..rig.layers() {
            let part = |of: usize| {
                let len = tokens as usize * 2 * of;
                layer as usize * len..(layer as usize + 1) * len
            };
            batch =
                batch.stage_device(&sequence, layer, tokens, &keys.slice(part(64)), &values.slice(part(48)));
        }
        let outcomes = enqueue_all(&rig.cache, batch.commit(&sequence, &new.ids)).await;
        model.push(&new);
        for staged in &outcomes[..rig.layers() as usize] {
            assert!(matches!(staged, Outcome::Staged { staged } if *staged == model.len()), "{staged:?}");
        }
        assert_eq!(committed(&outcomes[rig.layers() as usize]), model.len());
        rig.check(&sequence, &model).await;
    }
    drop(sequence);
    rig.finish().await;
}

#[tokio::test]
async fn layer_by_layer() {
    staged::<f16>().await;
    staged::<bf16>().await;
}

async fn read_back<E: OnDevice>(format: Format) {
    let Some((device, rig)) = rig::<E>(format, geometry(SHAPE, E::TYPE), |b| b).await else { return };
    let (sequence, _) = rig.filled(3 * rig.block() + 5).await;
    rig.sealed(&sequence).await;
    for (tokens, shift) in [(0..101, 0), (31..33, 0), (40..41, 0), (95..101, 0), (3..90, 1), (100..101, 3)] {
        let len = tokens.len() * 2;
        let (keys, values) = (device.memory::<E>(len * 64 + shift), device.memory::<E>(len * 48 + shift));
        let (to_keys, to_values) = (
            keys.tensor(&device).slice(shift..len * 64 + shift),
            values.tensor(&device).slice(shift..len * 48 + shift),
        );
        let batch = BatchCacheOperations::new().device_memory(device.point());
        // SAFETY: only this task knows the tensors, and it reads them behind the point.
        let batch = unsafe { batch.read_device(&sequence, 2, tokens.clone(), &to_keys, &to_values) };
        let step = rig.cache.enqueue(batch).await.unwrap();
        if let Some(point) = step.point() {
            point.wait(&device.stream).unwrap();
        }
        let (read_keys, read_values) = (device.download(&keys), device.download(&values));
        let outcome = step.done().await.unwrap().remove(0).unwrap();
        assert!(matches!(outcome, Outcome::ReadDevice { tokens: read } if read as usize == tokens.len()));
        let (host_keys, host_values) = sequence.read::<E>(2, tokens).await.unwrap();
        assert_eq!(
            bytemuck::cast_slice::<E, u8>(&read_keys[shift..]),
            bytemuck::cast_slice::<E, u8>(&host_keys)
        );
        assert_eq!(
            bytemuck::cast_slice::<E, u8>(&read_values[shift..]),
            bytemuck::cast_slice::<E, u8>(&host_values)
        );
    }
    drop(sequence);
    rig.finish().await;
}

#[tokio::test]
async fn reads_into_device_memory() {
    for format in [Format::Raw, Format::Int8] {
        read_back::<f16>(format).await;
        read_back::<bf16>(format).await;
    }
}

/// One bad operation fails alone, and leaves its sequence as it was.
async fn not_finite<E: OnDevice>() {
    let Some((device, rig)) = rig::<E>(Format::Int8, geometry(SHAPE, E::TYPE), |b| b).await else { return };
    for bad in [E::NAN, E::INFINITY] {
        let (good, mut good_model) = rig.filled(5).await;
        let (spoilt, mut spoilt_model) = rig.filled(30).await;
        let tokens = rig.tokens(40);
        let [keys, values] = device.upload_tokens(&tokens);
        for last in [true, false] {
            let mut elements = tokens.values.clone();
            let at = if last { elements.len() - 1 } else { 0 };
            elements[at] = bad;
            let bad_values = device.upload(&elements);
            let batch = BatchCacheOperations::new()
                .device_memory(device.point())
                .append_device(&spoilt, &tokens.ids, &keys, &bad_values)
                .append_device(&good, &tokens.ids, &keys, &values);
            let results = enqueue(&rig.cache, batch).await;
            assert_eq!(results[0].as_ref().unwrap_err(), &Error::NotFinite);
            good_model.push(&tokens);
            assert_eq!(committed(results[1].as_ref().unwrap()), good_model.len());
            rig.check(&good, &good_model).await;
            rig.check(&spoilt, &spoilt_model).await;
        }
        let batch = BatchCacheOperations::new().device_memory(device.point());
        enqueue_all(&rig.cache, batch.append_device(&spoilt, &tokens.ids, &keys, &values)).await;
        spoilt_model.push(&tokens);
        rig.check(&spoilt, &spoilt_model).await;
        drop((good, spoilt));
    }
    rig.finish().await;
}

#[tokio::test]
async fn what_is_not_finite_fails_alone() {
    not_finite::<f16>().await;
    not_finite::<bf16>().await;
    not_finite::<f32>().await;
}
