//! What can go wrong, with the numbers a person needs to act on it.

use std::ops::Range;
use std::sync::Arc;

use crate::geometry::{ElementType, Plane};
use crate::pool::Tier;
use crate::sequence::SequenceId;

/// Why an operation, or a whole submission, failed. Nothing that was stored before it has changed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Too few vacant blocks. Close or truncate sequences, or wait for some to end.
    #[error(
        "the cache is full: {needed} blocks needed, {free} free, {evictable} evictable; close or truncate sequences, then retry"
    )]
    Capacity {
        /// Raw blocks that the operation needs.
        needed: u32,
        /// Raw blocks that are free and not reserved by other sequences.
        free: u32,
        /// Blocks that eviction could free.
        evictable: u32,
    },
    /// The tenant's blocks would take more than he may use, with nothing of his left to evict.
    #[error(
        "the tenant may use {quota_bytes} bytes of each device, uses {used_bytes} and needs {needed_bytes} more; close or truncate sequences of his, or raise his quota"
    )]
    TenantQuota {
        /// Bytes that the operation needs.
        needed_bytes: u64,
        /// Bytes that the tenant's blocks and reservations take on the shard.
        used_bytes: u64,
        /// What he may use of it.
        quota_bytes: u64,
    },
    /// Too few vacant slots in a tier to move blocks there. Nothing was moved.
    #[error(
        "{needed} blocks to move to the {tier:?} tier, {free} slots are free; move or close other sequences, then retry"
    )]
    TierFull {
        /// Where they were to go.
        tier: Tier,
        /// Blocks to move.
        needed: u32,
        /// Slots that are free there.
        free: u32,
    },
    /// A tensor's length does not match its shape.
    #[error("{plane:?} tensor of {bytes} bytes given, {expected_bytes} expected for shape {shape:?}")]
    Shape {
        /// Keys or values.
        plane: Plane,
        /// Bytes given.
        bytes: usize,
        /// Bytes that the shape takes.
        expected_bytes: usize,
        /// `[layers, tokens, kv_heads, dim]`; layers is 1 for a staged layer.
        shape: [usize; 4],
    },
    /// A tensor with dimensions, of another shape than the operation takes.
    #[error("{plane:?} tensor of shape {given:?} given, {expected:?} expected; reshape or transpose it")]
    Dimensions {
        /// Keys or values.
        plane: Plane,
        /// Shape given.
        given: Box<[usize]>,
        /// `[layers, tokens, kv_heads, dim]`, or without the layers for one layer.
        expected: Box<[usize]>,
    },
    /// The tensor's element type is not the geometry's.
    #[error("elements are {given:?}, the cache stores {expected:?}; convert before appending")]
    ElementType {
        /// Type of the tensor given.
        given: ElementType,
        /// Type of the geometry.
        expected: ElementType,
    },
    /// No such layer.
    #[error("layer {layer} does not exist: the geometry has {layers} layers")]
    Layer {
        /// Layer asked for.
        layer: u32,
        /// Layers of the geometry.
        layers: u32,
    },
    /// A range of tokens that is reversed or reaches past what is visible.
    #[error("tokens {}..{} asked for, {visible} visible", range.start, range.end)]
    TokenRange {
        /// Range asked for.
        range: Range<u32>,
        /// Tokens that are visible to this operation.
        visible: u32,
    },
    /// The range holds tokens that token dropping has removed.
    #[error("tokens {}..{} asked for, but tokens {}..{} were dropped", range.start, range.end, dropped.start, dropped.end)]
    TokensDropped {
        /// Range asked for.
        range: Range<u32>,
        /// Tokens that are gone.
        dropped: Range<u32>,
    },
    /// The operation names the position it expects, and the sequence is elsewhere.
    #[error("position {expected} expected, but the sequence is at {actual}")]
    Position {
        /// Where the caller believes the sequence ends.
        expected: u32,
        /// Where it ends.
        actual: u32,
    },
    /// Tokens were to be dropped by scores of the caller's, and there are not as many scores as tokens.
    #[error(
        "{scores} scores given for {tokens} tokens that are there; give one each, in order of their positions"
    )]
    Scores {
        /// Scores given.
        scores: usize,
        /// Tokens that were not dropped before.
        tokens: u32,
    },
    /// A score of the caller's is not a number.
    #[error("the score of token {token} of those that are there is not a number")]
    ScoreNotANumber {
        /// Which, counted from the first that was not dropped before.
        token: u32,
    },
    /// An operation over no tokens.
    #[error("no tokens given; give at least one")]
    Empty,
    /// Each of some sequences was to get one token, and there are not as many tokens as sequences.
    #[error("{tokens} token ids for {sequences} sequences; give one each")]
    EachTokens {
        /// Token ids given.
        tokens: usize,
        /// Sequences.
        sequences: usize,
    },
    /// NaN or infinity in the input. The sequence is as it was.
    #[error("NaN or infinity in the keys or values given")]
    NotFinite,
    /// A commit of tokens that some layer has not staged.
    #[error("{tokens} tokens to commit, but layer {layer} has staged {staged}")]
    NotStaged {
        /// Tokens to commit.
        tokens: u32,
        /// First layer that lacks some.
        layer: u32,
        /// Tokens which that layer has staged.
        staged: u32,
    },
    /// All layers are appended at once while some layer has staged tokens.
    #[error(
        "{staged} staged tokens stand in the way; commit them, or truncate to the committed length to discard them"
    )]
    StagedTokens {
        /// The most tokens that any layer has staged.
        staged: u32,
    },
    /// The sequence would grow past its limit.
    #[error("the sequence would have {tokens} tokens; the limit is {max_tokens}")]
    SequenceTooLong {
        /// Tokens after the operation.
        tokens: u64,
        /// Limit of one sequence.
        max_tokens: u32,
    },
    /// All sequences together would grow past their limit.
    #[error("all sequences together would have {tokens} tokens; the limit is {max_total_tokens}")]
    TooManyTokens {
        /// Tokens after the operation.
        tokens: u64,
        /// Limit over all sequences.
        max_total_tokens: u64,
    },
    /// No more sequences can be open.
    #[error(
        "{needed} sequences to open, but at most {max_sequences} may be open; close some, or raise `max_sequences`"
    )]
    TooManySequences {
        /// Sequences to open.
        needed: usize,
        /// Limit.
        max_sequences: usize,
    },
    /// No sequence has had this id.
    #[error("{0} does not exist")]
    UnknownSequence(SequenceId),
    /// The sequence was closed.
    #[error("{0} is closed")]
    ClosedSequence(SequenceId),
    /// The batch is for one tenant, the sequence belongs to another.
    #[error("{0} belongs to another tenant")]
    TenantMismatch(SequenceId),
    /// More than can ever be in flight. Split the batch, or raise the limit.
    #[error(
        "{jobs} operations of {bytes} bytes in one batch; at most {jobs_max} operations and {bytes_max} bytes fit; split the batch"
    )]
    BatchTooLarge {
        /// Operations of the batch.
        jobs: u64,
        /// Bytes that it carries in and out.
        bytes: u64,
        /// Most operations in flight.
        jobs_max: u64,
        /// Most bytes in flight.
        bytes_max: u64,
    },
    /// Everything that may be in flight is. Only `try_*` calls return this; the others wait.
    #[error(
        "{jobs_free} operations and {bytes_free} bytes are free, {jobs} and {bytes} needed; retry, or await `submit`"
    )]
    Overloaded {
        /// Operations needed.
        jobs: u64,
        /// Bytes needed.
        bytes: u64,
        /// Operations free.
        jobs_free: u64,
        /// Bytes free.
        bytes_free: u64,
    },
    /// The device does not do this.
    #[error("{what} is not supported here: {instead}")]
    Unsupported {
        /// What was asked.
        what: &'static str,
        /// What to do instead.
        instead: &'static str,
    },
    /// The shard is gone, with every sequence on it; other shards serve on.
    #[error("shard {shard} is lost ({reason}); its sequences are gone, open new ones")]
    ShardLost {
        /// Which shard.
        shard: u16,
        /// Why.
        reason: Arc<str>,
    },
    /// A copy to or from the device failed. The sequence is as it was.
    #[error("the device failed to carry out the operation: {0}")]
    Device(Arc<str>),
    /// The cache is shut down or shutting down.
    #[error("the cache is shut down")]
    Closed,
}

