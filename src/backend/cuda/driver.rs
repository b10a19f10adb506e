//! Owned handles of the CUDA driver: each destroys what it owns, and says in words what went wrong.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::{CString, c_void};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use cudarc::driver::{result, sys};
use kv_cache_actors::reach::Point;

/// A call of the driver that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DriverError {
    /// The driver's own error.
    #[error("{call}: {name} ({text})")]
    Call {
        /// What was called.
        call: &'static str,
        /// Name of the error, as in NVIDIA's documentation.
        name: String,
        /// The driver's words for it.
        text: String,
    },
    /// Memory that does not fit.
    #[error("{requested_bytes} bytes of GPU memory asked for, {free_bytes} of {total_bytes} free: {} are missing; lower `memory_bytes_per_device`", requested_bytes - free_bytes)]
    Memory {
        /// Bytes asked for.
        requested_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
        /// Bytes of the GPU.
        total_bytes: u64,
    },
    /// A GPU that the kernels do not run on.
    #[error("compute capability {major}.{minor} is too old: 8.0 (A100) or newer is needed")]
    TooOld {
        /// Major number.
        major: i32,
        /// Minor number.
        minor: i32,
    },
}

/// Names the call that failed.
pub(super) fn check<T>(
    call: &'static str,
    outcome: Result<T, result::DriverError>,
) -> Result<T, DriverError> {
    outcome.map_err(|error| {
        let text = |found: Result<&std::ffi::CStr, _>| match found {
            Ok(text) => text.to_string_lossy().into_owned(),
            Err(_) => format!("{:?}", error.0),
        };
        DriverError::Call { call, name: text(error.error_name()), text: text(error.error_string()) }
    })
}

/// Whether the driver's library can be loaded. Without it every call of it would panic.
pub(super) fn driver_is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // Not cudarc's own question: it has none where another crate has it link the driver instead of loading it.
    const NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
    // SAFETY: loads the driver's library by name; what it runs on loading is the driver's own.
    *PRESENT.get_or_init(|| NAMES.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok()))
}

/// GPUs that the kernels run on, by the driver's numbers, or why there are none.
pub(crate) fn usable_gpus() -> Result<Vec<u16>, String> {
    let count = device_count()?;
    let (usable, old): (Vec<usize>, Vec<usize>) = (0..count)
        .partition(|ordinal| capability(*ordinal).is_ok_and(|(major, _)| major >= CAPABILITY_MAJOR));
    match usable.is_empty() {
        true => {
            Err(format!("of {count} NVIDIA GPUs none has compute capability {CAPABILITY_MAJOR}.0 or newer"))
        }
        false => {
            if !old.is_empty() {
                tracing::warn!(target: "kv_cache::devices", gpus = ?old, "too old, and left alone");
            }
            Ok(usable.into_iter().map(|ordinal| ordinal as u16).collect())
        }
    }
}

/// The oldest that the kernels are compiled for: A100.
const CAPABILITY_MAJOR: i32 = 8;

fn capability(ordinal: usize) -> Result<(i32, i32), DriverError> {
    let device = check("cuDeviceGet", result::device::get(ordinal as i32))?;
    // SAFETY: the device is valid.
    let attribute =
        |which| unsafe { check("cuDeviceGetAttribute", result::device::get_attribute(device, which)) };
    let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok((major, attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
}

fn device_count() -> Result<usize, String> {
    if !driver_is_present() {
        return Err("no NVIDIA driver was found".into());
    }
    let count =
        check("cuInit", result::init()).and_then(|()| check("cuDeviceGetCount", result::device::get_count()));
    match count {
        Ok(0) => Err("an NVIDIA driver was found, but no GPU".into()),
        Ok(count) => Ok(count as usize),
        Err(error) => Err(format!("an NVIDIA driver was found, but no GPU: {error}")),
    }
}

/// A GPU with its primary context, which other libraries of the process share.
pub(crate) struct Gpu {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
}

// SAFETY: handles of the driver may be used from any thread on which the context is current (2).
unsafe impl Send for Gpu {}
// SAFETY: as above; nothing here changes after it was made.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({}, {})", self.ordinal, self.name)
    }
}

