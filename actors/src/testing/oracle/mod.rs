//! The oracle: random operations on a core, any legal order of everything, every answer checked against the model.
//!
//! One [`run`] is one cache from beginning to end: random settings, a few thousand operations, then everything is read back,
//! closed, and nothing may be left. A seed is a run; runs are short, so a failing seed is quickly looked into:
//!
//! ```text
//! KV_SEED=<seed> cargo test -p kv-cache-actors --test oracle
//! ```
//!
//! With `KV_TRACE` set as well it tells of every operation.
//!
//! Answers of one submission come together, so an answer may overtake an older one: the model therefore keeps a queue per
//! sequence and looks at an operation once all those before it are answered.

mod checks;
mod generate;
mod report;
mod views;

use std::collections::VecDeque;

pub use self::report::Report;
use self::views::View;
use super::Rng;
use super::model::{ModelSequence, Op, Rules};
use super::rig::{Rig, Ticket};
use super::scenario::Setup;
use super::sim::LANES;
use crate::batch::{BatchCacheOperations, Outcome, Results};
use crate::block::BlockKey;
use crate::error::Error;
use crate::sequence::{OpenSequence, SequenceId};

/// Which faults a run injects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// None.
    None,
    /// Launches fail, before or in the middle of a step.
    FailedLaunches,
    /// As above, and at some moment the device is lost for good.
    LostDevice,
}

/// Says which seed it was if a run panics.
struct Announce<'a>(u64, &'a Setup, Faults);

impl Drop for Announce<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("\nKV_SEED={} fails; faults {:?}, {:#?}", self.0, self.2, self.1);
        }
    }
}

/// One cache from beginning to end, in about `operations` operations.
///
/// # Panics
/// If anything is wrong.
pub fn run(seed: u64, operations: u64, faults: Faults) -> Report {
    let mut rng = Rng::new(seed);
    let setup = Setup::random(&mut rng);
    let _announce = Announce(seed, &setup, faults);
    let mut oracle = Oracle::new(&setup, rng, faults);
    let loss_at = match faults {
        Faults::LostDevice => oracle.rng.below(operations as usize) as u64,
        _ => u64::MAX,
    };
    while oracle.report.operations < operations {
        oracle.tick();
        if oracle.report.operations >= loss_at {
            oracle.lose_device();
            return oracle.finish();
        }
    }
    oracle.wind_down();
    oracle.finish()
}

/// A sequence that the oracle has the handle of.
struct Tracked {
    id: SequenceId,
    handle: Option<OpenSequence>,
    tenant: u32,
    /// Parent key of its first block, if it shares.
    root: Option<BlockKey>,
    /// What it and others are made of, if it shares.
    document: Option<Document>,
    /// None while a fork before it in its parent's queue is not looked at yet.
    model: Option<ModelSequence>,
    queue: VecDeque<Queued>,
    /// What was asked of it came to an end that nobody saw: only closing is left.
    doomed: bool,
    /// A close is on its way.
    closing: bool,
    /// Where it will be if all goes well: committed tokens, and up to where each layer is staged.
    guess: Guess,
}

#[derive(Debug, Clone, Default)]
struct Guess {
    committed: u32,
    layers: Vec<u32>,
}

/// Tokens that several sequences are made of. Documents begin alike and go apart somewhere.
#[derive(Debug, Clone, Copy)]
struct Document {
    number: u32,
    /// The first token that is its own.
    own_from: u32,
}

impl Document {
    /// Stamps of all documents; those of other tokens come after.
    const STAMPS: u64 = 1 << 24;
    const TOKENS: u32 = 1 << 16;

    /// The stamp of its token `at`. They follow each other, but where its own begin.
    fn stamp(self, at: u32) -> u64 {
        let number = if at < self.own_from { 0 } else { self.number };
        u64::from(number * Self::TOKENS + at)
    }

    /// How many of `tokens` tokens from `at` on have stamps that follow each other.
    fn in_a_row(self, at: u32, tokens: u32) -> u32 {
        if at < self.own_from { tokens.min(self.own_from - at) } else { tokens }
    }
}

