//! The composition root: opens devices, starts and wires the actors, and ends them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kv_cache_actors::assembly::Assembler;
use kv_cache_actors::batch::{BatchCacheOperations as Inner, Outcome as InnerOutcome};
use kv_cache_actors::block::{HashSecret, KeyScheme};
use kv_cache_actors::device::{CoreConfig, ShardView};
use kv_cache_actors::directory::Directory;
use kv_cache_actors::events::EventHub;
use kv_cache_actors::permit::{Amount, Permits};
use kv_cache_actors::pool::PoolLayout;
use kv_cache_actors::prefix::Matcher;
use kv_cache_actors::router::FaultInjector;
use kv_cache_actors::submit::{Needs, Refusals, Submitter};
use kv_cache_actors::supervisor::Supervisor;
use kv_cache_actors::tokens::TokenBudget;

use crate::backend::{self, Lender, Memory};
use crate::cache::ShutdownReport;
use crate::config::CacheConfig;
use crate::error::BuildError;
use crate::key_means::Centres;
use crate::{BlockLayout, Error};

/// What every handle of a cache shares.
pub(crate) struct Runtime {
    pub(crate) config: CacheConfig,
    pub(crate) layout: BlockLayout,
    pub(crate) pool: PoolLayout,
    pub(crate) submitter: Submitter,
    pub(crate) directory: Arc<Directory>,
    pub(crate) supervisor: Arc<Supervisor>,
    pub(crate) views: Vec<ShardView>,
    pub(crate) memories: Vec<Memory>,
    /// What sealed keys are told apart from.
    pub(crate) centres: Option<Arc<Centres>>,
    pub(crate) lender: Lender,
    pub(crate) tokens: TokenBudget,
    /// None once the cache has shut down: listeners hear of the end when nobody can tell them anything any more.
    pub(crate) events: Mutex<Option<EventHub>>,
    pub(crate) faults: FaultInjector,
}

/// Every handle prints it, so it says little.
impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("shards", &self.views.len()).finish_non_exhaustive()
    }
}

/// Opens everything. Blocks. The caller runs the router, and has to: nothing moves without it.
pub(crate) fn open(
    mut config: CacheConfig,
) -> Result<(Runtime, impl Future<Output = ()> + Send + 'static), BuildError> {
    let (layout, pool) = config.plan()?;
    match config.keys_without_means() {
        None if config.keeps_keys_raw() => tracing::info!(
            target: "kv_cache::quantisation",
            "no format is named, so keys stay raw and values are stored in int8: with the model's mean keys (quantisation.key_means) keys are stored in int8 too"
        ),
        None => {}
        Some(format) if !format.is_rotated() => tracing::info!(
            target: "kv_cache::quantisation",
            %format,
            "keys are stored without the model's mean keys: if its key projection has a bias, name them in quantisation.key_means, or answers lose accuracy"
        ),
        Some(format) => tracing::warn!(
            target: "kv_cache::quantisation",
            %format,
            "keys are stored in a rotated format without the model's mean keys: if its key projection has a bias, answers are ruined; make the file \
             with KeyMeansBuilder and name it in quantisation.key_means, or store keys in int4"
        ),
    }
    let means = config.key_means()?;
    let centres = means.as_ref().map(|means| Centres::new(means, &config.geometry, config.max_tokens));
    let centres = centres.transpose().map_err(|reason| BuildError::KeyMeans {
        file: config
            .quantisation
            .key_means
            .as_ref()
            .map_or_else(String::new, |file| file.display().to_string()),
        reason,
    })?;
    let centres = centres.map(Arc::new);
    let devices = backend::choose(config.devices)?;
    let memories = backend::allocate(&devices, &pool)?;
    let lender = Lender::new(&devices, &memories, config.lent_memory_bytes)?;
    let secret = match config.hash_secret.take() {
        Some(secret) => secret,
        None if config.deterministic => HashSecret([0; 32]),
        None => {
            let mut secret = [0; 32];
            getrandom::fill(&mut secret).map_err(|error| BuildError::Device {
                device: "the system's random source".into(),
                reason: error.to_string(),
            })?;
            HashSecret(secret)
        }
    };
    let tokens = TokenBudget::new(config.max_total_tokens);
    // Wraps: ids of two caches are alike only if 256 were opened between them.
    static CACHES: AtomicU8 = AtomicU8::new(0);
    let cache = CACHES.fetch_add(1, Ordering::Relaxed);
    let tenants: Arc<HashMap<_, _>> = Arc::new(config.tenants.clone().into_iter().collect());
    let mut keys = KeyScheme::new(secret, &config.geometry, config.dropping().as_ref());
    if let Some(means) = &means {
        keys = keys.storing(&means.bytes());
    }
    let events = EventHub::new(config.event_capacity);
    let mut assembler =
        Assembler::new(devices.len(), config.max_jobs_in_flight, config.max_sequences, events.clone());
    for (shard, (device, memory)) in devices.iter().zip(&memories).enumerate() {
        let core = CoreConfig {
            cache,
            shard: shard as u16,
            geometry: config.geometry.clone(),
            layout,
            pool,
            formats: config.formats(),
            keep_raw: config.keep_raw(),
            max_tokens: config.max_tokens,
            token_budget: tokens.clone(),
            copy_lane_min_bytes: if config.non_blocking { config.copy_lane_min_bytes } else { usize::MAX },
            seals_per_launch: memory.seals_per_launch(),
            deterministic: config.deterministic,
            dropping: config.dropping(),
            centred: centres.is_some(),
            keys: keys.clone(),
            eviction: config.eviction,
            tenants: tenants.clone(),
            index_hash_bits: 64,
        };
        backend::add_shard(&mut assembler, device, memory, core, &config, centres.as_ref())?;
    }
    let (assembly, router) = assembler.finish(config.deterministic);
    let jobs = Amount { jobs: config.max_jobs_in_flight as u64, bytes: config.max_bytes_in_flight };
    let sequences = Amount { jobs: config.max_sequences as u64, bytes: 0 };
    let matcher = Matcher {
        keys,
        indices: assembly.views.iter().map(|view| view.index.clone()).collect(),
        block_tokens: layout.block_tokens,
        deterministic: config.deterministic,
    };
    let submitter = Submitter {
        matcher,
        layout,
        max_tokens: config.max_tokens,
        devices: memories.iter().map(Memory::device).collect(),
        permits: Permits::new(jobs),
        sequences: Permits::new(sequences),
        router: assembly.router,
        supervisor: assembly.supervisor.clone(),
        refusals: Refusals::default(),
    };
    let closing = CloseOnDrop([submitter.permits.clone(), submitter.sequences.clone()]);
    let router = async move {
        // However the router ends, with its executor for one: from then on everybody hears that the cache is closed.
        let _closing = closing;
        router.await;
    };
    let runtime = Runtime {
        config,
        layout,
        pool,
        submitter,
        directory: assembly.directory,
        supervisor: assembly.supervisor,
        views: assembly.views,
        memories,
        centres,
        lender,
        tokens,
        events: Mutex::new(Some(events)),
        faults: assembly.faults,
    };
    Ok((runtime, router))
}

