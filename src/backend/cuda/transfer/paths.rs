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
use super::super::copies::Copies;
use super::super::driver::{DeviceMemory, DriverError, Event, Gpu, Stream};
use super::super::fence::Fence;
use super::super::kernels::{Descriptors, Kernels};
use super::engine::PIECE_BYTES;
use super::plan::{Chunk, Direction, Method, Planner, joint_run};

/// Streams by number. The join stream has no work of its own: it waits for the others, and counts the fence up.
const COPIES: usize = 0;
const KERNELS: usize = 1;
const JOIN: usize = 2;
const STREAMS: usize = 3;

/// What an engine takes from the GPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    /// Bytes of a staging buffer: the largest chunk. A copy of 16 MiB takes 300 µs; the pause before the next one is 2 to 3.
    pub(super) buffer_bytes: usize,
    /// Staging buffers: one that fills, and one that drains.
    pub(super) buffers: usize,
    /// Thread blocks of 256 of a kernel between staging memory and slots.
    pub(super) staged_grid: u32,
    /// Thread blocks of 256 of a kernel that reaches over PCIe; each has 32 KiB in flight, and PCIe needs some 150: 8 measured
    /// no slower than 132, and hold up compute the least.
    pub(super) direct_grid: u32,
    /// The same while bytes flow both ways, when answers take longer: with 8, 16, 32, 64 and 132 one kernel for all came to 59, 64,
    /// 72, 79 and 81 GB/s both ways, units of 4 KiB blocks to 59, 59, 60 and 66 with 8, 32, 64 and 132.
    pub(super) crowded_grid: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config { buffer_bytes: 16 << 20, buffers: 2, staged_grid: 32, direct_grid: 8, crowded_grid: 132 }
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

/// How large chunks may be: the copies of a transfer follow each other without a pause, but nothing hides the kernel before the
/// first one, or behind the last one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunks {
    /// Bytes of the transfer before the next chunk, and from it on.
    pub(super) before: usize,
    pub(super) left: usize,
}

impl Chunks {
    /// A kernel moves some ten times as many bytes as a copy in the same time, so it is done before a third of them has been copied.
    fn limit(&self, direction: Direction) -> usize {
        let bytes = match direction {
            Direction::ToHost => self.before * 3,
            Direction::ToDevice => self.left / 4 * 3,
        };
        bytes.max(PIECE_BYTES)
    }

    fn pass(&mut self, bytes: usize) {
        self.before += bytes;
        self.left = self.left.saturating_sub(bytes);
    }
}

/// Descriptors of a unit, written one after the other into its part of the ring.
pub(super) struct Script<'a> {
    left: &'a mut [abi::Move],
    address: u64,
    /// Of the descriptors since the last that were ended: how many, and the most bytes of any.
    count: usize,
    most: usize,
}

impl<'a> Script<'a> {
    /// Over places that the device sees at `address`.
    pub(super) fn new(left: &'a mut [abi::Move], address: u64) -> Self {
        Script { left, address, count: 0, most: 0 }
    }

    /// Writes the next descriptor. There is room for one of each piece of the unit.
    fn put(&mut self, item: abi::Move) {
        self.left[self.count] = item;
        self.count += 1;
        self.most = self.most.max(item.bytes as usize);
    }

