//! What the suites share: the list of setups that every case runs on, generated tokens, and a naive model of a sequence.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

pub mod model;

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kv_cache::*;
pub use model::{Model, Number, Tokens};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng};

/// Far longer than anything here takes on a busy machine: only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for `future`, and fails loudly if it hangs.
pub async fn within<F: Future>(what: impl fmt::Display, future: F) -> F::Output {
    within_time(PATIENCE, what, future).await
}

/// Longer than [`within`], so that what hangs inside is named first.
pub async fn whole_case<F: Future>(what: impl fmt::Display, future: F) -> F::Output {
    within_time(2 * PATIENCE, what, future).await
}

async fn within_time<F: Future>(time: Duration, what: impl fmt::Display, future: F) -> F::Output {
    match tokio::time::timeout(time, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} hangs"),
    }
}

/// Waits until `is_so`, which looks at what other threads publish.
pub async fn eventually(what: impl fmt::Display, mut is_so: impl FnMut() -> bool) {
    let poll = async {
        while !is_so() {
            tokio::task::yield_now().await;
            std::thread::yield_now();
        }
    };
    within(what, poll).await;
}

/// One way of running a cache. To run every case on another backend, add it to [`SETUPS`].
pub struct Setup {
    pub name: &'static str,
    /// The builder, or why this machine cannot run it.
    pub builder: fn(Geometry) -> Result<CacheBuilder, String>,
    /// Addresses of block tables may be read by the test.
    pub host_memory: bool,
}

pub const SETUPS: [Setup; 9] = [
    Setup { name: "cpu", builder: |g| Ok(Cache::builder(g).devices(Devices::cpu(1))), host_memory: true },
    Setup {
        name: "3 cpu shards",
        builder: |g| Ok(Cache::builder(g).devices(Devices::cpu(3))),
        host_memory: true,
    },
    Setup {
        name: "deterministic",
        builder: |g| Ok(Cache::builder(g).devices(Devices::cpu(1)).deterministic(true)),
        host_memory: true,
    },
    Setup {
        name: "copy lanes",
        builder: |g| {
            Ok(Cache::builder(g).devices(Devices::cpu(1)).configure(|c| {
                c.copy_lane_min_bytes = 1;
            }))
        },
        host_memory: true,
    },
    Setup {
        name: "one lane",
        builder: |g| {
            Ok(Cache::builder(g).devices(Devices::cpu(2)).configure(|c| {
                c.non_blocking = false;
                c.copy_lane_min_bytes = 1;
                c.auto_tune = false;
            }))
        },
        host_memory: true,
    },
    Setup { name: "cuda", builder: |g| cuda(g, |_| {}), host_memory: false },
    Setup {
        name: "cuda deterministic",
        builder: |g| cuda(g, |c| c.deterministic = true),
        host_memory: false,
    },
    Setup {
        name: "cuda copy lanes",
        builder: |g| cuda(g, |c| c.copy_lane_min_bytes = 1),
        host_memory: false,
    },
    Setup {
        name: "cuda, narrow rings on one lane",
        builder: |g| {
            cuda(g, |c| {
                c.non_blocking = false;
                c.max_jobs_in_flight = 4096;
                c.pinned_memory_bytes = 3 << 20;
            })
        },
        host_memory: false,
    },
];

/// A cache on one GPU, or why there is none.
fn cuda(geometry: Geometry, change: impl FnOnce(&mut CacheConfig)) -> Result<CacheBuilder, String> {
    Devices::gpus_found()?;
    // Page-locked memory is slow to allocate, and every case opens a cache of its own.
    let small = |c: &mut CacheConfig| {
        c.max_jobs_in_flight = 4096;
        (c.pinned_memory_bytes, c.lent_memory_bytes) = (12 << 20, 1 << 20);
    };
    Ok(Cache::builder(geometry).devices(Devices::cuda(1)).configure(small).configure(change))
}

