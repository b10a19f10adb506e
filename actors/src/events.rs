//! Block events: what prompts can find from now on, and what they cannot, for routers that send requests to where their prefix is.

use tokio::sync::broadcast;

use crate::block::BlockKey;
use crate::pool::Tier;

/// What has happened to a block that prompts find, or found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockEvent {
    /// It can be found.
    Stored {
        /// The shard that it is on.
        shard: u16,
        /// Names its content.
        key: BlockKey,
        /// The block before it; none for a first one.
        parent: Option<BlockKey>,
        /// Where it is.
        tier: Tier,
    },
    /// It cannot be found any more: evicted, or invalidated.
    Removed {
        /// The shard that it was on.
        shard: u16,
        /// Names its content.
        key: BlockKey,
    },
    /// It is in another tier.
    Moved {
        /// The shard that it is on.
        shard: u16,
        /// Names its content.
        key: BlockKey,
        /// Where it is now.
        tier: Tier,
    },
}

/// Where the shards of a cache tell of their blocks. What nobody listens to is not even made.
#[derive(Debug, Clone)]
pub struct EventHub(broadcast::Sender<BlockEvent>);

impl EventHub {
    /// A hub that keeps the last `capacity` events for those who are slow.
    pub fn new(capacity: usize) -> Self {
        EventHub(broadcast::Sender::new(capacity.max(1)))
    }

    /// Hears everything from now on.
    pub fn subscribe(&self) -> BlockEvents {
        BlockEvents(self.0.subscribe())
    }

    pub(crate) fn is_heard(&self) -> bool {
        self.0.receiver_count() > 0
    }

    pub(crate) fn tell(&self, events: impl Iterator<Item = BlockEvent>) {
        for event in events {
            // An error means that nobody listens any more.
            let _ = self.0.send(event);
        }
    }
}

/// So many events were missed: the listener was slower than the cache. What it knows is to be thrown away, or read again elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} block events were missed: the listener is too slow, or the capacity of the event stream too small"
)]
pub struct Missed(pub u64);

/// Block events, in the order in which each shard made them.
#[derive(Debug)]
pub struct BlockEvents(broadcast::Receiver<BlockEvent>);

impl BlockEvents {
    /// Waits for the next event. None once the cache has ended.
    ///
    /// Cancel-safe: a future that is dropped takes no event with it.
    ///
    /// # Errors
    /// [`Missed`], once for each gap; the next call goes on behind it.
    pub async fn next(&mut self) -> Option<Result<BlockEvent, Missed>> {
        match self.0.recv().await {
            Ok(event) => Some(Ok(event)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Err(Missed(missed))),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }

    /// The next event if there is one.
    ///
    /// # Errors
    /// As [`BlockEvents::next`].
    pub fn try_next(&mut self) -> Option<Result<BlockEvent, Missed>> {
        match self.0.try_recv() {
            Ok(event) => Some(Ok(event)),
            Err(broadcast::error::TryRecvError::Lagged(missed)) => Some(Err(Missed(missed))),
            Err(_) => None,
        }
    }
}
