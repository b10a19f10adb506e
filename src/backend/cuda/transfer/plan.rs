//! Which way the bytes of a transfer take. Pure: addresses are numbers here, and costs come from a [`Calibration`].
//!
//! Pieces are sorted by host address. A *host run* is a stretch without gaps on the host; a *joint run* has no gap on the device
//! either. A host run takes one way:
//!
//! | way | costs | good for |
//! |---|---|---|
//! | copies | one call of the driver per joint run | few, large joint runs |
//! | staged | one copy per host run into staging memory, and a share of a kernel | scattered slots of a host run |
//! | direct | a share of a kernel that reaches over PCIe | what is scattered on both sides |

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

/// What a way costs: a start, and per item a call and its bytes. Calls do not hide behind bytes: two streams with copies of
/// 256 KiB in turn came to two thirds of what one long copy does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cost {
    /// Of a transfer.
    pub(super) start_us: f64,
    /// Of a copy; of a block that a kernel moves.
    pub(super) item_us: f64,
    /// Rate of many bytes.
    pub(super) gb_per_s: f64,
}

impl Cost {
    fn item(&self, bytes: usize) -> f64 {
        self.item_us + bytes as f64 / self.gb_per_s / 1e3
    }
}

/// What the ways cost in one direction, by [`Method`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Calibration(pub(super) [Cost; 3]);

impl Calibration {
    /// Before anything was measured: an H100 on PCIe 5.
    pub(super) const TYPICAL: Calibration = Calibration([
        Cost { start_us: 6.0, item_us: 2.5, gb_per_s: 54.0 },
        Cost { start_us: 20.0, item_us: 2.5, gb_per_s: 53.0 },
        Cost { start_us: 9.0, item_us: 0.0, gb_per_s: 50.7 },
    ]);
}

/// Pieces that a unit of work takes at most: their numbers have this many bits to spare beside an address.
pub(super) const UNIT_PIECES: usize = 1 << PIECE_BITS;
const PIECE_BITS: u32 = 13;

/// Pieces without a gap on the host, and their way.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HostRun {
    pub(super) pieces: Range<usize>,
    pub(super) method: Method,
    bytes: usize,
    costs_us: [f64; 3],
}

/// Sorts pieces into host runs and chooses their ways. Keeps its memory from unit to unit.
#[derive(Debug, Default)]
pub(super) struct Planner {
    keys: Vec<u64>,
    sorted: Vec<Move>,
    runs: Vec<HostRun>,
}

impl Planner {
    /// Plans a unit of at most [`UNIT_PIECES`] pieces that is `share` of its transfer, which pays for the starts.
    pub(super) fn plan(&mut self, pieces: &[Move], share: f64, costs: &Calibration, forced: Option<Method>) {
        self.sort(pieces);
        self.find_runs(costs);
        match forced {
            Some(method) => self.runs.iter_mut().for_each(|run| run.method = method),
            None => self.choose(share, costs),
        }
    }

    /// The pieces by host address.
    pub(super) fn pieces(&self) -> &[Move] {
        &self.sorted
    }

    /// The pieces and ways of the host runs.
    pub(super) fn runs(&self) -> &[HostRun] {
        &self.runs
    }

    fn sort(&mut self, pieces: &[Move]) {
        self.sorted.clear();
        if pieces.is_sorted_by_key(|piece| piece.host) {
            self.sorted.extend_from_slice(pieces);
            return;
        }
        // Whole numbers sort several times faster than structs, and this is done while the first bytes wait.
        let least = pieces.iter().map(|piece| piece.host).min().unwrap_or_default();
        self.keys.clear();
        let keys =
            pieces.iter().enumerate().map(|(at, piece)| (piece.host - least) << PIECE_BITS | at as u64);
        self.keys.extend(keys);
        self.keys.sort_unstable();
        let index = |key: &u64| (key & (UNIT_PIECES as u64 - 1)) as usize;
        self.sorted.extend(self.keys.iter().map(|key| pieces[index(key)]));
    }

    fn find_runs(&mut self, Calibration([copies, staged, direct]): &Calibration) {
        self.runs.clear();
        let pieces = &self.sorted;
        let mut at = 0;
        while at < pieces.len() {
            let (first, mut bytes, mut copies_us, mut direct_us) = (at, 0, 0.0, 0.0);
            loop {
                let joint = joint_run(pieces, at);
                let joint_bytes: usize = pieces[joint.clone()].iter().map(|piece| piece.bytes).sum();
                copies_us += copies.item(joint_bytes);
                // Blocks share the kernel's warps, so their parts add up.
                direct_us += joint.len() as f64 * direct.item_us + joint_bytes as f64 / direct.gb_per_s / 1e3;
                bytes += joint_bytes;
                at = joint.end;
                if at == pieces.len() || !pieces[at - 1].meets_on_host(&pieces[at]) {
                    break;
                }
            }
            let costs_us = [copies_us, staged.item(bytes), direct_us];
            self.runs.push(HostRun { pieces: first..at, method: Method::Copies, bytes, costs_us });
        }
    }

