//! Sealed blocks that are re-encoded to smaller formats while memory is short, before any of them has to make way.

use kv_cache::half::{bf16, f16};
use kv_cache::*;

use crate::common::{Combo, ELEMENTS, Model, Number, Rig, SETUPS, Tokens, eventually, geometry, whole_case};

/// What blocks are sealed in, and then re-encoded to.
const LADDER: [Format; 3] = [Format::Int8, Format::R4, Format::R2];

/// Tokens of a text.
const TEXT: u32 = 8 * 32 + 1;

/// Every setup, in one element type each.
fn combos() -> impl Iterator<Item = (Combo, ElementType)> {
    let setups = SETUPS.iter().filter(|setup| crate::common::is_wanted(setup)).enumerate();
    setups.map(|(number, setup)| {
        let element = ELEMENTS[number % ELEMENTS.len()];
        (Combo { setup, format: LADDER[0].into(), geometry: geometry((32, 2, 1, 64, 48), element) }, element)
    })
}

macro_rules! on_every_setup {
    ($($name:ident),* $(,)?) => {
        mod on_every_setup {
            use super::{ElementType, bf16, f16, whole_case};
            $(
                #[tokio::test]
                async fn $name() {
                    for (combo, element) in super::combos() {
                        let case = format!("{} on {combo}", stringify!($name));
                        match element {
                            ElementType::F16 => whole_case(case, super::$name::<f16>(combo)).await,
                            ElementType::Bf16 => whole_case(case, super::$name::<bf16>(combo)).await,
                            ElementType::F32 => whole_case(case, super::$name::<f32>(combo)).await,
                        }
                    }
                }
            )*
        }
    };
}

on_every_setup!(
    cached_blocks_are_re_encoded_before_any_makes_way,
    blocks_that_are_held_follow_when_memory_is_shorter,
    recent_blocks_follow_when_there_is_no_other_room,
    what_was_re_encoded_moves_and_is_written_to_like_any_other,
    a_view_holds_still_while_its_block_is_re_encoded,
    whoever_writes_waits_for_others_to_shrink,
    a_tenants_own_blocks_are_re_encoded_before_they_make_way_for_its_quota,
);

async fn rig<E: Number>(combo: &Combo, rungs: usize) -> Option<Rig<E>> {
    // Room enough for a text to be no burst.
    let builder = combo.builder()?.colder_formats(&LADDER[1..rungs]);
    Some(Rig::new(combo, builder.configure(|c| c.memory_bytes_per_device *= 2)).await)
}

/// Bytes of the slot of a block as it is sealed.
fn sealed_slot_bytes<E: Number>(rig: &Rig<E>) -> u64 {
    (rig.format.block_bytes(&rig.layout) as u64).next_multiple_of(128)
}

/// Rows of a sequence by what they have been through: nothing, the first format, ….
async fn stages<E: Number>(rig: &Rig<E>, sequence: &Sequence, model: &Model<E>) -> Vec<usize> {
    let mut all = vec![0; LADDER.len() + 1];
    for layer in 0..rig.layers() {
        let (keys, values) = sequence.read::<E>(layer, 0..model.len()).await.unwrap();
        let counts = model.compare_down(layer, 0..model.len(), &keys, &values, &LADDER);
        all.iter_mut().zip(counts).for_each(|(all, count)| *all += count);
        let seen = super::views::look::<E>(&rig.layout, &sequence.view(layer).unwrap());
        model.compare_down(layer, 0..model.len(), &seen.keys, &seen.values, &LADDER);
    }
    all
}

/// Texts come and go until `enough`.
async fn press<E: Number>(rig: &Rig<E>, mut enough: impl FnMut(&CoreCounters) -> bool) -> Vec<Tokens<E>> {
    let mut texts = Vec::new();
    while !enough(&rig.stats().await.total) {
        assert!(texts.len() < 4000, "{:?}", rig.cache.stats().total);
        let text = rig.text(TEXT);
        let (sequence, _) = rig.shared(&text).await;
        sequence.close().await.unwrap();
        texts.push(text);
        rig.all_sealed().await;
    }
    texts
}

