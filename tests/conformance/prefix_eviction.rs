//! Cached blocks that make way for others, that are given up by name, and that many tasks want at once.

use std::sync::Arc;

use kv_cache::*;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng};

use crate::common::{Combo, Model, Number, Rig, SETUPS, Tokens, combos, geometry, whole_case, within};

crate::conformance!(combos:
    cached_blocks_make_way_and_held_ones_never,
    everything_that_is_cached_makes_way_for_a_reservation,
    an_append_fails_only_when_nothing_cached_could_go,
    a_reservation_counts_what_is_found_and_is_kept,
    a_view_holds_still_while_its_block_is_evicted,
    an_offloaded_block_is_evicted_like_others,
    what_is_invalidated_is_not_found,
    whoever_holds_what_is_invalidated_keeps_it,
);

fn options() -> OpenOptions {
    OpenOptions::default()
}

/// Raw blocks of one shard.
fn shard_blocks<E: Number>(rig: &Rig<E>) -> u32 {
    rig.cache.stats().shards[0].counters.blocks_total as u32
}

/// Texts come and go until each shard has evicted as many blocks as it has raw ones. Returns the texts.
async fn press<E: Number>(rig: &Rig<E>) -> Vec<Tokens<E>> {
    let mut texts = Vec::new();
    for shard in 0..rig.cache.stats().shards.len() {
        press_shard(rig, shard, &mut texts).await;
    }
    texts
}

/// Where a prompt is found its sequence goes: all of these begin with the same block, which is held on the shard.
async fn press_shard<E: Number>(rig: &Rig<E>, shard: usize, texts: &mut Vec<Tokens<E>>) {
    let mut elsewhere = Vec::new();
    let (first, base) = loop {
        let text = rig.text(rig.block());
        let (sequence, _) = rig.shared(&text).await;
        if usize::from(sequence.id().shard()) == shard {
            break (text, sequence);
        }
        elsewhere.push(sequence);
    };
    let blocks = shard_blocks(rig);
    let evictions = async || rig.stats().await.shards[shard].counters.evictions;
    let goal = evictions().await + u64::from(blocks);
    for round in 0.. {
        assert!(round < 1000, "so much is not cached: {:?}", rig.cache.stats().total);
        let text = rig.computed(&[&first.ids[..], &rig.ids(blocks.div_ceil(8) * rig.block())].concat());
        // That this does not fail is half of the test.
        let (sequence, _) = rig.shared(&text).await;
        assert_eq!(usize::from(sequence.id().shard()), shard);
        sequence.close().await.unwrap();
        texts.push(text);
        if evictions().await >= goal {
            break;
        }
    }
    drop(elsewhere);
    base.close().await.unwrap();
}

/// Opens a sequence with each text and one more token, and compares what is found. Returns how many blocks that were.
async fn check_found<E: Number>(rig: &Rig<E>, texts: &[Tokens<E>]) -> u32 {
    let mut found = 0;
    for text in texts {
        let sequence =
            rig.cache.open("tenant", options().prompt(&[&text.ids[..], &[7]].concat())).await.unwrap();
        let mut model = rig.model();
        model.push_some(text, sequence.len());
        rig.check(&sequence, &model).await;
        assert_eq!(sequence.len() % rig.block(), 0);
        found += sequence.len() / rig.block();
    }
    found
}

async fn cached_blocks_make_way_and_held_ones_never<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(4 * block + 1);
    let (held, model) = rig.shared(&text).await;
    // One that computes nothing and holds what it has found.
    let (finder, found) = rig.prompted(&text).await;
    let texts = press(&rig).await;
    let all: usize = texts.iter().map(|text| text.len() / block as usize).sum();
    let cached = check_found(&rig, &texts).await;
    let total = rig.stats().await.total;
    assert!(cached > 0 && (cached as usize) < all, "{cached} of {all} blocks, {total:?}");
    assert!(total.evictions > 0 && total.blocks_cached > 0, "{total:?}");
    assert_eq!(total.seal_failures, 0);
    rig.check(&held, &model).await;
    rig.check(&finder, &found).await;
    assert_eq!(rig.found(options(), &text.ids).await, 4 * block);
    // Once one has gone the other holds them still.
    held.close().await.unwrap();
    press(&rig).await;
    rig.check(&finder, &found).await;
    assert_eq!(rig.found(options(), &text.ids).await, 4 * block);
    finder.close().await.unwrap();
    press(&rig).await;
    // Nobody holds them: found or not, what is found is right.
    check_found(&rig, &[text.slice(0..4 * block as usize)]).await;
    rig.finish().await;
}

