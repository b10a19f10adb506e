//! Operations on sequences: what each one checks, takes, launches, and does when it lands.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::blocks::BlockStore;
use super::cached::{Origin, Published, Room};
use super::core::{CoreConfig, DeviceCore, Effects, Progress};
use super::entry::{Rest, SequenceEntry, Sharing};
use crate::batch::Outcome;
use crate::block::{BlockId, BlockKey, BlockState, ExtraIdentity};
use crate::dropping::Compacted;
use crate::error::Error;
use crate::geometry::Plane;
use crate::memory::{AppendStep, LaneKind, OpRef, ReadBuffer, ReadStep, Step};
use crate::payload::TensorView;
use crate::permit::Permit;
use crate::pool::SizeClass;
use crate::sequence::{SINK_TOKENS, SequenceShared, SequenceState, pieces};
use crate::stats::CoreCounters;

impl DeviceCore {
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
            let stored = state.stored(state.committed) as usize;
            let partial = !stored.is_multiple_of(self.config.layout.block_tokens);
            let shows_staged = partial && state.end() > state.committed;
            // Staged tokens are the owner's alone.
            let blocks = state.blocks[..self.config.layout.blocks_for(stored)].into();
            let SequenceState { committed, window_start, ref compacted, .. } = *state;
            let compacted = compacted.clone();
            (shows_staged, SequenceState { committed, staged: Vec::new(), blocks, window_start, compacted })
        };
        let (tenant, name) = (parent.rest.tenant, parent.shared.tenant().clone());
        let sharing = parent.rest.sharing.clone();
        let extra: Vec<_> =
            parent.rest.extra.iter().copied().filter(|&(at, _)| at < state.committed).collect();
        self.config.token_budget.take(u64::from(state.committed) * u64::from(count))?;
        let mut forks = Vec::with_capacity(count as usize);
        for _ in 0..count {
            for &block in state.blocks.iter().filter(|&&block| block != BlockId::DROPPED) {
                self.blocks.retain(block);
            }
            let permit = permit.as_mut().and_then(|all| all.split(1));
            let mut rest = Rest::new(tenant, sharing.clone(), 0, extra.clone(), permit);
            self.blocks.follow(&mut rest.tail, &state);
            let layout = self.config.layout;
            let make =
                |id| SequenceEntry::new(SequenceShared::new(id, name.clone(), state.clone()), rest, &layout);
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
    pub(super) fn close(&mut self, index: usize, effects: &mut Effects) -> Vec<OpRef> {
        let mut entry = self.sequences.remove(index);
        let state = {
            let mut shown = entry.shared.state();
            entry.shared.publish_committed(0);
            std::mem::take(&mut *shown)
        };
        // From its end: what comes last is worth least to others.
        for &block in state.blocks.iter().rev() {
            self.blocks.release(block);
        }
        self.blocks.unfollow(&mut entry.rest.tail);
        self.blocks.unreserve(entry.rest.tenant, entry.rest.reserved);
        self.config.token_budget.give_back(u64::from(state.committed));
        effects.closed.push(entry.id);
        std::iter::from_fn(|| entry.unpark()).collect()
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
        // What is cut to tokens of which all are there is as if nothing had ever been dropped.
        let is_thinned = |compacted: &Arc<Compacted>| compacted.stored(tokens) < tokens;
        state.compacted =
            state.compacted.take().filter(is_thinned).map(|compacted| match compacted.truncated(tokens) {
                same if same == *compacted => compacted,
                cut => Arc::new(cut),
            });
        entry.rest.extra.retain(|&(at, _)| at < tokens);
        self.config.token_budget.give_back(u64::from(visible - tokens));
        state.committed = tokens;
        state.staged.clear();
        release_tail(&mut self.blocks, &self.config, &mut state, true);
        self.blocks.follow(&mut entry.rest.tail, &state);
        entry.glance.renew(&shared, &state, &self.config.layout);
        Ok(Outcome::Truncated { committed: tokens })
    }

    /// Launches the scatter of `tokens` tokens to the target's layers, behind what the first of them holds already.
    pub(super) fn plan_write(
        &mut self,
        op: OpRef,
        index: usize,
        target: WriteTarget,
        tokens: u32,
        view: TensorView,
    ) -> Progress {
        let TensorView { spans: tensors, tokens: payload_tokens, mut first_token, bytes } = view;
        let lane = self.config.lane_for(LaneKind::Upload, bytes, tensors.on_device);
        let DeviceCore { sequences, blocks, config, counters, .. } = self;
        let SequenceEntry { shared, rest, took_blocks, .. } = &mut sequences[index];
        let mut state = shared.state();
        let range = match check_write(config, &state, &target, tokens) {
            Ok(range) => state.stored_range(&range),
            Err(error) => return Progress::Done(Err(error)),
        };
        if is_moving(blocks, &state, config.layout.block_tokens, range.clone()) {
            self.waiting_for_moves.push(op);
            return Progress::Flying;
        }
        let prepared = match prepare_blocks(rest, blocks, config, counters, &mut state, range.clone()) {
            Ok(prepared) => prepared,
            Err(Shortage { needed, reserved }) => {
                drop(state);
                let owner = rest.tenant;
                return match self.make_room(op, owner, needed) {
                    Room::Now => self.plan_write(op, index, target, tokens, view),
                    Room::Soon => Progress::Flying,
                    Room::Never => Progress::Done(Err(self.capacity_error(owner, needed, reserved))),
                };
            }
        };
        *took_blocks = prepared.took_blocks;
        // Pinned: sealing may move a block that a copy reads.
        let pins: SmallVec<[_; 1]> = prepared.pinned.iter().filter_map(|&block| blocks.pin(block)).collect();
        let block_tokens = config.layout.block_tokens;
        let mut slots = SmallVec::<[(Range<usize>, usize); 2]>::new();
        for (at, inside) in pieces(block_tokens, range) {
            let replaced = || rest.replacing.iter().find(|(place, _)| *place == at).map(|(_, copy)| *copy);
            let block = if *took_blocks { replaced() } else { None }.unwrap_or(state.blocks[at]);
            blocks.get_mut(block).writing = true;
            rest.writing.push(block);
            slots.push((inside, blocks.offset(block)));
        }
        drop(state);
        let layers = match target {
            WriteTarget::AllLayers { .. } => 0..config.layout.layers,
            WriteTarget::Layer(layer) => layer as usize..layer as usize + 1,
        };
        counters.bytes_in += bytes as u64;
        let (launch, flight) = self.flight(lane, op, None);
        launch.pins.extend(pins);
        launch.steps.extend(prepared.steps);
        for (inside, slot_offset) in slots {
            let count = inside.len();
            launch.steps.push(Step::Append(AppendStep {
                flight,
                layers: layers.clone(),
                keys_at: tensors.keys_at,
                values_at: tensors.values_at,
                on_device: tensors.on_device,
                payload_tokens,
                first_token,
                slot_offset,
                tokens: inside,
            }));
            first_token += count;
        }
        Progress::Flying
    }

    /// Ends the write in flight: it has landed, one way or the other.
    ///
    /// If it went well its copies take their places; otherwise the sequence has what it had.
    fn end_write(
        (in_place, took_blocks, rest): (Option<BlockId>, &mut bool, &mut Rest),
        blocks: &mut BlockStore,
        config: &CoreConfig,
        state: &mut SequenceState,
        landed: &Result<(), Error>,
    ) {
        for block in rest.writing.drain(..).chain(in_place) {
            blocks.get_mut(block).writing = false;
        }
        blocks.resume_draining();
        if !std::mem::take(took_blocks) {
            return;
        }
        let reserved = std::mem::take(&mut rest.reserved_in_flight);
        let replacing = std::mem::take(&mut rest.replacing);
        let Err(error) = landed else {
            for (at, new) in replacing {
                blocks.release(std::mem::replace(&mut state.blocks[at], new));
            }
            return;
        };
        let keep = config.layout.blocks_for(state.stored(state.end()) as usize);
        for block in replacing.into_iter().map(|(_, copy)| copy).chain(state.blocks.drain(keep..)) {
            if matches!(error, Error::Device(_)) {
                // Nobody knows how far it came: the slot may still hold what was there before.
                blocks.spoil(block);
            }
            blocks.release(block);
        }
        // What was promised is promised again, unless somebody looks at the slots that came back.
        if blocks.pool_mut().reserve_raw_again(reserved) {
            rest.reserved += reserved;
            blocks.charge(rest.tenant, SizeClass::Raw, reserved as i64);
        }
    }

    pub(super) fn land_append(
        &mut self,
        index: usize,
        landed: Result<(), Error>,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
    ) -> Result<Outcome, Error> {
        let DeviceCore { sequences, blocks, config, counters, .. } = self;
        let SequenceEntry { shared, rest, took_blocks, in_place, glance, .. } = &mut sequences[index];
        let mut state = shared.state();
        let landed = landed.and_then(|()| config.token_budget.take(token_ids.len() as u64));
        let in_place = std::mem::take(in_place).then_some(glance.tail);
        Self::end_write((in_place, took_blocks, rest), blocks, config, &mut state, &landed);
        if landed.is_ok() {
            commit(rest, blocks, config, counters, &mut state, token_ids, extra);
        }
        blocks.follow(&mut rest.tail, &state);
        glance.renew(shared, &state, &config.layout);
        landed?;
        Ok(Outcome::Appended { committed: state.committed })
    }

    pub(super) fn land_stage(
        &mut self,
        index: usize,
        landed: Result<(), Error>,
        layer: u32,
        tokens: u32,
    ) -> Result<Outcome, Error> {
        let DeviceCore { sequences, blocks, config, .. } = self;
        let SequenceEntry { shared, rest, took_blocks, glance, .. } = &mut sequences[index];
        let mut state = shared.state();
        Self::end_write((None, took_blocks, rest), blocks, config, &mut state, &landed);
        if landed.is_ok() {
            if state.staged.is_empty() {
                let committed = state.committed;
                state.staged.resize(config.layout.layers, committed);
            }
            state.staged[layer as usize] += tokens;
        }
        blocks.follow(&mut rest.tail, &state);
        glance.renew(shared, &state, &config.layout);
        landed.map(|()| Outcome::Staged { staged: state.staged[layer as usize] })
    }

    pub(super) fn commit_staged(
        &mut self,
        index: usize,
        token_ids: &[u32],
        extra: Option<ExtraIdentity>,
    ) -> Result<Outcome, Error> {
        let DeviceCore { sequences, blocks, config, counters, .. } = self;
        let SequenceEntry { shared, rest, glance, .. } = &mut sequences[index];
        let mut state = shared.state();
        let tokens = token_ids.len() as u32;
        for layer in 0..config.layout.layers {
            let staged = state.visible(layer) - state.committed;
            if staged < tokens {
                return Err(Error::NotStaged { tokens, layer: layer as u32, staged });
            }
        }
        config.token_budget.take(u64::from(tokens))?;
        let rewound = state.end() - state.committed > tokens;
        commit(rest, blocks, config, counters, &mut state, token_ids, extra);
        // Its memory stays: the next token is staged just so.
        state.staged.clear();
        release_tail(blocks, config, &mut state, rewound);
        blocks.follow(&mut rest.tail, &state);
        glance.renew(shared, &state, &config.layout);
        Ok(Outcome::Committed { committed: state.committed })
    }

    pub(super) fn plan_read(
        &mut self,
        op: OpRef,
        index: usize,
        layer: u32,
        tokens: &Range<u32>,
        output: ReadOutput,
    ) -> Progress {
        let DeviceCore { sequences, pending, blocks, config, counters, building, .. } = self;
        let state = sequences[index].shared.state();
        if let Err(error) = state.check_readable(layer as usize, tokens) {
            return Progress::Done(Err(error));
        }
        let layout = config.layout;
        let (output, on_device) = match output {
            ReadOutput::Buffer(buffer) => {
                let output = buffer.unwrap_or_else(|| Box::new(ReadBuffer::new(&layout, tokens.len())));
                if tokens.is_empty() {
                    return Progress::Done(Ok(Outcome::Read(output)));
                }
                (Some(output), None)
            }
            ReadOutput::Device(addresses) => (None, Some(addresses)),
        };
        let bytes = tokens.len() * (layout.token_bytes(Plane::Key) + layout.token_bytes(Plane::Value));
        let sources: SmallVec<[_; 4]> = state
            .pieces(&layout, tokens.clone())
            .map(|(at, inside)| {
                let id = state.blocks[at];
                (blocks.offset(id), blocks.format(id), blocks.positions(id), blocks.pin(id), inside)
            })
            .collect();
        let lane = config.lane_for(LaneKind::Download, bytes, on_device.is_some());
        let (launch, flight) = building.flight(lane, op, pending.submission_mut(op), output);
        let mut output_token = 0;
        for (slot_offset, format, positions, pin, tokens) in sources {
            let count = tokens.len();
            launch.pins.extend(pin);
            let layer = layer as usize;
            launch.steps.push(Step::Read(ReadStep {
                flight,
                format,
                positions,
                slot_offset,
                layer,
                tokens,
                output_token,
                on_device,
            }));
            output_token += count;
        }
        counters.bytes_out += bytes as u64;
        Progress::Flying
    }
}

