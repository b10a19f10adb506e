//! The synchronisation primitives that the model checkers swap.
//!
//! Everything in this crate that shares memory between threads imports its primitives from here: `std` in a normal
//! build, `shuttle` under `--cfg shuttle` (permits, replies, slots), and for the lock-free [`crate::slot`] states `loom`
//! under `--cfg loom`. Channels of other crates are not modelled; a claim about interleavings covers this module only.

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};
#[cfg(not(shuttle))]
pub(crate) use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};

/// What lock-free code is made of. Loom's primitives work only inside its models, so nothing else gets them.
pub(crate) mod lock_free {
    #[cfg(not(loom))]
    pub(crate) use super::{Arc, AtomicU64, Ordering};
    #[cfg(loom)]
    pub(crate) use loom::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    /// Between a `SeqCst` store and a `SeqCst` load that follows it. Loom takes such accesses for weaker ones and knows the order of all
    /// threads from fences only; everywhere else the accesses are enough.
    pub(crate) fn loom_fence() {
        #[cfg(loom)]
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// Locks `mutex`, also after a holder panicked.
///
/// Every critical section of this crate leaves its data consistent at each statement that can unwind, and a shard whose
/// actor panicked is marked lost by its supervisor: poisoning would only turn that typed error into a second panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
