//! Slots: places of blocks in a device's slab, and who may touch them.
//!
//! A slot is owned by exactly one [`FilledSlot`] or [`VacantSlot`], both move-only, so it cannot be freed twice.
//! Readers that do not own it (views, copies on another lane) pin it inline through the shared [`SlotTable`]: a pin
//! succeeds only while the generation that the reader saw still holds, and a slot is claimed for reuse only at zero
//! pins. That one rule keeps "freed" from ever meaning "readable as somebody else's".

use crate::sync::lock_free::{Arc, AtomicU64, Ordering};

/// Number of a slot in its slab. Which bytes it names depends on the size class of its chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// Counts the times that a slot changed hands, in [`Generation::BITS`] bits. A reader's stale generation never pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// Bits that count. A reader would have to sleep through 2^28 owners of one slot to be fooled.
    pub const BITS: u32 = 28;

    fn next(self) -> Generation {
        Generation((self.0 + 1) & ((1 << Self::BITS) - 1))
    }
}

const PINS: u64 = 0xFFFF_FFFF;

/// `generation << 32 | pins`, changed by compare-and-swap only.
#[derive(Debug)]
struct SlotState(AtomicU64);

impl SlotState {
    fn new() -> Self {
        SlotState(AtomicU64::new(0))
    }

    fn try_pin(&self, generation: Generation) -> bool {
        let mut seen = self.0.load(Ordering::Acquire);
        loop {
            // A full pin counter refuses rather than spilling into the generation.
            if (seen >> 32) as u32 != generation.0 || seen & PINS == PINS {
                return false;
            }
            match self.0.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
    }

    fn unpin(&self) {
        let before = self.0.fetch_sub(1, Ordering::Release);
        assert!(before & PINS != 0, "a slot was unpinned more often than pinned");
    }

    #[inline]
    fn try_claim(&self, generation: Generation) -> Option<Generation> {
        let next = generation.next();
        // Acquire pairs with the Release in `unpin`: the last reader is done before the slot is written again.
        self.0
            .compare_exchange(
                u64::from(generation.0) << 32,
                u64::from(next.0) << 32,
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .ok()
            .map(|_| next)
    }

    fn pins(&self) -> u32 {
        (self.0.load(Ordering::Acquire) & PINS) as u32
    }
}

/// Generation and pins of every slot of one device, shared with the readers.
#[derive(Debug, Clone)]
pub struct SlotTable {
    states: Arc<Vec<SlotState>>,
}

impl SlotTable {
    /// A table of `slots` slots, all of generation 0 and unpinned.
    pub fn new(slots: usize) -> Self {
        SlotTable { states: Arc::new((0..slots).map(|_| SlotState::new()).collect()) }
    }

    /// Pins `slot` if `generation` still holds: the bytes stay in place until the pin is dropped.
    pub fn pin(&self, slot: SlotId, generation: Generation) -> Option<SlotPin> {
        self.states
            .get(slot.0 as usize)?
            .try_pin(generation)
            .then(|| SlotPin { states: self.states.clone(), slot })
    }

    /// Whether anybody but its owner is looking at the slot.
    pub(crate) fn is_pinned(&self, slot: &FilledSlot) -> bool {
        self.states[slot.id.0 as usize].pins() != 0
    }

    /// How many are looking at a slot.
    pub(crate) fn pins(&self, slot: SlotId) -> u32 {
        self.states[slot.0 as usize].pins()
    }

    /// The generation of a slot, by number.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn generation(&self, slot: usize) -> u32 {
        (self.states[slot].0.load(Ordering::Relaxed) >> 32) as u32
    }

    /// A slot that nobody has used yet. Called once per slot by the pool.
    pub(crate) fn first(&self, slot: SlotId) -> VacantSlot {
        VacantSlot { id: slot, generation: Generation(0) }
    }

    /// Ends the ownership of `slot`: pins of its generation can no longer be taken. Hands it back while a pin is held.
    #[inline]
    pub(crate) fn vacate(&self, slot: FilledSlot) -> Result<VacantSlot, FilledSlot> {
        match self.states[slot.id.0 as usize].try_claim(slot.generation) {
            Some(generation) => Ok(VacantSlot { id: slot.id, generation }),
            None => Err(slot),
        }
    }
}

/// Keeps the bytes of one slot in place. Dropping it never waits.
#[derive(Debug)]
#[must_use]
pub struct SlotPin {
    states: Arc<Vec<SlotState>>,
    slot: SlotId,
}

impl SlotPin {
    /// The slot that is pinned.
    pub fn slot(&self) -> SlotId {
        self.slot
    }
}

impl Drop for SlotPin {
    fn drop(&mut self) {
        self.states[self.slot.0 as usize].unpin();
    }
}

/// A slot with no content, owned.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct VacantSlot {
    id: SlotId,
    generation: Generation,
}

impl VacantSlot {
    /// Which slot.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// Makes it a block's.
    #[inline]
    pub(crate) fn fill(self) -> FilledSlot {
        FilledSlot { id: self.id, generation: self.generation }
    }
}

/// A slot that holds (or is being given) a block's bytes, owned.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct FilledSlot {
    id: SlotId,
    generation: Generation,
}

impl FilledSlot {
    /// Which slot.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// The generation under which readers may pin it.
    pub fn generation(&self) -> Generation {
        self.generation
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_pin_holds_the_slot_and_a_stale_generation_does_not_pin() {
        let table = SlotTable::new(1);
        let slot = table.first(SlotId(0)).fill();
        let seen = slot.generation();
        let pin = table.pin(SlotId(0), seen).expect("the generation holds");
        let slot = table.vacate(slot).expect_err("a pin is held");
        drop(pin);
        let vacant = table.vacate(slot).expect("no pin is held");
        assert!(
            table.pin(SlotId(0), seen).is_none(),
            "the old generation must not pin the next owner's bytes"
        );
        assert_ne!(vacant.fill().generation(), seen);
        assert!(table.pin(SlotId(7), seen).is_none(), "out of range is a miss, not a panic");
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::thread;

    /// Two readers race the owner's reuse: a pinned read and the next owner's write never meet, and no pin is lost.
    ///
    /// `RUSTFLAGS="--cfg loom" cargo test -p kv-cache-actors --lib --release loom`
    #[test]
    fn reuse_never_overlaps_a_pinned_read() {
        loom::model(|| {
            let table = SlotTable::new(1);
            let bytes = Arc::new(UnsafeCell::new(()));
            let slot = table.first(SlotId(0)).fill();
            let seen = slot.generation();
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let (table, bytes) = (table.clone(), bytes.clone());
                    thread::spawn(move || {
                        if let Some(_pin) = table.pin(SlotId(0), seen) {
                            // loom fails the test if the owner writes while this is borrowed.
                            bytes.with(|_| thread::yield_now());
                        }
                    })
                })
                .collect();
            let vacated = table.vacate(slot);
            if vacated.is_ok() {
                bytes.with_mut(|_| thread::yield_now());
            }
            for reader in readers {
                reader.join().unwrap();
            }
            if let Err(slot) = vacated {
                assert!(table.vacate(slot).is_ok(), "nobody looks any more");
            }
        });
    }
}
