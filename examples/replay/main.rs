//! How many blocks of a request trace would have been cached, and what finding out costs.
//!
//! ```text
//! cargo run --release --example replay -- --trace FILE --capacity-blocks 1000,5000 --policy lru,auto,clairvoyant --index-only
//! cargo run --release --example replay -- --trace FILE --capacity-blocks 1000 --index-only --second-half --json
//! cargo run --release --example replay -- --trace FILE --capacity-blocks 5000 --rounds 1      # the whole runtime
//! cargo run --release --example replay -- --trace FILE --capacity-blocks 1000 --rounds 1 --format int8 --colder r4,r2
//! ```
//!
//! Requests of a trace in the Mooncake format run strictly in order; their timestamps are ages, not a pace. A request matches
//! the leading run of its blocks that are cached, evicts what it takes to add the rest, holds all of them until it ends, and
//! ends before the next one begins. Generated tokens are not part of it. `ns_per_block` is the wall time of all requests,
//! divided by all of their blocks; making the block keys comes before, and is timed apart.
//!
//! | file | what is there |
//! |---|---|
//! | `workload.rs` | which requests run, as block keys |
//! | `driver.rs` | the policies, and how a run is timed |
//! | `shard.rs` | a shard of a cache's without its device: `--index-only` |
//! | `whole.rs` | the whole runtime |
//! | `clairvoyant.rs` | what no policy can beat |
//! | `report.rs` | the figures as JSON, a table, and a page with plots |
//! | `../common/` | what examples share: traces, plots, pages |

mod clairvoyant;
mod driver;
#[path = "../common/mix.rs"]
mod mix;
#[path = "../common/page.rs"]
mod page;
#[path = "../common/plot.rs"]
#[allow(dead_code, reason = "other examples plot over time")]
mod plot;
mod report;
mod shard;
#[path = "../common/trace.rs"]
#[allow(dead_code, reason = "other examples also decode")]
mod trace;
mod whole;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use clap::Parser;
use kv_cache::Format;

use crate::driver::{Deal, Policy, Setup};
use crate::report::Row;
use crate::whole::Stored;
use crate::workload::{Selection, Workload};

/// Replays a request trace against the policies of eviction.
#[derive(Debug, Parser)]
#[command(name = "replay")]
struct Options {
    /// A trace in the Mooncake format: one JSON object a line.
    #[arg(long)]
    trace: PathBuf,
    /// Blocks of 512 tokens that the cache has room for, one run each.
    #[arg(long, value_delimiter = ',', required = true, value_parser = clap::value_parser!(u32).range(1..=1 << 27))]
    capacity_blocks: Vec<u32>,
    /// What decides which block goes.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    policy: Vec<Policy>,
    /// Only decides: no keys and values move.
    #[arg(long)]
    index_only: bool,
    /// Format of sealed blocks of a whole cache. Capacities are memory then, for so many raw blocks.
    #[arg(long, default_value = "raw", conflicts_with = "index_only")]
    format: Format,
    /// Formats that they are re-encoded to when memory is short.
    #[arg(long, value_delimiter = ',', conflicts_with = "index_only")]
    colder: Vec<Format>,
    /// Threads, each with a shard of its own and a share of the capacity. `clairvoyant` and whole caches have one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// How requests are dealt to threads.
    #[arg(long, value_enum, default_value = "round-robin")]
    deal: Deal,
    /// Runs of each case with an empty cache; the one with the median time is reported.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Only the first half of the requests.
    #[arg(long, conflicts_with = "second_half")]
    first_half: bool,
    /// Only the second half of the requests.
    #[arg(long)]
    second_half: bool,
    /// Only each N-th request (of the half).
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    every: u32,
    /// Other keys for the same blocks: `auto` learns from a sample of uses, and keys decide who is in it.
    #[arg(long, default_value_t = 0)]
    label: u8,
    /// One JSON object per line on standard output instead of a table.
    #[arg(long)]
    json: bool,
    /// Where the report goes.
    #[arg(long, default_value = "target/replay-report.html")]
    html: PathBuf,
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
    ensure!(
        options.index_only || !options.policy.contains(&Policy::Clairvoyant),
        "clairvoyant is no policy of a cache's: give --index-only, or leave it out"
    );
    let selection = match (options.first_half, options.second_half) {
        (true, _) => Selection::FirstHalf,
        (_, true) => Selection::SecondHalf,
        _ => Selection::All,
    };
    let workload = Workload::read(&options.trace, selection, options.every as usize, options.label)?;
    let mut capacities = options.capacity_blocks.clone();
    capacities.sort_unstable();
    capacities.dedup();
    let threads_most = if options.index_only { u32::from(options.threads) } else { 1 };
    let (least, longest) = (capacities[0], workload.longest());
    ensure!(
        (least / threads_most) as usize >= longest,
        "--capacity-blocks {least} for {threads_most} threads: the longest request has {longest} blocks, and they are all held at once"
    );

    if !options.json {
        report::print_heading(&workload);
    }
    let stored = Stored { format: options.format, colder: options.colder.clone() };
    let mut rows: Vec<Row> = Vec::new();
    for &policy in &options.policy {
        for &capacity_blocks in &capacities {
            let threads = policy.threads(options.threads, options.index_only);
            let (deal, index_only) = (options.deal, options.index_only);
            let setup = Setup { policy, capacity_blocks, threads, deal, index_only, stored: &stored };
            let row = Row::new(&workload, &setup, driver::median(&workload, &setup, options.rounds)?);
            if options.json {
                println!("{}", serde_json::to_string(&row)?);
            } else {
                println!("{row}");
            }
            rows.push(row);
        }
    }
    report::write(&options.html, &workload, &rows)?;
    eprintln!("report: {}", options.html.display());
    Ok(())
}