/// Where a read goes.
pub(super) enum ReadOutput {
    /// Host memory.
    Buffer(Option<Box<ReadBuffer>>),
    /// Keys and values in the device's memory.
    Device([u64; 2]),
}

/// Where a write goes.
pub(super) enum WriteTarget {
    /// An append, with the position that it expects.
    AllLayers { at: Option<u32> },
    /// A staged layer.
    Layer(u32),
}

/// The positions that a write will fill, or why it may not.
fn check_write(
    config: &CoreConfig,
    state: &SequenceState,
    target: &WriteTarget,
    tokens: u32,
) -> Result<Range<u32>, Error> {
    let start = match *target {
        WriteTarget::AllLayers { at: Some(expected) } if expected != state.committed => {
            return Err(Error::Position { expected, actual: state.committed });
        }
        WriteTarget::AllLayers { .. } if !state.staged.is_empty() => {
            return Err(Error::StagedTokens { staged: state.end() - state.committed });
        }
        WriteTarget::AllLayers { .. } => state.committed,
        WriteTarget::Layer(layer) => state.visible(layer as usize),
    };
    let max_tokens = config.max_tokens;
    let end = match start.checked_add(tokens) {
        Some(end) if end <= max_tokens => end,
        _ => return Err(Error::SequenceTooLong { tokens: u64::from(start) + u64::from(tokens), max_tokens }),
    };
    config.token_budget.check(u64::from(end - state.committed))?;
    Ok(start..end)
}

