//! Prefix sharing: what a prompt finds, what it must never find, and that whoever shares cannot tell but by the counters.
//!
//! Texts are ids, with keys and values that follow from all ids up to each ([`Tokens::computed`]): whatever is found that is not the
//! prompt's own reads back wrong.

use kv_cache::*;

use crate::common::{Model, Number, Rig, Tokens, combos};

crate::conformance!(combos:
    a_full_hit_leaves_the_last_block_to_compute,
    a_partial_block_is_not_shared,
    a_prompt_shorter_than_a_block_finds_no_block,
    a_prompt_that_diverges_finds_the_blocks_before,
    the_same_block_behind_another_parent_is_not_found,
    what_is_found_reads_as_it_was_written_and_goes_on,
    blocks_outlive_their_sequence,
    generated_tokens_can_be_found,
    committed_drafts_can_be_found_and_rejected_ones_cannot,
    two_that_compute_the_same_end_with_one_copy,
    tenants_never_share,
    a_shared_domain_is_shared,
    adapters_keep_apart,
    extra_identity_keeps_apart,
    nothing_is_shared_without_a_prompt,
    cutting_a_sequence_leaves_those_who_share_alone,
    what_is_written_after_a_cut_has_another_key,
    a_found_prefix_may_be_cut_anywhere,
    forks_share_what_they_compute,
    forks_of_a_sequence_without_a_prompt_keep_to_themselves,
    offloaded_blocks_are_found,
    a_batch_opens_with_prompts,
);

fn options() -> OpenOptions {
    OpenOptions::default()
}

/// Blocks that prompts asked for and found, so far.
async fn asked_and_hit<E: Number>(rig: &Rig<E>) -> (u64, u64) {
    let total = rig.stats().await.total;
    (total.prefix_blocks_asked, total.prefix_blocks_hit)
}

/// The same text but for one token, another one for each `by`.
fn changed(ids: &[u32], at: u32, by: u32) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids[at as usize] ^= by;
    ids
}

/// The same text with one more token, so that all its full blocks may be found.
fn longer(ids: &[u32]) -> Vec<u32> {
    [ids, &[7]].concat()
}

/// Tokens in the full blocks of a text: all of them where a block is one token.
fn full<E: Number>(rig: &Rig<E>, text: &Tokens<E>) -> u32 {
    text.len() as u32 / rig.block() * rig.block()
}

/// What is found of a prompt whose first `common` tokens, without its last, agree with cached blocks: whole blocks, and where cached
/// blocks can be copied as they are, what the next one has in common.
fn part<E: Number>(rig: &Rig<E>, common: u32) -> u32 {
    if rig.format == Format::Raw { common } else { common / rig.block() * rig.block() }
}

/// Checks it. A prompt of which no whole block is found may come to a shard that has nothing of it.
#[track_caller]
fn assert_part<E: Number>(rig: &Rig<E>, found: u32, common: u32) {
    let elsewhere = found == 0 && common < rig.block() && rig.cache.stats().shards.len() > 1;
    assert!(elsewhere || found == part(rig, common), "{found} tokens found, {common} in common");
}

/// How many tokens of a text are found, with a token behind it so that none of its blocks is left out.
async fn found_of<E: Number>(rig: &Rig<E>, ids: &[u32]) -> u32 {
    rig.found(options(), &longer(ids)).await
}

// ---- what is found ----

