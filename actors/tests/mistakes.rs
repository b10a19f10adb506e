//! Mistakes that others made (DESIGN.md §8), each one a test: the same story, told to the core on a simulated device.
//!
//! The oracle meets most of these situations sooner or later. Here each is set up on purpose, so that its name says what
//! broke. Items that need what is not built yet (tiers, remote stores) have no test yet; 7 and 8 are in `block.rs`.

use kv_cache_actors::batch::{BatchCacheOperations, Invalidate, Outcome};
use kv_cache_actors::device::Event;
use kv_cache_actors::dropping::{Dropping, KeyScore};
use kv_cache_actors::error::Error;
use kv_cache_actors::format::Format;
use kv_cache_actors::geometry::Plane;
use kv_cache_actors::memory::{Elements, LaneKind};
use kv_cache_actors::sequence::{OpenOptions, OpenSequence, SequenceId};
use kv_cache_actors::slot::SlotPin;
use kv_cache_actors::testing::rig::{Rig, Ticket, tenant_name, token_id};
use kv_cache_actors::testing::scenario::Setup;
use kv_cache_actors::testing::values::{first_difference, tenant_of};

/// Tokens of a block of [`Setup::small`].
const BLOCK: u32 = 4;

fn append(rig: &mut Rig, id: SequenceId, tenant: u32, stamp: u64, tokens: u32) -> BatchCacheOperations {
    let mut batch = BatchCacheOperations::new();
    rig.append(&mut batch, id, None, tenant, stamp, tokens, None, None);
    batch
}

/// Appends and expects it to work.
fn must_append(rig: &mut Rig, id: SequenceId, tenant: u32, stamp: u64, tokens: u32) {
    let batch = append(rig, id, tenant, stamp, tokens);
    let answer = rig.run(batch).remove(0);
    assert!(matches!(answer, Ok(Outcome::Appended { .. })), "{answer:?}");
}

fn read(id: SequenceId, tokens: std::ops::Range<u32>) -> BatchCacheOperations {
    let mut batch = BatchCacheOperations::new();
    batch.read(id, 0, tokens);
    batch
}

/// Whether an answer is what these stamps say.
fn is_read(rig: &Rig, answer: &Result<Outcome, Error>, tenant: u32, stamps: &[u64]) -> bool {
    let Ok(Outcome::Read(buffer)) = answer else { return false };
    let (Elements::Single(keys), Elements::Single(values)) = (&buffer.keys, &buffer.values) else {
        return false;
    };
    let layout = rig.config().layout;
    [(Plane::Key, keys), (Plane::Value, values)]
        .iter()
        .all(|(plane, tensor)| first_difference(tensor, &layout, *plane, 0, tenant, stamps).is_none())
}

fn must_read(rig: &mut Rig, id: SequenceId, tenant: u32, stamps: impl Iterator<Item = u64>) {
    let stamps: Vec<u64> = stamps.collect();
    let answer = rig.run(read(id, 0..stamps.len() as u32)).remove(0);
    assert!(is_read(rig, &answer, tenant, &stamps), "{answer:?}");
}

