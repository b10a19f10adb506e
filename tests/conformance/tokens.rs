//! Tokens go in and come out: appended, staged, committed, cut off.

use kv_cache::*;

use crate::common::model::{int8_encode, through_int8};
use crate::common::{Number, Rig, combos};

mod all {
    use super::*;
    use crate::common::all_combos;

    crate::conformance!(all_combos: any_range_of_any_layer);

    pub(super) async fn any_range_of_any_layer<E: Number>(rig: Rig<E>) {
        let (sequence, mut model) = (rig.open().await, rig.model());
        let block = rig.block();
        for tokens in [1, block - 1, block, 1, 2 * block + 1, 3 * block] {
            rig.append(&sequence, &mut model, tokens).await;
            rig.check(&sequence, &model).await;
        }
        let end = model.len();
        let mut ranges = vec![0..0, end..end, 0..1, end - 1..end, 1..end - 1, block..2 * block];
        ranges.extend((0..8).map(|i| end * i / 11..end * (i + 3) / 11));
        for layer in 0..rig.layers() {
            for range in &ranges {
                let (keys, values) = sequence.read::<E>(layer, range.clone()).await.unwrap();
                model.compare(layer, range.clone(), &keys, &values, rig.format);
            }
        }
        let info = sequence.info();
        assert_eq!((info.committed, info.staged, info.dropped), (end, vec![], 0..0));
        assert_eq!(info.raw_blocks + info.sealed_blocks, end.div_ceil(block));
        assert!(info.sealed_blocks <= end / block);
        drop(sequence);
        rig.finish().await;
    }
}

crate::conformance!(combos:
    sealed_blocks_hold_the_formats_bytes,
    the_int8_error_is_bounded,
    a_layer_is_readable_as_soon_as_it_is_staged,
    layers_may_run_ahead_of_each_other,
    a_commit_takes_the_first_staged_tokens_only,
    what_is_staged_can_be_discarded,
    appending_over_staged_tokens_is_refused,
    a_commit_needs_every_layer,
    truncating_to_nothing,
    truncating_inside_the_open_block,
    truncating_into_a_sealed_block,
    truncating_past_the_end_is_refused,
    a_position_must_match,
    extra_identity_changes_no_bytes,
    operations_take_effect_in_the_order_of_their_first_poll,
);

async fn sealed_blocks_hold_the_formats_bytes<E: Number>(rig: Rig<E>) {
    let (sequence, model) = rig.filled(3 * rig.block() + 1).await;
    rig.sealed(&sequence).await;
    let info = sequence.info();
    let open = u32::from(rig.block() > 1);
    assert_eq!((info.sealed_blocks, info.raw_blocks), (model.len() / rig.block(), open));
    for layer in 0..rig.layers() {
        let full = 0..model.len() / rig.block() * rig.block();
        let (keys, values) = sequence.read::<E>(layer, full.clone()).await.unwrap();
        model.compare_sealed(layer, full.clone(), &keys, &values, rig.format);
        let rest = full.end..model.len();
        let (keys, values) = sequence.read::<E>(layer, rest.clone()).await.unwrap();
        model.compare_exact(layer, rest, &keys, &values);
    }
    drop(sequence);
    rig.finish().await;
}

/// The bound that the codec's documentation gives, on what really comes out of the cache.
async fn the_int8_error_is_bounded<E: Number>(rig: Rig<E>) {
    if rig.format != Format::Raw && rig.format != Format::Int8 {
        // Their bounds are the codec's tests.
        return rig.finish().await;
    }
    let tokens = 4 * rig.block();
    let (sequence, model) = rig.filled(tokens).await;
    rig.sealed(&sequence).await;
    let mut lossy = false;
    for layer in 0..rig.layers() {
        let (keys, values) = sequence.read::<E>(layer, 0..tokens).await.unwrap();
        for (plane, read) in [(Plane::Key, &keys), (Plane::Value, &values)] {
            let dim = rig.layout.dim(plane);
            let written = model.rows(plane, layer, 0..tokens);
            for (written, read) in written.chunks(dim).zip(read.chunks(dim)) {
                let (_, scale) = int8_encode(written);
                let subnormal = if rig.layout.element == ElementType::F16 { 4e-6 } else { 0.0 };
                for (x, y) in written.iter().zip(read) {
                    let (x, y) = (x.to_f32(), y.to_f32());
                    let bound = scale / 2.0 + scale / 16.0 + subnormal + y.abs() * E::ROUNDING;
                    // In f64: the difference of two large f32 may overflow.
                    let error = (f64::from(x) - f64::from(y)).abs();
                    let bound = if rig.format == Format::Int8 { f64::from(bound) } else { 0.0 };
                    assert!(error <= bound, "{x} came back as {y}, scale {scale}");
                    lossy |= error > 0.0;
                }
            }
        }
    }
    assert_eq!(lossy, rig.format == Format::Int8, "the format was used");
    drop(sequence);
    rig.finish().await;
}

