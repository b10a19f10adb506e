//! What the runner counts: for the metrics, the health check and the page.
//!
//! Counters go two ways. The `metrics` facade takes them to whatever recorder a process has installed, here Prometheus. The page and the
//! health check need few of them, and need them back, so the runner also keeps those behind a lock that it takes a few times a step.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// Latencies kept between two samples of the page; more than that in a second say nothing new.
const RECENT_MAX: usize = 4096;

/// How a request has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Finished,
    /// The client went away.
    Gone,
    /// The client did not read for too long.
    Cut,
    Failed,
}

impl Ending {
    fn name(self) -> &'static str {
        match self {
            Ending::Finished => "finished",
            Ending::Gone => "gone",
            Ending::Cut => "cut",
            Ending::Failed => "failed",
        }
    }
}

/// A step that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepFigures {
    /// Chunks, each of another sequence.
    pub(crate) chunks: usize,
    /// Of those, chunks of one token that go on with an answer.
    pub(crate) decodes: usize,
    pub(crate) tokens: u32,
    pub(crate) took: Duration,
}

/// The state of the runner as it last told.
#[derive(Debug, Clone)]
pub(crate) struct State {
    pub(crate) steps: u64,
    pub(crate) step_chunks: u64,
    pub(crate) step_decodes: u64,
    pub(crate) step_tokens: u64,
    pub(crate) tokens_out: u64,
    pub(crate) finished: u64,
    pub(crate) ended_otherwise: u64,
    pub(crate) preemptions: u64,
    pub(crate) parkings: u64,
    pub(crate) waiting: usize,
    pub(crate) running: usize,
    pub(crate) parked: usize,
    /// When the runner last got anywhere, or began to have something to do.
    pub(crate) progress: Instant,
    /// Since the last sample, in milliseconds.
    pub(crate) first_token_ms: Vec<f32>,
    pub(crate) between_tokens_ms: Vec<f32>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Figures(Mutex<State>);

impl Figures {
    pub(crate) fn new() -> Self {
        Figures(Mutex::new(State {
            steps: 0,
            step_chunks: 0,
            step_decodes: 0,
            step_tokens: 0,
            tokens_out: 0,
            finished: 0,
            ended_otherwise: 0,
            preemptions: 0,
            parkings: 0,
            waiting: 0,
            running: 0,
            parked: 0,
            progress: Instant::now(),
            first_token_ms: Vec::new(),
            between_tokens_ms: Vec::new(),
        }))
    }

    /// Locks it. Copy out what is needed: the runner waits for it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn arrived(&self, prompt_tokens: u32) {
        counter!("serve_requests_total").increment(1);
        counter!("serve_prompt_tokens_total").increment(u64::from(prompt_tokens));
    }

    pub(crate) fn cached(&self, tokens: u32) {
        counter!("serve_prompt_tokens_cached_total").increment(u64::from(tokens));
    }

    /// Called after every turn of the loop.
    pub(crate) fn places(&self, waiting: usize, running: usize, parked: usize) {
        gauge!("serve_requests_waiting").set(waiting as f64);
        gauge!("serve_requests_running").set(running as f64);
        gauge!("serve_requests_parked").set(parked as f64);
        let mut state = self.lock();
        if state.waiting + state.running == 0 {
            state.progress = Instant::now();
        }
        (state.waiting, state.running, state.parked) = (waiting, running, parked);
    }

    pub(crate) fn step(&self, step: StepFigures) {
        counter!("serve_steps_total").increment(1);
        histogram!("serve_step_seconds").record(step.took.as_secs_f64());
        histogram!("serve_step_tokens").record(f64::from(step.tokens));
        histogram!("serve_step_sequences").record(step.chunks as f64);
        let mut state = self.lock();
        state.steps += 1;
        state.step_chunks += step.chunks as u64;
        state.step_decodes += step.decodes as u64;
        state.step_tokens += u64::from(step.tokens);
        state.progress = Instant::now();
    }

    /// A token was sampled, `since` after the one before it, or after the request's arrival if it is the `first`.
    pub(crate) fn token(&self, since: Duration, first: bool) {
        counter!("serve_generated_tokens_total").increment(1);
        let name = if first { "serve_time_to_first_token_seconds" } else { "serve_inter_token_seconds" };
        histogram!(name).record(since.as_secs_f64());
        let mut state = self.lock();
        state.tokens_out += 1;
        let recent = if first { &mut state.first_token_ms } else { &mut state.between_tokens_ms };
        if recent.len() < RECENT_MAX {
            recent.push(since.as_secs_f32() * 1e3);
        }
    }

    pub(crate) fn preempted(&self) {
        counter!("serve_preemptions_total").increment(1);
        self.lock().preemptions += 1;
    }

    pub(crate) fn parked(&self) {
        counter!("serve_parkings_total").increment(1);
        self.lock().parkings += 1;
    }

    pub(crate) fn ended(&self, ending: Ending) {
        counter!("serve_requests_ended_total", "how" => ending.name()).increment(1);
        let mut state = self.lock();
        match ending {
            Ending::Finished => state.finished += 1,
            _ => state.ended_otherwise += 1,
        }
    }
}

/// Says what the metrics of this server mean.
pub(crate) fn describe() {
    describe_counter!("serve_requests_total", "Requests that were taken in.");
    describe_counter!("serve_requests_ended_total", "Requests that have ended, by how.");
    describe_counter!("serve_refusals_total", "Requests that were answered with an error, by its code.");
    describe_counter!("serve_prompt_tokens_total", "Tokens of prompts.");
    describe_counter!("serve_prompt_tokens_cached_total", "Of those, tokens found in the cache.");
    describe_counter!("serve_generated_tokens_total", "Tokens that were sampled.");
    describe_counter!("serve_steps_total", "Steps of the model, each with one batch for the cache.");
    describe_counter!(
        "serve_preemptions_total",
        "Sequences that were closed to make room, to be computed again."
    );
    describe_counter!(
        "serve_parkings_total",
        "Sequences that were closed because their client did not read."
    );
    describe_gauge!("serve_requests_waiting", "Requests that wait for their turn.");
    describe_gauge!("serve_requests_running", "Requests with an open sequence.");
    describe_gauge!("serve_requests_parked", "Requests whose client does not read.");
    let seconds = Some(Unit::Seconds);
    let describe = |name: &'static str, unit: Option<Unit>, what: &'static str| match unit {
        Some(unit) => describe_histogram!(name, unit, what),
        None => describe_histogram!(name, what),
    };
    describe("serve_time_to_first_token_seconds", seconds, "From a request to its first token.");
    describe("serve_inter_token_seconds", seconds, "Between two tokens of an answer.");
    describe("serve_step_seconds", seconds, "A step of the model and the cache.");
    describe("serve_step_tokens", None, "Tokens of a step.");
    describe("serve_step_sequences", None, "Sequences of a step.");
}
