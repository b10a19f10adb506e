//! How fast the kernels are on this GPU, beside its own copies in the same run. `examples/gpu_bench` prints it.

use std::sync::Arc;

use cudarc::driver::{result, sys};
use half::{bf16, f16};
use kv_cache_actors::geometry::{BlockLayout, ElementType, Geometry};
use serde::Serialize;

use super::abi;
use super::driver::{DeviceMemory, DriverError, Gpu, PinnedMemory, Stream, check};
use super::kernels::{Descriptors, Kernels, NearDescriptors};
use crate::error::BuildError;
use crate::key_means::Centres;
use crate::{BlockFormat, Format, KeyMeansBuilder};

/// Tokens of the sequences whose blocks are measured.
const SEQUENCE_TOKENS: u32 = 1 << 15;

/// Bytes moved in a time.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Figure {
    /// What was done.
    pub what: String,
    /// Bytes read and written.
    pub bytes: u64,
    /// Median over the rounds.
    pub median_us: f64,
    /// Bytes over the median.
    pub gb_per_s: f64,
}

impl Figure {
    pub(super) fn new(what: impl Into<String>, bytes: u64, mut times_us: Vec<f64>) -> Self {
        times_us.sort_by(f64::total_cmp);
        let median_us = times_us[times_us.len() / 2];
        Figure { what: what.into(), bytes, median_us, gb_per_s: bytes as f64 / median_us / 1e3 }
    }
}

/// A pair of events around work on a stream.
pub(super) struct Clock([sys::CUevent; 2]);

