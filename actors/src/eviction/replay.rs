//! Replays made-up loads through the evictor, and prints how many blocks hit. Traces go through the `replay` example of the root package.
//!
//! `cargo test --release -p kv-cache-actors eviction::replay::table -- --ignored --nocapture`

use std::time::{Duration, Instant};

use super::*;

struct Request {
    at_ms: u64,
    blocks: Vec<u32>,
}

/// Requests one after the other: hits are the leading blocks that are cached, the others are cached whatever they evict, and
/// all are held to the end of the request. Returns hits, blocks, and the time that it took.
fn replay(requests: &[Request], capacity: usize, policy: EvictionPolicy) -> (usize, usize, Duration) {
    let contents =
        requests.iter().flat_map(|request| &request.blocks).max().map_or(0, |most| *most as usize + 1);
    let mut block_of: Vec<Option<BlockId>> = vec![None; contents];
    let mut content_of = vec![0; capacity];
    let mut vacant: Vec<BlockId> = (0..capacity as u32).map(BlockId).collect();
    let mut evictor = Evictor::new(policy, capacity);
    let (mut hits, mut blocks, mut held) = (0, 0, Vec::new());
    let start = Instant::now();
    for Request { at_ms: now_ms, blocks: contents } in requests {
        let mut is_run = true;
        for (depth, &content) in contents.iter().enumerate() {
            let touch = Touch { now_ms: *now_ms, depth: depth as u32, request_blocks: contents.len() as u32 };
            blocks += 1;
            is_run &= block_of[content as usize].is_some();
            if let Some(block) = block_of[content as usize].filter(|_| is_run) {
                hits += 1;
                evictor.touch(block, touch);
                evictor.hold(block);
                held.push(block);
                continue;
            }
            let block = vacant.pop().or_else(|| {
                let victim = evictor.victim(*now_ms)?;
                evictor.remove(victim, *now_ms);
                block_of[content_of[victim.0 as usize] as usize] = None;
                Some(victim)
            });
            let Some(block) = block else { break };
            block_of[content as usize] = Some(block);
            content_of[block.0 as usize] = content;
            evictor.insert(block, held.last().copied(), u64::from(content), 0, touch);
            held.push(block);
        }
        held.drain(..).rev().for_each(|block| evictor.release(block, *now_ms));
    }
    (hits, blocks, start.elapsed())
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed ^ mixed >> 27
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// One block a request, popular ones more often.
fn zipf(contents: u32, exponent: f64, requests: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=contents)
        .map(|rank| {
            sum += f64::from(rank).powf(-exponent);
            sum
        })
        .collect();
    let mut random = Random(seed);
    let one = |_| {
        let drawn = random.unit() * sum;
        vec![sums.partition_point(|upto| *upto < drawn).min(contents as usize - 1) as u32]
    };
    (0..requests).map(one).collect()
}

/// The same chains of 8 blocks over and over.
fn cycle(chains: u32, requests: u32) -> Vec<Vec<u32>> {
    (0..requests).map(|request| (0..8).map(|depth| request % chains * 8 + depth).collect()).collect()
}

/// One load after the other, or one request of each in turn; contents are not shared.
fn joined(first: Vec<Vec<u32>>, second: Vec<Vec<u32>>, in_turn: bool) -> Vec<Vec<u32>> {
    let most = first.iter().flatten().max().map_or(0, |most| most + 1);
    let second = second.into_iter().map(|blocks| blocks.into_iter().map(|block| block + most).collect());
    match in_turn {
        false => first.into_iter().chain(second).collect(),
        true => first.into_iter().zip(second).flat_map(|(a, b)| [a, b]).collect(),
    }
}

fn timed(requests: Vec<Vec<u32>>) -> Vec<Request> {
    requests.into_iter().zip(0..).map(|(blocks, at)| Request { at_ms: at * 10, blocks }).collect()
}

fn print(name: &str, requests: &[Request], capacities: &[usize]) {
    println!("{name:20}{}", capacities.iter().map(|capacity| format!("{capacity:>8}")).collect::<String>());
    for policy in [EvictionPolicy::Lru, EvictionPolicy::Lfu, EvictionPolicy::Slru, EvictionPolicy::Auto] {
        let mut ratios = String::new();
        let mut ns_per_block = Vec::new();
        for &capacity in capacities {
            let (hits, blocks, took) = replay(requests, capacity, policy);
            ratios += &format!("{:8.4}", hits as f64 / blocks as f64);
            ns_per_block.push(took.as_nanos() as usize / blocks);
        }
        let (least, most) = (ns_per_block.iter().min().unwrap(), ns_per_block.iter().max().unwrap());
        println!("{:20}{ratios}   {least}-{most} ns a block", format!("  {policy:?}"));
    }
}

#[test]
#[ignore = "prints a table, takes minutes"]
fn table() {
    let some = [1000, 3000, 5000, 10_000, 20_000];
    let popular = |seed| zipf(50_000, 0.9, 200_000, seed);
    let fresh = (0..200_000).map(|block| vec![block]).collect::<Vec<_>>();
    print("Zipf 0.8", &timed(zipf(100_000, 0.8, 400_000, 1)), &some);
    print("Zipf 1.0", &timed(zipf(100_000, 1.0, 400_000, 1)), &some);
    print("loop of 12,000", &timed(cycle(1500, 30_000)), &some);
    print("never again", &timed(fresh.clone()), &some);
    print("Zipf, other Zipf", &timed(joined(popular(1), popular(2), false)), &some);
    print("Zipf, loop", &timed(joined(popular(1), cycle(1500, 20_000), false)), &some);
    print("loop, Zipf", &timed(joined(cycle(1500, 20_000), popular(1), false)), &some);
    print("Zipf between scans", &timed(joined(popular(1), fresh, true)), &some);
}

/// What a policy for prefix caches has to get right, small enough for every run of the tests.
#[test]
fn auto_is_at_least_as_good_as_lru_and_lfu() {
    let popular = |seed| zipf(5000, 0.9, 40_000, seed);
    let fresh = (0..40_000).map(|block| vec![block]).collect::<Vec<_>>();
    let loads = [
        ("Zipf", popular(1)),
        ("loop", cycle(150, 4000)),
        ("Zipf between scans", joined(popular(1), fresh, true)),
        ("Zipf, other Zipf", joined(popular(1), popular(2), false)),
    ];
    for (name, load) in loads {
        let requests = timed(load);
        for capacity in [200, 1000] {
            let hits = |policy| replay(&requests, capacity, policy).0 as f64;
            let best = hits(EvictionPolicy::Lru).max(hits(EvictionPolicy::Lfu));
            let auto = hits(EvictionPolicy::Auto);
            assert!(auto >= 0.98 * best, "{name}, {capacity} blocks: {auto} hits, LRU or LFU {best}");
        }
    }
}
