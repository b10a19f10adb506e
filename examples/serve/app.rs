//! What request handlers share, and the way of a request from its text to the runner.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kv_cache::{Cache, Format, Tenant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::api::{Ask, Header, Input, Kind};
use crate::error::ApiError;
use crate::figures::Figures;
use crate::history::History;
use crate::model::Codec;
use crate::outbox::{Inbox, channel};
use crate::runner::{Mail, Request};
use crate::sample::Sampler;
use crate::scheduler::RequestId;
use crate::text::TextStream;

/// See the module.
pub(crate) struct App {
    pub(crate) model: String,
    pub(crate) codec: Arc<dyn Codec>,
    /// Longest sequence: what the model was trained for, or what the cache holds if that is less.
    pub(crate) context_tokens: u32,
    pub(crate) cache: Cache,
    pub(crate) sealed_format: Format,
    pub(crate) figures: Arc<Figures>,
    pub(crate) history: History,
    pub(crate) mail: Sender<Mail>,
    /// One permit for each request from its arrival to the end of its sequence.
    pub(crate) places: Arc<Semaphore>,
    pub(crate) places_max: u32,
    /// One permit of [`DELIVERING_MAX`] for each answer until its connection has taken all of it.
    pub(crate) delivering: Arc<Semaphore>,
    pub(crate) running_max: usize,
    pub(crate) is_draining: AtomicBool,
    /// Set by the runner's thread when it ends, for whatever reason.
    pub(crate) runner_ended: Arc<AtomicBool>,
    pub(crate) body_bytes_max: usize,
    pub(crate) body_within: Duration,
    pub(crate) stalled_after: Duration,
    pub(crate) started: Instant,
    pub(crate) created_s: u64,
    pub(crate) next_id: AtomicU64,
}

/// More answers than there can be.
pub(crate) const DELIVERING_MAX: u32 = 1 << 28;

/// An answer on its way.
pub(crate) struct Answer {
    pub(crate) header: Header,
    pub(crate) inbox: Inbox,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    _delivering: Option<OwnedSemaphorePermit>,
}

/// Seconds since 1970.
pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl App {
    /// Hands a request to the runner.
    ///
    /// # Errors
    /// Everything that can be known before the model runs.
    pub(crate) async fn submit(self: &Arc<Self>, ask: Ask, tenant: Tenant) -> Result<Answer, ApiError> {
        if self.is_draining.load(Ordering::Relaxed) {
            return Err(ApiError::shutting_down());
        }
        if ask.model != self.model {
            return Err(ApiError::unknown_model(&ask.model));
        }
        let Ok(permit) = self.places.clone().try_acquire_owned() else { return Err(ApiError::overloaded()) };
        let tokens = self.tokens(ask.kind, ask.input).await?;
        let prompt_tokens = tokens.len() as u32;
        let max_tokens = self.max_tokens(ask.kind, prompt_tokens, ask.max_tokens)?;
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (outbox, inbox) = channel(id, self.mail.clone());
        let request = Request {
            id,
            tokens,
            prompt_tokens,
            max_tokens,
            tenant,
            sampler: Sampler::new(ask.temperature, ask.top_p, ask.seed),
            text: TextStream::new(ask.stops),
            outbox,
            arrived: Instant::now(),
            permit,
        };
        let ended = |_| ApiError::internal("The model has stopped.");
        self.mail.send(Mail::Request(Box::new(request))).map_err(ended)?;
        let prefix = if ask.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let header = Header {
            kind: ask.kind,
            id: format!("{prefix}-{:08x}{:08x}", self.created_s as u32, id.0),
            created_s: unix_s(),
            model: ask.model,
        };
        let _delivering = self.delivering.clone().try_acquire_owned().ok();
        Ok(Answer { header, inbox, stream: ask.stream, include_usage: ask.include_usage, _delivering })
    }

    /// The prompt as tokens, made away from the executor: a large one takes a while.
    async fn tokens(&self, kind: Kind, input: Input) -> Result<Vec<u32>, ApiError> {
        let codec = self.codec.clone();
        let encode = move || match input {
            Input::Text(text) => codec.encode(&text),
            Input::Chat(messages) => codec.encode_chat(&messages),
            Input::Tokens(tokens) => Ok(tokens),
        };
        let encoded = tokio::task::spawn_blocking(encode).await;
        let failed = |error: &dyn std::fmt::Display| {
            tracing::error!(%error, "a prompt could not be encoded");
            ApiError::internal("The prompt could not be encoded.")
        };
        let tokens = encoded.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
        let vocabulary = self.codec.vocabulary();
        if let Some(token) = tokens.iter().find(|token| **token >= vocabulary) {
            let message = format!("Invalid 'prompt': {token} is not a token; there are {vocabulary}.");
            return Err(ApiError::invalid(message, "prompt", "invalid_value"));
        }
        if tokens.is_empty() {
            let message = "Invalid 'prompt': it is empty, and the model needs something to go on from.";
            return Err(ApiError::invalid(message, param(kind), "empty_prompt"));
        }
        Ok(tokens)
    }

    fn max_tokens(&self, kind: Kind, prompt_tokens: u32, asked: Option<u64>) -> Result<u32, ApiError> {
        let limit = self.context_tokens;
        let left = u64::from(limit.saturating_sub(prompt_tokens));
        match asked.unwrap_or(left.max(1)) {
            tokens if tokens <= left => Ok(tokens as u32),
            tokens => Err(ApiError::context_length(limit, prompt_tokens.into(), tokens, param(kind))),
        }
    }

    /// Why the server should get no more requests; nothing if it is well.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        if self.is_draining.load(Ordering::Relaxed) {
            complaints.push("the server is shutting down".into());
        }
        if self.runner_ended.load(Ordering::Relaxed) {
            complaints.push("the thread that runs the model has ended".into());
        }
        // A thread that lives may still hang: in the model, in a driver, in a lock. Only steps show that it does not.
        let (busy, since) = {
            let state = self.figures.lock();
            (state.waiting + state.running > 0, state.progress.elapsed())
        };
        if busy && since >= self.stalled_after {
            complaints.push(format!("there is work, and no step has ended for {:.1} s", since.as_secs_f32()));
        }
        for shard in self.cache.stats().shards {
            complaints.extend(shard.lost.map(|reason| format!("shard {} is lost: {reason}", shard.shard)));
        }
        complaints
    }

    /// Requests on the books.
    pub(crate) fn requests(&self) -> usize {
        self.places_max as usize - self.places.available_permits()
    }

    /// Waits until no request is on the books and no sequence of one is open.
    pub(crate) async fn idle(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().acquire_many_owned(self.places_max).await.ok()
    }

    /// Waits until all answers have gone to their connections.
    pub(crate) async fn delivered(&self) {
        // It is never closed.
        let _ = self.delivering.acquire_many(DELIVERING_MAX).await;
    }
}

fn param(kind: Kind) -> &'static str {
    match kind {
        Kind::Completion => "prompt",
        Kind::Chat => "messages",
    }
}
