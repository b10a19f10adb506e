//! What a cache refuses, with the numbers that it gives; and that nothing else changes.

#[path = "../common/mod.rs"]
mod common;

mod building;

use std::task::{Context, Waker};
use std::time::Duration;

use common::{
    Combo, ELEMENTS, FORMATS, Model, Number, Rig, SETUPS, Tokens, fitting, geometry, shaped, whole_case,
};
use kv_cache::half::{bf16, f16};
use kv_cache::*;

/// A small cache: blocks of 5 tokens (32 where the format asks for that), 2 layers of 2 heads, keys of 8 and values of 6 elements.
fn small(element: ElementType, format: impl Into<BlockFormat>) -> Combo {
    let format = fitting(format.into(), 2);
    Combo { setup: &SETUPS[0], format, geometry: shaped(format, (5, 2, 2, 8, 6), element) }
}

async fn rig<E: Number>(change: impl FnOnce(CacheBuilder) -> CacheBuilder) -> Rig<E> {
    let combo = small(E::TYPE, Format::Int8);
    Rig::new(&combo, change(combo.builder().unwrap())).await
}

/// Runs `$body` with `E` as every element type, in every format, with a sequence that must not change.
macro_rules! on_every_element {
    ($name:ident) => {
        #[tokio::test]
        async fn $name() {
            for format in FORMATS {
                for element in ELEMENTS {
                    let combo = small(element, format);
                    println!("on {combo}");
                    let builder = combo.builder().unwrap();
                    let case = async {
                        match element {
                            ElementType::F16 => each::$name(Rig::<f16>::new(&combo, builder).await).await,
                            ElementType::Bf16 => each::$name(Rig::<bf16>::new(&combo, builder).await).await,
                            ElementType::F32 => each::$name(Rig::<f32>::new(&combo, builder).await).await,
                        }
                    };
                    whole_case(stringify!($name), case).await;
                }
            }
        }
    };
}

on_every_element!(values_that_are_not_finite);
on_every_element!(wrong_shapes);
on_every_element!(wrong_element_types);
on_every_element!(layers_and_ranges_that_do_not_exist);

mod each {
    use super::*;

    pub(super) async fn values_that_are_not_finite<E: Number>(rig: Rig<E>) {
        let (sequence, mut model) = rig.filled(rig.layout.block_tokens as u32 + 2).await;
        let (bystander, mut other) = rig.filled(1).await;
        let negative = E::from_f32(-1.0);
        assert!(E::INFINITY.to_f32() > 0.0 && negative.to_f32() < 0.0);
        let minus_infinity = E::from_f32(f32::NEG_INFINITY);
        for bad in [E::NAN, E::INFINITY, minus_infinity] {
            for tokens in [1, 5, 11] {
                for (in_keys, at_end) in [(true, false), (true, true), (false, false), (false, true)] {
                    let mut new = rig.tokens(tokens);
                    let plane = if in_keys { &mut new.keys } else { &mut new.values };
                    let at = if at_end { plane.len() - 1 } else { 0 };
                    plane[at] = bad;
                    let before = sequence.info();
                    let fine = rig.tokens(1);
                    let batch = BatchCacheOperations::new()
                        .append(&sequence, &new.ids, &new.keys, &new.values)
                        .append(&bystander, &fine.ids, &fine.keys, &fine.values);
                    let results = rig.cache.submit(batch).await.unwrap();
                    assert_eq!(results[0].as_ref().unwrap_err(), &Error::NotFinite);
                    assert!(results[1].is_ok());
                    other.push(&fine);
                    let layer = if at_end { 1 } else { 0 };
                    let staged = sequence.stage(layer, new.keys_of(layer), new.values_of(layer)).await;
                    assert_eq!(staged, Err(Error::NotFinite));
                    let after = sequence.info();
                    assert_eq!((after.committed, &after.staged), (before.committed, &before.staged));
                    assert_eq!(after.raw_blocks + after.sealed_blocks, 2, "no block was taken");
                    rig.check(&sequence, &model).await;
                }
            }
        }
        rig.append(&sequence, &mut model, 6).await;
        rig.check(&sequence, &model).await;
        rig.check(&bystander, &other).await;
        let stats = rig.stats().await;
        let not_finite = stats.errors.iter().find(|(kind, _)| *kind == ErrorKind::NotFinite);
        assert_eq!(not_finite, Some(&(ErrorKind::NotFinite, 3 * 3 * 4 * 2)));
        drop((sequence, bystander));
        rig.finish().await;
    }

