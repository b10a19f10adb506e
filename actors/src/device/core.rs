//! What a device actor decides: a plain state machine over sequences, blocks and slots.
//!
//! Submissions and finished launches come in through [`DeviceCore::apply`]; launches and answers go out through
//! [`Effects`]. It owns no thread, clock, channel or device, so a seeded scheduler can drive it through every legal order of
//! messages, completions and faults.
//!
//! The rule that keeps it simple: **a sequence has at most one operation in flight**; later ones wait in the sequence's own
//! queue. Everything else (blocks shared by forks, slots read by views, seals in the background) is settled by reference
//! counts and pins, never by waiting (but a write to a block that a move is copying waits for the move).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use indexmap::IndexSet;
use slab::Slab;
use smallvec::SmallVec;

use super::blocks::BlockStore;
use super::cached::Room;
use super::entry::SequenceEntry;
use super::plan::{ReadOutput, WriteTarget};
use super::tier::TierMoves;
use crate::batch::{Each, EachWrite, Invalidate, Operation, Outcome, ReadTarget, Row, out_of_reach};
use crate::block::{BlockId, BlockKey, KeyScheme};
use crate::dropping::Dropping;
use crate::error::Error;
use crate::events::BlockEvent;
use crate::eviction::EvictionPolicy;
use crate::format::{KeepRaw, Ladder};
use crate::geometry::{BlockLayout, Geometry};
use crate::limits::TenantLimits;
use crate::memory::{AppendRow, AppendRows, Flight, LaneKind, Launch, OpRef, Purpose, ReadBuffer, Step};
use crate::payload::Payload;
use crate::pool::{Pool, PoolLayout};
use crate::sequence::{CloseHook, SequenceId, SequenceShared, Tenant};
use crate::stats::CoreCounters;
use crate::submission::{Brief, Submission, Submissions};
use crate::tokens::TokenBudget;

/// What a device core needs to know.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Tells the ids of the process's caches apart.
    pub cache: u8,
    /// Number of the shard.
    pub shard: u16,
    /// What is cached.
    pub geometry: Geometry,
    /// The bytes of a block, from the geometry.
    pub layout: BlockLayout,
    /// How the slab is cut.
    pub pool: PoolLayout,
    /// Format of sealed blocks, and those that they are re-encoded to.
    pub formats: Ladder,
    /// Full blocks that are not sealed.
    pub keep_raw: KeepRaw,
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
    /// How tokens are dropped without being asked to, if they are.
    pub dropping: Option<Dropping>,
    /// Sealed keys are differences from centres, so that steps have to say where tokens stand.
    pub centred: bool,
    /// How block keys are made.
    pub keys: KeyScheme,
    /// Which cached block goes first.
    pub eviction: EvictionPolicy,
    /// What tenants may use, by name; others have no limits.
    pub tenants: Arc<HashMap<String, TenantLimits>>,
    /// Bits of a block key that place it in the prefix index: 64, but for tests.
    pub index_hash_bits: u32,
}

impl CoreConfig {
    /// The lane for an operation that moves `bytes` bytes: `kind`, if that is many and has to cross a bus.
    pub(super) fn lane_for(&self, kind: LaneKind, bytes: usize, on_device: bool) -> LaneKind {
        if bytes >= self.copy_lane_min_bytes && !on_device { kind } else { LaneKind::Compute }
    }
}

/// What comes into the core.
#[derive(Debug)]
pub enum Event {
    /// Operations to carry out.
    Submission(Box<Submission>),
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
    /// Submissions that are complete, to be sent.
    pub answers: Submissions,
    /// Sequences that have opened.
    pub opened: Vec<Arc<SequenceShared>>,
    /// Sequences that have closed.
    pub closed: Vec<SequenceId>,
    /// What has become of blocks that prompts find, if somebody wants to know ([`DeviceCore::observe`]).
    pub events: Vec<BlockEvent>,
}

/// Submissions that are not answered yet.
#[derive(Debug, Default)]
pub(super) struct Pending(Slab<Box<Submission>>);

impl Pending {
    pub(super) fn submission(&self, op: OpRef) -> &Submission {
        &self.0[op.submission as usize]
    }

    pub(super) fn submission_mut(&mut self, op: OpRef) -> &mut Submission {
        &mut self.0[op.submission as usize]
    }

