//! A unit of work: the part of a launch that goes to the device at once. Its steps become descriptors, sorted by kind, and lie in
//! the ring with the payload that they read, the positions of tokens that lie where tokens were dropped, and the output that they write:
//!
//! ```text
//! | a flag per flight, and per row | moves | reopens | appends | moves for seals | seals | reads | payloads, positions and outputs |
//! ```

use std::ops::Range;
use std::sync::Arc;

use kv_cache_actors::dropping::Positions;
use kv_cache_actors::format::{BlockFormat, Format, Ladder};
use kv_cache_actors::geometry::{BlockLayout, Plane};
use kv_cache_actors::memory::{AppendRows, AppendStep, Launch, ReadStep, Step};

use super::driver::{DriverError, Stream};
use super::kernels::{Descriptors, Kernels, NearDescriptors, Sealed};
use super::{Slab, abi};

/// Payloads and outputs begin at multiples of this: what a thread loads or stores at once.
const VECTOR_BYTES: usize = 16;

/// A thing for each format that a cache's sealed blocks may have.
type ByRung<T> = [T; Ladder::RUNGS_MAX];

/// Which of the formats it is.
fn rung_of(sealed: &[Sealed], format: BlockFormat) -> Option<usize> {
    sealed.iter().position(|sealed| sealed.format() == format)
}

/// How much of each thing a unit holds.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) steps: usize,
    flights: usize,
    /// Rows of appends, each with a flag of its own.
    rows: usize,
    moves: usize,
    /// By the rung of the format, as seals and reads.
    reopens: ByRung<usize>,
    appends: usize,
    seal_moves: usize,
    seals: ByRung<usize>,
    /// Those of raw blocks among the first.
    reads: ByRung<usize>,
    /// Bytes of payloads, positions and outputs.
    data_bytes: usize,
}

/// Output of a read step that lies in the ring: keys, then values.
#[derive(Debug)]
pub(super) struct ReadBack {
    pub(super) flight: usize,
    pub(super) output_token: usize,
    pub(super) planes: [Range<usize>; 2],
}

fn token_bytes(layout: &BlockLayout) -> [usize; 2] {
    Plane::BOTH.map(|plane| layout.token_bytes(plane))
}

/// Where a step says that its block's tokens stand.
fn positions<'a>(layout: &BlockLayout, step: &'a Step) -> Option<&'a Positions> {
    match step {
        Step::Seal { positions, .. } | Step::Reopen { positions, .. } => Some(positions),
        Step::Read(read) if has_coded_keys(layout, read) => Some(&read.positions),
        _ => None,
    }
}

/// Whether a read has to do with sealed keys: only those depend on where they stand.
fn has_coded_keys(layout: &BlockLayout, read: &ReadStep) -> bool {
    read.format.of(layout, read.layer, Plane::Key) != Format::Raw
}

/// Bytes of the ring that the positions of a step take: none where they follow each other.
fn positions_bytes(layout: &BlockLayout, step: &Step) -> usize {
    match positions(layout, step) {
        Some(Positions::PerToken(each)) => size_of_val(&each[..]).next_multiple_of(VECTOR_BYTES),
        _ => 0,
    }
}

/// Bytes of the ring that a step's payload or output takes: none if the device reaches it where it is.
fn data_bytes(layout: &BlockLayout, launch: &Launch, step: &Step) -> usize {
    let tokens = match step {
        Step::Append(append) if append.on_device || launch.payload_is_reachable(append.flight) => 0,
        Step::Append(append) => append.layers.len() * append.tokens.len(),
        Step::AppendRows(rows) if rows.on_device || launch.payload_is_reachable(rows.flight) => 0,
        // Each row is staged by itself.
        Step::AppendRows(rows) => {
            let row = |bytes: usize| (rows.layers.len() * bytes).next_multiple_of(VECTOR_BYTES);
            return rows.rows.len() * token_bytes(layout).map(row).iter().sum::<usize>();
        }
        Step::Read(read) if read.on_device.is_none() => read.tokens.len(),
        _ => 0,
    };
    token_bytes(layout).iter().map(|bytes| (tokens * bytes).next_multiple_of(VECTOR_BYTES)).sum()
}

