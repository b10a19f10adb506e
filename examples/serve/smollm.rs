//! The real model: `examples/common/llm`, as the server wants it.

use std::path::Path;
use std::sync::Arc;

use kv_cache::half::f16;
use kv_cache::{BlockingCache, Element as _, Error, Format, Sequence};

use crate::api::Role;
use crate::llm::cached::Step;
use crate::llm::model::{self, Wanted, Weights};
use crate::llm::tokenizer::{Message, Tokenizer};
use crate::llm::{self, CHUNK_TOKENS};
use crate::model::{Chunk, Codec, Decoder, Landed, Model};

/// Reads the model's file, or the one that is fetched.
pub(crate) fn load(given: Option<&Path>) -> anyhow::Result<Model> {
    let path = llm::fetch::model(given)?;
    let tokenizer = Tokenizer::from_gguf(&path)?;
    let decoder = model::Model::load(&path, Weights::Quantised)?;
    let config = decoder.config();
    Ok(Model {
        name: "smollm2-135m-instruct".into(),
        context_tokens: config.context_tokens as u32,
        chunk_tokens: CHUNK_TOKENS as u32,
        geometry: decoder.geometry(f16::TYPE).model(&config.name),
        sealed_format: Format::Int8,
        codec: Arc::new(tokenizer),
        decoder: Box::new(decoder),
    })
}

impl Codec for Tokenizer {
    fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        Tokenizer::encode(self, text)
    }

    fn encode_chat(&self, messages: &[(Role, String)]) -> anyhow::Result<Vec<u32>> {
        let message =
            |(role, content): &(Role, String)| Message { role: role.name().into(), content: content.clone() };
        Tokenizer::encode_chat(self, &messages.iter().map(message).collect::<Vec<_>>())
    }

    fn decode(&self, token: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(self.bytes(token));
    }

    fn is_end(&self, token: u32) -> bool {
        Tokenizer::is_end(self, token)
    }

    fn vocabulary(&self) -> u32 {
        self.tokens()
    }
}

impl Decoder for model::Model {
    fn step(&mut self, cache: &BlockingCache, chunks: &[Chunk<'_>]) -> anyhow::Result<Vec<Landed>> {
        let sequences = chunks.iter().map(|chunk| chunk.sequence).collect::<Vec<&Sequence>>();
        let rows = chunks
            .iter()
            .map(|chunk| llm::Chunk { tokens: chunk.tokens, position: chunk.position })
            .collect::<Vec<_>>();
        let samples = chunks.iter().map(|chunk| chunk.samples).collect::<Vec<_>>();
        let config = self.config();
        let mut step = Step::<f16>::begin(&sequences, &rows, config.kv_heads, config.head_dim)?;
        let logits = self.forward(&rows, &mut step, Wanted::LastOf(&samples))?;
        let (batch, order) = step.into_batch();
        let unanswered = || Landed { committed: Err(Error::Empty), logits: Vec::new() };
        let mut landed = chunks.iter().map(|_| unanswered()).collect::<Vec<_>>();
        for (chunk, outcome) in order.into_iter().zip(cache.submit(batch)?) {
            landed[chunk].committed = outcome.map(drop);
        }
        let sampled = landed.iter_mut().zip(samples).filter(|(_, samples)| *samples);
        sampled.zip(logits.rows()).for_each(|((landed, _), row)| landed.logits = row.to_vec());
        Ok(landed)
    }
}
