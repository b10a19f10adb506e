//! Token dropping by scores: what stays is what it was, where it was, and nobody else notices.

use std::ops::Range;

use kv_cache::*;

use super::views::look;
use crate::common::model::through;
use crate::common::{Combo, Number, Rig, SETUPS, combos, geometry};

crate::conformance!(combos:
    kept_tokens_are_what_and_where_they_were,
    forks_and_prompts_keep_what_they_had,
    what_cannot_be_dropped_is_refused,
);

/// Keys and values of some tokens of each layer, by position.
async fn read_each<E: Number>(sequence: &Sequence, positions: &[u32], layers: u32) -> Vec<(Vec<E>, Vec<E>)> {
    let mut all = Vec::new();
    for layer in 0..layers {
        for &at in positions {
            all.push(sequence.read::<E>(layer, at..at + 1).await.unwrap());
        }
    }
    all
}

/// Rows of these layers, one after the other, are the same, or have been sealed again in between. Keys of grouped formats then share their scales
/// with others.
fn assert_alike<E: Number>(
    rig: &Rig<E>,
    layers: Range<u32>,
    before: &[(Vec<E>, Vec<E>)],
    after: &[(Vec<E>, Vec<E>)],
) {
    assert_eq!(before.len(), after.len());
    let layout = &rig.layout;
    let of_layer = (before.len() / layers.len()).max(1);
    for (at, (before, after)) in before.iter().zip(after).enumerate() {
        let layer = layers.start as usize + at / of_layer;
        for (dim, plane, before, after) in [
            (layout.key_dim, Plane::Key, &before.0, &after.0),
            (layout.value_dim, Plane::Value, &before.1, &after.1),
        ] {
            let format = rig.format.of(layout, layer, plane);
            if plane == Plane::Key && format.is_grouped() {
                assert!(after.iter().all(|x| x.to_f32().is_finite()));
                continue;
            }
            for (before, after) in before.chunks(dim).zip(after.chunks(dim)) {
                let (mut row, mut same) = (before.to_vec(), before == after);
                for _ in 0..if format == Format::Raw { 0 } else { 3 } {
                    row = through(format, &row);
                    same |= row == after;
                }
                assert!(same, "{plane:?}\nbefore {before:?}\nafter  {after:?}");
            }
        }
    }
}

/// Scores of the caller's that keep every third token.
fn thirds(tokens: u32) -> Vec<f32> {
    (0..tokens).map(|at| if at % 3 == 2 { 1.0 } else { 0.0 }).collect()
}

