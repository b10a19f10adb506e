//! One suite over every backend and format: what a cache promises, through the public handles.

use kv_cache::half::{bf16, f16};
use kv_cache::*;

#[tokio::test]
async fn smoke() {
    let cache = Cache::builder(Geometry::new(2, 2, 16, ElementType::F16))
        .memory_bytes_per_device(1 << 20)
        .build()
        .await
        .unwrap();
    let seq = cache.open("t", OpenOptions::default()).await.unwrap();
    let n = 40usize;
    let k: Vec<f16> = (0..2 * n * 2 * 16).map(|i| f16::from_f32((i % 97) as f32 / 7.0)).collect();
    let v: Vec<f16> = k.iter().map(|x| -*x).collect();
    let ids: Vec<u32> = (0..n as u32).collect();
    assert_eq!(seq.append(&ids, &k, &v).await.unwrap(), 40);
    let (rk, rv) = seq.read::<f16>(1, 0..40).await.unwrap();
    for (a, b) in rk.iter().zip(&k[n * 32..]) {
        assert!((a.to_f32() - b.to_f32()).abs() < 0.1, "{a} {b}");
    }
    assert_eq!(rv.len(), rk.len());
    let view = seq.view(0).unwrap();
    assert_eq!(view.tokens(), 40);
    drop(view);
    let fork = seq.fork().await.unwrap();
    drop(seq);
    fork.truncate(33).await.unwrap();
    println!("{:?}", cache.stats());
    drop(fork);
    let r = cache.shutdown(std::time::Duration::from_secs(5)).await;
    println!("{r:?} {:?}", cache.stats().total);
    assert!(r.drained);
    let _ = bf16::ONE;
}
