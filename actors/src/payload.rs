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
    pub(crate) keys_bytes: u32,
    pub(crate) values_bytes: u32,
    pub(crate) elements: [ElementType; 2],
    pub(crate) on_device: bool,
    /// Of tensors that hold a token for each of several sequences: which one, and of how many. 0 of 0: they are all its own.
    pub(crate) row: u32,
    pub(crate) rows: u32,
}

impl TensorSpans {
    pub(crate) fn new(
        keys: (usize, usize),
        values: (usize, usize),
        elements: [ElementType; 2],
        on_device: bool,
    ) -> Self {
        // One that 32 bits do not count is of no shape that a batch can carry: the door says so.
        let bytes = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        TensorSpans {
            keys_at: keys.0,
            values_at: values.0,
            keys_bytes: bytes(keys.1),
            values_bytes: bytes(values.1),
            elements,
            on_device,
            row: 0,
            rows: 0,
        }
    }

    /// Bytes of both that belong to the operation.
    pub(crate) fn bytes(&self) -> usize {
        (self.keys_bytes as usize + self.values_bytes as usize) / self.rows.max(1) as usize
    }

    /// Tokens from one layer to the next, for an operation on `tokens` tokens.
    pub(crate) fn tokens(&self, tokens: u32) -> usize {
        if self.rows == 0 { tokens as usize } else { self.rows as usize }
    }
}