async fn everything_that_is_cached_makes_way_for_a_reservation<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let free = rig.cache.stats().shards[0].counters.blocks_free as u32;
    press(&rig).await;
    rig.all_sealed().await;
    let stats = rig.stats().await;
    let is_full = |of: &CoreCounters| of.blocks_cached > 0 && of.blocks_free < u64::from(free) / 2;
    assert!(stats.shards.iter().all(|shard| is_full(&shard.counters)), "{:?}", stats.total);
    assert!(rig.cache.can_admit(free / 2 * block), "what is cached makes way: {:?}", stats.total);
    let (sequence, mut model) = rig.prompted_with(options().reserve_tokens(free * block), &rig.text(1)).await;
    let shard = sequence.id().shard() as usize;
    // What is left of it lies where no raw block fits.
    assert_eq!(rig.stats().await.shards[shard].counters.blocks_free, 0);
    rig.append(&sequence, &mut model, free * block).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

/// Appends to a sequence that shares nothing until that fails, and returns what it holds.
async fn fill<E: Number>(rig: &Rig<E>) -> (Sequence, Model<E>) {
    let (sequence, mut model) = (rig.open().await, rig.model());
    loop {
        let more = rig.tokens(2 * rig.block());
        match sequence.append(&more.ids, &more.keys, &more.values).await {
            Ok(_) => model.push(&more),
            Err(Error::Capacity { needed, free, evictable }) => {
                assert!(
                    free < needed && evictable == 0,
                    "{needed} needed, {free} free, {evictable} evictable"
                );
                return (sequence, model);
            }
            Err(other) => panic!("{other}"),
        }
    }
}

async fn an_append_fails_only_when_nothing_cached_could_go<E: Number>(rig: Rig<E>) {
    press(&rig).await;
    let shards = rig.cache.stats().shards.len();
    let mut fillers = Vec::new();
    while fillers.len() < shards {
        let (sequence, model) = fill(&rig).await;
        let counters = rig.stats().await.shards[sequence.id().shard() as usize].counters;
        assert_eq!(counters.blocks_cached, 0, "{counters:?}");
        assert!(
            model.len() / rig.block() >= shard_blocks(&rig) * 3 / 4,
            "{} tokens, {counters:?}",
            model.len()
        );
        fillers.push((sequence, model));
    }
    for (sequence, model) in &fillers {
        rig.check(sequence, model).await;
    }
    drop(fillers);
    rig.finish().await;
}

async fn a_reservation_counts_what_is_found_and_is_kept<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(8 * block);
    let (first, mut model) = rig.prompted(&text).await;
    rig.go_on(&first, &mut model, &text, 4 * block).await;
    rig.sealed(&first).await;
    first.close().await.unwrap();
    let free = |stats: Stats| stats.total.blocks_free;
    let before = free(rig.stats().await);
    let (sequence, mut model) = rig.prompted_with(options().reserve_tokens(7 * block), &text).await;
    assert_eq!(sequence.len(), 4 * block);
    assert_eq!(before - free(rig.stats().await), 3, "of the seven blocks four are there");
    let mut fillers = Vec::new();
    for _ in 0..rig.cache.stats().shards.len() {
        fillers.push(fill(&rig).await);
    }
    rig.go_on(&sequence, &mut model, &text, 7 * block).await;
    rig.check(&sequence, &model).await;
    for (filler, model) in &fillers {
        rig.check(filler, model).await;
    }
    drop(fillers);
    // Less than what is found is nothing to set aside.
    let before = free(rig.stats().await);
    let (other, _) = rig.prompted_with(options().reserve_tokens(3 * block), &text).await;
    assert_eq!((other.len(), free(rig.stats().await)), (7 * block, before));
    drop((sequence, other));
    rig.finish().await;
}

