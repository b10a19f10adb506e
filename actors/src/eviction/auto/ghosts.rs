//! Ghosts: how often blocks were used that are not cached any more.

/// Ghosts in a bucket. A full bucket forgets its oldest.
const BUCKET: usize = 16;
/// Ghosts per block that the cache holds.
const PER_BLOCK: usize = 2;

const COUNT: u16 = 3;

/// A table of 14 bits of a fingerprint and 2 of a count each. Two blocks in a thousand are taken for others, which costs
/// nothing but a wrong guess.
#[derive(Debug)]
pub(super) struct Ghosts {
    buckets: Vec<[u16; BUCKET]>,
}

impl Ghosts {
    pub(super) fn new(blocks: usize) -> Self {
        Ghosts { buckets: vec![[0; BUCKET]; (blocks * PER_BLOCK / BUCKET).max(1)] }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.buckets[..])
    }

    fn bucket(&mut self, print: u32) -> &mut [u16; BUCKET] {
        let place = (u64::from(print) * self.buckets.len() as u64) >> 32;
        &mut self.buckets[place as usize]
    }

    /// Remembers a block with 1 to 4 uses.
    pub(super) fn remember(&mut self, print: u32, count: u8) {
        let bucket = self.bucket(print);
        bucket.copy_within(..BUCKET - 1, 1);
        bucket[0] = tag(print) | u16::from(count.clamp(1, 4) - 1);
    }

    /// The uses of a block, none if it is not remembered. It is forgotten: it is cached again.
    pub(super) fn take(&mut self, print: u32) -> u8 {
        let bucket = self.bucket(print);
        let Some(place) = bucket.iter().position(|ghost| ghost & !COUNT == tag(print)) else { return 0 };
        let count = (bucket[place] & COUNT) as u8 + 1;
        bucket.copy_within(place + 1.., place);
        bucket[BUCKET - 1] = 0;
        count
    }
}

/// Never zero, which is what an empty place holds. The upper bits of the fingerprint choose the bucket.
fn tag(print: u32) -> u16 {
    ((print as u16) << 2).max(1 << 2)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_latest_and_forgets_what_it_gives() {
        let mut ghosts = Ghosts::new(4);
        for print in 0..20 {
            ghosts.remember(print, 1 + print as u8 % 4);
        }
        assert_eq!((3..20).map(|print| ghosts.take(print)).filter(|&count| count > 0).count(), 16);
        assert_eq!(ghosts.take(19), 0);
        ghosts.remember(7, 9);
        assert_eq!(ghosts.take(7), 4);
    }
}
