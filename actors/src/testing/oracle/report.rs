//! What runs of the oracle did, so that a run that checked nothing shows.

use crate::stats::CoreCounters;

/// What some runs did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Runs.
    pub runs: u64,
    /// Operations submitted.
    pub operations: u64,
    /// Operations answered and found right.
    pub checked: u64,
    /// Operations refused, as they had to be or for lack of room.
    pub refused: u64,
    /// Tokens read back and compared.
    pub tokens_read: u64,
    /// Launches failed on purpose.
    pub failed_launches: u64,
    /// Devices lost on purpose.
    pub lost_devices: u64,
    /// Blocks sealed.
    pub seals: u64,
    /// Blocks re-encoded.
    pub recodes: u64,
    /// Blocks copied on write.
    pub copies_on_write: u64,
    /// Blocks moved to make room for sealed ones.
    pub blocks_moved: u64,
    /// Sealed blocks moved between tiers.
    pub tier_moves: u64,
    /// Times that sealing found no slot.
    pub seal_stalls: u64,
    /// Slots zeroed between tenants.
    pub slots_zeroed: u64,
    /// Tokens that prompts have found.
    pub prefix_tokens: u64,
    /// Blocks of which one copy was kept.
    pub deduplicated: u64,
    /// Cached blocks that made way.
    pub evictions: u64,
    /// Tokens dropped by their scores.
    pub tokens_dropped: u64,
    /// Views whose bytes were found unchanged.
    pub views: u64,
    /// Launches per lane.
    pub launches: [u64; 3],
}

impl Report {
    /// Adds another run.
    pub fn add(&mut self, other: &Report) {
        self.runs += other.runs;
        self.operations += other.operations;
        self.checked += other.checked;
        self.refused += other.refused;
        self.tokens_read += other.tokens_read;
        self.failed_launches += other.failed_launches;
        self.lost_devices += other.lost_devices;
        self.seals += other.seals;
        self.recodes += other.recodes;
        self.copies_on_write += other.copies_on_write;
        self.blocks_moved += other.blocks_moved;
        self.tier_moves += other.tier_moves;
        self.seal_stalls += other.seal_stalls;
        self.slots_zeroed += other.slots_zeroed;
        self.prefix_tokens += other.prefix_tokens;
        self.deduplicated += other.deduplicated;
        self.evictions += other.evictions;
        self.tokens_dropped += other.tokens_dropped;
        self.views += other.views;
        self.launches.iter_mut().zip(other.launches).for_each(|(mine, more)| *mine += more);
    }
}

impl Report {
    pub(super) fn count(&mut self, counters: &CoreCounters) {
        let CoreCounters {
            seals, copies_on_write, blocks_moved, seal_stalls, slots_zeroed, tier_moves, ..
        } = *counters;
        (self.tier_moves, self.tokens_dropped) = (tier_moves, counters.tokens_dropped);
        self.recodes = counters.recodes;
        (self.deduplicated, self.evictions) = (counters.blocks_deduplicated, counters.evictions);
        (self.seals, self.copies_on_write, self.slots_zeroed) = (seals, copies_on_write, slots_zeroed);
        (self.blocks_moved, self.seal_stalls) = (blocks_moved, seal_stalls);
    }
}
