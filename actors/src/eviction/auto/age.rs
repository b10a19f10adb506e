//! Ages: time since a use, counted in uses of any block, in steps that grow with the age.

/// Steps of ages. The first begins at nothing, the last has no end.
pub(super) const STEPS: usize = 26;

/// The most blocks for which the finest unit serves.
const FINE_BLOCKS: usize = 32_768;

/// Where the steps begin: two to each doubling, from a unit that depends on how many blocks the cache holds.
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
            _ => ((2 + (step as u32 - 1) % 2) << ((step as u32 - 1) / 2)) << (unit_bits - 1),
        });
        Ages { begin, unit_bits }
    }

    /// How often the units of time double for a cache of so many blocks.
    pub(super) fn coarseness(blocks: usize) -> u32 {
        // The last step begins at 2^12 units, and has to fit in 32 bits.
        (blocks / FINE_BLOCKS).max(1).ilog2().min(12)
    }

    /// The step of an age.
    pub(super) fn step(&self, age: u32) -> usize {
        let halves = age >> (self.unit_bits - 1);
        if halves < 2 {
            return 0;
        }
        let doublings = halves.ilog2() - 1;
        let upper = halves >> doublings & 1;
        (2 * doublings as usize + upper as usize + 1).min(STEPS - 1)
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
