//! The streams of an engine, and the three ways over them.
//!
//! ```text
//! copies:   copy stream
//! staged:   copy stream  --filled-->  kernel stream      to the device; back to the host the arrows turn round
//!                        <--drained--
//! direct:   kernel stream
//! ```
//!
//! Kernels run on an urgent stream with few thread blocks: PCIe needs no more, and compute keeps the rest of the GPU. Streams are few
//! because the driver maps those of a process to 8 queues of the GPU, and what shares a queue waits for each other: with five
//! streams an engine, compute beside a transfer took up to 1.8 times as long.

use std::sync::Arc;

use super::super::abi;
use super::super::driver::{DeviceMemory, DriverError, Event, Gpu, Stream};
use super::super::fence::Fence;
use super::super::kernels::{Descriptors, Kernels};
use super::plan::{Chunk, Direction, Method, Move, Planner, joint_run};

/// Streams by number. The join stream has no work of its own: it waits for the others, and counts the fence up.
const COPIES: usize = 0;
const KERNELS: usize = 1;
const JOIN: usize = 2;
const STREAMS: usize = 3;

/// What an engine takes from the GPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    /// Bytes of a staging buffer: the largest chunk. A copy of 8 MiB takes 150 µs, some 15 times what enqueueing a chunk does.
    pub(super) buffer_bytes: usize,
    /// Staging buffers: one that fills, one that drains, and two between.
    pub(super) buffers: usize,
    /// Thread blocks of 256 of a kernel between staging memory and slots.
    pub(super) staged_grid: u32,
    /// Thread blocks of 256 of a kernel that reaches over PCIe; each has 32 KiB in flight, and PCIe needs some 150: 8 measured
    /// no slower than 132.
    pub(super) direct_grid: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config { buffer_bytes: 8 << 20, buffers: 4, staged_grid: 32, direct_grid: 8 }
    }
}

impl Direction {
    /// Orders a place on the device (a slot, or staging memory) and one nearer to the host into from and to.
    fn route(self, device: u64, host: u64) -> (u64, u64) {
        match self {
            Direction::ToDevice => (host, device),
            Direction::ToHost => (device, host),
        }
    }
}

/// A staging buffer's states, as points on streams. Waiting on one that was never recorded is no wait: the buffer is free then.
struct Buffer {
    filled: Event,
    drained: Event,
}

/// Descriptors of a unit, written one after the other into its part of the ring.
pub(super) struct Script<'a> {
    left: &'a mut [abi::Move],
    address: u64,
}

impl<'a> Script<'a> {
    /// Over places that the device sees at `address`.
    pub(super) fn new(left: &'a mut [abi::Move], address: u64) -> Self {
        Script { left, address }
    }

    /// Writes the next descriptors, and returns where they are and the most bytes of any.
    fn write(&mut self, moves: impl Iterator<Item = abi::Move>) -> (Descriptors, usize) {
        let (mut count, mut most) = (0, 0);
        for (place, item) in self.left.iter_mut().zip(moves) {
            *place = item;
            most = most.max(item.bytes as usize);
            count += 1;
        }
        let descriptors = Descriptors { address: self.address, count };
        self.left = &mut std::mem::take(&mut self.left)[count..];
        self.address += (count * size_of::<abi::Move>()) as u64;
        (descriptors, most)
    }
}

/// See the [module documentation](self).
pub(super) struct Paths {
    streams: [Stream; STREAMS],
    /// Recorded at the end of each stream's part of a unit.
    tails: [Event; STREAMS],
    buffers: Vec<Buffer>,
    staging: DeviceMemory,
    kernels: Arc<Kernels>,
    direction: Direction,
    config: Config,
    /// A bit for each stream on which a part of the current unit ends.
    ends_on: u8,
    /// The stream that the last ticket was issued on.
    fenced_on: usize,
    next_buffer: usize,
    chunk: Chunk,
}

