//! A real model over the cache against the same model over a cache of its own, and what the formats cost it.
//!
//! ```text
//! cargo run --release --example llm_bench                              # everything, a few minutes
//! cargo run --release --example llm_bench -- --only speed --sequences 1,64
//! ```

#[path = "../common/llm/mod.rs"]
mod llm;
mod memory;
mod speed;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use kv_cache::half::f16;
use kv_cache::{Cache, Devices, Element as _, Format};
use llm::model::{Model, Weights};
use llm::tokenizer::Tokenizer;

#[derive(Debug, Clone, Parser)]
#[command(about = "A real model over the cache: speed and bytes")]
struct Args {
    /// A GGUF file of a Llama or a Qwen2 model, or a name (`smollm2`, `qwen2.5-coder`), instead of the SmolLM2-135M-Instruct that is fetched.
    #[arg(long)]
    model: Option<PathBuf>,
    /// What to measure; everything unless given.
    #[arg(long, value_delimiter = ',')]
    only: Vec<What>,
    /// Sequences that decode together, for speed.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,64")]
    sequences: Vec<usize>,
    /// The model's matrices on a GPU (needs `--features candle-cuda`); the cache stays in host memory.
    #[arg(long)]
    gpu: bool,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Tokens per second.
    Speed,
    /// Bytes of a sequence.
    Memory,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    let path = llm::fetch::model(args.model.as_deref())?;
    let wanted = |what| args.only.is_empty() || args.only.contains(&what);
    if wanted(What::Memory) {
        memory::run(&Model::load(&path, Weights::Quantised, &llm::device(false)?)?, args.json).await?;
    }
    if wanted(What::Speed) {
        let tokenizer = Tokenizer::from_gguf(&path)?;
        let model = Model::load(&path, Weights::Quantised, &llm::device(args.gpu)?)?;
        speed::run(&model, &tokenizer, &args.sequences, args.json).await?;
    }
    Ok(())
}

async fn cache(model: &Model, format: Format) -> anyhow::Result<Cache> {
    Ok(Cache::builder(model.geometry(f16::TYPE))
        .devices(Devices::cpu(1))
        .memory_bytes_per_device(1 << 30)
        .sealed_format(format)
        .build()
        .await?)
}

/// Prints an object as JSON, or the line that is for people.
fn print(json: bool, object: &impl serde::Serialize, line: &str) {
    match serde_json::to_string(object) {
        Ok(object) if json => println!("{object}"),
        _ => println!("{line}"),
    }
}
