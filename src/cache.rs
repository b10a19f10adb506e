//! The front door: building a cache, opening sequences, submitting batches, looking at it, shutting it down.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kv_cache_actors::batch::Outcome as InnerOutcome;
use kv_cache_actors::events::EventHub;
use kv_cache_actors::router::FaultInjector;
use kv_cache_actors::submission::Answered;
use kv_cache_actors::submit::Submitter;
use kv_cache_actors::supervisor::{ActorName, Exit};
use tracing::Instrument;

use crate::batch::{BatchCacheOperations, Outcome};
use crate::blocking::BlockingCache;
use crate::config::{CacheConfig, Compression, Devices};
use crate::error::BuildError;
use crate::runtime::{self, Runtime};
use crate::sequence::unexpected;
use crate::telemetry::Stats;
use crate::view::BlockTable;
use crate::{
    BlockEvents, BlockFormat, Error, Format, Geometry, Invalidate, OpenOptions, Sequence, SequenceId, Tenant,
};

/// A KV cache: cheap to clone, shared by all tasks of a server.
///
/// It ends with its last handle, or in an orderly way with [`Cache::shutdown`].
#[derive(Debug, Clone)]
pub struct Cache {
    runtime: Arc<Runtime>,
}

/// Settings under way to a [`Cache`].
#[derive(Debug, Clone)]
#[must_use]
pub struct CacheBuilder {
    config: CacheConfig,
}

impl CacheBuilder {
    /// Which devices; [`Devices::auto`] unless set.
    pub fn devices(mut self, devices: Devices) -> Self {
        self.config.devices = devices;
        self
    }

    /// Bytes of each device's slab; 1 GiB unless set.
    pub fn memory_bytes_per_device(mut self, bytes: u64) -> Self {
        self.config.memory_bytes_per_device = bytes;
        self
    }

    /// Formats that sealed blocks are re-encoded to when memory runs short; none unless set. See
    /// [`Quantisation::colder_formats`](crate::Quantisation::colder_formats).
    pub fn colder_formats(mut self, formats: &[Format]) -> Self {
        self.config.quantisation.colder_formats = formats.to_vec();
        self
    }

    /// Format of sealed blocks; unless set, one that does for any model: see [`Quantisation::format`](crate::Quantisation::format).
    pub fn sealed_format(mut self, format: impl Into<BlockFormat>) -> Self {
        let format = format.into();
        let of = &mut self.config.quantisation;
        let values = (format.values != format.keys).then_some(format.values);
        (of.enabled, of.format, of.values_format) = (!format.is_raw(), Some(format.keys), values);
        (of.raw_first_layers, of.raw_last_layers) = (format.raw_first_layers, format.raw_last_layers);
        self
    }

    /// Longest sequence, in tokens.
    pub fn max_tokens(mut self, tokens: u32) -> Self {
        self.config.max_tokens = tokens;
        self
    }

    /// Sequences that may be open at once.
    pub fn max_sequences(mut self, sequences: usize) -> Self {
        self.config.max_sequences = sequences;
        self
    }

    /// Operations and bytes that may be in flight.
    pub fn max_in_flight(mut self, jobs: usize, bytes: u64) -> Self {
        self.config.max_jobs_in_flight = jobs;
        self.config.max_bytes_in_flight = bytes;
        self
    }

    /// Token dropping; off unless set.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.config.compression = compression;
        self
    }

    /// The same submissions in the same order give the same bytes, placement and evictions.
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.config.deterministic = deterministic;
        self
    }

    /// Changes any other setting.
    pub fn configure(mut self, change: impl FnOnce(&mut CacheConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Opens the devices and starts the actors. Needs a tokio runtime, on which the router will run: nothing moves while nobody drives
    /// that runtime (a current-thread one outside of `block_on`), and the cache closes when it is dropped. A program that uses the
    /// cache from elsewhere takes [`CacheBuilder::build_blocking`], which gives the router a thread.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub async fn build(self) -> Result<Cache, BuildError> {
        let handle = tokio::runtime::Handle::try_current().map_err(|_| BuildError::NoRuntime)?;
        // Allocating and opening blocks, for seconds if the slab is large.
        let span = tracing::info_span!(target: "kv_cache::runtime", "build");
        let opened = handle.spawn_blocking(move || span.in_scope(|| runtime::open(self.config))).await;
        let (runtime, router) = opened.map_err(|error| BuildError::Device {
            device: "the cache".into(),
            reason: error.to_string(),
        })??;
        handle.spawn(router);
        Ok(Cache { runtime: Arc::new(runtime) })
    }

    /// [`CacheBuilder::build`] for programs without a tokio runtime: the router gets a thread of its own.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn build_blocking(self) -> Result<BlockingCache, BuildError> {
        let (runtime, router) = runtime::open(self.config)?;
        let failed = |error: std::io::Error| BuildError::Device {
            device: "the router".into(),
            reason: error.to_string(),
        };
        let tokio = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(failed)?;
        let thread = std::thread::Builder::new().name(ActorName::Router.to_string());
        thread.spawn(move || tokio.block_on(router)).map_err(failed)?;
        Ok(BlockingCache::new(Cache { runtime: Arc::new(runtime) }))
    }
}

