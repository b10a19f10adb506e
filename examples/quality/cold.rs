//! Blocks that have been in a cold tier: encoded into a frame, decoded, and put back where they were.

use kv_cache::cold::{self, Codec, KeyBasis, LowRank, Shape};
use kv_cache::half::f16;
use kv_cache::{BlockLayout, Element as _, History, Sequence};

/// How frames are made: keys and values in a codec, or keys in few directions and values in the codec.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frames<'a> {
    pub(crate) codec: Codec,
    pub(crate) basis: Option<&'a KeyBasis>,
}

/// Replaces the last block of a sequence over a raw cache, which holds `tokens`, by what a frame gives back. The frame's bytes.
///
/// # Errors
/// Those of the sequence; none of the codec, for a cache holds finite elements only.
pub(crate) async fn recode(
    sequence: &Sequence,
    layout: &BlockLayout,
    tokens: &[u32],
    frames: Frames<'_>,
) -> anyhow::Result<usize> {
    let first = sequence.len() - tokens.len() as u32;
    let mut block = Vec::new();
    for layer in 0..layout.layers as u32 {
        let (keys, values) = sequence.read::<f16>(layer, first..sequence.len()).await?;
        for (tensor, dim) in [(keys, layout.key_dim), (values, layout.value_dim)] {
            block.extend(turned(&tensor, tokens.len(), layout.kv_heads, dim));
        }
    }
    let mut frame = Vec::new();
    let mut bytes = bytes_of(&block);
    let (element, shape, values) = (f16::TYPE.into(), Shape::from(layout), frames.codec);
    let raw = History::default();
    match frames.basis {
        None => {
            cold::encode(values, element, &shape, &raw, &bytes, &mut frame)?;
            cold::decode(&frame, &mut bytes)?;
        }
        Some(basis) => {
            let low_rank = LowRank { basis, values };
            low_rank.encode(element, &shape, first, &raw, &bytes, &mut frame)?;
            low_rank.decode(&frame, first, &mut bytes)?;
        }
    }
    let block = bytes.chunks_exact(2).map(|x| f16::from_le_bytes([x[0], x[1]])).collect::<Vec<_>>();

    let (mut keys, mut values, mut at) = (Vec::new(), Vec::new(), 0);
    for _ in 0..layout.layers {
        for (tensor, dim) in [(&mut keys, layout.key_dim), (&mut values, layout.value_dim)] {
            let elements = layout.kv_heads * tokens.len() * dim;
            tensor.extend(turned(&block[at..at + elements], layout.kv_heads, tokens.len(), dim));
            at += elements;
        }
    }
    sequence.truncate(first).await?;
    sequence.append(tokens, &keys, &values).await?;
    Ok(frame.len())
}

/// `[a, b, dim]` as `[b, a, dim]`.
fn turned(tensor: &[f16], a: usize, b: usize, dim: usize) -> impl Iterator<Item = f16> {
    (0..b).flat_map(move |y| (0..a).flat_map(move |x| &tensor[(x * b + y) * dim..][..dim])).copied()
}

fn bytes_of(block: &[f16]) -> Vec<u8> {
    block.iter().flat_map(|x| x.to_le_bytes()).collect()
}
