#![doc = include_str!("../README.md")]

mod backend;
mod batch;
mod blocking;
mod cache;
#[cfg(feature = "candle")]
pub mod candle;
pub mod cold;
#[cfg(any(feature = "candle", feature = "cuda"))]
mod columns;
mod config;
mod element;
mod error;
mod key_means;
mod runtime;
mod sequence;
mod telemetry;
mod view;

/// The arithmetic of the CPU device, usable by itself.
pub mod codec {
    pub use crate::backend::cpu::codec::{Kernels, RowCentres};
}

/// What only a CUDA device has: tensors that are on it already, points on its streams, and block tables for kernels.
///
/// A decode step whose keys and values a model has just computed on the GPU, without the host waiting for the device:
///
/// ```no_run
/// # use std::sync::Arc;
/// # use cudarc::driver::{CudaSlice, CudaStream};
/// # use kv_cache::{BatchCacheOperations, Cache, Error, Sequence, half::f16};
/// # use kv_cache::cuda::{DeviceTensor, StreamPoint};
/// # async fn step(cache: Cache, sequence: Sequence, stream: Arc<CudaStream>, k: Arc<CudaSlice<f16>>, v: Arc<CudaSlice<f16>>)
/// # -> Result<(), Error> {
/// let (keys, values) = (DeviceTensor::new(&k, &stream), DeviceTensor::new(&v, &stream));
/// // By the thread that has put the model's kernels on the stream.
/// let after = StreamPoint::record(&stream)?;
/// let batch = BatchCacheOperations::new().device_memory(after).append_device(&sequence, &[42], &keys, &values);
/// // On the cache's queue now; the stream may overwrite the tensors behind the point.
/// let step = cache.enqueue(batch).await?;
/// if let Some(point) = step.point() {
///     point.wait(&stream)?;
/// }
/// // Finite, and committed.
/// for result in step.done().await? {
///     result?;
/// }
/// # Ok(()) }
/// ```
///
/// # Block tables
///
#[doc = include_str!("backend/cuda/table.md")]
#[cfg(feature = "cuda")]
pub mod cuda {
    pub use crate::backend::cuda::interop::{DeviceTensor, Enqueued, StreamPoint};
    pub use crate::backend::cuda::measure::{Figure, driver_call_costs, kernel_figures};
    pub use crate::backend::cuda::table::{BlockStrides, DeviceBlockTable};
    pub use crate::backend::cuda::transfer::figures::{TransferFigure, transfer_figures};
}

pub use batch::{BatchCacheOperations, KeysValues, Outcome, Region};
pub use blocking::{BlockingCache, BlockingSequence};
pub use cache::{Cache, CacheBuilder, PinnedPrefix, ShutdownReport};
pub use config::{CacheConfig, Compression, CompressionMethod, Devices, Quantisation};
pub use element::Element;
pub use error::{BuildError, ConfigError, Error, ErrorKind};
pub use half;
pub use key_means::{KeyMeans, KeyMeansBuilder, KeyMeansError};
pub use kv_cache_actors::batch::Invalidate;
pub use kv_cache_actors::block::{BlockKey, ExtraIdentity, HashSecret};
pub use kv_cache_actors::dropping::{KeyScore, TokenScores};
pub use kv_cache_actors::events::{BlockEvent, BlockEvents, Missed};
pub use kv_cache_actors::eviction::EvictionPolicy;
pub use kv_cache_actors::format::{BlockFormat, Format, FormatLayout, History, RowFormat};
pub use kv_cache_actors::geometry::{
    BlockLayout, ElementType, Geometry, LayerGroup, Plane, Rope, RopeLayout,
};
pub use kv_cache_actors::limits::TenantLimits;
pub use kv_cache_actors::pool::Tier;
pub use kv_cache_actors::sequence::{OpenOptions, Prompt, RetentionHint, SequenceId, Tenant};
pub use kv_cache_actors::stats::{BatchSizes, CoreCounters, Percentiles};
pub use kv_cache_actors::supervisor::{ActorName, Exit};
pub use sequence::{Sequence, SequenceInfo};
pub use telemetry::{ShardReport, Stats};
pub use view::{BlockEntry, BlockTable, BlockView, CommittedView, Rows, Scales, SequenceRows, View};
