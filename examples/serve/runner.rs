//! The loop that serves: takes mail, opens sequences, runs one step of the model, submits one batch to the cache, hands out tokens.
//!
//! It is a thread of its own, because a step computes for milliseconds and an executor's worker must not. It waits in three places
//! only: for mail when there is nothing to do, for the model, and for the cache, through its blocking handles. It never waits for a client
//! ([`outbox`](crate::outbox)). Who runs is decided by the [`Scheduler`]; this file carries it out.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use kv_cache::{BatchCacheOperations, BlockingCache, BlockingSequence, Error, OpenOptions, Tenant};
use tokio::sync::OwnedSemaphorePermit;

use crate::api::{FinishReason, Usage};
use crate::error::ApiError;
use crate::figures::{Ending, Figures, StepFigures};
use crate::model::{Chunk, Codec, Decoder, Landed};
use crate::outbox::{Event, Outbox};
use crate::sample::Sampler;
use crate::scheduler::{NoRoom, Planned, RequestId, Scheduler};
use crate::text::TextStream;

/// What a request is made of once it was read and found possible.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    /// Prompt, and behind it what was generated.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_tokens: u32,
    pub(crate) max_tokens: u32,
    /// Prefixes are shared within one tenant only.
    pub(crate) tenant: Tenant,
    pub(crate) sampler: Sampler,
    pub(crate) text: TextStream,
    pub(crate) outbox: Outbox,
    pub(crate) arrived: Instant,
    /// Its place in the server, given back when its sequence is closed.
    pub(crate) permit: OwnedSemaphorePermit,
}

/// What the runner is told. There are at most a few for each request that holds a permit, so the mailbox needs no bound of its own.
#[derive(Debug)]
pub(crate) enum Mail {
    Request(Box<Request>),
    /// A client that was behind reads again.
    CaughtUp(RequestId),
    /// A client went away, or has got all.
    Gone(RequestId),
    /// End now, whatever runs.
    Stop,
}

/// A request on the runner's books.
struct Active {
    request: Request,
    sequence: Option<BlockingSequence>,
    /// Tokens found in the cache when it was first opened.
    cached_tokens: Option<u32>,
    last_token: Option<Instant>,
    /// All is said; only its client has to read it.
    is_over: bool,
}

/// What the loop needs to know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunnerOptions {
    /// A client that has not read for so long is given up.
    pub(crate) cut_after: Duration,
}

/// See the module.
pub(crate) struct Runner {
    cache: BlockingCache,
    codec: Arc<dyn Codec>,
    decoder: Box<dyn Decoder>,
    scheduler: Scheduler,
    mail: Receiver<Mail>,
    figures: Arc<Figures>,
    options: RunnerOptions,
    active: HashMap<RequestId, Active>,
    /// Sequences to close at the end of this turn, in one batch, and the permits to give back then.
    closing: Vec<BlockingSequence>,
    leaving: Vec<OwnedSemaphorePermit>,
}

/// After this, a sequence for which there was no room is tried again while nothing else runs: sealing frees some within it.
const REOPEN_AFTER: Duration = Duration::from_millis(5);

