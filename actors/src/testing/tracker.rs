//! What the simulated device watches for: rows read that nobody wrote, and lanes that get into each other's way.
//!
//! **Watermarks.** Every `(layer, token)` of a raw slot, and every sealed slot as a whole, is marked when it is written and
//! unmarked when the slot changes hands. Reading, sealing or copying out an unmarked one is a violation, whatever its bytes.
//!
//! **Hazards.** Between lanes anything goes, so two launches on different lanes that are both under way must not touch the
//! same rows unless both only read them. A launch counts as under way until its completion is *reported*: before that the
//! core cannot know. (On a real device the same is a data race; here it is found whichever way the race would have gone.)

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use crate::dropping::Positions;
use crate::format::{BlockFormat, Format};
use crate::geometry::BlockLayout;
use crate::memory::{AppendStep, LaneKind, Step};
use crate::pool::{PoolLayout, SizeClass};

/// Watermarks and accesses under way of one simulated device.
#[derive(Debug)]
pub struct Tracker {
    layout: BlockLayout,
    pool: PoolLayout,
    /// Per raw slot, layer and token.
    raw_written: Vec<bool>,
    /// Per sealed slot: where the tokens of the block that it was sealed as stood.
    sealed: Vec<Option<Positions>>,
    /// Slots that hold tokens which were decoded, raw ones and sealed ones.
    decoded: [Vec<bool>; SizeClass::COUNT],
    /// Raw slots into which such a block was decoded: sealed from there it is what it was.
    decoded_twice: Vec<bool>,
    /// Generations of the slots when last looked at.
    generations: Vec<u32>,
    /// Accesses under way, per chunk.
    under_way: Vec<Vec<Access>>,
}

/// Rows of one slot that a launch reads or writes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Access {
    lane: LaneKind,
    launch: u64,
    write: bool,
    slot: Range<usize>,
    raw: bool,
    layers: Range<usize>,
    tokens: Range<usize>,
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Access {
    fn collides(&self, other: &Access) -> bool {
        if self.lane == other.lane || !(self.write || other.write) || !overlap(&self.slot, &other.slot) {
            return false;
        }
        // Different cuts of the same bytes: rows do not line up.
        let same_rows = self.raw && other.raw && self.slot == other.slot;
        !same_rows || overlap(&self.layers, &other.layers) && overlap(&self.tokens, &other.tokens)
    }
}

impl Tracker {
    /// A tracker of a fresh slab.
    pub fn new(layout: BlockLayout, pool: PoolLayout) -> Self {
        let slots = pool.slot_ids_all_tiers() + pool.scratch_slots;
        Tracker {
            raw_written: vec![false; slots * layout.layers * layout.block_tokens],
            sealed: vec![None; slots],
            decoded: SizeClass::ALL.map(|_| vec![false; slots]),
            decoded_twice: vec![false; slots],
            generations: vec![0; pool.slot_ids_all_tiers()],
            under_way: vec![Vec::new(); pool.chunks + 1],
            layout,
            pool,
        }
    }

    /// Tells of the generation of every slot: the content of those that changed hands is void.
    pub fn observe(&mut self, generation_of: impl Fn(usize) -> u32) {
        let rows = self.layout.layers * self.layout.block_tokens;
        for slot in 0..self.generations.len() {
            let now = generation_of(slot);
            if self.generations[slot] != now {
                self.generations[slot] = now;
                self.raw_written[slot * rows..(slot + 1) * rows].fill(false);
                self.sealed[slot] = None;
                self.decoded.iter_mut().for_each(|decoded| decoded[slot] = false);
            }
        }
    }

    /// Whether the slot at `offset` holds tokens that were decoded: not what the model computed, whatever their bytes.
    pub fn is_decoded(&self, class: SizeClass, offset: usize) -> bool {
        self.decoded[class as usize][self.slot_of(class, offset)]
    }

    fn set_decoded(&mut self, class: SizeClass, offset: usize, decoded: bool) {
        let slot = self.slot_of(class, offset);
        self.decoded[class as usize][slot] = decoded;
    }

    /// Where the accesses to the slot at `offset` are listed: by chunk, and all of the host tier together.
    fn listed_at(&self, offset: usize) -> usize {
        (offset / self.pool.chunk_bytes).min(self.pool.chunks)
    }

