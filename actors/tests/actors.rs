//! The real actors (router task, device and transfer threads) on simulated devices: that the shells around the cores do
//! what the oracle's rig does by hand. Their threads are scheduled by the system, so these tests cover no interleaving in
//! particular; nothing here depends on time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kv_cache_actors::assembly::{Assembler, Assembly};
use kv_cache_actors::batch::{BatchCacheOperations, HostTensor, Outcome};
use kv_cache_actors::device::CoreConfig;
use kv_cache_actors::error::Error;
use kv_cache_actors::events::EventHub;
use kv_cache_actors::format::Format;
use kv_cache_actors::geometry::{BlockLayout, ElementType, Plane};
use kv_cache_actors::memory::Elements;
use kv_cache_actors::permit::{Amount, Permits};
use kv_cache_actors::prefix::Matcher;
use kv_cache_actors::sequence::{OpenOptions, OpenSequence, SequenceId};
use kv_cache_actors::submit::{Refusals, Submitter};
use kv_cache_actors::supervisor::{ActorName, Exit};
use kv_cache_actors::testing::Rng;
use kv_cache_actors::testing::rig::token_ids;
use kv_cache_actors::testing::scenario::Setup;
use kv_cache_actors::testing::sim::{LANES, SimDevice};
use kv_cache_actors::testing::values::{first_difference, push_tensor};
use kv_cache_actors::tokens::TokenBudget;

/// A cache of simulated devices, and the thread that moves them.
struct Simulated {
    submitter: Submitter,
    assembly: Assembly,
    devices: Vec<SimDevice>,
    tokens: TokenBudget,
    fail: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    mover: Option<JoinHandle<()>>,
}

impl Simulated {
    fn start(shards: u16, format: Format) -> Simulated {
        // Half of the appends and reads go over the copy lanes.
        let setup = Setup { copy_lane_min_bytes: 2 * 8 * 4, ..Setup::small(format) };
        let tokens = TokenBudget::new(u64::MAX);
        let mut assembler = Assembler::new(shards as usize, 64, 64, EventHub::new(16));
        let mut devices = Vec::new();
        let mut layout = None;
        for shard in 0..shards {
            let config = CoreConfig { shard, token_budget: tokens.clone(), ..setup.config() };
            layout = Some(config.layout);
            let device = SimDevice::new(&config.layout, &config.pool);
            devices.push(device.clone());
            assembler.add_shard(device, config).expect("a simulated device opens");
        }
        let (assembly, router) = assembler.finish(false);
        tokio::spawn(router);
        let matcher = Matcher {
            keys: setup.config().keys,
            indices: assembly.views.iter().map(|view| view.index.clone()).collect(),
            block_tokens: setup.config().layout.block_tokens,
            deterministic: false,
        };
        let submitter = Submitter {
            matcher,
            refusals: Refusals::default(),
            layout: layout.expect("a shard"),
            devices: Vec::new(),
            max_tokens: setup.max_tokens,
            permits: Permits::new(Amount { jobs: 64, bytes: 1 << 20 }),
            sequences: Permits::new(Amount { jobs: 64, bytes: 0 }),
            router: assembly.router.clone(),
            supervisor: assembly.supervisor.clone(),
        };
        let (fail, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let mover = {
            let (devices, fail, stop) = (devices.clone(), fail.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut rng = Rng::new(1);
                while !stop.load(Ordering::Acquire) {
                    let (device, lane) = (rng.pick(&devices), rng.pick(&LANES));
                    let moved = match fail.load(Ordering::Acquire) && rng.one_in(2) {
                        true => device.fail(lane, rng.one_in(2)),
                        false => device.advance(lane),
                    };
                    if moved {
                        device.ring();
                    } else {
                        std::thread::yield_now();
                    }
                }
            })
        };
        Simulated { submitter, assembly, devices, tokens, fail, stop, mover: Some(mover) }
    }

    async fn one(&self, build: impl FnOnce(&mut BatchCacheOperations)) -> Result<Outcome, Error> {
        let mut batch = BatchCacheOperations::new();
        build(&mut batch);
        self.submitter.submit(batch).await?.into_results().remove(0)
    }

