//! Sealing and re-encoding for those who need room, on a simulated device where nothing happens behind their backs.

use kv_cache_actors::batch::{BatchCacheOperations, Outcome};
use kv_cache_actors::error::Error;
use kv_cache_actors::format::{Format, KeepRaw};
use kv_cache_actors::memory::LaneKind;
use kv_cache_actors::pool::Tier;
use kv_cache_actors::sequence::{OpenSequence, SequenceId};
use kv_cache_actors::testing::Rng;
use kv_cache_actors::testing::rig::{Rig, Ticket};
use kv_cache_actors::testing::scenario::{Setup, geometry};
use kv_cache_actors::testing::sim::LANES;

/// Tokens of a block.
const BLOCK: u32 = 4;

/// A cache whose blocks may be re-encoded so often.
fn rig(rungs_below: usize) -> Rig {
    rig_with(rungs_below, Setup::small(Format::Int8))
}

fn rig_with(rungs_below: usize, setup: Setup) -> Rig {
    let geometry = geometry(8, 2, 8, 8).block_tokens(BLOCK);
    Rig::new(&Setup { geometry, rungs_below, max_tokens: 1 << 16, ..setup })
}

/// As [`rig`], re-encoding twice, and so many blocks at the end of a sequence later than all others.
fn rig_that_spares(recent_blocks: [usize; 2]) -> Rig {
    let keep_raw = KeepRaw { recent_blocks, ..KeepRaw::default() };
    rig_with(2, Setup { keep_raw, ..Setup::small(Format::Int8) })
}

/// How often each block of a sequence has been re-encoded.
fn rungs(rig: &Rig, sequence: &OpenSequence) -> Vec<usize> {
    let formats = [Format::Int8, Format::R4, Format::R2];
    let state = sequence.shared().state();
    let places = state.blocks.iter().map(|id| rig.core().blocks().place(*id).expect("it is somewhere"));
    places.map(|place| formats.iter().position(|format| place.format == *format).unwrap_or(0)).collect()
}

/// Writes a block to a sequence, with a quiet moment behind it.
fn press(rig: &mut Rig, id: SequenceId, stamp: u64) -> Result<(), Error> {
    let ticket = append(rig, id, stamp, 1);
    let answer = finish(rig, ticket);
    rig.settle();
    rig.core().audit().expect("consistent");
    answer.map(drop)
}

fn append(rig: &mut Rig, id: SequenceId, stamp: u64, blocks: u32) -> Ticket {
    let mut batch = BatchCacheOperations::new();
    rig.append(&mut batch, id, None, 1, stamp, blocks * BLOCK, None, None);
    rig.submit(batch)
}

fn move_to(rig: &mut Rig, id: SequenceId, tier: Tier) -> Ticket {
    let mut batch = BatchCacheOperations::new();
    batch.move_to(id, tier);
    rig.submit(batch)
}

/// Lets everything happen but for the seals, and re-encodings, of quiet moments.
fn finish(rig: &mut Rig, ticket: Ticket) -> Result<Outcome, Error> {
    loop {
        rig.flush();
        for lane in LANES {
            while rig.device.advance(lane) {}
            while rig.report(lane) {}
        }
        if let Some(results) = rig.take(ticket) {
            return results.expect("it was answered").remove(0);
        }
    }
}

/// Texts that nobody holds, until raw room is left for fewer than `left` blocks. None of them is re-encoded.
fn cache_texts(rig: &mut Rig, left: u64) {
    for text in 1.. {
        let stamps = text * 1000..text * 1000 + u64::from(2 * BLOCK);
        let sequence = rig.open_prompt(1, stamps.clone());
        append(rig, sequence.id(), stamps.start, 2);
        rig.settle();
        drop(sequence);
        rig.settle();
        if rig.core_mut().counters().blocks_free < left {
            break;
        }
    }
    let counters = *rig.core_mut().counters();
    assert!(counters.recodes == 0 && counters.evictions == 0 && counters.blocks_cached > 32, "{counters:?}");
}

