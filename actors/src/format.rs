//! Storage formats of sealed blocks: their names and where their bytes lie. The arithmetic lives in the backends.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::geometry::{BlockLayout, ElementType, Plane};

/// How a sealed block is stored.
///
/// All but `raw` keep a row, the elements of one (token, head), as codes of a fixed width. Scales stand apart: one a row, but for
/// `int4` and `int2`, where [`RowFormat`] says whose they are. Any rows of a block can be decoded by themselves. The arithmetic is
/// that of `kv_cache::codec`.
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
    /// 4 bits per element between the least and the largest of a group of [`GROUP`]: in keys the elements of one channel of as many
    /// tokens, in values as many neighbours in a row (KIVI: Liu et al. 2024, arXiv 2402.02750). Blocks hold whole groups of tokens.
    ///
    /// Keys with large constant channels do not harm it: what is constant is the group's least element.
    Int4,
    /// As `int4`, in 2 bits. Coarse: measure your model before you choose it.
    Int2,
}

/// Elements that share a scale in `int4` and `int2`, at most.
pub const GROUP: usize = 32;

impl Format {
    /// Every format.
    pub const ALL: [Format; 8] = [
        Format::Raw,
        Format::Int8,
        Format::Fp8,
        Format::R4,
        Format::R3,
        Format::R2,
        Format::Int4,
        Format::Int2,
    ];

    /// Short stable name, as in configuration files and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Int8 => "int8",
            Format::Fp8 => "fp8",
            Format::R4 => "r4",
            Format::R3 => "r3",
            Format::R2 => "r2",
            Format::Int4 => "int4",
            Format::Int2 => "int2",
        }
    }

    /// Bits of one element's code; those of the element itself for `raw`.
    pub const fn code_bits(self, element: ElementType) -> usize {
        match self {
            Format::Raw => 8 * element.bytes(),
            Format::Int8 | Format::Fp8 => 8,
            Format::R4 | Format::Int4 => 4,
            Format::R3 => 3,
            Format::R2 | Format::Int2 => 2,
        }
    }

    /// Whether scales are those of groups of [`GROUP`] elements, which in keys span as many tokens.
    pub const fn is_grouped(self) -> bool {
        matches!(self, Format::Int4 | Format::Int2)
    }

    /// Bytes of the codes of a row of `dim` elements.
    pub const fn row_bytes(self, element: ElementType, dim: usize) -> usize {
        (dim * self.code_bits(element)).div_ceil(8)
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

/// How the rows of one plane are stored: keys or values of some dim, in a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowFormat {
    /// The format.
    pub format: Format,
    /// The type of what is decoded.
    pub element: ElementType,
    /// Keys or values: `int4` and `int2` group them differently.
    pub plane: Plane,
    /// Elements of a row.
    pub dim: usize,
}

impl RowFormat {
    /// Rows of `plane` in blocks of `layout` that are stored in `format`.
    pub const fn new(format: Format, layout: &BlockLayout, plane: Plane) -> RowFormat {
        RowFormat { format, element: layout.element, plane, dim: layout.dim(plane) }
    }

    /// Bytes of the codes of a row.
    pub const fn row_bytes(self) -> usize {
        self.format.row_bytes(self.element, self.dim)
    }

    /// Rows that share their scales: [`GROUP`] tokens of a head for keys in `int4` and `int2`, else 1.
    pub const fn scale_rows(self) -> usize {
        match self.plane {
            Plane::Key if self.format.is_grouped() => GROUP,
            _ => 1,
        }
    }

    /// Bytes of the scales of [`RowFormat::scale_rows`] rows; none for `raw`.
    ///
    /// For `int4` and `int2` these are the least elements of all groups and then their steps, in the element type: a group is a
    /// channel of the keys, [`GROUP`] neighbours (the last group may have fewer) of a row of values.
    pub const fn scale_bytes(self) -> usize {
        match self.format {
            Format::Raw => 0,
            Format::Int8 | Format::Fp8 => self.element.scale_bytes(),
            Format::R4 | Format::R3 | Format::R2 => 2,
            Format::Int4 | Format::Int2 => 2 * self.groups() * self.element.bytes(),
        }
    }

    /// Groups of `int4` and `int2` in [`RowFormat::scale_rows`] rows.
    pub const fn groups(self) -> usize {
        match self.plane {
            Plane::Key => self.dim,
            Plane::Value => self.dim.div_ceil(GROUP),
        }
    }

    /// Bytes of the scales of `rows` rows that begin with those of a group.
    pub const fn scales_bytes(self, rows: usize) -> usize {
        rows.div_ceil(self.scale_rows()) * self.scale_bytes()
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
    keys: RowFormat,
    values: RowFormat,
    /// Where the scales begin.
    pub scales_offset: usize,
    /// All bytes of the block.
    pub total_bytes: usize,
}

impl FormatLayout {
    /// The layout of blocks of `format`.
    pub const fn new(format: Format, layout: &BlockLayout) -> Self {
        let keys = RowFormat::new(format, layout, Plane::Key);
        let values = RowFormat::new(format, layout, Plane::Value);
        let rows = layout.rows_per_plane();
        let codes = layout.layers * rows * (keys.row_bytes() + values.row_bytes());
        let scales = layout.layers * (keys.scales_bytes(rows) + values.scales_bytes(rows));
        let scales_offset = if scales == 0 { codes } else { codes.next_multiple_of(4) };
        Self { keys, values, scales_offset, total_bytes: scales_offset + scales }
    }

    /// How rows of keys or of values are stored.
    pub const fn rows(&self, plane: Plane) -> RowFormat {
        match plane {
            Plane::Key => self.keys,
            Plane::Value => self.values,
        }
    }

    /// Where the codes of one plane of one layer begin.
    pub const fn codes_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        let keys = layout.rows_per_plane() * self.keys.row_bytes();
        let values = layout.rows_per_plane() * self.values.row_bytes();
        layer * (keys + values)
            + match plane {
                Plane::Key => 0,
                Plane::Value => keys,
            }
    }

    /// Where the scales of one plane of one layer begin.
    pub const fn scales_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        let keys = self.keys.scales_bytes(layout.rows_per_plane());
        let values = self.values.scales_bytes(layout.rows_per_plane());
        self.scales_offset
            + layer * (keys + values)
            + match plane {
                Plane::Key => 0,
                Plane::Value => keys,
            }
    }

    /// Where the codes of some rows of a plane lie, and where the scales of all groups that they are in.
    pub const fn places(
        &self,
        layout: &BlockLayout,
        layer: usize,
        plane: Plane,
        rows: &Range<usize>,
    ) -> (Range<usize>, Range<usize>) {
        let of = self.rows(plane);
        let (codes, row) = (self.codes_at(layout, layer, plane), of.row_bytes());
        let (scales, scale) = (self.scales_at(layout, layer, plane), of.scale_bytes());
        let groups = rows.start / of.scale_rows()..rows.end.div_ceil(of.scale_rows());
        (
            codes + rows.start * row..codes + rows.end * row,
            scales + groups.start * scale..scales + groups.end * scale,
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
        assert_eq!(bits(Format::Int4, ElementType::F16, 64), 5.0);
        assert_eq!(bits(Format::Int2, ElementType::Bf16, 128), 3.0);
    }
}
