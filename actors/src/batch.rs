//! `BatchCacheOperations`: any mix of operations over any sequences, with the bytes they need, as one message.
//!
//! The same type carries what one caller submits and what the router merges from many. It owns its input: token ids and
//! tensor bytes lie in two arenas that operations point into, so a batch of any size is a handful of allocations, made in
//! the caller's task.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use tokio::sync::oneshot;

use crate::block::ExtraIdentity;
use crate::dropping::TokenScores;
use crate::error::Error;
use crate::geometry::{BlockLayout, ElementType, Plane};
use crate::memory::ReadBuffer;
use crate::payload::{Payload, TensorSpans, TensorView};
use crate::permit::{Amount, Permit};
use crate::pool::Tier;
use crate::prefix::{Matcher, Prefix};
use crate::reach::{Arena, DeviceSource, LentMemory, Point};
use crate::sequence::{OpenOptions, OpenSequence, SequenceId, Tenant};
use crate::submission::Submission;

/// Tensors for [`BatchCacheOperations::append_each`]: keys `[layers, sequences, kv_heads, key_dim]`, values likewise.
#[derive(Debug, Clone)]
pub enum EachTensors<'a> {
    /// In host memory, to be copied.
    Host(HostTensor<'a>, HostTensor<'a>),
    /// In a region of the batch: where the keys and values begin and end.
    Region(ElementType, Range<usize>, Range<usize>),
    /// In the memory of the batch's device.
    Device(DeviceSpan, DeviceSpan),
}

/// A tensor in the memory of the device that a batch names ([`BatchCacheOperations::device_source`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSpan {
    /// Element type.
    pub element: ElementType,
    /// Where it begins.
    pub address: u64,
    /// Its bytes.
    pub bytes: usize,
}

/// A tensor in host memory: its bytes, little endian, and their type.
#[derive(Debug, Clone, Copy)]
pub struct HostTensor<'a> {
    /// Element type.
    pub element: ElementType,
    /// Elements in C order.
    pub bytes: &'a [u8],
}

/// Token ids of an operation, inside the batch's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct IdSpan {
    start: u32,
    pub(crate) count: u32,
}

impl IdSpan {
    pub(crate) fn of(self, ids: &[u32]) -> &[u32] {
        &ids[self.start as usize..][..self.count as usize]
    }
}

/// One operation. Build them with the methods of [`BatchCacheOperations`].
///
/// About one cache line: a decode step writes and reads hundreds of them.
#[derive(Debug)]
pub(crate) enum Operation {
    Open {
        options: Box<OpenOptions>,
        /// What the door has found of the prompt, if there is one.
        prefix: Option<Box<Prefix>>,
        permit: Option<Permit>,
    },
    Append {
        sequence: SequenceId,
        at: Option<u32>,
        ids: IdSpan,
        extra: Option<Box<ExtraIdentity>>,
        tensors: TensorSpans,
    },
    Stage {
        sequence: SequenceId,
        layer: u32,
        tokens: u32,
        tensors: TensorSpans,
    },
    Commit {
        sequence: SequenceId,
        ids: IdSpan,
        extra: Option<Box<ExtraIdentity>>,
    },
    Read {
        sequence: SequenceId,
        layer: u32,
        tokens: Range<u32>,
        buffer: Option<Box<ReadBuffer>>,
    },
    ReadDevice {
        sequence: SequenceId,
        target: Box<ReadTarget>,
    },
    Fork {
        sequence: SequenceId,
        count: u32,
        permit: Option<Permit>,
    },
    Truncate {
        sequence: SequenceId,
        tokens: u32,
    },
    MoveTo {
        sequence: SequenceId,
        tier: Tier,
    },
    Drop {
        sequence: SequenceId,
        keep: u32,
        scores: Box<TokenScores>,
    },
    Close {
        sequence: SequenceId,
    },
    Invalidate {
        shard: u16,
        what: Box<Invalidate>,
    },
    /// A token each for some sequences.
    Each(Box<Each>),
    /// Refused at the door, with as many results as it would have had.
    Refused {
        error: Box<Error>,
        results: u32,
    },
}