    pub(super) async fn wrong_shapes<E: Number>(rig: Rig<E>) {
        let (sequence, model) = rig.filled(rig.layout.block_tokens as u32 + 2).await;
        let bytes = rig.layout.element.bytes();
        let new = rig.tokens(3);
        let (keys, values) = (new.keys.len() * bytes, new.values.len() * bytes);
        let shape =
            |plane, bytes, expected_bytes, shape| Err(Error::Shape { plane, bytes, expected_bytes, shape });
        let short = sequence.append(&new.ids, &new.keys[1..], &new.values).await;
        assert_eq!(short, shape(Plane::Key, keys - bytes, keys, [2, 3, 2, 8]));
        let short = sequence.append(&new.ids, &new.keys, &new.values[1..]).await;
        assert_eq!(short, shape(Plane::Value, values - bytes, values, [2, 3, 2, 6]));
        let one_token_less = sequence.append(&new.ids[1..], &new.keys, &new.values).await;
        assert_eq!(one_token_less, shape(Plane::Key, keys, keys / 3 * 2, [2, 2, 2, 8]));
        let swapped = sequence.append(&new.ids, &new.values, &new.keys).await;
        assert_eq!(swapped, shape(Plane::Key, values, keys, [2, 3, 2, 8]));
        let empty = sequence.append::<E>(&new.ids, &[], &[]).await;
        assert_eq!(empty, shape(Plane::Key, 0, keys, [2, 3, 2, 8]));
        assert_eq!(sequence.append::<E>(&[], &[], &[]).await, Err(Error::Empty));
        assert_eq!(sequence.append(&[], &new.keys, &new.values).await, Err(Error::Empty));
        assert_eq!(sequence.stage::<E>(0, &[], &[]).await, Err(Error::Empty));
        // All layers where one is expected; and a part of a token.
        let (one, two) = (new.values_of(0), &new.values);
        let all_layers = sequence.stage(0, new.keys_of(0), two).await;
        assert_eq!(all_layers, shape(Plane::Value, values, values / 2, [1, 3, 2, 6]));
        let part = sequence.stage(0, &new.keys_of(0)[1..], one).await;
        assert_eq!(part, shape(Plane::Key, keys / 2 - bytes, keys / 2, [1, 3, 2, 8]));
        let batch = BatchCacheOperations::new().stage(&sequence, 0, u32::MAX, new.keys_of(0), one);
        let results = rig.cache.submit(batch).await.unwrap();
        let expected_bytes = u32::MAX as usize * 2 * 8 * bytes;
        let absurd = shape(Plane::Key, keys / 2, expected_bytes, [1, u32::MAX as usize, 2, 8]);
        assert_eq!(results[0].as_ref().err(), absurd.as_ref().err().map(|e: &Error| e));
        let _: Result<u32, Error> = absurd;
        assert_eq!(sequence.info().staged, Vec::<u32>::new());
        rig.check(&sequence, &model).await;
        drop(sequence);
        rig.finish().await;
    }

    pub(super) async fn wrong_element_types<E: Number>(rig: Rig<E>) {
        let (sequence, model) = rig.filled(rig.layout.block_tokens as u32 + 2).await;
        async fn refused<Wrong: Number>(rig: &Rig<impl Number>, sequence: &Sequence) {
            let given = Wrong::TYPE;
            let expected = rig.layout.element;
            if given == expected {
                return;
            }
            let error = Error::ElementType { given, expected };
            let new = Tokens::<Wrong>::generate(rig.layout, 2, 7);
            let appended = sequence.append(&new.ids, &new.keys, &new.values).await;
            assert_eq!(appended, Err(error.clone()));
            assert_eq!(sequence.stage(0, new.keys_of(0), new.values_of(0)).await, Err(error.clone()));
            assert_eq!(sequence.read::<Wrong>(0, 0..1).await, Err(error.clone()));
            let batch = BatchCacheOperations::new().read(sequence, 0, 0..1);
            let Ok(Outcome::Read(read)) = rig.cache.submit(batch).await.unwrap().remove(0) else { panic!() };
            assert_eq!(read.into_elements::<Wrong>().unwrap_err(), error);
            let view = sequence.view(0).unwrap();
            for block in view.blocks() {
                assert_eq!(block.keys::<Wrong>(0).unwrap_err(), error);
                assert_eq!(block.values::<Wrong>(0).unwrap_err(), error);
            }
        }
        refused::<f16>(&rig, &sequence).await;
        refused::<bf16>(&rig, &sequence).await;
        refused::<f32>(&rig, &sequence).await;
        rig.check(&sequence, &model).await;
        drop(sequence);
        rig.finish().await;
    }

