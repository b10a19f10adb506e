//! Moving sealed blocks to the host tier and back: nobody can tell but by the statistics.

use kv_cache::*;

use crate::common::{HOST_TIER_BLOCKS, Number, Rig, combos};

crate::conformance!(combos:
    offloaded_blocks_read_as_before_and_come_back,
    an_offloaded_block_is_copied_on_write,
    forks_share_what_was_offloaded,
    a_full_host_tier_says_so_and_moves_nothing,
    a_view_holds_still_while_its_blocks_move,
);

async fn offloaded_blocks_read_as_before_and_come_back<E: Number>(rig: Rig<E>) {
    let open = rig.block() - 1;
    let (sequence, mut model) = rig.filled(5 * rig.block() + open).await;
    rig.sealed(&sequence).await;
    let used = rig.stats().await.total.bytes_used;
    let blocks =
        |view: &View| view.blocks().map(|block| (block.first_token(), block.format())).collect::<Vec<_>>();
    let before = blocks(&sequence.view(0).unwrap());
    assert_eq!(sequence.offload().await.unwrap(), 5);
    assert_eq!(sequence.offload().await.unwrap(), 0, "they are there");
    assert_eq!((sequence.info().sealed_blocks, sequence.info().host_blocks), (5, 5));
    let total = rig.stats().await.total;
    assert_eq!((total.blocks_host, total.tier_moves), (5, 5));
    assert!(total.bytes_used < used, "the device's memory is free");
    rig.check(&sequence, &model).await;
    let view = sequence.view(0).unwrap();
    assert_eq!(blocks(&view), before);
    let seen = super::views::look::<E>(&rig.layout, &view);
    model.compare(0, 0..model.len(), &seen.keys, &seen.values, rig.format);
    drop(view);
    let table = rig.cache.block_table(&[&sequence], 0).unwrap();
    let (host, device) = table.sequences[0].blocks.split_at(5);
    assert!(
        host.iter().all(|block| block.tier == Tier::Host)
            && device.iter().all(|block| block.tier == Tier::Device)
    );
    drop(table);
    // What is appended later stays on the device until it is offloaded too.
    rig.append(&sequence, &mut model, rig.block()).await;
    rig.sealed(&sequence).await;
    assert_eq!(sequence.info().host_blocks, 5);
    rig.check(&sequence, &model).await;
    assert_eq!(sequence.prefetch().await.unwrap(), 5);
    assert_eq!((sequence.info().sealed_blocks, sequence.info().host_blocks), (6, 0));
    assert_eq!(sequence.prefetch().await.unwrap(), 0);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn an_offloaded_block_is_copied_on_write<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(3 * rig.block()).await;
    rig.sealed(&sequence).await;
    sequence.offload().await.unwrap();
    for cut in [2 * rig.block() + rig.block() / 2, rig.block(), 1] {
        sequence.truncate(cut).await.unwrap();
        model.truncate(cut);
        rig.append(&sequence, &mut model, 2 * rig.block()).await;
        rig.check(&sequence, &model).await;
        rig.sealed(&sequence).await;
        sequence.offload().await.unwrap();
        rig.check(&sequence, &model).await;
    }
    drop(sequence);
    rig.finish().await;
}

async fn forks_share_what_was_offloaded<E: Number>(rig: Rig<E>) {
    let (parent, model) = rig.filled(4 * rig.block()).await;
    rig.sealed(&parent).await;
    let fork = parent.fork().await.unwrap();
    assert_eq!(parent.offload().await.unwrap(), 4);
    assert_eq!(fork.info().host_blocks, 4, "shared blocks move for all who share them");
    rig.check(&fork, &model).await;
    parent.close().await.unwrap();
    assert_eq!(rig.stats().await.total.blocks_host, 4);
    let mut longer = model.clone();
    rig.append(&fork, &mut longer, 3).await;
    rig.check(&fork, &longer).await;
    assert_eq!(fork.prefetch().await.unwrap(), 4);
    rig.check(&fork, &longer).await;
    fork.offload().await.unwrap();
    drop(fork);
    // Their places in the host tier are free again.
    rig.finish().await;
}

async fn a_full_host_tier_says_so_and_moves_nothing<E: Number>(rig: Rig<E>) {
    let half = HOST_TIER_BLOCKS / 2 + 1;
    let (first, first_model) = rig.filled(half * rig.block()).await;
    // Each shard has a host tier of its own: whoever lands on another shard stays there, so that the next one does not.
    let mut others = Vec::new();
    let (second, second_model) = loop {
        let (other, model) = rig.filled(half * rig.block()).await;
        if other.id().shard() == first.id().shard() {
            break (other, model);
        }
        others.push(other);
    };
    rig.sealed(&first).await;
    rig.sealed(&second).await;
    assert_eq!(first.offload().await.unwrap(), half);
    let free = HOST_TIER_BLOCKS - half;
    let full = Error::TierFull { tier: Tier::Host, needed: half, free };
    assert!(full.is_retryable());
    assert_eq!(second.offload().await.unwrap_err(), full);
    assert_eq!(second.info().host_blocks, 0);
    rig.check(&first, &first_model).await;
    rig.check(&second, &second_model).await;
    first.close().await.unwrap();
    assert_eq!(second.offload().await.unwrap(), half);
    rig.check(&second, &second_model).await;
    let batch = BatchCacheOperations::new().move_to(&second, Tier::Device).move_to(&second, Tier::Host).read(
        &second,
        0,
        0..1,
    );
    let results = rig.cache.submit(batch).await.unwrap();
    assert!(matches!(results[0], Ok(Outcome::Moved { blocks }) if blocks == half));
    assert!(matches!(results[1], Ok(Outcome::Moved { blocks }) if blocks == half));
    assert!(matches!(results[2], Ok(Outcome::Read(_))));
    drop((second, others));
    rig.finish().await;
}

async fn a_view_holds_still_while_its_blocks_move<E: Number>(rig: Rig<E>) {
    let (sequence, model) = rig.filled(3 * rig.block()).await;
    rig.sealed(&sequence).await;
    let view = sequence.view(0).unwrap();
    sequence.offload().await.unwrap();
    let in_host = sequence.view(0).unwrap();
    sequence.prefetch().await.unwrap();
    // Whose slots are free now would get the new blocks.
    let others = rig.filled(6 * rig.block()).await.0;
    rig.sealed(&others).await;
    others.offload().await.unwrap();
    for view in [&view, &in_host] {
        let seen = super::views::look::<E>(&rig.layout, view);
        model.compare(0, 0..model.len(), &seen.keys, &seen.values, rig.format);
    }
    drop((view, in_host, sequence, others));
    rig.finish().await;
}
