//! Blocks: `block_tokens` consecutive tokens of a sequence, over all layers. Their identity, sharing and state.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::dropping::Dropping;
use crate::format::{BlockFormat, History, Ladder};
use crate::geometry::Geometry;
use crate::pool::SizeClass;
use crate::sequence::{OpenOptions, Prompt};
use crate::slot::{FilledSlot, Generation, SlotId};
use crate::sync::{Arc, AtomicU8, AtomicU64, Ordering};

/// Version of the block key's definition; part of every key.
const KEY_VERSION: u32 = 1;

/// Number of a block on its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// Stands in a sequence's list where token dropping has released the block.
    pub const DROPPED: BlockId = BlockId(u32::MAX);
}

/// Identity beside the token ids: the hash of an image, say, whose placeholder tokens are all alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExtraIdentity(pub [u8; 32]);

/// Names the logical content of a block: a keyed 256-bit hash chain over everything that decides its keys and values.
///
/// Equal keys mean equal content; how a copy is encoded is not part of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockKey(pub [u8; 32]);

impl std::fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The secret that keeps block keys from being predicted or forged by whoever chooses the prompts (CVE-2025-25183).
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashSecret(pub [u8; 32]);

impl std::fmt::Debug for HashSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashSecret(…)")
    }
}

/// Fields that cannot run into each other, each preceded by its length, to be hashed under a key.
///
/// They are gathered first and hashed at once: a decode step that fills its blocks makes one key a sequence, and most of what an
/// incremental hasher does for so few bytes is to set itself up.
#[derive(Default)]
struct Fields(SmallVec<[u8; 512]>);

impl Fields {
    fn field(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.0.extend_from_slice(bytes);
        self
    }

    fn hash(&self, secret: &HashSecret) -> BlockKey {
        BlockKey(*blake3::keyed_hash(&secret.0, &self.0).as_bytes())
    }
}

/// What all block keys of a cache depend on, beside the sequence and its tokens.
#[derive(Debug, Clone)]
pub struct KeyScheme {
    secret: HashSecret,
    block_tokens: usize,
    /// The fields that every root begins with.
    common: std::sync::Arc<[u8]>,
}

impl KeyScheme {
    /// The keys of a cache for `geometry` that drops tokens by itself as `dropping` says.
    pub fn new(secret: HashSecret, geometry: &Geometry, dropping: Option<&Dropping>) -> Self {
        let mut fields = Fields::default();
        fields.field(&KEY_VERSION.to_le_bytes()).field(geometry.model.as_bytes());
        fields.field(&geometry.block_tokens.to_le_bytes());
        for group in &geometry.groups {
            for number in [group.layers, group.kv_heads, group.key_dim, group.value_dim] {
                fields.field(&number.to_le_bytes());
            }
            fields.field(&[group.element as u8]);
            match &group.rope {
                None => fields.field(&[0]),
                Some(rope) => {
                    fields.field(&[1, rope.layout as u8]).field(&rope.rotary_dims.to_le_bytes());
                    fields.field(&rope.attention_scale.to_le_bytes());
                    let freqs: Vec<u8> = rope.inv_freq.iter().flat_map(|f| f.to_le_bytes()).collect();
                    fields.field(&freqs)
                }
            };
        }
        match dropping {
            None => fields.field(b"none"),
            Some(dropping) => fields.field(dropping.name().as_bytes()),
        };
        KeyScheme { secret, block_tokens: geometry.block_tokens as usize, common: fields.0.as_slice().into() }
    }

    /// The same for a cache that stores what `what` says, which other caches of this geometry may not.
    pub fn storing(mut self, what: &[u8]) -> Self {
        let mut fields = Fields(SmallVec::from_slice(&self.common));
        fields.field(blake3::hash(what).as_bytes());
        self.common = fields.0.as_slice().into();
        self
    }

    /// The parent key of a sequence's first block: all that its blocks have in common.
    pub fn root(&self, options: &OpenOptions) -> BlockKey {
        let mut fields = Fields(SmallVec::from_slice(&self.common));
        match &options.shared_domain {
            None => fields.field(&[0]).field(options.tenant.name().as_bytes()),
            Some(domain) => fields.field(&[1]).field(domain.as_bytes()),
        };
        match &options.adapter {
            None => fields.field(&[0]),
            Some(adapter) => fields.field(&[1]).field(adapter.as_bytes()),
        };
        fields.hash(&self.secret)
    }

    /// The key of the block after `parent` that holds `token_ids`, with the extra identity at positions in the block.
    pub fn child(
        &self,
        parent: BlockKey,
        token_ids: &[u32],
        extra: impl IntoIterator<Item = (u32, ExtraIdentity)>,
    ) -> BlockKey {
        let mut fields = Fields::default();
        fields.field(&parent.0);
        // Counted in tokens.
        fields.0.extend_from_slice(&(token_ids.len() as u64).to_le_bytes());
        fields.0.extend_from_slice(bytemuck::cast_slice(token_ids));
        for (position, identity) in extra {
            fields.field(&position.to_le_bytes()).field(&identity.0);
        }
        fields.hash(&self.secret)
    }

