//! What the runtime allocates: nothing per token on the device thread, and little per idle sequence.
//!
//! `cargo bench --bench memory` counts every allocation of this process with a global allocator and prints two figures.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use kv_cache::half::f16;
use kv_cache::{BatchCacheOperations, Cache, ElementType, Format, Geometry, OpenOptions};

/// Counts live bytes, and allocations on the device threads.
struct Counting;

static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);
static DEVICE_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Whether this thread is a device thread; unknown until first asked.
    static ON_DEVICE: Cell<Option<bool>> = const { Cell::new(None) };
}

fn on_device() -> bool {
    ON_DEVICE.with(|known| {
        known.get().unwrap_or_else(|| {
            // Asking for the name may allocate: it must not ask again.
            known.set(Some(false));
            let is = std::thread::current().name().is_some_and(|name| name.starts_with("kv-device"));
            known.set(Some(is));
            is
        })
    })
}

// SAFETY: passes every call on to the system allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size() as i64, Relaxed);
        if on_device() {
            DEVICE_ALLOCATIONS.fetch_add(1, Relaxed);
        }
        // SAFETY: the caller's promise is the system allocator's condition.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size() as i64, Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SEQUENCES: usize = 256;
const TOKEN: usize = 4 * 2 * 64;

fn main() {
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    tokio.block_on(async {
        per_token().await;
        per_idle_sequence().await;
    });
}

/// 256 sequences decode; after a warm-up, the device thread may allocate for new blocks, but not for tokens.
async fn per_token() {
    let cache = Cache::builder(Geometry::new(4, 2, 64, ElementType::F16))
        .memory_bytes_per_device(1 << 30)
        .sealed_format(Format::Int8)
        .build()
        .await
        .expect("a cache");
    let mut sequences = Vec::new();
    for _ in 0..SEQUENCES {
        sequences.push(cache.open("bench", OpenOptions::default()).await.expect("a sequence"));
    }
    let row = [f16::ONE; TOKEN];
    let step = async || {
        let batch = BatchCacheOperations::new().reserve_bytes(SEQUENCES * TOKEN * 4);
        let batch = sequences.iter().fold(batch, |batch, sequence| batch.append(sequence, &[1], &row, &row));
        assert!(cache.submit(batch).await.expect("submitted").iter().all(Result::is_ok));
    };
    for _ in 0..520 {
        step().await;
    }
    let before = DEVICE_ALLOCATIONS.load(Relaxed);
    const STEPS: usize = 31;
    for _ in 0..STEPS {
        step().await;
    }
    let between_seals = DEVICE_ALLOCATIONS.load(Relaxed) - before;
    let tokens = (STEPS * SEQUENCES) as f64;
    println!(
        "allocations on the device thread, {STEPS} steps of {SEQUENCES} appends: {between_seals} ({:.4} a token)",
        between_seals as f64 / tokens
    );
    let before = DEVICE_ALLOCATIONS.load(Relaxed);
    for _ in 0..320 {
        step().await;
    }
    let with_seals = DEVICE_ALLOCATIONS.load(Relaxed) - before;
    println!(
        "the same over 320 steps, {} seals among them: {with_seals} ({:.4} a token)",
        SEQUENCES * 10,
        with_seals as f64 / (320 * SEQUENCES) as f64
    );
}

/// Bytes of heap that an open sequence of 512 tokens holds, beyond the slab.
async fn per_idle_sequence() {
    const COUNT: usize = 10_000;
    let rows = vec![f16::ONE; 512 * 8];
    let ids = vec![1; 512];
    for tokens in [0, 1, 512] {
        let geometry = Geometry::new(1, 1, 8, ElementType::F16);
        let builder = Cache::builder(geometry).memory_bytes_per_device(1 << 29).sealed_format(Format::Int8);
        let cache = builder.build().await.expect("a cache");
        let mut sequences = Vec::with_capacity(COUNT);
        let before = LIVE_BYTES.load(Relaxed);
        for _ in 0..COUNT {
            let sequence = cache.open("bench", OpenOptions::default()).await.expect("a sequence");
            if tokens > 0 {
                let range = ..tokens * 8;
                sequence.append(&ids[..tokens], &rows[range], &rows[range]).await.expect("appended");
            }
            sequences.push(sequence);
        }
        // Tables that grow with the number of sequences are counted; what belongs to the slab was there before.
        let held = (LIVE_BYTES.load(Relaxed) - before) / COUNT as i64;
        println!(
            "an idle sequence of {tokens} tokens: {held} bytes beyond the slab, and a handle of {} (reach: 2048)",
            size_of_val(&sequences[0])
        );
    }
}