/// Every format for keys and values alike, keys and values in two that store scales differently, and layers that stay raw beside them.
pub const FORMATS: [BlockFormat; 11] = {
    let mut formats = [BlockFormat::RAW; 11];
    let mut at = 0;
    while at < Format::ALL.len() {
        (formats[at].keys, formats[at].values) = (Format::ALL[at], Format::ALL[at]);
        at += 1;
    }
    let (raw_first_layers, raw_last_layers) = (1, 1);
    formats[8] =
        BlockFormat { keys: Format::Int4, values: Format::R3, raw_first_layers: 0, raw_last_layers: 0 };
    formats[9] = BlockFormat { keys: Format::R4, values: Format::Int2, raw_first_layers, raw_last_layers };
    formats[10] =
        BlockFormat { keys: Format::Raw, values: Format::Int8, raw_first_layers, raw_last_layers: 0 };
    formats
};
pub const ELEMENTS: [ElementType; 3] = [ElementType::F16, ElementType::Bf16, ElementType::F32];

/// `(block_tokens, layers, kv_heads, key_dim, value_dim)`: round and odd, keys and values alike and not.
pub const SHAPES: [(u32, u32, u32, u32, u32); 6] = [
    (1, 1, 1, 8, 8),
    (5, 3, 2, 16, 24),
    (32, 1, 2, 64, 64),
    (1, 3, 2, 5, 3),
    (5, 1, 3, 7, 16),
    (32, 3, 2, 24, 16),
];

/// A setup with everything else that a case runs over.
#[derive(Clone)]
pub struct Combo {
    pub setup: &'static Setup,
    pub format: BlockFormat,
    pub geometry: Geometry,
}

impl fmt::Display for Combo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = &self.geometry.groups[0];
        write!(f, "{}, {}, {:?}, ", self.setup.name, self.format, group.element)?;
        write!(f, "{} tokens a block, ", self.geometry.block_tokens)?;
        write!(f, "{}x{}x({}+{})", group.layers, group.kv_heads, group.key_dim, group.value_dim)
    }
}

/// The format without its raw layers, where a shape has too few for them.
pub fn fitting(format: BlockFormat, layers: u32) -> BlockFormat {
    match u32::from(format.raw_first_layers + format.raw_last_layers) < layers {
        true => format,
        false => BlockFormat { raw_first_layers: 0, raw_last_layers: 0, ..format },
    }
}

/// A shape with blocks that `format` takes.
pub fn shaped(
    format: impl Into<BlockFormat>,
    shape: (u32, u32, u32, u32, u32),
    element: ElementType,
) -> Geometry {
    let geometry = geometry(shape, element);
    let block_tokens = geometry.block_tokens;
    if format.into().keys.is_grouped() {
        geometry.block_tokens(block_tokens.next_multiple_of(32))
    } else {
        geometry
    }
}

pub fn geometry(shape: (u32, u32, u32, u32, u32), element: ElementType) -> Geometry {
    let (block_tokens, layers, heads, key_dim, value_dim) = shape;
    let mut geometry = Geometry::new(layers, heads, key_dim, element).block_tokens(block_tokens);
    geometry.groups[0].value_dim = value_dim;
    geometry
}

/// Every setup with every element type, each `raw`, in `int8` and in one of the other formats (one element type in two), on one shape each:
/// all setups see all shapes, and all formats run.
pub fn combos() -> impl Iterator<Item = Combo> {
    SETUPS.iter().enumerate().filter(|(_, setup)| is_wanted(setup)).flat_map(|(at, setup)| {
        ELEMENTS.into_iter().enumerate().flat_map(move |(element_at, element)| {
            let turn = ELEMENTS.len() * at + element_at;
            let other = |turn: usize| 2 + turn % (FORMATS.len() - 2);
            let second = (element_at == at % ELEMENTS.len()).then(|| other(turn + 4));
            [0, 1, other(turn)].into_iter().chain(second).map(move |format_at| {
                let shape_at = match format_at {
                    0 | 1 => ELEMENTS.len() * format_at + element_at + at,
                    // Those with blocks of several tokens, and with layers for those of which some stay raw.
                    9 | 10 => [1, 5][turn % 2],
                    _ => [1, 2, 4, 5][turn % 4],
                };
                Combo::new(setup, FORMATS[format_at], element, SHAPES[shape_at % SHAPES.len()])
            })
        })
    })
}

