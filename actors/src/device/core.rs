//! What a device actor decides: a plain state machine over sequences, blocks and slots.
//!
//! Submissions and finished launches come in through [`DeviceCore::apply`]; launches and answers go out through
//! [`Effects`]. It owns no thread, clock, channel or device, so a seeded scheduler can drive it through every legal order of
//! messages, completions and faults.
//!
//! The rule that keeps it simple: **a sequence has at most one operation in flight**; later ones wait in the sequence's own
//! queue. Everything else (blocks shared by forks, slots read by views, seals in the background) is settled by reference
//! counts and pins, never by waiting.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;

use super::blocks::BlockStore;
use super::plan::SequenceEntry;
use crate::batch::{BatchCacheOperations, Operation, Outcome, Payload, Results};
use crate::block::{BlockId, BlockKey, HashSecret};
use crate::error::Error;
use crate::format::Format;
use crate::geometry::{BlockLayout, Geometry};
use crate::memory::{Flight, LaneKind, Launch, Purpose, ReadBuffer};
use crate::permit::Permit;
use crate::pool::{Pool, PoolLayout};
use crate::reply::ReplyTo;
use crate::sequence::{CloseHook, SequenceId, SequenceShared, Tenant};
use crate::stats::CoreCounters;
use crate::tokens::TokenBudget;

/// What a device core needs to know.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Number of the shard.
    pub shard: u16,
    /// What is cached.
    pub geometry: Geometry,
    /// The bytes of a block, from the geometry.
    pub layout: BlockLayout,
    /// How the slab is cut.
    pub pool: PoolLayout,
    /// Format of sealed blocks.
    pub sealed_format: Format,
    /// Longest sequence.
    pub max_tokens: u32,
    /// Tokens of all sequences of the cache.
    pub token_budget: TokenBudget,
    /// Appends and reads of at least this many bytes go over a copy lane.
    pub copy_lane_min_bytes: usize,
    /// Blocks sealed in one launch: what a small operation may have to wait behind.
    pub seals_per_launch: usize,
    /// One operation at a time, sealed before the next: the same submissions give the same bytes and places.
    pub deterministic: bool,
    /// Share of a sequence's tokens that is kept, if token dropping is on.
    pub keep_ratio: Option<f32>,
    /// Secret of the block keys.
    pub secret: HashSecret,
}

/// A submission, or the part of one that runs on this shard.
#[derive(Debug)]
pub struct ShardSubmission {
    pub(crate) batch: BatchCacheOperations,
    pub(crate) payload: Arc<Payload>,
    pub(crate) permit: Option<Permit>,
    pub(crate) reply: ReplyTo,
    /// When it was submitted; the core only carries it.
    pub(crate) submitted_at: Option<std::time::Instant>,
}

/// What comes into the core.
#[derive(Debug)]
// Boxing the large variant would cost the device thread an allocation per submission.
#[allow(clippy::large_enum_variant)]
pub enum Event {
    /// Operations to carry out.
    Submission(ShardSubmission),
    /// A lane has finished a launch, or failed it.
    Launched(Launch),
    /// Time to seal full blocks.
    Seal,
}

/// What the core wants done.
#[derive(Debug, Default)]
pub struct Effects {
    /// Work for the lanes, in order for each lane.
    pub launches: Vec<(LaneKind, Launch)>,
    /// Submissions that are complete.
    pub answers: Vec<Completed>,
    /// Sequences that have opened.
    pub opened: Vec<Arc<SequenceShared>>,
    /// Sequences that have closed.
    pub closed: Vec<SequenceId>,
}

/// A complete submission.
#[derive(Debug)]
pub struct Completed {
    reply: ReplyTo,
    results: Results,
    permit: Option<Permit>,
    /// When it was submitted.
    pub submitted_at: Option<std::time::Instant>,
}

impl Completed {
    /// Gives the permit back, then answers: whoever has the answer finds the permit free.
    pub fn send(self) {
        drop(self.permit);
        self.reply.send(self.results);
    }
}

/// A submission some of whose operations are not answered yet.
#[derive(Debug)]
struct Pending {
    operations: SmallVec<[Option<Operation>; 1]>,
    results: SmallVec<[Option<Result<Outcome, Error>>; 1]>,
    unanswered: usize,
    tenant: Option<Tenant>,
    token_ids: SmallVec<[u32; 8]>,
    payload: Arc<Payload>,
    permit: Option<Permit>,
    reply: ReplyTo,
    submitted_at: Option<std::time::Instant>,
}

/// One operation of a pending submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpRef {
    pub(super) submission: usize,
    pub(super) index: usize,
}

