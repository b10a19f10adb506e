//! Scores a format over a text.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, ensure};
use indicatif::ProgressBar;
use kv_cache::cold::{Codec, KeyBasis, KeyBasisBuilder};
use kv_cache::half::f16;
use kv_cache::{BlockFormat, Cache, Devices, Element as _, Format, KeyMeansBuilder, OpenOptions};

use crate::cold::{Frames, recode};
use crate::llm::CHUNK_TOKENS;
use crate::llm::generate::{CachedSequences, Sequences, feed, until_sealed};
use crate::llm::model::{Model, ModelConfig, Wanted};
use crate::llm::score::{Predictions, Scorer};
use crate::llm::tokenizer::Tokenizer;
use crate::report::Row;

/// Tokens that mean keys and bases of keys are made from.
const CALIBRATION_TOKENS: usize = 4096;

/// How many of them at a time.
const PASSAGE_TOKENS: usize = 1024;

/// A format, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) format: BlockFormat,
    /// `+rc`
    pub(crate) centred: bool,
    /// `+all`: no full block stays raw.
    pub(crate) all: bool,
    /// `+nosinks`: the first does not.
    pub(crate) no_sinks: bool,
    /// `+cold32`, `+cold16`: full blocks go through frames of this codec.
    pub(crate) cold: Option<Codec>,
    /// `+lowrank50`: through frames with keys in so many directions, in percent of their width; values are lossless unless `cold` says how.
    pub(crate) low_rank: Option<u32>,
}

impl Kind {
    /// Full blocks go through frames.
    fn is_framed(&self) -> bool {
        self.cold.is_some() || self.low_rank.is_some()
    }