/// One token for each of some sequences, over tensors that they share: a decode step. Each row is an operation to everybody who
/// sees results; here they lie together, because a step writes and reads hundreds of them.
#[derive(Debug)]
pub(crate) struct Each {
    pub(crate) write: EachWrite,
    pub(crate) tensors: TensorSpans,
    pub(crate) rows: Vec<Row>,
    /// Tokens of the tensors: more than rows if some have gone to other shards.
    pub(crate) tensor_rows: u32,
    /// Place of the first row's result; the others follow.
    pub(crate) first_result: u32,
}

/// What becomes of the tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum EachWrite {
    /// They are committed in all layers.
    Append,
    /// They are staged in one.
    Stage { layer: u32 },
}

/// The token of one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Row {
    pub(crate) sequence: SequenceId,
    pub(crate) token_id: u32,
    /// Token of the tensors; [`Row::REFUSED`] if the door has refused it.
    pub(crate) row: u32,
}

impl Row {
    /// The sequence's device does not reach the tensors.
    pub(crate) const REFUSED: u32 = u32::MAX;
}

impl Each {
    /// The same for these rows; nothing if there are none.
    pub(crate) fn with_rows(&self, rows: Vec<Row>) -> Option<Operation> {
        (!rows.is_empty()).then(|| Operation::Each(Box::new(Each { rows, ..*self })))
    }

    /// The row whose result has this place in the submission.
    pub(crate) fn row_at(&self, result: u32) -> Option<&Row> {
        self.rows.get(result.checked_sub(self.first_result)? as usize)
    }

    /// Place of the result after its last.
    pub(crate) fn results_end(&self) -> u32 {
        self.first_result + self.rows.len() as u32
    }

    /// The tensors as one row sees them.
    pub(crate) fn tensors_of(&self, row: &Row) -> TensorView {
        self.tensors.row(row.row, self.tensor_rows)
    }
}

/// Device memory that the sequence's shard does not reach.
pub(crate) fn out_of_reach() -> Error {
    Error::Unsupported {
        what: "device memory of another device than the sequence's",
        instead: "name memory of the sequence's own GPU, or give host tensors",
    }
}

/// A read into device memory.
#[derive(Debug, Clone)]
pub(crate) struct ReadTarget {
    pub(crate) layer: u32,
    pub(crate) tokens: Range<u32>,
    pub(crate) tensors: TensorSpans,
}

impl Operation {
    /// The tensors that it reads or writes in device memory.
    fn on_device(&self) -> bool {
        match self {
            Operation::Append { tensors, .. } | Operation::Stage { tensors, .. } => tensors.on_device,
            Operation::Each(each) => each.tensors.on_device,
            Operation::ReadDevice { .. } => true,
            _ => false,
        }
    }

    /// Results that it has.
    pub(crate) fn results(&self) -> usize {
        match self {
            Operation::Each(each) => each.rows.len(),
            Operation::Refused { results, .. } => *results as usize,
            _ => 1,
        }
    }

    /// Whether it opens or closes sequences, which only the router counts.
    pub(crate) fn changes_sequences(&self) -> bool {
        matches!(self, Operation::Open { .. } | Operation::Fork { .. } | Operation::Close { .. })
    }

    /// The sequence that its result at this place, counted from its first, is about; none for opens and refusals.
    pub(crate) fn sequence_at(&self, result: usize) -> Option<SequenceId> {
        match self {
            Operation::Each(each) => each.rows.get(result).map(|row| row.sequence),
            other => other.sequence(),
        }
    }

    /// All sequences that it works on, one for each result.
    pub(crate) fn sequences(&self) -> impl Iterator<Item = Option<SequenceId>> {
        (0..self.results()).map(|result| self.sequence_at(result))
    }