impl Error {
    /// Whether the same call may succeed later without a change by the caller.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Error::Capacity { .. }
                | Error::TenantQuota { .. }
                | Error::TierFull { .. }
                | Error::Overloaded { .. }
                | Error::TooManyTokens { .. }
                | Error::Device(_)
        ) || matches!(self, Error::TooManySequences { needed, max_sequences } if needed <= max_sequences)
    }

    /// The kind, for counters.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Capacity { .. }
            | Error::TenantQuota { .. }
            | Error::TierFull { .. }
            | Error::TooManyTokens { .. }
            | Error::TooManySequences { .. } => ErrorKind::Capacity,
            Error::Shape { .. }
            | Error::Dimensions { .. }
            | Error::ElementType { .. }
            | Error::Layer { .. }
            | Error::TokenRange { .. }
            | Error::TokensDropped { .. }
            | Error::Position { .. }
            | Error::Empty
            | Error::EachTokens { .. }
            | Error::Scores { .. }
            | Error::ScoreNotANumber { .. }
            | Error::NotStaged { .. }
            | Error::StagedTokens { .. }
            | Error::SequenceTooLong { .. }
            | Error::BatchTooLarge { .. }
            | Error::Unsupported { .. } => ErrorKind::InvalidInput,
            Error::NotFinite => ErrorKind::NotFinite,
            Error::UnknownSequence(_) | Error::ClosedSequence(_) | Error::TenantMismatch(_) => {
                ErrorKind::UnknownSequence
            }
            Error::Overloaded { .. } => ErrorKind::Overloaded,
            Error::ShardLost { .. } | Error::Device(_) => ErrorKind::Device,
            Error::Closed => ErrorKind::Closed,
        }
    }
}

