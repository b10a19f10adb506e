//! The embedder's side of a GPU: tensors that are on it already, and points on the embedder's streams.
//! The example of `kv_cache::cuda` shows how the two go together.

use std::any::Any;
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, result, sys};
use kv_cache_actors::batch::{DeviceSpan, EachTensors};
use kv_cache_actors::reach::Point;
use kv_cache_actors::submission::Answered;
use kv_cache_actors::submit::Waiting;
use kv_cache_actors::supervisor::Supervisor;
use tokio::sync::oneshot;

use super::driver::{Event, Gpu, check, driver_is_present};
use crate::batch::ids;
use crate::{BatchCacheOperations, Cache, Element, ElementType, Error, Outcome, Sequence, SequenceId};

fn device_error(error: super::DriverError) -> Error {
    Error::Device(error.to_string().into())
}

/// A recorded event: everything that was on a stream when it was recorded.
#[derive(Debug, Clone)]
pub struct StreamPoint(Arc<Event>);

impl StreamPoint {
    /// The end of what is on `stream` now. Call it on the thread that put it there.
    ///
    /// # Errors
    /// [`Error::Unsupported`] while the stream is being captured into a graph; [`Error::Device`].
    pub fn record(stream: &CudaStream) -> Result<StreamPoint, Error> {
        // SAFETY: the stream lives, and belongs to the primary context of its GPU.
        unsafe { Self::record_raw(stream.context().ordinal(), stream.cu_stream()) }
    }

    /// [`StreamPoint::record`] for a stream of another library.
    ///
    /// # Errors
    /// As [`StreamPoint::record`]; [`Error::Unsupported`] for a stream of another context than the GPU's primary one.
    ///
    /// # Safety
    /// `stream` is a live stream.
    pub unsafe fn record_raw(ordinal: usize, stream: sys::CUstream) -> Result<StreamPoint, Error> {
        let gpu = Gpu::shared(ordinal).map_err(device_error)?;
        let _entered = gpu.enter().map_err(device_error)?;
        // SAFETY: the caller vouches for the stream.
        let capturing = unsafe { result::stream::is_capturing(stream) };
        let none = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        if check("cuStreamIsCapturing", capturing).map_err(device_error)? != none {
            return Err(Error::Unsupported {
                what: "a stream that is being captured into a graph",
                instead: "append outside of the capture",
            });
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for the handle; the caller vouches for the stream.
        check("cuStreamGetCtx", unsafe { sys::cuStreamGetCtx(stream, &mut context) }.result())
            .map_err(device_error)?;
        if context != gpu.context() {
            return Err(Error::Unsupported {
                what: "a stream of another context",
                instead: "use a stream of the GPU's primary context",
            });
        }
        let event =
            Event::new(&gpu).and_then(|event| event.record(stream).map(|()| event)).map_err(device_error)?;
        Ok(StreamPoint(Arc::new(event)))
    }

    /// Has `stream` wait for the point, without the host waiting.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn wait(&self, stream: &CudaStream) -> Result<(), Error> {
        // SAFETY: the stream lives.
        unsafe { self.wait_raw(stream.cu_stream()) }
    }

    /// [`StreamPoint::wait`] for a stream of another library.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// `stream` is a live stream.
    pub unsafe fn wait_raw(&self, stream: sys::CUstream) -> Result<(), Error> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event was recorded, and the driver keeps what a stream waits for; the caller vouches for the stream.
        check("cuStreamWaitEvent", unsafe { result::stream::wait_event(stream, self.0.raw(), flags) })
            .map_err(device_error)
    }

    /// Waits on this thread.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn synchronize(&self) -> Result<(), Error> {
        self.0.wait().map_err(device_error)
    }

    fn ordinal(&self) -> usize {
        self.0.gpu().ordinal()
    }
}

