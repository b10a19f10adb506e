//! Decode steps: a token for each of many sequences as one call.

use kv_cache::*;

use crate::common::{Model, Number, Rig, combos};

crate::conformance!(combos:
    a_step_appends_a_token_to_each_sequence,
    a_step_stages_a_token_for_each_sequence,
    a_row_fails_alone,
    a_step_that_is_wrong_as_a_whole_fails_every_row,
    a_batch_never_overtakes_what_was_submitted_before,
);

const SEQUENCES: usize = 18;

/// Sequences of different lengths, one of them empty and one of a whole block.
async fn sequences<E: Number>(rig: &Rig<E>) -> (Vec<Sequence>, Vec<Model<E>>) {
    let (mut sequences, mut models) = (Vec::new(), Vec::new());
    for at in 0..SEQUENCES as u32 {
        let (sequence, model) = rig.filled(at % (rig.block() + 1)).await;
        sequences.push(sequence);
        models.push(model);
    }
    (sequences, models)
}

async fn a_step_appends_a_token_to_each_sequence<E: Number>(rig: Rig<E>) {
    let (sequences, mut models) = sequences(&rig).await;
    let all: Vec<&Sequence> = sequences.iter().collect();
    for round in 0..rig.block() + 3 {
        let step = rig.tokens(SEQUENCES as u32);
        let batch = if round.is_multiple_of(2) {
            BatchCacheOperations::new().append_each(&all, &step.ids, &step.keys, &step.values)
        } else {
            let mut batch = rig.cache.batch(2 * size_of_val(&*step.keys) + 2 * size_of_val(&*step.values));
            let (keys, values) =
                (batch.region(step.keys.len()).unwrap(), batch.region(step.values.len()).unwrap());
            batch.fill(&keys).copy_from_slice(&step.keys);
            batch.fill(&values).copy_from_slice(&step.values);
            batch.append_each_region(&all, &step.ids, &keys, &values)
        };
        assert_eq!(batch.len(), SEQUENCES);
        let results = rig.cache.submit(batch).await.unwrap();
        assert_eq!(results.len(), SEQUENCES);
        for (at, (result, model)) in results.into_iter().zip(&mut models).enumerate() {
            model.push(&step.token(at));
            let Ok(Outcome::Appended { committed }) = result else { panic!("{result:?}") };
            assert_eq!(committed, model.len());
        }
    }
    for (sequence, model) in sequences.iter().zip(&models) {
        rig.check(sequence, model).await;
    }
    drop(sequences);
    rig.finish().await;
}

async fn a_step_stages_a_token_for_each_sequence<E: Number>(rig: Rig<E>) {
    let (sequences, mut models) = sequences(&rig).await;
    let all: Vec<&Sequence> = sequences.iter().collect();
    for _ in 0..3 {
        let step = rig.tokens(SEQUENCES as u32);
        for layer in 0..rig.layers() {
            let batch = BatchCacheOperations::new().stage_each(
                &all,
                layer,
                step.keys_of(layer),
                step.values_of(layer),
            );
            for (result, model) in rig.cache.submit(batch).await.unwrap().into_iter().zip(&models) {
                let Ok(Outcome::Staged { staged }) = result else { panic!("{result:?}") };
                assert_eq!(staged, model.len() + 1);
            }
        }
        let commit = all
            .iter()
            .zip(&step.ids)
            .fold(BatchCacheOperations::new(), |batch, (sequence, id)| batch.commit(*sequence, &[*id]));
        assert!(rig.cache.submit(commit).await.unwrap().iter().all(Result::is_ok));
        models.iter_mut().enumerate().for_each(|(at, model)| model.push(&step.token(at)));
    }
    for (sequence, model) in sequences.iter().zip(&models) {
        rig.check(sequence, model).await;
    }
    drop(sequences);
    rig.finish().await;
}