async fn kept_tokens_are_what_and_where_they_were<E: Number>(rig: Rig<E>) {
    let all = 3 * rig.block() + 40;
    let (sequence, mut model) = rig.filled(all).await;
    rig.sealed(&sequence).await;
    let keep = all / 2;
    let places = (0..all).collect::<Vec<_>>();
    let before = read_each::<E>(&sequence, &places, rig.layers()).await;
    assert_eq!(sequence.drop_tokens(all, KeyScore::Norm).await, Ok(all), "there are no more");
    assert_eq!(sequence.drop_tokens(keep, thirds(all)).await, Ok(keep));
    let positions = sequence.positions();
    assert_eq!((sequence.len(), sequence.info().kept, positions.len() as u32), (all, keep, keep));
    let recent = (keep - 4).div_ceil(2).min(32);
    assert!(positions.iter().copied().take(4).eq(0..4) && positions.ends_with(&[all - 2, all - 1]));
    let chosen = &positions[4..(keep - recent) as usize];
    assert!(
        chosen.iter().filter(|at| *at % 3 == 2).count()
            >= chosen.len().min((all as usize / 3).saturating_sub(20))
    );

    let kept = |layer: u32| positions.iter().map(move |at| (layer * all + at) as usize);
    let expected: Vec<_> =
        (0..rig.layers()).flat_map(|layer| kept(layer).map(|at| before[at].clone())).collect();
    assert_alike(
        &rig,
        0..rig.layers(),
        &expected,
        &read_each::<E>(&sequence, &positions, rig.layers()).await,
    );
    // Views and tables say where the tokens stood.
    for layer in 0..rig.layers() {
        let view = sequence.view(layer).unwrap();
        assert_eq!(view.tokens(), keep);
        assert!(
            view.blocks()
                .flat_map(|block| block.positions().collect::<Vec<_>>())
                .eq(positions.iter().copied())
        );
        assert!(view.blocks().all(|block| Some(block.first_token()) == block.positions().next()));
        let seen = look::<E>(&rig.layout, &view);
        let heads = rig.layout.kv_heads;
        let keys = seen.keys.chunks(heads * rig.layout.key_dim).map(<[E]>::to_vec);
        let values = seen.values.chunks(heads * rig.layout.value_dim).map(<[E]>::to_vec);
        let seen: Vec<_> = keys.zip(values).collect();
        let first = (layer * keep) as usize;
        assert_alike(&rig, layer..layer + 1, &expected[first..first + keep as usize], &seen);
    }
    let table = rig.cache.block_table(&[&sequence], 0).unwrap();
    let row = &table.sequences[0];
    assert_eq!((row.tokens, &row.positions), (all, &positions));
    assert_eq!(row.blocks.len(), keep.div_ceil(rig.block()) as usize);
    for (block, tokens) in row.blocks.iter().zip(positions.chunks(rig.block() as usize)) {
        assert_eq!(block.first_token, tokens[0]);
    }
    drop(table);
    // A range with a gap in it is not there, and the error says where the gap is.
    let gap =
        positions.windows(2).find(|pair| pair[1] > pair[0] + 1).map(|pair| pair[0] + 1..pair[1]).unwrap();
    for range in [gap.clone(), gap.start - 1..gap.start + 1, 0..all] {
        let error = sequence.read::<E>(0, range.clone()).await.unwrap_err();
        assert_eq!(error, Error::TokensDropped { range, dropped: gap.clone() });
    }
    // It goes on where it was: by appends, by stages, across blocks.
    for tokens in [1, rig.block(), 3] {
        let new = rig.tokens(tokens);
        let at = Some(sequence.len());
        sequence.append_with(at, &new.ids, None, &new.keys, &new.values).await.unwrap();
        model.push(&new);
        let staged = rig.tokens(2);
        rig.stage_all(&sequence, &staged).await;
        let refused = sequence.drop_tokens(5, KeyScore::Diff).await;
        assert_eq!(refused, Err(Error::StagedTokens { staged: 2 }));
        sequence.commit(&staged.ids).await.unwrap();
        model.push(&staged);
        let (keys, values) = sequence.read::<E>(0, all..model.len()).await.unwrap();
        if !rig.format.keys.is_grouped() {
            model.compare(0, all..model.len(), &keys, &values, rig.format);
        }
    }
    assert_eq!((sequence.len(), sequence.info().kept), (model.len(), keep + model.len() - all));
    // Once more, of what is left and what is new; then down into what was thinned out, and on.
    let again = sequence.drop_tokens(keep, KeyScore::Diff).await.unwrap();
    let twice = sequence.positions();
    assert_eq!((again, twice.len() as u32, sequence.len()), (keep, keep, model.len()));
    assert!(twice.iter().all(|at| *at >= all || positions.contains(at)));
    let cut = twice[keep as usize / 2] + 1;
    sequence.truncate(cut).await.unwrap();
    assert_eq!((sequence.len(), sequence.positions()), (cut, twice[..=keep as usize / 2].to_vec()));
    let new = rig.tokens(rig.block() + 1);
    sequence.append_with(Some(cut), &new.ids, None, &new.keys, &new.values).await.unwrap();
    let left = twice[..=keep as usize / 2].iter().copied();
    assert!(sequence.positions().into_iter().eq(left.chain(cut..cut + rig.block() + 1)));
    sequence.truncate(0).await.unwrap();
    assert!(sequence.positions().is_empty());
    let mut model = rig.model();
    rig.append(&sequence, &mut model, rig.block() + 2).await;
    rig.check(&sequence, &model).await;
    drop(sequence);
    rig.finish().await;
}