impl Gpu {
    /// Takes a share in the primary context of a GPU.
    fn open(ordinal: usize) -> Result<Arc<Gpu>, DriverError> {
        if !driver_is_present() {
            return Err(DriverError::Call {
                call: "loading the driver",
                name: "libcuda".into(),
                text: "no NVIDIA driver was found".into(),
            });
        }
        check("cuInit", result::init())?;
        let device = check("cuDeviceGet", result::device::get(ordinal as i32))?;
        let name = check("cuDeviceGetName", result::device::get_name(device))?;
        let (major, minor) = capability(ordinal)?;
        if major < CAPABILITY_MAJOR {
            return Err(DriverError::TooOld { major, minor });
        }
        // SAFETY: the device is valid; the share is given back when this is dropped.
        let context = check("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        let gpu = Arc::new(Gpu { ordinal, device, context, name });
        gpu.make_current()?;
        Ok(gpu)
    }

    /// The GPU of this number, with others who have it open.
    pub(crate) fn shared(ordinal: usize) -> Result<Arc<Gpu>, DriverError> {
        static OPEN: Mutex<Vec<Weak<Gpu>>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.iter().filter_map(Weak::upgrade).find(|gpu| gpu.ordinal == ordinal) {
            return Ok(gpu);
        }
        let gpu = Gpu::open(ordinal)?;
        open.retain(|weak| weak.strong_count() > 0);
        open.push(Arc::downgrade(&gpu));
        Ok(gpu)
    }

    /// Which GPU.
    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Its multiprocessors.
    pub(super) fn multiprocessors(&self) -> Result<u32, DriverError> {
        let which = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(self.attribute(which)?.cast_unsigned())
    }

    /// Its compute capability: major and minor number.
    pub(super) fn capability(&self) -> Result<(i32, i32), DriverError> {
        capability(self.ordinal)
    }

    fn attribute(&self, which: sys::CUdevice_attribute) -> Result<i32, DriverError> {
        // SAFETY: the device is valid.
        check("cuDeviceGetAttribute", unsafe { result::device::get_attribute(self.device, which) })
    }

    /// The context, for comparing with the embedder's.
    pub(super) fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// Makes its context current on this thread.
    pub(crate) fn make_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context is held (1).
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    /// Makes its context current on a thread that is not ours, until the guard goes: whose it is finds the thread as it was.
    pub(super) fn enter(&self) -> Result<Entered, DriverError> {
        let before = check("cuCtxGetCurrent", result::ctx::get_current())?;
        self.make_current()?;
        Ok(Entered { before })
    }

    /// Free and total bytes.
    pub(crate) fn memory_info(&self) -> Result<(usize, usize), DriverError> {
        self.make_current()?;
        check("cuMemGetInfo", result::mem_get_info())
    }
}

/// See [`Gpu::enter`].
pub(super) struct Entered {
    before: Option<sys::CUcontext>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: the context that was current on this thread, or none.
        let _ = unsafe { result::ctx::set_current(self.before.unwrap_or(std::ptr::null_mut())) };
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: one share was taken in `open`. An error at the end helps nobody.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Bytes of GPU memory.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    address: u64,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl DeviceMemory {
    /// Allocates and zeroes.
    pub(super) fn zeroed(gpu: &Arc<Gpu>, bytes: usize) -> Result<DeviceMemory, DriverError> {
        let memory = Self::uninitialised(gpu, bytes)?;
        // SAFETY: all of the allocation, which nobody else knows yet.
        check("cuMemsetD8", unsafe { result::memset_d8_sync(memory.address, 0, bytes) })?;
        check("cuCtxSynchronize", result::ctx::synchronize())?;
        Ok(memory)
    }

    /// Allocates. `cuMemAlloc`, not the stream-ordered allocator: peers reach it at full speed.
    pub(super) fn uninitialised(gpu: &Arc<Gpu>, bytes: usize) -> Result<DeviceMemory, DriverError> {
        let (free, total) = gpu.memory_info()?;
        let missing = DriverError::Memory {
            requested_bytes: bytes as u64,
            free_bytes: (free as u64).min(bytes as u64),
            total_bytes: total as u64,
        };
        if bytes > free {
            return Err(missing);
        }
        // SAFETY: the context is current (2).
        let address = unsafe { result::malloc_sync(bytes.max(1)) };
        let address = match address {
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(missing),
            other => check("cuMemAlloc", other)?,
        };
        Ok(DeviceMemory { address, bytes, gpu: gpu.clone() })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Copies bytes from `from` on to the host, and waits.
    ///
    /// What is copied while the device writes to it is whatever it is then; callers look at nothing of the kind (4).
    pub(super) fn read(&self, from: usize, to: &mut [u8]) -> Result<(), DriverError> {
        assert!(from + to.len() <= self.bytes, "{from}+{} of {}", to.len(), self.bytes);
        let _entered = self.gpu.enter()?;
        // On the default stream it would wait for the embedder's kernels.
        let stream = Stream::new(&self.gpu)?;
        // SAFETY: in bounds of an allocation that lives (1, 3); the stream is waited for before `to` is the caller's again.
        let copied = unsafe { result::memcpy_dtoh_async(to, self.address + from as u64, stream.raw()) };
        check("cuMemcpyDtoHAsync", copied)?;
        stream.synchronize()
    }

    /// Copies bytes from the host to `to` on, and waits.
    pub(super) fn write(&self, to: usize, from: &[u8]) -> Result<(), DriverError> {
        assert!(to + from.len() <= self.bytes, "{to}+{} of {}", from.len(), self.bytes);
        self.gpu.make_current()?;
        // SAFETY: in bounds of an allocation that lives (1, 3).
        check("cuMemcpyHtoD", unsafe { result::memcpy_htod_sync(self.address + to as u64, from) })?;
        // A copy from pageable memory may return once the bytes are on their way.
        check("cuCtxSynchronize", result::ctx::synchronize())
    }

    /// Copies bytes from the host to the front, on `stream` and no other, and waits.
    pub(super) fn write_on(&self, stream: &Stream, from: &[u8]) -> Result<(), DriverError> {
        assert!(from.len() <= self.bytes, "{} of {}", from.len(), self.bytes);
        self.gpu.make_current()?;
        // SAFETY: in bounds of an allocation that lives (1, 3), and `from` is borrowed until the copy is done.
        let copied = unsafe { result::memcpy_htod_async(self.address, from, stream.raw()) };
        check("cuMemcpyHtoDAsync", copied)?;
        stream.synchronize()
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: allocated by `cuMemAlloc`, freed once; lanes have waited for their streams (1).
            let _ = unsafe { result::memory_free(self.address) };
        }
    }
}

/// Bytes of page-locked host memory that the GPU reads and writes at the same address.
#[derive(Debug)]
pub(super) struct PinnedMemory {
    base: NonNull<u8>,
    bytes: usize,
    gpu: Arc<Gpu>,
}

// SAFETY: it owns its allocation; the accessors demand what makes shared access sound.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// Allocates zeroed memory. Cached, not write-combined: the host reads what comes back.
    pub(super) fn zeroed(gpu: &Arc<Gpu>, bytes: usize) -> Result<PinnedMemory, DriverError> {
        gpu.make_current()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let bytes = bytes.max(1);
        // SAFETY: the context is current (2).
        let base = check("cuMemHostAlloc", unsafe { result::malloc_host(bytes, flags) })?.cast::<u8>();
        let base = NonNull::new(base).ok_or_else(|| DriverError::Call {
            call: "cuMemHostAlloc",
            name: "null".into(),
            text: "no memory was returned".into(),
        })?;
        // SAFETY: all of the allocation, which nobody else knows yet.
        unsafe { base.as_ptr().write_bytes(0, bytes) };
        Ok(PinnedMemory { base, bytes, gpu: gpu.clone() })
    }