async fn a_layer_is_readable_as_soon_as_it_is_staged<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(rig.block() + 1).await;
    let committed = model.len();
    let new = rig.tokens(2 * rig.block() + 1);
    model.push(&new);
    for layer in (0..rig.layers()).rev() {
        let hidden = sequence.read::<E>(layer, 0..committed + 1).await.unwrap_err();
        assert_eq!(hidden, Error::TokenRange { range: 0..committed + 1, visible: committed });
        let staged = sequence.stage(layer, new.keys_of(layer), new.values_of(layer)).await.unwrap();
        assert_eq!(staged, model.len());
        let (keys, values) = sequence.read::<E>(layer, committed - 1..staged).await.unwrap();
        model.compare(layer, committed - 1..staged, &keys, &values, rig.format);
        assert_eq!(sequence.view(layer).unwrap().tokens(), staged);
        assert_eq!(sequence.len(), committed);
        assert_eq!(sequence.info().staged[layer as usize], staged);
        // A fork has neither these tokens nor the blocks that only they are in.
        let fork = sequence.fork().await.unwrap();
        assert_eq!((fork.len(), fork.info().staged), (committed, vec![]));
        let hidden = fork.read::<E>(layer, 0..committed + 1).await.unwrap_err();
        assert_eq!(hidden, Error::TokenRange { range: 0..committed + 1, visible: committed });
        assert_eq!(fork.view(layer).unwrap().tokens(), committed);
        let table = rig.cache.block_table(&[&sequence, &fork], layer).unwrap();
        assert_eq!((table.sequences[0].tokens, table.sequences[1].tokens), (staged, committed));
        assert_eq!(table.sequences[1].blocks.len() as u32, committed.div_ceil(rig.block()));
    }
    // The forks have closed.
    assert_eq!(rig.stats().await.tokens, u64::from(committed), "staged tokens do not count");
    assert_eq!(sequence.commit(&new.ids).await.unwrap(), model.len());
    assert!(sequence.info().staged.is_empty());
    rig.check(&sequence, &model).await;
    rig.sealed(&sequence).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn layers_may_run_ahead_of_each_other<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = (rig.open().await, rig.model());
    let new = rig.tokens(2 * rig.block() + 1);
    let row = |plane| rig.layout.kv_heads * rig.layout.dim(plane);
    // The first layers in one go, the last one token by token, before and after.
    let last = rig.layers() - 1;
    let one = async |token: usize| {
        let keys = &new.keys_of(last)[token * row(Plane::Key)..][..row(Plane::Key)];
        let values = &new.values_of(last)[token * row(Plane::Value)..][..row(Plane::Value)];
        assert_eq!(sequence.stage(last, keys, values).await.unwrap() as usize, token + 1);
    };
    one(0).await;
    for layer in 0..last {
        sequence.stage(layer, new.keys_of(layer), new.values_of(layer)).await.unwrap();
    }
    for token in 1..new.len() {
        one(token).await;
    }
    sequence.commit(&new.ids).await.unwrap();
    model.push(&new);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