/// A model has to run on the last token of a prompt in any case, so its block is not taken over.
async fn a_full_hit_leaves_the_last_block_to_compute<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    for blocks in 1..=4 {
        let text = rig.text(blocks * block);
        let before = asked_and_hit(&rig).await;
        let (sequence, model) = rig.shared(&text).await;
        assert_eq!(asked_and_hit(&rig).await, (before.0 + u64::from(blocks), before.1));
        let (again, mut found) = rig.prompted(&text).await;
        assert_part(&rig, again.len(), blocks * block - 1);
        let (asked, hit) = asked_and_hit(&rig).await;
        assert_eq!((asked - before.0, hit - before.1), (2 * u64::from(blocks), u64::from(blocks) - 1));
        rig.go_on(&again, &mut found, &text, text.len() as u32).await;
        rig.check(&again, &found).await;
        rig.check(&sequence, &model).await;
        // One token more, and the block may be used.
        assert_eq!(found_of(&rig, &text.ids).await, blocks * block);
        drop((sequence, again));
    }
    rig.finish().await;
}

async fn a_partial_block_is_not_shared<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block - 1);
    let (sequence, model) = rig.shared(&text).await;
    let full = model.len() / block * block;
    assert_eq!(found_of(&rig, &text.ids).await, full);
    for len in full - 1..=text.len() as u32 {
        let found = rig.found(options(), &text.ids[..len as usize]).await;
        assert_part(&rig, found, len.saturating_sub(1).min(full));
    }
    // It is shared once it is full.
    let rest = rig.computed(&[&text.ids[..], &[1]].concat());
    let (other, mut others) = rig.prompted(&rest).await;
    rig.go_on(&other, &mut others, &rest, 3 * block).await;
    assert_eq!(found_of(&rig, &rest.ids).await, 3 * block);
    rig.check(&other, &others).await;
    rig.check(&sequence, &model).await;
    drop((sequence, other));
    rig.finish().await;
}

async fn a_prompt_shorter_than_a_block_finds_no_block<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(2 * block);
    let (sequence, _) = rig.shared(&text).await;
    for len in [0, 1, block / 2, block - 1, block] {
        let found = rig.found(options(), &text.ids[..len as usize]).await;
        assert_part(&rig, found, len.saturating_sub(1));
    }
    assert_eq!(rig.found(options(), &text.ids[..block as usize + 1]).await, block);
    drop(sequence);
    rig.finish().await;
}

async fn a_prompt_that_diverges_finds_the_blocks_before<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(4 * block);
    let (sequence, model) = rig.shared(&text).await;
    for (by, at) in (1..).zip([0, block - 1, block, 2 * block + block / 2, 4 * block - 1]) {
        let other = rig.computed(&changed(&text.ids, at, by));
        let (diverged, mut diverges) = rig.prompted(&other).await;
        assert_part(&rig, diverged.len(), at);
        assert!(at < block || diverged.id().shard() == sequence.id().shard());
        rig.go_on(&diverged, &mut diverges, &other, other.len() as u32).await;
        rig.check(&diverged, &diverges).await;
        diverged.close().await.unwrap();
        // Both branches can be found now.
        assert_eq!(found_of(&rig, &other.ids).await, 4 * block);
        assert_eq!(found_of(&rig, &text.ids).await, 4 * block);
    }
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn the_same_block_behind_another_parent_is_not_found<E: Number>(rig: Rig<E>) {
    let block = rig.block() as usize;
    let text = rig.text(3 * block as u32);
    let (sequence, _) = rig.shared(&text).await;
    // Its second and third block at the start; and behind another first block, which is cached as well.
    assert_eq!(found_of(&rig, &text.ids[block..]).await, 0);
    let other = rig.text(block as u32);
    let (first, _) = rig.shared(&other).await;
    let crossed = rig.computed(&[&other.ids[..], &text.ids[block..]].concat());
    let (crosses, mut model) = rig.prompted(&crossed).await;
    assert_eq!(crosses.len(), block as u32);
    rig.go_on(&crosses, &mut model, &crossed, crossed.len() as u32).await;
    rig.check(&crosses, &model).await;
    // Repeating a block does not find it a second time.
    let twice = [&text.ids[..block], &text.ids[..block]].concat();
    assert_eq!(found_of(&rig, &twice).await, block as u32);
    drop((sequence, first, crosses));
    rig.finish().await;
}

