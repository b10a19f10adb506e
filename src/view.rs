//! Looking at stored blocks in place: views for the CPU, block tables for attention kernels.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, LazyLock, OnceLock};

use half::{bf16, f16};
use kv_cache_actors::block::{BlockId, Place};
use kv_cache_actors::device::ShardView;
use kv_cache_actors::dropping::{Compacted, Positions};
use kv_cache_actors::format::{BlockFormat, FormatLayout, History, RowFormat};
use kv_cache_actors::sequence::{SequenceShared, SequenceState};
use kv_cache_actors::slot::SlotPin;

use crate::backend::cpu::codec::Kernels;
use crate::backend::{HostCopy, Memory};
use crate::element::{Element, check_type};
use crate::key_means::{Centres, Keys, Scratch};
use crate::runtime::Runtime;
use crate::{BlockLayout, ElementType, Error, Format, Plane, SequenceId, Tier};

/// For decoding on a caller's thread.
static KERNELS: LazyLock<Kernels> = LazyLock::new(Kernels::best);

thread_local! {
    /// Likewise.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Finds where a block is and keeps it there.
fn pin(shard: &ShardView, block: BlockId) -> Option<(Place, SlotPin)> {
    // The caller holds the sequence's lock, so the block exists; it can only be moved under our eyes by sealing, once.
    for _ in 0..1000 {
        let place = shard.places.get(block)?;
        if let Some(pin) = shard.slots.pin(place.slot, place.generation) {
            return Some((place, pin));
        }
        std::thread::yield_now();
    }
    None
}

/// Pins that tell their shards when they go: a slot that was freed meanwhile can then be used again at once, also when
/// nobody sends the shard anything.
#[derive(Debug, Default)]
struct Pins {
    pins: Vec<SlotPin>,
    shards: Vec<ShardView>,
}

impl Pins {
    fn push(&mut self, shard: &ShardView, pin: SlotPin) {
        // A view has one shard and a table few, each in a run.
        if self.shards.last().is_none_or(|last| !last.is_same(shard)) {
            self.shards.push(shard.clone());
        }
        self.pins.push(pin);
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.pins.clear();
        self.shards.iter().for_each(ShardView::pins_dropped);
    }
}

/// The tokens that a sequence still has, as ranges: sinks and window if some were truncated.
fn kept(state: &SequenceState, visible: u32) -> impl Iterator<Item = Range<u32>> {
    let dropped = state.dropped();
    let (sinks, window) = match dropped.is_empty() {
        true => (0..0, 0..visible),
        false => (0..dropped.start, dropped.end..visible),
    };
    [sinks, window].into_iter().filter(|range| !range.is_empty())
}

fn check_layer(layout: &BlockLayout, layer: u32) -> Result<(), Error> {
    match (layer as usize) < layout.layers {
        true => Ok(()),
        false => Err(Error::Layer { layer, layers: layout.layers as u32 }),
    }
}

/// Blocks of a sequence that stay where they are while this lives.
#[derive(Debug)]
pub(crate) struct Pinned {
    memory: Memory,
    layout: BlockLayout,
    centres: Option<Arc<Centres>>,
    /// Where its tokens stood, if some were dropped by their scores.
    compacted: Option<Arc<Compacted>>,
    pieces: Vec<Piece>,
    _pins: Pins,
}

#[derive(Debug)]
struct Piece {
    /// Its first token, among those that are stored.
    stored: u32,
    first_token: u32,
    /// Where the block's tokens stand; found when keys are decoded that are differences from where that puts their mean.
    positions: OnceLock<Positions>,
    inside: Range<usize>,
    offset: usize,
    format: BlockFormat,
    history: History,
    /// The block's bytes, where the host cannot look into the device's memory; made at the first look.
    copy: OnceLock<Result<HostCopy, Error>>,
}

impl Piece {
    fn positions(&self, pinned: &Pinned) -> &Positions {
        let (compacted, block_tokens) = (pinned.compacted.as_deref(), pinned.layout.block_tokens);
        self.positions
            .get_or_init(|| Positions::of_block(compacted, self.stored as usize / block_tokens, block_tokens))
    }
}

impl Pinned {
    /// The blocks of the tokens that `visible` finds.
    fn new(
        runtime: &Runtime,
        shared: &SequenceShared,
        visible: impl FnOnce(&SequenceState) -> u32,
    ) -> Result<Pinned, Error> {
        let layout = runtime.layout;
        if runtime.submitter.permits.is_closed() {
            return Err(Error::Closed);
        }
        let shard = shared.id().shard();
        if let Some(lost) = runtime.supervisor.lost(shard) {
            return Err(lost);
        }
        let memory = runtime.memories[shard as usize].clone();
        let shard = &runtime.views[shard as usize];
        let state = shared.state();
        if state.blocks.is_empty() && runtime.directory.get(shared.id()).is_none() {
            return Err(Error::ClosedSequence(shared.id()));
        }
        let centres = runtime.centres.clone();
        let (compacted, pieces) = (state.compacted.clone(), Vec::new());
        let mut pinned = Pinned { memory, layout, centres, compacted, pieces, _pins: Pins::default() };
        for range in kept(&state, visible(&state)) {
            for (at, inside) in state.pieces(&layout, range) {
                let stored = (at * layout.block_tokens + inside.start) as u32;
                let first_token = state.position(stored);
                let found = state.blocks.get(at).and_then(|&block| pin(shard, block));
                let (place, pin) = found.ok_or(Error::ClosedSequence(shared.id()))?;
                let offset = runtime.pool.offset_bytes(place.class, place.slot);
                let (positions, copy) = (OnceLock::new(), OnceLock::new());
                let (format, history) = (place.format, place.history);
                pinned.pieces.push(Piece {
                    stored,
                    first_token,
                    positions,
                    inside,
                    offset,
                    format,
                    history,
                    copy,
                });
                pinned._pins.push(shard, pin);
            }
        }
        Ok(pinned)
    }

    fn tokens(&self) -> u32 {
        self.pieces.iter().map(|piece| piece.inside.len() as u32).sum()
    }

    /// Bytes of one of its blocks.
    fn bytes<'a>(&'a self, piece: &'a Piece, inside: Range<usize>) -> Result<&'a [u8], Error> {
        let slot = piece.offset..piece.offset + piece.format.block_bytes(&self.layout);
        self.memory.pinned(slot, inside, &piece.copy, self)
    }

    fn blocks(&self, layer: usize) -> impl Iterator<Item = BlockView<'_>> {
        self.pieces.iter().map(move |piece| BlockView { pinned: self, layer, piece })
    }
}

