//! `BatchCacheOperations` with typed tensors and handles.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use kv_cache_actors::batch::{BatchCacheOperations as Inner, EachTensors, Outcome as InnerOutcome};
use kv_cache_actors::memory::ReadBuffer;
use kv_cache_actors::reach::LentMemory;

use crate::element::{Element, check_type, tensor};
use crate::runtime::Runtime;
use crate::{
    ElementType, Error, ExtraIdentity, OpenOptions, Sequence, SequenceId, Tenant, Tier, TokenScores,
};

/// Any mix of operations over any sequences, submitted and validated as one batch: one message, one result per operation.
///
/// Operations on one sequence take effect in their order, each as if alone: one that fails leaves its sequence as it was,
/// and the next one finds it so. Operations on different sequences may take effect in any order.
///
/// The batch owns copies of the tensors given to it, so it can be built anywhere and submitted later.
///
/// ```
/// # use kv_cache::*;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let cache = Cache::builder(Geometry::new(1, 1, 4, ElementType::F32)).memory_bytes_per_device(1 << 20).build().await?;
/// let (a, b) = (cache.open("tenant", OpenOptions::default()).await?, cache.open("tenant", OpenOptions::default()).await?);
/// let batch = BatchCacheOperations::new()
///     .append(&a, &[7], &[0.5f32; 4], &[1.5f32; 4])
///     .append(&b, &[8], &[f32::NAN; 4], &[0.0f32; 4])
///     .read(&a, 0, 0..1)
///     .fork(&a, 2);
/// let results = cache.submit(batch).await?;
/// assert!(matches!(results[0], Ok(Outcome::Appended { committed: 1 })));
/// assert_eq!(results[1].as_ref().unwrap_err(), &Error::NotFinite);
/// let Ok(Outcome::Read(read)) = &results[2] else { panic!() };
/// assert!(matches!(&results[3], Ok(Outcome::Forked(forks)) if forks.len() == 2));
/// # assert_eq!(read.clone().into_elements::<f32>()?.1, vec![1.5; 4]);
/// # Ok(()) }
/// ```
#[derive(Debug, Default)]
#[must_use = "a batch does nothing until it is submitted"]
pub struct BatchCacheOperations(pub(crate) Inner);

impl BatchCacheOperations {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn lent(memory: Box<dyn LentMemory>) -> Self {
        BatchCacheOperations(Inner::lent(memory))
    }

    /// Sets memory for `elements` elements aside in a batch made by [`Cache::batch`](crate::Cache::batch), to be filled
    /// ([`BatchCacheOperations::fill`]) and appended without a copy. It is zero until then.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the batch has no lent memory, or not so much left.
    pub fn region<T: Element>(&mut self, elements: usize) -> Result<Region<T>, Error> {
        let bytes = elements.checked_mul(size_of::<T>());
        let start = bytes.and_then(|bytes| self.0.region(bytes)).ok_or(Error::Unsupported {
            what: "a region of more memory than the batch was lent",
            instead: "make the batch with `Cache::batch` and enough bytes",
        })?;
        Ok(Region { batch: self.0.arena_id(), start, elements, element: PhantomData })
    }

    /// The elements of a region of this batch; none of one of another batch.
    pub fn fill<T: Element>(&mut self, region: &Region<T>) -> &mut [T] {
        if region.batch != self.0.arena_id() {
            return &mut [];
        }
        let bytes = self.0.arena_mut().get_mut(region.bytes());
        // Lent memory is aligned, and so are regions.
        bytes.and_then(|bytes| bytemuck::try_cast_slice_mut(bytes).ok()).unwrap_or_default()
    }

    /// [`BatchCacheOperations::append`] of tensors that stand in regions of this batch.
    pub fn append_region<T: Element>(
        mut self,
        sequence: impl Into<SequenceId>,
        token_ids: &[u32],
        keys: &Region<T>,
        values: &Region<T>,
    ) -> Self {
        if !self.holds(keys) || !self.holds(values) {
            self.0.refused(foreign_region());
        } else {
            self.0.append_region(sequence.into(), token_ids, T::TYPE, keys.bytes(), values.bytes());
        }
        self
    }

    /// Every operation must be on a sequence of `tenant`; others fail with [`Error::TenantMismatch`].
    pub fn only_tenant(mut self, tenant: impl Into<Tenant>) -> Self {
        self.0.only_tenant(tenant.into());
        self
    }

    /// Makes room for `bytes` bytes of tensors, so that filling the batch allocates once.
    pub fn reserve_bytes(mut self, bytes: usize) -> Self {
        self.0.reserve_bytes(bytes);
        self
    }

    /// Opens a sequence: [`Outcome::Opened`].
    pub fn open(mut self, tenant: impl Into<Tenant>, options: OpenOptions) -> Self {
        self.0.open(options.tenant(tenant));
        self
    }

