//! The device thread's part of a sequence.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::dropping::Thinning;
use super::recent::Tail;
use crate::block::{BlockId, BlockKey, ExtraIdentity};
use crate::geometry::BlockLayout;
use crate::memory::OpRef;
use crate::permit::Permit;
use crate::sequence::{RetentionHint, SequenceId, SequenceShared, SequenceState, Tenant};

/// The device thread's part of a sequence. With many sequences open every step misses the caches for it: what a step does
/// not need lies elsewhere.
#[derive(Debug)]
pub(super) struct SequenceEntry {
    pub(super) id: SequenceId,
    pub(super) shared: Arc<SequenceShared>,
    pub(super) rest: Box<Rest>,
    pub(super) glance: Glance,
    /// An operation is in flight.
    pub(super) busy: bool,
    /// It is an append that [`DeviceCore::append_in_place`] has planned.
    pub(super) in_place: bool,
    /// The write in flight has taken blocks: `rest` says which.
    pub(super) took_blocks: bool,
    /// The operation that waits for the one in flight: mostly there is one at most, the next step's. `rest` has those behind it.
    next: Option<OpRef>,
}

/// What is needed once per block or less.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) tenant: u32,
    /// None: it shares nothing by prefix.
    pub(super) sharing: Option<Sharing>,
    /// Operations that wait behind the entry's `next`, in order.
    parked: VecDeque<OpRef>,
    /// Blocks that the write in flight writes to, unless it is one in place.
    pub(super) writing: SmallVec<[BlockId; 2]>,
    /// Raw blocks set aside and not used yet.
    pub(super) reserved: usize,
    /// Of those, how many the write in flight has taken.
    pub(super) reserved_in_flight: usize,
    /// Copies that the write in flight makes, by the place of the block that they will replace. Until the write has landed
    /// the sequence keeps what it had: readers see it, a failed write falls back to it, and no other writer gets at it.
    pub(super) replacing: SmallVec<[(usize, BlockId); 1]>,
    /// Its last blocks.
    pub(super) tail: Tail,
    /// What the operation in flight does to drop tokens by their scores, if it does.
    pub(super) thinning: Option<Box<Thinning>>,
    /// Positions that carry more identity than their token id.
    pub(super) extra: Vec<(u32, ExtraIdentity)>,
    /// The right to be open, given back when the entry goes.
    _permit: Option<Permit>,
}

/// What a sequence has that finds cached blocks and lets others find its own.
#[derive(Debug, Clone)]
pub(super) struct Sharing {
    /// Parent key of the first block.
    pub(super) root: BlockKey,
    /// Number of the root.
    pub(super) root_number: u32,
    /// Blocks of the prompt.
    pub(super) prompt_blocks: u32,
    /// How long its blocks are kept: see [`OpenOptions::retention`](crate::sequence::OpenOptions::retention).
    pub(super) retention: Vec<(Range<u32>, RetentionHint)>,
}

impl Rest {
    pub(super) fn new(
        tenant: u32,
        sharing: Option<Sharing>,
        reserved: usize,
        extra: Vec<(u32, ExtraIdentity)>,
        permit: Option<Permit>,
    ) -> Self {
        Rest {
            tenant,
            sharing,
            parked: VecDeque::new(),
            writing: SmallVec::new(),
            reserved,
            reserved_in_flight: 0,
            replacing: SmallVec::new(),
            tail: Tail::default(),
            thinning: None,
            extra,
            _permit: permit,
        }
    }
}

impl SequenceEntry {
    pub(super) fn new(shared: Arc<SequenceShared>, rest: Rest, layout: &BlockLayout) -> Self {
        let glance = Glance::of(&shared.state(), layout);
        SequenceEntry {
            id: shared.id(),
            rest: Box::new(rest),
            glance,
            busy: false,
            in_place: false,
            took_blocks: false,
            next: None,
            shared,
        }
    }

    /// Whether it is the sequence of this id, and of this tenant if one is named.
    pub(super) fn is_of(&self, id: SequenceId, tenant: Option<&Tenant>) -> bool {
        self.id == id && tenant.is_none_or(|tenant| tenant == self.shared.tenant())
    }

    pub(super) fn park(&mut self, op: OpRef) {
        match self.next {
            None => self.next = Some(op),
            Some(_) => self.rest.parked.push_back(op),
        }
    }

    pub(super) fn park_first(&mut self, op: OpRef) {
        if let Some(second) = self.next.replace(op) {
            self.rest.parked.push_front(second);
        }
    }

    pub(super) fn has_parked(&self) -> bool {
        self.next.is_some()
    }

    pub(super) fn unpark(&mut self) -> Option<OpRef> {
        let next = self.next.take();
        if next.is_some() {
            self.next = self.rest.parked.pop_front();
        }
        next
    }
}

/// What a write has to look at first. A copy: only the device thread changes the state, so it need not lock it to look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Glance {
    pub(super) committed: u32,
    /// The last block.
    pub(super) tail: BlockId,
    /// Tokens that fit behind the committed ones in the last block; 0 if that is full, or if tokens are staged.
    pub(super) room: u32,
}

impl Glance {
    pub(super) fn of(state: &SequenceState, layout: &BlockLayout) -> Self {
        let tail = state.blocks.last().copied().unwrap_or(BlockId::DROPPED);
        let filled = state.stored(state.committed) as usize % layout.block_tokens;
        let room = if filled == 0 || !state.staged.is_empty() { 0 } else { layout.block_tokens - filled };
        Glance { committed: state.committed, tail, room: room as u32 }
    }

    /// After a change of the state, and before its lock is given up: here and for readers without the lock.
    pub(super) fn renew(&mut self, shared: &SequenceShared, state: &SequenceState, layout: &BlockLayout) {
        *self = Glance::of(state, layout);
        shared.publish_committed(self.committed);
    }
}

#[cfg(any(test, feature = "testing"))]
impl SequenceEntry {
    /// Operations that wait for the one in flight.
    pub(super) fn parked(&self) -> usize {
        self.rest.parked.len() + usize::from(self.next.is_some())
    }

    /// Whether the copies are those of `state`. While a write is in flight its sequence may have new blocks already.
    pub(super) fn is_in_step(&self, state: &SequenceState, layout: &BlockLayout) -> bool {
        self.busy || self.glance == Glance::of(state, layout)
    }

    /// Blocks that it holds and does not list.
    pub(super) fn held_blocks(&self) -> impl Iterator<Item = BlockId> {
        let thinning = self.rest.thinning.iter().flat_map(|thinning| thinning.blocks());
        self.rest.replacing.iter().map(|(_, block)| *block).chain(thinning.copied())
    }
}
