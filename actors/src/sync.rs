//! The synchronisation primitives that the model checkers swap.
//!
//! Everything in this crate that shares memory between threads imports its primitives from here: `std` in a normal
//! build, `loom` under `--cfg loom` (lock-free [`crate::slot`] states) and `shuttle` under `--cfg shuttle` (permits,
//! mailboxes, replies). Channels of other crates are not modelled; a claim about interleavings covers this module only.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};
#[cfg(loom)]
pub(crate) use std::sync::{Mutex, MutexGuard};

/// Locks `mutex`, also after a holder panicked.
///
/// Every critical section of this crate leaves its data consistent at each statement that can unwind, and a shard whose
/// actor panicked is marked lost by its supervisor: poisoning would only turn that typed error into a second panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