/// One layer of a sequence, borrowed in place. See [`Sequence::view`](crate::Sequence::view).
#[derive(Debug)]
pub struct View {
    pinned: Pinned,
    layer: usize,
}

impl View {
    pub(crate) fn new(runtime: &Runtime, shared: &SequenceShared, layer: u32) -> Result<View, Error> {
        check_layer(&runtime.layout, layer)?;
        let layer = layer as usize;
        Ok(View { pinned: Pinned::new(runtime, shared, |state| state.visible(layer))?, layer })
    }

    /// Tokens in the view.
    pub fn tokens(&self) -> u32 {
        self.pinned.tokens()
    }

    /// The blocks in order of their tokens.
    pub fn blocks(&self) -> impl Iterator<Item = BlockView<'_>> {
        self.pinned.blocks(self.layer)
    }
}

/// All layers of a sequence's committed tokens, borrowed in place: its blocks are looked up and pinned once for a whole step of a
/// model. See [`Sequence::view_committed`](crate::Sequence::view_committed).
#[derive(Debug)]
pub struct CommittedView(Pinned);

impl CommittedView {
    pub(crate) fn new(runtime: &Runtime, shared: &SequenceShared) -> Result<CommittedView, Error> {
        Ok(CommittedView(Pinned::new(runtime, shared, |state| state.committed)?))
    }

    /// Tokens in the view.
    pub fn tokens(&self) -> u32 {
        self.0.tokens()
    }

    /// The blocks of one layer in order of their tokens.
    ///
    /// # Errors
    /// [`Error::Layer`].
    pub fn blocks(&self, layer: u32) -> Result<impl Iterator<Item = BlockView<'_>>, Error> {
        check_layer(&self.0.layout, layer)?;
        Ok(self.0.blocks(layer as usize))
    }
}

/// One block of a [`View`] or a [`CommittedView`].
#[derive(Debug, Clone, Copy)]
pub struct BlockView<'a> {
    pinned: &'a Pinned,
    layer: usize,
    piece: &'a Piece,
}