async fn cached_blocks_are_re_encoded_before_any_makes_way<E: Number>(combo: Combo) {
    let Some(rig) = rig::<E>(&combo, 3).await else { return };
    let texts = press(&rig, |total| total.evictions > 0).await;
    let stats = rig.stats().await;
    assert_eq!((stats.total.seal_failures, stats.total.failed_launches), (0, 0));
    // What makes way does so for want of room in a chunk of the right kind: most has been re-encoded twice by then.
    let full = stats.shards.iter().map(|shard| shard.counters).find(|of| of.evictions > 0).unwrap();
    let (cached, colder) = (full.blocks_cached, full.blocks_colder);
    assert!(colder * 10 > cached * 8, "{colder} of {cached}: {combo}");
    assert!(full.recodes * 10 > cached * 13, "{} for {cached}: {combo}", full.recodes);
    let as_sealed = full.bytes_used / sealed_slot_bytes(&rig);
    assert!(cached > 2 * as_sealed, "{cached} blocks, {as_sealed} as they were sealed: {combo}");
    let (mut found, mut stages_all) = (0, vec![0; 4]);
    for text in &texts {
        let sequence = rig.cache.open("tenant", OpenOptions::default().prompt(&text.ids)).await.unwrap();
        let mut model = rig.model();
        model.push_some(text, sequence.len());
        found += sequence.len() / 32;
        let stages = stages(&rig, &sequence, &model).await;
        stages_all.iter_mut().zip(stages).for_each(|(all, more)| *all += more);
    }
    assert!(found > 0 && stages_all[3] > stages_all[1], "{found} found, {stages_all:?}: {combo}");
    rig.finish().await;
}

async fn blocks_that_are_held_follow_when_memory_is_shorter<E: Number>(combo: Combo) {
    let Some(rig) = rig::<E>(&combo, 2).await else { return };
    // More than the memory of a shard holds as it is sealed, less than it holds re-encoded.
    let as_sealed = rig.cache.config().memory_bytes_per_device / sealed_slot_bytes(&rig);
    let (sequence, mut model) = (rig.open().await, rig.model());
    while u64::from(model.len()) / 32 < as_sealed * 5 / 4 {
        rig.append(&sequence, &mut model, 64).await;
        rig.sealed(&sequence).await;
        let recoding = || rig.cache.stats().total.blocks_waiting_to_seal == 0;
        eventually("recoding", recoding).await;
    }
    let total = rig.stats().await.total;
    assert!(total.blocks_colder > 0 && total.evictions == 0, "{total:?}");
    let stages = stages(&rig, &sequence, &model).await;
    assert!(stages[1] > 0 && stages[2] > 0 && stages[3] == 0, "{stages:?}: {combo}");
    // The first is the one that was sealed longest ago.
    let view = sequence.view(0).unwrap();
    let formats: Vec<_> = view.blocks().map(|block| block.format()).collect();
    assert_eq!(formats[0], LADDER[1], "{combo}");
    assert_eq!(formats[formats.len() - 4], LADDER[0], "{combo}");
    let entries = rig.cache.block_table(&[&sequence], 1).unwrap();
    let in_table: Vec<_> = entries.sequences[0].blocks.iter().map(|entry| entry.format).collect();
    assert_eq!(in_table, formats);
    drop((view, entries, sequence));
    rig.finish().await;
}