    /// Address for the host and, since addressing is unified, for the GPU.
    pub(super) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Copies bytes from `from` on. What the device writes to meanwhile is whatever it is; callers look at nothing of the kind (4).
    pub(super) fn read(&self, from: usize, to: &mut [u8]) {
        assert!(from + to.len() <= self.bytes, "{from}+{} of {}", to.len(), self.bytes);
        // SAFETY: in bounds (3) and initialised (8); slots that a view pins are not written to (4).
        unsafe { self.base.as_ptr().add(from).copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: allocated by `cuMemHostAlloc`, freed once; lanes have waited for their streams (1).
            let _ = unsafe { result::free_host(self.base.as_ptr().cast()) };
        }
    }
}

/// A page of ordinary memory that the GPU can write to. Unlike [`PinnedMemory`] it stays readable when the process ends and the
/// driver takes its memory back under threads that still look at it.
#[derive(Debug)]
pub(super) struct RegisteredPage {
    base: NonNull<u8>,
    address: u64,
    gpu: Arc<Gpu>,
}

// SAFETY: it owns its page; what is in it is read atomically.
unsafe impl Send for RegisteredPage {}
// SAFETY: as above.
unsafe impl Sync for RegisteredPage {}

impl RegisteredPage {
    const LAYOUT: Layout = match Layout::from_size_align(4096, 4096) {
        Ok(layout) => layout,
        Err(_) => panic!("4096 is a power of two"),
    };

