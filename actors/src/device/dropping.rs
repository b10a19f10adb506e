//! Dropping tokens by their scores: those that stay are copied to blocks of the sequence's own, which take the place of all that it held.
//!
//! That takes a launch to copy, and one before it where tokens are scored by their keys. The sequence is busy with its operation all the
//! while: one that asks for it, or a write that has landed and is not answered yet, since [`Dropping`](crate::dropping::Dropping) says that it is
//! time. Until the copies are there it has what it had, and so it does if anything fails; a write has gone well all the same, and the next one
//! tries again.

use std::sync::Arc;

use smallvec::SmallVec;

use super::cached::Room;
use super::core::{DeviceCore, Progress};
use super::plan::complete;
use crate::batch::{Operation, Outcome};
use crate::block::BlockId;
use crate::dropping::{Compacted, KeyScore, TokenScores, choose};
use crate::error::Error;
use crate::memory::{GatherStep, LaneKind, OpRef, Purpose, ReadBuffer, ScoreSource, ScoreStep, Step};
use crate::sequence::SINK_TOKENS;

/// How far it has come with one sequence.
#[derive(Debug)]
pub(super) enum Thinning {
    /// Tokens are being scored; so many shall stay.
    Scoring { keep: u32 },
    /// Those that stay are being copied to these blocks.
    Copying { blocks: SmallVec<[BlockId; 6]>, compacted: Compacted },
}

#[cfg(any(test, feature = "testing"))]
impl Thinning {
    /// Blocks that it holds.
    pub(super) fn blocks(&self) -> &[BlockId] {
        match self {
            Thinning::Scoring { .. } => &[],
            Thinning::Copying { blocks, .. } => blocks,
        }
    }
}

/// What a lane has brought back, or why it could not.
type Landed = Result<Option<Box<ReadBuffer>>, Error>;

impl DeviceCore {
    /// An operation asks for it.
    pub(super) fn plan_drop(&mut self, op: OpRef, index: usize) -> Progress {
        if let Err(refused) = self.check_drop(op, index) {
            return Progress::Done(Err(refused));
        }
        let Operation::Drop { keep, ref scores, .. } = *self.pending.operation(op) else {
            return Progress::Flying;
        };
        let keep = keep.max(SINK_TOKENS + 1);
        let stored = self.stored(index);
        if keep >= stored {
            return Progress::Done(Ok(Outcome::Dropped { kept: stored }));
        }
        match &**scores {
            TokenScores::Given(scores) => {
                let kept = choose(scores, keep);
                self.plan_copies(op, index, &kept)
            }
            &TokenScores::Keys(score) => {
                self.plan_scores(op, index, score, keep);
                Progress::Flying
            }
        }
    }

