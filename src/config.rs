//! Every setting of a cache, as one serde struct.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kv_cache_actors::block::HashSecret;
use kv_cache_actors::dropping::{Dropping, KeyScore};
use kv_cache_actors::error::ConfigError;
use kv_cache_actors::eviction::EvictionPolicy;
use kv_cache_actors::format::{BlockFormat, Format, GROUP, KeepRaw, Ladder, RowFormat};
use kv_cache_actors::geometry::{BlockLayout, Geometry, Plane};
use kv_cache_actors::limits::TenantLimits;
use kv_cache_actors::permit::Amount;
use kv_cache_actors::pool::PoolLayout;
use kv_cache_actors::sequence::SINK_TOKENS;
use serde::{Deserialize, Serialize};

use crate::error::BuildError;
use crate::key_means::KeyMeans;

/// More CPU shards than this are a slip of the pen.
const CPU_SHARDS_MAX: u16 = 256;

/// Which devices hold the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Devices {
    /// All GPUs if there are any, otherwise one CPU device. One log line says which and why.
    #[default]
    Auto,
    /// So many shards in host memory.
    Cpu(u16),
    /// The first so many GPUs, a shard each, or an error. `CUDA_VISIBLE_DEVICES` says which come first.
    Cuda(u16),
}

impl Devices {
    /// See [`Devices::Auto`].
    pub fn auto() -> Self {
        Devices::Auto
    }

    /// See [`Devices::Cuda`].
    pub fn cuda(gpus: u16) -> Self {
        Devices::Cuda(gpus)
    }

    /// GPUs that [`Devices::Auto`] would take, or why there is none.
    ///
    /// # Errors
    /// In words for a person.
    pub fn gpus_found() -> Result<usize, String> {
        crate::backend::gpus().map(|gpus| gpus.len())
    }

    /// See [`Devices::Cpu`].
    pub fn cpu(shards: u16) -> Self {
        Devices::Cpu(shards)
    }
}

/// How blocks that are full are stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quantisation {
    /// Off: sealed blocks stay in the element type.
    pub enabled: bool,
    /// In which format: see [`Format`] for what each costs in accuracy. Unless it is said, one that does for any model: keys stay `raw`, or are
    /// stored in `int8` where there are [`key_means`](Quantisation::key_means); values are stored in `int8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// A format of their own for values; unless it is said, `format`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub values_format: Option<Format>,
    /// Smaller formats that sealed blocks are re-encoded to, keys and values alike, when memory runs short, before any has to make way: `["r4", "r2"]`
    /// behind `int8`, at most two, each smaller than what comes before it: `format`, or what stands for it. Blocks that no sequence holds are, while
    /// less than an eighth of a device's memory is left; those of sequences, the ones sealed longest ago first, while less than a sixteenth is and no
    /// others could make way, [recent ones](Quantisation::raw_window_blocks) only when there is no room to be had otherwise. What is lost is not regained. Cached blocks of a
    /// tenant are re-encoded before its quota evicts them.
    /// Blocks in the host tier are left as they are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub colder_formats: Vec<Format>,
    /// So many of the first layers stay raw in sealed blocks too, and [so many](Quantisation::raw_last_layers) of the last.
    pub raw_first_layers: u16,
    /// See [`Quantisation::raw_first_layers`].
    pub raw_last_layers: u16,
    /// The first block of a sequence stays raw, or as many as hold 4 tokens: those are what attention falls back on (sinks). Unless it is said:
    /// for formats of 4 bits and fewer, and wherever there are `key_means`. Where only `colder_formats` are of so few, they stay as they were sealed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_sinks: Option<bool>,
    /// Full blocks at the end of a sequence, behind the one that is being filled, that stay raw too. They are sealed when the
    /// sequence has grown past them or is closed. Unless it is said: as many as hold 32 tokens for `r4`, 128 for other formats of 4 bits
    /// and fewer, none for the rest. For each of `colder_formats` likewise: so many are re-encoded to it after all others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw_window_blocks: Option<u32>,
    /// A file of the model's mean keys ([`KeyMeans`](crate::KeyMeans)): sealed keys are stored as differences from them. Rotated
    /// formats need it, and so do `int8` and `fp8` if the model's key projection has a bias.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_means: Option<PathBuf>,
}