    /// The sequence it works on; none for opens, refusals, and where there are several.
    pub(crate) fn sequence(&self) -> Option<SequenceId> {
        match self {
            Operation::Open { .. }
            | Operation::Invalidate { .. }
            | Operation::Refused { .. }
            | Operation::Each(_) => None,
            Operation::Append { sequence, .. }
            | Operation::Stage { sequence, .. }
            | Operation::Commit { sequence, .. }
            | Operation::Read { sequence, .. }
            | Operation::ReadDevice { sequence, .. }
            | Operation::Fork { sequence, .. }
            | Operation::Truncate { sequence, .. }
            | Operation::MoveTo { sequence, .. }
            | Operation::Drop { sequence, .. }
            | Operation::Close { sequence } => Some(*sequence),
        }
    }
}

/// What an operation has done.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// A sequence was opened.
    Opened(OpenSequence),
    /// Tokens were appended; this many are committed now.
    Appended {
        /// Committed tokens.
        committed: u32,
    },
    /// A layer was staged up to this token.
    Staged {
        /// First token that the layer does not hold.
        staged: u32,
    },
    /// Staged tokens were committed; this many are committed now.
    Committed {
        /// Committed tokens.
        committed: u32,
    },
    /// Keys and values, decoded.
    Read(Box<ReadBuffer>),
    /// Keys and values are where the caller wanted them in device memory: this many tokens.
    ReadDevice {
        /// Tokens read.
        tokens: u32,
    },
    /// Forks, in no particular order.
    Forked(Vec<OpenSequence>),
    /// The sequence was cut.
    Truncated {
        /// Committed tokens.
        committed: u32,
    },
    /// So many sealed blocks were moved to another tier.
    Moved {
        /// Blocks that were not there yet.
        blocks: u32,
    },
    /// Tokens were dropped by their scores.
    Dropped {
        /// Committed tokens that are still there.
        kept: u32,
    },
    /// The sequence was closed.
    Closed,
    /// So many blocks are not found by prompts any more.
    Invalidated {
        /// Blocks.
        blocks: u32,
    },
}

/// Cached blocks that prompts shall not find any more.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Invalidate {
    /// All of them: the model has new weights, say.
    All,
    /// Those that this adapter computed.
    Adapter(String),
    /// Those of this tenant, in shared domains too if his sequences computed them.
    Tenant(Tenant),
    /// Those of this shared domain.
    Domain(String),
}

/// One result per operation, in the batch's order.
pub type Results = SmallVec<[Result<Outcome, Error>; 1]>;

/// Any mix of operations over any sequences, submitted and validated as one batch.
///
/// Operations on one sequence take effect in their order, each as if alone: one that fails leaves its sequence as it was,
/// and the next one finds it so. Operations on different sequences may take effect in any order.
#[derive(Debug, Default)]
pub struct BatchCacheOperations {
    /// What travels, from the start.
    submission: Box<Submission>,
    arena: Arena,
    device: Option<Box<DeviceSource>>,
}

impl BatchCacheOperations {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every operation must be on a sequence of `tenant`; others fail with [`Error::TenantMismatch`].
    pub fn only_tenant(&mut self, tenant: Tenant) {
        self.submission.tenant = Some(tenant);
    }

    /// The tenant set by [`BatchCacheOperations::only_tenant`].
    pub fn tenant(&self) -> Option<&Tenant> {
        self.submission.tenant.as_ref()
    }

    /// Makes room for `bytes` more bytes of tensors.
    pub fn reserve_bytes(&mut self, bytes: usize) {
        self.arena.reserve(bytes);
    }

    /// An empty batch whose tensors go into memory that was lent.
    pub fn lent(memory: Box<dyn LentMemory>) -> Self {
        BatchCacheOperations { arena: Arena::lent(memory), ..Self::default() }
    }