    pub(super) fn operation(&self, op: OpRef) -> &Operation {
        &self.submission(op).operations[op.index as usize]
    }

    /// Where the results of an operation over rows end; none if `op` is not one.
    fn rows_end(&self, op: OpRef) -> Option<u32> {
        match self.operation(op) {
            Operation::Each(each) => Some(each.results_end()),
            _ => None,
        }
    }

    /// What comes after `op` in its submission: the next row, or with `whole` the next operation.
    fn after(&self, op: OpRef, whole: bool) -> Option<OpRef> {
        let result = match self.rows_end(op) {
            Some(end) if whole => end,
            Some(end) if op.result + 1 < end => return Some(OpRef { result: op.result + 1, ..op }),
            Some(end) => end,
            None => op.result + self.operation(op).results() as u32,
        };
        let index = op.index + 1;
        let left = (index as usize) < self.submission(op).operations.len();
        left.then_some(OpRef { index, result, ..op })
    }

    /// The row that `op` is, if it is one.
    pub(super) fn row(&self, op: OpRef) -> Option<(&Each, &Row)> {
        let Operation::Each(each) = self.operation(op) else { return None };
        Some((each, each.row_at(op.result)?))
    }

    pub(super) fn sequence(&self, op: OpRef) -> Option<SequenceId> {
        self.row(op).map_or_else(|| self.operation(op).sequence(), |(_, row)| Some(row.sequence))
    }

    #[cfg(any(test, feature = "testing"))]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Submission> {
        self.0.iter().map(|(_, submission)| &**submission)
    }
}

/// Launches that are being built, one a lane, and the memory of those that have landed.
#[derive(Debug, Default)]
pub(super) struct Building {
    pub(super) launches: [Option<Launch>; 3],
    spare: Vec<Launch>,
    spare_rows: Vec<Vec<AppendRow>>,
}

impl Building {
    pub(super) fn launch(&mut self, lane: LaneKind) -> &mut Launch {
        self.launches[lane as usize].get_or_insert_with(|| self.spare.pop().unwrap_or_default())
    }

    /// Adds a flight for an operation. One with no output reads its submission's payload.
    pub(super) fn flight(
        &mut self,
        lane: LaneKind,
        op: OpRef,
        submission: &mut Submission,
        output: Option<Box<ReadBuffer>>,
    ) -> (&mut Launch, usize) {
        let payload = output.is_none().then_some(&mut submission.payload);
        let launch = self.launch(lane);
        let flight = launch.add(Purpose::Operation(op), payload, output);
        (launch, flight)
    }

    /// An empty list for rows.
    pub(super) fn spare_rows(&mut self) -> Vec<AppendRow> {
        self.spare_rows.pop().unwrap_or_default()
    }

    /// Adds rows of an operation: to the last step if that is for the same, otherwise to the one that `make` makes of a flight.
    pub(super) fn append_rows(
        &mut self,
        lane: LaneKind,
        op: OpRef,
        payload: &mut Payload,
        rows: Vec<AppendRow>,
        make: impl FnOnce(usize) -> AppendRows,
    ) {
        let launch = self.launch(lane);
        match launch.steps.last_mut() {
            Some(Step::AppendRows(last))
                if (last.op.submission, last.op.index) == (op.submission, op.index) =>
            {
                last.rows.extend_from_slice(&rows);
                self.recycle_rows(rows);
            }
            _ => {
                let flight = launch.add(Purpose::Rows { op }, Some(payload), None);
                launch.steps.push(Step::AppendRows(AppendRows { rows, ..make(flight) }));
            }
        }
    }

    pub(super) fn recycle_rows(&mut self, mut rows: Vec<AppendRow>) {
        if self.spare_rows.len() < 8 {
            rows.clear();
            self.spare_rows.push(rows);
        }
    }

    fn recycle(&mut self, launch: Launch) {
        if self.spare.len() < 8 {
            self.spare.push(launch.emptied());
        }
    }
}

