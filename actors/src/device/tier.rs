//! Moving sealed blocks between tiers. A move changes a block's place and nothing else: whoever reads it reads the old place
//! until the move has landed, and the new one from then on.

use super::blocks::BlockStore;
use super::core::{DeviceCore, Progress};
use crate::batch::Outcome;
use crate::block::{BlockId, BlockState};
use crate::error::Error;
use crate::memory::{LaneKind, OpRef, Purpose, Step};
use crate::pool::{SizeClass, Tier};
use crate::slot::FilledSlot;
use crate::stats::CoreCounters;

/// What one operation moves.
#[derive(Debug)]
pub(crate) struct TierMoves {
    pub(super) op: OpRef,
    pub(super) moves: Vec<TierMove>,
}

/// A block on its way to another tier, and the slot that it goes to.
#[derive(Debug)]
pub(super) struct TierMove {
    block: BlockId,
    slot: FilledSlot,
    class: SizeClass,
}

/// Why blocks cannot move to a tier.
struct NoRoom {
    error: Error,
    /// There may be room once what is under way has landed.
    is_coming: bool,
}

impl DeviceCore {
    /// Launches the moves of a sequence's sealed blocks to a tier, all of them or none.
    pub(super) fn plan_move(&mut self, op: OpRef, index: usize, tier: Tier) -> Progress {
        if tier == Tier::Host && self.config.pool.host_slots == 0 {
            return Progress::Done(Err(Error::Unsupported {
                what: "the host tier of a cache that has none",
                instead: "set `host_tier_bytes_per_device`",
            }));
        }
        let shared = self.sequences[index].shared.clone();
        let blocks: Vec<BlockId> =
            shared.state().blocks.iter().copied().filter(|&id| self.blocks.moves_to(id, tier)).collect();
        if blocks.is_empty() {
            return Progress::Done(Ok(Outcome::Moved { blocks: 0 }));
        }
        let moves = loop {
            match self.blocks.begin_moves(&blocks, tier, &mut self.counters) {
                Ok(moves) => break moves,
                Err(NoRoom { is_coming: true, .. }) if self.room_is_coming() => {
                    self.waiting_for_moves.push(op);
                    return Progress::Flying;
                }
                // The vacancies that were to take blocks have been taken by others.
                Err(NoRoom { is_coming: true, .. }) if self.blocks.evict_one(&mut self.counters) => {}
                Err(NoRoom { error, .. }) => return Progress::Done(Err(error)),
            }
        };
        let lane = match tier {
            Tier::Host => LaneKind::Download,
            Tier::Device => LaneKind::Upload,
        };
        let launch = self.building.launch(lane);
        for moved in &moves {
            let from_offset = self.blocks.offset(moved.block);
            let to_offset = self.blocks.pool().offset_bytes(moved.class, moved.slot.id());
            let bytes = self.blocks.stored_bytes(moved.block);
            launch.steps.push(Step::Transfer { from_offset, to_offset, bytes });
        }
        launch.add(Purpose::Tier(Box::new(TierMoves { op, moves })), None, None);
        Progress::Flying
    }

    /// Takes back the moves of one operation, and says whether the device carried them out.
    pub(super) fn land_moves(&mut self, moves: Vec<TierMove>, moved: bool) -> Outcome {
        let blocks = moves.len() as u32;
        if moved {
            self.counters.tier_moves += u64::from(blocks);
            let bytes = moves.iter().map(|one| self.blocks.stored_bytes(one.block) as u64);
            self.counters.bytes_moved += bytes.sum::<u64>();
        }
        for one in moves {
            self.blocks.end_move(one, moved);
        }
        Outcome::Moved { blocks }
    }
}

impl BlockStore {
    /// Whether a block is sealed and in another tier than this one, and not on its way already.
    fn moves_to(&self, id: BlockId, tier: Tier) -> bool {
        if id == BlockId::DROPPED {
            return false;
        }
        let block = self.get(id);
        block.state == BlockState::Sealed && block.moving_to.is_none() && block.class.tier() != tier
    }

