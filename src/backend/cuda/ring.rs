//! A ring of page-locked memory: what goes to the device and what comes back passes through it, in the order of tickets.

use std::collections::VecDeque;
use std::ops::Range;

use super::driver::PinnedMemory;

/// Ranges begin at multiples of this: vector loads of kernels, and no sharing of cache lines between steps.
pub(super) const ALIGN_BYTES: usize = 128;

/// Where the free bytes of a ring are. Positions count up for ever; a position's place is its remainder.
#[derive(Debug)]
struct Cursor {
    bytes: usize,
    head: u64,
    tail: u64,
    taken: VecDeque<(u64, u64)>,
}

impl Cursor {
    /// Takes a range that does not wrap, held until `ticket` is released.
    fn take(&mut self, bytes: usize, ticket: u64) -> Option<Range<usize>> {
        let bytes = bytes.next_multiple_of(ALIGN_BYTES);
        let at = (self.head % self.bytes as u64) as usize;
        // What is left before the end is skipped if it is too short.
        let skip = if at + bytes > self.bytes { self.bytes - at } else { 0 };
        let end = self.head + (skip + bytes) as u64;
        if bytes > self.bytes || end - self.tail > self.bytes as u64 {
            return None;
        }
        let start = (at + skip) % self.bytes;
        self.head = end;
        self.taken.push_back((ticket, end));
        Some(start..start + bytes)
    }

    fn release(&mut self, reached: u64) {
        while let Some(&(ticket, end)) = self.taken.front()
            && ticket <= reached
        {
            self.tail = end;
            self.taken.pop_front();
        }
    }
}

/// See the [module documentation](self).
pub(super) struct Ring {
    memory: PinnedMemory,
    cursor: Cursor,
}

impl Ring {
    pub(super) fn new(memory: PinnedMemory) -> Self {
        let bytes = memory.bytes() / ALIGN_BYTES * ALIGN_BYTES;
        Ring { memory, cursor: Cursor { bytes, head: 0, tail: 0, taken: VecDeque::new() } }
    }

    /// Most bytes that one unit of work may take: half, so that filling one half overlaps with copying the other.
    pub(super) fn unit_bytes_max(&self) -> usize {
        self.cursor.bytes / 2 / ALIGN_BYTES * ALIGN_BYTES
    }

    /// Takes `bytes` bytes for the unit with this ticket, if so many are free in a row.
    pub(super) fn take(&mut self, bytes: usize, ticket: u64) -> Option<Range<usize>> {
        self.cursor.take(bytes, ticket)
    }

    /// Gives back what units up to `reached` have taken.
    pub(super) fn release(&mut self, reached: u64) {
        self.cursor.release(reached);
    }

    /// Address of a place in the ring, for host and device.
    pub(super) fn address(&self, at: usize) -> u64 {
        self.memory.address() + at as u64
    }

    /// Bytes of the ring.
    ///
    /// # Safety
    /// The range was taken and not released, and the device does not use it at this time (5, 6).
    pub(super) unsafe fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.memory.bytes(), "{range:?} of a ring");
        // SAFETY: in bounds and initialised (3, 8); the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base().as_ptr().add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_overlap_and_come_back_in_order() {
        let mut cursor = Cursor { bytes: 16 * ALIGN_BYTES, head: 0, tail: 0, taken: VecDeque::new() };
        let mut live: VecDeque<(u64, Range<usize>)> = VecDeque::new();
        let mut seed = 1u64;
        let mut refused = 0;
        for ticket in 1..10_000u64 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let bytes = 1 + (seed >> 33) as usize % (5 * ALIGN_BYTES);
            match cursor.take(bytes, ticket) {
                Some(range) => {
                    assert!(range.len() >= bytes && range.end <= 16 * ALIGN_BYTES);
                    assert!(
                        live.iter().all(|(_, other)| other.end <= range.start || range.end <= other.start)
                    );
                    live.push_back((ticket, range));
                }
                None => {
                    refused += 1;
                    let (ticket, _) = live.pop_front().expect("an empty ring has room");
                    cursor.release(ticket);
                }
            }
        }
        assert!(refused > 100);
        assert!(cursor.take(17 * ALIGN_BYTES, 0).is_none(), "more than the ring holds");
    }
}