    fn slot_of(&self, class: SizeClass, offset: usize) -> usize {
        if offset >= self.pool.slab_bytes() {
            let inside = offset - self.pool.slab_bytes();
            assert_eq!(
                inside % self.pool.sealed_slot_bytes,
                0,
                "offset {offset} is no slot of the host tier"
            );
            return self.pool.slot_ids() + inside / self.pool.sealed_slot_bytes;
        }
        let scratch = self.pool.scratch_offset_bytes(0);
        if offset >= scratch {
            return self.pool.slot_ids_all_tiers() + (offset - scratch) / self.pool.raw_slot_bytes;
        }
        let chunk = offset / self.pool.chunk_bytes;
        let inside = offset % self.pool.chunk_bytes;
        assert_eq!(inside % self.pool.slot_bytes(class), 0, "offset {offset} is no {class:?} slot");
        let index = inside / self.pool.slot_bytes(class);
        assert!(index < self.pool.slots_per_chunk(class), "offset {offset} lies past the slots of its chunk");
        chunk * self.pool.slot_ids_per_chunk() + index
    }

    /// The class of the slot at `offset`, of a block that is stored so.
    fn class_at(&self, format: BlockFormat, offset: usize) -> SizeClass {
        if offset >= self.pool.slab_bytes() { SizeClass::Host } else { self.class_of(format) }
    }

    fn class_of(&self, format: BlockFormat) -> SizeClass {
        match format.keys {
            _ if !self.pool.has_sealed_class => SizeClass::Raw,
            Format::Raw => SizeClass::Raw,
            Format::R4 => SizeClass::Colder,
            Format::R2 => SizeClass::Coldest,
            _ => SizeClass::Sealed,
        }
    }

    /// The format of a block of which so many bytes are moved.
    fn format_of(&self, bytes: usize) -> BlockFormat {
        let formats = [Format::Raw, Format::Int8, Format::R4, Format::R2].map(BlockFormat::from);
        let found = formats.into_iter().find(|format| format.block_bytes(&self.layout) == bytes);
        found.unwrap_or_else(|| panic!("no block has {bytes} bytes"))
    }

    fn rows(&mut self, offset: usize, layer: usize, tokens: Range<usize>) -> &mut [bool] {
        let slot = self.slot_of(SizeClass::Raw, offset);
        let first = (slot * self.layout.layers + layer) * self.layout.block_tokens;
        &mut self.raw_written[first + tokens.start..first + tokens.end]
    }

    fn whole(&mut self, offset: usize) -> &mut [bool] {
        let rows = self.layout.layers * self.layout.block_tokens;
        let slot = self.slot_of(SizeClass::Raw, offset);
        &mut self.raw_written[slot * rows..(slot + 1) * rows]
    }