impl Quantisation {
    /// The formats of keys and of values, named or not, whether or not it is enabled.
    fn planes(&self) -> [Format; 2] {
        // What keys lose without means depends on the model; values have no such channels.
        let of_keys = if self.key_means.is_some() { Format::Int8 } else { Format::Raw };
        let of_values = self.values_format.or(self.format).unwrap_or(Format::Int8);
        [self.format.unwrap_or(of_keys), of_values]
    }
}

impl Default for Quantisation {
    fn default() -> Self {
        Quantisation {
            enabled: true,
            format: None,
            values_format: None,
            colder_formats: Vec::new(),
            raw_first_layers: 0,
            raw_last_layers: 0,
            raw_sinks: None,
            raw_window_blocks: None,
            key_means: None,
        }
    }
}

/// How token dropping chooses what to keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CompressionMethod {
    /// The first 4 tokens (attention sinks) and the most recent ones that fit the ratio.
    #[default]
    Truncation,
    /// Tokens whose keys have the smallest norms, beside the first 4 and some recent ones: see [`KeyScore::Norm`].
    KeyNorm,
    /// Tokens whose keys differ most from the mean key, likewise: see [`KeyScore::Diff`].
    KeyDiff,
}

impl CompressionMethod {
    fn score(self) -> Option<KeyScore> {
        match self {
            CompressionMethod::Truncation => None,
            CompressionMethod::KeyNorm => Some(KeyScore::Norm),
            CompressionMethod::KeyDiff => Some(KeyScore::Diff),
        }
    }
}

/// Token dropping: keeping fewer tokens of a sequence than it was given, as its writes are committed.
///
/// Truncation keeps to the ratio all the time. By scores, tokens are dropped down to the ratio, as many whole blocks as that allows, whenever that
/// gains a block and a quarter as many tokens are new as were kept the last time; for moments and scores of the caller's own there is
/// [`Sequence::drop_tokens`](crate::Sequence::drop_tokens), which needs none of these settings. A cache that drops tokens by itself shares nothing
/// by prefix.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Compression {
    /// Off: every token is kept.
    pub enabled: bool,
    /// Share of a sequence's tokens that is kept, above 0 and up to 1.
    pub ratio: f32,
    /// How tokens are chosen.
    pub method: CompressionMethod,
}

impl Default for Compression {
    fn default() -> Self {
        Compression { enabled: false, ratio: 0.5, method: CompressionMethod::Truncation }
    }
}