    async fn open(&self) -> OpenSequence {
        match self.one(|batch| batch.open(OpenOptions::default())).await {
            Ok(Outcome::Opened(handle)) => handle,
            other => panic!("a sequence was opened, but: {other:?}"),
        }
    }

    async fn append(&self, id: SequenceId, stamp: u64, tokens: u32) -> Result<Outcome, Error> {
        let [keys, values] = Plane::BOTH.map(|plane| {
            let mut tensor = Vec::new();
            let stamps = stamp..stamp + u64::from(tokens);
            push_tensor(&mut tensor, &self.submitter.layout, plane, 0..1, 0, stamps);
            tensor.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()
        });
        let host = |bytes| HostTensor { element: ElementType::F32, bytes };
        self.one(|batch| batch.append(id, None, &token_ids(stamp, tokens), None, host(&keys), host(&values)))
            .await
    }

    /// Ends everything, and checks that nothing is left.
    async fn end(mut self) {
        self.submitter.permits.idle().await;
        self.submitter.sequences.idle().await;
        assert_eq!(self.tokens.used(), 0);
        self.assembly.router.stop();
        self.assembly.supervisor.all_ended().await;
        assert!(self.assembly.directory.is_empty());
        self.stop.store(true, Ordering::Release);
        self.mover.take().expect("it was started").join().expect("the device did not find anything wrong");
    }
}

fn is_read(layout: &BlockLayout, answer: &Result<Outcome, Error>, stamps: &[u64]) -> bool {
    let Ok(Outcome::Read(buffer)) = answer else { return false };
    let (Elements::Single(keys), Elements::Single(values)) = (&buffer.keys, &buffer.values) else {
        return false;
    };
    first_difference(keys, layout, Plane::Key, 0, 0, stamps).is_none()
        && first_difference(values, layout, Plane::Value, 0, 0, stamps).is_none()
}

