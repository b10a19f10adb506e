//! One suite over every backend and format: what a cache promises, through the public handles.
//!
//! A case is an `async fn case<E: Number>(rig: Rig<E>)` named in its module's `conformance!` list, which makes one test of it
//! that runs on every setup of `tests/common/mod.rs`, in both formats and all element types. A new backend is one more setup.

#[path = "../common/mod.rs"]
mod common;

mod batches;
mod callers;
mod colder;
mod dropping;
mod memory;
mod mixed;
mod prefix;
mod prefix_events;
mod prefix_eviction;
mod random;
mod sharing;
mod steps;
mod tiers;
mod tokens;
mod views;
