//! The kernels, loaded from the PTX that the crate carries, and their typed launchers.
//!
//! A kernel that cannot be loaded is replaced by its plain twin, which gives the same bytes; a warning says so once.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kv_cache_actors::format::{BlockFormat, Format, FormatLayout, Ladder};
use kv_cache_actors::geometry::{BlockLayout, ElementType, Plane};

use super::abi;
use super::driver::{DeviceMemory, DriverError, Function, Gpu, Module, Stream};
use crate::RopeLayout;
use crate::key_means::Centres;

/// Made by `kernels/build.py` from the sources beside them: what knows no format, and a module for each format.
const CACHE: &str = include_str!("kernels/cache.ptx");
/// Keys as they are, and keys as differences from centres.
const INT8: [&str; 2] = [include_str!("kernels/int8.ptx"), include_str!("kernels/int8_rc.ptx")];
const FP8: [&str; 2] = [include_str!("kernels/fp8.ptx"), include_str!("kernels/fp8_rc.ptx")];
const R4: [&str; 2] = [include_str!("kernels/r4.ptx"), include_str!("kernels/r4_rc.ptx")];
const R3: [&str; 2] = [include_str!("kernels/r3.ptx"), include_str!("kernels/r3_rc.ptx")];
const R2: [&str; 2] = [include_str!("kernels/r2.ptx"), include_str!("kernels/r2_rc.ptx")];
const INT4: [&str; 2] = [include_str!("kernels/int4.ptx"), include_str!("kernels/int4_rc.ptx")];
const INT2: [&str; 2] = [include_str!("kernels/int2.ptx"), include_str!("kernels/int2_rc.ptx")];

/// The module of a format, if it has any kernels: blocks that stay raw are read by `CACHE`.
///
/// # Errors
/// A format of a newer core, which has none yet.
fn source(format: Format, centred: bool) -> Result<Option<&'static str>, DriverError> {
    let both = match format {
        Format::Raw => return Ok(None),
        Format::Int8 => INT8,
        Format::Fp8 => FP8,
        Format::R4 => R4,
        Format::R3 => R3,
        Format::R2 => R2,
        Format::Int4 => INT4,
        Format::Int2 => INT2,
        other => {
            return Err(DriverError::Call {
                call: "loading kernels",
                name: "no module".into(),
                text: format!("{other} has no kernels"),
            });
        }
    };
    Ok(Some(both[usize::from(centred)]))
}

/// Threads of a block of the kernels that convert whole planes.
const CONVERT_THREADS: u32 = 256;
/// The same of the seals of rotated rows, and the rows that each of its warps takes at a time, as in the source. A thread block goes on to
/// rows of other blocks of the cache.
const ROTATED_SEAL_THREADS: u32 = 128;
const ROTATED_SEAL_ROWS: u32 = 32;
/// Threads of a block of `move_blocks`, and the vectors of 16 bytes that each has in flight, as in the source.
const MOVE_THREADS: u32 = 256;
const MOVE_UNROLL: u32 = 4;
/// Threads of a block of `carry_blocks`, and the bytes that each of its warps has in flight, as in the source.
const CARRY_THREADS: u32 = 256;
const CARRY_BYTES: usize = 4096;
/// More thread blocks than this keep every GPU busy.
const ENOUGH_BLOCKS: u32 = 1024;

/// The kernels for one element type, and for the formats of a cache's sealed blocks.
pub(super) struct Kernels {
    block: BlockLayout,
    /// By rung: at least one.
    sealed: Vec<Sealed>,
    append: Function,
    move_blocks: Function,
    carry_blocks: Function,
    signal: Function,
    /// The layout has their addresses.
    _tables: Option<Tables>,
    /// The functions are theirs.
    _modules: Vec<Arc<Module>>,
}

/// A format of sealed blocks, and the kernels that know it.
pub(super) struct Sealed {
    pub(super) place: FormatLayout,
    /// What stays raw: see [`FormatLayout::raw_runs`].
    pub(super) raw_runs: Vec<(usize, usize, usize)>,
    /// For keys and values together, or for each: at least one.
    of_planes: Vec<PlaneKernels>,
}

impl Sealed {
    pub(super) fn format(&self) -> BlockFormat {
        self.place.format()
    }
}

/// The kernels that know a format, for the planes that are stored in it.
struct PlaneKernels {
    layout: abi::Layout,
    /// Of a layer: 1 or 2.
    planes: u32,
    /// Thread blocks of its seal that the GPU has room for at once, if these go on from block to block of the cache.
    seals_at_once: Option<u32>,
    /// None for what stays raw.
    seal: Option<Function>,
    reopen: Option<Function>,
    read: Function,
}

/// The tables of [`Centres`] in device memory.
struct Tables {
    at: abi::CentreTables,
    _memory: [DeviceMemory; 4],
}

impl Tables {
    fn upload(gpu: &Arc<Gpu>, centres: &Centres) -> Result<Tables, DriverError> {
        let upload = |bytes: &[u8]| {
            // An empty table, of keys that do not rotate, has an address too.
            let memory = DeviceMemory::zeroed(gpu, bytes.len().max(16))?;
            memory.write(0, bytes)?;
            Ok(memory)
        };
        let [cos, sin] = &centres.token_turns;
        let of_tokens = [cos.as_slice(), sin].concat();
        let in_pair = |pair: usize| (pair..cos.len()).step_by(centres.pairs).map(|at| [cos[at], sin[at]]);
        let of_pairs: Vec<[f32; 2]> = (0..centres.pairs).flat_map(in_pair).collect();
        let memory = [
            upload(bytemuck::cast_slice(&centres.means))?,
            upload(bytemuck::cast_slice(&centres.block_turns))?,
            upload(bytemuck::cast_slice(&of_tokens))?,
            upload(bytemuck::cast_slice(&of_pairs))?,
        ];
        let [means, block_turns, token_turns, pair_turns] = memory.each_ref().map(DeviceMemory::address);
        let (pairs, most) = (centres.pairs as u32, centres.bound());
        let apart = match centres.layout {
            RopeLayout::Interleaved => 1,
            RopeLayout::HalfSplit => pairs,
        };
        let at =
            abi::CentreTables { means, block_turns, token_turns, pair_turns, pairs, apart, most, padding: 0 };
        Ok(Tables { at, _memory: memory })
    }
}