    fn of(format: impl Into<BlockFormat>) -> Kind {
        let format = format.into();
        Kind { format, centred: false, all: false, no_sinks: false, cold: None, low_rank: None }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Kind, String> {
        let mut parts = name.split('+');
        let mut kind = Kind::of(parts.next().unwrap_or_default().parse::<BlockFormat>()?);
        for part in parts {
            match part {
                layers if layers.starts_with("raw") => {
                    let of_layers: BlockFormat = format!("int8+{layers}").parse()?;
                    (kind.format.raw_first_layers, kind.format.raw_last_layers) =
                        (of_layers.raw_first_layers, of_layers.raw_last_layers);
                }
                "rc" => kind.centred = true,
                "all" => kind.all = true,
                "nosinks" => kind.no_sinks = true,
                "cold32" => kind.cold = Some(Codec::Lossy32),
                "cold16" => kind.cold = Some(Codec::Lossy16),
                _ => {
                    let percent = part.strip_prefix("lowrank").and_then(|percent| percent.parse().ok());
                    kind.low_rank = percent.filter(|percent| (1..=100).contains(percent));
                    if kind.low_rank.is_none() {
                        return Err(format!(
                            "+{part} is none of +raw2:1 (layers), +rc, +all, +nosinks, +lowrank1 to +lowrank100, +cold32 and +cold16"
                        ));
                    }
                }
            }
        }
        if kind.is_framed() && kind.format != Format::Raw {
            return Err(format!("{name}: frames are made of raw blocks"));
        }
        Ok(kind)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (rc, all) = (if self.centred { "+rc" } else { "" }, if self.all { "+all" } else { "" });
        let no_sinks = if self.no_sinks { "+nosinks" } else { "" };
        let cold = match self.cold {
            Some(Codec::Lossy32) => "+cold32",
            Some(Codec::Lossy16) => "+cold16",
            _ => "",
        };
        let low_rank = self.low_rank.map(|percent| format!("+lowrank{percent}")).unwrap_or_default();
        write!(f, "{}{rc}{all}{no_sinks}{low_rank}{cold}", self.format)
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
        let mut ids = tokenizer.encode(&text[..cut(tokens.saturating_mul(8)).unwrap_or(text.len())])?;
        ids.truncate(tokens);
        let end = cut(text.len().saturating_sub(8 * CALIBRATION_TOKENS)).unwrap_or_default();
        // Of a short text there is less, or nothing.
        let scored = tokenizer.decode(&ids)?.len();
        let end = cut(scored.max(end)).unwrap_or(text.len());
        let mut other = tokenizer.encode(&text[end..])?;
        other.truncate(CALIBRATION_TOKENS);
        let passages = ids.chunks(passage_tokens).map(<[u32]>::to_vec).filter(|ids| ids.len() > 1).collect();
        Ok(Texts { passages, other })
    }
}

/// What is made from the keys of some text.
pub(crate) struct Calibration {
    pub(crate) means: KeyMeansBuilder,
    pub(crate) basis: KeyBasisBuilder,
}

impl Calibration {
    /// The basis of so many percent of the width.
    pub(crate) fn basis(&self, model: &ModelConfig, percent: u32) -> anyhow::Result<KeyBasis> {
        let width = (model.kv_heads * model.head_dim) as u32;
        Ok(self.basis.finish((width * percent / 100).max(1))?)
    }
}

/// Of keys as the model computes them over a raw cache.
pub(crate) async fn calibrate(model: &Model, tokens: &[u32]) -> anyhow::Result<Calibration> {
    ensure!(
        !tokens.is_empty(),
        "the text is too short: nothing of it is left that is not scored, of which mean keys could be made"
    );
    let raw = Kind::of(Format::Raw);
    let cache = open(model, &raw, Path::new(""), PASSAGE_TOKENS).await?;
    let geometry = model.geometry(f16::TYPE);
    let mut means = KeyMeansBuilder::new(&geometry)?;
    let mut basis = KeyBasisBuilder::new(&geometry)?;
    for passage in tokens.chunks(PASSAGE_TOKENS) {
        let sequence = cache.open("calibrate", OpenOptions::default()).await?;
        let mut sequences = CachedSequences::<f16>::new(&cache, vec![sequence]);
        feed(model, &mut sequences, 0, passage).await?;
        for layer in 0..model.config().layers as u32 {
            let all = 0..passage.len() as u32;
            let (keys, _) = sequences.sequences[0].read::<f16>(layer, all).await?;
            let keys = keys.into_iter().map(f16::to_f32).collect::<Vec<_>>();
            means.add(layer, 0, &keys);
            basis.add(layer, 0, &keys);
        }
    }
    Ok(Calibration { means, basis })
}

/// What was found out.
pub(crate) struct Scores {
    /// A row for each kind, in their order.
    pub(crate) rows: Vec<Row>,
    /// Perplexity of the text over the raw cache.
    pub(crate) raw_perplexity: f64,
}

/// A kind while it is scored.
struct Scored<'a> {
    kind: &'a Kind,
    cache: Cache,
    scorer: Scorer,
    stored_bits: usize,
    /// Of elements that went through frames, how many, and the bits that frames take instead.
    framed: usize,
    frame_bits: usize,
}

