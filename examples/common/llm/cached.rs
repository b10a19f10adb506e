//! Keys and values in the blocks of `kv_cache`, and nowhere else: what was stored before is read in place, what a step computes goes
//! in as one batch.

use kv_cache::{BatchCacheOperations, BlockView, CommittedView, Error, Rows as Stored, Sequence};

use super::attention::{Rows, Run};
use super::plain::Stored as Element;
use super::{Chunk, KeysValues};

/// One step of some sequences: it holds their blocks where they are, and what is new until it is submitted.
///
/// Sequences with a chunk of one token, those that decode, go in as one operation of rows; chunks of prompts as an operation each.
pub struct Step<'a, T> {
    sequences: Vec<&'a Sequence>,
    chunks: Vec<Chunk<'a>>,
    views: Vec<CommittedView>,
    kv_heads: usize,
    dim: usize,
    /// `[layers, chunks of one token, kv_heads, dim]`.
    decoded: Tensors<T>,
    /// Of each other chunk in turn, `[layers, tokens, kv_heads, dim]`.
    prompts: Vec<Tensors<T>>,
    /// The current layer's new rows by chunk, as attention reads them: `[kv_heads, tokens, dim]`.
    own: Vec<Tensors<T>>,
}

#[derive(Debug, Clone)]
struct Tensors<T> {
    keys: Vec<T>,
    values: Vec<T>,
}

// Not derived: that would ask for elements with a default.
impl<T> Default for Tensors<T> {
    fn default() -> Self {
        Tensors { keys: Vec::new(), values: Vec::new() }
    }
}

impl<'a, T: Element> Step<'a, T> {
    /// Pins what the sequences hold. `chunks` has one for each of them, behind their committed tokens.
    ///
    /// # Errors
    /// [`Error::Position`] if a chunk is elsewhere; those of [`Sequence::view_committed`].
    pub fn begin(
        sequences: &[&'a Sequence],
        chunks: &[Chunk<'a>],
        kv_heads: usize,
        dim: usize,
    ) -> Result<Self, Error> {
        let mut views = Vec::with_capacity(sequences.len());
        for (sequence, chunk) in sequences.iter().zip(chunks) {
            let actual = sequence.len();
            if actual != chunk.position {
                return Err(Error::Position { expected: chunk.position, actual });
            }
            views.push(sequence.view_committed()?);
        }
        let prompts = chunks.iter().filter(|chunk| chunk.tokens.len() != 1).map(|_| Tensors::default());
        Ok(Step {
            sequences: sequences.to_vec(),
            chunks: chunks.to_vec(),
            views,
            kv_heads,
            dim,
            decoded: Tensors::default(),
            prompts: prompts.collect(),
            own: vec![Tensors::default(); chunks.len()],
        })
    }

    /// The step as one batch, and which chunk each of its results is of.
    pub fn into_batch(self) -> (BatchCacheOperations, Vec<usize>) {
        // Blocks may move again.
        drop(self.views);
        let (mut sequences, mut ids) = (Vec::new(), Vec::new());
        let (mut first, mut last) = (Vec::new(), Vec::new());
        let mut batch = BatchCacheOperations::new();
        let mut prompts = self.prompts.iter();
        for (at, (chunk, sequence)) in self.chunks.iter().zip(&self.sequences).enumerate() {
            match chunk.tokens {
                [token] => {
                    sequences.push(*sequence);
                    ids.push(*token);
                    first.push(at);
                }
                tokens => {
                    if let Some(tensors) = prompts.next() {
                        batch = batch.append(*sequence, tokens, &tensors.keys, &tensors.values);
                        last.push(at);
                    }
                }
            }
        }
        if !sequences.is_empty() {
            batch = batch.append_each(&sequences, &ids, &self.decoded.keys, &self.decoded.values);
        }
        last.extend(first);
        (batch, last)
    }
}

impl<T: Element> KeysValues for Step<'_, T> {
    fn put(&mut self, _layer: usize, keys: &[f32], values: &[f32]) {
        let (heads, dim) = (self.kv_heads, self.dim);
        let mut prompts = self.prompts.iter_mut();
        let mut first = 0;
        for (chunk, own) in self.chunks.iter().zip(&mut self.own) {
            let tokens = chunk.tokens.len();
            let rows = first..first + tokens * heads * dim;
            first = rows.end;
            let to = if tokens == 1 { Some(&mut self.decoded) } else { prompts.next() };
            let Some(to) = to else { continue };
            for (from, to, own) in [
                (&keys[rows.clone()], &mut to.keys, &mut own.keys),
                (&values[rows], &mut to.values, &mut own.values),
            ] {
                let at = to.len();
                to.extend(from.iter().map(|x| T::round(*x)));
                own.clear();
                for head in 0..heads {
                    for token in 0..tokens {
                        let row = at + (token * heads + head) * dim;
                        own.extend_from_slice(&to[row..row + dim]);
                    }
                }
            }
        }
    }

    fn runs(&self, layer: usize, chunk: usize, head: usize) -> anyhow::Result<Vec<Run<'_>>> {
        let mut runs = Vec::new();
        for block in self.views[chunk].blocks(layer as u32)? {
            let tokens = block.tokens() as usize;
            let keys = rows(block.keys::<T>(head)?, &block, tokens * self.dim, |block, rows| {
                block.decode_keys(head, rows)
            })?;
            let values = rows(block.values::<T>(head)?, &block, tokens * self.dim, |block, rows| {
                block.decode_values(head, rows)
            })?;
            runs.push(Run { tokens, keys, values });
        }
        let tokens = self.chunks[chunk].tokens.len();
        let own = head * tokens * self.dim..(head + 1) * tokens * self.dim;
        let (keys, values) = (&self.own[chunk].keys[own.clone()], &self.own[chunk].values[own]);
        runs.push(Run { tokens, keys: T::rows(keys), values: T::rows(values) });
        Ok(runs)
    }
}

/// Rows of a block for attention: in place where it reads the format, decoded otherwise.
fn rows<'b, T: Element>(
    stored: Stored<'b, T>,
    block: &BlockView<'b>,
    elements: usize,
    decode: impl FnOnce(&BlockView<'b>, &mut [T]) -> Result<(), Error>,
) -> Result<Rows<'b>, Error> {
    match stored {
        Stored::Raw(rows) => Ok(T::rows(rows)),
        Stored::Int8 { codes, scales } => Ok(Rows::Int8(codes, scales)),
        _ => {
            debug_assert!(!block.format().is_raw());
            let mut rows = vec![T::round(0.0); elements];
            decode(block, &mut rows)?;
            Ok(Rows::Decoded(rows.into_iter().map(T::single).collect()))
        }
    }
}
