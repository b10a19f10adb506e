//! Scores a format over a text.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, ensure};
use kv_cache::half::f16;
use kv_cache::{Cache, Devices, Element as _, Format, KeyMeans, KeyMeansBuilder, OpenOptions};

use crate::llm::CHUNK_TOKENS;
use crate::llm::generate::{CachedSequences, Sequences, until_sealed};
use crate::llm::model::{Model, ModelConfig, Wanted};
use crate::llm::score::Scorer;
use crate::llm::tokenizer::Tokenizer;
use crate::report::Row;

/// Tokens that mean keys are made from.
const CALIBRATION_TOKENS: usize = 4096;

/// A format, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) format: Format,
    /// `+rc`
    pub(crate) centred: bool,
    /// `+all`: no full block stays raw.
    pub(crate) all: bool,
    /// `+nosinks`: the first does not.
    pub(crate) no_sinks: bool,
}

impl Kind {
    fn of(format: Format) -> Kind {
        Kind { format, centred: false, all: false, no_sinks: false }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Kind, String> {
        let mut parts = name.split('+');
        let mut kind = Kind::of(parts.next().unwrap_or_default().parse()?);
        for part in parts {
            match part {
                "rc" => kind.centred = true,
                "all" => kind.all = true,
                "nosinks" => kind.no_sinks = true,
                _ => return Err(format!("+{part} is neither +rc, +all nor +nosinks")),
            }
        }
        Ok(kind)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (rc, all) = (if self.centred { "+rc" } else { "" }, if self.all { "+all" } else { "" });
        write!(f, "{}{rc}{all}{}", self.format, if self.no_sinks { "+nosinks" } else { "" })
    }
}

/// Tokens of a text.
pub(crate) struct Texts {
    /// What is scored.
    pub(crate) passages: Vec<Vec<u32>>,
    /// What mean keys are made from: nothing of the passages.
    pub(crate) other: Vec<u32>,
}

impl Texts {
    pub(crate) fn cut(
        tokenizer: &Tokenizer,
        text: &str,
        tokens: usize,
        passage_tokens: usize,
        model: &ModelConfig,
    ) -> anyhow::Result<Texts> {
        ensure!(
            passage_tokens <= model.context_tokens,
            "passages of {passage_tokens} tokens are longer than the model's context of {}",
            model.context_tokens
        );
        // Enough text for that many tokens, cut between characters.
        let cut = |bytes: usize| text.char_indices().map(|(at, _)| at).find(|at| *at >= bytes);
        let mut ids = tokenizer.encode(&text[..cut(8 * tokens).unwrap_or(text.len())])?;
        ids.truncate(tokens);
        let end = cut(text.len().saturating_sub(8 * CALIBRATION_TOKENS)).unwrap_or_default();
        let mut other = tokenizer.encode(&text[end..])?;
        other.truncate(CALIBRATION_TOKENS);
        let passages = ids.chunks(passage_tokens).map(<[u32]>::to_vec).filter(|ids| ids.len() > 1).collect();
        Ok(Texts { passages, other })
    }
}

/// Mean keys of some text, as the model computes them over a raw cache.
pub(crate) async fn calibrate(model: &Model, tokens: &[u32]) -> anyhow::Result<KeyMeans> {
    let raw = Kind::of(Format::Raw);
    let cache = open(model, &raw, Path::new("")).await?;
    let mut means = KeyMeansBuilder::new(&model.geometry(f16::TYPE))?;
    for passage in tokens.chunks(1024) {
        let sequence = cache.open("calibrate", OpenOptions::default()).await?;
        let mut sequences = CachedSequences::<f16>::new(&cache, vec![sequence]);
        for chunk in passage.chunks(CHUNK_TOKENS) {
            sequences.step(model, &[0], &[chunk], Wanted::LastOf(&[false])).await?;
        }
        for layer in 0..model.config().layers as u32 {
            let all = 0..passage.len() as u32;
            let (keys, _) = sequences.sequences[0].read::<f16>(layer, all).await?;
            means.add(layer, 0, &keys.into_iter().map(f16::to_f32).collect::<Vec<_>>());
        }
    }
    Ok(means.finish())
}

/// The passages over a cache of the kind, and over a raw one beside it.
pub(crate) async fn score(
    model: &Model,
    passages: &[Vec<u32>],
    kind: &Kind,
    means: &Path,
) -> anyhow::Result<Row> {
    let raw = Kind::of(Format::Raw);
    let caches = [open(model, &raw, means).await?, open(model, kind, means).await?];
    let layout = model.geometry(f16::TYPE).layout()?;
    let token_elements = layout.raw_bytes() / layout.element.bytes() / layout.block_tokens;
    let mut scorer = Scorer::default();
    let (mut stored_bits, mut elements) = (0usize, 0usize);
    for passage in passages {
        let mut both = Vec::new();
        for cache in &caches {
            let sequence = cache.open("score", OpenOptions::default()).await?;
            both.push(CachedSequences::<f16>::new(cache, vec![sequence]));
        }
        for (at, chunk) in passage.chunks(CHUNK_TOKENS).enumerate() {
            let mut logits = Vec::new();
            for sequences in &mut both {
                logits.push(sequences.step(model, &[0], &[chunk], Wanted::All).await?);
                until_sealed(&sequences.sequences[0]).await;
            }
            let next = &passage[(at * CHUNK_TOKENS + 1).min(passage.len())..];
            scorer.add(&logits[0], &logits[1], next);
        }
        // Blocks as they are stored; of the last one, what its tokens take.
        let sequence = &both[1].sequences[0];
        for block in sequence.view(0).context("what was stored")?.blocks() {
            let bytes = block.format().block_bytes(&layout);
            stored_bits += 8 * bytes * block.tokens() as usize / layout.block_tokens;
        }
        elements += sequence.len() as usize * token_elements;
    }
    Ok(Row {
        format: kind.to_string(),
        bits_per_element: kind.format.bits_per_element(&layout),
        bits_per_element_with_raw: stored_bits as f64 / elements as f64,
        score: scorer.finish(),
    })
}

async fn open(model: &Model, kind: &Kind, means: &Path) -> anyhow::Result<Cache> {
    let configure = |config: &mut kv_cache::CacheConfig| {
        config.quantisation.key_means = kind.centred.then(|| means.to_owned());
        if kind.all || kind.no_sinks {
            config.quantisation.raw_sinks = Some(false);
        }
        if kind.all {
            config.quantisation.raw_window_blocks = Some(0);
        }
    };
    let builder = Cache::builder(model.geometry(f16::TYPE)).devices(Devices::cpu(1));
    let builder = builder.memory_bytes_per_device(1 << 29).sealed_format(kind.format).configure(configure);
    Ok(builder.build().await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for name in ["raw", "int8", "r4+rc", "r2+rc+all", "fp8+all", "int2+nosinks"] {
            assert_eq!(name.parse::<Kind>().unwrap().to_string(), name);
        }
        for name in ["", "int7", "int8+", "int8+rd"] {
            assert!(name.parse::<Kind>().is_err(), "{name}");
        }
    }
}