/// A tensor in a GPU's memory, or a part of one. Cheap to slice: a decode step slices one tensor per sequence.
#[derive(Debug, Clone)]
pub struct DeviceTensor {
    device: u16,
    element: ElementType,
    address: u64,
    elements: usize,
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl DeviceTensor {
    /// The elements of a cudarc slice, which is kept alive as long as the cache needs it. Call it before
    /// [`StreamPoint::record`]: `stream` waits for whatever still writes to the slice, and the point has to come behind that.
    pub fn new<T: Element>(slice: &Arc<CudaSlice<T>>, stream: &CudaStream) -> DeviceTensor {
        let (address, synchronised) = slice.device_ptr(stream);
        drop(synchronised);
        DeviceTensor {
            device: slice.context().ordinal() as u16,
            element: T::TYPE,
            address,
            elements: slice.len(),
            owner: Some(slice.clone()),
        }
    }

    /// Elements at an address of a GPU's memory.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the elements do not lie in one allocation of a GPU, or not at a multiple of their size.
    ///
    /// # Safety
    /// The memory stays allocated until every batch that names it is done, and nobody writes to it between the point given to
    /// [`BatchCacheOperations::device_memory`] and [`Enqueued::point`]. What [`BatchCacheOperations::read_device`] writes,
    /// nobody reads in between.
    pub unsafe fn from_raw<T: Element>(address: u64, elements: usize) -> Result<DeviceTensor, Error> {
        let foreign = Error::Unsupported {
            what: "device memory outside of an allocation of a GPU",
            instead: "give an address and a length inside of one",
        };
        if !driver_is_present() || !address.is_multiple_of(size_of::<T>() as u64) {
            return Err(foreign);
        }
        let (mut ordinal, mut start, mut bytes) = (-1i32, 0u64, 0usize);
        let ask = |which, to: *mut std::ffi::c_void| {
            // SAFETY: a place of the attribute's size; any address may be asked for.
            unsafe { sys::cuPointerGetAttribute(to, which, address) }.result().is_ok()
        };
        let known =
            ask(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, (&raw mut ordinal).cast())
                && ask(
                    sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                    (&raw mut start).cast(),
                )
                && ask(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, (&raw mut bytes).cast());
        let end = elements.checked_mul(size_of::<T>()).and_then(|bytes| address.checked_add(bytes as u64));
        match end {
            Some(end) if known && ordinal >= 0 && start <= address && end <= start + bytes as u64 => {
                Ok(DeviceTensor { device: ordinal as u16, element: T::TYPE, address, elements, owner: None })
            }
            _ => Err(foreign),
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// Some of the elements. Those behind the end are left out, and the operation's shape check finds them missing.
    #[must_use]
    pub fn slice(&self, elements: Range<usize>) -> DeviceTensor {
        let end = elements.end.min(self.elements);
        let start = elements.start.min(end);
        let address = self.address + (start * self.element.bytes()) as u64;
        DeviceTensor { address, elements: end - start, ..self.clone() }
    }

    #[cfg(feature = "candle-cuda")]
    pub(super) fn of_parts(
        ordinal: usize,
        element: ElementType,
        address: u64,
        elements: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> DeviceTensor {
        DeviceTensor { device: ordinal as u16, element, address, elements, owner: Some(owner) }
    }

    pub(super) fn span(&self) -> DeviceSpan {
        let bytes = self.elements * self.element.bytes();
        DeviceSpan { element: self.element, address: self.address, bytes }
    }
}

/// Operations on tensors in device memory. The batch must name the point behind which they may be touched first.
impl BatchCacheOperations {
    /// The batch's device tensors may be touched once `after` is reached. All of them are on its GPU. Called again, it adds a
    /// point; one on another GPU adds nothing, and tensors there are refused.
    ///
    /// The GPU's compute lane waits for the point, in order: record it when what it stands for is nearly done, not long before.
    pub fn device_memory(mut self, after: StreamPoint) -> Self {
        self.ready_behind(after);
        self
    }

    pub(super) fn ready_behind(&mut self, after: StreamPoint) {
        let device = after.ordinal() as u16;
        let ready: Arc<dyn Point> = after.0;
        self.0.device_source(device, ready);
    }

    /// [`BatchCacheOperations::append`] of tensors in device memory. Nothing crosses the bus.
    pub fn append_device(
        mut self,
        sequence: impl Into<SequenceId>,
        token_ids: &[u32],
        keys: &DeviceTensor,
        values: &DeviceTensor,
    ) -> Self {
        match self.accept(keys, values) {
            Ok(()) => self.0.append_device(sequence.into(), token_ids, None, keys.span(), values.span()),
            Err(error) => self.0.refused(error),
        }
        self
    }

    /// [`BatchCacheOperations::append_each`] of tensors in device memory.
    pub fn append_each_device(
        mut self,
        sequences: &[&Sequence],
        token_ids: &[u32],
        keys: &DeviceTensor,
        values: &DeviceTensor,
    ) -> Self {
        match self.accept(keys, values) {
            Ok(()) => {
                self.0.append_each(ids(sequences), token_ids, EachTensors::Device(keys.span(), values.span()))
            }
            Err(error) => sequences.iter().for_each(|_| self.0.refused(error.clone())),
        }
        self
    }

    /// [`BatchCacheOperations::stage_each`] of tensors in device memory.
    pub fn stage_each_device(
        mut self,
        sequences: &[&Sequence],
        layer: u32,
        keys: &DeviceTensor,
        values: &DeviceTensor,
    ) -> Self {
        match self.accept(keys, values) {
            Ok(()) => {
                self.0.stage_each(ids(sequences), layer, EachTensors::Device(keys.span(), values.span()))
            }
            Err(error) => sequences.iter().for_each(|_| self.0.refused(error.clone())),
        }
        self
    }

    /// [`BatchCacheOperations::stage`] of tensors in device memory.
    pub fn stage_device(
        mut self,
        sequence: impl Into<SequenceId>,
        layer: u32,
        tokens: u32,
        keys: &DeviceTensor,
        values: &DeviceTensor,
    ) -> Self {
        match self.accept(keys, values) {
            Ok(()) => self.0.stage_device(sequence.into(), layer, tokens, keys.span(), values.span()),
            Err(error) => self.0.refused(error),
        }
        self
    }

    /// [`BatchCacheOperations::read`] into device memory: [`Outcome::ReadDevice`].
    ///
    /// # Safety
    /// Until the point of [`Cache::enqueue`] is reached nobody else reads or writes the tensors, also if they are slices of
    /// something that is shared.
    pub unsafe fn read_device(
        mut self,
        sequence: impl Into<SequenceId>,
        layer: u32,
        tokens: Range<u32>,
        keys: &DeviceTensor,
        values: &DeviceTensor,
    ) -> Self {
        match self.accept(keys, values) {
            Ok(()) => self.0.read_device(sequence.into(), layer, tokens, keys.span(), values.span()),
            Err(error) => self.0.refused(error),
        }
        self
    }

    /// Keeps the tensors' owners, if the tensors are where the batch says.
    pub(super) fn accept(&mut self, keys: &DeviceTensor, values: &DeviceTensor) -> Result<(), Error> {
        let device = self.0.device();
        if device != Some(keys.device) || device != Some(values.device) {
            return Err(Error::Unsupported {
                what: "a device tensor on another GPU than the batch's, or before the batch names one",
                instead: "call `device_memory` first, with a point on the tensors' GPU",
            });
        }
        [keys, values]
            .into_iter()
            .filter_map(|tensor| tensor.owner.as_ref())
            .for_each(|owner| self.0.keep(owner));
        Ok(())
    }
}

/// A batch that is on its device's queue. See [`Cache::enqueue`].
#[derive(Debug)]
#[must_use = "whoever does not wait for `done` never learns whether the tensors were finite"]
pub struct Enqueued {
    point: Option<StreamPoint>,
    results: Results,
    cache: Cache,
}

#[derive(Debug)]
enum Results {
    Waiting(Waiting<Arc<Supervisor>>),
    There(Answered),
}

impl Enqueued {
    /// Behind it the batch's device tensors are the caller's again. None if there is nothing to wait for: the batch has no
    /// device tensors, or is done.
    pub fn point(&self) -> Option<&StreamPoint> {
        self.point.as_ref()
    }

    /// Waits for the results, in the batch's order: finite, and committed.
    ///
    /// # Errors
    /// As [`Cache::submit`].
    pub async fn done(self) -> Result<Vec<Result<Outcome, Error>>, Error> {
        let answered = match self.results {
            Results::Waiting(waiting) => waiting.await?,
            Results::There(answered) => answered,
        };
        Ok(self.cache.outcomes(answered))
    }
}

impl Cache {
    /// Submits a batch and returns once it is on its device's queue: before its device tensors are read, with a point to wait
    /// for on the caller's stream. Only operations on device tensors count for that. An operation that waits for an earlier one of its sequence is on the queue once that is done.
    ///
    /// Cancel-safe as [`Cache::submit`] is: dropped later, the operations take effect all the same. Device memory that was
    /// given by address must stay as it is until then.
    ///
    /// # Errors
    /// As [`Cache::submit`].
    pub async fn enqueue(&self, batch: BatchCacheOperations) -> Result<Enqueued, Error> {
        let mut batch = batch.0;
        let enqueued = batch.expect_enqueued();
        let waiting = self.submitter().submit_only(batch).await?;
        until_enqueued(self.clone(), enqueued, waiting).await
    }

    /// [`Cache::enqueue`] that submits before it returns, if permits are free, and otherwise gives the batch back with the
    /// reason ([`Error::Overloaded`]). Batches take effect in the order of these calls, however their futures are polled: a
    /// server can have several steps under way.
    ///
    /// # Errors
    /// The batch, as it was, with what [`Cache::submit`] would have said.
    // The error is the batch, handed back as it came: boxing it would be the caller's loss.
    #[allow(clippy::type_complexity, clippy::result_large_err)]
    pub fn try_enqueue(
        &self,
        batch: BatchCacheOperations,
    ) -> Result<impl Future<Output = Result<Enqueued, Error>> + Send + use<>, (BatchCacheOperations, Error)>
    {
        let mut batch = batch.0;
        let enqueued = batch.expect_enqueued();
        match self.submitter().try_submit(batch) {
            Ok(waiting) => Ok(until_enqueued(self.clone(), enqueued, waiting)),
            Err((batch, error)) => Err((BatchCacheOperations(batch), error)),
        }
    }
}

/// Waits until a submitted batch is on its device's queue, or done.
async fn until_enqueued(
    cache: Cache,
    enqueued: Option<oneshot::Receiver<Arc<dyn Point>>>,
    mut waiting: Waiting<Arc<Supervisor>>,
) -> Result<Enqueued, Error> {
    let Some(mut enqueued) = enqueued else {
        return Ok(Enqueued { point: None, results: Results::Waiting(waiting), cache });
    };
    let mut gone = false;
    let first = poll_fn(|context| {
        if !gone {
            match Pin::new(&mut enqueued).poll(context) {
                Poll::Ready(Ok(point)) => return Poll::Ready(Ok(point)),
                // An operation has failed before it got there: the answer comes, and says so.
                Poll::Ready(Err(_)) => gone = true,
                Poll::Pending => {}
            }
        }
        Pin::new(&mut waiting).poll(context).map(Err)
    });
    match first.await {
        Ok(point) => {
            let point: Arc<dyn Any + Send + Sync> = point;
            let point = point.downcast::<Event>().ok().map(StreamPoint);
            Ok(Enqueued { point, results: Results::Waiting(waiting), cache })
        }
        Err(answered) => Ok(Enqueued { point: None, results: Results::There(answered?), cache }),
    }
}