/// The passages over a cache of each kind, and over a raw one that all are compared with. `bases` are by percent of the width.
pub(crate) async fn score(
    model: &Model,
    passages: &[Vec<u32>],
    kinds: &[Kind],
    means: &Path,
    bases: &BTreeMap<u32, KeyBasis>,
) -> anyhow::Result<Scores> {
    let longest = passages.iter().map(Vec::len).max().unwrap_or_default();
    let raw = open(model, &Kind::of(Format::Raw), Path::new(""), longest).await?;
    let mut scored = Vec::with_capacity(kinds.len());
    for kind in kinds {
        let cache = open(model, kind, means, longest).await?;
        scored.push(Scored {
            kind,
            cache,
            scorer: Scorer::default(),
            stored_bits: 0,
            framed: 0,
            frame_bits: 0,
        });
    }
    let layout = model.geometry(f16::TYPE).layout()?;
    let token_elements = layout.raw_bytes() / layout.element.bytes() / layout.block_tokens;
    let tokens = passages.iter().map(Vec::len).sum::<usize>();
    let (mut surprise, mut predicted) = (0.0, 0);
    let bar = ProgressBar::new((tokens * (1 + kinds.len())) as u64);
    for passage in passages {
        let mut expected = begin(&raw).await?;
        let mut sequences = Vec::with_capacity(scored.len());
        for scored in &scored {
            sequences.push(begin(&scored.cache).await?);
        }
        for (at, chunk) in passage.chunks(CHUNK_TOKENS).enumerate() {
            let logits = expected.step(model, &[0], &[chunk], Wanted::All).await?;
            let predictions = Predictions::new(&logits);
            let next = &passage[(at * CHUNK_TOKENS + 1).min(passage.len())..];
            surprise += predictions.surprise(next);
            predicted += next.len().min(chunk.len());
            bar.inc(chunk.len() as u64);
            for (scored, sequences) in scored.iter_mut().zip(&mut sequences) {
                let logits = sequences.step(model, &[0], &[chunk], Wanted::All).await?;
                until_sealed(&sequences.sequences[0]).await;
                // The sinks stay as they are, as in formats of few bits. A chunk is a block.
                let kind = scored.kind;
                if kind.is_framed() && chunk.len() == layout.block_tokens && (kind.all || at > 0) {
                    let codec = kind.cold.unwrap_or(Codec::Lossless);
                    let basis =
                        kind.low_rank.map(|percent| bases.get(&percent).context("a basis of that rank"));
                    let frames = Frames { codec, basis: basis.transpose()? };
                    scored.frame_bits += 8 * recode(&sequences.sequences[0], &layout, chunk, frames).await?;
                    scored.framed += chunk.len() * token_elements;
                }
                scored.scorer.add(&predictions, &logits, next);
                bar.inc(chunk.len() as u64);
            }
        }
        // Blocks as they are stored; of the last one, what its tokens take.
        for (scored, sequences) in scored.iter_mut().zip(&sequences) {
            for block in sequences.sequences[0].view(0).context("what was stored")?.blocks() {
                let bytes = block.format().block_bytes(&layout);
                scored.stored_bits += 8 * bytes * block.tokens() as usize / layout.block_tokens;
            }
        }
    }
    bar.finish_and_clear();
    let row = |Scored { kind, scorer, stored_bits, framed, frame_bits, .. }: Scored<'_>| {
        let stored_bits = stored_bits - 8 * layout.element.bytes() * framed + frame_bits;
        let sealed_bits = kind.format.bits_per_element(&layout);
        Row {
            format: kind.to_string(),
            bits_per_element: if framed > 0 { frame_bits as f64 / framed as f64 } else { sealed_bits },
            bits_per_element_with_raw: stored_bits as f64 / (tokens * token_elements) as f64,
            score: scorer.finish(),
        }
    };
    Ok(Scores {
        rows: scored.into_iter().map(row).collect(),
        raw_perplexity: (surprise / predicted.max(1) as f64).exp(),
    })
}

async fn begin(cache: &Cache) -> anyhow::Result<CachedSequences<f16>> {
    let sequence = cache.open("score", OpenOptions::default()).await?;
    Ok(CachedSequences::new(cache, vec![sequence]))
}

/// A cache with room for one sequence of so many tokens, twice.
async fn open(model: &Model, kind: &Kind, means: &Path, tokens: usize) -> anyhow::Result<Cache> {
    let configure = |config: &mut kv_cache::CacheConfig| {
        config.quantisation.key_means = kind.centred.then(|| means.to_owned());
        if kind.all || kind.no_sinks {
            config.quantisation.raw_sinks = Some(false);
        }
        if kind.all {
            config.quantisation.raw_window_blocks = Some(0);
        }
    };
    let geometry = model.geometry(f16::TYPE);
    let layout = geometry.layout()?;
    let bytes = 2 * tokens.div_ceil(layout.block_tokens) * layout.raw_bytes() + (64 << 20);
    let builder = Cache::builder(geometry).devices(Devices::cpu(1)).memory_bytes_per_device(bytes as u64);
    let builder = builder.sealed_format(kind.format).configure(configure);
    Ok(builder.build().await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for name in [
            "raw",
            "int8",
            "r4+rc",
            "r2+rc+all",
            "fp8+all",
            "int2+nosinks",
            "raw+cold32",
            "raw+all+cold16",
            "raw+lowrank50",
            "raw+lowrank25+cold32",
            "r4/int4+raw2:1+rc",
        ] {
            assert_eq!(name.parse::<Kind>().unwrap().to_string(), name);
        }
        for name in
            ["", "int7", "int8+", "int8+rd", "raw+cold8", "int8+cold16", "raw+lowrank0", "r4+lowrank50"]
        {
            assert!(name.parse::<Kind>().is_err(), "{name}");
        }
    }
}