/// Kinds of [`Error`], as counted in the statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// Out of blocks, tokens or sequences.
    Capacity,
    /// Shapes, types, ranges, positions.
    InvalidInput,
    /// NaN or infinity.
    NotFinite,
    /// Unknown or closed sequence, or another tenant's.
    UnknownSequence,
    /// No permits.
    Overloaded,
    /// The device or its shard.
    Device,
    /// After shutdown.
    Closed,
}

impl ErrorKind {
    /// All kinds, in counter order.
    pub const ALL: [ErrorKind; 7] = [
        ErrorKind::Capacity,
        ErrorKind::InvalidInput,
        ErrorKind::NotFinite,
        ErrorKind::UnknownSequence,
        ErrorKind::Overloaded,
        ErrorKind::Device,
        ErrorKind::Closed,
    ];
}

/// Why a configuration or geometry was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A value out of range.
    #[error("{field}: {value} is not possible; {fix}")]
    Invalid {
        /// The field, as in the configuration file.
        field: &'static str,
        /// What it was.
        value: String,
        /// What to write instead.
        fix: String,
    },
    /// A setting whose feature this version does not have.
    #[error("{field}: {value} is not built yet; use {instead}")]
    NotBuilt {
        /// The field, as in the configuration file.
        field: &'static str,
        /// What it was.
        value: String,
        /// What works now.
        instead: &'static str,
    },
}

impl ConfigError {
    /// A value out of range.
    pub fn invalid(field: &'static str, value: impl ToString, fix: impl Into<String>) -> Self {
        ConfigError::Invalid { field, value: value.to_string(), fix: fix.into() }
    }
}
