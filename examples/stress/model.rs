//! What one sequence must contain, kept beside it: who wrote each token, and how exactly it must read back.
//!
//! Plain data, no cache in sight. A *writer* is a number that nobody else uses: after a fork, a truncation or a cancelled
//! write, what comes next has a new writer, so that bytes of the branch not taken are never mistaken for the right ones.

use std::ops::Range;

use kv_cache::Format;

use crate::content::{self, Bound};

/// Consecutive tokens of one writer.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u32,
    writer: u64,
}

/// The committed tokens of a sequence.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    seed: u64,
    format: Format,
    block_tokens: u32,
    runs: Vec<Run>,
    len: u32,
    /// Whether the last run's writer may go on.
    continues: bool,
    exact_from: u32,
    reencoded: u32,
}

/// Tokens that are about to be written behind the committed ones.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    writer: u64,
    /// One seed a token.
    pub(crate) seeds: Vec<u64>,
}

impl Planned {
    pub(crate) fn tokens(&self) -> u32 {
        self.seeds.len() as u32
    }

    /// Token ids that go with the content.
    pub(crate) fn token_ids(&self) -> Vec<u32> {
        self.seeds.iter().map(|seed| (seed >> 40) as u32).collect()
    }
}

impl Model {
    pub(crate) fn new(seed: u64, format: Format, block_tokens: u32) -> Self {
        let (runs, len, continues, exact_from, reencoded) = (Vec::new(), 0, false, 0, 0);
        Model { seed, format, block_tokens, runs, len, continues, exact_from, reencoded }
    }

    /// Committed tokens.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Decides what the next `tokens` tokens are; `fresh` is a writer that nobody has used.
    pub(crate) fn plan(&self, tokens: u32, fresh: u64) -> Planned {
        let writer = self.runs.last().filter(|_| self.continues).map_or(fresh, |run| run.writer);
        let positions = self.len..self.len + tokens;
        Planned { writer, seeds: positions.map(|p| content::token_seed(self.seed, writer, p)).collect() }
    }

    /// The tokens, or the first `tokens` of them, are committed.
    pub(crate) fn committed(&mut self, planned: &Planned, tokens: u32) {
        if tokens > 0 && self.runs.last().is_none_or(|run| run.writer != planned.writer) {
            self.runs.push(Run { start: self.len, writer: planned.writer });
        }
        self.len += tokens;
        self.continues = true;
        self.reached(self.len);
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
        self.len = tokens;
        self.exact_from = self.exact_from.min(tokens);
        self.runs.retain(|run| run.start < tokens);
        self.continues = false;
    }

    /// A write was cancelled, or the sequence was forked: whatever comes next is somebody else's.
    pub(crate) fn diverged(&mut self) {
        self.continues = false;
    }

    /// The model of a fork.
    pub(crate) fn fork(&mut self) -> Model {
        self.diverged();
        self.clone()
    }

    /// Seeds of committed tokens.
    pub(crate) fn seeds(&self, range: Range<u32>) -> Vec<u64> {
        let mut seeds = Vec::with_capacity(range.len());
        for (index, run) in self.runs.iter().enumerate() {
            let end = self.runs.get(index + 1).map_or(self.len, |next| next.start);
            let part = run.start.max(range.start)..end.min(range.end);
            seeds.extend(part.map(|position| content::token_seed(self.seed, run.writer, position)));
        }
        seeds
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
    fn runs_follow_appends_forks_and_truncations() {
        let mut model = Model::new(1, Format::Int8, 32);
        for (tokens, writer) in [(20, 1), (30, 2)] {
            let planned = model.plan(tokens, writer);
            model.committed(&planned, tokens);
        }
        assert_eq!(model.runs.len(), 1, "an undisturbed writer goes on");
        let whole = model.seeds(0..50);
        assert_eq!(whole.len(), 50);
        assert_eq!(whole[10..12], model.seeds(10..12));

        let mut fork = model.fork();
        let (ours, theirs) = (model.plan(5, 3), fork.plan(5, 4));
        assert_ne!(ours.seeds, theirs.seeds);
        fork.committed(&theirs, 5);
        model.committed(&ours, 2);
        assert_eq!(model.seeds(50..52), ours.seeds[..2]);
        assert_eq!(fork.seeds(0..55)[..50], whole);

        fork.truncated(40);
        assert_eq!((fork.len(), fork.runs.len(), fork.bound().reencoded), (40, 1, 0));
        let again = fork.plan(10, 5);
        assert_ne!(again.seeds, whole[40..50], "what was cut off does not come back");
    }

    #[test]
    fn only_full_blocks_may_be_lossy_and_reopening_one_is_counted() {
        let mut model = Model::new(1, Format::Int8, 32);
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