/// A sequence of raw blocks that takes all raw room. None of them is sealed.
fn take_raw_room(rig: &mut Rig) -> OpenSequence {
    let sequence = rig.open(1);
    let free = rig.core_mut().counters().blocks_free as u32;
    let ticket = append(rig, sequence.id(), 500_000, free);
    let answer = finish(rig, ticket);
    assert!(matches!(answer, Ok(Outcome::Appended { .. })), "{answer:?}");
    sequence
}

#[test]
fn what_comes_back_from_the_host_has_others_re_encoded_before_any_makes_way() {
    let mut rig = rig(2);
    let sequence = rig.open(1);
    append(&mut rig, sequence.id(), 900_000, 16);
    rig.settle();
    let ticket = move_to(&mut rig, sequence.id(), Tier::Host);
    rig.settle();
    assert!(matches!(rig.take(ticket), Some(Ok(results)) if results.len() == 1));
    assert_eq!(rig.core_mut().counters().blocks_host, 16);
    cache_texts(&mut rig, 16);
    let other = take_raw_room(&mut rig);
    let before = *rig.core_mut().counters();
    let ticket = move_to(&mut rig, sequence.id(), Tier::Device);
    let answer = finish(&mut rig, ticket);
    assert!(matches!(answer, Ok(Outcome::Moved { blocks: 16 })), "{answer:?}");
    let after = *rig.core_mut().counters();
    assert!(after.recodes > 0 && after.evictions == 0, "{after:?}");
    assert_eq!((after.blocks_cached, after.blocks_host), (before.blocks_cached, 0));
    rig.core().audit().expect("consistent");
    drop((sequence, other));
    rig.settle();
}

/// A write of 8 blocks to the second of two sequences, where the first has taken all raw room.
fn write_without_room(rig: &mut Rig) -> ([OpenSequence; 2], Ticket) {
    let second = rig.open(2);
    let first = take_raw_room(rig);
    let ticket = append(rig, second.id(), 900_000, 8);
    ([first, second], ticket)
}

#[test]
fn a_write_waits_for_what_is_to_be_sealed() {
    let mut rig = rig(0);
    let (sequences, ticket) = write_without_room(&mut rig);
    let answer = finish(&mut rig, ticket);
    assert!(matches!(answer, Ok(Outcome::Appended { .. })), "{answer:?}");
    drop(sequences);
    rig.settle();
}

#[test]
fn a_write_does_not_wait_for_seals_that_fail() {
    let mut rig = rig(0);
    let (sequences, ticket) = write_without_room(&mut rig);
    rig.flush();
    rig.device.fail(LaneKind::Compute, false);
    let answer = finish(&mut rig, ticket);
    assert!(matches!(answer, Err(Error::Capacity { .. })), "{answer:?}");
    // The next one tries again.
    rig.settle();
    let ticket = append(&mut rig, sequences[1].id(), 900_000, 8);
    let answer = finish(&mut rig, ticket);
    assert!(matches!(answer, Ok(Outcome::Appended { .. })), "{answer:?}");
    drop(sequences);
    rig.settle();
}

/// Nobody closes anything, until a write is refused: no block is left raw then that waits to be sealed.
#[test]
fn a_full_cache_has_sealed_and_re_encoded_all_that_it_can() {
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let setup = Setup {
            geometry: geometry(8, 2, 8, 8).block_tokens(BLOCK),
            rungs_below: rng.below(3),
            blocks: u64::from(rng.between(16, 96)),
            chunk_slots: Some(rng.between(1, 8) as usize),
            keep_raw: KeepRaw {
                sinks_as_sealed: u32::from(rng.one_in(2)),
                sinks: u32::from(rng.one_in(4)) * (1 + seed as u32 % 2),
                window_blocks: rng.below(3),
                recent_blocks: [[0, 0], [1, 4]][seed as usize % 2],
            },
            max_tokens: 1024,
            ..Setup::small(Format::Int8)
        };
        let mut rig = Rig::new(&setup);
        let sequences: Vec<_> = (0..800).map(|_| rig.open(1)).collect();
        let mut refused = None;
        for (at, sequence) in sequences.iter().enumerate() {
            let ticket = append(&mut rig, sequence.id(), (at as u64 + 1) << 16, rng.between(1, 6));
            // With a quiet moment before it, or without.
            if rng.one_in(2) {
                rig.settle();
            }
            refused = finish(&mut rig, ticket).err();
            if refused.is_some() {
                break;
            }
        }
        assert!(matches!(refused, Some(Error::Capacity { .. })), "{refused:?}");
        rig.settle();
        let holdings = rig.core().holdings();
        assert_eq!(holdings.to_seal, 0, "seed {seed}: {holdings:?} of {setup:#?}");
        drop(sequences);
        rig.settle();
        rig.assert_empty();
    }
}

