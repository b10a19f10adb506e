//! Request traces in the Mooncake format, one JSON object a line, as chains of the peer's sequence hashes.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use dynamo_tokens::{PositionalLineageHash, compute_block_hash_for_tokens, compute_salt_hash_from_bytes};
use kvbm_logical::SequenceHash;
use serde::Deserialize;

/// Input tokens that one hash id stands for.
pub const BLOCK_TOKENS: usize = 512;
/// Made-up token ids lie under this, as in a real vocabulary.
const VOCABULARY: u64 = 128_000;

#[derive(Deserialize)]
struct Request {
    timestamp: u64,
    input_length: u32,
    #[serde(rename = "output_length")]
    _output_length: u32,
    hash_ids: Vec<u64>,
}

/// What is replayed: the blocks of each request, hashed beforehand.
pub struct Workload {
    /// As given on the command line.
    pub name: String,
    /// One chain a request, in order of arrival.
    pub requests: Vec<Vec<SequenceHash>>,
    /// Blocks of all requests.
    pub blocks: usize,
    /// Blocks of the longest request.
    pub longest: usize,
    /// Time that hashing took: xxh3 over the 512 token ids of each block, and the chain.
    pub hashing: Duration,
}

impl Workload {
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let requests = parse(path).with_context(|| name.clone())?;
        ensure!(!requests.is_empty(), "{name}: no requests");
        let mut hashing = Duration::ZERO;
        let requests: Vec<_> =
            requests.iter().map(|request| chain(&request.hash_ids, &mut hashing)).collect();
        let lengths = || requests.iter().map(Vec::len);
        let (blocks, longest) = (lengths().sum(), lengths().max().unwrap_or(0));
        Ok(Workload { name, requests, blocks, longest, hashing })
    }

    pub fn hash_ns_per_block(&self) -> f64 {
        self.hashing.as_nanos() as f64 / self.blocks as f64
    }
}

fn parse(path: &Path) -> anyhow::Result<Vec<Request>> {
    let mut requests: Vec<Request> = Vec::new();
    for (line, text) in (1..).zip(BufReader::new(File::open(path)?).lines()) {
        let text = text.with_context(|| format!("line {line}"))?;
        if text.trim().is_empty() {
            continue;
        }
        let request: Request =
            serde_json::from_str(&text).with_context(|| format!("line {line}: not a request"))?;
        let (expected, given) =
            ((request.input_length as usize).div_ceil(BLOCK_TOKENS), request.hash_ids.len());
        if given == 0 || given != expected {
            bail!(
                "line {line}: {given} hash_ids for input_length {}; {expected} expected",
                request.input_length
            );
        }
        if let Some(previous) = requests.last().filter(|previous| previous.timestamp > request.timestamp) {
            bail!("line {line}: timestamp {} after {}", request.timestamp, previous.timestamp);
        }
        requests.push(request);
    }
    Ok(requests)
}

/// The hashes of one request's blocks, made the way the peer's `TokenBlock` makes them, from made-up token ids: an id stands
/// for the same 512 tokens wherever it appears, so equal ids after equal ids are equal blocks.
fn chain(hash_ids: &[u64], hashing: &mut Duration) -> Vec<SequenceHash> {
    let tokens: Vec<Vec<u32>> = hash_ids.iter().map(|id| tokens(*id)).collect();
    let salt = compute_salt_hash_from_bytes(b"");
    let begun = Instant::now();
    let mut chain: Vec<SequenceHash> = Vec::with_capacity(tokens.len());
    for block in &tokens {
        let hash = compute_block_hash_for_tokens(block, salt);
        let next =
            chain.last().map_or_else(|| PositionalLineageHash::root(hash), |parent| parent.extend(hash));
        chain.push(next);
    }
    *hashing += begun.elapsed();
    chain
}

fn tokens(id: u64) -> Vec<u32> {
    let seed = id.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..BLOCK_TOKENS as u64).map(|offset| (mix(seed ^ offset) % VOCABULARY) as u32).collect()
}

/// The finaliser of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
