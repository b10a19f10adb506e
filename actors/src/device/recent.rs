//! Which blocks are among the last ones of a sequence, and so are re-encoded after all others.
//!
//! Attention looks at recent tokens most. Each format below that of sealing has a window ([`KeepRaw::recent_blocks`]): so many full blocks at the
//! end of a sequence, and what lies behind them. A sequence lists the blocks in its windows, and each block counts in how many such lists it is: it is
//! recent as long as any sequence that holds it says so. Lists follow every change of a sequence, at the price of a window each, and a block
//! changes queues when it enters the first and when it leaves the last. What a sequence let go of is in none: in the cache nothing is recent.

use smallvec::SmallVec;

use super::blocks::BlockStore;
use crate::block::BlockId;
use crate::format::{KeepRaw, Ladder};
use crate::sequence::SequenceState;

/// Rungs that a block may leave.
const LEAVES: usize = Ladder::RUNGS_MAX - 1;

/// A sequence's blocks from the beginning of each window on, by the rung that they would leave. Nothing where there are no windows.
#[derive(Debug, Default)]
pub(super) struct Tail(Option<Box<Lists>>);

type Lists = [SmallVec<[BlockId; 5]>; LEAVES];

/// The windows, and who is in them.
#[derive(Debug)]
pub(super) struct Windows {
    /// Full blocks, by the rung that they would leave.
    blocks: [usize; LEAVES],
    /// In how many [`Tail`]s each block is, by its number. A block may be gone before the list is brought up to date.
    tails: [Vec<u32>; LEAVES],
}

impl Windows {
    /// Of a cache with room for so many blocks.
    pub(super) fn new(keep_raw: &KeepRaw, formats: &Ladder, blocks: usize) -> Self {
        let leaves = |rung: usize| rung + 1 < formats.formats().len();
        let window = |rung: usize| if leaves(rung) { keep_raw.recent_blocks[rung] } else { 0 };
        let windows: [usize; LEAVES] = std::array::from_fn(window);
        Windows { blocks: windows, tails: windows.map(|window| vec![0; if window > 0 { blocks } else { 0 }]) }
    }

    /// What of a sequence lies in the window of a rung, or behind it.
    fn of<'a>(&self, rung: usize, state: &'a SequenceState, block_tokens: usize) -> &'a [BlockId] {
        let full = state.stored(state.committed) as usize / block_tokens;
        let from = full.saturating_sub(self.blocks[rung]);
        state.blocks.get(from..).unwrap_or_default()
    }
}

impl BlockStore {
    /// Whether the block is among the last ones of a sequence, for the rung that it is on.
    pub(super) fn is_recent(&self, id: BlockId) -> bool {
        let tails = self.windows.tails.get(usize::from(self.get(id).rung));
        tails.and_then(|tails| tails.get(id.0 as usize)).is_some_and(|tails| *tails > 0)
    }

    /// A sequence has other blocks or tokens than before.
    pub(super) fn follow(&mut self, tail: &mut Tail, state: &SequenceState) {
        if self.windows.blocks == [0; LEAVES] {
            return;
        }
        for (rung, list) in tail.0.get_or_insert_default().iter_mut().enumerate() {
            let now = self.windows.of(rung, state, self.block_tokens());
            if self.windows.blocks[rung] == 0 || list[..] == *now {
                continue;
            }
            let before = std::mem::replace(list, SmallVec::from_slice(now));
            // What is in both is not let go of in between.
            now.iter().for_each(|&id| self.count_tail(rung, id, true));
            before.into_iter().for_each(|id| self.count_tail(rung, id, false));
        }
    }

    /// A sequence has closed.
    pub(super) fn unfollow(&mut self, tail: &mut Tail) {
        for (rung, list) in tail.0.take().into_iter().flat_map(|lists| lists.into_iter().enumerate()) {
            list.into_iter().for_each(|id| self.count_tail(rung, id, false));
        }
    }

    fn count_tail(&mut self, rung: usize, id: BlockId, enters: bool) {
        if id == BlockId::DROPPED {
            return;
        }
        let tails = &mut self.windows.tails[rung][id.0 as usize];
        let before = *tails;
        *tails = if enters { before + 1 } else { before.saturating_sub(1) };
        let is_held = |store: &Self| store.blocks.get(id.0 as usize).is_some_and(|block| block.refs > 0);
        if (before == 0 || *tails == 0) && is_held(self) {
            self.sealed_anew(id);
        }
    }

    /// Counts again who is in the windows of these sequences.
    ///
    /// # Errors
    /// What does not add up.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn audit_windows<'a>(
        &self,
        sequences: impl Iterator<Item = (&'a Tail, Option<&'a SequenceState>)>,
    ) -> Result<(), String> {
        let mut counted = self.windows.tails.each_ref().map(|tails| vec![0; tails.len()]);
        for (tail, state) in sequences {
            for (rung, listed) in tail.0.iter().flat_map(|lists| lists.iter().enumerate()) {
                let old =
                    |state: &SequenceState| self.windows.of(rung, state, self.block_tokens()) != &listed[..];
                if self.windows.blocks[rung] > 0 && state.is_some_and(old) {
                    return Err(format!("rung {rung}: the window is said to hold {listed:?}"));
                }
                for id in listed.iter().filter(|id| **id != BlockId::DROPPED) {
                    counted[rung][id.0 as usize] += 1;
                }
            }
        }
        match counted == self.windows.tails {
            true => Ok(()),
            false => Err(format!("{counted:?} blocks in windows, {:?} kept", self.windows.tails)),
        }
    }
}