async fn what_is_found_reads_as_it_was_written_and_goes_on<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(5 * block + 2);
    let (first, model) = rig.shared(&text).await;
    // Once before all of it is sealed, if it is quick enough, and once after.
    for common in [full(&rig, &text), text.len() as u32] {
        let (second, mut found) = rig.prompted(&text).await;
        assert_part(&rig, second.len(), common.min(text.len() as u32 - 1));
        rig.check(&second, &found).await;
        let view = second.view(0).unwrap();
        assert_eq!(view.tokens(), found.len());
        let seen = super::views::look::<E>(&rig.layout, &view);
        found.compare(0, 0..found.len(), &seen.keys, &seen.values, rig.format);
        drop(view);
        assert_eq!((second.info().committed, second.info().staged), (found.len(), vec![]));
        // A few at a time, then what nobody else has.
        for to in [found.len() + 1, text.len() as u32] {
            rig.go_on(&second, &mut found, &text, to).await;
            rig.check(&second, &found).await;
        }
        rig.append(&second, &mut found, 2 * block).await;
        rig.check(&second, &found).await;
        rig.check(&first, &model).await;
        rig.sealed(&first).await;
        rig.sealed(&second).await;
        rig.check(&second, &found).await;
        drop(second);
    }
    assert_eq!(rig.stats().await.total.seal_failures, 0);
    drop(first);
    rig.finish().await;
}

async fn blocks_outlive_their_sequence<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(4 * block);
    let (sequence, _) = rig.shared(&text).await;
    rig.all_sealed().await;
    assert_eq!(rig.stats().await.total.blocks_cached, 0, "its sequence holds them");
    sequence.close().await.unwrap();
    let stats = rig.stats().await;
    assert_eq!((stats.tokens, stats.sequences_open), (0, 0));
    assert_eq!((stats.total.blocks_cached, stats.total.blocks_used), (4, 4));
    let (again, model) = rig.prompted(&rig.computed(&longer(&text.ids))).await;
    assert_eq!(again.len(), 4 * block);
    assert_eq!(rig.stats().await.total.blocks_cached, 0);
    assert_eq!(rig.cache.stats().tokens, u64::from(4 * block), "what is found counts");
    rig.check(&again, &model).await;
    drop(again);
    // A sequence that never was longer than a part of a block leaves nothing.
    let (short, _) = rig.shared(&rig.text(block.max(2) - 1)).await;
    let full = u64::from(short.len() / block);
    short.close().await.unwrap();
    assert_eq!(rig.stats().await.total.blocks_cached, 4 + full);
    rig.finish().await;
}

// ---- what becomes findable ----

async fn generated_tokens_can_be_found<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(block);
    // One by one, behind a prompt and behind an empty one; and by steps for both together.
    let (prompted, mut model) = rig.shared(&text).await;
    let (empty, mut nothing) = rig.prompted(&rig.text(0)).await;
    let long = rig.computed(&[&text.ids[..], &rig.ids(2 * block)].concat());
    let other = rig.text(2 * block);
    for token in 1..=block {
        rig.go_on(&prompted, &mut model, &long, block + token).await;
        rig.go_on(&empty, &mut nothing, &other, token).await;
    }
    for token in block..2 * block {
        let rows = [long.token((block + token) as usize), other.token(token as usize)];
        let join = |of: fn(&Tokens<E>, u32) -> &[E]| -> Vec<E> {
            (0..rig.layers())
                .flat_map(|layer| rows.iter().flat_map(move |row| of(row, layer)))
                .copied()
                .collect()
        };
        let (keys, values) = (join(Tokens::keys_of), join(Tokens::values_of));
        let ids = [rows[0].ids[0], rows[1].ids[0]];
        let batch = BatchCacheOperations::new().append_each(&[&prompted, &empty], &ids, &keys, &values);
        assert!(rig.cache.submit(batch).await.unwrap().iter().all(Result::is_ok));
        model.push(&rows[0]);
        nothing.push(&rows[1]);
    }
    for (text, sequence, model) in [(&long, &prompted, &model), (&other, &empty, &nothing)] {
        assert_eq!(found_of(&rig, &text.ids).await, text.len() as u32);
        rig.check(sequence, model).await;
    }
    drop((prompted, empty));
    for text in [&long, &other] {
        let (again, model) = rig.prompted(&rig.computed(&longer(&text.ids))).await;
        assert_eq!(again.len(), text.len() as u32);
        rig.check(&again, &model).await;
    }
    rig.finish().await;
}

