//! The block pool: which slots of a device's slab are vacant, by size class.
//!
//! The slab is cut into equal chunks. A chunk serves raw slots, or those of one format of sealed blocks, whichever is wanted when it is
//! taken, and goes back to the common stock once all its slots are vacant: the split between the classes follows the load instead of a
//! setting.
//!
//! Sealing frees raw slots, so it must never starve for want of a whole vacant chunk: raw slots worth one chunk (the *moving
//! room*) are out of everybody's reach, which is exactly enough to empty the emptiest raw chunk into the others.
//! Nothing here touches a block's bytes.

#[cfg(any(test, feature = "testing"))]
mod audit;

use std::collections::VecDeque;

use crate::error::ConfigError;
use crate::format::Ladder;
use crate::geometry::BlockLayout;
use crate::runs::Runs;
use crate::slot::{FilledSlot, SlotId, SlotTable, VacantSlot};

/// Slots begin at multiples of this: whole cache lines on the CPU, aligned vector loads on a GPU.
pub const SLOT_ALIGN_BYTES: usize = 128;

/// Slots of a chunk are kept in one 64-bit set.
const CHUNK_SLOTS_MAX: usize = 64;

/// Blocks that are re-encoded at once, at most; and the least part of the slab that is for that.
const SCRATCH_SLOTS_MAX: usize = 16;
const SCRATCH_PART: usize = 32;

/// The least raw blocks that make a cache: one chunk for sealed slots, one as moving room, one to use.
const BLOCKS_MIN: usize = 3;

/// The kinds of slots: sizes in the device's slab, and the host tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SizeClass {
    /// Holds a block in the element type.
    Raw,
    /// Holds a block as it was sealed.
    Sealed,
    /// Holds one that was re-encoded since.
    Colder,
    /// Holds one that was re-encoded twice.
    Coldest,
    /// Holds a sealed block in host memory, whatever its format.
    Host,
}

/// Where blocks are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The device's slab.
    Device,
    /// Page-locked host memory.
    Host,
}

impl SizeClass {
    /// How many there are.
    pub const COUNT: usize = 5;

    /// All of them, in the order of their numbers.
    pub const ALL: [SizeClass; Self::COUNT] =
        [SizeClass::Raw, SizeClass::Sealed, SizeClass::Colder, SizeClass::Coldest, SizeClass::Host];

    /// Those of sealed blocks in the slab, by rung of the [`Ladder`].
    pub const SEALED: [SizeClass; Ladder::RUNGS_MAX] =
        [SizeClass::Sealed, SizeClass::Colder, SizeClass::Coldest];

    /// The tier of such slots.
    pub fn tier(self) -> Tier {
        if self == SizeClass::Host { Tier::Host } else { Tier::Device }
    }

    /// Whether it is one of [`SizeClass::SEALED`].
    pub fn is_sealed(self) -> bool {
        Self::SEALED.contains(&self)
    }
}

/// How the bytes of one device are cut into chunks and slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLayout {
    /// Bytes from one raw slot to the next.
    pub raw_slot_bytes: usize,
    /// Bytes from one sealed slot to the next.
    pub sealed_slot_bytes: usize,
    /// Likewise of blocks that were re-encoded once and twice; 0 where that is never done.
    pub colder_slot_bytes: [usize; Ladder::RUNGS_MAX - 1],
    /// Bytes of a chunk; a whole number of raw slots.
    pub chunk_bytes: usize,
    /// Chunks in the slab.
    pub chunks: usize,
    /// Whether sealed blocks have slots of their own size (not so when the sealed format is `raw`).
    pub has_sealed_class: bool,
    /// Places for raw blocks behind the chunks, into which blocks are decoded that are re-encoded. They have no numbers: what is there lasts no
    /// longer than a flight.
    pub scratch_slots: usize,
    /// Slots of the host tier. They have numbers, and offsets, behind those of the slab.
    pub host_slots: usize,
}

