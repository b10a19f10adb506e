//! A real model over the cache against the same model over a cache of its own, and what the formats cost it.
//!
//! ```text
//! cargo run --release --example llm_bench                              # everything, a few minutes
//! cargo run --release --example llm_bench -- --only speed --sequences 1,64
//! cargo run --release --example llm_bench -- --only quality --formats int8,r4 --tokens 4096 --json
//! ```

#[path = "../common/llm/mod.rs"]
mod llm;
mod memory;
mod quality;
mod speed;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use kv_cache::half::f16;
use kv_cache::{Cache, Devices, Element as _, Format};
use llm::model::{Model, Weights};
use llm::tokenizer::Tokenizer;

#[derive(Debug, Clone, Parser)]
#[command(about = "A real model over the cache: speed, bytes and accuracy")]
struct Args {
    /// A GGUF file of a Llama model, instead of the SmolLM2-135M-Instruct that is fetched.
    #[arg(long)]
    model: Option<PathBuf>,
    /// A text file, instead of the Brown corpus that is fetched.
    #[arg(long)]
    corpus: Option<PathBuf>,
    /// What to measure; everything unless given.
    #[arg(long, value_delimiter = ',')]
    only: Vec<What>,
    /// Sequences that decode together, for speed.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,64")]
    sequences: Vec<usize>,
    /// Formats, for accuracy.
    #[arg(long, value_delimiter = ',', default_value = "int8,fp8,r4,r3,r2")]
    formats: Vec<String>,
    /// Tokens to score.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
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
    /// What predictions lose.
    Quality,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    let path = llm::fetch::model(args.model.as_deref())?;
    let wanted = |what| args.only.is_empty() || args.only.contains(&what);
    if wanted(What::Memory) {
        memory::run(&Model::load(&path, Weights::Quantised)?, args.json).await?;
    }
    if wanted(What::Speed) {
        let tokenizer = Tokenizer::from_gguf(&path)?;
        let model = Model::load(&path, Weights::Quantised)?;
        speed::run(&model, &tokenizer, &args.sequences, args.json).await?;
    }
    if wanted(What::Quality) {
        let text = match &args.corpus {
            Some(path) => std::fs::read_to_string(path)?,
            None => llm::fetch::brown()?,
        };
        let tokenizer = Tokenizer::from_gguf(&path)?;
        // Rounding activations to 8 bits would hide what the formats lose.
        let model = Model::load(&path, Weights::Single)?;
        let formats = args.formats.iter().map(|name| format(name)).collect::<anyhow::Result<Vec<_>>>()?;
        quality::run(&model, &tokenizer, &text, &formats, args.tokens, args.json).await?;
    }
    Ok(())
}

fn format(name: &str) -> anyhow::Result<Format> {
    Format::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
        anyhow::anyhow!("there is no format {name}; there are {}", Format::ALL.map(Format::name).join(", "))
    })
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
