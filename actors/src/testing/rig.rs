//! One device core on one simulated device, driven by hand: no thread, no clock, nothing happens unless asked for.
//!
//! It stands where the device actor stands, and does what that does with effects, one thing at a time and in any order that
//! the actor could. The permits, the checks at the door and the replies are the real ones.

use std::sync::{Arc, Mutex, PoisonError};

use slab::Slab;

use super::scenario::Setup;
use super::sim::{LANES, SimDevice};
use super::values::push_tensor;
use crate::batch::{BatchCacheOperations, EachTensors, HostTensor, Invalidate, Outcome, Results};
use crate::block::ExtraIdentity;
use crate::device::{CoreConfig, DeviceCore, Effects, Event};
use crate::geometry::{ElementType, Plane};
use crate::memory::LaneKind;
use crate::permit::{Amount, Permits};
use crate::prefix::Matcher;
use crate::reply::{Answer, Reply, Unanswered};
use crate::sequence::{CloseHook, OpenOptions, OpenSequence, SequenceId};
use crate::submission::Submission;

/// Names a submission that has not been taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub usize);

/// A core, its device, and everybody who waits for it.
pub struct Rig {
    core: Option<DeviceCore>,
    /// The device.
    pub device: SimDevice,
    config: CoreConfig,
    effects: Effects,
    permits: Permits,
    sequences: Permits,
    answers: Slab<Option<Answer>>,
    closes: Arc<Mutex<Vec<SequenceId>>>,
    opened: u64,
    closed: u64,
    /// One millisecond an event.
    now_ms: u64,
    /// Answers that came since [`Rig::answered`] was last asked.
    news: bool,
    tensors: [Vec<f32>; 2],
}

/// A token of one sequence: see [`Rig::each`].
#[derive(Debug, Clone, Copy)]
pub struct EachRow {
    /// Whose.
    pub sequence: SequenceId,
    /// Tenant that its content tells of.
    pub tenant: u32,
    /// What its content tells of.
    pub stamp: u64,
    /// Its last element is this instead.
    pub spoil: Option<f32>,
}

impl Rig {
    /// A rig of these settings.
    pub fn new(setup: &Setup) -> Self {
        let config = setup.config();
        let device = SimDevice::new(&config.layout, &config.pool);
        let closes: Arc<Mutex<Vec<SequenceId>>> = Arc::default();
        let hook = closes.clone();
        let on_drop: CloseHook =
            Arc::new(move |id| hook.lock().unwrap_or_else(PoisonError::into_inner).push(id));
        Rig {
            core: Some(DeviceCore::new(config.clone(), on_drop)),
            device,
            effects: Effects::default(),
            permits: Permits::new(Amount { jobs: 1 << 20, bytes: 1 << 40 }),
            sequences: Permits::new(Amount { jobs: 1 << 20, bytes: 0 }),
            answers: Slab::new(),
            closes,
            opened: 0,
            closed: 0,
            now_ms: 0,
            news: false,
            tensors: Default::default(),
            config,
        }
    }

    /// What the core was made with.
    pub fn config(&self) -> &CoreConfig {
        &self.config
    }

    /// The core.
    ///
    /// # Panics
    /// If it was lost.
    pub fn core(&self) -> &DeviceCore {
        self.core.as_ref().expect("the shard is not lost")
    }

    /// The core, to be changed.
    ///
    /// # Panics
    /// If it was lost.
    pub fn core_mut(&mut self) -> &mut DeviceCore {
        self.core.as_mut().expect("the shard is not lost")
    }

    /// Submits a batch, as a handle would: permits, checks at the door, buffers, reply.
    ///
    /// # Panics
    /// If the permits do not suffice: they are plenty.
    pub fn submit(&mut self, batch: BatchCacheOperations) -> Ticket {
        let (reply, answer) = Reply::new();
        let ticket = Ticket(self.answers.insert(Some(answer)));
        self.send(batch, Some(reply));
        ticket
    }

    /// Submits a batch that nobody waits for.
    pub fn submit_for_nobody(&mut self, batch: BatchCacheOperations) {
        self.send(batch, None);
    }

    fn send(&mut self, mut batch: BatchCacheOperations, reply: Option<Reply>) {
        let layout = self.config.layout;
        let bytes = batch.bytes(&layout, self.config.max_tokens);
        let amount = Amount { jobs: batch.len() as u64, bytes };
        let permit = self.permits.try_acquire(amount).expect("permits are plenty");
        let opens = Amount { jobs: batch.sequences_to_open() as u64, bytes: 0 };
        let opens = self.sequences.try_acquire(opens).expect("permits are plenty");
        batch.attach_sequence_permits(opens);
        batch.check(&layout, self.config.max_tokens, &[]);
        let index = self.core().blocks().index().clone();
        let (keys, block_tokens) = (self.config.keys.clone(), layout.block_tokens);
        let deterministic = self.config.deterministic;
        batch.match_prompts(&Matcher { keys, indices: vec![index], block_tokens, deterministic });
        batch.attach_read_buffers(&layout);
        let submission = Submission::new(batch, Some(permit), reply, None);
        self.apply(Event::Submission(submission));
    }

