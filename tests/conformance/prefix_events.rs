//! Block events: a listener that counts along knows what can be found, or is told what it has missed.

use std::collections::HashMap;

use kv_cache::*;

use crate::common::{Number, Rig, SETUPS, combos, eventually, geometry, within};

crate::conformance!(combos:
    a_stored_block_names_the_one_before_it,
    moves_between_tiers_are_told,
    a_listener_who_counts_along_knows_what_is_cached,
);

fn drain(events: &mut BlockEvents) -> Vec<BlockEvent> {
    std::iter::from_fn(|| events.try_next()).map(Result::unwrap).collect()
}

async fn a_stored_block_names_the_one_before_it<E: Number>(rig: Rig<E>) {
    let mut events = rig.cache.events();
    let text = rig.text(4 * rig.block());
    let (sequence, _) = rig.shared(&text).await;
    let shard = sequence.id().shard();
    let mut keys = Vec::new();
    for _ in 0..4 {
        let event = within("an event", events.next()).await.unwrap().unwrap();
        let BlockEvent::Stored { shard: on, key, parent, tier } = event else { panic!("{event:?}") };
        assert_eq!((on, parent, tier), (shard, keys.last().copied(), Tier::Device));
        keys.push(key);
    }
    // Neither finding it, nor sealing it, nor computing it again changes what can be found.
    rig.sealed(&sequence).await;
    drop(rig.prompted(&text).await);
    let (again, mut model) = rig.prompted(&text).await;
    rig.go_on(&again, &mut model, &text, text.len() as u32).await;
    drop((sequence, again));
    rig.poke().await;
    assert_eq!(drain(&mut events), []);
    assert_eq!(rig.cache.invalidate(Invalidate::All).await.unwrap(), 4);
    rig.poke().await;
    keys.reverse();
    let removed: Vec<_> = keys.into_iter().map(|key| BlockEvent::Removed { shard, key }).collect();
    assert_eq!(drain(&mut events), removed, "nobody is told of a block whose parent has gone");
    rig.finish().await;
    within("the end", async { while events.next().await.is_some() {} }).await;
}

async fn moves_between_tiers_are_told<E: Number>(rig: Rig<E>) {
    let text = rig.text(3 * rig.block());
    let (sequence, _) = rig.shared(&text).await;
    let plain = rig.filled(2 * rig.block()).await.0;
    rig.sealed(&sequence).await;
    rig.sealed(&plain).await;
    let mut events = rig.cache.events();
    for (moves, to) in [(true, Tier::Host), (false, Tier::Device)] {
        for sequence in [&plain, &sequence] {
            if moves {
                sequence.offload().await.unwrap()
            } else {
                sequence.prefetch().await.unwrap()
            };
        }
        rig.poke().await;
        let told = drain(&mut events);
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told.iter().all(|event| matches!(event, BlockEvent::Moved { tier, .. } if *tier == to)));
    }
    drop((sequence, plain));
    rig.finish().await;
}

/// The parent of each block that can be found, by shard and key.
type Known = HashMap<(u16, BlockKey), Option<BlockKey>>;

fn count(known: &mut Known, event: BlockEvent) {
    match event {
        BlockEvent::Stored { shard, key, parent, .. } => {
            assert!(parent.is_none_or(|parent| known.contains_key(&(shard, parent))));
            assert_eq!(known.insert((shard, key), parent), None, "stored twice");
        }
        BlockEvent::Removed { shard, key } => {
            assert!(known.remove(&(shard, key)).is_some(), "removed, and never stored");
            let mut others = known.iter();
            assert!(!others.any(|(of, parent)| of.0 == shard && *parent == Some(key)), "a child outlives it");
        }
        other => panic!("{other:?}"),
    }
}

async fn a_listener_who_counts_along_knows_what_is_cached<E: Number>(rig: Rig<E>) {
    let mut events = rig.cache.events();
    let mut known = Known::new();
    let blocks = rig.cache.stats().shards[0].counters.blocks_total as u32;
    let mut rounds = 0;
    while rig.stats().await.total.evictions < u64::from(blocks) {
        rounds += 1;
        assert!(rounds < 1000, "nothing is evicted");
        let text = rig.text(blocks.div_ceil(8) * rig.block());
        rig.shared(&text).await.0.close().await.unwrap();
        // Sealing goes on after the last answer, and may evict.
        eventually("knowing what is cached", || {
            for event in drain(&mut events) {
                count(&mut known, event);
            }
            known.len() as u64 == rig.cache.stats().total.blocks_cached
        })
        .await;
    }
    assert!(!known.is_empty());
    rig.finish().await;
}

/// Each listener by itself, and only those who fall behind.
#[tokio::test]
async fn a_slow_listener_is_told_how_many_it_missed() {
    let geometry = geometry((4, 1, 1, 8, 8), ElementType::F32);
    let combo = crate::common::Combo { setup: &SETUPS[0], format: Format::Int8.into(), geometry };
    let Some(builder) = combo.builder() else { return };
    let rig = Rig::<f32>::new(&combo, builder.configure(|c| c.event_capacity = 8)).await;
    let (mut slow, mut quick) = (rig.cache.events(), rig.cache.events());
    let text = rig.text(20 * 4);
    let (sequence, mut model) = rig.prompted(&text).await;
    let mut told = Vec::new();
    for block in 1..=20 {
        rig.go_on(&sequence, &mut model, &text, 4 * block).await;
        told.push(within("an event", quick.next()).await.unwrap().unwrap());
    }
    let missed = within("an event", slow.next()).await.unwrap().unwrap_err();
    assert!(missed.0 > 0 && missed.0 <= 12, "{missed}");
    assert_eq!(drain(&mut slow), told[missed.0 as usize..], "it goes on behind the gap");
    assert!(slow.try_next().is_none() && quick.try_next().is_none());
    // Whoever begins to listen now hears nothing of it.
    assert!(rig.cache.events().try_next().is_none());
    drop(sequence);
    within("finishing", rig.finish()).await;
}