impl PoolLayout {
    /// Cuts `budget_bytes` for blocks of `layout` that are sealed and re-encoded as `formats` says.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the bytes that are missing if not even three chunks of one block fit.
    pub fn plan(
        layout: &BlockLayout,
        formats: impl Into<Ladder>,
        budget_bytes: u64,
    ) -> Result<Self, ConfigError> {
        let formats = formats.into();
        let raw_slot_bytes = layout.raw_bytes().next_multiple_of(SLOT_ALIGN_BYTES);
        let mut slot_bytes = [0; Ladder::RUNGS_MAX];
        for (bytes, format) in slot_bytes.iter_mut().zip(formats.formats()) {
            *bytes = format.block_bytes(layout).next_multiple_of(SLOT_ALIGN_BYTES);
        }
        let has_sealed_class = !formats.sealed().is_raw();
        let budget = usize::try_from(budget_bytes).unwrap_or(usize::MAX);
        let scratch_slots = match formats.formats().len() {
            1 => 0,
            _ => (budget / raw_slot_bytes / SCRATCH_PART).clamp(1, SCRATCH_SLOTS_MAX),
        };
        // Those to re-encode in come on top.
        let blocks_min = BLOCKS_MIN + scratch_slots;
        let budget = budget.saturating_sub(scratch_slots * raw_slot_bytes);
        if budget < BLOCKS_MIN * raw_slot_bytes {
            return Err(ConfigError::invalid(
                "memory_bytes_per_device",
                budget_bytes,
                format!(
                    "{} bytes are missing for {} raw blocks",
                    (blocks_min * raw_slot_bytes) as u64 - budget_bytes,
                    blocks_min
                ),
            ));
        }
        // Few slots a chunk keep fragmentation low, many keep the waste at a sealed chunk's end low:
        // the smallest chunk within 1 % of the best waste, of those that leave at least 32 chunks: two of them are not for raw blocks.
        let waste = |slots: usize| {
            let chunk = slots * raw_slot_bytes;
            let of_class = |&bytes: &usize| {
                let used = (chunk / bytes).min(CHUNK_SLOTS_MAX) * bytes;
                (chunk - used) as f64 / chunk as f64
            };
            slot_bytes[..formats.formats().len()].iter().map(of_class).fold(0.0, f64::max)
        };
        let slots_max = (budget / raw_slot_bytes / 32).clamp(1, CHUNK_SLOTS_MAX);
        let least = (1..=slots_max).map(waste).fold(f64::INFINITY, f64::min);
        let slots = match has_sealed_class {
            true => (1..=slots_max).find(|&n| waste(n) <= least + 0.01).unwrap_or(1),
            false => slots_max.min(16),
        };
        // Slot ids are 32 bits wide.
        let chunks = (budget / (slots * raw_slot_bytes)).min((u32::MAX as usize) / CHUNK_SLOTS_MAX - 1);
        Ok(Self {
            raw_slot_bytes,
            sealed_slot_bytes: slot_bytes[0],
            colder_slot_bytes: [slot_bytes[1], slot_bytes[2]],
            chunk_bytes: slots * raw_slot_bytes,
            chunks,
            has_sealed_class,
            scratch_slots,
            host_slots: 0,
        })
    }

    /// Adds a host tier of at most `budget_bytes`.
    #[must_use]
    pub fn with_host_bytes(self, budget_bytes: u64) -> Self {
        let slots = budget_bytes / self.sealed_slot_bytes as u64;
        // Slot ids are 32 bits wide.
        let most = (u32::MAX as usize - 1).saturating_sub(self.slot_ids());
        PoolLayout { host_slots: usize::try_from(slots).unwrap_or(usize::MAX).min(most), ..self }
    }

    /// Bytes of the host tier.
    pub fn host_bytes(&self) -> usize {
        self.host_slots * self.sealed_slot_bytes
    }

    /// Bytes of the whole slab.
    pub fn slab_bytes(&self) -> usize {
        self.scratch_offset_bytes(self.scratch_slots)
    }

    /// Where a place for a block that is re-encoded begins in the slab.
    pub fn scratch_offset_bytes(&self, scratch: usize) -> usize {
        self.chunks * self.chunk_bytes + scratch * self.raw_slot_bytes
    }

    /// Raw slots that are kept vacant, so that a raw chunk can always be emptied into the others.
    #[inline]
    pub fn moving_room(&self) -> usize {
        if self.has_sealed_class { self.slots_per_chunk(SizeClass::Raw) } else { 0 }
    }

    /// Raw slots of the whole slab, were all its chunks raw.
    pub fn raw_slots(&self) -> usize {
        self.chunks * self.slots_per_chunk(SizeClass::Raw)
    }

    /// Slots of `class` in a chunk.
    #[inline]
    pub fn slots_per_chunk(&self, class: SizeClass) -> usize {
        match class {
            SizeClass::Raw => self.chunk_bytes / self.raw_slot_bytes,
            SizeClass::Host => 0,
            sealed => match self.slot_bytes(sealed) {
                0 => 0,
                bytes => (self.chunk_bytes / bytes).min(CHUNK_SLOTS_MAX),
            },
        }
    }

    /// Slot numbers that one chunk takes up, used or not in its present class.
    pub fn slot_ids_per_chunk(&self) -> usize {
        SizeClass::ALL.into_iter().map(|class| self.slots_per_chunk(class)).max().unwrap_or_default()
    }

    /// Slot numbers of the whole slab.
    pub fn slot_ids(&self) -> usize {
        self.chunks * self.slot_ids_per_chunk()
    }

    /// Slot numbers of all tiers; also the most blocks that can exist.
    pub fn slot_ids_all_tiers(&self) -> usize {
        self.slot_ids() + self.host_slots
    }

    /// Where a slot of `class` begins in the slab, or, behind the slab's end, in the host tier.
    #[inline]
    pub fn offset_bytes(&self, class: SizeClass, slot: SlotId) -> usize {
        if class == SizeClass::Host {
            return self.slab_bytes() + (slot.0 as usize - self.slot_ids()) * self.sealed_slot_bytes;
        }
        let (chunk, index) =
            (slot.0 as usize / self.slot_ids_per_chunk(), slot.0 as usize % self.slot_ids_per_chunk());
        chunk * self.chunk_bytes + index * self.slot_bytes(class)
    }

