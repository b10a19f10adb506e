//! A made-up model of no weights: its next token is a hash of all tokens before it, **as it reads them from the cache**.
//!
//! Keys are token ids and positions. So one wrong block, one token too many, a shared prefix of somebody else changes the text, and
//! tests know the right one from [`next`] alone. Its tokens are bytes: characters of two bytes are cut in half, as real tokenizers do.
//! `serve --toy` runs it, for a look at the server without a download.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::{Context, bail, ensure};
use kv_cache::{BatchCacheOperations, BlockingCache, ElementType, Format, Geometry, Rows, View};

use crate::api::Role;
use crate::model::{Chunk, Codec, Decoder, Landed, Model};

/// Tokens behind the bytes: the end of an answer, the begin and the end of a message.
const END: u32 = 256;
const BEGIN_MESSAGE: u32 = 257;
const END_MESSAGE: u32 = 258;
const VOCABULARY: u32 = 259;
/// Elements of a key: token id, position, and two to spare.
const DIM: usize = 4;

/// Lets steps through, or holds them up: tests look at the server while it is in the middle of something.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    waiting: bool,
}

impl Gate {
    fn set(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn wait_until(&self, holds: impl Fn(&GateState) -> bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(state, |state| !holds(state)).unwrap_or_else(PoisonError::into_inner));
    }

    /// Called by each step.
    fn pass(&self) {
        self.set(|state| state.waiting = true);
        self.wait_until(|state| !state.closed);
        self.set(|state| state.waiting = false);
    }
}

#[cfg(test)]
impl Gate {
    /// The next step waits.
    pub(crate) fn close(&self) {
        self.set(|state| state.closed = true);
    }

    /// All steps go on.
    pub(crate) fn open(&self) {
        self.set(|state| state.closed = false);
    }

    /// Waits until a step stands before the closed gate.
    pub(crate) fn wait_for_step(&self) {
        self.wait_until(|state| state.closed && state.waiting);
    }
}

/// How the toy behaves.
#[derive(Debug, Clone)]
pub(crate) struct Toy {
    /// One token of so many ends an answer; 0: none does.
    pub(crate) end_every: u64,
    pub(crate) context_tokens: u32,
    pub(crate) gate: Arc<Gate>,
}

impl Default for Toy {
    fn default() -> Self {
        Toy { end_every: 0, context_tokens: 4096, gate: Arc::default() }
    }
}

impl Toy {
    pub(crate) fn model(self) -> Model {
        Model {
            name: "toy".into(),
            context_tokens: self.context_tokens,
            chunk_tokens: 32,
            geometry: Geometry::new(1, 1, DIM as u32, ElementType::F32).model("toy"),
            // Token ids have to come back as they were.
            sealed_format: Format::Raw,
            codec: Arc::new(Bytes),
            decoder: Box::new(self),
        }
    }
}

/// What follows these tokens.
pub(crate) fn next(tokens: &[u32], end_every: u64) -> u32 {
    if tokens.last() == Some(&0xc3) {
        return 0xa9;
    }
    let fnv = |hash: u64, token: &u32| (hash ^ u64::from(*token)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325, fnv) >> 20;
    match hash {
        hash if end_every > 0 && hash % end_every == 1 => END,
        hash if hash % 13 == 0 => 0xc3,
        hash if hash % 6 == 0 => u32::from(b' '),
        hash => u32::from(b'a') + (hash % 26) as u32,
    }
}

impl Decoder for Toy {
    fn step(&mut self, cache: &BlockingCache, chunks: &[Chunk<'_>]) -> anyhow::Result<Vec<Landed>> {
        self.gate.pass();
        let mut batch = BatchCacheOperations::new();
        let mut landed = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let view = match chunk.sequence.view(0) {
                Ok(view) => view,
                Err(error) => {
                    landed.push(Landed { committed: Err(error), logits: Vec::new() });
                    continue;
                }
            };
            let mut tokens = stored(&view)?;
            ensure!(
                tokens.len() == chunk.position as usize,
                "{} tokens stored, {}",
                tokens.len(),
                chunk.position
            );
            tokens.extend(chunk.tokens);
            let mut logits = Vec::new();
            if chunk.samples {
                logits = vec![0.0; VOCABULARY as usize];
                logits[next(&tokens, self.end_every) as usize] = 10.0;
            }
            let key =
                |(at, &token): (usize, &u32)| [token as f32, (chunk.position as usize + at) as f32, 0.0, 0.0];
            let keys: Vec<f32> = chunk.tokens.iter().enumerate().flat_map(key).collect();
            batch = batch.append(chunk.sequence, chunk.tokens, &keys, &keys);
            landed.push(Landed { committed: Ok(()), logits });
        }
        let mut outcomes = cache.submit(batch)?.into_iter();
        for landed in landed.iter_mut().filter(|landed| landed.committed.is_ok()) {
            landed.committed = outcomes.next().context("a result for each append")?.map(drop);
        }
        Ok(landed)
    }
}

/// All tokens of a sequence, by their keys.
fn stored(view: &View) -> anyhow::Result<Vec<u32>> {
    let mut tokens = Vec::new();
    for block in view.blocks() {
        let Rows::Raw(rows) = block.keys::<f32>(0)? else { bail!("a block of the toy is not raw") };
        for row in rows.chunks_exact(DIM) {
            ensure!(row[1] == tokens.len() as f32, "position {} stored at {}", row[1], tokens.len());
            tokens.push(row[0] as u32);
        }
    }
    Ok(tokens)
}

/// A token is a byte.
#[derive(Debug)]
pub(crate) struct Bytes;

impl Codec for Bytes {
    fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn encode_chat(&self, messages: &[(Role, String)]) -> anyhow::Result<Vec<u32>> {
        let mut tokens = Vec::new();
        for (role, content) in messages {
            tokens.push(BEGIN_MESSAGE);
            tokens.extend(self.encode(role.name())?);
            tokens.extend(self.encode("\n")?);
            tokens.extend(self.encode(content)?);
            tokens.push(END_MESSAGE);
        }
        tokens.push(BEGIN_MESSAGE);
        tokens.extend(self.encode(Role::Assistant.name())?);
        Ok(tokens)
    }

    fn decode(&self, token: u32, out: &mut Vec<u8>) {
        out.extend(u8::try_from(token));
    }

    fn is_end(&self, token: u32) -> bool {
        token == END
    }

    fn vocabulary(&self) -> u32 {
        VOCABULARY
    }
}

/// The text that follows a prompt, as long as `tokens` tokens or to its end, and whether it has ended.
#[cfg(test)]
pub(crate) fn answer(prompt: &[u32], tokens: usize, end_every: u64) -> (String, bool) {
    let mut all = prompt.to_vec();
    let mut bytes = Vec::new();
    let mut ended = false;
    while !ended && all.len() < prompt.len() + tokens {
        let token = next(&all, end_every);
        ended = token == END;
        Bytes.decode(token, &mut bytes);
        all.push(token);
    }
    (String::from_utf8_lossy(&bytes).into_owned(), ended)
}
