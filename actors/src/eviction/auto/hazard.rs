//! The chance that a block is used (again), by the class of its last use and its age: learned from a sample of uses.
//!
//! A sampled use is followed until the same content is used again, cached or not, or until the log is full and its turn has
//! come to be forgotten. So what is learned does not depend on what the cache has evicted. Time at risk is counted as
//! actuaries do (Kaplan and Meier, "Nonparametric estimation from incomplete observations", 1958): who is still in a step of
//! ages counts for half of it. Otherwise what has been used again is known at once, what has not is known late, and new
//! ages look too good.
//!
//! Blocks of a request come back together, so there is far less to learn from than there are uses. Each class is taken to be
//! like all of them together, times a factor of its own, until it has seen more than that.

use super::CLASSES;
use super::age::{Ages, STEPS};
use super::rank::CELLS;

/// The most uses that are followed at a time: this many…
const LOG_MAX: usize = 16_384;
/// …and so many for each block that the cache holds.
const LOG_PER_BLOCK: usize = 8;
/// How far back the log has to reach, in uses: as many uses are left out as that takes. Never less than twice the cache.
const REACH: usize = 16_384;
/// One use in `2^bits` is followed.
const SAMPLE_BITS: std::ops::RangeInclusive<u32> = 3..=24;

/// Samples between two lessons: few in the beginning, then more.
const LESSON: std::ops::RangeInclusive<u32> = 32..=2048;
/// What a full lesson leaves of earlier ones.
const KEEP: f32 = 0.9;

/// Before anything is seen, a step of ages has this chance…
const FIRST_CHANCE: f32 = 0.005;
/// …and a step has that of the step before it, as if seen so often.
const STEP_PRIOR: f32 = 20.0;
/// A class is like all others, as if it had been seen in so many uses.
const CLASS_PRIOR: f32 = 3.0;
/// A cell is as its class and its step say, as if seen in so many uses.
const CELL_PRIOR: f32 = 12.0;

/// Keeps chances away from certainty.
const CHANCE_MAX: f32 = 0.97;

#[derive(Debug, Clone, Copy)]
struct Sample {
    used: u32,
    print: u32,
    class: u8,
    /// The step of ages that it was in when it was last counted.
    step: u8,
    /// Not used again yet.
    open: bool,
}

/// What was seen in one cell.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    again: f32,
    survived: f32,
    /// Open samples of this class that had this age at the last lesson.
    inside: u32,
}

impl Seen {
    fn at_risk(&self) -> f32 {
        self.again + self.survived + 0.5 * self.inside as f32
    }
}

/// The learner.
#[derive(Debug)]
pub(super) struct Hazard {
    /// A ring: sample number `n` is at `n % log_max`.
    log: Vec<Sample>,
    log_max: usize,
    /// Samples so far.
    samples: u64,
    open: Open,
    sample_bits: u32,
    seen: Vec<Seen>,
    factor: Vec<f32>,
    chances: Vec<f32>,
    since_lesson: u32,
}