/// Slots that were taken for a move that then lacked others hold what they held.
#[test]
fn a_move_that_finds_too_little_room_leaves_no_bytes_of_others_behind() {
    let setup = Setup { max_tokens: 1024, chunk_slots: Some(32), ..Setup::small(Format::Raw) };
    let mut rig = Rig::new(&setup);
    let sequence = rig.open(1);
    append(&mut rig, sequence.id(), 900_000, 16);
    rig.settle();
    move_to(&mut rig, sequence.id(), Tier::Host);
    rig.settle();
    // Another tenant's bytes in every slot, of which all but a few are taken.
    let mut others = Vec::new();
    while rig.core_mut().counters().blocks_free > 0 {
        let other = rig.open(2);
        let mut batch = BatchCacheOperations::new();
        rig.append(&mut batch, other.id(), None, 2, 1, BLOCK, None, None);
        assert!(matches!(rig.run(batch).remove(0), Ok(Outcome::Appended { .. })));
        others.push(other);
    }
    others.truncate(others.len() - 8);
    rig.settle();
    let ticket = move_to(&mut rig, sequence.id(), Tier::Device);
    let answer = finish(&mut rig, ticket);
    assert!(matches!(answer, Err(Error::TierFull { free: 8, .. })), "{answer:?}");
    // One token, in a slot of its own.
    let zeroed = rig.core_mut().counters().slots_zeroed;
    let new = rig.open(1);
    let mut batch = BatchCacheOperations::new();
    rig.append(&mut batch, new.id(), None, 1, 5, 1, None, None);
    assert!(matches!(rig.run(batch).remove(0), Ok(Outcome::Appended { .. })));
    assert_eq!(rig.core_mut().counters().slots_zeroed, zeroed + 1, "another tenant's bytes are left in it");
}

/// Blocks that the windows of [`Format::R4`] and [`Format::R2`] hold.
const WINDOWS: [usize; 2] = [1, 4];

/// Whether a block in a window of its sequence has gone down from the rung that the window is for.
fn is_recent_re_encoded(rungs: &[usize]) -> bool {
    let from_end = || rungs.iter().rev().enumerate();
    from_end().any(|(at, rung)| (0..2).any(|leaves| at < WINDOWS[leaves] && *rung > leaves))
}

/// A sequence that was written to long ago and another that fills the device: what is recent in either goes down when all else has.
#[test]
fn recent_blocks_are_re_encoded_when_no_other_can_be() {
    let mut rig = rig_that_spares(WINDOWS);
    let (idle, busy) = (rig.open(1), rig.open(1));
    append(&mut rig, idle.id(), 900_000, 12);
    rig.settle();
    let mut first = None;
    for stamp in 1.. {
        let before = [&idle, &busy].map(|sequence| rungs(&rig, sequence));
        if press(&mut rig, busy.id(), stamp * 1000).is_err() {
            break;
        }
        let after = [&idle, &busy].map(|sequence| rungs(&rig, sequence));
        if first.is_none() && after.iter().any(|rungs| is_recent_re_encoded(rungs)) {
            first = Some((before, after));
        }
    }
    let (before, after) = first.expect("they make room before a write is refused");
    // Until then, none; and then, all but what has been written since.
    assert!(!before.iter().any(|rungs| is_recent_re_encoded(rungs)), "{before:?}");
    for rungs in &after {
        let behind = |from_end: usize| &rungs[..rungs.len() - from_end];
        assert!(
            behind(5).iter().all(|rung| *rung == 2) && behind(2).iter().all(|rung| *rung > 0),
            "{rungs:?}"
        );
    }
    assert!(after[1].len() > 100, "{after:?}");
    // In the end nothing is spared.
    assert!(rungs(&rig, &idle).iter().all(|rung| *rung == 2));
    drop((idle, busy));
    rig.settle();
    rig.assert_empty();
}