    /// Appends tokens to all layers: [`Outcome::Appended`]. `keys` is `[layers, tokens, kv_heads, key_dim]`, `values` likewise.
    pub fn append<T: Element>(
        mut self,
        sequence: impl Into<SequenceId>,
        token_ids: &[u32],
        keys: &[T],
        values: &[T],
    ) -> Self {
        self.0.append(sequence.into(), None, token_ids, None, tensor(keys), tensor(values));
        self
    }

    /// [`BatchCacheOperations::append`] that fails with [`Error::Position`] unless exactly `at` tokens are committed, and
    /// whose tokens may carry more identity than their ids (the hash of an image).
    pub fn append_at<T: Element>(
        mut self,
        sequence: impl Into<SequenceId>,
        at: u32,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
        keys: &[T],
        values: &[T],
    ) -> Self {
        self.0.append(sequence.into(), Some(at), token_ids, extra, tensor(keys), tensor(values));
        self
    }

    /// Stages tokens of one layer behind what that layer holds: [`Outcome::Staged`]. `keys` is `[tokens, kv_heads, key_dim]`.
    pub fn stage<T: Element>(
        mut self,
        sequence: impl Into<SequenceId>,
        layer: u32,
        tokens: u32,
        keys: &[T],
        values: &[T],
    ) -> Self {
        self.0.stage(sequence.into(), layer, tokens, tensor(keys), tensor(values));
        self
    }

    /// Appends one token to each of some sequences, as a decode step does: an operation, and a result, per sequence, over
    /// tensors that they share. `keys` is `[layers, sequences, kv_heads, key_dim]`, `values` likewise.
    pub fn append_each<T: Element>(
        mut self,
        sequences: &[&Sequence],
        token_ids: &[u32],
        keys: &[T],
        values: &[T],
    ) -> Self {
        self.0.append_each(ids(sequences), token_ids, EachTensors::Host(tensor(keys), tensor(values)));
        self
    }

    /// [`BatchCacheOperations::append_each`] of tensors that stand in regions of this batch.
    pub fn append_each_region<T: Element>(
        mut self,
        sequences: &[&Sequence],
        token_ids: &[u32],
        keys: &Region<T>,
        values: &Region<T>,
    ) -> Self {
        match self.holds(keys) && self.holds(values) {
            true => {
                let tensors = EachTensors::Region(T::TYPE, keys.bytes(), values.bytes());
                self.0.append_each(ids(sequences), token_ids, tensors);
            }
            false => sequences.iter().for_each(|_| self.0.refused(foreign_region())),
        }
        self
    }

    /// Stages one token of one layer for each of some sequences: an operation, and a result, per sequence. `keys` is
    /// `[sequences, kv_heads, key_dim]`, `values` likewise.
    pub fn stage_each<T: Element>(
        mut self,
        sequences: &[&Sequence],
        layer: u32,
        keys: &[T],
        values: &[T],
    ) -> Self {
        self.0.stage_each(ids(sequences), layer, EachTensors::Host(tensor(keys), tensor(values)));
        self
    }

    fn holds<T: Element>(&self, region: &Region<T>) -> bool {
        region.batch == self.0.arena_id()
    }

    /// Commits the first `token_ids.len()` staged tokens and discards the others: [`Outcome::Committed`].
    pub fn commit(mut self, sequence: impl Into<SequenceId>, token_ids: &[u32]) -> Self {
        self.0.commit(sequence.into(), token_ids, None);
        self
    }

    /// Reads tokens of one layer: [`Outcome::Read`].
    pub fn read(mut self, sequence: impl Into<SequenceId>, layer: u32, tokens: Range<u32>) -> Self {
        self.0.read(sequence.into(), layer, tokens);
        self
    }

    /// Forks a sequence `count` times: [`Outcome::Forked`].
    pub fn fork(mut self, sequence: impl Into<SequenceId>, count: u32) -> Self {
        self.0.fork(sequence.into(), count);
        self
    }

    /// Cuts a sequence to `tokens` committed tokens: [`Outcome::Truncated`].
    pub fn truncate(mut self, sequence: impl Into<SequenceId>, tokens: u32) -> Self {
        self.0.truncate(sequence.into(), tokens);
        self
    }

    /// Moves the sealed blocks of a sequence to a tier: [`Outcome::Moved`]. See [`Sequence::offload`].
    pub fn move_to(mut self, sequence: impl Into<SequenceId>, tier: Tier) -> Self {
        self.0.move_to(sequence.into(), tier);
        self
    }

    /// Drops tokens by their scores: [`Outcome::Dropped`]. See [`Sequence::drop_tokens`].
    pub fn drop_tokens(
        mut self,
        sequence: impl Into<SequenceId>,
        keep: u32,
        scores: impl Into<TokenScores>,
    ) -> Self {
        self.0.drop_tokens(sequence.into(), keep, scores.into());
        self
    }

    /// Closes a sequence before its handle is dropped: [`Outcome::Closed`].
    pub fn close(mut self, sequence: impl Into<SequenceId>) -> Self {
        self.0.close(sequence.into());
        self
    }

