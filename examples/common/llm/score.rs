//! How far one model's predictions are from another's.

use rayon::prelude::*;

use super::model::{Logits, greedy};

/// Kullback-Leibler divergence of what `logits` predict from what `expected` predict, in nats.
pub fn divergence(expected: &[f32], logits: &[f32]) -> f64 {
    between(&log_softmax(expected), &log_softmax(logits))
}

fn between(expected: &[f64], got: &[f64]) -> f64 {
    expected.iter().zip(got).map(|(p, q)| p.exp() * (p - q)).sum()
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

/// What is predicted behind consecutive tokens, for any number of others to be compared with it.
#[derive(Debug)]
pub struct Predictions {
    /// Of each token, the logarithm of how likely the model holds every word.
    rows: Vec<Vec<f64>>,
    /// Of each token, the most likely word.
    first: Vec<u32>,
}

impl Predictions {
    pub fn new(logits: &Logits) -> Self {
        let rows = logits.rows().collect::<Vec<_>>();
        Predictions {
            rows: rows.par_iter().map(|row| log_softmax(row)).collect(),
            first: rows.iter().map(|row| greedy(row)).collect(),
        }
    }

    /// How unlikely what came next was found, in nats: the sum over those tokens behind which something came.
    pub fn surprise(&self, next: &[u32]) -> f64 {
        self.rows.iter().zip(next).map(|(row, next)| -row[*next as usize]).sum()
    }
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
    /// Predictions behind the same tokens; `next` are the tokens that came, as far as there are any.
    pub fn add(&mut self, expected: &Predictions, got: &Logits, next: &[u32]) {
        let got = Predictions::new(got);
        let rows = expected.rows.par_iter().zip(&got.rows);
        self.divergences.par_extend(rows.map(|(expected, got)| between(expected, got)));
        self.agreed +=
            expected.first.iter().zip(&got.first).filter(|(expected, got)| expected == got).count();
        self.surprise += got.surprise(next) - expected.surprise(next);
        self.predicted += next.len().min(got.rows.len());
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
