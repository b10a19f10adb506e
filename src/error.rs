//! Errors of building a cache. Errors of operations are [`Error`](crate::Error).

pub use kv_cache_actors::error::{ConfigError, Error, ErrorKind};

/// Why a cache could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A setting is wrong; the message names it and the fix.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration text could not be read.
    #[error("the configuration could not be read: {0}")]
    Parse(String),
    /// A file of mean keys could not be read or written, or is one of another model.
    #[error("{file}: no mean keys of this model: {reason}")]
    KeyMeans {
        /// Which file.
        file: String,
        /// Why.
        reason: String,
    },
    /// The budgets of all devices together do not fit in the machine's memory.
    #[error(
        "{requested_bytes} bytes of cache asked for, {available_bytes} available: {missing_bytes} are missing; lower `memory_bytes_per_device`"
    )]
    Memory {
        /// Bytes of all slabs on this memory.
        requested_bytes: u64,
        /// Bytes that can be had.
        available_bytes: u64,
        /// The difference.
        missing_bytes: u64,
    },
    /// A device could not be opened.
    #[error("{device} could not be opened: {reason}")]
    Device {
        /// Which device.
        device: String,
        /// Why.
        reason: String,
    },
    /// `build` was called outside of a tokio runtime.
    #[error("no tokio runtime is running here; call `build_blocking`")]
    NoRuntime,
}
