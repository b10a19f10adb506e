//! Who has which block pinned: notes in stripes, one for each of the threads that look up.
//!
//! Counting pins in the block's own word would make threads that find the same block write to one cache line, and so would counting
//! them all to keep the table alive. A thread notes the block in its stripe instead, and *then* looks whether the block can still be found;
//! the writer hides a block and *then* looks through the notes. With a fence in between on both sides one of them sees the other (as
//! hazard pointers work; Michael, "Safe memory reclamation for lock-free objects", 2004). Leases that wait in a queue can be more than a
//! stripe has room for: those are counted in the block's word after all.

use std::sync::atomic::AtomicUsize;

use super::{BlockId, Table};
use crate::sync::lock_free::{Arc, AtomicU64, Ordering, fence};

/// More threads share stripes. The writer looks through all that were ever used.
const STRIPES: usize = if cfg!(loom) { 1 } else { 32 };

/// Notes of a stripe: a cache line of them.
const NOTES: usize = if cfg!(loom) { 1 } else { 8 };

/// What one thread writes to when it looks up. Its counts lie in front of it, and nothing else in their line.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Stripe {
    /// `block + 1`; 0 is no note.
    notes: [AtomicU64; NOTES],
    table: Arc<Table>,
}

/// The stripes of a table.
#[derive(Debug)]
pub(super) struct Stripes {
    stripes: Vec<Arc<Stripe>>,
    /// A bit for each stripe that was ever used.
    used: AtomicU64,
}

impl Stripes {
    pub(super) fn new(table: &Arc<Table>) -> Self {
        let stripe = |_| {
            let notes = std::array::from_fn(|_| AtomicU64::new(0));
            Arc::new(Stripe { notes, table: table.clone() })
        };
        Stripes { stripes: (0..STRIPES).map(stripe).collect(), used: AtomicU64::new(0) }
    }

    /// The stripe of this thread.
    pub(super) fn own(&self) -> &Arc<Stripe> {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static OWN: usize = THREADS.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % STRIPES;
        }
        let own = OWN.with(|own| *own);
        // Before the note, and so before the fence behind it.
        if self.used.load(Ordering::Relaxed) >> own & 1 == 0 {
            self.used.fetch_or(1 << own, Ordering::Relaxed);
        }
        &self.stripes[own]
    }

    /// Whether a block that is hidden is noted anywhere.
    pub(super) fn have(&self, block: BlockId) -> bool {
        let mut left = self.used.load(Ordering::Relaxed);
        while left != 0 {
            let Stripe { notes, .. } = &*self.stripes[left.trailing_zeros() as usize];
            // Acquire pairs with the Release of those who let go.
            if notes.iter().any(|note| note.load(Ordering::Acquire) == note_of(block)) {
                return true;
            }
            left &= left - 1;
        }
        false
    }
}

fn note_of(block: BlockId) -> u64 {
    u64::from(block.0) + 1
}

/// Keeps a block what it is, until it is dropped.
#[derive(Debug)]
pub(super) struct Pin {
    stripe: Arc<Stripe>,
    block: BlockId,
    /// Where it is noted; none: counted in the block's word.
    note: Option<u8>,
}

impl Pin {
    /// Pins a block if it can be found. Its key has to be compared afterwards.
    pub(super) fn new(stripe: &Arc<Stripe>, block: BlockId) -> Option<Pin> {
        let table = &stripe.table;
        let Some(note) = stripe.note(block) else {
            return table.try_pin(block).then(|| Pin { stripe: stripe.clone(), block, note: None });
        };
        fence(Ordering::SeqCst);
        if table.is_published(block) {
            return Some(Pin { stripe: stripe.clone(), block, note: Some(note) });
        }
        stripe.forget(note);
        None
    }

    pub(super) fn block(&self) -> BlockId {
        self.block
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        match self.note {
            Some(note) => self.stripe.forget(note),
            None => self.stripe.table.unpin(self.block),
        }
    }
}

impl Stripe {
    /// Notes a block. None if there is no room.
    fn note(&self, block: BlockId) -> Option<u8> {
        let free = |note: &AtomicU64| {
            note.load(Ordering::Relaxed) == 0
                && note.compare_exchange(0, note_of(block), Ordering::Relaxed, Ordering::Relaxed).is_ok()
        };
        self.notes.iter().position(free).map(|note| note as u8)
    }

    fn forget(&self, note: u8) {
        self.notes[usize::from(note)].store(0, Ordering::Release);
    }
}