/// Speculative decoding: a draft is staged, its accepted part committed, again and again.
async fn a_commit_takes_the_first_staged_tokens_only<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(1).await;
    for round in 0..8 {
        let draft = rig.tokens(2 * rig.block() + 2);
        rig.stage_all(&sequence, &draft).await;
        let accepted = 1 + round * draft.len() as u32 / 8;
        let committed = sequence.commit(&draft.ids[..accepted as usize]).await.unwrap();
        model.push_some(&draft, accepted);
        assert_eq!((committed, sequence.info().staged), (model.len(), vec![]));
        let gone = sequence.read::<E>(0, 0..committed + 1).await.unwrap_err();
        assert_eq!(gone, Error::TokenRange { range: 0..committed + 1, visible: committed });
        // One look: a block that seals between two would be counted twice.
        let info = sequence.info();
        let blocks = info.raw_blocks + info.sealed_blocks;
        assert_eq!(blocks, committed.div_ceil(rig.block()), "blocks of rejected tokens are free");
        rig.check(&sequence, &model).await;
        rig.append(&sequence, &mut model, round % 3).await;
    }
    rig.sealed(&sequence).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn what_is_staged_can_be_discarded<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(rig.block() + 2).await;
    rig.stage_all(&sequence, &rig.tokens(rig.block() + 1)).await;
    sequence.truncate(model.len()).await.unwrap();
    assert!(sequence.info().staged.is_empty());
    rig.append(&sequence, &mut model, rig.block()).await;
    rig.stage_all(&sequence, &rig.tokens(1)).await;
    sequence.truncate(2).await.unwrap();
    model.truncate(2);
    rig.append(&sequence, &mut model, 2 * rig.block()).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn appending_over_staged_tokens_is_refused<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(2).await;
    let (staged, other) = (rig.tokens(3), rig.tokens(1));
    sequence.stage(0, staged.keys_of(0), staged.values_of(0)).await.unwrap();
    let refused = sequence.append(&other.ids, &other.keys, &other.values).await;
    assert_eq!(refused, Err(Error::StagedTokens { staged: 3 }));
    for layer in 1..rig.layers() {
        sequence.stage(layer, staged.keys_of(layer), staged.values_of(layer)).await.unwrap();
    }
    sequence.commit(&staged.ids).await.unwrap();
    model.push(&staged);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn a_commit_needs_every_layer<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(1).await;
    let new = rig.tokens(3);
    assert_eq!(sequence.commit(&new.ids).await, Err(Error::NotStaged { tokens: 3, layer: 0, staged: 0 }));
    let last = rig.layers() - 1;
    for layer in 0..last {
        sequence.stage(layer, new.keys_of(layer), new.values_of(layer)).await.unwrap();
    }
    assert_eq!(sequence.commit(&new.ids).await, Err(Error::NotStaged { tokens: 3, layer: last, staged: 0 }));
    sequence.stage(last, new.keys_of(last), new.values_of(last)).await.unwrap();
    let too_many = [0; 4];
    assert_eq!(sequence.commit(&too_many).await, Err(Error::NotStaged { tokens: 4, layer: 0, staged: 3 }));
    assert_eq!(sequence.commit(&new.ids).await, Ok(4));
    model.push(&new);
    // Nothing of a draft is accepted, or there is none.
    let draft = rig.tokens(1);
    for staged in [false, true] {
        if staged {
            rig.stage_all(&sequence, &draft).await;
        }
        assert_eq!(sequence.commit(&[]).await, Ok(sequence.len()));
        assert!(sequence.info().staged.is_empty());
    }
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn truncating_to_nothing<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(3 * rig.block() + 1).await;
    rig.sealed(&sequence).await;
    sequence.truncate(0).await.unwrap();
    model.truncate(0);
    assert!(sequence.is_empty());
    let info = sequence.info();
    assert_eq!((info.raw_blocks, info.sealed_blocks), (0, 0));
    assert_eq!(rig.cache.stats().tokens, 0);
    rig.append(&sequence, &mut model, rig.block() + 1).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn truncating_inside_the_open_block<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(3 * rig.block() - 1).await;
    for cut in [model.len(), model.len() - 1, model.len().saturating_sub(3)] {
        sequence.truncate(cut).await.unwrap();
        model.truncate(cut);
        rig.check(&sequence, &model).await;
        rig.append(&sequence, &mut model, 1).await;
        rig.check(&sequence, &model).await;
    }
    drop(sequence);
    rig.finish().await;
}