/// Rows of one head of one block: `[tokens, dim]`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Rows<'a, T> {
    /// In the element type.
    Raw(&'a [T]),
    /// One code per element, one scale per token: `x = code * scale`.
    Int8 {
        /// `[tokens, dim]`.
        codes: &'a [i8],
        /// `[tokens]`.
        scales: Scales<'a>,
    },
    /// Codes of another format, as [`kv_cache::codec`](crate::codec) describes them and decodes them.
    Coded {
        /// Which, of keys or values of which dim.
        rows: RowFormat,
        /// Rows before these that share the first scales; 0 but for keys in `int4` and `int2`.
        skip: usize,
        /// `[tokens]`, [`RowFormat::row_bytes`] each.
        codes: &'a [u8],
        /// One a token, or those of all groups that the tokens are in: see [`RowFormat::scale_bytes`].
        scales: Scales<'a>,
    },
}

/// Scales of a sealed block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scales<'a> {
    /// Of f16 elements in `int8`, `fp8`, `int4` and `int2`.
    F16(&'a [f16]),
    /// Factors of the rotated formats; of bf16 elements in `int4` and `int2`.
    Bf16(&'a [bf16]),
    /// Of bf16 elements in `int8` and `fp8`, and of f32 elements in all but the rotated formats.
    F32(&'a [f32]),
}

impl<'a> Scales<'a> {
    /// As they are stored.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Scales::F16(scales) => bytemuck::cast_slice(scales),
            Scales::Bf16(scales) => bytemuck::cast_slice(scales),
            Scales::F32(scales) => bytemuck::cast_slice(scales),
        }
    }
}

impl<'a> BlockView<'a> {
    /// Position of the first token.
    pub fn first_token(&self) -> u32 {
        self.piece.first_token
    }

    /// Tokens of the block in the view.
    pub fn tokens(&self) -> u32 {
        self.piece.inside.len() as u32
    }