    /// Bytes from one slot of `class` to the next.
    #[inline]
    pub fn slot_bytes(&self, class: SizeClass) -> usize {
        match class {
            SizeClass::Raw => self.raw_slot_bytes,
            SizeClass::Sealed | SizeClass::Host => self.sealed_slot_bytes,
            SizeClass::Colder => self.colder_slot_bytes[0],
            SizeClass::Coldest => self.colder_slot_bytes[1],
        }
    }
}

/// What a slot's bytes last were, as far as showing them to somebody matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Residue {
    /// Never written: zero from the allocation.
    Fresh,
    /// Written by one tenant only.
    Tenant(u32),
    /// Bytes of several blocks overlap here since the chunk changed class.
    Mixed,
}

/// A slot of any tier.
#[derive(Debug)]
struct Slot {
    /// None while somebody has it.
    vacant: Option<VacantSlot>,
    /// Means nothing in the host tier.
    residue: Residue,
}

#[derive(Debug)]
struct Chunk {
    class: Option<SizeClass>,
    /// Set bits are vacant slots of the present class.
    vacant: u64,
    /// Where this chunk stands in its class's list of chunks with vacancies.
    listed_at: Option<usize>,
    /// Being emptied to serve the other class: none of its slots is given out, and none counts as vacant.
    draining: bool,
}

/// A bit for each of the first slots of a chunk, of which there are some.
#[inline]
fn first_slots(slots: usize) -> u64 {
    u64::MAX >> (CHUNK_SLOTS_MAX - slots)
}

/// A slot taken from the pool.
#[derive(Debug)]
pub(crate) struct Allocated {
    pub(crate) slot: FilledSlot,
    /// The bytes may be another tenant's: zero the slot before anything else touches it.
    pub(crate) must_zero: bool,
}

/// Who holds which slot. Every operation is O(1), except [`Pool::reclaim`], which looks at each quarantined slot.
#[derive(Debug)]
pub struct Pool {
    layout: PoolLayout,
    /// Of the layout: every block asks for them, and working them out takes divisions.
    slot_ids_per_chunk: u32,
    /// Slots of a chunk, by class.
    slots_per_chunk: [u32; SizeClass::COUNT],
    /// Bytes from one slot to the next, by class.
    slot_bytes: [usize; SizeClass::COUNT],
    table: SlotTable,
    chunks: Vec<Chunk>,
    stock: Vec<u32>,
    with_vacancy: [Vec<u32>; SizeClass::COUNT],
    slots: Vec<Slot>,
    quarantine: VecDeque<(SizeClass, FilledSlot)>,
    /// Vacant slots of chunks by class, those of chunks that are being emptied left out.
    vacancies: [usize; SizeClass::COUNT],
    used: [usize; SizeClass::COUNT],
    /// Which slots of the host tier are free, counted from its first.
    host: Runs,
    reserved_raw: usize,
    draining: Option<u32>,
}

impl Pool {
    /// A pool with every slot vacant.
    pub fn new(layout: PoolLayout) -> Self {
        let slots = layout.slot_ids_all_tiers();
        let table = SlotTable::new(slots);
        let mut pool = Pool {
            chunks: (0..layout.chunks)
                .map(|_| Chunk { class: None, vacant: 0, listed_at: None, draining: false })
                .collect(),
            stock: (0..layout.chunks as u32).rev().collect(),
            with_vacancy: Default::default(),
            slots: (0..slots as u32)
                .map(|id| Slot { vacant: Some(table.first(SlotId(id))), residue: Residue::Fresh })
                .collect(),
            quarantine: VecDeque::new(),
            vacancies: [0; SizeClass::COUNT],
            used: [0; SizeClass::COUNT],
            host: Runs::new(layout.host_slots),
            reserved_raw: 0,
            draining: None,
            slot_ids_per_chunk: layout.slot_ids_per_chunk() as u32,
            slots_per_chunk: SizeClass::ALL.map(|class| layout.slots_per_chunk(class) as u32),
            slot_bytes: SizeClass::ALL.map(|class| layout.slot_bytes(class)),
            layout,
            table,
        };
        if layout.has_sealed_class {
            pool.open_chunk(SizeClass::Sealed);
        }
        pool
    }

    /// The cut of the slab.
    pub fn layout(&self) -> &PoolLayout {
        &self.layout
    }

    /// Where a slot of `class` begins in the slab.
    pub(crate) fn offset_bytes(&self, class: SizeClass, slot: SlotId) -> usize {
        if class == SizeClass::Host {
            return self.layout.offset_bytes(class, slot);
        }
        let (chunk, index) = (slot.0 / self.slot_ids_per_chunk, slot.0 % self.slot_ids_per_chunk);
        chunk as usize * self.layout.chunk_bytes + index as usize * self.slot_bytes(class)
    }

    /// Bytes from one slot of `class` to the next.
    #[inline]
    pub(crate) fn slot_bytes(&self, class: SizeClass) -> usize {
        self.slot_bytes[class as usize]
    }

    /// Pins and generations of all slots.
    pub fn table(&self) -> &SlotTable {
        &self.table
    }

