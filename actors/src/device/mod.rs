//! The device actor: one per device, on a thread of its own that owns the compute lane.
//!
//! It waits for submissions and finished launches, lets [`DeviceCore`] decide, and carries the effects out. It may block
//! on its mailbox and, downwards, on the transfer actor's; it never blocks on anything above it.

#[cfg(any(test, feature = "testing"))]
mod audit;
mod blocks;
mod bookkeeping;
mod cached;
mod core;
mod dropping;
mod entry;
mod in_place;
mod lineage;
mod open;
mod plan;
mod recent;
pub(crate) mod recode;
pub(crate) mod tier;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(any(test, feature = "testing"))]
pub use self::audit::Holdings;
pub use self::blocks::BlockStore;
pub use self::bookkeeping::{Bookkeeping, TooManyBlocks};
pub use self::core::{CoreConfig, DeviceCore, Effects, Event};
use crate::block::Places;
use crate::directory::Directory;
use crate::events::EventHub;
use crate::index::PrefixIndex;
use crate::mailbox::{Control, DeviceMailbox, TRANSFERS_MAX, TransferSender, Wake};
use crate::memory::{DeviceLost, Doorbell, Lane, LaneKind, Launch};
use crate::sequence::CloseHook;
use crate::slot::SlotTable;
use crate::stats::SharedStats;
use crate::submission::Submissions;
use crate::supervisor::{ActorName, Exit, Supervisor, panic_message};
use crate::usher::UsherHandle;

/// Submissions taken from the mailbox before the launches built from them go out: bounds the wait of the first one.
const DRAIN_MAX: usize = 4096;

/// What a shard shows to readers who send it no message.
#[derive(Debug, Clone)]
pub struct ShardView {
    /// Where blocks are.
    pub places: Places,
    /// Pins and generations of slots.
    pub slots: SlotTable,
    /// Statistics.
    pub stats: Arc<SharedStats>,
    /// Finds prompts.
    pub index: PrefixIndex,
    bell: Bell,
}

#[derive(Clone)]
struct Bell(Doorbell);

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bell")
    }
}

impl ShardView {
    /// Whether both show the same shard.
    pub fn is_same(&self, other: &ShardView) -> bool {
        Arc::ptr_eq(&self.stats, &other.stats)
    }

    /// To be called after pins were dropped: wakes the device actor if slots wait for that.
    ///
    /// The actor publishes how many wait before it waits itself, so either it finds the pins gone or this finds the number.
    pub fn pins_dropped(&self) {
        if self.stats.lock().counters.slots_quarantined > 0 {
            (self.bell.0)();
        }
    }
}

pub(crate) struct DeviceActor<L> {
    // First: dropped before the replies in the core, since whoever is told that the shard is lost may free memory that work on
    // the lane still reads.
    compute: L,
    core: DeviceCore,
    mailbox: DeviceMailbox,
    transfer: TransferSender,
    transfers_in_flight: u64,
    transfers_waiting: VecDeque<(LaneKind, Launch)>,
    stats: Arc<SharedStats>,
    directory: Arc<Directory>,
    usher: UsherHandle,
    events: EventHub,
    opened_at: Instant,
    effects: Effects,
    done: Vec<Launch>,
    patience: Duration,
}

/// How much longer than a lane says an actor looks for work before it sleeps, if work tends to come soon after it fell asleep.
const PATIENCE_MAX: u32 = 8;

/// Everything a device actor is made of.
pub(crate) struct DeviceParts<L> {
    pub(crate) config: CoreConfig,
    pub(crate) compute: L,
    pub(crate) mailbox: DeviceMailbox,
    pub(crate) transfer: TransferSender,
    pub(crate) directory: Arc<Directory>,
    pub(crate) supervisor: Arc<Supervisor>,
    pub(crate) on_drop: CloseHook,
    pub(crate) usher: UsherHandle,
    pub(crate) events: EventHub,
    /// The same for all shards of a cache.
    pub(crate) opened_at: Instant,
}

