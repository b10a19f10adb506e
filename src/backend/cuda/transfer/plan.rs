//! Which way the bytes of a transfer take. Pure: addresses are numbers here, and costs come from a [`Calibration`].
//!
//! Pieces are sorted by host address. A *host run* is a stretch without gaps on the host; a *joint run* has no gap on the device
//! either. A host run takes one way:
//!
//! | way | costs | good for |
//! |---|---|---|
//! | copies | one copy per joint run, many in a call of the driver | joint runs that are large, or few |
//! | staged | one copy per host run into staging memory, and a share of a kernel | small scattered slots of a host run |
//! | direct | a share of a kernel that reaches over PCIe | what is small and scattered on both sides |

use std::ops::Range;

/// Where the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From page-locked host memory to the device.
    ToDevice,
    /// Back.
    ToHost,
}

/// A way over PCIe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// One copy per joint run.
    Copies,
    /// One copy per host run, through staging memory that a kernel scatters from or gathers into.
    Staged,
    /// A kernel that reads or writes host memory.
    Direct,
}

impl Method {
    /// All ways, in the order of their numbers.
    pub(super) const ALL: [Method; 3] = [Method::Copies, Method::Staged, Method::Direct];
}

/// Bytes that belong together on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    /// Address on the device.
    pub(super) device: u64,
    /// Address on the host.
    pub(super) host: u64,
    pub(super) bytes: usize,
}

impl Move {
    /// Whether `next` begins on the host where this ends.
    fn meets_on_host(&self, next: &Move) -> bool {
        self.host + self.bytes as u64 == next.host
    }

    /// Whether `next` begins where this ends, on both sides.
    fn meets(&self, next: &Move) -> bool {
        self.meets_on_host(next) && self.device + self.bytes as u64 == next.device
    }
}

/// What a way costs: a start, and per item its bytes and what does not hide behind them, but no less than the driver or the copy
/// engine need for any item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cost {
    /// Of a transfer.
    pub(super) start_us: f64,
    /// Of a transfer of several copies: the device waits for a call with all its first ones.
    pub(super) many_us: f64,
    /// Of a copy, or of a block that a kernel moves, beside its bytes.
    pub(super) item_us: f64,
    /// Of a copy or block, however small.
    pub(super) least_us: f64,
    /// Of a byte of many.
    pub(super) byte_us: f64,
}

impl Cost {
    /// Bytes and nothing else.
    pub(super) const fn of_bytes(byte_us: f64) -> Cost {
        Cost { start_us: 0.0, many_us: 0.0, item_us: 0.0, least_us: 0.0, byte_us }
    }

    fn bytes(&self, bytes: usize) -> f64 {
        bytes as f64 * self.byte_us
    }

    fn item(&self, bytes: usize) -> f64 {
        (self.item_us + self.bytes(bytes)).max(self.least_us)
    }
}

/// What the ways cost in one direction, by [`Method`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Calibration(pub(super) [Cost; 3]);

impl Calibration {
    /// Before anything was measured: an H100 on PCIe 5.
    pub(super) const TYPICAL: Calibration = Calibration([
        Cost { start_us: 6.0, many_us: 15.0, item_us: 0.03, least_us: 0.7, byte_us: 1e-3 / 54.0 },
        Cost { start_us: 20.0, many_us: 15.0, item_us: 0.03, least_us: 0.7, byte_us: 1e-3 / 53.5 },
        Cost { start_us: 9.0, ..Cost::of_bytes(1e-3 / 50.7) },
    ]);
}

/// What a kernel on the bus costs others: it holds up compute and the bytes that flow against it (60 GB/s both ways where copies
/// come to 80 and more). So copies win where both take about as long.
const KERNEL_ON_THE_BUS: f64 = 1.05;

/// What staging costs others: the bytes pass through the device's memory twice more.
const THROUGH_STAGING: f64 = 1.01;

/// Pieces that a unit of work takes at most: their numbers have this many bits to spare beside an address.
pub(super) const UNIT_PIECES: usize = 1 << PIECE_BITS;
const PIECE_BITS: u32 = 13;

