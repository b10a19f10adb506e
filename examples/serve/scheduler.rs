//! Who runs in the next step: a plain state machine without a clock, a thread or a cache, driven by what has happened.
//!
//! A job is a number of tokens, of which some are **computed** (their keys and values are in the cache). A prompt is many tokens that
//! are not computed yet, a decode is one: the same rule plans both. Jobs are in one of three places:
//!
//! ```text
//!               opened                      sampled its last token, left
//!   waiting ───────────────► running ──────────────────────────────────────► gone
//!      ▲                        │
//!      │   no room: youngest    │ its reader is behind
//!      ├────────────────────────┤
//!      │                        ▼
//!      └──────────────────── parked
//!          reader caught up
//! ```
//!
//! Whoever leaves `running` gives its sequence back to the cache, and is computed again when its turn comes. That is cheap: what it had computed
//! stays cached under its tokens until the room is needed, so that reopening finds most of it.
//!
//! Two rules keep everybody going. Jobs are ordered by arrival everywhere, and the oldest that runs is never preempted: it ends, whatever
//! the load. And the tokens of a step are counted: decodes come first, prompts share what is left in chunks, so a long prompt delays the
//! others' next token by one chunk and not by its whole length.

use std::collections::BTreeMap;

/// Names a request; later ones have larger numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RequestId(pub(crate) u64);

/// What a step may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Jobs that run at once: each has a sequence open.
    pub(crate) running_max: usize,
    /// Tokens of one step, decodes and chunks of prompts together.
    pub(crate) step_tokens: u32,
    /// Tokens of one job in one step.
    pub(crate) chunk_tokens: u32,
}

impl Limits {
    /// The limits with room for at least one chunk beside a full house of decodes: otherwise prompts would starve.
    pub(crate) fn checked(self) -> Self {
        let (running_max, chunk_tokens) = (self.running_max.max(1), self.chunk_tokens.max(1));
        let least = u32::try_from(running_max).unwrap_or(u32::MAX).saturating_add(chunk_tokens);
        Limits { running_max, chunk_tokens, step_tokens: self.step_tokens.max(least) }
    }
}

/// Consecutive tokens of one job, to be computed in the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) id: RequestId,
    /// Position of the first token.
    pub(crate) position: u32,
    pub(crate) tokens: u32,
    /// The job's last token is among them: its logits say what comes next.
    pub(crate) samples: bool,
}

/// What to do about a cache without room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// These jobs wait again, and their sequences are to be closed.
    Preempted(Vec<RequestId>),
    /// Nobody else runs: the same again, since sealing may still free some.
    Retry(RequestId),
    /// Nobody else runs, and it has been tried often enough: this job does not fit. It is gone from the scheduler.
    Hopeless(RequestId),
}

#[derive(Debug, Clone, Copy)]
struct Job {
    /// Prompt and generated tokens.
    tokens: u32,
    /// Those that are in the cache.
    computed: u32,
    /// Times in a row that there was no room for it alone.
    refused: u32,
}