/// A block is recent as long as it is so for any sequence that holds it.
#[test]
fn what_is_recent_for_a_fork_is_re_encoded_when_the_fork_has_closed() {
    let mut rig = rig_that_spares(WINDOWS);
    let (sequence, busy) = (rig.open(1), rig.open(1));
    append(&mut rig, sequence.id(), 900_000, 16);
    rig.settle();
    let mut batch = BatchCacheOperations::new();
    batch.fork(sequence.id(), 1);
    let Ok(Outcome::Forked(mut forks)) = rig.run(batch).remove(0) else { panic!("a fork") };
    let fork = forks.remove(0);
    let mut batch = BatchCacheOperations::new();
    batch.truncate(fork.id(), 8 * BLOCK);
    assert!(matches!(rig.run(batch).remove(0), Ok(Outcome::Truncated { .. })));
    let mut stamps = (1..).map(|at| at * 1000);
    let mut press_until = |rig: &mut Rig, enough: &dyn Fn(&[usize]) -> bool| {
        while !enough(&rungs(rig, &sequence)) {
            press(rig, busy.id(), stamps.next().unwrap()).expect("there is room");
        }
        rungs(rig, &sequence)
    };
    let both = press_until(&mut rig, &|rungs| rungs[..4].iter().all(|rung| *rung == 2));
    let both = press_until(&mut rig, &|rungs| rungs[8..12] == [2; 4] && rungs[..4] == both[..4]);
    assert_eq!(both, [2, 2, 2, 2, 1, 1, 1, 0, 2, 2, 2, 2, 1, 1, 1, 0]);
    assert_eq!(rungs(&rig, &fork), both[..8]);
    drop(fork);
    let one = press_until(&mut rig, &|rungs| rungs[..12] == [2; 12]);
    assert_eq!(one[12..], [1, 1, 1, 0]);
    drop(sequence);
    rig.settle();
    drop(busy);
    rig.settle();
    rig.assert_empty();
}

/// Sparing what is recent costs no room: neither a sequence that fills a device alone, nor many that have nothing but recent blocks.
#[test]
fn as_much_fits_as_where_nothing_is_spared() {
    for chunk_slots in 1..=8 {
        for blocks_each in [usize::MAX, 3] {
            let [spared, all] = [WINDOWS, [0, 0]].map(|recent_blocks| {
                let keep_raw = KeepRaw { recent_blocks, ..KeepRaw::default() };
                let setup = Setup { keep_raw, chunk_slots: Some(chunk_slots), ..Setup::small(Format::Int8) };
                let mut rig = rig_with(2, setup);
                let mut sequences = vec![rig.open(1)];
                let mut written = 0;
                while press(&mut rig, sequences[sequences.len() - 1].id(), written as u64 * 1000) == Ok(()) {
                    written += 1;
                    if written % blocks_each == 0 {
                        sequences.push(rig.open(1));
                    }
                }
                let rungs: Vec<_> = sequences.iter().map(|sequence| rungs(&rig, sequence)).collect();
                assert!(rungs.iter().flatten().all(|rung| *rung == 2), "{chunk_slots} {rungs:?}");
                written
            });
            assert!(spared >= all, "{spared} blocks, {all} where nothing is spared; chunks of {chunk_slots}");
        }
    }
}
