//! Operations on sequences: what each one checks, takes, launches, and does when it lands.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::core::{DeviceCore, Effects, OpRef, Progress};
use crate::batch::{Outcome, TensorSpans};
use crate::block::{BlockId, BlockKey, BlockState, ExtraIdentity};
use crate::error::Error;
use crate::format::Format;
use crate::geometry::Plane;
use crate::memory::{AppendStep, LaneKind, ReadBuffer, ReadStep, Step};
use crate::permit::Permit;
use crate::sequence::{OpenOptions, SINK_TOKENS, SequenceShared, SequenceState, pieces};

/// The device thread's part of a sequence. With many sequences open every step misses the caches for it: what a step does
/// not need lies elsewhere.
#[derive(Debug)]
pub(super) struct SequenceEntry {
    pub(super) shared: Arc<SequenceShared>,
    /// An operation is in flight.
    pub(super) busy: bool,
    /// Blocks that a write in flight writes to.
    writing: SmallVec<[BlockId; 2]>,
    /// Operations that wait for it, in order.
    pub(super) parked: VecDeque<OpRef>,
    pub(super) rest: Box<Rest>,
}

/// What is needed once per block or less.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) tenant: u32,
    /// Parent key of the first block.
    root: BlockKey,
    /// Raw blocks set aside and not used yet.
    pub(super) reserved: usize,
    /// Of those, how many the write in flight has taken.
    reserved_in_flight: usize,
    /// Copies that the write in flight makes, by the place of the block that they will replace. Until the write has landed
    /// the sequence keeps what it had: readers see it, a failed write falls back to it, and no other writer gets at it.
    replacing: SmallVec<[(usize, BlockId); 1]>,
    /// Positions that carry more identity than their token id.
    extra: Vec<(u32, ExtraIdentity)>,
    /// The right to be open, given back when the entry goes.
    _permit: Option<Permit>,
}

impl Rest {
    fn new(
        tenant: u32,
        root: BlockKey,
        reserved: usize,
        extra: Vec<(u32, ExtraIdentity)>,
        permit: Option<Permit>,
    ) -> Self {
        let replacing = SmallVec::new();
        Rest { tenant, root, reserved, reserved_in_flight: 0, replacing, extra, _permit: permit }
    }
}

impl SequenceEntry {
    fn new(shared: Arc<SequenceShared>, rest: Rest) -> Self {
        SequenceEntry {
            shared,
            busy: false,
            writing: SmallVec::new(),
            parked: VecDeque::new(),
            rest: Box::new(rest),
        }
    }
}

#[cfg(any(test, feature = "testing"))]
impl SequenceEntry {
    /// Blocks that it holds and does not list.
    pub(super) fn held_blocks(&self) -> impl Iterator<Item = BlockId> {
        self.rest.replacing.iter().map(|(_, block)| *block)
    }
}

/// A block that a write must not touch, and the private copy that takes its place.
struct Replacement {
    index: usize,
    from: BlockId,
}

impl DeviceCore {
    pub(super) fn open(
        &mut self,
        options: OpenOptions,
        permit: Option<Permit>,
        effects: &mut Effects,
    ) -> Result<Outcome, Error> {
        let reserved = self.config.layout.blocks_for(options.reserve_tokens as usize);
        let free = self.blocks.raw_available(reserved);
        if !self.blocks.pool_mut().reserve_raw(reserved) {
            return Err(Error::Capacity { needed: reserved as u32, free: free as u32, evictable: 0 });
        }
        let dropping =
            self.config.keep_ratio.map_or_else(|| "none".into(), |ratio| format!("truncation:{ratio}"));
        let root = BlockKey::root(&self.config.secret, &self.config.geometry, &dropping, &options);
        let tenant = self.tenant_number(&options.tenant);
        let make = |id| {
            let shared = SequenceShared::new(id, options.tenant, SequenceState::default());
            SequenceEntry::new(shared, Rest::new(tenant, root, reserved, Vec::new(), permit))
        };
        Ok(Outcome::Opened(self.register(make, effects)))
    }