async fn a_view_holds_still_while_its_block_is_evicted<E: Number>(rig: Rig<E>) {
    let text = rig.text(3 * rig.block() + 1);
    let (sequence, model) = rig.shared(&text).await;
    rig.sealed(&sequence).await;
    let (view, table) = (sequence.view(0).unwrap(), rig.cache.block_table(&[&sequence], 0).unwrap());
    sequence.close().await.unwrap();
    press(&rig).await;
    // The room of whoever lets go of everything goes to others.
    let filler = fill(&rig).await;
    let seen = super::views::look::<E>(&rig.layout, &view);
    model.compare(0, 0..model.len(), &seen.keys, &seen.values, rig.format);
    assert_eq!(table.sequences[0].tokens, model.len());
    rig.check(&filler.0, &filler.1).await;
    drop((view, table, filler));
    rig.finish().await;
}

async fn an_offloaded_block_is_evicted_like_others<E: Number>(rig: Rig<E>) {
    let text = rig.text(4 * rig.block());
    let (sequence, _) = rig.shared(&text).await;
    rig.sealed(&sequence).await;
    sequence.offload().await.unwrap();
    sequence.close().await.unwrap();
    let mut texts = press(&rig).await;
    texts.push(text);
    check_found(&rig, &texts).await;
    rig.finish().await;
}

// ---- giving up by name ----

async fn what_is_invalidated_is_not_found<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block);
    // Who, with which options.
    let kinds = [
        ("a", options()),
        ("b", options()),
        ("a", options().adapter("lora")),
        ("b", options().shared_domain("public")),
    ];
    let fill = async || {
        for (tenant, with) in &kinds {
            let sequence = rig.cache.open(*tenant, with.clone().prompt(&text.ids)).await.unwrap();
            let rest = text.slice(sequence.len() as usize..text.len());
            sequence.append(&rest.ids, &rest.keys, &rest.values).await.unwrap();
            sequence.close().await.unwrap();
        }
    };
    let found = async || {
        let mut found = Vec::new();
        for (tenant, with) in &kinds {
            let sequence = rig.cache.open(*tenant, with.clone().prompt(&text.ids)).await.unwrap();
            found.push(sequence.len() / block);
            sequence.close().await.unwrap();
        }
        found
    };
    let cases = [
        (Invalidate::Adapter("lora".into()), 3, [2, 2, 0, 2]),
        (Invalidate::Adapter("other".into()), 0, [2, 2, 2, 2]),
        (Invalidate::Tenant(Tenant::new("a")), 6, [0, 2, 0, 2]),
        // In the domain too, since his sequence computed it.
        (Invalidate::Tenant(Tenant::new("b")), 6, [2, 0, 2, 0]),
        (Invalidate::Domain("public".into()), 3, [2, 2, 2, 0]),
        (Invalidate::Domain("a".into()), 0, [2, 2, 2, 2]),
        (Invalidate::All, 12, [0, 0, 0, 0]),
    ];
    for (what, blocks, left) in cases {
        fill().await;
        rig.all_sealed().await;
        assert_eq!(found().await, [2; 4]);
        let before = rig.stats().await.total.blocks_cached;
        assert_eq!(rig.cache.invalidate(what.clone()).await.unwrap(), blocks, "{what:?}");
        assert_eq!(found().await, left, "{what:?}");
        assert_eq!(rig.stats().await.total.blocks_cached, before - blocks);
        assert_eq!(rig.cache.invalidate(what).await.unwrap(), 0);
    }
    assert_eq!(rig.stats().await.total.blocks_used, 0);
    rig.finish().await;
}

async fn whoever_holds_what_is_invalidated_keeps_it<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block + 1);
    let full = text.len() as u32 / block;
    let (holder, mut model) = rig.shared(&text).await;
    let (finder, mut found) = rig.prompted(&text).await;
    assert_eq!(rig.cache.invalidate(Invalidate::All).await.unwrap(), u64::from(full));
    assert_eq!(rig.found(options(), &text.ids).await, 0);
    rig.check(&holder, &model).await;
    rig.check(&finder, &found).await;
    rig.append(&holder, &mut model, block).await;
    rig.append(&finder, &mut found, 2 * block).await;
    // Somebody else computes it anew: a copy of its own.
    let (again, anew) = rig.shared(&text).await;
    assert_eq!(rig.found(options(), &text.ids).await, 3 * block);
    holder.close().await.unwrap();
    rig.check(&finder, &found).await;
    finder.close().await.unwrap();
    rig.check(&again, &anew).await;
    assert_eq!(rig.found(options(), &text.ids).await, 3 * block);
    drop(again);
    rig.finish().await;
}