    pub(super) async fn layers_and_ranges_that_do_not_exist<E: Number>(rig: Rig<E>) {
        let (sequence, model) = rig.filled(rig.layout.block_tokens as u32 + 2).await;
        let new = rig.tokens(1);
        for layer in [2, 3, u32::MAX] {
            let error = Error::Layer { layer, layers: 2 };
            assert_eq!(sequence.read::<E>(layer, 0..1).await, Err(error.clone()));
            assert_eq!(sequence.stage(layer, new.keys_of(0), new.values_of(0)).await, Err(error.clone()));
            assert_eq!(sequence.view(layer).unwrap_err(), error);
            assert_eq!(rig.cache.block_table(&[&sequence], layer).unwrap_err(), error);
        }
        let visible = rig.layout.block_tokens as u32 + 2;
        let past = visible + 1;
        #[allow(clippy::reversed_empty_ranges)]
        for range in [0..past, visible..past, past..past, 5..2, 1000..1001] {
            let error = sequence.read::<E>(1, range.clone()).await.unwrap_err();
            match error {
                Error::TokenRange { range: told, visible: told_visible } if range.start <= range.end => {
                    assert_eq!((told, told_visible), (range, visible));
                }
                // Seen to be wrong before anybody looks at the sequence.
                Error::TokenRange { range: told, .. } => assert_eq!(told, range),
                other => panic!("{range:?}: {other:?}"),
            }
        }
        assert_eq!(sequence.read::<E>(1, visible..visible).await.unwrap(), (vec![], vec![]));
        rig.check(&sequence, &model).await;
        drop(sequence);
        rig.finish().await;
    }
}

/// Numbers as large as they come: typed errors, no panic, and no memory to go with them.
#[tokio::test]
async fn absurd_numbers() {
    let case = async {
        for max_tokens in [100, u32::MAX] {
            let rig = rig::<f16>(|b| b.max_tokens(max_tokens)).await;
            let (sequence, model) = rig.filled(7).await;
            for range in [0..u32::MAX, u32::MAX..u32::MAX, 3..u32::MAX - 1, u32::MAX - 1..u32::MAX] {
                let error = sequence.read::<f16>(0, range.clone()).await.unwrap_err();
                match error {
                    Error::TokenRange { range: told, visible } => {
                        assert!(told == range && visible <= max_tokens)
                    }
                    // So many bytes could never be in flight.
                    Error::BatchTooLarge { bytes, bytes_max, .. } => {
                        assert!(bytes > bytes_max && bytes == range.len() as u64 * 2 * 14 * 2);
                    }
                    other => panic!("{range:?}: {other:?}"),
                }
            }
            let error = sequence.fork_many(u32::MAX).await.unwrap_err();
            let (needed, max_sequences) = (u32::MAX as usize, rig.cache.config().max_sequences);
            assert_eq!(error, Error::TooManySequences { needed, max_sequences });
            assert_eq!(sequence.fork_many(0).await.unwrap_err(), Error::Empty);
            let batch = (0..3).fold(BatchCacheOperations::new(), |batch, _| batch.fork(&sequence, u32::MAX));
            for result in rig.cache.submit(batch).await.unwrap() {
                assert_eq!(result.unwrap_err(), Error::TooManySequences { needed, max_sequences });
            }
            let refused = sequence.truncate(u32::MAX).await;
            assert_eq!(refused, Err(Error::TokenRange { range: 0..u32::MAX, visible: 7 }));
            let many = OpenOptions::default().reserve_tokens(u32::MAX);
            let error = rig.cache.open("tenant", many).await.unwrap_err();
            match error {
                Error::SequenceTooLong { tokens, max_tokens: 100 } => assert_eq!(tokens, u64::from(u32::MAX)),
                Error::Capacity { needed, .. } => assert_eq!(needed, u32::MAX.div_ceil(5)),
                other => panic!("{other:?}"),
            }
            assert!(!rig.cache.can_admit(u32::MAX) && rig.cache.can_admit(0));
            let (number, wrong) = (SequenceId::from_u64(u64::MAX), rig.tokens(1));
            let batch = BatchCacheOperations::new()
                .append_at(&sequence, u32::MAX, &wrong.ids, None, &wrong.keys, &wrong.values)
                .append(number, &wrong.ids, &wrong.keys, &wrong.values)
                .read(number, 0, 0..u32::MAX)
                .reserve_bytes(0);
            let results = rig.cache.submit(batch).await.unwrap();
            let position = Error::Position { expected: u32::MAX, actual: 7 };
            assert_eq!(results[0].as_ref().unwrap_err(), &position);
            assert_eq!(results[1].as_ref().unwrap_err(), &Error::UnknownSequence(number));
            match &results[2] {
                Err(Error::TokenRange { .. }) => {}
                Err(Error::BatchTooLarge { jobs: 1, .. }) => assert_eq!(max_tokens, u32::MAX),
                other => panic!("{other:?}"),
            }
            rig.check(&sequence, &model).await;
            drop(sequence);
            rig.finish().await;
        }
    };
    whole_case("absurd numbers", case).await;
}

