//! Opens a cache and a sequence, appends, reads, forks, truncates: `cargo run --example 01_quickstart`.

use std::time::Duration;

use kv_cache::half::f16;
use kv_cache::{Cache, Devices, ElementType, Geometry, OpenOptions, Rows};

const LAYERS: usize = 2;
const HEADS: usize = 2;
const DIM: usize = 16;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // Events of the library, as RUST_LOG selects them.
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();

    let geometry = Geometry::new(LAYERS as u32, HEADS as u32, DIM as u32, ElementType::F16);
    let cache =
        Cache::builder(geometry).devices(Devices::auto()).memory_bytes_per_device(16 << 20).build().await?;

    // A prompt of 100 tokens, all layers at once: keys and values are [layers, tokens, heads, dim].
    let sequence = cache.open("alice", OpenOptions::default()).await?;
    let prompt: Vec<u32> = (0..100).collect();
    let keys: Vec<f16> =
        (0..LAYERS * 100 * HEADS * DIM).map(|i| f16::from_f32((i % 31) as f32 / 8.0)).collect();
    let values: Vec<f16> = keys.iter().map(|key| -*key).collect();
    let committed = sequence.append(&prompt, &keys, &values).await?;
    println!("{committed} tokens committed");

    // One more token as a model computes it, layer by layer: [tokens, heads, dim].
    let row = [f16::ONE; HEADS * DIM];
    for layer in 0..LAYERS as u32 {
        sequence.stage(layer, &row, &row).await?;
        // The attention of this layer may read it already.
        let (key, _) = sequence.read::<f16>(layer, 100..101).await?;
        assert_eq!(key, row);
    }
    sequence.commit(&[100]).await?;

    // In place, without a copy: the values of full blocks are in `int8` by now, or soon.
    let view = sequence.view(0)?;
    for block in view.blocks() {
        match block.values::<f16>(0)? {
            Rows::Raw(rows) => println!("tokens {}..: raw, {} elements", block.first_token(), rows.len()),
            Rows::Int8 { codes, .. } => {
                println!("tokens {}..: int8, {} codes", block.first_token(), codes.len())
            }
            _ => println!("tokens {}..: {}", block.first_token(), block.format()),
        }
    }
    drop(view);

    // A fork shares every block until one of the two writes.
    let branch = sequence.fork().await?;
    branch.truncate(50).await?;
    branch.append(&[7], &[f16::ZERO; LAYERS * HEADS * DIM], &[f16::ZERO; LAYERS * HEADS * DIM]).await?;
    println!("the sequence has {} tokens, its branch {}", sequence.len(), branch.len());

    drop((sequence, branch));
    let report = cache.shutdown(Duration::from_secs(5)).await;
    println!("drained: {}", report.drained);
    Ok(())
}
