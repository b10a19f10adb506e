//! The port to hardware: what the actors ask of a device, and nothing about how it does it.
//!
//! A [`Lane`] is an ordered queue of work on a device. What is launched on one lane takes effect in launch order; nothing
//! is promised between lanes. The cores never start work that depends on another lane before that lane has reported its
//! launch done, and they pin every slot that a launch reads and its sequence does not own, so a lane needs no locks.
//!
//! Ownership makes asynchronous copies safe without a lifetime: a [`Launch`] owns every host buffer that its steps read or
//! write. It moves into the lane and comes back from [`Lane::poll`] when the hardware is done with it. Whoever wanted the
//! result may be gone by then; the buffers are not.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::block::BlockId;
use crate::device::recode::Recoded;
use crate::device::tier::TierMoves;
use crate::dropping::{KeyScore, Positions};
use crate::format::{BlockFormat, Ladder};
use crate::geometry::{BlockLayout, ElementType, Plane};
use crate::payload::Payload;
use crate::pool::PoolLayout;
use crate::reach::{Point, Reachable};
use crate::slot::{FilledSlot, SlotPin};

/// Which of a device's lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LaneKind {
    /// Kernels: small appends and reads, seals. Owned by the device actor.
    Compute,
    /// Large appends from host memory. Owned by the transfer actor.
    Upload,
    /// Large reads to host memory. Owned by the transfer actor.
    Download,
}

/// A device that can be opened. Opening happens on the thread that will own the compute lane.
pub trait Backend: Send + 'static {
    /// Lane type. All lanes of a backend share one type; what differs is the queue behind it.
    type Lane: Lane;

    /// Allocates the slab and opens the lanes.
    ///
    /// # Errors
    /// Why the device cannot be used, in words for a person.
    fn open(
        self,
        block: &BlockLayout,
        pool: &PoolLayout,
        formats: &Ladder,
    ) -> Result<Lanes<Self::Lane>, String>;
}

/// The lanes of one device.
#[derive(Debug)]
pub struct Lanes<L> {
    /// See [`LaneKind::Compute`].
    pub compute: L,
    /// See [`LaneKind::Upload`].
    pub upload: L,
    /// See [`LaneKind::Download`].
    pub download: L,
}

/// An ordered queue of work on a device.
pub trait Lane: Send + 'static {
    /// Starts `launch` after everything launched before on this lane. Never waits for the device.
    fn launch(&mut self, launch: Launch);

    /// Moves the launches that are done to `done`, in launch order. Never waits.
    ///
    /// A launch that failed comes back with [`Launch::error`] set once the device no longer touches its buffers.
    ///
    /// # Errors
    /// [`DeviceLost`]: the device will not do anything any more, and launches still inside are never acknowledged.
    fn poll(&mut self, done: &mut Vec<Launch>) -> Result<(), DeviceLost>;

    /// Has `doorbell` rung whenever a launch may have become done and the owner has asked for it ([`Lane::ring_when_done`]).
    /// Called once, on the thread that owns the lane from then on.
    fn on_progress(&mut self, doorbell: Doorbell) {
        drop(doorbell);
    }

    /// Whether nothing is under way: no launch will ever be returned unless one is launched first.
    fn is_idle(&self) -> bool {
        true
    }

    /// How long the owner looks for launches to be done, and for more work, before it sleeps: a few times what a small launch
    /// takes where that is less than waking up does. Nothing for a lane that is done when it is launched.
    fn spin(&self) -> Duration {
        Duration::ZERO
    }

    /// The owner is about to sleep: has the doorbell rung once the oldest launch under way is done, or the device is lost.
    /// A lane that is idle does nothing.
    fn ring_when_done(&mut self) {}
}

/// Rung by a lane when polling it may pay.
pub type Doorbell = Arc<dyn Fn() + Send + Sync>;

/// The device is gone for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("device lost: {0}")]
pub struct DeviceLost(pub Arc<str>);