/// Pieces that take one way: those of a host run, or neighbours of one size that stand alone, each a host run of its own.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Part {
    pub(super) pieces: Range<usize>,
    pub(super) method: Method,
    bytes: usize,
    costs_us: [f64; 3],
}

/// Sorts pieces into host runs and chooses their ways. Keeps its memory from unit to unit.
///
/// Blocks of 4 KiB cross the bus in 75 ns each, so every pass over them counts.
#[derive(Debug, Default)]
pub(super) struct Planner {
    keys: Vec<u64>,
    spare_keys: Vec<u64>,
    sorted: Vec<Move>,
    parts: Vec<Part>,
    /// Copies that each way makes: joint runs, host runs, none.
    copies: [usize; 3],
}

impl Planner {
    /// Plans a unit of at most [`UNIT_PIECES`] pieces that is `share` of its transfer, which pays for the starts. Takes the pieces,
    /// and leaves anything in their place.
    pub(super) fn plan(
        &mut self,
        pieces: &mut Vec<Move>,
        share: f64,
        costs: &Calibration,
        forced: Option<Method>,
    ) {
        self.sort(pieces);
        self.find_parts(costs);
        match forced {
            Some(method) => self.parts.iter_mut().for_each(|part| part.method = method),
            None => self.choose(share, costs),
        }
    }

    /// The pieces that take one way, in host order.
    pub(super) fn pieces_by(&self, method: Method) -> impl Iterator<Item = &[Move]> {
        let parts = self.parts.iter().filter(move |part| part.method == method);
        parts.map(|part| &self.sorted[part.pieces.clone()])
    }

    fn sort(&mut self, pieces: &mut Vec<Move>) {
        if pieces.is_sorted_by_key(|piece| piece.host) {
            std::mem::swap(&mut self.sorted, pieces);
            return;
        }
        self.sorted.clear();
        // This is done while the first bytes wait: numbers sort several times faster than structs.
        let least = pieces.iter().map(|piece| piece.host).min().unwrap_or_default();
        self.keys.clear();
        let keys =
            pieces.iter().enumerate().map(|(at, piece)| (piece.host - least) << PIECE_BITS | at as u64);
        self.keys.extend(keys);
        sort_keys(&mut self.keys, &mut self.spare_keys);
        let index = |key: &u64| (key & (UNIT_PIECES as u64 - 1)) as usize;
        self.sorted.extend(self.keys.iter().map(|key| pieces[index(key)]));
    }

    fn find_parts(&mut self, Calibration([copies, staged, direct]): &Calibration) {
        self.parts.clear();
        self.copies = [0; 3];
        let pieces = &self.sorted;
        let mut at = 0;
        while at < pieces.len() {
            let (first, mut bytes, mut copies_us, mut direct_us) = (at, 0, 0.0, 0.0);
            loop {
                self.copies[Method::Copies as usize] += 1;
                let joint = joint_run(pieces, at);
                let joint_bytes: usize = pieces[joint.clone()].iter().map(|piece| piece.bytes).sum();
                copies_us += copies.item(joint_bytes);
                // Blocks share the kernel's warps, so their parts add up.
                direct_us +=
                    (joint.len() as f64 * direct.item_us + direct.bytes(joint_bytes)) * KERNEL_ON_THE_BUS;
                bytes += joint_bytes;
                at = joint.end;
                if at == pieces.len() || !pieces[at - 1].meets_on_host(&pieces[at]) {
                    break;
                }
            }
            let costs_us = [copies_us, staged.item(bytes) * THROUGH_STAGING, direct_us];
            let mut count = 1;
            if at - first == 1 {
                // More that stand alone need no second look, nor parts of their own.
                count += (at..pieces.len()).take_while(|at| stands_alone(pieces, *at, bytes)).count();
                at = first + count;
                self.copies[Method::Copies as usize] += count - 1;
            }
            self.copies[Method::Staged as usize] += count;
            let (bytes, costs_us) = (bytes * count, costs_us.map(|us| us * count as f64));
            self.parts.push(Part { pieces: first..at, method: Method::Copies, bytes, costs_us });
        }
    }

