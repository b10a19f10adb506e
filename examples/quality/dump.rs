//! Keys and values of a text as the model computes them, in a file: what codecs are tested and measured on.
//!
//! The file is in the safetensors format: of each layer that is asked for `layers.N.keys` and `layers.N.values`, `[tokens, kv_heads, dim]`
//! in f32, keys as they are cached, rotated.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::ensure;
use kv_cache::{Cache, Devices, Element as _, Format, OpenOptions};
use serde_json::{Map, json};

use crate::llm::generate::{CachedSequences, feed};
use crate::llm::model::Model;

/// Writes keys and values of `layers` (all, if none are named) over `tokens`, one sequence from its beginning.
///
/// # Errors
/// If there is no such layer, or the file cannot be written.
pub(crate) async fn write(model: &Model, tokens: &[u32], layers: &[u32], file: &Path) -> anyhow::Result<()> {
    let count = model.config().layers as u32;
    let all = (0..count).collect::<Vec<_>>();
    let layers = if layers.is_empty() { &all[..] } else { layers };
    for layer in layers {
        ensure!(*layer < count, "there is no layer {layer}: the model has {count}");
    }
    let builder = Cache::builder(model.geometry(f32::TYPE)).devices(Devices::cpu(1));
    let cache = builder.memory_bytes_per_device(1 << 29).sealed_format(Format::Raw).build().await?;
    let sequence = cache.open("dump", OpenOptions::default()).await?;
    let mut sequences = CachedSequences::<f32>::new(&cache, vec![sequence]);
    feed(model, &mut sequences, 0, tokens).await?;

    let shape = [tokens.len(), model.config().kv_heads, model.config().head_dim];
    let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
    for layer in layers {
        let (keys, values) = sequences.sequences[0].read::<f32>(*layer, 0..tokens.len() as u32).await?;
        for (what, tensor) in [("keys", keys), ("values", values)] {
            let first = data.len();
            data.extend(tensor.iter().flat_map(|x| x.to_le_bytes()));
            let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [first, data.len()]});
            header.insert(format!("layers.{layer}.{what}"), entry);
        }
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::new(File::create(file)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    out.write_all(&data)?;
    Ok(out.flush()?)
}