#[tokio::test]
async fn sequences_that_are_too_long() {
    let rig = rig::<f32>(|b| b.max_tokens(12)).await;
    let (sequence, mut model) = rig.filled(9).await;
    let new = rig.tokens(4);
    let error = Error::SequenceTooLong { tokens: 13, max_tokens: 12 };
    assert_eq!(sequence.append(&new.ids, &new.keys, &new.values).await, Err(error.clone()));
    assert_eq!(sequence.stage(1, new.keys_of(1), new.values_of(1)).await, Err(error.clone()));
    // Just up to the limit, and staged tokens count.
    let three = rig.tokens(3);
    sequence.stage(1, three.keys_of(1), three.values_of(1)).await.unwrap();
    let one = rig.tokens(1);
    assert_eq!(sequence.stage(1, one.keys_of(1), one.values_of(1)).await, Err(error));
    sequence.truncate(9).await.unwrap();
    rig.append(&sequence, &mut model, 3).await;
    rig.check(&sequence, &model).await;
    let reserve = OpenOptions::default().reserve_tokens(13);
    let refused = rig.cache.open("tenant", reserve).await.unwrap_err();
    assert_eq!(refused, Error::SequenceTooLong { tokens: 13, max_tokens: 12 });
    assert!(rig.cache.can_admit(12) && !rig.cache.can_admit(13));
    drop(sequence);
    whole_case("finishing", rig.finish()).await;
}

#[tokio::test]
async fn prompts_that_make_no_sense() {
    let rig = rig::<f32>(|b| b.max_tokens(12)).await;
    let options = OpenOptions::default;
    let open = |options: OpenOptions| rig.cache.open("tenant", options);
    let error = Error::SequenceTooLong { tokens: 13, max_tokens: 12 };
    let text = rig.text(13);
    assert_eq!(open(options().prompt(&text.ids)).await.unwrap_err(), error);
    assert_eq!(open(options().prompt(&text.ids[..3]).reserve_tokens(13)).await.unwrap_err(), error);
    // In a batch it fails alone.
    let batch = BatchCacheOperations::new()
        .open("tenant", options().prompt(&text.ids))
        .open("tenant", options().prompt(&text.ids[..12]));
    let results = rig.cache.submit(batch).await.unwrap();
    assert_eq!(results[0].as_ref().unwrap_err(), &error);
    assert!(matches!(&results[1], Ok(Outcome::Opened(sequence)) if sequence.is_empty()));
    drop(results);
    // As long as a sequence may be, and what it finds counts.
    let twelve = text.slice(0..12);
    let (first, _) = rig.shared(&twelve).await;
    let (second, mut model) = rig.prompted(&twelve).await;
    assert_eq!((second.len(), rig.cache.stats().tokens), (10, 22));
    let three = rig.tokens(3);
    assert_eq!(second.append(&three.ids, &three.keys, &three.values).await, Err(error));
    rig.go_on(&second, &mut model, &twelve, 12).await;
    rig.check(&second, &model).await;
    // No prompt at all, no name, and extra identity where there are no tokens, or twice.
    assert_eq!(open(options().prompt(&[])).await.unwrap().len(), 0);
    assert_eq!(open(options().prompt(&twelve.ids).shared_domain("").adapter("")).await.unwrap().len(), 0);
    let extra = |positions| Prompt::new(&twelve.ids).extra_at(positions, ExtraIdentity([1; 32]));
    let reversed = std::ops::Range { start: 9, end: 5 };
    for (positions, found) in [(12..u32::MAX, 10), (u32::MAX..u32::MAX, 10), (reversed, 10), (5..u32::MAX, 5)]
    {
        let sequence = open(options().prompt(extra(positions.clone()))).await.unwrap();
        assert_eq!(sequence.len(), found, "{positions:?}");
    }
    let twice = extra(0..5).extra_at(0..5, ExtraIdentity([2; 32]));
    assert_eq!(open(options().prompt(twice)).await.unwrap().len(), 0);
    drop((first, second));
    // Giving up what there is not.
    for what in [Invalidate::Adapter(String::new()), Invalidate::Domain("nobody's".into())] {
        assert_eq!(rig.cache.invalidate(what).await.unwrap(), 0);
    }
    whole_case("finishing", rig.finish()).await;
}

