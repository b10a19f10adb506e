//! The whole runtime: each request is a sequence that is opened with its prompt, appends what was not found, and closes.
//!
//! A block of 512 tokens has 16 KiB of keys and values here, 128 KiB where it is sealed in a format that is not `raw`: then the capacity is memory
//! for so many raw blocks. Ages are those of the run, which is faster than the trace.

use std::time::Duration;

use kv_cache::half::f16;
use kv_cache::{BlockingCache, Cache, Devices, ElementType, EvictionPolicy, Format, Geometry, OpenOptions};

use crate::driver::Driver;
use crate::trace::{HASH_TOKENS, token_id};
use crate::workload::Planned;

/// How blocks are stored.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) format: Format,
    pub(crate) colder: Vec<Format>,
}

impl Stored {
    /// Elements of a token's key, and of its value.
    fn dim(&self) -> usize {
        // Rows of 8 elements would be scales, mostly.
        if self.format == Format::Raw { 8 } else { 64 }
    }
}

impl std::fmt::Display for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.format)?;
        self.colder.iter().try_for_each(|format| write!(f, ">{format}"))
    }
}

/// A cache on one CPU device.
pub(crate) struct Whole {
    cache: BlockingCache,
    dim: usize,
    /// Keys or values of the longest request.
    tensor: Vec<f16>,
    token_ids: Vec<u32>,
}

impl Whole {
    pub(crate) fn new(
        policy: EvictionPolicy,
        capacity_blocks: u32,
        longest: usize,
        stored: &Stored,
    ) -> anyhow::Result<Self> {
        let dim = stored.dim();
        let block_elements = HASH_TOKENS as usize * dim;
        let geometry = Geometry::new(1, 1, dim as u32, ElementType::F16).block_tokens(HASH_TOKENS);
        let cache = Cache::builder(geometry)
            .devices(Devices::cpu(1))
            .memory_bytes_per_device(
                u64::from(capacity_blocks) * 2 * (block_elements * size_of::<f16>()) as u64,
            )
            .sealed_format(stored.format)
            .colder_formats(&stored.colder)
            .configure(|config| config.eviction = policy)
            .build_blocking()?;
        let tensor = (0..longest * block_elements).map(|at| f16::from_f32((at % 251) as f32)).collect();
        Ok(Whole { cache, dim, tensor, token_ids: Vec::new() })
    }

    fn run(&mut self, request: &Planned) -> Result<usize, kv_cache::Error> {
        let ids = request.hash_ids.iter();
        self.token_ids.clear();
        self.token_ids.extend(ids.flat_map(|id| (0..HASH_TOKENS).map(|offset| token_id(*id, offset))));
        let mut options = OpenOptions::default().prompt(&self.token_ids);
        // As the other drivers count: also the block of the last token.
        options.whole_prompt = true;
        let sequence = self.cache.open("replay", options)?;
        let found = sequence.sequence().len() as usize;
        let rest = &self.token_ids[found..];
        if !rest.is_empty() {
            let tensor = &self.tensor[..rest.len() * self.dim];
            sequence.append(rest, tensor, tensor)?;
        }
        sequence.close()?;
        Ok(found / HASH_TOKENS as usize)
    }
}

impl Driver for Whole {
    fn request(&mut self, request: &Planned) -> usize {
        self.run(request).expect("a cache that has room for the longest request serves it")
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        // Nothing is in flight: it drains at once.
        let _ = self.cache.shutdown(Duration::from_secs(10));
    }
}
