//! The handle of one sequence.

use std::ops::Range;
use std::sync::Arc;

use kv_cache_actors::batch::{BatchCacheOperations as Inner, Outcome as InnerOutcome, read_bytes};
use kv_cache_actors::block::BlockId;
use kv_cache_actors::sequence::OpenSequence;

use crate::batch::{KeysValues, Outcome};
use crate::element::{Element, tensor};
use crate::runtime::Runtime;
use crate::view::{CommittedView, View};
use crate::{BlockFormat, Error, ExtraIdentity, SequenceId, Tenant, Tier, TokenScores};

/// An open sequence. Dropping it closes it, without waiting; its memory is free once what is in flight has ended.
///
/// Methods take `&self`: several may be in flight, and they take effect in the order in which they are
/// submitted: that of their first poll while permits are free, and under back-pressure that in which they get theirs.
///
/// Every async method is cancel-safe in the same way: a future dropped while it waits for a permit has done nothing; one
/// dropped later takes effect all the same, and only its result is lost. Nothing in between, no leak either way.
#[derive(Debug)]
pub struct Sequence {
    open: OpenSequence,
    runtime: Arc<Runtime>,
}

impl From<&Sequence> for SequenceId {
    fn from(sequence: &Sequence) -> Self {
        sequence.id()
    }
}

/// What a sequence holds just now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SequenceInfo {
    /// Committed tokens, dropped ones included.
    pub committed: u32,
    /// Up to which token each layer is staged; empty if nothing is.
    pub staged: Vec<u32>,
    /// Tokens that truncation has dropped.
    pub dropped: Range<u32>,
    /// Committed tokens that are there: those that were not dropped, one way or another.
    pub kept: u32,
    /// Blocks in the element type.
    pub raw_blocks: u32,
    /// Blocks in the sealed format, on every tier.
    pub sealed_blocks: u32,
    /// Of those, blocks in the host tier.
    pub host_blocks: u32,
    /// Full blocks in the element type that are about to be sealed: those that are to [stay raw](crate::Quantisation) are not, nor
    /// those that cannot be, since they held what is not finite ([`CoreCounters::seal_failures`](crate::CoreCounters::seal_failures) counts them).
    pub blocks_to_seal: u32,
}

impl Sequence {
    pub(crate) fn new(open: OpenSequence, runtime: Arc<Runtime>) -> Self {
        Sequence { open, runtime }
    }

    pub(crate) fn is_of(&self, runtime: &Arc<Runtime>) -> bool {
        Arc::ptr_eq(&self.runtime, runtime)
    }

    /// Its id, for batches of the cache that it was opened on: another cache may have given the same id out.
    pub fn id(&self) -> SequenceId {
        self.open.id()
    }

    /// Whose it is.
    pub fn tenant(&self) -> &Tenant {
        self.open.shared().tenant()
    }

    /// Committed tokens. Inline: no message.
    pub fn len(&self) -> u32 {
        self.open.shared().committed()
    }

    /// Whether no token is committed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the sequence holds. Inline: no message.
    pub fn info(&self) -> SequenceInfo {
        let state = self.open.shared().state();
        let places = &self.runtime.views[self.id().shard() as usize].places;
        let held = || state.blocks.iter().filter(|&&block| block != BlockId::DROPPED);
        let sealed = |block: &&BlockId| places.get(**block).is_some_and(|place| place.sealed);
        let sealed_blocks = held().filter(sealed).count() as u32;
        let in_host =
            |block: &&BlockId| places.get(**block).is_some_and(|place| place.class.tier() == Tier::Host);
        let host_blocks = held().filter(in_host).count() as u32;
        let keep = self.runtime.config.keep_raw();
        let stored = state.stored(state.committed);
        let full = stored as usize / self.runtime.layout.block_tokens;
        let to_seal = state.blocks.iter().take(full.saturating_sub(keep.window_blocks));
        let to_seal = to_seal.skip(keep.sinks as usize).filter(|&&block| block != BlockId::DROPPED);
        let waits =
            |block: &&BlockId| places.get(**block).is_none_or(|place| !place.sealed && !place.unsealable);
        let blocks_to_seal = to_seal.filter(waits).count() as u32;
        SequenceInfo {
            committed: state.committed,
            staged: state.staged.clone(),
            dropped: state.dropped(),
            kept: stored - state.dropped().len() as u32,
            raw_blocks: held().count() as u32 - sealed_blocks,
            sealed_blocks,
            host_blocks,
            blocks_to_seal,
        }
    }