    /// Positions of these tokens in their sequence: one after the other, unless tokens between them were dropped by their scores.
    pub fn positions(&self) -> impl Iterator<Item = u32> + 'a {
        let (compacted, stored) = (self.pinned.compacted.as_deref(), self.piece.stored);
        let position = move |at| compacted.map_or(at, |compacted| compacted.position(at));
        (stored..stored + self.tokens()).map(position)
    }

    /// How the block is stored.
    pub fn format(&self) -> BlockFormat {
        self.piece.format
    }

    /// What the block's tokens have been stored in so far, this format included: also where it was decoded since, into a copy that its
    /// sequence could write to.
    pub fn history(&self) -> History {
        self.piece.history
    }

    /// How the keys or the values of this layer are stored.
    pub fn format_of(&self, plane: Plane) -> Format {
        self.piece.format.of(&self.pinned.layout, self.layer, plane)
    }

    /// Keys of one head: rows of `key_dim` elements. In a cache with [mean keys](crate::KeyMeans) those of sealed blocks are
    /// [`Rows::Coded`] in every format, and what they decode to are differences, of f32 in the rotated formats: [`BlockView::decode_keys`] adds
    /// the rest, and is the shorter way.
    ///
    /// # Errors
    /// [`Error::ElementType`] if `T` is not the cache's element type; [`Error::Unsupported`] for a head that does not exist;
    /// [`Error::Device`] if a GPU's bytes cannot be copied.
    pub fn keys<T: Element>(&self, head: usize) -> Result<Rows<'a, T>, Error> {
        self.rows(Plane::Key, head)
    }

    /// Values of one head: rows of `value_dim` elements.
    ///
    /// # Errors
    /// As [`BlockView::keys`].
    pub fn values<T: Element>(&self, head: usize) -> Result<Rows<'a, T>, Error> {
        self.rows(Plane::Value, head)
    }

    fn rows<T: Element>(&self, plane: Plane, head: usize) -> Result<Rows<'a, T>, Error> {
        let (pinned, layer, layout) = (self.pinned, self.layer, &self.pinned.layout);
        check_type::<T>(layout.element)?;
        if head >= layout.kv_heads {
            return Err(Error::Unsupported {
                what: "this head",
                instead: "the geometry says how many there are",
            });
        }
        let first = head * layout.block_tokens + self.piece.inside.start;
        let rows = first..first + self.piece.inside.len();
        let stored = FormatLayout::new(self.piece.format, layout);
        let of = stored.rows(layout, layer, plane);
        let (codes, scales) = stored.places(layout, layer, plane, &rows);
        let codes = pinned.bytes(self.piece, codes)?;
        if of.format == Format::Raw {
            // Slots and planes begin at multiples of the element size, so the cast cannot fail.
            return Ok(Rows::Raw(bytemuck::cast_slice(codes)));
        }
        let bytes = pinned.bytes(self.piece, scales)?;
        // They begin at multiples of 4 bytes.
        let scales = match (of.format, layout.element) {
            (Format::R4 | Format::R3 | Format::R2, _) => Scales::Bf16(bytemuck::cast_slice(bytes)),
            (Format::Int4 | Format::Int2, ElementType::Bf16) => Scales::Bf16(bytemuck::cast_slice(bytes)),
            (_, ElementType::F16) => Scales::F16(bytemuck::cast_slice(bytes)),
            (_, _) => Scales::F32(bytemuck::cast_slice(bytes)),
        };
        Ok(match of.format {
            Format::Int8 if !self.is_centred(plane) => {
                Rows::Int8 { codes: bytemuck::cast_slice(codes), scales }
            }
            _ => Rows::Coded {
                rows: if self.is_centred(plane) { of.of_differences() } else { of },
                skip: first % of.scale_rows(),
                codes,
                scales,
            },
        })
    }

    /// Decodes the rows of one head, whatever their format, into `rows`: `[tokens, key_dim]`.
    ///
    /// # Errors
    /// As [`BlockView::keys`]; [`Error::Shape`] if `rows` is not as long.
    pub fn decode_keys<T: Element>(&self, head: usize, rows: &mut [T]) -> Result<(), Error> {
        self.decode(Plane::Key, head, rows)
    }

    /// [`BlockView::decode_keys`] for values.
    ///
    /// # Errors
    /// As there.
    pub fn decode_values<T: Element>(&self, head: usize, rows: &mut [T]) -> Result<(), Error> {
        self.decode(Plane::Value, head, rows)
    }

    fn decode<T: Element>(&self, plane: Plane, head: usize, rows: &mut [T]) -> Result<(), Error> {
        let dim = self.pinned.layout.dim(plane);
        let shape = [1, self.piece.inside.len(), 1, dim];
        let (bytes, expected_bytes) = (size_of_val(rows), shape[1] * dim * size_of::<T>());
        if bytes != expected_bytes {
            return Err(Error::Shape { plane, bytes, expected_bytes, shape });
        }
        let (skip, codes, scales) = match self.rows::<T>(plane, head)? {
            Rows::Raw(raw) => {
                rows.copy_from_slice(raw);
                return Ok(());
            }
            Rows::Int8 { codes, scales } => (0, bytemuck::cast_slice(codes), scales),
            Rows::Coded { skip, codes, scales, .. } => (skip, codes, scales),
        };
        let row = dim * size_of::<T>();
        let out = bytemuck::cast_slice_mut(rows);
        let of = RowFormat::new(self.format_of(plane), &self.pinned.layout, plane);
        match (&self.pinned.centres, plane) {
            (Some(centres), Plane::Key) => {
                let (positions, tokens) = (self.piece.positions(self.pinned), self.piece.inside.clone());
                let keys = Keys { layer: self.layer, head, positions, tokens };
                let coded = [codes, scales.bytes()];
                SCRATCH.with_borrow_mut(|scratch| {
                    centres.decode(*KERNELS, &keys, of, skip, coded, out, row, scratch);
                });
            }
            _ => KERNELS.decode(of, skip, codes, scales.bytes(), out, row),
        }
        Ok(())
    }

    fn is_centred(&self, plane: Plane) -> bool {
        plane == Plane::Key && self.pinned.centres.is_some()
    }
}

/// Where one layer of some sequences lies. See [`Cache::block_table`](crate::Cache::block_table).
///
/// A raw block holds `[K|V][kv_head][token][dim]` of a layer at its entry's offset: an attention kernel for HND pages reaches
/// keys there and values [`BlockTable::value_offset_bytes`] further on.
#[derive(Debug)]
pub struct BlockTable {
    /// Tokens in a block.
    pub block_tokens: u32,
    /// From the keys of a layer that is raw to its values.
    pub value_offset_bytes: usize,
    /// Address of each shard's slab in its device's memory, by shard.
    pub base_addresses: Vec<usize>,
    /// A row per sequence asked for.
    pub sequences: Vec<SequenceRows>,
    _pins: Pins,
}

