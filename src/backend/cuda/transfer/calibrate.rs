//! What the ways cost on this machine: lower quartiles of a few short transfers by each, some 100 ms in all, memory included.

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
/// Blocks that copies take as long for as for any smaller ones, and blocks that hide it.
const LEAST_BLOCK: usize = 32 << 10;
const HIDING_BLOCK: usize = 128 << 10;

/// Times so many blocks of so many bytes by a way, in microseconds.
type Probe<'a> = dyn FnMut(Method, usize, usize) -> Result<f64, DriverError> + 'a;

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
    let course = (direction, Arc::default());
    let mut engine = Engine::open(gpu, kernels.clone(), course, regions, config, Calibration::TYPICAL)?;
    // Slots in reverse: contiguous on the host, and never on both sides.
    let probe: &mut Probe<'_> = &mut |method, block, blocks| {
        let place = |at: usize| Move {
            device: device_at + ((blocks - 1 - at) * block) as u64,
            host: host_at + (at * block) as u64,
            bytes: block,
        };
        time_us(&mut engine, method, (0..blocks).map(place).collect())
    };
    // What each of many more adds has no start in it. A clock that ran backwards would make it negative.
    let each_us = |probe: &mut Probe<'_>, method, block: usize, counts: [usize; 2]| {
        let [few, many] = counts;
        let (few_us, many_us) = (probe(method, block, few)?, probe(method, block, many)?);
        Ok::<f64, DriverError>(((many_us - few_us) / (many - few) as f64).max(0.0))
    };
    let mut cost = |method, block: usize| -> Result<Cost, DriverError> {
        let of_block_us = each_us(probe, method, block, [SHORT / block, LONG / block])?;
        let byte_us = (of_block_us / block as f64).max(1e-7);
        let beside = |us: f64, bytes: usize| (us - bytes as f64 * byte_us).max(0.0);
        let one_us = probe(method, SMALL_BLOCK, 1)?;
        Ok(match method {
            Method::Copies => {
                let least_us = each_us(probe, method, LEAST_BLOCK, [64, 512])?;
                let hiding_us = each_us(probe, method, HIDING_BLOCK, [64, 512])?;
                // Of the transfer for which it decides: short, of the smallest blocks for which copies pay in a long one.
                let small_us =
                    (LEAST_BLOCK as f64 * byte_us * 2.0 + beside(hiding_us, HIDING_BLOCK)).max(least_us);
                let count = SHORT / (2 * LEAST_BLOCK);
                let many_us = probe(method, 2 * LEAST_BLOCK, count)? - count as f64 * small_us - one_us;
                Cost {
                    start_us: one_us,
                    many_us: many_us.max(0.0),
                    item_us: beside(hiding_us, HIDING_BLOCK),
                    least_us,
                    byte_us,
                }
            }
            Method::Direct => {
                let small_us = each_us(probe, method, SMALL_BLOCK, [1, 128])?;
                Cost { start_us: one_us, item_us: beside(small_us, SMALL_BLOCK), ..Cost::of_bytes(byte_us) }
            }
            // One copy here: what further ones cost was measured for copies.
            Method::Staged => {
                let short_us = probe(method, block, SHORT / block)?;
                Cost { start_us: beside(short_us, SHORT).max(one_us), ..Cost::of_bytes(byte_us) }
            }
        })
    };
    let copies = cost(Method::Copies, 2 << 20)?;
    // Its copies are like others, and a kernel cannot make their bytes cheaper: less is noise.
    let staged = cost(Method::Staged, 64 << 10)?;
    let (start_us, byte_us) = (staged.start_us, staged.byte_us.max(copies.byte_us));
    let staged = Cost { start_us, byte_us, ..copies };
    let direct = cost(Method::Direct, 64 << 10)?;
    Ok(Calibration([copies, staged, direct]))
}

/// Time of a transfer, from handing it over until it is seen to be done: the lower quartile, since neighbours on the bus only add.
fn time_us(engine: &mut Engine, method: Method, mut moves: Vec<Move>) -> Result<f64, DriverError> {
    let (mut times, mut done) = (Vec::with_capacity(ROUNDS), Vec::new());
    let bytes = moves.iter().map(|item| item.bytes).sum();
    for round in 0..=ROUNDS {
        let started = Instant::now();
        engine.submit(Transfer { moves, bytes, after: None, method: Some(method) });
        engine.finish(&mut done)?;
        // The first round warms up.
        if round > 0 {
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
        moves = done.pop().map(|finished| finished.moves).unwrap_or_default();
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 4])
}
