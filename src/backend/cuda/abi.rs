//! What kernels are handed, byte for byte as in `kernels/common.cuh`.

use bytemuck::{Pod, Zeroable};
use kv_cache_actors::format::FormatLayout;
use kv_cache_actors::geometry::{BlockLayout, ElementType, Plane};

/// Where everything lies in a block.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Layout {
    layers: u32,
    kv_heads: u32,
    block_tokens: u32,
    element: u32,
    dim: [u32; 2],
    row_bytes: [u32; 2],
    code_bytes: [u32; 2],
    element_bytes: u32,
    /// Of a row, or of the rows that have them in common.
    scale_bytes: [u32; 2],
    /// Planes are counted keys, values, keys of the next layer, ….
    first_plane: u32,
    plane_step: u32,
    /// Those that are coded.
    pub(super) planes: u32,
    plane_bytes: [u64; 2],
    layer_bytes: u64,
    /// Codes of layer 0, were it coded (maybe before the block's first byte), and from a layer to the next. Scales likewise.
    codes_at: [u64; 2],
    codes_layer: u64,
    scales_at: [u64; 2],
    scales_layer: u64,
    centres: CentreTables,
}

/// What sealed keys are told apart from: addresses of the tables of [`Centres`](crate::key_means::Centres), 0 without any.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct CentreTables {
    pub(super) means: u64,
    pub(super) block_turns: u64,
    /// Cosines, and behind them sines.
    pub(super) token_turns: u64,
    /// Both of a token beside each other, and tokens of a pair.
    pub(super) pair_turns: u64,
    pub(super) pairs: u32,
    /// From the first dim of a pair to the second: 1, or as many as there are pairs.
    pub(super) apart: u32,
    /// No centre is larger.
    pub(super) most: f32,
    pub(super) padding: u32,
}

impl Layout {
    /// For `planes` (keys, values or both) of blocks that are sealed as `sealed` says.
    pub(super) fn new(
        block: &BlockLayout,
        sealed: &FormatLayout,
        planes: &[Plane],
        centres: CentreTables,
    ) -> Self {
        let of = |f: &dyn Fn(Plane) -> usize| Plane::BOTH.map(f);
        let first = sealed.coded_layers(block).start;
        let rows = |plane| sealed.rows(block, first, plane);
        let bytes = sealed.layer_bytes();
        // Of layer 0, which may lie before the block: addresses wrap.
        let from_layer_0 = |at: usize, layer: usize| (at as u64).wrapping_sub((first * layer) as u64);
        let (codes_layer, scales_layer) = (bytes.codes.iter().sum(), bytes.scales.iter().sum());
        Layout {
            layers: block.layers as u32,
            kv_heads: block.kv_heads as u32,
            block_tokens: block.block_tokens as u32,
            element: match block.element {
                ElementType::F16 => 0,
                ElementType::Bf16 => 1,
                ElementType::F32 => 2,
            },
            dim: of(&|plane| block.dim(plane)).map(|n| n as u32),
            row_bytes: of(&|plane| block.row_bytes(plane)).map(|n| n as u32),
            code_bytes: of(&|plane| rows(plane).row_bytes()).map(|n| n as u32),
            element_bytes: block.element.bytes() as u32,
            scale_bytes: of(&|plane| rows(plane).scale_bytes()).map(|n| n as u32),
            first_plane: (2 * first + usize::from(planes == [Plane::Value])) as u32,
            plane_step: (3 - planes.len()) as u32,
            planes: (planes.len() * sealed.coded_layers(block).len()) as u32,
            plane_bytes: of(&|plane| block.plane_bytes(plane)).map(|n| n as u64),
            layer_bytes: block.layer_bytes() as u64,
            codes_at: of(&|plane| sealed.codes_at(block, first, plane))
                .map(|at| from_layer_0(at, codes_layer)),
            codes_layer: codes_layer as u64,
            scales_at: of(&|plane| sealed.scales_at(block, first, plane))
                .map(|at| from_layer_0(at, scales_layer)),
            scales_layer: scales_layer as u64,
            centres,
        }
    }
}

/// One append step.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Append {
    /// First token of the first layer, keys and values.
    pub(super) source: [u64; 2],
    pub(super) slot: u64,
    pub(super) flag: u64,
    /// Tokens from one layer to the next in the source.
    pub(super) source_tokens: u32,
    pub(super) first_layer: u32,
    pub(super) layers: u32,
    pub(super) first_token: u32,
    pub(super) tokens: u32,
    pub(super) padding: u32,
}

/// In the place of a block's number: the rest is the address of the positions of its tokens, a `u32` each, since they are those of no block of a
/// sequence that nothing was dropped from.
pub(super) const POSITIONS_PER_TOKEN: u64 = 1 << 63;

/// One seal or reopen step.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Convert {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) flag: u64,
    /// Which block of its sequence it is, or [`POSITIONS_PER_TOKEN`].
    pub(super) index: u64,
}

/// One read step.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Read {
    /// From where keys and values lie in it as the kernel expects.
    pub(super) slot: [u64; 2],
    /// Where the first token's keys and values go.
    pub(super) output: [u64; 2],
    pub(super) layer: u32,
    pub(super) first_token: u32,
    pub(super) tokens: u32,
    /// Bit 0: keys are raw; bit 1: values are.
    pub(super) raw: u32,
    /// Which block of its sequence it is, or [`POSITIONS_PER_TOKEN`].
    pub(super) index: u64,
}

/// One copy of bytes, or zeros if `from` is 0.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Move {
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) bytes: u64,
}