#[tokio::test]
async fn what_is_found_counts_among_all_tokens() {
    let rig = rig::<f32>(|b| b.configure(|c| c.max_total_tokens = 20)).await;
    let text = rig.text(11);
    let (first, _) = rig.shared(&text).await;
    let error = Error::TooManyTokens { tokens: 21, max_total_tokens: 20 };
    let refused = rig.cache.open("tenant", OpenOptions::default().prompt(&text.ids)).await.unwrap_err();
    assert_eq!(refused, error);
    // It holds nothing of what it had found, and has no right to be open.
    first.close().await.unwrap();
    let stats = rig.stats().await;
    assert_eq!((stats.total.blocks_cached, stats.tokens, stats.sequences_open), (2, 0, 0));
    let (again, model) = rig.prompted(&text).await;
    assert_eq!(again.len(), 10);
    rig.check(&again, &model).await;
    drop(again);
    whole_case("finishing", rig.finish()).await;
}

#[tokio::test]
async fn too_many_tokens_in_all() {
    let rig = rig::<f32>(|b| b.configure(|c| c.max_total_tokens = 20)).await;
    let (a, mut model) = rig.filled(8).await;
    let b = a.fork().await.unwrap();
    assert_eq!(rig.cache.stats().tokens, 16);
    let error = |tokens| Error::TooManyTokens { tokens, max_total_tokens: 20 };
    let five = rig.tokens(5);
    assert_eq!(a.append(&five.ids, &five.keys, &five.values).await, Err(error(21)));
    assert_eq!(a.stage(0, five.keys_of(0), five.values_of(0)).await, Err(error(21)));
    assert_eq!(a.fork().await.unwrap_err(), error(24));
    assert_eq!(a.fork_many(1000).await.unwrap_err(), error(16 + 8000));
    assert!(rig.cache.can_admit(4) && !rig.cache.can_admit(5));
    // Two sequences stage what only one of them can commit.
    let three = rig.tokens(3);
    rig.stage_all(&a, &three).await;
    rig.stage_all(&b, &three).await;
    a.commit(&three.ids).await.unwrap();
    model.push(&three);
    assert_eq!(b.commit(&three.ids).await, Err(error(22)));
    assert_eq!(b.commit(&three.ids[..1]).await, Ok(9));
    assert_eq!(rig.cache.stats().tokens, 20);
    rig.check(&a, &model).await;
    // What is cut off is free for others.
    b.truncate(2).await.unwrap();
    assert_eq!(rig.cache.stats().tokens, 13);
    rig.append(&a, &mut model, 7).await;
    rig.check(&a, &model).await;
    drop((a, b));
    whole_case("finishing", rig.finish()).await;
}

