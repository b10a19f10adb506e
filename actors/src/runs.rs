//! Runs: which parts of a row of equal units are free, so that what belongs together can lie together.

use std::collections::BTreeMap;
use std::ops::Range;

/// Free runs of a row of units, first fit.
///
/// Taking and giving back cost a look at the free runs, of which there are few as long as runs are long.
#[derive(Debug)]
pub struct Runs {
    /// Start and length of each, no two of them adjacent.
    free: BTreeMap<usize, usize>,
    free_units: usize,
}

impl Runs {
    /// A row of `units` free units.
    pub fn new(units: usize) -> Self {
        let free = if units > 0 { BTreeMap::from([(0, units)]) } else { BTreeMap::new() };
        Runs { free, free_units: units }
    }

    /// Free units.
    pub fn free_units(&self) -> usize {
        self.free_units
    }

    /// Takes `units` units in a row.
    pub fn take(&mut self, units: usize) -> Option<Range<usize>> {
        if units == 0 {
            return Some(0..0);
        }
        let (&start, &length) = self.free.iter().find(|(_, length)| **length >= units)?;
        Some(self.cut(start, length, units))
    }

    /// Takes as many units as there are in a row, at most `units`: the first run that holds them all, or the longest.
    pub fn take_some(&mut self, units: usize) -> Option<Range<usize>> {
        let fits = self.free.iter().find(|(_, length)| **length >= units);
        let (&start, &length) = fits.or_else(|| self.free.iter().max_by_key(|(_, length)| **length))?;
        Some(self.cut(start, length, units.min(length)))
    }

    fn cut(&mut self, start: usize, length: usize, units: usize) -> Range<usize> {
        self.free.remove(&start);
        if length > units {
            self.free.insert(start + units, length - units);
        }
        self.free_units -= units;
        start..start + units
    }

    /// Gives units back that were taken.
    pub fn give_back(&mut self, run: Range<usize>) {
        if run.is_empty() {
            return;
        }
        self.free_units += run.len();
        let (mut start, mut end) = (run.start, run.end);
        if let Some((&before, &length)) = self.free.range(..start).next_back()
            && before + length == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(length) = self.free.remove(&end) {
            end += length;
        }
        self.free.insert(start, end - start);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn runs_never_overlap_and_join_again() {
        let mut runs = Runs::new(1000);
        let mut taken: Vec<Range<usize>> = Vec::new();
        let mut seed = 7u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let number = (seed >> 33) as usize;
            match runs.take(1 + number % 60) {
                Some(run) if !number.is_multiple_of(3) => {
                    assert!(
                        run.end <= 1000 && taken.iter().all(|t| t.end <= run.start || run.end <= t.start)
                    );
                    taken.push(run);
                }
                Some(run) => runs.give_back(run),
                None => runs.give_back(taken.swap_remove(number % taken.len())),
            }
            let held: usize = taken.iter().map(|run| run.len()).sum();
            assert_eq!(runs.free_units() + held, 1000);
        }
        taken.into_iter().for_each(|run| runs.give_back(run));
        assert_eq!(runs.take(1000), Some(0..1000), "all of it is one run again");
        assert_eq!(runs.take_some(1), None);
    }
}