/// A cached prefix that stays: see [`Cache::pin`]. Dropping it lets go of it, without waiting.
#[derive(Debug)]
#[must_use = "dropping it unpins the prefix"]
pub struct PinnedPrefix(Sequence);

impl PinnedPrefix {
    /// Tokens of the prompt that were cached, and are pinned.
    pub fn tokens(&self) -> u32 {
        self.0.len()
    }
}

/// How a shutdown went.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Everything that was in flight was answered, and every actor has ended, before the deadline.
    pub drained: bool,
    /// Operations that were still in flight at the deadline.
    pub abandoned_operations: u64,
    /// Actors that still run.
    pub running: Vec<ActorName>,
    /// How the others ended.
    pub exits: Vec<(ActorName, Exit)>,
}

impl Cache {
    /// A cache for `geometry` with default settings.
    pub fn builder(geometry: Geometry) -> CacheBuilder {
        CacheBuilder { config: CacheConfig::new(geometry) }
    }

    /// A cache with these settings.
    pub fn from_config(config: CacheConfig) -> CacheBuilder {
        CacheBuilder { config }
    }

    /// The settings.
    pub fn config(&self) -> &CacheConfig {
        &self.runtime.config
    }

    /// Opens a sequence, on the shard that holds most of its prompt, or else on that with the least load.
    ///
    /// With a prompt ([`OpenOptions::prompt`]) it begins with what of that is cached: [`Sequence::len`] says how many tokens need not be
    /// computed. Whole blocks are found (in a cache whose sealed blocks are `raw`, also the beginning of one), and never the prompt's last
    /// token, since a model has to be run on it in any case.
    ///
    /// # Errors
    /// [`Error::TooManySequences`]; [`Error::Capacity`] if what it reserves is not free; [`Error::ShardLost`] if no shard is
    /// left; [`Error::Closed`].
    pub async fn open(&self, tenant: impl Into<Tenant>, options: OpenOptions) -> Result<Sequence, Error> {
        let options = options.tenant(tenant);
        match self.runtime.one(0, 1, |batch| batch.open(options)).await? {
            InnerOutcome::Opened(open) => Ok(Sequence::new(open, self.runtime.clone())),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits for permits, submits the batch, and waits for all its results, which stand in the batch's order.
    ///
    /// Cancel-safe: dropped before it was submitted, nothing has happened; dropped later, the operations take effect, and
    /// sequences among their results close.
    ///
    /// # Errors
    /// What concerns the whole batch: [`Error::BatchTooLarge`], [`Error::TooManySequences`], [`Error::Closed`],
    /// [`Error::ShardLost`]. What goes wrong with one operation is its result.
    pub async fn submit(&self, batch: BatchCacheOperations) -> Result<Vec<Result<Outcome, Error>>, Error> {
        let results = self.runtime.submitter.submit(batch.0).await?;
        Ok(self.outcomes(results))
    }

    /// Submits if permits are free, and otherwise gives the batch back with the reason ([`Error::Overloaded`]).
    ///
    /// The batch is submitted when this returns: the future only waits for the results, and dropping it loses nothing else.
    ///
    /// # Errors
    /// The batch, as it was, with what [`Cache::submit`] would have said. (Operations that the door refuses are marked as
    /// such in it, and stay refused.)
    // The error is the batch, handed back as it came: boxing it would be the caller's loss.
    #[allow(clippy::type_complexity, clippy::result_large_err)]
    pub fn try_submit(
        &self,
        batch: BatchCacheOperations,
    ) -> Result<
        impl Future<Output = Result<Vec<Result<Outcome, Error>>, Error>> + Send + use<>,
        (BatchCacheOperations, Error),
    > {
        match self.runtime.submitter.try_submit(batch.0) {
            Ok(results) => {
                let cache = self.clone();
                Ok(async move { Ok(cache.outcomes(results.await?)) })
            }
            Err((batch, error)) => Err((BatchCacheOperations(batch), error)),
        }
    }

    pub(crate) fn outcomes(&self, answered: Answered) -> Vec<Result<Outcome, Error>> {
        answered
            .into_iter()
            .map(|result| result.and_then(|inner| Outcome::new(inner, &self.runtime)))
            .collect()
    }

    #[cfg_attr(not(any(feature = "candle", feature = "cuda")), expect(dead_code))]
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub(crate) fn submitter(&self) -> &Submitter {
        &self.runtime.submitter
    }

    /// An empty batch over `bytes` bytes of memory that the devices read in place: page-locked where there are GPUs. Tensors
    /// are copied once instead of twice, or not at all where they are computed into a [`Region`](crate::Region).
    ///
    /// The memory is the cache's and goes back when the batch is done: see [`CacheConfig::lent_memory_bytes`]. It is never more than
    /// [`CacheConfig::max_bytes_in_flight`], which no batch may exceed.
    pub fn batch(&self, bytes: usize) -> BatchCacheOperations {
        // More could not be submitted.
        let most = usize::try_from(self.runtime.config.max_bytes_in_flight).unwrap_or(usize::MAX);
        BatchCacheOperations::lent(self.runtime.lender.lend(bytes.min(most)))
    }

    /// Whether `tokens` new tokens would find room on some shard now, all raw, as a prefill leaves them before they are
    /// sealed. Inline, and only true until the next append: reserve with [`OpenOptions::reserve_tokens`] to be sure.
    pub fn can_admit(&self, tokens: u32) -> bool {
        self.runtime.can_admit(tokens)
    }

    /// Where one layer of some sequences lies, for attention kernels that read the cache in place. Inline: no message. The
    /// blocks stay where they are while the table lives.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::ClosedSequence`], [`Error::ShardLost`].
    pub fn block_table(&self, sequences: &[&Sequence], layer: u32) -> Result<BlockTable, Error> {
        // Ids repeat between caches: a handle of another one must not name a sequence of this one.
        if let Some(stranger) = sequences.iter().find(|sequence| !sequence.is_of(&self.runtime)) {
            return Err(Error::UnknownSequence(stranger.id()));
        }
        let ids: Vec<SequenceId> = sequences.iter().map(|sequence| sequence.id()).collect();
        BlockTable::new(&self.runtime, &ids, layer)
    }

    /// Keeps what is cached of a prompt, whatever eviction would say, until the result is dropped. It holds whole blocks, that of the
    /// prompt's end included, and counts as an open sequence.
    ///
    /// # Errors
    /// As [`Cache::open`]; [`Error::Empty`] without a prompt. Nothing of it being cached is none: see [`PinnedPrefix::tokens`].
    pub async fn pin(&self, tenant: impl Into<Tenant>, options: OpenOptions) -> Result<PinnedPrefix, Error> {
        if options.prompt.is_none() {
            return Err(Error::Empty);
        }
        let mut options = options;
        (options.whole_prompt, options.reserve_tokens) = (true, 0);
        Ok(PinnedPrefix(self.open(tenant, options).await?))
    }

    /// Lets prompts find some cached blocks no more, on every shard: after new weights for the model, or an adapter. Sequences that hold
    /// such blocks keep them. Returns how many blocks they were.
    ///
    /// Takes effect for every sequence that is opened after it has returned. What sequences compute that are open meanwhile can be found
    /// again: close them first.
    ///
    /// # Errors
    /// [`Error::Closed`]; [`Error::ShardLost`] if no shard is left.
    pub async fn invalidate(&self, what: Invalidate) -> Result<u64, Error> {
        let mut batch = kv_cache_actors::batch::BatchCacheOperations::new();
        (0..self.runtime.views.len()).for_each(|shard| batch.invalidate(shard as u16, what.clone()));
        let mut sum = 0;
        for result in self.runtime.submitter.submit(batch).await? {
            match result {
                Ok(InnerOutcome::Invalidated { blocks }) => sum += u64::from(blocks),
                // What was cached on it is gone.
                Err(Error::ShardLost { .. }) => {}
                Ok(other) => return Err(unexpected(&other)),
                Err(error) => return Err(error),
            }
        }
        Ok(sum)
    }

    /// Hears of every block that prompts find from now on, or find no more: for a router that sends requests to where their prefix is.
    /// What came before is not told. [`CacheConfig::event_capacity`] bounds how far a listener may fall behind.
    pub fn events(&self) -> BlockEvents {
        let hub = self.runtime.events.lock().unwrap_or_else(PoisonError::into_inner);
        // After the end: a stream that has ended, too.
        hub.as_ref().map_or_else(|| EventHub::new(1).subscribe(), EventHub::subscribe)
    }

    /// Counters, gauges and percentiles. Inline: no message.
    pub fn stats(&self) -> Stats {
        Stats::collect(&self.runtime)
    }

    /// Refuses new work, waits until what is in flight is answered and every actor has ended, at most until `deadline`.
    ///
    /// Sequences that are open close with it. When it has drained, the devices are let go of: the process may end. Cancel-safe: new work
    /// stays refused, and calling it again goes on waiting.
    ///
    /// # Panics
    /// Outside of a tokio runtime with time enabled.
    pub async fn shutdown(&self, deadline: Duration) -> ShutdownReport {
        let span = tracing::info_span!(target: "kv_cache::runtime", "shutdown");
        self.runtime.shutdown(deadline).instrument(span).await
    }

    /// The same cache for threads that do not run async code. Somebody has to drive the runtime that it was built on meanwhile: see
    /// [`CacheBuilder::build`].
    pub fn blocking(&self) -> BlockingCache {
        BlockingCache::new(self.clone())
    }

    /// Injects faults, for tests of what they do to a server.
    #[doc(hidden)]
    pub fn faults(&self) -> &FaultInjector {
        &self.runtime.faults
    }
}
