//! What the figures are measured with: how blocks lie, clocks, a stream without an engine, and compute to run beside.

use std::sync::Arc;
use std::time::Instant;

use kv_cache_actors::geometry::BlockLayout;

use super::super::super::abi;
use super::super::super::driver::{DeviceMemory, DriverError, Event, Gpu, PinnedMemory, Stream};
use super::super::super::fence::Fence;
use super::super::super::kernels::{Descriptors, Kernels};
use super::super::super::measure::{random, upload};
use super::super::engine::{Engine, Finished, Transfer};
use super::super::plan::{Direction, Method, Move};
use super::GIB;
use crate::{BlockFormat, Format};

/// After so long the driver is asked for the error.
const STALL_S: f64 = 5.0;

pub(super) fn failed(name: &str, text: String) -> DriverError {
    DriverError::Call { call: "measuring transfers", name: name.into(), text }
}

/// How blocks lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spread {
    /// In one run on either side.
    Contiguous,
    /// In one run on the host, in order; in scattered slots on the device.
    HostRun,
    /// In scattered slots on both sides, in random order.
    Scattered,
}

impl Spread {
    pub(super) fn name(self) -> &'static str {
        match self {
            Spread::Contiguous => "both contiguous",
            Spread::HostRun => "host contiguous",
            Spread::Scattered => "both scattered",
        }
    }
}

pub(super) fn size_name(bytes: usize) -> String {
    match bytes {
        _ if bytes < 1 << 20 => format!("{} KiB", bytes >> 10),
        _ if bytes < GIB => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / GIB as f64),
    }
}

pub(super) fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::ToDevice => "h2d",
        Direction::ToHost => "d2h",
    }
}

/// The numbers below `count` in an order without a pattern.
pub(super) fn shuffled(count: usize, mut seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for at in (1..count).rev() {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        order.swap(at, (seed >> 33) as usize % (at + 1));
    }
    order
}

pub(super) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Rounds, so that a row takes some tens of milliseconds.
pub(super) fn rounds(bytes: usize) -> usize {
    match bytes {
        _ if bytes <= 16 << 20 => 21,
        _ if bytes <= 256 << 20 => 7,
        _ => 3,
    }
}

pub(super) fn elapsed_us(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e6
}

/// What copies and kernels without an engine run on.
pub(super) struct Lane {
    pub(super) stream: Stream,
    pub(super) fence: Fence,
}

impl Lane {
    pub(super) fn open(gpu: &Arc<Gpu>, kernels: &Kernels) -> Result<Lane, DriverError> {
        let stream = Stream::new(gpu)?;
        let fence = Fence::new(&stream, kernels)?;
        Ok(Lane { stream, fence })
    }

    pub(super) fn spin(&self, ticket: u64) -> Result<(), DriverError> {
        let started = Instant::now();
        while self.fence.reached() < ticket {
            if started.elapsed().as_secs_f64() > STALL_S {
                self.stream.synchronize()?;
            }
            std::hint::spin_loop();
        }
        Ok(())
    }
}

pub(super) fn give_up_after(started: Instant) -> Result<(), DriverError> {
    match started.elapsed().as_secs_f64() > STALL_S {
        true => Err(failed("no progress", format!("for {STALL_S} s"))),
        false => Ok(()),
    }
}

pub(super) fn submit(
    engine: &mut Engine,
    moves: Vec<Move>,
    after: Option<Arc<Event>>,
    method: Option<Method>,
) {
    let bytes = moves.iter().map(|item| item.bytes).sum();
    engine.submit(Transfer { moves, bytes, after, method });
}

/// Median time of a transfer, and the ways that its bytes took.
pub(super) fn transfer_us(
    engine: &mut Engine,
    mut moves: Vec<Move>,
    method: Option<Method>,
) -> Result<(f64, String), DriverError> {
    let bytes: usize = moves.iter().map(|item| item.bytes).sum();
    let (mut times, mut ways) = (Vec::new(), String::new());
    for _ in 0..=rounds(bytes) {
        let mut done = Vec::with_capacity(1);
        let started = Instant::now();
        engine.submit(Transfer { moves, bytes, after: None, method });
        engine.finish(&mut done)?;
        times.push(elapsed_us(started));
        ways = ways_of(&done);
        moves = done.pop().map(|finished| finished.moves).unwrap_or_default();
    }
    Ok((median(times.split_off(1)), ways))
}

/// The ways that a transfer took, with their shares if there are several.
pub(super) fn ways_of(done: &[Finished]) -> String {
    let Some(finished) = done.last() else { return String::new() };
    let total: u64 = finished.bytes_by_method.iter().sum();
    let used = Method::ALL.into_iter().zip(finished.bytes_by_method).filter(|(_, bytes)| *bytes > 0);
    let names = used.map(|(method, bytes)| match bytes == total {
        true => format!("{method:?}"),
        false => format!("{method:?} {:.0} %", 100.0 * bytes as f64 / total as f64),
    });
    names.collect::<Vec<_>>().join(" + ")
}

/// Compute that memory bounds: blocks that are sealed again and again.
pub(super) struct Sealing {
    steps: DeviceMemory,
    blocks: usize,
    _memories: [DeviceMemory; 2],
    _flag: PinnedMemory,
}

impl Sealing {
    pub(super) fn new(gpu: &Arc<Gpu>, layout: &BlockLayout, blocks: usize) -> Result<Sealing, DriverError> {
        let (raw_bytes, sealed_bytes) =
            (layout.raw_bytes(), BlockFormat::from(Format::Int8).block_bytes(layout).next_multiple_of(128));
        let raw = random(gpu, layout.element, blocks * raw_bytes)?;
        let sealed = DeviceMemory::zeroed(gpu, blocks * sealed_bytes)?;
        let flag = PinnedMemory::zeroed(gpu, 64)?;
        let at =
            |memory: &DeviceMemory, block: usize, bytes: usize| memory.address() + (block * bytes) as u64;
        let step = |block| abi::Convert {
            from: at(&raw, block, raw_bytes),
            to: at(&sealed, block, sealed_bytes),
            flag: flag.address(),
            index: 0,
        };
        let steps = upload(gpu, &(0..blocks).map(step).collect::<Vec<_>>())?;
        Ok(Sealing { steps, blocks, _memories: [raw, sealed], _flag: flag })
    }

    pub(super) fn launch(&self, stream: &Stream, kernels: &Kernels) -> Result<(), DriverError> {
        let steps = Descriptors { address: self.steps.address(), count: self.blocks };
        // SAFETY: descriptors of allocations that outlive the kernel, as sized in `new` (3).
        unsafe { kernels.seal(stream, 0, steps) }
    }
}