/// Whether a block that is being written to, at these stored tokens, is on its way to another slot. The write waits for it: a copy of
/// its own would take a slot that may be promised.
fn is_moving(blocks: &BlockStore, state: &SequenceState, block_tokens: usize, range: Range<u32>) -> bool {
    pieces(block_tokens, range).filter_map(|(at, _)| state.blocks.get(at)).any(|&id| {
        let block = blocks.get(id);
        block.moving_to.is_some() && block.state == BlockState::Open
    })
}

/// Steps that make blocks writable, and the blocks that the copies among them read.
#[derive(Default)]
struct Prepared {
    steps: SmallVec<[Step; 1]>,
    pinned: SmallVec<[BlockId; 1]>,
    took_blocks: bool,
}

/// So many raw slots are needed and not vacant, beside those that were reserved.
struct Shortage {
    needed: usize,
    reserved: usize,
}

/// Makes every block under the stored tokens `range` exist and be this sequence's to write, or changes nothing.
fn prepare_blocks(
    rest: &mut Rest,
    blocks: &mut BlockStore,
    config: &CoreConfig,
    counters: &mut CoreCounters,
    state: &mut SequenceState,
    range: Range<u32>,
) -> Result<Prepared, Shortage> {
    let layout = config.layout;
    let existing = state.blocks.len();
    let touched = range.start as usize / layout.block_tokens..layout.blocks_for(range.end as usize);
    // Places of blocks that the write must not touch: private copies will take them.
    let mut replace = SmallVec::<[usize; 1]>::new();
    for at in touched.start..touched.end.min(existing) {
        if !blocks.is_writable(state.blocks[at]) {
            replace.push(at);
        }
    }
    let needed = replace.len() + touched.end.saturating_sub(existing);
    if needed == 0 {
        return Ok(Prepared::default());
    }
    let reserved = rest.reserved.min(needed);
    if !blocks.has_room(rest.tenant, needed - reserved) {
        return Err(Shortage { needed: needed - reserved, reserved });
    }
    rest.reserved -= reserved;
    rest.reserved_in_flight = reserved;
    // What is taken is charged again at once.
    blocks.unreserve(rest.tenant, reserved);
    let mut prepared = Prepared { took_blocks: true, ..Prepared::default() };
    let mut after_private = state.blocks.last().is_some_and(|&id| blocks.is_private(id));
    for at in replace {
        let from = state.blocks[at];
        let (source, format) = (blocks.offset(from), blocks.format(from));
        // Decoded bytes are not what the model computed: they never pass as the clean block.
        let private = blocks.get(from).private || !format.is_raw();
        let new = blocks.create(rest.tenant, at, private);
        // The copy overwrites the whole slot, so there is nothing to zero.
        prepared.steps.push(if format.is_raw() {
            Step::Copy { from_offset: source, to_offset: blocks.offset(new.id) }
        } else {
            let positions = blocks.positions(from);
            Step::Reopen { format, positions, from_offset: source, to_offset: blocks.offset(new.id) }
        });
        blocks.copy_token_ids(from, new.id);
        blocks.inherit_past(from, new.id);
        rest.replacing.push((at, new.id));
        after_private = private;
        prepared.pinned.push(from);
        counters.copies_on_write += 1;
    }
    for _ in existing..touched.end {
        after_private |= state.window_start > SINK_TOKENS || state.compacted.is_some();
        let new = blocks.create(rest.tenant, state.blocks.len(), after_private);
        if new.must_zero {
            prepared.steps.push(Step::Zero { slot_offset: blocks.offset(new.id) });
            counters.slots_zeroed += 1;
        }
        state.blocks.push(new.id);
    }
    Ok(prepared)
}