#[tokio::test]
async fn too_many_sequences() {
    let rig = rig::<f32>(|b| b.max_sequences(3)).await;
    let error = |needed| Error::TooManySequences { needed, max_sequences: 3 };
    let (a, b) = (rig.open().await, rig.open().await);
    assert_eq!(a.fork_many(2).await.unwrap_err(), error(2));
    let two = || BatchCacheOperations::new().open("tenant", OpenOptions::default()).fork(&a, 1);
    assert_eq!(rig.cache.submit(two()).await.unwrap_err(), error(2));
    let (back, reason) = rig.cache.try_submit(two()).err().unwrap();
    assert_eq!((back.len(), reason), (2, error(2)));
    let c = a.fork().await.unwrap();
    assert_eq!(rig.cache.open("tenant", OpenOptions::default()).await.unwrap_err(), error(1));
    // An open that fails does not use up the right to be open.
    b.close().await.unwrap();
    for _ in 0..5 {
        let reserve = OpenOptions::default().reserve_tokens(1 << 20);
        assert!(matches!(rig.cache.open("tenant", reserve).await, Err(Error::Capacity { .. })));
        let nobody = BatchCacheOperations::new().fork(SequenceId::from_u64(77 << 28), 1);
        assert!(rig.cache.submit(nobody).await.unwrap()[0].is_err());
    }
    let d = rig.open().await;
    assert_eq!(rig.cache.open("tenant", OpenOptions::default()).await.unwrap_err(), error(1));
    drop((a, c, d, back));
    whole_case("finishing", rig.finish()).await;
}

#[tokio::test]
async fn batches_larger_than_the_permits() {
    let rig = rig::<f32>(|b| b.max_in_flight(4, 1000)).await;
    let (sequence, model) = rig.filled(1).await;
    let five = || (0..5).fold(BatchCacheOperations::new(), |batch, _| batch.read(&sequence, 0, 0..1));
    // A token of one layer is 2 heads of 8 and 6 elements of 4 bytes.
    let jobs = Error::BatchTooLarge { jobs: 5, bytes: 5 * 112, jobs_max: 4, bytes_max: 1000 };
    assert_eq!(rig.cache.submit(five()).await.unwrap_err(), jobs);
    let (back, reason) = rig.cache.try_submit(five()).err().unwrap();
    assert_eq!((back.len(), reason), (5, jobs));
    let new = rig.tokens(5);
    let bytes = Error::BatchTooLarge { jobs: 1, bytes: 5 * 224, jobs_max: 4, bytes_max: 1000 };
    assert_eq!(sequence.append(&new.ids, &new.keys, &new.values).await, Err(bytes));
    let read = Error::BatchTooLarge { jobs: 1, bytes: 9 * 112, jobs_max: 4, bytes_max: 1000 };
    assert_eq!(sequence.read::<f32>(0, 0..9).await, Err(read));
    rig.check(&sequence, &model).await;
    drop(sequence);
    whole_case("finishing", rig.finish()).await;
}

/// `try_submit` gives the batch back whole, and it can be submitted later.
/// What needs more than there is in all is refused by itself: what stands beside it in the batch takes effect.
#[tokio::test]
async fn impossible_operations_fail_alone() {
    let rig = rig::<f32>(|b| b.max_in_flight(4, 100_000).max_sequences(8)).await;
    let (sequence, mut model) = rig.filled(1).await;
    let new = rig.tokens(1);
    let batch = BatchCacheOperations::new()
        .append(&sequence, &new.ids, &new.keys, &new.values)
        .read(&sequence, 0, 0..10_000)
        .fork(&sequence, u32::MAX)
        .read(&sequence, 0, 0..2);
    model.push(&new);
    let results = rig.cache.submit(batch).await.unwrap();
    assert!(matches!(results[0], Ok(Outcome::Appended { committed: 2 })), "{:?}", results[0]);
    let bytes = 10_000 * 112;
    let error = Error::BatchTooLarge { jobs: 1, bytes, jobs_max: 4, bytes_max: 100_000 };
    assert_eq!(results[1].as_ref().unwrap_err(), &error);
    let error = Error::TooManySequences { needed: u32::MAX as usize, max_sequences: 8 };
    assert_eq!(results[2].as_ref().unwrap_err(), &error);
    assert!(!error.is_retryable(), "it never fits");
    assert!(results[3].is_ok());
    rig.check(&sequence, &model).await;
    drop((sequence, results));
    whole_case("finishing", rig.finish()).await;
}