/// One piece of work inside a [`Launch`]. Offsets are bytes from the start of the slab; those behind its end are in the host tier.
/// A step's slots are in the slab, except that sealed blocks are read wherever they are, and that transfers write to the tier.
/// `flight` indexes [`Launch::flights`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Fills a raw slot with zeros.
    Zero {
        /// Slot to clear.
        slot_offset: usize,
    },
    /// Copies a raw block to another raw slot (copy on write).
    Copy {
        /// Slot read.
        from_offset: usize,
        /// Slot written.
        to_offset: usize,
    },
    /// Copies a sealed block to another tier, byte by byte.
    Transfer {
        /// Slot read.
        from_offset: usize,
        /// Slot written.
        to_offset: usize,
        /// Bytes of the block.
        bytes: usize,
    },
    /// Decodes a sealed block into a raw slot.
    Reopen {
        /// How it is stored.
        format: BlockFormat,
        /// Where the block's tokens stand in their sequence.
        positions: Positions,
        /// Slot read.
        from_offset: usize,
        /// Slot written.
        to_offset: usize,
    },
    /// Scatters tokens of a flight's payload into a raw slot, and clears the flight's `finite` if one is not.
    Append(AppendStep),
    /// Scatters one token of a flight's payload to each of some raw slots.
    AppendRows(AppendRows),
    /// Encodes a whole raw block, and clears the flight's `finite` if one of its elements is not.
    Seal {
        /// Whose flag.
        flight: usize,
        /// Format to encode to.
        format: BlockFormat,
        /// Where the block's tokens stand in their sequence.
        positions: Positions,
        /// Raw slot read.
        from_offset: usize,
        /// Sealed slot written.
        to_offset: usize,
    },
    /// Gathers and decodes tokens of one layer into a flight's output.
    Read(ReadStep),
    /// Scores tokens by their keys in all layers, into a flight's output ([`ReadBuffer::scores`]).
    Score(ScoreStep),
    /// Decodes some tokens of a block, all layers of them, to tokens of a raw slot that follow each other.
    Gather(GatherStep),
}

/// See [`Step::Score`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreStep {
    /// Whose output.
    pub flight: usize,
    /// How the keys of each layer and head are scored; a token's scores are added in the order of layers and heads.
    pub score: KeyScore,
    /// Where the tokens are, in order.
    pub sources: Vec<ScoreSource>,
}

/// The first tokens of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreSource {
    /// How the block is stored.
    pub format: BlockFormat,
    /// Where the block's tokens stand in their sequence.
    pub positions: Positions,
    /// Slot read.
    pub slot_offset: usize,
    /// How many tokens of it.
    pub tokens: usize,
}

/// See [`Step::Gather`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatherStep {
    /// For whom.
    pub flight: usize,
    /// How the block is stored.
    pub format: BlockFormat,
    /// Where the block's tokens stand in their sequence.
    pub positions: Positions,
    /// Slot read.
    pub from_offset: usize,
    /// Tokens of it, ascending.
    pub tokens: Vec<u32>,
    /// Raw slot written.
    pub to_offset: usize,
    /// Token of that slot where the first goes.
    pub to_token: usize,
}

/// See [`Step::Append`]. The tensors are `[layers, payload_tokens, kv_heads, dim]`, keys and values apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppendStep {
    /// Whose payload.
    pub flight: usize,
    /// Layers written; the payload holds exactly these.
    pub layers: Range<usize>,
    /// Where the key tensor begins in the payload, or in the device's address space.
    pub keys_at: usize,
    /// Where the value tensor begins, likewise.
    pub values_at: usize,
    /// The tensors are in memory of the device.
    pub on_device: bool,
    /// Tokens of the payload's tensors.
    pub payload_tokens: usize,
    /// First token of the payload that goes to this slot.
    pub first_token: usize,
    /// Raw slot written.
    pub slot_offset: usize,
    /// Tokens of the slot that are written.
    pub tokens: Range<usize>,
}

/// See [`Step::AppendRows`]: a decode step. The tensors are those of an [`AppendStep`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppendRows {
    /// Whose rows, with any of its results.
    pub(crate) op: OpRef,
    /// Whose payload.
    pub flight: usize,
    /// Layers written; the payload holds exactly these.
    pub layers: Range<usize>,
    /// Where the key tensor begins in the payload, or in the device's address space.
    pub keys_at: usize,
    /// Where the value tensor begins, likewise.
    pub values_at: usize,
    /// The tensors are in memory of the device.
    pub on_device: bool,
    /// Tokens of the payload's tensors.
    pub payload_tokens: usize,
    /// One for each token.
    pub rows: Vec<AppendRow>,
}