async fn committed_drafts_can_be_found_and_rejected_ones_cannot<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let (sequence, mut model) = rig.prompted(&rig.text(0)).await;
    let mut ids = Vec::new();
    // Drafts of which the first few are accepted, over several borders of blocks.
    while model.len() < 3 * block {
        let draft = rig.ids(block / 2 + 2);
        let accepted = (draft.len() as u32 - 1).min(3 * block - model.len());
        let staged = rig.computed(&[&ids[..], &draft].concat());
        let staged = staged.slice(ids.len()..staged.len());
        rig.stage_all(&sequence, &staged).await;
        sequence.commit(&draft[..accepted as usize]).await.unwrap();
        model.push_some(&staged, accepted);
        let rejected = [&ids[..], &draft].concat();
        assert_eq!(found_of(&rig, &rejected).await, model.len() / block * block);
        ids.extend_from_slice(&draft[..accepted as usize]);
    }
    rig.check(&sequence, &model).await;
    sequence.close().await.unwrap();
    let (again, model) = rig.prompted(&rig.computed(&longer(&ids))).await;
    assert_eq!(again.len(), 3 * block);
    rig.check(&again, &model).await;
    drop(again);
    rig.finish().await;
}

/// Opens sequences of a text until one is on `shard`. Whatever is cached of it draws them all to one shard.
async fn prompted_on<E: Number>(rig: &Rig<E>, shard: u16, text: &Tokens<E>) -> (Sequence, Model<E>) {
    let mut elsewhere = Vec::new();
    loop {
        let (sequence, model) = rig.prompted(text).await;
        if sequence.id().shard() == shard {
            return (sequence, model);
        }
        elsewhere.push(sequence);
    }
}

async fn two_that_compute_the_same_end_with_one_copy<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(4 * block + 1);
    let (a, mut model_a) = rig.prompted(&text).await;
    let (b, mut model_b) = prompted_on(&rig, a.id().shard(), &text).await;
    assert_eq!((a.len(), b.len()), (0, 0));
    // Side by side in steps that cross borders of blocks, and the last ones staged.
    for to in [block - 1, block + 1, 2 * block, 3 * block] {
        rig.go_on(&a, &mut model_a, &text, to).await;
        rig.go_on(&b, &mut model_b, &text, to).await;
    }
    let rest = text.slice(model_a.len() as usize..text.len());
    rig.stage_all(&a, &rest).await;
    rig.stage_all(&b, &rest).await;
    for (sequence, model) in [(&a, &mut model_a), (&b, &mut model_b)] {
        sequence.commit(&rest.ids).await.unwrap();
        model.push(&rest);
    }
    let total = rig.stats().await.total;
    let blocks = u64::from(full(&rig, &text) / block);
    assert_eq!(total.blocks_deduplicated, blocks);
    let partial = u64::from(block > 1);
    assert_eq!(total.blocks_used, blocks + 2 * partial, "one copy of each, and a partial block each");
    for _ in 0..2 {
        rig.check(&a, &model_a).await;
        rig.check(&b, &model_b).await;
        rig.sealed(&a).await;
        rig.sealed(&b).await;
    }
    let copies = rig.stats().await.total.copies_on_write;
    rig.append(&a, &mut model_a, block).await;
    rig.append(&b, &mut model_b, block).await;
    a.close().await.unwrap();
    rig.check(&b, &model_b).await;
    assert_eq!(rig.stats().await.total.copies_on_write, copies, "full blocks are not written to");
    drop(b);
    rig.finish().await;
}

