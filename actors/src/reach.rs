//! Tensor memory that devices reach by themselves: what a backend lends, and what a caller has on a device already.
//!
//! Nothing here knows how a device does it. A backend makes [`LentMemory`] and [`Point`]s and finds its own again.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::oneshot;

use crate::sync::{Mutex, lock};

/// Host memory that a backend lends to callers; it goes back when this is dropped. Aligned for every element type.
pub trait LentMemory: fmt::Debug + Send + Sync {
    /// The bytes.
    fn bytes(&self) -> &[u8];

    /// The bytes, to be written.
    fn bytes_mut(&mut self) -> &mut [u8];

    /// Whether every device of the cache reads it where it lies. If not, lanes copy what they need.
    fn is_reachable(&self) -> bool;
}

/// A point on a queue of some device (a recorded event): whoever waits for it waits for everything before.
pub trait Point: fmt::Debug + Any + Send + Sync {}

/// Memory of a device that belongs to the caller of a batch.
pub struct DeviceSource {
    device: u16,
    ready: Vec<Arc<dyn Point>>,
    keep: Vec<Arc<dyn Any + Send + Sync>>,
    enqueued: Mutex<Enqueuing>,
}

/// How far a batch over device memory is.
#[derive(Debug, Default)]
struct Enqueuing {
    operations: usize,
    seen: usize,
    reply: Option<oneshot::Sender<Arc<dyn Point>>>,
}

impl fmt::Debug for DeviceSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceSource")
            .field("device", &self.device)
            .field("ready", &self.ready)
            .finish_non_exhaustive()
    }
}

impl DeviceSource {
    /// Memory on the device of this number that may be touched once `ready` is reached.
    pub fn new(device: u16, ready: Arc<dyn Point>) -> Self {
        DeviceSource {
            device,
            ready: vec![ready],
            keep: Vec::new(),
            enqueued: Mutex::new(Enqueuing::default()),
        }
    }

    /// Keeps `owner` until no launch needs the memory any more.
    pub(crate) fn keep(&mut self, owner: &Arc<dyn Any + Send + Sync>) {
        // Tensors of one allocation mostly stand together.
        if !self.keep.last().is_some_and(|last| Arc::ptr_eq(last, owner)) {
            self.keep.push(owner.clone());
        }
    }

    /// Which device.
    pub fn device(&self) -> u16 {
        self.device
    }

    /// What lanes wait for before they touch the memory.
    pub fn ready(&self) -> &[Arc<dyn Point>] {
        &self.ready
    }

    /// Adds a point to wait for.
    pub(crate) fn wait_too(&mut self, ready: Arc<dyn Point>) {
        self.ready.push(ready);
    }

    /// Has the receiver told once all `operations` on device tensors are on the device's queue. They share one queue, so a point
    /// behind the last of them is behind all. Those that fail before they get
    /// there are never on it: whoever waits listens for the batch's answer too.
    pub(crate) fn expect(&self, operations: usize) -> oneshot::Receiver<Arc<dyn Point>> {
        let (reply, receiver) = oneshot::channel();
        *lock(&self.enqueued) = Enqueuing { operations, seen: 0, reply: Some(reply) };
        receiver
    }

    /// `flights` more are on the queue, before `point`.
    fn passed(&self, flights: usize, point: &Arc<dyn Point>) {
        let mut state = lock(&self.enqueued);
        state.seen += flights;
        if state.seen >= state.operations
            && let Some(reply) = state.reply.take()
        {
            // Whoever asked may be gone.
            let _ = reply.send(point.clone());
        }
    }
}

/// What the launches of one batch share: an arena that devices reach, memory of a device, or both.
#[derive(Debug)]
pub struct Reachable {
    pub(crate) arena: Vec<u8>,
    pub(crate) lent: Option<Box<dyn LentMemory>>,
    pub(crate) device: Option<Box<DeviceSource>>,
}

impl Reachable {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.lent.as_ref().map_or(&self.arena, |lent| lent.bytes())
    }

    pub(crate) fn is_reachable(&self) -> bool {
        self.lent.as_ref().is_some_and(|lent| lent.is_reachable())
    }

    pub(crate) fn passed(&self, flights: usize, point: &Arc<dyn Point>) {
        if let Some(device) = &self.device {
            device.passed(flights, point);
        }
    }
}

/// Host memory that is lent where no device has any to lend.
#[derive(Debug)]
pub struct PlainMemory {
    words: Vec<u64>,
    bytes: usize,
}

impl PlainMemory {
    /// `bytes` zero bytes.
    pub fn new(bytes: usize) -> Self {
        PlainMemory { words: vec![0; bytes.div_ceil(8)], bytes }
    }
}

impl LentMemory for PlainMemory {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }

    fn is_reachable(&self) -> bool {
        false
    }
}

/// Where a batch's host tensors lie while it is being built.
#[derive(Debug)]
pub(crate) enum Arena {
    Own(Vec<u8>),
    Lent { memory: Box<dyn LentMemory>, used: usize, id: u64 },
}

impl Default for Arena {
    fn default() -> Self {
        Arena::Own(Vec::new())
    }
}

/// Tensors in lent memory begin at multiples of this: whole vectors for a device that reads them in place.
const LENT_ALIGN_BYTES: usize = 16;

impl Arena {
    pub(crate) fn lent(memory: Box<dyn LentMemory>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arena::Lent { memory, used: 0, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    pub(crate) fn id(&self) -> u64 {
        match self {
            Arena::Own(_) => 0,
            Arena::Lent { id, .. } => *id,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Arena::Own(bytes) => bytes.len(),
            Arena::Lent { used, .. } => *used,
        }
    }

    pub(crate) fn reserve(&mut self, bytes: usize) {
        if let Arena::Own(own) = self {
            // A wish: what cannot be had is asked for again, tensor by tensor.
            let _ = own.try_reserve(bytes);
        }
    }

    /// Copies a tensor in, and says where it begins.
    pub(crate) fn push(&mut self, tensor: &[u8]) -> usize {
        match self {
            Arena::Own(bytes) => {
                bytes.extend_from_slice(tensor);
                bytes.len() - tensor.len()
            }
            Arena::Lent { memory, used, .. } => {
                let start = used.next_multiple_of(LENT_ALIGN_BYTES);
                let end = start + tensor.len();
                if end > memory.bytes().len() {
                    // More than was asked for: no device reaches it, but it works.
                    let mut larger = PlainMemory::new(2 * end);
                    larger.bytes_mut()[..*used].copy_from_slice(&memory.bytes()[..*used]);
                    *memory = Box::new(larger);
                }
                memory.bytes_mut()[start..end].copy_from_slice(tensor);
                *used = end;
                start
            }
        }
    }

    /// Sets `bytes` bytes aside in lent memory, for the caller to fill. None without lent memory that has so much left.
    pub(crate) fn region(&mut self, bytes: usize) -> Option<usize> {
        let Arena::Lent { memory, used, .. } = self else { return None };
        let start = used.next_multiple_of(LENT_ALIGN_BYTES);
        let end = start.checked_add(bytes).filter(|end| *end <= memory.bytes().len())?;
        *used = end;
        // What was there before may be another tenant's.
        memory.bytes_mut()[start..end].fill(0);
        Some(start)
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Arena::Own(bytes) => bytes,
            Arena::Lent { memory, used, .. } => &mut memory.bytes_mut()[..*used],
        }
    }
}