/// Whether a setup's name begins with `KV_CACHE_TEST_SETUPS`, if that is set: `cuda` for what needs a GPU, say.
pub fn is_wanted(setup: &Setup) -> bool {
    std::env::var("KV_CACHE_TEST_SETUPS").map_or(true, |wanted| setup.name.starts_with(&wanted))
}

/// The full product.
pub fn all_combos() -> impl Iterator<Item = Combo> {
    SETUPS.iter().filter(|setup| is_wanted(setup)).flat_map(|setup| {
        FORMATS.into_iter().flat_map(move |format| {
            ELEMENTS.into_iter().flat_map(move |element| {
                SHAPES.into_iter().map(move |shape| Combo::new(setup, format, element, shape))
            })
        })
    })
}

/// Tokens that every cache of the suites has raw room for, on each shard.
pub const ROOM_TOKENS: u64 = 1024;

/// Blocks that the host tier of every shard of the suites' caches holds.
pub const HOST_TIER_BLOCKS: u32 = 17;

impl Combo {
    fn new(
        setup: &'static Setup,
        format: BlockFormat,
        element: ElementType,
        shape: (u32, u32, u32, u32, u32),
    ) -> Combo {
        Combo { setup, format: fitting(format, shape.1), geometry: shaped(format, shape, element) }
    }

    /// The builder with room for [`ROOM_TOKENS`] raw tokens; prints the reason if this machine lacks the backend.
    pub fn builder(&self) -> Option<CacheBuilder> {
        let block = self.geometry.layout().unwrap();
        let bytes = (block.raw_bytes() as u64).next_multiple_of(128);
        let blocks = (ROOM_TOKENS / u64::from(self.geometry.block_tokens)).max(64);
        match (self.setup.builder)(self.geometry.clone()) {
            // Some chunks are kept for sealed blocks.
            Ok(builder) => {
                let sealed = (self.format.block_bytes(&block) as u64).next_multiple_of(128);
                let builder = builder
                    .sealed_format(self.format)
                    .memory_bytes_per_device(blocks * bytes * 18 / 16)
                    .configure(|c| c.host_tier_bytes_per_device = u64::from(HOST_TIER_BLOCKS) * sealed)
                    // Every full block, unless a case is about those that are not.
                    .configure(|c| {
                        let quantisation = &mut c.quantisation;
                        (quantisation.raw_sinks, quantisation.raw_window_blocks) = (Some(false), Some(0));
                    });
                println!("on {self}");
                Some(builder)
            }
            Err(reason) => {
                println!("skipped {self}: {reason}");
                None
            }
        }
    }
}

/// Defines one test per case, named in the list: an `async fn case<E: Number>(Rig<E>)`, run over `$combos`, each under a timeout.
#[macro_export]
macro_rules! conformance {
    ($combos:ident: $($case:ident),* $(,)?) => {
        mod on_every_setup {
            $(
                #[tokio::test]
                async fn $case() {
                    let mut ran = 0;
                    for combo in super::$combos() {
                        let Some(builder) = combo.builder() else { continue };
                        ran += 1;
                        match combo.geometry.groups[0].element {
                            kv_cache::ElementType::F16 => $crate::run_case!($case, kv_cache::half::f16, combo, builder),
                            kv_cache::ElementType::Bf16 => $crate::run_case!($case, kv_cache::half::bf16, combo, builder),
                            kv_cache::ElementType::F32 => $crate::run_case!($case, f32, combo, builder),
                        }
                    }
                    assert!(ran > 0, "no setup can run here");
                }
            )*
        }
    };
}

/// What [`conformance!`] does with one case on one setup.
#[macro_export]
macro_rules! run_case {
    ($case:ident, $element:ty, $combo:ident, $builder:ident) => {{
        let run = async {
            let rig = $crate::common::Rig::<$element>::new(&$combo, $builder).await;
            super::$case(rig).await;
        };
        $crate::common::whole_case(format!("{} on {}", stringify!($case), $combo), run).await
    }};
}

