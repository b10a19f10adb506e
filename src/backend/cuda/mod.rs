//! The CUDA device: a slab of GPU memory, and lanes that are streams.
//!
//! | on the CPU device | here |
//! |---|---|
//! | slab | one `cuMemAlloc`, addressed from its first byte |
//! | lane | a stream, a ring of page-locked staging memory, a fence word that the stream counts up |
//! | launch | at most one kernel of each kind, however many steps; payloads, and descriptors of few layers, are read by the kernels where they lie |
//! | launch done | the fence word has reached the launch's ticket |
//!
//! Nothing here needs a CUDA toolkit: the driver is loaded at run time, and the kernels come with the crate, compiled or as PTX.
//!
//! # Safety chapter
//!
//! `SAFETY` comments name the invariant that they rely on.
//!
//! 1. **Handles live.** A stream, event, module or allocation is owned by one value of `driver.rs`, which destroys it when it is
//!    dropped and keeps the context alive until then. Lanes wait for their stream before they drop what it uses, so nothing in
//!    flight outlives its memory. After a sticky error nothing is in flight any more.
//! 2. **The context is current.** Every thread that calls the driver has made the context current before: lanes do so on their
//!    first call on a thread. The driver counts users of the primary context, which the embedder may share.
//! 3. **Addresses are in bounds.** Descriptors are made from steps of the device core, whose offsets name slots inside the slab,
//!    and from ranges of the ring, of a payload or of an output that were checked when they were taken. Positions of tokens are below
//!    `max_tokens`, so their blocks have turns in the tables of the centres.
//! 4. **One writer.** As on the CPU device: a step writes only slots (or rows) that its launch owns, readers hold pins.
//!    Steps of one launch run kind by kind (zero, copy, reopen, append, seal, read), which keeps every order that the core relies on:
//!    steps that prepare a slot come before the append to it, and no other two steps of a launch touch the same bytes.
//! 5. **Rings are not reused early.** Bytes of a ring go back only once the fence word has passed the ticket that used them.
//! 6. **The host reads what the device wrote only behind its ticket.** The fence word is written by the stream after, and with
//!    a system-wide barrier behind, everything before it; the host reads it with acquire ordering.
//! 7. **Layouts agree.** Structs handed to kernels are `repr(C)` mirrors of those in the `.cu` sources and hold plain integers.
//!    `copies.rs` mirrors one struct and one function of the driver's API, and asks for them by the version that has them.
//! 8. **Plain memory.** Page-locked memory is allocated zeroed and holds bytes only.
//! 9. **Staging buffers pass from hand to hand.** The stream that fills one waits for the event behind its last draining, the stream
//!    that drains it for the event behind its filling; both are recorded before they are waited for.
//! 10. **Tickets of an engine come in order.** They are issued on one stream; on another only behind all that were issued before,
//!     or while none is outstanding.
//! 11. **Cubins are whole.** They are made with the crate, and CI compares; a frame whose checksum is wrong is not handed to the driver.

mod abi;
#[cfg(feature = "candle-cuda")]
pub(crate) mod candle;
mod compound;
mod copies;
mod driver;
mod fence;
mod image;
pub(crate) mod interop;
mod kernels;
mod lane;
mod lender;
pub(crate) mod measure;
mod ring;
pub(crate) mod table;
pub(crate) mod transfer;
mod unit;

use std::ops::Range;
use std::sync::Arc;

use kv_cache_actors::format::Ladder;
use kv_cache_actors::geometry::BlockLayout;
use kv_cache_actors::memory::{Backend, LaneKind, Lanes};
use kv_cache_actors::pool::PoolLayout;

use super::HostCopy;
use crate::error::Error;
use crate::key_means::Centres;
use crate::view::Pinned;

use self::driver::{DeviceMemory, PinnedMemory};
pub(crate) use self::driver::{DriverError, Gpu, usable_gpus};
use self::kernels::Kernels;
use self::lane::CudaLane;
pub(crate) use self::lender::Lender;
use self::table::Tables;
use self::transfer::Traffic;

/// Lanes of a device with a ring of page-locked memory each.
pub(crate) const RINGS: u64 = 3;

