//! Page-locked memory that callers fill and kernels read where it lies.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use kv_cache_actors::reach::LentMemory;
use kv_cache_actors::runs::Runs;

use super::driver::{DriverError, Gpu, PinnedMemory};

/// What is lent is a whole number of these: a decode step of a small model.
const UNIT_BYTES: usize = 64 << 10;

/// Lends page-locked memory that was allocated ahead. What was given back last is lent again first: it is still in the caches.
#[derive(Debug, Clone)]
pub(crate) struct Lender {
    memory: Arc<PinnedMemory>,
    free: Arc<Mutex<Runs>>,
}

impl Lender {
    /// Allocates `bytes` bytes that every GPU of the process reaches.
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Lender, DriverError> {
        let units = bytes / UNIT_BYTES;
        let memory = Arc::new(PinnedMemory::zeroed(gpu, units * UNIT_BYTES)?);
        Ok(Lender { memory, free: Arc::new(Mutex::new(Runs::new(units))) })
    }

    /// `bytes` bytes, if so many are free in a row. They hold what was in them before.
    pub(crate) fn lend(&self, bytes: usize) -> Option<Box<dyn LentMemory>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let run = free.take(bytes.div_ceil(UNIT_BYTES).max(1))?;
        Some(Box::new(Lent { lender: self.clone(), run, bytes }))
    }
}

#[derive(Debug)]
struct Lent {
    lender: Lender,
    run: Range<usize>,
    bytes: usize,
}

impl Lent {
    fn base(&self) -> *mut u8 {
        // SAFETY: the run is one of the memory's (3).
        unsafe { self.lender.memory.base().as_ptr().add(self.run.start * UNIT_BYTES) }
    }
}

impl LentMemory for Lent {
    fn bytes(&self) -> &[u8] {
        // SAFETY: initialised (8), inside the run, which is this value's alone; the device only reads from it.
        unsafe { std::slice::from_raw_parts(self.base(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively: no launch has it yet.
        unsafe { std::slice::from_raw_parts_mut(self.base(), self.bytes) }
    }

    fn is_reachable(&self) -> bool {
        true
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // The launches that read it hold it until they have landed.
        let mut free = self.lender.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.give_back(self.run.clone());
    }
}