/// An operation whose answer was not looked at yet.
struct Queued {
    ticket: Ticket,
    index: usize,
    op: Op,
    /// Submitted for a tenant whose sequence it is not.
    foreign: bool,
    answer: Option<Result<Outcome, Error>>,
    /// Nobody waits for the answer (a dropped handle).
    unanswered: bool,
    /// Forks, by entry; an entry may have been given to another since.
    children: Vec<(usize, SequenceId)>,
}

impl Queued {
    /// The operation at `index` of a batch that is not submitted yet.
    fn new(index: usize, op: Op, foreign: bool) -> Queued {
        let (ticket, children) = (Ticket(usize::MAX), Vec::new());
        Queued { ticket, index, op, foreign, answer: None, unanswered: false, children }
    }
}

/// What an operation of a submission was.
enum Asked {
    Open {
        tenant: u32,
        reserved_tokens: u32,
        root: Option<BlockKey>,
        document: Option<Document>,
        prompt_tokens: u32,
    },
    On(usize, SequenceId),
    /// Nobody finds some blocks any more.
    Invalidate,
    /// Its answer does not depend on any sequence.
    Refused(Error),
}

struct Submitted {
    ticket: Ticket,
    asked: Vec<Asked>,
}

struct Oracle {
    rig: Rig,
    rules: Rules,
    rng: Rng,
    faults: Faults,
    tracked: Vec<Option<Tracked>>,
    vacant: Vec<usize>,
    /// Sequences that may be chosen.
    alive: Vec<usize>,
    closed_ids: Vec<SequenceId>,
    submitted: Vec<Submitted>,
    views: Vec<View>,
    next_stamp: u64,
    outstanding_max: usize,
    sequences_max: usize,
    /// Tells of every operation as the model looks at it.
    trace: bool,
    report: Report,
}

impl Oracle {
    fn new(setup: &Setup, mut rng: Rng, faults: Faults) -> Self {
        let rig = Rig::new(setup);
        let config = rig.config();
        let rules = Rules {
            host_slots: config.pool.host_slots,
            layout: config.layout,
            format: config.formats.sealed(),
            max_tokens: config.max_tokens,
            max_total_tokens: setup.max_total_tokens,
            dropping: config.dropping,
            faults: faults != Faults::None,
            keys: config.keys.clone(),
        };
        let outstanding_max = rng.pick(&[1, 4, 8, 16]);
        let sequences_max = setup.sequences;
        Oracle {
            rig,
            rules,
            rng,
            faults,
            tracked: Vec::new(),
            vacant: Vec::new(),
            alive: Vec::new(),
            closed_ids: Vec::new(),
            submitted: Vec::new(),
            views: Vec::new(),
            next_stamp: Document::STAMPS,
            outstanding_max,
            sequences_max,
            trace: std::env::var_os("KV_TRACE").is_some(),
            report: Report { runs: 1, ..Report::default() },
        }
    }

    /// Something happens.
    fn tick(&mut self) {
        match self.rng.below(32) {
            0..9 if self.submitted.len() < self.outstanding_max => self.submit(),
            9 => self.close_dropped(),
            10 => self.seal(),
            11 => self.look(),
            12..18 => self.rig.flush(),
            18 if self.rng.one_in(4) => self.check_something(),
            19 if self.rng.one_in(32) => self.drop_handle(),
            _ => self.lanes(),
        }
        self.collect();
    }

    /// A lane takes a few steps, or reports.
    fn lanes(&mut self) {
        let lane = self.rng.pick(&LANES);
        let (running, finished) = self.rig.device.depth(lane);
        if self.faults != Faults::None && running > 0 && self.rng.one_in(64) {
            let half_way = self.rng.one_in(2);
            self.rig.device.fail(lane, half_way);
            self.report.failed_launches += 1;
            return;
        }
        if finished > 0 && (running == 0 || self.rng.one_in(2)) {
            self.rig.report(lane);
        } else if running > 0 {
            for _ in 0..self.rng.between(1, 6) {
                self.rig.device.advance(lane);
            }
        }
    }

    /// Looks at the answers that have come.
    fn collect(&mut self) {
        if !self.rig.answered() {
            return;
        }
        let mut at = 0;
        while at < self.submitted.len() {
            match self.rig.take(self.submitted[at].ticket) {
                None => at += 1,
                Some(Err(error)) => panic!("a reply was dropped: {error:?}"),
                Some(Ok(results)) => {
                    let submitted = self.submitted.swap_remove(at);
                    self.receive(submitted, results);
                }
            }
        }
    }

