//! Thousands of concurrent sequences on CPU devices or GPUs, every byte of them checked.
//!
//! ```text
//! cargo run --release --example stress                                  # 10,000 sequences, 10 seconds
//! cargo run --release --example stress -- --sequences 1000 --shards 2 --format raw --json
//! cargo run --release --example stress -- --gpus 1 --sequences 4096 --seconds 300
//! cargo run --release --example stress -- --trace FILE --speed 60       # requests of a trace in the Mooncake format
//! ```
//!
//! Without `--trace`, many tasks append, stage and commit, read, fork, truncate, close, reopen and *cancel* at random, and
//! compare what they read with what they wrote, within the bound of the storage format; half of the sequences begin with one of a few
//! system prompts, of which they share what is cached. With it, the requests of the trace find what is cached of their prompts, prefill
//! the rest and decode as in the service that it was recorded in. Both write `target/stress-report.html`. The exit status is
//! 0 if there was no error, no mismatch and no leak.
//!
//! | file | what is there |
//! |---|---|
//! | `content.rs` | keys and values from a seed; the check of what was read |
//! | `model.rs` | what one sequence must contain |
//! | `worker.rs`, `operations.rs`, `views.rs`, `cancel.rs` | a task of the synthetic load, what it does, and what it cuts short |
//! | `synthetic.rs`, `replay.rs` | the two loads |
//! | `session.rs` | the cache, its statistics, leaks |
//! | `recorder.rs`, `histogram.rs` | counts, latencies, samples over time |
//! | `totals.rs`, `report.rs` | the figures as JSON, text and a page with plots |
//! | `../common/` | what examples share: traces, plots, pages |

mod cancel;
mod content;
mod histogram;
#[path = "../common/mix.rs"]
mod mix;
mod model;
mod operations;
#[path = "../common/page.rs"]
mod page;
#[path = "../common/plot.rs"]
#[allow(dead_code, reason = "other examples plot over settings")]
mod plot;
mod recorder;
mod replay;
mod report;
mod session;
mod stop;
mod synthetic;
mod totals;
#[path = "../common/trace.rs"]
mod trace;
mod views;
mod worker;

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use kv_cache::{Devices, Format};

use crate::content::Shape;
use crate::session::{Leaks, Session, Setup};
use crate::stop::Stop;
use crate::totals::{Run, Totals};
use crate::trace::Request;

/// Tasks of the synthetic load, unless there are fewer sequences: each has one operation in flight.
const TASKS: usize = 1024;
/// Room for a replay: four times what the Mooncake conversation trace holds at once in real time, with no block sealed.
const TRACE_MEMORY_BYTES: u64 = 256 << 20;

/// Puts the cache under load, checks every byte, and writes a report.
#[derive(Debug, Parser)]
#[command(name = "stress")]
struct Options {
    /// Sequences that are open at once.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    sequences: u32,
    /// Seconds of load after all sequences are open.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Tasks that share the sequences [default: 1024, or one a sequence].
    #[arg(long)]
    tasks: Option<usize>,
    /// Run on this many GPUs instead of CPU devices.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    gpus: Option<u16>,
    /// CPU devices.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    shards: u16,
    /// Format of sealed blocks.
    #[arg(long, value_enum, default_value = "int8")]
    format: FormatOption,
    /// Decides contents and what each task does.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Memory of all shards together [default: enough that the load never fills it].
    #[arg(long)]
    memory_mib: Option<u64>,
    /// Layers, key/value heads and head dim [default: 2x2x32, and 1x1x16 for a trace].
    #[arg(long)]
    geometry: Option<GeometryOption>,
    /// Tokens of the system prompts that half of the sequences begin with; 0 for none, and nothing shared but by forks.
    #[arg(long, default_value_t = 56, value_parser = clap::value_parser!(u32).range(0..=64), conflicts_with = "trace")]
    shared_prefix_tokens: u32,
    /// Replays a trace in the Mooncake format instead.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// How much faster than recorded a trace runs.
    #[arg(long, default_value_t = 60.0, requires = "trace")]
    speed: f64,
    /// Only the first requests of a trace.
    #[arg(long, requires = "trace")]
    limit: Option<usize>,
    /// One JSON object on standard output instead of text.
    #[arg(long)]
    json: bool,
    /// Where the report goes.
    #[arg(long, default_value = "target/stress-report.html")]
    report: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatOption {
    Raw,
    Int8,
}

impl From<FormatOption> for Format {
    fn from(option: FormatOption) -> Self {
        match option {
            FormatOption::Raw => Format::Raw,
            FormatOption::Int8 => Format::Int8,
        }
    }
}

/// `LAYERSxHEADSxDIM`.
#[derive(Debug, Clone, Copy)]
struct GeometryOption(Shape);

impl FromStr for GeometryOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Vec<u32> = text.split('x').map_while(|part| part.parse().ok()).collect();
        match (numbers.as_slice(), text.split('x').count()) {
            (&[layers, kv_heads, head_dim], 3) if layers * kv_heads * head_dim > 0 => {
                Ok(GeometryOption(shape(layers, kv_heads, head_dim)))
            }
            _ => Err("three positive numbers as in 2x2x32: layers, key/value heads, head dim".into()),
        }
    }
}