/// One token of [`AppendRows`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendRow {
    /// Raw slot written.
    pub slot_offset: usize,
    /// Token of the slot.
    pub token: u32,
    /// Token of the payload's tensors.
    pub row: u32,
    /// Place of its result in its submission.
    pub(crate) result: u32,
    /// Whether every element of it was finite. Lanes clear it, never set it.
    pub finite: bool,
}

impl AppendRows {
    /// The same for some of its rows.
    pub fn part(&self, rows: &[AppendRow]) -> AppendRows {
        let AppendRows { op, flight, keys_at, values_at, on_device, payload_tokens, .. } = *self;
        let (layers, rows) = (self.layers.clone(), rows.to_vec());
        AppendRows { op, flight, layers, keys_at, values_at, on_device, payload_tokens, rows }
    }

    /// One row as a step of its own.
    pub fn step_of(&self, row: &AppendRow) -> AppendStep {
        let token = row.token as usize;
        AppendStep {
            flight: self.flight,
            layers: self.layers.clone(),
            keys_at: self.keys_at,
            values_at: self.values_at,
            on_device: self.on_device,
            payload_tokens: self.payload_tokens,
            first_token: row.row as usize,
            slot_offset: row.slot_offset,
            tokens: token..token + 1,
        }
    }
}

/// See [`Step::Read`]. Output tensors are `[tokens, kv_heads, dim]`, keys and values apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadStep {
    /// Whose output.
    pub flight: usize,
    /// How the block is stored.
    pub format: BlockFormat,
    /// Where the block's tokens stand in their sequence.
    pub positions: Positions,
    /// Slot read.
    pub slot_offset: usize,
    /// Layer read.
    pub layer: usize,
    /// Tokens of the slot that are read.
    pub tokens: Range<usize>,
    /// Token of the output where they go.
    pub output_token: usize,
    /// Where the output's keys and values begin in the device's memory; none: they go to the flight's buffer.
    pub on_device: Option<[u64; 2]>,
}

/// Work for one lane, with everything that it touches on the host.
#[derive(Debug, Default)]
pub struct Launch {
    /// Executed in order.
    pub steps: Vec<Step>,
    /// What the steps work for.
    pub flights: Vec<Flight>,
    /// Host bytes that append steps read: one for all flights of a submission. See [`Launch::payload`].
    payloads: Vec<Payload>,
    /// Keep the slots that it reads in place.
    pub(crate) pins: Vec<SlotPin>,
    /// Set by the lane if the launch failed: none of its flights took effect as far as anybody may rely on it.
    pub error: Option<Arc<str>>,
}

impl Launch {
    /// Host bytes that the append steps of a flight read; none if it has no such steps.
    pub fn payload(&self, flight: usize) -> &[u8] {
        let number = self.flights[flight].payload;
        self.payloads.get(number as usize).map_or(&[], Payload::bytes)
    }

    /// Whether the device reads a flight's payload where it lies.
    pub fn payload_is_reachable(&self, flight: usize) -> bool {
        let payload = self.payloads.get(self.flights[flight].payload as usize);
        payload.and_then(Payload::reachable).is_some_and(Reachable::is_reachable)
    }

    /// What has to be reached before the device memory of callers may be touched.
    pub fn waits_for(&self) -> impl Iterator<Item = &Arc<dyn Point>> {
        let sources = self.payloads.iter().filter_map(Payload::reachable);
        sources.filter_map(|reachable| reachable.device.as_ref()).flat_map(|source| source.ready())
    }

    /// The flight of a step on device memory of callers.
    fn on_device(step: &Step) -> Option<usize> {
        match step {
            Step::Append(append) => append.on_device.then_some(append.flight),
            Step::AppendRows(rows) => rows.on_device.then_some(rows.flight),
            Step::Read(read) => read.on_device.map(|_| read.flight),
            _ => None,
        }
    }

    /// Whether somebody may wait for the launch to be on the device's queue: see [`Launch::enqueued`].
    pub fn is_awaited_enqueued(&self) -> bool {
        self.waits_for().next().is_some() && self.steps.iter().any(|step| Self::on_device(step).is_some())
    }