/// A cache under test.
pub struct Rig<E> {
    pub cache: Cache,
    pub layout: BlockLayout,
    pub format: BlockFormat,
    pub combo: Combo,
    blocks_free: u64,
    seed: AtomicU64,
    element: PhantomData<fn() -> E>,
}

impl<E: Number> Rig<E> {
    pub async fn new(combo: &Combo, builder: CacheBuilder) -> Self {
        let cache = builder.build().await.unwrap();
        Rig {
            layout: combo.geometry.layout().unwrap(),
            format: cache.config().sealed_format(),
            combo: combo.clone(),
            blocks_free: cache.stats().total.blocks_free,
            cache,
            seed: AtomicU64::new(1),
            element: PhantomData,
        }
    }

    pub fn block(&self) -> u32 {
        self.layout.block_tokens as u32
    }

    pub fn layers(&self) -> u32 {
        self.layout.layers as u32
    }

    /// New tokens, other ones each time.
    pub fn tokens(&self, tokens: u32) -> Tokens<E> {
        Tokens::generate(self.layout, tokens as usize, self.seed.fetch_add(1, Ordering::Relaxed))
    }

    /// New ids, other ones each time.
    pub fn ids(&self, tokens: u32) -> Vec<u32> {
        let mut rng = SmallRng::seed_from_u64(self.seed.fetch_add(1, Ordering::Relaxed));
        (0..tokens).map(|_| rng.random()).collect()
    }

    /// What a model makes of these ids: see [`Tokens::computed`].
    pub fn computed(&self, ids: &[u32]) -> Tokens<E> {
        Tokens::computed(self.layout, ids, 0)
    }

    /// A new text, another one each time, computed.
    pub fn text(&self, tokens: u32) -> Tokens<E> {
        self.computed(&self.ids(tokens))
    }

    pub fn model(&self) -> Model<E> {
        Model::new(self.layout)
    }

    /// Opens a sequence with a text as its prompt. The model holds what was found of it.
    pub async fn prompted(&self, text: &Tokens<E>) -> (Sequence, Model<E>) {
        self.prompted_with(OpenOptions::default(), text).await
    }

    /// [`Rig::prompted`], with other options beside the prompt.
    pub async fn prompted_with(&self, options: OpenOptions, text: &Tokens<E>) -> (Sequence, Model<E>) {
        let sequence = self.cache.open("tenant", options.prompt(&text.ids)).await.unwrap();
        let mut model = self.model();
        model.push_some(text, sequence.len());
        (sequence, model)
    }

    /// Appends what a sequence lacks of the first `tokens` tokens of its text.
    pub async fn go_on(&self, sequence: &Sequence, model: &mut Model<E>, text: &Tokens<E>, tokens: u32) {
        if tokens > model.len() {
            let rest = text.slice(model.len() as usize..tokens as usize);
            let committed = sequence.append(&rest.ids, &rest.keys, &rest.values).await.unwrap();
            model.push(&rest);
            assert_eq!((committed, sequence.len()), (tokens, tokens));
        }
    }

    /// A sequence of all of a text, which shares it.
    pub async fn shared(&self, text: &Tokens<E>) -> (Sequence, Model<E>) {
        let (sequence, mut model) = self.prompted(text).await;
        self.go_on(&sequence, &mut model, text, text.len() as u32).await;
        (sequence, model)
    }

    /// How many tokens of a prompt are found.
    pub async fn found(&self, options: OpenOptions, ids: &[u32]) -> u32 {
        let sequence = self.cache.open("tenant", options.prompt(ids)).await.unwrap();
        let found = sequence.len();
        sequence.close().await.unwrap();
        found
    }

    pub async fn open(&self) -> Sequence {
        self.cache.open("tenant", OpenOptions::default()).await.unwrap()
    }

    /// A sequence of `tokens` tokens.
    pub async fn filled(&self, tokens: u32) -> (Sequence, Model<E>) {
        let (sequence, mut model) = (self.open().await, self.model());
        self.append(&sequence, &mut model, tokens).await;
        (sequence, model)
    }