    /// One way for all, or to each its cheapest where that pays for several starts.
    fn choose(&mut self, share: f64, costs: &Calibration) {
        let start = |method: Method| {
            let (cost, copies) = (&costs.0[method as usize], self.copies[method as usize]);
            (cost.start_us + if copies > 1 { cost.many_us } else { 0.0 }) * share
        };
        let mut uniform = Method::ALL.map(start);
        let (mut mixed, mut used) = (0.0, [false; 3]);
        for part in &mut self.parts {
            let cost = |method: &Method| part.costs_us[*method as usize];
            let cheapest = Method::ALL.into_iter().min_by(|a, b| cost(a).total_cmp(&cost(b)));
            let cheapest = cheapest.unwrap_or(Method::Direct);
            mixed += cost(&cheapest);
            used[cheapest as usize] = true;
            Method::ALL.iter().for_each(|method| uniform[*method as usize] += cost(method));
            part.method = cheapest;
        }
        mixed += Method::ALL.into_iter().filter(|method| used[*method as usize]).map(start).sum::<f64>();
        let of = |method: &Method| uniform[*method as usize];
        let best = Method::ALL.into_iter().min_by(|a, b| of(a).total_cmp(&of(b)));
        if let Some(best) = best.filter(|best| of(best) <= mixed) {
            self.parts.iter_mut().for_each(|part| part.method = best);
        }
    }

    /// Bytes that take each way.
    pub(super) fn bytes_by_method(&self) -> [u64; 3] {
        let mut bytes = [0; 3];
        self.parts.iter().for_each(|part| bytes[part.method as usize] += part.bytes as u64);
        bytes
    }
}

/// Whether the piece at `at`, which does not meet the one before, has `bytes` bytes and does not meet the next.
fn stands_alone(pieces: &[Move], at: usize, bytes: usize) -> bool {
    pieces[at].bytes == bytes && pieces.get(at + 1).is_none_or(|next| !pieces[at].meets_on_host(next))
}

/// Sorts keys whose lowest [`PIECE_BITS`] do not matter, digit by digit: places of blocks have few digits that differ.
fn sort_keys(keys: &mut Vec<u64>, spare: &mut Vec<u64>) {
    const DIGIT: u32 = 11;
    let places = keys.iter().fold(0, |bits, key| bits | key >> PIECE_BITS);
    let mut shift = PIECE_BITS + if places == 0 { 0 } else { places.trailing_zeros() };
    let end = u64::BITS - places.leading_zeros() + PIECE_BITS;
    if end.saturating_sub(shift) > 4 * DIGIT || keys.len() < 1 << (DIGIT - 3) {
        keys.sort_unstable();
        return;
    }
    spare.clear();
    spare.resize(keys.len(), 0);
    while shift < end {
        let digit = |key: &u64| (key >> shift) as usize & ((1 << DIGIT) - 1);
        let mut next = [0u32; 1 << DIGIT];
        keys.iter().for_each(|key| next[digit(key)] += 1);
        let mut sum = 0;
        for count in &mut next {
            sum += std::mem::replace(count, sum);
        }
        for key in keys.iter() {
            let place = &mut next[digit(key)];
            spare[*place as usize] = *key;
            *place += 1;
        }
        std::mem::swap(keys, spare);
        shift += DIGIT;
    }
}

/// The pieces from `first` on without a gap on either side.
pub(super) fn joint_run(pieces: &[Move], first: usize) -> Range<usize> {
    let rest = pieces[first..].windows(2).take_while(|pair| pair[0].meets(&pair[1])).count();
    first..first + rest + 1
}

/// Where segments begin in staging memory: whole vectors, and whole lines of the cache.
const SEGMENT_ALIGN: usize = 128;

/// Bytes of a chunk without gaps on the host and in staging memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) host: u64,
    pub(super) staging_at: usize,
    pub(super) bytes: usize,
}

/// What passes through a staging buffer at once. Keeps its memory from chunk to chunk.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) segments: Vec<Segment>,
    bytes: usize,
}