async fn a_batch_opens_with_prompts<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(2 * block + 1);
    let (sequence, _) = rig.shared(&text).await;
    let batch = BatchCacheOperations::new()
        .open("tenant", options().prompt(&text.ids))
        .open("tenant", options().prompt(&changed(&text.ids, block, 1)))
        .open("tenant", options())
        .open("other", options().prompt(&text.ids));
    let mut lens = Vec::new();
    for result in rig.cache.submit(batch).await.unwrap() {
        let Ok(Outcome::Opened(sequence)) = result else { panic!("{result:?}") };
        lens.push(sequence.len());
    }
    assert_eq!(lens, [2 * block, block, 0, 0]);
    drop(sequence);
    rig.finish().await;
}

// ---- what keeps apart ----

async fn tenants_never_share<E: Number>(rig: Rig<E>) {
    let text = rig.text(3 * rig.block());
    let of = |tenant: &'static str| rig.cache.open(tenant, options().prompt(&text.ids));
    let mine = rig.shared(&text).await.0;
    let hits = asked_and_hit(&rig).await.1;
    let other = Tokens::computed(rig.layout, &text.ids, 1);
    for name in ["another", "tenan", "tenant2", ""] {
        let stranger = of(name).await.unwrap();
        assert_eq!(stranger.len(), 0, "{name}");
        // What they compute is theirs, be it on the same shard.
        stranger.append(&other.ids, &other.keys, &other.values).await.unwrap();
        let mut model = rig.model();
        model.push(&other);
        rig.check(&stranger, &model).await;
        stranger.close().await.unwrap();
        assert_part(&rig, of(name).await.unwrap().len(), 3 * rig.block() - 1);
        assert_eq!(rig.cache.invalidate(Invalidate::Tenant(Tenant::new(name))).await.unwrap(), 3);
    }
    let total = rig.stats().await.total;
    assert_eq!((total.prefix_blocks_hit - hits, total.blocks_deduplicated), (4 * 2, 0));
    drop(mine);
    let (again, model) = rig.prompted(&text).await;
    assert_part(&rig, again.len(), 3 * rig.block() - 1);
    rig.check(&again, &model).await;
    drop(again);
    rig.finish().await;
}

async fn a_shared_domain_is_shared<E: Number>(rig: Rig<E>) {
    let text = rig.text(3 * rig.block());
    let in_domain = |name: &str| options().shared_domain(name).prompt(&text.ids);
    let first = rig.cache.open("one", in_domain("public")).await.unwrap();
    first.append(&text.ids, &text.keys, &text.values).await.unwrap();
    let second = rig.cache.open("two", in_domain("public")).await.unwrap();
    assert_part(&rig, second.len(), 3 * rig.block() - 1);
    assert_eq!(second.tenant().name(), "two");
    let mut model = rig.model();
    model.push_some(&text, second.len());
    rig.check(&second, &model).await;
    // Not by name of the tenant, nor without the domain, nor in another one.
    for (tenant, options) in [
        ("one", options().prompt(&text.ids)),
        ("public", options().prompt(&text.ids)),
        ("two", in_domain("publi")),
        ("two", in_domain("")),
    ] {
        assert_eq!(rig.cache.open(tenant, options).await.unwrap().len(), 0);
    }
    drop((first, second));
    rig.finish().await;
}

