//! A simulated device: memory that is a vector, and three lanes that move only when told to.
//!
//! A launch waits in its lane until the scheduler lets its next step happen, so what a step reads is read at that moment,
//! never when it was enqueued. Order inside a lane is kept; between lanes anything goes. A finished launch stays with the
//! device until its completion is reported, which may be much later. A launch can be failed half-way, with whatever its
//! steps had written by then, and the whole device can be lost: nothing inside is ever acknowledged again.
//!
//! Elements are f32; formats are `raw` and `int8` by the definition of FORMATS.md §1, one element at a time.
//!
//! The oracle drives it synchronously ([`SimDevice::enqueue`], [`SimDevice::advance`], [`SimDevice::report`]). Real actors run
//! on it through [`Backend`], with somebody who calls [`SimDevice::advance`] and [`SimDevice::ring`] from outside.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::tracker::Tracker;
use crate::format::{BlockFormat, Format, FormatLayout, Ladder};
use crate::geometry::{BlockLayout, ElementType, Plane};
use crate::memory::{
    AppendStep, Backend, DeviceLost, Doorbell, GatherStep, Lane, LaneKind, Lanes, Launch, ReadStep,
    ScoreStep, Step,
};
use crate::pool::{PoolLayout, SizeClass};

/// All lanes, in the order of their numbers.
pub const LANES: [LaneKind; 3] = [LaneKind::Compute, LaneKind::Upload, LaneKind::Download];

/// A simulated device. Clones are the same device.
#[derive(Debug, Clone)]
pub struct SimDevice(Arc<Mutex<Sim>>);

#[derive(Debug)]
struct Sim {
    memory: Memory,
    tracker: Tracker,
    lanes: [Queue; 3],
    next_launch: u64,
    lost: Option<DeviceLost>,
    doorbells: Doorbells,
    counts: SimCounts,
}

/// What a simulated device has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SimCounts {
    /// Launches taken, per lane.
    pub launches: [u64; 3],
    /// Steps carried out.
    pub steps: u64,
    /// Launches failed.
    pub failed: u64,
}

#[derive(Default)]
struct Doorbells(Vec<Doorbell>);

impl std::fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} doorbells", self.0.len())
    }
}

#[derive(Debug, Default)]
struct Queue {
    running: VecDeque<Running>,
    finished: VecDeque<Running>,
}

#[derive(Debug)]
struct Running {
    number: u64,
    launch: Launch,
    next_step: usize,
}

