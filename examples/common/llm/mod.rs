//! A small language model over the cache, for the examples that need a real one: SmolLM2, on the CPU or with its matrices on a GPU.
//!
//! [`fetch`] gets it, [`model`] computes it, [`attention`] reads keys and values wherever they lie. That is either [`cached`]: in the
//! blocks of `kv_cache`, in place; or [`plain`]: in vectors of its own, as decoders do it that have no cache beside them.
#![allow(dead_code, unreachable_pub, reason = "each example uses a part of it")]

pub mod attention;
pub mod cached;
pub mod fetch;
pub mod generate;
pub mod model;
pub mod plain;
pub mod score;
pub mod tokenizer;

use anyhow::Context;
use attention::Run;
use candle_core::Device;

/// Most tokens of a sequence that are computed together: a block, so that what follows reads it sealed.
pub const CHUNK_TOKENS: usize = 32;

/// Where the matrices of a model are.
///
/// # Errors
/// If candle was built without CUDA (the feature `candle-cuda`), or there is no GPU.
pub fn device(on_gpu: bool) -> anyhow::Result<Device> {
    match on_gpu {
        false => Ok(Device::Cpu),
        true => {
            Device::new_cuda(0).context("the model cannot be on a GPU: build with `--features candle-cuda`")
        }
    }
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Their ids, at most [`CHUNK_TOKENS`] while attention is to read stored blocks.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub position: u32,
}

/// Where attention finds what came before, and where new keys and values go.
///
/// The *rows* of a step are the tokens of all its chunks, one after the other.
pub trait KeysValues: Sync {
    /// Takes the new keys and values of a layer: `[rows, kv_heads, dim]`, rotated. They are rounded to the element type of the cache, and
    /// attended to in that form, so that a token is the same for those of its own chunk as for those that read it later.
    fn put(&mut self, layer: usize, keys: &[f32], values: &[f32]);

    /// All keys and values of one head of a chunk's sequence in order of their tokens, those of the chunk itself last.
    ///
    /// # Errors
    /// Whatever the cache says.
    fn runs(&self, layer: usize, chunk: usize, head: usize) -> anyhow::Result<Vec<Run<'_>>>;
}