    /// Raw slots that can be taken without touching reservations or the moving room.
    #[inline]
    pub fn raw_available(&self) -> usize {
        self.raw_vacant().saturating_sub(self.reserved_raw + self.moving_room())
    }

    /// No fewer than could be taken if blocks that take `bytes` bytes of slots were gone, and chunks made raw of them.
    pub(crate) fn raw_available_without(&self, bytes: u64) -> usize {
        if !self.layout.has_sealed_class {
            return self.raw_available() + bytes.div_ceil(self.layout.raw_slot_bytes as u64) as usize + 1;
        }
        let raw_slots = self.slots_per_chunk(SizeClass::Raw);
        let classes = SizeClass::SEALED.into_iter().filter(|class| self.slots_per_chunk(*class) > 0);
        // As if all of them were of the class of which a chunk holds the fewest bytes.
        let of_chunk = |class: SizeClass| self.slots_per_chunk(class) * self.layout.slot_bytes(class);
        let fewest = classes.clone().map(of_chunk).min().unwrap_or(1) as u64;
        let freed = (bytes * raw_slots as u64).div_ceil(fewest) as usize;
        let vacant =
            |class| (self.vacancies[class as usize] * raw_slots).div_ceil(self.slots_per_chunk(class));
        let vacant: usize = classes.map(vacant).sum();
        // And a chunk that is being emptied, which counts for no class.
        self.raw_available() + freed + vacant + raw_slots
    }

    /// Whether a chunk's worth of raw slots can be given up to sealed ones without breaking a reservation.
    fn can_give_up_chunk(&self) -> bool {
        self.raw_vacant() >= self.reserved_raw + self.slots_per_chunk(SizeClass::Raw)
    }

    fn slots_per_chunk(&self, class: SizeClass) -> usize {
        self.slots_per_chunk[class as usize] as usize
    }

    fn moving_room(&self) -> usize {
        if self.layout.has_sealed_class { self.slots_per_chunk(SizeClass::Raw) } else { 0 }
    }

    #[inline]
    fn raw_vacant(&self) -> usize {
        self.vacancies[SizeClass::Raw as usize] + self.stock.len() * self.slots_per_chunk(SizeClass::Raw)
    }

    /// Slots of `class` in use, quarantined ones included.
    pub fn used(&self, class: SizeClass) -> usize {
        self.used[class as usize]
    }

    /// Slots that were freed while somebody was still looking at them.
    pub fn quarantined(&self) -> usize {
        self.quarantine.len()
    }

    /// Sets `slots` raw slots aside. False, with nothing changed, if there are not so many.
    #[must_use]
    pub fn reserve_raw(&mut self, slots: usize) -> bool {
        let fits = self.raw_available() >= slots;
        if fits {
            self.reserved_raw += slots;
        }
        fits
    }

    /// Sets slots aside that were set aside a moment ago, and taken and freed since: what was promised then holds, also where
    /// a new reservation would be refused. False if the slots are not vacant (somebody looks at them).
    #[must_use]
    pub(crate) fn reserve_raw_again(&mut self, slots: usize) -> bool {
        if self.raw_vacant() < self.reserved_raw + slots {
            // They may have come back to a chunk that is being emptied since: a promise goes before sealing.
            self.stop_draining();
        }
        let fits = self.raw_vacant() >= self.reserved_raw + slots;
        if fits {
            self.reserved_raw += slots;
        }
        fits
    }

    /// Gives back what [`Pool::reserve_raw`] set aside.
    pub fn unreserve_raw(&mut self, slots: usize) {
        self.reserved_raw -= slots;
    }

    /// Takes a raw slot for `tenant`. The caller has looked at [`Pool::raw_available`] or gives back a reservation for it.
    #[inline]
    pub(crate) fn take_raw(&mut self, tenant: u32) -> Option<Allocated> {
        self.take(SizeClass::Raw, tenant)
    }

    /// Takes a slot of a class of sealed blocks for one that comes back from another tier. Unlike sealing that frees no raw slot
    /// afterwards, so it leaves the moving room alone, and where sealing has made a chunk of that, the chunk's slots.
    pub(crate) fn take_sealed_spare(&mut self, class: SizeClass, tenant: u32) -> Option<FilledSlot> {
        let left = self.raw_vacant() + self.vacancies[SizeClass::Sealed as usize];
        let is_owed = class == SizeClass::Sealed && left <= self.reserved_raw + self.moving_room();
        if is_owed || self.takes_moving_room(class) {
            return None;
        }
        self.take(class, tenant).map(|taken| taken.slot)
    }

    /// Whether a slot of a class takes a whole chunk, and that out of the moving room.
    pub(crate) fn takes_moving_room(&self, class: SizeClass) -> bool {
        self.with_vacancy[class as usize].is_empty()
            && self.raw_available() < self.slots_per_chunk(SizeClass::Raw)
    }

    /// Slots of the host tier that can be taken.
    pub fn host_available(&self) -> usize {
        self.host.free_units()
    }