    /// A page of zeros.
    pub(super) fn zeroed(gpu: &Arc<Gpu>) -> Result<RegisteredPage, DriverError> {
        gpu.make_current()?;
        let failed = || DriverError::Call {
            call: "allocating a page",
            name: "out of memory".into(),
            text: "the allocator refused 4096 bytes".into(),
        };
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(Self::LAYOUT) }).ok_or_else(failed)?;
        let mut page = RegisteredPage { base, address: 0, gpu: gpu.clone() };
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: a page of our own; the context is current (2).
        let registered =
            unsafe { sys::cuMemHostRegister_v2(base.as_ptr().cast(), Self::LAYOUT.size(), flags) };
        check("cuMemHostRegister", registered.result())?;
        // SAFETY: a place for the address of a page that is registered.
        let found = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut page.address, base.as_ptr().cast(), 0) };
        check("cuMemHostGetDevicePointer", found.result())?;
        Ok(page)
    }

    /// Address for the GPU.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for RegisteredPage {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: registered in `zeroed`, if that went well; lanes have waited for their streams (1).
            let _ = unsafe { sys::cuMemHostUnregister(self.base.as_ptr().cast()) };
        }
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.base.as_ptr(), Self::LAYOUT) }
    }
}

/// An ordered queue of work on a GPU.
#[derive(Debug)]
pub(super) struct Stream {
    raw: sys::CUstream,
    gpu: Arc<Gpu>,
}

// SAFETY: see [`Gpu`].
unsafe impl Send for Stream {}

impl Stream {
    /// A stream that does not wait for the legacy default stream.
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Stream, DriverError> {
        gpu.make_current()?;
        let raw = check("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        Ok(Stream { raw, gpu: gpu.clone() })
    }

    /// A stream whose thread blocks go before those of other streams: for kernels of few blocks that others wait for.
    pub(super) fn urgent(gpu: &Arc<Gpu>) -> Result<Stream, DriverError> {
        gpu.make_current()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: two places for numbers; the context is current (2).
        let range = unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) };
        check("cuCtxGetStreamPriorityRange", range.result())?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the handle; the context is current (2).
        let created = unsafe { sys::cuStreamCreateWithPriority(&mut raw, flags, greatest) };
        check("cuStreamCreateWithPriority", created.result())?;
        Ok(Stream { raw, gpu: gpu.clone() })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Waits until everything on the stream is done.
    pub(super) fn synchronize(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives (1).
        check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.raw) })
    }

    /// Has the stream wait for an event that was recorded.
    ///
    /// # Safety
    /// The event lives until the wait is done.
    pub(super) unsafe fn wait(&self, event: sys::CUevent) -> Result<(), DriverError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the stream lives (1), and the caller vouches for the event.
        check("cuStreamWaitEvent", unsafe { result::stream::wait_event(self.raw, event, flags) })
    }

    /// Copies `bytes` bytes between any two places that the GPU reaches, in stream order.
    ///
    /// # Safety
    /// Both ranges are in bounds and live until the copy is done, and nobody else writes to them (3, 4).
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: the caller vouches for it.
        check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(to, from, bytes, self.raw) }.result())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A point on a stream.
#[derive(Debug)]
pub(super) struct Event {
    raw: sys::CUevent,
    gpu: Arc<Gpu>,
}

// SAFETY: see [`Gpu`].
unsafe impl Send for Event {}
// SAFETY: the driver's calls on events may be made from several threads.
unsafe impl Sync for Event {}