impl Chunk {
    /// Adds a piece, unless it goes beyond `limit_bytes` of a chunk that is not empty. Returns its offset in staging memory.
    pub(super) fn push(&mut self, piece: &Move, limit_bytes: usize) -> Option<usize> {
        let joins = self.segments.last().is_some_and(|last| last.host + last.bytes as u64 == piece.host);
        let at = if joins { self.bytes } else { self.bytes.next_multiple_of(SEGMENT_ALIGN) };
        if at + piece.bytes > limit_bytes && !self.is_empty() {
            return None;
        }
        match self.segments.last_mut().filter(|_| joins) {
            Some(last) => last.bytes += piece.bytes,
            None => self.segments.push(Segment { host: piece.host, staging_at: at, bytes: piece.bytes }),
        }
        self.bytes = at + piece.bytes;
        Some(at)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1 << 10;
    const HOST: u64 = 1 << 40;

    fn shuffled(count: usize) -> Vec<u64> {
        let mut order: Vec<u64> = (0..count as u64).collect();
        let mut seed = 7u64;
        for at in (1..count).rev() {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            order.swap(at, (seed >> 33) as usize % (at + 1));
        }
        order
    }

    /// Blocks in device slots `device`, host slots `host`.
    fn moves(bytes: usize, device: impl Fn(u64) -> u64, host: impl Fn(u64) -> u64, count: u64) -> Vec<Move> {
        let at = |i| Move { device: device(i) * bytes as u64, host: HOST + host(i) * bytes as u64, bytes };
        (0..count).map(at).collect()
    }

    fn methods(pieces: &[Move]) -> Vec<Method> {
        let mut planner = Planner::default();
        planner.plan(&mut pieces.to_vec(), 1.0, &Calibration::TYPICAL, None);
        let mut methods: Vec<Method> = planner.parts.iter().map(|part| part.method).collect();
        methods.dedup();
        methods
    }

    #[test]
    fn what_is_contiguous_on_both_sides_is_one_run_in_any_order() {
        let order = shuffled(1000);
        let pieces = moves(4 * KIB, |i| order[i as usize], |i| order[i as usize], 1000);
        let mut planner = Planner::default();
        planner.plan(&mut pieces.clone(), 1.0, &Calibration::TYPICAL, None);
        assert_eq!(planner.parts.len(), 1);
        assert_eq!(planner.parts[0].method, Method::Copies);
        assert_eq!(joint_run(&planner.sorted, 0), 0..1000);
        assert_eq!(planner.bytes_by_method(), [4000 * KIB as u64, 0, 0]);
    }

    #[test]
    fn a_host_run_with_scattered_slots_is_staged() {
        let order = shuffled(8192);
        for bytes in [4 * KIB, 64 * KIB] {
            let pieces = moves(bytes, |i| 2 * order[i as usize], |i| i, 8192);
            assert_eq!(methods(&pieces), [Method::Staged]);
        }
    }

    #[test]
    fn blocks_scattered_on_both_sides_go_directly_unless_they_are_large() {
        let order = shuffled(512);
        let of = |bytes| methods(&moves(bytes, |i| 2 * order[i as usize], |i| 2 * i, 512));
        assert_eq!(of(4 * KIB), [Method::Direct]);
        assert_eq!(of(16 * KIB), [Method::Direct]);
        assert_eq!(of(64 * KIB), [Method::Copies]);
        assert_eq!(of(1024 * KIB), [Method::Copies]);
    }

    #[test]
    fn what_stands_alone_is_one_part_for_each_size() {
        let order = shuffled(300);
        let mut pieces = moves(4 * KIB, |i| i, |i| 2 * order[i as usize], 200);
        pieces.extend(moves(8 * KIB, |i| 1000 + i, |i| 1000 + 2 * i, 100));
        // A run between two that stand alone.
        pieces.extend(moves(4 * KIB, |i| 5000 + 2 * i, |i| 5000 + i, 10));
        pieces.extend(moves(4 * KIB, |i| 6000 + 2 * i, |i| 6000 + 2 * i, 10));
        let mut planner = Planner::default();
        planner.plan(&mut pieces.clone(), 1.0, &Calibration::TYPICAL, None);
        let lengths: Vec<usize> = planner.parts.iter().map(|part| part.pieces.len()).collect();
        assert_eq!(lengths, [200, 100, 10, 10]);
    }

    #[test]
    fn keys_are_sorted_whatever_their_digits() {
        let mut spare = Vec::new();
        for (count, shift, most) in
            [(8192, 12, 1 << 21), (8192, 0, 1 << 40), (300, 20, 1 << 12), (5, 3, 9), (4096, 0, 1)]
        {
            let mut seed = 11u64;
            let mut next = || {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((seed >> 24) % most) << shift
            };
            let mut keys: Vec<u64> = (0..count).map(|at| next() << PIECE_BITS | at).collect();
            let mut sorted = keys.clone();
            sorted.sort_unstable();
            sort_keys(&mut keys, &mut spare);
            assert_eq!(keys, sorted, "{count} keys << {shift} below {most}");
        }
    }

    #[test]
    fn a_short_transfer_takes_the_way_that_starts_soonest() {
        assert_eq!(methods(&moves(4 * KIB, |i| i, |i| i, 1)), [Method::Copies]);
        assert_eq!(methods(&moves(4 * KIB, |i| 2 * i, |i| i, 16)), [Method::Direct]);
    }

    #[test]
    fn a_mixed_list_is_split_by_what_suits_each_part() {
        let order = shuffled(2000);
        let far = |pieces: Vec<Move>, by: u64| {
            pieces.into_iter().map(move |piece| Move {
                host: piece.host + by,
                device: piece.device + by,
                ..piece
            })
        };
        let mut pieces = moves(64 * KIB, |i| 2 * order[i as usize], |i| i, 2000);
        pieces.extend(far(moves(64 * KIB, |i| i, |i| i, 2000), 1 << 32));
        pieces.extend(far(moves(4 * KIB, |i| 2 * order[i as usize], |i| 2 * i, 2000), 1 << 33));
        assert_eq!(methods(&pieces), [Method::Staged, Method::Copies, Method::Direct]);
    }

    #[test]
    fn planning_loses_no_piece() {
        let order = shuffled(UNIT_PIECES);
        let host = |i: u64| order[i as usize] * 3 / 2;
        let mut pieces = moves(4 * KIB, |i| i, host, UNIT_PIECES as u64);
        for forced in [None, Some(Method::Copies), Some(Method::Staged), Some(Method::Direct)] {
            let mut planner = Planner::default();
            planner.plan(&mut pieces.clone(), 0.5, &Calibration::TYPICAL, forced);
            let ways = Method::ALL.into_iter().flat_map(|method| planner.pieces_by(method));
            assert_eq!(ways.map(<[Move]>::len).sum::<usize>(), pieces.len());
            assert_eq!(planner.bytes_by_method().iter().sum::<u64>(), (4 * KIB * pieces.len()) as u64);
            let mut found = planner.sorted.clone();
            found.sort_by_key(|piece| piece.device);
            pieces.sort_by_key(|piece| piece.device);
            assert_eq!(found, pieces);
        }
    }

    #[test]
    fn chunks_join_host_neighbours_and_keep_to_their_limit() {
        let mut chunk = Chunk::default();
        let piece = |device, host, bytes| Move { device, host, bytes };
        assert_eq!(chunk.push(&piece(1000, 0, 100), 4096), Some(0));
        assert_eq!(chunk.push(&piece(9000, 100, 100), 4096), Some(100));
        assert_eq!(chunk.push(&piece(5000, 500, 300), 4096), Some(256));
        assert_eq!(
            chunk.segments,
            [
                Segment { host: 0, staging_at: 0, bytes: 200 },
                Segment { host: 500, staging_at: 256, bytes: 300 }
            ]
        );
        assert_eq!(chunk.push(&piece(0, 800, 4096), 4096), None);
        chunk.clear();
        assert_eq!(chunk.push(&piece(0, 800, 4096), 4096), Some(0));
    }
}
