//! One task of the synthetic load: it owns a few sequences, does one thing after another to them, and checks each.
//!
//! A worker knows what each of its sequences must contain ([`Model`]) and compares through the public handles only.
//! An operation that fails although nothing provoked it is counted, and the sequence replaced: the load goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use kv_cache::{Cache, Error, Format, OpenOptions, Sequence, Tenant};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::content::{self, Mismatch, Shape};
use crate::model::{Model, Planned};
use crate::recorder::{Kind, Recorder};

/// Blocks that a sequence may grow to.
pub(crate) const BLOCKS_MAX: u32 = 4;
/// Tenants that the sequences are spread over.
const TENANTS: u64 = 4;
/// System prompts of each tenant's, with which half of the sequences begin.
const SYSTEM_PROMPTS: u64 = 3;
/// A block that is not sealed this long after it was filled will not be: the report shows it in the peak.
const SEAL_WAIT_MAX: Duration = Duration::from_secs(10);

/// What all workers share.
pub(crate) struct Load {
    pub(crate) cache: Cache,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) shape: Shape,
    pub(crate) format: Format,
    pub(crate) seed: u64,
    /// Tokens of the system prompts; 0: there are none.
    pub(crate) shared_prefix_tokens: u32,
}

/// How a sequence begins.
pub(crate) struct Beginning {
    model: Model,
    /// Its first tokens.
    planned: Planned,
    /// How many of them others may have computed; none if the sequence shares nothing.
    shared: Option<u32>,
}

impl Beginning {
    pub(crate) fn options(&self) -> OpenOptions {
        match self.shared {
            Some(_) => OpenOptions::default().prompt(&self.planned.token_ids()),
            None => OpenOptions::default(),
        }
    }
}

/// The tenant of this number.
pub(crate) fn tenant(number: u64) -> Tenant {
    Tenant::new(format!("tenant-{number}"))
}

/// An open sequence, and what must be in it.
pub(crate) struct Held {
    pub(crate) sequence: Sequence,
    pub(crate) model: Model,
    /// Counted among the sequences that hold a sealed block.
    pub(crate) has_sealed: bool,
}

/// Why an operation ended without its result.
pub(crate) enum Fault {
    /// The cache is full, which small `--memory-mib` provokes.
    Full,
    Error(Kind, Error),
    Mismatch(&'static str, Mismatch),
    /// A number or state that is not one of the possible ones.
    Wrong(String),
}

/// A task's state.
pub(crate) struct Worker {
    pub(crate) load: Arc<Load>,
    pub(crate) index: u64,
    pub(crate) rng: SmallRng,
    /// Writers that this worker has made up so far.
    pub(crate) writers: u64,
    /// Empty where a sequence was given up and not yet replaced.
    pub(crate) slots: Vec<Option<Held>>,
}

impl Worker {
    /// Worker number `index`, which will hold `sequences` sequences.
    pub(crate) fn new(load: Arc<Load>, index: u64, sequences: usize) -> Self {
        let rng = SmallRng::seed_from_u64(content::number(load.seed, index, u32::MAX));
        Worker { load, index, rng, writers: 0, slots: (0..sequences).map(|_| None).collect() }
    }