    /// Appends tokens to all layers, and returns how many are committed then.
    ///
    /// `keys` is `[layers, tokens, kv_heads, key_dim]`, `values` `[layers, tokens, kv_heads, value_dim]`, tokens being
    /// `token_ids.len()`. The tensors are copied once a permit is had, before this future is next suspended.
    ///
    /// # Errors
    /// Nothing has changed on any error: [`Error::Empty`], [`Error::Shape`], [`Error::ElementType`], [`Error::NotFinite`],
    /// [`Error::Capacity`], [`Error::SequenceTooLong`], [`Error::TooManyTokens`], [`Error::StagedTokens`],
    /// [`Error::ClosedSequence`] (a batch closed it), [`Error::BatchTooLarge`], and those of a lost shard or closed cache.
    // No `async fn`s, here and below: they would keep their arguments twice, in every task that waits.
    pub fn append<T: Element>(
        &self,
        token_ids: &[u32],
        keys: &[T],
        values: &[T],
    ) -> impl Future<Output = Result<u32, Error>> {
        self.append_with(None, token_ids, None, keys, values)
    }

    /// [`Sequence::append`] that fails with [`Error::Position`] unless exactly `at` tokens are committed, and whose tokens
    /// may carry more identity than their ids (the hash of an image whose placeholder ids are all alike).
    ///
    /// # Errors
    /// As [`Sequence::append`].
    pub fn append_with<T: Element>(
        &self,
        at: Option<u32>,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
        keys: &[T],
        values: &[T],
    ) -> impl Future<Output = Result<u32, Error>> {
        let bytes = (size_of_val(keys) + size_of_val(values)) as u64;
        let build = move |batch: &mut Inner| {
            batch.append(self.id(), at, token_ids, extra, tensor(keys), tensor(values));
        };
        async move {
            match self.runtime.one(bytes, 0, build).await? {
                InnerOutcome::Appended { committed } => Ok(committed),
                other => Err(unexpected(&other)),
            }
        }
    }

    /// Writes tokens of one layer behind what that layer holds, as a model computes them, and returns up to which token the
    /// layer is staged then. `keys` is `[tokens, kv_heads, key_dim]`; how many tokens follows from its length.
    ///
    /// Reads of this layer by this handle see the tokens as soon as this returns; forks see them once they are committed.
    ///
    /// # Errors
    /// As [`Sequence::append`], and [`Error::Layer`].
    pub async fn stage<T: Element>(&self, layer: u32, keys: &[T], values: &[T]) -> Result<u32, Error> {
        let bytes = (size_of_val(keys) + size_of_val(values)) as u64;
        let per_token = self.runtime.layout.kv_heads * self.runtime.layout.key_dim;
        let tokens = keys.len().div_ceil(per_token) as u32;
        let build = |batch: &mut Inner| batch.stage(self.id(), layer, tokens, tensor(keys), tensor(values));
        match self.runtime.one(bytes, 0, build).await? {
            InnerOutcome::Staged { staged } => Ok(staged),
            other => Err(unexpected(&other)),
        }
    }

    /// Counts the first `token_ids.len()` staged tokens in and discards the other staged tokens: speculative decoding
    /// stages its draft and commits what was accepted. Returns how many tokens are committed then.
    ///
    /// # Errors
    /// [`Error::NotStaged`] if a layer lacks some of them; those of a lost shard or closed cache.
    pub async fn commit(&self, token_ids: &[u32]) -> Result<u32, Error> {
        self.commit_with(token_ids, None).await
    }