/// The state machine of one shard.
#[derive(Debug)]
pub struct DeviceCore {
    pub(super) config: CoreConfig,
    pub(super) blocks: BlockStore,
    pub(super) sequences: Slab<SequenceEntry>,
    /// Generation of the next sequence at each table entry.
    generations: Vec<u32>,
    tenants: HashMap<Tenant, u32>,
    pending: Slab<Pending>,
    /// Operations not looked at yet, in submission order.
    ready: VecDeque<OpRef>,
    building: [Option<Launch>; 3],
    spare: Vec<Launch>,
    in_flight: usize,
    pub(super) counters: CoreCounters,
    on_drop: DebugHook,
}

/// A [`CloseHook`] that prints as nothing.
pub(super) struct DebugHook(pub(super) CloseHook);

impl std::fmt::Debug for DebugHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// What became of an operation that was looked at.
pub(super) enum Progress {
    /// It is answered.
    Done(Result<Outcome, Error>),
    /// Steps for it are in a launch.
    Flying,
}

impl DeviceCore {
    /// An empty shard. `on_drop` is what the sequences that it opens do when their handle is dropped.
    pub fn new(config: CoreConfig, on_drop: CloseHook) -> Self {
        let pool = Pool::new(config.pool);
        DeviceCore {
            blocks: BlockStore::new(pool, config.layout, config.sealed_format),
            sequences: Slab::new(),
            generations: Vec::new(),
            tenants: HashMap::new(),
            pending: Slab::new(),
            ready: VecDeque::new(),
            building: [None, None, None],
            spare: Vec::new(),
            in_flight: 0,
            counters: CoreCounters::default(),
            on_drop: DebugHook(on_drop),
            config,
        }
    }

    /// Blocks and slots.
    pub fn blocks(&self) -> &BlockStore {
        &self.blocks
    }

    /// Counters, with the gauges brought up to date.
    pub fn counters(&mut self) -> &CoreCounters {
        self.counters.sequences = self.sequences.len() as u64;
        self.blocks.gauges(&mut self.counters);
        &self.counters
    }

    /// Whether full blocks wait to be sealed and could be now.
    pub fn wants_to_seal(&self) -> bool {
        self.blocks.wants_to_seal()
    }

    /// Launches that lanes have not finished.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes one event. Call [`DeviceCore::flush`] after a run of them: operations that come together share launches.
    pub fn apply(&mut self, event: Event, effects: &mut Effects) {
        match event {
            Event::Submission(submission) => self.accept(submission),
            Event::Launched(launch) => self.land(launch, effects),
            Event::Seal => self.seal_some(),
        }
        self.pump(effects);
    }

    /// Hands the launches built so far over to the effects.
    pub fn flush(&mut self, effects: &mut Effects) {
        for (slot, lane) in
            self.building.iter_mut().zip([LaneKind::Compute, LaneKind::Upload, LaneKind::Download])
        {
            if let Some(launch) = slot.take() {
                self.in_flight += 1;
                self.counters.launches += 1;
                effects.launches.push((lane, launch));
            }
        }
    }

    fn accept(&mut self, submission: ShardSubmission) {
        let ShardSubmission { mut batch, payload, permit, reply, submitted_at } = submission;
        let operations: SmallVec<[_; 1]> = batch.operations.drain(..).map(Some).collect();
        let count = operations.len();
        let pending = Pending {
            results: std::iter::repeat_with(|| None).take(count).collect(),
            unanswered: count,
            tenant: batch.tenant().cloned(),
            token_ids: std::mem::take(&mut batch.token_ids),
            operations,
            payload,
            permit,
            reply,
            submitted_at,
        };
        let submission = self.pending.insert(pending);
        self.counters.operations += count as u64;
        self.ready.extend((0..count).map(|index| OpRef { submission, index }));
    }

    /// Starts what can be started.
    fn pump(&mut self, effects: &mut Effects) {
        while let Some(&op) = self.ready.front() {
            if self.config.deterministic {
                if !self.is_quiet() {
                    return;
                }
                // Blocks are sealed before the next operation looks.
                self.seal_some();
                if !self.is_quiet() {
                    return;
                }
            }
            self.ready.pop_front();
            let id = self.pending[op.submission].operations[op.index].as_ref().and_then(Operation::sequence);
            match id.map(|id| self.find(id, op)) {
                // An operation on no sequence.
                None => self.start(op, None, effects),
                Some(Err(error)) => self.answer(op, Err(error), effects),
                Some(Ok(index)) => {
                    let sequence = &mut self.sequences[index];
                    if sequence.busy {
                        sequence.parked.push_back(op);
                    } else {
                        self.start(op, Some(index), effects);
                    }
                }
            }
        }
    }

    /// Nothing in flight and nothing about to be.
    fn is_quiet(&self) -> bool {
        self.in_flight == 0 && self.building.iter().all(Option::is_none)
    }

