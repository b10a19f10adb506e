//! The last minutes, sampled: kept by the server, so that a page that is opened later shows them, too.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::app::App;
use crate::occupancy::Occupancy;

/// Samples kept: five minutes of one a second.
const SAMPLES_MAX: usize = 300;

/// One moment, and what has happened since the one before it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Sample {
    /// Counts up from 1.
    pub(crate) number: u64,
    /// Since the server's start.
    pub(crate) at_s: f32,
    pub(crate) generated_per_s: f32,
    pub(crate) prefilled_per_s: f32,
    pub(crate) waiting: usize,
    pub(crate) running: usize,
    pub(crate) parked: usize,
    pub(crate) occupancy: Occupancy,
    /// Share of the blocks of prompts that were cached; null without a prompt.
    pub(crate) hit_rate: Option<f32>,
    pub(crate) first_token_ms: Option<Quantiles>,
    pub(crate) between_tokens_ms: Option<Quantiles>,
    /// Sequences of a step; null without a step.
    pub(crate) step_sequences: Option<f32>,
    pub(crate) step_tokens: Option<f32>,
    pub(crate) preemptions: u64,
    pub(crate) evictions: u64,
}

/// Of the values since the last sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f32,
    pub(crate) p95: f32,
}

impl Quantiles {
    /// None of no values.
    pub(crate) fn of(mut values: Vec<f32>) -> Option<Self> {
        values.sort_unstable_by(f32::total_cmp);
        let last = values.len().checked_sub(1)?;
        let at = |share: f32| values[(last as f32 * share).round() as usize];
        Some(Quantiles { p50: at(0.5), p95: at(0.95) })
    }
}

/// Counters as of the last sample.
#[derive(Debug, Clone, Copy, Default)]
struct Before {
    at_s: f32,
    generated: u64,
    steps: u64,
    chunks: u64,
    decodes: u64,
    tokens: u64,
    preemptions: u64,
    asked: u64,
    hit: u64,
    evictions: u64,
}

#[derive(Debug, Default)]
struct Kept {
    samples: VecDeque<Sample>,
    number: u64,
    before: Before,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct History(Mutex<Kept>);

impl History {
    /// Takes a sample.
    pub(crate) fn sample(&self, app: &App) {
        let stats = app.cache.stats();
        // The latencies are taken, not copied: the runner waits.
        let (state, first_token_ms, between_tokens_ms) = {
            let mut state = app.figures.lock();
            let (first, between) =
                (std::mem::take(&mut state.first_token_ms), std::mem::take(&mut state.between_tokens_ms));
            (state.clone(), first, between)
        };
        let now = Before {
            at_s: app.started.elapsed().as_secs_f32(),
            generated: state.tokens_out,
            steps: state.steps,
            chunks: state.step_chunks,
            decodes: state.step_decodes,
            tokens: state.step_tokens,
            preemptions: state.preemptions,
            asked: stats.total.prefix_blocks_asked,
            hit: stats.total.prefix_blocks_hit,
            evictions: stats.total.evictions,
        };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut kept.before, now);
        let seconds = (now.at_s - before.at_s).max(1e-3);
        let steps = now.steps - before.steps;
        let per = |sum: u64, count: u64| (count > 0).then(|| sum as f32 / count as f32);
        let (tokens, decodes) = (now.tokens - before.tokens, now.decodes - before.decodes);
        let shards = stats.shards.iter().filter(|shard| shard.lost.is_none());
        let occupancies = shards.map(|shard| Occupancy::of(&shard.counters, app.cache.config()));
        kept.number += 1;
        let sample = Sample {
            number: kept.number,
            at_s: now.at_s,
            generated_per_s: (now.generated - before.generated) as f32 / seconds,
            prefilled_per_s: (tokens - decodes) as f32 / seconds,
            waiting: state.waiting,
            running: state.running,
            parked: state.parked,
            occupancy: occupancies.fold(Occupancy::default(), Occupancy::add),
            // A shard that is lost takes nothing back of what it has counted; saturating all the same.
            hit_rate: per(now.hit.saturating_sub(before.hit), now.asked.saturating_sub(before.asked)),
            first_token_ms: Quantiles::of(first_token_ms),
            between_tokens_ms: Quantiles::of(between_tokens_ms),
            step_sequences: per(now.chunks - before.chunks, steps),
            step_tokens: per(tokens, steps),
            preemptions: now.preemptions - before.preemptions,
            evictions: now.evictions.saturating_sub(before.evictions),
        };
        if kept.samples.len() == SAMPLES_MAX {
            kept.samples.pop_front();
        }
        kept.samples.push_back(sample);
    }

    /// Samples with larger numbers than `since`.
    pub(crate) fn since(&self, since: u64) -> Vec<Sample> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.samples.iter().filter(|sample| sample.number > since).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_values_themselves() {
        assert_eq!(Quantiles::of(Vec::new()), None);
        assert_eq!(Quantiles::of(vec![3.0]), Some(Quantiles { p50: 3.0, p95: 3.0 }));
        let values = (0..=100).rev().map(|at| at as f32).collect();
        assert_eq!(Quantiles::of(values), Some(Quantiles { p50: 50.0, p95: 95.0 }));
    }
}