    /// Takes `count` slots of the host tier, in as few runs as there are: what is moved together shall lie together.
    pub(crate) fn take_host(&mut self, count: usize) -> Option<Vec<FilledSlot>> {
        if count > self.host_available() {
            return None;
        }
        let mut slots = Vec::with_capacity(count);
        while slots.len() < count {
            let run = self.host.take_some(count - slots.len())?;
            let first = self.layout.slot_ids();
            // What is moved there overwrites the whole slot: nothing of another tenant's survives in it.
            slots.extend(run.filter_map(|at| Some(self.slots[first + at].vacant.take()?.fill())));
        }
        self.used[SizeClass::Host as usize] += count;
        Some(slots)
    }

    /// Takes a slot for a block of `tenant` that is sealed, or re-encoded, never at the cost of a raw slot that is reserved.
    pub(crate) fn take_sealed(&mut self, class: SizeClass, tenant: u32) -> Option<FilledSlot> {
        let needs_chunk = self.with_vacancy[class as usize].is_empty();
        // A raw chunk that is being emptied wants the raw slots of the moving room for what is in it.
        let is_wanted = self.draining_class() == Some(SizeClass::Raw) && self.takes_moving_room(class);
        if needs_chunk && (is_wanted || !self.can_give_up_chunk()) {
            return None;
        }
        // The whole block is overwritten, so nothing of another tenant's survives in it.
        self.take(class, tenant).map(|taken| taken.slot)
    }

    #[inline]
    fn take(&mut self, class: SizeClass, tenant: u32) -> Option<Allocated> {
        let chunk_index = match self.with_vacancy[class as usize].last() {
            Some(&index) => index,
            None => {
                self.open_chunk(class);
                *self.with_vacancy[class as usize].last()?
            }
        };
        let chunk = &mut self.chunks[chunk_index as usize];
        let bit = chunk.vacant.trailing_zeros() as usize;
        chunk.vacant &= chunk.vacant - 1;
        if chunk.vacant == 0 {
            chunk.listed_at = None;
            self.with_vacancy[class as usize].pop();
        }
        let id = chunk_index as usize * self.slot_ids_per_chunk as usize + bit;
        let of_slot = &mut self.slots[id];
        let slot = of_slot.vacant.take()?.fill();
        let must_zero = match of_slot.residue {
            Residue::Fresh => false,
            Residue::Tenant(before) => before != tenant,
            Residue::Mixed => true,
        };
        of_slot.residue = Residue::Tenant(tenant);
        self.used[class as usize] += 1;
        self.vacancies[class as usize] -= 1;
        Some(Allocated { slot, must_zero })
    }

    /// The bytes of a slot are not what its owner was to write: they may be of whoever had it before.
    pub(crate) fn spoil(&mut self, slot: SlotId) {
        self.slots[slot.0 as usize].residue = Residue::Mixed;
    }

    /// Gives a chunk of the stock to `class`.
    fn open_chunk(&mut self, class: SizeClass) {
        if let Some(index) = self.stock.pop() {
            self.assign(index, class);
        }
    }

    /// Makes a chunk whose slots are all vacant serve `class`.
    fn assign(&mut self, index: u32, class: SizeClass) {
        let slots = self.slots_per_chunk(class);
        let first = index as usize * self.slot_ids_per_chunk as usize;
        let of_chunk = &mut self.slots[first..first + self.slot_ids_per_chunk as usize];
        if of_chunk.iter().any(|slot| slot.residue != Residue::Fresh) {
            of_chunk.iter_mut().for_each(|slot| slot.residue = Residue::Mixed);
        }
        let chunk = &mut self.chunks[index as usize];
        chunk.class = Some(class);
        chunk.vacant = first_slots(slots);
        self.vacancies[class as usize] += slots;
        self.list(index);
    }

    /// Chooses the chunk of `class` with the fewest blocks to be emptied for another class, if the other chunks have room for what
    /// is in it. One at a time.
    pub(crate) fn start_draining(&mut self, class: SizeClass) -> bool {
        let slots = self.slots_per_chunk(class);
        let possible = match class {
            SizeClass::Raw => self.can_give_up_chunk(),
            _ => slots > 0 && self.vacancies[class as usize] >= slots,
        };
        if self.draining.is_some() || !possible {
            return false;
        }
        // A slot that somebody looks at may stay for long.
        let looked_at = |index: &u32| {
            let ids = self.slot_ids_per_chunk as usize;
            self.quarantine.iter().any(|(_, slot)| slot.id().0 as usize / ids == *index as usize)
        };
        let vacancies = |index: u32| self.chunks[index as usize].vacant.count_ones() as usize;
        let listed = self.with_vacancy[class as usize].iter().copied();
        let emptiest = match class {
            SizeClass::Raw => listed.max_by_key(|&index| vacancies(index)),
            _ => listed.filter(|index| !looked_at(index)).max_by_key(|&index| vacancies(index)),
        };
        let Some(index) = emptiest else { return false };
        let vacant = vacancies(index);
        let elsewhere = match class {
            SizeClass::Raw => self.raw_vacant() - vacant,
            _ => self.vacancies[class as usize] - vacant,
        };
        if elsewhere < slots - vacant {
            return false;
        }
        self.unlist(index);
        self.vacancies[class as usize] -= vacant;
        if vacant == slots {
            self.drained(index, class);
        } else {
            self.chunks[index as usize].draining = true;
            self.draining = Some(index);
        }
        true
    }