// ---- once, not on every setup ----

fn small(setup: usize) -> Combo {
    Combo {
        setup: &SETUPS[setup],
        format: Format::Int8.into(),
        geometry: geometry((4, 2, 1, 16, 8), ElementType::F32),
    }
}

/// Bytes of so many raw blocks.
fn memory(combo: &Combo, blocks: u64) -> u64 {
    blocks * (combo.geometry.layout().unwrap().raw_bytes() as u64).next_multiple_of(128)
}

/// Texts that share beginnings: each is a way through a tree with two branches a level of `step` tokens.
fn forest(rig: &Rig<f32>, depth: u32, step: u32) -> Vec<Tokens<f32>> {
    let mut ways: Vec<Vec<u32>> = vec![Vec::new()];
    for level in 0..depth {
        let branch = |way: Vec<u32>| {
            (0..2).map(move |side| {
                let next = (0..step).map(|at| 1000 * level + 100 * side + at);
                way.iter().copied().chain(next).collect::<Vec<u32>>()
            })
        };
        ways = ways.into_iter().flat_map(branch).collect();
    }
    ways.iter().map(|ids| rig.computed(ids)).collect()
}

/// What a script of opens, appends and closes finds, and what becomes of the blocks.
async fn script(rig: &Rig<f32>) -> (Vec<u32>, Vec<BlockEvent>) {
    let (texts, mut rng) = (forest(rig, 7, 9), SmallRng::seed_from_u64(5));
    let mut events = rig.cache.events();
    let (mut found, mut open) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        let text = &texts[rng.random_range(0..texts.len())];
        let (sequence, mut model) = rig.prompted(text).await;
        found.push(sequence.len());
        rig.go_on(&sequence, &mut model, text, text.len() as u32).await;
        open.push(sequence);
        if open.len() > 2 {
            open.swap_remove(rng.random_range(0..open.len())).close().await.unwrap();
        }
    }
    drop(open);
    rig.poke().await;
    let mut events: Vec<BlockEvent> = std::iter::from_fn(|| events.try_next()).map(Result::unwrap).collect();
    // Each shard has an order; which of two shards comes first is theirs to race for.
    events.sort_by_key(|event| match event {
        BlockEvent::Stored { shard, .. }
        | BlockEvent::Removed { shard, .. }
        | BlockEvent::Moved { shard, .. } => *shard,
        other => panic!("{other:?}"),
    });
    (found, events)
}

#[tokio::test]
async fn deterministic_mode_finds_and_evicts_the_same() {
    for shards in [1, 3] {
        let mut runs = Vec::new();
        for _ in 0..2 {
            let combo = small(2);
            let Some(builder) = combo.builder() else { return };
            let builder = builder.devices(Devices::cpu(shards)).memory_bytes_per_device(memory(&combo, 72));
            let rig = Rig::<f32>::new(&combo, builder).await;
            runs.push(within("the script", script(&rig)).await);
            assert!(shards > 1 || rig.stats().await.total.evictions > 0);
            within("finishing", rig.finish()).await;
        }
        assert!(runs[0].0.iter().any(|found| *found > 0));
        assert_eq!(runs[0].0, runs[1].0);
        let events = runs[0].1.iter().zip(&runs[1].1).enumerate();
        let differing = events.filter(|(_, (a, b))| a != b).take(3).collect::<Vec<_>>();
        let lengths = [runs[0].1.len(), runs[1].1.len()];
        assert!(differing.is_empty() && lengths[0] == lengths[1], "{shards}, {lengths:?}: {differing:?}");
    }
}

