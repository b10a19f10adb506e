//! What happens when more is asked for than fits: `cargo run --example 03_backpressure`.

use kv_cache::{BatchCacheOperations, Cache, ElementType, Error, Geometry, OpenOptions};

const TOKEN: usize = 16;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    // Room for 64 blocks of 4 KiB, and for 4 operations in flight.
    let cache = Cache::builder(Geometry::new(1, 1, TOKEN as u32, ElementType::F32))
        .memory_bytes_per_device(64 * 4096)
        .max_in_flight(4, 1 << 20)
        .build()
        .await?;
    let sequence = cache.open("alice", OpenOptions::default()).await?;
    let append = |batch: BatchCacheOperations| batch.append(&sequence, &[1], &[1.0f32; TOKEN], &[1.0; TOKEN]);

    // `try_submit` never waits: without a permit the batch comes back, whole, with the numbers.
    let mut in_flight = Vec::new();
    let refused = loop {
        match cache.try_submit(append(append(BatchCacheOperations::new()))) {
            Ok(results) => in_flight.push(results),
            Err((batch, error)) => break (batch, error),
        }
    };
    let (batch, error) = refused;
    println!("after {} batches: {error}", in_flight.len());
    assert!(error.is_retryable());

    // `submit` waits for its turn.
    cache.submit(batch).await?;
    for results in in_flight {
        results.await?;
    }
    println!("all served: {} tokens", sequence.len());

    // A batch that can never fit says so at once.
    let large = (0..5).fold(BatchCacheOperations::new(), |batch, _| append(batch));
    println!("{}", cache.submit(large).await.unwrap_err());

    // A full cache is an error with numbers, and heals when somebody leaves.
    let mut held = Vec::new();
    let full = loop {
        let long = cache.open("bob", OpenOptions::default()).await?;
        match long.append(&[1; 320], &[1.0f32; 320 * TOKEN], &[1.0; 320 * TOKEN]).await {
            Ok(_) => held.push(long),
            Err(error) => break error,
        }
    };
    println!("with {} long sequences: {full}", held.len());
    assert!(matches!(full, Error::Capacity { needed: 10, .. }) && !cache.can_admit(320));
    held.pop().expect("some were admitted").close().await?;

    // Reserved room is room for sure.
    let sure = cache.open("carol", OpenOptions::default().reserve_tokens(64)).await?;
    sure.append(&[1; 64], &[1.0f32; 64 * TOKEN], &[1.0; 64 * TOKEN]).await?;
    println!("the reserved sequence has {} tokens", sure.len());
    Ok(())
}
