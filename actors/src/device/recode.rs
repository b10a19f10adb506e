//! Re-encoding sealed blocks to smaller formats when memory runs short, before any of them has to go.
//!
//! Blocks that nobody holds come first, those let go of longest ago before others. Those that sequences hold, the ones sealed longest ago before
//! others, come when memory is shorter still and nothing that nobody holds could make way: what is being read is worth more than what may be found. The last
//! blocks of a sequence ([`super::recent`]) come after all of these, and only for somebody who would not get room otherwise.
//! For a tenant's quota his own go down likewise, those that nobody holds alone, before they make way for it.
//! A block that is pinned is passed over: its old slot could not be freed. A block goes down one rung of the [`Ladder`](crate::format::Ladder) at a time, so its rung
//! says what it has been through: it is decoded into a place kept for that and sealed from there, and moves when that has landed, as a seal does.

use std::collections::{HashMap, HashSet, VecDeque};

use super::blocks::BlockStore;
use crate::block::{Block, BlockId, BlockState};
use crate::dropping::Positions;
use crate::format::BlockFormat;
use crate::memory::{Purpose, Step};
use crate::pool::{PoolLayout, SizeClass};
use crate::slot::FilledSlot;
use crate::stats::CoreCounters;

/// Blocks that nobody holds are re-encoded while less than this part of the slab can be had.
const CACHED_BELOW: usize = 8;

/// And those that sequences hold, while it is less than this, with what could make way.
const HELD_BELOW: usize = 16;

/// Bit of [`Block::queued`](crate::block::Block): a prompt has found the block while a flight re-encodes it.
const USED: u8 = 4;

/// Another: it could not be re-encoded, and is left as it is.
const FAILED: u8 = 8;

/// Blocks that somebody looks at which are passed over for one to re-encode.
const LOOKS: usize = 64;

/// Who may come next. Both are bits of [`Block::queued`](crate::block::Block).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Cached = 1,
    /// Held, and not recent.
    Held = 2,
    /// Cached, of one owner that has a quota.
    Own = 16,
    /// Held, and among the last of a sequence.
    Recent = 32,
}

/// In which order they come: whose, and from which rung.
const TURNS: [(Whose, u8); 4] = [(Whose::Cached, 0), (Whose::Cached, 1), (Whose::Held, 0), (Whose::Held, 1)];

/// And after all others, when there is no other way.
const LAST_TURNS: [(Whose, u8); 2] = [(Whose::Recent, 0), (Whose::Recent, 1)];

/// The least length at which a [`Line`] is looked through.
const LINE_LEAST: usize = 256;

/// Blocks in the order in which they come up. Some may have changed since: who comes up is looked at.
#[derive(Debug, Default)]
struct Line {
    blocks: VecDeque<BlockId>,
    /// Those that were left when it was last looked through.
    left: usize,
}

impl Line {
    /// Whether numbers of blocks that are gone may be so many that it is worth it to look through them.
    fn is_long(&self) -> bool {
        self.blocks.len() > LINE_LEAST.max(2 * self.left)
    }
}

/// Of an owner that has a quota.
#[derive(Debug, Default)]
struct Own {
    cached: [Line; 2],
    /// What his blocks will take less once flights have landed.
    saved_in_flight_bytes: u64,
}

/// For lines of all owners.
const NOBODY: u32 = u32::MAX;

/// Blocks that may be re-encoded, by rung.
#[derive(Debug, Default)]
pub(super) struct Recodable {
    cached: [Line; 2],
    held: [Line; 2],
    recent: [Line; 2],
    owners: HashMap<u32, Own>,
    planned: Vec<RecodePlan>,
    /// Flights, by the rung that they start from.
    in_flight: [usize; 2],
    /// Places to decode blocks into that no flight uses.
    scratch: Vec<usize>,
    /// No slot could be had for the next; nothing changes until one is freed.
    pub(super) stalled: bool,
}

impl Recodable {
    pub(super) fn new(pool: &PoolLayout) -> Self {
        Recodable { scratch: (0..pool.scratch_slots).collect(), ..Recodable::default() }
    }

