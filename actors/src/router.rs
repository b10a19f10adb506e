//! The router actor: a task that takes what callers submit, places new sequences, and hands each shard one batch.
//!
//! It never blocks: permits bound what can be under way, and the shards' lanes hold more than that. It merges by itself:
//! while it routes one run of messages, the next run queues up behind it, so batches grow with the load and an idle
//! system adds no wait. What is a batch already and finds nothing queued before it goes past the router (`Bypass`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::Instant;

use smallvec::SmallVec;
use tokio::sync::mpsc;

use crate::batch::{BatchCacheOperations, Operation};
use crate::device::ShardView;
use crate::error::Error;
use crate::mailbox::{Control, DeviceSender};
use crate::memory::DeviceLost;
use crate::permit::Permit;
use crate::prefix::Prefix;
use crate::reply::{Answer, Reply};
use crate::sequence::{CloseHook, SequenceId};
use crate::submission::{Submission, Submissions};
use crate::supervisor::{ActorName, Exit, Supervisor};
use crate::sync::{Mutex, lock};
use crate::usher::{Usher, UsherHandle, usher};

/// Messages taken at once.
const DRAIN_MAX: usize = 1024;

/// A submission of so many operations is a batch already: there is nothing to merge it with, and the hop over the router's task
/// would be most of what a decode step waits for.
const BATCH_MIN: usize = 16;

#[derive(Debug)]
enum Message {
    Submit(Box<Submission>),
    Close(SequenceId),
    Stop,
}

/// Sends to the router. Sending never waits and allocates only the channel's own blocks.
#[derive(Debug, Clone)]
pub struct RouterHandle {
    sender: mpsc::UnboundedSender<Message>,
    bypass: Arc<Bypass>,
}

impl RouterHandle {
    /// Sends a batch whose permits are attached already.
    ///
    /// If the router has ended, the submission is answered with [`Error::Closed`].
    pub fn submit(&self, batch: BatchCacheOperations, permit: Permit) -> Answer {
        let (reply, answer) = Reply::new();
        let submission = Submission::new(batch, Some(permit), Some(reply), Some(Instant::now()));
        if let Some(submission) = self.bypass.take(submission)
            && let Err(mpsc::error::SendError(Message::Submit(back))) =
                self.sender.send(Message::Submit(submission))
        {
            back.refuse(&Error::Closed);
        }
        answer
    }

    /// Ends the router, and with it the actors below once they have finished their work.
    pub fn stop(&self) {
        self.bypass.undelivered.fetch_add(1, Ordering::SeqCst);
        // An error means that it has ended.
        let _ = self.sender.send(Message::Stop);
    }
}

/// The way past the router.
#[derive(Debug, Default)]
struct Bypass {
    /// Messages for the router that have not reached a shard's mailbox. Whoever finds none may send to a shard himself: what
    /// he sent before is in that mailbox already.
    undelivered: AtomicUsize,
    /// There while the router runs: shards end when nobody can send to them any more.
    delivery: Mutex<Option<Arc<Delivery>>>,
}

impl Bypass {
    /// Sends a submission to its shard, or gives it back, counted, to be sent to the router.
    fn take(&self, submission: Box<Submission>) -> Option<Box<Submission>> {
        if self.undelivered.load(Ordering::SeqCst) == 0
            && let Some(shard) = only_shard(&submission)
        {
            let running = lock(&self.delivery);
            if let Some(delivery) = running.as_ref().filter(|delivery| shard < delivery.shards.len()) {
                let stranded = delivery.deliver(shard, vec![submission]);
                // Outside of the lock: whoever is refused is woken, and may submit again at once.
                drop(running);
                stranded.refuse();
                return None;
            }
        }
        self.undelivered.fetch_add(1, Ordering::SeqCst);
        Some(submission)
    }
}

/// The shard of a batch that the router would only pass on: all of it goes there, and it opens and closes nothing.
fn only_shard(submission: &Submission) -> Option<usize> {
    let operations = submission.operations();
    if submission.results() < BATCH_MIN || operations.iter().any(Operation::changes_sequences) {
        return None;
    }
    let mut shards = operations.iter().flat_map(Operation::sequences).map(|id| id.map(SequenceId::shard));
    let first = shards.next()??;
    shards.all(|shard| shard == Some(first)).then_some(first as usize)
}

/// Where the router sends.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) sender: DeviceSender,
    pub(crate) view: ShardView,
}

/// Hands batches to the shards.
#[derive(Debug)]
struct Delivery {
    shards: Vec<Shard>,
    supervisor: Arc<Supervisor>,
}

