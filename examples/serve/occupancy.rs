//! What states the blocks are in, and what the bytes of a slab are used for by them.

use kv_cache::{CacheConfig, CoreCounters};
use serde::Serialize;

/// Blocks of a shard by their state.
pub(crate) fn blocks(counters: &CoreCounters) -> [(&'static str, u64); 5] {
    [
        ("raw", counters.blocks_used.saturating_sub(counters.blocks_sealed)),
        ("sealed", counters.blocks_sealed.saturating_sub(counters.blocks_cached)),
        ("cached", counters.blocks_cached),
        ("free", counters.blocks_free),
        ("host", counters.blocks_host),
    ]
}

/// Bytes of a shard's slab, or of all together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Occupancy {
    /// Blocks that sequences hold and write to, or that wait to be sealed.
    pub(crate) raw: u64,
    /// Blocks that sequences hold and that are sealed.
    pub(crate) sealed: u64,
    /// Blocks that nobody holds, kept for a prompt to find.
    pub(crate) cached: u64,
    pub(crate) free: u64,
    /// Blocks in the host tier, by number: they take no bytes of the slab.
    pub(crate) host_blocks: u64,
}

impl Occupancy {
    /// Divides the bytes in use among the states. The counters tell blocks, and blocks of different classes differ in size.
    pub(crate) fn of(counters: &CoreCounters, config: &CacheConfig) -> Self {
        let raw_bytes = config.geometry.layout().map_or(0, |layout| layout.raw_bytes() as u64);
        // In the host tier blocks are sealed, too, and take nothing here.
        let sealed = counters.blocks_sealed.saturating_sub(counters.blocks_host);
        let on_device = counters.blocks_used.saturating_sub(counters.blocks_host);
        let cached = counters.blocks_cached.min(sealed);
        let raw = (on_device.saturating_sub(sealed) * raw_bytes).min(counters.bytes_used);
        let cached = (counters.bytes_used - raw) * cached / sealed.max(1);
        Occupancy {
            raw,
            sealed: counters.bytes_used - raw - cached,
            cached,
            free: config.memory_bytes_per_device.saturating_sub(counters.bytes_used),
            host_blocks: counters.blocks_host,
        }
    }

    pub(crate) fn add(self, other: Occupancy) -> Self {
        Occupancy {
            raw: self.raw + other.raw,
            sealed: self.sealed + other.sealed,
            cached: self.cached + other.cached,
            free: self.free + other.free,
            host_blocks: self.host_blocks + other.host_blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use kv_cache::{ElementType, Geometry};

    use super::*;

    #[test]
    fn all_bytes_are_accounted_for() {
        // A raw block of 32 tokens × 4 elements × 4 bytes, twice: 1 KiB.
        let mut config = CacheConfig::new(Geometry::new(1, 1, 4, ElementType::F32));
        config.memory_bytes_per_device = 1 << 20;
        let mut counters = CoreCounters::default();
        assert_eq!(Occupancy::of(&counters, &config), Occupancy { free: 1 << 20, ..Occupancy::default() });
        counters.blocks_used = 10;
        counters.blocks_sealed = 8;
        counters.blocks_cached = 2;
        counters.bytes_used = 2 * 1024 + 8 * 512;
        let expected =
            Occupancy { raw: 2048, sealed: 3072, cached: 1024, free: (1 << 20) - 6144, host_blocks: 0 };
        assert_eq!(Occupancy::of(&counters, &config), expected);
        // Counters of different moments do not make it overflow.
        counters.blocks_used = 1000;
        let torn = Occupancy::of(&counters, &config);
        assert_eq!(torn.raw + torn.sealed + torn.cached + torn.free, 1 << 20);
    }
}
