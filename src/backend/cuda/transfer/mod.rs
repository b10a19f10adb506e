//! Transfers between slots of a device and page-locked host memory, in one direction per engine.
//!
//! [`plan`] decides the way of every byte, [`paths`] owns the streams and the staging memory and enqueues, [`engine`] keeps
//! transfers in order and learns when they are done, [`calibrate`] measures what the ways cost on this machine, and
//! [`carrier`] is a copy lane's hold on an engine.

mod calibrate;
mod carrier;
mod engine;
pub(crate) mod figures;
mod paths;
mod plan;

pub(super) use self::carrier::Carrier;
pub(super) use self::engine::Traffic;
