//! What the formats do to the model's predictions, on real text through the real cache.

use kv_cache::Element as _;
use kv_cache::Format;
use kv_cache::half::f16;
use serde::Serialize;

use crate::llm::model::Model;
use crate::llm::score::{Score, score};
use crate::llm::tokenizer::Tokenizer;

#[derive(Serialize)]
struct Row {
    what: &'static str,
    format: &'static str,
    bits_per_element: f64,
    #[serde(flatten)]
    score: Score,
}

pub(crate) async fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    text: &str,
    formats: &[Format],
    tokens: usize,
    json: bool,
) -> anyhow::Result<()> {
    // Enough text for that many tokens, cut between characters.
    let end = text.char_indices().map(|(at, _)| at).find(|at| *at >= 8 * tokens).unwrap_or(text.len());
    let mut ids = tokenizer.encode(&text[..end])?;
    ids.truncate(tokens.min(model.config().context_tokens));
    let layout = model.geometry(f16::TYPE).layout()?;
    if !json {
        println!(
            "predictions over a format against those over raw f16, {} tokens in chunks of 32",
            ids.len()
        );
        println!(
            "{:<6} {:>5} {:>9} {:>9} {:>7} {:>8}",
            "format", "bits", "KL mean", "KL p99", "top 1", "PPL"
        );
    }
    for &format in formats {
        let reference = crate::cache(model, Format::Raw).await?;
        let scored = crate::cache(model, format).await?;
        let score = score::<f16>(model, &ids, &reference, &scored).await?;
        let bits = format.bits_per_element(&layout);
        let line = format!(
            "{:<6} {bits:>5.2} {:>9.5} {:>9.5} {:>6.2}% {:>+7.2}%",
            format.name(),
            score.kl_mean,
            score.kl_p99,
            100.0 * score.top1_agreement,
            score.delta_ppl_percent
        );
        crate::print(
            json,
            &Row { what: "quality", format: format.name(), bits_per_element: bits, score },
            &line,
        );
    }
    Ok(())
}
