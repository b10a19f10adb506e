//! Finding prompts and keeping account of cached blocks: what it costs, and how it grows with threads.
//!
//! `cargo bench --bench prefix` prints nanoseconds per block, and the throughput of several threads against as many times one:
//!
//! - *match*: threads look prompts up in one shard's index, inline, as callers do; also while the shard's own thread keeps changing it;
//! - *cycle*: match, allocate, register, release and evict, each thread on a shard of its own, as each device has;
//! - *in registers*: a loop without memory, as often. Virtual cores that share a core, or a clock that falls, slow that down as well.
//!
//! All are medians of seven rounds.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kv_cache_actors::block::{BlockKey, HashSecret, KeyScheme};
use kv_cache_actors::device::Bookkeeping;
use kv_cache_actors::eviction::EvictionPolicy;
use kv_cache_actors::geometry::{ElementType, Geometry};
use kv_cache_actors::sequence::OpenOptions;

const CAPACITY: usize = 50_000;
const PROMPT_BLOCKS: usize = 24;
const PROMPTS: usize = 4000;
const ROUNDS: usize = 7;
/// Prompts that a thread looks up in a round.
const MATCHES: usize = 100_000;
/// Requests that it goes through in one.
const REQUESTS: usize = 20_000;

/// Prompts that begin alike in groups of 8: the first half of their blocks is the group's.
fn prompts(seed: u32) -> Vec<Vec<BlockKey>> {
    let geometry = Geometry::new(1, 1, 1, ElementType::F16);
    let keys = KeyScheme::new(HashSecret([0; 32]), &geometry, None);
    let root = keys.root(&OpenOptions::default());
    let block = |prompt: usize, at: usize| {
        let owner = if at < PROMPT_BLOCKS / 2 { prompt / 8 } else { PROMPTS + prompt };
        keys.child(root, &[seed, owner as u32, at as u32], [])
    };
    (0..PROMPTS).map(|prompt| (0..PROMPT_BLOCKS).map(|at| block(prompt, at)).collect()).collect()
}

/// Requests in an order that comes back to popular prompts: three in four are of one prompt in eight.
fn order(seed: u64, requests: usize) -> Vec<usize> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize
    };
    let one = |_| if random() % 4 > 0 { random() % (PROMPTS / 8) } else { random() % PROMPTS };
    (0..requests).map(one).collect()
}

/// Wall time of `work`, in nanoseconds per block, done on each state by a thread of its own at once.
fn ns_per_block<T: Send>(states: Vec<T>, blocks: usize, work: impl Fn(&mut T) + Sync) -> f64 {
    let start = Barrier::new(states.len() + 1);
    let wall = std::thread::scope(|scope| {
        let (work, start) = (&work, &start);
        let running: Vec<_> = states
            .into_iter()
            .map(|mut state| {
                scope.spawn(move || {
                    start.wait();
                    work(&mut state);
                    state
                })
            })
            .collect();
        start.wait();
        let begun = Instant::now();
        let _states: Vec<_> = running.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        begun.elapsed()
    });
    wall.as_nanos() as f64 / blocks as f64
}

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let counts: Vec<usize> =
        [1, 2, 4, 8, 16].into_iter().filter(|threads| *threads <= cores.max(2)).collect();
    println!(
        "{cores} cores; nanoseconds a block for each thread, and throughput as a share of linear growth"
    );
    let prompts = &prompts(1);

    for writing in [false, true] {
        let mut shard = Bookkeeping::new(CAPACITY, EvictionPolicy::Lru);
        for prompt in prompts {
            shard.request(0, prompt).expect("it has room");
        }
        let index = shard.index().clone();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            if writing {
                let (stop, shard) = (&stop, &mut shard);
                scope.spawn(move || {
                    let other = self::prompts(2);
                    for prompt in other.iter().cycle() {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        shard.request(0, prompt).expect("it has room");
                    }
                });
            }
            let mut took = vec![Vec::new(); counts.len()];
            for _ in 0..ROUNDS {
                for (rounds, &threads) in took.iter_mut().zip(&counts) {
                    let orders = (0..threads as u64).map(|seed| order(seed, MATCHES)).collect();
                    rounds.push(ns_per_block(orders, MATCHES * PROMPT_BLOCKS, |order: &mut Vec<usize>| {
                        for &prompt in order.iter() {
                            drop(std::hint::black_box(index.lease(&prompts[prompt])));
                        }
                    }));
                }
            }
            report(if writing { "match beside changes" } else { "match" }, &counts, took);
            stop.store(true, Ordering::Relaxed);
        });
    }

    let policies = [("cycle, lru", EvictionPolicy::Lru), ("cycle, auto", EvictionPolicy::Auto)];
    // By row and thread count: what each round took.
    let mut took = vec![vec![Vec::new(); counts.len()]; policies.len() + 1];
    // A round has all of them: a machine that is slow for a while is so for all.
    for _ in 0..ROUNDS {
        for (at, &threads) in counts.iter().enumerate() {
            took[0][at].push(ns_per_block(
                (0..threads as u64).collect(),
                REQUESTS * PROMPT_BLOCKS,
                in_registers,
            ));
            for (row, (_, policy)) in (1..).zip(policies) {
                let shards: Vec<_> = (0..threads as u64)
                    .map(|seed| (Bookkeeping::new(CAPACITY / 4, policy), order(seed, REQUESTS)))
                    .collect();
                let ns = ns_per_block(shards, REQUESTS * PROMPT_BLOCKS, |(shard, order)| {
                    for (now, &prompt) in (0..).zip(order.iter()) {
                        shard.request(now, &prompts[prompt]).expect("it has room");
                    }
                });
                took[row][at].push(ns);
            }
        }
    }
    for (name, row) in ["in registers"].into_iter().chain(policies.map(|(name, _)| name)).zip(took) {
        report(name, &counts, row);
    }
}

/// As many independent operations as keep a core busy, and no memory: what more threads cost each other on this machine by themselves.
fn in_registers(seed: &mut u64) {
    let mixed = |number: u64| (number ^ number >> 29).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17);
    let steps = 60 * (REQUESTS * PROMPT_BLOCKS) as u64;
    *seed = (*seed..*seed + steps).fold(0, |all, number| all ^ mixed(number));
}

/// The medians of what each number of threads took, beside what one did.
fn report(name: &str, counts: &[usize], took: Vec<Vec<f64>>) {
    let median = |mut rounds: Vec<f64>| {
        rounds.sort_by(f64::total_cmp);
        rounds[rounds.len() / 2]
    };
    let medians: Vec<f64> = took.into_iter().map(median).collect();
    for (threads, ns) in counts.iter().zip(&medians) {
        let growth = medians[0] / ns;
        println!("{name:<22} {threads:>3} threads {ns:>8.1} ns a block, {growth:.2} of linear");
    }
}
