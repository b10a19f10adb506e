//! The short way for appends: nearly every step of a decode adds a token to a block that has room for it.

use super::core::{DeviceCore, OpRef};
use super::entry::SequenceEntry;
use super::plan::commit;
use crate::batch::Operation;
use crate::memory::{AppendStep, LaneKind, Step};
use crate::submission::Submissions;

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
            submissions.iter().flat_map(|submission| submission.operations()).filter_map(Operation::sequence)
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
    /// It takes no lock, no block and no temporary.
    pub(super) fn append_in_place(&mut self, op: OpRef) -> bool {
        let DeviceCore { sequences, pending, blocks, config, counters, building, .. } = self;
        let submission = pending.submission(op);
        let Operation::Append { sequence, at, ids, extra: None, tensors } = pending.operation(op) else {
            return false;
        };
        let Some(entry) = sequences.get_mut(sequence.index()) else { return false };
        let tokens = ids.count;
        // Token dropping looks at the whole sequence.
        let plain = entry.id == *sequence
            && !entry.busy
            && tokens <= entry.glance.room
            && at.is_none_or(|at| at == entry.glance.committed)
            && tokens <= config.max_tokens.saturating_sub(entry.glance.committed)
            && config.keep_ratio.is_none()
            && submission.tenant.as_ref().is_none_or(|tenant| tenant == entry.shared.tenant());
        if !plain
            || config.token_budget.check(u64::from(tokens)).is_err()
            || !blocks.is_writable(entry.glance.tail)
        {
            return false;
        }
        entry.busy = true;
        entry.in_place = true;
        blocks.get_mut(entry.glance.tail).writing = true;
        let slot_offset = blocks.offset(entry.glance.tail);
        let first = config.layout.block_tokens - entry.glance.room as usize;
        let bytes = tensors.bytes();
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
            payload_tokens: tensors.tokens(tokens),
            first_token: tensors.row as usize,
            slot_offset,
            tokens: first..first + tokens as usize,
        }));
        true
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
        entry.in_place = false;
        let SequenceEntry { shared, rest, glance, .. } = entry;
        blocks.get_mut(glance.tail).writing = false;
        blocks.resume_draining();
        let token_ids = ids.of(&pending.submission(op).token_ids);
        if ids.count < glance.room {
            blocks.set_token_ids(glance.tail, config.layout.block_tokens - glance.room as usize, token_ids);
            glance.committed += ids.count;
            glance.room -= ids.count;
            shared.publish_committed(glance.committed);
            counters.tokens_committed += u64::from(ids.count);
        } else {
            let mut state = shared.state();
            commit(rest, blocks, config, counters, &mut state, token_ids, None);
            glance.renew(shared, &state, &config.layout);
        }
        Some((index, glance.committed))
    }
}
