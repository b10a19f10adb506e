//! Tokens per second while some sequences decode together, over caches of one element type, in turn.

use std::time::Instant;

use kv_cache::half::f16;
use kv_cache::{Format, OpenOptions};
use serde::Serialize;

use crate::llm::generate::{CachedSequences, PlainSequences, Sequences, decode, prefill};
use crate::llm::model::Model;
use crate::llm::tokenizer::Tokenizer;

const PROMPT: &str = "The sea had been calm for three days, and the boats lay in the harbour with their sails furled. On the fourth \
                      morning the wind turned to the north, the gulls came inland, and the old men on the wall began to argue \
                      about what that meant. Nobody asked the youngest of them, who had";

/// Tokens in a measurement of each kind, and how often the kinds take turns.
const TOKENS: usize = 16;
const ROUNDS: usize = 5;

#[derive(Serialize)]
struct Row {
    what: &'static str,
    sequences: usize,
    plain_f16_tokens_per_second: f64,
    raw_tokens_per_second: f64,
    int8_tokens_per_second: f64,
    raw_of_plain: f64,
    int8_of_plain: f64,
}

pub(crate) async fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    counts: &[usize],
    json: bool,
) -> anyhow::Result<()> {
    let prompt = tokenizer.encode(PROMPT)?;
    if !json {
        println!(
            "tokens/s of all sequences together, median of {ROUNDS} turns of {TOKENS} tokens, behind {} tokens",
            prompt.len()
        );
        println!(
            "{:>9} {:>11} {:>11} {:>11} {:>9} {:>9}",
            "sequences", "plain f16", "raw f16", "int8", "raw", "int8"
        );
    }
    for &count in counts {
        let [plain, raw, int8] = together(model, &prompt, count).await?;
        let row = Row {
            what: "decode",
            sequences: count,
            plain_f16_tokens_per_second: plain,
            raw_tokens_per_second: raw,
            int8_tokens_per_second: int8,
            raw_of_plain: raw / plain,
            int8_of_plain: int8 / plain,
        };
        let line = format!(
            "{count:>9} {plain:>11.1} {raw:>11.1} {int8:>11.1} {:>8.3}x {:>8.3}x",
            row.raw_of_plain, row.int8_of_plain
        );
        crate::print(json, &row, &line);
    }
    Ok(())
}

/// Medians of the plain decoder, and of ours over `raw` and `int8`.
async fn together(model: &Model, prompt: &[u32], count: usize) -> anyhow::Result<[f64; 3]> {
    let mut plain = PlainSequences::<f16>::new(model, count);
    let logits = prefill(model, &mut plain, &[prompt]).await?;
    plain.fork_first();
    let mut cached = Vec::new();
    for format in [Format::Raw, Format::Int8] {
        let cache = crate::cache(model, format).await?;
        let sequence = cache.open("bench", OpenOptions::default()).await?;
        let mut one = CachedSequences::<f16>::new(&cache, vec![sequence]);
        prefill(model, &mut one, &[prompt]).await?;
        let mut forks = match count as u32 - 1 {
            0 => Vec::new(),
            more => one.sequences[0].fork_many(more).await?,
        };
        forks.extend(one.sequences);
        cached.push(CachedSequences::<f16>::new(&cache, forks));
    }
    let first = vec![logits[0].clone(); count];
    let mut rates = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        rates[0].push(rate(model, &mut plain, &first).await?);
        for (sequences, rates) in cached.iter_mut().zip(&mut rates[1..]) {
            rates.push(rate(model, sequences, &first).await?);
        }
    }
    Ok(rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    }))
}

async fn rate(model: &Model, sequences: &mut impl Sequences, first: &[Vec<f32>]) -> anyhow::Result<f64> {
    let start = Instant::now();
    // The first token of an answer comes from the prompt's logits.
    decode(model, sequences, first, TOKENS + 1).await?;
    Ok((TOKENS * first.len()) as f64 / start.elapsed().as_secs_f64())
}
