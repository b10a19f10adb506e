//! SmolLM2 behind the server's two traits: the model that the examples share, over this server's cache.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use kv_cache::half::f16;
use kv_cache::{BlockingCache, ElementType, Format, Sequence};

use crate::api::Role;
use crate::llm::cached::Step;
use crate::llm::model::{Wanted, Weights};
use crate::llm::tokenizer::{Message, Tokenizer};
use crate::llm::{self, CHUNK_TOKENS, fetch};
use crate::model::{Chunk, Codec, Decoder, Landed, Model};

/// As requests name it.
const NAME: &str = "smollm2-135m-instruct";

/// Gets the model, the first time over the network, and loads it.
///
/// # Errors
/// If it cannot be had or read; the error says what to do instead.
pub(crate) async fn load(given: Option<PathBuf>, on_gpu: bool) -> anyhow::Result<Model> {
    tokio::task::spawn_blocking(move || {
        let path = fetch::model(given.as_deref())?;
        read(&path, on_gpu).with_context(|| format!("cannot use the model {}", path.display()))
    })
    .await?
}

fn read(path: &Path, on_gpu: bool) -> anyhow::Result<Model> {
    let decoder = llm::model::Model::load(path, Weights::Quantised, &llm::device(on_gpu)?)?;
    let config = decoder.config();
    let vocabulary = config.vocab as u32;
    Ok(Model {
        name: NAME.into(),
        context_tokens: config.context_tokens as u32,
        chunk_tokens: CHUNK_TOKENS as u32,
        geometry: decoder.geometry(ElementType::F16).model(NAME),
        sealed_format: Format::Int8,
        codec: Arc::new(SmolCodec { tokenizer: Tokenizer::from_gguf(path)?, vocabulary }),
        decoder: Box::new(SmolDecoder(decoder)),
    })
}

struct SmolCodec {
    tokenizer: Tokenizer,
    vocabulary: u32,
}

impl Codec for SmolCodec {
    fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        self.tokenizer.encode(text)
    }

    fn encode_chat(&self, messages: &[(Role, String)]) -> anyhow::Result<Vec<u32>> {
        let message =
            |(role, content): &(Role, String)| Message { role: role.name().into(), content: content.clone() };
        self.tokenizer.encode_chat(&messages.iter().map(message).collect::<Vec<_>>())
    }

    fn decode(&self, token: u32, out: &mut Vec<u8>) {
        out.extend(self.tokenizer.bytes(token));
    }

    fn is_end(&self, token: u32) -> bool {
        self.tokenizer.is_end(token)
    }

    fn vocabulary(&self) -> u32 {
        self.vocabulary
    }
}

struct SmolDecoder(llm::model::Model);

impl Decoder for SmolDecoder {
    fn step(&mut self, cache: &BlockingCache, chunks: &[Chunk<'_>]) -> anyhow::Result<Vec<Landed>> {
        // Sequences of a shard that is lost fail by themselves, not the step.
        let lost = |chunk: &Chunk<'_>| chunk.sequence.view(0).map(drop);
        let mut landed: Vec<Landed> =
            chunks.iter().map(|chunk| Landed { committed: lost(chunk), logits: Vec::new() }).collect();
        let which: Vec<usize> = (0..chunks.len()).filter(|at| landed[*at].committed.is_ok()).collect();
        if which.is_empty() {
            return Ok(landed);
        }
        let sequences: Vec<&Sequence> = which.iter().map(|at| chunks[*at].sequence).collect();
        let pieces: Vec<llm::Chunk<'_>> = which
            .iter()
            .map(|at| llm::Chunk { tokens: chunks[*at].tokens, position: chunks[*at].position })
            .collect();
        let config = self.0.config();
        let mut step = Step::<f16>::begin(&sequences, &pieces, config.kv_heads, config.head_dim)?;
        let samples = which.iter().map(|at| chunks[*at].samples).collect::<Vec<_>>();
        let logits = self.0.forward(&pieces, &mut step, Wanted::LastOf(&samples))?;
        let sampled = which.iter().filter(|at| chunks[**at].samples);
        for (&at, row) in sampled.zip(logits.rows()) {
            landed[at].logits = row.to_vec();
        }
        let (batch, of) = step.into_batch();
        let results = cache.submit(batch)?;
        for (piece, result) in of.into_iter().zip(results) {
            landed[which[piece]].committed = result.map(drop);
        }
        Ok(landed)
    }
}
