//! How the host learns that a stream has come to a point: a word that the stream counts up, and a thread that sleeps for it.
//!
//! Looking at the word costs a load, so an actor that expects more work spins on it. An actor that wants to sleep *arms* the
//! waiter first: a thread that sleeps in the driver and rings the actor's doorbell. No timer is involved in either. An error that
//! ended the device shows up in the waiter's sleep, never in the word.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;

use cudarc::driver::sys;
use kv_cache_actors::memory::Doorbell;

use super::driver::{DriverError, Event, Gpu, RegisteredPage, Stream, check};
use super::kernels::Kernels;

/// Counts what is done on one stream.
pub(super) struct Fence {
    word: RegisteredPage,
    signal: Signal,
    issued: u64,
}

/// How the stream writes the word.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signal {
    /// By itself.
    StreamWrite,
    /// With a kernel of one thread: plain, and a launch more.
    Kernel,
}

impl Fence {
    /// A fence of a stream on which nothing has happened yet.
    pub(super) fn new(stream: &Stream, kernels: &Kernels) -> Result<Fence, DriverError> {
        let word = RegisteredPage::zeroed(stream.gpu())?;
        let mut fence = Fence { word, signal: Signal::StreamWrite, issued: 0 };
        if let Err(error) = fence.issue(stream, kernels).and_then(|_| stream.synchronize()) {
            tracing::warn!(target: "kv_cache::cuda", %error, "streams cannot write memory here: a kernel does it instead");
            fence.signal = Signal::Kernel;
            fence.issue(stream, kernels)?;
            stream.synchronize()?;
        }
        Ok(fence)
    }

    /// The ticket that comes next.
    pub(super) fn next_ticket(&self) -> u64 {
        self.issued + 1
    }

    /// Adds a point behind everything on the stream, and returns its ticket.
    pub(super) fn issue(&mut self, stream: &Stream, kernels: &Kernels) -> Result<u64, DriverError> {
        self.issued += 1;
        let (address, ticket) = (self.word.address(), self.issued);
        match self.signal {
            Signal::StreamWrite => {
                let flags = sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
                // SAFETY: the word is page-locked memory of ours, written by this stream alone (6).
                let written = unsafe { sys::cuStreamWriteValue64_v2(stream.raw(), address, ticket, flags) };
                check("cuStreamWriteValue64", written.result())?;
            }
            Signal::Kernel => kernels.signal(stream, address, ticket)?,
        }
        Ok(ticket)
    }

    /// The last ticket whose point was reached.
    pub(super) fn reached(&self) -> u64 {
        // SAFETY: a page of ours, aligned, that the device writes 8 bytes at a time (6).
        let word = unsafe { AtomicU64::from_ptr(self.word.base().as_ptr().cast()) };
        word.load(Ordering::Acquire)
    }
}

/// Sleeps until events are reached, and rings a doorbell then.
pub(super) struct Waiter {
    gpu: Arc<Gpu>,
    events: Option<(mpsc::Sender<Event>, JoinHandle<()>)>,
    doorbell: Option<Doorbell>,
    lost: Arc<OnceLock<DriverError>>,
}

impl Drop for Waiter {
    /// What it waits for has been reached by now, or never will be and the driver says so: its owner synchronises the stream first.
    fn drop(&mut self) {
        if let Some((events, thread)) = self.events.take() {
            drop(events);
            // An error means that it has panicked, and ended.
            let _ = thread.join();
        }
    }
}

impl Waiter {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        Waiter { gpu: gpu.clone(), events: None, doorbell: None, lost: Arc::default() }
    }

    pub(super) fn set_doorbell(&mut self, doorbell: Doorbell) {
        self.doorbell = Some(doorbell);
    }

    /// Rings at once.
    pub(super) fn ring(&self) {
        if let Some(doorbell) = &self.doorbell {
            doorbell();
        }
    }

    /// The error that ended the device, if the waiter has met it.
    pub(super) fn lost(&self) -> Option<&DriverError> {
        self.lost.get()
    }

    /// Rings the doorbell once `event` is reached. The thread starts with the first one.
    pub(super) fn arm(&mut self, event: Event) -> Result<(), DriverError> {
        let failed = |text: String| DriverError::Call { call: "waiting", name: "no waiter".into(), text };
        if self.events.is_none() {
            let doorbell = self.doorbell.clone().ok_or_else(|| failed("no doorbell was given".into()))?;
            let (sender, events) = mpsc::channel::<Event>();
            let lost = self.lost.clone();
            let run = move || {
                for event in events {
                    if let Err(error) = event.wait() {
                        // The first error stays; the owner looks for it when the bell rings.
                        let _ = lost.set(error);
                    }
                    doorbell();
                }
            };
            let name = format!("kv-waiter-{}", self.gpu.ordinal());
            let thread = std::thread::Builder::new().name(name).spawn(run);
            self.events = Some((sender, thread.map_err(|error| failed(error.to_string()))?));
        }
        match &self.events {
            Some((events, _)) => events.send(event).map_err(|_| failed("its thread has ended".into())),
            None => Ok(()),
        }
    }
}