    pub(super) fn fork(
        &mut self,
        index: usize,
        count: u32,
        mut permit: Option<Permit>,
        effects: &mut Effects,
    ) -> Result<Outcome, Error> {
        let parent = &self.sequences[index];
        let (shows_staged, state) = {
            let state = parent.shared.state();
            let partial = !(state.committed as usize).is_multiple_of(self.config.layout.block_tokens);
            let shows_staged = partial && state.end() > state.committed;
            // Staged tokens are the owner's alone.
            let blocks = state.blocks[..self.config.layout.blocks_for(state.committed as usize)].to_vec();
            let (committed, window_start) = (state.committed, state.window_start);
            (shows_staged, SequenceState { committed, staged: Vec::new(), blocks, window_start })
        };
        let (tenant, root, name) = (parent.rest.tenant, parent.rest.root, parent.shared.tenant().clone());
        let extra: Vec<_> =
            parent.rest.extra.iter().copied().filter(|&(at, _)| at < state.committed).collect();
        self.config.token_budget.take(u64::from(state.committed) * u64::from(count))?;
        let mut forks = Vec::with_capacity(count as usize);
        for _ in 0..count {
            for &block in state.blocks.iter().filter(|&&block| block != BlockId::DROPPED) {
                self.blocks.retain(block);
            }
            let permit = permit.as_mut().and_then(|all| all.split(1));
            let rest = Rest::new(tenant, root, 0, extra.clone(), permit);
            let make = |id| SequenceEntry::new(SequenceShared::new(id, name.clone(), state.clone()), rest);
            forks.push(self.register(make, effects));
        }
        if shows_staged && let Some(&tail) = state.blocks.last() {
            // Whoever is left with it writes where a view of the staged tokens may still look.
            self.blocks.get_mut(tail).rewound = true;
        }
        self.counters.forks += u64::from(count);
        Ok(Outcome::Forked(forks))
    }

    /// Closes a sequence, and returns the operations that waited for it.
    pub(super) fn close(&mut self, index: usize, effects: &mut Effects) -> VecDeque<OpRef> {
        let entry = self.sequences.remove(index);
        let state = std::mem::take(&mut *entry.shared.state());
        for block in state.blocks {
            self.blocks.release(block);
        }
        self.blocks.unreserve(entry.rest.reserved);
        self.config.token_budget.give_back(u64::from(state.committed));
        effects.closed.push(entry.shared.id());
        entry.parked
    }

    pub(super) fn truncate(&mut self, index: usize, tokens: u32) -> Result<Outcome, Error> {
        let entry = &mut self.sequences[index];
        let shared = entry.shared.clone();
        let mut state = shared.state();
        let visible = state.committed;
        if tokens > visible {
            return Err(Error::TokenRange { range: 0..tokens, visible });
        }
        let dropped = state.dropped();
        if dropped.start < tokens && tokens < dropped.end {
            return Err(Error::TokensDropped { range: 0..tokens, dropped });
        }
        if tokens <= dropped.start {
            state.window_start = 0;
        }
        entry.rest.extra.retain(|&(at, _)| at < tokens);
        self.config.token_budget.give_back(u64::from(visible - tokens));
        state.committed = tokens;
        state.staged = Vec::new();
        self.release_tail(&mut state, true);
        Ok(Outcome::Truncated { committed: tokens })
    }

    /// Lets go of the blocks behind the last token. With `rewound`, the block that holds it was cut.
    fn release_tail(&mut self, state: &mut SequenceState, rewound: bool) {
        let layout = &self.config.layout;
        let keep = layout.blocks_for(state.end() as usize);
        for block in state.blocks.drain(keep..) {
            self.blocks.release(block);
        }
        let partial = !(state.committed as usize).is_multiple_of(layout.block_tokens);
        if rewound && partial {
            let tail = state.blocks[layout.blocks_for(state.committed as usize) - 1];
            let block = self.blocks.get_mut(tail);
            if block.refs == 1 {
                self.blocks.reopen_raw(tail);
            } else {
                // Others still count its tokens as they were. The write to come copies it anyway.
                block.rewound = true;
            }
        }
    }