    /// Operations in the batch.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no operation.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub(crate) fn ids(sequences: &[&Sequence]) -> impl ExactSizeIterator<Item = SequenceId> {
    sequences.iter().map(|sequence| sequence.id())
}

fn foreign_region() -> Error {
    Error::Unsupported {
        what: "a region of another batch",
        instead: "append what this batch's `region` gave",
    }
}

/// Memory of a batch that its caller fills: see [`BatchCacheOperations::region`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region<T> {
    /// The batch that it is of.
    batch: u64,
    start: usize,
    elements: usize,
    element: PhantomData<T>,
}

impl<T: Element> Region<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// Some of its elements. Those behind the end are left out, and the operation's shape check finds them missing.
    #[must_use]
    pub fn slice(&self, elements: Range<usize>) -> Region<T> {
        let end = elements.end.min(self.elements);
        let start = elements.start.min(end);
        Region { start: self.start + start * size_of::<T>(), elements: end - start, ..self.clone() }
    }

    fn bytes(&self) -> Range<usize> {
        self.start..self.start + self.elements * size_of::<T>()
    }
}

/// What an operation of a batch has done.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// A sequence was opened.
    Opened(Sequence),
    /// Tokens were appended.
    Appended {
        /// Committed tokens now.
        committed: u32,
    },
    /// A layer was staged.
    Staged {
        /// First token that the layer does not hold.
        staged: u32,
    },
    /// Staged tokens were committed.
    Committed {
        /// Committed tokens now.
        committed: u32,
    },
    /// Tokens were read.
    Read(KeysValues),
    /// Tokens were read into device memory.
    ReadDevice {
        /// Tokens read.
        tokens: u32,
    },
    /// A sequence was forked.
    Forked(Vec<Sequence>),
    /// A sequence was cut.
    Truncated {
        /// Committed tokens now.
        committed: u32,
    },
    /// Sealed blocks were moved to another tier.
    Moved {
        /// Blocks that were not there yet.
        blocks: u32,
    },
    /// Tokens were dropped by their scores.
    Dropped {
        /// Committed tokens that are still there.
        kept: u32,
    },
    /// A sequence was closed.
    Closed,
}

impl Outcome {
    pub(crate) fn new(inner: InnerOutcome, runtime: &Arc<Runtime>) -> Result<Outcome, Error> {
        Ok(match inner {
            InnerOutcome::Opened(open) => Outcome::Opened(Sequence::new(open, runtime.clone())),
            InnerOutcome::Appended { committed } => Outcome::Appended { committed },
            InnerOutcome::Staged { staged } => Outcome::Staged { staged },
            InnerOutcome::Committed { committed } => Outcome::Committed { committed },
            InnerOutcome::Read(buffer) => Outcome::Read(KeysValues::new(buffer, runtime.layout.element)),
            InnerOutcome::ReadDevice { tokens } => Outcome::ReadDevice { tokens },
            InnerOutcome::Forked(forks) => {
                Outcome::Forked(forks.into_iter().map(|fork| Sequence::new(fork, runtime.clone())).collect())
            }
            InnerOutcome::Truncated { committed } => Outcome::Truncated { committed },
            InnerOutcome::Moved { blocks } => Outcome::Moved { blocks },
            InnerOutcome::Dropped { kept } => Outcome::Dropped { kept },
            InnerOutcome::Closed => Outcome::Closed,
            // No batch of a caller's asks for it.
            other @ InnerOutcome::Invalidated { .. } => return Err(crate::sequence::unexpected(&other)),
            _ => {
                return Err(Error::Unsupported {
                    what: "an outcome of a newer core",
                    instead: "upgrade kv-cache",
                });
            }
        })
    }
}

/// Keys `[tokens, kv_heads, key_dim]` and values `[tokens, kv_heads, value_dim]` of one layer, decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct KeysValues {
    buffer: Box<ReadBuffer>,
    element: ElementType,
}

impl KeysValues {
    pub(crate) fn new(buffer: Box<ReadBuffer>, element: ElementType) -> Self {
        KeysValues { buffer, element }
    }

    /// The elements, without a copy.
    ///
    /// # Errors
    /// [`Error::ElementType`] if `T` is not the cache's element type.
    pub fn into_elements<T: Element>(self) -> Result<(Vec<T>, Vec<T>), Error> {
        check_type::<T>(self.element)?;
        let mismatch = || Error::ElementType { given: T::TYPE, expected: self.element };
        let ReadBuffer { keys, values } = *self.buffer;
        let keys = T::from_elements(keys).ok_or_else(mismatch)?;
        let values = T::from_elements(values).ok_or_else(mismatch)?;
        Ok((keys, values))
    }

    /// Key bytes, little endian.
    pub fn key_bytes(&self) -> &[u8] {
        self.buffer.keys.bytes()
    }

    /// Value bytes, little endian.
    pub fn value_bytes(&self) -> &[u8] {
        self.buffer.values.bytes()
    }
}