/// Lets go of the blocks behind the last token. With `rewound`, the block that holds it was cut.
fn release_tail(blocks: &mut BlockStore, config: &CoreConfig, state: &mut SequenceState, rewound: bool) {
    let layout = &config.layout;
    let keep = layout.blocks_for(state.stored(state.end()) as usize);
    for block in state.blocks.drain(keep..) {
        blocks.release(block);
    }
    let stored = state.stored(state.committed) as usize;
    let partial = !stored.is_multiple_of(layout.block_tokens);
    if rewound && partial {
        let tail = state.blocks[layout.blocks_for(stored) - 1];
        if blocks.get(tail).refs == 1 {
            blocks.reopen_raw(tail);
        } else {
            // Others still count its tokens as they were. The write to come copies it anyway.
            blocks.get_mut(tail).rewound = true;
        }
    }
}

/// Counts tokens in whose keys and values are in place in every layer. The caller has taken them from the budget.
pub(super) fn commit(
    rest: &mut Rest,
    blocks: &mut BlockStore,
    config: &CoreConfig,
    counters: &mut CoreCounters,
    state: &mut SequenceState,
    token_ids: &[u32],
    extra: Option<ExtraIdentity>,
) {
    let block_tokens = config.layout.block_tokens;
    let tokens = token_ids.len() as u32;
    let start = state.committed;
    let stored = state.stored(start);
    let mut done = 0;
    if let Some(extra) = extra {
        rest.extra.extend((start..start + tokens).map(|at| (at, extra)));
    }
    for (at, inside) in pieces(block_tokens, stored..stored + tokens) {
        let id = state.blocks[at];
        // Computed from fewer tokens than there are ids: no key says which.
        blocks.get_mut(id).private |= state.window_start > SINK_TOKENS || state.compacted.is_some();
        blocks.set_token_ids(id, inside.start, &token_ids[done..done + inside.len()]);
        done += inside.len();
        if inside.end == block_tokens {
            if let Some(sharing) = &rest.sharing
                && let Some(key) = next_key(sharing, &rest.extra, blocks, config, state, at)
            {
                let parent = at.checked_sub(1).map(|before| state.blocks[before]);
                let position = (at * block_tokens) as u32;
                let inside = position..position + block_tokens as u32;
                let has_extra = rest.extra.iter().any(|(position, _)| inside.contains(position));
                let origin = Origin { parent, root: sharing.root_number, has_extra };
                let touch = (at as u32, sharing.prompt_blocks);
                let published = blocks.publish_key(id, &key, origin, touch, counters);
                let kept = if let Published::Twin(twin) = published { twin } else { id };
                blocks.set_retention(kept, &sharing.retention, position);
                if let Published::Twin(twin) = published {
                    blocks.release(id);
                    state.blocks[at] = twin;
                    continue;
                }
            }
            complete(blocks, config, counters, state, at);
        }
    }
    state.committed = start + tokens;
    let behind_window =
        |tokens: u32| (tokens as usize / block_tokens).saturating_sub(config.keep_raw.window_blocks);
    for at in behind_window(stored)..behind_window(stored + tokens) {
        blocks.leaves_window(state.blocks[at]);
    }
    counters.tokens_committed += u64::from(tokens);
    if let Some(ratio) = config.dropping.and_then(|dropping| dropping.truncation()) {
        drop_tokens(blocks, config, counters, state, ratio);
    }
}