    pub(super) fn plan_append(
        &mut self,
        op: OpRef,
        index: usize,
        at: Option<u32>,
        tokens: u32,
        tensors: &TensorSpans,
    ) -> Progress {
        let staged_or_moved = {
            let state = self.sequences[index].shared.state();
            match at {
                Some(expected) if expected != state.committed => {
                    Some(Error::Position { expected, actual: state.committed })
                }
                _ if !state.staged.is_empty() => {
                    Some(Error::StagedTokens { staged: state.end() - state.committed })
                }
                _ => None,
            }
        };
        if let Some(error) = staged_or_moved {
            return Progress::Done(Err(error));
        }
        self.plan_write(op, index, 0..self.config.layout.layers, tokens, tensors)
    }

    pub(super) fn plan_stage(
        &mut self,
        op: OpRef,
        index: usize,
        layer: u32,
        tokens: u32,
        tensors: &TensorSpans,
    ) -> Progress {
        self.plan_write(op, index, layer as usize..layer as usize + 1, tokens, tensors)
    }

    /// Launches the scatter of `tokens` tokens to `layers`, behind what the first of them holds already.
    fn plan_write(
        &mut self,
        op: OpRef,
        index: usize,
        layers: Range<usize>,
        tokens: u32,
        tensors: &TensorSpans,
    ) -> Progress {
        let shared = self.sequences[index].shared.clone();
        let mut state = shared.state();
        let start = state.visible(layers.start);
        let max_tokens = self.config.max_tokens;
        let end = match start.checked_add(tokens) {
            Some(end) if end <= max_tokens => end,
            _ => {
                let tokens = u64::from(start) + u64::from(tokens);
                return Progress::Done(Err(Error::SequenceTooLong { tokens, max_tokens }));
            }
        };
        if let Err(error) = self.config.token_budget.check(u64::from(end - state.committed)) {
            return Progress::Done(Err(error));
        }
        let bytes = tensors.keys.len() + tensors.values.len();
        let lane = self.lane_for(LaneKind::Upload, bytes);
        let prepared = match self.prepare_blocks(index, &mut state, start..end) {
            Ok(steps) => steps,
            Err(error) => return Progress::Done(Err(error)),
        };
        // Pins before the flight is borrowed: sealing may move a block that a copy reads.
        let pins: SmallVec<[_; 1]> =
            prepared.pinned.iter().filter_map(|&block| self.blocks.pin(block)).collect();
        let block_tokens = self.config.layout.block_tokens;
        let replacing = &self.sequences[index].rest.replacing;
        let written = |at| replacing.iter().find(|(place, _)| *place == at).map_or(state.blocks[at], |r| r.1);
        let writing: SmallVec<[BlockId; 2]> =
            pieces(block_tokens, start..end).map(|(at, _)| written(at)).collect();
        for &block in &writing {
            self.blocks.get_mut(block).writing = true;
        }
        let slots: SmallVec<[usize; 4]> = writing.iter().map(|&block| self.blocks.offset(block)).collect();
        self.sequences[index].writing = writing;
        let (launch, flight) = self.flight(lane, op, None);
        launch.flights[flight].pins.extend(pins);
        launch.steps.extend(prepared.steps);
        let mut first_token = 0;
        for ((_, inside), slot_offset) in pieces(block_tokens, start..end).zip(slots) {
            let count = inside.len();
            launch.steps.push(Step::Append(AppendStep {
                flight,
                layers: layers.clone(),
                keys_at: tensors.keys.start,
                values_at: tensors.values.start,
                payload_tokens: tokens as usize,
                first_token,
                slot_offset,
                tokens: inside,
            }));
            first_token += count;
        }
        self.counters.bytes_in += bytes as u64;
        Progress::Flying
    }