    /// The keys of all full blocks of a prompt.
    pub fn prompt(&self, root: BlockKey, prompt: &Prompt) -> Vec<BlockKey> {
        let mut parent = root;
        let mut extra = prompt.extra.as_slice();
        let blocks = prompt.token_ids.chunks_exact(self.block_tokens);
        let ends = (1..).map(|block| block * self.block_tokens as u64);
        let key = |(token_ids, end)| {
            let inside = extra.iter().take_while(|(at, _)| u64::from(*at) < end).count();
            let (here, rest) = extra.split_at(inside);
            extra = rest;
            let start = end - self.block_tokens as u64;
            let here = here.iter().map(|&(at, identity)| ((u64::from(at) - start) as u32, identity));
            parent = self.child(parent, token_ids, here);
            parent
        };
        blocks.zip(ends).map(key).collect()
    }
}

/// What a block is going through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// Raw, and its sequence may write to it.
    Open,
    /// Raw, every token committed: waits to be sealed.
    Full,
    /// Being encoded; the raw bytes are still what readers see.
    Sealing,
    /// In the sealed format.
    Sealed,
    /// Raw for good: encoding found a value that is not finite.
    Unsealable,
}

/// One block of a shard. Small, since every step looks at one: its key and token ids lie elsewhere.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) slot: FilledSlot,
    pub(crate) class: SizeClass,
    pub(crate) state: BlockState,
    /// How often it has been re-encoded since it was sealed: its format is that of this rung.
    pub(crate) rung: u8,
    /// Formats of the ladder that its tokens, or some of them, have been through before they were copied here. Never changes but while the block
    /// is made.
    pub(crate) past: u8,
    /// In which queues for that it is, see [`super::device`].
    pub(crate) queued: u8,
    /// Sequences and flights that hold the block.
    pub(crate) refs: u32,
    pub(crate) tenant: u32,
    /// Its place in every sequence that holds it: the key of a shared block is that of all tokens up to its end.
    pub(crate) index: u32,
    /// Holds decoded (lossy) tokens, or tokens computed after dropping: never published under a key.
    pub(crate) private: bool,
    /// It is full, and the index's table has its key.
    pub(crate) has_key: bool,
    /// Some of its tokens have more identity than their ids.
    pub(crate) has_extra: bool,
    /// The prefix index knows it. Its content is final then: whoever wants to write copies it.
    pub(crate) published: bool,
    /// Tokens were cut off it since it was written: a view may still show the bytes that the next write replaces.
    pub(crate) rewound: bool,
    /// A write to it is in flight: it must stay where it is.
    pub(crate) writing: bool,
    /// It is being copied to a slot of this class: whoever wants to write waits, or copies it himself.
    pub(crate) moving_to: Option<SizeClass>,
}

impl Block {
    pub(crate) fn format(&self, formats: &Ladder) -> BlockFormat {
        if self.state == BlockState::Sealed { formats.rung(self.rung) } else { BlockFormat::RAW }
    }

    /// Formats of the ladder that its tokens, or some of them, have been through.
    pub(crate) fn been_through(&self) -> u8 {
        been_through(self.past, (self.state == BlockState::Sealed).then_some(self.rung))
    }
}

/// Formats of the ladder down to which tokens have been that came through `past` of them, and are sealed on a rung now, or not.
fn been_through(past: u8, sealed: Option<u8>) -> u8 {
    sealed.map_or(past, |rung| past.max(rung + 1))
}

/// Where a block's bytes are, as readers outside of the device thread see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The slot.
    pub slot: SlotId,
    /// The size class of the slot.
    pub class: SizeClass,
    /// The generation to pin it under.
    pub generation: Generation,
    /// How the bytes are stored.
    pub format: BlockFormat,
    /// What they have been stored in so far.
    pub history: History,
    /// Whether the block is sealed (into a format that may be `raw` itself).
    pub sealed: bool,
    /// Whether it stays raw for good: sealing found a value that is not finite.
    pub unsealable: bool,
}

/// The place of every block of a shard: written by the device thread, read inline by anybody.
///
/// A reader takes the place, pins the slot under the place's generation and, if that fails because the block has just
/// moved (been sealed), reads the place again.
#[derive(Debug, Clone)]
pub struct Places {
    blocks: Arc<[Whereabouts]>,
    formats: Ladder,
}

/// What [`Places`] knows of a block.
#[derive(Debug)]
struct Whereabouts {
    /// `slot << 32 | generation << 4 | what is stored`, as a number: one word, so that a reader never sees half a move.
    place: AtomicU64,
    /// What it has been through before it was made: written before its first place, and never while anybody may look.
    past: AtomicU8,
}

/// `(class, sealed, rung)` of the numbers in [`Places`].
const STORED: [(SizeClass, bool, u8); 9] = [
    (SizeClass::Raw, false, 0),
    (SizeClass::Raw, true, 0),
    (SizeClass::Sealed, true, 0),
    (SizeClass::Colder, true, 1),
    (SizeClass::Coldest, true, 2),
    (SizeClass::Host, true, 0),
    (SizeClass::Host, true, 1),
    (SizeClass::Host, true, 2),
    (SizeClass::Raw, false, 0),
];

