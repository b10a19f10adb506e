//! The kernels, loaded from what the crate carries, and their typed launchers.
//!
//! A kernel that cannot be loaded is replaced by its plain twin, which gives the same bytes; a warning says so once.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kv_cache_actors::format::{BlockFormat, Format, FormatLayout, Ladder};
use kv_cache_actors::geometry::{BlockLayout, ElementType, Plane};

use super::abi;
use super::driver::{DeviceMemory, DriverError, Function, Gpu, Module, Stream};
use super::image::{Image, image};
use crate::RopeLayout;
use crate::key_means::Centres;

/// What knows no format.
static CACHE: Image = image!("cache");
/// A module for each format: for keys as they are, and for keys as differences from centres.
static INT8: [Image; 2] = [image!("int8"), image!("int8_rc")];
static FP8: [Image; 2] = [image!("fp8"), image!("fp8_rc")];
static R4: [Image; 2] = [image!("r4"), image!("r4_rc")];
static R3: [Image; 2] = [image!("r3"), image!("r3_rc")];
static R2: [Image; 2] = [image!("r2"), image!("r2_rc")];
static INT4: [Image; 2] = [image!("int4"), image!("int4_rc")];
static INT2: [Image; 2] = [image!("int2"), image!("int2_rc")];

/// The module of a format, if it has any kernels: blocks that stay raw are read by `CACHE`.
///
/// # Errors
/// A format of a newer core, which has none yet.
fn image_of(format: Format, centred: bool) -> Result<Option<&'static Image>, DriverError> {
    let both = match format {
        Format::Raw => return Ok(None),
        Format::Int8 => &INT8,
        Format::Fp8 => &FP8,
        Format::R4 => &R4,
        Format::R3 => &R3,
        Format::R2 => &R2,
        Format::Int4 => &INT4,
        Format::Int2 => &INT2,
        other => {
            return Err(DriverError::Call {
                call: "loading kernels",
                name: "no module".into(),
                text: format!("{other} has no kernels"),
            });
        }
    };
    Ok(Some(&both[usize::from(centred)]))
}

/// Threads of a block of the kernels that convert whole planes.
const CONVERT_THREADS: u32 = 256;
/// The same of kernels that decode rotated keys with their means: they have registers for 512 threads at once, and four blocks of threads hide better than two
/// what each of them begins with.
const TURNED_DECODE_THREADS: u32 = 128;
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
    /// Threads of a block of the kernels that decode.
    decode_threads: u32,
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

/// Whether keys are for the kernels of keys all of whose dims turn (`PAIRED_KERNELS` and `PAIRED_DECODES` in the sources): halves of rows are a power of two of vectors, and
/// the means of all heads fit into a thread block's shared memory.
fn all_turn(block: &BlockLayout, centres: &abi::CentreTables) -> bool {
    /// `TURNED_MAX` in the source.
    const MEANS_MOST: usize = 4096;
    block.element.bytes() == 2
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
            |format, centred| image_of(format, centred)?.map(|image| Self::module(gpu, image)).transpose();
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
        Self::of(Self::module(gpu, &CACHE)?, modules, block, tables, gpu.multiprocessors()?)
    }

    /// A module on a GPU, loaded once for all caches that are on it at a time.
    fn module(gpu: &Arc<Gpu>, image: &'static Image) -> Result<Arc<Module>, DriverError> {
        /// By the GPU's number and the image's address.
        type Loaded = ((usize, usize), Weak<Module>);
        static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (gpu.ordinal(), std::ptr::from_ref(image).addr());
        let found = loaded.iter().find(|(of, _)| *of == key);
        if let Some(module) = found.and_then(|(_, module)| module.upgrade()) {
            return Ok(module);
        }
        let module = Arc::new(image.load(gpu)?);
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
            let turned = centred.filter(|tables| all_turn(block, &tables.at));
            // Half a row apart.
            let halves = turned.is_some_and(|tables| tables.at.apart != 1);
            let dim = block.key_dim;
            let of_one_dim = turned.is_some() && [64, 128].contains(&dim);
            let decodes_turned = rotated && of_one_dim;
            let function = |module: &Arc<Module>, name: &str| {
                // Those of `int8` and `fp8` are for all lengths of rows that have halves, others for one each. Seals of `int4` and `int2`
                // are for neighbours as well; those of rotated rows take the centres of all pairs off in one way.
                let kind = match format {
                    _ if decodes_turned && name != "seal" => format!("turned{dim}_"),
                    Format::Int8 | Format::Fp8 if halves => "halves_".to_owned(),
                    Format::Int4 | Format::Int2 if of_one_dim && (halves || name == "seal") => {
                        format!("paired{dim}_")
                    }
                    _ => String::new(),
                };
                let function = pick(module, &kind, name, element)?;
                // Their plain twins keep a row in shared memory, which leaves room for few blocks otherwise. Centres want a cache for
                // their tables beside it.
                if rotated {
                    match (centred.is_some(), name) {
                        (false, _) => function.prefer_shared_memory(100)?,
                        (true, "seal") => function.prefer_cache(module.gpu(), ROTATED_SEAL_THREADS)?,
                        (true, _) if decodes_turned => {
                            function.prefer_cache(module.gpu(), TURNED_DECODE_THREADS)?
                        }
                        (true, _) => function.prefer_shared_memory(50)?,
                    }
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
                decode_threads: if decodes_turned { TURNED_DECODE_THREADS } else { CONVERT_THREADS },
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
                unsafe { of.launch(function, stream, grid, of.decode_threads, steps) }?;
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
        for of in &self.sealed[rung].of_planes {
            let threads = vectors.next_multiple_of(32).clamp(32, of.decode_threads);
            let parts = vectors.div_ceil(threads * 4).min(ENOUGH_BLOCKS / (2 * steps.count as u32)).max(1);
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
mod tests;
