//! The pure cores against a naive model, under one seeded scheduler. See `kv_cache_actors::testing::oracle`.
//!
//! `KV_SEED` runs one seed (and only that), `KV_OPS` sets the operations of all tests of this file together:
//!
//! ```text
//! cargo test -p kv-cache-actors --test oracle -- --nocapture
//! KV_SEED=1234 cargo test -p kv-cache-actors --test oracle
//! KV_OPS=1000000000 cargo test -p kv-cache-actors --test oracle -- --nocapture
//! ```

use std::time::Instant;

use kv_cache_actors::testing::oracle::{Faults, Report, run};

/// Operations of one run: enough to fill and empty a pool many times, few enough to look into.
const RUN_OPERATIONS: u64 = 3000;

/// Operations of all tests together.
const OPERATIONS: u64 = 8_000_000;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Runs seeds from `first_seed` on until this test has had its share of the operations.
fn runs(name: &str, first_seed: u64, share: f64, faults: Faults) -> Report {
    if let Some(seed) = from_environment("KV_SEED") {
        return run(seed, RUN_OPERATIONS, faults);
    }
    let operations = (from_environment("KV_OPS").unwrap_or(OPERATIONS) as f64 * share) as u64;
    let started = Instant::now();
    let mut total = Report::default();
    let mut seed = first_seed;
    while total.operations < operations {
        total.add(&run(seed, RUN_OPERATIONS, faults));
        seed += 1;
    }
    let rate = total.operations as f64 / started.elapsed().as_secs_f64();
    println!("{name}: {rate:.0} operations/s, seeds {first_seed}..{seed}: {total:?}");
    total
}

#[test]
fn every_answer_is_what_the_model_says() {
    let total = runs("no faults", 1, 0.5, Faults::None);
    assert_eq!(total.failed_launches, 0);
    let counts = [
        total.tier_moves,
        total.prefix_tokens,
        total.deduplicated,
        total.evictions,
        total.tokens_dropped,
        total.recodes,
    ];
    assert!(from_environment("KV_SEED").is_some() || counts.iter().all(|count| *count > 0), "{counts:?}");
}

#[test]
fn failed_launches_change_nothing() {
    let total = runs("failed launches", 1_000_000, 0.35, Faults::FailedLaunches);
    assert!(total.failed_launches > 0);
}

#[test]
fn a_lost_device_leaves_nobody_waiting() {
    let total = runs("lost device", 2_000_000, 0.15, Faults::LostDevice);
    assert_eq!(total.lost_devices, total.runs);
}