/// One task's life: appends, reads, forks, truncates. With faults, operations may fail, and then nothing has changed.
async fn live(cache: Arc<Simulated>, task: u64) {
    let mut rng = Rng::new(task);
    let mut handle = cache.open().await;
    let mut stamps: Vec<u64> = Vec::new();
    for turn in 0..60u64 {
        let id = handle.id();
        match rng.below(8) {
            0..4 if stamps.len() < 56 => {
                let (stamp, tokens) = (task << 32 | turn << 8, rng.between(1, 6));
                match cache.append(id, stamp, tokens).await {
                    Ok(_) => stamps.extend(stamp..stamp + u64::from(tokens)),
                    Err(Error::Device(_) | Error::Capacity { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            4..6 => {
                let start = rng.below(stamps.len() + 1);
                let answer = cache.one(|batch| batch.read(id, 0, start as u32..stamps.len() as u32)).await;
                let failed = matches!(answer, Err(Error::Device(_)));
                assert!(failed || is_read(&cache.submitter.layout, &answer, &stamps[start..]), "{answer:?}");
            }
            6 => match cache.one(|batch| batch.fork(id, 1)).await {
                // The fork goes on, the parent closes by being dropped.
                Ok(Outcome::Forked(mut forks)) => handle = forks.remove(0),
                other => panic!("{other:?}"),
            },
            _ => {
                stamps.truncate(rng.between(stamps.len() as u32 / 2, stamps.len() as u32) as usize);
                let tokens = stamps.len() as u32;
                let answer = cache.one(|batch| batch.truncate(id, tokens)).await;
                assert!(matches!(answer, Ok(Outcome::Truncated { .. })), "{answer:?}");
            }
        }
    }
}

async fn many_lives(cache: Simulated) {
    let cache = Arc::new(cache);
    let tasks: Vec<_> = (0..16).map(|task| tokio::spawn(live(cache.clone(), task))).collect();
    for task in tasks {
        task.await.expect("every answer was right");
    }
    let Ok(cache) = Arc::try_unwrap(cache) else { panic!("the tasks are done with it") };
    let exits = cache.assembly.supervisor.clone();
    cache.end().await;
    assert!(exits.exits().iter().all(|(_, exit)| *exit == Exit::Finished), "{:?}", exits.exits());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn actors_answer_what_their_cores_decide() {
    for format in [Format::Raw, Format::Int8] {
        many_lives(Simulated::start(2, format)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_launches_climb_up_as_errors_and_change_nothing() {
    let cache = Simulated::start(1, Format::Int8);
    cache.fail.store(true, Ordering::Release);
    many_lives(cache).await;
}

/// Submissions that wait for a lane which does not move are answered when the device is lost, and only theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_one_device_fails_its_sequences_and_leaves_the_other_serving() {
    let cache = Simulated::start(2, Format::Int8);
    let (a, b) = (cache.open().await, cache.open().await);
    assert_ne!(a.id().shard(), b.id().shard(), "placed by load");
    cache.append(a.id(), 1, 5).await.expect("it appends");
    cache.append(b.id(), 11, 5).await.expect("it appends");
    cache.devices[a.id().shard() as usize].lose("it fell off the bus");
    // The device actor may notice with this submission, or before it; either way the answer says what happened.
    let answer = loop {
        match cache.append(a.id(), 6, 1).await {
            Ok(_) => panic!("a lost device answered"),
            Err(error @ Error::ShardLost { .. }) => break error,
            // Its reply was dropped in the moment before the reason was known.
            Err(Error::Closed) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert!(answer.to_string().contains("it fell off the bus"), "{answer}");
    cache.append(b.id(), 16, 1).await.expect("the other shard serves on");
    // A batch over both: the operations of the lost shard fail alone.
    let mut batch = BatchCacheOperations::new();
    batch.read(a.id(), 0, 0..5);
    batch.read(b.id(), 0, 0..6);
    let results = cache.submitter.submit(batch).await.expect("it is answered").into_results();
    assert!(matches!(results[0], Err(Error::ShardLost { .. })), "{:?}", results[0]);
    assert!(is_read(&cache.submitter.layout, &results[1], &(11..17).collect::<Vec<_>>()), "{:?}", results[1]);
    let answer = cache.one(|batch| batch.read(b.id(), 0, 0..6)).await;
    assert!(is_read(&cache.submitter.layout, &answer, &(11..17).collect::<Vec<_>>()), "{answer:?}");
    drop((a, b));
    cache.end().await;
}

/// A submission may reach the mailbox of an actor in the moment between its panic and its end: it is answered too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_actor_that_panics_is_reported_and_its_callers_hear_of_it() {
    let cache = Simulated::start(1, Format::Raw);
    let handle = cache.open().await;
    cache.assembly.faults.panic_device(0);
    let error = loop {
        match cache.append(handle.id(), 1, 1).await {
            // It was served before the panic overtook the next one.
            Ok(_) | Err(Error::Closed) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, Error::ShardLost { shard: 0, reason } if reason.contains("panic")), "{error}");
    drop(handle);
    let supervisor = cache.assembly.supervisor.clone();
    cache.end().await;
    let panicked = |(name, exit): &(ActorName, Exit)| {
        *name == ActorName::Device(0)
            && matches!(exit, Exit::Panicked(message) if message.contains("injected"))
    };
    assert!(supervisor.exits().iter().any(panicked), "{:?}", supervisor.exits());
}

/// Callers who go away leave their operations to take effect, and what those opened closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_callers_leave_nothing_behind() {
    let cache = Simulated::start(1, Format::Int8);
    let handle = cache.open().await;
    for stamp in 0..50 {
        let mut batch = BatchCacheOperations::new();
        batch.open(OpenOptions::default().reserve_tokens(1));
        batch.fork(handle.id(), 2);
        let mut waiting = Box::pin(cache.submitter.submit(batch));
        // Polled once: submitted, if there were permits.
        let polled =
            std::future::poll_fn(|context| std::task::Poll::Ready(waiting.as_mut().poll(context))).await;
        drop((polled, waiting));
        cache.append(handle.id(), stamp, 1).await.expect("it appends");
    }
    drop(handle);
    cache.end().await;
}
