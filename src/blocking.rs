//! The same cache for threads that do not run async code. Each call parks its thread until it is answered; do not call
//! these from async code, whose executor they would hold up.

use std::ops::Range;
use std::time::Duration;

use pollster::block_on;

use crate::batch::{BatchCacheOperations, Outcome};
use crate::cache::{Cache, PinnedPrefix, ShutdownReport};
use crate::element::Element;
use crate::error::BuildError;
use crate::{Error, Invalidate, OpenOptions, Sequence, Tenant, TokenScores};

/// A [`Cache`] for threads.
///
/// ```
/// use kv_cache::{Cache, ElementType, Geometry, OpenOptions};
/// let cache = Cache::builder(Geometry::new(1, 1, 4, ElementType::F32)).memory_bytes_per_device(1 << 20).build_blocking()?;
/// let sequence = cache.open("tenant", OpenOptions::default())?;
/// sequence.append(&[1], &[0.0f32; 4], &[1.0f32; 4])?;
/// assert_eq!(sequence.read::<f32>(0, 0..1)?.1, [1.0; 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct BlockingCache {
    cache: Cache,
}

impl BlockingCache {
    pub(crate) fn new(cache: Cache) -> Self {
        BlockingCache { cache }
    }

    /// The async cache behind it, for what needs no waiting.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// See [`Cache::open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(&self, tenant: impl Into<Tenant>, options: OpenOptions) -> Result<BlockingSequence, Error> {
        block_on(self.cache.open(tenant, options)).map(|sequence| BlockingSequence { sequence })
    }

    /// See [`Cache::pin`].
    ///
    /// # Errors
    /// As there.
    pub fn pin(&self, tenant: impl Into<Tenant>, options: OpenOptions) -> Result<PinnedPrefix, Error> {
        block_on(self.cache.pin(tenant, options))
    }

    /// See [`Cache::invalidate`].
    ///
    /// # Errors
    /// As there.
    pub fn invalidate(&self, what: Invalidate) -> Result<u64, Error> {
        block_on(self.cache.invalidate(what))
    }

    /// See [`Cache::submit`].
    ///
    /// # Errors
    /// As there.
    pub fn submit(&self, batch: BatchCacheOperations) -> Result<Vec<Result<Outcome, Error>>, Error> {
        block_on(self.cache.submit(batch))
    }

    /// See [`Cache::shutdown`].
    ///
    /// # Errors
    /// [`BuildError::Device`] if no timer can be had.
    pub fn shutdown(&self, deadline: Duration) -> Result<ShutdownReport, BuildError> {
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let timer = timer
            .map_err(|error| BuildError::Device { device: "a timer".into(), reason: error.to_string() })?;
        Ok(timer.block_on(self.cache.shutdown(deadline)))
    }
}

/// A [`Sequence`] for threads.
#[derive(Debug)]
pub struct BlockingSequence {
    sequence: Sequence,
}

impl BlockingSequence {
    /// The async sequence behind it, for what needs no waiting.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// See [`Sequence::append`].
    ///
    /// # Errors
    /// As there.
    pub fn append<T: Element>(&self, token_ids: &[u32], keys: &[T], values: &[T]) -> Result<u32, Error> {
        block_on(self.sequence.append(token_ids, keys, values))
    }

    /// See [`Sequence::stage`].
    ///
    /// # Errors
    /// As there.
    pub fn stage<T: Element>(&self, layer: u32, keys: &[T], values: &[T]) -> Result<u32, Error> {
        block_on(self.sequence.stage(layer, keys, values))
    }

    /// See [`Sequence::commit`].
    ///
    /// # Errors
    /// As there.
    pub fn commit(&self, token_ids: &[u32]) -> Result<u32, Error> {
        block_on(self.sequence.commit(token_ids))
    }

    /// See [`Sequence::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read<T: Element>(&self, layer: u32, tokens: Range<u32>) -> Result<(Vec<T>, Vec<T>), Error> {
        block_on(self.sequence.read(layer, tokens))
    }

    /// See [`Sequence::fork`].
    ///
    /// # Errors
    /// As there.
    pub fn fork(&self) -> Result<BlockingSequence, Error> {
        block_on(self.sequence.fork()).map(|sequence| BlockingSequence { sequence })
    }

    /// See [`Sequence::fork_many`].
    ///
    /// # Errors
    /// As there.
    pub fn fork_many(&self, count: u32) -> Result<Vec<BlockingSequence>, Error> {
        let forks = block_on(self.sequence.fork_many(count))?;
        Ok(forks.into_iter().map(|sequence| BlockingSequence { sequence }).collect())
    }

    /// See [`Sequence::drop_tokens`].
    ///
    /// # Errors
    /// As there.
    pub fn drop_tokens(&self, keep: u32, scores: impl Into<TokenScores>) -> Result<u32, Error> {
        block_on(self.sequence.drop_tokens(keep, scores))
    }

    /// See [`Sequence::close`].
    ///
    /// # Errors
    /// As there.
    pub fn close(self) -> Result<(), Error> {
        block_on(self.sequence.close())
    }

    /// See [`Sequence::truncate`].
    ///
    /// # Errors
    /// As there.
    pub fn truncate(&self, tokens: u32) -> Result<(), Error> {
        block_on(self.sequence.truncate(tokens))
    }
}