    /// The line of a rung; `owner` matters to [`Whose::Own`] alone.
    fn line(&mut self, whose: Whose, owner: u32, rung: u8) -> Option<&mut Line> {
        let lines = match whose {
            Whose::Cached => &mut self.cached,
            Whose::Held => &mut self.held,
            Whose::Recent => &mut self.recent,
            Whose::Own => &mut self.owners.entry(owner).or_default().cached,
        };
        lines.get_mut(usize::from(rung))
    }

    /// What an owner's blocks will take less once flights have landed.
    fn saved_in_flight_bytes(&self, owner: u32) -> u64 {
        self.owners.get(&owner).map_or(0, |own| own.saved_in_flight_bytes)
    }
}

/// What came of planning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planned {
    One,
    /// A block might be, had it a slot to go to.
    NoSlot,
    Nothing,
}

/// A block that is re-encoded, with its slots.
#[derive(Debug)]
pub(crate) struct RecodePlan {
    recoded: Recoded,
    /// What it is, and what it becomes.
    formats: [BlockFormat; 2],
    positions: Positions,
    from_offset: usize,
    raw_offset: usize,
    to_offset: usize,
}

/// What a flight that re-encodes a block has taken.
#[derive(Debug)]
pub(crate) struct Recoded {
    block: BlockId,
    /// Nobody held it.
    was_cached: bool,
    /// Of the next rung.
    slot: FilledSlot,
    /// For what is decoded.
    scratch: usize,
}

impl RecodePlan {
    /// The steps for a flight.
    pub(super) fn steps(&self, flight: usize) -> [Step; 2] {
        let RecodePlan { formats: [from, to], from_offset, raw_offset, to_offset, .. } = *self;
        let [of_from, of_to] = [0, 1].map(|_| self.positions.clone());
        [
            Step::Reopen { format: from, positions: of_from, from_offset, to_offset: raw_offset },
            Step::Seal { flight, format: to, positions: of_to, from_offset: raw_offset, to_offset },
        ]
    }

    pub(super) fn into_purpose(self) -> Purpose {
        Purpose::Recode(Box::new(self.recoded))
    }
}

impl BlockStore {
    /// Whether blocks are re-encoded in this cache.
    pub(super) fn is_recoded(&self) -> bool {
        self.formats.formats().len() > 1
    }

    /// A block that sequences hold has been found by a prompt.
    pub(super) fn found_again(&mut self, id: BlockId) {
        let block = self.get_mut(id);
        if block.moving_to.is_some() {
            block.queued |= USED;
        }
        self.sealed_anew(id);
    }

    /// A block that sequences hold has been sealed, or re-encoded, or moves no more, or is recent now, or no more.
    pub(super) fn sealed_anew(&mut self, id: BlockId) {
        self.enqueue(id, if self.is_recent(id) { Whose::Recent } else { Whose::Held });
    }

    /// Nobody holds a published block any more.
    pub(super) fn let_go(&mut self, id: BlockId) {
        self.enqueue(id, Whose::Cached);
        if self.ledger.quota_bytes(self.get(id).tenant).is_some() {
            self.enqueue(id, Whose::Own);
        }
    }

    /// Whether a block is sealed, and not for good.
    fn has_next_rung(&self, block: &Block) -> bool {
        block.state == BlockState::Sealed
            && usize::from(block.rung) + 1 < self.formats.formats().len()
            && block.index >= self.keep_raw.sinks_as_sealed
            && block.queued & FAILED == 0
    }

    fn enqueue(&mut self, id: BlockId, whose: Whose) {
        if !self.has_next_rung(self.get(id)) || self.get(id).queued & whose as u8 != 0 {
            return;
        }
        let block = self.get_mut(id);
        block.queued |= whose as u8;
        let (owner, rung) = (block.tenant, block.rung);
        let Some(line) = self.recodable.line(whose, owner, rung) else { return };
        line.blocks.push_back(id);
        if line.is_long() {
            // Numbers of blocks that are gone stay until they come up, or until they are many.
            let all = std::mem::take(&mut line.blocks);
            let mut seen = HashSet::new();
            let first = all.into_iter().filter(|id| seen.insert(*id));
            let (kept, gone): (Vec<_>, Vec<_>) =
                first.partition(|id| self.may_recode(*id, whose, owner, rung));
            gone.into_iter().for_each(|id| self.unqueue(id, whose));
            if let Some(line) = self.recodable.line(whose, owner, rung) {
                *line = Line { left: kept.len(), blocks: kept.into() };
            }
        }
    }