/// `count` descriptors of type `T` at `address`, which the device reaches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptors {
    pub(super) address: u64,
    pub(super) count: usize,
}

/// Device memory for descriptors that many thread blocks share: the host's memory tells them one after the other, a microsecond each.
pub(super) struct NearDescriptors(DeviceMemory);

impl NearDescriptors {
    const BYTES: usize = 1 << 20;
    /// From so many layers on, a copy takes less time than they do.
    const LAYERS: usize = 4;

    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, DriverError> {
        DeviceMemory::zeroed(gpu, Self::BYTES).map(Self)
    }

    /// Copies the `bytes` bytes of descriptors at `address` on the stream, if that is worth it for blocks of so many layers. Gives what
    /// their addresses have to be moved by.
    ///
    /// # Safety
    /// The bytes live and stay as they are until the stream is past the copy; only this stream uses the memory here (4).
    pub(super) unsafe fn bring(
        &self,
        stream: &Stream,
        address: u64,
        bytes: usize,
        layers: usize,
    ) -> Result<u64, DriverError> {
        if layers < Self::LAYERS || bytes == 0 || bytes > Self::BYTES {
            return Ok(0);
        }
        // SAFETY: in bounds (3); passed on.
        unsafe { stream.copy(self.0.address(), address, bytes) }?;
        Ok(self.0.address().wrapping_sub(address))
    }
}

impl Descriptors {
    /// In as many launches as a dimension of a grid asks for.
    fn launches<T>(self) -> impl Iterator<Item = Descriptors> {
        const MOST: usize = 65_535;
        (0..self.count).step_by(MOST).map(move |first| Descriptors {
            address: self.address + (first * size_of::<T>()) as u64,
            count: MOST.min(self.count - first),
        })
    }

    pub(super) fn moved(self, by: u64) -> Self {
        Descriptors { address: self.address.wrapping_add(by), ..self }
    }
}

/// Whether keys are for the kernels of pairs that lie half a row apart (`HALVES_KERNELS` in the sources): all dims turn, halves of rows are a power of
/// two of vectors, and the means of all heads fit into a thread block's shared memory.
fn has_halves(block: &BlockLayout, centres: &abi::CentreTables) -> bool {
    const MEANS_MOST: usize = 4096;
    block.element.bytes() == 2
        && centres.apart != 1
        && 2 * centres.pairs as usize == block.key_dim
        && [32, 64, 128, 256].contains(&block.key_dim)
        && block.block_tokens.is_multiple_of(8)
        && block.kv_heads * block.key_dim <= MEANS_MOST
}

impl Kernels {
    /// Loads the kernels for blocks of `block` that are sealed, and re-encoded, as `formats` says.
    /// Sealed keys are differences from `centres`, if there are any.
    pub(super) fn load(
        gpu: &Arc<Gpu>,
        block: &BlockLayout,
        formats: impl Into<Ladder>,
        centres: Option<&Centres>,
    ) -> Result<Kernels, DriverError> {
        let module =
            |format, centred| source(format, centred)?.map(|source| Self::module(gpu, source)).transpose();
        let mut modules = Vec::new();
        for &format in formats.into().formats() {
            let keys = module(format.keys, centres.is_some())?;
            let values =
                match format.values == format.keys && !(centres.is_some() && format.keys.is_rotated()) {
                    true => keys.clone(),
                    false => module(format.values, false)?,
                };
            modules.push((format, [keys, values]));
        }
        let tables = centres.map(|centres| Tables::upload(gpu, centres)).transpose()?;
        gpu.make_current()?;
        Self::of(Self::module(gpu, CACHE)?, modules, block, tables, gpu.multiprocessors()?)
    }

    /// A module on a GPU, loaded once for all caches that are on it at a time.
    fn module(gpu: &Arc<Gpu>, source: &'static str) -> Result<Arc<Module>, DriverError> {
        /// By the GPU's number and the source's address.
        type Loaded = ((usize, usize), Weak<Module>);
        static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (gpu.ordinal(), source.as_ptr().addr());
        let found = loaded.iter().find(|(of, _)| *of == key);
        if let Some(module) = found.and_then(|(_, module)| module.upgrade()) {
            return Ok(module);
        }
        let module = Arc::new(Module::load(gpu, source)?);
        loaded.retain(|(_, module)| module.strong_count() > 0);
        loaded.push((key, Arc::downgrade(&module)));
        Ok(module)
    }

