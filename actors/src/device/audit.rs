//! What must hold of a device core at all times, checked the slow way. For tests.

use std::collections::{HashMap, HashSet};

use super::core::DeviceCore;
use crate::block::{Block, BlockId, BlockState};
use crate::pool::SizeClass;
use crate::sequence::SequenceState;

/// What a core holds. All zeros once everything is closed and nothing is in flight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Open sequences.
    pub sequences: usize,
    /// Blocks.
    pub blocks: usize,
    /// Slots taken, quarantined ones included.
    pub slots: usize,
    /// Slots freed while somebody looks at them.
    pub quarantined: usize,
    /// Blocks being sealed.
    pub sealing: usize,
    /// Full blocks that wait for it.
    pub to_seal: usize,
    /// Raw slots set aside.
    pub reserved: usize,
    /// Submissions not answered.
    pub submissions: usize,
    /// Operations not looked at yet.
    pub ready: usize,
    /// Launches with the lanes.
    pub in_flight: usize,
    /// Launches being built.
    pub building: usize,
    /// Committed tokens.
    pub tokens: u64,
}

impl DeviceCore {
    /// What it holds now.
    pub fn holdings(&self) -> Holdings {
        let pool = self.blocks.pool();
        Holdings {
            sequences: self.sequences.len(),
            blocks: self.blocks.len(),
            slots: SizeClass::ALL.into_iter().map(|class| pool.used(class)).sum(),
            quarantined: pool.quarantined(),
            sealing: self.blocks.iter().filter(|(_, block)| block.state == BlockState::Sealing).count(),
            to_seal: self.blocks.to_seal(),
            reserved: pool.reserved_raw(),
            submissions: self.pending.iter().count(),
            ready: self.not_looked_at(),
            in_flight: self.in_flight,
            building: self.building.launches.iter().flatten().count(),
            tokens: self.sequences.iter().map(|(_, entry)| u64::from(entry.shared.state().committed)).sum(),
        }
    }

    /// Frees the slots that nobody looks at any more, as the next operation that needs one would.
    pub fn reclaim(&mut self) {
        self.blocks.reclaim();
    }

