//! Settings of a simulated cache: small ones to write a test with, and random ones.

use std::collections::HashMap;
use std::sync::Arc;

use super::Rng;
use super::rig::tenant_name;
use crate::block::{HashSecret, KeyScheme};
use crate::device::CoreConfig;
use crate::dropping::Dropping;
use crate::eviction::EvictionPolicy;
use crate::format::{BlockFormat, Format, KeepRaw, Ladder};
use crate::geometry::{ElementType, Geometry};
use crate::limits::TenantLimits;
use crate::pool::PoolLayout;
use crate::tokens::TokenBudget;

/// What a simulated cache is made of, and how a run treats it.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What is cached; f32.
    pub geometry: Geometry,
    /// Format of sealed blocks.
    pub format: Format,
    /// How often they may be re-encoded.
    pub rungs_below: usize,
    /// Full blocks that are not sealed.
    pub keep_raw: KeepRaw,
    /// Raw blocks that the slab holds.
    pub blocks: u64,
    /// Longest sequence.
    pub max_tokens: u32,
    /// Tokens of all sequences together.
    pub max_total_tokens: u64,
    /// Appends and reads of at least this many bytes go over a copy lane.
    pub copy_lane_min_bytes: usize,
    /// Blocks sealed in one launch.
    pub seals_per_launch: usize,
    /// One operation at a time.
    pub deterministic: bool,
    /// How tokens are dropped, if some are.
    pub dropping: Option<Dropping>,
    /// Raw slots in a chunk, if not as many as the pool would choose.
    pub chunk_slots: Option<usize>,
    /// Blocks that the host tier holds.
    pub host_blocks: u64,
    /// Sequences that a run keeps open.
    pub sequences: usize,
    /// Which cached block goes first.
    pub eviction: EvictionPolicy,
    /// Bits of a block key that place it in the prefix index.
    pub index_hash_bits: u32,
    /// What tenants may use.
    pub tenants: Arc<HashMap<String, TenantLimits>>,
}

impl Setup {
    /// One layer, one head of 4 elements, 4 tokens a block, 64 blocks, everything on the compute lane.
    pub fn small(format: Format) -> Self {
        Setup {
            geometry: geometry(1, 1, 4, 4).block_tokens(4),
            format,
            rungs_below: 0,
            keep_raw: KeepRaw::default(),
            blocks: 64,
            max_tokens: 64,
            max_total_tokens: u64::MAX,
            copy_lane_min_bytes: usize::MAX,
            seals_per_launch: 4,
            deterministic: false,
            dropping: None,
            chunk_slots: None,
            host_blocks: 16,
            sequences: 8,
            eviction: EvictionPolicy::Lru,
            index_hash_bits: 64,
            tenants: Arc::default(),
        }
    }

    /// Anything that a user could configure, in small.
    pub fn random(rng: &mut Rng) -> Self {
        if rng.one_in(3) {
            return Setup::crowded(rng);
        }
        let block_tokens = rng.pick(&[1, 4, 4, 4, 8, 32]);
        let geometry = random_geometry(rng, block_tokens);
        // Small pools run out of room all the time, larger ones share more.
        let blocks = if block_tokens == 32 { rng.between(8, 48) } else { rng.between(12, 140) };
        let format = rng.pick(&[Format::Raw, Format::Int8, Format::Int8]);
        Setup {
            format,
            rungs_below: if format == Format::Raw { 0 } else { rng.pick(&[0, 0, 1, 2]) },
            keep_raw: random_keep_raw(rng, blocks),
            blocks: blocks.into(),
            max_tokens: rng.pick(&[3, 6, 10]) * block_tokens + rng.between(0, 3),
            max_total_tokens: match rng.one_in(4) {
                true => u64::from(blocks * block_tokens / 2),
                false => u64::MAX,
            },
            copy_lane_min_bytes: random_copy_lane(rng, &geometry),
            seals_per_launch: rng.pick(&[1, 2, 8]),
            deterministic: rng.one_in(6),
            dropping: random_dropping(rng),
            chunk_slots: None,
            host_blocks: rng.pick(&[0, 6, 60]),
            sequences: rng.pick(&[2, 6, 12, 24]),
            eviction: random_policy(rng),
            index_hash_bits: rng.pick(&[64, 8, 1]),
            tenants: random_tenants(rng, &geometry, blocks),
            geometry,
        }
    }

    /// Many sequences in a pool of few large chunks, which gets full and fragmented: sealing stalls, and blocks are moved to
    /// make room for it.
    fn crowded(rng: &mut Rng) -> Self {
        let block_tokens = rng.pick(&[1, 2, 4, 8]);
        let geometry = random_geometry(rng, block_tokens);
        let blocks = rng.between(40, 160);
        Setup {
            format: Format::Int8,
            rungs_below: rng.pick(&[0, 0, 1, 2]),
            keep_raw: random_keep_raw(rng, blocks),
            blocks: blocks.into(),
            max_tokens: rng.pick(&[12, 24]) * block_tokens,
            max_total_tokens: u64::MAX,
            copy_lane_min_bytes: random_copy_lane(rng, &geometry),
            seals_per_launch: rng.pick(&[1, 8]),
            deterministic: rng.one_in(12),
            dropping: None,
            chunk_slots: Some(rng.between(2, 12) as usize),
            host_blocks: rng.pick(&[0, 10, 200]),
            sequences: 40,
            eviction: random_policy(rng),
            index_hash_bits: rng.pick(&[64, 8, 1]),
            tenants: random_tenants(rng, &geometry, blocks),
            geometry,
        }
    }

