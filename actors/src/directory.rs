//! The directory of open sequences: from an id to what inline look-ups need, without a message.

use dashmap::DashMap;

use crate::sequence::{SequenceId, SequenceShared};
use crate::sync::Arc;

/// All open sequences of a cache. Device actors write it when sequences open and close; anybody reads it.
#[derive(Debug, Default)]
pub struct Directory {
    sequences: DashMap<SequenceId, Arc<SequenceShared>>,
}

impl Directory {
    /// The shared part of an open sequence.
    pub fn get(&self, id: SequenceId) -> Option<Arc<SequenceShared>> {
        self.sequences.get(&id).map(|entry| entry.value().clone())
    }

    /// Open sequences.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether no sequence is open.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub(crate) fn insert(&self, shared: Arc<SequenceShared>) {
        self.sequences.insert(shared.id(), shared);
    }

    pub(crate) fn remove(&self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    /// Forgets every sequence of a shard that is lost.
    pub(crate) fn remove_shard(&self, shard: u16) {
        self.sequences.retain(|id, _| id.shard() != shard);
    }
}
