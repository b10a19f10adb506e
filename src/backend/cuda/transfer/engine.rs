//! Keeps transfers in order, feeds them to the streams in units, and learns from a fence when they are done.
//!
//! What is bounded: units in flight, pieces and bytes of a unit, the ring of descriptors, the staging memory. So a transfer of any
//! length is accepted at once, and [`Engine::poll`] enqueues what follows. The first unit is small: the device begins while the
//! host still sorts the rest.
//!
//! Nothing here waits for the device except [`Engine::finish`] and dropping the engine. The driver may hold a caller for as long
//! as its queue of a stream is full; the bounds keep well below that.

use std::any::Any;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::super::driver::{DeviceMemory, DriverError, Event, Gpu, PinnedMemory};
use super::super::fence::Fence;
use super::super::kernels::Kernels;
use super::super::ring::Ring;
use super::super::{Slab, abi};
use super::paths::{Chunks, Config, Paths, Script};
use super::plan::{Calibration, Direction, Method, Move, Planner, UNIT_PIECES};

/// Moves are cut into pieces of at most this, so that chunks fill their buffers. Copies join them again.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Bytes of a unit: 0.6 ms over PCIe. Enqueueing the copies of one takes up to 0.4 ms.
const UNIT_BYTES: usize = 32 << 20;
/// Pieces of the first unit of a transfer; the next ones are twice as long each, up to [`UNIT_PIECES`].
const FIRST_PIECES: usize = 512;
/// Units in flight.
const UNITS: usize = 6;
/// Room for the descriptors of all units in flight and one that is skipped at the end.
const RING_BYTES: usize = (UNITS + 2) * UNIT_PIECES * size_of::<abi::Move>();
/// After so long without progress the device is asked whether it still lives.
const STALL: Duration = Duration::from_secs(2);

/// Memory that transfers may touch, kept alive by the engine.
#[derive(Clone)]
pub(super) struct Region {
    range: Range<u64>,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Region {
    /// `bytes` bytes of device memory.
    pub(super) fn device(memory: Arc<DeviceMemory>, bytes: usize) -> Region {
        let address = memory.address();
        Region { range: address..address + bytes as u64, _owner: memory }
    }

    /// All of a page-locked allocation.
    pub(super) fn host(memory: Arc<PinnedMemory>) -> Region {
        let address = memory.address();
        Region { range: address..address + memory.bytes() as u64, _owner: memory }
    }

    /// The slab, and its host tier.
    pub(super) fn tiers(slab: &Arc<Slab>) -> (Region, Region) {
        let region = |address: u64, bytes: usize| Region {
            range: address..address + bytes as u64,
            _owner: slab.clone(),
        };
        (region(slab.address(), slab.memory.bytes()), region(slab.host.address(), slab.host.bytes()))
    }

    fn holds(&self, address: u64, bytes: usize) -> bool {
        let end = address.checked_add(bytes as u64);
        self.range.start <= address && end.is_some_and(|end| end <= self.range.end)
    }
}

/// Bytes to be moved. Until it is [`Finished`], nobody else writes to its places, and nobody else reads those it writes to (4).
#[derive(Debug)]
pub(super) struct Transfer {
    /// In any order, without overlaps. Those in host order are planned fastest.
    pub(super) moves: Vec<Move>,
    /// Bytes of all. It shapes the plan, and no more depends on it.
    pub(super) bytes: usize,
    /// Waited for before the first byte.
    pub(super) after: Option<Arc<Event>>,
    /// A way for all instead of the planned ones.
    pub(super) method: Option<Method>,
}

/// A transfer that is done.
#[derive(Debug)]
pub(super) struct Finished {
    /// As they were handed over.
    pub(super) moves: Vec<Move>,
    /// Bytes that took each way, by [`Method`].
    pub(super) bytes_by_method: [u64; 3],
}

/// A transfer on its way.
struct Travelling {
    transfer: Transfer,
    /// The next move, and how much of it is enqueued.
    next: (usize, usize),
    unit_pieces: usize,
    bytes_by_method: [u64; 3],
}

impl Travelling {
    fn has_begun(&self) -> bool {
        self.next != (0, 0)
    }

    /// How large the next chunks may be.
    fn chunks(&self) -> Chunks {
        let before = self.bytes_by_method.iter().sum::<u64>() as usize;
        Chunks { before, left: self.transfer.bytes.saturating_sub(before) }
    }

    fn is_enqueued(&self) -> bool {
        self.next.0 == self.transfer.moves.len()
    }