    pub async fn append(&self, sequence: &Sequence, model: &mut Model<E>, tokens: u32) {
        if tokens == 0 {
            return;
        }
        let new = self.tokens(tokens);
        let committed = sequence.append(&new.ids, &new.keys, &new.values).await.unwrap();
        model.push(&new);
        assert_eq!(committed, model.len());
        assert_eq!(sequence.len(), model.len());
    }

    /// Stages tokens of every layer.
    pub async fn stage_all(&self, sequence: &Sequence, tokens: &Tokens<E>) {
        for layer in 0..self.layers() {
            sequence.stage(layer, tokens.keys_of(layer), tokens.values_of(layer)).await.unwrap();
        }
    }

    /// Reads everything and compares it.
    pub async fn check(&self, sequence: &Sequence, model: &Model<E>) {
        assert_eq!(sequence.len(), model.len());
        for layer in 0..self.layers() {
            let (keys, values) = sequence.read::<E>(layer, 0..model.len()).await.unwrap();
            model.compare(layer, 0..model.len(), &keys, &values, self.format);
        }
    }

    /// Waits until every full block of a sequence is sealed. (One that was cut stays sealed until it is written to.)
    pub async fn sealed(&self, sequence: &Sequence) {
        let full = sequence.len() / self.block();
        eventually("sealing", || sequence.info().sealed_blocks >= full).await;
    }

    /// Waits until nothing is left to seal in the whole cache: while a block is encoded somebody holds it.
    pub async fn all_sealed(&self) {
        while self.stats().await.total.blocks_waiting_to_seal > 0 {
            tokio::task::yield_now().await;
        }
    }

    /// A message to every shard and back: what was sent before has been carried out by now.
    pub async fn poke(&self) {
        let shards = self.cache.stats().shards.len() as u64;
        let nobody = |shard: u64| SequenceId::from_u64(shard << 48 | 0xF_FFFF << 28);
        let batch =
            (0..shards).fold(BatchCacheOperations::new(), |batch, shard| batch.truncate(nobody(shard), 0));
        for result in self.cache.submit(batch).await.unwrap() {
            assert!(matches!(result, Err(Error::UnknownSequence(_))), "{result:?}");
        }
    }

    /// Statistics that show everything sent before. A shard publishes them after it has answered, so it takes two messages.
    pub async fn stats(&self) -> Stats {
        self.poke().await;
        self.poke().await;
        self.cache.stats()
    }

    /// Once all handles are dropped, and what is cached is given up: everything is free again, and the actors end in peace.
    pub async fn finish(self) {
        self.poke().await;
        eventually(format_args!("{:?}: closing everything", self.cache.stats()), || {
            let stats = self.cache.stats();
            stats.sequences_open as u64 + stats.total.sequences + stats.jobs_in_flight == 0
        })
        .await;
        self.cache.invalidate(Invalidate::All).await.unwrap();
        self.poke().await;
        let cache = self.cache;
        let stats = cache.stats();
        eventually(format_args!("{stats:?}: freeing everything, {} blocks", self.blocks_free), || {
            let stats = cache.stats();
            let total = &stats.total;
            let open = stats.sequences_open as u64 + total.sequences + stats.tokens;
            let blocks = total.blocks_used + total.blocks_sealed + total.slots_quarantined + total.bytes_used;
            let permits = stats.jobs_in_flight + stats.bytes_in_flight;
            // The chunk that waits for the next block to seal may have been given to others, where blocks are re-encoded.
            let is_recoded = !cache.config().quantisation.colder_formats.is_empty();
            let all_free =
                total.blocks_free == self.blocks_free || is_recoded && total.blocks_free > self.blocks_free;
            open + blocks + permits == 0 && all_free
        })
        .await;
        let report = cache.shutdown(PATIENCE).await;
        assert!(report.drained && report.running.is_empty(), "{report:?}");
        assert!(report.exits.iter().all(|(_, exit)| *exit == Exit::Finished), "{report:?}");
    }
}
