//! What one decode step costs the runtime without the bytes' copying: 256 appends of one token as one batch, through the
//! core of a device actor with a lane that does nothing.
//!
//! `cargo bench --bench core` prints the median of many steps, in microseconds for the whole batch: building the batch (with
//! and without its tensors), planning it, landing it, and taking the results apart.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_cache_actors::batch::{BatchCacheOperations, EachTensors, HostTensor, Outcome};
use kv_cache_actors::block::{HashSecret, KeyScheme};
use kv_cache_actors::device::{CoreConfig, DeviceCore, Effects, Event};
use kv_cache_actors::eviction::EvictionPolicy;
use kv_cache_actors::format::BlockFormat;
use kv_cache_actors::geometry::{ElementType, Geometry};
use kv_cache_actors::pool::PoolLayout;
use kv_cache_actors::reply::Reply;
use kv_cache_actors::sequence::{CloseHook, OpenOptions, OpenSequence, SequenceId};
use kv_cache_actors::submission::Submission;
use kv_cache_actors::tokens::TokenBudget;

const STEP: usize = 256;

fn main() {
    println!("microseconds per batch of {STEP} appends, medians");
    println!(
        "{:<34} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}",
        "", "build", "send", "plan", "land", "results", "seal"
    );
    // The last two: with 4 KiB of keys and values copied per append, as a caller of this shape would.
    for (name, sequences, copied, each) in [
        ("256 sequences, no tensors", 256, false, false),
        ("20,000 sequences, no tensors", 20_000, false, false),
        ("256 sequences, 4 KiB copied each", 256, true, false),
        ("the same as one append_each", 256, true, true),
    ] {
        step(name, sequences, copied, each);
    }
}

/// The parts of a step.
#[derive(Default)]
struct Times([Vec<Duration>; 6]);

impl Times {
    fn lap(&mut self, part: usize, started: &mut Instant) {
        let now = Instant::now();
        self.0[part].push(now - *started);
        *started = now;
    }
}

fn step(name: &str, count: usize, copied: bool, each: bool) {
    // Without tensors to speak of: 32 bytes of keys, 32 of values.
    let (heads, dim) = if copied { (8, 128) } else { (1, 16) };
    let geometry = Geometry::new(1, heads, dim, ElementType::F16);
    let layout = geometry.layout().expect("a layout");
    let slot = layout.raw_bytes().next_multiple_of(128);
    let pool = PoolLayout::plan(&layout, BlockFormat::RAW, (count * slot * 8) as u64).expect("a pool");
    let keys = KeyScheme::new(HashSecret([0; 32]), &geometry, None);
    let config = CoreConfig {
        cache: 0,
        shard: 0,
        geometry,
        layout,
        pool,
        formats: BlockFormat::RAW.into(),
        keep_raw: Default::default(),
        max_tokens: 1 << 20,
        token_budget: TokenBudget::new(1 << 40),
        copy_lane_min_bytes: 1 << 20,
        seals_per_launch: 16,
        deterministic: false,
        dropping: None,
        centred: false,
        keys,
        eviction: EvictionPolicy::Auto,
        index_hash_bits: 64,
        tenants: Arc::default(),
    };
    let on_drop: CloseHook = Arc::new(|_| {});
    let mut core = DeviceCore::new(config, on_drop);
    let mut effects = Effects::default();
    let handles: Vec<OpenSequence> = (0..count).map(|_| open(&mut core, &mut effects)).collect();
    let ids: Vec<SequenceId> = handles.iter().map(OpenSequence::id).collect();
    let tensor = vec![0u8; heads as usize * dim as usize * 2];
    let host = HostTensor { element: ElementType::F16, bytes: &tensor };
    let all = vec![0u8; STEP * tensor.len()];
    let host_of_all = HostTensor { element: ElementType::F16, bytes: &all };
    let mut times = Times::default();
    let mut next = 0;
    for _ in 0..count / STEP * 200 {
        let mut started = Instant::now();
        let mut batch = BatchCacheOperations::new();
        batch.reserve_bytes(STEP * tensor.len() * 2);
        if each {
            batch.append_each(ids.iter().copied(), &[1; STEP], EachTensors::Host(host_of_all, host_of_all));
        } else {
            for _ in 0..STEP {
                next = (next + 7919) % count;
                batch.append(ids[next], None, &[1], None, host, host);
            }
        }
        batch.check(&layout, 1 << 20, &[]);
        times.lap(0, &mut started);
        let (reply, mut answer) = Reply::new();
        let submissions = vec![Submission::new(batch, None, Some(reply), None)];
        times.lap(1, &mut started);
        core.warm(&submissions);
        for submission in submissions {
            core.apply(Event::Submission(submission), &mut effects);
        }
        core.flush(&mut effects);
        times.lap(2, &mut started);
        while let Some((_, launch)) = effects.launches.pop() {
            core.apply(Event::Launched(launch), &mut effects);
        }
        for answer in effects.answers.drain(..) {
            answer.send();
        }
        times.lap(3, &mut started);
        let results = answer.try_take().expect("answered").expect("not dropped");
        let appended = results.iter().filter(|result| matches!(result, Ok(Outcome::Appended { .. }))).count();
        assert_eq!(appended, STEP);
        drop(results);
        times.lap(4, &mut started);
        while core.wants_to_seal() {
            core.apply(Event::Seal, &mut effects);
            core.flush(&mut effects);
            while let Some((_, launch)) = effects.launches.pop() {
                core.apply(Event::Launched(launch), &mut effects);
            }
        }
        times.lap(5, &mut started);
        // Sequences stay short: no step is about the length of a list of blocks.
        if core.blocks().pool().raw_available() < STEP * 2 {
            truncate(&mut core, &mut effects, &ids);
        }
    }
    print!("{name:<34}");
    for mut part in times.0 {
        part.sort();
        print!(" {:>7.1}", part[part.len() / 2].as_secs_f64() * 1e6);
    }
    println!();
}

fn open(core: &mut DeviceCore, effects: &mut Effects) -> OpenSequence {
    let mut batch = BatchCacheOperations::new();
    batch.open(OpenOptions::default());
    let (reply, mut answer) = Reply::new();
    core.apply(Event::Submission(Submission::new(batch, None, Some(reply), None)), effects);
    effects.opened.clear();
    effects.answers.drain(..).for_each(|answer| answer.send());
    match answer.try_take().expect("answered").expect("not dropped").pop() {
        Some(Ok(Outcome::Opened(handle))) => handle,
        other => panic!("a sequence was opened, but: {other:?}"),
    }
}

fn truncate(core: &mut DeviceCore, effects: &mut Effects, ids: &[SequenceId]) {
    for &id in ids {
        let mut batch = BatchCacheOperations::new();
        batch.truncate(id, 0);
        core.apply(Event::Submission(Submission::new(batch, None, None, None)), effects);
        effects.answers.clear();
    }
}