    /// The table entry of a sequence that `op` may work on.
    fn find(&self, id: SequenceId, op: OpRef) -> Result<usize, Error> {
        let index = id.index();
        match self.sequences.get(index) {
            Some(entry) if entry.shared.id() == id => match &self.pending[op.submission].tenant {
                Some(tenant) if tenant != entry.shared.tenant() => Err(Error::TenantMismatch(id)),
                _ => Ok(index),
            },
            _ if self.generations.get(index).is_some_and(|&next| id.generation() < next) => {
                Err(Error::ClosedSequence(id))
            }
            _ => Err(Error::UnknownSequence(id)),
        }
    }

    fn start(&mut self, op: OpRef, sequence: Option<usize>, effects: &mut Effects) {
        let pending = &mut self.pending[op.submission];
        let Some(operation) = pending.operations[op.index].take() else { return };
        // Launched operations need their token ids again when they land; they go back to their place below.
        let progress = match (operation, sequence) {
            (Operation::Refused(error), _) => Progress::Done(Err(error)),
            (Operation::Open { options, permit }, _) => Progress::Done(self.open(*options, permit, effects)),
            (Operation::Append { sequence: id, at, ids, extra, tensors }, Some(index)) => {
                let progress = self.plan_append(op, index, at, ids.len() as u32, &tensors);
                let again = Operation::Append { sequence: id, at, ids, extra, tensors };
                self.pending[op.submission].operations[op.index] = Some(again);
                progress
            }
            (Operation::Stage { sequence: id, layer, tokens, tensors }, Some(index)) => {
                let progress = self.plan_stage(op, index, layer, tokens, &tensors);
                let again = Operation::Stage { sequence: id, layer, tokens, tensors };
                self.pending[op.submission].operations[op.index] = Some(again);
                progress
            }
            (Operation::Commit { ids, extra, .. }, Some(index)) => {
                let token_ids = SmallVec::<[u32; 8]>::from_slice(&pending.token_ids[ids]);
                Progress::Done(self.commit_staged(index, &token_ids, extra.as_deref().copied()))
            }
            (Operation::Read { sequence: id, layer, tokens, buffer }, Some(index)) => {
                let progress = self.plan_read(op, index, layer, &tokens, buffer);
                let again = Operation::Read { sequence: id, layer, tokens, buffer: None };
                self.pending[op.submission].operations[op.index] = Some(again);
                progress
            }
            (Operation::Fork { count, permit, .. }, Some(index)) => {
                Progress::Done(self.fork(index, count, permit, effects))
            }
            (Operation::Truncate { tokens, .. }, Some(index)) => Progress::Done(self.truncate(index, tokens)),
            (Operation::Close { sequence: id }, Some(index)) => {
                for parked in self.close(index, effects) {
                    self.answer(parked, Err(Error::ClosedSequence(id)), effects);
                }
                Progress::Done(Ok(Outcome::Closed))
            }
            // `find` has answered every operation whose sequence does not exist.
            (_, None) => return,
        };
        match progress {
            Progress::Done(result) => self.answer(op, result, effects),
            Progress::Flying => {
                if let Some(index) = sequence {
                    self.sequences[index].busy = true;
                }
            }
        }
    }

    /// Answers one operation, and its submission with the last.
    fn answer(&mut self, op: OpRef, result: Result<Outcome, Error>, effects: &mut Effects) {
        if let Err(error) = &result {
            self.counters.errors[error.kind() as usize] += 1;
        }
        let pending = &mut self.pending[op.submission];
        pending.operations[op.index] = None;
        pending.results[op.index] = Some(result);
        pending.unanswered -= 1;
        if pending.unanswered == 0 {
            let Pending { results, permit, reply, submitted_at, .. } = self.pending.remove(op.submission);
            let results = results.into_iter().flatten().collect();
            effects.answers.push(Completed { reply, results, permit, submitted_at });
        }
    }

    /// Takes back what a lane has finished.
    fn land(&mut self, mut launch: Launch, effects: &mut Effects) {
        self.in_flight -= 1;
        let error = launch.error.take();
        if error.is_some() {
            self.counters.failed_launches += 1;
        }
        for flight in launch.flights.drain(..) {
            let Flight { purpose, output, finite, pins, .. } = flight;
            drop(pins);
            match purpose {
                Purpose::Operation { submission, index } => {
                    let landed = match (&error, finite) {
                        (Some(reason), _) => Err(Error::Device(reason.clone())),
                        (None, false) => Err(Error::NotFinite),
                        (None, true) => Ok(output),
                    };
                    self.land_operation(OpRef { submission, index }, landed, effects);
                }
                Purpose::Seal { block, slot } => {
                    let sealed = error.is_none().then_some(finite);
                    self.blocks.land_seal(block, slot, sealed, &mut self.counters);
                }
            }
        }
        launch.steps.clear();
        if self.spare.len() < 8 {
            self.spare.push(launch);
        }
    }