    fn receive(&mut self, submitted: Submitted, results: Results) {
        let Submitted { ticket, asked } = submitted;
        assert_eq!(asked.len(), results.len(), "one result per operation");
        for (index, (asked, answer)) in asked.into_iter().zip(results).enumerate() {
            match asked {
                Asked::Refused(expected) => match answer {
                    Err(error) if error == expected => self.report.refused += 1,
                    other => panic!("{expected:?} expected, not {other:?}"),
                },
                Asked::Open { tenant, reserved_tokens, root, document, prompt_tokens } => match answer {
                    Ok(Outcome::Opened(handle)) => {
                        let mut model = ModelSequence::new(&self.rules, handle.id(), tenant, reserved_tokens);
                        let found = handle.shared().committed();
                        let block_tokens = self.rules.layout.block_tokens as u32;
                        let whole = found.is_multiple_of(block_tokens) || self.rules.format.is_raw();
                        assert!(found == 0 || found < prompt_tokens && whole);
                        if let Some(document) = document {
                            model.found(
                                &self.rules,
                                &(0..found).map(|at| document.stamp(at)).collect::<Vec<_>>(),
                            );
                        }
                        self.track(handle, tenant, root, document, Some(model));
                        self.report.prefix_tokens += u64::from(found);
                        self.report.checked += 1;
                    }
                    Err(Error::TenantQuota { needed_bytes, used_bytes, quota_bytes })
                        if used_bytes + needed_bytes > quota_bytes =>
                    {
                        self.report.refused += 1;
                    }
                    Err(Error::TooManyTokens { .. }) if self.rules.max_total_tokens < u64::MAX => {
                        self.report.refused += 1;
                    }
                    Err(Error::Capacity { needed, free, .. }) if needed > free => self.report.refused += 1,
                    other => panic!("a wrong answer to an open: {other:?}"),
                },
                Asked::Invalidate => match answer {
                    Ok(Outcome::Invalidated { .. }) => self.report.checked += 1,
                    other => panic!("a wrong answer to an invalidation: {other:?}"),
                },
                Asked::On(at, id) => self.answer(at, id, ticket, index, answer),
            }
        }
    }

    fn track(
        &mut self,
        handle: OpenSequence,
        tenant: u32,
        root: Option<BlockKey>,
        document: Option<Document>,
        model: Option<ModelSequence>,
    ) -> usize {
        let committed = model.as_ref().map_or(0, ModelSequence::committed);
        let tracked = Tracked {
            id: handle.id(),
            handle: Some(handle),
            tenant,
            root,
            document,
            model,
            queue: VecDeque::new(),
            doomed: false,
            closing: false,
            guess: Guess { committed, layers: vec![committed; self.rules.layout.layers] },
        };
        let at = self.vacant.pop().unwrap_or_else(|| {
            self.tracked.push(None);
            self.tracked.len() - 1
        });
        self.tracked[at] = Some(tracked);
        self.alive.push(at);
        at
    }

    fn tracked(&mut self, at: usize) -> &mut Tracked {
        self.tracked[at].as_mut().expect("it has operations under way")
    }

    /// The answer to an operation on a sequence.
    fn answer(
        &mut self,
        at: usize,
        id: SequenceId,
        ticket: Ticket,
        index: usize,
        answer: Result<Outcome, Error>,
    ) {
        // It may have been given up, and its entry be another's by now.
        let Some(tracked) = self.tracked[at].as_mut().filter(|tracked| tracked.id == id) else { return };
        let (tenant, root, document) = (tracked.tenant, tracked.root, tracked.document);
        // Tickets are used again, but only once they were answered.
        let is_it = |q: &Queued| (q.ticket, q.index) == (ticket, index) && q.answer.is_none();
        let Some(place) = tracked.queue.iter().position(is_it) else {
            assert!(tracked.doomed, "an operation was answered twice");
            return;
        };
        let mut answer = answer;
        // Handles are kept from now on; what the forks hold is known once the model gets there.
        let handles = match &mut answer {
            Ok(Outcome::Forked(handles)) => std::mem::take(handles),
            _ => Vec::new(),
        };
        let queued = &mut tracked.queue[place];
        if let (Op::Fork { count }, Ok(_)) = (&queued.op, &answer) {
            assert_eq!(handles.len(), *count as usize, "as many forks as asked for");
        }
        queued.answer = Some(answer);
        for handle in handles {
            let child = (handle.id(), self.track(handle, tenant, root, document, None));
            self.tracked(at).queue[place].children.push((child.1, child.0));
        }
        self.advance(at);
    }