    /// Sets `bytes` bytes of the lent memory aside, and says where they begin. None if there are not so many.
    pub fn region(&mut self, bytes: usize) -> Option<usize> {
        self.arena.region(bytes)
    }

    /// Tells lent memory of batches apart: 0 for a batch that has none.
    pub fn arena_id(&self) -> u64 {
        self.arena.id()
    }

    /// The bytes of all tensors so far.
    pub fn arena_mut(&mut self) -> &mut [u8] {
        self.arena.bytes_mut()
    }

    /// Names the device that the batch's device tensors are on, and a point to wait for before they are touched. Once a device
    /// is named, points of others are left out.
    pub fn device_source(&mut self, device: u16, ready: Arc<dyn Point>) {
        match &mut self.device {
            Some(source) if source.device() == device => source.wait_too(ready),
            Some(_) => {}
            None => self.device = Some(Box::new(DeviceSource::new(device, ready))),
        }
    }

    /// The device that was named.
    pub fn device(&self) -> Option<u16> {
        self.device.as_ref().map(|source| source.device())
    }

    /// Keeps the owner of some of that memory until no launch needs it any more.
    pub fn keep(&mut self, owner: &Arc<dyn Any + Send + Sync>) {
        if let Some(source) = &mut self.device {
            source.keep(owner);
        }
    }

    /// An operation that is wrong already: it is answered with `error`.
    pub fn refused(&mut self, error: Error) {
        self.push_refused(error, 1);
    }

    fn push_refused(&mut self, error: Error, results: usize) {
        if results > 0 {
            let refused = Operation::Refused { error: Box::new(error), results: results as u32 };
            self.submission.operations.push(refused);
        }
    }

    /// Is told once every operation on device tensors is on its device's queue. None if there is no such operation.
    pub fn expect_enqueued(&mut self) -> Option<oneshot::Receiver<Arc<dyn Point>>> {
        let on_device = self.submission.operations.iter().filter(|operation| operation.on_device());
        let operations: usize = on_device.map(Operation::results).sum();
        self.device.as_ref().filter(|_| operations > 0).map(|device| device.expect(operations))
    }

    /// Operations in the batch, and results: one for each.
    pub fn len(&self) -> usize {
        self.submission.results()
    }

    /// Whether there is no operation.
    pub fn is_empty(&self) -> bool {
        self.submission.operations.is_empty()
    }

    /// Opens a sequence.
    pub fn open(&mut self, options: OpenOptions) {
        self.submission.operations.push(Operation::Open {
            options: Box::new(options),
            prefix: None,
            permit: None,
        });
    }

    /// Appends tokens to all layers: `keys` is `[layers, tokens, kv_heads, key_dim]`, `values` likewise.
    ///
    /// With `at`, the operation fails unless the sequence has exactly so many committed tokens.
    pub fn append(
        &mut self,
        sequence: SequenceId,
        at: Option<u32>,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
        keys: HostTensor<'_>,
        values: HostTensor<'_>,
    ) {
        let (ids, tensors) = (self.push_ids(token_ids), self.push_tensors(keys, values));
        self.submission.operations.push(Operation::Append {
            sequence,
            at,
            ids,
            extra: extra.map(Box::new),
            tensors,
        });
    }

    /// [`BatchCacheOperations::append`] of tensors that stand in a region ([`BatchCacheOperations::region`]): where the keys
    /// begin and their bytes, and the values likewise.
    pub fn append_region(
        &mut self,
        sequence: SequenceId,
        token_ids: &[u32],
        element: ElementType,
        keys: Range<usize>,
        values: Range<usize>,
    ) {
        let ids = self.push_ids(token_ids);
        let (keys, values) = ((keys.start, keys.len()), (values.start, values.len()));
        let tensors = TensorSpans::new(keys, values, [element; 2], false);
        self.submission.operations.push(Operation::Append { sequence, at: None, ids, extra: None, tensors });
    }

