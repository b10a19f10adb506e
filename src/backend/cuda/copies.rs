//! Many copies in one call of the driver: from 64 KiB each on they come close to one long copy, where a call for each reaches a third.

use std::ffi::c_void;
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::driver::{DriverError, Stream, check};

/// Copies that are gathered for one call of the driver, as the lists that it takes. Those of a call run in any order.
#[derive(Debug, Default)]
pub(super) struct Copies {
    to: Vec<u64>,
    from: Vec<u64>,
    bytes: Vec<usize>,
    /// Copies of the next call.
    most: usize,
}

impl Copies {
    /// Copies of a call. The driver takes 0.7 µs for each, and the device begins once the call was made; between calls it pauses for
    /// some 2 µs. Of 64 KiB each, calls of 16, 64 and 512 came to .88, .96 and .93 of one long copy.
    const MOST: usize = 64;
    /// Copies of the first call while the device idles. The next ones grow by half each: no copy that is worth it is made in less
    /// time than the driver takes for one and a half.
    const FIRST: usize = 8;

    /// The device waits for what is pushed next.
    pub(super) fn hurry(&mut self) {
        self.most = Self::FIRST;
    }

    /// Adds a copy, and sends all to `stream` when there are enough.
    ///
    /// # Safety
    /// As of [`Copies::send`].
    pub(super) unsafe fn push(
        &mut self,
        to: u64,
        from: u64,
        bytes: usize,
        stream: &Stream,
    ) -> Result<(), DriverError> {
        self.to.push(to);
        self.from.push(from);
        self.bytes.push(bytes);
        if self.bytes.len() < self.most {
            return Ok(());
        }
        self.most = (self.most + self.most / 2).clamp(Self::FIRST, Self::MOST);
        // SAFETY: passed on.
        unsafe { self.send(stream) }
    }

    /// Puts what was added on `stream`: behind what is there, before what follows.
    ///
    /// # Safety
    /// As of [`Stream::copy`] for each copy; and none writes to where another reads or writes.
    pub(super) unsafe fn send(&mut self, stream: &Stream) -> Result<(), DriverError> {
        // SAFETY: passed on.
        let sent = unsafe { self.send_all(stream) };
        self.to.clear();
        self.from.clear();
        self.bytes.clear();
        sent
    }

    /// # Safety
    /// As of [`Copies::send`].
    unsafe fn send_all(&mut self, stream: &Stream) -> Result<(), DriverError> {
        // A single one starts sooner by itself.
        if self.bytes.len() > 1
            && let Some(batch) = copies_in_one_call()
        {
            let mut attributes =
                CopyAttributes { source_order: CopyAttributes::IN_STREAM_ORDER, ..Default::default() };
            let (mut applies_from, mut failed_at) = (0usize, 0usize);
            let [to, from] = [&mut self.to, &mut self.from].map(Vec::as_mut_ptr);
            let (bytes, count) = (self.bytes.as_mut_ptr(), self.bytes.len());
            // SAFETY: three lists of as many items, attributes for all from the first on, and a place for a number (7); the
            // caller vouches for what the lists name.
            let copied = unsafe {
                batch(
                    to,
                    from,
                    bytes,
                    count,
                    &mut attributes,
                    &mut applies_from,
                    1,
                    &mut failed_at,
                    stream.raw(),
                )
            };
            if copied != sys::CUresult::CUDA_ERROR_NOT_SUPPORTED {
                return check("cuMemcpyBatchAsync", copied.result());
            }
        }
        let mut each = self.to.iter().zip(&self.from).zip(&self.bytes);
        // SAFETY: passed on.
        each.try_for_each(|((to, from), bytes)| unsafe { stream.copy(*to, *from, *bytes) })
    }
}

/// `CUmemcpyAttributes` of CUDA 12.8: the order of accesses, hints for managed memory (a kind and a number each), flags.
#[derive(Debug, Default)]
#[repr(C)]
struct CopyAttributes {
    source_order: u32,
    hints: [[i32; 2]; 2],
    flags: u32,
}

impl CopyAttributes {
    /// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`.
    const IN_STREAM_ORDER: u32 = 1;
}

/// `cuMemcpyBatchAsync` of CUDA 12.8: destinations, sources, sizes, how many; attributes, the first copy that each applies to, how
/// many; the copy that failed; the stream.
type CopyBatch = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut CopyAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> sys::CUresult;

/// The driver's call for many copies at once, from 12.8 on. The bindings are of an older version, which more drivers have.
fn copies_in_one_call() -> Option<CopyBatch> {
    const VERSION: i32 = 12_080;
    static FOUND: OnceLock<Option<CopyBatch>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let mut found = std::ptr::null_mut();
        let mut status = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
        let name = c"cuMemcpyBatchAsync".as_ptr();
        // SAFETY: a name, and places for an address and a status.
        let asked = unsafe { sys::cuGetProcAddress_v2(name, &mut found, VERSION, 0, &mut status) };
        if asked != sys::CUresult::CUDA_SUCCESS || found.is_null() {
            tracing::info!(target: "kv_cache::cuda", "the driver has no batches of copies (CUDA 12.8): they go one by one");
            return None;
        }
        // SAFETY: asked for by the version that has this signature (7).
        Some(unsafe { std::mem::transmute::<*mut c_void, CopyBatch>(found) })
    })
}