    /// Lets the core take an event, and sends the answers that follow.
    pub fn apply(&mut self, event: Event) {
        let core = self.core.as_mut().expect("the shard is not lost");
        self.now_ms += 1;
        core.observe(self.now_ms, true);
        core.apply(event, &mut self.effects);
        self.effects.events.clear();
        self.opened += self.effects.opened.drain(..).count() as u64;
        self.closed += self.effects.closed.drain(..).count() as u64;
        self.news |= !self.effects.answers.is_empty();
        for answer in self.effects.answers.drain(..) {
            answer.send();
        }
    }

    /// Hands what the core has built to the lanes.
    pub fn flush(&mut self) {
        let core = self.core.as_mut().expect("the shard is not lost");
        core.flush(&mut self.effects);
        if self.effects.launches.is_empty() {
            return;
        }
        // Slots that changed hands: whatever the launches to come do not write themselves is void.
        let pool = core.blocks().pool();
        self.device.observe_generations(|slot| pool.generation(slot));
        for (lane, launch) in self.effects.launches.drain(..) {
            self.device.enqueue(lane, launch);
        }
    }

    /// Reports one completion of `lane` to the core. False if there is none.
    pub fn report(&mut self, lane: LaneKind) -> bool {
        let Some(launch) = self.device.report(lane) else { return false };
        self.apply(Event::Launched(launch));
        true
    }

