//! The short way for appends: nearly every step of a decode adds a token to a block that has room for it.

use super::blocks::BlockStore;
use super::core::{CoreConfig, DeviceCore};
use super::entry::SequenceEntry;
use super::plan::commit;
use crate::batch::{EachWrite, Operation, Row};
use crate::memory::{AppendRow, AppendRows, AppendStep, LaneKind, OpRef, Step};
use crate::sequence::{SequenceId, Tenant};
use crate::stats::CoreCounters;
use crate::submission::{Brief, Submissions};

/// What so few sequences need is in the caches anyway.
const WARM_MIN: usize = 1024;

impl DeviceCore {
    /// Touches what the operations are about to need.
    ///
    /// With many sequences open each step would wait for memory several times in a row; loads that do not depend on each
    /// other wait together.
    pub fn warm(&self, submissions: &Submissions) {
        if self.sequences.len() <= WARM_MIN {
            return;
        }
        let mut touched = 0u32;
        let ids = || {
            let operations = submissions.iter().flat_map(|submission| submission.operations());
            operations.flat_map(Operation::sequences).flatten()
        };
        for entry in ids().filter_map(|id| self.sequences.get(id.index())) {
            touched = touched.wrapping_add(entry.glance.room);
        }
        for entry in ids().filter_map(|id| self.sequences.get(id.index())) {
            let room = (entry.glance.room as usize).max(1);
            touched = touched.wrapping_add(entry.shared.committed());
            touched = touched
                .wrapping_add(self.blocks.touch(entry.glance.tail, self.config.layout.block_tokens - room));
        }
        std::hint::black_box(touched);
    }

    /// Plans an append if it is of the plain kind that nearly every step of a decode is: into room that is left in a block
    /// which is open, this sequence's alone, and not shown to anybody where it will write. False, with nothing changed, if
    /// it is not: then the long way finds out what it is, or what is wrong with it.
    ///
    /// It takes no lock, no block and no temporary. (A row of a busy sequence is parked instead, which is true as well.)
    pub(super) fn append_in_place(&mut self, op: OpRef) -> bool {
        if self.pending.row(op).is_some() {
            return self.append_rows_in_place(op, op.result + 1) > 0;
        }
        let DeviceCore { sequences, pending, blocks, config, counters, building, .. } = self;
        let submission = pending.submission(op);
        let Operation::Append { sequence, at, ids, extra: None, tensors } = pending.operation(op) else {
            return false;
        };
        let tokens = ids.count;
        if config.token_budget.check(u64::from(tokens)).is_err() {
            return false;
        }
        let Some(entry) = sequences.get_mut(sequence.index()) else { return false };
        if at.is_some_and(|at| at != entry.glance.committed) {
            return false;
        }
        let tenant = submission.tenant.as_ref();
        let Some((slot_offset, first)) = take_room(entry, blocks, config, *sequence, tenant, tokens) else {
            return false;
        };
        let bytes = tensors.whole(tokens).bytes;
        counters.bytes_in += bytes as u64;
        let lane = config.lane_for(LaneKind::Upload, bytes, tensors.on_device);
        let tensors = *tensors;
        let (launch, flight) = building.flight(lane, op, pending.submission_mut(op), None);
        launch.steps.push(Step::Append(AppendStep {
            flight,
            layers: 0..config.layout.layers,
            keys_at: tensors.keys_at,
            values_at: tensors.values_at,
            on_device: tensors.on_device,
            payload_tokens: tokens as usize,
            first_token: 0,
            slot_offset,
            tokens: first..first + tokens as usize,
        }));
        true
    }

    /// [`DeviceCore::append_in_place`] for the rows of an operation, from that of `first` to before result `end`: plans them, or
    /// parks them behind what their sequences are busy with, up to the first that is not plain, and returns how many.
    pub(super) fn append_rows_in_place(&mut self, first: OpRef, end: u32) -> u32 {
        let DeviceCore { sequences, pending, blocks, config, counters, building, .. } = self;
        let submission = pending.submission_mut(first);
        let Operation::Each(each) = &submission.operations[first.index as usize] else { return 0 };
        // Every row alone would have to fit: that all of them do is seen when they land.
        if each.write != EachWrite::Append || config.token_budget.check(1).is_err() {
            return 0;
        }
        let (tensors, tensor_rows) = (each.tensors, each.tensor_rows);
        let bytes = tensors.row(0, tensor_rows).bytes;
        let lane = config.lane_for(LaneKind::Upload, bytes, tensors.on_device);
        let from = (first.result - each.first_result) as usize;
        let count = (end - first.result) as usize;
        let mut planned = building.spare_rows();
        let mut result = first.result;
        for row in &each.rows[from..from + count] {
            let Row { sequence, row, .. } = *row;
            let Some(entry) = sequences.get_mut(sequence.index()).filter(|_| row != Row::REFUSED) else {
                break;
            };
            let tenant = submission.tenant.as_ref();
            let Some((slot_offset, token)) = take_room(entry, blocks, config, sequence, tenant, 1) else {
                if !(entry.busy && entry.is_of(sequence, tenant)) {
                    break;
                }
                entry.park(OpRef { result, ..first });
                result += 1;
                continue;
            };
            planned.push(AppendRow { slot_offset, token: token as u32, row, result, finite: true });
            result += 1;
        }
        let (count, looked_at) = (planned.len(), result - first.result);
        if count == 0 {
            building.recycle_rows(planned);
            return looked_at;
        }
        counters.bytes_in += (count * bytes) as u64;
        building.append_rows(lane, first, &mut submission.payload, planned, |flight| AppendRows {
            op: first,
            flight,
            layers: 0..config.layout.layers,
            keys_at: tensors.keys_at,
            values_at: tensors.values_at,
            on_device: tensors.on_device,
            payload_tokens: tensor_rows as usize,
            rows: Vec::new(),
        });
        looked_at
    }