    /// [`BatchCacheOperations::append`] of tensors in device memory.
    pub fn append_device(
        &mut self,
        sequence: SequenceId,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
        keys: DeviceSpan,
        values: DeviceSpan,
    ) {
        let (ids, tensors) = (self.push_ids(token_ids), Self::device_tensors(keys, values));
        let extra = extra.map(Box::new);
        self.submission.operations.push(Operation::Append { sequence, at: None, ids, extra, tensors });
    }

    /// [`BatchCacheOperations::stage`] of tensors in device memory.
    pub fn stage_device(
        &mut self,
        sequence: SequenceId,
        layer: u32,
        tokens: u32,
        keys: DeviceSpan,
        values: DeviceSpan,
    ) {
        let tensors = Self::device_tensors(keys, values);
        self.submission.operations.push(Operation::Stage { sequence, layer, tokens, tensors });
    }

    /// [`BatchCacheOperations::read`] into device memory.
    pub fn read_device(
        &mut self,
        sequence: SequenceId,
        layer: u32,
        tokens: Range<u32>,
        keys: DeviceSpan,
        values: DeviceSpan,
    ) {
        let target = Box::new(ReadTarget { layer, tokens, tensors: Self::device_tensors(keys, values) });
        self.submission.operations.push(Operation::ReadDevice { sequence, target });
    }

    fn each_tensors(&mut self, tensors: EachTensors<'_>) -> TensorSpans {
        match tensors {
            EachTensors::Host(keys, values) => self.push_tensors(keys, values),
            EachTensors::Region(element, keys, values) => {
                let (keys, values) = ((keys.start, keys.len()), (values.start, values.len()));
                TensorSpans::new(keys, values, [element; 2], false)
            }
            EachTensors::Device(keys, values) => Self::device_tensors(keys, values),
        }
    }

    /// Appends one token to each of some sequences: an operation each, over tensors that they share.
    pub fn append_each(
        &mut self,
        sequences: impl ExactSizeIterator<Item = SequenceId>,
        token_ids: &[u32],
        tensors: EachTensors<'_>,
    ) {
        let rows = sequences.len();
        if token_ids.len() != rows {
            let error = Error::EachTokens { tokens: token_ids.len(), sequences: rows };
            return self.push_refused(error, rows);
        }
        self.push_each(EachWrite::Append, sequences.zip(token_ids.iter().copied()), tensors);
    }

    /// Writes one token of one layer to each of some sequences.
    pub fn stage_each(
        &mut self,
        sequences: impl ExactSizeIterator<Item = SequenceId>,
        layer: u32,
        tensors: EachTensors<'_>,
    ) {
        self.push_each(EachWrite::Stage { layer }, sequences.map(|sequence| (sequence, 0)), tensors);
    }

    fn push_each(
        &mut self,
        write: EachWrite,
        tokens: impl ExactSizeIterator<Item = (SequenceId, u32)>,
        tensors: EachTensors<'_>,
    ) {
        let (tensors, tensor_rows) = (self.each_tensors(tensors), tokens.len() as u32);
        let rows = (0u32..).zip(tokens).map(|(row, (sequence, token_id))| Row { sequence, token_id, row });
        let each = Each { write, tensors, rows: Vec::new(), tensor_rows, first_result: 0 };
        self.submission.operations.extend(each.with_rows(rows.collect()));
    }

    fn device_tensors(keys: DeviceSpan, values: DeviceSpan) -> TensorSpans {
        let span = |span: DeviceSpan| (span.address as usize, span.bytes);
        TensorSpans::new(span(keys), span(values), [keys.element, values.element], true)
    }

    /// Writes `tokens` tokens of one layer after what that layer already holds: `keys` is `[tokens, kv_heads, key_dim]`.
    pub fn stage(
        &mut self,
        sequence: SequenceId,
        layer: u32,
        tokens: u32,
        keys: HostTensor<'_>,
        values: HostTensor<'_>,
    ) {
        let tensors = self.push_tensors(keys, values);
        self.submission.operations.push(Operation::Stage { sequence, layer, tokens, tensors });
    }

