//! bf16 blocks of a real model through general coders, beside the cache's own: what the cold codec was chosen by.
//!
//! `KV_CACHE_KV=FILE` takes what `quality --dump-kv FILE` has written instead of the tensors that lie beside the tests. Rates are bytes of the
//! block a second on one core, each block in the fastest of many turns.

#[allow(dead_code, reason = "the bench of the cache reads more")]
#[path = "../../../../tests/common/kv.rs"]
mod kv;

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use constriction::stream::Decode;
use constriction::stream::model::{
    SmallContiguousCategoricalEntropyModel, SmallContiguousLookupDecoderModel,
};
use constriction::stream::stack::SmallAnsCoder;
use kv::Kv;
use kv_cache::History;
use kv_cache::cold::{self, Codec, Element, Shape};

const TURNS: usize = 40;

fn main() -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/data/kv.safetensors");
    let file = std::env::var_os("KV_CACHE_KV").map_or(path, Into::into);
    let kv = Kv::read(&file)?;
    println!("bf16, {} layers, {} tokens, blocks of {} tokens", kv.layers.len(), kv.tokens, kv::BLOCK_TOKENS);
    println!("| coder | times smaller | encode MB/s | decode MB/s |");
    println!("|---|---|---|---|");
    let (blocks, shape) = (kv.blocks(Element::Bf16), kv.shape());
    measure(
        "cold::Codec::Lossless",
        &blocks,
        |block| ours(block, &shape),
        |frame, len| Ok(cold::decode_to_vec(frame, len)?.1),
    )?;
    for level in [1, 3, 9] {
        let encode = |block: &[u8]| Ok(zstd::bulk::compress(block, level)?);
        let decode = |frame: &[u8], len| Ok(zstd::bulk::decompress(frame, len)?);
        measure(&format!("zstd {level}, the block as it is"), &blocks, encode, decode)?;
    }
    for level in [1, 3, 9] {
        let encode = |block: &[u8]| {
            let (exponents, mut rest) = split(block);
            rest.extend(zstd::bulk::compress(&exponents, level)?);
            Ok(rest)
        };
        let decode = |frame: &[u8], len: usize| {
            let (rest, exponents) = frame.split_at_checked(len / 2).context("short")?;
            Ok(join(&zstd::bulk::decompress(exponents, len / 2)?, rest))
        };
        measure(&format!("exponents by zstd {level}, the rest as it is"), &blocks, encode, decode)?;
    }
    measure(
        "exponents by constriction's ANS, one table a block",
        &blocks,
        constriction_encode,
        constriction_decode,
    )
}

fn ours(block: &[u8], shape: &Shape) -> anyhow::Result<Vec<u8>> {
    let mut frame = Vec::new();
    cold::encode(Codec::Lossless, Element::Bf16, shape, &History::default(), block, &mut frame)?;
    Ok(frame)
}

/// Exponents, and signs with mantissas.
fn split(block: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let words = block.chunks_exact(2).map(|x| u16::from_le_bytes([x[0], x[1]]));
    words.map(|x| ((x >> 7) as u8, (x >> 8) as u8 & 0x80 | x as u8 & 0x7F)).unzip()
}

fn join(exponents: &[u8], rest: &[u8]) -> Vec<u8> {
    let word = |(exponent, rest): (&u8, &u8)| {
        u16::from(*exponent) << 7 | u16::from(rest & 0x80) << 8 | u16::from(rest & 0x7F)
    };
    exponents.iter().zip(rest).map(word).flat_map(u16::to_le_bytes).collect()
}