impl Plan {
    /// The steps of `launch` from `from` on that fit into `bytes_max` bytes. At least one does: see [`split_large`]. Reads come last in a unit, so
    /// a step that relies on those before it begins another.
    pub(super) fn of(
        layout: &BlockLayout,
        sealed: &[Sealed],
        launch: &Launch,
        from: usize,
        bytes_max: usize,
        is_after_reads: impl Fn(&Step) -> bool,
    ) -> Plan {
        let mut plan = Plan { flights: launch.flights.len(), ..Plan::default() };
        for step in &launch.steps[from..] {
            let data_bytes = data_bytes(layout, launch, step) + positions_bytes(layout, step);
            let rows = if let Step::AppendRows(rows) = step { rows.rows.len() } else { 0 };
            // The largest descriptor stands for any.
            // What no rung has is refused when it is written.
            let rung = match step {
                Step::Seal { format, .. } | Step::Reopen { format, .. } => rung_of(sealed, *format),
                Step::Read(read) => rung_of(sealed, read.format),
                _ => None,
            };
            let rung = rung.unwrap_or_default();
            let raw_runs = sealed.get(rung).map_or(0, |sealed| sealed.raw_runs.len());
            let runs = if matches!(step, Step::Seal { .. } | Step::Reopen { .. }) { raw_runs } else { 0 };
            let descriptors = (rows.max(1) + runs) * size_of::<abi::Append>() + rows * size_of::<u32>();
            let more = plan.bytes() + data_bytes + descriptors + VECTOR_BYTES;
            let is_late = plan.reads.iter().any(|reads| *reads > 0) && is_after_reads(step);
            if plan.steps > 0 && (more > bytes_max || is_late) {
                break;
            }
            match step {
                Step::Zero { .. } | Step::Copy { .. } | Step::Transfer { .. } => plan.moves += 1,
                Step::Reopen { .. } => {
                    plan.reopens[rung] += 1;
                    plan.moves += raw_runs;
                }
                Step::Append(_) => plan.appends += 1,
                Step::AppendRows(_) => plan.appends += rows,
                Step::Seal { .. } => {
                    plan.seals[rung] += 1;
                    plan.seal_moves += raw_runs;
                }
                Step::Read(_) => plan.reads[rung] += 1,
                _ => {}
            }
            plan.rows += rows;
            plan.data_bytes += data_bytes;
            plan.steps += 1;
        }
        plan
    }

    fn flags_bytes(&self) -> usize {
        self.flags().len().next_multiple_of(8)
    }

    /// Where payloads and outputs begin.
    pub(super) fn data_at(&self) -> usize {
        let all = |counts: &ByRung<usize>| counts.iter().sum::<usize>();
        let descriptors = (self.moves + self.seal_moves) * size_of::<abi::Move>()
            + (all(&self.reopens) + all(&self.seals)) * size_of::<abi::Convert>()
            + self.appends * size_of::<abi::Append>()
            + all(&self.reads) * size_of::<abi::Read>();
        (self.flags_bytes() + descriptors).next_multiple_of(VECTOR_BYTES)
    }

    /// All bytes of the unit.
    pub(super) fn bytes(&self) -> usize {
        self.data_at() + self.data_bytes
    }

    /// Where the flags lie in the unit: a `u32` for each flight of the launch and then for each row of the unit's steps, set if
    /// something was not finite.
    pub(super) fn flags(&self) -> Range<usize> {
        0..(self.flights + self.rows) * size_of::<u32>()
    }
}