/// Settings of a cache. Load it from TOML or JSON, or let [`Cache::builder`](crate::Cache::builder) make it.
///
/// ```
/// let config = kv_cache::CacheConfig::from_toml(r#"
///     memory_bytes_per_device = 67_108_864
///     devices = { cpu = 2 }
///     [geometry]
///     groups = [{ layers = 4, kv_heads = 2, key_dim = 64, value_dim = 64, element = "bf16" }]
///     [quantisation]
///     format = "int4"
/// "#)?;
/// assert_eq!(config.geometry.block_tokens, 32);
/// # Ok::<(), kv_cache::BuildError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct CacheConfig {
    /// What is cached.
    pub geometry: Geometry,
    /// Where.
    #[serde(default)]
    pub devices: Devices,
    /// Bytes of each device's slab, allocated at start. On GPUs where tokens may be dropped by their scores (unless the cache truncates)
    /// those of 8 raw blocks come on top, to gather tokens in.
    #[serde(default = "defaults::memory_bytes_per_device")]
    pub memory_bytes_per_device: u64,
    /// Bytes of each device's host tier, to which sealed blocks can be moved ([`Sequence::offload`](crate::Sequence::offload)).
    /// Page-locked where the device is a GPU; allocated at start. 0: there is none.
    #[serde(default)]
    pub host_tier_bytes_per_device: u64,
    /// Longest sequence, in tokens.
    #[serde(default = "defaults::max_tokens")]
    pub max_tokens: u32,
    /// Tokens of all sequences together; forks count the tokens that they share.
    #[serde(default = "defaults::max_total_tokens")]
    pub max_total_tokens: u64,
    /// Sequences that may be open at once.
    #[serde(default = "defaults::max_sequences")]
    pub max_sequences: usize,
    /// Operations that may be in flight; `submit` waits and `try_submit` refuses beyond it.
    #[serde(default = "defaults::max_jobs_in_flight")]
    pub max_jobs_in_flight: usize,
    /// Bytes that operations in flight may carry, in and out.
    #[serde(default = "defaults::max_bytes_in_flight")]
    pub max_bytes_in_flight: u64,
    /// Sealed blocks.
    #[serde(default)]
    pub quantisation: Quantisation,
    /// Token dropping.
    #[serde(default)]
    pub compression: Compression,
    /// Bytes of page-locked host memory of each GPU, through which host tensors go on their way to or from it: a third for each
    /// of its lanes, allocated at start. Lent memory, the host tier and its staging memory come on top. CPU devices copy nothing across a bus and take none.
    #[serde(default = "defaults::pinned_memory_bytes")]
    pub pinned_memory_bytes: u64,
    /// Bytes of page-locked host memory that batches are lent ([`Cache::batch`](crate::Cache::batch)) where there are GPUs,
    /// allocated at start. Beyond it they get ordinary memory, which is copied once more.
    #[serde(default = "defaults::lent_memory_bytes")]
    pub lent_memory_bytes: u64,
    /// Large copies run on lanes of their own beside small operations; off, everything runs in submission order on one lane.
    #[serde(default = "defaults::yes")]
    pub non_blocking: bool,
    /// From how many bytes an operation counts as a large copy.
    #[serde(default = "defaults::copy_lane_min_bytes")]
    pub copy_lane_min_bytes: usize,
    /// Which of the blocks that no sequence holds goes first when room is needed. Blocks of sequences that were opened with a prompt
    /// ([`OpenOptions::prompt`](crate::OpenOptions::prompt)) are kept until then; all others are freed with their last sequence.
    #[serde(default)]
    pub eviction: EvictionPolicy,
    /// What tenants may use of each device, and what is kept for them, by name. Tenants that are not named have no limits.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tenants: BTreeMap<String, TenantLimits>,
    /// Block events that are kept for listeners that are slow ([`Cache::events`](crate::Cache::events)).
    #[serde(default = "defaults::event_capacity")]
    pub event_capacity: usize,
    /// The same submissions in the same order give the same bytes, placement and evictions. Slower: one operation at a time.
    #[serde(default)]
    pub deterministic: bool,
    /// Times the kernels that this machine can run at start, and takes the fastest. All give the same bytes. Off, or in
    /// deterministic mode, the choice follows from the CPU's features alone.
    #[serde(default = "defaults::yes")]
    pub auto_tune: bool,
    /// Secret of the block keys. Left out, each cache makes its own; give caches that exchange keys the same one.
    #[serde(default, skip_serializing)]
    pub hash_secret: Option<HashSecret>,
}

mod defaults {
    pub(super) fn memory_bytes_per_device() -> u64 {
        1 << 30
    }
    /// Three rings, each with room for two copies of 16 MiB: one is filled while the other flies.
    pub(super) fn pinned_memory_bytes() -> u64 {
        96 << 20
    }
    /// A few dozen decode steps of a large batch.
    pub(super) fn lent_memory_bytes() -> u64 {
        64 << 20
    }
    pub(super) fn max_tokens() -> u32 {
        1 << 20
    }
    pub(super) fn max_total_tokens() -> u64 {
        u64::MAX
    }
    /// Each may have a close under way: 16 bytes of lane a shard.
    pub(super) fn max_sequences() -> usize {
        1 << 17
    }
    /// Deep enough for a batch of thousands of decode steps beside as many single operations.
    pub(super) fn max_jobs_in_flight() -> usize {
        1 << 16
    }
    pub(super) fn max_bytes_in_flight() -> u64 {
        256 << 20
    }
    /// Below it, the hand-over to another thread costs more than the copy (about 20 µs at 10 GB/s).
    pub(super) fn copy_lane_min_bytes() -> usize {
        256 << 10
    }
    /// A second or so of a busy shard; 80 bytes each, once somebody listens.
    pub(super) fn event_capacity() -> usize {
        1 << 14
    }
    pub(super) fn yes() -> bool {
        true
    }
}