    fn of(
        cache: Arc<Module>,
        formats: Vec<(BlockFormat, [Option<Arc<Module>>; 2])>,
        block: &BlockLayout,
        tables: Option<Tables>,
        multiprocessors: u32,
    ) -> Result<Kernels, DriverError> {
        let element = match block.element {
            ElementType::F16 => "_f16",
            ElementType::Bf16 => "_bf16",
            ElementType::F32 => "_f32",
        };
        let pick = |module: &Module, kind: &str, name: &str, element: &str| {
            let kernel = format!("{kind}{name}{element}");
            module.function(&kernel).or_else(|error| {
                tracing::warn!(target: "kv_cache::cuda", kernel, %error, "a kernel cannot be loaded: the plain one runs instead");
                module.function(&format!("plain_{name}{element}"))
            })
        };
        let centres = tables.as_ref().map(|tables| tables.at).unwrap_or_default();
        let of_planes = |place: &FormatLayout, planes: &[Plane], module: Option<&Arc<Module>>| {
            let format = if planes == [Plane::Value] { place.format().values } else { place.format().keys };
            let rotated = format.is_rotated();
            let centred = tables.as_ref().filter(|_| planes.contains(&Plane::Key));
            let halves = !rotated && centred.is_some_and(|tables| has_halves(block, &tables.at));
            let function = |module: &Arc<Module>, name: &str| {
                let function = pick(module, if halves { "halves_" } else { "" }, name, element)?;
                // Their plain twins keep a row in shared memory, which leaves room for few blocks otherwise. To put centres back wants a
                // cache for their tables beside it.
                if rotated {
                    let adds_centres = centred.is_some() && name != "seal";
                    function.prefer_shared_memory(if adds_centres { 50 } else { 100 })?;
                }
                Ok::<_, DriverError>(function)
            };
            let seal = module.map(|module| function(module, "seal")).transpose()?;
            let seals_at_once = |seal: Function| {
                Ok::<_, DriverError>(multiprocessors * seal.resident_blocks(ROTATED_SEAL_THREADS)?.max(1))
            };
            Ok::<_, DriverError>(PlaneKernels {
                layout: abi::Layout::new(block, place, planes, centres),
                planes: planes.len() as u32,
                seals_at_once: seal.filter(|_| rotated).map(seals_at_once).transpose()?,
                seal,
                reopen: module.map(|module| function(module, "reopen")).transpose()?,
                read: match module {
                    Some(module) => function(module, "read")?,
                    None => pick(&cache, "", "read_raw", "")?,
                },
            })
        };
        let mut sealed = Vec::new();
        let mut modules = Vec::new();
        for (format, [keys, values]) in formats {
            let place = FormatLayout::new(format, block);
            let raw_runs = if format.is_raw() { Vec::new() } else { place.raw_runs(block).collect() };
            // Seals of rotated rows want planes of one width, and registers that centres would take from values.
            let together = format.keys == format.values
                && (!format.keys.is_rotated() || block.key_dim == block.value_dim && tables.is_none());
            let of_planes = match together {
                true => vec![of_planes(&place, &Plane::BOTH, keys.as_ref())?],
                false => vec![
                    of_planes(&place, &[Plane::Key], keys.as_ref())?,
                    of_planes(&place, &[Plane::Value], values.as_ref())?,
                ],
            };
            sealed.push(Sealed { place, raw_runs, of_planes });
            modules.extend(keys.into_iter().chain(values));
        }
        Ok(Kernels {
            block: *block,
            sealed,
            _tables: tables,
            append: pick(&cache, "", "append", "")?,
            move_blocks: pick(&cache, "", "move_blocks", "")?,
            carry_blocks: pick(&cache, "", "carry_blocks", "")?,
            signal: cache.function("signal")?,
            _modules: modules.into_iter().chain([cache]).collect(),
        })
    }

    /// Vectors of 16 bytes in `tokens` tokens of one plane of one layer.
    fn vectors(&self, tokens: usize) -> u32 {
        let row = self.block.row_bytes(Plane::Key).max(self.block.row_bytes(Plane::Value));
        (tokens * self.block.kv_heads * row).div_ceil(16) as u32
    }

    /// Scatters tokens: `layers` and `tokens` are the most of any descriptor.
    ///
    /// # Safety
    /// The descriptors are [`abi::Append`]s that keep to invariants 3 and 4.
    pub(super) unsafe fn append(
        &self,
        stream: &Stream,
        steps: Descriptors,
        layers: usize,
        tokens: usize,
    ) -> Result<(), DriverError> {
        let threads = self.vectors(tokens).next_multiple_of(32).clamp(32, 256);
        // Appends know no format: any of the layouts does.
        let of = &self.sealed[0].of_planes[0];
        let grid = (steps.count as u32, 2 * layers as u32, 1);
        // SAFETY: passed on.
        unsafe { of.launch(self.append, stream, grid, threads, steps) }
    }

    /// The formats of sealed blocks, by rung.
    pub(super) fn sealed(&self) -> &[Sealed] {
        &self.sealed
    }

    /// Encodes whole blocks to the format of a rung, but for what stays raw.
    ///
    /// # Safety
    /// The descriptors are [`abi::Convert`]s, raw to sealed, that keep to invariants 3 and 4.
    pub(super) unsafe fn seal(
        &self,
        stream: &Stream,
        rung: usize,
        steps: Descriptors,
    ) -> Result<(), DriverError> {
        for of in &self.sealed[rung].of_planes {
            let Some(function) = of.seal else { continue };
            let planes = of.layout.planes;
            for steps in steps.launches::<abi::Convert>() {
                let count = steps.count as u32;
                let (grid, threads) = match of.seals_at_once {
                    None => ((planes, count, 1), CONVERT_THREADS),
                    Some(at_once) => {
                        let rows = (self.block.kv_heads * self.block.block_tokens) as u32;
                        let shares = u64::from(count * planes) * u64::from(rows.div_ceil(ROTATED_SEAL_ROWS));
                        // Its plain twin, and rows of odd widths, have a thread block a plane.
                        let blocks = shares.div_ceil(u64::from(ROTATED_SEAL_THREADS / 32));
                        let blocks = blocks.max((count * planes).into()).min(at_once.into());
                        ((blocks as u32, 1, 1), ROTATED_SEAL_THREADS)
                    }
                };
                // SAFETY: passed on.
                unsafe { of.launch(function, stream, grid, threads, steps) }?;
            }
        }
        Ok(())
    }

    /// Decodes whole blocks in the format of a rung, but for what stays raw.
    ///
    /// # Safety
    /// The descriptors are [`abi::Convert`]s, sealed to raw, that keep to invariants 3 and 4.
    pub(super) unsafe fn reopen(
        &self,
        stream: &Stream,
        rung: usize,
        steps: Descriptors,
    ) -> Result<(), DriverError> {
        for of in &self.sealed[rung].of_planes {
            let Some(function) = of.reopen else { continue };
            for steps in steps.launches::<abi::Convert>() {
                let grid = (of.layout.planes, steps.count as u32, 1);
                // SAFETY: passed on.
                unsafe { of.launch(function, stream, grid, CONVERT_THREADS, steps) }?;
            }
        }
        Ok(())
    }