async fn adapters_keep_apart<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let ids = rig.ids(3 * block);
    let with = |adapter: Option<&str>| adapter.map_or_else(options, |name| options().adapter(name));
    let adapters = [None, Some("a"), Some("b"), Some("")];
    for (number, adapter) in adapters.iter().enumerate() {
        assert_eq!(rig.found(with(*adapter), &ids).await, 0, "{adapter:?}");
        let text = Tokens::computed(rig.layout, &ids, number as u64);
        let (sequence, mut model) = rig.prompted_with(with(*adapter), &text).await;
        rig.go_on(&sequence, &mut model, &text, 3 * block).await;
        sequence.close().await.unwrap();
    }
    for (number, adapter) in adapters.iter().enumerate() {
        let text = Tokens::computed(rig.layout, &ids, number as u64);
        let (sequence, model) = rig.prompted_with(with(*adapter), &text).await;
        assert_part(&rig, sequence.len(), 3 * block - 1);
        rig.check(&sequence, &model).await;
    }
    assert_eq!(rig.stats().await.total.blocks_deduplicated, 0);
    rig.finish().await;
}

async fn extra_identity_keeps_apart<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let ids = rig.ids(4 * block);
    // An image in the second block and the first token of the third.
    let (start, end) = (block + block / 2, 2 * block + 1);
    let prompt = |image: Option<u8>| match image {
        None => Prompt::new(&ids),
        Some(image) => Prompt::new(&ids).extra_at(start..end, ExtraIdentity([image; 32])),
    };
    let images = [None, Some(1), Some(2)];
    for (number, image) in images.iter().enumerate() {
        // What comes before the image is common to all.
        let sequence = rig.cache.open("tenant", options().prompt(prompt(*image))).await.unwrap();
        assert_part(&rig, sequence.len(), if number == 0 { 0 } else { start });
        let plain = rig.computed(&ids);
        let text = Tokens::computed(rig.layout, &ids, image.map_or(0, u64::from));
        for (part, extra) in [(sequence.len()..start, None), (start..end, *image), (end..4 * block, None)] {
            let from = if part.end <= start { &plain } else { &text };
            let part = from.slice(part.start as usize..part.end as usize);
            if part.len() > 0 {
                let extra = extra.map(|image| ExtraIdentity([image; 32]));
                sequence.append_with(None, &part.ids, extra, &part.keys, &part.values).await.unwrap();
            }
        }
    }
    for image in images {
        let sequence = rig.cache.open("tenant", options().prompt(prompt(image))).await.unwrap();
        assert_part(&rig, sequence.len(), 4 * block - 1);
        let text = Tokens::computed(rig.layout, &ids, image.map_or(0, u64::from));
        let mut model = rig.model();
        model.push(&rig.computed(&ids).slice(0..start as usize));
        model.push(&text.slice(start as usize..sequence.len() as usize));
        rig.check(&sequence, &model).await;
    }
    // The same image one token further on is another prompt.
    let moved = Prompt::new(&ids).extra_at(start + 1..end + 1, ExtraIdentity([1; 32]));
    let sequence = rig.cache.open("tenant", options().prompt(moved)).await.unwrap();
    // Up to there it is as the one without an image.
    assert_part(&rig, sequence.len(), start + 1);
    drop(sequence);
    rig.finish().await;
}

async fn nothing_is_shared_without_a_prompt<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block);
    let plain = rig.open().await;
    plain.append(&text.ids, &text.keys, &text.values).await.unwrap();
    assert_eq!(found_of(&rig, &text.ids).await, 0, "it publishes nothing");
    let (sharing, _) = rig.shared(&text).await;
    let second = rig.open().await;
    assert_eq!(second.len(), 0);
    second.append(&text.ids, &text.keys, &text.values).await.unwrap();
    let total = rig.stats().await.total;
    assert_eq!((total.blocks_deduplicated, total.blocks_used), (0, 9), "and takes nothing over");
    rig.all_sealed().await;
    plain.close().await.unwrap();
    second.close().await.unwrap();
    let total = rig.stats().await.total;
    assert_eq!((total.blocks_used, total.blocks_cached), (3, 0));
    drop(sharing);
    rig.finish().await;
}

// ---- cuts and forks ----

