//! Sequences as their owners see them: ids, tenants, the shared state that inline look-ups read, and the handle that closes.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::block::{BlockId, ExtraIdentity};
use crate::dropping::Compacted;
use crate::error::Error;
use crate::geometry::BlockLayout;
use crate::sync::{Arc, AtomicU32, Mutex, MutexGuard, Ordering, lock};

/// Tokens at the start of a sequence that token dropping always keeps (attention sinks).
pub const SINK_TOKENS: u32 = 4;

/// Names a sequence for the lifetime of the cache; never used again after it closes, and unknown to other caches of the process.
///
/// The cache (8 bits), the shard (8), the entry in the shard's table (20) and the entry's generation (28).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SequenceId(u64);

impl SequenceId {
    /// Most sequences of one shard.
    pub const PER_SHARD_MAX: usize = 1 << 20;

    pub(crate) fn new(cache: u8, shard: u16, index: u32, generation: u32) -> Self {
        debug_assert!((index as usize) < Self::PER_SHARD_MAX && generation < 1 << 28 && shard < 256);
        let (cache, shard) = (u64::from(cache), u64::from(shard & 0xff));
        SequenceId(cache << 56 | shard << 48 | u64::from(index) << 28 | u64::from(generation))
    }

    /// Which cache of the process it is of.
    pub(crate) fn cache(self) -> u8 {
        (self.0 >> 56) as u8
    }

    /// The shard it lives on.
    pub fn shard(self) -> u16 {
        u16::from((self.0 >> 48) as u8)
    }

    pub(crate) fn index(self) -> usize {
        (self.0 >> 28) as usize & (Self::PER_SHARD_MAX - 1)
    }

    pub(crate) fn generation(self) -> u32 {
        self.0 as u32 & ((1 << 28) - 1)
    }

    /// As a number, for logs and maps of the embedder's.
    pub fn as_u64(self) -> u64 {
        self.0
    }

    /// From a number that [`SequenceId::as_u64`] gave. Any other number is answered as an unknown sequence.
    pub fn from_u64(number: u64) -> Self {
        SequenceId(number)
    }
}

impl std::fmt::Debug for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sequence {}/{}.{}", self.shard(), self.index(), self.generation())
    }
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// Whose sequence it is. Tenants never see each other's bytes or share blocks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tenant(std::sync::Arc<str>);

impl Tenant {
    /// The tenant of this name.
    pub fn new(name: impl AsRef<str>) -> Self {
        Tenant(name.as_ref().into())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Tenant {
    fn from(name: &str) -> Self {
        Tenant::new(name)
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Tenant::new("default")
    }
}

/// What a sequence is opened with.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Whose it is.
    pub tenant: Tenant,
    /// Adapter (LoRA) that computes its keys and values: part of every block key.
    pub adapter: Option<String>,
    /// Raw blocks for this many tokens are set aside, so that appending them cannot fail for lack of room. Those that are found cached
    /// count among them.
    pub reserve_tokens: u32,
    /// What the sequence will begin with, as far as it is known: the cached part of it is there from the start. With a prompt, be it an
    /// empty one, a sequence also shares what it computes. None: it shares nothing, but with its forks.
    pub prompt: Option<Prompt>,
    /// How long blocks are kept when no sequence holds them, by the positions of their first tokens. The first hint that covers a
    /// position counts; where there is none, the eviction policy decides alone.
    pub retention: Vec<(Range<u32>, RetentionHint)>,
    /// Also the block of the prompt's last token is found: for whoever keeps a prompt cached, or knows already what comes after it. A model
    /// that has to go on from the prompt would have no token to run on.
    pub whole_prompt: bool,
    /// Shares with every sequence of this domain, whatever its tenant, instead of those of its tenant.
    pub shared_domain: Option<String>,
}

/// How much blocks are worth keeping, as their sequence's owner knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionHint {
    /// 0 to 100. Blocks below 50 make way before all ordinary ones, those above 50 after them, by priority.
    pub priority: u8,
    /// Milliseconds for which it holds, counted anew whenever the block is used. None: until the block is evicted.
    pub ttl_ms: Option<u64>,
    /// The priority moves towards 50 step by step over that time, instead of at its end.
    pub decay: bool,
}

impl RetentionHint {
    /// A hint that holds until the block is evicted. Priorities above 100 count as 100.
    pub fn priority(priority: u8) -> Self {
        RetentionHint { priority: priority.min(100), ttl_ms: None, decay: false }
    }

    /// Holds for so long after each use.
    #[must_use]
    pub fn for_ms(self, ttl_ms: u64) -> Self {
        RetentionHint { ttl_ms: Some(ttl_ms), ..self }
    }

    /// Fades over its time instead of ending with it.
    #[must_use]
    pub fn decaying(self) -> Self {
        RetentionHint { decay: true, ..self }
    }
}