impl Hazard {
    pub(super) fn new(blocks: usize) -> Self {
        let log_max = (blocks.saturating_mul(LOG_PER_BLOCK)).clamp(1, LOG_MAX);
        let sparse = REACH.max(blocks.saturating_mul(2)) / log_max;
        Hazard {
            log: Vec::with_capacity(log_max),
            log_max,
            samples: 0,
            open: Open::new(log_max),
            sample_bits: (usize::BITS - sparse.leading_zeros())
                .clamp(*SAMPLE_BITS.start(), *SAMPLE_BITS.end()),
            seen: vec![Seen::default(); CELLS],
            factor: vec![1.0; CLASSES],
            chances: vec![FIRST_CHANCE; CELLS],
            since_lesson: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let log = self.log_max * size_of::<Sample>() + size_of_val(&self.open.table[..]);
        log + size_of_val(&self.seen[..]) + 2 * size_of_val(&self.chances[..]) + size_of::<Self>()
    }

    /// The chance that a block of a cell is used before it leaves the cell by age: above 0, below 1.
    pub(super) fn chances(&self) -> &[f32] {
        &self.chances
    }

    /// Whether any use of this class was followed.
    pub(super) fn knows(&self, class: usize) -> bool {
        self.seen[class * STEPS].at_risk() > 0.0
    }

    /// Whether the use at this time is in the sample. Evenly spread, and in no step with the lengths of requests.
    pub(super) fn is_sampled(&self, now: u32) -> bool {
        now.wrapping_mul(0x9E37_79B9) >> (32 - self.sample_bits) == 0
    }

    /// Follows a use.
    pub(super) fn follow(&mut self, print: u32, class: u8, now: u32, ages: &Ages) {
        self.open.remove(&self.log, print);
        let place = (self.samples % self.log_max as u64) as usize;
        let sample = Sample { used: now, print, class, step: 0, open: true };
        if place == self.log.len() {
            self.log.push(sample);
        } else {
            if self.log[place].open {
                let cell = count(&mut self.log[place], &mut self.seen, now, ages);
                self.seen[cell].survived += 0.5;
                let oldest = self.log[place].print;
                if self.open.find(&self.log, oldest).is_some_and(|(_, at)| at == place) {
                    self.open.remove(&self.log, oldest);
                }
            }
            self.log[place] = sample;
        }
        self.open.insert(&self.log, place);
        self.samples += 1;
        self.since_lesson += 1;
    }

    /// The content is used; if an earlier use of it is followed, this is what it led to.
    pub(super) fn used_again(&mut self, print: u32, now: u32, ages: &Ages) {
        let Some((_, place)) = self.open.find(&self.log, print) else { return };
        self.open.remove(&self.log, print);
        let cell = count(&mut self.log[place], &mut self.seen, now, ages);
        self.log[place].open = false;
        self.seen[cell].again += 1.0;
    }

    /// Works the chances out anew, if enough has been seen since the last time.
    pub(super) fn learn(&mut self, now: u32, ages: &Ages) -> bool {
        let due = u32::try_from(self.samples / 8).unwrap_or(u32::MAX).clamp(*LESSON.start(), *LESSON.end());
        if self.since_lesson < due {
            return false;
        }
        let keep = if due == *LESSON.end() { KEEP } else { 1.0 };
        self.since_lesson = 0;
        self.seen.iter_mut().for_each(|seen| seen.inside = 0);
        for sample in self.log.iter_mut().filter(|sample| sample.open) {
            let cell = count(sample, &mut self.seen, now, ages);
            self.seen[cell].inside += 1;
        }
        let steps = self.steps();
        for class in 0..CLASSES {
            if !self.knows(class) && self.factor[class] == 1.0 && class != 0 {
                // Never seen: as all others.
                self.chances[class * STEPS..(class + 1) * STEPS].copy_from_slice(&steps);
                continue;
            }
            let seen = &mut self.seen[class * STEPS..(class + 1) * STEPS];
            let again: f32 = seen.iter().map(|seen| seen.again).sum();
            let expected: f32 = seen.iter().zip(&steps).map(|(seen, chance)| seen.at_risk() * chance).sum();
            let factor = (again + CLASS_PRIOR) / (expected + CLASS_PRIOR);
            self.factor[class] = factor;
            for ((seen, step), chance) in seen.iter_mut().zip(&steps).zip(&mut self.chances[class * STEPS..])
            {
                let prior = (step * factor).clamp(1e-6, 0.9);
                let learned = (seen.again + CELL_PRIOR) / (seen.at_risk() + CELL_PRIOR / prior);
                *chance = learned.min(CHANCE_MAX);
                seen.again *= keep;
                seen.survived *= keep;
            }
        }
        true
    }

    /// The chances of a class with factor 1.
    fn steps(&self) -> [f32; STEPS] {
        let mut before = FIRST_CHANCE;
        std::array::from_fn(|step| {
            let (mut again, mut expected) = (0.0, 0.0);
            for (class, factor) in self.factor.iter().enumerate() {
                let seen = &self.seen[class * STEPS + step];
                again += seen.again;
                expected += seen.at_risk() * factor;
            }
            before = ((again + STEP_PRIOR * before) / (expected + STEP_PRIOR)).clamp(1e-6, CHANCE_MAX);
            before
        })
    }
}

/// Counts the steps of ages that a sample has got past unused since it was last counted, and returns the cell that it is in now.
fn count(sample: &mut Sample, seen: &mut [Seen], now: u32, ages: &Ages) -> usize {
    let step = ages.step(now.wrapping_sub(sample.used));
    let first = usize::from(sample.class) * STEPS;
    (usize::from(sample.step)..step).for_each(|past| seen[first + past].survived += 1.0);
    sample.step = step as u8;
    first + step
}

/// Open samples by fingerprint: linear probing, at most half full.
#[derive(Debug)]
struct Open {
    /// Places in the log, plus one.
    table: Vec<u16>,
}

impl Open {
    fn new(samples: usize) -> Self {
        Open { table: vec![0; (2 * samples).next_power_of_two()] }
    }

    fn home(&self, print: u32) -> usize {
        print as usize & (self.table.len() - 1)
    }

    fn after(&self, slot: usize) -> usize {
        (slot + 1) & (self.table.len() - 1)
    }

    /// The slot here and the place in the log.
    fn find(&self, log: &[Sample], print: u32) -> Option<(usize, usize)> {
        let mut slot = self.home(print);
        while self.table[slot] != 0 {
            let place = usize::from(self.table[slot]) - 1;
            if log[place].print == print {
                return Some((slot, place));
            }
            slot = self.after(slot);
        }
        None
    }

    fn insert(&mut self, log: &[Sample], place: usize) {
        let mut slot = self.home(log[place].print);
        while self.table[slot] != 0 {
            slot = self.after(slot);
        }
        self.table[slot] = place as u16 + 1;
    }

    fn remove(&mut self, log: &[Sample], print: u32) {
        let Some((mut hole, _)) = self.find(log, print) else { return };
        self.table[hole] = 0;
        let mut slot = self.after(hole);
        // What has been pushed past the hole moves into it.
        while self.table[slot] != 0 {
            let home = self.home(log[usize::from(self.table[slot]) - 1].print);
            let mask = self.table.len() - 1;
            if (slot.wrapping_sub(home) & mask) >= (slot.wrapping_sub(hole) & mask) {
                self.table[hole] = self.table[slot];
                self.table[slot] = 0;
                hole = slot;
            }
            slot = self.after(slot);
        }
    }
}