    fn check_drop(&self, op: OpRef, index: usize) -> Result<(), Error> {
        let what = "dropping tokens by scores";
        if self.config.dropping.is_some_and(|dropping| dropping.truncation().is_some()) {
            let instead = "the cache truncates already; choose another `compression.method`, or none";
            return Err(Error::Unsupported { what, instead });
        }
        let state = self.sequences[index].shared.state();
        if !state.staged.is_empty() {
            return Err(Error::StagedTokens { staged: state.end() - state.committed });
        }
        let tokens = state.stored(state.committed);
        match self.pending.operation(op) {
            Operation::Drop { scores, .. } => match &**scores {
                TokenScores::Given(scores) if scores.len() != tokens as usize => {
                    Err(Error::Scores { scores: scores.len(), tokens })
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// A write has been committed. True if tokens are being dropped now, and its answer has to wait.
    pub(super) fn drop_if_due(&mut self, op: OpRef, index: usize) -> bool {
        let Some(dropping) = self.config.dropping else { return false };
        let due = {
            let state = self.sequences[index].shared.state();
            let stored = state.stored(state.committed);
            dropping.due(state.committed, stored, state.thinned(), self.config.layout.block_tokens as u32)
        };
        let Some((score, keep)) = due else { return false };
        let needed = self.config.layout.blocks_for(keep as usize);
        if !self.blocks.has_room(self.sequences[index].rest.tenant, needed) {
            return false;
        }
        self.plan_scores(op, index, score, keep);
        true
    }

    /// Committed tokens that are there.
    fn stored(&self, index: usize) -> u32 {
        let state = self.sequences[index].shared.state();
        state.stored(state.committed)
    }

    fn plan_scores(&mut self, op: OpRef, index: usize, score: KeyScore, keep: u32) {
        let DeviceCore { sequences, blocks, config, building, .. } = self;
        let entry = &mut sequences[index];
        let state = entry.shared.state();
        let launch = building.launch(LaneKind::Compute);
        let all = 0..state.committed;
        let sources = state.pieces(&config.layout, all).map(|(at, inside)| {
            let id = state.blocks[at];
            launch.pins.extend(blocks.pin(id));
            ScoreSource {
                format: blocks.format(id),
                positions: blocks.positions(id),
                slot_offset: blocks.offset(id),
                tokens: inside.len(),
            }
        });
        let sources = sources.collect();
        let output = Box::new(ReadBuffer::scores(state.stored(state.committed) as usize));
        let flight = launch.add(Purpose::Operation(op), None, Some(output));
        launch.steps.push(Step::Score(ScoreStep { flight, score, sources }));
        entry.rest.thinning = Some(Box::new(Thinning::Scoring { keep }));
    }

    /// Launches the copies of the stored tokens `kept`, all of them.
    fn plan_copies(&mut self, op: OpRef, index: usize, kept: &[u32]) -> Progress {
        let owner = self.sequences[index].rest.tenant;
        let needed = self.config.layout.blocks_for(kept.len());
        // A write does not wait for room that it can do without.
        let room = match self.pending.operation(op) {
            Operation::Drop { .. } => self.make_room(op, owner, needed),
            _ if self.blocks.has_room(owner, needed) => Room::Now,
            _ => Room::Never,
        };
        match room {
            Room::Now => {}
            Room::Soon => return Progress::Flying,
            Room::Never => return Progress::Done(Err(self.capacity_error(owner, needed, 0))),
        }
        let DeviceCore { sequences, blocks, config, counters, building, .. } = self;
        let entry = &mut sequences[index];
        let state = entry.shared.state();
        let launch = building.launch(LaneKind::Compute);
        let mut taken = SmallVec::new();
        let block_tokens = config.layout.block_tokens;
        for at in 0..needed {
            let new = blocks.create(owner, at, true);
            blocks.get_mut(new.id).writing = true;
            // Copies overwrite the whole of all others.
            if new.must_zero && (at + 1) * block_tokens > kept.len() {
                launch.steps.push(Step::Zero { slot_offset: blocks.offset(new.id) });
                counters.slots_zeroed += 1;
            }
            taken.push(new.id);
        }
        let flight = launch.add(Purpose::Operation(op), None, None);
        let mut done = 0;
        while done < kept.len() {
            let (from, to) = (kept[done] as usize / block_tokens, done / block_tokens);
            let of_block = kept[done..].iter().take_while(|token| **token as usize / block_tokens == from);
            let count = of_block.count().min((to + 1) * block_tokens - done);
            let source = state.blocks[from];
            // Sealing may move it meanwhile.
            launch.pins.extend(blocks.pin(source));
            blocks.inherit_past(source, taken[to]);
            launch.steps.push(Step::Gather(GatherStep {
                flight,
                format: blocks.format(source),
                positions: blocks.positions(source),
                from_offset: blocks.offset(source),
                tokens: kept[done..done + count].iter().map(|token| token % block_tokens as u32).collect(),
                to_offset: blocks.offset(taken[to]),
                to_token: done % block_tokens,
            }));
            done += count;
        }
        let positions = kept.iter().map(|token| state.position(*token)).collect();
        let compacted = Compacted::new(positions, state.committed);
        drop(state);
        entry.rest.thinning = Some(Box::new(Thinning::Copying { blocks: taken, compacted }));
        Progress::Flying
    }

    /// A launch of an operation has landed: goes on if it was one of these. The sequence and the operation's result once it is done;
    /// nothing while more is under way. An error hands back what landed for something else.
    #[allow(clippy::type_complexity)]
    pub(super) fn land_thinning(
        &mut self,
        op: OpRef,
        landed: Landed,
    ) -> Result<Option<(usize, Result<Outcome, Error>)>, Landed> {
        let Some(index) = self.pending.sequence(op).map(|id| id.index()) else { return Err(landed) };
        let Some(thinning) = self.sequences[index].rest.thinning.take() else { return Err(landed) };
        let progress = match (*thinning, landed) {
            (Thinning::Scoring { keep }, Ok(Some(mut scores))) => {
                let kept = choose(&KeyScore::shared(scores.scores_mut()), keep);
                self.plan_copies(op, index, &kept)
            }
            (Thinning::Scoring { .. }, Ok(None)) => {
                Progress::Done(Err(Error::Device("scores came back without their buffer".into())))
            }
            (Thinning::Scoring { .. }, Err(error)) => Progress::Done(Err(error)),
            (Thinning::Copying { blocks, compacted }, landed) => {
                Progress::Done(self.land_copies(index, blocks, compacted, landed.map(drop)))
            }
        };
        let Progress::Done(result) = progress else { return Ok(None) };
        // A write is there, whatever has become of the rest.
        let committed = self.sequences[index].shared.committed();
        let result = match self.pending.operation(op) {
            Operation::Drop { .. } => result,
            Operation::Commit { .. } => Ok(Outcome::Committed { committed }),
            _ => Ok(Outcome::Appended { committed }),
        };
        Ok(Some((index, result)))
    }

    fn land_copies(
        &mut self,
        index: usize,
        taken: SmallVec<[BlockId; 6]>,
        compacted: Compacted,
        landed: Result<(), Error>,
    ) -> Result<Outcome, Error> {
        let DeviceCore { sequences, blocks, config, counters, .. } = self;
        let entry = &mut sequences[index];
        taken.iter().for_each(|&block| blocks.get_mut(block).writing = false);
        blocks.resume_draining();
        if let Err(error) = landed {
            for block in taken {
                // Nobody knows how far it came.
                blocks.spoil(block);
                blocks.release(block);
            }
            return Err(error);
        }
        let mut state = entry.shared.state();
        let before = state.stored(state.committed);
        for block in std::mem::replace(&mut state.blocks, taken).into_iter().rev() {
            blocks.release(block);
        }
        state.compacted = Some(Arc::new(compacted));
        let kept = state.stored(state.committed);
        let full = kept as usize / config.layout.block_tokens;
        for at in 0..full {
            complete(blocks, config, counters, &state, at);
        }
        for &block in &state.blocks[..full.saturating_sub(config.keep_raw.window_blocks)] {
            blocks.leaves_window(block);
        }
        blocks.follow(&mut entry.rest.tail, &state);
        counters.tokens_dropped += u64::from(before - kept);
        entry.glance.renew(&entry.shared, &state, &config.layout);
        Ok(Outcome::Dropped { kept })
    }
}