/// The token ids that a sequence will begin with.
///
/// Token ids are the identity of what is cached: whoever shares promises that the keys and values which he appends follow from them, from
/// the model and the adapter, and from the extra identity where token ids do not tell.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompt {
    pub(crate) token_ids: Vec<u32>,
    /// By ascending position.
    pub(crate) extra: Vec<(u32, ExtraIdentity)>,
}

impl Prompt {
    /// A prompt of these tokens.
    pub fn new(token_ids: &[u32]) -> Self {
        Prompt { token_ids: token_ids.to_vec(), extra: Vec::new() }
    }

    /// Tokens at `positions` stand for more than their ids say: for the image of this hash, say. Has to be what the appends of these
    /// tokens will name. Positions behind its end say nothing.
    #[must_use]
    pub fn extra_at(mut self, positions: Range<u32>, identity: ExtraIdentity) -> Self {
        let end = positions.end.min(self.token_ids.len() as u32);
        self.extra.extend((positions.start..end).map(|at| (at, identity)));
        self.extra.sort_by_key(|(at, _)| *at);
        self
    }
}

impl From<&[u32]> for Prompt {
    fn from(token_ids: &[u32]) -> Self {
        Prompt::new(token_ids)
    }
}

impl From<&Vec<u32>> for Prompt {
    fn from(token_ids: &Vec<u32>) -> Self {
        Prompt::new(token_ids)
    }
}

impl<const N: usize> From<&[u32; N]> for Prompt {
    fn from(token_ids: &[u32; N]) -> Self {
        Prompt::new(token_ids)
    }
}

impl OpenOptions {
    /// Sets the tenant.
    #[must_use]
    pub fn tenant(mut self, tenant: impl Into<Tenant>) -> Self {
        self.tenant = tenant.into();
        self
    }

    /// Sets the adapter.
    #[must_use]
    pub fn adapter(mut self, name: impl Into<String>) -> Self {
        self.adapter = Some(name.into());
        self
    }

    /// Sets aside raw blocks for `tokens` tokens.
    #[must_use]
    pub fn reserve_tokens(mut self, tokens: u32) -> Self {
        self.reserve_tokens = tokens;
        self
    }

    /// Sets the prompt: the sequence begins with what of it is cached, and shares what it computes.
    #[must_use]
    pub fn prompt(mut self, prompt: impl Into<Prompt>) -> Self {
        self.prompt = Some(prompt.into());
        self
    }

    /// Adds a hint for blocks that begin at `positions`; `0..u32::MAX` covers what will be generated, too.
    #[must_use]
    pub fn retain(mut self, positions: Range<u32>, hint: RetentionHint) -> Self {
        self.retention.push((positions, hint));
        self
    }

    /// Sets the domain to share with, instead of the tenant's own sequences. All that is known of a domain is its name: give it only to
    /// those who may see whether its prompts are cached. Blocks are the domain's then, which has no limits: they count for no tenant's
    /// quota, and no reserve is theirs.
    #[must_use]
    pub fn shared_domain(mut self, domain: impl Into<String>) -> Self {
        self.shared_domain = Some(domain.into());
        self
    }
}

/// What is in a sequence. The device thread changes it; everybody else reads it under the lock.
#[derive(Debug, Clone, Default)]
pub struct SequenceState {
    /// Tokens that are in all layers and counted.
    pub committed: u32,
    /// Per layer, up to which token it is staged; empty while nothing is staged.
    pub staged: Vec<u32>,
    /// Blocks in order, short lists in place: with many sequences open each list elsewhere is one more wait for memory.
    /// [`BlockId::DROPPED`] where token dropping released one.
    pub blocks: SmallVec<[BlockId; 6]>,
    /// Tokens `SINK_TOKENS..window_start` were dropped (none while it is at most `SINK_TOKENS`): truncation leaves their blocks out.
    pub window_start: u32,
    /// Tokens were dropped by their scores: the blocks hold what is left, one token after the other. Never beside truncation.
    pub compacted: Option<std::sync::Arc<Compacted>>,
}

impl SequenceState {
    /// Up to which token the owner may read `layer`: staged tokens count for their layer.
    pub fn visible(&self, layer: usize) -> u32 {
        self.staged.get(layer).copied().unwrap_or(0).max(self.committed)
    }

    /// The tokens that truncation has dropped.
    pub fn dropped(&self) -> Range<u32> {
        SINK_TOKENS.min(self.window_start)..self.window_start
    }

    /// The furthest token that any layer holds.
    pub(crate) fn end(&self) -> u32 {
        self.staged.iter().copied().max().unwrap_or(0).max(self.committed)
    }

    /// Tokens of the first `position` that are stored, and so the place of the token at `position` among the stored ones, by which it is
    /// found in the blocks. Truncation leaves the places of dropped tokens empty; otherwise they are closed up.
    pub fn stored(&self, position: u32) -> u32 {
        self.compacted.as_ref().map_or(position, |compacted| compacted.stored(position))
    }

    /// [`SequenceState::stored`] for both ends.
    pub fn stored_range(&self, positions: &Range<u32>) -> Range<u32> {
        self.stored(positions.start)..self.stored(positions.end)
    }