/// Turns the calling thread into a device actor until it ends. `ready` is called with its view before the first message.
pub(crate) fn run<L: Lane>(parts: DeviceParts<L>, ready: impl FnOnce(ShardView)) {
    let DeviceParts {
        config,
        compute,
        mailbox,
        transfer,
        directory,
        supervisor,
        on_drop,
        usher,
        events,
        opened_at,
    } = parts;
    let shard = config.shard;
    let core = DeviceCore::new(config, on_drop);
    let stats = Arc::new(SharedStats::default());
    let view = ShardView {
        places: core.blocks().places().clone(),
        slots: core.blocks().pool().table().clone(),
        stats: stats.clone(),
        index: core.blocks().index().clone(),
        bell: Bell(mailbox.doorbell()),
    };
    let mut actor = DeviceActor {
        core,
        compute,
        mailbox,
        transfer,
        transfers_in_flight: 0,
        transfers_waiting: VecDeque::new(),
        stats,
        directory: directory.clone(),
        usher,
        events,
        opened_at,
        effects: Effects::default(),
        done: Vec::new(),
        patience: Duration::ZERO,
    };
    actor.publish(0, 0, Instant::now());
    ready(view);
    let exit = match catch_unwind(AssertUnwindSafe(|| actor.run())) {
        Ok(Ok(())) => Exit::Finished,
        Ok(Err(lost)) => Exit::DeviceLost(lost.0.to_string()),
        Err(panic) => Exit::Panicked(panic_message(panic)),
    };
    let name = ActorName::Device(shard);
    if exit == Exit::Finished {
        // Nobody waits for an answer. Whoever waits for the end may end the process then: the device is to be let go of before.
        drop(actor);
        directory.remove_shard(shard);
        supervisor.ended(name, exit);
    } else {
        // Before the actor is dropped, and every unanswered reply with it.
        supervisor.ended(name, exit);
        actor.mailbox.discard();
        directory.remove_shard(shard);
    }
}

impl<L: Lane> DeviceActor<L> {
    fn run(&mut self) -> Result<(), DeviceLost> {
        self.compute.on_progress(self.mailbox.doorbell());
        let mut closed = false;
        loop {
            let wake = match self.mailbox.try_next() {
                Some(wake) => wake,
                // Sealing is what it does when nobody waits.
                None if self.core.wants_to_seal() && !closed => {
                    let shard = self.core.config.shard;
                    let _span = tracing::debug_span!(target: "kv_cache::device", "seal", shard).entered();
                    self.core.apply(Event::Seal, &mut self.effects);
                    self.settle()?;
                    self.publish(0, 0, Instant::now());
                    continue;
                }
                None if closed && self.core.in_flight() == 0 => return Ok(()),
                None => {
                    // Readers may have let go of slots, or of blocks, since they were freed: that shall show before this waits.
                    if self.core.blocks.waits_for_readers() {
                        self.core.blocks.reclaim();
                        self.publish(0, 0, Instant::now());
                        if self.core.wants_to_seal() && !closed {
                            continue;
                        }
                    }
                    self.wait()?
                }
            };
            // Whoever listened before he sent something hears what becomes of it.
            self.observe();
            match wake {
                Wake::Control(Control::Lost(lost)) => return Err(lost),
                #[cfg(any(test, feature = "testing"))]
                Wake::Control(Control::Panic) => panic!("a panic was injected"),
                Wake::TransferEnded => return Err(DeviceLost("its transfer actor ended".into())),
                Wake::Closed => closed = true,
                Wake::Doorbell => {}
                Wake::Landed(launch) => {
                    self.transfers_in_flight -= 1;
                    self.core.apply(Event::Launched(launch), &mut self.effects);
                }
                Wake::Submissions(submissions) => {
                    self.serve(submissions)?;
                    continue;
                }
            }
            let started = Instant::now();
            let answered = self.settle()?;
            self.publish(0, answered, started);
        }
    }

    /// Waits for the next message, or for the compute lane to come forward.
    ///
    /// A launch is mostly a matter of microseconds, which a sleeping thread would double: so it looks for a while first, and
    /// for as long as work keeps coming it does not sleep. If it fell asleep and work came soon, it looks longer the next time.
    fn wait(&mut self) -> Result<Wake, DeviceLost> {
        let (started, spin) = (Instant::now(), self.patience.max(self.compute.spin()));
        while !spin.is_zero() && started.elapsed() < spin {
            self.compute.poll(&mut self.done)?;
            if !self.done.is_empty() {
                return Ok(Wake::Doorbell);
            }
            if let Some(wake) = self.mailbox.try_next() {
                return Ok(wake);
            }
            std::hint::spin_loop();
        }
        if !self.compute.is_idle() {
            self.compute.ring_when_done();
        }
        let asleep = Instant::now();
        let wake = self.mailbox.next();
        let longest = PATIENCE_MAX * self.compute.spin();
        self.patience = if asleep.elapsed() < longest { longest.min(2 * spin) } else { Duration::ZERO };
        Ok(wake)
    }

