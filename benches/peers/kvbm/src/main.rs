//! Replays a request trace against `kvbm-logical`, the logical block manager of NVIDIA Dynamo.
//!
//! ```text
//! cargo run --release --manifest-path benches/peers/kvbm/Cargo.toml -- --trace FILE --capacity-blocks 1000,5000 --json
//! ```

mod cycle;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use clap::Parser;
use serde::Serialize;

use crate::cycle::{Backend, Deal, ReleaseOrder, Setup};
use crate::trace::Workload;

/// Replays a request trace against kvbm-logical: match, allocate, register, release, request by request.
#[derive(Debug, Parser)]
#[command(name = "kvbm-peer")]
struct Options {
    /// A trace in the Mooncake format: one JSON object a line.
    #[arg(long)]
    trace: PathBuf,
    /// Blocks in the pool, one run each.
    #[arg(long, value_delimiter = ',', required = true, value_parser = clap::value_parser!(u32).range(1..))]
    capacity_blocks: Vec<u32>,
    /// Backends of the inactive pool.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "hashmap,lru,multi_lru,lineage,lineage_fifo"
    )]
    backend: Vec<Backend>,
    /// Threads that share one manager.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// How requests are dealt to threads.
    #[arg(long, value_enum, default_value = "round-robin")]
    deal: Deal,
    /// Runs of each case with a fresh pool; the one with the median time is reported.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Which end of a request's blocks is released first.
    #[arg(long, value_enum, default_value = "tail")]
    release: ReleaseOrder,
    /// One JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Row<'a> {
    trace: &'a str,
    policy: &'static str,
    capacity_blocks: u32,
    threads: u16,
    blocks: usize,
    hit_blocks: usize,
    hit_ratio: f64,
    ns_per_block: f64,
    hash_ns_per_block: f64,
    retries: usize,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    let workload = Workload::read(&options.trace)?;
    for capacity in &options.capacity_blocks {
        let longest = workload.longest;
        ensure!(
            *capacity as usize >= longest,
            "--capacity-blocks {capacity}: the longest request has {longest} blocks, and they are all held at once"
        );
    }
    if !options.json {
        println!(
            "{}: {} requests, {} blocks; hashing {:.0} ns a block, not part of ns/block",
            workload.name,
            workload.requests.len(),
            workload.blocks,
            workload.hash_ns_per_block()
        );
        println!(
            "{:<20}{:>10}{:>9}{:>11}{:>9}{:>11}",
            "policy", "capacity", "threads", "hits", "ratio", "ns/block"
        );
    }
    for &backend in &options.backend {
        for &capacity in &options.capacity_blocks {
            let row = measure(options, &workload, backend, capacity)?;
            if options.json {
                println!("{}", serde_json::to_string(&row)?);
            } else {
                println!(
                    "{:<20}{:>10}{:>9}{:>11}{:>9.4}{:>11.0}",
                    row.policy, capacity, row.threads, row.hit_blocks, row.hit_ratio, row.ns_per_block
                );
            }
        }
    }
    Ok(())
}

fn measure<'a>(
    options: &Options,
    workload: &'a Workload,
    backend: Backend,
    capacity_blocks: u32,
) -> anyhow::Result<Row<'a>> {
    let setup = Setup {
        capacity_blocks: capacity_blocks as usize,
        threads: options.threads.into(),
        deal: options.deal,
        release: options.release,
    };
    let round = |_| cycle::round(workload, backend, &setup);
    let mut rounds = (0..options.rounds).map(round).collect::<Result<Vec<_>, _>>()?;
    rounds.sort_by_key(|round| round.wall);
    let median = rounds[rounds.len() / 2];
    let blocks = workload.blocks;
    Ok(Row {
        trace: &workload.name,
        policy: backend.policy(),
        capacity_blocks,
        threads: options.threads,
        blocks,
        hit_blocks: median.hit_blocks,
        hit_ratio: median.hit_blocks as f64 / blocks as f64,
        ns_per_block: median.wall.as_nanos() as f64 / blocks as f64,
        hash_ns_per_block: workload.hash_ns_per_block(),
        retries: median.retries,
    })
}