/// The state machine of one shard.
#[derive(Debug)]
pub struct DeviceCore {
    pub(super) config: CoreConfig,
    pub(super) blocks: BlockStore,
    pub(super) sequences: Slab<SequenceEntry>,
    /// Generation of the next sequence at each table entry.
    generations: Vec<u32>,
    owners: HashMap<Owner, u32>,
    roots: IndexSet<Root>,
    pub(super) pending: Pending,
    /// The first operation not looked at yet of each submission that has some, in submission order.
    ready: VecDeque<OpRef>,
    /// What waits for blocks to have moved, in order: writes to blocks that are on their way to other slots, and whatever needs raw slots
    /// that moves or seals will make. The sequences are busy with it.
    pub(super) waiting_for_moves: Vec<OpRef>,
    /// Memory of [`DeviceCore::land_rows`].
    resumed: Vec<u32>,
    pub(super) building: Building,
    pub(super) in_flight: usize,
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

impl Drop for DeviceCore {
    /// A shard that is lost takes its sequences with it; the tokens are free for the other shards.
    fn drop(&mut self) {
        let tokens = self.sequences.iter().map(|(_, entry)| u64::from(entry.shared.state().committed)).sum();
        self.config.token_budget.give_back(tokens);
    }
}

/// Whose blocks are: no one else sees their bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// A tenant's own.
    Tenant(Tenant),
    /// A shared domain's.
    Domain(String),
}