    /// Counts the first `token_ids.len()` staged tokens in, none if it is empty; the other staged tokens are discarded.
    pub fn commit(&mut self, sequence: SequenceId, token_ids: &[u32], extra: Option<ExtraIdentity>) {
        let ids = self.push_ids(token_ids);
        self.submission.operations.push(Operation::Commit { sequence, ids, extra: extra.map(Box::new) });
    }

    /// Reads a range of tokens of one layer, decoded to the element type.
    pub fn read(&mut self, sequence: SequenceId, layer: u32, tokens: Range<u32>) {
        self.submission.operations.push(Operation::Read { sequence, layer, tokens, buffer: None });
    }

    /// Forks a sequence `count` times: each fork shares its committed tokens until one of them writes.
    pub fn fork(&mut self, sequence: SequenceId, count: u32) {
        self.submission.operations.push(Operation::Fork { sequence, count, permit: None });
    }

    /// Cuts a sequence to its first `tokens` committed tokens and discards what is staged.
    pub fn truncate(&mut self, sequence: SequenceId, tokens: u32) {
        self.submission.operations.push(Operation::Truncate { sequence, tokens });
    }

    /// Moves the sealed blocks of a sequence to a tier. They stay readable where they are, on the way and after.
    pub fn move_to(&mut self, sequence: SequenceId, tier: Tier) {
        self.submission.operations.push(Operation::MoveTo { sequence, tier });
    }

    /// Drops all but about `keep` tokens of a sequence: those with the highest scores stay, the sinks and the most recent ones in any case.
    pub fn drop_tokens(&mut self, sequence: SequenceId, keep: u32, scores: TokenScores) {
        self.submission.operations.push(Operation::Drop { sequence, keep, scores: Box::new(scores) });
    }

    /// Lets prompts find some blocks of a shard no more. Sequences that hold them keep them.
    pub fn invalidate(&mut self, shard: u16, what: Invalidate) {
        self.submission.operations.push(Operation::Invalidate { shard, what: Box::new(what) });
    }

    /// Closes a sequence. Closing one that is closed already is answered with [`Error::ClosedSequence`].
    pub fn close(&mut self, sequence: SequenceId) {
        self.submission.operations.push(Operation::Close { sequence });
    }

    /// # Panics
    /// At more ids than 32 bits count: 16 GiB of them.
    fn push_ids(&mut self, ids: &[u32]) -> IdSpan {
        let all = &mut self.submission.token_ids;
        let start = all.len();
        all.extend_from_slice(ids);
        assert!(all.len() <= u32::MAX as usize, "one batch cannot carry so many token ids: split it");
        IdSpan { start: start as u32, count: ids.len() as u32 }
    }

    fn push_tensors(&mut self, keys: HostTensor<'_>, values: HostTensor<'_>) -> TensorSpans {
        self.arena.reserve(keys.bytes.len() + values.bytes.len());
        let keys_at = self.arena.push(keys.bytes);
        let values_at = self.arena.push(values.bytes);
        let (keys_at, values_at) = ((keys_at, keys.bytes.len()), (values_at, values.bytes.len()));
        TensorSpans::new(keys_at, values_at, [keys.element, values.element], false)
    }

    /// Sequences that the batch would open.
    pub fn sequences_to_open(&self) -> usize {
        self.submission
            .operations
            .iter()
            .map(|operation| match operation {
                Operation::Open { .. } => 1,
                Operation::Fork { count, .. } => *count as usize,
                _ => 0,
            })
            .sum()
    }

