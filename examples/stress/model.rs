//! What one sequence must contain, kept beside it: the ids of its tokens, what follows from them, and how exactly it must read back.
//!
//! Plain data, no cache in sight. A *writer* is a number that is used once: what comes after a fork, a truncation or a cancelled write
//! has ids that nobody else has given out, so that bytes of the branch not taken are never mistaken for the right ones. The *system
//! prompts*, with which many sequences begin, are what the sequences of a tenant have in common.

use std::ops::Range;

use kv_cache::Format;

use crate::content::{self, Bound};

/// Number of the system prompts' writers.
const SYSTEM: u64 = 1 << 63;

/// The committed tokens of a sequence.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    seed: u64,
    /// What comes before the first token.
    root: u64,
    format: Format,
    block_tokens: u32,
    /// One a token.
    seeds: Vec<u64>,
    exact_from: u32,
    reencoded: u32,
}

/// Tokens that are about to be written behind the committed ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Planned {
    ids: Vec<u32>,
    /// One seed a token.
    pub(crate) seeds: Vec<u64>,
}

impl Planned {
    pub(crate) fn tokens(&self) -> u32 {
        self.seeds.len() as u32
    }

    /// Token ids that go with the content.
    pub(crate) fn token_ids(&self) -> Vec<u32> {
        self.ids.clone()
    }

    /// What is left without the first `tokens`.
    pub(crate) fn skip(&self, tokens: u32) -> Planned {
        let at = tokens as usize;
        Planned { ids: self.ids[at..].to_vec(), seeds: self.seeds[at..].to_vec() }
    }
}

impl Model {
    /// An empty sequence of a tenant. What others compute from the same ids is not equal.
    pub(crate) fn new(seed: u64, tenant: u64, format: Format, block_tokens: u32) -> Self {
        let root = content::number(seed, tenant, 0);
        Model { seed, root, format, block_tokens, seeds: Vec::new(), exact_from: 0, reencoded: 0 }
    }

    /// Committed tokens.
    pub(crate) fn len(&self) -> u32 {
        self.seeds.len() as u32
    }

    /// Decides what the next `tokens` tokens are; `fresh` is a writer that nobody has used.
    pub(crate) fn plan(&self, tokens: u32, fresh: u64) -> Planned {
        let positions = self.len()..self.len() + tokens;
        self.planned(self.written(fresh, positions).collect())
    }

    /// The beginning of a sequence: the first `shared` tokens of a system prompt, and `own` tokens of a fresh writer.
    pub(crate) fn plan_prompt(&self, system: u64, shared: u32, own: u32, fresh: u64) -> Planned {
        let shared_ids = self.written(SYSTEM | system, 0..shared);
        self.planned(shared_ids.chain(self.written(fresh, shared..shared + own)).collect())
    }

    fn written(&self, writer: u64, positions: Range<u32>) -> impl Iterator<Item = u32> + use<> {
        let seed = self.seed;
        positions.map(move |position| (content::number(seed, writer, position) >> 32) as u32)
    }

    fn planned(&self, ids: Vec<u32>) -> Planned {
        let before = self.seeds.last().copied().unwrap_or(self.root);
        Planned { seeds: content::seeds_behind(before, &ids), ids }
    }

    /// The tokens, or the first `tokens` of them, are committed.
    pub(crate) fn committed(&mut self, planned: &Planned, tokens: u32) {
        self.seeds.extend_from_slice(&planned.seeds[..tokens as usize]);
        self.reached(self.len());
    }

    /// Some layer holds tokens up to `end`: the blocks that they fill may be sealed from now on.
    pub(crate) fn reached(&mut self, end: u32) {
        self.exact_from = self.exact_from.max(end / self.block_tokens * self.block_tokens);
    }

    /// Everything from `tokens` on is gone, staged tokens included.
    pub(crate) fn truncated(&mut self, tokens: u32) {
        if tokens < self.exact_from && !tokens.is_multiple_of(self.block_tokens) {
            self.reencoded += 1;
        }
        self.seeds.truncate(tokens as usize);
        self.exact_from = self.exact_from.min(tokens);
    }

    /// Seeds of committed tokens.
    pub(crate) fn seeds(&self, range: Range<u32>) -> Vec<u64> {
        self.seeds[range.start as usize..range.end as usize].to_vec()
    }

    /// How exactly the tokens must read back.
    pub(crate) fn bound(&self) -> Bound {
        Bound { format: self.format, exact_from: self.exact_from, reencoded: self.reencoded }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_planned_follows_from_what_is_there() {
        let mut model = Model::new(1, 0, Format::Int8, 32);
        for (tokens, writer) in [(20, 1), (30, 2)] {
            let planned = model.plan(tokens, writer);
            model.committed(&planned, tokens);
        }
        let whole = model.seeds(0..50);
        assert_eq!(whole.len(), 50);
        assert_eq!(whole[10..12], model.seeds(10..12));

        let mut fork = model.clone();
        let (ours, theirs) = (model.plan(5, 3), fork.plan(5, 4));
        assert_ne!(ours.seeds, theirs.seeds);
        fork.committed(&theirs, 5);
        model.committed(&ours, 2);
        assert_eq!(model.seeds(50..52), ours.seeds[..2]);
        assert_eq!(fork.seeds(0..55)[..50], whole);
        assert_eq!(theirs.skip(2).seeds, fork.seeds(52..55));

        fork.truncated(40);
        assert_eq!((fork.len(), fork.bound().reencoded), (40, 0));
        let again = fork.plan(10, 5);
        assert_ne!(again.seeds, whole[40..50], "what was cut off does not come back");
    }

    #[test]
    fn system_prompts_are_common_to_a_tenant() {
        let model = |tenant| Model::new(1, tenant, Format::Int8, 32);
        let (a, b) = (model(0).plan_prompt(2, 40, 8, 1), model(0).plan_prompt(2, 40, 8, 2));
        assert_eq!((&a.ids[..40], &a.seeds[..40]), (&b.ids[..40], &b.seeds[..40]));
        assert!(a.ids[40..] != b.ids[40..] && a.seeds[40..] != b.seeds[40..]);
        let other = model(1).plan_prompt(2, 40, 8, 1);
        assert!(a.ids == other.ids && a.seeds[..40] != other.seeds[..40]);
        assert_ne!(a.ids[..40], model(0).plan_prompt(3, 40, 8, 1).ids[..40]);
    }

    #[test]
    fn only_full_blocks_may_be_lossy_and_reopening_one_is_counted() {
        let mut model = Model::new(1, 0, Format::Int8, 32);
        let planned = model.plan(70, 1);
        model.committed(&planned, 70);
        assert_eq!(model.bound().exact_from, 64);
        model.truncated(40);
        assert_eq!((model.bound().exact_from, model.bound().reencoded), (40, 1));
        model.truncated(32);
        assert_eq!(model.bound().reencoded, 1, "a cut between blocks opens none");
        model.reached(64);
        model.truncated(32);
        assert_eq!(model.bound().exact_from, 32);
    }
}
