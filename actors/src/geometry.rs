//! The shape of what is cached: layers, heads, head dims, element type and block size.
//!
//! A [`Geometry`] is what the user states; a [`BlockLayout`] is what follows from it: the bytes of one block
//! and where each layer, head and token lies inside. Nothing here knows a device or a storage format.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Tokens in a block unless the user says otherwise.
pub const DEFAULT_BLOCK_TOKENS: u32 = 32;

/// The type of one key or value element as the model computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE 754 single precision.
    F32,
}

impl ElementType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            ElementType::F16 | ElementType::Bf16 => 2,
            ElementType::F32 => 4,
        }
    }

    /// Bytes of one stored scale: f16 data keeps f16 scales, wider ranges keep f32 scales.
    pub const fn scale_bytes(self) -> usize {
        match self {
            ElementType::F16 => 2,
            ElementType::Bf16 | ElementType::F32 => 4,
        }
    }
}

/// How rotary position embedding pairs the dims of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Dims `2i` and `2i + 1` rotate together (Llama weights in GGUF files).
    Interleaved,
    /// Dims `i` and `i + rotary_dims / 2` rotate together (Qwen2, Hugging Face Llama).
    HalfSplit,
}

/// The rotary embedding the keys carry. The cache stores keys after rotation; formats that un-rotate need this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Inverse frequencies, `rotary_dims / 2` of them.
    pub inv_freq: Vec<f32>,
    /// Leading dims of a key head that are rotated.
    pub rotary_dims: u32,
    /// Which dims form a pair.
    pub layout: RopeLayout,
    /// Factor on cos and sin (YaRN and its kin); 1.0 for plain RoPE.
    #[serde(default = "one")]
    pub attention_scale: f32,
}

/// Scales of the attention are near 1; with much larger ones keys would leave the range of f16.
const SCALE_MOST: f32 = 1000.0;

fn one() -> f32 {
    1.0
}

/// Layers that share one shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerGroup {
    /// Layers in the group.
    pub layers: u32,
    /// Key/value heads of a layer.
    pub kv_heads: u32,
    /// Elements of one key head.
    pub key_dim: u32,
    /// Elements of one value head.
    pub value_dim: u32,
    /// Type of keys and values.
    pub element: ElementType,
    /// Rotary embedding, if the keys carry one.
    #[serde(default)]
    pub rope: Option<Rope>,
}

/// What a cache holds, fixed for its lifetime.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Layer groups. Exactly one is supported today.
    pub groups: Vec<LayerGroup>,
    /// Tokens in a block.
    #[serde(default = "default_block_tokens")]
    pub block_tokens: u32,
    /// Names the model (and its revision): part of every block key.
    #[serde(default)]
    pub model: String,
}

fn default_block_tokens() -> u32 {
    DEFAULT_BLOCK_TOKENS
}

impl Geometry {
    /// One group of `layers` layers with `kv_heads` heads of `head_dim` elements for keys and values alike.
    pub fn new(layers: u32, kv_heads: u32, head_dim: u32, element: ElementType) -> Self {
        let group =
            LayerGroup { layers, kv_heads, key_dim: head_dim, value_dim: head_dim, element, rope: None };
        Self { groups: vec![group], block_tokens: DEFAULT_BLOCK_TOKENS, model: String::new() }
    }

    /// Sets the tokens of a block.
    #[must_use]
    pub fn block_tokens(mut self, tokens: u32) -> Self {
        self.block_tokens = tokens;
        self
    }

    /// Sets the model name that goes into every block key.
    #[must_use]
    pub fn model(mut self, name: impl Into<String>) -> Self {
        self.model = name.into();
        self
    }