/// Every token of the block at place `at` of a sequence is committed.
pub(super) fn complete(
    blocks: &mut BlockStore,
    config: &CoreConfig,
    counters: &mut CoreCounters,
    state: &SequenceState,
    at: usize,
) {
    if config.centred {
        blocks.set_positions(state.blocks[at], state.compacted.as_deref(), at);
    }
    blocks.complete(state.blocks[at], counters);
}

/// The key of a block that has just become full; none if it is private or behind a private one.
fn next_key(
    sharing: &Sharing,
    extra: &[(u32, ExtraIdentity)],
    blocks: &BlockStore,
    config: &CoreConfig,
    state: &SequenceState,
    at: usize,
) -> Option<BlockKey> {
    if blocks.is_private(state.blocks[at]) {
        return None;
    }
    let parent = match at.checked_sub(1) {
        None => sharing.root,
        Some(before) if state.blocks[before] == BlockId::DROPPED => return None,
        Some(before) => blocks.key(state.blocks[before])?,
    };
    let block_tokens = config.layout.block_tokens as u32;
    let inside = at as u32 * block_tokens..(at as u32 + 1) * block_tokens;
    let extra = extra.iter().copied().filter(|(position, _)| inside.contains(position));
    let extra = extra.map(|(position, identity)| (position - inside.start, identity));
    Some(config.keys.child(parent, blocks.token_ids(state.blocks[at]), extra))
}

/// Token dropping by truncation: keeps the first tokens and the most recent ones, `ratio` of all together.
///
/// Attention sinks plus a recent window, as in StreamingLLM (Xiao et al., 2024, arXiv 2309.17453). The window never
/// moves back, and whole blocks go without moving a byte.
fn drop_tokens(
    blocks: &mut BlockStore,
    config: &CoreConfig,
    counters: &mut CoreCounters,
    state: &mut SequenceState,
    ratio: f32,
) {
    let kept = (f64::from(state.committed) * f64::from(ratio)).ceil() as u32;
    let recent = kept.saturating_sub(SINK_TOKENS).max(1);
    let window_start = state.committed.saturating_sub(recent);
    if window_start <= state.window_start.max(SINK_TOKENS) {
        return;
    }
    let block_tokens = config.layout.block_tokens as u32;
    // Whole blocks between the sinks and the window.
    let first = SINK_TOKENS.div_ceil(block_tokens).max(state.window_start / block_tokens);
    state.window_start = window_start;
    for at in first..window_start / block_tokens {
        let id = std::mem::replace(&mut state.blocks[at as usize], BlockId::DROPPED);
        blocks.release(id);
    }
    counters.window_moves += 1;
}