    /// Recounts everything that the core keeps count of.
    ///
    /// # Errors
    /// What does not add up.
    pub fn audit(&self) -> Result<(), String> {
        self.blocks.pool().audit()?;
        let layout = self.config.layout;
        let mut holders: HashMap<BlockId, u32> = HashMap::new();
        let (mut reserved, mut waiting) = (0, self.not_looked_at());
        for (_, entry) in &self.sequences {
            let id = entry.shared.id();
            let state = entry.shared.state();
            reserved += entry.rest.reserved;
            waiting += entry.parked() + usize::from(entry.busy);
            if !entry.busy && entry.has_parked() {
                return Err(format!("{id}: operations are parked, but none is in flight"));
            }
            if !entry.busy && state.blocks.len() != layout.blocks_for(state.stored(state.end()) as usize) {
                return Err(format!("{id}: {} blocks for {} tokens", state.blocks.len(), state.end()));
            }
            if !entry.is_in_step(&state, &layout) {
                return Err(format!("{id}: the device thread's copy of its state is old: {entry:?}"));
            }
            let dropped = state.blocks.iter().filter(|block| **block == BlockId::DROPPED).count();
            if dropped * layout.block_tokens > state.dropped().len() {
                return Err(format!("{id}: {dropped} blocks dropped for tokens {:?}", state.dropped()));
            }
            let taken = entry.held_blocks().chain(state.blocks.iter().copied());
            for block in taken.filter(|block| *block != BlockId::DROPPED) {
                *holders.entry(block).or_default() += 1;
                let found = self.blocks.try_get(block).ok_or_else(|| format!("{id}: {block:?} is gone"))?;
                if found.tenant != entry.rest.tenant {
                    return Err(format!("{id}: {block:?} belongs to tenant {}", found.tenant));
                }
            }
            self.audit_positions(&state).map_err(|wrong| format!("{id}: {wrong}"))?;
        }
        let states =
            self.sequences.iter().map(|(_, entry)| (entry, entry.shared.state())).collect::<Vec<_>>();
        let settled =
            states.iter().map(|(entry, state)| (&entry.rest.tail, (!entry.busy).then_some(&**state)));
        self.blocks.audit_windows(settled)?;
        drop(states);
        self.blocks.audit_queues()?;
        self.blocks.audit_positions()?;
        let mut charged: HashMap<u32, u64> = HashMap::new();
        let mut charge = |owner: u32, class: SizeClass, slots: usize| {
            let slot_bytes = if class == SizeClass::Host { 0 } else { self.config.pool.slot_bytes(class) };
            *charged.entry(owner).or_default() += (slots * slot_bytes) as u64;
        };
        self.sequences
            .iter()
            .for_each(|(_, entry)| charge(entry.rest.tenant, SizeClass::Raw, entry.rest.reserved));
        self.blocks.iter().for_each(|(_, block)| charge(block.tenant, block.class, 1));
        let in_device = |block: &&Block| block.class != SizeClass::Host && block.published && block.refs == 0;
        let unheld = self.blocks.iter().map(|(_, block)| block).filter(in_device);
        let unheld: usize = unheld.map(|block| self.config.pool.slot_bytes(block.class)).sum();
        if unheld as u64 != self.blocks.ledger.cached_bytes() {
            return Err(format!(
                "{unheld} bytes held by nobody, {} in the ledger",
                self.blocks.ledger.cached_bytes()
            ));
        }
        let mut flights: HashMap<u32, u32> = HashMap::new();
        for (_, block) in self.blocks.iter() {
            let flying = u32::from(block.state == BlockState::Sealing) + u32::from(block.moving_to.is_some());
            *flights.entry(block.tenant).or_default() += flying;
        }
        for (owner, flying) in flights {
            let kept = self.blocks.ledger.flights_of(owner);
            if flying != kept {
                return Err(format!("owner {owner}: {flying} flights counted, {kept} in the ledger"));
            }
        }
        for (owner, bytes) in charged {
            let kept = self.blocks.ledger.used_bytes(owner);
            if bytes != kept {
                return Err(format!("owner {owner}: {bytes} bytes counted, {kept} in the ledger"));
            }
        }
        let mut slots = HashSet::new();
        let mut held_by_blocks = [0; SizeClass::COUNT];
        for (id, block) in self.blocks.iter() {
            let seals = u32::from(block.state == BlockState::Sealing);
            // The target slots of seals and moves in flight are owned by their flights.
            if let Some(class) = block.moving_to {
                held_by_blocks[class as usize] += 1;
            }
            held_by_blocks[SizeClass::Sealed as usize] += seals as usize;
            let held = holders.get(&id).copied().unwrap_or(0) + seals + u32::from(block.moving_to.is_some());
            if block.refs != held {
                return Err(format!("{id:?}: {} references, {held} holders", block.refs));
            }
            if !slots.insert(block.slot.id()) || self.blocks.pool().is_free(block.slot.id().0 as usize) {
                return Err(format!("{id:?}: {:?} has another owner", block.slot));
            }
            let place = self.blocks.place(id).ok_or_else(|| format!("{id:?} has no place"))?;
            if (place.slot, place.generation) != (block.slot.id(), block.slot.generation()) {
                return Err(format!("{id:?}: published at {place:?}, is in {:?}", block.slot));
            }
            held_by_blocks[block.class as usize] += 1;
            self.audit_published(id, block)?;
            if block.private && self.blocks.key(id).is_some() {
                return Err(format!("{id:?} is private and has a key"));
            }
        }
        let held = self.blocks.pool().held();
        if held != held_by_blocks {
            return Err(format!(
                "slots held, by class: {held:?}; blocks and flights hold {held_by_blocks:?}"
            ));
        }
        // Those without a sequence to be parked on.
        waiting += self.waiting_for_moves.iter().filter(|op| self.pending.sequence(**op).is_none()).count();
        let unanswered: usize = self.pending.iter().map(|pending| pending.unanswered()).sum();
        for (what, counted, kept) in [
            ("reserved slots", reserved, self.blocks.pool().reserved_raw()),
            ("operations", waiting, unanswered),
        ] {
            if counted != kept {
                return Err(format!("{what}: {counted} counted, {kept} kept"));
            }
        }
        Ok(())
    }

    /// What is sealed, or will be, of a sequence's committed tokens is so where they stand.
    fn audit_positions(&self, state: &SequenceState) -> Result<(), String> {
        let layout = &self.config.layout;
        for (at, inside) in state.pieces(layout, 0..state.committed) {
            let id = state.blocks[at];
            let is_open = |block: &Block| block.state == BlockState::Open;
            if !self.config.centred || self.blocks.try_get(id).is_none_or(is_open) {
                continue;
            }
            let positions = self.blocks.positions(id);
            let first = at * layout.block_tokens;
            if let Some(wrong) =
                inside.clone().find(|&token| positions.of(token) != state.position((first + token) as u32))
            {
                return Err(format!("token {wrong} of {id:?} stands elsewhere than {positions:?}"));
            }
        }
        Ok(())
    }

    /// What must hold of a block that prompts find, or do not.
    fn audit_published(&self, id: BlockId, block: &Block) -> Result<(), String> {
        let (key, found) = (self.blocks.key(id), |key| self.blocks.find_key(&key));
        if block.published != (key.and_then(found) == Some(id)) {
            return Err(format!("{id:?}: published is {}, and the index disagrees", block.published));
        }
        if !block.published {
            let in_limbo = self.blocks.limbo.contains(&id);
            return if (block.refs == 0) == in_limbo {
                Ok(())
            } else {
                Err(format!("{id:?}: {} references, in limbo is {in_limbo}", block.refs))
            };
        }
        let parent = self.blocks.lineage.ancestors(id).next();
        let orphan = parent.is_some_and(|parent| !self.blocks.is_published(parent));
        if !self.blocks.lineage.children(parent, self.blocks.root(id)).any(|child| child == id) {
            return Err(format!("{id:?} is not among the children of {parent:?}"));
        }
        let is_full = matches!(block.state, BlockState::Full | BlockState::Sealing | BlockState::Sealed);
        if orphan || !is_full {
            return Err(format!("{id:?}: published as {:?} behind {parent:?}", block.state));
        }
        Ok(())
    }
}