    /// Gathers and decodes tokens of blocks that are raw, or in the format of a rung; `tokens` is the most of any descriptor.
    ///
    /// # Safety
    /// The descriptors are [`abi::Read`]s that keep to invariants 3 and 4.
    pub(super) unsafe fn read(
        &self,
        stream: &Stream,
        rung: usize,
        steps: Descriptors,
        tokens: usize,
    ) -> Result<(), DriverError> {
        let vectors = self.vectors(tokens);
        let threads = vectors.next_multiple_of(32).clamp(32, 256);
        let parts = vectors.div_ceil(threads * 4).min(ENOUGH_BLOCKS / (2 * steps.count as u32)).max(1);
        for of in &self.sealed[rung].of_planes {
            let grid = (steps.count as u32, of.planes, parts);
            // SAFETY: passed on.
            unsafe { of.launch(of.read, stream, grid, threads, steps) }?;
        }
        Ok(())
    }

    /// Copies or zeroes; `bytes` is the most of any descriptor.
    ///
    /// # Safety
    /// The descriptors are [`abi::Move`]s that keep to invariants 3 and 4.
    pub(super) unsafe fn move_blocks(
        &self,
        stream: &Stream,
        mut steps: Descriptors,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let per_block = (MOVE_THREADS * MOVE_UNROLL * 16) as usize;
        let parts = bytes.div_ceil(per_block).clamp(1, (ENOUGH_BLOCKS as usize / steps.count).max(1)) as u32;
        let grid = (steps.count as u32, parts, 1);
        let mut parameters = [(&raw mut steps.address).cast::<c_void>()];
        // SAFETY: the kernel takes one address; passed on.
        unsafe { self.move_blocks.launch(stream, grid, MOVE_THREADS, &mut parameters) }
    }

    /// Copies with at most `grid` thread blocks, so that the rest of the GPU computes; `bytes` is the most of any descriptor.
    ///
    /// # Safety
    /// The descriptors are [`abi::Move`]s that keep to invariants 3 and 4.
    pub(super) unsafe fn carry_blocks(
        &self,
        stream: &Stream,
        mut steps: Descriptors,
        bytes: usize,
        grid: u32,
    ) -> Result<(), DriverError> {
        let (mut count, mut parts) = (steps.count as u32, bytes.div_ceil(CARRY_BYTES).max(1) as u32);
        let warps = (u64::from(count) * u64::from(parts)).div_ceil(u64::from(CARRY_THREADS / 32));
        let grid = (u64::from(grid).min(warps).max(1) as u32, 1, 1);
        let mut parameters =
            [(&raw mut steps.address).cast::<c_void>(), (&raw mut count).cast(), (&raw mut parts).cast()];
        // SAFETY: the kernel takes an address and two numbers (7); passed on.
        unsafe { self.carry_blocks.launch(stream, grid, CARRY_THREADS, &mut parameters) }
    }

    /// Writes `value` to `address` once everything before it on the stream is done.
    pub(super) fn signal(
        &self,
        stream: &Stream,
        mut address: u64,
        mut value: u64,
    ) -> Result<(), DriverError> {
        let mut parameters = [(&raw mut address).cast::<c_void>(), (&raw mut value).cast()];
        // SAFETY: the kernel takes an address, here of a fence's word (6), and a value.
        unsafe { self.signal.launch(stream, (1, 1, 1), 1, &mut parameters) }
    }
}