    /// Ends the descriptors of a kernel: where they are, and the most bytes of any.
    fn end(&mut self) -> (Descriptors, usize) {
        let (count, most) = (std::mem::take(&mut self.count), std::mem::take(&mut self.most));
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
    copies: Copies,
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
            buffer_bytes: config.buffer_bytes.max(PIECE_BYTES).next_multiple_of(128),
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
            copies: Copies::default(),
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

    /// Enqueues a unit that is planned. `crowded`: bytes flow against it. `alone`: nothing else is in flight.
    pub(super) fn enqueue(
        &mut self,
        planner: &Planner,
        mut script: Script<'_>,
        chunks: Chunks,
        crowded: bool,
        alone: bool,
    ) -> Result<(), DriverError> {
        if alone {
            self.copies.hurry();
        }
        // Copies last: they take the host longest, and the device has something to do meanwhile.
        self.direct(planner, &mut script, crowded)?;
        let mut chunk = std::mem::take(&mut self.chunk);
        let staged = self.stage(planner, &mut chunk, &mut script, chunks);
        chunk.clear();
        self.chunk = chunk;
        staged?;
        self.copy(planner)
    }

    /// One launch for all that goes directly.
    fn direct(
        &mut self,
        planner: &Planner,
        script: &mut Script<'_>,
        crowded: bool,
    ) -> Result<(), DriverError> {
        let (direction, config) = (self.direction, self.config);
        let grid = if crowded { config.crowded_grid } else { config.direct_grid };
        for piece in planner.pieces_by(Method::Direct).flatten() {
            let (from, to) = direction.route(piece.device, piece.host);
            script.put(abi::Move { from, to, bytes: piece.bytes as u64 });
        }
        let (descriptors, most) = script.end();
        if descriptors.count == 0 {
            return Ok(());
        }
        self.ends_on |= 1 << KERNELS;
        // SAFETY: checked against both regions (3), which the caller lends to the transfer (4); the descriptors are the
        // unit's part of the ring (5).
        unsafe { self.kernels.carry_blocks(&self.streams[KERNELS], descriptors, most, grid) }
    }

    /// A copy for each joint run.
    fn copy(&mut self, planner: &Planner) -> Result<(), DriverError> {
        for pieces in planner.pieces_by(Method::Copies) {
            self.ends_on |= 1 << COPIES;
            let mut at = 0;
            while at < pieces.len() {
                let run = joint_run(pieces, at);
                let (first, bytes) = (pieces[at], pieces[run.clone()].iter().map(|piece| piece.bytes).sum());
                at = run.end;
                let (from, to) = self.direction.route(first.device, first.host);
                // SAFETY: checked against both regions (3), which the caller lends to the transfer, without overlaps (4).
                unsafe { self.copies.push(to, from, bytes, &self.streams[COPIES]) }?;
            }
        }
        // SAFETY: as above.
        unsafe { self.copies.send(&self.streams[COPIES]) }
    }

    /// Packs what is staged into chunks.
    fn stage(
        &mut self,
        planner: &Planner,
        chunk: &mut Chunk,
        script: &mut Script<'_>,
        mut chunks: Chunks,
    ) -> Result<(), DriverError> {
        let (direction, most) = (self.direction, self.config.buffer_bytes);
        let limit = |chunks: &Chunks| chunks.limit(direction).min(most);
        let (mut limit_bytes, mut base) = (limit(&chunks), self.next_buffer_address());
        for pieces in planner.pieces_by(Method::Staged) {
            for piece in pieces {
                let at = match chunk.push(piece, limit_bytes) {
                    Some(at) => at,
                    None => {
                        self.pass(chunk, script)?;
                        chunks.pass(chunk.bytes());
                        (limit_bytes, base) = (limit(&chunks), self.next_buffer_address());
                        chunk.clear();
                        // An empty chunk takes any piece: none is larger than a buffer.
                        chunk.push(piece, limit_bytes).unwrap_or_default()
                    }
                };
                let (from, to) = direction.route(piece.device, base + at as u64);
                script.put(abi::Move { from, to, bytes: piece.bytes as u64 });
            }
        }
        if chunk.is_empty() { Ok(()) } else { self.pass(chunk, script) }
    }

    fn next_buffer_address(&self) -> u64 {
        self.staging.address() + (self.next_buffer * self.config.buffer_bytes) as u64
    }

    /// Sends a chunk through the next staging buffer. The script ends in its descriptors.
    fn pass(&mut self, chunk: &Chunk, script: &mut Script<'_>) -> Result<(), DriverError> {
        let (base, buffer) = (self.next_buffer_address(), &self.buffers[self.next_buffer]);
        self.next_buffer = (self.next_buffer + 1) % self.buffers.len();
        let copies = COPIES;
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
                    unsafe { self.copies.push(to, from, segment.bytes, &self.streams[on]) }?;
                }
                // SAFETY: as above.
                unsafe { self.copies.send(&self.streams[on]) }?;
            } else {
                let (descriptors, most) = script.end();
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
