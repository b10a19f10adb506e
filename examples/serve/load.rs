//! Load: clients that stream chats with one system prompt in common, some of which go away in the middle.
//!
//! `serve --load 1,8,32,64` prints what they see; the load test asks for every word of it.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::client::Client;
use crate::history::Quantiles;

/// What every client begins with: some hundred tokens of a real tokenizer.
pub(crate) const SYSTEM_PROMPT: &str = "You are the assistant of a small library. You answer questions about books, \
    their authors and where they stand on the shelves. You are friendly, brief and exact. If you do not know an answer, \
    you say so and name somebody who may know. You never make up titles. When somebody asks for advice, you ask for the \
    age of the reader first and suggest three books at most. The library is open from nine to six on weekdays and from \
    ten to two on Saturdays. Books may be kept for four weeks, films for one, and both may be extended twice unless \
    somebody else waits for them. Children under twelve pay nothing. Remind people of the reading hour on Thursday \
    afternoons, if it fits. Here comes the first question.";

const QUESTIONS: [&str; 8] = [
    "Where do I find books about the sea?",
    "Which novel would you give to a nurse who works at night?",
    "How long may I keep a film?",
    "Is there anything about how bridges are built?",
    "My daughter likes dragons. What should she read?",
    "Who wrote the first detective stories?",
    "Are you open on Saturday afternoon?",
    "I would like to learn to bake bread.",
];

/// How the clients behave.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) clients: usize,
    /// Requests of each client, one after the other.
    pub(crate) rounds: usize,
    pub(crate) max_tokens: u32,
    /// One client of so many goes away after a few tokens; 0: none does.
    pub(crate) leaves_every: usize,
    pub(crate) model: String,
}

/// One answer as its client saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    #[cfg_attr(not(test), expect(dead_code))]
    pub(crate) question: String,
    pub(crate) text: String,
    /// The client went away by itself.
    pub(crate) left: bool,
    pub(crate) completion_tokens: u64,
    pub(crate) first_token: Duration,
    pub(crate) between_tokens: Vec<Duration>,
}

/// What all clients saw.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LoadReport {
    pub(crate) clients: usize,
    pub(crate) answers: usize,
    pub(crate) left: usize,
    pub(crate) seconds: f64,
    /// Of finished answers.
    pub(crate) tokens: u64,
    pub(crate) tokens_per_s: f64,
    pub(crate) first_token_ms: Option<Quantiles>,
    pub(crate) between_tokens_ms: Option<Quantiles>,
}

/// The question of a client in a round: no two are the same.
pub(crate) fn question(client: usize, round: usize) -> String {
    format!("{} (Reader {client}, visit {round}.)", QUESTIONS[(client + round) % QUESTIONS.len()])
}

/// The messages of a chat about it.
pub(crate) fn messages(question: &str) -> Value {
    json!([{ "role": "system", "content": SYSTEM_PROMPT }, { "role": "user", "content": question }])
}

/// Runs all clients to their end.
///
/// # Errors
/// The first thing that any of them did not expect.
pub(crate) async fn run(client: &Client, load: &Load) -> anyhow::Result<(LoadReport, Vec<Seen>)> {
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for number in 0..load.clients {
        let (client, load) = (client.clone(), load.clone());
        clients.spawn(async move {
            let leaves = load.leaves_every > 0 && number % load.leaves_every == load.leaves_every - 1;
            let mut seen = Vec::new();
            for round in 0..load.rounds {
                seen.push(chat(&client, &load, question(number, round), leaves).await?);
            }
            anyhow::Ok(seen)
        });
    }
    let mut seen = Vec::new();
    while let Some(joined) = clients.join_next().await {
        seen.extend(joined??);
    }
    let seconds = began.elapsed().as_secs_f64();
    let tokens = seen.iter().filter(|answer| !answer.left).map(|answer| answer.completion_tokens).sum();
    let ms = |duration: &Duration| duration.as_secs_f32() * 1e3;
    let report = LoadReport {
        clients: load.clients,
        answers: seen.len(),
        left: seen.iter().filter(|answer| answer.left).count(),
        seconds,
        tokens,
        tokens_per_s: tokens as f64 / seconds,
        first_token_ms: Quantiles::of(seen.iter().map(|answer| ms(&answer.first_token)).collect()),
        between_tokens_ms: Quantiles::of(
            seen.iter().flat_map(|answer| answer.between_tokens.iter().map(ms)).collect(),
        ),
    };
    Ok((report, seen))
}

/// One chat. A client that leaves does so after three pieces.
async fn chat(client: &Client, load: &Load, question: String, leaves: bool) -> anyhow::Result<Seen> {
    let body = json!({
        "model": load.model, "messages": messages(&question), "max_tokens": load.max_tokens, "temperature": 0,
        "stream": true, "stream_options": { "include_usage": true },
    });
    let mut before = Instant::now();
    let mut events = client.stream("/v1/chat/completions", &body).await?;
    let mut seen = Seen {
        question,
        text: String::new(),
        left: false,
        completion_tokens: 0,
        first_token: Duration::ZERO,
        between_tokens: Vec::new(),
    };
    let (mut pieces, mut finish) = (0, None);
    loop {
        let event = events.next().await?.context("the answer ended without [DONE]")?;
        if event == "[DONE]" {
            ensure!(finish.is_some(), "the answer ended without a reason");
            ensure!(events.next().await?.is_none(), "something came behind [DONE]");
            return Ok(seen);
        }
        let event: Value = serde_json::from_str(&event)?;
        if let Some(error) = event.get("error") {
            bail!("the answer ended with {error}");
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            seen.completion_tokens = tokens;
            continue;
        }
        let choice = &event["choices"][0];
        if let Some(text) = choice["delta"]["content"].as_str() {
            ensure!(finish.is_none(), "text came behind the end");
            seen.text.push_str(text);
            let since = before.elapsed();
            before = Instant::now();
            match pieces {
                0 => seen.first_token = since,
                _ => seen.between_tokens.push(since),
            }
            pieces += 1;
            if leaves && pieces == 3 {
                seen.left = true;
                return Ok(seen);
            }
        }
        finish = finish.or(choice["finish_reason"].as_str().map(str::to_owned));
    }
}

/// A table for people.
pub(crate) fn print(reports: &[LoadReport]) {
    println!("clients  answers  tokens/s   first token p50 / p95      between tokens p50 / p95");
    let ms = |quantiles: Option<Quantiles>| match quantiles {
        Some(Quantiles { p50, p95 }) => format!("{p50:9.1} / {p95:9.1} ms"),
        None => String::new(),
    };
    for report in reports {
        println!(
            "{:7}  {:7}  {:8.1}   {}   {}",
            report.clients,
            report.answers,
            report.tokens_per_s,
            ms(report.first_token_ms),
            ms(report.between_tokens_ms)
        );
    }
}