/// Cuts steps whose payload or output is more than fits into `bytes_max` bytes.
pub(super) fn split_large(layout: &BlockLayout, launch: &mut Launch, bytes_max: usize) {
    let overhead = launch.flights.len() * size_of::<u32>() + size_of::<abi::Append>() + 3 * VECTOR_BYTES;
    let most = bytes_max.saturating_sub(overhead);
    if launch.steps.iter().all(|step| unit_bytes(layout, launch, step) <= most) {
        return;
    }
    let token: usize = token_bytes(layout).iter().sum();
    let of_data = |less: usize| (most.saturating_sub(2 * VECTOR_BYTES + less) / token).max(1);
    let tokens_max = of_data(0);
    let mut steps = Vec::with_capacity(launch.steps.len() + 8);
    for step in &launch.steps {
        let bytes = unit_bytes(layout, launch, step);
        match step {
            Step::Append(append) if bytes > most => split_append(layout, append, tokens_max, &mut steps),
            Step::AppendRows(rows) if bytes > most => {
                let rows_max = (most / (bytes / rows.rows.len())).max(1);
                steps.extend(rows.rows.chunks(rows_max).map(|part| Step::AppendRows(rows.part(part))));
            }
            Step::Read(read) if bytes > most => {
                let tokens_max = of_data(positions_bytes(layout, step));
                for at in read.tokens.clone().step_by(tokens_max) {
                    let tokens = at..read.tokens.end.min(at + tokens_max);
                    let output_token = read.output_token + at - read.tokens.start;
                    steps.push(Step::Read(ReadStep { tokens, output_token, ..read.clone() }));
                }
            }
            other => steps.push(other.clone()),
        }
    }
    launch.steps = steps;
}

/// Bytes of a unit that a step takes, less one descriptor.
fn unit_bytes(layout: &BlockLayout, launch: &Launch, step: &Step) -> usize {
    let row = size_of::<abi::Append>() + size_of::<u32>();
    let rows = if let Step::AppendRows(rows) = step { rows.rows.len() * row } else { 0 };
    rows + data_bytes(layout, launch, step) + positions_bytes(layout, step)
}

fn split_append(layout: &BlockLayout, append: &AppendStep, tokens_max: usize, steps: &mut Vec<Step>) {
    let [key_token, value_token] = token_bytes(layout);
    for (at, layer) in append.layers.clone().enumerate() {
        let before = at * append.payload_tokens;
        for first in append.tokens.clone().step_by(tokens_max) {
            steps.push(Step::Append(AppendStep {
                layers: layer..layer + 1,
                keys_at: append.keys_at + before * key_token,
                values_at: append.values_at + before * value_token,
                first_token: append.first_token + first - append.tokens.start,
                tokens: first..append.tokens.end.min(first + tokens_max),
                ..append.clone()
            }));
        }
    }
}

/// Descriptors of one kind, being written.
struct Section<'a, T> {
    at: Descriptors,
    left: std::slice::IterMut<'a, T>,
}

impl<T> Section<'_, T> {
    fn put(&mut self, value: T) {
        // The plan has counted them.
        if let Some(place) = self.left.next() {
            *place = value;
        }
    }
}

/// A unit that is being written into its bytes of the ring.
pub(super) struct Unit<'a> {
    layout: &'a BlockLayout,
    /// The formats that the kernels know besides `raw`.
    sealed: &'a [Sealed],
    launch: &'a Launch,
    slab: &'a Slab,
    flags: u64,
    /// Flag of the next row.
    row_flag: u64,
    moves: Section<'a, abi::Move>,
    reopens: ByRung<Section<'a, abi::Convert>>,
    appends: Section<'a, abi::Append>,
    seal_moves: Section<'a, abi::Move>,
    seals: ByRung<Section<'a, abi::Convert>>,
    reads: ByRung<Section<'a, abi::Read>>,
    data: &'a mut [u8],
    data_address: u64,
    data_used: usize,
    /// The most layers and tokens of an append, tokens of a read, bytes of a move, and of one for a seal.
    most: (usize, usize, usize, usize, usize),
}

/// Takes bytes off the front of a unit.
struct Carver<'a> {
    bytes: &'a mut [u8],
    address: u64,
}

impl<'a> Carver<'a> {
    fn bytes(&mut self, bytes: usize) -> &'a mut [u8] {
        let (head, rest) = std::mem::take(&mut self.bytes).split_at_mut(bytes);
        self.bytes = rest;
        self.address += bytes as u64;
        head
    }

    fn section<T: bytemuck::Pod>(&mut self, count: usize) -> Section<'a, T> {
        let at = Descriptors { address: self.address, count };
        // Aligned: units begin at multiples of 128 bytes, and sizes are multiples of 8.
        Section { at, left: bytemuck::cast_slice_mut(self.bytes(count * size_of::<T>())).iter_mut() }
    }
}