impl CacheConfig {
    /// The defaults for `geometry`.
    pub fn new(geometry: Geometry) -> Self {
        CacheConfig {
            geometry,
            devices: Devices::Auto,
            memory_bytes_per_device: defaults::memory_bytes_per_device(),
            host_tier_bytes_per_device: 0,
            max_tokens: defaults::max_tokens(),
            max_total_tokens: defaults::max_total_tokens(),
            max_sequences: defaults::max_sequences(),
            max_jobs_in_flight: defaults::max_jobs_in_flight(),
            max_bytes_in_flight: defaults::max_bytes_in_flight(),
            quantisation: Quantisation::default(),
            compression: Compression::default(),
            pinned_memory_bytes: defaults::pinned_memory_bytes(),
            lent_memory_bytes: defaults::lent_memory_bytes(),
            non_blocking: true,
            copy_lane_min_bytes: defaults::copy_lane_min_bytes(),
            eviction: EvictionPolicy::Auto,
            tenants: BTreeMap::new(),
            event_capacity: defaults::event_capacity(),
            deterministic: false,
            auto_tune: true,
            hash_secret: None,
        }
    }

    /// Reads TOML and validates.
    ///
    /// # Errors
    /// [`BuildError::Parse`] with line and column, also for unknown fields; [`BuildError::Config`].
    pub fn from_toml(text: &str) -> Result<Self, BuildError> {
        Self::checked(toml::from_str(text).map_err(|error| BuildError::Parse(error.to_string()))?)
    }

    /// Reads JSON and validates.
    ///
    /// # Errors
    /// As [`CacheConfig::from_toml`].
    pub fn from_json(text: &str) -> Result<Self, BuildError> {
        Self::checked(serde_json::from_str(text).map_err(|error| BuildError::Parse(error.to_string()))?)
    }

