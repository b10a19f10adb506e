//! Page-locked memory that batches are lent: appended in place, also where it runs out.

use kv_cache::half::{bf16, f16};
use kv_cache::*;

use crate::common::{Number, Rig, Tokens, geometry};
use crate::device::rig;

const SHAPE: (u32, u32, u32, u32, u32) = (32, 2, 2, 64, 48);

/// A batch over `bytes` lent bytes that appends tokens through regions.
fn through_regions<E: Number>(
    rig: &Rig<E>,
    bytes: usize,
    sequence: &Sequence,
    tokens: &Tokens<E>,
) -> BatchCacheOperations {
    let mut batch = rig.cache.batch(bytes);
    let keys = batch.region::<E>(tokens.keys.len()).unwrap();
    let values = batch.region::<E>(tokens.values.len()).unwrap();
    batch.fill(&keys).copy_from_slice(&tokens.keys);
    batch.fill(&values).copy_from_slice(&tokens.values);
    batch.append_region(sequence, &tokens.ids, &keys, &values)
}

async fn all(cache: &Cache, batch: BatchCacheOperations) -> Vec<Outcome> {
    cache.submit(batch).await.unwrap().into_iter().map(|result| result.unwrap()).collect()
}

async fn regions<E: Number + cudarc::driver::DeviceRepr>() {
    let Some((_, rig)) = rig::<E>(Format::Int8, geometry(SHAPE, E::TYPE), |b| b).await else { return };
    let (sequence, mut model) = rig.filled(3).await;
    for tokens in [1, 70, 1, 33] {
        let (new, more) = (rig.tokens(tokens), rig.tokens(2));
        // Beside tensors that are copied into the batch, with room for them and without.
        let bytes = size_of_val(&new.keys[..]) + size_of_val(&new.values[..]) + 64;
        for room in [0, 1 << 16] {
            let batch = through_regions(&rig, bytes + room, &sequence, &new);
            all(&rig.cache, batch.append(&sequence, &more.ids, &more.keys, &more.values)).await;
            model.push(&new);
            model.push(&more);
        }
    }
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

#[tokio::test]
async fn regions_are_appended_where_they_lie() {
    regions::<f16>().await;
    regions::<bf16>().await;
}

#[tokio::test]
async fn regions_that_cannot_be() {
    let Some((_, rig)) = rig::<f16>(Format::Int8, geometry(SHAPE, ElementType::F16), |b| b).await else {
        return;
    };
    let (sequence, mut model) = rig.filled(3).await;
    let mut batch = rig.cache.batch(1 << 16);
    for elements in [(1 << 15) + 1, usize::MAX / 2, usize::MAX] {
        assert!(matches!(batch.region::<f16>(elements), Err(Error::Unsupported { .. })), "{elements}");
    }
    let mut plain = BatchCacheOperations::new();
    assert!(matches!(plain.region::<f16>(1), Err(Error::Unsupported { .. })));
    // Of another batch, behind the end of this one.
    let mut other = rig.cache.batch(1 << 20);
    other.region::<f16>(1 << 16).unwrap();
    let stranger = other.region::<f16>(256).unwrap();
    assert!(batch.fill(&stranger).is_empty());
    let new = rig.tokens(1);
    let (keys, values) = (batch.region::<f16>(256).unwrap(), batch.region::<f16>(192).unwrap());
    batch.fill(&keys).copy_from_slice(&new.keys);
    batch.fill(&values).copy_from_slice(&new.values);
    let batch = batch
        .append_region(&sequence, &new.ids, &stranger, &stranger)
        .append_region(&sequence, &new.ids, &keys.slice(0..255), &values)
        .append_region(&sequence, &new.ids, &values, &keys)
        .append_region(&sequence, &new.ids, &keys, &values);
    let results = rig.cache.submit(batch).await.unwrap();
    assert!(matches!(results[0], Err(Error::Unsupported { .. })), "{:?}", results[0]);
    assert!(matches!(results[1], Err(Error::Shape { .. })), "{:?}", results[1]);
    assert!(matches!(results[2], Err(Error::Shape { .. })), "{:?}", results[2]);
    assert!(matches!(results[3], Ok(Outcome::Appended { committed: 4 })), "{:?}", results[3]);
    model.push(&new);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

/// Of 1 MiB to lend: what does not fit comes out of ordinary memory, and stores the same bytes.
#[tokio::test]
async fn running_out() {
    let few = |builder: CacheBuilder| builder.configure(|c| c.lent_memory_bytes = 1 << 20);
    let Some((_, rig)) = rig::<f16>(Format::Int8, geometry(SHAPE, ElementType::F16), few).await else {
        return;
    };
    let (sequence, mut model) = (rig.open().await, rig.model());
    for _ in 0..3 {
        let new: Vec<_> = (0..5).map(|_| rig.tokens(20)).collect();
        let batches: Vec<_> =
            new.iter().map(|tokens| through_regions(&rig, 400 << 10, &sequence, tokens)).collect();
        for (batch, tokens) in batches.into_iter().zip(&new) {
            all(&rig.cache, batch).await;
            model.push(tokens);
        }
    }
    rig.check(&sequence, &model).await;
    let huge = rig.cache.batch(64 << 20);
    assert!(huge.is_empty());
    drop((sequence, huge));
    rig.finish().await;
}

/// Memory comes back only once the device has read it: batches in flight do not see each other's tokens.
#[tokio::test]
async fn memory_is_not_lent_again_too_early() {
    let few = |builder: CacheBuilder| builder.configure(|c| c.lent_memory_bytes = 256 << 10);
    let Some((_, rig)) = rig::<f16>(Format::Raw, geometry(SHAPE, ElementType::F16), few).await else {
        return;
    };
    let mut rows = Vec::new();
    for _ in 0..8 {
        rows.push((rig.open().await, rig.model()));
    }
    for _ in 0..60 {
        let mut flying = Vec::new();
        for (sequence, model) in &mut rows {
            let new = rig.tokens(2);
            let batch = through_regions(&rig, 60 << 10, sequence, &new);
            flying.push(rig.cache.try_submit(batch).map_err(|(_, error)| error).unwrap());
            model.push(&new);
        }
        for results in flying {
            results.await.unwrap().remove(0).unwrap();
        }
    }
    for (sequence, model) in &rows {
        rig.check(sequence, model).await;
    }
    drop(rows);
    rig.finish().await;
}