    /// The block is in the queue no more.
    fn unqueue(&mut self, id: BlockId, whose: Whose) {
        if let Some(block) = self.blocks.get_mut(id.0 as usize) {
            block.queued &= !(whose as u8);
        }
    }

    fn may_recode(&self, id: BlockId, whose: Whose, owner: u32, rung: u8) -> bool {
        self.blocks.get(id.0 as usize).is_some_and(|block| {
            let is_cached = block.refs == 0 && block.published;
            let is_whose = match whose {
                Whose::Cached => is_cached,
                Whose::Held => block.refs > 0 && !self.is_recent(id),
                Whose::Recent => block.refs > 0 && self.is_recent(id),
                Whose::Own => is_cached && block.tenant == owner,
            };
            is_whose
                && block.state == BlockState::Sealed
                && block.class == SizeClass::SEALED[usize::from(rung)]
                && block.moving_to.is_none()
        })
    }

    /// Whether blocks are to be re-encoded now, for room to be there when it is wanted.
    pub(super) fn wants_to_recode(&self) -> bool {
        if !self.is_recoded() || self.recodable.stalled {
            return false;
        }
        let (left, slab) = (self.pool.available_bytes(), self.pool.layout().slab_bytes());
        let any = |lines: &[Line]| lines.iter().any(|line| !line.blocks.is_empty());
        left < slab / CACHED_BELOW && any(&self.recodable.cached)
            || any(&self.recodable.held) && self.is_shorter()
    }

    /// Whether memory is so short that blocks of sequences are re-encoded too.
    fn is_shorter(&self) -> bool {
        let left = self.pool.available_bytes() as u64 + self.ledger.cached_bytes();
        left < (self.pool.layout().slab_bytes() / HELD_BELOW) as u64
    }

    /// Whether re-encoding makes room, or may.
    pub(super) fn may_make_room(&self) -> bool {
        let Recodable { cached, held, recent, .. } = &self.recodable;
        let mut lines = cached.iter().chain(held).chain(recent);
        self.is_recoding() || lines.any(|line| !line.blocks.is_empty())
    }

    /// Plans to re-encode the next block, if memory is short.
    pub(super) fn plan_recode(&mut self) -> bool {
        if !self.wants_to_recode() {
            return false;
        }
        let is_shorter = self.is_shorter();
        let mut turns = TURNS.into_iter().filter(|(whose, _)| *whose == Whose::Cached || is_shorter);
        turns.any(|(whose, rung)| self.plan(whose, NOBODY, rung) == Planned::One)
    }

    /// Has blocks re-encoded for somebody who waits for room, and chunks emptied that this has left with few. True if room will come of what is
    /// under way.
    ///
    /// Where blocks would go there may be no room either. Then a chunk is emptied for that, and some make way for it: fewer than it will hold.
    ///
    /// With `spares_held` those that sequences hold stay as they are.
    pub(super) fn recode_for_room(&mut self, spares_held: bool, counters: &mut CoreCounters) -> bool {
        self.is_recoded()
            && (self.recode_in_turns(&TURNS, spares_held, counters)
                || !spares_held && self.recode_in_turns(&LAST_TURNS, false, counters))
    }

