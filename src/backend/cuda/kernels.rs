//! The kernels, loaded from the PTX that the crate carries, and their typed launchers.
//!
//! A kernel that cannot be loaded is replaced by its plain twin, which gives the same bytes; a warning says so once.

use std::ffi::c_void;
use std::sync::Arc;

use kv_cache_actors::geometry::{BlockLayout, ElementType, Plane};

use super::abi;
use super::driver::{DriverError, Function, Gpu, Module, Stream};

/// Made from `kernels/cache.cu` by `kernels/build.py`.
const PTX: &str = include_str!("kernels/cache.ptx");

/// Threads of a block of the kernels that convert whole planes.
const CONVERT_THREADS: u32 = 256;
/// Threads of a block of `move_blocks`, and the vectors of 16 bytes that each has in flight, as in the source.
const MOVE_THREADS: u32 = 256;
const MOVE_UNROLL: u32 = 4;
/// More thread blocks than this keep every GPU busy.
const ENOUGH_BLOCKS: u32 = 1024;

/// The kernels for one element type.
pub(super) struct Kernels {
    layout: abi::Layout,
    row_bytes_max: usize,
    kv_heads: usize,
    layers: u32,
    append: Function,
    seal: Function,
    reopen: Function,
    read: Function,
    move_blocks: Function,
    signal: Function,
    /// The functions are its.
    _module: Module,
}

/// `count` descriptors of type `T` at `address`, which the device reaches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptors {
    pub(super) address: u64,
    pub(super) count: usize,
}

impl Kernels {
    /// Loads the kernels for blocks of `block`.
    pub(super) fn load(gpu: &Arc<Gpu>, block: &BlockLayout) -> Result<Kernels, DriverError> {
        Self::load_ptx(gpu, block, PTX)
    }

    fn load_ptx(gpu: &Arc<Gpu>, block: &BlockLayout, ptx: &str) -> Result<Kernels, DriverError> {
        let module = Module::load(gpu, ptx)?;
        let element = match block.element {
            ElementType::F16 => "_f16",
            ElementType::Bf16 => "_bf16",
            ElementType::F32 => "_f32",
        };
        let pick = |name: &str, element: &str| {
            let name = format!("{name}{element}");
            module.function(&name).or_else(|error| {
                tracing::warn!(target: "kv_cache::cuda", kernel = name, %error, "a kernel cannot be loaded: the plain one runs instead");
                module.function(&format!("plain_{name}"))
            })
        };
        Ok(Kernels {
            layout: abi::Layout::new(block),
            row_bytes_max: block.row_bytes(Plane::Key).max(block.row_bytes(Plane::Value)),
            kv_heads: block.kv_heads,
            layers: block.layers as u32,
            append: pick("append", "")?,
            seal: pick("seal", element)?,
            reopen: pick("reopen", element)?,
            read: pick("read", element)?,
            move_blocks: pick("move_blocks", "")?,
            signal: module.function("signal")?,
            _module: module,
        })
    }

    /// Vectors of 16 bytes in `tokens` tokens of one plane of one layer.
    fn vectors(&self, tokens: usize) -> u32 {
        (tokens * self.kv_heads * self.row_bytes_max).div_ceil(16) as u32
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
        // SAFETY: passed on.
        unsafe {
            self.with_layout(self.append, stream, (steps.count as u32, 2 * layers as u32, 1), threads, steps)
        }
    }

    /// Encodes whole blocks.
    ///
    /// # Safety
    /// The descriptors are [`abi::Convert`]s, raw to sealed, that keep to invariants 3 and 4.
    pub(super) unsafe fn seal(&self, stream: &Stream, steps: Descriptors) -> Result<(), DriverError> {
        let grid = (steps.count as u32, 2 * self.layers, 1);
        // SAFETY: passed on.
        unsafe { self.with_layout(self.seal, stream, grid, CONVERT_THREADS, steps) }
    }

    /// Decodes whole blocks.
    ///
    /// # Safety
    /// The descriptors are [`abi::Convert`]s, sealed to raw, that keep to invariants 3 and 4.
    pub(super) unsafe fn reopen(&self, stream: &Stream, steps: Descriptors) -> Result<(), DriverError> {
        let grid = (steps.count as u32, 2 * self.layers, 1);
        // SAFETY: passed on.
        unsafe { self.with_layout(self.reopen, stream, grid, CONVERT_THREADS, steps) }
    }

    /// Gathers and decodes tokens; `tokens` is the most of any descriptor.
    ///
    /// # Safety
    /// The descriptors are [`abi::Read`]s that keep to invariants 3 and 4.
    pub(super) unsafe fn read(
        &self,
        stream: &Stream,
        steps: Descriptors,
        tokens: usize,
    ) -> Result<(), DriverError> {
        let vectors = self.vectors(tokens);
        let threads = vectors.next_multiple_of(32).clamp(32, 256);
        let parts = vectors.div_ceil(threads * 4).min(ENOUGH_BLOCKS / (2 * steps.count as u32)).max(1);
        // SAFETY: passed on.
        unsafe { self.with_layout(self.read, stream, (steps.count as u32, 2, parts), threads, steps) }
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

    /// # Safety
    /// `function` takes the layout and an address of descriptors that keep to invariants 3 and 4.
    unsafe fn with_layout(
        &self,
        function: Function,
        stream: &Stream,
        grid: (u32, u32, u32),
        threads: u32,
        mut steps: Descriptors,
    ) -> Result<(), DriverError> {
        let mut layout = self.layout;
        let mut parameters = [(&raw mut layout).cast::<c_void>(), (&raw mut steps.address).cast()];
        // SAFETY: the driver copies the parameters before it returns; passed on.
        unsafe { function.launch(stream, grid, threads, &mut parameters) }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    /// The seal kernel multiplies where the CPU divides: for f16 that never shows.
    #[test]
    fn the_reciprocal_of_127_gives_the_same_f16_scales() {
        for bits in 0..f16::INFINITY.to_bits() {
            let most = f16::from_bits(bits).to_f32();
            assert_eq!(f16::from_f32(most * 0.007_874_016_f32), f16::from_f32(most / 127.0), "{most}");
        }
    }
}