async fn cutting_a_sequence_leaves_those_who_share_alone<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block + 1);
    let (first, model) = rig.shared(&text).await;
    for (sealed, cut) in [(false, 2 * block + 1), (true, 2 * block + 1), (true, block), (true, 1), (true, 0)]
    {
        if sealed {
            rig.sealed(&first).await;
        }
        let (second, mut cuts) = rig.prompted(&text).await;
        assert_eq!(second.len(), 3 * block);
        second.truncate(cut).await.unwrap();
        cuts.truncate(cut);
        rig.append(&second, &mut cuts, block + 2).await;
        rig.check(&second, &cuts).await;
        rig.check(&first, &model).await;
        rig.sealed(&second).await;
        rig.check(&second, &cuts).await;
        assert_eq!(found_of(&rig, &text.ids).await, full(&rig, &text));
        second.close().await.unwrap();
    }
    // Who computed it may cut it as well.
    let (second, shared) = rig.prompted(&text).await;
    first.truncate(1).await.unwrap();
    let mut own = model.clone();
    own.truncate(1);
    rig.append(&first, &mut own, 2 * block).await;
    rig.check(&first, &own).await;
    rig.check(&second, &shared).await;
    drop((first, second));
    let (again, model) = rig.prompted(&text).await;
    assert_eq!(again.len(), 3 * block);
    rig.check(&again, &model).await;
    drop(again);
    rig.finish().await;
}

async fn what_is_written_after_a_cut_has_another_key<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block);
    let (sequence, mut model) = rig.shared(&text).await;
    // Between blocks, so that all that follows is as the model computes it.
    sequence.truncate(block).await.unwrap();
    model.truncate(block);
    let other = rig.computed(&[&text.ids[..block as usize], &rig.ids(2 * block)].concat());
    rig.go_on(&sequence, &mut model, &other, 3 * block).await;
    rig.check(&sequence, &model).await;
    assert_eq!(found_of(&rig, &other.ids).await, 3 * block);
    assert_eq!(found_of(&rig, &text.ids).await, 3 * block, "what was cut off is cached still");
    drop(sequence);
    for text in [&text, &other] {
        let (again, model) = rig.prompted(&rig.computed(&longer(&text.ids))).await;
        assert_eq!(again.len(), 3 * block);
        rig.check(&again, &model).await;
    }
    // Written again as it was: the same key, and no second copy.
    let (sequence, mut model) = rig.prompted(&rig.computed(&longer(&text.ids))).await;
    sequence.truncate(block).await.unwrap();
    model.truncate(block);
    let used = rig.stats().await.total.blocks_used;
    rig.go_on(&sequence, &mut model, &text, 3 * block).await;
    let total = rig.stats().await.total;
    assert_eq!((total.blocks_used, total.blocks_deduplicated), (used, 2));
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

/// Inside of a sealed block the rest is decoded: it stays the sequence's own in a lossy format, and is shared in one that is not.
async fn a_found_prefix_may_be_cut_anywhere<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block);
    let (first, _) = rig.shared(&text).await;
    rig.sealed(&first).await;
    first.close().await.unwrap();
    let cut = block + block.div_ceil(2);
    let (sequence, mut model) = rig.prompted(&rig.computed(&longer(&text.ids))).await;
    sequence.truncate(cut).await.unwrap();
    model.truncate(cut);
    let other = rig.computed(&[&text.ids[..cut as usize], &rig.ids(3 * block - cut)].concat());
    rig.go_on(&sequence, &mut model, &other, 3 * block).await;
    rig.sealed(&sequence).await;
    rig.check(&sequence, &model).await;
    let clean = rig.format == Format::Raw || cut.is_multiple_of(block);
    assert_eq!(found_of(&rig, &other.ids).await, if clean { 3 * block } else { block });
    drop(sequence);
    let (again, model) = rig.prompted(&rig.computed(&longer(&text.ids))).await;
    assert_eq!(again.len(), 3 * block);
    rig.check(&again, &model).await;
    drop(again);
    rig.finish().await;
}