    /// Takes a slot of the tier for each block, or changes nothing.
    fn begin_moves(
        &mut self,
        blocks: &[BlockId],
        tier: Tier,
        counters: &mut CoreCounters,
    ) -> Result<Vec<TierMove>, NoRoom> {
        let slots = match tier {
            Tier::Host => self.take_host(blocks.len(), counters)?,
            Tier::Device => self.take_device(blocks, counters)?,
        };
        let begin = |(&block, slot)| {
            let class = self.class_in(block, tier);
            self.get_mut(block).moving_to = Some(class);
            self.take_off(block);
            TierMove { block, slot, class }
        };
        Ok(blocks.iter().zip(slots).map(begin).collect())
    }

    /// The class of the slot that a sealed block takes in a tier.
    fn class_in(&self, block: BlockId, tier: Tier) -> SizeClass {
        match tier {
            Tier::Host => SizeClass::Host,
            Tier::Device if self.pool.layout().has_sealed_class => {
                SizeClass::SEALED[usize::from(self.get(block).rung)]
            }
            Tier::Device => SizeClass::Raw,
        }
    }

    fn take_host(&mut self, count: usize, counters: &mut CoreCounters) -> Result<Vec<FilledSlot>, NoRoom> {
        if self.pool.host_available() < count {
            self.reclaim();
            self.make_host_room(count, counters);
        }
        let error = Error::TierFull {
            tier: Tier::Host,
            needed: count as u32,
            free: self.pool.host_available() as u32,
        };
        self.pool.take_host(count).ok_or(NoRoom { error, is_coming: false })
    }

    /// Others that nobody holds are re-encoded to make room, and then make way.
    fn take_device(
        &mut self,
        blocks: &[BlockId],
        counters: &mut CoreCounters,
    ) -> Result<Vec<FilledSlot>, NoRoom> {
        while !self.pool.layout().has_sealed_class
            && self.raw_available(blocks.len()) < blocks.len()
            && self.evict_one(counters)
        {}
        let free = self.raw_available(blocks.len());
        let mut slots = Vec::with_capacity(blocks.len());
        let mut is_coming = false;
        for &block in blocks {
            let (tenant, class) = (self.get(block).tenant, self.class_in(block, Tier::Device));
            // The move overwrites the whole block, so there is nothing to zero.
            let taken = match class {
                SizeClass::Raw if slots.len() < free => self.pool.take_raw(tenant).map(|taken| taken.slot),
                SizeClass::Raw => None,
                class => loop {
                    let taken = self.pool.take_sealed_spare(class, tenant);
                    is_coming = taken.is_none() && self.recode_for_room(true, counters);
                    if taken.is_some() || is_coming || !self.evict_one(counters) {
                        break taken;
                    }
                },
            };
            match taken {
                Some(slot) => {
                    slots.push(slot);
                    // It may have opened a chunk.
                    self.seal_stalled = false;
                }
                None => {
                    let had = slots.len() as u32;
                    for (slot, &block) in slots.into_iter().zip(blocks) {
                        let class = self.class_in(block, Tier::Device);
                        // Nothing was written there: it may hold another tenant's bytes.
                        self.pool.spoil(slot.id());
                        self.free_slot(class, slot);
                    }
                    let needed = blocks.len() as u32;
                    let error = Error::TierFull { tier: Tier::Device, needed, free: had };
                    return Err(NoRoom { error, is_coming });
                }
            }
        }
        Ok(slots)
    }

    fn end_move(&mut self, moved: TierMove, carried_out: bool) {
        let TierMove { block: id, slot, class } = moved;
        let block = self.get_mut(id);
        block.moving_to = None;
        let (class, slot) = match carried_out {
            true => (std::mem::replace(&mut block.class, class), std::mem::replace(&mut block.slot, slot)),
            false => (class, slot),
        };
        if carried_out {
            let block = self.get(id);
            let (owner, now) = (block.tenant, block.class);
            self.charge(owner, class, -1);
            self.charge(owner, now, 1);
            self.publish(id);
            self.tell_moved(id);
        } else {
            // Nobody knows how far it came.
            self.pool.spoil(slot.id());
        }
        self.sealed_anew(id);
        self.free_slot(class, slot);
        self.land(id, false);
    }
}