impl PlaneKernels {
    /// # Safety
    /// `function` takes a layout and an address of descriptors that keep to invariants 3 and 4, and perhaps how many they are.
    unsafe fn launch(
        &self,
        function: Function,
        stream: &Stream,
        grid: (u32, u32, u32),
        threads: u32,
        mut steps: Descriptors,
    ) -> Result<(), DriverError> {
        let mut layout = self.layout;
        let mut count = steps.count as u32;
        let mut parameters =
            [(&raw mut layout).cast::<c_void>(), (&raw mut steps.address).cast(), (&raw mut count).cast()];
        // SAFETY: the driver copies the parameters before it returns; passed on.
        unsafe { function.launch(stream, grid, threads, &mut parameters) }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use half::{bf16, f16};
    use kv_cache_actors::format::{Format, GROUP};
    use kv_cache_actors::geometry::Geometry;
    use kv_cache_actors::pool::SLOT_ALIGN_BYTES;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::super::driver::usable_gpus;
    use super::super::measure::upload;
    use super::*;
    use crate::backend::cpu::codec::Kernels as Codec;
    use crate::backend::cpu::codec::fp8::to_e4m3;

    /// The seal kernel multiplies where the CPU divides: for f16 that never shows.
    #[test]
    fn the_reciprocal_of_127_gives_the_same_f16_scales() {
        for bits in 0..f16::INFINITY.to_bits() {
            let most = f16::from_bits(bits).to_f32();
            assert_eq!(f16::from_f32(most * 0.007_874_016_f32), f16::from_f32(most / 127.0), "{most}");
        }
    }

    /// For bf16 and f32 it corrects the product once. Exponents only shift what the significand decides: at the floor of a scale
    /// nothing of it is subnormal yet, and the largest is far from infinity.
    #[test]
    fn corrected_reciprocals_give_the_same_f32_scales() {
        // Of int8, fp8, int4 and int2.
        for codes in [127.0f32, 448.0, 7.5, 1.5] {
            let corrected = |most: f32| {
                let near = most * (1.0 / codes);
                near.mul_add(-codes, most).mul_add(1.0 / codes, near)
            };
            let one = 1.0f32.to_bits();
            for significand in 0..1 << 23 {
                let most = f32::from_bits(one + significand);
                assert_eq!(corrected(most).to_bits(), (most / codes).to_bits(), "{most} / {codes}");
            }
            for exponent in 0..255 {
                for significand in [0, 1, 0x2b_cdef, 0x7f_ffff] {
                    let most = f32::from_bits(exponent << 23 | significand);
                    let floor = 2f32.powi(-100);
                    assert_eq!(corrected(most).max(floor), (most / codes).max(floor), "{most:e} / {codes}");
                }
            }
        }
    }

    /// A reciprocal as the kernels make it, from one that may be off by one in the last place.
    fn near_reciprocal(x: f32, off: i32) -> f32 {
        let near = f32::from_bits(x.recip().to_bits().wrapping_add_signed(off));
        (-x).mul_add(near, 1.0).mul_add(near, near)
    }

    /// Codes of `int8` come without a division.
    #[test]
    fn products_with_the_reciprocal_give_the_same_int8_codes() {
        const WHOLE: f32 = 12_582_912.0;
        let code = |rounded: f32| (rounded.to_bits() as u8).cast_signed();
        let check = |x: f32, scale: f32, coded: f32| {
            let exact = (x / scale).round_ties_even();
            assert_eq!(f32::from(code(coded)), exact, "{x:e} / {scale:e}");
        };
        // What is left of an element in a scale, and not: exponents of both only shift it.
        let elements = |most: f32, bits: u32| {
            let one = 1.0f32.to_bits() >> (23 - bits);
            let all = (0..11 << bits).map(move |at| f32::from_bits((one + at) << (23 - bits)) / 8.0);
            all.take_while(move |x| *x <= most)
        };
        for off in [-1, 0, 1] {
            for scale in (0..1 << 10).map(|bits| f32::from_bits(1.0f32.to_bits() + (bits << 13))) {
                let inverse = near_reciprocal(scale, off);
                let most = (127.0 * scale) * (1.0 + 2f32.powi(-11));
                elements(most, 10)
                    .for_each(|x| check(x, scale, x.mul_add(inverse, 1536.0) + (WHOLE - 1536.0)));
            }
            for most in (0..1 << 7).map(|bits| f32::from_bits(0x42fe_0000 + (bits << 16))) {
                let scale = most / 127.0;
                let inverse = near_reciprocal(scale, off);
                elements(most, 7).for_each(|x| {
                    let near = x * inverse;
                    check(x, scale, (-near).mul_add(scale, x).mul_add(inverse, near) + WHOLE);
                });
            }
        }
    }

    /// Codes of `fp8` come by additions.
    #[test]
    fn additions_give_the_same_fp8_codes() {
        let lows = [0, 1, 0x7_ffff, 0x8_0000, 0x8_0001, 0xf_ffff];
        let all = (0x3000_0000u32..0x43f0_0000).step_by(1 << 20).flat_map(|bits| lows.map(|low| bits | low));
        // From 464 on a code would be too large: no scale leaves as much.
        for bits in all.filter(|bits| *bits < 0x43e8_0000) {
            let magnitude = f32::from_bits(bits);
            let far = f32::from_bits((bits & 0x7f80_0000).max(0x3c80_0000) + (20 << 23));
            let code = ((magnitude + far - far) * 2f32.powi(-120)).to_bits() >> 20;
            assert_eq!(code, u32::from(to_e4m3(magnitude)), "{magnitude:e}");
        }
    }

    /// A source without its fast kernels. Plain ones, and `signal`, stay.
    fn without_fast_kernels(source: &str) -> String {
        let mut lines: Vec<String> = Vec::new();
        for line in source.lines() {
            let fast = line.contains(".entry ")
                && !line.contains(".entry plain_")
                && !line.contains(".entry signal");
            lines.push(if fast { line.replace(".entry ", ".entry gone_") } else { line.to_owned() });
        }
        lines.join("\n")
    }

    #[test]
    fn every_fast_kernel_has_a_plain_twin() {
        let names = |text: &str| -> Vec<String> {
            let entries = text.lines().filter_map(|line| line.split(".entry ").nth(1));
            entries.filter_map(|entry| entry.split(['(', ' ']).next()).map(str::to_owned).collect()
        };
        let all = [false, true].into_iter().flat_map(|centred| Format::ALL.map(|format| (format, centred)));
        for source in all.map(|(format, centred)| source(format, centred).unwrap().unwrap_or(CACHE)) {
            let left = names(&without_fast_kernels(source));
            let (halves, fast): (Vec<String>, Vec<String>) = names(source)
                .into_iter()
                .filter(|name| !name.starts_with("plain_") && name != "signal")
                .partition(|name| name.starts_with("halves_"));
            assert!(fast.len() == if source == CACHE { 4 } else { 9 }, "{fast:?}");
            assert!(halves.is_empty() || halves.len() == 6, "{halves:?}");
            for name in fast.iter().chain(&halves) {
                assert!(left.contains(&format!("plain_{}", name.trim_start_matches("halves_"))), "{name}");
                assert!(left.contains(&format!("gone_{name}")) && !left.contains(name), "{name}");
            }
        }
    }

    /// Elements of every size, zeros and the largest among them; calm ones are all about 1.
    fn elements(element: ElementType, count: usize, seed: u64, calm: bool) -> Vec<u8> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut bytes = Vec::with_capacity(count * element.bytes());
        for _ in 0..count {
            let most = match rng.random_range(if calm { 50..400 } else { 0..400 }) {
                0..10 => 0.0,
                10..20 => 60000.0,
                20..30 => 1e-7,
                30 if element != ElementType::F16 => 1e30,
                _ => 4.0,
            };
            let x = rng.random_range(-1.0f32..1.0) * most;
            match element {
                ElementType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
                ElementType::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
                ElementType::F32 => bytes.extend(x.to_le_bytes()),
            }
        }
        bytes
    }

    /// A GPU with memory for one block, raw and sealed, and for tensors of one.
    struct Bench {
        stream: Stream,
        layout: BlockLayout,
        payload: DeviceMemory,
        raw: DeviceMemory,
        sealed: DeviceMemory,
        reopened: DeviceMemory,
        output: DeviceMemory,
        steps: DeviceMemory,
        flag: DeviceMemory,
    }