async fn forks_share_what_they_compute<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(block + block / 2);
    let (parent, model) = rig.shared(&text).await;
    let forks = parent.fork_many(3).await.unwrap();
    let mut branches = Vec::new();
    for fork in forks {
        let branch = rig.computed(&[&text.ids[..], &rig.ids(3 * block - text.len() as u32)].concat());
        let mut model = model.clone();
        rig.go_on(&fork, &mut model, &branch, 3 * block).await;
        branches.push((fork, model, branch));
    }
    // The parent computes what one of the forks has.
    let mut own = model.clone();
    rig.go_on(&parent, &mut own, &branches[1].2, 3 * block).await;
    assert!(rig.stats().await.total.blocks_deduplicated > 0);
    for (fork, model, branch) in &branches {
        rig.check(fork, model).await;
        assert_eq!(found_of(&rig, &branch.ids).await, 3 * block);
    }
    rig.check(&parent, &own).await;
    drop(parent);
    let (texts, forks): (Vec<_>, Vec<_>) = branches.into_iter().map(|(fork, _, text)| (text, fork)).unzip();
    drop(forks);
    for text in texts {
        let (again, model) = rig.prompted(&rig.computed(&longer(&text.ids))).await;
        assert_eq!(again.len(), 3 * block);
        // A fork of one that has found all it holds.
        let fork = again.fork().await.unwrap();
        drop(again);
        rig.check(&fork, &model).await;
    }
    rig.finish().await;
}

async fn forks_of_a_sequence_without_a_prompt_keep_to_themselves<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(3 * block);
    let parent = rig.open().await;
    let half = text.slice(0..block as usize);
    parent.append(&half.ids, &half.keys, &half.values).await.unwrap();
    let fork = parent.fork().await.unwrap();
    let mut model = rig.model();
    model.push(&half);
    rig.go_on(&fork, &mut model, &text, 3 * block).await;
    assert_eq!(found_of(&rig, &text.ids).await, 0);
    rig.check(&fork, &model).await;
    drop((parent, fork));
    assert_eq!(found_of(&rig, &text.ids).await, 0);
    rig.finish().await;
}

// ---- tiers ----

async fn offloaded_blocks_are_found<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    let text = rig.text(4 * block + 1);
    let (first, model) = rig.shared(&text).await;
    rig.sealed(&first).await;
    assert_eq!(first.offload().await.unwrap(), full(&rig, &text) / block);
    let (second, mut found) = rig.prompted(&text).await;
    assert_eq!((second.len(), second.info().host_blocks), (4 * block, 4));
    rig.check(&second, &found).await;
    rig.append(&second, &mut found, block).await;
    rig.check(&second, &found).await;
    first.close().await.unwrap();
    // They come back for one, and for all who find them then.
    assert_eq!(second.prefetch().await.unwrap(), 4);
    rig.check(&second, &found).await;
    second.offload().await.unwrap();
    second.close().await.unwrap();
    assert!(rig.stats().await.total.blocks_host >= 4, "offloaded blocks stay cached too");
    let (third, mut found) = rig.prompted(&text).await;
    assert_eq!((third.len(), third.info().host_blocks), (4 * block, 4));
    rig.check(&third, &found).await;
    // Cut and written again: copied to the device.
    third.truncate(3 * block + 1.min(block - 1)).await.unwrap();
    found.truncate(3 * block + 1.min(block - 1));
    rig.append(&third, &mut found, block).await;
    rig.check(&third, &found).await;
    let (fourth, same) = rig.prompted(&text).await;
    assert_eq!((fourth.len(), model.len()), (4 * block, 4 * block + 1));
    rig.check(&fourth, &same).await;
    drop((third, fourth));
    rig.finish().await;
}
