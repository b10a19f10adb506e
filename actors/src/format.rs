//! Storage formats of sealed blocks: their names and where their bytes lie. The arithmetic lives in the backends.

use serde::{Deserialize, Serialize};

use crate::geometry::{BlockLayout, Plane};

/// How a sealed block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// In the element type, as given. Sealing moves no bytes.
    Raw,
    /// One signed byte per element and one scale per (token, head): `s = max|x| / 127`, `q = round(x / s)`.
    ///
    /// Keys with large constant channels (a bias on `k_proj`, as in Qwen2) lose accuracy under per-token scales.
    Int8,
}

impl Format {
    /// Short stable name, as in configuration files and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Int8 => "int8",
        }
    }

    /// Bytes of one sealed block before slot alignment.
    pub const fn block_bytes(self, layout: &BlockLayout) -> usize {
        match self {
            Format::Raw => layout.raw_bytes(),
            Format::Int8 => Int8Layout::new(layout).total_bytes,
        }
    }

    /// Average stored bits per element.
    pub fn bits_per_element(self, layout: &BlockLayout) -> f64 {
        let elements = layout.raw_bytes() / layout.element.bytes();
        self.block_bytes(layout) as f64 * 8.0 / elements as f64
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Where an `int8` block keeps its codes and scales.
///
/// Codes first, in the raw order with one byte an element; then all scales, `[layer][K|V][kv_head][token]`,
/// beginning at a multiple of 4 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Int8Layout {
    /// Where the scales begin.
    pub scales_offset: usize,
    /// All bytes of the block.
    pub total_bytes: usize,
}

impl Int8Layout {
    /// The layout for blocks of `layout`.
    pub const fn new(layout: &BlockLayout) -> Self {
        let codes = layout.raw_bytes() / layout.element.bytes();
        let scales_offset = codes.next_multiple_of(4);
        Self { scales_offset, total_bytes: scales_offset + layout.rows() * layout.element.scale_bytes() }
    }

    /// Where the codes of one plane of one layer begin.
    pub const fn codes_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        layout.plane_offset(layer, plane) / layout.element.bytes()
    }

    /// Where the scales of one plane of one layer begin.
    pub const fn scales_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        let plane_index = match plane {
            Plane::Key => 2 * layer,
            Plane::Value => 2 * layer + 1,
        };
        self.scales_offset + plane_index * layout.rows_per_plane() * layout.element.scale_bytes()
    }
}