    /// To be called once all steps are on the device's queue, with a point behind them.
    pub fn enqueued(&self, point: &Arc<dyn Point>) {
        let mut last = None;
        // A row is an operation. All other steps of a flight are one, and stand together.
        let operations: Vec<(usize, usize)> = self
            .steps
            .iter()
            .filter_map(|step| match (step, Self::on_device(step)?) {
                (Step::AppendRows(rows), flight) => Some((flight, rows.rows.len())),
                (_, flight) => (last.replace(flight) != Some(flight)).then_some((flight, 1)),
            })
            .collect();
        for (number, payload) in self.payloads.iter().enumerate() {
            let of_payload = |(flight, _): &&(usize, usize)| self.flights[*flight].payload as usize == number;
            let passed = operations.iter().filter(of_payload).map(|(_, operations)| operations).sum();
            if let Some(reachable) = payload.reachable().filter(|_| passed > 0) {
                reachable.passed(passed, point);
            }
        }
    }

    /// Adds a flight that reads `payload`, and returns its index.
    pub(crate) fn add(
        &mut self,
        purpose: Purpose,
        payload: Option<&mut Payload>,
        output: Option<Box<ReadBuffer>>,
    ) -> usize {
        let payload = payload.map_or(NO_PAYLOAD, |payload| {
            // Flights of a submission mostly stand together.
            if !self.payloads.last().is_some_and(|last| last.is_same(payload)) {
                self.payloads.push(payload.lend());
            }
            self.payloads.len() as u32 - 1
        });
        self.flights.push(Flight { purpose, output, payload, finite: true });
        self.flights.len() - 1
    }

    /// Lets go of the slots that it reads, and returns its flights, with the payloads that have to go back.
    pub(crate) fn land(&mut self) -> impl Iterator<Item = (Flight, Option<Payload>)> {
        self.pins.clear();
        let Launch { flights, payloads, .. } = self;
        flights.drain(..).map(|flight| {
            let lent =
                payloads.get_mut(flight.payload as usize).filter(|lent| matches!(lent, Payload::One(_)));
            (flight, lent.map(std::mem::take))
        })
    }

    /// Its memory, for another launch.
    pub(crate) fn emptied(mut self) -> Launch {
        self.steps.clear();
        self.flights.clear();
        self.payloads.clear();
        self.pins.clear();
        Launch { error: None, ..self }
    }
}

/// One operation (or seal, or the rows of a step) inside a launch. Small: a decode step has hundreds of them.
#[derive(Debug)]
pub struct Flight {
    /// What it is for.
    pub(crate) purpose: Purpose,
    /// Host buffers that its read steps write.
    pub output: Option<Box<ReadBuffer>>,
    /// Which of the launch's payloads its append steps read.
    payload: u32,
    /// Whether every element seen was finite. Lanes clear it, never set it.
    pub finite: bool,
}

const NO_PAYLOAD: u32 = u32::MAX;

/// One operation of a pending submission, or one row of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpRef {
    pub(crate) submission: u32,
    pub(crate) index: u32,
    /// Place of its result.
    pub(crate) result: u32,
}

/// Why a flight was launched.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// An operation of a submission.
    Operation(OpRef),
    /// Rows of an operation: those of the flight's steps.
    Rows { op: OpRef },
    /// Sealing this block into this slot.
    Seal { block: BlockId, slot: FilledSlot },
    /// Re-encoding a sealed block.
    Recode(Box<Recoded>),
    /// Moving sealed blocks to another tier.
    Tier(Box<TierMoves>),
    /// Moving this raw block to this slot.
    Move { block: BlockId, slot: FilledSlot },
}

/// Elements in host memory, typed by width so that no copy is needed to hand them out as what they are.
#[derive(Debug, Clone, PartialEq)]
pub enum Elements {
    /// Bit patterns of f16 or bf16 elements.
    Half(Vec<u16>),
    /// f32 elements.
    Single(Vec<f32>),
}

impl Elements {
    fn zeroed(element: ElementType, count: usize) -> Self {
        match element {
            ElementType::F16 | ElementType::Bf16 => Elements::Half(vec![0; count]),
            ElementType::F32 => Elements::Single(vec![0.0; count]),
        }
    }

