//! How fast transfers are on this machine, beside its own plain copies in the same run. `examples/gpu_bench` prints it.

mod rig;

use std::sync::{Arc, Barrier};
use std::time::Instant;

use cudarc::driver::result;
use kv_cache_actors::geometry::{BlockLayout, ElementType, Geometry};
use serde::Serialize;

use self::rig::{
    Lane, Sealing, Spread, direction_name, elapsed_us, failed, give_up_after, median, rounds, shuffled,
    size_name, submit, transfer_us, ways_of,
};
use super::super::driver::{DeviceMemory, DriverError, Event, Gpu, PinnedMemory, check};
use super::super::kernels::Kernels;
use super::calibrate;
use super::engine::{Engine, Region, Traffic};
use super::paths::Config;
use super::plan::{Calibration, Direction, Method, Move};
use crate::Format;
use crate::error::BuildError;

/// One figure of [`transfer_figures`].
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct TransferFigure {
    /// Figures that belong together.
    pub group: &'static str,
    /// What was done.
    pub what: String,
    /// Median.
    pub value: f64,
    /// Of the value.
    pub unit: &'static str,
    /// The value by what it is judged by.
    pub ratio: Option<f64>,
    /// What that is, and what else there is to say.
    pub of: String,
}

/// Bytes of a transfer at most; the memory on either side is twice that, so that slots can lie apart.
const TOTAL_MAX: usize = 4 << 30;
const MEMORY: usize = 2 * TOTAL_MAX;
const GIB: usize = 1 << 30;
const SIZES: [usize; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20];
const COUNTS: [usize; 4] = [16, 256, 4096, 100_000];
const DIRECTIONS: [Direction; 2] = [Direction::ToDevice, Direction::ToHost];

/// Measures transfers on GPU `ordinal`, and reports each figure as it comes. Takes 8 GiB on the GPU and 8 GiB of page-locked memory.
///
/// Times run from handing a transfer over until the host sees that it is done, sorting and planning included, and so do those of
/// the copies that they are judged by. Contents are compared in every combination: all blocks of small ones, 256 of large ones.
///
/// # Errors
/// [`BuildError::Device`]: there is no such GPU, not enough memory, or bytes that did not arrive.
pub fn transfer_figures(ordinal: usize, report: &mut dyn FnMut(TransferFigure)) -> Result<(), BuildError> {
    let layout = Geometry::new(1, 8, 128, ElementType::F16).layout()?;
    Bench::open(ordinal, &layout, report)
        .and_then(|mut bench| bench.run(&layout))
        .map_err(|error| BuildError::Device { device: format!("GPU {ordinal}"), reason: error.to_string() })
}

struct Bench<'a> {
    report: &'a mut dyn FnMut(TransferFigure),
    engines: [Engine; 2],
    calibrations: [Calibration; 2],
    lanes: [Lane; 2],
    device: Arc<DeviceMemory>,
    host: Arc<PinnedMemory>,
    kernels: Arc<Kernels>,
    gpu: Arc<Gpu>,
    /// One way, by direction, and both ways at once.
    peaks: [f64; 3],
}