impl Clock {
    pub(super) fn new() -> Result<Clock, DriverError> {
        let event = || check("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Clock([event()?, event()?]))
    }

    /// Microseconds that the device needs for `work`.
    pub(super) fn time_us(
        &self,
        stream: &Stream,
        work: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<f64, DriverError> {
        let [start, end] = self.0;
        // SAFETY: events and stream live (1).
        check("cuEventRecord", unsafe { result::event::record(start, stream.raw()) })?;
        work()?;
        // SAFETY: as above.
        check("cuEventRecord", unsafe { result::event::record(end, stream.raw()) })?;
        stream.synchronize()?;
        // SAFETY: as above; both were recorded and reached.
        check("cuEventElapsedTime", unsafe { result::event::elapsed(start, end) })
            .map(|ms| f64::from(ms) * 1e3)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        for event in self.0 {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

/// Seals, decodes and gathers `tokens` tokens of `geometry` in each of `formats` on GPU `ordinal`, `rounds` times each, beside copies of
/// 512 MiB. If its keys rotate, sealed ones are differences from means, of sequences of 32,768 tokens.
///
/// The data is random and larger than the GPU's caches if `tokens` is; every round goes over all of it. Descriptors lie in page-locked host
/// memory, as those of a cache do.
///
/// # Errors
/// [`BuildError::Device`]: there is no such GPU, or not enough memory on it.
pub fn kernel_figures(
    ordinal: usize,
    geometry: &Geometry,
    formats: &[Format],
    tokens: usize,
    rounds: usize,
) -> Result<Vec<Figure>, BuildError> {
    let layout = geometry.layout()?;
    let failed = |reason: String| BuildError::Device { device: format!("GPU {ordinal}"), reason };
    let centres =
        geometry.groups[0].rope.is_some().then(|| some_centres(geometry)).transpose().map_err(failed)?;
    measure(ordinal, &layout, centres.as_ref(), formats, tokens, rounds.max(1))
        .map_err(|error| failed(error.to_string()))
}

/// Centres of keys of which some channels are far from zero, as those of models with a bias are.
fn some_centres(geometry: &Geometry) -> Result<Centres, String> {
    let group = &geometry.groups[0];
    let mut means = KeyMeansBuilder::new(geometry).map_err(|error| error.to_string())?;
    let keys: Vec<f32> =
        (0..group.kv_heads * group.key_dim).map(|at| (at % 23) as f32 / 23.0 - 0.5).collect();
    (0..group.layers).for_each(|layer| means.add(layer, 1, &keys));
    let means = means.finish().map_err(|error| error.to_string())?;
    Centres::new(&means, geometry, SEQUENCE_TOKENS)
}

fn measure(
    ordinal: usize,
    layout: &BlockLayout,
    centres: Option<&Centres>,
    formats: &[Format],
    tokens: usize,
    rounds: usize,
) -> Result<Vec<Figure>, DriverError> {
    let gpu = Gpu::shared(ordinal)?;
    let stream = Stream::new(&gpu)?;
    let clock = Clock::new()?;
    let repeat = |what: String, bytes, work: &dyn Fn() -> Result<(), DriverError>| {
        work()?;
        let times: Result<Vec<f64>, DriverError> =
            (0..rounds).map(|_| clock.time_us(&stream, work)).collect();
        Ok(Figure::new(what, bytes, times?))
    };
    let mut figures = Vec::new();
    {
        const COPY_BYTES: usize = 512 << 20;
        let (from, to) = (random(&gpu, layout.element, COPY_BYTES)?, DeviceMemory::zeroed(&gpu, COPY_BYTES)?);
        figures.push(repeat("device copy".into(), 2 * COPY_BYTES as u64, &|| {
            // SAFETY: two allocations of that size, which outlive the copy.
            unsafe { stream.copy(to.address(), from.address(), COPY_BYTES) }
        })?);
    }
    let blocks = tokens.div_ceil(layout.block_tokens);
    let raw_bytes = layout.raw_bytes();
    let raw = random(&gpu, layout.element, blocks * raw_bytes)?;
    let decoded = DeviceMemory::zeroed(&gpu, blocks * raw_bytes)?;
    let flag = PinnedMemory::zeroed(&gpu, 64)?;
    let near = NearDescriptors::new(&gpu)?;
    let at = |memory: &DeviceMemory, block: usize, bytes: usize| memory.address() + (block * bytes) as u64;
    for &format in formats.iter().filter(|format| **format != Format::Raw) {
        let block_format = BlockFormat::from(format);
        let kernels = Kernels::load(&gpu, layout, block_format, centres)?;
        let format = if centres.is_some() { format!("{format}+rc") } else { format.to_string() };
        let index = |block: usize| (block % (SEQUENCE_TOKENS as usize / layout.block_tokens)) as u64;
        let sealed_bytes = block_format.block_bytes(layout).next_multiple_of(128);
        let sealed = DeviceMemory::zeroed(&gpu, blocks * sealed_bytes)?;
        let steps = |from: (&DeviceMemory, usize), to: (&DeviceMemory, usize), flag| {
            let steps: Vec<abi::Convert> = (0..blocks)
                .map(|block| abi::Convert {
                    from: at(from.0, block, from.1),
                    to: at(to.0, block, to.1),
                    index: index(block),
                    flag,
                })
                .collect();
            in_host_memory(&gpu, &steps)
        };
        let seals = steps((&raw, raw_bytes), (&sealed, sealed_bytes), flag.address())?;
        let reopens = steps((&sealed, sealed_bytes), (&decoded, raw_bytes), 0)?;
        let reads: Vec<abi::Read> = (0..blocks * layout.layers)
            .map(|at_layer| {
                let (block, layer) = (at_layer / layout.layers, at_layer % layout.layers);
                let to = at(&decoded, block, raw_bytes) + (layer * layout.layer_bytes()) as u64;
                abi::Read {
                    slot: [at(&sealed, block, sealed_bytes); 2],
                    output: [to, to + (layout.layer_bytes() / 2) as u64],
                    layer: layer as u32,
                    first_token: 0,
                    tokens: layout.block_tokens as u32,
                    raw: 0,
                    index: index(block),
                }
            })
            .collect();
        let reads = in_host_memory(&gpu, &reads)?;
        let of = |memory: &PinnedMemory, count| Descriptors { address: memory.address(), count };
        let converts = |memory: &PinnedMemory| {
            // SAFETY: host memory that outlives the kernels; all of them are on this stream.
            let by = unsafe { near.bring(&stream, memory.address(), memory.bytes(), layout.layers) }?;
            Ok::<_, DriverError>(of(memory, blocks).moved(by))
        };
        let moved = (blocks * (raw_bytes + block_format.block_bytes(layout))) as u64;
        // SAFETY: descriptors of allocations that outlive the kernels, as sized above (3).
        let seal = || unsafe { kernels.seal(&stream, 0, converts(&seals)?) };
        figures.push(repeat(format!("seal {format}"), moved, &seal)?);
        // SAFETY: as above.
        let reopen = || unsafe { kernels.reopen(&stream, 0, converts(&reopens)?) };
        figures.push(repeat(format!("decode {format}, whole blocks"), moved, &reopen)?);
        if layout.key_dim == layout.value_dim {
            let count = blocks * layout.layers;
            // SAFETY: as above; keys and values take half of a layer each.
            let work = || unsafe { kernels.read(&stream, 0, of(&reads, count), layout.block_tokens) };
            figures.push(repeat(
                format!("decode {format} and gather to [tokens, heads, dim]"),
                moved,
                &work,
            )?);
        }
    }
    Ok(figures)
}

/// What calls of the driver cost this thread, in microseconds: what a launch is made of.
///
/// # Errors
/// [`BuildError::Device`]: there is no such GPU.
pub fn driver_call_costs(ordinal: usize) -> Result<Vec<(&'static str, f64)>, BuildError> {
    call_costs(ordinal)
        .map_err(|error| BuildError::Device { device: format!("GPU {ordinal}"), reason: error.to_string() })
}

fn call_costs(ordinal: usize) -> Result<Vec<(&'static str, f64)>, DriverError> {
    const ROUNDS: usize = 501;
    let gpu = Gpu::shared(ordinal)?;
    let (stream, other) = (Stream::new(&gpu)?, Stream::new(&gpu)?);
    let layout = Geometry::new(1, 1, 64, ElementType::F16).layout().map_err(|error| DriverError::Call {
        call: "measuring",
        name: "the geometry".into(),
        text: error.to_string(),
    })?;
    let kernels = Kernels::load(&gpu, &layout, BlockFormat::RAW, None)?;
    let mut fence = super::fence::Fence::new(&stream, &kernels)?;
    let word = PinnedMemory::zeroed(&gpu, 64)?;
    let event = super::driver::Event::new(&gpu)?;
    let mut costs = Vec::new();
    let mut cost = |what, work: &mut dyn FnMut() -> Result<(), DriverError>| -> Result<(), DriverError> {
        let mut times = Vec::new();
        for round in 0..ROUNDS {
            let started = std::time::Instant::now();
            work()?;
            times.push(started.elapsed().as_secs_f64() * 1e6);
            if round % 16 == 0 {
                stream.synchronize()?;
            }
        }
        stream.synchronize()?;
        times.sort_by(f64::total_cmp);
        costs.push((what, times[ROUNDS / 2]));
        Ok(())
    };
    cost("launch a kernel of one thread", &mut || kernels.signal(&stream, word.address(), 1))?;
    cost("have the stream write a word", &mut || fence.issue(&stream, &kernels).map(drop))?;
    cost("create and destroy an event", &mut || super::driver::Event::new(&gpu).map(drop))?;
    cost("record an event", &mut || event.record(stream.raw()))?;
    event.record(other.raw())?;
    // SAFETY: the event outlives the wait.
    cost("have the stream wait for an event", &mut || unsafe { stream.wait(event.raw()) })?;
    cost("make the context current", &mut || gpu.make_current())?;
    cost("launch a kernel, and see its word", &mut || {
        kernels.signal(&stream, word.address(), 1)?;
        let ticket = fence.issue(&stream, &kernels)?;
        while fence.reached() < ticket {
            std::hint::spin_loop();
        }
        Ok(())
    })?;
    Ok(costs)
}

/// Elements that are random and finite.
pub(super) fn random(
    gpu: &Arc<Gpu>,
    element: ElementType,
    bytes: usize,
) -> Result<DeviceMemory, DriverError> {
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        // The sum of a few uniform numbers is about normal.
        let uniform = |shift: u32| (seed >> shift & 0xFFFF) as f32 / 65536.0 - 0.5;
        2.0 * (uniform(16) + uniform(32) + uniform(48))
    };
    const PATTERN_BYTES: usize = 1 << 20;
    let mut pattern = Vec::with_capacity(PATTERN_BYTES);
    while pattern.len() < PATTERN_BYTES {
        match element {
            ElementType::F16 => pattern.extend(f16::from_f32(next()).to_le_bytes()),
            ElementType::Bf16 => pattern.extend(bf16::from_f32(next()).to_le_bytes()),
            ElementType::F32 => pattern.extend(next().to_le_bytes()),
        }
    }
    let memory = DeviceMemory::zeroed(gpu, bytes)?;
    for at in (0..bytes).step_by(PATTERN_BYTES) {
        memory.write(at, &pattern[..PATTERN_BYTES.min(bytes - at)])?;
    }
    Ok(memory)
}

pub(super) fn upload<T: bytemuck::Pod>(gpu: &Arc<Gpu>, values: &[T]) -> Result<DeviceMemory, DriverError> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let memory = DeviceMemory::zeroed(gpu, bytes.len())?;
    memory.write(0, bytes)?;
    Ok(memory)
}

fn in_host_memory<T: bytemuck::Pod>(gpu: &Arc<Gpu>, values: &[T]) -> Result<PinnedMemory, DriverError> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let memory = PinnedMemory::zeroed(gpu, bytes.len())?;
    // SAFETY: new memory of that many bytes, which the device does not know yet (4).
    unsafe { memory.base().as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    Ok(memory)
}
