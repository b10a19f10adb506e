//! The GPU as an embedder uses it: a stream, tensors, and the kernels of the tests.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig,
    PushKernelArg, result,
};
use cudarc::nvrtc::Ptx;
use kv_cache::cuda::{DeviceTensor, StreamPoint};
use kv_cache::half::f16;
use kv_cache::*;

use crate::common::{Combo, Number, Rig, SETUPS, Tokens};

/// An element type that can be copied to a GPU.
pub(crate) trait OnDevice: Number + DeviceRepr {}

impl<T: Number + DeviceRepr> OnDevice for T {}

/// Longer than everything that the host does meanwhile; nothing depends on it but that a mistake would show.
pub(crate) const DELAY_MS: u64 = 50;

/// The first GPU, with a stream that is not the cache's.
pub(crate) struct Device {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
}

impl Device {
    /// The GPU, or a printed reason why there is none.
    pub(crate) fn open() -> Option<Device> {
        if let Err(reason) = Devices::gpus_found() {
            println!("skipped: {reason}");
            return None;
        }
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let module = context.load_module(Ptx::from_src(include_str!("kernels/test.ptx"))).unwrap();
        Some(Device { context, stream, module })
    }

    pub(crate) fn kernel(&self, name: &str) -> CudaFunction {
        self.module.load_function(name).unwrap()
    }

    /// The end of what is on the stream now.
    pub(crate) fn point(&self) -> StreamPoint {
        StreamPoint::record(&self.stream).unwrap()
    }

    /// A copy of `elements` in the GPU's memory.
    pub(crate) fn upload<T: OnDevice>(&self, elements: &[T]) -> DeviceTensor {
        let slice = Arc::new(self.stream.clone_htod(elements).unwrap());
        DeviceTensor::new(&slice, &self.stream)
    }

    /// Keys and values of tokens.
    pub(crate) fn upload_tokens<T: OnDevice>(&self, tokens: &Tokens<T>) -> [DeviceTensor; 2] {
        [self.upload(&tokens.keys), self.upload(&tokens.values)]
    }

    /// Memory for `elements` elements, all zero.
    pub(crate) fn memory<T: OnDevice>(&self, elements: usize) -> Shared<T> {
        self.memory_of(&vec![T::from_f32(0.0); elements])
    }

    /// Memory that holds `elements`, once the stream is there.
    pub(crate) fn memory_of<T: OnDevice>(&self, elements: &[T]) -> Shared<T> {
        let slice = Arc::new(self.stream.clone_htod(elements).unwrap());
        let (address, guard) = slice.device_ptr(&self.stream);
        drop(guard);
        Shared { slice, address }
    }

    /// Has the stream do nothing for a while.
    pub(crate) fn delay(&self, ms: u64) {
        let (kernel, ns) = (self.kernel("delay"), ms * 1_000_000);
        let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes a number and touches no memory.
        unsafe { self.stream.launch_builder(&kernel).arg(&ns).launch(config) }.unwrap();
    }

    /// Writes `value` to all of `memory`, on the stream.
    pub(crate) fn fill(&self, memory: &Shared<f16>, value: f16) {
        let (kernel, count, bits) = (self.kernel("fill16"), memory.len() as u32, value.to_bits());
        let config = LaunchConfig { grid_dim: (256, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.stream.launch_builder(&kernel);
        launch.arg(&memory.address).arg(&count).arg(&bits);
        // SAFETY: the kernel takes an address, here of `count` elements of 16 bits, and the value.
        unsafe { launch.launch(config) }.unwrap();
    }

    /// Copies all of `from` to `to`, on the stream.
    pub(crate) fn copy<T>(&self, to: &Shared<T>, from: &Shared<T>) {
        let bytes = from.len().min(to.len()) * size_of::<T>();
        self.context.bind_to_thread().unwrap();
        // SAFETY: two allocations of at least so many bytes, which live until the tests have waited for the stream.
        unsafe { result::memcpy_dtod_async(to.address, from.address, bytes, self.stream.cu_stream()) }
            .unwrap();
    }

    /// The elements, once everything on the stream is done.
    pub(crate) fn download<T: OnDevice>(&self, memory: &Shared<T>) -> Vec<T> {
        let elements = self.stream.clone_dtoh(&*memory.slice).unwrap();
        self.stream.synchronize().unwrap();
        elements
    }
}

/// Memory that the tests write to while the cache knows its address.
pub(crate) struct Shared<T> {
    slice: Arc<CudaSlice<T>>,
    pub(crate) address: u64,
}

impl<T> Shared<T> {
    pub(crate) fn len(&self) -> usize {
        self.slice.len()
    }
}

impl<T: OnDevice> Shared<T> {
    /// As a tensor, which keeps the memory.
    pub(crate) fn tensor(&self, device: &Device) -> DeviceTensor {
        DeviceTensor::new(&self.slice, &device.stream)
    }
}

/// A cache on the GPU, and the GPU; prints the reason if there is none.
pub(crate) async fn rig<E: OnDevice>(
    format: impl Into<BlockFormat>,
    geometry: Geometry,
    change: impl FnOnce(CacheBuilder) -> CacheBuilder,
) -> Option<(Device, Rig<E>)> {
    let setup = SETUPS.iter().find(|setup| setup.name == "cuda").unwrap();
    let combo = Combo { setup, format: format.into(), geometry };
    let builder = combo.builder()?;
    Some((Device::open()?, Rig::new(&combo, change(builder)).await))
}

/// Submits a batch as a step of a model, and waits for its results.
pub(crate) async fn enqueue(cache: &Cache, batch: BatchCacheOperations) -> Vec<Result<Outcome, Error>> {
    cache.enqueue(batch).await.unwrap().done().await.unwrap()
}

/// Every operation has worked.
pub(crate) async fn enqueue_all(cache: &Cache, batch: BatchCacheOperations) -> Vec<Outcome> {
    enqueue(cache, batch).await.into_iter().map(|result| result.unwrap()).collect()
}