impl<'a> Unit<'a> {
    /// Lays the unit out over `bytes`, which the device sees at `address`.
    pub(super) fn new(
        layout: &'a BlockLayout,
        sealed: &'a [Sealed],
        launch: &'a Launch,
        plan: &Plan,
        slab: &'a Slab,
        bytes: &'a mut [u8],
        address: u64,
    ) -> Self {
        let mut carver = Carver { bytes, address };
        let flags = carver.address;
        let row_flag = flags + (plan.flights * size_of::<u32>()) as u64;
        carver.bytes(plan.flags_bytes()).fill(0);
        let moves = carver.section(plan.moves);
        let reopens = plan.reopens.map(|count| carver.section(count));
        let appends = carver.section(plan.appends);
        let seal_moves = carver.section(plan.seal_moves);
        let seals = plan.seals.map(|count| carver.section(count));
        let reads = plan.reads.map(|count| carver.section(count));
        carver.bytes((address + plan.data_at() as u64 - carver.address) as usize);
        let Carver { bytes: data, address: data_address } = carver;
        let most = (1, 1, 1, 0, 0);
        Unit {
            layout,
            sealed,
            launch,
            slab,
            flags,
            row_flag,
            moves,
            reopens,
            appends,
            seal_moves,
            seals,
            reads,
            data,
            data_address,
            data_used: 0,
            most,
        }
    }

    /// Writes the descriptors of a step, and its payload. Returns where its output will lie, counted from the unit's payloads
    /// and outputs on, if it has one there.
    ///
    /// # Errors
    /// In words, a step that this device does not know.
    pub(super) fn write(&mut self, step: &Step) -> Result<Option<[Range<usize>; 2]>, Arc<str>> {
        let block_bytes = self.layout.raw_bytes();
        let slab = self.slab;
        let at = |offset: &usize| slab.address_of(*offset);
        match step {
            Step::Zero { slot_offset } => self.put_move(0, at(slot_offset), block_bytes),
            Step::Copy { from_offset, to_offset } => {
                self.put_move(at(from_offset), at(to_offset), block_bytes);
            }
            Step::Transfer { from_offset, to_offset, bytes } => {
                self.put_move(at(from_offset), at(to_offset), *bytes);
            }
            Step::Reopen { format, positions, from_offset, to_offset }
                if let Some(rung) = rung_of(self.sealed, *format) =>
            {
                let (from, to) = (at(from_offset), at(to_offset));
                let formats = self.sealed;
                for &(raw, sealed, bytes) in &formats[rung].raw_runs {
                    self.put_move(from + sealed as u64, to + raw as u64, bytes);
                }
                let index = self.index(positions);
                self.reopens[rung].put(abi::Convert { from, to, flag: 0, index });
            }
            Step::Seal { flight, format, positions, from_offset, to_offset }
                if let Some(rung) = rung_of(self.sealed, *format) =>
            {
                let (from, to, flag) = (at(from_offset), at(to_offset), self.flag(*flight));
                // Appends have seen that it is finite.
                for &(raw, sealed, bytes) in &self.sealed[rung].raw_runs {
                    let (from, to) = (from + raw as u64, to + sealed as u64);
                    self.seal_moves.put(abi::Move { from, to, bytes: bytes as u64 });
                    self.most.4 = self.most.4.max(bytes);
                }
                let index = self.index(positions);
                self.seals[rung].put(abi::Convert { from, to, flag, index });
            }
            Step::Append(append) => self.append(append, self.flag(append.flight)),
            Step::AppendRows(rows) => self.append_rows(rows),
            Step::Read(read) if read.format.is_raw() => return Ok(self.read(read, 0)),
            Step::Read(read) if let Some(rung) = rung_of(self.sealed, read.format) => {
                return Ok(self.read(read, rung));
            }
            // Steps of a newer core, formats of another cache: failing loudly beats leaving bytes out.
            other => return Err(format!("the CUDA device does not know {other:?}").into()),
        }
        Ok(None)
    }