impl Delivery {
    /// Sends to a shard, and returns what nobody there will ever receive.
    #[must_use]
    fn deliver(&self, number: usize, submissions: Submissions) -> Stranded {
        let shard = &self.shards[number];
        let refused = shard.sender.data.try_send(submissions).map_err(|error| {
            if error.is_full() {
                // Permits make this impossible; if it happens, answering beats waiting.
                tracing::error!(target: "kv_cache::router", shard = number, "a shard's lane was full");
            }
            error.into_inner()
        });
        // The device actor records its end and then discards what it has not received; this looks the other way round, so
        // whatever lies between the two is found by one of them.
        fence(Ordering::SeqCst);
        let lost = self.supervisor.lost(number as u16);
        let stranded = lost.is_some().then(|| shard.sender.unreceived.try_iter()).into_iter().flatten();
        let submissions = refused.err().into_iter().chain(stranded).flatten().collect();
        Stranded { submissions, error: lost.unwrap_or(Error::Closed) }
    }
}

/// Submissions that have no shard to go to, and why.
struct Stranded {
    submissions: Submissions,
    error: Error,
}

impl Stranded {
    fn refuse(self) {
        for submission in self.submissions {
            submission.refuse(&self.error);
        }
    }
}

/// The router before it runs: gives out its handle and the hook by which sequences close.
pub(crate) struct RouterInbox {
    receiver: mpsc::UnboundedReceiver<Message>,
    bypass: Arc<Bypass>,
    usher: Usher,
}

/// The router's mailbox.
///
/// It is unbounded as a channel and bounded by construction: every submission holds a permit, and every close belongs to
/// an open sequence, whose number is limited too.
pub(crate) fn inbox() -> (RouterHandle, UsherHandle, CloseHook, RouterInbox) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let bypass = Arc::<Bypass>::default();
    // Weak: sequences whose close is still to come must not keep a cache alive that nobody holds.
    let (weak, counted) = (sender.downgrade(), bypass.clone());
    let on_drop: CloseHook = Arc::new(move |id| {
        if let Some(sender) = weak.upgrade() {
            counted.undelivered.fetch_add(1, Ordering::SeqCst);
            // An error means that the router has ended, and all sequences with it.
            let _ = sender.send(Message::Close(id));
        }
    });
    let (usher_handle, usher) = usher();
    let inbox = RouterInbox { receiver, bypass: bypass.clone(), usher };
    (RouterHandle { sender, bypass }, usher_handle, on_drop, inbox)
}

pub(crate) struct RouterActor {
    core: RouterCore,
    delivery: Arc<Delivery>,
}

impl RouterActor {
    pub(crate) fn new(shards: Vec<Shard>, deterministic: bool, supervisor: Arc<Supervisor>) -> Self {
        RouterActor {
            core: RouterCore::new(shards.len(), deterministic),
            delivery: Arc::new(Delivery { shards, supervisor }),
        }
    }

    /// The router's task. Ends when told to, or when nobody can send any more.
    pub(crate) async fn run(mut self, inbox: RouterInbox) {
        let RouterInbox { mut receiver, bypass, usher } = inbox;
        // Dropped last, also when the task is aborted with its runtime.
        let _report = EndReport(self.delivery.supervisor.clone());
        let _closing = CloseBypass(bypass.clone());
        tokio::spawn(usher.run());
        *lock(&bypass.delivery) = Some(self.delivery.clone());
        let mut messages = Vec::with_capacity(DRAIN_MAX);
        let mut stopping = false;
        while !stopping && receiver.recv_many(&mut messages, DRAIN_MAX).await > 0 {
            // To the back of the executor's queue: tasks that are ready submit first, and one batch carries them all. On an
            // idle executor this returns at once.
            tokio::task::yield_now().await;
            while let Ok(message) = receiver.try_recv() {
                messages.push(message);
                if messages.len() >= DRAIN_MAX {
                    break;
                }
            }
            self.observe();
            let taken = messages.len();
            for message in messages.drain(..) {
                match message {
                    Message::Submit(submission) => self.core.submit(submission),
                    Message::Close(id) => self.core.close(id),
                    Message::Stop => stopping = true,
                }
            }
            for (number, outbox) in
                self.core.outboxes.iter_mut().enumerate().filter(|(_, outbox)| !outbox.is_empty())
            {
                self.delivery.deliver(number, std::mem::take(outbox)).refuse();
            }
            if !stopping {
                bypass.undelivered.fetch_sub(taken, Ordering::SeqCst);
            }
        }
    }

    /// Looks at the shards before placing on them.
    fn observe(&mut self) {
        let Delivery { shards, supervisor } = &*self.delivery;
        for (number, (shard, load)) in shards.iter().zip(&mut self.core.loads).enumerate() {
            load.lost = supervisor.lost(number as u16).is_some();
            if !self.core.deterministic && shards.len() > 1 {
                let counters = &shard.view.stats.lock().counters;
                load.blocks_held = counters.blocks_used - counters.blocks_cached;
                load.blocks_let_go = counters.blocks_cached + counters.evictions;
            }
        }
    }
}

/// Nobody gets past a router that has ended.
struct CloseBypass(Arc<Bypass>);

impl Drop for CloseBypass {
    fn drop(&mut self) {
        *lock(&self.0.delivery) = None;
    }
}