    /// One way for all, or to each its cheapest where that pays for several starts.
    fn choose(&mut self, share: f64, costs: &Calibration) {
        let start = |method: Method| costs.0[method as usize].start_us * share;
        let mut uniform = Method::ALL.map(start);
        let (mut mixed, mut used) = (0.0, [false; 3]);
        for run in &mut self.runs {
            let cost = |method: &Method| run.costs_us[*method as usize];
            let cheapest = Method::ALL.into_iter().min_by(|a, b| cost(a).total_cmp(&cost(b)));
            let cheapest = cheapest.unwrap_or(Method::Direct);
            mixed += cost(&cheapest);
            used[cheapest as usize] = true;
            Method::ALL.iter().for_each(|method| uniform[*method as usize] += cost(method));
            run.method = cheapest;
        }
        mixed += Method::ALL.into_iter().filter(|method| used[*method as usize]).map(start).sum::<f64>();
        let of = |method: &Method| uniform[*method as usize];
        let best = Method::ALL.into_iter().min_by(|a, b| of(a).total_cmp(&of(b)));
        if let Some(best) = best.filter(|best| of(best) <= mixed) {
            self.runs.iter_mut().for_each(|run| run.method = best);
        }
    }

    /// Bytes that take each way.
    pub(super) fn bytes_by_method(&self) -> [u64; 3] {
        let mut bytes = [0; 3];
        self.runs.iter().for_each(|run| bytes[run.method as usize] += run.bytes as u64);
        bytes
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
    /// Place on the device, offset in staging memory, bytes.
    pub(super) places: Vec<(u64, usize, usize)>,
    bytes: usize,
}

impl Chunk {
    /// Adds a piece, unless it goes beyond `limit_bytes` of a chunk that is not empty.
    pub(super) fn push(&mut self, piece: &Move, limit_bytes: usize) -> bool {
        let joins = self.segments.last().is_some_and(|last| last.host + last.bytes as u64 == piece.host);
        let at = if joins { self.bytes } else { self.bytes.next_multiple_of(SEGMENT_ALIGN) };
        if at + piece.bytes > limit_bytes && !self.is_empty() {
            return false;
        }
        match self.segments.last_mut().filter(|_| joins) {
            Some(last) => last.bytes += piece.bytes,
            None => self.segments.push(Segment { host: piece.host, staging_at: at, bytes: piece.bytes }),
        }
        self.places.push((piece.device, at, piece.bytes));
        self.bytes = at + piece.bytes;
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.places.clear();
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
        planner.plan(pieces, 1.0, &Calibration::TYPICAL, None);
        let mut methods: Vec<Method> = planner.runs().iter().map(|run| run.method).collect();
        methods.dedup();
        methods
    }

    #[test]
    fn what_is_contiguous_on_both_sides_is_one_run_in_any_order() {
        let order = shuffled(1000);
        let pieces = moves(4 * KIB, |i| order[i as usize], |i| order[i as usize], 1000);
        let mut planner = Planner::default();
        planner.plan(&pieces, 1.0, &Calibration::TYPICAL, None);
        assert_eq!(planner.runs().len(), 1);
        assert_eq!(planner.runs()[0].method, Method::Copies);
        assert_eq!(joint_run(planner.pieces(), 0), 0..1000);
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
        assert_eq!(of(64 * KIB), [Method::Direct]);
        assert_eq!(of(1024 * KIB), [Method::Direct]);
        assert_eq!(of(16 * 1024 * KIB), [Method::Copies]);
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
            planner.plan(&pieces, 0.5, &Calibration::TYPICAL, forced);
            let covered: usize = planner.runs().iter().map(|run| run.pieces.len()).sum();
            assert_eq!(covered, pieces.len());
            assert_eq!(planner.bytes_by_method().iter().sum::<u64>(), (4 * KIB * pieces.len()) as u64);
            let mut found = planner.pieces().to_vec();
            found.sort_by_key(|piece| piece.device);
            pieces.sort_by_key(|piece| piece.device);
            assert_eq!(found, pieces);
        }
    }

    #[test]
    fn chunks_join_host_neighbours_and_keep_to_their_limit() {
        let mut chunk = Chunk::default();
        let piece = |device, host, bytes| Move { device, host, bytes };
        assert!(chunk.push(&piece(1000, 0, 100), 4096));
        assert!(chunk.push(&piece(9000, 100, 100), 4096));
        assert!(chunk.push(&piece(5000, 500, 300), 4096));
        assert_eq!(
            chunk.segments,
            [
                Segment { host: 0, staging_at: 0, bytes: 200 },
                Segment { host: 500, staging_at: 256, bytes: 300 }
            ]
        );
        assert_eq!(chunk.places, [(1000, 0, 100), (9000, 100, 100), (5000, 256, 300)]);
        assert!(!chunk.push(&piece(0, 800, 4096), 4096));
        chunk.clear();
        assert!(chunk.push(&piece(0, 800, 4096), 4096));
    }
}