    /// As bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Elements::Half(v) => bytemuck::cast_slice(v),
            Elements::Single(v) => bytemuck::cast_slice(v),
        }
    }

    /// As bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Elements::Half(v) => bytemuck::cast_slice_mut(v),
            Elements::Single(v) => bytemuck::cast_slice_mut(v),
        }
    }
}

/// What a read fills: keys `[tokens, kv_heads, key_dim]` and values `[tokens, kv_heads, value_dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadBuffer {
    /// Keys.
    pub keys: Elements,
    /// Values.
    pub values: Elements,
}

impl ReadBuffer {
    /// A buffer for the scores of `tokens` tokens, which take the place of keys.
    pub fn scores(tokens: usize) -> Self {
        ReadBuffer { keys: Elements::Single(vec![0.0; tokens]), values: Elements::Single(Vec::new()) }
    }

    /// The scores, in a buffer for them.
    pub fn scores_mut(&mut self) -> &mut [f32] {
        match &mut self.keys {
            Elements::Single(scores) => scores,
            Elements::Half(_) => &mut [],
        }
    }

    /// A buffer for `tokens` tokens of one layer.
    pub fn new(layout: &BlockLayout, tokens: usize) -> Self {
        let zeroed = |plane| Elements::zeroed(layout.element, tokens * layout.kv_heads * layout.dim(plane));
        ReadBuffer { keys: zeroed(Plane::Key), values: zeroed(Plane::Value) }
    }

    /// One of the two tensors, to be written.
    pub fn plane_mut(&mut self, plane: Plane) -> &mut [u8] {
        match plane {
            Plane::Key => self.keys.bytes_mut(),
            Plane::Value => self.values.bytes_mut(),
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::batch::{BatchCacheOperations, DeviceSpan, HostTensor};
    use crate::sequence::SequenceId;

    #[derive(Debug)]
    struct Mark(#[expect(dead_code, reason = "printed by Debug")] u8);

    impl Point for Mark {}

    fn append(flight: usize, on_device: bool) -> Step {
        Step::Append(AppendStep {
            flight,
            layers: 0..1,
            keys_at: 0,
            values_at: 0,
            on_device,
            payload_tokens: 1,
            first_token: 0,
            slot_offset: 0,
            tokens: 0..1,
        })
    }

    /// A caller may write to his tensors behind the point: it must come after the operations on them, and no others count.
    #[test]
    fn a_batch_is_enqueued_when_its_device_tensors_are() {
        let id = SequenceId::from_u64(0);
        let span = DeviceSpan { element: ElementType::F32, address: 64, bytes: 4 };
        let host = HostTensor { element: ElementType::F32, bytes: &[0; 4] };
        let mut batch = BatchCacheOperations::new();
        batch.device_source(3, Arc::new(Mark(0)));
        // Of the same device: one point more. Of another: the batch stays with the first.
        batch.device_source(3, Arc::new(Mark(1)));
        batch.device_source(4, Arc::new(Mark(2)));
        batch.append_device(id, &[1], None, span, span);
        batch.append(id, None, &[1], None, host, host);
        batch.append_device(id, &[1], None, span, span);
        let mut enqueued = batch.expect_enqueued().expect("it has device tensors");
        let mut payload = batch.into_submission().payload;
        let operation = |index| Purpose::Operation(OpRef { submission: 0, index, result: index });
        let point = |mark| -> Arc<dyn Point> { Arc::new(Mark(mark)) };
        let mut launches = Vec::new();
        for (index, on_device) in [(0, true), (1, false), (2, true)] {
            let mut launch = Launch::default();
            let flight = launch.add(operation(index), Some(&mut payload), None);
            launch.steps.extend([append(flight, on_device), append(flight, on_device)]);
            assert_eq!(launch.waits_for().count(), 2);
            assert_eq!(launch.is_awaited_enqueued(), on_device);
            launches.push(launch);
        }
        launches[1].enqueued(&point(9));
        launches[0].enqueued(&point(10));
        assert!(enqueued.try_recv().is_err(), "one of two is on the queue");
        launches[2].enqueued(&point(11));
        assert_eq!(format!("{:?}", enqueued.try_recv().expect("both are")), "Mark(11)");
    }
}