    impl Bench {
        fn new(gpu: &Arc<Gpu>, layout: BlockLayout, sealed: BlockFormat) -> Bench {
            let zeroed = |bytes| DeviceMemory::zeroed(gpu, bytes).unwrap();
            let (raw, sealed) = (layout.raw_bytes(), sealed.block_bytes(&layout));
            Bench {
                stream: Stream::new(gpu).unwrap(),
                layout,
                payload: zeroed(raw),
                raw: zeroed(raw),
                sealed: zeroed(sealed),
                reopened: zeroed(raw),
                output: zeroed(raw),
                steps: zeroed(256),
                flag: zeroed(64),
            }
        }

        fn step<T: bytemuck::Pod>(&self, step: T) -> Descriptors {
            self.steps.write_on(&self.stream, bytemuck::bytes_of(&step)).unwrap();
            Descriptors { address: self.steps.address(), count: 1 }
        }

        fn bytes(&self, memory: &DeviceMemory) -> Vec<u8> {
            self.stream.synchronize().unwrap();
            let mut bytes = vec![0; memory.bytes()];
            memory.read(0, &mut bytes).unwrap();
            bytes
        }

        /// What the sealed block decodes to.
        fn reopened(&self, kernels: &Kernels) -> Vec<u8> {
            let reopen = self.step(abi::Convert {
                from: self.sealed.address(),
                to: self.reopened.address(),
                flag: 0,
                index: INDEX,
            });
            // SAFETY: memory of this bench, which nobody else uses; everything is waited for before it is looked at.
            unsafe { kernels.reopen(&self.stream, 0, reopen) }.unwrap();
            self.bytes(&self.reopened)
        }

        /// Everything that the kernels write when `tokens` tokens are appended to a block that is sealed, reopened and read.
        fn run(&self, kernels: &Kernels, tokens: Range<usize>, calm: bool, bad: bool) -> Vec<Vec<u8>> {
            let layout = &self.layout;
            let [key_token, value_token] = Plane::BOTH.map(|plane| layout.token_bytes(plane));
            let count = tokens.len();
            let mut payload = elements(layout.element, layout.raw_bytes() / layout.element.bytes(), 7, calm);
            if bad {
                // The last key of the first token is infinite, or not a number.
                let end = key_token;
                payload[end - layout.element.bytes()..end].fill(0xFF);
            }
            self.payload.write_on(&self.stream, &payload).unwrap();
            for memory in [&self.raw, &self.sealed, &self.reopened, &self.output, &self.flag] {
                memory.write_on(&self.stream, &vec![0; memory.bytes()]).unwrap();
            }
            let stream = &self.stream;
            let values_at = self.payload.address() + (layout.layers * count * key_token) as u64;
            let append = self.step(abi::Append {
                source: [self.payload.address(), values_at],
                slot: self.raw.address(),
                flag: self.flag.address(),
                source_tokens: count as u32,
                first_layer: 0,
                layers: layout.layers as u32,
                first_token: tokens.start as u32,
                tokens: count as u32,
                padding: 0,
            });
            // SAFETY: memory of this bench, which nobody else uses; everything is waited for before it is looked at.
            unsafe { kernels.append(stream, append, layout.layers, count) }.unwrap();
            let mut written = vec![self.bytes(&self.raw), self.bytes(&self.flag)];
            self.flag.write_on(&self.stream, &[0; 64]).unwrap();
            let seal = self.step(abi::Convert {
                from: self.raw.address(),
                to: self.sealed.address(),
                flag: self.flag.address(),
                index: INDEX,
            });
            // SAFETY: as above.
            unsafe { kernels.seal(stream, 0, seal) }.unwrap();
            written.extend([self.bytes(&self.sealed), self.bytes(&self.flag)]);
            written.push(self.reopened(kernels));
            for (raw, slot) in [(0b11, &self.raw), (0b00, &self.sealed)] {
                for layer in 0..layout.layers {
                    let output = self.output.address();
                    let read = self.step(abi::Read {
                        slot: [slot.address(); 2],
                        output: [output, output + (count * key_token) as u64],
                        layer: layer as u32,
                        first_token: tokens.start as u32,
                        tokens: count as u32,
                        raw,
                        index: INDEX,
                    });
                    // SAFETY: as above; the output has room for a block of all layers.
                    unsafe { kernels.read(stream, 0, read, count) }.unwrap();
                    written.push(self.bytes(&self.output)[..count * (key_token + value_token)].to_vec());
                }
            }
            let moves = [
                abi::Move {
                    from: self.raw.address(),
                    to: self.reopened.address(),
                    bytes: layout.raw_bytes() as u64,
                },
                abi::Move { from: 0, to: self.raw.address(), bytes: layout.raw_bytes() as u64 },
            ];
            for step in moves {
                let step = self.step(step);
                // SAFETY: as above.
                unsafe { kernels.move_blocks(stream, step, layout.raw_bytes()) }.unwrap();
                written.extend([self.bytes(&self.reopened), self.bytes(&self.raw)]);
            }
            written
        }
    }

    /// `(block_tokens, layers, kv_heads, key_dim, value_dim)`.
    const SHAPES: [(u32, u32, u32, u32, u32); 14] = [
        (32, 1, 1, 64, 64),
        (32, 1, 1, 80, 80),
        (32, 1, 1, 128, 128),
        (32, 1, 1, 256, 256),
        (32, 2, 3, 64, 80),
        (32, 2, 3, 128, 256),
        (5, 3, 2, 80, 16),
        (1, 1, 1, 8, 8),
        (1, 2, 1, 1, 3),
        (5, 1, 3, 7, 33),
        (32, 1, 1, 512, 520),
        (6, 2, 3, 64, 64),
        (7, 2, 5, 128, 128),
        (1, 1, 1, 128, 64),
    ];

    /// Where the block of a bench stands in its sequence.
    const INDEX: u64 = 5;