    /// Whether answers have come since this was last asked.
    pub fn answered(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// The results of a submission, once they are there. An error: the reply was dropped.
    pub fn take(&mut self, ticket: Ticket) -> Option<Result<Results, Unanswered>> {
        let answer = self.answers.get_mut(ticket.0)?.as_mut()?;
        let taken = answer.try_take()?;
        self.answers.remove(ticket.0);
        Some(taken)
    }

    /// The caller goes away: nobody waits for this submission any more.
    pub fn cancel(&mut self, ticket: Ticket) {
        drop(self.answers.remove(ticket.0));
    }

    /// Submissions that nobody has taken the results of.
    pub fn waiting(&self) -> usize {
        self.answers.len()
    }

    /// Ids of handles dropped since this was last asked; their closes are for the caller to submit.
    pub fn dropped_handles(&mut self) -> Vec<SequenceId> {
        std::mem::take(&mut *self.closes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Submits the closes of handles that were dropped.
    pub fn close_dropped(&mut self) {
        for id in self.dropped_handles() {
            let mut batch = BatchCacheOperations::new();
            batch.close(id);
            self.submit_for_nobody(batch);
        }
    }

    /// Lets everything happen until nothing is left to do, lane by lane. Blocks that can be sealed are sealed.
    pub fn settle(&mut self) {
        loop {
            self.close_dropped();
            self.flush();
            let mut moved = false;
            for lane in LANES {
                while self.device.advance(lane) {
                    moved = true;
                }
                while self.report(lane) {
                    moved = true;
                }
            }
            if !moved && self.core().wants_to_seal() {
                self.apply(Event::Seal);
                moved = true;
            }
            if !moved && self.core().holdings().building == 0 {
                return;
            }
        }
    }

    /// Submits a batch, lets everything happen, and returns its results.
    ///
    /// # Panics
    /// If it is not answered.
    pub fn run(&mut self, batch: BatchCacheOperations) -> Results {
        let ticket = self.submit(batch);
        self.settle();
        self.take(ticket).expect("everything has happened").expect("the reply was not dropped")
    }

    /// Opens a sequence for tenant number `tenant`.
    ///
    /// # Panics
    /// If that fails.
    pub fn open(&mut self, tenant: u32) -> OpenSequence {
        self.open_with(tenant, OpenOptions::default())
    }

    /// Opens a sequence that shares, of a prompt of tokens with these stamps.
    ///
    /// # Panics
    /// If that fails.
    pub fn open_prompt(&mut self, tenant: u32, stamps: std::ops::Range<u64>) -> OpenSequence {
        let ids: Vec<u32> = stamps.map(token_id).collect();
        self.open_with(tenant, OpenOptions::default().prompt(&ids))
    }

    /// [`Rig::open`] with more options.
    ///
    /// # Panics
    /// If that fails.
    pub fn open_with(&mut self, tenant: u32, options: OpenOptions) -> OpenSequence {
        let mut batch = BatchCacheOperations::new();
        batch.open(options.tenant(tenant_name(tenant).as_str()));
        match self.run(batch).remove(0) {
            Ok(Outcome::Opened(sequence)) => sequence,
            other => panic!("a sequence was opened, but: {other:?}"),
        }
    }

    /// Adds an append of `tokens` tokens with stamps from `stamp` on, their last element not finite if `spoil` says with what.
    #[allow(clippy::too_many_arguments)]
    pub fn append(
        &mut self,
        batch: &mut BatchCacheOperations,
        sequence: SequenceId,
        at: Option<u32>,
        tenant: u32,
        stamp: u64,
        tokens: u32,
        extra: Option<ExtraIdentity>,
        spoil: Option<f32>,
    ) {
        let ids = token_ids(stamp, tokens);
        let layers = 0..self.config.layout.layers;
        self.fill(layers, tenant, stamp, tokens, spoil);
        let [keys, values] = &self.tensors;
        batch.append(sequence, at, &ids, extra, host(keys), host(values));
    }

    /// Adds a stage of `tokens` tokens of one layer. See [`Rig::append`].
    #[allow(clippy::too_many_arguments)]
    pub fn stage(
        &mut self,
        batch: &mut BatchCacheOperations,
        sequence: SequenceId,
        layer: u32,
        tenant: u32,
        stamp: u64,
        tokens: u32,
        spoil: Option<f32>,
    ) {
        let layer_index = layer as usize;
        self.fill(layer_index..layer_index + 1, tenant, stamp, tokens, spoil);
        let [keys, values] = &self.tensors;
        batch.stage(sequence, layer, tokens, host(keys), host(values));
    }

    /// Adds a token for each of some sequences, to all layers or one.
    pub fn each(&mut self, batch: &mut BatchCacheOperations, layer: Option<u32>, rows: &[EachRow]) {
        let layers = match layer {
            Some(layer) => layer as usize..layer as usize + 1,
            None => 0..self.config.layout.layers,
        };
        // `[layers, rows, …]` of rows that come as `[layers, 1, …]`.
        let mut all: [Vec<Vec<f32>>; 2] = [0, 1].map(|_| vec![Vec::new(); layers.len()]);
        for row in rows {
            self.fill(layers.clone(), row.tenant, row.stamp, 1, row.spoil);
            for (all, tensor) in all.iter_mut().zip(&self.tensors) {
                let bytes = tensor.len() / layers.len();
                all.iter_mut()
                    .zip(tensor.chunks_exact(bytes))
                    .for_each(|(all, one)| all.extend_from_slice(one));
            }
        }
        let [keys, values] = all.map(|layers| layers.concat());
        let tensors = EachTensors::Host(host(&keys), host(&values));
        let ids = rows.iter().map(|row| row.sequence);
        match layer {
            Some(layer) => batch.stage_each(ids, layer, tensors),
            None => {
                let tokens: Vec<u32> = rows.iter().flat_map(|row| token_ids(row.stamp, 1)).collect();
                batch.append_each(ids, &tokens, tensors);
            }
        }
    }

    fn fill(
        &mut self,
        layers: std::ops::Range<usize>,
        tenant: u32,
        stamp: u64,
        tokens: u32,
        spoil: Option<f32>,
    ) {
        let layout = self.config.layout;
        let stamps = stamp..stamp + u64::from(tokens);
        for (tensor, plane) in self.tensors.iter_mut().zip(Plane::BOTH) {
            tensor.clear();
            push_tensor(tensor, &layout, plane, layers.clone(), tenant, stamps.clone());
        }
        if let (Some(bad), Some(last)) = (spoil, self.tensors[(stamp & 1) as usize].last_mut()) {
            *last = bad;
        }
    }

    /// Loses the shard: the core goes, with every reply that it owes, and the device is never heard of again.
    pub fn lose(&mut self) {
        self.device.lose("a fault was injected");
        self.effects = Effects::default();
        self.core = None;
        self.closed = self.opened;
    }

    /// What the permits of submissions and of open sequences have given out: nothing when all is done.
    pub fn permits_used(&self) -> [Amount; 2] {
        [self.permits.used(), self.sequences.used()]
    }

    /// Sequences that the core has said it opened, less those closed.
    pub fn open_sequences(&self) -> u64 {
        self.opened - self.closed
    }

    /// Checks that nothing is left of anything.
    ///
    /// # Panics
    /// If something is.
    pub fn assert_empty(&mut self) {
        assert_eq!(self.permits_used(), [Amount::default(); 2], "permits are missing");
        assert_eq!(self.config.token_budget.used(), 0, "tokens are still counted");
        assert_eq!(self.open_sequences(), 0, "sequences were opened and not closed");
        let Some(core) = &mut self.core else { return };
        core.invalidate(&Invalidate::All);
        core.reclaim();
        core.audit().expect("consistent");
        assert_eq!(core.holdings(), Default::default(), "something is left");
        assert_eq!(self.device.accesses(), 0, "the device still touches slots");
    }
}

/// The name of tenant number `tenant`.
pub fn tenant_name(tenant: u32) -> String {
    format!("tenant {tenant}")
}

/// The token ids of tokens with these stamps.
pub fn token_ids(stamp: u64, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| token_id(stamp + u64::from(i))).collect()
}

/// The id of the token with this stamp; different ones for stamps below 2^32: whoever shares tokens promises that ids tell them apart.
pub fn token_id(stamp: u64) -> u32 {
    (stamp ^ stamp >> 9) as u32
}

fn host(elements: &[f32]) -> HostTensor<'_> {
    HostTensor { element: ElementType::F32, bytes: bytemuck::cast_slice(elements) }
}