/// With a step between them, sealing has long ended after so many.
const ATTEMPTS_ALONE_MAX: u32 = 8;

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    waiting: BTreeMap<RequestId, Job>,
    running: BTreeMap<RequestId, Job>,
    parked: BTreeMap<RequestId, Job>,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        let (waiting, running, parked) = Default::default();
        Scheduler { limits: limits.checked(), waiting, running, parked }
    }

    /// A request of so many prompt tokens has come.
    pub(crate) fn arrived(&mut self, id: RequestId, prompt_tokens: u32) {
        self.waiting.insert(id, Job { tokens: prompt_tokens, computed: 0, refused: 0 });
    }

    /// Whose sequence is to be opened next, and for how many tokens; none while as many run as may.
    pub(crate) fn next_to_open(&self) -> Option<(RequestId, u32)> {
        let room = self.running.len() < self.limits.running_max;
        self.waiting.first_key_value().filter(|_| room).map(|(id, job)| (*id, job.tokens))
    }

    /// Its sequence is open, and began with `cached` tokens.
    pub(crate) fn opened(&mut self, id: RequestId, cached: u32) {
        if let Some(job) = self.waiting.remove(&id) {
            // The last token is computed in any case, or there would be nothing to sample from.
            let computed = cached.min(job.tokens.saturating_sub(1));
            self.running.insert(id, Job { computed, ..job });
        }
    }

    /// There was no room to open it.
    pub(crate) fn not_opened(&mut self, id: RequestId) -> NoRoom {
        let alone = self.running.is_empty();
        let Some(job) = self.waiting.get_mut(&id).filter(|_| alone) else { return NoRoom::Retry(id) };
        job.refused += 1;
        if job.refused < ATTEMPTS_ALONE_MAX {
            return NoRoom::Retry(id);
        }
        self.waiting.remove(&id);
        NoRoom::Hopeless(id)
    }

    /// The next step: a token of everybody who decodes, and chunks of prompts, oldest first, while the budget lasts.
    pub(crate) fn plan(&self) -> Vec<Planned> {
        let mut budget = self.limits.step_tokens;
        let mut plan = Vec::new();
        let chunks = |job: &Job| job.tokens - job.computed > 1;
        let decodes = self.running.iter().filter(|(_, job)| !chunks(job));
        let prompts = self.running.iter().filter(|(_, job)| chunks(job));
        for (&id, job) in decodes.chain(prompts) {
            let left = job.tokens - job.computed;
            let tokens = left.min(self.limits.chunk_tokens).min(budget);
            if tokens > 0 {
                budget -= tokens;
                plan.push(Planned { id, position: job.computed, tokens, samples: tokens == left });
            }
        }
        plan
    }

    /// Tokens of it are in the cache now.
    pub(crate) fn computed(&mut self, id: RequestId, tokens: u32) {
        if let Some(job) = self.running.get_mut(&id) {
            job.computed = (job.computed + tokens).min(job.tokens);
            job.refused = 0;
        }
    }

    /// A token was sampled: the next one to compute.
    pub(crate) fn sampled(&mut self, id: RequestId) {
        if let Some(job) = self.running.get_mut(&id) {
            job.tokens += 1;
        }
    }

    /// The cache had no room for what these jobs have computed in the last step; they are as they were before it.
    pub(crate) fn no_room(&mut self, refused: &[RequestId]) -> NoRoom {
        let others = self.running.len().saturating_sub(1);
        if let (0, Some((&id, job))) = (others, self.running.iter_mut().next()) {
            job.refused += 1;
            if job.refused < ATTEMPTS_ALONE_MAX {
                return NoRoom::Retry(id);
            }
            self.running.remove(&id);
            return NoRoom::Hopeless(id);
        }
        // Each needs a block and each victim frees at least one. The oldest stays.
        let victims: Vec<_> = self.running.keys().rev().take(refused.len().min(others)).copied().collect();
        victims.iter().for_each(|&id| self.wait_again(id));
        NoRoom::Preempted(victims)
    }

    fn wait_again(&mut self, id: RequestId) {
        if let Some(job) = self.running.remove(&id) {
            self.waiting.insert(id, Job { computed: 0, refused: 0, ..job });
        }
    }

    /// Its reader is behind. Its sequence is to be closed.
    pub(crate) fn park(&mut self, id: RequestId) {
        if let Some(job) = self.running.remove(&id) {
            self.parked.insert(id, Job { computed: 0, refused: 0, ..job });
        }
    }

    /// Its reader has caught up: it waits for its turn.
    pub(crate) fn unpark(&mut self, id: RequestId) {
        if let Some(job) = self.parked.remove(&id) {
            self.waiting.insert(id, job);
        }
    }

    /// It has ended, or nobody waits for it any more.
    pub(crate) fn left(&mut self, id: RequestId) {
        for jobs in [&mut self.waiting, &mut self.running, &mut self.parked] {
            jobs.remove(&id);
        }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    pub(crate) fn parked(&self) -> usize {
        self.parked.len()
    }
}

#[cfg(test)]
#[path = "tests/scheduler.rs"]
mod tests;