async fn forks_and_prompts_keep_what_they_had<E: Number>(rig: Rig<E>) {
    let text = rig.text(4 * rig.block() + 30);
    let all = text.len() as u32;
    let (sequence, model) = rig.shared(&text).await;
    let fork = sequence.fork().await.unwrap();
    let view = sequence.view(0).unwrap();
    let before = look::<E>(&rig.layout, &view).stored;
    let keep = all / 3;
    sequence.drop_tokens(keep, KeyScore::Norm).await.unwrap();
    assert_eq!((sequence.info().kept, fork.info().kept), (keep, all));
    rig.check(&fork, &model).await;
    assert_eq!(look::<E>(&rig.layout, &view).stored, before, "a view shows what it showed");
    drop(view);
    // A fork of what is left shares it, until one of the two writes.
    let thin = sequence.fork().await.unwrap();
    let positions = sequence.positions();
    assert_eq!((thin.len(), thin.positions()), (all, positions.clone()));
    let kept = read_each::<E>(&sequence, &positions, rig.layers()).await;
    let new = rig.tokens(rig.block() + 1);
    sequence.append(&new.ids, &new.keys, &new.values).await.unwrap();
    thin.append(&new.ids[..1], &rig.tokens(1).keys, &rig.tokens(1).values).await.unwrap();
    assert_eq!((sequence.len(), thin.len()), (all + rig.block() + 1, all + 1));
    for sequence in [&sequence, &thin] {
        assert_alike(&rig, 0..rig.layers(), &kept, &read_each::<E>(sequence, &positions, rig.layers()).await);
    }
    // Prompts find what was computed before anything was dropped, and nothing that was copied or computed after.
    drop(fork);
    let mut longer = text.ids.clone();
    longer.extend(&new.ids);
    let found = rig.found(OpenOptions::default(), &longer).await;
    assert!(found <= all && found >= all / rig.block() * rig.block(), "{found} of {all}");
    drop((sequence, thin));
    rig.finish().await;
}

async fn what_cannot_be_dropped_is_refused<E: Number>(rig: Rig<E>) {
    let (sequence, model) = rig.filled(50).await;
    for scores in [0, 49, 51] {
        let refused = sequence.drop_tokens(10, vec![0.0; scores]).await;
        assert_eq!(refused, Err(Error::Scores { scores, tokens: 50 }));
    }
    let mut scores = vec![f32::INFINITY; 50];
    scores[7] = f32::NAN;
    assert_eq!(sequence.drop_tokens(10, scores).await, Err(Error::ScoreNotANumber { token: 7 }));
    let staged = rig.tokens(1);
    sequence.stage(0, staged.keys_of(0), staged.values_of(0)).await.unwrap();
    let refused = sequence.drop_tokens(10, KeyScore::Norm).await;
    assert_eq!(refused, Err(Error::StagedTokens { staged: 1 }));
    sequence.truncate(50).await.unwrap();
    rig.check(&sequence, &model).await;
    // In a batch, in order; too few are the sinks and the last one.
    let batch =
        BatchCacheOperations::new().drop_tokens(&sequence, 0, KeyScore::Norm).read(&sequence, 0, 0..5);
    let results = rig.cache.submit(batch).await.unwrap();
    assert!(matches!(results[0], Ok(Outcome::Dropped { kept: 5 })), "{results:?}");
    assert_eq!(*results[1].as_ref().unwrap_err(), Error::TokensDropped { range: 0..5, dropped: 4..49 });
    assert_eq!(sequence.positions(), [0, 1, 2, 3, 49]);
    let id = sequence.id();
    sequence.close().await.unwrap();
    let batch = BatchCacheOperations::new().drop_tokens(id, 0, KeyScore::Norm);
    let results = rig.cache.submit(batch).await.unwrap();
    assert_eq!(*results[0].as_ref().unwrap_err(), Error::ClosedSequence(id));
    rig.finish().await;
}

