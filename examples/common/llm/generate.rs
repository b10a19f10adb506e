//! Whole steps and whole answers, for those who want nothing in between: tests, benches, measurements of quality.

use anyhow::Context;
use kv_cache::{Cache, Sequence};

use super::cached::Step;
use super::model::{Logits, Model, Wanted, greedy};
use super::plain::{PlainCache, PlainStep, Stored};
use super::{CHUNK_TOKENS, Chunk};

/// Sequences that a model computes steps of.
pub trait Sequences {
    /// Tokens in one.
    fn len(&self, sequence: usize) -> u32;

    /// Computes `tokens[i]` behind what sequence `which[i]` holds.
    fn step(
        &mut self,
        model: &Model,
        which: &[usize],
        tokens: &[&[u32]],
        wanted: Wanted<'_>,
    ) -> impl Future<Output = anyhow::Result<Logits>>;
}

/// Over `kv_cache`.
pub struct CachedSequences<T> {
    cache: Cache,
    pub sequences: Vec<Sequence>,
    element: std::marker::PhantomData<T>,
}

impl<T: Stored> CachedSequences<T> {
    pub fn new(cache: &Cache, sequences: Vec<Sequence>) -> Self {
        CachedSequences { cache: cache.clone(), sequences, element: std::marker::PhantomData }
    }

    /// Waits until the full blocks of a sequence are sealed.
    pub async fn until_sealed(&self, sequence: usize) {
        until_sealed(&self.sequences[sequence]).await;
    }
}

impl<T: Stored> Sequences for CachedSequences<T> {
    fn len(&self, sequence: usize) -> u32 {
        self.sequences[sequence].len()
    }

    async fn step(
        &mut self,
        model: &Model,
        which: &[usize],
        tokens: &[&[u32]],
        wanted: Wanted<'_>,
    ) -> anyhow::Result<Logits> {
        let chunks = chunks(which, tokens, |sequence| self.sequences[sequence].len());
        let sequences = which.iter().map(|at| &self.sequences[*at]).collect::<Vec<_>>();
        let config = model.config();
        let mut step = Step::<T>::begin(&sequences, &chunks, config.kv_heads, config.head_dim)?;
        let logits = model.forward(&chunks, &mut step, wanted)?;
        let (batch, _) = step.into_batch();
        for result in self.cache.submit(batch).await? {
            result.context("a step was not stored")?;
        }
        Ok(logits)
    }
}

/// Waits until the full blocks of `sequence` are sealed: at once, if they stay raw.
pub async fn until_sealed(sequence: &Sequence) {
    while sequence.info().blocks_to_seal > 0 {
        tokio::task::yield_now().await;
    }
}

/// Over a decoder's own cache.
pub struct PlainSequences<T> {
    dim: usize,
    kv_heads: usize,
    sequences: Vec<PlainCache<T>>,
}

impl<T: Stored> PlainSequences<T> {
    pub fn new(model: &Model, count: usize) -> Self {
        let config = model.config();
        let sequences = (0..count).map(|_| PlainCache::new(config.layers, config.kv_heads)).collect();
        PlainSequences { dim: config.head_dim, kv_heads: config.kv_heads, sequences }
    }

    /// Makes all of them copies of the first.
    pub fn fork_first(&mut self) {
        if let Some((first, others)) = self.sequences.split_first_mut() {
            others.iter_mut().for_each(|other| other.clone_from(first));
        }
    }
}

impl<T: Stored> Sequences for PlainSequences<T> {
    fn len(&self, sequence: usize) -> u32 {
        self.sequences[sequence].len(self.dim) as u32
    }

    async fn step(
        &mut self,
        model: &Model,
        which: &[usize],
        tokens: &[&[u32]],
        wanted: Wanted<'_>,
    ) -> anyhow::Result<Logits> {
        let chunks = chunks(which, tokens, |sequence| self.sequences[sequence].len(self.dim) as u32);
        // In the order of `which`, which is that of the sequences.
        let chosen = self.sequences.iter_mut().enumerate().filter(|(at, _)| which.contains(at));
        let chosen = chosen.map(|(_, sequence)| sequence).collect();
        let mut step = PlainStep::new(chosen, &chunks, self.kv_heads, self.dim);
        model.forward(&chunks, &mut step, wanted)
    }
}

fn chunks<'a>(which: &[usize], tokens: &[&'a [u32]], position: impl Fn(usize) -> u32) -> Vec<Chunk<'a>> {
    let chunk = |(sequence, tokens): (&usize, &&'a [u32])| Chunk { tokens, position: position(*sequence) };
    which.iter().zip(tokens).map(chunk).collect()
}

/// Computes what `tokens` leave behind in a sequence, in chunks, and nothing of what comes next.
///
/// # Errors
/// Those of the steps.
pub async fn feed(
    model: &Model,
    sequences: &mut impl Sequences,
    sequence: usize,
    tokens: &[u32],
) -> anyhow::Result<()> {
    for chunk in tokens.chunks(CHUNK_TOKENS) {
        sequences.step(model, &[sequence], &[chunk], Wanted::LastOf(&[false])).await?;
    }
    Ok(())
}

/// Computes prompts, in chunks and each sequence by itself, and returns the logits behind the last token of each.
///
/// # Errors
/// Those of the steps; an empty prompt.
pub async fn prefill(
    model: &Model,
    sequences: &mut impl Sequences,
    prompts: &[&[u32]],
) -> anyhow::Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(prompts.len());
    for (at, prompt) in prompts.iter().enumerate() {
        let cached = sequences.len(at) as usize;
        let mut last = None;
        for chunk in prompt[cached..].chunks(CHUNK_TOKENS) {
            last = Some(sequences.step(model, &[at], &[chunk], Wanted::Last).await?);
        }
        all.push(last.context("nothing to compute")?.row(0).to_vec());
    }
    Ok(all)
}

/// Goes on with the most likely token `count` times, all sequences in each step.
///
/// # Errors
/// Those of the steps.
pub async fn decode(
    model: &Model,
    sequences: &mut impl Sequences,
    first: &[Vec<f32>],
    count: usize,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let which = (0..first.len()).collect::<Vec<_>>();
    let mut tokens = first.iter().map(|logits| vec![greedy(logits)]).collect::<Vec<_>>();
    for _ in 1..count {
        let last = tokens.iter().map(|tokens| &tokens[tokens.len() - 1..]).collect::<Vec<_>>();
        let logits = sequences.step(model, &which, &last, Wanted::Last).await?;
        tokens.iter_mut().zip(logits.rows()).for_each(|(tokens, row)| tokens.push(greedy(row)));
    }
    Ok(tokens)
}