    /// Refuses operations that need more than there is in all, so that the others need not fail with them: reads of more than
    /// `limit.bytes`, forks of more than `max_sequences`.
    pub fn refuse_impossible(
        &mut self,
        layout: &BlockLayout,
        max_tokens: u32,
        limit: Amount,
        max_sequences: usize,
    ) {
        for operation in &mut self.submission.operations {
            let error = match operation {
                Operation::Read { tokens, .. } => {
                    let bytes = read_bytes(layout, tokens, max_tokens);
                    let (jobs_max, bytes_max) = (limit.jobs, limit.bytes);
                    (bytes > bytes_max).then_some(Error::BatchTooLarge {
                        jobs: 1,
                        bytes,
                        jobs_max,
                        bytes_max,
                    })
                }
                Operation::Fork { count, .. } => {
                    let needed = *count as usize;
                    (needed > max_sequences).then_some(Error::TooManySequences { needed, max_sequences })
                }
                _ => None,
            };
            if let Some(error) = error {
                *operation = Operation::Refused { error: Box::new(error), results: 1 };
            }
        }
    }

    /// Bytes that the batch carries in, and out once its reads are done. Reads that the door will refuse carry nothing.
    pub fn bytes(&self, layout: &BlockLayout, max_tokens: u32) -> u64 {
        let reads = self.submission.operations.iter().map(|operation| match operation {
            Operation::Read { tokens, .. } => read_bytes(layout, tokens, max_tokens),
            Operation::Drop { scores, .. } => scores.bytes(),
            _ => 0,
        });
        self.arena.len() as u64 + reads.sum::<u64>()
    }

    /// The shard of the first operation that is on a sequence.
    pub(crate) fn first_shard(&self) -> Option<u16> {
        self.submission
            .operations
            .iter()
            .find_map(|operation| operation.sequence_at(0))
            .map(SequenceId::shard)
    }

    /// Refuses what can be seen to be wrong without looking at any sequence: shapes, types, layers, devices. `devices` says
    /// which device each shard is on, where device memory can be used.
    ///
    /// The refused operations stay in place and are answered with their error; the others are not touched.
    pub fn check(&mut self, layout: &BlockLayout, max_tokens: u32, devices: &[Option<u16>]) {
        let source = self.device.as_ref().map(|source| source.device());
        let reaches = |id: SequenceId| {
            source.is_some() && devices.get(id.shard() as usize).copied().flatten() == source
        };
        for operation in &mut self.submission.operations {
            let mut checked = check(operation, layout, max_tokens);
            if operation.on_device() {
                match &mut *operation {
                    Operation::Each(each) => {
                        for row in each.rows.iter_mut().filter(|row| !reaches(row.sequence)) {
                            row.row = Row::REFUSED;
                        }
                    }
                    other if !other.sequence().is_some_and(reaches) => checked = Err(out_of_reach()),
                    _ => {}
                }
            }
            if let Err(error) = checked {
                let results = operation.results() as u32;
                *operation = Operation::Refused { error: Box::new(error), results };
            }
        }
    }

    /// Splits the permits for the sequences to open among the operations that open them.
    pub(crate) fn attach_sequence_permits(&mut self, mut all: Permit) {
        for operation in &mut self.submission.operations {
            match operation {
                Operation::Open { permit, .. } => *permit = all.split(1),
                Operation::Fork { permit, count, .. } => *permit = all.split(u64::from(*count)),
                _ => {}
            }
        }
    }

    /// Looks for the prompts of sequences to open: in the caller's task, after its permit, since what is found is pinned from then on.
    pub(crate) fn match_prompts(&mut self, matcher: &Matcher) {
        for operation in &mut self.submission.operations {
            if let Operation::Open { options, prefix, .. } = operation {
                *prefix = matcher.find(options);
            }
        }
    }

    /// Allocates what the reads will fill: in the caller's task, after its permit.
    pub(crate) fn attach_read_buffers(&mut self, layout: &BlockLayout) {
        for operation in &mut self.submission.operations {
            if let Operation::Read { tokens, buffer, .. } = operation {
                *buffer = Some(Box::new(ReadBuffer::new(layout, tokens.len())));
            }
        }
    }

