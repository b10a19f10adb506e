//! Ages: time since a use, counted in uses of any block, in steps that grow with the age.

/// Steps of ages. The first begins at nothing, the last has no end.
pub(super) const STEPS: usize = 42;
/// Steps to each doubling. The blocks of a cell go together, so a step must be short beside the age at which blocks are evicted:
/// with two, a cache that is nearly large enough does worse than one that goes by last use.
const PER_DOUBLING: u32 = 4;

/// For fewer than twice as many blocks, the finest unit serves. The last step begins at eight times the cache or later.
const FINE_BLOCKS: usize = 4096;

/// Where the steps begin: so many to each doubling, from a unit that depends on how many blocks the cache holds.
#[derive(Debug)]
pub(super) struct Ages {
    begin: [u32; STEPS],
    unit_bits: u32,
}

impl Ages {
    pub(super) fn new(blocks: usize) -> Self {
        let unit_bits = 6 + Self::coarseness(blocks);
        let begin = std::array::from_fn(|step| match step {
            0 => 0,
            _ => {
                let (doublings, part) = ((step as u32 - 1) / PER_DOUBLING, (step as u32 - 1) % PER_DOUBLING);
                (PER_DOUBLING + part) << doublings << (unit_bits - PER_DOUBLING.ilog2())
            }
        });
        Ages { begin, unit_bits }
    }

    /// How often the units of time double for a cache of so many blocks.
    pub(super) fn coarseness(blocks: usize) -> u32 {
        // The last step begins at 2^10 units, and has to fit in 32 bits.
        (blocks / FINE_BLOCKS).max(1).ilog2().min(12)
    }

    /// The step of an age.
    pub(super) fn step(&self, age: u32) -> usize {
        let parts = age >> (self.unit_bits - PER_DOUBLING.ilog2());
        if parts < PER_DOUBLING {
            return 0;
        }
        let doublings = (parts / PER_DOUBLING).ilog2();
        let part = (parts >> doublings) - PER_DOUBLING;
        ((doublings * PER_DOUBLING + part) as usize + 1).min(STEPS - 1)
    }

    /// The age at which a step ends; the last one never does.
    pub(super) fn end(&self, step: usize) -> u32 {
        self.begin.get(step + 1).copied().unwrap_or(u32::MAX)
    }

    /// How long a step takes; the last one as long as all before it.
    pub(super) fn width(&self, step: usize) -> f32 {
        match self.begin.get(step + 1) {
            Some(end) => (end - self.begin[step]) as f32,
            None => self.begin[step] as f32,
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn steps_begin_where_they_say() {
        for blocks in [0, 1000, 50_000, 10_000_000, usize::MAX] {
            let ages = Ages::new(blocks);
            for step in 0..STEPS {
                assert_eq!(ages.step(ages.begin[step]), step);
                assert_eq!(ages.step(ages.end(step) - 1), step);
                assert!(ages.width(step) > 0.0);
            }
            assert_eq!(ages.step(u32::MAX), STEPS - 1);
        }
    }
}
