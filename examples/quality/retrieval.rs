//! What token dropping forgets: facts are strewn over a text, tokens are dropped behind it, and each fact is asked for.
//!
//! Perplexity does not tell: dropping three quarters of all tokens at random costs it a few percent. All methods drop from forks of one prefilled
//! sequence, before any question is known, so they differ in nothing but what they keep.

use anyhow::Context;
use kv_cache::half::f16;
use kv_cache::{Cache, Devices, Element as _, Format, KeyScore, OpenOptions, Sequence, TokenScores};
use serde::Serialize;

use crate::llm::generate::{CachedSequences, Sequences, feed};
use crate::llm::model::{Model, Wanted, greedy};
use crate::llm::tokenizer::Tokenizer;
use crate::mix::mix;

/// What facts are about: one of each in a text.
const THINGS: [&str; 8] =
    ["harbour", "library", "orchard", "mountain", "hospital", "theatre", "railway", "museum"];

/// Tokens of a text before its facts.
const TEXT_TOKENS: usize = 768;

/// What a method remembers.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Recall {
    pub(crate) method: &'static str,
    /// Share of the tokens that stayed.
    pub(crate) kept: f64,
    /// Share of the facts that the model gives whole.
    pub(crate) facts: f64,
    /// Share of their digits, each behind the right ones.
    pub(crate) digits: f64,
    /// Facts that were asked for.
    pub(crate) asked: usize,
}

impl Recall {
    pub(crate) fn line(&self) -> String {
        let Recall { method, kept, facts, digits, asked } = self;
        let [kept, facts, digits] = [kept, facts, digits].map(|share| 100.0 * share);
        format!(
            "{method:<15} kept {kept:>5.1}%  facts {facts:>5.1}%  digits {digits:>5.1}%  of {asked} facts"
        )
    }
}

/// Which tokens stay.
#[derive(Debug, Clone, Copy)]
enum Method {
    All,
    /// The first and the most recent: scores that rise with the position.
    Recent,
    Scores(KeyScore),
    /// Scores by chance, to compare with.
    Chance,
}

impl Method {
    const ALL: [Method; 5] = [
        Method::All,
        Method::Recent,
        Method::Scores(KeyScore::Norm),
        Method::Scores(KeyScore::Diff),
        Method::Chance,
    ];

    fn name(self) -> &'static str {
        match self {
            Method::All => "all tokens",
            Method::Recent => "sinks + window",
            Method::Scores(score) => score.name(),
            Method::Chance => "chance",
        }
    }

    fn scores(self, tokens: u32) -> Option<TokenScores> {
        match self {
            Method::All => None,
            Method::Recent => Some((0..tokens).map(|at| at as f32).collect::<Vec<_>>().into()),
            Method::Scores(score) => Some(score.into()),
            Method::Chance => {
                Some((0..tokens).map(|at| mix(u64::from(at)) as f32).collect::<Vec<_>>().into())
            }
        }
    }
}

/// A fact, and the five digits that it is about.
fn fact(text: usize, thing: usize) -> (String, String) {
    let number = 10_000 + mix((text * THINGS.len() + thing) as u64) % 90_000;
    (format!(" The secret number of the {} is", THINGS[thing]), format!(" {number}"))
}

/// A text with facts at even distances, in an order of its own: from the beginning to the end.
fn strewn(tokenizer: &Tokenizer, text: usize, words: &[u32]) -> anyhow::Result<Vec<u32>> {
    let mut tokens = Vec::new();
    for (at, part) in words.chunks(words.len().div_ceil(THINGS.len()).max(1)).enumerate() {
        let (of, number) = fact(text, (at + 3 * text) % THINGS.len());
        tokens.extend_from_slice(part);
        tokens.extend(tokenizer.encode(&format!("{of}{number}."))?);
    }
    Ok(tokens)
}

/// Asks for the facts of `texts` texts of these words, `ratio` of whose tokens stay.
///
/// # Errors
/// Those of the model, the tokenizer and the cache; fewer words than that.
pub(crate) async fn recall(
    model: &Model,
    tokenizer: &Tokenizer,
    words: &[u32],
    texts: usize,
    ratio: f64,
) -> anyhow::Result<Vec<Recall>> {
    let geometry = model.geometry(f16::TYPE);
    let bytes = geometry.layout()?.raw_bytes() as u64 * 256;
    let builder = Cache::builder(geometry).devices(Devices::cpu(1)).memory_bytes_per_device(bytes);
    let cache = builder.sealed_format(Format::Raw).build().await?;
    let mut rows = Method::ALL.map(|method| Recall {
        method: method.name(),
        kept: 0.0,
        facts: 0.0,
        digits: 0.0,
        asked: texts * THINGS.len(),
    });
    for text in 0..texts {
        let words = words.chunks_exact(TEXT_TOKENS).nth(text).context("the text is too short")?;
        let tokens = strewn(tokenizer, text, words)?;
        let sequence = cache.open("recall", OpenOptions::default()).await?;
        let mut prefilled = CachedSequences::<f16>::new(&cache, vec![sequence]);
        feed(model, &mut prefilled, 0, &tokens).await?;
        for (method, row) in Method::ALL.into_iter().zip(&mut rows) {
            let fork = prefilled.sequences[0].fork().await?;
            let all = fork.len();
            if let Some(scores) = method.scores(all) {
                fork.drop_tokens((f64::from(all) * ratio) as u32, scores).await?;
            }
            row.kept += f64::from(fork.info().kept) / f64::from(all) / texts as f64;
            for thing in 0..THINGS.len() {
                let right = ask(model, tokenizer, &cache, &fork, fact(text, thing)).await?;
                let share = right.iter().filter(|right| **right).count() as f64 / right.len() as f64;
                row.digits += share / row.asked as f64;
                row.facts += f64::from(u8::from(share == 1.0)) / row.asked as f64;
            }
        }
    }
    Ok(rows.into())
}

/// Which tokens of the answer are what the model finds most likely behind the question and the right ones before.
async fn ask(
    model: &Model,
    tokenizer: &Tokenizer,
    cache: &Cache,
    sequence: &Sequence,
    (question, answer): (String, String),
) -> anyhow::Result<Vec<bool>> {
    let (question, answer) = (tokenizer.encode(&question)?, tokenizer.encode(&answer)?);
    let both = [&question[..], &answer[..]].concat();
    let mut fork = CachedSequences::<f16>::new(cache, vec![sequence.fork().await?]);
    let logits = fork.step(model, &[0], &[&both], Wanted::All).await?;
    let predicted = logits.rows().skip(question.len() - 1).map(greedy);
    Ok(predicted.zip(&answer).map(|(predicted, right)| predicted == *right).collect())
}