/// The memory of an open CUDA device, shared by its lanes and by the handles that export addresses of it.
#[derive(Debug)]
pub(crate) struct Slab {
    memory: DeviceMemory,
    /// The host tier, whose offsets begin where the slab ends.
    host: PinnedMemory,
    /// What its lanes carry between the two.
    traffic: Arc<Traffic>,
    tables: Tables,
}

impl Slab {
    /// Allocates `bytes` zero bytes on `gpu`, and `host_bytes` of page-locked memory as its host tier.
    pub(crate) fn allocate(gpu: &Arc<Gpu>, bytes: usize, host_bytes: usize) -> Result<Slab, DriverError> {
        let (memory, host) = (DeviceMemory::zeroed(gpu, bytes)?, PinnedMemory::zeroed(gpu, host_bytes)?);
        Ok(Slab { memory, host, traffic: Arc::default(), tables: Tables::default() })
    }

    fn has_host_tier(&self) -> bool {
        // An empty one has a byte, since the driver allocates no less.
        self.host.bytes() > 1
    }

    /// Where the byte at an offset lies, for kernels: in the slab or, behind its end, in the host tier.
    pub(crate) fn address_of(&self, offset: usize) -> u64 {
        match offset.checked_sub(self.memory.bytes()) {
            None => self.memory.address() + offset as u64,
            Some(in_host) => self.host.address() + in_host as u64,
        }
    }

    /// Where the slab begins in the GPU's memory.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// A copy of the bytes of `range`, a slot that `view` pins. Waits for the copy, on no lane.
    pub(crate) fn pinned(&self, range: Range<usize>, view: &Pinned) -> Result<HostCopy, Error> {
        let _ = view;
        let mut copy = vec![0u64; range.len().div_ceil(size_of::<u64>())];
        let bytes = &mut bytemuck::cast_slice_mut(&mut copy)[..range.len()];
        if let Some(in_host) = range.start.checked_sub(self.memory.bytes()) {
            self.host.read(in_host, bytes);
            return Ok(copy);
        }
        self.memory.read(range.start, bytes).map_err(|error| Error::Device(error.to_string().into()))?;
        Ok(copy)
    }

    /// Memory for tables of its blocks.
    fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The GPU that it lies on.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        self.memory.gpu()
    }
}

/// A CUDA device to be opened over a slab.
pub(crate) struct CudaBackend {
    slab: Arc<Slab>,
    ring_bytes: usize,
    calibrate: bool,
    gathers: bool,
    centres: Option<Arc<Centres>>,
}

impl CudaBackend {
    /// `ring_bytes` of page-locked memory go to each lane. `calibrate`: the ways over the bus are timed at start. `gathers`: tokens may be
    /// dropped by scores, for which the compute lane has memory of its own. Sealed keys are
    /// differences from `centres`, if there are any.
    pub(crate) fn new(
        slab: Arc<Slab>,
        ring_bytes: usize,
        calibrate: bool,
        gathers: bool,
        centres: Option<Arc<Centres>>,
    ) -> Self {
        CudaBackend { slab, ring_bytes, calibrate, gathers, centres }
    }
}

impl Backend for CudaBackend {
    type Lane = CudaLane;

    fn open(self, block: &BlockLayout, _: &PoolLayout, formats: &Ladder) -> Result<Lanes<CudaLane>, String> {
        let gpu = self.slab.gpu().clone();
        let open = || -> Result<Lanes<CudaLane>, DriverError> {
            let kernels = Arc::new(Kernels::load(&gpu, block, *formats, self.centres.as_deref())?);
            let lane = |kind| {
                CudaLane::open(
                    kind,
                    self.slab.clone(),
                    kernels.clone(),
                    *block,
                    self.ring_bytes,
                    self.calibrate,
                    self.gathers && kind == LaneKind::Compute,
                )
            };
            Ok(Lanes {
                compute: lane(LaneKind::Compute)?,
                upload: lane(LaneKind::Upload)?,
                download: lane(LaneKind::Download)?,
            })
        };
        open().map_err(|error| error.to_string())
    }
}
