//! One suite over every backend and format: what a cache promises, through the public handles.
//!
//! A case is an `async fn case<E: Number>(rig: Rig<E>)` named in its module's `conformance!` list, which makes one test of it
//! that runs on every setup of `tests/common/mod.rs` with all element types, in all formats between them. A new backend is one more setup.

#[path = "../common/mod.rs"]
mod common;

mod batches;
mod callers;
mod colder;
mod dropping;
mod memory;
mod mixed;
mod prefix;
mod prefix_events;
mod prefix_eviction;
mod random;
mod sharing;
mod steps;
mod thinned;
mod tiers;
mod tokens;
mod views;

/// Formats take turns among the setups: none is left out, nor runs on blocks of one token alone.
#[test]
fn all_formats_run_on_more_than_tiny_blocks() {
    for format in common::FORMATS {
        let combos: Vec<_> = common::combos().filter(|combo| combo.format == format).collect();
        let what = combos.iter().map(|combo| format!("\n{combo}")).collect::<String>();
        assert!(combos.iter().any(|combo| combo.geometry.block_tokens > 1), "{format}:{what}");
    }
}
