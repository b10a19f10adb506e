//! A streaming text server over the cache, to copy from: an OpenAI-compatible API, continuous batching, a page that shows the cache live.
//!
//! ```text
//! cargo run --release --example serve                      # http://127.0.0.1:8080
//! cargo run --release --example serve -- --toy             # a made-up model, without a download
//! cargo run --release --example serve -- --load 1,8,32,64  # its own clients, then the figures
//! ```
//!
//! ```text
//! client ── http ── app ───── mailbox ─────► runner (a thread)            [one turn of its loop]
//!   ▲        │       │  place (a permit)       │  scheduler: who runs        take mail
//!   │        │       └─ else 429               │  cache: open with prompt    open sequences, oldest first
//!   │        │                                 │  model: one step            decodes, and chunks of prompts
//!   │        │                                 │  cache: one batch           append_each and append
//!   └── server-sent events ◄── outbox ─────────┘  sample, hand out           close what has ended
//! ```
//!
//! What to look at first: [`scheduler`] decides and does nothing else; [`runner`] carries it out; [`model`] is what the server asks of a
//! model; [`outbox`] is why a client that does not read harms nobody.
//!
//! - **Room.** A sequence is opened with its prompt, which shares what is cached of it, and with room set aside for all of it. When
//!   the cache is full requests queue; when those that run need more than there is, the youngest is closed and computed again later,
//!   mostly from its own cached blocks. The oldest always ends.
//! - **Slow clients.** Whoever does not read is parked after 64 pieces: his sequence is closed, and opened again when he has caught up.
//!   After `--cut-seconds` he is given up.
//! - **Clients that go** free their sequence in the turn after the connection is found closed.
//! - **Errors** have the shape and the status of the OpenAI API. Before the first token they are an HTTP status; behind it, the last
//!   event of the stream.

mod api;
mod app;
mod client;
mod error;
mod figures;
mod history;
mod http;
#[path = "../common/llm/mod.rs"]
mod llm;
mod load;
mod model;
mod occupancy;
mod outbox;
mod prometheus;
mod runner;
mod sample;
mod scheduler;
mod server;
mod smollm;
mod status;
mod text;
mod toy;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use kv_cache::{Devices, Format};
use tracing_subscriber::EnvFilter;

use crate::client::Client;
use crate::load::Load;
use crate::model::Model;
use crate::server::{Server, Settings};
use crate::toy::Toy;

/// A streaming text server over kv-cache.
#[derive(Debug, Parser)]
struct Flags {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// A GGUF file of SmolLM2; left out, it is fetched once and kept.
    #[arg(long)]
    model: Option<PathBuf>,
    /// A made-up model that needs no weights.
    #[arg(long, conflicts_with = "model")]
    toy: bool,
    /// The model's matrices on a GPU (needs `--features candle-cuda`); the cache stays in host memory.
    #[arg(long)]
    gpu: bool,
    /// MiB of each shard's slab.
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// Shards of the cache, in host memory.
    #[arg(long, default_value_t = 1)]
    shards: u16,
    /// How full blocks are stored; the model's own choice if it is left out.
    #[arg(long)]
    format: Option<Format>,
    /// A file of the model's mean keys, which few bits need (`quality --calibrate` makes it).
    #[arg(long)]
    key_means: Option<PathBuf>,
    /// Requests that run at once.
    #[arg(long, default_value_t = 64)]
    running: usize,
    /// Requests that wait beside them; more are answered with 429.
    #[arg(long, default_value_t = 256)]
    waiting: usize,
    /// Tokens of one step, decodes and chunks of prompts together.
    #[arg(long, default_value_t = 128)]
    step_tokens: u32,
    /// Seconds after which a client that does not read is given up.
    #[arg(long, default_value_t = 60)]
    cut_seconds: u64,
    /// Seconds that streams have to end when the server is told to.
    #[arg(long, default_value_t = 20)]
    drain_seconds: u64,
    /// Instead of serving, runs so many clients at once against itself, for each number, and prints what they saw.
    #[arg(long, value_delimiter = ',')]
    load: Vec<usize>,
    /// Requests of each client of `--load`.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Tokens of each answer of `--load`.
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Figures of `--load` as JSON.
    #[arg(long)]
    json: bool,
}

impl Flags {
    fn settings(&self) -> Settings {
        Settings {
            listen: self.listen,
            // The model computes in host memory: keys and values across a bus would cost more than they save.
            devices: Devices::cpu(self.shards),
            memory_bytes_per_device: self.memory_mib << 20,
            sealed_format: self.format,
            key_means: self.key_means.clone(),
            running_max: self.running,
            waiting_max: self.waiting,
            step_tokens: self.step_tokens,
            cut_after: Duration::from_secs(self.cut_seconds),
            ..Settings::default()
        }
    }

    async fn model(&self) -> anyhow::Result<Model> {
        if self.toy { Ok(Toy::default().model()) } else { smollm::load(self.model.clone(), self.gpu).await }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let flags = Flags::parse();
    if flags.load.is_empty() { serve(&flags).await } else { load(&flags).await }
}

async fn serve(flags: &Flags) -> anyhow::Result<()> {
    let server = Server::start(flags.settings(), flags.model().await?).await?;
    println!("model {} at http://{}", server.app.model, server.addr);
    asked_to_end().await?;
    println!("ending: {} requests may run on for {} s", server.app.requests(), flags.drain_seconds);
    let ended = server.shutdown(Duration::from_secs(flags.drain_seconds)).await?;
    println!("all answers given: {}; cache drained: {}", ended.drained, ended.cache.drained);
    Ok(())
}

/// Ctrl-C, or what a supervisor sends.
async fn asked_to_end() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

async fn load(flags: &Flags) -> anyhow::Result<()> {
    let settings = Settings { listen: SocketAddr::from(([127, 0, 0, 1], 0)), ..flags.settings() };
    let server = Server::start(settings, flags.model().await?).await?;
    let client = Client::new(server.addr);
    let mut reports = Vec::new();
    for &clients in &flags.load {
        let load = Load {
            clients,
            rounds: flags.rounds,
            max_tokens: flags.max_tokens,
            leaves_every: 0,
            model: server.app.model.clone(),
        };
        reports.push(load::run(&client, &load).await?.0);
    }
    server.shutdown(Duration::from_secs(flags.drain_seconds)).await?;
    match flags.json {
        true => println!("{}", serde_json::to_string(&reports)?),
        false => load::print(&reports),
    }
    Ok(())
}