async fn recent_blocks_follow_when_there_is_no_other_room<E: Number>(combo: Combo) {
    let Some(builder) = combo.builder() else { return };
    // One block of 32 tokens is recent for `r4`, four are for `r2`.
    let builder = builder.colder_formats(&LADDER[1..]).configure(|c| c.quantisation.raw_window_blocks = None);
    let rig = Rig::<E>::new(&combo, builder).await;
    // More than the memory of a shard holds re-encoded once.
    let as_sealed = rig.cache.config().memory_bytes_per_device / sealed_slot_bytes(&rig);
    let (sequence, mut model) = (rig.open().await, rig.model());
    while u64::from(model.len()) / 32 < as_sealed * 2 {
        rig.append(&sequence, &mut model, 32).await;
        rig.sealed(&sequence).await;
    }
    let formats = |sequence: &Sequence| -> Vec<BlockFormat> {
        sequence.view(0).unwrap().blocks().map(|block| block.format()).collect()
    };
    let told = formats(&sequence);
    let (old, recent) = told.split_at(told.len() - 4);
    assert!(
        old[0] == LADDER[2] && recent[..3].iter().all(|format| *format != LADDER[2]),
        "{told:?}: {combo}"
    );
    assert_eq!(recent[3], LADDER[0], "{combo}");
    // Nothing is spared to the last.
    let error = loop {
        let new = rig.tokens(32);
        match sequence.append(&new.ids, &new.keys, &new.values).await {
            Ok(_) => model.push(&new),
            Err(error) => break error,
        }
        rig.sealed(&sequence).await;
    };
    assert!(matches!(error, Error::Capacity { .. }), "{error:?}");
    let told = formats(&sequence);
    assert!(told.iter().all(|format| *format == LADDER[2]), "{told:?}: {combo}");
    stages(&rig, &sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

/// A cache with a text of which all full blocks have been re-encoded twice.
async fn cold_text<E: Number>(rig: &Rig<E>) -> (Tokens<E>, Sequence, Model<E>) {
    let text = rig.text(TEXT);
    rig.shared(&text).await.0.close().await.unwrap();
    rig.all_sealed().await;
    let shards = rig.cache.stats().shards.len() as u64;
    // On each shard.
    let more = press(rig, |total| total.blocks_colder >= shards * 30).await;
    for text in std::iter::once(text).chain(more) {
        let (sequence, model) = rig.prompted(&text).await;
        if sequence.len() + 1 == TEXT {
            let view = sequence.view(0).unwrap();
            let is_cold =
                view.blocks().all(|block| block.format() == LADDER[1] || block.format() == LADDER[2]);
            drop(view);
            if is_cold {
                return (text, sequence, model);
            }
        }
        sequence.close().await.unwrap();
    }
    panic!("none is cold: {:?}", rig.cache.stats().total);
}

async fn what_was_re_encoded_moves_and_is_written_to_like_any_other<E: Number>(combo: Combo) {
    let Some(rig) = rig::<E>(&combo, 3).await else { return };
    let (text, sequence, mut model) = cold_text(&rig).await;
    let before = stages(&rig, &sequence, &model).await;
    assert_eq!(before[0] + before[1], 0, "{before:?}: {combo}");
    // To the host and back, byte by byte.
    let read = async |sequence: &Sequence| sequence.read::<E>(1, 0..TEXT - 1).await.unwrap();
    let expected = read(&sequence).await;
    let histories = |sequence: &Sequence| {
        let view = sequence.view(0).unwrap();
        view.blocks().map(|block| block.history().formats().to_vec()).collect::<Vec<_>>()
    };
    let told = histories(&sequence);
    let down_to = |format| {
        let until = LADDER.iter().position(|rung| format == *rung).unwrap();
        LADDER[..=until].iter().map(|format| BlockFormat::from(*format)).collect::<Vec<_>>()
    };
    let view = sequence.view(0).unwrap();
    assert!(view.blocks().map(|block| down_to(block.format())).eq(told.iter().cloned()), "{told:?}: {combo}");
    drop(view);
    assert_eq!(sequence.offload().await.unwrap(), 8);
    assert!(read(&sequence).await == expected, "{combo}: in host memory");
    assert_eq!(histories(&sequence), told, "{combo}: in host memory");
    assert_eq!(sequence.prefetch().await.unwrap(), 8);
    assert!(read(&sequence).await == expected, "{combo}: back again");
    assert_eq!(histories(&sequence), told, "{combo}: back again");
    // A fork writes into the middle of one: what is behind is decoded, and sealed as any new block is.
    let fork = sequence.fork().await.unwrap();
    fork.truncate(2 * 32 + 7).await.unwrap();
    let rest = text.slice(2 * 32 + 7..TEXT as usize);
    fork.append(&rest.ids, &rest.keys, &rest.values).await.unwrap();
    rig.sealed(&fork).await;
    assert!(read(&sequence).await == expected, "{combo}: a fork changes nothing");
    // What was decoded for it, and sealed again as any new block is, has lost what it had lost before; what is new behind it has not.
    let view = fork.view(0).unwrap();
    let formats: Vec<_> = view.blocks().map(|block| block.format()).collect();
    drop(view);
    let of_fork = histories(&fork);
    assert!(
        of_fork[2].starts_with(&told[2]) && of_fork[..2] == histories(&sequence)[..2],
        "{of_fork:?}: {combo}"
    );
    assert!(
        formats[3..8].iter().zip(&of_fork[3..8]).all(|(format, told)| *told == down_to(*format)),
        "{combo}"
    );
    let entries = rig.cache.block_table(&[&fork], 1).unwrap();
    let in_table: Vec<_> =
        entries.sequences[0].blocks.iter().map(|entry| entry.history.formats().to_vec()).collect();
    assert_eq!(in_table[..8], of_fork[..8]);
    assert!(entries.sequences[0].blocks.last().unwrap().history.is_exact(), "{combo}: one raw token");
    drop(entries);
    let (keys, values) = fork.read::<E>(0, 0..64).await.unwrap();
    model.truncate(64);
    model.compare_down(0, 0..64, &keys, &values, &LADDER);
    drop((sequence, fork));
    rig.finish().await;
}

async fn a_view_holds_still_while_its_block_is_re_encoded<E: Number>(combo: Combo) {
    let Some(rig) = rig::<E>(&combo, 3).await else { return };
    let text = rig.text(TEXT);
    let (sequence, _) = rig.shared(&text).await;
    rig.all_sealed().await;
    let view = sequence.view(0).unwrap();
    let before = super::views::look::<E>(&rig.layout, &view).stored;
    sequence.close().await.unwrap();
    press(&rig, |total| total.evictions > 8).await;
    assert!(super::views::look::<E>(&rig.layout, &view).stored == before, "{combo}");
    drop(view);
    rig.finish().await;
}

async fn whoever_writes_waits_for_others_to_shrink<E: Number>(combo: Combo) {
    let Some(rig) = rig::<E>(&combo, 3).await else { return };
    let shards = rig.cache.stats().shards.len() as u64;
    let as_sealed = shards * rig.cache.config().memory_bytes_per_device / sealed_slot_bytes(&rig);
    // Nobody closes anything, and nobody waits between one write and the next.
    let mut sequences = Vec::new();
    let error = loop {
        let sequence = rig.open().await;
        let new = rig.tokens(TEXT - 1);
        match sequence.append(&new.ids, &new.keys, &new.values).await {
            Ok(_) => {
                let mut model = rig.model();
                model.push(&new);
                sequences.push((sequence, model));
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Capacity { .. }), "{error:?}");
    let blocks = sequences.len() as u64 * 8;
    assert!(blocks > as_sealed * 3, "{blocks} blocks, {as_sealed} as they were sealed: {combo}");
    for (sequence, model) in sequences.iter().step_by(7) {
        stages(&rig, sequence, model).await;
    }
    drop(sequences);
    rig.finish().await;
}

async fn a_tenants_own_blocks_are_re_encoded_before_they_make_way_for_its_quota<E: Number>(combo: Combo) {
    let Some(builder) = combo.builder() else { return };
    let builder = builder.colder_formats(&LADDER[1..]).configure(|c| {
        // What the tenant may use leaves more than that to others: memory is never short.
        let quota = c.memory_bytes_per_device / 2;
        c.memory_bytes_per_device *= 2;
        c.tenants.insert("tenant".into(), TenantLimits { quota_bytes: Some(quota), reserve_bytes: 0 });
    });
    let rig = Rig::<E>::new(&combo, builder).await;
    let others = rig.text(4 * 32 + 1);
    let open = async || rig.cache.open("other", OpenOptions::default().prompt(&others.ids)).await.unwrap();
    let sequence = open().await;
    sequence.append(&others.ids, &others.keys, &others.values).await.unwrap();
    sequence.close().await.unwrap();
    rig.all_sealed().await;
    let texts = press(&rig, |total| total.evictions > 0).await;
    let stats = rig.stats().await;
    assert_eq!((stats.total.seal_failures, stats.total.failed_launches), (0, 0));
    let full = stats.shards.iter().map(|shard| shard.counters).find(|of| of.evictions > 0).unwrap();
    let (cached, colder) = (full.blocks_cached, full.blocks_colder);
    assert!(full.bytes_used * 2 < rig.cache.config().memory_bytes_per_device, "{full:?}: {combo}");
    assert!(colder * 10 > cached * 8, "{colder} of {cached}: {combo}");
    assert!(full.recodes * 10 > cached * 15, "{} for {cached}: {combo}", full.recodes);
    // They are what they are, and those of others are left alone.
    let mut found = 0;
    for text in texts.iter().rev().step_by(3) {
        let (sequence, model) = rig.prompted(text).await;
        found += stages(&rig, &sequence, &model).await.iter().sum::<usize>();
    }
    assert!(found > 0, "{combo}");
    let sequence = open().await;
    let view = sequence.view(0).unwrap();
    assert!(view.blocks().count() == 4 && view.blocks().all(|block| block.format() == LADDER[0]), "{combo}");
    drop((view, sequence));
    rig.finish().await;
}

/// Differences from mean keys are re-encoded with the same means.
#[tokio::test]
async fn mean_keys_stay_what_they_are() {
    for setup in SETUPS.iter().filter(|setup| crate::common::is_wanted(setup)) {
        let mut geometry = geometry((32, 1, 1, 64, 64), ElementType::F32);
        geometry.groups[0].rope = Some(Rope {
            inv_freq: (0..32).map(|at| 1000f32.powf(-(at as f32) / 32.0)).collect(),
            rotary_dims: 64,
            layout: RopeLayout::HalfSplit,
            attention_scale: 1.0,
        });
        // Keys that are their mean, but for values: differences are nearly zero, and zeros stay zeros in every format.
        let mean: Vec<f32> = (0..64).map(|at| (at % 7) as f32 * 10.0 - 30.0).collect();
        let mut means = KeyMeansBuilder::new(&geometry).unwrap();
        means.add(0, 0, &mean);
        let file = tempfile::NamedTempFile::new().unwrap();
        means.finish().unwrap().save(file.path()).unwrap();
        let combo = Combo { setup, format: LADDER[0].into(), geometry };
        let Some(builder) = combo.builder() else { continue };
        let builder = builder
            .colder_formats(&LADDER[1..])
            .configure(|c| c.quantisation.key_means = Some(file.path().to_owned()));
        let case = async {
            let rig = Rig::<f32>::new(&combo, builder).await;
            let key = |position: u32| -> Vec<f32> {
                let mut key = mean.clone();
                for pair in 0..32 {
                    let angle = f64::from(position) * 1000f64.powf(-f64::from(pair) / 32.0);
                    let (sin, cos) = angle.sin_cos();
                    let at = pair as usize;
                    let (x, y) = (f64::from(mean[at]), f64::from(mean[at + 32]));
                    (key[at], key[at + 32]) = ((x * cos - y * sin) as f32, (x * sin + y * cos) as f32);
                }
                key
            };
            let keys: Vec<f32> = (0..TEXT).flat_map(key).collect();
            let mut text = rig.text(TEXT);
            text.keys = keys.clone();
            rig.shared(&text).await.0.close().await.unwrap();
            rig.all_sealed().await;
            press(&rig, |total| total.blocks_colder >= 64).await;
            let (sequence, _) = rig.prompted(&text).await;
            let found = sequence.len();
            let view = sequence.view(0).unwrap();
            let colder = view.blocks().filter(|block| block.format() != LADDER[0]).count();
            assert!(found + 1 == TEXT && colder > 0, "{found} tokens, {colder} blocks: {combo}");
            drop(view);
            let (read, _) = sequence.read::<f32>(0, 0..found).await.unwrap();
            let off = read.iter().zip(&keys).map(|(read, key)| (read - key).abs()).fold(0.0, f32::max);
            assert!(off < 0.01, "{combo}: off by {off} of 30");
            drop(sequence);
            rig.finish().await;
        };
        whole_case(format!("mean keys on {combo}"), case).await;
    }
}