/// The rest; which exponents occur and how often, in 12 bits; the words of the coder.
fn constriction_encode(block: &[u8]) -> anyhow::Result<Vec<u8>> {
    let (exponents, mut out) = split(block);
    let mut counts = [0u32; 256];
    exponents.iter().for_each(|exponent| counts[usize::from(*exponent)] += 1);
    let occurring = (0..=255u8).filter(|exponent| counts[usize::from(*exponent)] > 0).collect::<Vec<_>>();
    let mut symbols = [0usize; 256];
    occurring.iter().enumerate().for_each(|(symbol, exponent)| symbols[usize::from(*exponent)] = symbol);
    // What is written is what both sides make their table of.
    let most = counts.iter().max().copied().unwrap_or(1);
    let weights = occurring.iter().map(|exponent| {
        (f64::from(counts[usize::from(*exponent)]) / f64::from(most) * 65535.0).ceil() as u16
    });
    let weights = weights.collect::<Vec<_>>();
    let likely = weights.iter().map(|weight| f64::from(*weight)).collect::<Vec<_>>();
    let model = SmallContiguousCategoricalEntropyModel::<Vec<u16>>::from_floating_point_probabilities_fast(
        &likely, None,
    );
    let model = model.map_err(|()| anyhow!("no model of {} exponents", likely.len()))?;
    let mut coder = SmallAnsCoder::new();
    let symbols = exponents.iter().map(|exponent| symbols[usize::from(*exponent)]);
    coder.encode_iid_symbols_reverse(symbols, &model).map_err(|error| anyhow!("{error:?}"))?;
    out.push(occurring.len() as u8);
    out.extend(&occurring);
    out.extend(weights.iter().flat_map(|weight| weight.to_le_bytes()));
    let words = coder.into_compressed().map_err(|error| anyhow!("{error:?}"))?;
    out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    Ok(out)
}

fn constriction_decode(frame: &[u8], len: usize) -> anyhow::Result<Vec<u8>> {
    let (rest, coded) = frame.split_at_checked(len / 2).context("short")?;
    let (count, coded) = coded.split_first().context("short")?;
    let (occurring, coded) = coded.split_at_checked(usize::from(*count)).context("short")?;
    let (weights, coded) = coded.split_at_checked(2 * occurring.len()).context("short")?;
    let words =
        |bytes: &[u8]| bytes.chunks_exact(2).map(|x| u16::from_le_bytes([x[0], x[1]])).collect::<Vec<_>>();
    let likely = words(weights).iter().map(|weight| f64::from(*weight)).collect::<Vec<_>>();
    let model =
        SmallContiguousLookupDecoderModel::<Vec<u16>>::from_floating_point_probabilities_fast(&likely, None);
    let model = model.map_err(|()| anyhow!("no model of {count} exponents"))?;
    let mut coder = SmallAnsCoder::from_compressed(words(coded)).map_err(|_| anyhow!("no words"))?;
    let symbols = coder.decode_iid_symbols(len / 2, &model);
    let exponents =
        symbols.map(|symbol| symbol.map(|symbol| occurring[symbol])).collect::<Result<Vec<_>, _>>();
    Ok(join(&exponents.map_err(|error| anyhow!("{error:?}"))?, rest))
}

fn measure(
    name: &str,
    blocks: &[Vec<u8>],
    encode: impl Fn(&[u8]) -> anyhow::Result<Vec<u8>>,
    decode: impl Fn(&[u8], usize) -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<()> {
    let (mut stored, mut total) = (0, 0);
    let mut seconds = [0.0; 2];
    for block in blocks {
        let mut fastest = [f64::INFINITY; 2];
        for turn in 0..TURNS {
            let start = Instant::now();
            let frame = encode(black_box(block))?;
            let encoded = Instant::now();
            let decoded = decode(black_box(&frame), block.len())?;
            let times = [encoded - start, encoded.elapsed()].map(|time| time.as_secs_f64());
            fastest.iter_mut().zip(times).for_each(|(fastest, time)| *fastest = fastest.min(time));
            if turn == 0 {
                ensure!(decoded == *block, "{name} has lost something");
                stored += frame.len();
                total += block.len();
            }
        }
        seconds.iter_mut().zip(fastest).for_each(|(sum, time)| *sum += time);
    }
    let [encode, decode] = seconds.map(|seconds| total as f64 / 1e6 / seconds);
    println!("| {name} | {:.3} | {encode:.0} | {decode:.0} |", total as f64 / stored as f64);
    Ok(())
}