fn shape(layers: u32, kv_heads: u32, head_dim: u32) -> Shape {
    Shape { layers, kv_heads, head_dim, block_tokens: 32 }
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options).await {
        Ok(totals) if totals.is_clean() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> anyhow::Result<Totals> {
    ensure!((0.0..=1e9).contains(&options.seconds), "--seconds must be a number from 0 to 1e9");
    ensure!(options.speed > 0.0 && options.speed.is_finite(), "--speed must be a positive number");
    let stop = Stop::on_ctrl_c();
    let requests = options.trace.as_deref().map(|file| read_trace(file, options)).transpose()?;
    let setup = setup(options, requests.as_deref());
    eprintln!("{}; {} for {} shard(s)", setup.shape, totals::mib(setup.memory_bytes), setup.shards);

    let begun = Instant::now();
    let session = Session::open(setup).await?;
    let (tasks, sequences, replay, leaks) = match requests {
        Some(requests) => {
            let count = requests.len();
            let (mut replay, leaks) = replay::run(&session, requests, options.speed, &stop).await;
            replay.trace = options.trace.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
            (count, count as u64, Some(replay), leaks)
        }
        None => {
            let (tasks, leaks) = synthetic_load(options, &session, &stop).await;
            (tasks, u64::from(options.sequences), None, leaks)
        }
    };
    let run = Run {
        setup: &session.setup,
        tasks,
        sequences,
        wall_seconds: begun.elapsed().as_secs_f64(),
        interrupted: stop.is_requested(),
        replay,
        gauges: session.gauges(),
        leaks,
    };
    session.shutdown().await;
    let totals = Totals::new(run, &session.recorder);

    let recorder = &session.recorder;
    report::write(&options.report, &totals, &recorder.samples(), recorder.measured_from_s())?;
    eprintln!("report: {}", options.report.display());
    if options.json {
        println!("{}", serde_json::to_string(&totals)?);
    } else {
        print!("{totals}");
    }
    Ok(totals)
}

async fn synthetic_load(options: &Options, session: &Session, stop: &Stop) -> (usize, Leaks) {
    let sequences = options.sequences as usize;
    let tasks = options.tasks.unwrap_or(TASKS).clamp(1, sequences);
    let duration = Duration::from_secs_f64(options.seconds);
    let shared_prefix_tokens = options.shared_prefix_tokens;
    (tasks, synthetic::run(session, sequences, tasks, shared_prefix_tokens, duration, stop).await)
}

fn setup(options: &Options, trace: Option<&[Request]>) -> Setup {
    let (devices, shards) = match options.gpus {
        Some(gpus) => (Devices::cuda(gpus), gpus),
        None => (Devices::cpu(options.shards), options.shards),
    };
    let default_shape = if trace.is_some() { shape(1, 1, 16) } else { shape(2, 2, 32) };
    let shape = options.geometry.map_or(default_shape, |geometry| geometry.0);
    let default_bytes = match trace {
        Some(_) => TRACE_MEMORY_BYTES,
        None => synthetic::memory_bytes(&shape, options.sequences as usize, u32::from(shards)),
    };
    // Besides the sequences: forks and cancelled opens that are about to close.
    let sequences_max = trace.map_or(options.sequences as usize, <[Request]>::len) + 8 * TASKS;
    Setup {
        shape,
        format: options.format.into(),
        devices,
        shards,
        sequences_max,
        memory_bytes: options.memory_mib.map_or(default_bytes, |mib| mib << 20),
        seed: options.seed,
    }
}

fn read_trace(file: &Path, options: &Options) -> anyhow::Result<Vec<Request>> {
    let opened = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let requests = trace::parse(BufReader::new(opened), options.limit.unwrap_or(usize::MAX))
        .with_context(|| file.display().to_string())?;
    ensure!(!requests.is_empty(), "{}: no requests", file.display());
    Ok(requests)
}