    /// What the core is to know of the world outside: the time, and who listens.
    fn observe(&mut self) {
        self.core.observe(self.opened_at.elapsed().as_millis() as u64, self.events.is_heard());
    }

    /// Carries out submissions, with all those that have queued up behind them, as one batch.
    fn serve(&mut self, first: Submissions) -> Result<(), DeviceLost> {
        let started = Instant::now();
        let (shard, none) = (self.core.config.shard, tracing::field::Empty);
        let span = tracing::debug_span!(
            target: "kv_cache::device", "batch", shard, operations = none, submissions = none
        )
        .entered();
        let mut operations = 0;
        let mut submissions = 0;
        let mut next = Some(first);
        // What is done by now stands in nobody's way.
        self.compute.poll(&mut self.done)?;
        for launch in self.done.drain(..) {
            self.core.apply(Event::Launched(launch), &mut self.effects);
        }
        while let Some(arrived) = next {
            let mut stats = self.stats.lock();
            for submission in &arrived {
                operations += submission.results() as u64;
                if let Some(submitted) = submission.submitted_at() {
                    stats
                        .queue_wait
                        .record_ns(started.saturating_duration_since(submitted).as_nanos() as u64);
                }
            }
            drop(stats);
            submissions += arrived.len();
            self.core.warm(&arrived);
            for submission in arrived {
                self.core.apply(Event::Submission(submission), &mut self.effects);
            }
            next = if submissions < DRAIN_MAX { self.mailbox.try_next_submissions() } else { None };
            if next.is_some() {
                self.observe();
            }
        }
        let answered = self.settle()?;
        if self.core.seal_is_urgent() {
            self.core.apply(Event::Seal, &mut self.effects);
            self.settle()?;
        }
        self.publish(operations, answered, started);
        span.record("operations", operations).record("submissions", submissions);
        Ok(())
    }

    /// Carries effects out until nothing more follows from what has already landed. Returns the answers sent.
    fn settle(&mut self) -> Result<u64, DeviceLost> {
        let mut answered = 0;
        loop {
            self.core.flush(&mut self.effects);
            for (lane, launch) in self.effects.launches.drain(..) {
                match lane {
                    LaneKind::Compute => self.compute.launch(launch),
                    LaneKind::Upload | LaneKind::Download => self.transfers_waiting.push_back((lane, launch)),
                }
            }
            // Never more out than the lane for landed launches holds: neither actor can block the other.
            while self.transfers_in_flight < TRANSFERS_MAX as u64 {
                let Some((lane, launch)) = self.transfers_waiting.pop_front() else { break };
                self.transfers_in_flight += 1;
                self.transfer.send(lane, launch)?;
            }
            // Known to the directory before anybody is told the id.
            for shared in self.effects.opened.drain(..) {
                self.directory.insert(shared);
            }
            for id in self.effects.closed.drain(..) {
                self.directory.remove(id);
            }
            self.events.tell(self.effects.events.drain(..));
            if !self.effects.answers.is_empty() {
                // Whoever has an answer finds its effect in the statistics, and in what admission looks at.
                self.stats.lock().counters = *self.core.counters();
            }
            answered += self.effects.answers.len() as u64;
            self.usher.give(&mut self.effects.answers);
            self.compute.poll(&mut self.done)?;
            if self.done.is_empty() {
                return Ok(answered);
            }
            for launch in self.done.drain(..) {
                self.core.apply(Event::Launched(launch), &mut self.effects);
            }
        }
    }

    fn publish(&mut self, operations: u64, answered: u64, started: Instant) {
        let counters = *self.core.counters();
        let mut stats = self.stats.lock();
        stats.counters = counters;
        stats.mailbox_depth = self.mailbox.depth() as u64;
        stats.transfers_in_flight = self.transfers_in_flight;
        stats.batch_sizes.record(operations);
        if answered > 0 {
            stats.service.record_ns(started.elapsed().as_nanos() as u64);
        }
    }
}