/// The number of a raw block that is never sealed.
const UNSEALABLE: u64 = 8;

impl Places {
    pub(crate) fn new(blocks: usize, formats: Ladder) -> Self {
        Places {
            blocks: (0..blocks)
                .map(|_| Whereabouts { place: AtomicU64::new(u64::MAX), past: AtomicU8::new(0) })
                .collect(),
            formats,
        }
    }

    #[inline]
    pub(crate) fn publish(&self, id: BlockId, block: &Block) {
        let stored = match block.class {
            SizeClass::Raw if block.state == BlockState::Unsealable => UNSEALABLE,
            SizeClass::Raw => u64::from(block.state == BlockState::Sealed),
            SizeClass::Host => 5 + u64::from(block.rung),
            // Their numbers follow each other in both.
            class => class as u64 - SizeClass::Sealed as u64 + 2,
        };
        let generation = u64::from(block.slot.generation().0);
        let word = u64::from(block.slot.id().0) << 32 | generation << 4 | stored;
        let at = &self.blocks[id.0 as usize];
        at.past.store(block.past, Ordering::Relaxed);
        at.place.store(word, Ordering::Release);
    }

    /// Where `block` is now.
    pub fn get(&self, block: BlockId) -> Option<Place> {
        let at = self.blocks.get(block.0 as usize)?;
        let word = at.place.load(Ordering::Acquire);
        let slot = SlotId((word >> 32) as u32);
        if slot.0 == u32::MAX {
            return None;
        }
        let &(class, sealed, rung) = STORED.get((word & 15) as usize)?;
        let past = at.past.load(Ordering::Relaxed);
        Some(Place {
            slot,
            class,
            generation: Generation((word >> 4) as u32 & ((1 << Generation::BITS) - 1)),
            format: if sealed { self.formats.rung(rung) } else { BlockFormat::RAW },
            history: History::new(self.formats, been_through(past, sealed.then_some(rung))),
            sealed,
            unsealable: word & 15 == UNSEALABLE,
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::dropping::KeyScore;
    use crate::geometry::ElementType;

    #[test]
    fn every_part_of_the_identity_changes_the_key() {
        let secret = HashSecret([7; 32]);
        let geometry = Geometry::new(2, 2, 16, ElementType::F16).model("m");
        let options = OpenOptions::default().tenant("a");
        let root = |g: &Geometry, o: &OpenOptions| KeyScheme::new(secret, g, None).root(o);
        let base = root(&geometry, &options);
        let dropping = Dropping { score: None, ratio: 0.5 };
        let others = [
            root(&geometry.clone().model("n"), &options),
            root(&geometry.clone().block_tokens(16), &options),
            root(&Geometry::new(2, 2, 32, ElementType::F16).model("m"), &options),
            root(&Geometry::new(2, 2, 16, ElementType::Bf16).model("m"), &options),
            root(&geometry, &OpenOptions::default().tenant("b")),
            root(&geometry, &options.clone().adapter("a")),
            root(&geometry, &options.clone().shared_domain("a")),
            KeyScheme::new(secret, &geometry, Some(&dropping)).root(&options),
            KeyScheme::new(secret, &geometry, Some(&Dropping { score: Some(KeyScore::Diff), ..dropping }))
                .root(&options),
            KeyScheme::new(HashSecret([8; 32]), &geometry, None).root(&options),
        ];
        assert!(others.iter().all(|key| *key != base));

        let scheme = KeyScheme::new(secret, &geometry, None);
        let child =
            |ids: &[u32], extra: &[(u32, ExtraIdentity)]| scheme.child(base, ids, extra.iter().copied());
        let image = ExtraIdentity([1; 32]);
        assert_eq!(child(&[1, 2], &[]), child(&[1, 2], &[]));
        assert_ne!(child(&[1, 2], &[]), child(&[2, 1], &[]));
        assert_ne!(child(&[1, 2], &[]), child(&[1, 2, 0], &[]));
        assert_ne!(child(&[1, 2], &[]), child(&[1, 2], &[(0, image)]));
        assert_ne!(child(&[1, 2], &[(1, image)]), child(&[1, 2], &[(0, image)]));
    }

    #[test]
    fn a_prompt_has_the_keys_of_its_blocks() {
        let geometry = Geometry::new(1, 1, 16, ElementType::F16).block_tokens(16);
        let scheme = KeyScheme::new(HashSecret([7; 32]), &geometry, None);
        let root = scheme.root(&OpenOptions::default());
        let ids: Vec<u32> = (0..40).collect();
        let image = ExtraIdentity([1; 32]);
        let prompt = Prompt::new(&ids).extra_at(20..22, image);
        let first = scheme.child(root, &ids[..16], []);
        let second = scheme.child(first, &ids[16..32], [(4, image), (5, image)]);
        assert_eq!(scheme.prompt(root, &prompt), [first, second], "the third block is not full");
    }
}
