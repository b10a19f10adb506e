//! How far one model's predictions are from another's.

use kv_cache::Cache;

use super::CHUNK_TOKENS;
use super::generate::{CachedSequences, Sequences};
use super::model::{Model, Wanted, greedy};
use super::plain::Stored;

/// Kullback-Leibler divergence of what `logits` predict from what `expected` predict, in nats.
pub fn divergence(expected: &[f32], logits: &[f32]) -> f64 {
    let (p, q) = (log_softmax(expected), log_softmax(logits));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, x| most.max(*x));
    let sum = logits.iter().map(|x| f64::from(x - most).exp()).sum::<f64>().ln();
    logits.iter().map(|x| f64::from(x - most) - sum).collect()
}

/// A format against the raw cache, on one text.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Score {
    pub kl_mean: f64,
    pub kl_p99: f64,
    /// Share of tokens for which both find the same one most likely.
    pub top1_agreement: f64,
    /// Change of the perplexity.
    pub delta_ppl_percent: f64,
    pub tokens_scored: usize,
}

/// Feeds `tokens` to the model over both caches in chunks of a block, so that attention reads sealed blocks, and compares what is
/// predicted behind every token. Blocks are given time to be sealed before the next chunk reads them.
///
/// # Errors
/// Those of the steps.
pub async fn score<T: Stored>(
    model: &Model,
    tokens: &[u32],
    reference: &Cache,
    scored: &Cache,
) -> anyhow::Result<Score> {
    let mut both = Vec::new();
    for cache in [reference, scored] {
        let sequence = cache.open("score", kv_cache::OpenOptions::default()).await?;
        both.push(CachedSequences::<T>::new(cache, vec![sequence]));
    }
    let (mut divergences, mut agreed) = (Vec::with_capacity(tokens.len()), 0usize);
    let (mut surprise, mut surprise_before) = (0.0, 0.0);
    for (at, chunk) in tokens.chunks(CHUNK_TOKENS).enumerate() {
        let mut logits = Vec::new();
        for sequences in &mut both {
            logits.push(sequences.step(model, &[0], &[chunk], Wanted::All).await?);
            sequences.until_sealed(0).await;
        }
        for (row, (expected, got)) in logits[0].rows().zip(logits[1].rows()).enumerate() {
            divergences.push(divergence(expected, got));
            agreed += usize::from(greedy(expected) == greedy(got));
            if let Some(next) = tokens.get(at * CHUNK_TOKENS + row + 1) {
                surprise_before -= log_softmax(expected)[*next as usize];
                surprise -= log_softmax(got)[*next as usize];
            }
        }
    }
    let count = divergences.len();
    divergences.sort_by(f64::total_cmp);
    let per_token = (surprise - surprise_before) / (count - 1).max(1) as f64;
    Ok(Score {
        kl_mean: divergences.iter().sum::<f64>() / count as f64,
        kl_p99: divergences[(count * 99 / 100).min(count - 1)],
        top1_agreement: agreed as f64 / count as f64,
        delta_ppl_percent: (per_token.exp() - 1.0) * 100.0,
        tokens_scored: count,
    })
}
