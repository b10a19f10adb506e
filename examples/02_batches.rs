//! A decode step of many sequences as one `BatchCacheOperations`: `cargo run --example 02_batches`.

use kv_cache::{BatchCacheOperations, Cache, ElementType, Error, Geometry, OpenOptions, Outcome};

const TOKEN: usize = 2 * 4 * 8; // layers × heads × dim

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let geometry = Geometry::new(2, 4, 8, ElementType::F32);
    let cache = Cache::builder(geometry).memory_bytes_per_device(16 << 20).build().await?;

    // Opening is an operation like any other.
    let opens =
        (0..8).fold(BatchCacheOperations::new(), |batch, _| batch.open("alice", OpenOptions::default()));
    let mut sequences = Vec::new();
    for result in cache.submit(opens).await? {
        if let Outcome::Opened(sequence) = result? {
            sequences.push(sequence);
        }
    }

    // A step: one token each. The fourth one is broken; it fails alone.
    let mut step = BatchCacheOperations::new();
    for (index, sequence) in sequences.iter().enumerate() {
        let mut keys = [index as f32; TOKEN];
        if index == 3 {
            keys[5] = f32::NAN;
        }
        step = step.append(sequence, &[index as u32], &keys, &[0.5; TOKEN]);
    }
    for (index, result) in cache.submit(step).await?.into_iter().enumerate() {
        match result {
            Ok(Outcome::Appended { committed }) => println!("sequence {index}: {committed} token"),
            Err(error @ Error::NotFinite) => println!("sequence {index}: {error}"),
            other => anyhow::bail!("unexpected: {other:?}"),
        }
    }
    assert_eq!(sequences[3].len(), 0, "it is as it was before");

    // Any mix, in order per sequence: append, read it back, fork.
    let mixed = BatchCacheOperations::new()
        .append(&sequences[0], &[9], &[2.0f32; TOKEN], &[3.0; TOKEN])
        .read(&sequences[0], 1, 1..2)
        .fork(&sequences[0], 2)
        .truncate(&sequences[1], 0);
    let mut results = cache.submit(mixed).await?.into_iter();
    results.next();
    if let Some(Ok(Outcome::Read(read))) = results.next() {
        let (keys, values) = read.into_elements::<f32>()?;
        println!("read back: keys {:?}…, values {:?}…", &keys[..2], &values[..2]);
    }
    if let Some(Ok(Outcome::Forked(forks))) = results.next() {
        println!("{} forks of {} tokens", forks.len(), forks[0].len());
    }
    let stats = cache.stats();
    println!(
        "{} batches reached the device, {:.1} operations each",
        stats.batch_sizes.batches,
        stats.batch_sizes.mean()
    );
    Ok(())
}
