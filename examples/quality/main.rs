//! What storage formats do to a real model's predictions: every token of a text is scored over a cache of the format, and over a raw
//! one in the same run. Attention reads what the codecs stored, through the cache, chunk by chunk.
//!
//! ```text
//! cargo run --release --example quality                                   # the formats that are shipped, 4,096 tokens
//! cargo run --release --example quality -- --formats int8,int8+rc,r4+rc --tokens 1024 --json
//! cargo run --release --example quality -- --calibrate means.json         # only the mean keys that `+rc` needs
//! cargo run --release --example quality -- --calibrate-basis keys.kvkb    # only the basis of keys that cold frames of low rank need
//! cargo run --release --example quality -- --formats raw+cold32,raw+lowrank50+cold32,raw+lowrank25+cold32
//! cargo run --release --example quality -- --retrieval 8                  # what token dropping forgets
//! cargo run --release --example quality -- --model qwen2.5-coder          # a model whose keys have a bias: 491 MB
//! cargo run --release --example quality -- --dump-kv kv.safetensors       # only keys and values, to measure codecs on
//! ```
//!
//! `+rc` is a format with the model's mean keys: without `--key-means` they are made first, from another part of the text. So are the
//! bases of `+lowrank50` and its kin.
//!
//! | module | what |
//! |---|---|
//! | `run.rs` | scores a format |
//! | `cold.rs` | blocks that have been in a cold tier |
//! | `dump.rs` | keys and values in a file |
//! | `retrieval.rs` | what token dropping forgets |
//! | `report.rs` | the figures as JSON, a table, and a page with plots |

mod cold;
mod dump;
#[path = "../common/llm/mod.rs"]
mod llm;
#[path = "../common/mix.rs"]
mod mix;
#[path = "../common/page.rs"]
#[allow(dead_code, reason = "other examples write larger numbers")]
mod page;
#[path = "../common/plot.rs"]
#[allow(dead_code, reason = "other examples plot over time")]
mod plot;
mod report;
mod retrieval;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use kv_cache::KeyMeans;
use llm::model::{Model, Weights};
use llm::tokenizer::Tokenizer;
use run::Kind;

