//! The tensors of a batch on their way: their bytes, and where each operation's are.

use std::sync::Arc;

use crate::geometry::ElementType;
use crate::reach::{Arena, DeviceSource, Reachable};

/// The tensor bytes of a batch, lent to the launches that read them.
#[derive(Debug, Default)]
pub(crate) enum Payload {
    #[default]
    None,
    /// Of a batch of one operation: it moves into the launch and comes back with it. Most batches are of this kind, and
    /// counting references to each would cost an allocation and a wait for memory.
    One(Vec<u8>),
    /// Of several operations, which may fly in different launches.
    Many(Arc<Vec<u8>>),
    /// Lent, or of a device.
    Shared(Arc<Reachable>),
}

impl Payload {
    pub(crate) fn new(arena: Arena, device: Option<Box<DeviceSource>>, operations: usize) -> Self {
        match (arena, device) {
            (Arena::Own(bytes), None) => match (bytes.len(), operations) {
                (0, _) => Payload::None,
                (_, 1) => Payload::One(bytes),
                _ => Payload::Many(Arc::new(bytes)),
            },
            (Arena::Own(arena), device) => Payload::Shared(Arc::new(Reachable { arena, lent: None, device })),
            (Arena::Lent { memory, .. }, device) => {
                Payload::Shared(Arc::new(Reachable { arena: Vec::new(), lent: Some(memory), device }))
            }
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Payload::None => &[],
            Payload::One(bytes) => bytes,
            Payload::Many(bytes) => bytes,
            Payload::Shared(reachable) => reachable.bytes(),
        }
    }

    pub(crate) fn reachable(&self) -> Option<&Reachable> {
        match self {
            Payload::Shared(reachable) => Some(reachable),
            _ => None,
        }
    }

    /// For a launch. What was moved out is to be put back when the launch has landed: the caller's thread frees it.
    pub(crate) fn lend(&mut self) -> Payload {
        match self {
            Payload::Many(bytes) => Payload::Many(bytes.clone()),
            Payload::Shared(reachable) => Payload::Shared(reachable.clone()),
            own => std::mem::take(own),
        }
    }

    pub(crate) fn is_same(&self, other: &Payload) -> bool {
        match (self, other) {
            (Payload::Many(a), Payload::Many(b)) => Arc::ptr_eq(a, b),
            (Payload::Shared(a), Payload::Shared(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Where the keys and values of an operation are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TensorSpans {
    /// In the payload, or the device's address.
    pub(crate) keys_at: usize,
    pub(crate) values_at: usize,
    pub(crate) keys_bytes: usize,
    pub(crate) values_bytes: usize,
    pub(crate) elements: [ElementType; 2],
    pub(crate) on_device: bool,
}

impl TensorSpans {
    pub(crate) fn new(
        keys: (usize, usize),
        values: (usize, usize),
        elements: [ElementType; 2],
        on_device: bool,
    ) -> Self {
        let ((keys_at, keys_bytes), (values_at, values_bytes)) = (keys, values);
        TensorSpans { keys_at, values_at, keys_bytes, values_bytes, elements, on_device }
    }

    /// As the only operation on them sees them: `tokens` tokens.
    pub(crate) fn whole(self, tokens: u32) -> TensorView {
        TensorView { spans: self, tokens: tokens as usize, first_token: 0, bytes: self.bytes() }
    }

    /// As the operation on one of `rows` tokens sees them.
    pub(crate) fn row(self, row: u32, rows: u32) -> TensorView {
        let bytes = self.bytes() / rows.max(1) as usize;
        TensorView { spans: self, tokens: rows as usize, first_token: row as usize, bytes }
    }

    fn bytes(&self) -> usize {
        self.keys_bytes + self.values_bytes
    }
}

/// Tensors as one operation sees them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TensorView {
    pub(crate) spans: TensorSpans,
    /// Tokens of the tensors, from one layer to the next.
    pub(crate) tokens: usize,
    /// The operation's first.
    pub(crate) first_token: usize,
    /// Bytes of keys and values that are the operation's.
    pub(crate) bytes: usize,
}
