//! Retention hints: blocks that go before all others, or after them, for a time.

use std::collections::{BTreeMap, BTreeSet};

use super::Node;
use super::queue::Heap;

/// The priority of blocks without a hint.
const ORDINARY: u8 = 50;
/// Steps in which a decaying priority gets to the ordinary one.
const DECAY_STEPS: u64 = 8;

/// How long a block should stay, compared to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Retention {
    /// 0 to 100. Below 50, the block goes before all ordinary ones, above 50 after them; lower ones first.
    pub priority: u8,
    /// When the block becomes ordinary; never, if none.
    pub until_ms: Option<u64>,
    /// Whether it becomes so in steps instead of at once.
    pub decay: bool,
}

impl Default for Retention {
    fn default() -> Self {
        Retention { priority: ORDINARY, until_ms: None, decay: false }
    }
}

#[derive(Debug)]
struct Hint {
    retention: Retention,
    since_ms: u64,
    /// The priority now.
    priority: u8,
    /// When it changes next.
    change_ms: Option<u64>,
}

impl Hint {
    /// The priority at a time, and when it changes after that.
    fn at(retention: Retention, since_ms: u64, now_ms: u64) -> (u8, Option<u64>) {
        let priority = retention.priority.min(100);
        let Some(until_ms) = retention.until_ms else { return (priority, None) };
        if now_ms >= until_ms {
            return (ORDINARY, None);
        }
        let step_ms = until_ms.saturating_sub(since_ms) / DECAY_STEPS;
        if !retention.decay || step_ms == 0 {
            return (priority, Some(until_ms));
        }
        let steps = (now_ms.saturating_sub(since_ms) / step_ms).min(DECAY_STEPS);
        let left = (i64::from(priority) - i64::from(ORDINARY)) * (DECAY_STEPS - steps) as i64;
        let priority = i64::from(ORDINARY) + left / DECAY_STEPS as i64;
        (priority as u8, Some((since_ms + (steps + 1) * step_ms).min(until_ms)))
    }
}

/// The blocks with hints, and those of them that are candidates.
#[derive(Debug, Default)]
pub(super) struct Kept {
    hints: BTreeMap<u32, Hint>,
    changes: BTreeSet<(u64, u32)>,
    candidates: Heap,
}

impl Kept {
    /// Whether the block has a priority of its own from now on. It must not be a candidate at this moment.
    pub(super) fn set(&mut self, block: u32, retention: Retention, now_ms: u64) -> bool {
        self.set_since(block, retention, now_ms, now_ms)
    }

    fn set_since(&mut self, block: u32, retention: Retention, since_ms: u64, now_ms: u64) -> bool {
        self.removed(block);
        let (priority, change_ms) = Hint::at(retention, since_ms, now_ms);
        // One that decays towards the ordinary may round to it early; it stays there.
        if priority == ORDINARY {
            return false;
        }
        self.changes.extend(change_ms.map(|change_ms| (change_ms, block)));
        self.hints.insert(block, Hint { retention, since_ms, priority, change_ms });
        true
    }

    /// A block with a hint whose time to change has come.
    pub(super) fn due(&self, now_ms: u64) -> Option<u32> {
        self.changes.first().filter(|(change_ms, _)| *change_ms <= now_ms).map(|(_, block)| *block)
    }

    /// Changes its priority. False if it is ordinary now. It must not be a candidate at this moment.
    pub(super) fn change(&mut self, block: u32, now_ms: u64) -> bool {
        let Some(hint) = self.hints.get(&block) else { return false };
        self.set_since(block, hint.retention, hint.since_ms, now_ms)
    }

    pub(super) fn removed(&mut self, block: u32) {
        if let Some(hint) = self.hints.remove(&block)
            && let Some(change_ms) = hint.change_ms
        {
            self.changes.remove(&(change_ms, block));
        }
    }

    pub(super) fn enter(&mut self, nodes: &mut [Node], block: u32) {
        let priority = self.hints.get(&block).map_or(ORDINARY, |hint| hint.priority);
        let key = u64::from(priority) << 56 | nodes[block as usize].used & ((1 << 56) - 1);
        self.candidates.push(nodes, key, block);
    }

    pub(super) fn leave(&mut self, nodes: &mut [Node], block: u32) {
        self.candidates.remove(nodes, block);
    }

    /// The first to go, and whether it goes before ordinary blocks.
    pub(super) fn first(&self) -> Option<(bool, u32)> {
        self.candidates.first().map(|(key, block)| ((key >> 56) < u64::from(ORDINARY), block))
    }
}