async fn a_row_fails_alone<E: Number>(rig: Rig<E>) {
    let (mut sequences, mut models) = sequences(&rig).await;
    let (closed, foreign) =
        (sequences.pop().unwrap(), rig.cache.open("another", OpenOptions::default()).await.unwrap());
    rig.cache.submit(BatchCacheOperations::new().close(&closed)).await.unwrap().remove(0).unwrap();
    // The first one twice: its second token comes behind the first.
    let mut all: Vec<&Sequence> = sequences.iter().collect();
    all.extend([&closed, &foreign, &sequences[0]]);
    let mut step = rig.tokens(all.len() as u32);
    // In the last layer of row 3: `[layers, rows, kv_heads, key_dim]`.
    let token = rig.layout.kv_heads * rig.layout.key_dim;
    let last_layer = step.keys.len() - all.len() * token;
    step.keys[last_layer + 4 * token - 1] = E::INFINITY;
    let batch = BatchCacheOperations::new()
        .only_tenant("tenant")
        .truncate(&sequences[1], 1 << 30)
        .append_each(&all, &step.ids, &step.keys, &step.values)
        .read(&sequences[2], 0, 0..models[2].len() + 1);
    let mut results = rig.cache.submit(batch).await.unwrap();
    assert_eq!(results.len(), all.len() + 2);
    assert!(matches!(results.remove(0), Err(Error::TokenRange { .. })));
    let read = results.pop().unwrap();
    let last = results.pop().unwrap();
    let foreign_result = results.pop().unwrap();
    let closed_result = results.pop().unwrap();
    for (at, result) in results.into_iter().enumerate() {
        if at == 3 {
            assert_eq!(result.unwrap_err(), Error::NotFinite);
            continue;
        }
        models[at].push(&step.token(at));
        let Ok(Outcome::Appended { committed }) = result else { panic!("row {at}: {result:?}") };
        assert_eq!(committed, models[at].len(), "row {at}");
    }
    assert_eq!(closed_result.unwrap_err(), Error::ClosedSequence(closed.id()));
    assert_eq!(foreign_result.unwrap_err(), Error::TenantMismatch(foreign.id()));
    models[0].push(&step.token(all.len() - 1));
    assert!(matches!(last, Ok(Outcome::Appended { committed }) if committed == models[0].len()), "{last:?}");
    let Ok(Outcome::Read(read)) = read else { panic!("{read:?}") };
    let (keys, values) = read.into_elements::<E>().unwrap();
    models[2].compare(0, 0..models[2].len(), &keys, &values, rig.format);
    for (sequence, model) in sequences.iter().zip(&models) {
        rig.check(sequence, model).await;
    }
    assert_eq!(foreign.len(), 0);
    drop((sequences, closed, foreign));
    rig.finish().await;
}

async fn a_step_that_is_wrong_as_a_whole_fails_every_row<E: Number>(rig: Rig<E>) {
    let (sequences, models) = sequences(&rig).await;
    let all: Vec<&Sequence> = sequences.iter().collect();
    let step = rig.tokens(SEQUENCES as u32);
    let layers = rig.layers();
    let batch = BatchCacheOperations::new()
        .append_each(&all, &step.ids[1..], &step.keys, &step.values)
        .append_each(&all, &step.ids, &step.keys[1..], &step.values)
        .stage_each(&all, layers, step.keys_of(0), step.values_of(0))
        .append_each(&[], &[], &[] as &[E], &[])
        .append_each(&[], &[1], &[] as &[E], &[]);
    let results = rig.cache.submit(batch).await.unwrap();
    assert_eq!(results.len(), 3 * SEQUENCES);
    for (at, result) in results.into_iter().enumerate() {
        let error = result.unwrap_err();
        match at / SEQUENCES {
            0 => assert_eq!(error, Error::EachTokens { tokens: SEQUENCES - 1, sequences: SEQUENCES }),
            1 => assert!(matches!(error, Error::Shape { .. }), "{error:?}"),
            _ => assert_eq!(error, Error::Layer { layer: layers, layers }),
        }
    }
    for (sequence, model) in sequences.iter().zip(&models) {
        rig.check(sequence, model).await;
    }
    drop(sequences);
    rig.finish().await;
}

/// Large batches may take a shorter way: only when nothing that came before is still under way to the shards.
async fn a_batch_never_overtakes_what_was_submitted_before<E: Number>(rig: Rig<E>) {
    let (sequences, mut models) = sequences(&rig).await;
    for _ in 0..4 {
        let mut singles = Vec::new();
        for (sequence, model) in sequences.iter().zip(&mut models) {
            let one = rig.tokens(1);
            let single = BatchCacheOperations::new().append(sequence, &one.ids, &one.keys, &one.values);
            singles.push(rig.cache.try_submit(single).map_err(|(_, error)| error).unwrap());
            model.push(&one);
        }
        let mut batch = BatchCacheOperations::new();
        for (sequence, model) in sequences.iter().zip(&mut models) {
            let next = rig.tokens(1);
            batch = batch.append_at(sequence, model.len(), &next.ids, None, &next.keys, &next.values);
            model.push(&next);
        }
        let results = rig.cache.submit(batch).await.unwrap();
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        for single in singles {
            assert!(single.await.unwrap().iter().all(Result::is_ok));
        }
    }
    for (sequence, model) in sequences.iter().zip(&models) {
        rig.check(sequence, model).await;
    }
    drop(sequences);
    rig.finish().await;
}