/// No sequence is open when the next one comes: what the others have left behind tells the shards apart.
#[tokio::test]
async fn sequences_that_come_one_by_one_fill_all_shards() {
    let combo = small(1);
    let Some(builder) = combo.builder() else { return };
    let rig = Rig::<f32>::new(&combo, builder.memory_bytes_per_device(memory(&combo, 96))).await;
    let text_blocks = 16;
    let shares = |stats: Stats| {
        let came = stats.shards.iter().map(|shard| shard.counters.blocks_cached + shard.counters.evictions);
        let came: Vec<u64> = came.collect();
        let apart = came.iter().max().unwrap() - came.iter().min().unwrap();
        assert!(apart <= text_blocks, "{came:?}");
        stats.shards.iter().all(|shard| shard.counters.evictions > 0)
    };
    // Also when all of them are full: what is cached is replaced everywhere.
    for round in 0.. {
        rig.shared(&rig.text(text_blocks as u32 * 4)).await.0.close().await.unwrap();
        if shares(rig.stats().await) {
            break;
        }
        assert!(round < 1000, "nothing is evicted: {:?}", rig.cache.stats().total);
    }
    within("finishing", rig.finish()).await;
}

/// The prompts of a batch are looked for before any of its operations is carried out, and what they have found stays: others make way.
#[tokio::test]
async fn a_write_looks_behind_all_blocks_that_prompts_have_just_found() {
    let combo = Combo { format: BlockFormat::RAW, ..small(0) };
    let Some(builder) = combo.builder() else { return };
    let rig = Rig::<f32>::new(&combo, builder.memory_bytes_per_device(memory(&combo, 160))).await;
    let old: Vec<_> = (0..60).map(|_| rig.text(5)).collect();
    for text in &old {
        rig.shared(text).await.0.close().await.unwrap();
    }
    while rig.stats().await.total.blocks_free >= 8 {
        rig.shared(&rig.text(8 * 4)).await.0.close().await.unwrap();
    }
    let (plain, mut model) = (rig.open().await, rig.model());
    let more = rig.tokens(16 * 4);
    let mut batch = BatchCacheOperations::new().append(&plain, &more.ids, &more.keys, &more.values);
    for text in &old {
        batch = batch.open("tenant", options().prompt(&text.ids));
    }
    let mut results = rig.cache.submit(batch).await.unwrap();
    let found = results.split_off(1);
    results.remove(0).unwrap();
    model.push(&more);
    rig.check(&plain, &model).await;
    for (result, text) in found.into_iter().zip(&old) {
        let Ok(Outcome::Opened(sequence)) = result else { panic!("{result:?}") };
        let mut model = rig.model();
        model.push_some(text, 4);
        rig.check(&sequence, &model).await;
    }
    drop(plain);
    within("finishing", rig.finish()).await;
}

/// Tokens computed after dropping depend on more than their ids.
#[tokio::test]
async fn token_dropping_switches_sharing_off() {
    let combo = small(0);
    let Some(builder) = combo.builder() else { return };
    let compression = Compression { enabled: true, ratio: 0.5, method: CompressionMethod::Truncation };
    let rig = Rig::<f32>::new(&combo, builder.compression(compression)).await;
    let text = rig.text(64);
    // Also for the part of a prompt that nothing is dropped of.
    for len in [8, 64] {
        let text = text.slice(0..len);
        let (sequence, _) = rig.shared(&text).await;
        assert_eq!(rig.found(options(), &text.ids).await, 0);
        let (other, _) = rig.shared(&text).await;
        drop((sequence, other));
    }
    let total = rig.stats().await.total;
    assert_eq!((total.blocks_used, total.blocks_cached), (0, 0));
    assert_eq!((total.prefix_blocks_hit, total.blocks_deduplicated), (0, 0));
    assert_eq!(rig.cache.invalidate(Invalidate::All).await.unwrap(), 0);
    within("finishing", rig.finish()).await;
}