impl Paths {
    pub(super) fn open(
        gpu: &Arc<Gpu>,
        kernels: Arc<Kernels>,
        direction: Direction,
        config: Config,
    ) -> Result<Paths, DriverError> {
        let config = Config {
            buffers: config.buffers.max(1),
            buffer_bytes: config.buffer_bytes.max(super::engine::PIECE_BYTES).next_multiple_of(128),
            ..config
        };
        let (plain, urgent, event) = (|| Stream::new(gpu), || Stream::urgent(gpu), || Event::new(gpu));
        let buffer = |_| Ok(Buffer { filled: event()?, drained: event()? });
        Ok(Paths {
            streams: [plain()?, urgent()?, plain()?],
            tails: [event()?, event()?, event()?],
            buffers: (0..config.buffers).map(buffer).collect::<Result<_, DriverError>>()?,
            staging: DeviceMemory::zeroed(gpu, config.buffers * config.buffer_bytes)?,
            kernels,
            direction,
            config,
            ends_on: 0,
            fenced_on: JOIN,
            next_buffer: 0,
            chunk: Chunk::default(),
        })
    }

    /// The stream of the fence, which has seen nothing yet.
    pub(super) fn join(&self) -> &Stream {
        &self.streams[JOIN]
    }

    pub(super) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Has everything that is enqueued from now on wait for `event`, which the caller keeps until then.
    pub(super) fn begin_after(&self, event: &Event) -> Result<(), DriverError> {
        // SAFETY: the engine keeps the event until the transfer is done (1).
        self.streams[..JOIN].iter().try_for_each(|stream| unsafe { stream.wait(event.raw()) })
    }

    /// Enqueues a unit that is planned.
    pub(super) fn enqueue(
        &mut self,
        planner: &Planner,
        mut script: Script<'_>,
        chunk_bytes: usize,
    ) -> Result<(), DriverError> {
        // Copies last: they take the host longest, and the device has something to do meanwhile.
        self.direct(planner, &mut script)?;
        let mut chunk = std::mem::take(&mut self.chunk);
        let staged = self.stage(planner, &mut chunk, &mut script, chunk_bytes.min(self.config.buffer_bytes));
        chunk.clear();
        self.chunk = chunk;
        staged?;
        planner
            .runs()
            .iter()
            .filter(|run| run.method == Method::Copies)
            .try_for_each(|run| self.copy(&planner.pieces()[run.pieces.clone()]))
    }

    /// One launch for all that goes directly.
    fn direct(&mut self, planner: &Planner, script: &mut Script<'_>) -> Result<(), DriverError> {
        let direction = self.direction;
        let runs = planner.runs().iter().filter(|run| run.method == Method::Direct);
        let pieces = runs.flat_map(|run| &planner.pieces()[run.pieces.clone()]);
        let (descriptors, most) = script.write(pieces.map(|piece| {
            let (from, to) = direction.route(piece.device, piece.host);
            abi::Move { from, to, bytes: piece.bytes as u64 }
        }));
        if descriptors.count == 0 {
            return Ok(());
        }
        self.ends_on |= 1 << KERNELS;
        // SAFETY: checked against both regions (3), which the caller lends to the transfer (4); the descriptors are the
        // unit's part of the ring (5).
        unsafe {
            self.kernels.carry_blocks(&self.streams[KERNELS], descriptors, most, self.config.direct_grid)
        }
    }

    /// A copy for each joint run.
    fn copy(&mut self, pieces: &[Move]) -> Result<(), DriverError> {
        let mut at = 0;
        while at < pieces.len() {
            let run = joint_run(pieces, at);
            let (first, bytes) = (pieces[at], pieces[run.clone()].iter().map(|piece| piece.bytes).sum());
            at = run.end;
            self.ends_on |= 1 << COPIES;
            let (from, to) = self.direction.route(first.device, first.host);
            // SAFETY: checked against both regions (3), which the caller lends to the transfer (4).
            unsafe { self.streams[COPIES].copy(to, from, bytes) }?;
        }
        Ok(())
    }