/// Handles name sequences of their own cache only.
#[tokio::test]
async fn a_sequence_of_another_cache_is_unknown() {
    let (rig, other) = (rig::<f32>(|b| b).await, rig::<f32>(|b| b).await);
    let (sequence, model) = rig.filled(3).await;
    let (stranger, strange_model) = other.filled(3).await;
    let new = rig.tokens(2);
    let one = new.token(0);
    let batch = BatchCacheOperations::new()
        .read(&stranger, 0, 0..1)
        .append(&stranger, &new.ids, &new.keys, &new.values)
        .append_each(&[&stranger, &sequence], &new.ids, &new.keys, &new.values)
        .append_each(&[&stranger], &one.ids, &one.keys, &one.values)
        .truncate(&sequence, 3)
        .close(&stranger);
    let results = rig.cache.submit(batch).await.unwrap();
    for at in [0, 1, 2, 4, 6] {
        assert_eq!(results[at].as_ref().unwrap_err(), &Error::UnknownSequence(stranger.id()), "{at}");
    }
    rig.check(&sequence, &model).await;
    other.check(&stranger, &strange_model).await;
    drop((sequence, stranger, results));
    whole_case("finishing", rig.finish()).await;
    whole_case("finishing", other.finish()).await;
}

/// Refusals of whole submissions are in the statistics, too.
#[tokio::test]
async fn refusals_are_counted() {
    let rig = rig::<f32>(|b| b.max_in_flight(1, 1000).max_sequences(1)).await;
    let sequence = rig.open().await;
    assert!(rig.cache.open("tenant", OpenOptions::default()).await.is_err());
    let two = BatchCacheOperations::new().truncate(&sequence, 0).truncate(&sequence, 0);
    assert!(rig.cache.submit(two).await.is_err());
    assert_eq!(rig.cache.stats().errors, [(ErrorKind::Capacity, 1), (ErrorKind::InvalidInput, 1)]);
    drop(sequence);
    whole_case("finishing", rig.finish()).await;
}

/// Absurd wishes for memory are granted as far as they could ever be used.
#[tokio::test]
async fn absurd_batches_of_memory() {
    let rig = rig::<f32>(|b| b.max_in_flight(4, 100_000)).await;
    let mut batch = rig.cache.batch(usize::MAX);
    assert!(batch.region::<f32>(100_000).is_err());
    assert_eq!(batch.region::<f32>(1000).unwrap().len(), 1000);
    drop(BatchCacheOperations::new().reserve_bytes(usize::MAX));
    whole_case("finishing", rig.finish()).await;
}

#[tokio::test]
async fn an_overloaded_cache_gives_the_batch_back() {
    let rig = rig::<f32>(|b| b.max_in_flight(3, 2000)).await;
    let (sequence, mut model) = rig.filled(1).await;
    let (first, second) = (rig.tokens(2), rig.tokens(1));
    // Sent, and not carried out before this task waits: its permits are taken.
    let busy = BatchCacheOperations::new().append(&sequence, &first.ids, &first.keys, &first.values).read(
        &sequence,
        1,
        0..3,
    );
    let Ok(busy) = rig.cache.try_submit(busy) else { panic!("permits are free") };
    let taken = 2 * 224 + 3 * 112;
    let stats = rig.cache.stats();
    assert_eq!((stats.jobs_in_flight, stats.bytes_in_flight), (2, taken));
    let batch = BatchCacheOperations::new()
        .only_tenant("tenant")
        .append(&sequence, &second.ids, &second.keys, &second.values)
        .fork(&sequence, 1);
    let (back, reason) = rig.cache.try_submit(batch).err().expect("there is one permit, and two are needed");
    let bytes_free = 2000 - taken;
    assert_eq!(reason, Error::Overloaded { jobs: 2, bytes: 224, jobs_free: 1, bytes_free });
    assert!(reason.is_retryable() && back.len() == 2);
    // By bytes, too; and the right to open the fork was given back.
    let large = rig.tokens(6);
    let batch = BatchCacheOperations::new().append(&sequence, &large.ids, &large.keys, &large.values);
    let (_, reason) = rig.cache.try_submit(batch).err().expect("too few bytes are free");
    assert_eq!(reason, Error::Overloaded { jobs: 1, bytes: 6 * 224, jobs_free: 1, bytes_free });
    model.push(&first);
    let mut results = busy.await.unwrap();
    let Ok(Outcome::Read(read)) = results.remove(1) else { panic!() };
    let (keys, values) = read.into_elements::<f32>().unwrap();
    model.compare(1, 0..3, &keys, &values, rig.format);
    let Ok(again) = rig.cache.try_submit(back) else { panic!("permits are free again") };
    let results = again.await.unwrap();
    model.push(&second);
    assert!(matches!(results[0], Ok(Outcome::Appended { committed: 4 })), "{results:?}");
    let Ok(Outcome::Forked(forks)) = &results[1] else { panic!("{results:?}") };
    rig.check(&forks[0], &model).await;
    rig.check(&sequence, &model).await;
    drop((results, sequence));
    whole_case("finishing", rig.finish()).await;
}

