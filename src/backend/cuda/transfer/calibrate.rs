//! What the ways cost on this machine: medians of a few short transfers by each, some 40 ms in all.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::super::driver::{DeviceMemory, DriverError, Gpu, PinnedMemory};
use super::super::kernels::Kernels;
use super::engine::{Engine, Region, Transfer};
use super::paths::Config;
use super::plan::{Calibration, Cost, Direction, Method, Move};

/// Bytes of the long and of the shorter probe: the difference has no start in it.
const LONG: usize = 64 << 20;
const SHORT: usize = 16 << 20;
const ROUNDS: usize = 5;
const SMALL_BLOCK: usize = 4 << 10;

/// What the ways cost between this GPU and the host, measured once for all caches of the process.
pub(super) fn known(
    gpu: &Arc<Gpu>,
    kernels: &Arc<Kernels>,
    direction: Direction,
    config: Config,
) -> Result<Calibration, DriverError> {
    static KNOWN: Mutex<Vec<(usize, Direction, Calibration)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let is_it =
        |(ordinal, of, _): &&(usize, Direction, Calibration)| (*ordinal, *of) == (gpu.ordinal(), direction);
    if let Some((.., calibration)) = known.iter().find(is_it) {
        return Ok(*calibration);
    }
    let calibration = measure(gpu, kernels, direction, config)?;
    tracing::debug!(target: "kv_cache::cuda", gpu = gpu.ordinal(), ?direction, ?calibration, "transfers calibrated");
    known.push((gpu.ordinal(), direction, calibration));
    Ok(calibration)
}

/// Measures the ways in one direction, on memory of its own.
pub(super) fn measure(
    gpu: &Arc<Gpu>,
    kernels: &Arc<Kernels>,
    direction: Direction,
    config: Config,
) -> Result<Calibration, DriverError> {
    let device = Arc::new(DeviceMemory::zeroed(gpu, LONG)?);
    let host = Arc::new(PinnedMemory::zeroed(gpu, LONG)?);
    let (device_at, host_at) = (device.address(), host.address());
    let regions = (Region::device(device, LONG), Region::host(host));
    let mut engine = Engine::open(gpu, kernels.clone(), direction, regions, config, Calibration::TYPICAL)?;
    // Slots in reverse: contiguous on the host, and never on both sides.
    let mut probe = |method, block: usize, blocks: usize| {
        let place = |at: usize| Move {
            device: device_at + ((blocks - 1 - at) * block) as u64,
            host: host_at + (at * block) as u64,
            bytes: block,
        };
        time_us(&mut engine, method, (0..blocks).map(place).collect())
    };
    let mut cost = |method, block: usize| -> Result<Cost, DriverError> {
        let short_us = probe(method, block, SHORT / block)?;
        let long_us = probe(method, block, LONG / block)?;
        // A clock that ran backwards would divide by nothing.
        let us_per_byte = ((long_us - short_us) / (LONG - SHORT) as f64).max(1e-7);
        let bytes_us = |bytes: usize| bytes as f64 * us_per_byte;
        let (one_us, many_us) = (probe(method, SMALL_BLOCK, 1)?, probe(method, SMALL_BLOCK, 128)?);
        let small_us = ((many_us - one_us) / 127.0).max(0.0);
        let (start_us, item_us) = match method {
            Method::Copies => ((one_us - small_us).max(0.0), small_us),
            Method::Direct => (one_us, (small_us - bytes_us(SMALL_BLOCK)).max(0.0)),
            // One copy here: what further ones cost is measured above.
            Method::Staged => ((short_us - bytes_us(SHORT)).max(one_us), 0.0),
        };
        Ok(Cost { start_us, item_us, gb_per_s: 1e-3 / us_per_byte })
    };
    let copies = cost(Method::Copies, 2 << 20)?;
    let staged = Cost { item_us: copies.item_us, ..cost(Method::Staged, 64 << 10)? };
    let direct = cost(Method::Direct, 64 << 10)?;
    Ok(Calibration([copies, staged, direct]))
}

/// Median time of a transfer, from handing it over until it is seen to be done.
fn time_us(engine: &mut Engine, method: Method, mut moves: Vec<Move>) -> Result<f64, DriverError> {
    let (mut times, mut done) = (Vec::with_capacity(ROUNDS), Vec::new());
    for round in 0..=ROUNDS {
        let started = Instant::now();
        let transfer = Transfer { moves, after: None, method: Some(method) };
        engine.submit(transfer).map_err(|error| DriverError::Call {
            call: "calibrating",
            name: "out of bounds".into(),
            text: error.to_string(),
        })?;
        engine.finish(&mut done)?;
        // The first round warms up.
        if round > 0 {
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
        moves = done.pop().map(|finished| finished.moves).unwrap_or_default();
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}