    /// A step takes effect now.
    ///
    /// # Panics
    /// If it reads what nobody has written.
    pub fn execute(&mut self, step: &Step) {
        match step {
            Step::Zero { slot_offset } => {
                self.whole(*slot_offset).fill(false);
                self.set_decoded(SizeClass::Raw, *slot_offset, false);
            }
            Step::Copy { from_offset, to_offset } => {
                let marks = self.whole(*from_offset).to_vec();
                self.whole(*to_offset).copy_from_slice(&marks);
                let from_class = self.class_at(BlockFormat::RAW, *from_offset);
                let decoded = self.is_decoded(from_class, *from_offset);
                self.set_decoded(SizeClass::Raw, *to_offset, decoded);
            }
            Step::Transfer { from_offset, to_offset, bytes } => {
                if !self.pool.has_sealed_class {
                    let marks = self.whole(*from_offset).to_vec();
                    self.whole(*to_offset).copy_from_slice(&marks);
                }
                let format = self.format_of(*bytes);
                let (from_class, to_class) =
                    (self.class_at(format, *from_offset), self.class_at(format, *to_offset));
                let (from, to) = (self.slot_of(from_class, *from_offset), self.slot_of(to_class, *to_offset));
                assert!(
                    !self.pool.has_sealed_class || self.sealed[from].is_some(),
                    "moved before it was sealed: {step:?}"
                );
                self.sealed[to] = self.sealed[from].clone();
                self.decoded[to_class as usize][to] = self.decoded[from_class as usize][from];
            }
            Step::Reopen { format, positions, from_offset, to_offset } => {
                self.check_sealed(*format, positions, *from_offset, step);
                self.whole(*to_offset).fill(true);
                let twice = self.is_decoded(self.class_at(*format, *from_offset), *from_offset);
                let slot = self.slot_of(SizeClass::Raw, *to_offset);
                self.decoded_twice[slot] = twice;
                self.set_decoded(SizeClass::Raw, *to_offset, true);
            }
            Step::Append(append) => {
                for layer in append.layers.clone() {
                    self.rows(append.slot_offset, layer, append.tokens.clone()).fill(true);
                }
            }
            Step::AppendRows(rows) => {
                for row in &rows.rows {
                    let AppendStep { layers, slot_offset, tokens, .. } = rows.step_of(row);
                    for layer in layers {
                        self.rows(slot_offset, layer, tokens.clone()).fill(true);
                    }
                }
            }
            Step::Seal { format, positions, from_offset, to_offset, .. } => {
                assert!(
                    self.whole(*from_offset).iter().all(|w| *w),
                    "sealed before it was written: {step:?}"
                );
                let class = self.class_of(*format);
                let slot = self.slot_of(class, *to_offset);
                self.sealed[slot] = Some(positions.clone());
                let decoded = match class {
                    // Re-encoded: what it holds is as first-hand as it was before.
                    SizeClass::Colder | SizeClass::Coldest => {
                        self.decoded_twice[self.slot_of(SizeClass::Raw, *from_offset)]
                    }
                    _ => self.is_decoded(SizeClass::Raw, *from_offset),
                };
                self.set_decoded(class, *to_offset, decoded);
            }
            Step::Read(read) => match self.class_of(read.format) {
                // Also of a block in the host tier.
                SizeClass::Raw => assert!(
                    self.rows(read.slot_offset, read.layer, read.tokens.clone()).iter().all(|w| *w),
                    "read before it was written: {read:?}"
                ),
                _ => {
                    self.check_sealed(read.format, &read.positions, read.slot_offset, step);
                }
            },
            Step::Score(score) => {
                for from in &score.sources {
                    let all = 0..from.tokens as u32;
                    self.check_tokens(from.format, &from.positions, from.slot_offset, all, step);
                }
            }
            Step::Gather(gather) => {
                let tokens = gather.tokens.iter().copied();
                self.check_tokens(gather.format, &gather.positions, gather.from_offset, tokens, step);
                let filled = gather.to_token..gather.to_token + gather.tokens.len();
                for layer in 0..self.layout.layers {
                    self.rows(gather.to_offset, layer, filled.clone()).fill(true);
                }
                let from = self.class_at(gather.format, gather.from_offset);
                if !gather.format.is_raw() || self.is_decoded(from, gather.from_offset) {
                    self.set_decoded(SizeClass::Raw, gather.to_offset, true);
                }
            }
        }
    }

    /// All layers of some tokens of a block have been written.
    fn check_tokens(
        &mut self,
        format: BlockFormat,
        positions: &Positions,
        offset: usize,
        tokens: impl Iterator<Item = u32>,
        step: &Step,
    ) {
        if self.class_of(format) != SizeClass::Raw {
            return self.check_sealed(format, positions, offset, step);
        }
        for token in tokens {
            for layer in 0..self.layout.layers {
                let written = self.rows(offset, layer, token as usize..token as usize + 1)[0];
                assert!(written, "read before it was written: layer {layer}, token {token} of {step:?}");
            }
        }
    }

    /// It was sealed, as the block of tokens at these positions: that is part of what its bytes mean.
    fn check_sealed(&self, format: BlockFormat, positions: &Positions, offset: usize, step: &Step) {
        let slot = self.slot_of(self.class_at(format, offset), offset);
        assert_eq!(
            self.sealed[slot].as_ref(),
            Some(positions),
            "not what was sealed, or before it was: {step:?}"
        );
    }