/// A cache that drops tokens by itself: prompts are at their ratio when they are in, and sequences stay near it as they grow.
#[tokio::test]
async fn a_cache_drops_tokens_by_itself() {
    for (setup, method) in
        [(0, CompressionMethod::KeyNorm), (1, CompressionMethod::KeyDiff), (2, CompressionMethod::KeyDiff)]
    {
        for format in [Format::Raw, Format::Int8] {
            let geometry = geometry((8, 2, 2, 16, 8), ElementType::F16);
            let combo = Combo { setup: &SETUPS[setup], format: format.into(), geometry };
            let Some(builder) = combo.builder() else { continue };
            let compression = Compression { enabled: true, ratio: 0.5, method };
            let rig = Rig::<half::f16>::new(&combo, builder.compression(compression)).await;
            let (sequence, mut model) = rig.filled(200).await;
            // A whole number of blocks went.
            assert_eq!((sequence.len(), sequence.info().kept), (200, 104));
            let fork = sequence.fork().await.unwrap();
            let kept = sequence.positions();
            for at in 0..150 {
                let new = rig.tokens(1);
                match at % 3 {
                    0 => {
                        rig.stage_all(&sequence, &new).await;
                        sequence.commit(&new.ids).await.unwrap();
                    }
                    1 => drop(sequence.append(&new.ids, &new.keys, &new.values).await.unwrap()),
                    _ => {
                        let batch = BatchCacheOperations::new();
                        let batch = batch.append_each(&[&sequence], &new.ids, &new.keys, &new.values);
                        let results = rig.cache.submit(batch).await.unwrap();
                        let expected = 201 + at;
                        assert!(
                            matches!(results[0], Ok(Outcome::Appended { committed }) if committed == expected)
                        );
                    }
                }
                model.push(&new);
                let most = f64::from(model.len()) * 0.5 * 1.25 + 16.0;
                assert!(f64::from(sequence.info().kept) <= most, "{:?}", sequence.info());
                // What is newest is there, whatever was dropped.
                let last = model.len() - 5..model.len();
                let (keys, values) = sequence.read::<half::f16>(1, last.clone()).await.unwrap();
                model.compare(1, last, &keys, &values, format);
            }
            assert_eq!((sequence.len(), fork.len(), fork.positions()), (350, 200, kept));
            assert!(rig.stats().await.total.tokens_dropped > 100);
            drop((sequence, fork));
            rig.finish().await;
        }
    }
}

/// Without room for what stays nothing is dropped, and what was written is there.
#[tokio::test]
async fn dropping_needs_room() {
    let combo = Combo {
        setup: &SETUPS[0],
        format: BlockFormat::RAW,
        geometry: geometry((8, 1, 1, 16, 16), ElementType::F32),
    };
    let Some(builder) = combo.builder() else { return };
    let rig = Rig::<f32>::new(&combo, builder).await;
    let free = rig.cache.stats().total.blocks_free as u32;
    let (sequence, model) = rig.filled((free - 3) * 8).await;
    let refused = sequence.drop_tokens(5 * 8, KeyScore::Diff).await;
    assert_eq!(refused, Err(Error::Capacity { needed: 5, free: 3, evictable: 0 }));
    rig.check(&sequence, &model).await;
    assert_eq!(sequence.drop_tokens(3 * 8, KeyScore::Diff).await, Ok(3 * 8));
    drop(sequence);
    rig.finish().await;
}

/// Truncation goes without it, and says so.
#[tokio::test]
async fn a_cache_that_truncates_drops_nothing_by_scores() {
    let combo = Combo {
        setup: &SETUPS[0],
        format: BlockFormat::RAW,
        geometry: geometry((8, 1, 1, 16, 16), ElementType::F32),
    };
    let Some(builder) = combo.builder() else { return };
    let compression = Compression { enabled: true, ratio: 0.5, method: CompressionMethod::Truncation };
    let rig = Rig::<f32>::new(&combo, builder.compression(compression)).await;
    let (sequence, _) = rig.filled(40).await;
    let refused = sequence.drop_tokens(10, KeyScore::Norm).await;
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    assert_eq!((sequence.info().kept, sequence.positions().len()), (20, 20));
    drop(sequence);
    rig.finish().await;
}
