//! candle's tensors in a GPU's memory: where they lie, the stream behind which they are ready, and the thread they go back to.

use std::any::Any;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::{CudaDType, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, Device, Storage, Tensor};
use cudarc::driver::{CudaStream, DevicePtr};
use half::{bf16, f16};
use kv_cache_actors::batch::DeviceSpan;

use super::interop::{DeviceTensor, Enqueued, StreamPoint};
use crate::batch::Outcome;
use crate::candle::failed;
use crate::sequence::unexpected;
use crate::{BatchCacheOperations, Element, ElementType, Error, Plane, Sequence};

/// The driver's handle of "the stream of the calling thread".
const PER_THREAD: usize = 2;

/// Tensors that the cache has finished with, and the thread that has computed them should free: freed on another, they would
/// be free before kernels of theirs have ended, on a stream that the other thread cannot name.
type Finished = Mutex<Vec<Tensor>>;

thread_local! {
    static FINISHED: RefCell<Arc<Finished>> = RefCell::default();
}

/// Frees what came back to this thread.
fn free_finished() {
    let finished = FINISHED.with_borrow(Arc::clone);
    let tensors = std::mem::take(&mut *finished.lock().unwrap_or_else(PoisonError::into_inner));
    drop(tensors);
}

/// A tensor that a batch keeps, of a device with a stream per thread.
#[derive(Debug)]
struct Kept {
    tensor: Option<Tensor>,
    home: Arc<Finished>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        let tensor = self.tensor.take();
        self.home.lock().unwrap_or_else(PoisonError::into_inner).extend(tensor);
    }
}

/// What keeps `tensor` alive until the cache is done with it.
fn owner(tensor: &Tensor, stream: &CudaStream) -> Arc<dyn Any + Send + Sync> {
    if stream.cu_stream() as usize != PER_THREAD {
        return Arc::new(tensor.clone());
    }
    Arc::new(Kept { tensor: Some(tensor.clone()), home: FINISHED.with_borrow(Arc::clone) })
}

fn span_of<T: CudaDType + Element>(
    storage: &CudaStorage,
    start: usize,
    stream: &CudaStream,
) -> Result<u64, Error> {
    let slice = storage.as_cuda_slice::<T>().map_err(failed)?;
    let (address, synchronised) = slice.device_ptr(stream);
    drop(synchronised);
    Ok(address + (start * size_of::<T>()) as u64)
}

/// A contiguous tensor in a GPU's memory.
fn device_tensor(tensor: &Tensor, stream: &CudaStream) -> Result<DeviceTensor, Error> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Unsupported { what: "a tensor that is not on a GPU", instead: "move it there" });
    };
    let start = layout.start_offset();
    let element = crate::candle::element_type(tensor)?;
    let address = match element {
        ElementType::F16 => span_of::<f16>(storage, start, stream)?,
        ElementType::Bf16 => span_of::<bf16>(storage, start, stream)?,
        ElementType::F32 => span_of::<f32>(storage, start, stream)?,
    };
    let owner = owner(tensor, stream);
    Ok(DeviceTensor::of_parts(stream.context().ordinal(), element, address, tensor.elem_count(), owner))
}

fn stream_of(tensor: &Tensor) -> Result<Arc<CudaStream>, Error> {
    tensor.device().as_cuda_device().map(CudaDevice::cuda_stream).map_err(failed)
}

/// Has `batch` read the tensors behind what this thread has put on their stream.
pub(crate) fn accept(
    batch: &mut BatchCacheOperations,
    keys: &Tensor,
    values: &Tensor,
) -> Result<(DeviceSpan, DeviceSpan), Error> {
    free_finished();
    let (of_keys, of_values) = (stream_of(keys)?, stream_of(values)?);
    let (keys, values) = (device_tensor(keys, &of_keys)?, device_tensor(values, &of_values)?);
    batch.ready_behind(StreamPoint::record(&of_keys)?);
    if of_keys.cu_stream() != of_values.cu_stream() {
        batch.ready_behind(StreamPoint::record(&of_values)?);
    }
    batch.accept(&keys, &values)?;
    Ok((keys.span(), values.span()))
}

/// Uninitialised tensors `[tokens, kv_heads, dim]`.
fn vacant(shape: [usize; 3], element: ElementType, device: &CudaDevice) -> Result<Tensor, Error> {
    fn of<T: CudaDType + Element + cudarc::driver::DeviceRepr>(
        elements: usize,
        device: &CudaDevice,
    ) -> Result<CudaStorage, Error> {
        // SAFETY: plain numbers, every one of which the read writes before the tensor is handed out.
        let slice = unsafe { device.alloc::<T>(elements) }.map_err(failed)?;
        Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
    }
    let elements = shape.iter().product();
    let storage = match element {
        ElementType::F16 => of::<f16>(elements, device)?,
        ElementType::Bf16 => of::<bf16>(elements, device)?,
        ElementType::F32 => of::<f32>(elements, device)?,
    };
    Ok(Tensor::from_storage(Storage::Cuda(storage), &shape, BackpropOp::none(), false))
}

/// Reads into new tensors on the GPU that holds the sequence.
pub(crate) async fn read(
    sequence: &Sequence,
    layer: u32,
    tokens: Range<u32>,
    device: &CudaDevice,
) -> Result<(Tensor, Tensor), Error> {
    let (tensors, batch) = into_vacant(sequence, layer, tokens, device)?;
    match sequence.submit_one(batch).await? {
        Outcome::ReadDevice { .. } => Ok(tensors),
        other => Err(unexpected(&other)),
    }
}

fn into_vacant(
    sequence: &Sequence,
    layer: u32,
    tokens: Range<u32>,
    device: &CudaDevice,
) -> Result<((Tensor, Tensor), BatchCacheOperations), Error> {
    let layout = sequence.layout();
    // An absurd range must not allocate: no sequence holds more.
    let count = tokens.len().min(sequence.len() as usize + layout.block_tokens);
    let vacant = |plane| vacant([count, layout.kv_heads, layout.dim(plane)], layout.element, device);
    let (keys, values) = (vacant(Plane::Key)?, vacant(Plane::Value)?);
    let mut batch = BatchCacheOperations::new();
    let (of_keys, of_values) = accept(&mut batch, &keys, &values)?;
    batch.0.read_device(sequence.id(), layer, tokens, of_keys, of_values);
    Ok(((keys, values), batch))
}

impl Enqueued {
    /// Has candle's stream wait for the batch's point, for whatever this thread launches next: until then the tensors that the
    /// batch reads must not be written to in place. Does nothing if there is no point.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn before_tensors_of(&self, device: &Device) -> Result<(), Error> {
        match (self.point(), device) {
            (Some(point), Device::Cuda(device)) => point.wait(&device.cuda_stream()),
            _ => Ok(()),
        }
    }
}
