//! Which requests of a trace run, and their block keys, made before any clock starts.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kv_cache::{BlockKey, ElementType, Geometry, HashSecret, OpenOptions};
use kv_cache_actors::block::KeyScheme;

use crate::trace::{self, HASH_TOKENS, Request, token_id};

/// Which part of a trace runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Selection {
    All,
    FirstHalf,
    SecondHalf,
}

/// A request, as a cache sees it.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    /// Arrival, milliseconds from the start of the trace.
    pub(crate) time_ms: u64,
    /// What the trace calls its blocks.
    pub(crate) hash_ids: Vec<u64>,
    /// One key for each block of the prompt, the last of which may be partial.
    pub(crate) keys: Vec<BlockKey>,
}

/// The requests that run.
#[derive(Debug)]
pub(crate) struct Workload {
    /// The trace, as given on the command line.
    pub(crate) name: String,
    /// In order of arrival.
    pub(crate) requests: Vec<Planned>,
    /// What hashing took, without making up the tokens.
    hashing: Duration,
}

impl Workload {
    /// Reads a trace and keeps each `every`-th request of the part that `selection` names. Another `label` gives all blocks other keys.
    ///
    /// # Errors
    /// When the file cannot be read, a line is not a request, or no request is left.
    pub(crate) fn read(path: &Path, selection: Selection, every: usize, label: u8) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let opened = File::open(path).with_context(|| format!("cannot open {name}"))?;
        let requests = trace::parse(BufReader::new(opened), usize::MAX).with_context(|| name.clone())?;
        let (first, second) = requests.split_at(requests.len() / 2);
        let part = match selection {
            Selection::All => &requests,
            Selection::FirstHalf => first,
            Selection::SecondHalf => second,
        };
        let mut hashing = Duration::ZERO;
        let requests: Vec<_> =
            part.iter().step_by(every).map(|request| plan(request, label, &mut hashing)).collect();
        ensure!(!requests.is_empty(), "{name}: no requests");
        Ok(Workload { name, requests, hashing })
    }

    /// Blocks of all requests.
    pub(crate) fn blocks(&self) -> usize {
        self.requests.iter().map(|request| request.keys.len()).sum()
    }

    /// Blocks of the longest request.
    pub(crate) fn longest(&self) -> usize {
        self.requests.iter().map(|request| request.keys.len()).max().unwrap_or(0)
    }

    /// Time to hash the 512 token ids of a block with its parent's key.
    pub(crate) fn hash_ns_per_block(&self) -> f64 {
        self.hashing.as_nanos() as f64 / self.blocks() as f64
    }
}

/// Chains the keys of the blocks. A hash id stands for the same 512 made-up tokens wherever it appears, also where it names
/// the partial last block, so blocks have equal keys where the ids up to them are equal.
fn plan(request: &Request, label: u8, hashing: &mut Duration) -> Planned {
    let tokens: Vec<Vec<u32>> = request
        .hash_ids
        .iter()
        .map(|id| (0..HASH_TOKENS).map(|offset| token_id(*id, offset)).collect())
        .collect();
    let mut keys = Vec::with_capacity(tokens.len());
    // All requests have one tenant, model and adapter; what the keys begin with does not matter here.
    let geometry = Geometry::new(1, 1, 1, ElementType::F16).block_tokens(HASH_TOKENS);
    let scheme = KeyScheme::new(HashSecret([label; 32]), &geometry, None);
    let mut parent = scheme.root(&OpenOptions::default());
    let begun = Instant::now();
    for block in &tokens {
        parent = scheme.child(parent, block, []);
        keys.push(parent);
    }
    *hashing += begun.elapsed();
    Planned { time_ms: request.timestamp_ms, hash_ids: request.hash_ids.clone(), keys }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(selection: Selection, every: usize) -> Workload {
        Workload::read(Path::new("tests/data/mooncake_small.jsonl"), selection, every, 0).unwrap()
    }

    #[test]
    fn halves_and_steps_add_up() {
        let all = small(Selection::All, 1);
        let count = |selection, every| small(selection, every).requests.len();
        assert_eq!(all.requests.len(), 40);
        assert_eq!((count(Selection::FirstHalf, 1), count(Selection::SecondHalf, 1)), (20, 20));
        assert_eq!((count(Selection::All, 3), count(Selection::SecondHalf, 7)), (14, 3));
        assert_eq!(small(Selection::SecondHalf, 1).requests[0].keys, all.requests[20].keys);
    }

    #[test]
    fn equal_prefixes_have_equal_keys() {
        let keys = |hash_ids: &[u64]| {
            let line = format!(
                r#"{{"timestamp": 7, "input_length": {}, "output_length": 1, "hash_ids": {hash_ids:?}}}"#,
                512 * hash_ids.len()
            );
            let mut hashing = Duration::ZERO;
            plan(&trace::parse(line.as_bytes(), 1).unwrap()[0], 0, &mut hashing).keys
        };
        let (a, b, c) = (keys(&[1, 2, 3]), keys(&[1, 2, 4]), keys(&[5, 2, 3]));
        assert_eq!(a[..2], b[..2]);
        assert_ne!(a[2], b[2]);
        assert!(a.iter().zip(&c).all(|(a, c)| a != c));
    }
}
