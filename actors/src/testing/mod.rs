//! Test support: a simulated device, a naive model of a cache, and a seeded scheduler that drives the pure cores against it.
//!
//! Compiled for this crate's tests and with the `testing` feature. Everything here is plain, safe, synchronous Rust; a run
//! depends on its seed alone, so a seed that once failed can be run again.
//!
//! | module | what |
//! |---|---|
//! | [`sim`] | a device whose lanes move when told to, fail when told to, and get lost when told to |
//! | [`tracker`] | what the simulated device checks: reads of rows that nobody wrote, lanes that get into each other's way |
//! | [`values`] | keys and values that follow from a stamp, survive `int8` unchanged, and show whose they are |
//! | [`rig`] | one core on one simulated device, driven by hand |
//! | [`model`] | the naive model: sequence → tokens → values |
//! | [`scenario`] | random settings |
//! | [`oracle`] | the scheduler: random operations, any legal order, every answer checked against the model |
//! | [`replay`] | deterministic mode: the same operations, differently cut, give the same bytes and places |

#[cfg(all(test, shuttle))]
mod interleavings;
pub mod model;
pub mod oracle;
pub mod replay;
pub mod rig;
mod rng;
pub mod scenario;
pub mod sim;
pub mod tracker;
pub mod values;

pub use self::rng::Rng;
