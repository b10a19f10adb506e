//! A real model over the cache: what it says is what it says over a cache of its own.
//!
//! The model is fetched at the first run. Where that fails the tests say so and pass, unless `CI` or `KV_CACHE_REQUIRE_MODEL` is set.

#[path = "../../examples/common/llm/mod.rs"]
mod llm;

use std::path::Path;
use std::sync::LazyLock;

use kv_cache::half::f16;
use kv_cache::{Cache, Devices, Format, OpenOptions, Sequence};
use llm::generate::{CachedSequences, PlainSequences, decode, prefill};
use llm::model::{Model, Weights};
use llm::plain::Stored;
use llm::tokenizer::{Message, Tokenizer};

/// The CPU, or a GPU where `KV_CACHE_TEST_MODEL_ON_GPU` is set (needs `--features candle-cuda`).
fn device() -> candle_core::Device {
    llm::device(std::env::var_os("KV_CACHE_TEST_MODEL_ON_GPU").is_some())
        .expect("a GPU, since it was asked for")
}

/// Weights as f32 need half a gigabyte: each kind is loaded once.
static LOADED: LazyLock<Option<(Model, Tokenizer)>> = LazyLock::new(|| load(Weights::Quantised));

fn load(weights: Weights) -> Option<(Model, Tokenizer)> {
    loaded(None, weights)
}

fn loaded(model: Option<&str>, weights: Weights) -> Option<(Model, Tokenizer)> {
    match llm::fetch::model(model.map(Path::new)) {
        Ok(path) => Some((
            Model::load(&path, weights, &device()).expect("a model whose hash was right"),
            Tokenizer::from_gguf(&path).expect("its tokenizer"),
        )),
        Err(error) => {
            let required =
                ["CI", "KV_CACHE_REQUIRE_MODEL"].iter().any(|name| std::env::var_os(name).is_some());
            assert!(!required, "{error:#}");
            println!("SKIPPED, there is no model here: {error:#}");
            None
        }
    }
}

async fn cache<T: Stored>(model: &Model, format: Format) -> Cache {
    Cache::builder(model.geometry(T::TYPE))
        .devices(Devices::cpu(1))
        .memory_bytes_per_device(256 << 20)
        .sealed_format(format)
        // Every full block, sinks and the last ones too: prompts are short.
        .configure(|config| {
            let quantisation = &mut config.quantisation;
            (quantisation.raw_sinks, quantisation.raw_window_blocks) = (Some(false), Some(0));
        })
        .build()
        .await
        .unwrap()
}

async fn open(cache: &Cache, options: &OpenOptions) -> Sequence {
    cache.open("tenant", options.clone()).await.unwrap()
}

/// Of many lengths: within a block, to its end, over several.
const PROMPTS: [&str; 8] = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):",
    "Water boils at a temperature of one hundred degrees, because the pressure of its vapour then equals that of the \
     air around it. On a high mountain the air is thinner, so that",
    "1, 2, 4, 8, 16, 32,",
    "Dear Sir or Madam,\n\nI am writing to you about",
    "The three laws of motion that Newton wrote down are these. First, a body at rest stays at rest, and a body that moves goes on \
     moving in a straight line, unless a force acts on it. Second, the force that acts on a body is its mass times its acceleration. \
     Third, to every action there is an equal and opposite reaction. From these follows",
    "Q: Why is the sky blue?\nA:",
];

const NEW_TOKENS: usize = 24;

async fn says_the_same<T: Stored>() {
    let Some((model, tokenizer)) = &*LOADED else { return };
    let prompts = PROMPTS.map(|prompt| tokenizer.encode(prompt).unwrap());
    let mut alone = Vec::new();
    for prompt in &prompts {
        let mut plain = PlainSequences::<T>::new(model, 1);
        let first = prefill(model, &mut plain, &[prompt]).await.unwrap();
        let expected = decode(model, &mut plain, &first, NEW_TOKENS).await.unwrap();

        let cache = cache::<T>(model, Format::Raw).await;
        let sequence = open(&cache, &OpenOptions::default()).await;
        let mut cached = CachedSequences::<T>::new(&cache, vec![sequence]);
        let over_cache = prefill(model, &mut cached, &[prompt]).await.unwrap();
        assert_eq!(over_cache, first, "logits behind the prompt");
        let said = decode(model, &mut cached, &over_cache, NEW_TOKENS).await.unwrap();
        assert_eq!(said, expected);
        println!("{}", tokenizer.decode(&said[0]).unwrap());
        alone.extend(said);
    }
    // All eight in every step, and then the same over a cache of their own.
    let refs = prompts.iter().map(Vec::as_slice).collect::<Vec<_>>();
    let cache = cache::<T>(model, Format::Raw).await;
    let mut sequences = Vec::new();
    for _ in &prompts {
        sequences.push(open(&cache, &OpenOptions::default()).await);
    }
    let mut cached = CachedSequences::<T>::new(&cache, sequences);
    let first = prefill(model, &mut cached, &refs).await.unwrap();
    let together = decode(model, &mut cached, &first, NEW_TOKENS).await.unwrap();
    let mut plain = PlainSequences::<T>::new(model, prompts.len());
    let first = prefill(model, &mut plain, &refs).await.unwrap();
    let expected = decode(model, &mut plain, &first, NEW_TOKENS).await.unwrap();
    assert_eq!(together, expected);
    // candle's products on a GPU add in another order for another number of rows.
    if device().is_cpu() {
        assert_eq!(together, alone, "a batch says what each says alone");
    }
}

#[tokio::test]
async fn greedy_answers_over_a_raw_f32_cache_are_those_of_a_plain_decoder() {
    says_the_same::<f32>().await;
}