    /// Makes every block under `range` exist and be this sequence's to write, or changes nothing.
    fn prepare_blocks(
        &mut self,
        index: usize,
        state: &mut SequenceState,
        range: Range<u32>,
    ) -> Result<Prepared, Error> {
        let layout = self.config.layout;
        let existing = state.blocks.len();
        let touched = range.start as usize / layout.block_tokens..layout.blocks_for(range.end as usize);
        let mut replace = SmallVec::<[Replacement; 1]>::new();
        for at in touched.start..touched.end.min(existing) {
            let id = state.blocks[at];
            if !self.is_writable(id) {
                replace.push(Replacement { index: at, from: id });
            }
        }
        let needed = replace.len() + touched.end.saturating_sub(existing);
        if needed > 0 {
            let reserved = self.sequences[index].rest.reserved.min(needed);
            let free = self.blocks.raw_available(needed - reserved);
            if needed - reserved > free {
                return Err(Error::Capacity {
                    needed: needed as u32,
                    free: (free + reserved) as u32,
                    evictable: 0,
                });
            }
            let rest = &mut self.sequences[index].rest;
            rest.reserved -= reserved;
            rest.reserved_in_flight = reserved;
            self.blocks.pool_mut().unreserve_raw(reserved);
        }
        let mut prepared = Prepared::default();
        if needed == 0 {
            return Ok(prepared);
        }
        let tenant = self.sequences[index].rest.tenant;
        let mut after_private = state.blocks.last().is_some_and(|&id| self.is_private(id));
        for Replacement { index: at, from } in replace {
            let (source, format) = (self.blocks.offset(from), self.blocks.format(from));
            // Decoded bytes are not what the model computed: they never pass as the clean block.
            let private = self.blocks.get(from).private || format != Format::Raw;
            let new = self.blocks.create(tenant, private);
            // The copy overwrites the whole slot, so there is nothing to zero.
            prepared.steps.push(match format {
                Format::Raw => Step::Copy { from_offset: source, to_offset: new.offset },
                format => Step::Reopen { format, from_offset: source, to_offset: new.offset },
            });
            self.blocks.copy_token_ids(from, new.id);
            self.sequences[index].rest.replacing.push((at, new.id));
            after_private = private;
            prepared.pinned.push(from);
            self.counters.copies_on_write += 1;
        }
        for _ in existing..touched.end {
            after_private |= state.window_start > SINK_TOKENS;
            let new = self.blocks.create(tenant, after_private);
            if new.must_zero {
                prepared.steps.push(Step::Zero { slot_offset: new.offset });
                self.counters.slots_zeroed += 1;
            }
            state.blocks.push(new.id);
        }
        Ok(prepared)
    }

    fn is_private(&self, id: BlockId) -> bool {
        id == BlockId::DROPPED || self.blocks.get(id).private
    }

    /// Whether a write may go straight into the block.
    fn is_writable(&mut self, id: BlockId) -> bool {
        let block = self.blocks.get(id);
        if block.refs > 1 || block.moving || block.state != BlockState::Open {
            return false;
        }
        // A view taken before tokens were cut off still shows them, and the write would change them under its eyes.
        if block.rewound && !self.blocks.is_pinned(id) {
            self.blocks.get_mut(id).rewound = false;
        }
        !self.blocks.get(id).rewound
    }

    /// A write has landed, one way or the other: its blocks may be moved again.
    fn end_write(&mut self, index: usize) {
        for block in self.sequences[index].writing.drain(..) {
            self.blocks.get_mut(block).writing = false;
        }
        self.blocks.resume_draining();
    }

    /// A write has landed: its copies take their places.
    fn keep_write(&mut self, index: usize) {
        self.end_write(index);
        let entry = &mut self.sequences[index];
        entry.rest.reserved_in_flight = 0;
        if entry.rest.replacing.is_empty() {
            return;
        }
        let replacing = std::mem::take(&mut entry.rest.replacing);
        let shared = entry.shared.clone();
        let mut state = shared.state();
        for (at, new) in replacing {
            self.blocks.release(std::mem::replace(&mut state.blocks[at], new));
        }
    }