    fn recode_in_turns(
        &mut self,
        turns: &[(Whose, u8)],
        spares_held: bool,
        counters: &mut CoreCounters,
    ) -> bool {
        loop {
            let mut lacks_slot = false;
            let nothing_goes = self.evictor.unheld() == 0 || self.ledger.is_all_protected();
            let takes_held = !spares_held && nothing_goes;
            for &(whose, rung) in turns.iter().filter(|(whose, _)| *whose == Whose::Cached || takes_held) {
                let mut planned = Planned::One;
                while planned == Planned::One {
                    planned = self.plan(whose, NOBODY, rung);
                }
                lacks_slot |= planned == Planned::NoSlot;
            }
            if self.is_recoding() {
                return true;
            }
            if let Some(class) = self.pool.draining_class() {
                if !class.is_sealed() {
                    return false;
                }
                let goes_on = self.draining_is_under_way() || self.pool.has_vacancy(class);
                if goes_on && !self.pool.draining_waits_for_readers() {
                    return true;
                }
                self.stop_draining();
            }
            let drains = self.start_draining_sealed();
            if !lacks_slot {
                return drains && self.pool.draining_class().is_some();
            }
            if !drains && !self.evict_one(counters) {
                return false;
            }
        }
    }

    /// Has cached blocks of an owner re-encoded for his quota, as many as save `missing_bytes` or as there are. True if their flights have to land
    /// first, or others that leave room for them.
    pub(super) fn recode_for_quota(&mut self, owner: u32, missing_bytes: u64) -> bool {
        if !self.is_recoded() {
            return false;
        }
        loop {
            let mut lacks_slot = false;
            for rung in 0..2 {
                // Slots of tiny blocks are of one size whatever the format.
                let saves = self.saved_bytes(rung) > 0;
                let mut planned = if saves { Planned::One } else { Planned::Nothing };
                while planned == Planned::One && self.recodable.saved_in_flight_bytes(owner) < missing_bytes {
                    planned = self.plan(Whose::Own, owner, rung);
                }
                lacks_slot |= planned == Planned::NoSlot;
            }
            if self.recodable.saved_in_flight_bytes(owner) > 0 || lacks_slot && self.is_recoding() {
                return true;
            }
            if !lacks_slot {
                return false;
            }
            // Without slots to go to, unless a chunk can be emptied for that, some have to make way.
            if let Some(class) = self.pool.draining_class() {
                let goes_on = class.is_sealed()
                    && self.pool.has_vacancy(class)
                    && !self.pool.draining_waits_for_readers();
                return goes_on || self.draining_is_under_way();
            }
            if !self.start_draining_sealed() {
                return false;
            }
            if self.pool.draining_class().is_some() {
                return true;
            }
        }
    }

    /// Has a chunk emptied if blocks that are to be re-encoded lack room, and if it can be without any making way.
    pub(super) fn drain_for_recodes(&mut self) {
        if self.recodable.stalled && self.pool.draining_class().is_none() && self.start_draining_sealed() {
            self.recodable.stalled = false;
        }
    }

    /// Chooses a chunk of sealed blocks to be emptied, as [`Pool::start_draining`](crate::pool::Pool) does.
    pub(super) fn start_draining_sealed(&mut self) -> bool {
        SizeClass::SEALED.into_iter().any(|class| self.pool.start_draining(class))
    }

    /// Plans to re-encode the next block of a line.
    fn plan(&mut self, whose: Whose, owner: u32, rung: u8) -> Planned {
        let mut looked_at = 0;
        while looked_at < LOOKS
            && let Some(id) = self.recodable.line(whose, owner, rung).and_then(|line| line.blocks.pop_front())
        {
            self.unqueue(id, whose);
            if !self.may_recode(id, whose, owner, rung) {
                continue;
            }
            if self.is_pinned(id) {
                looked_at += 1;
                self.enqueue(id, whose);
                continue;
            }
            let class = SizeClass::SEALED[usize::from(rung) + 1];
            let tenant = self.get(id).tenant;
            let scratch = self.recodable.scratch.pop();
            let slot = scratch.and_then(|_| self.pool.take_sealed(class, tenant));
            let (Some(slot), Some(scratch)) = (slot, scratch) else {
                self.recodable.scratch.extend(scratch);
                self.get_mut(id).queued |= whose as u8;
                if let Some(line) = self.recodable.line(whose, owner, rung) {
                    line.blocks.push_front(id);
                }
                self.recodable.stalled = true;
                return Planned::NoSlot;
            };
            let (positions, from_offset) = (self.positions(id), self.offset(id));
            let raw_offset = self.pool.layout().scratch_offset_bytes(scratch);
            let to_offset = self.pool.offset_bytes(class, slot.id());
            let formats = [rung, rung + 1].map(|rung| self.formats.rung(rung));
            let block = self.get_mut(id);
            block.moving_to = Some(class);
            block.queued &= !USED;
            self.take_off(id);
            let saved = self.saved_bytes(rung);
            if let Some(own) = self.recodable.owners.get_mut(&tenant) {
                own.saved_in_flight_bytes += saved;
            }
            self.recodable.in_flight[usize::from(rung)] += 1;
            self.recodable.planned.push(RecodePlan {
                recoded: Recoded {
                    block: id,
                    was_cached: !matches!(whose, Whose::Held | Whose::Recent),
                    slot,
                    scratch,
                },
                formats,
                positions,
                from_offset,
                raw_offset,
                to_offset,
            });
            return Planned::One;
        }
        self.recodable.stalled |= looked_at > 0;
        Planned::Nothing
    }