    /// Leaves the chunk that is being emptied to its class.
    pub(crate) fn stop_draining(&mut self) {
        let Some(index) = self.draining.take() else { return };
        let chunk = &mut self.chunks[index as usize];
        chunk.draining = false;
        let (class, vacant) = (chunk.class, chunk.vacant.count_ones() as usize);
        if let Some(class) = class {
            self.vacancies[class as usize] += vacant;
        }
        if vacant > 0 {
            self.list(index);
        }
    }

    /// The class of the chunk that is being emptied.
    pub(crate) fn draining_class(&self) -> Option<SizeClass> {
        self.chunks[self.draining? as usize].class
    }

    /// Whether only readers keep the chunk that is being emptied from being empty.
    pub(crate) fn draining_waits_for_readers(&self) -> bool {
        self.draining().all(|slot| self.is_quarantined(slot))
    }

    /// Whether a slot was freed while somebody looked at it.
    pub(crate) fn is_quarantined(&self, slot: SlotId) -> bool {
        self.quarantine.iter().any(|(_, held)| held.id() == slot)
    }

    /// Bytes of the slab that can be had for one class or another, without touching reservations or the moving room.
    pub(crate) fn available_bytes(&self) -> usize {
        let sealed = SizeClass::SEALED
            .into_iter()
            .map(|class| self.vacancies[class as usize] * self.layout.slot_bytes(class));
        self.raw_available() * self.layout.raw_slot_bytes + sealed.sum::<usize>()
    }

    /// Whether a chunk serves no class.
    pub(crate) fn has_vacant_chunk(&self) -> bool {
        !self.stock.is_empty()
    }

    /// Whether slots of a class are vacant without another chunk.
    pub(crate) fn has_vacancy(&self, class: SizeClass) -> bool {
        self.vacancies[class as usize] > 0
    }

    /// Bytes of the slots in use that are not raw.
    pub(crate) fn sealed_bytes(&self) -> u64 {
        SizeClass::SEALED
            .into_iter()
            .map(|class| (self.used(class) * self.layout.slot_bytes(class)) as u64)
            .sum()
    }

    /// A slot of a class out of a chunk that is not being emptied: for a block that moves out of the one that is.
    pub(crate) fn take_vacancy(&mut self, class: SizeClass, tenant: u32) -> Option<FilledSlot> {
        self.has_vacancy(class).then(|| self.take(class, tenant)).flatten().map(|taken| taken.slot)
    }

    /// The slots of the chunk that is being emptied that are not vacant.
    pub(crate) fn draining(&self) -> impl Iterator<Item = SlotId> + use<> {
        let class = self.draining_class().unwrap_or(SizeClass::Raw);
        let slots = self.slots_per_chunk(class);
        let (first, taken) = match self.draining {
            None => (0, 0),
            Some(index) => {
                let taken = first_slots(slots) & !self.chunks[index as usize].vacant;
                (index as usize * self.slot_ids_per_chunk as usize, taken)
            }
        };
        (0..slots).filter(move |bit| taken >> bit & 1 == 1).map(move |bit| SlotId((first + bit) as u32))
    }

    #[inline]
    fn list(&mut self, index: u32) {
        let chunk = &mut self.chunks[index as usize];
        let Some(class) = chunk.class else { return };
        let list = &mut self.with_vacancy[class as usize];
        chunk.listed_at = Some(list.len());
        list.push(index);
    }

    fn unlist(&mut self, index: u32) {
        let chunk = &mut self.chunks[index as usize];
        let (Some(class), Some(at)) = (chunk.class, chunk.listed_at.take()) else { return };
        let list = &mut self.with_vacancy[class as usize];
        list.swap_remove(at);
        if let Some(&moved) = list.get(at) {
            self.chunks[moved as usize].listed_at = Some(at);
        }
    }

    /// Loads what taking the slot back and giving it out again will need.
    pub(crate) fn warm(&self, slot: SlotId) -> u32 {
        // Chunks are few, and what is known of them in the caches.
        u32::from(self.slots[slot.0 as usize].vacant.is_some()) | self.table.pins(slot)
    }

    /// Takes a slot back: vacant at once, or quarantined while a pin holds it.
    #[inline]
    pub(crate) fn free(&mut self, class: SizeClass, slot: FilledSlot) {
        match self.table.vacate(slot) {
            Ok(vacant) => self.put_back(class, vacant),
            Err(pinned) => self.quarantine.push_back((class, pinned)),
        }
    }

    /// Frees the quarantined slots that nobody looks at any more.
    pub fn reclaim(&mut self) {
        for _ in 0..self.quarantine.len() {
            if let Some((class, slot)) = self.quarantine.pop_front() {
                self.free(class, slot);
            }
        }
    }

