#![doc = include_str!("../README.md")]

mod backend;
mod batch;
mod blocking;
mod cache;
mod config;
mod element;
mod error;
mod runtime;
mod sequence;
mod telemetry;
mod view;

/// The arithmetic of the CPU device, usable by itself.
pub mod codec {
    pub use crate::backend::cpu::codec::Kernels;
}

pub use batch::{BatchCacheOperations, KeysValues, Outcome};
pub use blocking::{BlockingCache, BlockingSequence};
pub use cache::{Cache, CacheBuilder, ShutdownReport};
pub use config::{CacheConfig, Compression, CompressionMethod, Devices, EvictionStrategy, Quantisation};
pub use element::Element;
pub use error::{BuildError, ConfigError, Error, ErrorKind};
pub use half;
pub use kv_cache_actors::block::{ExtraIdentity, HashSecret};
pub use kv_cache_actors::format::Format;
pub use kv_cache_actors::geometry::{
    BlockLayout, ElementType, Geometry, LayerGroup, Plane, Rope, RopeLayout,
};
pub use kv_cache_actors::sequence::{OpenOptions, SequenceId, Tenant};
pub use kv_cache_actors::stats::{BatchSizes, CoreCounters, Percentiles};
pub use kv_cache_actors::supervisor::{ActorName, Exit};
pub use sequence::{Sequence, SequenceInfo};
pub use telemetry::{ShardReport, Stats};
pub use view::{BlockEntry, BlockTable, BlockView, Rows, Scales, SequenceRows, View};