    /// Lets the model follow as far as answers are there.
    fn advance(&mut self, at: usize) {
        loop {
            let Some(tracked) = &mut self.tracked[at] else { return };
            let Some(model) = &mut tracked.model else { return };
            let Some(front) = tracked.queue.front() else {
                tracked.guess.committed = model.committed();
                for (layer, guess) in tracked.guess.layers.iter_mut().enumerate() {
                    *guess = model.visible(layer);
                }
                if model.is_closed() {
                    self.retire(at);
                }
                return;
            };
            if front.answer.is_none() && !front.unanswered {
                return;
            }
            let Some(queued) = tracked.queue.pop_front() else { return };
            let answer = queued.answer.unwrap_or(Ok(Outcome::Closed));
            if queued.unanswered {
                if !model.is_closed() {
                    model.check(&self.rules, &queued.op, &answer).expect("closing works");
                }
                continue;
            }
            if queued.foreign {
                let refused = matches!(&answer, Err(Error::TenantMismatch(id) | Error::ClosedSequence(id)) if *id == tracked.id);
                assert!(refused, "another tenant's {:?} was answered with {answer:?}", queued.op);
                self.report.refused += 1;
                continue;
            }
            if self.trace {
                eprintln!("{}: {:?} -> {answer:?}", tracked.id, queued.op);
            }
            if let Err(error) = model.check(&self.rules, &queued.op, &answer) {
                panic!("{error}\nthe answer was {answer:?}");
            }
            match &answer {
                Ok(Outcome::Read(_)) => {
                    if let Op::Read { tokens, .. } = &queued.op {
                        self.report.tokens_read += tokens.len() as u64;
                    }
                    self.report.checked += 1;
                }
                Ok(_) => self.report.checked += 1,
                Err(_) => self.report.refused += 1,
            }
            let parent = (!queued.children.is_empty()).then(|| model.clone());
            for (child, id) in queued.children {
                let tracked = self.tracked[child].as_mut().filter(|tracked| tracked.id == id);
                if let (Some(parent), Some(tracked)) = (&parent, tracked) {
                    tracked.model = Some(parent.fork(&self.rules, id));
                    self.advance(child);
                }
            }
        }
    }

    /// A sequence is closed and all is said.
    fn retire(&mut self, at: usize) {
        let Some(tracked) = self.tracked[at].take() else { return };
        self.alive.retain(|alive| *alive != at);
        self.vacant.push(at);
        if tracked.doomed {
            // Its close may still wait for what was under way.
            return;
        }
        if self.closed_ids.len() >= 8 {
            let victim = self.rng.below(8);
            self.closed_ids.swap_remove(victim);
        }
        self.closed_ids.push(tracked.id);
        // Its handle goes with it, and closes once more: nobody hears of it.
    }

    /// Submits the closes of dropped handles.
    fn close_dropped(&mut self) {
        for id in self.rig.dropped_handles() {
            let mut batch = BatchCacheOperations::new();
            batch.close(id);
            let at = self
                .alive
                .iter()
                .copied()
                .find(|at| self.tracked[*at].as_ref().is_some_and(|tracked| tracked.id == id));
            if let Some(at) = at {
                let tracked = self.tracked(at);
                tracked.closing = true;
                tracked.queue.push_back(Queued {
                    ticket: Ticket(usize::MAX),
                    index: 0,
                    op: Op::Close,
                    foreign: false,
                    answer: None,
                    unanswered: true,
                    children: Vec::new(),
                });
            }
            self.rig.submit_for_nobody(batch);
            if let Some(at) = at {
                match self.tracked(at).doomed {
                    true => self.retire(at),
                    false => self.advance(at),
                }
            }
        }
    }

    fn finish(mut self) -> Report {
        let counts = self.rig.device.counts();
        self.report.launches = counts.launches;
        self.report
    }
}