    /// Opens every sequence with at least one full block, and waits until each has one sealed.
    pub(crate) async fn fill(&mut self, stop: impl Fn() -> bool) {
        for slot in 0..self.slots.len() {
            if stop() {
                return;
            }
            self.reopen(slot).await;
        }
        let deadline = Instant::now() + SEAL_WAIT_MAX;
        while !stop() && Instant::now() < deadline && !self.note_sealed_all() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// One random thing to one random sequence.
    pub(crate) async fn step(&mut self) {
        if self.rng.random_bool(0.03) {
            return self.append_each().await;
        }
        let slot = self.rng.random_range(0..self.slots.len());
        let Some(mut held) = self.slots[slot].take() else { return self.reopen(slot).await };
        let outcome = match self.rng.random_range(0..100) {
            0..42 => self.append(&mut held).await,
            42..54 => self.append_staged(&mut held).await,
            54..71 => self.read(&held).await,
            71..74 => self.change_tier(&held).await,
            74..78 => self.view(&mut held).await,
            78..82 => self.fork(slot, &held).await,
            82..88 => self.truncate(&mut held).await,
            88..92 => {
                self.leave(held).await;
                return self.reopen(slot).await;
            }
            _ => self.cancel(&mut held).await,
        };
        match outcome {
            Ok(()) => self.keep(slot, held),
            Err(fault) => self.recover(held, fault).await,
        }
    }

    /// Closes the sequences, each after a last look.
    pub(crate) async fn finish(mut self) {
        for held in std::mem::take(&mut self.slots).into_iter().flatten() {
            self.leave(held).await;
        }
    }

    /// Reads every token of every layer once more, then closes the sequence.
    pub(crate) async fn leave(&self, held: Held) {
        match self.check_all(&held).await {
            Ok(()) => self.close(held),
            Err(fault) => self.recover(held, fault).await,
        }
    }

    // ---- opening, closing, replacing ----

    pub(crate) fn tenant(&mut self) -> u64 {
        self.rng.random_range(0..TENANTS)
    }

    /// At least one full block: half of the sequences with a system prompt before it, and a few that share without one.
    pub(crate) fn beginning(&mut self, tenant: u64) -> Beginning {
        let Load { seed, format, shape, shared_prefix_tokens, .. } = *self.load;
        let block = shape.block_tokens;
        let own = self.rng.random_range(block..2 * block);
        let shared = match self.rng.random_range(0..8) {
            _ if shared_prefix_tokens == 0 => None,
            0..4 => Some(shared_prefix_tokens),
            4 => Some(0),
            _ => None,
        };
        let model = Model::new(seed, tenant, format, block);
        let (system, writer) = (self.rng.random_range(0..SYSTEM_PROMPTS), self.fresh_writer());
        let planned = model.plan_prompt(system, shared.unwrap_or(0), own, writer);
        Beginning { model, planned, shared }
    }

    /// A new sequence with at least one full block, in an empty slot.
    async fn reopen(&mut self, slot: usize) {
        let number = self.tenant();
        let beginning = self.beginning(number);
        let opened = self.timed(Kind::Open, self.load.cache.open(tenant(number), beginning.options())).await;
        let sequence = match opened {
            Ok(sequence) => sequence,
            Err(fault) => {
                self.count(None, fault);
                return pause().await;
            }
        };
        let mut held = self.opened(sequence, beginning.model);
        match self.begin(&mut held, &beginning.planned, beginning.shared.unwrap_or(0)).await {
            Ok(()) => self.keep(slot, held),
            Err(fault) => self.recover(held, fault).await,
        }
    }

    /// Looks at what a new sequence has found of its first tokens, and computes the rest. Others have computed the first `shared` at most.
    async fn begin(&mut self, held: &mut Held, planned: &Planned, shared: u32) -> Result<(), Fault> {
        let found = held.sequence.len();
        // Of raw blocks also a part may be taken over.
        let whole = found.is_multiple_of(self.load.shape.block_tokens) || self.load.format == Format::Raw;
        if found > shared || !whole {
            return Err(Fault::Wrong(format!("{found} tokens of a prompt found; {shared} are shared")));
        }
        held.model.committed(planned, found);
        if found > 0 {
            let layer = self.rng.random_range(0..self.load.shape.layers);
            self.read_and_check("a prefix that was found", held, layer, 0..found).await?;
        }
        self.append_planned(held, &planned.skip(found)).await
    }

    pub(crate) fn opened(&self, sequence: Sequence, model: Model) -> Held {
        self.load.recorder.sequence_opened();
        Held { sequence, model, has_sealed: false }
    }

    pub(crate) fn keep(&mut self, slot: usize, mut held: Held) {
        self.note_sealed(&mut held);
        // A fork of this very step may have taken a slot, but never the one that its parent came from.
        self.slots[slot] = Some(held);
    }

    pub(crate) fn close(&self, held: Held) {
        if held.has_sealed {
            self.load.recorder.sealed_lost();
        }
        self.load.recorder.sequence_closed();
        drop(held);
    }

    /// Counts what went wrong and gives up the sequence; its slot is filled again when its turn comes.
    pub(crate) async fn recover(&self, held: Held, fault: Fault) {
        self.count(Some(&held), fault);
        self.close(held);
        pause().await;
    }

    fn count(&self, held: Option<&Held>, fault: Fault) {
        let (recorder, worker) = (&self.load.recorder, self.index);
        let sequence = || match held {
            Some(held) => format!("{} of {} tokens", held.sequence.id(), held.model.len()),
            None => "no sequence".into(),
        };
        match fault {
            Fault::Full => {
                recorder.backpressure.fetch_add(1, Relaxed);
            }
            Fault::Error(kind, error) => {
                recorder
                    .error(|| format!("worker {worker}, {}: {} failed: {error}", sequence(), kind.name()));
            }
            Fault::Mismatch(what, mismatch) => {
                recorder.mismatch(|| format!("worker {worker}, {}: {what}: {mismatch}", sequence()));
            }
            Fault::Wrong(message) => {
                recorder.mismatch(|| format!("worker {worker}, {}: {message}", sequence()))
            }
        }
    }

    fn note_sealed(&self, held: &mut Held) {
        if !held.has_sealed
            && held.model.len() >= self.load.shape.block_tokens
            && held.sequence.info().sealed_blocks > 0
        {
            held.has_sealed = true;
            self.load.recorder.sealed_gained();
        }
    }

    /// Whether every sequence of this worker holds a sealed block.
    fn note_sealed_all(&mut self) -> bool {
        let mut slots = std::mem::take(&mut self.slots);
        slots.iter_mut().flatten().for_each(|held| self.note_sealed(held));
        self.slots = slots;
        self.slots.iter().flatten().all(|held| held.has_sealed)
    }
}

impl Fault {
    pub(crate) fn of(kind: Kind, error: Error) -> Self {
        match error {
            Error::Capacity { .. } | Error::TierFull { .. } => Fault::Full,
            error => Fault::Error(kind, error),
        }
    }
}

/// A number that the cache returned is the one that it must be.
pub(crate) fn expect(what: &str, expected: u32, got: u32) -> Result<(), Fault> {
    if expected == got { Ok(()) } else { Err(Fault::Wrong(format!("{got} {what}, {expected} expected"))) }
}

/// After something went wrong: a worker whose every operation fails at once must not keep others from running.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}