async fn truncating_into_a_sealed_block<E: Number>(rig: Rig<E>) {
    let block = rig.block();
    for inside in [0, 1, block - 1] {
        let (sequence, mut model) = rig.filled(4 * block).await;
        rig.sealed(&sequence).await;
        let cut = 2 * block + inside;
        sequence.truncate(cut).await.unwrap();
        model.truncate(cut);
        assert_eq!(sequence.info().raw_blocks + sequence.info().sealed_blocks, cut.div_ceil(block));
        // Not written to yet: sealed as it was.
        let (keys, values) = sequence.read::<E>(0, 0..cut).await.unwrap();
        model.compare_sealed(0, 0..cut, &keys, &values, rig.format);
        rig.append(&sequence, &mut model, 1).await;
        let (keys, values) = sequence.read::<E>(0, cut..cut + 1).await.unwrap();
        match block {
            1 => model.compare(0, cut..cut + 1, &keys, &values, rig.format),
            _ if inside == block - 1 => model.compare(0, cut..cut + 1, &keys, &values, rig.format),
            _ => model.compare_exact(0, cut..cut + 1, &keys, &values),
        }
        rig.check(&sequence, &model).await;
        rig.append(&sequence, &mut model, 2 * block).await;
        rig.sealed(&sequence).await;
        rig.check(&sequence, &model).await;
    }
    rig.finish().await;
}

async fn truncating_past_the_end_is_refused<E: Number>(rig: Rig<E>) {
    let (sequence, model) = rig.filled(rig.block() + 1).await;
    let end = model.len();
    rig.stage_all(&sequence, &rig.tokens(4)).await;
    for tokens in [end + 1, end + 4, u32::MAX] {
        // Staged tokens are not there to be kept.
        let refused = sequence.truncate(tokens).await;
        assert_eq!(refused, Err(Error::TokenRange { range: 0..tokens, visible: end }));
    }
    assert_eq!(sequence.info().staged, vec![end + 4; rig.layout.layers], "as it was");
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn a_position_must_match<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(5).await;
    let new = rig.tokens(2);
    for wrong in [0, 4, 6, u32::MAX] {
        let refused = sequence.append_with(Some(wrong), &new.ids, None, &new.keys, &new.values).await;
        assert_eq!(refused, Err(Error::Position { expected: wrong, actual: 5 }));
    }
    rig.check(&sequence, &model).await;
    let committed = sequence.append_with(Some(5), &new.ids, None, &new.keys, &new.values).await;
    assert_eq!(committed, Ok(7));
    model.push(&new);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn extra_identity_changes_no_bytes<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(1).await;
    let (image, staged) = (rig.tokens(2 * rig.block()), rig.tokens(rig.block()));
    let extra = Some(ExtraIdentity([7; 32]));
    sequence.append_with(None, &image.ids, extra, &image.keys, &image.values).await.unwrap();
    model.push(&image);
    rig.stage_all(&sequence, &staged).await;
    sequence.commit_with(&staged.ids, extra).await.unwrap();
    model.push(&staged);
    let fork = sequence.fork().await.unwrap();
    sequence.truncate(2).await.unwrap();
    rig.check(&fork, &model).await;
    model.truncate(2);
    rig.append(&sequence, &mut model, rig.block()).await;
    rig.check(&sequence, &model).await;
    drop((sequence, fork));
    rig.finish().await;
}

async fn operations_take_effect_in_the_order_of_their_first_poll<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(1).await;
    let (a, b) = (rig.tokens(rig.block()), rig.tokens(2));
    let (first, read, cut, second) = tokio::join!(
        sequence.append(&a.ids, &a.keys, &a.values),
        sequence.read::<E>(0, 0..1 + rig.block()),
        sequence.truncate(2),
        sequence.append_with(Some(2), &b.ids, None, &b.keys, &b.values),
    );
    assert_eq!((first, cut, second), (Ok(1 + rig.block()), Ok(()), Ok(4)));
    model.push(&a);
    let (keys, values) = read.unwrap();
    model.compare(0, 0..model.len(), &keys, &values, rig.format);
    model.truncate(2);
    model.push(&b);
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

/// The reference above is worth nothing if it does not lose anything itself.
#[test]
fn the_reference_codec_is_what_the_formats_page_says() {
    let row = [1.0f32, -127.0, 0.5, 0.49];
    let (codes, scale) = int8_encode(&row);
    assert_eq!((codes.as_slice(), scale), ([1, -127, 0, 0].as_slice(), 1.0));
    assert_eq!(through_int8(&row), [1.0, -127.0, 0.0, 0.0]);
    assert_eq!(through_int8(&[0.0f32; 3]), [0.0; 3]);
}