/// What a sequence's blocks have in common, beside the model: their keys begin with it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Root {
    pub(super) owner: Owner,
    pub(super) tenant: Tenant,
    pub(super) adapter: Option<String>,
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
        let mut core = DeviceCore {
            blocks: BlockStore::new(
                pool,
                config.shard,
                &config.layout,
                config.formats,
                config.keep_raw,
                config.eviction,
                config.index_hash_bits,
            ),
            sequences: Slab::new(),
            generations: Vec::new(),
            owners: HashMap::new(),
            roots: IndexSet::new(),
            pending: Pending::default(),
            ready: VecDeque::new(),
            waiting_for_moves: Vec::new(),
            resumed: Vec::new(),
            building: Building::default(),
            in_flight: 0,
            counters: CoreCounters::default(),
            on_drop: DebugHook(on_drop),
            config,
        };
        // Now, so that what is promised to tenants is out of the others' reach before they come.
        let mut tenants: Vec<Tenant> = core.config.tenants.keys().map(Tenant::new).collect();
        tenants.sort_unstable_by(|a, b| a.name().cmp(b.name()));
        for tenant in tenants {
            core.owner_number(&Owner::Tenant(tenant));
        }
        core
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
        self.may_seal() && (self.blocks.wants_to_seal() || self.blocks.wants_to_recode())
    }

    /// Whether sealing must not wait for a quiet moment: raw slots run out while full blocks hold them.
    pub fn seal_is_urgent(&self) -> bool {
        let pool = self.blocks.pool();
        self.wants_to_seal() && pool.raw_available() < pool.layout().raw_slots() / 4
    }

    /// In deterministic mode seals wait for each other too: which slots they find vacant must not depend on the device's pace.
    fn may_seal(&self) -> bool {
        !self.config.deterministic || self.is_quiet()
    }

    /// Launches that lanes have not finished.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// What time it is, in milliseconds since the cache was opened, and whether anybody wants to hear of blocks.
    ///
    /// In deterministic mode time is counted in operations instead: what is evicted must not depend on a clock.
    pub fn observe(&mut self, now_ms: u64, is_heard: bool) {
        self.blocks.now_ms = if self.config.deterministic { self.counters.operations } else { now_ms };
        self.blocks.is_heard = is_heard;
    }

    /// Takes one event. Call [`DeviceCore::flush`] after a run of them: operations that come together share launches.
    pub fn apply(&mut self, event: Event, effects: &mut Effects) {
        match event {
            Event::Submission(submission) => self.accept(submission),
            Event::Launched(launch) => self.land(launch, effects),
            Event::Seal if self.may_seal() => self.seal_some(),
            Event::Seal => {}
        }
        self.pump(effects);
        effects.events.append(&mut self.blocks.events);
    }

    /// Hands the launches built so far over to the effects.
    pub fn flush(&mut self, effects: &mut Effects) {
        let lanes = [LaneKind::Compute, LaneKind::Upload, LaneKind::Download];
        for (slot, lane) in self.building.launches.iter_mut().zip(lanes) {
            if let Some(launch) = slot.take() {
                self.in_flight += 1;
                self.counters.launches += 1;
                effects.launches.push((lane, launch));
            }
        }
    }

    fn accept(&mut self, submission: Box<Submission>) {
        self.counters.operations += submission.results() as u64;
        let submission = self.pending.0.insert(submission) as u32;
        self.ready.push_back(OpRef { submission, index: 0, result: 0 });
    }

    /// Operations not looked at yet.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn not_looked_at(&self) -> usize {
        let left = |op: &OpRef| self.pending.submission(*op).results() - op.result as usize;
        self.ready.iter().map(left).sum()
    }

    /// Starts what can be started.
    fn pump(&mut self, effects: &mut Effects) {
        while let Some(&first) = self.ready.front() {
            if !self.config.deterministic {
                self.ready.pop_front();
                let mut next = Some(first);
                while let Some(op) = next {
                    // Before the last of its results may be answered.
                    next = self.pending.after(op, true);
                    match self.pending.rows_end(op) {
                        Some(end) => self.look_at_rows(op, end, effects),
                        None => self.look_at(op, effects),
                    }
                }
            } else {
                if !self.is_quiet() {
                    return;
                }
                // Blocks are sealed before the next operation looks.
                self.seal_some();
                if !self.is_quiet() {
                    return;
                }
                match self.pending.after(first, false) {
                    Some(next) => self.ready[0] = next,
                    None => drop(self.ready.pop_front()),
                }
                self.look_at(first, effects);
            }
        }
    }

    /// Looks at the rows of an operation from `next` on.
    fn look_at_rows(&mut self, mut next: OpRef, end: u32, effects: &mut Effects) {
        while next.result < end {
            next.result += self.append_rows_in_place(next, end);
            if next.result < end {
                self.look_at(next, effects);
                next.result += 1;
            }
        }
    }

    /// Starts an operation, or parks it behind the one that its sequence has in flight.
    fn look_at(&mut self, op: OpRef, effects: &mut Effects) {
        if self.append_in_place(op) {
            return;
        }
        match self.pending.sequence(op).map(|id| self.find(id, op)) {
            // An operation on no sequence.
            None => self.start(op, None, effects),
            Some(Err(error)) => self.answer(op, Err(error), effects),
            Some(Ok(index)) => {
                let sequence = &mut self.sequences[index];
                if sequence.busy {
                    sequence.park(op);
                } else {
                    self.start(op, Some(index), effects);
                }
            }
        }
    }

    /// Nothing in flight and nothing about to be.
    fn is_quiet(&self) -> bool {
        self.in_flight == 0 && self.building.launches.iter().all(Option::is_none)
    }

    /// The table entry of a sequence that `op` may work on.
    fn find(&self, id: SequenceId, op: OpRef) -> Result<usize, Error> {
        let index = id.index();
        match self.sequences.get(index) {
            Some(entry) if entry.id == id => match &self.pending.submission(op).tenant {
                Some(tenant) if tenant != entry.shared.tenant() => Err(Error::TenantMismatch(id)),
                _ => Ok(index),
            },
            // An id of a shard that does not exist comes here as well.
            _ if (id.cache(), id.shard()) == (self.config.cache, self.config.shard)
                && self.generations.get(index).is_some_and(|&next| id.generation() < next) =>
            {
                Err(Error::ClosedSequence(id))
            }
            _ => Err(Error::UnknownSequence(id)),
        }
    }

    fn start(&mut self, op: OpRef, sequence: Option<usize>, effects: &mut Effects) {
        let submission = self.pending.submission_mut(op);
        let progress = match (&mut submission.operations[op.index as usize], sequence) {
            (Operation::Refused { error, results }, _) => {
                let (error, end) = (error.clone(), op.result + *results);
                for result in op.result..end {
                    self.answer(OpRef { result, ..op }, Err((*error).clone()), effects);
                }
                return;
            }
            (Operation::Open { .. }, _) => self.open(op, effects),
            (Operation::Invalidate { what, .. }, _) => {
                let what = (**what).clone();
                Progress::Done(Ok(Outcome::Invalidated { blocks: self.invalidate(&what) }))
            }
            // What flies stays in its place: landing needs it again.
            (Operation::Append { at, ids, tensors, .. }, Some(index)) => {
                let (at, tokens, tensors) = (*at, ids.count, *tensors);
                self.plan_write(op, index, WriteTarget::AllLayers { at }, tokens, tensors.whole(tokens))
            }
            (Operation::Each(each), Some(index)) => {
                let Some(row) = each.row_at(op.result).copied() else { return };
                let tensors = each.tensors_of(&row);
                let target = match each.write {
                    EachWrite::Append => WriteTarget::AllLayers { at: None },
                    EachWrite::Stage { layer } => WriteTarget::Layer(layer),
                };
                match row.row {
                    Row::REFUSED => Progress::Done(Err(out_of_reach())),
                    _ => self.plan_write(op, index, target, 1, tensors),
                }
            }
            (Operation::Stage { layer, tokens, tensors, .. }, Some(index)) => {
                let (layer, tokens, tensors) = (*layer, *tokens, *tensors);
                self.plan_write(op, index, WriteTarget::Layer(layer), tokens, tensors.whole(tokens))
            }
            (Operation::Read { layer, tokens, buffer, .. }, Some(index)) => {
                let (layer, tokens, buffer) = (*layer, tokens.clone(), buffer.take());
                self.plan_read(op, index, layer, &tokens, ReadOutput::Buffer(buffer))
            }
            (Operation::ReadDevice { target, .. }, Some(index)) => {
                let ReadTarget { layer, tokens, tensors } = (**target).clone();
                let output = ReadOutput::Device([tensors.keys_at as u64, tensors.values_at as u64]);
                self.plan_read(op, index, layer, &tokens, output)
            }
            (Operation::Commit { ids, extra, .. }, Some(index)) => {
                let token_ids = SmallVec::<[u32; 8]>::from_slice(ids.of(&submission.token_ids));
                let extra = extra.as_deref().copied();
                match self.commit_staged(index, &token_ids, extra) {
                    Ok(_) if self.drop_if_due(op, index) => Progress::Flying,
                    result => Progress::Done(result),
                }
            }
            (Operation::Fork { count, permit, .. }, Some(index)) => {
                let (count, permit) = (*count, permit.take());
                Progress::Done(self.fork(index, count, permit, effects))
            }
            (Operation::Truncate { tokens, .. }, Some(index)) => {
                let tokens = *tokens;
                Progress::Done(self.truncate(index, tokens))
            }
            (Operation::MoveTo { tier, .. }, Some(index)) => {
                let tier = *tier;
                self.plan_move(op, index, tier)
            }
            (Operation::Drop { .. }, Some(index)) => self.plan_drop(op, index),
            (Operation::Close { sequence }, Some(index)) => {
                let id = *sequence;
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
        // A close that nobody waits for may find its sequence closed by hand.
        if let Err(error) = &result
            && self.pending.submission(op).is_awaited()
        {
            self.counters.errors[error.kind() as usize] += 1;
        }
        self.answer_brief(op, result.into(), effects);
    }

    fn answer_brief(&mut self, op: OpRef, result: Brief, effects: &mut Effects) {
        if self.pending.submission_mut(op).answer(op.result as usize, result) {
            effects.answers.push(self.pending.0.remove(op.submission as usize));
        }
    }

    /// Takes back what a lane has finished.
    fn land(&mut self, mut launch: Launch, effects: &mut Effects) {
        self.in_flight -= 1;
        let error = launch.error.take();
        if error.is_some() {
            self.counters.failed_launches += 1;
        }
        for (flight, payload) in launch.land() {
            let Flight { purpose, output, finite, .. } = flight;
            match purpose {
                Purpose::Rows { op } => {
                    if let Some(payload) = payload {
                        self.pending.submission_mut(op).payload = payload;
                    }
                }
                Purpose::Operation(op) => {
                    if let Some(payload) = payload {
                        self.pending.submission_mut(op).payload = payload;
                    }
                    if error.is_none() && finite && output.is_none() && self.land_in_place(op, effects) {
                        continue;
                    }
                    let landed = match (&error, finite) {
                        (Some(reason), _) => Err(Error::Device(reason.clone())),
                        (None, false) => Err(Error::NotFinite),
                        (None, true) => Ok(output),
                    };
                    self.land_operation(op, landed, effects);
                }
                Purpose::Seal { block, slot } => {
                    let sealed = error.is_none().then_some(finite);
                    self.blocks.land_seal(block, slot, sealed, &mut self.counters);
                }
                Purpose::Tier(tier) => {
                    let TierMoves { op, moves } = *tier;
                    let outcome = self.land_moves(moves, error.is_none());
                    let sequence = self.pending.sequence(op);
                    let result = error.clone().map_or(Ok(outcome), |reason| Err(Error::Device(reason)));
                    self.answer(op, result, effects);
                    if let Some(id) = sequence {
                        self.resume(id.index(), effects);
                    }
                }
                Purpose::Recode(recoded) => {
                    let carried_out = error.is_none() && finite;
                    self.blocks.land_recode(*recoded, carried_out, &mut self.counters);
                }
                Purpose::Move { block, slot } => {
                    self.blocks.land_move(block, slot, error.is_none());
                }
            }
        }
        for op in std::mem::take(&mut self.waiting_for_moves) {
            match self.pending.sequence(op) {
                Some(id) => {
                    self.sequences[id.index()].park_first(op);
                    self.resume(id.index(), effects);
                }
                None => self.start(op, None, effects),
            }
        }
        for step in &mut launch.steps {
            if let Step::AppendRows(rows) = step {
                self.land_rows(rows, error.as_ref(), effects);
                self.building.recycle_rows(std::mem::take(&mut rows.rows));
            }
        }
        self.building.recycle(launch);
    }

    /// [`DeviceCore::land_operation`] for what [`DeviceCore::append_in_place`] has planned, if it went well.
    fn land_in_place(&mut self, op: OpRef, effects: &mut Effects) -> bool {
        let Some((index, committed)) = self.land_append_in_place(op) else { return false };
        self.answer_brief(op, Brief::Appended(committed), effects);
        self.resume(index, effects);
        true
    }

    /// Lands the rows of a step: all of them were planned by [`DeviceCore::append_rows_in_place`].
    fn land_rows(&mut self, rows: &AppendRows, error: Option<&Arc<str>>, effects: &mut Effects) {
        let mut resumed = std::mem::take(&mut self.resumed);
        if error.is_none() && self.land_rows_in_place(rows, &mut resumed) {
            effects.answers.push(self.pending.0.remove(rows.op.submission as usize));
        } else {
            let left = |row: &&AppendRow| self.pending.submission(rows.op).is_missing(row.result as usize);
            // Whatever went wrong goes the long way.
            for row in rows.rows.iter().filter(left).copied().collect::<Vec<_>>() {
                let landed = match error {
                    Some(reason) => Err(Error::Device(reason.clone())),
                    None if !row.finite => Err(Error::NotFinite),
                    None => Ok(None),
                };
                self.land_operation(OpRef { result: row.result, ..rows.op }, landed, effects);
            }
        }
        self.resume_all(&resumed, effects);
        resumed.clear();
        self.resumed = resumed;
    }

    /// [`DeviceCore::resume`] for many sequences: what waits on them is mostly the next step over all of them, which is looked
    /// at as a whole.
    fn resume_all(&mut self, sequences: &[u32], effects: &mut Effects) {
        let mut run: Option<(OpRef, u32)> = None;
        for &index in sequences {
            let index = index as usize;
            let entry = &mut self.sequences[index];
            entry.busy = false;
            let Some(next) = entry.unpark() else { continue };
            match &mut run {
                Some((first, end))
                    if (first.submission, first.index, *end)
                        == (next.submission, next.index, next.result) =>
                {
                    *end += 1;
                }
                _ => {
                    if let Some((first, end)) = run.take() {
                        self.resume_rows(first, end, effects);
                    }
                    if self.pending.row(next).is_some() {
                        run = Some((next, next.result + 1));
                    } else {
                        self.sequences[index].park_first(next);
                        self.resume(index, effects);
                    }
                }
            }
        }
        if let Some((first, end)) = run {
            self.resume_rows(first, end, effects);
        }
    }

    /// Looks at rows that waited, and at what waited behind those that do not fly.
    fn resume_rows(&mut self, first: OpRef, end: u32, effects: &mut Effects) {
        // Before the last of them may be answered.
        let ids: SmallVec<[SequenceId; 4]> = (first.result..end)
            .filter_map(|result| self.pending.sequence(OpRef { result, ..first }))
            .filter(|id| self.sequences.get(id.index()).is_some_and(SequenceEntry::has_parked))
            .collect();
        self.look_at_rows(first, end, effects);
        for id in ids {
            if self.sequences.get(id.index()).is_some_and(|entry| entry.id == id && !entry.busy) {
                self.resume(id.index(), effects);
            }
        }
    }

    fn land_operation(
        &mut self,
        op: OpRef,
        landed: Result<Option<Box<ReadBuffer>>, Error>,
        effects: &mut Effects,
    ) {
        let landed = match self.land_thinning(op, landed) {
            Err(landed) => landed,
            Ok(None) => return,
            Ok(Some((index, result))) => {
                self.answer(op, result, effects);
                return self.resume(index, effects);
            }
        };
        let submission = self.pending.submission(op);
        // A read leaves nothing behind but the sequence that it kept busy.
        let (id, result) = match &submission.operations[op.index as usize] {
            Operation::Each(each) => {
                let Some(&Row { sequence: id, token_id, .. }) = each.row_at(op.result) else { return };
                let landed = landed.map(drop);
                let result = match each.write {
                    EachWrite::Append => self.land_append(id.index(), landed, &[token_id], None),
                    EachWrite::Stage { layer } => self.land_stage(id.index(), landed, layer, 1),
                };
                (id, result)
            }
            Operation::Append { sequence, ids, extra, .. } => {
                let (id, extra) = (*sequence, extra.as_deref().copied());
                let token_ids = SmallVec::<[u32; 8]>::from_slice(ids.of(&submission.token_ids));
                (id, self.land_append(id.index(), landed.map(drop), &token_ids, extra))
            }
            Operation::Stage { sequence, layer, tokens, .. } => {
                let (id, layer, tokens) = (*sequence, *layer, *tokens);
                (id, self.land_stage(id.index(), landed.map(drop), layer, tokens))
            }
            Operation::Read { sequence, .. } => {
                let missing = || Error::Device("a read came back without its buffer".into());
                let result = landed.and_then(|output| output.map(Outcome::Read).ok_or_else(missing));
                (*sequence, result)
            }
            Operation::ReadDevice { sequence, target } => {
                let tokens = target.tokens.len() as u32;
                (*sequence, landed.map(|_| Outcome::ReadDevice { tokens }))
            }
            _ => return,
        };
        if matches!(result, Ok(Outcome::Appended { .. })) && self.drop_if_due(op, id.index()) {
            return;
        }
        self.answer(op, result, effects);
        self.resume(id.index(), effects);
    }

    /// The operation that a sequence had in flight has landed: starts those that waited for it.
    fn resume(&mut self, index: usize, effects: &mut Effects) {
        let entry = &mut self.sequences[index];
        entry.busy = false;
        if !entry.has_parked() {
            return;
        }
        let id = entry.id;
        // In order, until one of them flies (or closes the sequence).
        while let Some(entry) = self.sequences.get_mut(index).filter(|entry| entry.id == id && !entry.busy) {
            let Some(next) = entry.unpark() else { break };
            if self.append_in_place(next) {
                break;
            }
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
        output: Option<Box<ReadBuffer>>,
    ) -> (&mut Launch, usize) {
        self.building.flight(lane, op, self.pending.submission_mut(op), output)
    }

    /// Plans the seals of one launch.
    fn seal_some(&mut self) {
        self.blocks.reclaim();
        for _ in 0..self.config.seals_per_launch {
            let Some(seal) = self.blocks.next_seal(&mut self.counters) else { break };
            let launch = self.building.launch(LaneKind::Compute);
            launch.steps.push(seal.step(launch.flights.len()));
            launch.add(seal.into_purpose(), None, None);
        }
        for _ in 0..self.config.seals_per_launch {
            if !self.blocks.plan_recode() {
                break;
            }
        }
        self.blocks.drain_for_recodes();
        self.recode_some();
        // Sealing has stalled for want of a vacant chunk: empty one. It goes on when the moves have landed.
        self.move_some();
    }

    /// Launches what is planned to be re-encoded.
    fn recode_some(&mut self) {
        for plan in self.blocks.planned_recodes() {
            let launch = self.building.launch(LaneKind::Compute);
            launch.steps.extend(plan.steps(launch.flights.len()));
            launch.add(plan.into_purpose(), None, None);
        }
    }

    /// Plans the moves out of the chunk that is being emptied, and says how many.
    fn move_some(&mut self) -> usize {
        let mut planned = 0;
        while let Some(plan) = self.blocks.next_move(&mut self.counters) {
            let launch = self.building.launch(LaneKind::Compute);
            launch.steps.push(plan.step());
            launch.add(plan.into_purpose(), None, None);
            planned += 1;
        }
        planned
    }

    /// Sees to it that an owner can have `wanted` raw slots. With [`Room::Soon`], `op` is looked at again when something has landed.
    pub(super) fn make_room(&mut self, op: OpRef, owner: u32, wanted: usize) -> Room {
        loop {
            let is_short = !self.blocks.has_room(owner, wanted);
            if is_short && self.blocks.seals_may_suffice(owner, wanted) && self.seal_for_room() {
                self.waiting_for_moves.push(op);
                return Room::Soon;
            }
            let room = self.blocks.make_room(owner, wanted, &mut self.counters);
            if room != Room::Soon {
                return room;
            }
            if self.room_is_coming() || self.blocks.ledger.flights_of(owner) > 0 {
                self.waiting_for_moves.push(op);
                return Room::Soon;
            }
            // The vacancies that were to take the blocks have been taken by others. Nothing is under way that would make some.
            if !self.blocks.evict_one_for(owner, wanted, &mut self.counters) {
                self.blocks.stop_draining();
                return if self.blocks.has_room(owner, wanted) { Room::Now } else { Room::Never };
            }
        }
    }

    /// Seals what waits for it. True if raw slots will come of what is under way.
    fn seal_for_room(&mut self) -> bool {
        if self.blocks.wants_to_seal() {
            self.seal_some();
        }
        self.blocks.is_sealing() || self.room_is_coming()
    }

    /// Launches what was planned to make room. True if some will come of what is under way.
    pub(super) fn room_is_coming(&mut self) -> bool {
        self.recode_some();
        self.move_some() > 0 || self.blocks.draining_is_under_way() || self.blocks.is_recoding()
    }

    /// Lets prompts find some blocks no more, and returns how many. Sequences that hold them keep them.
    pub fn invalidate(&mut self, what: &Invalidate) -> u32 {
        let roots = &self.roots;
        let is_meant = |root: u32| {
            let Some(Root { owner, tenant, adapter }) = roots.get_index(root as usize) else { return false };
            match what {
                Invalidate::All => true,
                Invalidate::Adapter(name) => adapter.as_ref() == Some(name),
                Invalidate::Tenant(of) => tenant == of,
                Invalidate::Domain(of) => matches!(owner, Owner::Domain(name) if name == of),
            }
        };
        self.blocks.withdraw_all(|blocks, block| is_meant(blocks.root(block))) as u32
    }

    /// The number of whoever blocks belong to.
    pub(super) fn owner_number(&mut self, owner: &Owner) -> u32 {
        let next = self.owners.len() as u32;
        let number = *self.owners.entry(owner.clone()).or_insert(next);
        if number == next {
            let limits = match owner {
                Owner::Tenant(tenant) => self.config.tenants.get(tenant.name()).copied(),
                Owner::Domain(_) => None,
            };
            self.blocks.open_owner(number, limits.unwrap_or_default());
        }
        number
    }

    /// The number of what some sequences' blocks have in common.
    pub(super) fn root_number(&mut self, root: Root) -> u32 {
        self.roots.insert_full(root).0 as u32
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
        let entry = make(SequenceId::new(self.config.cache, self.config.shard, index as u32, generation));
        let shared = entry.shared.clone();
        vacant.insert(entry);
        effects.opened.push(shared.clone());
        crate::sequence::OpenSequence::new(shared, self.on_drop.0.clone())
    }

    /// The key of a sequence's block, if it is full and not private.
    pub fn block_key(&self, id: SequenceId, index: usize) -> Option<BlockKey> {
        let entry = self.sequences.get(id.index()).filter(|entry| entry.id == id)?;
        let block: BlockId = *entry.shared.state().blocks.get(index)?;
        self.blocks.key(block)
    }
}