impl SimDevice {
    /// A device with a zeroed slab.
    ///
    /// # Panics
    /// If the element type is not f32.
    pub fn new(layout: &BlockLayout, pool: &PoolLayout) -> Self {
        assert_eq!(layout.element, ElementType::F32, "the simulated device computes in f32");
        SimDevice(Arc::new(Mutex::new(Sim {
            memory: Memory {
                layout: *layout,
                int8: FormatLayout::new(Format::Int8.into(), layout),
                bytes: vec![0; pool.slab_bytes() + pool.host_bytes()],
                re_encoded: Vec::new(),
            },
            tracker: Tracker::new(*layout, *pool),
            lanes: Default::default(),
            next_launch: 0,
            lost: None,
            doorbells: Doorbells::default(),
            counts: SimCounts::default(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Sim> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Puts a launch at the end of a lane.
    pub fn enqueue(&self, lane: LaneKind, launch: Launch) {
        let sim = &mut *self.lock();
        let number = sim.next_launch;
        sim.next_launch += 1;
        sim.counts.launches[lane as usize] += 1;
        sim.tracker.begin(lane, number, &launch.steps);
        sim.lanes[lane as usize].running.push_back(Running { number, launch, next_step: 0 });
    }

    /// Carries out the next step of a lane. False if the lane has nothing to do, or the device is lost.
    pub fn advance(&self, lane: LaneKind) -> bool {
        let sim = &mut *self.lock();
        if sim.lost.is_some() {
            return false;
        }
        let queue = &mut sim.lanes[lane as usize];
        let Some(running) = queue.running.front_mut() else { return false };
        if let Some(mut step) = running.launch.steps.get(running.next_step).cloned() {
            sim.tracker.execute(&step);
            sim.memory.execute(&mut step, &mut running.launch);
            running.launch.steps[running.next_step] = step;
            sim.counts.steps += 1;
            running.next_step += 1;
        }
        if running.next_step >= running.launch.steps.len() {
            queue.finished.extend(queue.running.pop_front());
        }
        true
    }

    /// Fails the launch that a lane is at, before or in the middle of its next step. False if there is none.
    pub fn fail(&self, lane: LaneKind, half_way: bool) -> bool {
        let sim = &mut *self.lock();
        let queue = &mut sim.lanes[lane as usize];
        let Some(mut running) = queue.running.pop_front() else { return false };
        if let Some(mut step) = running.launch.steps.get(running.next_step).filter(|_| half_way).cloned() {
            sim.memory.execute_half(&mut step, &mut running.launch);
        }
        running.launch.error = Some("a fault was injected".into());
        sim.counts.failed += 1;
        queue.finished.push_back(running);
        true
    }

    /// Reports the oldest completion of a lane that was not reported yet.
    pub fn report(&self, lane: LaneKind) -> Option<Launch> {
        let sim = &mut *self.lock();
        let Running { number, launch, .. } = sim.lanes[lane as usize].finished.pop_front()?;
        sim.tracker.end(number, &launch.steps);
        Some(launch)
    }

    /// Launches on a lane that are not finished, and finished ones that are not reported.
    pub fn depth(&self, lane: LaneKind) -> (usize, usize) {
        let sim = self.lock();
        let queue = &sim.lanes[lane as usize];
        (queue.running.len(), queue.finished.len())
    }

    /// Loses the device: polling says so from now on, and what is inside is never acknowledged.
    pub fn lose(&self, reason: &str) {
        self.lock().lost = Some(DeviceLost(reason.into()));
        self.ring();
    }

    /// Drops everything inside a lost device, as its memory being unmapped would.
    pub fn forget(&self) {
        self.lock().lanes = Default::default();
    }

    /// Rings the doorbells of whoever runs real actors on this device.
    pub fn ring(&self) {
        // Outside of the lock: a doorbell may wake somebody who polls at once.
        let doorbells = self.lock().doorbells.0.clone();
        doorbells.iter().for_each(|ring| ring());
    }

    /// Tells the tracker which slots have changed hands. See [`Tracker::observe`].
    pub fn observe_generations(&self, generation_of: impl Fn(usize) -> u32) {
        self.lock().tracker.observe(generation_of);
    }

    /// Whether a slot holds decoded tokens. See [`Tracker::is_decoded`].
    pub fn is_decoded(&self, class: SizeClass, offset: usize) -> bool {
        self.lock().tracker.is_decoded(class, offset)
    }

    /// Copies bytes of the slab to the end of `out`.
    pub fn copy_bytes(&self, range: Range<usize>, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.lock().memory.bytes[range]);
    }

    /// Whether bytes of the slab are these.
    pub fn has_bytes(&self, range: Range<usize>, bytes: &[u8]) -> bool {
        self.lock().memory.bytes[range] == *bytes
    }

    /// The first f32 in `range` of the slab of which `wrong` is true.
    pub fn find_element(&self, range: Range<usize>, mut wrong: impl FnMut(f32) -> bool) -> Option<f32> {
        let sim = self.lock();
        sim.memory.bytes[range].chunks_exact(4).map(element).find(|x| wrong(*x))
    }

    /// Writes one f32 where nobody asked for it: memory that goes bad.
    pub fn damage(&self, at: usize, value: f32) {
        self.lock().memory.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// What it has done so far.
    pub fn counts(&self) -> SimCounts {
        self.lock().counts
    }

    /// Accesses of launches whose completion was not reported.
    pub fn accesses(&self) -> usize {
        self.lock().tracker.accesses()
    }
}

fn element(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// The bytes, and what steps do to them.
#[derive(Debug)]
struct Memory {
    layout: BlockLayout,
    int8: FormatLayout,
    bytes: Vec<u8>,
    /// What blocks of formats below `int8` hold, exactly: theirs are of fewer bits than a stamp needs, so a block is a number here.
    re_encoded: Vec<Vec<u8>>,
}

impl Memory {
    fn execute(&mut self, step: &mut Step, launch: &mut Launch) {
        let raw_bytes = self.layout.raw_bytes();
        match step {
            Step::Zero { slot_offset } => self.bytes[*slot_offset..*slot_offset + raw_bytes].fill(0),
            Step::Copy { from_offset, to_offset } => {
                self.bytes.copy_within(*from_offset..*from_offset + raw_bytes, *to_offset);
            }
            Step::Transfer { from_offset, to_offset, bytes } => {
                self.bytes.copy_within(*from_offset..*from_offset + *bytes, *to_offset);
            }
            Step::Reopen { format, positions, from_offset, to_offset } => {
                let tokens = (0..self.layout.block_tokens as u32).collect();
                self.gather(&GatherStep {
                    flight: 0,
                    format: *format,
                    positions: positions.clone(),
                    from_offset: *from_offset,
                    tokens,
                    to_offset: *to_offset,
                    to_token: 0,
                });
            }
            Step::Append(append) => {
                let finite = self.append(append, launch.payload(append.flight));
                launch.flights[append.flight].finite &= finite;
            }
            Step::AppendRows(rows) => {
                for at in 0..rows.rows.len() {
                    let step = rows.step_of(&rows.rows[at]);
                    rows.rows[at].finite &= self.append(&step, launch.payload(step.flight));
                }
            }
            Step::Seal { flight, format, from_offset, to_offset, .. } => {
                let finite = match format.keys {
                    Format::Int8 => self.seal(*from_offset, *to_offset),
                    Format::R4 | Format::R2 => self.re_encode(*from_offset, *to_offset),
                    other => panic!("no blocks are sealed in {other} here"),
                };
                launch.flights[*flight].finite &= finite;
            }
            Step::Read(read) => {
                if let Some(output) = &mut launch.flights[read.flight].output {
                    for plane in Plane::BOTH {
                        self.read(read, plane, output.plane_mut(plane));
                    }
                }
            }
            Step::Score(score) => {
                if let Some(output) = &mut launch.flights[score.flight].output {
                    self.score(score, output.scores_mut());
                }
            }
            Step::Gather(gather) => self.gather(gather),
        }
    }

    /// A step that is cut off in the middle.
    fn execute_half(&mut self, step: &mut Step, launch: &mut Launch) {
        let half = self.layout.raw_bytes() / 8 * 4;
        match step {
            Step::Zero { slot_offset } => self.bytes[*slot_offset..*slot_offset + half].fill(0),
            Step::Copy { from_offset, to_offset } => {
                self.bytes.copy_within(*from_offset..*from_offset + half, *to_offset);
            }
            Step::Transfer { from_offset, to_offset, bytes } => {
                self.bytes.copy_within(*from_offset..*from_offset + *bytes / 2, *to_offset);
            }
            Step::Append(append) => {
                let mut append = append.clone();
                append.tokens.end -= append.tokens.len() / 2;
                self.execute(&mut Step::Append(append), launch);
            }
            Step::AppendRows(rows) => {
                let half = rows.part(&rows.rows[..rows.rows.len() / 2]);
                self.execute(&mut Step::AppendRows(half), launch);
            }
            Step::Gather(gather) => {
                gather.tokens.truncate(gather.tokens.len() / 2);
                self.gather(gather);
            }
            // Reads and seals write where nobody looks before they are done: all of it or none of it is the same.
            other => self.execute(other, launch),
        }
    }

    /// Where one row of a raw slot lies.
    fn raw_row(&self, slot: usize, layer: usize, plane: Plane, head: usize, token: usize) -> Range<usize> {
        let layout = &self.layout;
        let row = layout.row_bytes(plane);
        let start = slot + layout.plane_offset(layer, plane) + (head * layout.block_tokens + token) * row;
        start..start + row
    }

    fn append(&mut self, step: &AppendStep, payload: &[u8]) -> bool {
        let layout = self.layout;
        let mut finite = true;
        for (at, layer) in step.layers.clone().enumerate() {
            for (plane, tensor_at) in [(Plane::Key, step.keys_at), (Plane::Value, step.values_at)] {
                let row = layout.row_bytes(plane);
                let first = (at * step.payload_tokens + step.first_token) * layout.kv_heads;
                for (i, token) in step.tokens.clone().enumerate() {
                    for head in 0..layout.kv_heads {
                        let from = tensor_at + (first + i * layout.kv_heads + head) * row;
                        let from = &payload[from..from + row];
                        finite &= from.chunks_exact(4).all(|bytes| element(bytes).is_finite());
                        let to = self.raw_row(step.slot_offset, layer, plane, head, token);
                        self.bytes[to].copy_from_slice(from);
                    }
                }
            }
        }
        finite
    }

    fn read(&self, step: &ReadStep, plane: Plane, output: &mut [u8]) {
        let layout = &self.layout;
        let row = layout.row_bytes(plane);
        for (i, token) in step.tokens.clone().enumerate() {
            for head in 0..layout.kv_heads {
                let to = ((step.output_token + i) * layout.kv_heads + head) * row;
                let to = &mut output[to..to + row];
                self.load_row(step.format, step.slot_offset, step.layer, plane, head, token, to);
            }
        }
    }

    /// One row of a slot, whatever its format.
    #[allow(clippy::too_many_arguments)]
    fn load_row(
        &self,
        format: BlockFormat,
        slot: usize,
        layer: usize,
        plane: Plane,
        head: usize,
        token: usize,
        to: &mut [u8],
    ) {
        match format.keys {
            Format::Int8 => self.decode_row(slot, layer, plane, head, token, to),
            Format::R4 | Format::R2 => {
                let number = u32::from_le_bytes(std::array::from_fn(|at| self.bytes[slot + at]));
                let block = &self.re_encoded[number as usize];
                to.copy_from_slice(&block[self.raw_row(0, layer, plane, head, token)]);
            }
            _ => to.copy_from_slice(&self.bytes[self.raw_row(slot, layer, plane, head, token)]),
        }
    }

    fn score(&self, step: &ScoreStep, scores: &mut [f32]) {
        let layout = &self.layout;
        let row = layout.row_bytes(Plane::Key);
        for layer in 0..layout.layers {
            for head in 0..layout.kv_heads {
                let mut keys = vec![0; scores.len() * row];
                let tokens = step.sources.iter().flat_map(|from| (0..from.tokens).map(move |at| (from, at)));
                for ((from, token), to) in tokens.zip(keys.chunks_exact_mut(row)) {
                    self.load_row(from.format, from.slot_offset, layer, Plane::Key, head, token, to);
                }
                let keys: Vec<f32> = keys.chunks_exact(4).map(element).collect();
                step.score.add(&keys, layout.key_dim, scores);
            }
        }
    }

    fn gather(&mut self, step: &GatherStep) {
        let layout = self.layout;
        let mut row = [0; 4 * super::values::DIM_MAX];
        for layer in 0..layout.layers {
            for plane in Plane::BOTH {
                let row = &mut row[..layout.row_bytes(plane)];
                for head in 0..layout.kv_heads {
                    for (to, &token) in (step.to_token..).zip(&step.tokens) {
                        self.load_row(step.format, step.from_offset, layer, plane, head, token as usize, row);
                        let target = self.raw_row(step.to_offset, layer, plane, head, to);
                        self.bytes[target].copy_from_slice(row);
                    }
                }
            }
        }
    }

    /// Keeps a raw block under a number, and stores that.
    fn re_encode(&mut self, from: usize, to: usize) -> bool {
        let block = self.bytes[from..from + self.layout.raw_bytes()].to_vec();
        let finite = block.chunks_exact(4).all(|bytes| element(bytes).is_finite());
        self.bytes[to..to + 4].copy_from_slice(&(self.re_encoded.len() as u32).to_le_bytes());
        self.re_encoded.push(block);
        finite
    }

    /// Where the codes and the scale of one row of a sealed slot lie.
    fn int8_row(&self, slot: usize, layer: usize, plane: Plane, row: usize) -> (Range<usize>, Range<usize>) {
        let dim = self.layout.dim(plane);
        let codes = slot + self.int8.codes_at(&self.layout, layer, plane) + row * dim;
        let scale = slot + self.int8.scales_at(&self.layout, layer, plane) + row * 4;
        (codes..codes + dim, scale..scale + 4)
    }

    fn decode_row(&self, slot: usize, layer: usize, plane: Plane, head: usize, token: usize, to: &mut [u8]) {
        let row = head * self.layout.block_tokens + token;
        let (codes, scale) = self.int8_row(slot, layer, plane, row);
        let scale = element(&self.bytes[scale]);
        for (code, to) in self.bytes[codes].iter().zip(to.chunks_exact_mut(4)) {
            to.copy_from_slice(&(f32::from(code.cast_signed()) * scale).to_le_bytes());
        }
    }

    fn seal(&mut self, from: usize, to: usize) -> bool {
        let layout = self.layout;
        let mut finite = true;
        for layer in 0..layout.layers {
            for plane in Plane::BOTH {
                for row in 0..layout.rows_per_plane() {
                    let source = self.raw_row(from, layer, plane, 0, row);
                    let abs_max = |max: f32, bytes: &[u8]| max.max(element(bytes).abs());
                    let values = self.bytes[source.clone()].chunks_exact(4);
                    finite &= values.clone().all(|bytes| element(bytes).is_finite());
                    let scale = (values.fold(0.0, abs_max) / 127.0).max(f32::MIN_POSITIVE);
                    let (codes, stored) = self.int8_row(to, layer, plane, row);
                    for (i, code) in codes.enumerate() {
                        let x = element(&self.bytes[source.start + 4 * i..]) / scale;
                        self.bytes[code] = (x.round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned();
                    }
                    self.bytes[stored].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
        finite
    }
}

impl Backend for SimDevice {
    type Lane = SimLane;

    fn open(self, _: &BlockLayout, _: &PoolLayout, _: &Ladder) -> Result<Lanes<SimLane>, String> {
        let lane = |kind| SimLane { device: self.clone(), kind };
        Ok(Lanes {
            compute: lane(LaneKind::Compute),
            upload: lane(LaneKind::Upload),
            download: lane(LaneKind::Download),
        })
    }
}

/// One lane of a [`SimDevice`], for real actors.
#[derive(Debug)]
pub struct SimLane {
    device: SimDevice,
    kind: LaneKind,
}

impl Lane for SimLane {
    fn launch(&mut self, launch: Launch) {
        self.device.enqueue(self.kind, launch);
    }

    fn poll(&mut self, done: &mut Vec<Launch>) -> Result<(), DeviceLost> {
        if let Some(lost) = &self.device.lock().lost {
            return Err(lost.clone());
        }
        done.extend(std::iter::from_fn(|| self.device.report(self.kind)));
        Ok(())
    }

    fn on_progress(&mut self, doorbell: Doorbell) {
        self.device.lock().doorbells.0.push(doorbell);
    }
}