/// Takes every block that can be had, for `tenant`.
fn fill_pool(rig: &mut Rig, tenant: u32) -> Vec<OpenSequence> {
    let mut handles = Vec::new();
    loop {
        let handle = rig.open(tenant);
        let batch = append(rig, handle.id(), tenant, 5000, 1);
        // Not settled: sealing would make room.
        let ticket = rig.submit(batch);
        rig.flush();
        while rig.device.advance(LaneKind::Compute) {}
        while rig.report(LaneKind::Compute) {}
        handles.push(handle);
        match rig.take(ticket).expect("it has landed").expect("it was answered").remove(0) {
            Ok(_) => {}
            Err(Error::Capacity { .. }) => return handles,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Takes blocks for `tenant` until `left` can be had.
fn fill_pool_to(rig: &mut Rig, tenant: u32, left: usize) -> Vec<OpenSequence> {
    let mut handles = Vec::new();
    while rig.core().blocks().pool().raw_available() > left {
        let handle = rig.open(tenant);
        must_append(rig, handle.id(), tenant, 5000, 1);
        handles.push(handle);
    }
    handles
}

/// The place of a sequence's block: bytes in the slab, and a pin on them.
fn pin(rig: &Rig, handle: &OpenSequence, index: usize) -> (std::ops::Range<usize>, SlotPin) {
    let block = handle.shared().state().blocks[index];
    let blocks = rig.core().blocks();
    let place = blocks.place(block).unwrap();
    let start = rig.config().pool.offset_bytes(place.class, place.slot);
    let pin = blocks.pool().table().pin(place.slot, place.generation).unwrap();
    (start..start + rig.config().pool.slot_bytes(place.class), pin)
}

fn small(format: Format) -> Setup {
    Setup { blocks: 16, max_tokens: 400, ..Setup::small(format) }
}

fn finish(mut rig: Rig, handles: impl IntoIterator<Item = OpenSequence>) {
    handles.into_iter().for_each(drop);
    rig.settle();
    rig.assert_empty();
}

fn answer(rig: &mut Rig, ticket: Ticket) -> Result<Outcome, Error> {
    rig.take(ticket).expect("it was answered").expect("nobody dropped the reply").remove(0)
}

/// 1. A block is sealed (stored elsewhere) while its sequence closes: its slot stays until the copy has read it.
#[test]
fn blocks_are_not_freed_while_a_seal_still_reads_them() {
    let mut rig = Rig::new(&small(Format::Int8));
    let handle = rig.open(0);
    let batch = append(&mut rig, handle.id(), 0, 1, BLOCK);
    let ticket = rig.submit(batch);
    rig.flush();
    while rig.device.advance(LaneKind::Compute) {}
    rig.report(LaneKind::Compute);
    assert!(answer(&mut rig, ticket).is_ok());
    rig.apply(Event::Seal);
    rig.flush();
    // The seal waits in its lane; nothing of it has happened.
    assert_eq!(rig.core().holdings().sealing, 1);
    drop(handle);
    rig.close_dropped();
    assert_eq!((rig.open_sequences(), rig.core().blocks().len()), (0, 1), "the flight holds the block");
    let others = fill_pool(&mut rig, 1);
    rig.settle();
    for other in &others[..others.len() - 1] {
        must_read(&mut rig, other.id(), 1, 5000..5001);
    }
    finish(rig, others);
}

/// 1. A read on a copy lane is under way while the block is sealed and moves: it reads the old bytes, in their old place.
#[test]
fn blocks_are_not_reused_while_a_read_on_another_lane_is_under_way() {
    let setup = Setup { copy_lane_min_bytes: 4 * 8 * 4, ..small(Format::Int8) };
    let mut rig = Rig::new(&setup);
    let handle = rig.open(0);
    let batch = append(&mut rig, handle.id(), 0, 1, BLOCK);
    let ticket = rig.submit(batch);
    rig.flush();
    while rig.device.advance(LaneKind::Upload) {}
    rig.report(LaneKind::Upload);
    assert!(answer(&mut rig, ticket).is_ok());
    let reading = rig.submit(read(handle.id(), 0..BLOCK));
    rig.apply(Event::Seal);
    rig.flush();
    assert_eq!(rig.device.depth(LaneKind::Download).0, 1, "the read waits on its lane");
    while rig.device.advance(LaneKind::Compute) {}
    rig.report(LaneKind::Compute);
    assert_eq!(
        rig.core().holdings().quarantined,
        1,
        "sealed elsewhere, but the old slot is still being read"
    );
    let others = fill_pool(&mut rig, 1);
    rig.settle();
    let answer = answer(&mut rig, reading);
    assert!(is_read(&rig, &answer, 0, &[1, 2, 3, 4]), "{answer:?}");
    finish(rig, others.into_iter().chain([handle]));
}

/// 2. A write is under way when its caller goes away and the sequence closes: its slots are nobody else's before it lands.
#[test]
fn a_stale_write_in_flight_does_not_corrupt_a_reallocated_block() {
    let setup = Setup { copy_lane_min_bytes: 4 * 8 * 4, ..small(Format::Raw) };
    let mut rig = Rig::new(&setup);
    let handle = rig.open(0);
    let batch = append(&mut rig, handle.id(), 0, 1, 2 * BLOCK);
    let ticket = rig.submit(batch);
    rig.flush();
    assert_eq!(rig.device.depth(LaneKind::Upload).0, 1, "the write waits on its lane");
    rig.cancel(ticket);
    drop(handle);
    rig.close_dropped();
    // The close waits behind the write; the two blocks cannot be had.
    assert_eq!(rig.open_sequences(), 1);
    let others = fill_pool(&mut rig, 1);
    rig.settle();
    assert_eq!(rig.open_sequences(), others.len() as u64);
    for other in &others[..others.len() - 1] {
        must_read(&mut rig, other.id(), 1, 5000..5001);
    }
    finish(rig, others);
}

/// 2. A fork's write goes to its own copy, and the copy's source is not written to while it is being copied.
#[test]
fn the_source_of_a_copy_in_flight_is_not_written_to() {
    // One token goes over the compute lane, two over the upload lane.
    let setup = Setup { copy_lane_min_bytes: 2 * 8 * 4, ..small(Format::Raw) };
    let mut rig = Rig::new(&setup);
    let parent = rig.open(0);
    must_append(&mut rig, parent.id(), 0, 1, 1);
    // Staged tokens lie behind the committed one, in the same block.
    let mut batch = BatchCacheOperations::new();
    rig.stage(&mut batch, parent.id(), 0, 0, 10, 1, None);
    batch.fork(parent.id(), 1);
    let mut results = rig.run(batch);
    let Ok(Outcome::Forked(mut forks)) = results.remove(1) else { panic!("it forks") };
    let fork = forks.remove(0);
    // The parent writes on, into a copy of the block that it shares; the copy waits on the upload lane.
    let mut batch = BatchCacheOperations::new();
    rig.stage(&mut batch, parent.id(), 0, 0, 20, 2, None);
    let staging = rig.submit(batch);
    rig.flush();
    assert_eq!(rig.device.depth(LaneKind::Upload).0, 1);
    // The fork writes where the parent's staged token lies. The simulated device panics if lanes get into each other's way.
    let batch = append(&mut rig, fork.id(), 0, 30, 1);
    let appending = rig.submit(batch);
    rig.flush();
    while rig.device.advance(LaneKind::Compute) {}
    while rig.report(LaneKind::Compute) {}
    assert!(answer(&mut rig, appending).is_ok());
    rig.settle();
    assert!(answer(&mut rig, staging).is_ok());
    must_read(&mut rig, parent.id(), 0, [1, 10, 20, 21].into_iter());
    must_read(&mut rig, fork.id(), 0, [1, 30].into_iter());
    finish(rig, [parent, fork]);
}

/// 4. A slot goes from one tenant to another: nothing that the first wrote is in it, whatever the second has not written.
#[test]
fn a_slot_never_shows_one_tenant_another_ones_text() {
    for format in [Format::Raw, Format::Int8] {
        let mut rig = Rig::new(&small(format));
        let first = fill_pool(&mut rig, 1);
        drop(first);
        rig.settle();
        let second = fill_pool(&mut rig, 2);
        for handle in &second[..second.len() - 1] {
            let (bytes, _pin) = pin(&rig, handle, 0);
            let foreign = |x: f32| tenant_of(x).is_some_and(|tenant| tenant != 2);
            assert_eq!(rig.device.find_element(bytes, foreign), None);
        }
        finish(rig, second);
    }
}

/// 4. The launch that was to zero a slot fails: the slot still counts as the other tenant's.
#[test]
fn a_slot_whose_zeroing_failed_is_zeroed_the_next_time() {
    // Several slots to a chunk, and one of them in use: the chunk stays what it is.
    let mut rig = Rig::new(&Setup { blocks: 128, ..small(Format::Raw) });
    assert!(rig.config().pool.chunk_bytes > rig.config().pool.raw_slot_bytes);
    drop(fill_pool(&mut rig, 1));
    rig.settle();
    let neighbour = rig.open(2);
    must_append(&mut rig, neighbour.id(), 2, 1, 1);
    let handle = rig.open(2);
    let batch = append(&mut rig, handle.id(), 2, 1, 1);
    let ticket = rig.submit(batch);
    rig.flush();
    assert!(rig.device.fail(LaneKind::Compute, false));
    rig.settle();
    assert!(matches!(answer(&mut rig, ticket), Err(Error::Device(_))));
    must_append(&mut rig, handle.id(), 2, 1, 1);
    let (bytes, pin) = pin(&rig, &handle, 0);
    assert_eq!(rig.device.find_element(bytes, |x| tenant_of(x).is_some_and(|tenant| tenant != 2)), None);
    drop(pin);
    finish(rig, [neighbour, handle]);
}

/// 4. A slot is pinned by a reader: it is quarantined when freed, and its bytes do not change.
#[test]
fn a_slot_that_somebody_looks_at_is_not_reused() {
    let mut rig = Rig::new(&small(Format::Int8));
    let handle = rig.open(1);
    must_append(&mut rig, handle.id(), 1, 1, 2);
    let (bytes, pin) = pin(&rig, &handle, 0);
    let mut before = Vec::new();
    rig.device.copy_bytes(bytes.clone(), &mut before);
    drop(handle);
    rig.settle();
    assert_eq!(rig.core().holdings().quarantined, 1);
    let others = fill_pool(&mut rig, 2);
    assert!(rig.device.has_bytes(bytes, &before));
    drop(pin);
    finish(rig, others);
}

/// 6. The host memory of an append belongs to its launch: the caller's copy may go at once, however late the device reads.
#[test]
fn a_staging_buffer_lives_until_its_copy_has_ended() {
    let mut rig = Rig::new(&small(Format::Raw));
    let handle = rig.open(0);
    let batch = append(&mut rig, handle.id(), 0, 1, BLOCK + 1);
    let ticket = rig.submit(batch);
    rig.flush();
    // Nothing was read so far. The caller goes, and others use (and free) memory of the same sizes.
    rig.cancel(ticket);
    let other = rig.open(0);
    for stamp in 100..110 {
        must_append(&mut rig, other.id(), 0, stamp, 1);
    }
    must_read(&mut rig, handle.id(), 0, 1..6);
    finish(rig, [handle, other]);
}

/// 9. A write that failed, before or in the middle, is not visible, and what was there before is.
#[test]
fn a_failed_write_is_not_visible() {
    for (format, half_way) in
        [(Format::Raw, false), (Format::Raw, true), (Format::Int8, false), (Format::Int8, true)]
    {
        for steps in 0..3 {
            let mut rig = Rig::new(&small(format));
            let parent = rig.open(0);
            must_append(&mut rig, parent.id(), 0, 1, BLOCK + 2);
            let mut batch = BatchCacheOperations::new();
            batch.fork(parent.id(), 1);
            batch.truncate(parent.id(), BLOCK - 1);
            let Ok(Outcome::Forked(mut forks)) = rig.run(batch).remove(0) else { panic!("it forks") };
            let fork = forks.remove(0);
            // Copies the shared block, then writes to it and to the next: one launch, failed at different moments.
            let batch = append(&mut rig, parent.id(), 0, 50, BLOCK);
            let ticket = rig.submit(batch);
            rig.flush();
            for _ in 0..steps {
                rig.device.advance(LaneKind::Compute);
            }
            assert!(rig.device.fail(LaneKind::Compute, half_way));
            rig.settle();
            assert!(matches!(answer(&mut rig, ticket), Err(Error::Device(_))));
            assert_eq!(parent.shared().state().committed, BLOCK - 1);
            must_read(&mut rig, parent.id(), 0, 1..u64::from(BLOCK));
            must_read(&mut rig, fork.id(), 0, 1..u64::from(BLOCK) + 3);
            // And it works the next time.
            must_append(&mut rig, parent.id(), 0, 60, 2);
            must_read(&mut rig, parent.id(), 0, (1..u64::from(BLOCK)).chain(60..62));
            finish(rig, [parent, fork]);
        }
    }
}

/// 9. While a copy on write is under way, readers see the block as it was.
#[test]
fn a_view_during_a_copy_on_write_sees_the_old_block() {
    let mut rig = Rig::new(&small(Format::Raw));
    let parent = rig.open(0);
    must_append(&mut rig, parent.id(), 0, 1, 2);
    let mut batch = BatchCacheOperations::new();
    batch.fork(parent.id(), 1);
    let Ok(Outcome::Forked(forks)) = rig.run(batch).remove(0) else { panic!("it forks") };
    let (before, _) = pin(&rig, &parent, 0);
    let batch = append(&mut rig, parent.id(), 0, 10, 1);
    let ticket = rig.submit(batch);
    rig.flush();
    assert_eq!(pin(&rig, &parent, 0).0, before, "the copy has not been made yet");
    rig.settle();
    assert!(answer(&mut rig, ticket).is_ok());
    assert_ne!(pin(&rig, &parent, 0).0, before);
    finish(rig, forks.into_iter().chain([parent]));
}

/// 10. No slot to seal into: the core says so once, holds no pin for it, and goes on by itself when there may be one.
#[test]
fn a_full_pool_stalls_sealing_without_a_busy_loop_or_a_leaked_pin() {
    let mut rig = Rig::new(&small(Format::Int8));
    let open = |rig: &mut Rig, blocks: u32| {
        let mut batch = BatchCacheOperations::new();
        batch.open(OpenOptions::default().reserve_tokens(blocks * BLOCK));
        match rig.run(batch).remove(0) {
            Ok(Outcome::Opened(handle)) => Some(handle),
            _ => None,
        }
    };
    // Everything that can be set aside is, so that sealed slots get no further room.
    let writer = open(&mut rig, 8).unwrap();
    let mut reserving: Vec<_> = std::iter::from_fn(|| open(&mut rig, 1)).collect();
    let waiting = |rig: &mut Rig| rig.core_mut().counters().blocks_waiting_to_seal;
    // And what sealing frees is not free: somebody looks at it.
    let mut pins = Vec::new();
    for block in 0..8 {
        let batch = append(&mut rig, writer.id(), 0, 100 * block, BLOCK);
        let ticket = rig.submit(batch);
        rig.flush();
        while rig.device.advance(LaneKind::Compute) {}
        rig.report(LaneKind::Compute);
        assert!(answer(&mut rig, ticket).is_ok(), "what was set aside is there");
        pins.push(pin(&rig, &writer, block as usize));
        rig.settle();
    }
    assert!(waiting(&mut rig) > 0, "sealing has stalled");
    // Everything has settled, so nothing spins; asked all the same, nothing is launched and nothing is held.
    assert!(!rig.core().wants_to_seal());
    let before = rig.core().holdings();
    rig.apply(Event::Seal);
    assert_eq!(rig.core().holdings(), before);
    assert_eq!(before.in_flight, 0);
    // Those who held the rest go: their room is for sealing too.
    reserving.clear();
    rig.close_dropped();
    assert!(rig.core().wants_to_seal(), "there is room, and blocks wait for it");
    rig.settle();
    assert_eq!(waiting(&mut rig), 0);
    drop(pins);
    finish(rig, [writer]);
}

/// 10. A full pool refuses, with the numbers, and takes nothing; the refused operation works once there is room.
#[test]
fn a_full_pool_refuses_and_holds_nothing_back() {
    let mut rig = Rig::new(&small(Format::Raw));
    let mut handles = fill_pool(&mut rig, 0);
    rig.settle();
    let refused = handles.pop().unwrap();
    let before = rig.core().holdings();
    let batch = append(&mut rig, refused.id(), 0, 1, 3 * BLOCK);
    let answer = rig.run(batch).remove(0);
    assert_eq!(answer.unwrap_err(), Error::Capacity { needed: 3, free: 0, evictable: 0 });
    assert_eq!(rig.core().holdings(), before);
    handles.truncate(handles.len() - 3);
    rig.settle();
    must_append(&mut rig, refused.id(), 0, 1, 3 * BLOCK);
    finish(rig, handles.into_iter().chain([refused]));
}

/// 11. Callers go away at every moment of an open, an append and a fork: nothing is left of them.
#[test]
fn cancelled_requests_leak_nothing() {
    for moment in 0..12 {
        let mut rig = Rig::new(&small(Format::Int8));
        let handle = rig.open(0);
        must_append(&mut rig, handle.id(), 0, 1, BLOCK + 1);
        let mut batch = BatchCacheOperations::new();
        batch.open(Default::default());
        rig.append(&mut batch, handle.id(), None, 0, 10, BLOCK, None, None);
        batch.fork(handle.id(), 3);
        batch.read(handle.id(), 0, 0..2);
        let ticket = rig.submit(batch);
        // The caller goes after so many things have happened.
        for _ in 0..moment {
            rig.flush();
            if !rig.device.advance(LaneKind::Compute) {
                rig.report(LaneKind::Compute);
            }
        }
        rig.cancel(ticket);
        finish(rig, [handle]);
    }
}

/// 12. A block that holds NaN is never full, never sealed and has no key; filled again properly it has one.
#[test]
fn blocks_with_nan_never_get_a_key() {
    for format in [Format::Raw, Format::Int8] {
        let mut rig = Rig::new(&small(format));
        let handle = rig.open_prompt(0, 0..0);
        let mut batch = BatchCacheOperations::new();
        rig.append(&mut batch, handle.id(), None, 0, 1, BLOCK, None, Some(f32::NAN));
        assert_eq!(rig.run(batch).remove(0).unwrap_err(), Error::NotFinite);
        assert_eq!(rig.core().block_key(handle.id(), 0), None);
        assert_eq!((handle.shared().state().committed, rig.core().blocks().len()), (0, 0));
        must_append(&mut rig, handle.id(), 0, 1, BLOCK);
        assert!(rig.core().block_key(handle.id(), 0).is_some());
        finish(rig, [handle]);
    }
}

/// 12. Memory goes bad under a full block: sealing notices, and the block loses its key instead of passing the damage on.
#[test]
fn a_block_that_turns_out_not_finite_when_sealed_loses_its_key() {
    let mut rig = Rig::new(&small(Format::Int8));
    let handle = rig.open_prompt(0, 0..0);
    let batch = append(&mut rig, handle.id(), 0, 1, BLOCK);
    let ticket = rig.submit(batch);
    rig.flush();
    while rig.device.advance(LaneKind::Compute) {}
    rig.report(LaneKind::Compute);
    assert!(answer(&mut rig, ticket).is_ok());
    assert!(rig.core().block_key(handle.id(), 0).is_some());
    let (bytes, pin) = pin(&rig, &handle, 0);
    drop(pin);
    let block = handle.shared().state().blocks[0];
    assert!(!rig.core().blocks().place(block).unwrap().unsealable);
    rig.device.damage(bytes.start, f32::INFINITY);
    rig.settle();
    assert!(rig.core().blocks().place(block).unwrap().unsealable, "nobody has to wait for its seal");
    assert_eq!(rig.core().block_key(handle.id(), 0), None);
    assert_eq!(rig.core_mut().counters().seal_failures, 1);
    assert!(!rig.core().wants_to_seal(), "it is not tried again and again");
    // The undamaged rows are still there.
    let answer = rig.run(read(handle.id(), 1..BLOCK)).remove(0);
    assert!(is_read(&rig, &answer, 0, &[2, 3, 4]), "{answer:?}");
    finish(rig, [handle]);
}

/// 13. A lost device: whoever waits hears of it, and permits, tokens and sequences are given back.
#[test]
fn a_lost_device_answers_everybody_and_keeps_nothing() {
    let mut rig = Rig::new(&small(Format::Int8));
    let handle = rig.open(0);
    must_append(&mut rig, handle.id(), 0, 1, BLOCK);
    let batch = append(&mut rig, handle.id(), 0, 10, 1);
    let waiting = rig.submit(batch);
    rig.flush();
    rig.lose();
    assert!(matches!(rig.take(waiting), Some(Err(_))));
    rig.assert_empty();
}

/// In a shared domain a chain of blocks is made by several tenants. What one of them computed goes with all that comes behind it, and
/// nothing that was there stands in the way of what takes its place.
#[test]
fn what_is_behind_an_invalidated_block_goes_with_it() {
    for format in [Format::Raw, Format::Int8] {
        let mut rig = Rig::new(&small(format));
        let ids: Vec<u32> = (1..100).map(token_id).collect();
        let prompt = || OpenOptions::default().prompt(&ids).shared_domain("domain");
        let first = rig.open_with(0, prompt());
        must_append(&mut rig, first.id(), 0, 1, BLOCK);
        let second = rig.open_with(1, prompt());
        assert_eq!(second.shared().committed(), BLOCK);
        must_append(&mut rig, second.id(), 0, 1 + u64::from(BLOCK), 2 * BLOCK);
        drop((first, second));
        rig.settle();
        let mut batch = BatchCacheOperations::new();
        batch.invalidate(0, Invalidate::Tenant(tenant_name(0).as_str().into()));
        let invalidated = rig.run(batch).remove(0);
        assert!(matches!(invalidated, Ok(Outcome::Invalidated { blocks: 3 })), "{invalidated:?}");
        rig.core().audit().expect("consistent");
        let again = rig.open_with(1, prompt());
        assert_eq!(again.shared().committed(), 0);
        must_append(&mut rig, again.id(), 0, 1, 3 * BLOCK);
        finish(rig, [again]);
    }
}

/// A write that has gone well is answered so even if the tokens that it was time to drop cannot be dropped: a launch fails while they are
/// scored, or while they are copied, or there is no room. They are all there, and the next write drops them.
#[test]
fn a_write_stands_when_dropping_behind_it_fails() {
    for failing in [Some(1), Some(2), None] {
        let dropping = Some(Dropping { score: Some(KeyScore::Norm), ratio: 0.5 });
        let mut rig = Rig::new(&Setup { dropping, ..small(Format::Raw) });
        let handle = rig.open(0);
        let room = if failing.is_none() { 8 } else { 4 };
        let batch = append(&mut rig, handle.id(), 0, 1, room * BLOCK);
        // Takes the blocks that the copies would go to.
        let others = failing.is_none().then(|| fill_pool_to(&mut rig, 1, 8 + 2));
        let ticket = rig.submit(batch);
        // The append, the scores, the copies.
        for launch in 0..3 {
            rig.flush();
            match failing {
                Some(at) if at == launch => assert!(rig.device.fail(LaneKind::Compute, true)),
                _ => while rig.device.advance(LaneKind::Compute) {},
            }
            while rig.report(LaneKind::Compute) {}
            rig.core().audit().expect("consistent");
        }
        let committed = room * BLOCK;
        let answer = answer(&mut rig, ticket);
        assert!(
            matches!(answer, Ok(Outcome::Appended { committed: told }) if told == committed),
            "{answer:?}"
        );
        must_read(&mut rig, handle.id(), 0, 1..=u64::from(committed));
        drop(others);
        rig.close_dropped();
        rig.settle();
        must_append(&mut rig, handle.id(), 0, 1 + u64::from(committed), 1);
        let state = handle.shared().state();
        assert_eq!(state.stored(state.committed), (committed + 1).div_ceil(2), "dropped now");
        drop(state);
        finish(rig, [handle]);
    }
}