    #[inline]
    fn put_back(&mut self, class: SizeClass, vacant: VacantSlot) {
        let id = vacant.id().0 as usize;
        if class == SizeClass::Host {
            self.used[class as usize] -= 1;
            self.slots[id].vacant = Some(vacant);
            let at = id - self.layout.slot_ids();
            return self.host.give_back(at..at + 1);
        }
        let number = vacant.id().0;
        let (index, bit) =
            ((number / self.slot_ids_per_chunk) as usize, (number % self.slot_ids_per_chunk) as usize);
        self.slots[id].vacant = Some(vacant);
        self.used[class as usize] -= 1;
        let slots = self.slots_per_chunk(class);
        let chunk = &mut self.chunks[index];
        chunk.vacant |= 1 << bit;
        let all_vacant = chunk.vacant == first_slots(slots);
        let is_listed = chunk.listed_at.is_some();
        let index = index as u32;
        if chunk.draining {
            if all_vacant {
                self.drained(index, class);
            }
            return;
        }
        self.vacancies[class as usize] += 1;
        if !is_listed {
            self.list(index);
        }
        // The last chunk with sealed vacancies stays: the next block to seal need not wait for another.
        let keeps = class == SizeClass::Sealed && self.with_vacancy[class as usize].len() == 1;
        if all_vacant && !keeps {
            self.unlist(index);
            self.vacancies[class as usize] -= slots;
            self.return_to_stock(index);
        }
    }

    /// The chunk that was to be emptied is empty.
    fn drained(&mut self, index: u32, class: SizeClass) {
        self.chunks[index as usize].draining = false;
        self.draining = None;
        // Sealing may have come by room meanwhile: a second vacant chunk would be out of everybody's reach.
        match class {
            SizeClass::Raw if !self.has_vacancy(SizeClass::Sealed) => self.assign(index, SizeClass::Sealed),
            _ => self.return_to_stock(index),
        }
    }