    /// What travels, with its tensors.
    pub(crate) fn into_submission(self) -> Box<Submission> {
        let BatchCacheOperations { mut submission, arena, device } = self;
        submission.payload = Payload::new(arena, device, submission.results());
        submission
    }
}

/// Bytes that a read of `tokens` of one layer returns; 0 if the door refuses it.
pub fn read_bytes(layout: &BlockLayout, tokens: &Range<u32>, max_tokens: u32) -> u64 {
    if tokens.start > tokens.end || tokens.end > max_tokens {
        return 0;
    }
    let token = layout.token_bytes(Plane::Key) + layout.token_bytes(Plane::Value);
    tokens.len() as u64 * token as u64
}

fn check(operation: &Operation, layout: &BlockLayout, max_tokens: u32) -> Result<(), Error> {
    let check_tensors = |tensors: &TensorSpans, layers: usize, tokens: usize| {
        if tokens == 0 {
            return Err(Error::Empty);
        }
        if let Some(&given) = tensors.elements.iter().find(|element| **element != layout.element) {
            return Err(Error::ElementType { given, expected: layout.element });
        }
        for (plane, bytes) in [(Plane::Key, tensors.keys_bytes), (Plane::Value, tensors.values_bytes)] {
            let expected_bytes = (layers * tokens).checked_mul(layout.token_bytes(plane));
            if expected_bytes != Some(bytes) {
                return Err(Error::Shape {
                    plane,
                    bytes,
                    expected_bytes: expected_bytes.unwrap_or(usize::MAX),
                    shape: [layers, tokens, layout.kv_heads, layout.dim(plane)],
                });
            }
        }
        Ok(())
    };
    let check_layer = |layer: u32| {
        if (layer as usize) < layout.layers {
            Ok(())
        } else {
            Err(Error::Layer { layer, layers: layout.layers as u32 })
        }
    };
    match operation {
        Operation::Append { ids, tensors, .. } => check_tensors(tensors, layout.layers, ids.count as usize),
        Operation::Stage { layer, tokens, tensors, .. } => {
            check_layer(*layer)?;
            check_tensors(tensors, 1, *tokens as usize)
        }
        Operation::Each(each) => {
            let layers = match each.write {
                EachWrite::Append => layout.layers,
                EachWrite::Stage { layer } => check_layer(layer).map(|()| 1)?,
            };
            check_tensors(&each.tensors, layers, each.tensor_rows as usize)
        }
        Operation::ReadDevice { target, .. } => {
            check_layer(target.layer)?;
            let tokens = target.tokens.clone();
            if tokens.start > tokens.end || tokens.end > max_tokens {
                return Err(Error::TokenRange { range: tokens, visible: max_tokens });
            }
            check_tensors(&target.tensors, 1, tokens.len())
        }
        Operation::Read { layer, tokens, .. } => {
            check_layer(*layer)?;
            // Before a buffer of that size is allocated.
            if tokens.start > tokens.end || tokens.end > max_tokens {
                return Err(Error::TokenRange { range: tokens.clone(), visible: max_tokens });
            }
            Ok(())
        }
        Operation::Fork { count: 0, .. } => Err(Error::Empty),
        Operation::Drop { scores, .. } => match &**scores {
            TokenScores::Given(scores) => match scores.iter().position(|score| score.is_nan()) {
                Some(token) => Err(Error::ScoreNotANumber { token: token as u32 }),
                None => Ok(()),
            },
            TokenScores::Keys(_) => Ok(()),
        },
        Operation::Open { options, .. } => {
            let prompt = options.prompt.as_ref().map_or(0, |prompt| prompt.token_ids.len() as u64);
            match prompt.max(u64::from(options.reserve_tokens)) {
                tokens if tokens > u64::from(max_tokens) => {
                    Err(Error::SequenceTooLong { tokens, max_tokens })
                }
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}
