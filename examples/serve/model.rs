//! A language model as the server sees it: two traits, so that the scheduler, the HTTP side and their tests know nothing of weights.
//!
//! A [`Codec`] turns text into tokens and back, in request handlers. A [`Decoder`] runs steps, on the one thread that owns it; what it computes goes
//! into the cache and nowhere else, so that a sequence can be closed at any time and computed again from its tokens.

use std::sync::Arc;

use kv_cache::{BlockingCache, Error, Format, Geometry, Sequence};

use crate::api::Role;

/// Text to tokens and back.
pub(crate) trait Codec: Send + Sync {
    /// Tokens of plain text. What looks like a control token in it is text all the same.
    fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>>;

    /// Tokens of a chat, up to where the assistant is to go on.
    fn encode_chat(&self, messages: &[(Role, String)]) -> anyhow::Result<Vec<u32>>;

    /// Adds the bytes of a token, which may be half a character, to `out`.
    fn decode(&self, token: u32, out: &mut Vec<u8>);

    /// Whether an answer ends with this token.
    fn is_end(&self, token: u32) -> bool;

    /// How many tokens there are.
    fn vocabulary(&self) -> u32;
}

/// Consecutive tokens of one sequence in a step.
pub(crate) struct Chunk<'a> {
    /// Where the keys and values of what came before are, and where those of `tokens` go.
    pub(crate) sequence: &'a Sequence,
    pub(crate) tokens: &'a [u32],
    /// Position of the first of them.
    pub(crate) position: u32,
    /// Whether the logits behind the last one are wanted.
    pub(crate) samples: bool,
}

/// What has become of a chunk.
pub(crate) struct Landed {
    /// Whether its keys and values are in the cache. If not, the sequence is as it was before the step.
    pub(crate) committed: Result<(), Error>,
    /// `[vocabulary]` behind its last token; empty if they were not wanted.
    pub(crate) logits: Vec<f32>,
}

/// Runs the model.
pub(crate) trait Decoder: Send {
    /// Runs it on all chunks, and submits all their keys and values to the cache as **one** batch.
    ///
    /// # Errors
    /// When the step failed as a whole: nothing was stored.
    fn step(&mut self, cache: &BlockingCache, chunks: &[Chunk<'_>]) -> anyhow::Result<Vec<Landed>>;
}

/// All that makes a model.
pub(crate) struct Model {
    /// As requests name it.
    pub(crate) name: String,
    /// Longest sequence that it was trained for.
    pub(crate) context_tokens: u32,
    /// Most tokens of one sequence in one step.
    pub(crate) chunk_tokens: u32,
    pub(crate) geometry: Geometry,
    pub(crate) sealed_format: Format,
    pub(crate) codec: Arc<dyn Codec>,
    pub(crate) decoder: Box<dyn Decoder>,
}
