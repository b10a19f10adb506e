//! Who has which block pinned: notes in stripes, one for each of the threads that look up.
//!
//! Counting pins in the block's own word would make threads that find the same block write to one cache line, and so would counting
//! them all to keep the table alive. A thread notes the block in its stripe instead, and *then* looks whether the block can still be found;
//! the writer hides a block and *then* looks through the notes. These accesses are in one order for all threads (`SeqCst`), so one of
//! the two sees the other (as hazard pointers work; Michael, "Safe memory reclamation for lock-free objects", 2004). Leases that wait in a
//! queue can be more than a stripe has room for: those are counted in the block's word after all.

use std::sync::atomic::AtomicUsize;

use super::{BlockId, Table};
use crate::sync::lock_free::{Arc, AtomicU64, Ordering, loom_fence};

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
        if self.used.load(Ordering::SeqCst) >> own & 1 == 0 {
            self.used.fetch_or(1 << own, Ordering::SeqCst);
        }
        &self.stripes[own]
    }

    /// Whether a block that is hidden is noted anywhere.
    #[inline]
    pub(super) fn have(&self, block: BlockId) -> bool {
        let mut left = self.used.load(Ordering::SeqCst);
        while left != 0 {
            let Stripe { notes, .. } = &*self.stripes[left.trailing_zeros() as usize];
            if notes.iter().any(|note| note.load(Ordering::SeqCst) == note_of(block)) {
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
        let note = stripe.note(block);
        let entry = stripe.table.entry(block);
        if note.is_none() {
            entry.pins.fetch_add(1, Ordering::SeqCst);
        }
        loom_fence();
        // The key was there before the block was published.
        let is_published = entry.published.load(Ordering::SeqCst) != 0;
        if !is_published {
            stripe.unpin(block, note);
        }
        is_published.then(|| Pin { stripe: stripe.clone(), block, note })
    }

    pub(super) fn block(&self) -> BlockId {
        self.block
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.stripe.unpin(self.block, self.note);
    }
}

impl Stripe {
    /// Notes a block. None if there is no room.
    fn note(&self, block: BlockId) -> Option<u8> {
        let free = |note: &AtomicU64| {
            note.load(Ordering::Relaxed) == 0
                && note.compare_exchange(0, note_of(block), Ordering::SeqCst, Ordering::Relaxed).is_ok()
        };
        self.notes.iter().position(free).map(|note| note as u8)
    }

    /// Release: the writer may change what the block holds when it sees this.
    fn unpin(&self, block: BlockId, note: Option<u8>) {
        match note {
            Some(note) => self.notes[usize::from(note)].store(0, Ordering::Release),
            None => {
                let before = self.table.entry(block).pins.fetch_sub(1, Ordering::Release);
                assert!(before != 0, "a block was unpinned more often than pinned");
            }
        }
    }
}
