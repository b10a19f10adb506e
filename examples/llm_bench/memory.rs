//! Bytes of a sequence of 512 tokens, as the cache counts them.

use anyhow::ensure;
use kv_cache::half::f16;
use kv_cache::{BlockFormat, Element as _, Format, OpenOptions};
use serde::Serialize;

use crate::llm::generate::until_sealed;
use crate::llm::model::Model;

#[derive(Serialize)]
struct Row {
    what: &'static str,
    format: &'static str,
    tokens: usize,
    sealed_block_bytes: usize,
    sequence_bytes: u64,
    sealed_block_smaller: f64,
    sequence_smaller: f64,
}

pub(crate) async fn run(model: &Model, json: bool) -> anyhow::Result<()> {
    if !json {
        println!("bytes of a sequence, f16 elements; in brackets how many times smaller than raw");
    }
    for tokens in [512, 500] {
        let mut raw = None;
        for format in Format::ALL {
            let layout = model.geometry(f16::TYPE).layout()?;
            let block = BlockFormat::from(format).block_bytes(&layout);
            let bytes = sequence_bytes(model, format, tokens).await?;
            let (raw_block, raw_bytes) = *raw.get_or_insert((block, bytes));
            let row = Row {
                what: "bytes",
                format: format.name(),
                tokens,
                sealed_block_bytes: block,
                sequence_bytes: bytes,
                sealed_block_smaller: raw_block as f64 / block as f64,
                sequence_smaller: raw_bytes as f64 / bytes as f64,
            };
            let line = format!(
                "{tokens} tokens, {:<5} sealed block {block:>7} ({:.2}x), sequence {bytes:>9} ({:.2}x)",
                row.format, row.sealed_block_smaller, row.sequence_smaller
            );
            crate::print(json, &row, &line);
        }
    }
    Ok(())
}

async fn sequence_bytes(model: &Model, format: Format, tokens: usize) -> anyhow::Result<u64> {
    let cache = crate::cache(model, format).await?;
    let sequence = cache.open("bench", OpenOptions::default()).await?;
    let config = model.config();
    let elements = config.layers * tokens * config.kv_heads * config.head_dim;
    let rows = (0..elements).map(|at| f16::from_f32((at % 61) as f32 / 61.0 - 0.5)).collect::<Vec<_>>();
    let ids = (0..tokens as u32).collect::<Vec<_>>();
    sequence.append(&ids, &rows, &rows).await?;
    until_sealed(&sequence).await;
    // Statistics are as of the shard's last batch.
    sequence.truncate(tokens as u32).await?;
    let bytes = cache.stats().total.bytes_used;
    ensure!(bytes > 0, "nothing is stored");
    Ok(bytes)
}