    /// Lands what [`DeviceCore::append_in_place`] has planned and what went well: the sequence, and its committed tokens.
    ///
    /// None, with nothing changed, if it is something else, or the tokens do not fit the budget any more.
    pub(super) fn land_append_in_place(&mut self, op: OpRef) -> Option<(usize, u32)> {
        let DeviceCore { sequences, pending, blocks, config, counters, .. } = self;
        let Operation::Append { sequence, ids, .. } = pending.operation(op) else { return None };
        let index = sequence.index();
        let entry = &mut sequences[index];
        if !entry.in_place || config.token_budget.take(u64::from(ids.count)).is_err() {
            return None;
        }
        let token_ids = ids.of(&pending.submission(op).token_ids);
        Some((index, fill_room(entry, blocks, config, counters, token_ids)))
    }

    /// [`DeviceCore::land_append_in_place`] for the rows of a step: answers those that went well, and lists the sequences on which
    /// more waits. True if that were the last answers of the submission.
    pub(super) fn land_rows_in_place(&mut self, rows: &AppendRows, waited_for: &mut Vec<u32>) -> bool {
        let DeviceCore { sequences, pending, blocks, config, counters, .. } = self;
        let submission = pending.submission_mut(rows.op);
        let went_well = rows.rows.iter().filter(|row| row.finite);
        // The tokens of all at once; if they do not fit, as many as do.
        let tokens = went_well.clone().count() as u64;
        let together = config.token_budget.take(tokens).is_ok();
        let mut last = false;
        for row in went_well {
            let Operation::Each(each) = &submission.operations[rows.op.index as usize] else { return last };
            let Some(&Row { sequence, token_id, .. }) = each.row_at(row.result) else { return last };
            if !together && config.token_budget.take(1).is_err() {
                continue;
            }
            let entry = &mut sequences[sequence.index()];
            let committed = fill_room(entry, blocks, config, counters, &[token_id]);
            if entry.has_parked() {
                waited_for.push(sequence.index() as u32);
            } else {
                entry.busy = false;
            }
            last = submission.answer(row.result as usize, Brief::Appended(committed));
        }
        last
    }
}

/// Counts in what a plain append has written, and returns how many tokens are committed then. They were taken from the budget.
fn fill_room(
    entry: &mut SequenceEntry,
    blocks: &mut BlockStore,
    config: &CoreConfig,
    counters: &mut CoreCounters,
    token_ids: &[u32],
) -> u32 {
    entry.in_place = false;
    let SequenceEntry { shared, rest, glance, .. } = entry;
    let count = token_ids.len() as u32;
    blocks.get_mut(glance.tail).writing = false;
    blocks.resume_draining();
    if count < glance.room {
        blocks.set_token_ids(glance.tail, config.layout.block_tokens - glance.room as usize, token_ids);
        glance.committed += count;
        glance.room -= count;
        shared.publish_committed(glance.committed);
        counters.tokens_committed += u64::from(count);
    } else {
        let mut state = shared.state();
        commit(rest, blocks, config, counters, &mut state, token_ids, None);
        blocks.follow(&mut rest.tail, &state);
        glance.renew(shared, &state, &config.layout);
    }
    glance.committed
}

/// Sets a plain append of `tokens` tokens on its way if there is room for it: the slot, and the token of the slot where it
/// begins. None, with nothing changed, if it is not plain.
fn take_room(
    entry: &mut SequenceEntry,
    blocks: &mut BlockStore,
    config: &CoreConfig,
    id: SequenceId,
    tenant: Option<&Tenant>,
    tokens: u32,
) -> Option<(usize, usize)> {
    // Token dropping looks at the whole sequence.
    let plain = !entry.busy
        && tokens <= entry.glance.room
        && tokens <= config.max_tokens.saturating_sub(entry.glance.committed)
        && config.dropping.is_none()
        && entry.is_of(id, tenant);
    if !plain || !blocks.is_writable(entry.glance.tail) {
        return None;
    }
    entry.busy = true;
    entry.in_place = true;
    blocks.get_mut(entry.glance.tail).writing = true;
    let first = config.layout.block_tokens - entry.glance.room as usize;
    Some((blocks.offset(entry.glance.tail), first))
}