impl Event {
    /// An event whose waiters sleep, and that takes no time stamp.
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Event, DriverError> {
        gpu.make_current()?;
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32
            | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the handle; the context is current (2).
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, flags) }.result())?;
        Ok(Event { raw, gpu: gpu.clone() })
    }

    pub(super) fn raw(&self) -> sys::CUevent {
        self.raw
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Marks the end of what is on `stream` now.
    pub(super) fn record(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the event lives (1); the caller's stream does too, since it is in use.
        check("cuEventRecord", unsafe { result::event::record(self.raw, stream) })
    }

    /// Sleeps until the point was reached.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        self.gpu.make_current()?;
        // SAFETY: the event lives (1).
        check("cuEventSynchronize", unsafe { result::event::synchronize(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

impl Point for Event {}

/// Code on a GPU.
pub(super) struct Module {
    raw: sys::CUmodule,
    gpu: Arc<Gpu>,
}

// SAFETY: see [`Gpu`].
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// One kernel of a [`Module`], valid while that lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function(sys::CUfunction);

// SAFETY: see [`Gpu`].
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// Where it is loaded.
    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Loads PTX; the driver compiles it for the GPU, or finds it in its cache.
    pub(super) fn load_ptx(gpu: &Arc<Gpu>, ptx: &str) -> Result<Module, DriverError> {
        let image = CString::new(ptx).map_err(|_| DriverError::Call {
            call: "cuModuleLoadData",
            name: "the PTX is broken".into(),
            text: "it holds a zero byte".into(),
        })?;
        // SAFETY: a text that ends in zero, as the driver wants PTX.
        unsafe { Module::load(gpu, image.as_ptr().cast()) }
    }

    /// Loads what was compiled for a GPU already.
    ///
    /// # Safety
    /// It is a whole cubin: the driver goes by the sizes in it.
    pub(super) unsafe fn load_cubin(gpu: &Arc<Gpu>, cubin: &[u8]) -> Result<Module, DriverError> {
        // SAFETY: passed on.
        unsafe { Module::load(gpu, cubin.as_ptr().cast()) }
    }

    /// # Safety
    /// PTX that ends in zero, or a whole cubin.
    unsafe fn load(gpu: &Arc<Gpu>, image: *const c_void) -> Result<Module, DriverError> {
        gpu.make_current()?;
        // SAFETY: passed on.
        let raw = check("cuModuleLoadData", unsafe { result::module::load_data(image) })?;
        Ok(Module { raw, gpu: gpu.clone() })
    }

    /// A kernel by name.
    pub(super) fn function(&self, name: &str) -> Result<Function, DriverError> {
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module lives (1).
        check("cuModuleGetFunction", unsafe { result::module::get_function(self.raw, name) }).map(Function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(_entered) = self.gpu.enter() {
            // SAFETY: loaded in `load`, unloaded once; lanes that launch its kernels hold it (1).
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}

impl Function {
    /// Asks for so many percent of each multiprocessor's shared memory: for a kernel whose blocks need much of it and little cache.
    ///
    /// # Errors
    /// Those of the driver.
    pub(super) fn prefer_shared_memory(self, percent: i32) -> Result<(), DriverError> {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: the function's module lives (1).
        check("cuFuncSetAttribute", unsafe {
            result::function::set_function_attribute(self.0, attribute, percent)
        })
    }

    /// Asks for as much shared memory as the blocks of `threads` threads need that a multiprocessor has registers for: the rest is a cache.
    ///
    /// # Errors
    /// Those of the driver.
    pub(super) fn prefer_cache(self, gpu: &Gpu, threads: u32) -> Result<(), DriverError> {
        let per_block = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK;
        let per_multiprocessor =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR;
        let of_function = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function's module lives (1).
        let bytes = unsafe { result::function::get_function_attribute(self.0, of_function) };
        let bytes = check("cuFuncGetAttribute", bytes)? + gpu.attribute(per_block)?;
        let needed = self.resident_blocks(threads)? * bytes.cast_unsigned();
        let all = gpu.attribute(per_multiprocessor)?.cast_unsigned();
        self.prefer_shared_memory((100 * needed).div_ceil(all.max(1)).min(100).cast_signed())
    }

    /// How many blocks of `threads` threads a multiprocessor has room for at once.
    ///
    /// # Errors
    /// Those of the driver.
    pub(super) fn resident_blocks(self, threads: u32) -> Result<u32, DriverError> {
        let threads = threads.cast_signed();
        // SAFETY: the function's module lives (1).
        let count = unsafe { result::occupancy::max_active_block_per_multiprocessor(self.0, threads, 0) };
        Ok(check("cuOccupancyMaxActiveBlocksPerMultiprocessor", count)?.cast_unsigned())
    }

    /// Launches it.
    ///
    /// # Safety
    /// `parameters` point to what the kernel takes (7), and everything that it will reach through them is in bounds, alive
    /// until it is done, and written by nobody else (3, 4).
    pub(super) unsafe fn launch(
        self,
        stream: &Stream,
        grid: (u32, u32, u32),
        threads: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        // SAFETY: the caller vouches for it.
        let launched =
            unsafe { result::launch_kernel(self.0, grid, (threads, 1, 1), 0, stream.raw, parameters) };
        check("cuLaunchKernel", launched)
    }
}