/// One sequence of a [`BlockTable`].
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceRows {
    /// The sequence.
    pub sequence: SequenceId,
    /// Committed tokens (and tokens staged for this layer), dropped ones included.
    pub tokens: u32,
    /// Tokens that truncation has dropped.
    pub dropped: Range<u32>,
    /// Blocks in order; those of dropped tokens are left out.
    pub blocks: Vec<BlockEntry>,
    /// Where tokens were dropped by their scores ([`Sequence::drop_tokens`](crate::Sequence::drop_tokens)): the positions of those that are there,
    /// which fill the blocks one after the other. Otherwise empty: a block's tokens follow each other from its first.
    pub positions: Vec<u32>,
}

/// One block of a [`BlockTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockEntry {
    /// Position of the block's first token.
    pub first_token: u32,
    /// How it is stored.
    pub format: BlockFormat,
    /// What its tokens have been stored in so far: see [`BlockView::history`].
    pub history: History,
    /// Which memory it is in. Offsets of blocks in the host tier count on from the end of the slab: kernels reach them by
    /// [`BlockEntry::address`] alone.
    pub tier: Tier,
    /// Where the block begins in the slab.
    pub slot_offset_bytes: usize,
    /// Where the layer's keys (raw elements, or codes) begin in the slab.
    pub keys_offset_bytes: usize,
    /// Where the layer's values begin in the slab.
    pub values_offset_bytes: usize,
    /// The address of the layer's keys, as the device sees it.
    pub address: u64,
}

impl BlockTable {
    /// One that pins nothing.
    #[cfg(all(test, feature = "cuda"))]
    pub(crate) fn for_tests(block_tokens: u32, sequences: Vec<SequenceRows>) -> BlockTable {
        let (value_offset_bytes, base_addresses, _pins) = Default::default();
        BlockTable { block_tokens, value_offset_bytes, base_addresses, sequences, _pins }
    }

    pub(crate) fn new(runtime: &Runtime, ids: &[SequenceId], layer: u32) -> Result<BlockTable, Error> {
        let layout = runtime.layout;
        check_layer(&layout, layer)?;
        let base_addresses = runtime.memories.iter().map(Memory::address).collect();
        let mut table = BlockTable {
            block_tokens: layout.block_tokens as u32,
            value_offset_bytes: layout.plane_bytes(Plane::Key),
            base_addresses,
            sequences: Vec::with_capacity(ids.len()),
            _pins: Pins::default(),
        };
        for &id in ids {
            if let Some(lost) = runtime.supervisor.lost(id.shard()) {
                return Err(lost);
            }
            let shared = runtime.directory.get(id).ok_or(Error::ClosedSequence(id))?;
            let shard = &runtime.views[id.shard() as usize];
            let state = shared.state();
            // Not those that a write in flight has taken.
            let stored = state.stored(state.visible(layer as usize));
            let shown = layout.blocks_for(stored as usize);
            let mut blocks = Vec::with_capacity(shown);
            let listed = state.blocks.iter().take(shown).enumerate();
            for (at, &block) in listed.filter(|(_, block)| **block != BlockId::DROPPED) {
                let (place, pin) = pin(shard, block).ok_or(Error::ClosedSequence(id))?;
                let slot_offset_bytes = runtime.pool.offset_bytes(place.class, place.slot);
                let stored = FormatLayout::new(place.format, &layout);
                let [keys_offset_bytes, values_offset_bytes] = Plane::BOTH
                    .map(|plane| slot_offset_bytes + stored.codes_at(&layout, layer as usize, plane));
                let memory = &runtime.memories[id.shard() as usize];
                blocks.push(BlockEntry {
                    tier: place.class.tier(),
                    address: memory.address_of(keys_offset_bytes),
                    first_token: state.position((at * layout.block_tokens) as u32),
                    format: place.format,
                    history: place.history,
                    slot_offset_bytes,
                    keys_offset_bytes,
                    values_offset_bytes,
                });
                table._pins.push(shard, pin);
            }
            let (tokens, dropped) = (state.visible(layer as usize), state.dropped());
            let positions = match state.compacted {
                Some(_) => (0..stored).map(|at| state.position(at)).collect(),
                None => Vec::new(),
            };
            table.sequences.push(SequenceRows { sequence: id, tokens, dropped, blocks, positions });
        }
        Ok(table)
    }
}
