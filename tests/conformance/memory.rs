//! Where the bytes go: sealing, token dropping, capacity, and whose memory it was before.

use std::ops::Range;

use kv_cache::*;

use crate::common::{Number, Rig, combos, eventually, geometry};

crate::conformance!(combos:
    sealing_frees_memory,
    a_full_cache_says_so_and_recovers,
    a_reservation_is_kept,
    another_tenants_bytes_are_gone,
    a_batch_for_one_tenant_touches_no_other,
);

async fn sealing_frees_memory<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(8 * rig.block()).await;
    rig.sealed(&sequence).await;
    let total = rig.stats().await.total;
    assert_eq!((total.blocks_used, total.blocks_sealed, total.blocks_waiting_to_seal), (8, 8, 0));
    assert!(total.seals >= 8 && total.seal_failures == 0, "{total:?}");
    let raw = 8 * (rig.layout.raw_bytes() as u64).next_multiple_of(128);
    let sealed = 8 * (rig.format.block_bytes(&rig.layout) as u64).next_multiple_of(128);
    assert_eq!(total.bytes_used, sealed);
    assert!(rig.format.is_raw() || rig.layout.raw_bytes() <= 128 || sealed < raw);
    // Once it holds more tokens than there is raw room for, it has really let go of the raw blocks. How many more depends on
    // how sealed blocks fit into chunks; a fifth is far from what the formats save.
    let blocks = total.blocks_total / rig.cache.stats().shards.len() as u64;
    let goal = match rig.format.is_raw() {
        true => blocks / 2,
        _ if sealed * 3 < raw * 2 => blocks * 6 / 5,
        _ => blocks / 2,
    };
    while u64::from(model.len() / rig.block()) < goal {
        rig.append(&sequence, &mut model, 2 * rig.block()).await;
        rig.sealed(&sequence).await;
    }
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn a_full_cache_says_so_and_recovers<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(2).await;
    let more = rig.tokens(16 * rig.block());
    let free = loop {
        let blocks =
            (model.len() + more.len() as u32).div_ceil(rig.block()) - model.len().div_ceil(rig.block());
        match sequence.append(&more.ids, &more.keys, &more.values).await {
            Ok(_) => model.push(&more),
            Err(Error::Capacity { needed, free, evictable }) => {
                assert_eq!((needed, evictable), (blocks, 0));
                assert!(free < needed, "{free} free, {needed} needed");
                break free;
            }
            Err(other) => panic!("{other}"),
        }
    };
    rig.check(&sequence, &model).await;
    // The numbers are true: so many blocks fit and not one more. (Sealing goes on and may free some meanwhile.)
    let room = |sequence: &Sequence| sequence.len().next_multiple_of(rig.block()) - sequence.len();
    let mut expected = free;
    let fits = loop {
        let too_many = rig.tokens(room(&sequence) + (expected + 1) * rig.block());
        match sequence.append(&too_many.ids, &too_many.keys, &too_many.values).await {
            Ok(_) => model.push(&too_many),
            Err(Error::Capacity { needed, free, .. }) if free == expected => break (needed, free),
            Err(Error::Capacity { free, .. }) => expected = free,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(fits, (expected + 1, expected));
    let fitting = room(&sequence) + expected * rig.block();
    rig.append(&sequence, &mut model, fitting).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    eventually("closing", || rig.cache.stats().sequences_open == 0).await;
    let (again, model) = rig.filled(16 * rig.block()).await;
    rig.check(&again, &model).await;
    drop(again);
    rig.finish().await;
}

async fn a_reservation_is_kept<E: Number>(rig: Rig<E>) {
    let blocks = rig.cache.stats().shards[0].counters.blocks_free as u32;
    let reserve = (blocks - 1) * rig.block();
    let mut held = Vec::new();
    for _ in 0..rig.cache.stats().shards.len() {
        held.push(rig.cache.open("tenant", OpenOptions::default().reserve_tokens(reserve)).await.unwrap());
    }
    // One block is left on every shard.
    let error =
        rig.cache.open("tenant", OpenOptions::default().reserve_tokens(2 * rig.block())).await.unwrap_err();
    assert_eq!(error, Error::Capacity { needed: 2, free: 1, evictable: 0 });
    rig.stats().await;
    assert!(rig.cache.can_admit(rig.block()) && !rig.cache.can_admit(rig.block() + 1));
    let other = rig.open().await;
    let two = rig.tokens(2 * rig.block());
    let refused = other.append(&two.ids, &two.keys, &two.values).await;
    assert_eq!(refused, Err(Error::Capacity { needed: 2, free: 1, evictable: 0 }));
    // An append that fails gives the reserved blocks back to the reservation.
    let owner = held.iter().find(|held| held.id().shard() == other.id().shard()).unwrap();
    let mut bad = rig.tokens(3 * rig.block());
    *bad.values.last_mut().unwrap() = E::NAN;
    assert_eq!(owner.append(&bad.ids, &bad.keys, &bad.values).await, Err(Error::NotFinite));
    let refused = other.append(&two.ids, &two.keys, &two.values).await;
    assert_eq!(refused, Err(Error::Capacity { needed: 2, free: 1, evictable: 0 }));
    let mut model = rig.model();
    rig.append(owner, &mut model, reserve).await;
    rig.check(owner, &model).await;
    drop((held, other));
    rig.finish().await;
}

/// Bytes of the slab, as an attention kernel of somebody's would read them.
fn slab_bytes(table: &BlockTable, shard: u16, offset: usize, len: usize) -> &[u8] {
    let address = table.base_addresses[shard as usize] + offset;
    // SAFETY: the table pins the slot, and the test has no operation in flight that could write to it.
    unsafe { std::slice::from_raw_parts(address as *const u8, len) }
}

async fn another_tenants_bytes_are_gone<E: Number>(rig: Rig<E>) {
    // One tenant fills every block of every shard.
    let mut secret = rig.tokens(rig.block());
    secret.keys.fill(E::from_f32(77.0));
    secret.values.fill(E::from_f32(-77.0));
    let mut spies = Vec::new();
    for _ in 0..rig.cache.stats().shards.len() {
        let victim = rig.cache.open("victim", OpenOptions::default()).await.unwrap();
        loop {
            match victim.append(&secret.ids, &secret.keys, &secret.values).await {
                Ok(_) => {}
                Err(Error::Capacity { .. }) => break,
                Err(other) => panic!("{other}"),
            }
        }
        spies.push(victim);
    }
    drop(spies);
    eventually("closing", || rig.cache.stats().total.blocks_used == 0).await;
    for spies in [rig.open().await, rig.open().await] {
        // A token of one layer: everything else in the block is what was there before.
        let own = rig.tokens(1);
        spies.stage(0, own.keys_of(0), own.values_of(0)).await.unwrap();
        let view = spies.view(0).unwrap();
        let seen = super::views::look::<E>(&rig.layout, &view);
        assert_eq!((seen.keys.as_slice(), seen.values.as_slice()), (own.keys_of(0), own.values_of(0)));
        if rig.combo.setup.host_memory {
            let table = rig.cache.block_table(&[&spies], 0).unwrap();
            let block = table.sequences[0].blocks[0];
            let bytes =
                slab_bytes(&table, spies.id().shard(), block.slot_offset_bytes, rig.layout.raw_bytes());
            let own_bytes: usize = seen.stored.iter().filter(|byte| **byte != 0).count();
            let all = bytes.iter().filter(|byte| **byte != 0).count();
            assert_eq!(all, own_bytes, "bytes of another tenant's are in the block");
        }
    }
    assert!(rig.stats().await.total.slots_zeroed > 0);
    rig.finish().await;
}

async fn a_batch_for_one_tenant_touches_no_other<E: Number>(rig: Rig<E>) {
    let mine = rig.cache.open("mine", OpenOptions::default()).await.unwrap();
    let (other, model) = rig.filled(2).await;
    let new = rig.tokens(1);
    let batch = BatchCacheOperations::new()
        .only_tenant("mine")
        .append(&mine, &new.ids, &new.keys, &new.values)
        .append(&other, &new.ids, &new.keys, &new.values)
        .read(&other, 0, 0..2)
        .stage(&other, 0, 1, new.keys_of(0), new.values_of(0))
        .commit(&other, &new.ids)
        .fork(&other, 1)
        .truncate(&other, 0)
        .close(&other)
        .read(&mine, 0, 0..1);
    let results = rig.cache.submit(batch).await.unwrap();
    assert!(matches!(results[0], Ok(Outcome::Appended { committed: 1 })));
    for result in &results[1..8] {
        assert_eq!(result.as_ref().unwrap_err(), &Error::TenantMismatch(other.id()));
    }
    assert!(matches!(results[8], Ok(Outcome::Read(_))));
    rig.check(&other, &model).await;
    drop((mine, other));
    rig.finish().await;
}

/// Token dropping: `ratio` of the tokens stay, 4 of them at the start.
#[tokio::test]
async fn dropped_tokens_are_gone_and_kept_ones_exact() {
    for (setup, block) in [(0, 5), (1, 1), (2, 32), (3, 5), (4, 3), (0, 1)] {
        let setup = &crate::common::SETUPS[setup];
        let geometry = geometry((block, 2, 2, 16, 8), ElementType::F16);
        let combo = crate::common::Combo { setup, format: BlockFormat::RAW, geometry };
        let Some(builder) = combo.builder() else { continue };
        let compression = Compression { enabled: true, ratio: 0.5, method: CompressionMethod::Truncation };
        let rig = Rig::<half::f16>::new(&combo, builder.compression(compression)).await;
        drops_tokens(rig).await;
    }
}

/// What truncation to half of `committed` tokens drops.
fn half(committed: u32) -> Range<u32> {
    let recent = committed.div_ceil(2).saturating_sub(4).max(1);
    if committed.saturating_sub(recent) <= 4 { 0..0 } else { 4..committed - recent }
}

async fn drops_tokens<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = (rig.open().await, rig.model());
    for tokens in [4, 1, 7, 40, 1, 1, 1, 9, 64] {
        let new = rig.tokens(tokens);
        match tokens {
            1 => {
                rig.stage_all(&sequence, &new).await;
                sequence.commit(&new.ids).await.unwrap();
                model.push(&new);
            }
            _ => {
                sequence.append(&new.ids, &new.keys, &new.values).await.unwrap();
                model.push(&new);
            }
        }
        let (len, dropped) = (model.len(), half(model.len()));
        let info = sequence.info();
        assert_eq!((info.committed, &info.dropped), (len, &dropped));
        for layer in 0..rig.layers() {
            let view = sequence.view(layer).unwrap();
            assert_eq!(view.tokens(), len - (dropped.end - dropped.start));
            for kept in [0..dropped.start, dropped.end..len] {
                let (keys, values) = sequence.read::<E>(layer, kept.clone()).await.unwrap();
                model.compare_exact(layer, kept, &keys, &values);
            }
        }
        let table = rig.cache.block_table(&[&sequence], 0).unwrap();
        assert_eq!(table.sequences[0].dropped, dropped);
        if !dropped.is_empty() {
            for gone in [4..5, dropped.end - 1..len, 0..len, 3..5, dropped.clone()] {
                let error = sequence.read::<E>(0, gone.clone()).await.unwrap_err();
                assert_eq!(error, Error::TokensDropped { range: gone, dropped: dropped.clone() });
            }
        }
        // Blocks of dropped tokens alone are free.
        let holds = |block: u32| {
            let tokens = block * rig.block()..((block + 1) * rig.block()).min(len);
            tokens.start < dropped.start.max(if dropped.is_empty() { len } else { 0 })
                || tokens.end > dropped.end
        };
        let blocks = (0..len.div_ceil(rig.block())).filter(|block| holds(*block)).count();
        assert_eq!((info.raw_blocks + info.sealed_blocks) as usize, blocks);
        drop(table);
        assert_eq!(rig.stats().await.total.blocks_used as usize, blocks);
    }
    let dropped = sequence.info().dropped;
    // Cutting: among the dropped tokens is refused; down to the window, or into the sinks, is not.
    let error = sequence.truncate(dropped.end - 1).await.unwrap_err();
    assert_eq!(error, Error::TokensDropped { range: 0..dropped.end - 1, dropped: dropped.clone() });
    let fork = sequence.fork().await.unwrap();
    sequence.truncate(dropped.end).await.unwrap();
    model.truncate(dropped.end);
    let new = rig.tokens(3);
    sequence.append(&new.ids, &new.keys, &new.values).await.unwrap();
    model.push(&new);
    assert_eq!(sequence.info().dropped, dropped, "the window never moves back");
    let (keys, values) = sequence.read::<E>(1, dropped.end..model.len()).await.unwrap();
    model.compare_exact(1, dropped.end..model.len(), &keys, &values);
    sequence.truncate(3).await.unwrap();
    model.truncate(3);
    assert_eq!(sequence.info().dropped, 0..0);
    rig.append(&sequence, &mut model, 2).await;
    rig.check(&sequence, &model).await;
    assert_eq!(fork.info().dropped, dropped);
    drop((sequence, fork));
    rig.finish().await;
}

/// Nobody sends the shard anything after the view has gone: what it held back comes free all the same.
#[tokio::test]
async fn dropping_a_view_frees_what_it_held_on_an_idle_cache() {
    let cache = Cache::builder(Geometry::new(1, 1, 16, ElementType::F32))
        .memory_bytes_per_device(1 << 20)
        .build()
        .await
        .expect("a cache");
    let sequence = cache.open("t", OpenOptions::default()).await.expect("a sequence");
    sequence.append(&[1; 320], &[1.0f32; 320 * 16], &[1.0f32; 320 * 16]).await.expect("appended");
    // A block that is being sealed is not free before that is done.
    let sealed = async {
        while sequence.info().sealed_blocks < 10 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), sealed).await.expect("the blocks are sealed");
    let used = |cache: &Cache| cache.stats().total.bytes_used;
    let view = sequence.view(0).expect("a view");
    sequence.close().await.expect("closed");
    let held = used(&cache);
    assert!(cache.stats().total.slots_quarantined > 0, "the view holds slots");
    drop(view);
    let all_free = async {
        while cache.stats().total.slots_quarantined > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), all_free).await.expect("the slots come back");
    assert!(used(&cache) < held);
}
