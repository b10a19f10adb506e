//! How far one model's predictions are from another's.

use super::model::{Logits, greedy};

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

/// A format against the raw cache.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Score {
    /// Change of the perplexity.
    pub delta_ppl_percent: f64,
    pub kl_mean: f64,
    pub kl_p99: f64,
    /// Share of tokens for which both find the same one most likely.
    pub top1_agreement: f64,
    pub tokens_scored: usize,
}

/// Compares predictions, token by token.
#[derive(Debug, Default)]
pub struct Scorer {
    divergences: Vec<f64>,
    agreed: usize,
    /// How much less likely what came next was found, in nats, and how often something came.
    surprise: f64,
    predicted: usize,
}

impl Scorer {
    /// Predictions behind consecutive tokens; `next` are the tokens that came, as far as there are any.
    pub fn add(&mut self, expected: &Logits, got: &Logits, next: &[u32]) {
        for (row, (expected, got)) in expected.rows().zip(got.rows()).enumerate() {
            self.divergences.push(divergence(expected, got));
            self.agreed += usize::from(greedy(expected) == greedy(got));
            if let Some(next) = next.get(row) {
                let next = *next as usize;
                self.surprise += log_softmax(expected)[next] - log_softmax(got)[next];
                self.predicted += 1;
            }
        }
    }

    pub fn finish(mut self) -> Score {
        let count = self.divergences.len().max(1);
        self.divergences.sort_by(f64::total_cmp);
        let p99 = self.divergences.get((count * 99 / 100).min(count - 1));
        Score {
            delta_ppl_percent: ((self.surprise / self.predicted.max(1) as f64).exp() - 1.0) * 100.0,
            kl_mean: self.divergences.iter().sum::<f64>() / count as f64,
            kl_p99: p99.copied().unwrap_or_default(),
            top1_agreement: self.agreed as f64 / count as f64,
            tokens_scored: self.divergences.len(),
        }
    }
}