/// `submit` waits instead, in the order of arrival.
#[tokio::test]
async fn a_busy_cache_makes_callers_wait() {
    let rig = rig::<f32>(|b| b.max_in_flight(1, 1 << 20)).await;
    let (sequence, mut model) = rig.filled(1).await;
    let new: Vec<Tokens<f32>> = (0..6).map(|_| rig.tokens(1)).collect();
    let mut waiting: Vec<_> =
        new.iter().map(|new| Box::pin(sequence.append(&new.ids, &new.keys, &new.values))).collect();
    for future in &mut waiting {
        assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    assert_eq!(rig.cache.stats().jobs_in_flight, 1, "those who wait hold nothing");
    let last = waiting.pop().unwrap();
    drop(waiting.remove(2));
    for (at, future) in waiting.into_iter().enumerate() {
        assert_eq!(common::within("a caller", future).await, Ok(at as u32 + 2));
    }
    assert_eq!(last.await, Ok(6));
    for at in [0, 1, 3, 4, 5] {
        model.push(&new[at]);
    }
    rig.check(&sequence, &model).await;
    drop(sequence);
    whole_case("finishing", rig.finish()).await;
}

#[tokio::test]
async fn a_cache_that_is_shut_down() {
    let rig = rig::<f32>(|b| b).await;
    let (sequence, _) = rig.filled(7).await;
    let view = sequence.view(0).unwrap();
    let report = whole_case("shutting down", rig.cache.shutdown(Duration::MAX)).await;
    assert!(report.drained, "{report:?}");
    let new = rig.tokens(1);
    assert_eq!(sequence.append(&new.ids, &new.keys, &new.values).await, Err(Error::Closed));
    assert_eq!(sequence.stage(0, new.keys_of(0), new.values_of(0)).await, Err(Error::Closed));
    assert_eq!(sequence.commit(&[1]).await, Err(Error::Closed));
    assert_eq!(sequence.read::<f32>(0, 0..1).await, Err(Error::Closed));
    assert_eq!(sequence.truncate(0).await, Err(Error::Closed));
    assert_eq!(sequence.fork().await.unwrap_err(), Error::Closed);
    assert_eq!(sequence.fork_many(3).await.unwrap_err(), Error::Closed);
    assert_eq!(rig.cache.open("tenant", OpenOptions::default()).await.unwrap_err(), Error::Closed);
    let batch = || BatchCacheOperations::new().read(&sequence, 0, 0..1).truncate(&sequence, 1);
    assert_eq!(rig.cache.submit(batch()).await.unwrap_err(), Error::Closed);
    let (back, reason) = rig.cache.try_submit(batch()).err().unwrap();
    assert_eq!((back.len(), reason), (2, Error::Closed));
    assert_eq!(sequence.close().await, Err(Error::Closed));
    // What was borrowed stays.
    assert_eq!(view.tokens(), 7);
    assert!(view.blocks().all(|block| block.keys::<f32>(0).is_ok()));
    let stats = rig.cache.stats();
    assert_eq!((stats.sequences_open, stats.jobs_in_flight, stats.bytes_in_flight), (0, 0, 0));
}

/// Nothing of the above has to do with the model's arithmetic.
#[test]
fn the_model_checks_something() {
    let layout = geometry((5, 2, 2, 8, 6), ElementType::F32).layout().unwrap();
    let tokens = Tokens::<f32>::generate(layout, 3, 1);
    let mut model = Model::new(layout);
    model.push(&tokens);
    let (mut keys, values) = (tokens.keys_of(1).to_vec(), tokens.values_of(1).to_vec());
    model.compare(1, 0..3, &keys, &values, Format::Raw);
    keys[7] = keys[7] * 1.5 + 1.0;
    let wrong = std::panic::catch_unwind(|| model.compare(1, 0..3, &keys, &values, Format::Int8));
    assert!(wrong.is_err());
}