    /// Lets go of what a failed write had taken: the sequence has what it had.
    fn abandon_write(&mut self, index: usize, error: &Error) {
        self.end_write(index);
        let entry = &mut self.sequences[index];
        let shared = entry.shared.clone();
        let mut state = shared.state();
        let keep = self.config.layout.blocks_for(state.end() as usize);
        let copies = std::mem::take(&mut entry.rest.replacing).into_iter().map(|(_, copy)| copy);
        for block in copies.chain(state.blocks.drain(keep..)) {
            if matches!(error, Error::Device(_)) {
                // Nobody knows how far it came: the slot may still hold what was there before.
                self.blocks.spoil(block);
            }
            self.blocks.release(block);
        }
        // What was promised is promised again, unless somebody looks at the slots that came back.
        let reserved = std::mem::take(&mut entry.rest.reserved_in_flight);
        if self.blocks.pool_mut().reserve_raw(reserved) {
            entry.rest.reserved += reserved;
        }
    }

    pub(super) fn land_append(
        &mut self,
        index: usize,
        landed: Result<(), Error>,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
    ) -> Result<Outcome, Error> {
        let tokens = token_ids.len() as u64;
        if let Err(error) = landed.and_then(|()| self.config.token_budget.take(tokens)) {
            self.abandon_write(index, &error);
            return Err(error);
        }
        self.keep_write(index);
        Ok(Outcome::Appended { committed: self.commit(index, token_ids, extra) })
    }

    pub(super) fn land_stage(
        &mut self,
        index: usize,
        landed: Result<(), Error>,
        layer: u32,
        tokens: u32,
    ) -> Result<Outcome, Error> {
        if let Err(error) = landed {
            self.abandon_write(index, &error);
            return Err(error);
        }
        self.keep_write(index);
        let shared = &self.sequences[index].shared;
        let mut state = shared.state();
        if state.staged.is_empty() {
            state.staged = vec![state.committed; self.config.layout.layers];
        }
        let staged = &mut state.staged[layer as usize];
        *staged += tokens;
        Ok(Outcome::Staged { staged: *staged })
    }

    pub(super) fn commit_staged(
        &mut self,
        index: usize,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
    ) -> Result<Outcome, Error> {
        let shared = self.sequences[index].shared.clone();
        let tokens = token_ids.len() as u32;
        let most_staged = {
            let state = shared.state();
            for layer in 0..self.config.layout.layers {
                let staged = state.visible(layer) - state.committed;
                if staged < tokens {
                    return Err(Error::NotStaged { tokens, layer: layer as u32, staged });
                }
            }
            state.end() - state.committed
        };
        self.config.token_budget.take(u64::from(tokens))?;
        let committed = self.commit(index, token_ids, extra);
        let mut state = shared.state();
        state.staged = Vec::new();
        self.release_tail(&mut state, most_staged > tokens);
        Ok(Outcome::Committed { committed })
    }

    /// Counts tokens in whose keys and values are in place in every layer. The caller has taken them from the budget.
    fn commit(&mut self, index: usize, token_ids: &[u32], extra: Option<ExtraIdentity>) -> u32 {
        let layout = self.config.layout;
        let tokens = token_ids.len() as u32;
        let shared = self.sequences[index].shared.clone();
        let mut state = shared.state();
        let start = state.committed;
        let mut done = 0;
        if let Some(extra) = extra {
            self.sequences[index].rest.extra.extend((start..start + tokens).map(|at| (at, extra)));
        }
        for (at, inside) in pieces(layout.block_tokens, start..start + tokens) {
            let id = state.blocks[at];
            // Computed from fewer tokens than there are ids: no key says which.
            self.blocks.get_mut(id).private |= state.window_start > SINK_TOKENS;
            self.blocks.set_token_ids(id, inside.start, &token_ids[done..done + inside.len()]);
            done += inside.len();
            if inside.end == layout.block_tokens {
                let key = self.next_key(index, &state, at);
                self.blocks.complete(id, key, &mut self.counters);
            }
        }
        state.committed = start + tokens;
        self.counters.tokens_committed += u64::from(tokens);
        if let Some(ratio) = self.config.keep_ratio {
            self.drop_tokens(&mut state, ratio);
        }
        state.committed
    }