    /// [`Sequence::commit`] of tokens that carry more identity than their ids.
    ///
    /// # Errors
    /// As [`Sequence::commit`].
    pub async fn commit_with(&self, token_ids: &[u32], extra: Option<ExtraIdentity>) -> Result<u32, Error> {
        match self.runtime.one(0, 0, |batch| batch.commit(self.id(), token_ids, extra)).await? {
            InnerOutcome::Committed { committed } => Ok(committed),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads tokens of one layer, decoded: keys `[tokens, kv_heads, key_dim]` and values `[tokens, kv_heads, value_dim]`.
    ///
    /// # Errors
    /// [`Error::TokenRange`], [`Error::TokensDropped`], [`Error::Layer`], [`Error::ElementType`]; those of a lost shard or
    /// closed cache.
    pub async fn read<T: Element>(&self, layer: u32, tokens: Range<u32>) -> Result<(Vec<T>, Vec<T>), Error> {
        crate::element::check_type::<T>(self.runtime.layout.element)?;
        let bytes = read_bytes(&self.runtime.layout, &tokens, self.runtime.config.max_tokens);
        match self.runtime.one(bytes, 0, |batch| batch.read(self.id(), layer, tokens)).await? {
            InnerOutcome::Read(buffer) => {
                KeysValues::new(buffer, self.runtime.layout.element).into_elements()
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Borrows a layer in place, without a copy or a message. The blocks stay where they are while the view lives; what is
    /// appended meanwhile does not show in it. On a GPU a block is copied to host memory when it is first looked at, which
    /// blocks: good for checks and debugging; kernels go through [`Cache::block_table`](crate::Cache::block_table).
    ///
    /// # Errors
    /// [`Error::Layer`]; [`Error::ClosedSequence`]; [`Error::ShardLost`].
    pub fn view(&self, layer: u32) -> Result<View, Error> {
        View::new(&self.runtime, self.open.shared(), layer)
    }

    /// Borrows all layers of the committed tokens in place, with one look at each block: for a model that reads every layer in a step.
    /// Otherwise as [`Sequence::view`].
    ///
    /// # Errors
    /// [`Error::ClosedSequence`]; [`Error::ShardLost`].
    pub fn view_committed(&self) -> Result<CommittedView, Error> {
        CommittedView::new(&self.runtime, self.open.shared())
    }

    /// A sequence with the same committed tokens, sharing their blocks until one of the two writes to them.
    ///
    /// # Errors
    /// [`Error::TooManySequences`], [`Error::TooManyTokens`]; those of a lost shard or closed cache.
    pub async fn fork(&self) -> Result<Sequence, Error> {
        let mut forks = self.fork_many(1).await?;
        forks.pop().ok_or(Error::Empty)
    }

    /// `count` forks at once.
    ///
    /// # Errors
    /// As [`Sequence::fork`].
    pub async fn fork_many(&self, count: u32) -> Result<Vec<Sequence>, Error> {
        let outcome = self.runtime.one(0, count as usize, |batch| batch.fork(self.id(), count)).await?;
        match Outcome::new(outcome, &self.runtime)? {
            Outcome::Forked(forks) => Ok(forks),
            _ => Err(Error::Empty),
        }
    }

    /// Cuts the sequence to its first `tokens` committed tokens, and discards what is staged.
    ///
    /// Tokens that remain of a block sealed into a lossy format are decoded when the next token is appended, and stay this
    /// sequence's own from then on.
    ///
    /// # Errors
    /// [`Error::TokenRange`], [`Error::TokensDropped`]; those of a lost shard or closed cache.
    pub async fn truncate(&self, tokens: u32) -> Result<(), Error> {
        self.runtime.one(0, 0, |batch| batch.truncate(self.id(), tokens)).await.map(drop)
    }

    /// Drops committed tokens until `keep` are there, and returns how many that are: the first 4 (attention sinks) and the most recent ones stay
    /// (32, or half of what `keep` leaves for them if that is less), and of the others those with the highest scores. A token goes or stays for all
    /// layers and heads alike. Nothing happens if no more than `keep` are there.
    ///
    /// Scores are computed from the stored keys ([`KeyScore`](crate::KeyScore), attention-free), or come from the caller: one for each token that is
    /// there, in order of positions ([`Sequence::positions`]), the attention that it got for instance.
    ///
    /// Positions do not change: [`Sequence::len`] counts on from all tokens that ever were committed, keys stay rotated to where they stood, and
    /// reads name tokens by the positions that they had. What stays is copied to blocks of this sequence's own (of room for `keep` tokens,
    /// which has to be there before the old blocks go), which its forks share and prompts never find; the blocks that others hold too are
    /// left to them. Tokens from sealed blocks are decoded, and lose once more when they are sealed again. Reservations
    /// ([`OpenOptions`](crate::OpenOptions)) may come out a block short.
    ///
    /// # Errors
    /// Nothing was dropped on any error: [`Error::Scores`], [`Error::ScoreNotANumber`], [`Error::StagedTokens`], [`Error::Capacity`];
    /// [`Error::Unsupported`] in a cache that truncates; those of a lost shard or closed cache.
    pub async fn drop_tokens(&self, keep: u32, scores: impl Into<TokenScores>) -> Result<u32, Error> {
        let scores = scores.into();
        match self.runtime.one(scores.bytes(), 0, |batch| batch.drop_tokens(self.id(), keep, scores)).await? {
            InnerOutcome::Dropped { kept } => Ok(kept),
            other => Err(unexpected(&other)),
        }
    }

    /// Positions of the committed tokens that are there, ascending: all of them unless some were dropped. Inline: no message.
    pub fn positions(&self) -> Vec<u32> {
        let state = self.open.shared().state();
        let (stored, dropped) = (state.stored(state.committed), state.dropped());
        let positions = (0..stored).map(|at| state.position(at));
        positions.filter(|at| !dropped.contains(at)).collect()
    }

    /// Moves its sealed blocks to the host tier, and returns how many were not there yet. That frees memory of the device; blocks
    /// that forks share move for all of them.
    ///
    /// The blocks stay readable, in place and across the bus: [`Sequence::prefetch`] them before they are read often. Operations
    /// on this sequence wait until the move is done; those on others do not, except that large reads of the shard queue behind it
    /// (large appends behind a prefetch).
    ///
    /// Blocks that are not sealed yet stay, and blocks that another sequence has on their way already are not counted:
    /// [`Sequence::info`] says how many are where.
    ///
    /// # Errors
    /// [`Error::TierFull`]: nothing was moved; [`Error::Unsupported`] if the cache has no host tier; those of a lost shard or
    /// closed cache.
    pub async fn offload(&self) -> Result<u32, Error> {
        self.move_to(Tier::Host).await
    }

    /// Moves its sealed blocks back to the device, and returns how many were not there yet.
    ///
    /// # Errors
    /// [`Error::TierFull`]: nothing was moved; those of a lost shard or closed cache.
    pub async fn prefetch(&self) -> Result<u32, Error> {
        self.move_to(Tier::Device).await
    }

    async fn move_to(&self, tier: Tier) -> Result<u32, Error> {
        match self.runtime.one(0, 0, |batch| batch.move_to(self.id(), tier)).await? {
            InnerOutcome::Moved { blocks } => Ok(blocks),
            other => Err(unexpected(&other)),
        }
    }

    /// Closes the sequence and waits until its blocks are free.
    ///
    /// # Errors
    /// [`Error::ClosedSequence`]; those of a lost shard or closed cache.
    pub async fn close(self) -> Result<(), Error> {
        self.runtime.one(0, 0, |batch| batch.close(self.id())).await.map(drop)
    }

    /// Submits a batch of one operation of this sequence's.
    #[cfg(feature = "candle")]
    pub(crate) async fn submit_one(&self, batch: crate::BatchCacheOperations) -> Result<Outcome, Error> {
        let answered = self.runtime.submitter.submit(batch.0).await?;
        let first = answered.into_iter().next().ok_or(Error::Empty)?;
        Outcome::new(first?, &self.runtime)
    }

    #[cfg(feature = "candle")]
    pub(crate) fn layout(&self) -> &crate::BlockLayout {
        &self.runtime.layout
    }

    /// The GPU that holds it.
    #[cfg(feature = "candle-cuda")]
    pub(crate) fn device(&self) -> Option<u16> {
        self.runtime.memories[self.id().shard() as usize].device()
    }

    /// How the cache stores sealed blocks.
    pub fn sealed_format(&self) -> BlockFormat {
        self.runtime.config.sealed_format()
    }
}

/// An answer of the wrong kind: a defect of this crate, reported instead of a panic.
pub(crate) fn unexpected(outcome: &impl std::fmt::Debug) -> Error {
    tracing::error!(target: "kv_cache::runtime", ?outcome, "an operation was answered with another's outcome");
    Error::Device("an operation was answered with another's outcome".into())
}