impl<'a> Bench<'a> {
    fn open(
        ordinal: usize,
        layout: &BlockLayout,
        report: &'a mut dyn FnMut(TransferFigure),
    ) -> Result<Bench<'a>, DriverError> {
        let gpu = Gpu::shared(ordinal)?;
        let kernels = Arc::new(Kernels::load(&gpu, layout, Format::Int8, None)?);
        let device = Arc::new(DeviceMemory::zeroed(&gpu, MEMORY)?);
        let host = Arc::new(PinnedMemory::zeroed(&gpu, MEMORY)?);
        // SAFETY: nobody else knows this memory yet, and it holds plain bytes (8).
        let words = unsafe { std::slice::from_raw_parts_mut(host.base().as_ptr().cast::<u64>(), MEMORY / 8) };
        let mix = |at: u64| (at ^ at >> 15).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ at << 40;
        words.iter_mut().zip(1u64..).for_each(|(word, at)| *word = mix(at));
        let mut calibrations = [Calibration::TYPICAL; 2];
        for (calibration, direction) in calibrations.iter_mut().zip(DIRECTIONS) {
            let started = Instant::now();
            *calibration = calibrate::measure(&gpu, &kernels, direction, Config::default())?;
            let ms = elapsed_us(started) / 1e3;
            let what = format!("{}: calibration", direction_name(direction));
            let of = format!("{calibration:?}");
            report(TransferFigure {
                group: "transfers: set-up",
                what,
                value: ms,
                unit: "ms",
                ratio: None,
                of,
            });
        }
        let traffic = Arc::new(Traffic::default());
        let engine = |direction: Direction| {
            let regions = (Region::device(device.clone(), MEMORY), Region::host(host.clone()));
            let (course, calibration) = ((direction, traffic.clone()), calibrations[direction as usize]);
            Engine::open(&gpu, kernels.clone(), course, regions, Config::default(), calibration)
        };
        Ok(Bench {
            engines: [engine(Direction::ToDevice)?, engine(Direction::ToHost)?],
            lanes: [Lane::open(&gpu, &kernels)?, Lane::open(&gpu, &kernels)?],
            report,
            calibrations,
            device,
            host,
            kernels,
            gpu,
            peaks: [0.0; 3],
        })
    }

    fn run(&mut self, layout: &BlockLayout) -> Result<(), DriverError> {
        self.measure_peaks()?;
        for direction in DIRECTIONS {
            for spread in [Spread::HostRun, Spread::Scattered] {
                self.sweep(direction, spread)?;
            }
        }
        self.force()?;
        self.vary()?;
        self.both_ways()?;
        self.beside_compute(layout)
    }

    fn figure(&mut self, group: &'static str, what: String, value: f64, ratio: Option<f64>, of: String) {
        (self.report)(TransferFigure { group, what, value, unit: "GB/s", ratio, of });
    }

    /// Enqueues one contiguous copy from the start of the memories on (from half of them on back to the host).
    fn copy(&mut self, direction: Direction, bytes: usize) -> Result<u64, DriverError> {
        let lane = &mut self.lanes[direction as usize];
        let (device, host) = (self.device.address(), self.host.address());
        let half = (MEMORY / 2) as u64;
        let (to, from) = match direction {
            Direction::ToDevice => (device, host),
            Direction::ToHost => (host + half, device + half),
        };
        // SAFETY: half of either memory, which outlives the copy (3); nothing else is in flight there (4).
        unsafe { lane.stream.copy(to, from, bytes) }?;
        lane.fence.issue(&lane.stream, &self.kernels)
    }

    /// Median time of one contiguous copy, timed as transfers are.
    fn copy_us(&mut self, direction: Direction, bytes: usize) -> Result<f64, DriverError> {
        let mut times = Vec::new();
        for _ in 0..=rounds(bytes) {
            let started = Instant::now();
            let ticket = self.copy(direction, bytes)?;
            self.lanes[direction as usize].spin(ticket)?;
            times.push(elapsed_us(started));
        }
        Ok(median(times.split_off(1)))
    }

    fn measure_peaks(&mut self) -> Result<(), DriverError> {
        const GROUP: &str = "transfers: pinned peaks, copies of 1 GiB";
        for direction in DIRECTIONS {
            let peak = GIB as f64 / self.copy_us(direction, GIB)? / 1e3;
            self.peaks[direction as usize] = peak;
            self.figure(GROUP, direction_name(direction).into(), peak, None, String::new());
        }
        let mut times = Vec::new();
        for _ in 0..5 {
            let started = Instant::now();
            let tickets = [self.copy(Direction::ToDevice, GIB)?, self.copy(Direction::ToHost, GIB)?];
            self.lanes.iter().zip(tickets).try_for_each(|(lane, ticket)| lane.spin(ticket))?;
            times.push(elapsed_us(started));
        }
        self.peaks[2] = 2.0 * GIB as f64 / median(times) / 1e3;
        self.figure(GROUP, "both ways at once".into(), self.peaks[2], None, String::new());
        Ok(())
    }

    /// Blocks that lie as `spread` says, from `base` bytes on in both memories. They span twice their bytes.
    fn moves(&self, spread: Spread, block: usize, count: usize, base: usize) -> Vec<Move> {
        let (device, host) = (shuffled(count, 3), shuffled(count, 5));
        let places = (0..count).map(|at| match spread {
            Spread::Contiguous => (at, at),
            Spread::HostRun => (2 * device[at], at),
            Spread::Scattered => (2 * device[at], 2 * host[at]),
        });
        let address = |memory: u64, slot: usize| memory + (base + slot * block) as u64;
        let (to_device, to_host) = (self.device.address(), self.host.address());
        places
            .map(|(slot, place)| Move {
                device: address(to_device, slot),
                host: address(to_host, place),
                bytes: block,
            })
            .collect()
    }

    fn sweep(&mut self, direction: Direction, spread: Spread) -> Result<(), DriverError> {
        let group = match (direction, spread) {
            (Direction::ToDevice, Spread::Scattered) => {
                "transfers: h2d, both scattered, reach 0.92 of the peak"
            }
            (Direction::ToDevice, _) => "transfers: h2d, host contiguous, reach 0.95 of the peak",
            (Direction::ToHost, Spread::Scattered) => {
                "transfers: d2h, both scattered, reach 0.92 of the peak"
            }
            (Direction::ToHost, _) => "transfers: d2h, host contiguous, reach 0.95 of the peak",
        };
        for (block, count) in SIZES.into_iter().flat_map(|block| COUNTS.map(|count| (block, count))) {
            let bytes = block * count;
            let what = format!("{} × {count}", size_name(block));
            if bytes > TOTAL_MAX {
                self.figure(
                    group,
                    format!("{what}: skipped, over {}", size_name(TOTAL_MAX)),
                    0.0,
                    None,
                    String::new(),
                );
                continue;
            }
            let moves = self.moves(spread, block, count, 0);
            let compared = self.verify(direction, &moves, None)?;
            let copy_us = self.copy_us(direction, bytes)?;
            let engine = &mut self.engines[direction as usize];
            let (us, ways) = transfer_us(engine, moves, None)?;
            let (rate, peak) = (bytes as f64 / us / 1e3, self.peaks[direction as usize]);
            let of = format!(
                "of the peak; {:.2} of one copy ({us:.1} against {copy_us:.1} µs); {ways}; {compared} blocks compared",
                copy_us / us,
            );
            self.figure(group, what, rate, Some(rate / peak), of);
        }
        Ok(())
    }

    /// Each way for all, so that the planned choice can be judged.
    fn force(&mut self) -> Result<(), DriverError> {
        const GROUP: &str = "transfers: each way forced";
        for (direction, spread) in DIRECTIONS.into_iter().flat_map(|direction| {
            [Spread::HostRun, Spread::Scattered, Spread::Contiguous].map(|spread| (direction, spread))
        }) {
            for (block, count) in
                [(4 << 10, 256), (4 << 10, 4096), (64 << 10, 256), (64 << 10, 4096), (1 << 20, 512)]
            {
                let moves = self.moves(spread, block, count, 0);
                for method in [Some(Method::Copies), Some(Method::Staged), Some(Method::Direct), None] {
                    // Thousands of tiny copies say nothing new.
                    if spread == Spread::Scattered
                        && block == 4 << 10
                        && count > 256
                        && method != Some(Method::Direct)
                    {
                        continue;
                    }
                    self.verify(direction, &moves, method)?;
                    let (us, ways) =
                        transfer_us(&mut self.engines[direction as usize], moves.clone(), method)?;
                    let rate = (block * count) as f64 / us / 1e3;
                    let (from_to, size) = (direction_name(direction), size_name(block));
                    let how = method.map_or("planned".into(), |method| format!("{method:?}"));
                    let what = format!("{from_to}, {}, {size} × {count}: {how}", spread.name());
                    let of = format!("of the peak; {us:.1} µs; {ways}");
                    self.figure(GROUP, what, rate, Some(rate / self.peaks[direction as usize]), of);
                }
            }
        }
        Ok(())
    }

    /// Grids, buffers and streams other than the usual ones.
    fn vary(&mut self) -> Result<(), DriverError> {
        const GROUP: &str = "transfers: other set-ups, 256 MiB";
        let usual = Config::default();
        let grids =
            [4, 8, 16, 32, 64, 132].map(|grid| (Method::Direct, Config { direct_grid: grid, ..usual }));
        let staged = [
            usual,
            Config { buffer_bytes: 2 << 20, ..usual },
            Config { buffer_bytes: 8 << 20, ..usual },
            Config { buffers: 4, ..usual },
            Config { staged_grid: 8, ..usual },
            Config { staged_grid: 132, ..usual },
        ];
        let copies = [(Method::Copies, usual)];
        let cases = grids.into_iter().chain(staged.map(|config| (Method::Staged, config))).chain(copies);
        for (direction, (method, config)) in
            DIRECTIONS.into_iter().flat_map(|direction| cases.clone().map(move |case| (direction, case)))
        {
            let regions = (Region::device(self.device.clone(), MEMORY), Region::host(self.host.clone()));
            let (course, calibration) = ((direction, Arc::default()), self.calibrations[direction as usize]);
            let mut engine =
                Engine::open(&self.gpu, self.kernels.clone(), course, regions, config, calibration)?;
            for block in [4 << 10, 256 << 10] {
                if method == Method::Copies && block < 256 << 10 {
                    continue;
                }
                let spread = if method == Method::Staged { Spread::HostRun } else { Spread::Scattered };
                let moves = self.moves(spread, block, (256 << 20) / block, 0);
                let (us, _) = transfer_us(&mut engine, moves, Some(method))?;
                let rate = (256 << 20) as f64 / us / 1e3;
                let set_up = match method {
                    Method::Direct => format!("grid {}", config.direct_grid),
                    Method::Copies => "in calls of many".to_owned(),
                    Method::Staged => format!(
                        "{} × {}, grid {}",
                        config.buffers,
                        size_name(config.buffer_bytes),
                        config.staged_grid
                    ),
                };
                let what =
                    format!("{}, {}: {method:?}, {set_up}", direction_name(direction), size_name(block));
                let ratio = rate / self.peaks[direction as usize];
                self.figure(GROUP, what, rate, Some(ratio), "of the peak".into());
            }
        }
        Ok(())
    }

    fn both_ways(&mut self) -> Result<(), DriverError> {
        const GROUP: &str = "transfers: both ways at once, 1 GiB each, reach 83 GB/s";
        for (spread, block) in [Spread::HostRun, Spread::Scattered]
            .into_iter()
            .flat_map(|spread| [4 << 10, 64 << 10, 1 << 20].map(|block| (spread, block)))
        {
            let (rate, of) = self.both_ways_rate(None, spread, block)?;
            let what = format!("{}, {}", spread.name(), size_name(block));
            self.figure(GROUP, what, rate, Some(rate / self.peaks[2]), of);
        }
        for crowded_grid in [8, 32] {
            let (traffic, config) =
                (Arc::new(Traffic::default()), Config { crowded_grid, ..Config::default() });
            let open = |direction: Direction| {
                let (course, calibration) =
                    ((direction, traffic.clone()), self.calibrations[direction as usize]);
                let regions = (Region::device(self.device.clone(), MEMORY), Region::host(self.host.clone()));
                Engine::open(&self.gpu, self.kernels.clone(), course, regions, config, calibration)
            };
            let mut engines = [open(Direction::ToDevice)?, open(Direction::ToHost)?];
            let (rate, of) = self.both_ways_rate(Some(&mut engines), Spread::Scattered, 4 << 10)?;
            let what = format!("both scattered, 4 KiB: grid {crowded_grid}");
            self.figure(GROUP, what, rate, Some(rate / self.peaks[2]), of);
        }
        Ok(())
    }

    /// By the bench's engines unless others are given.
    fn both_ways_rate(
        &mut self,
        others: Option<&mut [Engine; 2]>,
        spread: Spread,
        block: usize,
    ) -> Result<(f64, String), DriverError> {
        let (mut times, mut host_us, mut ways) = (Vec::new(), 0.0, [String::new(), String::new()]);
        let lists = [0, MEMORY / 2].map(|base| self.moves(spread, block, GIB / block, base));
        let engines = others.unwrap_or(&mut self.engines);
        for _ in 0..4 {
            let lists = lists.clone();
            let (started, mut done) = (Instant::now(), [Vec::new(), Vec::new()]);
            for (engine, moves) in engines.iter_mut().zip(lists) {
                submit(engine, moves, None, None);
            }
            host_us = elapsed_us(started);
            while !engines.iter().all(Engine::is_idle) {
                let polled = Instant::now();
                for (engine, done) in engines.iter_mut().zip(&mut done) {
                    engine.poll(done)?;
                }
                // Shorter ones have enqueued nothing.
                host_us += Some(elapsed_us(polled)).filter(|us| *us > 5.0).unwrap_or(0.0);
                give_up_after(started)?;
            }
            times.push(elapsed_us(started));
            ways = done.map(|done| ways_of(&done));
        }
        let us = median(times.split_off(1));
        let [h2d, d2h] = ways;
        let of = format!(
            "of plain copies both ways; h2d {h2d}, d2h {d2h}; the host was busy {:.0} %",
            100.0 * host_us / us
        );
        Ok((2.0 * GIB as f64 / us / 1e3, of))
    }

    /// Transfers beside seal kernels that take about as long.
    fn beside_compute(&mut self, layout: &BlockLayout) -> Result<(), DriverError> {
        const GROUP: &str = "transfers: beside seal kernels, reach 1.05 of the longer one";
        const BLOCKS: usize = 4096;
        const TRANSFER: usize = 512 << 20;
        let sealing = Sealing::new(&self.gpu, layout, BLOCKS)?;
        let once = 32;
        let seal_us = self.compute_us(&sealing, once, None)?.0 / f64::from(once);
        for (direction, spread, block, share) in DIRECTIONS.into_iter().flat_map(|direction| {
            [
                (direction, Spread::HostRun, 64 << 10, 1.0),
                (direction, Spread::Scattered, 64 << 10, 1.0),
                (direction, Spread::Scattered, 4 << 10, 1.0),
                (direction, Spread::HostRun, 64 << 10, 0.5),
                (direction, Spread::HostRun, 64 << 10, 2.0),
                (direction, Spread::Scattered, 64 << 10, 2.0),
            ]
        }) {
            let moves = self.moves(spread, block, TRANSFER / block, 0);
            let (alone_us, ways) = transfer_us(&mut self.engines[direction as usize], moves.clone(), None)?;
            let launches = (share * alone_us / seal_us).round().max(1.0) as u32;
            let compute_us = self.compute_us(&sealing, launches, None)?.0;
            let (mut both, mut own) = (Vec::new(), (0.0, 0.0));
            for _ in 0..3 {
                let (compute, transfer) =
                    self.compute_us(&sealing, launches, Some((direction, moves.clone())))?;
                both.push(compute.max(transfer));
                own = (compute, transfer);
            }
            let (both_us, longer) = (median(both), alone_us.max(compute_us));
            let what = format!("{}, {}, {}", direction_name(direction), spread.name(), size_name(block));
            let of = format!(
                "of the longer one; transfer {alone_us:.0} alone, {:.0} beside; compute {compute_us:.0} alone, {:.0} beside; {ways}",
                own.1, own.0
            );
            let (value, ratio) = (both_us, Some(both_us / longer));
            (self.report)(TransferFigure { group: GROUP, what, value, unit: "µs", ratio, of });
        }
        Ok(())
    }

    /// When `launches` seal kernels, and a transfer beside them, are done. Compute has a thread of its own, as in a server.
    fn compute_us(
        &mut self,
        sealing: &Sealing,
        launches: u32,
        beside: Option<(Direction, Vec<Move>)>,
    ) -> Result<(f64, f64), DriverError> {
        let Bench { lanes: [lane, _], engines, kernels, gpu, .. } = self;
        let (ready, mut transfer_us) = (Barrier::new(2), 0.0);
        std::thread::scope(|scope| {
            let compute = scope.spawn(|| {
                gpu.make_current()?;
                ready.wait();
                let started = Instant::now();
                for _ in 0..launches {
                    sealing.launch(&lane.stream, kernels)?;
                }
                let ticket = lane.fence.issue(&lane.stream, kernels)?;
                lane.spin(ticket).map(|()| elapsed_us(started))
            });
            ready.wait();
            if let Some((direction, moves)) = beside {
                let (engine, started) = (&mut engines[direction as usize], Instant::now());
                submit(engine, moves, None, None);
                engine.finish(&mut Vec::new())?;
                transfer_us = elapsed_us(started);
            }
            let compute_us =
                compute.join().map_err(|_| failed("no compute", "its thread panicked".into()))?;
            Ok((compute_us?, transfer_us))
        })
    }

    /// Runs a transfer over memory that holds something else, and compares what arrived. Returns the blocks compared.
    fn verify(
        &mut self,
        direction: Direction,
        moves: &[Move],
        method: Option<Method>,
    ) -> Result<usize, DriverError> {
        const BLOCKS: usize = 256;
        let span = moves.iter().map(|item| (item.device - self.device.address()) as usize + item.bytes).max();
        let span = span.unwrap_or(0);
        let step = moves.len().div_ceil(BLOCKS).max(1);
        let sample = || moves.iter().step_by(step).chain(moves.last());
        let event = Arc::new(Event::new(&self.gpu)?);
        match direction {
            Direction::ToDevice => {
                // SAFETY: in bounds of memory that nothing in flight uses (3, 4).
                check("cuMemsetD8", unsafe { result::memset_d8_sync(self.device.address(), 0x5A, span) })?;
                check("cuCtxSynchronize", result::ctx::synchronize())?;
            }
            Direction::ToHost => {
                let (stream, host) = (&self.lanes[0].stream, self.host.address());
                // SAFETY: as above.
                unsafe { stream.copy(self.device.address(), host, span) }?;
                stream.synchronize()?;
                for item in sample() {
                    self.host_bytes(item).fill(0xA5);
                }
            }
        }
        event.record(self.lanes[0].stream.raw())?;
        let engine = &mut self.engines[direction as usize];
        submit(engine, moves.to_vec(), Some(event), method);
        engine.finish(&mut Vec::new())?;
        let (mut found, mut compared) = (Vec::new(), 0);
        for item in sample() {
            found.resize(item.bytes, 0);
            self.device.read((item.device - self.device.address()) as usize, &mut found)?;
            if found != self.host_bytes(item) {
                return Err(failed("other bytes arrived", format!("{direction:?}, {method:?}: {item:?}")));
            }
            compared += 1;
        }
        Ok(compared)
    }

    /// The host's side of a move.
    fn host_bytes(&mut self, item: &Move) -> &mut [u8] {
        let at = (item.host - self.host.address()) as usize;
        assert!(at + item.bytes <= MEMORY, "{at}+{} of the host's memory", item.bytes);
        // SAFETY: in bounds and plain bytes (3, 8); nothing is in flight while it is looked at (6).
        unsafe { std::slice::from_raw_parts_mut(self.host.base().as_ptr().add(at), item.bytes) }
    }
}