    fn put_move(&mut self, from: u64, to: u64, bytes: usize) {
        self.moves.put(abi::Move { from, to, bytes: bytes as u64 });
        self.most.3 = self.most.3.max(bytes);
    }

    /// Which block of its sequence has tokens at these positions, or where they are.
    fn index(&mut self, positions: &Positions) -> u64 {
        match positions {
            Positions::Contiguous(first) => {
                debug_assert!(
                    first.is_multiple_of(self.layout.block_tokens as u32),
                    "no block begins at {first}"
                );
                u64::from(*first) / self.layout.block_tokens as u64
            }
            Positions::PerToken(each) => {
                let (start, bytes) = (self.data_used, bytemuck::cast_slice(each));
                self.data[start..start + bytes.len()].copy_from_slice(bytes);
                self.data_used += bytes.len().next_multiple_of(VECTOR_BYTES);
                abi::POSITIONS_PER_TOKEN | (self.data_address + start as u64)
            }
        }
    }

    fn flag(&self, flight: usize) -> u64 {
        self.flags + (size_of::<u32>() * flight) as u64
    }

    /// Where the device reaches the tensors of a flight as they are: what their places are counted from.
    fn origin(&self, flight: usize, on_device: bool) -> Option<u64> {
        match on_device {
            true => Some(0),
            false => {
                let reachable = self.launch.payload_is_reachable(flight);
                reachable.then(|| self.launch.payload(flight).as_ptr() as u64)
            }
        }
    }

    fn append(&mut self, append: &AppendStep, flag: u64) {
        let origin = self.origin(append.flight, append.on_device);
        let [key_token, value_token] = token_bytes(self.layout);
        let planes = [(append.keys_at, key_token), (append.values_at, value_token)];
        let source = planes.map(|(from, token)| match origin {
            Some(origin) => origin + (from + append.first_token * token) as u64,
            None => self.stage(append, from, token),
        });
        let source_tokens = if origin.is_some() { append.payload_tokens } else { append.tokens.len() };
        self.most.0 = self.most.0.max(append.layers.len());
        self.most.1 = self.most.1.max(append.tokens.len());
        self.appends.put(abi::Append {
            source,
            slot: self.slab.address_of(append.slot_offset),
            flag,
            source_tokens: source_tokens as u32,
            first_layer: append.layers.start as u32,
            layers: append.layers.len() as u32,
            first_token: append.tokens.start as u32,
            tokens: append.tokens.len() as u32,
            padding: 0,
        });
    }

    fn append_rows(&mut self, rows: &AppendRows) {
        let Some(origin) = self.origin(rows.flight, rows.on_device) else {
            for row in &rows.rows {
                let flag = self.next_row_flag();
                self.append(&rows.step_of(row), flag);
            }
            return;
        };
        let tokens = token_bytes(self.layout).map(|bytes| bytes as u64);
        let planes = [origin + rows.keys_at as u64, origin + rows.values_at as u64];
        let of_all = abi::Append {
            source: planes,
            slot: 0,
            flag: 0,
            source_tokens: rows.payload_tokens as u32,
            first_layer: rows.layers.start as u32,
            layers: rows.layers.len() as u32,
            first_token: 0,
            tokens: 1,
            padding: 0,
        };
        self.most.0 = self.most.0.max(rows.layers.len());
        for row in &rows.rows {
            let at = u64::from(row.row);
            let source = [planes[0] + at * tokens[0], planes[1] + at * tokens[1]];
            let (slot, flag) = (self.slab.address_of(row.slot_offset), self.next_row_flag());
            self.appends.put(abi::Append { source, slot, flag, first_token: row.token, ..of_all });
        }
    }

    fn next_row_flag(&mut self) -> u64 {
        let flag = self.row_flag;
        self.row_flag += size_of::<u32>() as u64;
        flag
    }