    /// The position of a stored token.
    pub fn position(&self, stored: u32) -> u32 {
        self.compacted.as_ref().map_or(stored, |compacted| compacted.position(stored))
    }

    /// Tokens that have outlived a dropping by scores.
    pub(crate) fn thinned(&self) -> u32 {
        self.compacted.as_ref().map_or(0, |compacted| compacted.thinned())
    }

    /// The dropped tokens around the first one of `range` that was dropped by its score, if there is one.
    fn gap(&self, range: &Range<u32>) -> Option<Range<u32>> {
        let compacted = self.compacted.as_ref()?;
        let first = compacted.stored(range.start);
        let end = (first..).zip(range.clone()).find(|&(stored, at)| compacted.position(stored) != at)?.0;
        let start = end.checked_sub(1).map_or(0, |before| compacted.position(before) + 1);
        Some(start..compacted.position(end))
    }

    /// Checks that `range` of `layer` can be read.
    ///
    /// # Errors
    /// [`Error::TokenRange`], [`Error::TokensDropped`].
    pub fn check_readable(&self, layer: usize, range: &Range<u32>) -> Result<(), Error> {
        let visible = self.visible(layer);
        if range.start > range.end || range.end > visible {
            return Err(Error::TokenRange { range: range.clone(), visible });
        }
        let dropped = self.dropped();
        if range.start < dropped.end && dropped.start < range.end && !dropped.is_empty() {
            return Err(Error::TokensDropped { range: range.clone(), dropped });
        }
        match self.gap(range) {
            Some(dropped) => Err(Error::TokensDropped { range: range.clone(), dropped }),
            None => Ok(()),
        }
    }

    /// The `(index in blocks, tokens inside the block)` pieces that cover the stored tokens of `range`.
    pub fn pieces(
        &self,
        layout: &BlockLayout,
        range: Range<u32>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        pieces(layout.block_tokens, self.stored_range(&range))
    }
}

/// Cuts a range of stored tokens at block borders: `(block index, tokens inside that block)`.
pub fn pieces(block_tokens: usize, range: Range<u32>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut next = range.start as usize;
    let end = range.end as usize;
    std::iter::from_fn(move || {
        (next < end).then(|| {
            let (index, from) = (next / block_tokens, next % block_tokens);
            let to = block_tokens.min(from + (end - next));
            next += to - from;
            (index, from..to)
        })
    })
}

/// The part of a sequence that its handle, its shard and inline look-ups share.
#[derive(Debug)]
pub struct SequenceShared {
    id: SequenceId,
    tenant: Tenant,
    /// [`SequenceState::committed`], which an append into room that a listed block has changes without the lock: nothing
    /// else of the state changes with it, and whoever reads it finds the tokens in place.
    committed: AtomicU32,
    state: Mutex<SequenceState>,
}

impl SequenceShared {
    pub(crate) fn new(id: SequenceId, tenant: Tenant, state: SequenceState) -> Arc<Self> {
        Arc::new(SequenceShared {
            id,
            tenant,
            committed: AtomicU32::new(state.committed),
            state: Mutex::new(state),
        })
    }

    /// Its id.
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Whose it is.
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// Locks the state. Hold it briefly: the device thread waits for it.
    pub fn state(&self) -> MutexGuard<'_, SequenceState> {
        let mut state = lock(&self.state);
        state.committed = self.committed();
        state
    }

    /// Committed tokens.
    pub fn committed(&self) -> u32 {
        self.committed.load(Ordering::Acquire)
    }

    /// For the device thread: so many tokens are committed. It holds the lock, unless the new ones lie in blocks that the
    /// state lists already.
    pub(crate) fn publish_committed(&self, committed: u32) {
        self.committed.store(committed, Ordering::Release);
    }
}

/// Sends the close of a sequence on its way; must not wait.
pub type CloseHook = std::sync::Arc<dyn Fn(SequenceId) + Send + Sync>;

/// An open sequence, owned: dropping it closes the sequence.
///
/// Results carry it, so that a sequence opened for a caller who has gone away closes by itself.
pub struct OpenSequence {
    /// That of `shared`, which shares a line of memory with what the device thread writes.
    id: SequenceId,
    shared: Arc<SequenceShared>,
    on_drop: CloseHook,
}

impl OpenSequence {
    pub(crate) fn new(shared: Arc<SequenceShared>, on_drop: CloseHook) -> Self {
        OpenSequence { id: shared.id, shared, on_drop }
    }

    /// The shared part.
    pub fn shared(&self) -> &Arc<SequenceShared> {
        &self.shared
    }

    /// Its id.
    pub fn id(&self) -> SequenceId {
        self.id
    }
}

impl Drop for OpenSequence {
    fn drop(&mut self) {
        (self.on_drop)(self.id);
    }
}

impl std::fmt::Debug for OpenSequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpenSequence({})", self.shared.id)
    }
}