    fn land_operation(
        &mut self,
        op: OpRef,
        landed: Result<Option<ReadBuffer>, Error>,
        effects: &mut Effects,
    ) {
        let pending = &mut self.pending[op.submission];
        // A read leaves nothing behind but the sequence that it kept busy.
        let (id, result) = match pending.operations[op.index].take() {
            Some(Operation::Append { sequence, ids, extra, .. }) => {
                let token_ids = SmallVec::<[u32; 8]>::from_slice(&pending.token_ids[ids]);
                let extra = extra.as_deref().copied();
                (sequence, self.land_append(sequence.index(), landed.map(drop), &token_ids, extra))
            }
            Some(Operation::Stage { sequence, layer, tokens, .. }) => {
                (sequence, self.land_stage(sequence.index(), landed.map(drop), layer, tokens))
            }
            Some(Operation::Read { sequence, .. }) => {
                let result = landed.and_then(|output| {
                    output
                        .map(Outcome::Read)
                        .ok_or_else(|| Error::Device("a read came back without its buffer".into()))
                });
                (sequence, result)
            }
            _ => return,
        };
        self.answer(op, result, effects);
        let index = id.index();
        self.sequences[index].busy = false;
        // In order, until one of them flies (or closes the sequence).
        while let Some(entry) =
            self.sequences.get_mut(index).filter(|entry| entry.shared.id() == id && !entry.busy)
        {
            let Some(next) = entry.parked.pop_front() else { break };
            match self.find(id, next) {
                Ok(index) => self.start(next, Some(index), effects),
                Err(error) => self.answer(next, Err(error), effects),
            }
        }
    }

    /// Adds a flight to the launch that is being built for `lane`, and returns its index there.
    pub(super) fn flight(
        &mut self,
        lane: LaneKind,
        op: OpRef,
        output: Option<ReadBuffer>,
    ) -> (&mut Launch, usize) {
        let payload = output.is_none().then(|| self.pending[op.submission].payload.clone());
        let purpose = Purpose::Operation { submission: op.submission, index: op.index };
        let launch = Self::building(&mut self.building, &mut self.spare, lane);
        launch.flights.push(Flight { purpose, payload, output, finite: true, pins: Vec::new() });
        let index = launch.flights.len() - 1;
        (launch, index)
    }

    fn building<'a>(
        building: &'a mut [Option<Launch>; 3],
        spare: &mut Vec<Launch>,
        lane: LaneKind,
    ) -> &'a mut Launch {
        building[lane as usize].get_or_insert_with(|| spare.pop().unwrap_or_default())
    }

    pub(super) fn lane_for(&self, kind: LaneKind, bytes: usize) -> LaneKind {
        if bytes >= self.config.copy_lane_min_bytes { kind } else { LaneKind::Compute }
    }

    /// Plans the seals of one launch.
    fn seal_some(&mut self) {
        self.blocks.reclaim();
        for _ in 0..self.config.seals_per_launch {
            let Some(seal) = self.blocks.next_seal(&mut self.counters) else { break };
            let launch = Self::building(&mut self.building, &mut self.spare, LaneKind::Compute);
            let flight = launch.flights.len();
            launch.steps.push(seal.step(flight));
            launch.flights.push(seal.into_flight());
        }
    }

    pub(super) fn tenant_number(&mut self, tenant: &Tenant) -> u32 {
        match self.tenants.get(tenant) {
            Some(&number) => number,
            None => {
                let number = self.tenants.len() as u32;
                self.tenants.insert(tenant.clone(), number);
                number
            }
        }
    }

    /// Gives a new sequence its place in the table.
    pub(super) fn register(
        &mut self,
        make: impl FnOnce(SequenceId) -> SequenceEntry,
        effects: &mut Effects,
    ) -> crate::sequence::OpenSequence {
        let vacant = self.sequences.vacant_entry();
        let index = vacant.key();
        if index == self.generations.len() {
            self.generations.push(0);
        }
        // The generation wraps after 2^28 sequences at one entry.
        let generation = self.generations[index];
        self.generations[index] = (generation + 1) & ((1 << 28) - 1);
        let entry = make(SequenceId::new(self.config.shard, index as u32, generation));
        let shared = entry.shared.clone();
        vacant.insert(entry);
        effects.opened.push(shared.clone());
        crate::sequence::OpenSequence::new(shared, self.on_drop.0.clone())
    }

    /// The key of a sequence's block, if it is full and not private.
    pub fn block_key(&self, id: SequenceId, index: usize) -> Option<BlockKey> {
        let entry = self.sequences.get(id.index()).filter(|entry| entry.shared.id() == id)?;
        let block: BlockId = *entry.shared.state().blocks.get(index)?;
        self.blocks.key(block)
    }
}
