//! A shard without its device: the index, the pool and the eviction policy that a cache runs, and no bytes of keys and values.

use kv_cache::EvictionPolicy;
use kv_cache_actors::device::Bookkeeping;

use crate::driver::Driver;
use crate::workload::Planned;

/// The blocks of one shard. A thread has a shard of its own, as each device of a cache has.
pub(crate) struct Shard(Bookkeeping);

impl Shard {
    pub(crate) fn new(policy: EvictionPolicy, capacity_blocks: u32) -> Self {
        Shard(Bookkeeping::new(capacity_blocks as usize, policy))
    }
}

impl Driver for Shard {
    fn request(&mut self, request: &Planned) -> usize {
        self.0
            .request(request.time_ms, &request.keys)
            .expect("the capacity was checked against the longest request")
    }
}