    /// Copies the tokens of one tensor that a step takes to the unit, and returns their address.
    fn stage(&mut self, append: &AppendStep, from: usize, token: usize) -> u64 {
        let payload = self.launch.payload(append.flight);
        let (start, bytes) = (self.data_used, append.tokens.len() * token);
        for layer in 0..append.layers.len() {
            let from = from + (layer * append.payload_tokens + append.first_token) * token;
            self.data[start + layer * bytes..][..bytes].copy_from_slice(&payload[from..from + bytes]);
        }
        self.data_used += (append.layers.len() * bytes).next_multiple_of(VECTOR_BYTES);
        self.data_address + start as u64
    }

    fn read(&mut self, read: &ReadStep, rung: usize) -> Option<[Range<usize>; 2]> {
        let tokens = token_bytes(self.layout);
        let (output, planes) = match read.on_device {
            Some(output) => {
                ([0, 1].map(|plane| output[plane] + (read.output_token * tokens[plane]) as u64), None)
            }
            None => {
                let planes = tokens.map(|token| {
                    let start = self.data_used;
                    self.data_used += (read.tokens.len() * token).next_multiple_of(VECTOR_BYTES);
                    start..start + read.tokens.len() * token
                });
                ([0, 1].map(|plane: usize| self.data_address + planes[plane].start as u64), Some(planes))
            }
        };
        self.most.2 = self.most.2.max(read.tokens.len());
        let index = if has_coded_keys(self.layout, read) { self.index(&read.positions) } else { 0 };
        let slot = self.slab.address_of(read.slot_offset);
        let (mut slots, mut raw) = ([slot; 2], 0);
        for (at, plane) in Plane::BOTH.into_iter().enumerate() {
            if read.format.of(self.layout, read.layer, plane) == Format::Raw {
                raw |= 1 << at;
                if !read.format.is_raw() {
                    // So that it lies where it does in a raw block.
                    let (here, there) = (
                        self.sealed[rung].place.codes_at(self.layout, read.layer, plane),
                        self.layout.plane_offset(read.layer, plane),
                    );
                    slots[at] = slot.wrapping_add(here as u64).wrapping_sub(there as u64);
                }
            }
        }
        self.reads[rung].put(abi::Read {
            slot: slots,
            output,
            layer: read.layer as u32,
            first_token: read.tokens.start as u32,
            tokens: read.tokens.len() as u32,
            raw,
            index,
        });
        planes
    }

    /// Launches a kernel for each kind of step that there is, in the order that the core relies on.
    ///
    /// # Safety
    /// The unit's bytes stay as they are until the device is done with them, and so do slab and payloads; the steps keep to
    /// invariants 3 and 4.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        kernels: &Kernels,
        near: &NearDescriptors,
    ) -> Result<(), DriverError> {
        let (layers, append_tokens, read_tokens, move_bytes, seal_move_bytes) = self.most;
        // All but those of reads, which are for one layer each.
        let (first, end) = (self.moves.at.address, self.reads[0].at.address);
        // SAFETY: the descriptors are those of the kernels (7); the caller vouches for what they name, and that they stay.
        unsafe {
            let by = near.bring(stream, first, (end - first) as usize, self.layout.layers)?;
            let some = |descriptors: Descriptors| (descriptors.count > 0).then(|| descriptors.moved(by));
            if let Some(moves) = some(self.moves.at) {
                kernels.move_blocks(stream, moves, move_bytes)?;
            }
            for (rung, reopens) in self.reopens.iter().enumerate() {
                if let Some(reopens) = some(reopens.at) {
                    kernels.reopen(stream, rung, reopens)?;
                }
            }
            if let Some(appends) = some(self.appends.at) {
                kernels.append(stream, appends, layers, append_tokens)?;
            }
            if let Some(moves) = some(self.seal_moves.at) {
                kernels.move_blocks(stream, moves, seal_move_bytes)?;
            }
            for (rung, seals) in self.seals.iter().enumerate() {
                if let Some(seals) = some(seals.at) {
                    kernels.seal(stream, rung, seals)?;
                }
            }
            for (rung, reads) in self.reads.iter().enumerate() {
                if reads.at.count > 0 {
                    kernels.read(stream, rung, reads.at, read_tokens)?;
                }
            }
        }
        Ok(())
    }
}