/// Reports the end of the router however it comes.
struct EndReport(Arc<Supervisor>);

impl Drop for EndReport {
    fn drop(&mut self) {
        let exit = match std::thread::panicking() {
            true => Exit::Panicked("in the router task".into()),
            false => Exit::Finished,
        };
        self.0.ended(ActorName::Router, exit);
    }
}

/// What the router knows of a shard.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    lost: bool,
    /// Blocks that sequences hold, as the shard last published it.
    blocks_held: u64,
    /// Cached blocks that nobody holds, and those that have made way already.
    blocks_let_go: u64,
    /// Sequences placed there and not closed yet.
    sequences: u64,
}

/// What the router decides: which shard each operation goes to, and what goes there together.
#[derive(Debug)]
struct RouterCore {
    loads: Vec<Load>,
    outboxes: Vec<Submissions>,
    deterministic: bool,
}

impl RouterCore {
    fn new(shards: usize, deterministic: bool) -> Self {
        RouterCore {
            loads: vec![Load::default(); shards],
            outboxes: (0..shards).map(|_| Vec::new()).collect(),
            deterministic,
        }
    }

    /// The shard for a new sequence: that with most of its prompt, or the least loaded, that is not lost; shard 0 (which will refuse) if
    /// all are.
    fn place(&mut self, prefix: Option<&Prefix>) -> usize {
        // Sequences count as a block each, so that a burst of opens spreads before any of them shows in `blocks_held`. Of shards with
        // the same load that comes first to which least has come so far: so sequences that come one by one fill them all, and what is
        // cached on them is replaced at the same pace.
        let load = |load: &Load| (load.lost, load.blocks_held + load.sequences, load.blocks_let_go);
        let preferred = prefix
            .and_then(|prefix| prefix.shard(self.loads.len()))
            .filter(|&shard| self.loads.get(shard).is_some_and(|load| !load.lost));
        let least = || (0..self.loads.len()).min_by_key(|&shard| load(&self.loads[shard]));
        let shard = preferred.or_else(least).unwrap_or(0);
        self.loads[shard].sequences += 1;
        shard
    }

    /// The shard of each of an operation's results.
    fn targets(&mut self, operation: &Operation, targets: &mut SmallVec<[usize; 8]>) {
        if let Operation::Open { prefix, .. } = operation {
            return targets.push(self.place(prefix.as_deref()));
        }
        let shards = self.loads.len();
        if let Operation::Invalidate { shard, .. } = operation {
            return targets.push((*shard as usize).min(shards - 1));
        }
        targets.extend(operation.sequences().map(|id| {
            let shard = id.map_or(0, |id| id.shard() as usize);
            // An id that no shard gave out is answered by any shard as unknown.
            if shard < shards { shard } else { 0 }
        }));
        if let (Operation::Fork { count, .. }, Some(&shard)) = (operation, targets.last()) {
            self.add(shard, i64::from(*count));
        }
    }

    fn add(&mut self, shard: usize, sequences: i64) {
        if let Some(load) = self.loads.get_mut(shard) {
            load.sequences = load.sequences.saturating_add_signed(sequences);
        }
    }

    fn submit(&mut self, submission: Box<Submission>) {
        if self.outboxes.len() == 1 {
            // One shard: nothing to place, and nothing to count.
            if submission.operations().is_empty() {
                submission.send();
            } else {
                self.outboxes[0].push(submission);
            }
            return;
        }
        let mut targets = SmallVec::new();
        for operation in submission.operations() {
            self.targets(operation, &mut targets);
        }
        match targets.first().copied() {
            None => submission.send(),
            Some(first) if targets.iter().all(|target| *target == first) => {
                self.outboxes[first].push(submission)
            }
            Some(_) => {
                for (shard, part) in submission.split(&targets, self.outboxes.len()) {
                    self.outboxes[shard].push(part);
                }
            }
        }
    }

    fn close(&mut self, id: SequenceId) {
        // Every handle is dropped once, however often its sequence is closed by hand before.
        self.add(id.shard() as usize, -1);
        let mut batch = BatchCacheOperations::new();
        batch.close(id);
        self.submit(Submission::new(batch, None, None, None));
    }
}

/// Injects a fault into a shard, for tests of what a fault does.
#[derive(Debug, Clone)]
pub struct FaultInjector(pub(crate) Vec<crossbeam_channel::Sender<Control>>);

impl FaultInjector {
    /// Makes the device of `shard` count as lost for `reason`.
    pub fn lose_device(&self, shard: u16, reason: &str) {
        if let Some(sender) = self.0.get(shard as usize) {
            let _ = sender.try_send(Control::Lost(DeviceLost(reason.into())));
        }
    }

    /// Makes the device actor of `shard` panic.
    #[cfg(any(test, feature = "testing"))]
    pub fn panic_device(&self, shard: u16) {
        if let Some(sender) = self.0.get(shard as usize) {
            let _ = sender.try_send(Control::Panic);
        }
    }
}