    /// The key of a block that has just become full; none behind a private block.
    fn next_key(&self, index: usize, state: &SequenceState, at: usize) -> Option<BlockKey> {
        let entry = &self.sequences[index];
        let parent = match at.checked_sub(1) {
            None => entry.rest.root,
            Some(before) if state.blocks[before] == BlockId::DROPPED => return None,
            Some(before) => self.blocks.key(state.blocks[before])?,
        };
        let block_tokens = self.config.layout.block_tokens as u32;
        let inside = at as u32 * block_tokens..(at as u32 + 1) * block_tokens;
        let extra = entry.rest.extra.iter().copied().filter(|(position, _)| inside.contains(position));
        let extra = extra.map(|(position, identity)| (position - inside.start, identity));
        Some(BlockKey::child(&self.config.secret, parent, self.blocks.token_ids(state.blocks[at]), extra))
    }

    /// Token dropping by truncation: keeps the first tokens and the most recent ones, `ratio` of all together.
    ///
    /// Attention sinks plus a recent window, as in StreamingLLM (Xiao et al., 2024, arXiv 2309.17453). The window never
    /// moves back, and whole blocks go without moving a byte.
    fn drop_tokens(&mut self, state: &mut SequenceState, ratio: f32) {
        let kept = (f64::from(state.committed) * f64::from(ratio)).ceil() as u32;
        let recent = kept.saturating_sub(SINK_TOKENS).max(1);
        let window_start = state.committed.saturating_sub(recent);
        if window_start <= state.window_start.max(SINK_TOKENS) {
            return;
        }
        let block_tokens = self.config.layout.block_tokens as u32;
        // Whole blocks between the sinks and the window.
        let first = SINK_TOKENS.div_ceil(block_tokens).max(state.window_start / block_tokens);
        state.window_start = window_start;
        for at in first..window_start / block_tokens {
            let id = std::mem::replace(&mut state.blocks[at as usize], BlockId::DROPPED);
            self.blocks.release(id);
        }
        self.counters.window_moves += 1;
    }

    pub(super) fn plan_read(
        &mut self,
        op: OpRef,
        index: usize,
        layer: u32,
        tokens: &Range<u32>,
        buffer: Option<ReadBuffer>,
    ) -> Progress {
        let shared = self.sequences[index].shared.clone();
        let state = shared.state();
        if let Err(error) = state.check_readable(layer as usize, tokens) {
            return Progress::Done(Err(error));
        }
        let layout = self.config.layout;
        let output = buffer.unwrap_or_else(|| ReadBuffer::new(&layout, tokens.len()));
        if tokens.is_empty() {
            return Progress::Done(Ok(Outcome::Read(output)));
        }
        let bytes = tokens.len() * (layout.token_bytes(Plane::Key) + layout.token_bytes(Plane::Value));
        let sources: SmallVec<[_; 4]> = pieces(layout.block_tokens, tokens.clone())
            .map(|(at, inside)| {
                let id = state.blocks[at];
                (self.blocks.offset(id), self.blocks.format(id), self.blocks.pin(id), inside)
            })
            .collect();
        let lane = self.lane_for(LaneKind::Download, bytes);
        let (launch, flight) = self.flight(lane, op, Some(output));
        let mut output_token = 0;
        for (slot_offset, format, pin, tokens) in sources {
            let count = tokens.len();
            launch.flights[flight].pins.extend(pin);
            let layer = layer as usize;
            launch.steps.push(Step::Read(ReadStep {
                flight,
                format,
                slot_offset,
                layer,
                tokens,
                output_token,
            }));
            output_token += count;
        }
        self.counters.bytes_out += bytes as u64;
        Progress::Flying
    }
}

/// Steps that make blocks writable, and the blocks that the copies among them read.
#[derive(Default)]
struct Prepared {
    steps: SmallVec<[Step; 1]>,
    pinned: SmallVec<[BlockId; 1]>,
}