    /// Some means; half of the dims rotate, or all that can.
    fn some_centres(geometry: &Geometry) -> Centres {
        let (mut geometry, dim) = (geometry.clone(), geometry.groups[0].key_dim);
        let rotary_dims = if dim % 3 == 0 { dim / 2 } else { dim } / 2 * 2;
        geometry.groups[0].rope = Some(crate::Rope {
            inv_freq: (0..rotary_dims / 2).map(|i| 100f32.powf(-(i as f32) / dim as f32)).collect(),
            rotary_dims,
            layout: if dim % 64 == 0 { RopeLayout::HalfSplit } else { RopeLayout::Interleaved },
            attention_scale: 1.0,
        });
        let mut means = crate::KeyMeansBuilder::new(&geometry).unwrap();
        for layer in 0..geometry.groups[0].layers {
            let count = geometry.groups[0].kv_heads * dim;
            let keys: Vec<f32> = (0..count).map(|at| ((at + layer) % 23) as f32 - 9.0).collect();
            means.add(layer, 7, &keys);
        }
        Centres::new(&means.finish().unwrap(), &geometry, 1000).unwrap()
    }

    /// None, and why, without one.
    fn gpu() -> Option<Arc<Gpu>> {
        usable_gpus().inspect_err(|reason| println!("skipped: {reason}")).ok()?;
        Some(Gpu::shared(0).unwrap())
    }

    /// A test for each format, so that they run beside each other, and a sanitizer over some.
    macro_rules! of_each_format {
        ($test:ident) => {
            mod $test {
                super::of_each_format!($test, int8: Int8, fp8: Fp8, int4: Int4, int2: Int2, r4: R4, r3: R3, r2: R2);
            }
        };
        ($test:ident, $($name:ident: $format:ident),*) => {
            $(
                #[test]
                fn $name() {
                    if let Some(gpu) = super::gpu() {
                        super::$test(&gpu, super::Format::$format);
                    }
                }
            )*
        };
    }
    use of_each_format;

    of_each_format!(plain_kernels_give_the_same_bytes);
    of_each_format!(plain_kernels_with_means_give_the_same_bytes);
    of_each_format!(blocks_are_sealed_alike_alone_and_among_others);
    of_each_format!(random_bytes_decode_as_on_the_cpu);

    fn plain_kernels_give_the_same_bytes(gpu: &Arc<Gpu>, format: Format) {
        plain_kernels_of(gpu, format, false);
    }

    fn plain_kernels_with_means_give_the_same_bytes(gpu: &Arc<Gpu>, format: Format) {
        plain_kernels_of(gpu, format, true);
    }

    /// Every plane of a raw block by the CPU codec, and whether all of it is finite.
    fn sealed_on_cpu(layout: &BlockLayout, format: Format, raw: &[u8]) -> (Vec<u8>, bool) {
        let place = FormatLayout::new(format.into(), layout);
        let mut sealed = vec![0; place.format().block_bytes(layout)];
        let mut finite = true;
        for (layer, plane) in planes(layout) {
            let [codes, scales] = places(&place, layout, layer, plane);
            let from = layout.plane_offset(layer, plane);
            let (head, tail) = sealed.split_at_mut(scales.start);
            let (codes, scales) = (&mut head[codes], &mut tail[..scales.len()]);
            let rows = &raw[from..from + layout.plane_bytes(plane)];
            finite &= Codec::best().encode(place.rows(layout, layer, plane), rows, codes, scales);
        }
        (sealed, finite)
    }

    /// The other way round.
    fn decoded_on_cpu(layout: &BlockLayout, format: Format, sealed: &[u8]) -> Vec<u8> {
        let place = FormatLayout::new(format.into(), layout);
        let mut raw = vec![0; layout.raw_bytes()];
        for (layer, plane) in planes(layout) {
            let [codes, scales] = places(&place, layout, layer, plane);
            let from = layout.plane_offset(layer, plane);
            let rows = &mut raw[from..from + layout.plane_bytes(plane)];
            let (of, stride) = (place.rows(layout, layer, plane), layout.row_bytes(plane));
            Codec::best().decode(of, 0, &sealed[codes], &sealed[scales], rows, stride);
        }
        raw
    }

    fn planes(layout: &BlockLayout) -> impl Iterator<Item = (usize, Plane)> {
        (0..layout.layers).flat_map(|layer| Plane::BOTH.map(|plane| (layer, plane)))
    }

    fn places(place: &FormatLayout, layout: &BlockLayout, layer: usize, plane: Plane) -> [Range<usize>; 2] {
        place.places(layout, layer, plane, &(0..layout.kv_heads * layout.block_tokens)).into()
    }