    /// A launch is under way from now on.
    ///
    /// # Panics
    /// If a launch under way on another lane touches what it touches, and one of them writes.
    pub fn begin(&mut self, lane: LaneKind, launch: u64, steps: &[Step]) {
        for step in steps {
            let whole = 0..self.layout.layers;
            let all = 0..self.layout.block_tokens;
            let raw = SizeClass::Raw;
            match step {
                Step::Zero { slot_offset } => self.access(lane, launch, true, raw, *slot_offset, whole, all),
                Step::Copy { from_offset, to_offset } => {
                    let class = self.class_at(BlockFormat::RAW, *from_offset);
                    self.access(lane, launch, false, class, *from_offset, whole.clone(), all.clone());
                    self.access(lane, launch, true, raw, *to_offset, whole, all);
                }
                Step::Transfer { from_offset, to_offset, bytes } => {
                    let format = self.format_of(*bytes);
                    let class = |offset| self.class_at(format, offset);
                    let (from, to) = (class(*from_offset), class(*to_offset));
                    self.access(lane, launch, false, from, *from_offset, whole.clone(), all.clone());
                    self.access(lane, launch, true, to, *to_offset, whole, all);
                }
                Step::Reopen { format, from_offset, to_offset, .. } => {
                    let class = self.class_at(*format, *from_offset);
                    self.access(lane, launch, false, class, *from_offset, whole.clone(), all.clone());
                    self.access(lane, launch, true, raw, *to_offset, whole, all);
                }
                Step::Append(append) => {
                    let (layers, tokens) = (append.layers.clone(), append.tokens.clone());
                    self.access(lane, launch, true, raw, append.slot_offset, layers, tokens);
                }
                Step::AppendRows(rows) => {
                    for row in &rows.rows {
                        let AppendStep { layers, slot_offset, tokens, .. } = rows.step_of(row);
                        self.access(lane, launch, true, raw, slot_offset, layers, tokens);
                    }
                }
                Step::Seal { format, from_offset, to_offset, .. } => {
                    let class = self.class_of(*format);
                    self.access(lane, launch, false, raw, *from_offset, whole.clone(), all.clone());
                    self.access(lane, launch, true, class, *to_offset, whole, all);
                }
                Step::Read(read) => {
                    let (layers, tokens) = (read.layer..read.layer + 1, read.tokens.clone());
                    let class = self.class_at(read.format, read.slot_offset);
                    self.access(lane, launch, false, class, read.slot_offset, layers, tokens);
                }
                Step::Score(score) => {
                    for from in &score.sources {
                        let class = self.class_at(from.format, from.slot_offset);
                        let tokens = 0..from.tokens;
                        self.access(lane, launch, false, class, from.slot_offset, whole.clone(), tokens);
                    }
                }
                Step::Gather(gather) => {
                    let class = self.class_at(gather.format, gather.from_offset);
                    self.access(lane, launch, false, class, gather.from_offset, whole.clone(), all);
                    let filled = gather.to_token..gather.to_token + gather.tokens.len();
                    self.access(lane, launch, true, raw, gather.to_offset, whole, filled);
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn access(
        &mut self,
        lane: LaneKind,
        launch: u64,
        write: bool,
        class: SizeClass,
        offset: usize,
        layers: Range<usize>,
        tokens: Range<usize>,
    ) {
        let slot = offset..offset + self.pool.slot_bytes(class);
        let access = Access { lane, launch, write, slot, raw: class == SizeClass::Raw, layers, tokens };
        let listed_at = self.listed_at(offset);
        let others = &mut self.under_way[listed_at];
        if let Some(other) = others.iter().find(|other| access.collides(other)) {
            panic!("lanes in each other's way: {access:?} was launched while {other:?} is under way");
        }
        others.push(access);
    }

    /// The completion of a launch was reported.
    pub fn end(&mut self, launch: u64, steps: &[Step]) {
        for step in steps {
            let offsets: SmallVec<[usize; 2]> = match step {
                Step::Zero { slot_offset } => smallvec![*slot_offset],
                Step::Copy { from_offset, to_offset }
                | Step::Transfer { from_offset, to_offset, .. }
                | Step::Reopen { from_offset, to_offset, .. }
                | Step::Seal { from_offset, to_offset, .. } => smallvec![*from_offset, *to_offset],
                Step::Append(append) => smallvec![append.slot_offset],
                Step::AppendRows(rows) => rows.rows.iter().map(|row| row.slot_offset).collect(),
                Step::Read(read) => smallvec![read.slot_offset],
                Step::Score(score) => score.sources.iter().map(|from| from.slot_offset).collect(),
                Step::Gather(gather) => smallvec![gather.from_offset, gather.to_offset],
            };
            for offset in offsets {
                let listed_at = self.listed_at(offset);
                self.under_way[listed_at].retain(|access| access.launch != launch);
            }
        }
    }

    /// Accesses under way.
    pub fn accesses(&self) -> usize {
        self.under_way.iter().map(Vec::len).sum()
    }
}