    /// What the slot of a block of this rung has more bytes than that of the next.
    fn saved_bytes(&self, rung: u8) -> u64 {
        let slot = |rung: usize| self.pool.layout().slot_bytes(SizeClass::SEALED[rung]) as u64;
        slot(usize::from(rung)).saturating_sub(slot(usize::from(rung) + 1))
    }

    /// What was planned since this was called last.
    pub(super) fn planned_recodes(&mut self) -> Vec<RecodePlan> {
        std::mem::take(&mut self.recodable.planned)
    }

    /// Whether flights are re-encoding blocks.
    pub(super) fn is_recoding(&self) -> bool {
        self.recodable.in_flight.iter().sum::<usize>() > 0
    }

    /// Takes back a block that was re-encoded, and says whether the device carried it out.
    pub(super) fn land_recode(&mut self, recoded: Recoded, carried_out: bool, counters: &mut CoreCounters) {
        let Recoded { block: id, was_cached, slot, scratch } = recoded;
        let block = self.get_mut(id);
        let is_unused = was_cached && block.queued & USED == 0;
        let (was, class) = (block.class, block.moving_to.take().unwrap_or(block.class));
        let (rung, owner) = (self.get(id).rung, self.get(id).tenant);
        self.recodable.in_flight[usize::from(rung)] -= 1;
        let saved = self.saved_bytes(rung);
        if let Some(own) = self.recodable.owners.get_mut(&owner) {
            own.saved_in_flight_bytes = own.saved_in_flight_bytes.saturating_sub(saved);
        }
        if carried_out {
            counters.recodes += 1;
            let block = self.get_mut(id);
            (block.class, block.rung) = (class, block.rung + 1);
            // Of queues of the rung that it has left.
            block.queued = 0;
            let old = std::mem::replace(&mut block.slot, slot);
            self.publish(id);
            self.free_slot(was, old);
            self.charge(owner, was, -1);
            self.charge(owner, class, 1);
            self.sealed_anew(id);
        } else {
            // Nobody knows how far it came. The block is left as it is.
            self.get_mut(id).queued |= FAILED;
            self.pool.spoil(slot.id());
            self.free_slot(class, slot);
        }
        self.recodable.scratch.push(scratch);
        self.recodable.stalled = false;
        self.land(id, is_unused);
    }

    /// Checks that every block that may be re-encoded and that somebody holds is in the line where it is looked for.
    ///
    /// # Errors
    /// Which one is not.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn audit_queues(&self) -> Result<(), String> {
        let Recodable { held, recent, .. } = &self.recodable;
        let in_line = |line: &Line| line.blocks.iter().copied().collect::<HashSet<_>>();
        let lines = [held, recent].map(|lines| lines.each_ref().map(in_line));
        for (id, block) in self.iter() {
            let rung = block.rung;
            for (whose, lines) in [Whose::Held, Whose::Recent].into_iter().zip(&lines) {
                let is_due = self.has_next_rung(block) && self.may_recode(id, whose, NOBODY, rung);
                if is_due && !lines[usize::from(rung)].contains(&id) {
                    return Err(format!("{id:?} is not in the line of {whose:?}, rung {rung}"));
                }
            }
        }
        Ok(())
    }
}