#[derive(Debug, Clone, Parser)]
#[command(about = "What storage formats do to a real model's predictions")]
struct Args {
    /// A GGUF file of a Llama or a Qwen2 model, or the name of one that is fetched: `smollm2`, or `qwen2.5-coder`, an optional stress
    /// test (491 MB, of a source that names no licence): its keys have a bias, which formats with a scale a row do not take easily.
    #[arg(long, default_value = "smollm2")]
    model: PathBuf,
    /// A text file, instead of the Brown corpus that is fetched.
    #[arg(long)]
    corpus: Option<PathBuf>,
    /// Formats, each with `+rc` for keys as differences from the model's mean keys, with `+all` to seal every full block, sinks
    /// and window too, and with `+nosinks` to seal the first block only: `int2+nosinks` is what was published as KIVI-2.
    /// `raw+cold32` and `raw+cold16` put every full block but the first through a frame of a lossy cold codec; `raw+lowrank50` through one
    /// with keys in 50 % of their directions and values as they are, `raw+lowrank50+cold32` with values of that codec.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "int8,int8+rc,fp8,fp8+rc,int4,r4,r4+rc,r3+rc,int2,int2+nosinks,r2+rc"
    )]
    formats: Vec<Kind>,
    /// Tokens to score.
    #[arg(long, default_value_t = 4096)]
    tokens: usize,
    /// Tokens of a passage: each begins anew.
    #[arg(long, default_value_t = 2048)]
    passage_tokens: usize,
    /// A file of mean keys for `+rc`, instead of some that are made from the end of the text.
    #[arg(long)]
    key_means: Option<PathBuf>,
    /// Makes the mean keys, writes them to this file, and does nothing else.
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Makes a basis of the keys of each layer, writes it to this file, and does nothing else.
    #[arg(long, value_name = "FILE", conflicts_with = "calibrate")]
    calibrate_basis: Option<PathBuf>,
    /// Directions of `--calibrate-basis`, in percent of the width of a layer's keys.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100))]
    rank: u32,
    /// Writes keys and values of the first passage to this file, and does nothing else.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["calibrate", "calibrate_basis"])]
    dump_kv: Option<PathBuf>,
    /// Layers of `--dump-kv`, counted from 0, instead of all.
    #[arg(long, value_delimiter = ',', requires = "dump_kv")]
    layers: Vec<u32>,
    /// Instead of formats: what token dropping forgets of facts in so many texts, half of whose tokens stay.
    #[arg(long, value_name = "TEXTS")]
    retrieval: Option<NonZeroUsize>,
    /// The model's matrices on a GPU (needs `--features candle-cuda`); the cache stays in host memory.
    #[arg(long)]
    gpu: bool,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    /// Where the page goes.
    #[arg(long, default_value = "target/quality-report.html")]
    report: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    ensure!(args.tokens > 1 && args.passage_tokens > 1, "there is nothing to predict in fewer than 2 tokens");
    let path = llm::fetch::model(Some(&args.model))?;
    let (text, of) = match &args.corpus {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            (text.with_context(|| format!("the text {}", path.display()))?, path.display().to_string())
        }
        None => (llm::fetch::brown()?, "the Brown corpus".to_owned()),
    };
    let tokenizer = Tokenizer::from_gguf(&path)?;
    // Rounding activations to 8 bits would hide what the formats lose.
    let model = Model::load(&path, Weights::Single, &llm::device(args.gpu)?)?;
    eprintln!("{}, {of}", model.config().name);
    // What is only calibrated scores nothing.
    let tokens = if args.calibrate.is_some() || args.calibrate_basis.is_some() { 0 } else { args.tokens };
    let texts = run::Texts::cut(&tokenizer, &text, tokens, args.passage_tokens, model.config())?;
    if let Some(file) = &args.calibrate {
        run::calibrate(&model, &texts.other).await?.means.finish()?.save(file)?;
        println!("mean keys of {} tokens: {}", texts.other.len(), file.display());
        return Ok(());
    }
    if let Some(file) = &args.calibrate_basis {
        let basis = run::calibrate(&model, &texts.other).await?.basis(model.config(), args.rank)?;
        basis.save(file)?;
        let (rank, width, tokens) = (basis.rank(), basis.width(), texts.other.len());
        println!("{rank} of {width} directions of the keys of {tokens} tokens: {}", file.display());
        return Ok(());
    }
    if let Some(file) = &args.dump_kv {
        let passage = texts.passages.first().context("the text has no token")?;
        dump::write(&model, passage, &args.layers, file).await?;
        println!("keys and values of {} tokens: {}", passage.len(), file.display());
        return Ok(());
    }
    if let Some(texts) = args.retrieval {
        let rows = retrieval::recall(&model, &tokenizer, &tokenizer.encode(&text)?, texts.get(), 0.5).await?;
        for row in &rows {
            println!("{}", if args.json { serde_json::to_string(row)? } else { row.line() });
        }
        return Ok(());
    }
    // Caches read them from a file.
    let made = tempfile::NamedTempFile::new()?;
    let make_means = args.key_means.is_none() && args.formats.iter().any(|kind| kind.centred);
    let percents = args.formats.iter().filter_map(|kind| kind.low_rank).collect::<BTreeSet<_>>();
    let mut bases = BTreeMap::new();
    let mut means = args.key_means.clone().unwrap_or_default();
    if args.key_means.is_some() {
        KeyMeans::load(&means)?;
    }
    if make_means || !percents.is_empty() {
        let calibration = run::calibrate(&model, &texts.other).await?;
        for percent in percents {
            bases.insert(percent, calibration.basis(model.config(), percent)?);
        }
        if make_means {
            calibration.means.finish()?.save(made.path())?;
            means = made.path().to_owned();
        }
    }
    let scores = run::score(&model, &texts.passages, &args.formats, &means, &bases).await?;
    let raw = format!("perplexity over the raw cache {:.2}", scores.raw_perplexity);
    if !args.json {
        println!("{raw}\n{}", report::HEAD);
    }
    for row in &scores.rows {
        println!("{}", if args.json { serde_json::to_string(row)? } else { row.line() });
    }
    let what = format!("{}, {of}, passages of {} tokens, {raw}", model.config().name, args.passage_tokens);
    report::write(&args.report, &what, &scores.rows)?;
    eprintln!("report: {}", args.report.display());
    Ok(())
}