/// Many tasks open the same prompts while others close, cut, fork and invalidate, and room for a few of the texts is all there is.
async fn race(setup: usize, seed: u64) {
    let combo = small(setup);
    let Some(builder) = combo.builder() else { return };
    let rig = Arc::new(Rig::<f32>::new(&combo, builder.memory_bytes_per_device(memory(&combo, 96))).await);
    let texts = Arc::new(forest(&rig, 7, 9));
    let tasks: Vec<_> = (0..16)
        .map(|task| {
            tokio::spawn(racer(rig.clone(), texts.clone(), SmallRng::seed_from_u64(seed << 8 | task)))
        })
        .collect();
    for task in tasks {
        within("a task", task).await.unwrap();
    }
    let total = rig.stats().await.total;
    assert!(total.prefix_blocks_hit > 0 && total.evictions > 0, "{total:?}");
    assert_eq!(total.seal_failures, 0);
    within("finishing", Arc::into_inner(rig).unwrap().finish()).await;
}

async fn racer(rig: Arc<Rig<f32>>, texts: Arc<Vec<Tokens<f32>>>, mut rng: SmallRng) {
    for _ in 0..40 {
        let text = &texts[rng.random_range(0..texts.len())];
        let (sequence, mut model) = rig.prompted(text).await;
        rig.check(&sequence, &model).await;
        let end = text.len() as u32;
        while model.len() < end {
            let to = end.min(model.len() + rng.random_range(1..=12));
            let rest = text.slice(model.len() as usize..to as usize);
            match sequence.append(&rest.ids, &rest.keys, &rest.values).await {
                Ok(_) => model.push(&rest),
                // Others hold it all: this one makes room.
                Err(Error::Capacity { .. }) => break,
                Err(other) => panic!("{other}"),
            }
        }
        match rng.random_range(0..8) {
            0 => {
                let keep = rng.random_range(0..=model.len());
                sequence.truncate(keep).await.unwrap();
                model.truncate(keep);
            }
            1 => {
                let fork = sequence.fork().await.unwrap();
                drop(sequence);
                rig.check(&fork, &model).await;
                continue;
            }
            2 if rng.random_range(0..8) == 0 => drop(rig.cache.invalidate(Invalidate::All).await.unwrap()),
            3 => {
                let view = sequence.view(1).unwrap();
                drop(sequence);
                tokio::task::yield_now().await;
                let seen = super::views::look::<f32>(&rig.layout, &view);
                model.compare(1, 0..model.len(), &seen.keys, &seen.values, rig.format);
                continue;
            }
            _ => {}
        }
        rig.check(&sequence, &model).await;
        if rng.random() {
            sequence.close().await.unwrap();
        }
    }
}

/// What others leave to a tenant is his from the beginning, and his own writes may have it.
#[tokio::test]
async fn what_is_cached_within_a_reserve_goes_for_its_owner_alone() {
    for setup in 0..SETUPS.len() {
        whole_case(format!("setup {setup}"), reserved(setup)).await;
    }
}

async fn reserved(setup: usize) {
    let combo = small(setup);
    let Some(builder) = combo.builder() else { return };
    // All of them have room for the reserve, also those with several shards.
    let bytes = memory(&combo, 96);
    let limits = TenantLimits { quota_bytes: None, reserve_bytes: bytes / 4 };
    let builder = builder.memory_bytes_per_device(bytes).configure(|c| {
        c.tenants.insert("reserved".into(), limits);
    });
    let rig = Rig::<f32>::new(&combo, builder).await;
    let open =
        async |text: &Tokens<f32>| rig.cache.open("reserved", options().prompt(&text.ids)).await.unwrap();
    let writes = async |text: &Tokens<f32>| {
        let sequence = open(text).await;
        let rest = text.slice(sequence.len() as usize..text.len());
        sequence.append(&rest.ids, &rest.keys, &rest.values).await.unwrap();
        sequence.close().await.unwrap();
    };
    let text = rig.text(4 * rig.block() + 1);
    writes(&text).await;
    press(&rig).await;
    assert_eq!(open(&text).await.len(), 4 * rig.block(), "{combo}");
    // As much as there is room for in all.
    let room = rig.cache.stats().shards.len() as u32 * shard_blocks(&rig);
    for _ in 0..room.div_ceil(8) + 8 {
        writes(&rig.text(8 * rig.block())).await;
    }
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_tasks_want_the_same_prompts() {
    for (setup, seed) in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)] {
        whole_case(format!("setup {setup}"), race(setup, seed)).await;
    }
}