    /// Many blocks in one launch are those that they are each in its own, each has its own flag, and all are as the CPU has them.
    fn blocks_are_sealed_alike_alone_and_among_others(gpu: &Arc<Gpu>, format: Format) {
        for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
            for dim in [if format.is_rotated() { 64 } else { 80 }, 128] {
                many_blocks(gpu, format, element, dim);
            }
        }
    }

    fn many_blocks(gpu: &Arc<Gpu>, format: Format, element: ElementType, dim: u32) {
        // More rows than all warps of a GPU seal at once.
        const BLOCKS: usize = 300;
        let what = format!("{format}, {element:?}, heads of {dim}");
        let layout = Geometry::new(2, 3, dim, element).block_tokens(32).layout().unwrap();
        let kernels = Kernels::load(gpu, &layout, format, None).unwrap();
        let stream = Stream::new(gpu).unwrap();
        let slot = |bytes: usize| bytes.next_multiple_of(SLOT_ALIGN_BYTES);
        let block_bytes = BlockFormat::from(format).block_bytes(&layout);
        let (raw_bytes, sealed_bytes) = (slot(layout.raw_bytes()), slot(block_bytes));
        let raw = DeviceMemory::zeroed(gpu, BLOCKS * raw_bytes).unwrap();
        let of_block =
            |block| elements(element, raw_bytes / element.bytes(), block, !block.is_multiple_of(7));
        let mut bytes: Vec<u8> = (0..BLOCKS as u64).flat_map(of_block).collect();
        let bad = [0, 123, BLOCKS - 1];
        bad.iter().for_each(|block| bytes[block * raw_bytes..][..element.bytes()].fill(0xFF));
        raw.write(0, &bytes).unwrap();
        let sealed = |at_once: usize| {
            let sealed = DeviceMemory::zeroed(gpu, BLOCKS * sealed_bytes).unwrap();
            let flags = DeviceMemory::zeroed(gpu, BLOCKS * 4).unwrap();
            let converts: Vec<_> = (0..BLOCKS as u64)
                .map(|block| abi::Convert {
                    from: raw.address() + block * raw_bytes as u64,
                    to: sealed.address() + block * sealed_bytes as u64,
                    flag: flags.address() + block * 4,
                    index: block,
                })
                .collect();
            let memory = upload(gpu, &converts).unwrap();
            for first in (0..BLOCKS).step_by(at_once) {
                let address = memory.address() + (first * size_of::<abi::Convert>()) as u64;
                let steps = Descriptors { address, count: at_once.min(BLOCKS - first) };
                // SAFETY: memory of this test; everything is waited for before it is looked at.
                unsafe { kernels.seal(&stream, 0, steps) }.unwrap();
            }
            stream.synchronize().unwrap();
            [sealed, flags].map(|memory| {
                let mut bytes = vec![0; memory.bytes()];
                memory.read(0, &mut bytes).unwrap();
                bytes
            })
        };
        let [together, flags] = sealed(BLOCKS);
        let raised =
            flags.chunks_exact(4).enumerate().filter(|(_, flag)| flag[0] == 1).map(|(block, _)| block);
        assert_eq!(raised.collect::<Vec<_>>(), bad, "{what}");
        for (block, raw) in bytes.chunks_exact(raw_bytes).enumerate() {
            let (on_cpu, finite) = sealed_on_cpu(&layout, format, raw);
            assert_eq!(finite, !bad.contains(&block), "{what}: block {block}");
            let on_gpu = &together[block * sealed_bytes..][..block_bytes];
            let differs = on_gpu.iter().zip(&on_cpu).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{what}: block {block}, of bytes {block_bytes}");
        }
        assert!([together, flags] == sealed(1), "{what}");
    }

    /// Also what no seal ever wrote decodes, and to the same bytes: scales that are no numbers among it.
    fn random_bytes_decode_as_on_the_cpu(gpu: &Arc<Gpu>, format: Format) {
        let mut rng = SmallRng::seed_from_u64(5);
        for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
            for dim in [32, 64, 80, 128, 256, 7] {
                let layout = Geometry::new(2, 3, dim, element).block_tokens(32).layout().unwrap();
                let bench = Bench::new(gpu, layout, format.into());
                let kernels = Kernels::load(gpu, &layout, format, None).unwrap();
                for _ in 0..8 {
                    let bytes: Vec<u8> = (0..bench.sealed.bytes()).map(|_| rng.random()).collect();
                    bench.sealed.write_on(&bench.stream, &bytes).unwrap();
                    let on_gpu = bench.reopened(&kernels);
                    let on_cpu = decoded_on_cpu(&layout, format, &bytes);
                    let differs = on_gpu.iter().zip(&on_cpu).position(|(a, b)| a != b);
                    assert_eq!(differs, None, "{format}, {element:?}, heads of {dim}");
                }
            }
        }
    }

    fn plain_kernels_of(gpu: &Arc<Gpu>, format: Format, centred: bool) {
        let twins = |source: &str| {
            [source, &without_fast_kernels(source)].map(|source| Arc::new(Module::load(gpu, source).unwrap()))
        };
        let ([fast, plain], [fast_format, plain_format]) =
            (twins(CACHE), twins(source(format, centred).unwrap().unwrap()));
        for name in ["append", "move_blocks", "read_raw"] {
            assert!(fast.function(name).is_ok() && plain.function(name).is_err(), "{name}");
        }
        for name in ["seal_f16", "reopen_bf16", "read_f32"] {
            assert!(fast_format.function(name).is_ok() && plain_format.function(name).is_err(), "{name}");
        }
        for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
            for shape in SHAPES {
                let (mut block_tokens, layers, heads, key_dim, value_dim) = shape;
                if format.is_grouped() {
                    block_tokens = block_tokens.next_multiple_of(GROUP as u32);
                }
                let mut geometry = Geometry::new(layers, heads, key_dim, element).block_tokens(block_tokens);
                geometry.groups[0].value_dim = value_dim;
                let layout = geometry.layout().unwrap();
                let bench = Bench::new(gpu, layout, format.into());
                let kernels = [(&fast, &fast_format), (&plain, &plain_format)].map(|(cache, of_format)| {
                    let tables = centred.then(|| Tables::upload(gpu, &some_centres(&geometry)).unwrap());
                    let modules = [Some(of_format.clone()), Some(of_format.clone())];
                    Kernels::of(cache.clone(), vec![(format.into(), modules)], &layout, tables, 1).unwrap()
                });
                let block = layout.block_tokens;
                // Rows that are not written stay zeros, which are not calm.
                let parts = [
                    (0..1, false),
                    (0..block, false),
                    (0..block, true),
                    (block - 1..block, false),
                    (block / 3..(2 * block).div_ceil(3), false),
                ];
                for (tokens, calm) in parts.into_iter().filter(|(tokens, _)| !tokens.is_empty()) {
                    for bad in [false, true] {
                        let [fast, plain] =
                            kernels.each_ref().map(|kernels| bench.run(kernels, tokens.clone(), calm, bad));
                        let what = format!(
                            "{format}, centred: {centred}, {element:?}, {shape:?}, tokens {tokens:?}, calm: {calm}, not finite: {bad}"
                        );
                        assert_eq!(fast[1][0] != 0, bad, "{what}: the flag of the append");
                        assert_eq!(fast[3][0] != 0, bad, "{what}: the flag of the seal");
                        for (part, (fast, plain)) in fast.iter().zip(&plain).enumerate() {
                            assert!(fast == plain, "{what}: part {part} differs");
                        }
                    }
                }
            }
        }
    }
}
