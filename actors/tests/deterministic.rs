//! Deterministic mode: same submission order, same answers, same places, same bytes.
//!
//! ```text
//! KV_SEED=1234 cargo test -p kv-cache-actors --test deterministic
//! ```

use kv_cache_actors::testing::replay::run;

#[test]
fn the_same_operations_give_the_same_bytes_and_places_however_they_are_cut() {
    if let Ok(seed) = std::env::var("KV_SEED") {
        return run(seed.parse().expect("KV_SEED is a number"), 600, 8);
    }
    for seed in 0..200 {
        run(seed, 600, 3);
    }
}