    /// Reads a `.json` file as JSON and any other as TOML, and validates.
    ///
    /// # Errors
    /// As [`CacheConfig::from_toml`]; a file that cannot be read is a [`BuildError::Parse`] too.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, BuildError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|error| BuildError::Parse(format!("{}: {error}", path.display())))?;
        match path.extension() {
            Some(extension) if extension == "json" => Self::from_json(&text),
            _ => Self::from_toml(&text),
        }
    }

    fn checked(self) -> Result<Self, BuildError> {
        self.validate()?;
        Ok(self)
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field, the value and the fix, or what works instead of something not built yet.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.plan().map(drop)
    }

    /// What follows from the settings: the bytes of a block and the cut of a slab.
    pub(crate) fn plan(&self) -> Result<(BlockLayout, PoolLayout), ConfigError> {
        let layout = self.geometry.layout()?;
        match self.devices {
            Devices::Cpu(0) => {
                return Err(ConfigError::invalid("devices", "cpu = 0", "use at least one CPU device"));
            }
            Devices::Cuda(0) => {
                return Err(ConfigError::invalid("devices", "cuda = 0", "use at least one GPU, or auto"));
            }
            _ => {}
        }
        if let Devices::Cpu(shards) = self.devices
            && shards > CPU_SHARDS_MAX
        {
            let fix = format!("use at most {CPU_SHARDS_MAX}: each has two threads and a slab of its own");
            return Err(ConfigError::invalid("devices", format!("cpu = {shards}"), fix));
        }
        let at_least_one = |field, value: u64| match value {
            0 => Err(ConfigError::invalid(field, 0, "use at least 1")),
            _ => Ok(()),
        };
        at_least_one("max_tokens", u64::from(self.max_tokens))?;
        at_least_one("max_total_tokens", self.max_total_tokens)?;
        at_least_one("max_sequences", self.max_sequences as u64)?;
        at_least_one("max_jobs_in_flight", self.max_jobs_in_flight as u64)?;
        at_least_one("max_bytes_in_flight", self.max_bytes_in_flight)?;
        let at_most = |field, value: usize, most: usize| match value > most {
            true => Err(ConfigError::invalid(field, value, format!("use at most {most}"))),
            false => Ok(()),
        };
        at_most("max_sequences", self.max_sequences, 1 << 20)?;
        at_most("max_jobs_in_flight", self.max_jobs_in_flight, Amount::MAX.jobs as usize)?;
        if self.max_bytes_in_flight > Amount::MAX.bytes {
            let fix = format!("use at most {}", Amount::MAX.bytes);
            return Err(ConfigError::invalid("max_bytes_in_flight", self.max_bytes_in_flight, fix));
        }
        at_least_one("event_capacity", self.event_capacity as u64)?;
        at_most("event_capacity", self.event_capacity, 1 << 24)?;
        let ratio = self.compression.ratio;
        if self.compression.enabled && !(ratio > 0.0 && ratio <= 1.0) {
            return Err(ConfigError::invalid("compression.ratio", ratio, "use a share above 0 and up to 1"));
        }
        // A unit of work is at most half a ring, and holds at least one token (of all layers: a row of a decode step is not cut), the positions of a
        // block's tokens and a flag for each operation.
        let token_bytes = layout.layers * (layout.token_bytes(Plane::Key) + layout.token_bytes(Plane::Value));
        let unit_least = token_bytes as u64 + 4 * (layout.block_tokens + self.max_jobs_in_flight) as u64;
        let pinned_least = 3 * (4 * unit_least).max(1 << 20);
        if self.pinned_memory_bytes < pinned_least && !matches!(self.devices, Devices::Cpu(_)) {
            let fix = format!("use at least {pinned_least}");
            return Err(ConfigError::invalid("pinned_memory_bytes", self.pinned_memory_bytes, fix));
        }
        let (format, tokens) = (self.sealed_format(), layout.block_tokens);
        self.check_ladder(&layout)?;
        let of_keys = self.formats().formats().iter().map(|format| format.keys).collect::<Vec<_>>();
        for keys in of_keys.into_iter().chain(self.quantisation.colder_formats.iter().copied()) {
            if keys.is_grouped() && !tokens.is_multiple_of(GROUP) {
                let fix =
                    format!("use a multiple of {GROUP}: {keys} has a scale for each channel of {GROUP} keys");
                return Err(ConfigError::invalid("geometry.block_tokens", tokens, fix));
            }
        }
        let raw_layers = [format.raw_first_layers, format.raw_last_layers].map(usize::from);
        if raw_layers.iter().sum::<usize>() >= layout.layers && !format.is_raw() {
            let value = format!("{} and {} of {} layers", raw_layers[0], raw_layers[1], layout.layers);
            let fix = "leave a layer to be sealed, or turn quantisation off";
            return Err(ConfigError::invalid("quantisation.raw_first_layers, raw_last_layers", value, fix));
        }
        let pool = PoolLayout::plan(&layout, self.formats(), self.memory_bytes_per_device)?;
        self.check_tenants(&pool)?;
        let with_tier = pool.with_host_bytes(self.host_tier_bytes_per_device);
        if with_tier.host_slots == 0 && self.host_tier_bytes_per_device > 0 {
            let fix = format!("use 0 for none, or at least the {} bytes of a block", pool.sealed_slot_bytes);
            return Err(ConfigError::invalid(
                "host_tier_bytes_per_device",
                self.host_tier_bytes_per_device,
                fix,
            ));
        }
        Ok((layout, with_tier))
    }

    fn check_tenants(&self, pool: &PoolLayout) -> Result<(), ConfigError> {
        let invalid = |name: &str, field, value, fix| {
            Err(ConfigError::invalid("tenants", format!("{name}: {field} = {value}"), fix))
        };
        let block = pool.raw_slot_bytes as u64;
        for (name, &TenantLimits { quota_bytes, reserve_bytes }) in &self.tenants {
            match quota_bytes {
                Some(quota) if quota < block => {
                    let fix = format!("use at least the {block} bytes of a raw block, or leave it out");
                    return invalid(name, "quota_bytes", quota, fix);
                }
                Some(quota) if quota < reserve_bytes => {
                    let fix = format!("use at most the quota, {quota}");
                    return invalid(name, "reserve_bytes", reserve_bytes, fix);
                }
                _ => {}
            }
        }
        let reserves = self.tenants.values().map(|limits| limits.reserve_bytes);
        let sum = reserves.fold(0u64, u64::saturating_add);
        // The moving room is nobody's.
        let most = (pool.scratch_offset_bytes(0) - pool.moving_room() * pool.raw_slot_bytes) as u64;
        if sum > most {
            let fix = format!("reserve at most {most} bytes in all, which is what a device has for blocks");
            return invalid("all", "reserve_bytes", sum, fix);
        }
        Ok(())
    }

    /// The format that the quantisation settings stand for.
    pub fn sealed_format(&self) -> BlockFormat {
        if self.quantisation.enabled { self.format_if_enabled() } else { BlockFormat::RAW }
    }

    fn format_if_enabled(&self) -> BlockFormat {
        let Quantisation { raw_first_layers, raw_last_layers, .. } = self.quantisation;
        let [keys, values] = self.quantisation.planes();
        match (keys, values) {
            (Format::Raw, Format::Raw) => BlockFormat::RAW,
            _ => BlockFormat { keys, values, raw_first_layers, raw_last_layers },
        }
    }

    /// That format, and those that sealed blocks are re-encoded to.
    pub(crate) fn formats(&self) -> Ladder {
        self.formats_behind(self.sealed_format())
    }

    fn formats_behind(&self, sealed: BlockFormat) -> Ladder {
        let colder = self.quantisation.colder_formats.iter().filter(|_| !sealed.is_raw());
        let colder = colder.map(|&format| BlockFormat { keys: format, values: format, ..sealed });
        let all = std::iter::once(sealed).chain(colder).collect::<Vec<_>>();
        // More than there may be are refused before.
        Ladder::new(&all).unwrap_or_else(|| sealed.into())
    }

    /// Whether keys of sealed blocks are stored in any format that has codes.
    fn codes_keys(&self) -> bool {
        self.formats().formats().iter().any(|format| format.keys != Format::Raw)
    }

    /// Formats that blocks are re-encoded to are fewer bytes each, in keys and in values, and few. Also of settings that are turned off: a
    /// cache that is opened today opens when they are turned on.
    fn check_ladder(&self, layout: &BlockLayout) -> Result<(), ConfigError> {
        let colder_formats = &self.quantisation.colder_formats;
        let sealed = self.format_if_enabled();
        let refuse = |fix: String| {
            let names = colder_formats.iter().map(|format| format.name()).collect::<Vec<_>>();
            Err(ConfigError::invalid("quantisation.colder_formats", names.join(", "), fix))
        };
        if colder_formats.len() >= Ladder::RUNGS_MAX {
            return refuse(format!("name at most {}", Ladder::RUNGS_MAX - 1));
        }
        if !colder_formats.is_empty() && sealed.is_raw() {
            return refuse("name none, or seal in a format that is not raw".into());
        }
        let bytes = |format: &BlockFormat| format.block_bytes(layout);
        let plane_bytes = |format: Format, plane| {
            let (of, rows) = (RowFormat::new(format, layout, plane), layout.rows_per_plane());
            rows * of.row_bytes() + of.scales_bytes(rows)
        };
        for pair in self.formats_behind(sealed).formats().windows(2) {
            // What is stored anew, and so loses more, is to take less.
            let in_vain = |(plane, before, after): (Plane, Format, Format)| {
                before != after && plane_bytes(after, plane) >= plane_bytes(before, plane)
            };
            let planes =
                [(Plane::Key, pair[0].keys, pair[1].keys), (Plane::Value, pair[0].values, pair[1].values)];
            if bytes(&pair[1]) >= bytes(&pair[0]) || planes.into_iter().any(in_vain) {
                return refuse(format!(
                    "name formats that grow smaller, for keys and for values: a block in {} has {} bytes, and {} in {}",
                    pair[1],
                    bytes(&pair[1]),
                    bytes(&pair[0]),
                    pair[0]
                ));
            }
        }
        Ok(())
    }

    /// Full blocks that are not sealed.
    pub(crate) fn keep_raw(&self) -> KeepRaw {
        // Few bits are for old tokens.
        let recent_tokens = |format: Format| match format {
            Format::R4 => 32,
            Format::R3 | Format::R2 | Format::Int4 | Format::Int2 => 128,
            _ => 0,
        };
        let BlockFormat { keys, values, .. } = self.sealed_format();
        let tokens = recent_tokens(keys).max(recent_tokens(values));
        let window = |tokens: u32| match self.quantisation.raw_window_blocks {
            Some(blocks) => blocks as usize,
            None => tokens.div_ceil(self.geometry.block_tokens) as usize,
        };
        let mut recent_blocks = [0; Ladder::RUNGS_MAX - 1];
        for (blocks, format) in recent_blocks.iter_mut().zip(&self.quantisation.colder_formats) {
            *blocks = window(recent_tokens(*format));
        }
        // Sinks have small keys, which are far from the mean: a difference would be stored more coarsely.
        // Few bits would not do for them, here either.
        let is_lower = self.quantisation.colder_formats.iter().any(|format| recent_tokens(*format) > 0);
        let is_centred = self.quantisation.key_means.is_some() && self.codes_keys();
        let blocks = SINK_TOKENS.div_ceil(self.geometry.block_tokens);
        let sinks = |by_default| if self.quantisation.raw_sinks.unwrap_or(by_default) { blocks } else { 0 };
        KeepRaw {
            sinks: sinks(tokens > 0 || is_centred),
            sinks_as_sealed: sinks(is_lower),
            window_blocks: window(tokens),
            recent_blocks,
        }
    }

    /// The mean keys of the model, if sealed keys are stored as differences from them.
    pub(crate) fn key_means(&self) -> Result<Option<KeyMeans>, BuildError> {
        match &self.quantisation.key_means {
            Some(file) if self.codes_keys() => KeyMeans::load(file).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether keys stay raw for want of a name and of means.
    pub(crate) fn keeps_keys_raw(&self) -> bool {
        let Quantisation { enabled, format, ref key_means, .. } = self.quantisation;
        enabled && format.is_none() && key_means.is_none()
    }

    /// A format of keys that [wants means](Format::wants_means) where there are none: a rotated one if there is any, which loses most.
    pub(crate) fn keys_without_means(&self) -> Option<Format> {
        let formats = self.formats();
        let keys =
            || formats.formats().iter().map(|format| format.keys).filter(|format| format.wants_means());
        let wants = keys().find(|format| format.is_rotated()).or_else(|| keys().next());
        wants.filter(|_| self.quantisation.key_means.is_none())
    }

    /// How tokens are dropped without being asked to, if they are.
    pub(crate) fn dropping(&self) -> Option<Dropping> {
        let Compression { enabled, ratio, method } = self.compression;
        enabled.then(|| Dropping { score: method.score(), ratio })
    }

    /// Tokens that token dropping never drops, at the start of a sequence.
    pub const SINK_TOKENS: u32 = SINK_TOKENS;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ElementType;

    #[test]
    fn keys_want_means() {
        let mut config = CacheConfig::new(Geometry::new(1, 1, 64, ElementType::F16));
        let mut wants = |format, values, colder: &[Format], means: Option<&str>| {
            let quantisation = &mut config.quantisation;
            (quantisation.format, quantisation.values_format) = (Some(format), values);
            quantisation.colder_formats = colder.to_vec();
            quantisation.key_means = means.map(PathBuf::from);
            config.keys_without_means()
        };
        assert_eq!(wants(Format::Int8, None, &[], None), Some(Format::Int8));
        assert_eq!(wants(Format::Int8, None, &[], Some("means")), None);
        assert_eq!(wants(Format::Raw, Some(Format::Int8), &[], None), None);
        assert_eq!(wants(Format::Int4, Some(Format::R2), &[], None), None);
        assert_eq!(wants(Format::R3, Some(Format::Int4), &[], None), Some(Format::R3));
        assert_eq!(wants(Format::Int8, None, &[Format::R4, Format::R2], None), Some(Format::R4));
        assert_eq!(wants(Format::Int8, None, &[Format::R4, Format::R2], Some("means")), None);
    }

    /// Whatever the model: what nobody has named loses nothing that means would have to save.
    #[test]
    fn keys_whose_format_is_not_named_never_lack_means() {
        let mut config = CacheConfig::new(Geometry::new(1, 1, 64, ElementType::F16));
        let values = std::iter::once(None).chain(Format::ALL.map(Some));
        for (values_format, has_means) in values.flat_map(|of| [(of, false), (of, true)]) {
            let key_means = has_means.then(|| PathBuf::from("means"));
            config.quantisation = Quantisation { values_format, key_means, ..Quantisation::default() };
            let BlockFormat { keys, values, .. } = config.sealed_format();
            assert!(has_means || !keys.wants_means(), "{keys}/{values}");
            assert_eq!(config.keys_without_means(), None, "{keys}/{values}");
            assert_eq!(values, values_format.unwrap_or(Format::Int8));
            assert_eq!(keys, if has_means { Format::Int8 } else { Format::Raw });
        }
        // What is named is taken as named.
        for format in Format::ALL {
            config.quantisation = Quantisation { format: Some(format), ..Quantisation::default() };
            assert_eq!(config.sealed_format(), format);
            assert_eq!(config.keys_without_means(), Some(format).filter(|format| format.wants_means()));
        }
    }

    #[test]
    fn windows_hold_so_many_tokens() {
        let mut config = CacheConfig::new(Geometry::new(1, 1, 64, ElementType::F16));
        let mut windows = |format, colder: &[Format], block_tokens, raw_window_blocks| {
            config.geometry.block_tokens = block_tokens;
            let of = &mut config.quantisation;
            (of.format, of.colder_formats, of.raw_window_blocks) =
                (Some(format), colder.to_vec(), raw_window_blocks);
            let KeepRaw { window_blocks, recent_blocks, .. } = config.keep_raw();
            (window_blocks, recent_blocks)
        };
        let colder = [Format::R4, Format::R2];
        assert_eq!(windows(Format::Int8, &colder, 32, None), (0, [1, 4]));
        assert_eq!(windows(Format::Int8, &colder, 48, None), (0, [1, 3]));
        assert_eq!(windows(Format::R4, &colder[1..], 16, None), (2, [8, 0]));
        assert_eq!(windows(Format::Int4, &[], 512, None), (1, [0, 0]));
        assert_eq!(windows(Format::R4, &colder[1..], 32, Some(3)), (3, [3, 0]));
        assert_eq!(windows(Format::R4, &colder[1..], 32, Some(0)), (0, [0, 0]));
        for (block_tokens, blocks) in [(1, 4), (3, 2), (4, 1), (32, 1)] {
            config.geometry.block_tokens = block_tokens;
            assert_eq!(config.keep_raw().sinks, blocks, "blocks of {block_tokens} tokens");
        }
    }

    /// Blocks are re-encoded from what they are sealed in, named or not; who names a colder format that wants means is told so.
    #[test]
    fn ladders_begin_with_what_blocks_are_sealed_in() {
        let mut config = CacheConfig::new(Geometry::new(1, 1, 64, ElementType::F16));
        config.quantisation.colder_formats = vec![Format::Int8, Format::R4];
        let told = |config: &CacheConfig| {
            config
                .validate()
                .map(|()| config.formats().formats().iter().map(BlockFormat::to_string).collect())
        };
        let ladder = |names: [&str; 3]| Ok(names.map(String::from).to_vec());
        assert_eq!(told(&config), ladder(["raw/int8", "int8", "r4"]));
        assert_eq!(config.keys_without_means(), Some(Format::R4));
        // With means they are sealed in `int8` already.
        config.quantisation.key_means = Some("means".into());
        assert!(told(&config).is_err());
        config.quantisation.colder_formats = vec![Format::R4, Format::R2];
        assert_eq!(told(&config), ladder(["int8", "r4", "r2"]));
    }
}
