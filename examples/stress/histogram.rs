//! Latencies in buckets that grow with the value, as in HdrHistogram: any number of tasks count at once, without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Buckets per power of two: a percentile is at most 3 % too high.
const SUB_BUCKETS: u64 = 32;
/// Up to 2^41 ns, about 37 minutes; longer waits count as that.
const BUCKETS: usize = 37 * SUB_BUCKETS as usize;

/// Latencies in nanoseconds, in buckets that grow with the value.
pub(crate) struct Histogram(Box<[AtomicU64]>);

/// The counts of a [`Histogram`] at one time.
#[derive(Clone)]
pub(crate) struct Counts(Vec<u64>);

impl Histogram {
    pub(crate) fn new() -> Self {
        Histogram((0..BUCKETS).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn record(&self, ns: u64) {
        self.0[bucket_of(ns)].fetch_add(1, Relaxed);
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts(self.0.iter().map(|count| count.load(Relaxed)).collect())
    }

    pub(crate) fn clear(&self) {
        self.0.iter().for_each(|count| count.store(0, Relaxed));
    }
}

impl Counts {
    /// The counts since `earlier`.
    pub(crate) fn since(&self, earlier: &Counts) -> Counts {
        Counts(self.0.iter().zip(&earlier.0).map(|(now, before)| now.saturating_sub(*before)).collect())
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The value that the share `quantile` (0 to 1) does not exceed, in microseconds; 0 without any.
    pub(crate) fn quantile_us(&self, quantile: f64) -> f64 {
        let rank = ((self.total() as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = self.0.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        bucket.map_or(0.0, |bucket| upper_ns(bucket) as f64 / 1e3)
    }
}

fn bucket_of(ns: u64) -> usize {
    let shift = (64 - ns.leading_zeros()).saturating_sub(6);
    let bucket = u64::from(shift) * SUB_BUCKETS + (ns >> shift);
    (bucket as usize).min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn upper_ns(bucket: usize) -> u64 {
    let shift = (bucket as u64 / SUB_BUCKETS).saturating_sub(1);
    ((bucket as u64 - shift * SUB_BUCKETS + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_every_value_and_quantiles_are_close() {
        for ns in (0..5_000).chain((13..40).map(|bits| (1u64 << bits) + 12_345)) {
            let upper = upper_ns(bucket_of(ns));
            assert!(upper >= ns && upper as f64 <= ns as f64 * 1.033 + 1.0, "{ns} counted as {upper}");
        }
        let histogram = Histogram::new();
        (1..=1000u64).for_each(|us| histogram.record(us * 1000));
        let counts = histogram.counts();
        assert!((counts.quantile_us(0.5) - 500.0).abs() < 17.0);
        assert!((counts.quantile_us(0.99) - 990.0).abs() < 33.0);
        assert_eq!(histogram.counts().since(&counts).quantile_us(0.5), 0.0);
    }
}