/// Closes permits when it is dropped.
struct CloseOnDrop([Permits; 2]);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.iter().for_each(Permits::close);
    }
}

impl Runtime {
    /// Submits one operation that carries `bytes` bytes in or out and opens `sequences` sequences. Tensors are copied by
    /// `build`, once the permits are had.
    pub(crate) fn one(
        &self,
        bytes: u64,
        sequences: usize,
        build: impl FnOnce(&mut Inner),
    ) -> impl Future<Output = Result<InnerOutcome, Error>> {
        let needs = Needs { amount: Amount { jobs: 1, bytes }, sequences };
        self.submitter.submit_one(needs, build)
    }

    pub(crate) fn can_admit(&self, tokens: u32) -> bool {
        if tokens > self.config.max_tokens || self.submitter.permits.is_closed() {
            return false;
        }
        let total = self.tokens.used().saturating_add(u64::from(tokens));
        let blocks = self.layout.blocks_for(tokens as usize) as u64;
        let fits = |(shard, view): (usize, &ShardView)| {
            let counters = view.stats.lock().counters;
            // Cached blocks make way.
            let room = counters.blocks_free + counters.bytes_cached / self.pool.raw_slot_bytes as u64;
            self.supervisor.lost(shard as u16).is_none() && room >= blocks
        };
        total <= self.config.max_total_tokens && self.views.iter().enumerate().any(fits)
    }

    /// Stops from the top down: callers, then the router, then each shard once it has finished its work.
    pub(crate) async fn shutdown(&self, deadline: Duration) -> ShutdownReport {
        self.submitter.permits.close();
        self.submitter.sequences.close();
        let end = async {
            self.submitter.permits.idle().await;
            self.submitter.router.stop();
            self.supervisor.all_ended().await;
        };
        let drained = tokio::time::timeout(deadline, end).await.is_ok();
        let abandoned_operations = self.submitter.permits.used().jobs;
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Also after the deadline: whatever can still end shall.
        self.submitter.router.stop();
        let (running, exits) = (self.supervisor.running(), self.supervisor.exits());
        ShutdownReport { drained, abandoned_operations, running, exits }
    }
}
