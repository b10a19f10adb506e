//! Plays a trace back: each request arrives when it did, finds what is cached of its prompt, prefills the rest, decodes its answer, and
//! leaves.
//!
//! Time runs `speed` times as fast. A request is admitted, in order of arrival, once the cache can set aside room for all of
//! its tokens; until then it waits, as in a server's queue. Since the room is set aside, no admitted request ever runs into
//! a full cache, and none needs to be preempted. Where the machine is behind the clock it simply goes as fast as it can.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use half::f16;
use kv_cache::{Cache, Error, OpenOptions, Sequence, Tenant};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::content::{self, Bound, Shape};
use crate::recorder::{Kind, Recorder};
use crate::session::{self, Leaks, Session};
use crate::stop::Stop;
use crate::trace::Request;

/// Tokens of one append while prefilling.
const CHUNK_TOKENS: u32 = 2048;
/// Pace of decoding in the service that the trace stands for.
const DECODE_STEP: Duration = Duration::from_millis(30);
/// Tokens of one check.
const CHECK_TOKENS: u32 = 64;
/// Tokens decoded between two checks.
const CHECK_EVERY: u32 = 128;
/// A full cache is asked again at least this often; a request that leaves wakes the queue at once.
const ADMISSION_RETRY: Duration = Duration::from_millis(10);
/// A request that has waited this long with no other one in the cache will never fit.
const ALONE_MAX: Duration = Duration::from_secs(1);

/// What only a replay counts.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct ReplayTotals {
    pub(crate) trace: String,
    pub(crate) speed: f64,
    /// Requests of the trace, and those that ran to their end.
    pub(crate) requests: u64,
    pub(crate) requests_completed: u64,
    pub(crate) prefill_tokens: u64,
    /// Tokens of prompts that were cached, and did not have to be prefilled.
    pub(crate) found_tokens: u64,
    pub(crate) decode_tokens: u64,
    pub(crate) peak_concurrent: u64,
    /// Requests that waited because the cache was full.
    pub(crate) admission_waits: u64,
    /// How far behind the clock the last request was admitted.
    pub(crate) last_arrival_late_seconds: f64,
}

/// The tokens of a request.
struct Tokens {
    ids: Vec<u32>,
    seeds: Vec<u64>,
}

struct Replay {
    cache: Cache,
    recorder: Arc<Recorder>,
    shape: Shape,
    format: kv_cache::Format,
    seed: u64,
    speed: f64,
    stop: Stop,
    /// Told whenever a request leaves.
    left: Notify,
    completed: AtomicU64,
    prefill_tokens: AtomicU64,
    found_tokens: AtomicU64,
    decode_tokens: AtomicU64,
}

/// Replays `requests`. Returns what it counted and what stayed in use at the end.
pub(crate) async fn run(
    session: &Session,
    requests: Vec<Request>,
    speed: f64,
    stop: &Stop,
) -> (ReplayTotals, Leaks) {
    let replay = Arc::new(Replay {
        cache: session.cache.clone(),
        recorder: session.recorder.clone(),
        shape: session.setup.shape,
        format: session.setup.format,
        seed: session.setup.seed,
        speed,
        stop: stop.clone(),
        left: Notify::new(),
        completed: AtomicU64::new(0),
        prefill_tokens: AtomicU64::new(0),
        found_tokens: AtomicU64::new(0),
        decode_tokens: AtomicU64::new(0),
    });
    let bar = session::bar(requests.len() as u64, "requests");
    let watched = replay.clone();
    let watcher = session.watch(bar.clone(), move |bar, sample| {
        bar.set_position(watched.completed.load(Relaxed));
        bar.set_message(format!(
            "{:.0} open, {:.1} M tokens/s, p99 {:.1} ms",
            sample.sequences_open,
            sample.append_tokens_per_second / 1e6,
            sample.p99_us / 1e3
        ));
    });
    let mut totals = ReplayTotals { speed, requests: requests.len() as u64, ..Default::default() };
    replay.clone().dispatch(requests, &mut totals).await;
    session.recorder.stop_measuring();
    watcher.abort();
    bar.finish_and_clear();
    totals.requests_completed = replay.completed.load(Relaxed);
    totals.prefill_tokens = replay.prefill_tokens.load(Relaxed);
    totals.found_tokens = replay.found_tokens.load(Relaxed);
    totals.decode_tokens = replay.decode_tokens.load(Relaxed);
    totals.peak_concurrent = session.recorder.open_peak();
    (totals, session.leaks().await)
}