#[tokio::test]
async fn greedy_answers_over_a_raw_f16_cache_are_those_of_a_plain_decoder() {
    says_the_same::<f16>().await;
}

/// What a prompt finds cached it does not compute, and goes on as if it had.
#[tokio::test]
async fn a_shared_prefix_changes_nothing_that_is_said() {
    let Some((model, tokenizer)) = &*LOADED else { return };
    let chat = |question: &str| {
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let system = "You are a careful assistant. You answer in one short sentence, you never guess, and where you do not know \
                      something you say so. You are polite, but you do not waste words, and you never repeat the question.";
        tokenizer.encode_chat(&[message("system", system), message("user", question)]).unwrap()
    };
    let cache = cache::<f16>(model, Format::Raw).await;
    let mut said = Vec::new();
    for question in ["What is the largest planet?", "What is the largest planet?", "Who wrote Hamlet?"] {
        let prompt = chat(question);
        let sequence = open(&cache, &OpenOptions::default().prompt(&prompt)).await;
        let found = sequence.len();
        let mut cached = CachedSequences::<f16>::new(&cache, vec![sequence]);
        let first = prefill(model, &mut cached, &[&prompt]).await.unwrap();
        said.push((found, decode(model, &mut cached, &first, 24).await.unwrap().remove(0)));

        let mut plain = PlainSequences::<f16>::new(model, 1);
        let first = prefill(model, &mut plain, &[&prompt]).await.unwrap();
        let expected = decode(model, &mut plain, &first, 24).await.unwrap().remove(0);
        assert_eq!(said.last().unwrap().1, expected, "{question}");
        println!("{found} tokens found; {}", tokenizer.decode(&expected).unwrap());
    }
    assert_eq!(said[0].0, 0);
    assert!(said[1].0 > said[2].0 && said[2].0 >= 32, "{said:?}");
}

/// Sealed blocks are lossy in all other formats, but not so that the model is lost.
#[tokio::test]
async fn every_format_still_says_something_close() {
    let Some((model, tokenizer)) = &*LOADED else { return };
    let prompt = tokenizer.encode(PROMPTS[6]).unwrap();
    assert!(prompt.len() > 64, "two blocks at least are sealed");
    let mut plain = PlainSequences::<f16>::new(model, 1);
    let expected = prefill(model, &mut plain, &[&prompt]).await.unwrap().remove(0);
    for format in Format::ALL {
        let cache = cache::<f16>(model, format).await;
        let sequence = open(&cache, &OpenOptions::default()).await;
        let mut cached = CachedSequences::<f16>::new(&cache, vec![sequence]);
        let logits = prefill(model, &mut cached, &[&prompt]).await.unwrap().remove(0);
        let kl = llm::score::divergence(&expected, &logits);
        println!("{format}: {kl}");
        let most = if format == Format::R2 { 5.0 } else { 0.5 };
        assert!(kl < most, "{format}: {kl}");
        assert_eq!(format == Format::Raw, logits == expected, "{format} was used");
    }
}

#[test]
fn texts_become_tokens_and_come_back() {
    let Some((_, tokenizer)) = &*LOADED else { return };
    for text in [
        "Hello, world!",
        " leading and  double spaces",
        "naïve café — 東京 🦀 done",
        "tabs\tand\nlines\r\n",
        "",
    ] {
        let tokens = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        let bytes = tokens.iter().flat_map(|token| tokenizer.bytes(*token)).copied().collect::<Vec<_>>();
        assert_eq!(String::from_utf8(bytes).unwrap(), text, "token by token");
    }
    // What a user writes stays text.
    let written = tokenizer.encode("<|im_end|>").unwrap();
    assert!(written.len() > 1 && !written.iter().any(|token| tokenizer.is_end(*token)), "{written:?}");
    let message = Message { role: "user".into(), content: "<|im_end|>".into() };
    let chat = tokenizer.encode_chat(&[message]).unwrap();
    // The system's and the user's.
    assert_eq!(chat.iter().filter(|token| tokenizer.is_end(**token)).count(), 2);
}

/// The model whose keys have a bias is a large file, whose packages name no licence: it is tested where somebody has fetched it.
#[tokio::test]
async fn a_qwen2_model_answers_over_the_cache_too() {
    const NAME: &str = "qwen2.5-coder";
    if !llm::fetch::is_there(NAME) {
        println!("SKIPPED, {NAME} was not fetched: `quality --model {NAME}` does it");
        return;
    }
    let Some((model, tokenizer)) = loaded(Some(NAME), Weights::Quantised) else { return };
    // Ids of Qwen2's own tokenizer: digits stand alone.
    assert_eq!(tokenizer.encode("Hello, world!").unwrap(), [9707, 11, 1879, 0]);
    assert_eq!(tokenizer.encode("x = 123").unwrap(), [87, 284, 220, 16, 17, 18]);
    for (prompt, answer) in [("The capital of France is", " Paris"), ("def fibonacci(n):", "\n    if n <= ")]
    {
        let prompt = tokenizer.encode(prompt).unwrap();
        let mut plain = PlainSequences::<f16>::new(&model, 1);
        let first = prefill(&model, &mut plain, &[&prompt]).await.unwrap();
        let expected = decode(&model, &mut plain, &first, 8).await.unwrap();
        let cache = cache::<f16>(&model, Format::Raw).await;
        let sequence = open(&cache, &OpenOptions::default()).await;
        let mut cached = CachedSequences::<f16>::new(&cache, vec![sequence]);
        let first = prefill(&model, &mut cached, &[&prompt]).await.unwrap();
        assert_eq!(decode(&model, &mut cached, &first, 8).await.unwrap(), expected);
        let said = tokenizer.decode(&expected[0]).unwrap();
        assert!(said.starts_with(answer), "{said}");
    }
}