    /// Packs what is staged into chunks.
    fn stage(
        &mut self,
        planner: &Planner,
        chunk: &mut Chunk,
        script: &mut Script<'_>,
        chunk_bytes: usize,
    ) -> Result<(), DriverError> {
        for run in planner.runs().iter().filter(|run| run.method == Method::Staged) {
            for piece in &planner.pieces()[run.pieces.clone()] {
                if !chunk.push(piece, chunk_bytes) {
                    self.pass(chunk, script)?;
                    chunk.clear();
                    // An empty chunk takes any piece: none is larger than a buffer.
                    chunk.push(piece, chunk_bytes);
                }
            }
        }
        if chunk.is_empty() { Ok(()) } else { self.pass(chunk, script) }
    }

    /// Sends a chunk through the next staging buffer.
    fn pass(&mut self, chunk: &Chunk, script: &mut Script<'_>) -> Result<(), DriverError> {
        let at = self.next_buffer;
        self.next_buffer = (at + 1) % self.buffers.len();
        let copies = COPIES;
        let (buffer, base) =
            (&self.buffers[at], self.staging.address() + (at * self.config.buffer_bytes) as u64);
        let (first, second) = match self.direction {
            Direction::ToDevice => (copies, KERNELS),
            Direction::ToHost => (KERNELS, copies),
        };
        self.ends_on |= 1 << second;
        // SAFETY: the buffer's events live as long as the streams (1).
        unsafe { self.streams[first].wait(buffer.drained.raw()) }?;
        for on in [first, second] {
            if on == copies {
                for segment in &chunk.segments {
                    let (from, to) = self.direction.route(base + segment.staging_at as u64, segment.host);
                    // SAFETY: the host's side was checked (3) and is lent (4); the buffer is between its events (9).
                    unsafe { self.streams[on].copy(to, from, segment.bytes) }?;
                }
            } else {
                let direction = self.direction;
                let (descriptors, most) = script.write(chunk.places.iter().map(|(device, offset, bytes)| {
                    let (from, to) = direction.route(*device, base + *offset as u64);
                    abi::Move { from, to, bytes: *bytes as u64 }
                }));
                // SAFETY: the slots were checked (3) and are lent (4), the descriptors are the unit's part of the ring (5);
                // the buffer is between its events (9).
                unsafe {
                    self.kernels.carry_blocks(&self.streams[on], descriptors, most, self.config.staged_grid)
                }?;
            }
            if on == first {
                buffer.filled.record(self.streams[first].raw())?;
                // SAFETY: as above.
                unsafe { self.streams[second].wait(buffer.filled.raw()) }?;
            }
        }
        buffer.drained.record(self.streams[second].raw())
    }

    /// Adds a ticket behind the unit and all before it. `alone`: nothing else is in flight.
    ///
    /// A unit that ends on one stream needs no join if no ticket of another stream can come after its own (10).
    pub(super) fn end(&mut self, fence: &mut Fence, alone: bool) -> Result<(), DriverError> {
        let ends_on = std::mem::take(&mut self.ends_on);
        let only = ends_on.trailing_zeros() as usize;
        let on = if ends_on.count_ones() == 1 && (alone || only == self.fenced_on) { only } else { JOIN };
        if on == JOIN {
            let waits_for = (ends_on | 1 << self.fenced_on) & !(1 << JOIN);
            for other in (0..JOIN).filter(|other| waits_for & 1 << other != 0) {
                self.tails[other].record(self.streams[other].raw())?;
                // SAFETY: the event lives as long as the streams (1).
                unsafe { self.streams[JOIN].wait(self.tails[other].raw()) }?;
            }
        }
        self.fenced_on = on;
        fence.issue(&self.streams[on], &self.kernels).map(drop)
    }

    /// An event behind the last ticket.
    pub(super) fn record(&self) -> Result<Event, DriverError> {
        let stream = &self.streams[self.fenced_on];
        let event = Event::new(stream.gpu())?;
        event.record(stream.raw())?;
        Ok(event)
    }

    /// Waits until nothing is in flight.
    pub(super) fn synchronize(&self) -> Result<(), DriverError> {
        self.streams[JOIN].gpu().make_current()?;
        self.streams.iter().try_for_each(Stream::synchronize)
    }
}

impl Drop for Paths {
    fn drop(&mut self) {
        // Nothing in flight may outlive staging memory, ring and regions (1). An error means that nothing runs any more.
        let _ = self.synchronize();
    }
}
