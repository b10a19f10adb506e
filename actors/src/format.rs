//! Storage formats of sealed blocks: their names and where their bytes lie. The arithmetic lives in the backends.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::geometry::{BlockLayout, ElementType, Plane};

/// How a sealed block is stored.
///
/// All but `raw` keep a row, the elements of one (token, head), as codes of a fixed width and one scale, so any rows of a block can
/// be decoded by themselves. The arithmetic is that of
/// `kv_cache::codec`.
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
    /// One e4m3 float per element and one scale per (token, head), `s = max|x| / 448`. Coarser than `int8` in the middle of a row's
    /// range and finer near zero; the same warning holds.
    Fp8,
    /// 4 bits per element: the row is rotated (a seeded Hadamard transform), and each element becomes the nearest of the 16 values
    /// that suit a normal distribution best. One factor per (token, head).
    ///
    /// **Useless for keys with large constant channels** (a bias on `k_proj`): without centring, the constant takes all the codes.
    R4,
    /// As `r4`, with 8 values in 3 bits.
    R3,
    /// As `r4`, with 4 values in 2 bits.
    R2,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 6] = [Format::Raw, Format::Int8, Format::Fp8, Format::R4, Format::R3, Format::R2];

    /// Short stable name, as in configuration files and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Int8 => "int8",
            Format::Fp8 => "fp8",
            Format::R4 => "r4",
            Format::R3 => "r3",
            Format::R2 => "r2",
        }
    }

    /// Bits of one element's code; those of the element itself for `raw`.
    pub const fn code_bits(self, element: ElementType) -> usize {
        match self {
            Format::Raw => 8 * element.bytes(),
            Format::Int8 | Format::Fp8 => 8,
            Format::R4 => 4,
            Format::R3 => 3,
            Format::R2 => 2,
        }
    }

    /// Bytes of the codes of a row of `dim` elements.
    pub const fn row_bytes(self, element: ElementType, dim: usize) -> usize {
        (dim * self.code_bits(element)).div_ceil(8)
    }

    /// Bytes of a row's scale; none for `raw`.
    pub const fn scale_bytes(self, element: ElementType) -> usize {
        match self {
            Format::Raw => 0,
            Format::Int8 | Format::Fp8 => element.scale_bytes(),
            Format::R4 | Format::R3 | Format::R2 => 2,
        }
    }

    /// Bytes of one block before slot alignment.
    pub const fn block_bytes(self, layout: &BlockLayout) -> usize {
        FormatLayout::new(self, layout).total_bytes
    }

    /// Average stored bits per element.
    pub fn bits_per_element(self, layout: &BlockLayout) -> f64 {
        let elements = layout.raw_bytes() / layout.element.bytes();
        self.block_bytes(layout) as f64 * 8.0 / elements as f64
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    /// By [`Format::name`].
    fn from_str(name: &str) -> Result<Format, String> {
        let known = || Format::ALL.map(Format::name).join(", ");
        let found = Format::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| format!("there is no format {name}; there are {}", known()))
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Full blocks of a sequence that stay raw in a lossy format, since attention looks at them most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeepRaw {
    /// The first block, with the tokens that attention falls back on (sinks).
    pub sinks: bool,
    /// So many at the end, behind the block that is being filled. They are sealed when the sequence has grown past them, or nobody
    /// has them open any more.
    pub window_blocks: usize,
}

/// Where a block of one format keeps its rows and scales.
///
/// Codes first, in the raw order `[layer][K|V][kv_head][token]` of rows; then all scales in the same order, beginning at a multiple
/// of 4 bytes.
#[derive(Debug, Clone, Copy)]
pub struct FormatLayout {
    format: Format,
    /// Where the scales begin.
    pub scales_offset: usize,
    /// All bytes of the block.
    pub total_bytes: usize,
}

impl FormatLayout {
    /// The layout of blocks of `format`.
    pub const fn new(format: Format, layout: &BlockLayout) -> Self {
        let rows = layout.layers * layout.rows_per_plane();
        let row = format.row_bytes(layout.element, layout.key_dim)
            + format.row_bytes(layout.element, layout.value_dim);
        let scales = layout.rows() * format.scale_bytes(layout.element);
        let scales_offset = if scales == 0 { rows * row } else { (rows * row).next_multiple_of(4) };
        Self { format, scales_offset, total_bytes: scales_offset + scales }
    }

    /// Bytes of the codes of a row.
    pub const fn row_bytes(&self, layout: &BlockLayout, plane: Plane) -> usize {
        self.format.row_bytes(layout.element, layout.dim(plane))
    }

    /// Where the codes of one plane of one layer begin.
    pub const fn codes_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        let keys = layout.rows_per_plane() * self.row_bytes(layout, Plane::Key);
        let values = layout.rows_per_plane() * self.row_bytes(layout, Plane::Value);
        layer * (keys + values)
            + match plane {
                Plane::Key => 0,
                Plane::Value => keys,
            }
    }

    /// Where the scales of one plane of one layer begin.
    pub const fn scales_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        let plane_index = match plane {
            Plane::Key => 2 * layer,
            Plane::Value => 2 * layer + 1,
        };
        self.scales_offset + plane_index * layout.rows_per_plane() * self.format.scale_bytes(layout.element)
    }

    /// Where the codes, and where the scales, of some rows of a plane lie.
    pub const fn places(
        &self,
        layout: &BlockLayout,
        layer: usize,
        plane: Plane,
        rows: &Range<usize>,
    ) -> (Range<usize>, Range<usize>) {
        let (codes, row) = (self.codes_at(layout, layer, plane), self.row_bytes(layout, plane));
        let (scales, scale) = (self.scales_at(layout, layer, plane), self.format.scale_bytes(layout.element));
        (
            codes + rows.start * row..codes + rows.end * row,
            scales + rows.start * scale..scales + rows.end * scale,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;

    fn layout(element: ElementType, key_dim: u32, value_dim: u32) -> BlockLayout {
        let mut geometry = Geometry::new(3, 2, key_dim, element).block_tokens(32);
        geometry.groups[0].value_dim = value_dim;
        geometry.layout().unwrap()
    }

    /// No byte of a block belongs to two rows, and none is left over but for the alignment of the scales.
    #[test]
    fn rows_and_scales_tile_a_block() {
        for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
            for (key_dim, value_dim) in [(64, 64), (128, 80), (7, 5)] {
                let layout = layout(element, key_dim, value_dim);
                for format in Format::ALL {
                    let place = FormatLayout::new(format, &layout);
                    let planes = (0..3).flat_map(|layer| Plane::BOTH.map(|plane| (layer, plane)));
                    let rows = 0..layout.rows_per_plane();
                    let (mut codes, mut scales) = (0, place.scales_offset);
                    for (layer, plane) in planes {
                        let (of_codes, of_scales) = place.places(&layout, layer, plane, &rows);
                        assert_eq!((of_codes.start, of_scales.start), (codes, scales), "{format} {layer}");
                        (codes, scales) = (of_codes.end, of_scales.end);
                    }
                    assert!(place.scales_offset - codes < 4, "{format}");
                    assert_eq!(place.total_bytes, scales, "{format}");
                }
                assert_eq!(Format::Raw.block_bytes(&layout), layout.raw_bytes());
            }
        }
    }

    #[test]
    fn bits_per_element_are_those_of_codes_and_scales() {
        let bits = |format: Format, element, dim| format.bits_per_element(&layout(element, dim, dim));
        assert_eq!(bits(Format::Raw, ElementType::F16, 128), 16.0);
        assert_eq!(bits(Format::Int8, ElementType::F16, 128), 8.125);
        assert_eq!(bits(Format::Int8, ElementType::Bf16, 128), 8.25);
        assert_eq!(bits(Format::R4, ElementType::Bf16, 64), 4.25);
        assert_eq!(bits(Format::R3, ElementType::F16, 128), 3.125);
        assert_eq!(bits(Format::R2, ElementType::F16, 64), 2.25);
    }
}
