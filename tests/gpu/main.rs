//! What only a GPU has: tensors in its memory, order between streams, block tables for kernels, and its faults.
//!
//! Every test prints a reason and passes if no GPU is found. The kernels of `kernels/test.cu` are compiled by
//! `src/backend/cuda/kernels/build.py`. `tests/gpu/run.sh` runs everything that needs a GPU.

#[path = "../common/mod.rs"]
mod common;

mod appends;
mod attention;
mod bytes;
mod device;
mod faults;
mod lent;
mod ordering;
mod refusals;
mod steps;
mod table;

/// Tests that find no GPU pass. Whoever asks for one is to know.
#[test]
fn a_gpu_is_found_where_one_is_asked_for() {
    match std::env::var("KV_CACHE_TEST_SETUPS") {
        Ok(wanted) if wanted.starts_with("cuda") => drop(kv_cache::Devices::gpus_found().expect("a GPU")),
        _ => println!("skipped: KV_CACHE_TEST_SETUPS does not ask for a GPU"),
    }
}
