//! A decoder's own cache: for every sequence a vector per layer and head. What ours is compared with.

use kv_cache::half::{bf16, f16};

use super::attention::{Rows, Run};
use super::{Chunk, KeysValues};

/// An element that attention reads.
pub trait Stored: kv_cache::Element {
    fn round(x: f32) -> Self;
    fn single(self) -> f32;
    fn rows(rows: &[Self]) -> Rows<'_>;
}

impl Stored for f32 {
    fn round(x: f32) -> Self {
        x
    }
    fn single(self) -> f32 {
        self
    }
    fn rows(rows: &[Self]) -> Rows<'_> {
        Rows::F32(rows)
    }
}

impl Stored for f16 {
    fn round(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn single(self) -> f32 {
        self.to_f32()
    }
    fn rows(rows: &[Self]) -> Rows<'_> {
        Rows::F16(rows)
    }
}

impl Stored for bf16 {
    fn round(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn single(self) -> f32 {
        self.to_f32()
    }
    fn rows(rows: &[Self]) -> Rows<'_> {
        Rows::Bf16(rows)
    }
}

/// Keys and values of one sequence, by layer and head: `[tokens, dim]`.
#[derive(Debug, Clone, Default)]
pub struct PlainCache<T> {
    heads: Vec<(Vec<T>, Vec<T>)>,
}

impl<T: Stored> PlainCache<T> {
    pub fn new(layers: usize, kv_heads: usize) -> Self {
        PlainCache { heads: vec![(Vec::new(), Vec::new()); layers * kv_heads] }
    }

    /// Tokens in it.
    pub fn len(&self, dim: usize) -> usize {
        self.heads.first().map_or(0, |(keys, _)| keys.len() / dim)
    }
}

/// One step of some sequences.
pub struct PlainStep<'a, T> {
    sequences: Vec<&'a mut PlainCache<T>>,
    /// Tokens of each chunk.
    tokens: Vec<usize>,
    kv_heads: usize,
    dim: usize,
}

impl<'a, T: Stored> PlainStep<'a, T> {
    /// A step of one chunk for each sequence.
    pub fn new(
        sequences: Vec<&'a mut PlainCache<T>>,
        chunks: &[Chunk<'_>],
        kv_heads: usize,
        dim: usize,
    ) -> Self {
        let tokens = chunks.iter().map(|chunk| chunk.tokens.len()).collect();
        PlainStep { sequences, tokens, kv_heads, dim }
    }
}

impl<T: Stored> KeysValues for PlainStep<'_, T> {
    fn put(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        let mut rows = keys.chunks_exact(self.dim).zip(values.chunks_exact(self.dim));
        for (sequence, tokens) in self.sequences.iter_mut().zip(&self.tokens) {
            for _ in 0..*tokens {
                let heads = &mut sequence.heads[layer * self.kv_heads..(layer + 1) * self.kv_heads];
                for ((to_keys, to_values), (keys, values)) in heads.iter_mut().zip(rows.by_ref()) {
                    to_keys.extend(keys.iter().map(|x| T::round(*x)));
                    to_values.extend(values.iter().map(|x| T::round(*x)));
                }
            }
        }
    }

    fn runs(&self, layer: usize, chunk: usize, head: usize) -> anyhow::Result<Vec<Run<'_>>> {
        let (keys, values) = &self.sequences[chunk].heads[layer * self.kv_heads + head];
        // Cut as blocks are, so that what is loaded stays in the first-level cache.
        let block = super::CHUNK_TOKENS * self.dim;
        let pieces = keys.chunks(block).zip(values.chunks(block));
        Ok(pieces
            .map(|(keys, values)| Run {
                tokens: keys.len() / self.dim,
                keys: T::rows(keys),
                values: T::rows(values),
            })
            .collect())
    }
}