    /// The core's configuration, and the token budget in it.
    ///
    /// # Panics
    /// If the settings cannot work.
    pub fn config(&self) -> CoreConfig {
        let layout = self.geometry.layout().expect("a geometry that works");
        let ladder = [self.format, Format::R4, Format::R2].map(BlockFormat::from);
        let formats = Ladder::new(&ladder[..=self.rungs_below]).expect("three rungs at most");
        let slot = layout.raw_bytes().next_multiple_of(crate::pool::SLOT_ALIGN_BYTES) as u64;
        let mut pool = PoolLayout::plan(&layout, formats, self.blocks * slot).expect("a budget that works");
        if let Some(slots) = self.chunk_slots {
            pool.chunk_bytes = slots * pool.raw_slot_bytes;
            pool.chunks = self.blocks as usize / slots;
        }
        let pool = pool.with_host_bytes(self.host_blocks * pool.sealed_slot_bytes as u64);
        CoreConfig {
            cache: 0,
            shard: 0,
            geometry: self.geometry.clone(),
            layout,
            pool,
            formats,
            keep_raw: self.keep_raw,
            max_tokens: self.max_tokens,
            token_budget: TokenBudget::new(self.max_total_tokens),
            copy_lane_min_bytes: self.copy_lane_min_bytes,
            seals_per_launch: self.seals_per_launch,
            deterministic: self.deterministic,
            dropping: self.dropping,
            centred: true,
            keys: KeyScheme::new(HashSecret([7; 32]), &self.geometry, self.dropping.as_ref()),
            eviction: self.eviction,
            tenants: self.tenants.clone(),
            index_hash_bits: self.index_hash_bits,
        }
    }
}

/// Truncation, or none. Dropping by scores is asked for: whether there was room for it is not seen otherwise.
fn random_dropping(rng: &mut Rng) -> Option<Dropping> {
    rng.one_in(3).then(|| Dropping { score: None, ratio: rng.pick(&[0.1, 0.5, 0.8]) })
}

/// Limits for some of the tenants of a run.
fn random_tenants(rng: &mut Rng, geometry: &Geometry, blocks: u32) -> Arc<HashMap<String, TenantLimits>> {
    let block_bytes = geometry.layout().map_or(0, |layout| layout.raw_bytes() as u64);
    let mut some = |number: u32| {
        let quota = u64::from(rng.between(blocks / 8, blocks)) * block_bytes;
        let reserve_bytes = if rng.one_in(2) { quota / u64::from(rng.between(2, 9)) } else { 0 };
        let limits = TenantLimits { quota_bytes: rng.one_in(2).then_some(quota), reserve_bytes };
        (rng.one_in(4)).then(|| (tenant_name(number), limits))
    };
    Arc::new((0..2).filter_map(&mut some).collect())
}

/// `blocks` is a number as random as any: seeds that are known stay what they are.
fn random_keep_raw(rng: &mut Rng, blocks: u32) -> KeepRaw {
    let recent_blocks = [[0, 0], [1, 4], [2, 1], [0, 3]][blocks as usize % 4];
    match rng.one_in(3) {
        true => KeepRaw {
            sinks: u32::from(rng.one_in(2)) * (1 + blocks % 2),
            sinks_as_sealed: u32::from(rng.one_in(2)) * (1 + blocks % 3),
            window_blocks: rng.pick(&[0, 1, 1, 3]),
            recent_blocks,
        },
        false => KeepRaw { recent_blocks, ..KeepRaw::default() },
    }
}

fn random_policy(rng: &mut Rng) -> EvictionPolicy {
    rng.pick(&[
        EvictionPolicy::Auto,
        EvictionPolicy::Auto,
        EvictionPolicy::Lru,
        EvictionPolicy::Lfu,
        EvictionPolicy::Slru,
    ])
}

fn random_geometry(rng: &mut Rng, block_tokens: u32) -> Geometry {
    let (key_dim, value_dim) = rng.pick(&[(4, 4), (3, 5), (6, 2), (8, 7)]);
    geometry(rng.between(1, 3), rng.between(1, 2), key_dim, value_dim).block_tokens(block_tokens)
}

/// So many tokens go over a copy lane.
fn random_copy_lane(rng: &mut Rng, geometry: &Geometry) -> usize {
    let token_bytes = geometry.layout().map_or(0, |layout| layout.raw_bytes() / layout.block_tokens);
    token_bytes * rng.pick(&[0, 1, 2, 4, 1000])
}

/// A geometry of f32 elements.
pub fn geometry(layers: u32, kv_heads: u32, key_dim: u32, value_dim: u32) -> Geometry {
    let mut geometry = Geometry::new(layers, kv_heads, key_dim, ElementType::F32).model("simulated");
    geometry.groups[0].value_dim = value_dim;
    geometry
}