impl Runner {
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        cache: BlockingCache,
        codec: Arc<dyn Codec>,
        decoder: Box<dyn Decoder>,
        scheduler: Scheduler,
        mail: Receiver<Mail>,
        figures: Arc<Figures>,
        options: RunnerOptions,
    ) -> Self {
        let (active, closing, leaving) = Default::default();
        Runner { cache, codec, decoder, scheduler, mail, figures, options, active, closing, leaving }
    }

    /// Runs until it is told to stop, or nobody can send it anything any more.
    pub(crate) fn run(mut self) {
        while self.take_mail() {
            self.cut_the_silent();
            self.open_sequences();
            let plan = self.scheduler.plan();
            if !plan.is_empty() {
                self.step(&plan);
            }
            self.tidy();
        }
        let ids: Vec<RequestId> = self.active.keys().copied().collect();
        ids.into_iter().for_each(|id| self.fail(id, ApiError::shutting_down()));
        self.tidy();
    }

    /// Takes what is there, and waits only if there is nothing to run. False at the end.
    fn take_mail(&mut self) -> bool {
        if self.scheduler.running() == 0 {
            let mail = match self.nap() {
                None => self.mail.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(nap) => self.mail.recv_timeout(nap),
            };
            match mail {
                Ok(mail) => {
                    if !self.read(mail) {
                        return false;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.mail.try_recv() {
                Ok(mail) => {
                    if !self.read(mail) {
                        return false;
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// How long to wait for mail if nothing runs; none: until it comes.
    fn nap(&self) -> Option<Duration> {
        if self.scheduler.waiting() > 0 {
            return Some(REOPEN_AFTER);
        }
        let silent = self.active.values().filter_map(|active| active.request.outbox.behind_since());
        let left = |since: Instant| self.options.cut_after.saturating_sub(since.elapsed());
        // Never nothing at all: the cut comes after it.
        silent.map(left).min().map(|left| left + Duration::from_millis(1))
    }

    fn read(&mut self, mail: Mail) -> bool {
        match mail {
            Mail::Stop => return false,
            Mail::Request(request) => {
                self.figures.arrived(request.prompt_tokens);
                self.scheduler.arrived(request.id, request.prompt_tokens);
                let (sequence, cached_tokens, last_token) = Default::default();
                let id = request.id;
                let active =
                    Active { request: *request, sequence, cached_tokens, last_token, is_over: false };
                self.active.insert(id, active);
                // From here on the health check counts on progress.
                self.tell_places();
            }
            Mail::CaughtUp(id) => {
                if let Some(active) = self.active.get_mut(&id)
                    && active.request.outbox.flush()
                {
                    match active.is_over {
                        true => self.leave(id, None),
                        false => self.scheduler.unpark(id),
                    }
                }
            }
            Mail::Gone(id) => self.leave(id, Some(Ending::Gone)),
        }
        true
    }

    fn tell_places(&self) {
        let scheduler = &self.scheduler;
        self.figures.places(scheduler.waiting(), scheduler.running(), scheduler.parked());
    }

    /// Gives up clients that have not read for too long: they hold a place that others could have.
    fn cut_the_silent(&mut self) {
        let is_silent = |active: &Active| {
            active
                .request
                .outbox
                .behind_since()
                .is_some_and(|since| since.elapsed() >= self.options.cut_after)
        };
        let silent: Vec<RequestId> =
            self.active.iter().filter(|(_, active)| is_silent(active)).map(|(id, _)| *id).collect();
        silent.into_iter().for_each(|id| self.leave(id, Some(Ending::Cut)));
    }

    /// Opens sequences for those who wait, oldest first, as long as there is room.
    ///
    /// Room for the whole prompt is set aside when its sequence is opened, so a prefill never fails half way for lack of it. What
    /// those who run will need for their next tokens is left free: else the new one would be preempted at once.
    fn open_sequences(&mut self) {
        let config = self.cache.cache().config();
        let (block_tokens, tokens_max) = (config.geometry.block_tokens, config.max_tokens);
        while let Some((id, tokens)) = self.scheduler.next_to_open() {
            let Some(active) = self.active.get_mut(&id) else {
                self.scheduler.left(id);
                continue;
            };
            let ahead = (self.scheduler.running() as u32).saturating_mul(block_tokens).min(tokens_max);
            let opened = match self.cache.cache().can_admit(ahead) {
                true => {
                    let options =
                        OpenOptions::default().prompt(&active.request.tokens).reserve_tokens(tokens);
                    self.cache.open(active.request.tenant.clone(), options).map(Some)
                }
                false => Ok(None),
            };
            match opened {
                Ok(Some(sequence)) => {
                    let cached = sequence.sequence().len();
                    if active.cached_tokens.is_none() {
                        active.cached_tokens = Some(cached);
                        self.figures.cached(cached);
                    }
                    active.sequence = Some(sequence);
                    self.scheduler.opened(id, cached);
                }
                Ok(None) => return self.not_opened(id),
                Err(error) if is_for_lack_of_room(&error) => return self.not_opened(id),
                Err(error) => self.fail(id, cache_failed(&error)),
            }
        }
    }

    fn not_opened(&mut self, id: RequestId) {
        if let NoRoom::Hopeless(id) = self.scheduler.not_opened(id) {
            self.fail_without_room(id);
        }
    }

    fn fail_without_room(&mut self, id: RequestId) {
        let tokens = self.active.get(&id).map_or(0, |active| active.request.tokens.len());
        self.fail(id, ApiError::does_not_fit(tokens));
    }

    /// One step of the model, and what follows from it.
    fn step(&mut self, plan: &[Planned]) {
        let began = Instant::now();
        let chunks: Option<Vec<Chunk<'_>>> =
            plan.iter().map(|planned| chunk(&self.active, planned)).collect();
        let landed = match &chunks {
            Some(chunks) => self.decoder.step(&self.cache, chunks),
            None => Err(anyhow::anyhow!("a planned chunk has no sequence")),
        };
        drop(chunks);
        self.figures.step(StepFigures {
            chunks: plan.len(),
            decodes: plan.iter().filter(|planned| planned.tokens == 1 && planned.samples).count(),
            tokens: plan.iter().map(|planned| planned.tokens).sum(),
            took: began.elapsed(),
        });
        match landed {
            Ok(landed) if landed.len() == plan.len() => self.take_results(plan, landed),
            Ok(landed) => {
                let error = anyhow::anyhow!("{} results for {} chunks", landed.len(), plan.len());
                self.fail_all(plan, &error);
            }
            Err(error) => self.fail_all(plan, &error),
        }
    }

    fn fail_all(&mut self, plan: &[Planned], error: &anyhow::Error) {
        tracing::error!(error = format!("{error:#}"), sequences = plan.len(), "a step failed");
        plan.iter().for_each(|planned| self.fail(planned.id, ApiError::internal("The model failed.")));
    }

    fn take_results(&mut self, plan: &[Planned], landed: Vec<Landed>) {
        let mut refused = Vec::new();
        for (planned, landed) in plan.iter().zip(landed) {
            match landed.committed {
                Ok(()) => {
                    self.scheduler.computed(planned.id, planned.tokens);
                    if planned.samples {
                        self.sample(planned.id, &landed.logits);
                    }
                }
                Err(error) if is_for_lack_of_room(&error) => refused.push(planned.id),
                Err(error) => self.fail(planned.id, cache_failed(&error)),
            }
        }
        if refused.is_empty() {
            return;
        }
        match self.scheduler.no_room(&refused) {
            NoRoom::Preempted(victims) => {
                for id in victims {
                    self.close(id);
                    self.figures.preempted();
                }
            }
            NoRoom::Retry(_) => {}
            NoRoom::Hopeless(id) => self.fail_without_room(id),
        }
    }

    /// The next token of an answer, and what it means for it.
    fn sample(&mut self, id: RequestId, logits: &[f32]) {
        let Some(active) = self.active.get_mut(&id) else { return };
        let Some(token) = active.request.sampler.sample(logits) else {
            tracing::error!("the model gave no logits that are numbers");
            return self.fail(id, ApiError::internal("The model failed."));
        };
        let now = Instant::now();
        let first = active.last_token.is_none();
        let before = active.last_token.replace(now).unwrap_or(active.request.arrived);
        self.figures.token(now - before, first);
        let request = &mut active.request;
        request.tokens.push(token);
        let generated = request.tokens.len() as u32 - request.prompt_tokens;
        let mut finish = (generated >= request.max_tokens).then_some(FinishReason::Length);
        let mut text = String::new();
        if self.codec.is_end(token) {
            finish = Some(FinishReason::Stop);
        } else {
            let mut bytes = Vec::new();
            self.codec.decode(token, &mut bytes);
            let pushed = request.text.push(&bytes);
            text = pushed.text;
            if pushed.stopped {
                finish = Some(FinishReason::Stop);
            }
        }
        if finish.is_some() {
            // After a stop string nothing is left.
            text.push_str(&request.text.finish());
        }
        let mut keeps_up = text.is_empty() || request.outbox.push(Event::Text(text));
        if let Some(finish) = finish {
            let usage = Usage {
                prompt_tokens: request.prompt_tokens,
                completion_tokens: generated,
                cached_tokens: active.cached_tokens.unwrap_or(0),
            };
            keeps_up = request.outbox.push(Event::Done(finish, usage));
            self.end(id, Ending::Finished, keeps_up);
        } else {
            self.scheduler.sampled(id);
            if !keeps_up {
                self.scheduler.park(id);
                self.close(id);
                self.figures.parked();
            }
        }
    }

    fn fail(&mut self, id: RequestId, error: ApiError) {
        if let Some(active) = self.active.get_mut(&id).filter(|active| !active.is_over) {
            let keeps_up = active.request.outbox.push(Event::Failed(error));
            self.end(id, Ending::Failed, keeps_up);
        }
    }

    /// The last event of an answer was given to its outbox.
    fn end(&mut self, id: RequestId, ending: Ending, keeps_up: bool) {
        self.figures.ended(ending);
        self.scheduler.left(id);
        self.close(id);
        if let Some(active) = self.active.get_mut(&id) {
            active.is_over = true;
        }
        if keeps_up {
            self.leave(id, None);
        }
    }

    /// Takes a request off the books. `ending` counts if it had not ended by itself.
    fn leave(&mut self, id: RequestId, ending: Option<Ending>) {
        self.close(id);
        self.scheduler.left(id);
        if let Some(active) = self.active.remove(&id) {
            if let Some(ending) = ending.filter(|_| !active.is_over) {
                self.figures.ended(ending);
            }
            self.leaving.push(active.request.permit);
        }
    }

    /// Its sequence is closed at the end of this turn.
    fn close(&mut self, id: RequestId) {
        self.closing.extend(self.active.get_mut(&id).and_then(|active| active.sequence.take()));
    }

    /// Closes what is to be closed and waits until its room is free, gives back permits, and tells how things are.
    fn tidy(&mut self) {
        if !self.closing.is_empty() {
            let ids = self.closing.iter().map(|sequence| sequence.sequence().id());
            let batch = ids.fold(BatchCacheOperations::new(), |batch, id| batch.close(id));
            if let Err(error) = self.cache.submit(batch) {
                tracing::warn!(%error, "sequences are closed by dropping them");
            }
            self.closing.clear();
        }
        self.tell_places();
        // Last: whoever waits for a place finds everything as it is without its holder.
        self.leaving.clear();
    }
}

fn chunk<'a>(active: &'a HashMap<RequestId, Active>, planned: &Planned) -> Option<Chunk<'a>> {
    let active = active.get(&planned.id)?;
    let range = planned.position as usize..(planned.position + planned.tokens) as usize;
    Some(Chunk {
        sequence: active.sequence.as_ref()?.sequence(),
        tokens: active.request.tokens.get(range)?,
        position: planned.position,
        samples: planned.samples,
    })
}

/// Errors that pass when others leave.
fn is_for_lack_of_room(error: &Error) -> bool {
    matches!(error, Error::Capacity { .. } | Error::TooManySequences { .. } | Error::TooManyTokens { .. })
}

fn cache_failed(error: &Error) -> ApiError {
    tracing::warn!(%error, "the cache failed a request");
    match error {
        Error::TenantQuota { .. } => ApiError::overloaded(),
        Error::Closed => ApiError::shutting_down(),
        _ => ApiError::internal("The cache failed."),
    }
}