impl Replay {
    /// Lets the requests in one by one, and waits until the last has left.
    async fn dispatch(self: Arc<Self>, requests: Vec<Request>, totals: &mut ReplayTotals) {
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for (index, request) in requests.into_iter().enumerate() {
            let arrival = begun + Duration::from_millis(request.timestamp_ms).div_f64(self.speed);
            tokio::select! {
                () = tokio::time::sleep_until(arrival) => {}
                () = self.stop.requested() => break,
            }
            while let Some(ended) = tasks.try_join_next() {
                self.note_panic(ended);
            }
            let tokens = self.tokens(index, &request);
            match self.admit(&request, &tokens, totals).await {
                Ok(Some(sequence)) => {
                    totals.last_arrival_late_seconds = arrival.elapsed().as_secs_f64();
                    tasks.spawn(self.clone().serve(index, request, tokens, sequence));
                }
                Ok(None) => break,
                Err(error) => self.recorder.error(|| format!("request {index} cannot be opened: {error}")),
            }
        }
        while let Some(ended) = tasks.join_next().await {
            self.note_panic(ended);
        }
    }

    fn note_panic(&self, ended: Result<(), tokio::task::JoinError>) {
        if let Err(panic) = ended {
            self.recorder.error(|| format!("a request did not end well: {panic}"));
        }
    }

    /// Waits until there is room for all tokens of the request. `None` if it is time to stop.
    ///
    /// # Errors
    /// [`Error::Capacity`] only for a request that not even an empty cache has room for.
    async fn admit(
        &self,
        request: &Request,
        content: &Tokens,
        totals: &mut ReplayTotals,
    ) -> Result<Option<Sequence>, Error> {
        let tokens = request.total_tokens();
        let prompt = &content.ids[..request.input_tokens as usize];
        let options = OpenOptions::default().reserve_tokens(tokens).prompt(prompt);
        let mut waited = false;
        let mut alone_since = None;
        while !self.stop.is_requested() {
            let alone = self.recorder.open_now() == 0;
            let alone_for = alone.then(|| alone_since.get_or_insert_with(Instant::now).elapsed());
            let last_try = alone_for.is_some_and(|time| time > ALONE_MAX);
            if last_try || self.cache.can_admit(tokens) {
                let opened =
                    self.timed(Kind::Open, self.cache.open(Tenant::new("trace"), options.clone())).await;
                match opened {
                    Ok(sequence) => {
                        self.recorder.sequence_opened();
                        return Ok(Some(sequence));
                    }
                    Err(Error::Capacity { .. }) if !last_try => {}
                    Err(error) => return Err(error),
                }
            }
            totals.admission_waits += u64::from(!waited);
            waited = true;
            self.recorder.backpressure.fetch_add(1, Relaxed);
            let _ = tokio::time::timeout(ADMISSION_RETRY, self.left.notified()).await;
        }
        Ok(None)
    }

    async fn serve(self: Arc<Self>, index: usize, request: Request, tokens: Tokens, sequence: Sequence) {
        let mut has_sealed = false;
        let served = self.live(index, &request, &tokens, &sequence, &mut has_sealed).await;
        match served {
            Ok(true) => {
                self.completed.fetch_add(1, Relaxed);
            }
            Ok(false) => {}
            Err(error) => self.recorder.error(|| format!("request {index}: {error}")),
        }
        if has_sealed {
            self.recorder.sealed_lost();
        }
        drop(sequence);
        self.recorder.sequence_closed();
        self.left.notify_one();
    }

