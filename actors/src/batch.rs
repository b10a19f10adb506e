//! `BatchCacheOperations`: any mix of operations over any sequences, with the bytes they need, as one message.
//!
//! The same type carries what one caller submits and what the router merges from many. It owns its input: token ids and
//! tensor bytes lie in two arenas that operations point into, so a batch of any size is a handful of allocations, made in
//! the caller's task.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::block::ExtraIdentity;
use crate::error::Error;
use crate::geometry::{BlockLayout, ElementType, Plane};
use crate::memory::ReadBuffer;
use crate::permit::Permit;
use crate::sequence::{OpenOptions, OpenSequence, SequenceId, Tenant};
use crate::submission::Submission;

/// The tensor bytes of a batch, lent to the launches that read them.
#[derive(Debug, Default)]
pub(crate) enum Payload {
    #[default]
    None,
    /// Of a batch of one operation: it moves into the launch and comes back with it. Most batches are of this kind, and
    /// counting references to each would cost an allocation and a wait for memory.
    One(Vec<u8>),
    /// Of several operations, which may fly in different launches.
    Many(Arc<Vec<u8>>),
}

impl Payload {
    pub(crate) fn new(bytes: Vec<u8>, operations: usize) -> Self {
        match (bytes.len(), operations) {
            (0, _) => Payload::None,
            (_, 1) => Payload::One(bytes),
            _ => Payload::Many(Arc::new(bytes)),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Payload::None => &[],
            Payload::One(bytes) => bytes,
            Payload::Many(bytes) => bytes,
        }
    }

    /// For a launch. What was moved out is to be put back when the launch has landed: the caller's thread frees it.
    pub(crate) fn lend(&mut self) -> Payload {
        match self {
            Payload::Many(bytes) => Payload::Many(bytes.clone()),
            own => std::mem::take(own),
        }
    }

    pub(crate) fn is_same(&self, other: &Payload) -> bool {
        matches!((self, other), (Payload::Many(a), Payload::Many(b)) if Arc::ptr_eq(a, b))
    }
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

/// Keys and behind them values of an operation, inside the payload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TensorSpans {
    pub(crate) keys_at: usize,
    keys_bytes: usize,
    values_bytes: usize,
    element: ElementType,
}

impl TensorSpans {
    pub(crate) fn values_at(&self) -> usize {
        self.keys_at + self.keys_bytes
    }

    pub(crate) fn bytes(&self) -> usize {
        self.keys_bytes + self.values_bytes
    }
}

/// One operation. Build them with the methods of [`BatchCacheOperations`].
///
/// One cache line: a decode step writes and reads hundreds of them.
#[derive(Debug)]
pub(crate) enum Operation {
    Open {
        options: Box<OpenOptions>,
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
    Fork {
        sequence: SequenceId,
        count: u32,
        permit: Option<Permit>,
    },
    Truncate {
        sequence: SequenceId,
        tokens: u32,
    },
    Close {
        sequence: SequenceId,
    },
    /// Refused at the door; keeps its place so that results line up.
    Refused(Box<Error>),
    /// Answered, or gone to another shard.
    Gone,
}

impl Operation {
    /// The sequence it works on; none for opens and refusals.
    pub(crate) fn sequence(&self) -> Option<SequenceId> {
        match self {
            Operation::Open { .. } | Operation::Refused(_) | Operation::Gone => None,
            Operation::Append { sequence, .. }
            | Operation::Stage { sequence, .. }
            | Operation::Commit { sequence, .. }
            | Operation::Read { sequence, .. }
            | Operation::Fork { sequence, .. }
            | Operation::Truncate { sequence, .. }
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
    /// Forks, in no particular order.
    Forked(Vec<OpenSequence>),
    /// The sequence was cut.
    Truncated {
        /// Committed tokens.
        committed: u32,
    },
    /// The sequence was closed.
    Closed,
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
    payload: Vec<u8>,
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
        self.payload.reserve_exact(bytes);
    }

    /// Operations in the batch.
    pub fn len(&self) -> usize {
        self.submission.operations.len()
    }

    /// Whether there is no operation.
    pub fn is_empty(&self) -> bool {
        self.submission.operations.is_empty()
    }

    /// Opens a sequence.
    pub fn open(&mut self, options: OpenOptions) {
        self.submission.operations.push(Operation::Open { options: Box::new(options), permit: None });
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

    /// Counts the first `token_ids.len()` staged tokens in; the other staged tokens are discarded.
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
        let start = self.payload.len();
        self.payload.reserve(keys.bytes.len() + values.bytes.len());
        self.payload.extend_from_slice(keys.bytes);
        self.payload.extend_from_slice(values.bytes);
        let element = if values.element == keys.element { keys.element } else { values.element };
        let (keys_bytes, values_bytes) = (keys.bytes.len(), values.bytes.len());
        TensorSpans { keys_at: start, keys_bytes, values_bytes, element }
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

    /// Bytes that the batch carries in, and out once its reads are done. Reads that the door will refuse carry nothing.
    pub fn bytes(&self, layout: &BlockLayout, max_tokens: u32) -> u64 {
        let reads = self.submission.operations.iter().map(|operation| match operation {
            Operation::Read { tokens, .. } => read_bytes(layout, tokens, max_tokens),
            _ => 0,
        });
        self.payload.len() as u64 + reads.sum::<u64>()
    }

    /// The shard of the first operation that is on a sequence.
    pub(crate) fn first_shard(&self) -> Option<u16> {
        self.submission.operations.iter().find_map(Operation::sequence).map(SequenceId::shard)
    }

    /// Refuses what can be seen to be wrong without looking at any sequence: shapes, types, layers.
    ///
    /// The refused operations stay in place and are answered with their error; the others are not touched.
    pub fn check(&mut self, layout: &BlockLayout, max_tokens: u32) {
        for operation in &mut self.submission.operations {
            if let Err(error) = check(operation, layout, max_tokens) {
                *operation = Operation::Refused(Box::new(error));
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

    /// Allocates what the reads will fill: in the caller's task, after its permit.
    pub(crate) fn attach_read_buffers(&mut self, layout: &BlockLayout) {
        for operation in &mut self.submission.operations {
            if let Operation::Read { tokens, buffer, .. } = operation {
                *buffer = Some(Box::new(ReadBuffer::new(layout, tokens.len())));
            }
        }
    }

    /// What travels, and the tensors.
    pub(crate) fn into_parts(self) -> (Box<Submission>, Vec<u8>) {
        (self.submission, self.payload)
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
        if tensors.element != layout.element {
            return Err(Error::ElementType { given: tensors.element, expected: layout.element });
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
        Operation::Commit { ids, .. } if ids.count == 0 => Err(Error::Empty),
        Operation::Read { layer, tokens, .. } => {
            check_layer(*layer)?;
            // Before a buffer of that size is allocated.
            if tokens.start > tokens.end || tokens.end > max_tokens {
                return Err(Error::TokenRange { range: tokens.clone(), visible: max_tokens });
            }
            Ok(())
        }
        Operation::Fork { count: 0, .. } => Err(Error::Empty),
        Operation::Open { options, .. } if options.reserve_tokens > max_tokens => {
            Err(Error::SequenceTooLong { tokens: u64::from(options.reserve_tokens), max_tokens })
        }
        _ => Ok(()),
    }
}