    /// Cuts the pieces of the next unit; returns their bytes, and where the unit after it begins.
    fn cut(&self, pieces: &mut Vec<Move>) -> (usize, (usize, usize)) {
        pieces.clear();
        let (mut at, mut offset) = self.next;
        let mut total = 0;
        while at < self.transfer.moves.len() && pieces.len() < self.unit_pieces && total < UNIT_BYTES {
            let whole = self.transfer.moves[at];
            let bytes = (whole.bytes - offset).min(PIECE_BYTES);
            pieces.push(Move {
                device: whole.device + offset as u64,
                host: whole.host + offset as u64,
                bytes,
            });
            total += bytes;
            offset += bytes;
            if offset == whole.bytes {
                (at, offset) = (at + 1, 0);
            }
        }
        (total, (at, offset))
    }
}

/// A unit on the streams.
struct Flying {
    ticket: u64,
    ends_transfer: bool,
}

/// Which directions the engines of a device carry in, by [`Direction`].
#[derive(Debug, Default)]
pub(in super::super) struct Traffic([AtomicBool; 2]);

impl Traffic {
    fn set(&self, direction: Direction, flows: bool) {
        self.0[direction as usize].store(flows, Ordering::Relaxed);
    }

    /// Whether bytes flow against this direction.
    fn is_against(&self, direction: Direction) -> bool {
        self.0[1 - direction as usize].load(Ordering::Relaxed)
    }
}

/// See the [module documentation](self).
pub(super) struct Engine {
    // First: waits for the streams before what they use is dropped.
    paths: Paths,
    fence: Fence,
    ring: Ring,
    device: Region,
    host: Region,
    direction: Direction,
    traffic: Arc<Traffic>,
    calibration: Calibration,
    planner: Planner,
    pieces: Vec<Move>,
    /// Transfers that are not done, in order, and the first that is not enqueued.
    transfers: VecDeque<Travelling>,
    enqueuing: usize,
    units: VecDeque<Flying>,
    failed: Option<DriverError>,
}

impl Engine {
    /// Opens an engine between two regions.
    pub(super) fn open(
        gpu: &Arc<Gpu>,
        kernels: Arc<Kernels>,
        (direction, traffic): (Direction, Arc<Traffic>),
        (device, host): (Region, Region),
        config: Config,
        calibration: Calibration,
    ) -> Result<Engine, DriverError> {
        let paths = Paths::open(gpu, kernels, direction, config)?;
        let fence = Fence::new(paths.join(), paths.kernels())?;
        let ring = Ring::new(PinnedMemory::zeroed(gpu, RING_BYTES)?);
        Ok(Engine {
            paths,
            fence,
            ring,
            device,
            host,
            direction,
            traffic,
            calibration,
            planner: Planner::default(),
            pieces: Vec::new(),
            transfers: VecDeque::new(),
            enqueuing: 0,
            units: VecDeque::new(),
            failed: None,
        })
    }

    /// Takes a transfer, and enqueues as much of it as the bounds allow. Errors of the driver show in [`Engine::poll`].
    ///
    /// Transfers finish in order, but run side by side: those in flight at the same time have no bytes in common. A move that is not
    /// within the regions is a defect of ours: it ends the engine with an error before anything of its unit is enqueued.
    pub(super) fn submit(&mut self, transfer: Transfer) {
        let (next, unit_pieces) = ((0, 0), FIRST_PIECES);
        self.traffic.set(self.direction, true);
        self.transfers.push_back(Travelling { transfer, next, unit_pieces, bytes_by_method: [0; 3] });
        self.pump();
    }

    /// Takes what is done, and enqueues what follows.
    pub(super) fn poll(&mut self, done: &mut Vec<Finished>) -> Result<(), DriverError> {
        let reached = self.fence.reached();
        while let Some(&Flying { ends_transfer, .. }) =
            self.units.front().filter(|unit| unit.ticket <= reached)
        {
            self.units.pop_front();
            if ends_transfer && let Some(travelled) = self.transfers.pop_front() {
                self.enqueuing -= 1;
                let Travelling { transfer, bytes_by_method, .. } = travelled;
                done.push(Finished { moves: transfer.moves, bytes_by_method });
            }
        }
        self.ring.release(reached);
        if self.transfers.is_empty() {
            self.traffic.set(self.direction, false);
        }
        self.pump();
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Whether nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.transfers.is_empty()
    }

    /// An event behind everything that is enqueued now, for whoever wants to sleep until then.
    pub(super) fn record(&self) -> Result<Event, DriverError> {
        self.paths.record()
    }