    /// The life of one request. False if it was cut short by Ctrl-C.
    async fn live(
        &self,
        index: usize,
        request: &Request,
        tokens: &Tokens,
        sequence: &Sequence,
        has_sealed: &mut bool,
    ) -> Result<bool, Error> {
        let mut rng = SmallRng::seed_from_u64(content::number(self.seed, index as u64, u32::MAX));
        let mut at = sequence.len();
        self.found_tokens.fetch_add(u64::from(at), Relaxed);
        if at > 0 {
            self.check(index, tokens, sequence, at.saturating_sub(CHECK_TOKENS)..at).await?;
        }
        while at < request.input_tokens {
            if self.stop.is_requested() {
                return Ok(false);
            }
            let end = request.input_tokens.min(at + CHUNK_TOKENS);
            self.append(index, tokens, sequence, at..end).await?;
            self.prefill_tokens.fetch_add(u64::from(end - at), Relaxed);
            at = end;
        }
        for _ in 0..3 {
            let start = rng.random_range(0..request.input_tokens);
            self.check(index, tokens, sequence, start..request.input_tokens.min(start + CHECK_TOKENS))
                .await?;
        }
        self.check(index, tokens, sequence, at.saturating_sub(CHECK_TOKENS)..at).await?;

        self.note_sealed(sequence, has_sealed);

        let first_token = Instant::now();
        for step in 0..request.output_tokens {
            if self.stop.is_requested() {
                return Ok(false);
            }
            // Timers are good to a millisecond: under that it is better to go on, and to wait longer another time.
            let due = first_token + DECODE_STEP.mul_f64(f64::from(step) / self.speed);
            if due.saturating_duration_since(Instant::now()) > Duration::from_millis(1) {
                tokio::time::sleep_until(due).await;
            }
            self.append(index, tokens, sequence, at..at + 1).await?;
            self.decode_tokens.fetch_add(1, Relaxed);
            at += 1;
            if step % CHECK_EVERY == CHECK_EVERY - 1 {
                self.note_sealed(sequence, has_sealed);
                self.check(index, tokens, sequence, at.saturating_sub(CHECK_TOKENS)..at).await?;
            }
        }
        let start = rng.random_range(0..at);
        self.check(index, tokens, sequence, start..at.min(start + CHECK_TOKENS)).await?;
        self.check(index, tokens, sequence, at.saturating_sub(CHECK_TOKENS)..at).await?;
        self.note_sealed(sequence, has_sealed);
        Ok(true)
    }

    async fn append(
        &self,
        index: usize,
        tokens: &Tokens,
        sequence: &Sequence,
        positions: Range<u32>,
    ) -> Result<(), Error> {
        let part = positions.start as usize..positions.end as usize;
        let ids = &tokens.ids[part.clone()];
        let (keys, values) = content::all_layers(&self.shape, &tokens.seeds[part]);
        let committed = self.timed(Kind::Append, sequence.append(ids, &keys, &values)).await?;
        self.recorder.append_tokens.fetch_add(ids.len() as u64, Relaxed);
        if committed != positions.end {
            let end = positions.end;
            self.recorder
                .mismatch(|| format!("request {index}: {committed} tokens after an append, {end} expected"));
        }
        Ok(())
    }

    async fn check(
        &self,
        index: usize,
        tokens: &Tokens,
        sequence: &Sequence,
        positions: Range<u32>,
    ) -> Result<(), Error> {
        let block = self.shape.block_tokens;
        let bound = Bound { format: self.format, exact_from: sequence.len() / block * block, reencoded: 0 };
        let (first, seeds) =
            (positions.start, &tokens.seeds[positions.start as usize..positions.end as usize]);
        for layer in 0..self.shape.layers {
            let read = self.timed(Kind::Read, sequence.read::<f16>(layer, positions.clone())).await?;
            self.recorder.read_tokens.fetch_add(seeds.len() as u64, Relaxed);
            let checked = content::check_layer(&self.shape, layer, first, seeds, (&read.0, &read.1), &bound);
            if let Err(mismatch) = checked {
                self.recorder.mismatch(|| format!("request {index}, tokens {positions:?}: {mismatch}"));
            }
        }
        Ok(())
    }

    /// The content follows from the ids: equal prefixes have equal content.
    fn tokens(&self, index: usize, request: &Request) -> Tokens {
        let ids = request.token_ids(index, 0..request.total_tokens());
        Tokens { seeds: content::seeds_behind(self.seed, &ids), ids }
    }

    fn note_sealed(&self, sequence: &Sequence, has_sealed: &mut bool) {
        if !*has_sealed && sequence.info().sealed_blocks > 0 {
            *has_sealed = true;
            self.recorder.sealed_gained();
        }
    }

    async fn timed<T>(
        &self,
        kind: Kind,
        operation: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        let result = operation.await;
        self.recorder.operation(kind, begun.elapsed());
        result
    }
}