    /// Makes a chunk with no block, that is in no list, serve no class.
    fn return_to_stock(&mut self, index: u32) {
        self.chunks[index as usize].class = None;
        self.chunks[index as usize].vacant = 0;
        self.stock.push(index);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::geometry::{ElementType, Geometry};

    fn pool(blocks: u64) -> Pool {
        let layout = Geometry::new(1, 1, 16, ElementType::F16).layout().unwrap();
        Pool::new(PoolLayout::plan(&layout, Format::Int8, blocks * layout.raw_bytes() as u64).unwrap())
    }

    #[test]
    fn all_slots_come_back_and_the_split_follows_the_load() {
        let mut pool = pool(64);
        let whole = pool.raw_available();
        let raw: Vec<_> = (0..whole).map(|_| pool.take_raw(0).unwrap()).collect();
        assert_eq!(pool.raw_available(), 0);
        let sealed = pool.take_sealed(SizeClass::Sealed, 0).expect("one chunk is kept for sealing");
        for taken in raw {
            pool.free(SizeClass::Raw, taken.slot);
        }
        pool.free(SizeClass::Sealed, sealed);
        assert_eq!(
            (pool.raw_available(), pool.used(SizeClass::Raw), pool.used(SizeClass::Sealed)),
            (whole, 0, 0)
        );
        let sealed: Vec<_> = std::iter::from_fn(|| pool.take_sealed(SizeClass::Sealed, 0)).collect();
        assert!(
            sealed.len() > whole,
            "sealed blocks are smaller: {} fit where {whole} raw ones do",
            sealed.len()
        );
        assert_eq!(pool.raw_available(), 0);
    }

    #[test]
    fn slots_do_not_overlap() {
        let mut pool = pool(100);
        let mut ranges = Vec::new();
        for turn in 0.. {
            let class = if turn % 3 == 0 { SizeClass::Raw } else { SizeClass::Sealed };
            let Some(taken) = pool.take(class, 0) else { break };
            let start = pool.layout.offset_bytes(class, taken.slot.id());
            ranges.push(start..start + pool.layout.slot_bytes(class));
        }
        ranges.sort_by_key(|r| r.start);
        assert!(ranges.windows(2).all(|w| w[0].end <= w[1].start));
        assert!(ranges.last().unwrap().end <= pool.layout.slab_bytes());
    }

    #[test]
    fn bytes_of_another_tenant_must_be_zeroed() {
        let mut pool = pool(64);
        let first = pool.take_raw(1).unwrap();
        assert!(!first.must_zero, "never written");
        let held = pool.take_raw(1).unwrap();
        pool.free(SizeClass::Raw, first.slot);
        let again = pool.take_raw(1).unwrap();
        assert!(!again.must_zero, "its own bytes");
        pool.free(SizeClass::Raw, again.slot);
        assert!(pool.take_raw(2).unwrap().must_zero);
        pool.free(SizeClass::Raw, held.slot);
    }

    #[test]
    fn a_reservation_is_out_of_reach_of_sealing() {
        let mut pool = pool(64);
        let all = pool.raw_available();
        assert!(pool.reserve_raw(all));
        assert!(!pool.reserve_raw(1));
        let sealed: Vec<_> = std::iter::from_fn(|| pool.take_sealed(SizeClass::Sealed, 0)).collect();
        let per_chunk = pool.layout.slots_per_chunk(SizeClass::Sealed);
        assert_eq!(sealed.len(), 2 * per_chunk, "the chunk kept for sealing, and the moving room");
        sealed.into_iter().for_each(|slot| pool.free(SizeClass::Sealed, slot));
        pool.unreserve_raw(all);
        assert_eq!(pool.raw_available(), all);
    }

    #[test]
    fn blocks_that_come_back_leave_sealing_its_room() {
        let mut pool = pool(640);
        let raw: Vec<_> = (0..pool.raw_available() / 2).map(|_| pool.take_raw(0).unwrap().slot).collect();
        let back: Vec<_> = std::iter::from_fn(|| pool.take_sealed_spare(SizeClass::Sealed, 0)).collect();
        assert!(!back.is_empty());
        // Whatever came back: a chunk can still be given up to sealing.
        assert!(pool.can_give_up_chunk() && pool.take_sealed(SizeClass::Sealed, 0).is_some());
        drop((raw, back));
    }

    #[test]
    fn blocks_that_come_back_leave_the_chunk_of_the_moving_room_to_sealing() {
        let mut pool = pool(640);
        let raw: Vec<_> = (0..pool.raw_available()).map(|_| pool.take_raw(0).unwrap().slot).collect();
        let first = pool.vacancies[SizeClass::Sealed as usize];
        let mut sealed: Vec<_> = (0..=first).map(|_| pool.take_sealed(SizeClass::Sealed, 0)).collect();
        assert!(sealed.iter().all(Option::is_some) && !pool.can_give_up_chunk());
        let back: Vec<_> = std::iter::from_fn(|| pool.take_sealed_spare(SizeClass::Sealed, 0)).collect();
        assert!(!back.is_empty(), "a chunk holds more sealed blocks than raw ones");
        // Whatever came back: as many raw blocks can be sealed as have to be for the next chunk.
        let per_chunk = pool.slots_per_chunk(SizeClass::Raw);
        for slot in raw.into_iter().take(per_chunk) {
            sealed.push(pool.take_sealed(SizeClass::Sealed, 0));
            pool.free(SizeClass::Raw, slot);
        }
        assert!(sealed.iter().all(Option::is_some) && pool.can_give_up_chunk());
        drop((sealed, back));
    }

    #[test]
    fn the_emptiest_chunk_can_always_be_emptied() {
        let mut pool = pool(640);
        let mut raw: Vec<_> = (0..pool.raw_available()).map(|_| pool.take_raw(0).unwrap().slot).collect();
        while pool.take_sealed(SizeClass::Sealed, 0).is_some() {}
        // A vacancy here and there: as many as a chunk has slots, but no chunk is vacant.
        let per_chunk = pool.layout.slots_per_chunk(SizeClass::Raw);
        for turn in 0..per_chunk {
            let slot = raw.swap_remove((turn * 37) % raw.len());
            pool.free(SizeClass::Raw, slot);
        }
        assert!(pool.take_sealed(SizeClass::Sealed, 0).is_none());
        assert!(pool.start_draining(SizeClass::Raw));
        for slot in pool.draining().collect::<Vec<_>>() {
            let to = pool.take_raw(0).expect("the others have room").slot;
            let at = raw.iter().position(|held| held.id() == slot).expect("nothing else is in the chunk");
            let from = std::mem::replace(&mut raw[at], to);
            pool.free(SizeClass::Raw, from);
        }
        assert!(pool.take_sealed(SizeClass::Sealed, 0).is_some());
        assert!(!pool.start_draining(SizeClass::Raw), "what is reserved or in use is not given up");
    }

    #[test]
    fn a_chunk_that_was_emptied_for_nobody_is_everybodys() {
        let mut pool = pool(640);
        let whole = pool.raw_available();
        let mut raw: Vec<_> = (0..whole).map(|_| pool.take_raw(0).unwrap().slot).collect();
        let sealed: Vec<_> = std::iter::from_fn(|| pool.take_sealed(SizeClass::Sealed, 0)).collect();
        // As many as a chunk has slots, here and there: none is vacant yet.
        for turn in 0..pool.layout.slots_per_chunk(SizeClass::Raw) {
            let slot = raw.swap_remove((turn * 37) % raw.len());
            pool.free(SizeClass::Raw, slot);
        }
        assert!(pool.start_draining(SizeClass::Raw));
        sealed.into_iter().for_each(|slot| pool.free(SizeClass::Sealed, slot));
        raw.into_iter().for_each(|slot| pool.free(SizeClass::Raw, slot));
        assert_eq!((pool.draining_class(), pool.raw_available()), (None, whole));
    }

    #[test]
    fn a_budget_that_does_not_fit_says_what_is_missing() {
        let layout = Geometry::new(2, 2, 64, ElementType::F16).layout().unwrap();
        let error = PoolLayout::plan(&layout, Format::Int8, 1000).unwrap_err().to_string();
        let missing = BLOCKS_MIN * layout.raw_bytes() - 1000;
        assert!(error.contains("memory_bytes_per_device") && error.contains(&missing.to_string()), "{error}");
    }
}