    /// Spins until everything is done.
    pub(super) fn finish(&mut self, done: &mut Vec<Finished>) -> Result<(), DriverError> {
        let started = Instant::now();
        while !self.is_idle() {
            self.poll(done)?;
            if started.elapsed() > STALL {
                // The word never moves again after an error: this call says which.
                self.paths.synchronize()?;
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn pump(&mut self) {
        if self.failed.is_some() || self.enqueuing == self.transfers.len() || self.units.len() >= UNITS {
            return;
        }
        let mut pump = || {
            self.paths.join().gpu().make_current()?;
            while self.enqueuing < self.transfers.len() && self.units.len() < UNITS && self.enqueue()? {}
            Ok(())
        };
        if let Err(error) = pump() {
            tracing::error!(target: "kv_cache::cuda", %error, "the device is lost to transfers");
            self.failed = Some(error);
        }
    }

    /// Enqueues one unit; false if the ring has no room for its descriptors now.
    fn enqueue(&mut self) -> Result<bool, DriverError> {
        let travelling = &mut self.transfers[self.enqueuing];
        let (bytes, next) = travelling.cut(&mut self.pieces);
        // Unit by unit, while the device is busy with those before: a look at all of 100,000 blocks takes 3 % of their transfer.
        let fits = |item: &Move| {
            item.bytes > 0
                && self.device.holds(item.device, item.bytes)
                && self.host.holds(item.host, item.bytes)
        };
        if let Some(wrong) = self.pieces.iter().find(|piece| !fits(piece)) {
            let text = format!("{wrong:?} is not within the memory of this engine");
            return Err(DriverError::Call { call: "moving blocks", name: "out of bounds".into(), text });
        }
        let ticket = self.fence.next_ticket();
        let script_bytes = self.pieces.len() * size_of::<abi::Move>();
        let Some(range) = self.ring.take(script_bytes, ticket) else { return Ok(false) };
        if !travelling.has_begun()
            && let Some(event) = &travelling.transfer.after
        {
            self.paths.begin_after(event)?;
        }
        let share = bytes as f64 / travelling.transfer.bytes.max(1) as f64;
        self.planner.plan(&mut self.pieces, share, &self.calibration, travelling.transfer.method);
        let address = self.ring.address(range.start);
        // SAFETY: just taken; the device does not know of it yet.
        let places = unsafe { self.ring.bytes_mut(range.start..range.start + script_bytes) };
        // Aligned: ranges begin at multiples of 128.
        let script = Script::new(bytemuck::cast_slice_mut(places), address);
        let chunks = travelling.chunks();
        let crowded = self.traffic.is_against(self.direction);
        let alone = self.units.is_empty();
        self.paths.enqueue(&self.planner, script, chunks, crowded, alone)?;
        self.paths.end(&mut self.fence, alone)?;
        travelling.next = next;
        travelling.unit_pieces = (2 * travelling.unit_pieces).min(UNIT_PIECES);
        for (sum, bytes) in travelling.bytes_by_method.iter_mut().zip(self.planner.bytes_by_method()) {
            *sum += bytes;
        }
        let ends_transfer = travelling.is_enqueued();
        self.enqueuing += usize::from(ends_transfer);
        self.units.push_back(Flying { ticket, ends_transfer });
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_cover_every_byte_once_and_keep_to_their_bounds() {
        let sizes = [1usize, 4096, PIECE_BYTES, PIECE_BYTES + 1, 5 * PIECE_BYTES + 77, 200 << 20];
        let mut at = 0u64;
        let moves: Vec<Move> = (0..3000)
            .map(|i| {
                let bytes = sizes[if i % 500 == 0 { 5 } else { i % 5 }];
                at += bytes as u64;
                Move { device: at - bytes as u64, host: (1 << 40) + at - bytes as u64, bytes }
            })
            .collect();
        let transfer = Transfer { moves, bytes: at as usize, after: None, method: None };
        let (next, unit_pieces) = ((0, 0), FIRST_PIECES);
        let mut travelling = Travelling { transfer, next, unit_pieces, bytes_by_method: [0; 3] };
        let (mut pieces, mut covered) = (Vec::new(), 0u64);
        while !travelling.is_enqueued() {
            let (bytes, next) = travelling.cut(&mut pieces);
            assert!(pieces.len() <= unit_pieces && bytes < UNIT_BYTES + PIECE_BYTES);
            for piece in &pieces {
                assert_eq!((piece.device, piece.host), (covered, (1 << 40) + covered));
                assert!((1..=PIECE_BYTES).contains(&piece.bytes));
                covered += piece.bytes as u64;
            }
            travelling.next = next;
        }
        assert_eq!(covered, at);
    }
}
