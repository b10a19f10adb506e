//! The actors and pure state machines of `kv-cache`. No `unsafe`, no hardware.
//!
//! This crate is the inside of the `kv-cache` crate, which adds the front door and the devices; embedders use that one.
//!
//! A request flows downwards only: a handle takes a permit and sends to the [`router`], which hands each shard one batch;
//! the [`device`] actor of the shard decides ([`device::DeviceCore`]) and launches work on lanes of the [`memory`] port, large
//! copies by way of its transfer actor; a finished launch climbs back once, as the reply.
#![cfg_attr(not(loom), forbid(unsafe_code))]

pub mod assembly;
pub mod batch;
pub mod block;
pub mod device;
pub mod directory;
pub mod dropping;
pub mod error;
pub mod events;
pub mod eviction;
pub mod format;
pub mod geometry;
pub mod index;
pub mod limits;
mod mailbox;
pub mod memory;
mod payload;
pub mod permit;
pub mod pool;
pub mod prefix;
pub mod reach;
pub mod reply;
pub mod router;
pub mod runs;
pub mod sequence;
pub mod slot;
pub mod stats;
pub mod submission;
pub mod submit;
pub mod supervisor;
mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tokens;
mod transfer;
mod usher;