    /// Checks every field and computes the block layout.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field, the value and the fix.
    pub fn layout(&self) -> Result<BlockLayout, ConfigError> {
        let [group] = self.groups.as_slice() else {
            return Err(if self.groups.is_empty() {
                ConfigError::invalid("geometry.groups", "0 groups", "give one layer group")
            } else {
                ConfigError::NotBuilt {
                    field: "geometry.groups",
                    value: format!("{} groups", self.groups.len()),
                    instead: "one layer group with the same shape in every layer",
                }
            });
        };
        let in_range = |field, value: u32, max: u32| {
            if value == 0 || value > max {
                Err(ConfigError::invalid(field, value, format!("use 1 to {max}")))
            } else {
                Ok(())
            }
        };
        in_range("geometry.groups[0].layers", group.layers, 1024)?;
        in_range("geometry.groups[0].kv_heads", group.kv_heads, 1024)?;
        in_range("geometry.groups[0].key_dim", group.key_dim, 4096)?;
        in_range("geometry.groups[0].value_dim", group.value_dim, 4096)?;
        in_range("geometry.block_tokens", self.block_tokens, 1024)?;
        if let Some(rope) = &group.rope {
            if rope.rotary_dims > group.key_dim || rope.rotary_dims % 2 == 1 {
                let fix = format!("use an even number up to key_dim = {}", group.key_dim);
                return Err(ConfigError::invalid(
                    "geometry.groups[0].rope.rotary_dims",
                    rope.rotary_dims,
                    fix,
                ));
            }
            if rope.inv_freq.len() * 2 != rope.rotary_dims as usize {
                let fix = format!("give rotary_dims / 2 = {} frequencies", rope.rotary_dims / 2);
                return Err(ConfigError::invalid(
                    "geometry.groups[0].rope.inv_freq",
                    rope.inv_freq.len(),
                    fix,
                ));
            }
            if let Some(freq) = rope.inv_freq.iter().find(|freq| !freq.is_finite()) {
                let fix = "use finite numbers";
                return Err(ConfigError::invalid("geometry.groups[0].rope.inv_freq", freq, fix));
            }
            let scale = rope.attention_scale;
            if !(1.0 / SCALE_MOST..=SCALE_MOST).contains(&scale) {
                let fix = format!("use {} to {SCALE_MOST}; 1 for plain RoPE", 1.0 / SCALE_MOST);
                return Err(ConfigError::invalid("geometry.groups[0].rope.attention_scale", scale, fix));
            }
        }
        let layout = BlockLayout {
            layers: group.layers as usize,
            kv_heads: group.kv_heads as usize,
            key_dim: group.key_dim as usize,
            value_dim: group.value_dim as usize,
            block_tokens: self.block_tokens as usize,
            element: group.element,
        };
        // 1 GiB is far above any real block and keeps every later product inside 64 bits.
        let per_layer =
            (layout.block_tokens * layout.kv_heads).checked_mul(layout.key_dim + layout.value_dim);
        match per_layer.and_then(|n| n.checked_mul(layout.layers * layout.element.bytes())) {
            Some(bytes) if bytes <= 1 << 30 => Ok(layout),
            _ => Err(ConfigError::invalid("geometry", "a block over 1 GiB", "use fewer tokens per block")),
        }
    }
}

/// Keys or values: which half of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plane {
    /// Keys, `key_dim` elements a head.
    Key,
    /// Values, `value_dim` elements a head.
    Value,
}

impl Plane {
    /// Both planes in storage order.
    pub const BOTH: [Plane; 2] = [Plane::Key, Plane::Value];
}

/// The bytes of one raw block: `[layer][K|V][kv_head][token][dim]`, contiguous.
///
/// Tensors that cross the API are token-major instead: `[layers, tokens, kv_heads, dim]`, keys and values apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLayout {
    /// Layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Elements of a key head.
    pub key_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Tokens in a block.
    pub block_tokens: usize,
    /// Element type.
    pub element: ElementType,
}

impl BlockLayout {
    /// Elements of one head of `plane`.
    pub const fn dim(&self, plane: Plane) -> usize {
        match plane {
            Plane::Key => self.key_dim,
            Plane::Value => self.value_dim,
        }
    }

    /// Bytes of one token's row of one head.
    pub const fn row_bytes(&self, plane: Plane) -> usize {
        self.dim(plane) * self.element.bytes()
    }

    /// Bytes of one token of one layer in an API tensor: `[kv_heads, dim]`.
    pub const fn token_bytes(&self, plane: Plane) -> usize {
        self.kv_heads * self.row_bytes(plane)
    }

    /// Bytes of one plane of one layer of a raw block.
    pub const fn plane_bytes(&self, plane: Plane) -> usize {
        self.block_tokens * self.token_bytes(plane)
    }

    /// Bytes of one layer (keys and values) of a raw block.
    pub const fn layer_bytes(&self) -> usize {
        self.plane_bytes(Plane::Key) + self.plane_bytes(Plane::Value)
    }

    /// Bytes of a raw block.
    pub const fn raw_bytes(&self) -> usize {
        self.layers * self.layer_bytes()
    }

    /// Where the plane of a layer begins in a raw block.
    pub const fn plane_offset(&self, layer: usize, plane: Plane) -> usize {
        layer * self.layer_bytes()
            + match plane {
                Plane::Key => 0,
                Plane::Value => self.plane_bytes(Plane::Key),
            }
    }

    /// `(token, head)` rows of a block over all layers and both planes: one scale each in per-row formats.
    pub const fn rows(&self) -> usize {
        self.layers * 2 * self.rows_per_plane()
    }

    /// Rows of one plane of one layer.
    pub const fn rows_per_plane(&self) -> usize {
        self.kv_heads * self.block_tokens
    }

    /// Blocks that `tokens` tokens fill or begin.
    pub const fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }
}
