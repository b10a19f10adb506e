//! Prefix matching at the door: from a prompt to the keys of its blocks, and to the shard that holds the longest run of them.
//!
//! It happens inline in the caller's task: hashing a long prompt takes longer than anything else that opening a sequence needs.

use crate::block::{BlockKey, KeyScheme};
use crate::index::{Lease, PrefixIndex};
use crate::sequence::{OpenOptions, Prompt};

/// What the door finds out about a prompt.
#[derive(Debug)]
pub(crate) struct Prefix {
    /// Parent key of the first block.
    pub(crate) root: BlockKey,
    /// Keys of the prompt's full blocks.
    pub(crate) keys: Vec<BlockKey>,
    /// The longest run of them that is cached on one shard, pinned. None in deterministic mode, where the shard alone looks: what a caller
    /// finds depends on how far the device has come.
    pub(crate) lease: Option<Lease>,
}

impl Prefix {
    /// The shard to be on, if one is better than others.
    pub(crate) fn shard(&self, shards: usize) -> Option<usize> {
        match &self.lease {
            Some(lease) => (lease.blocks() > 0).then_some(lease.shard() as usize),
            // Prompts that begin alike come together.
            None => self.keys.first().map(|key| usize::from(key.0[0]) % shards),
        }
    }
}

/// Blocks that a prompt may find: its last token is left out, since a model has to be run on it, unless none is.
pub(crate) fn blocks_to_match(options: &OpenOptions, prompt: &Prompt, block_tokens: usize) -> usize {
    let last = usize::from(!options.whole_prompt);
    prompt.token_ids.len().saturating_sub(last) / block_tokens
}

/// Matches prompts. Shared by every handle of a cache.
#[derive(Debug)]
pub struct Matcher {
    /// How keys are made.
    pub keys: KeyScheme,
    /// The index of each shard.
    pub indices: Vec<PrefixIndex>,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Leave the looking to the shard.
    pub deterministic: bool,
}

impl Matcher {
    /// What is cached of the prompt that a sequence is opened with. None without a prompt.
    pub(crate) fn find(&self, options: &OpenOptions) -> Option<Box<Prefix>> {
        let prompt = options.prompt.as_ref()?;
        let root = self.keys.root(options);
        let keys = self.keys.prompt(root, prompt);
        let wanted = &keys[..blocks_to_match(options, prompt, self.block_tokens)];
        let lease = (!self.deterministic).then(|| self.longest(wanted)).flatten();
        Some(Box::new(Prefix { root, keys, lease }))
    }

    fn longest(&self, keys: &[BlockKey]) -> Option<Lease> {
        let leases = self.indices.iter().map(|index| index.lease(keys));
        // The first of the longest: equal ones are rare, and all begin with few.
        leases.reduce(|best, lease| if lease.blocks() > best.blocks() { lease } else { best })
    }
}
