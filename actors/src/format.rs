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
    /// 4 bits per element: the row is rotated (a seeded Hadamard transform), and each element becomes the nearest, or nearly, of the 16 values
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

    /// Whether rows are rotated, and have one factor each.
    pub const fn is_rotated(self) -> bool {
        matches!(self, Format::R4 | Format::R3 | Format::R2)
    }

    /// Whether keys with large constant channels (a bias on `k_proj`) lose accuracy in it unless they are stored as differences from mean keys:
    /// a constant has most of a row's scale, or all of its codes once it is rotated. Scales of channels know it.
    pub const fn wants_means(self) -> bool {
        !matches!(self, Format::Raw) && !self.is_grouped()
    }

    /// Bytes of the codes of a row of `dim` elements.
    pub const fn row_bytes(self, element: ElementType, dim: usize) -> usize {
        (dim * self.code_bits(element)).div_ceil(8)
    }
}

/// How a sealed block is stored: its keys, its values, and the layers at either end that stay raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockFormat {
    /// Of the keys.
    pub keys: Format,
    /// Of the values.
    pub values: Format,
    /// So many of the first layers are in the element type.
    pub raw_first_layers: u16,
    /// So many of the last ones too.
    pub raw_last_layers: u16,
}

impl From<Format> for BlockFormat {
    /// All of a block in one format.
    fn from(format: Format) -> Self {
        BlockFormat { keys: format, values: format, raw_first_layers: 0, raw_last_layers: 0 }
    }
}

impl PartialEq<Format> for BlockFormat {
    /// Whether all of a block is in this format.
    fn eq(&self, format: &Format) -> bool {
        *self == BlockFormat::from(*format)
    }
}

impl BlockFormat {
    /// All of a block in the element type: what it is before it is sealed.
    pub const RAW: BlockFormat =
        BlockFormat { keys: Format::Raw, values: Format::Raw, raw_first_layers: 0, raw_last_layers: 0 };

    /// Whether all of a block is in the element type.
    pub const fn is_raw(self) -> bool {
        matches!((self.keys, self.values), (Format::Raw, Format::Raw))
    }

    /// Whether keys and values are stored alike.
    const fn is_alike(self) -> bool {
        self.keys as u8 == self.values as u8
    }

    /// The format of the keys, or of the values, of a layer.
    pub const fn of(self, layout: &BlockLayout, layer: usize, plane: Plane) -> Format {
        let (first, last) = (self.raw_first_layers as usize, self.raw_last_layers as usize);
        match plane {
            _ if layer < first || layer + last >= layout.layers => Format::Raw,
            Plane::Key => self.keys,
            Plane::Value => self.values,
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

impl std::fmt::Display for BlockFormat {
    /// `int8`, or `r4/int4` for keys and values that differ, and then `+raw2:1` for two first layers and one last that stay raw.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let BlockFormat { keys, values, raw_first_layers, raw_last_layers } = self;
        write!(f, "{keys}")?;
        if values != keys {
            write!(f, "/{values}")?;
        }
        match (raw_first_layers, raw_last_layers) {
            (0, 0) => Ok(()),
            (first, last) => write!(f, "+raw{first}:{last}"),
        }
    }
}

impl std::str::FromStr for BlockFormat {
    type Err = String;

    /// As it is displayed.
    fn from_str(name: &str) -> Result<BlockFormat, String> {
        let (formats, raw) = name.split_once("+raw").unwrap_or((name, "0:0"));
        let (keys, values) = formats.split_once('/').unwrap_or((formats, formats));
        let layers = raw.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let (raw_first_layers, raw_last_layers) = layers
            .ok_or_else(|| format!("+raw{raw} is not of the kind +raw2:1, the first and the last layers"))?;
        Ok(BlockFormat { keys: keys.parse()?, values: values.parse()?, raw_first_layers, raw_last_layers })
    }
}

/// How a cache stores blocks that are not raw: as what they are sealed, and to what they are re-encoded, step by step, when memory runs short.
///
/// A block's rung says what it has been through since it was sealed: it was encoded as each format down to its own, one from the other. What is
/// decoded to be written to is a new block, and its sequence's alone: it keeps the [`History`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ladder {
    formats: [BlockFormat; Self::RUNGS_MAX],
    rungs: u8,
}

impl Ladder {
    /// The format of sealing, and at most two below it.
    pub const RUNGS_MAX: usize = 3;

    /// Sealed in the first of these, re-encoded to the others. None for no formats, or more than [`Ladder::RUNGS_MAX`].
    pub fn new(of: &[BlockFormat]) -> Option<Ladder> {
        let mut formats = [BlockFormat::RAW; Self::RUNGS_MAX];
        formats.get_mut(..of.len())?.copy_from_slice(of);
        (!of.is_empty()).then_some(Ladder { formats, rungs: of.len() as u8 })
    }

    /// As what blocks are sealed.
    pub fn sealed(&self) -> BlockFormat {
        self.formats[0]
    }

    /// All of them, the largest first.
    pub fn formats(&self) -> &[BlockFormat] {
        &self.formats[..usize::from(self.rungs)]
    }

    /// The format of a rung; the lowest, for those that are not there.
    pub fn rung(&self, rung: u8) -> BlockFormat {
        self.formats[usize::from(rung.min(self.rungs - 1))]
    }
}

impl<T: Into<BlockFormat>> From<T> for Ladder {
    /// Sealed, and never re-encoded.
    fn from(format: T) -> Ladder {
        Ladder { formats: [format.into(), BlockFormat::RAW, BlockFormat::RAW], rungs: 1 }
    }
}

/// What the tokens of a block have been stored in so far: what they have lost.
///
/// Nothing is regained by decoding. So a copy that was decoded to be written to has the history of what it was decoded from, and what it is
/// sealed and re-encoded to comes on top; a format that comes again is told once. Tokens that were appended to such a copy have been through
/// less than the block says.
#[derive(Debug, Clone, Copy)]
pub struct History {
    ladder: Ladder,
    rungs: u8,
}

impl PartialEq for History {
    /// Whether the formats are the same.
    fn eq(&self, other: &Self) -> bool {
        self.formats() == other.formats()
    }
}

impl Eq for History {}

impl Default for History {
    /// Of what has never been anything but raw.
    fn default() -> Self {
        History::new(BlockFormat::RAW.into(), 0)
    }
}

impl History {
    /// The first `rungs` formats of `ladder`, which is none that seals in `raw`.
    pub(crate) fn new(ladder: Ladder, rungs: u8) -> Self {
        History { ladder, rungs: if ladder.sealed().is_raw() { 0 } else { rungs.min(ladder.rungs) } }
    }

    /// Of what has been in these formats, one after the other. None for more than [`Ladder::RUNGS_MAX`], or if `raw` is among them.
    pub fn of(formats: &[BlockFormat]) -> Option<History> {
        match Ladder::new(formats) {
            None if formats.is_empty() => Some(History::default()),
            ladder => ladder
                .filter(|ladder| ladder.formats().iter().all(|format| !format.is_raw()))
                .map(|ladder| History { ladder, rungs: ladder.rungs }),
        }
    }

    /// The formats, one after the other: the least is the last. None for what has never been anything but raw.
    pub fn formats(&self) -> &[BlockFormat] {
        &self.ladder.formats()[..usize::from(self.rungs)]
    }

    /// Whether all is as it was written: no token was ever stored in a format that loses something.
    pub fn is_exact(&self) -> bool {
        self.rungs == 0
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

    /// What is coded of rows whose centres are taken off: the rotated formats take differences as they are, in f32, others rounded to the
    /// element type. Codes and scales are as many bytes.
    pub const fn of_differences(self) -> RowFormat {
        RowFormat { element: if self.format.is_rotated() { ElementType::F32 } else { self.element }, ..self }
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

/// Full blocks of a sequence that attention looks at most: they are never sealed, or re-encoded last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeepRaw {
    /// So many at the beginning, with the tokens that attention falls back on (sinks).
    pub sinks: u32,
    /// So many at the beginning are not re-encoded, if they are sealed.
    pub sinks_as_sealed: u32,
    /// So many at the end, behind the block that is being filled. They are sealed when the sequence has grown past them, or nobody
    /// has them open any more.
    pub window_blocks: usize,
    /// So many at the end are re-encoded to each rung below the first only when no other block can make room.
    pub recent_blocks: [usize; Ladder::RUNGS_MAX - 1],
}

/// Where a block of one format keeps its rows and scales.
///
/// What stays raw comes first, then the codes, both in the raw order `[layer][K|V][kv_head][token]` of rows; then all scales in the
/// same order, beginning at a multiple of 4 bytes.
#[derive(Debug, Clone, Copy)]
pub struct FormatLayout {
    format: BlockFormat,
    /// Of a layer that is not raw as a whole.
    layer: LayerBytes,
    /// Where the codes begin.
    pub codes_offset: usize,
    /// Where the scales begin.
    pub scales_offset: usize,
    /// All bytes of the block.
    pub total_bytes: usize,
}

/// Bytes of a layer that is not raw as a whole, by plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerBytes {
    /// Of planes that are raw all the same.
    pub raw: [usize; 2],
    /// Of codes.
    pub codes: [usize; 2],
    /// Of scales; multiples of 4 where keys and values have formats of their own.
    pub scales: [usize; 2],
}

impl LayerBytes {
    const fn new(format: BlockFormat, layout: &BlockLayout) -> Self {
        let rows = layout.rows_per_plane();
        let [mut raw, mut codes, mut scales] = [[0; 2]; 3];
        let mut plane = 0;
        while plane < 2 {
            let of = RowFormat::new([format.keys, format.values][plane], layout, Plane::BOTH[plane]);
            match of.format {
                Format::Raw => raw[plane] = rows * of.row_bytes(),
                _ => (codes[plane], scales[plane]) = (rows * of.row_bytes(), of.scales_bytes(rows)),
            }
            if !format.is_alike() {
                // Scales of one width leave those of another where they may begin.
                scales[plane] = scales[plane].next_multiple_of(4);
            }
            plane += 1;
        }
        LayerBytes { raw, codes, scales }
    }
}

impl FormatLayout {
    /// The layout of blocks of `format`.
    pub const fn new(format: BlockFormat, layout: &BlockLayout) -> Self {
        let layer = LayerBytes::new(format, layout);
        let mut place = FormatLayout { format, layer, codes_offset: 0, scales_offset: 0, total_bytes: 0 };
        let LayerBytes { raw, codes, scales } = layer;
        let coded = place.coded_layers(layout);
        let coded = coded.end - coded.start;
        place.codes_offset = (layout.layers - coded) * layout.layer_bytes() + coded * (raw[0] + raw[1]);
        let codes_end = place.codes_offset + coded * (codes[0] + codes[1]);
        let scales = coded * (scales[0] + scales[1]);
        place.scales_offset = if scales == 0 { codes_end } else { codes_end.next_multiple_of(4) };
        place.total_bytes = place.scales_offset + scales;
        place
    }

    /// What the block is stored in.
    pub const fn format(&self) -> BlockFormat {
        self.format
    }

    /// The layers that are not raw as a whole.
    pub const fn coded_layers(&self, layout: &BlockLayout) -> Range<usize> {
        let first = self.format.raw_first_layers as usize;
        let end = layout.layers.saturating_sub(self.format.raw_last_layers as usize);
        if first < end { first..end } else { end..end }
    }

    /// Bytes of one of [these](Self::coded_layers).
    pub const fn layer_bytes(&self) -> LayerBytes {
        self.layer
    }

    /// How rows of keys or of values of a layer are stored.
    pub const fn rows(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> RowFormat {
        RowFormat::new(self.format.of(layout, layer, plane), layout, plane)
    }

    /// Where the codes (or elements that stay raw) of one plane of one layer begin.
    pub const fn codes_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        let coded = self.coded_layers(layout);
        let LayerBytes { raw, codes, .. } = self.layer;
        let before = if layer < coded.start {
            0
        } else if layer < coded.end {
            layer - coded.start
        } else {
            coded.end - coded.start
        };
        let is_value = matches!(plane, Plane::Value);
        match self.format.of(layout, layer, plane) {
            Format::Raw => {
                let keys = match self.format.of(layout, layer, Plane::Key) {
                    Format::Raw if is_value => layout.plane_bytes(Plane::Key),
                    _ => 0,
                };
                (layer - before) * layout.layer_bytes() + before * (raw[0] + raw[1]) + keys
            }
            _ => {
                let keys = if is_value { codes[0] } else { 0 };
                self.codes_offset + before * (codes[0] + codes[1]) + keys
            }
        }
    }

    /// Where the scales of one plane of one layer begin, if it has any.
    pub const fn scales_at(&self, layout: &BlockLayout, layer: usize, plane: Plane) -> usize {
        let scales = self.layer.scales;
        match self.format.of(layout, layer, plane) {
            Format::Raw => self.scales_offset,
            _ => {
                let before = layer - self.coded_layers(layout).start;
                let keys = if matches!(plane, Plane::Value) { scales[0] } else { 0 };
                self.scales_offset + before * (scales[0] + scales[1]) + keys
            }
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
        let of = self.rows(layout, layer, plane);
        let (codes, row) = (self.codes_at(layout, layer, plane), of.row_bytes());
        let (scales, scale) = (self.scales_at(layout, layer, plane), of.scale_bytes());
        let groups = rows.start / of.scale_rows()..rows.end.div_ceil(of.scale_rows());
        (
            codes + rows.start * row..codes + rows.end * row,
            scales + groups.start * scale..scales + groups.end * scale,
        )
    }

    /// What a block keeps in the element type: `(where in a raw block, where in this one, bytes)` of runs that are contiguous in both.
    pub fn raw_runs(&self, layout: &BlockLayout) -> impl Iterator<Item = (usize, usize, usize)> {
        let planes = (0..layout.layers).flat_map(|layer| Plane::BOTH.map(|plane| (layer, plane)));
        let (place, layout) = (*self, *layout);
        let mut runs = planes
            .filter(move |&(layer, plane)| place.format.of(&layout, layer, plane) == Format::Raw)
            .map(move |(layer, plane)| {
                let from = layout.plane_offset(layer, plane);
                (from, place.codes_at(&layout, layer, plane), layout.plane_bytes(plane))
            })
            .peekable();
        std::iter::from_fn(move || {
            let (from, to, mut bytes) = runs.next()?;
            while let Some((_, _, more)) = runs.next_if(|next| next.0 == from + bytes && next.1 == to + bytes)
            {
                bytes += more;
            }
            Some((from, to, bytes))
        })
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

    /// Every pair of formats, with and without raw layers at the ends.
    fn block_formats() -> impl Iterator<Item = BlockFormat> {
        let pairs = Format::ALL.into_iter().flat_map(|keys| Format::ALL.map(|values| (keys, values)));
        pairs.flat_map(|(keys, values)| {
            [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)].map(|(raw_first_layers, raw_last_layers)| BlockFormat {
                keys,
                values,
                raw_first_layers,
                raw_last_layers,
            })
        })
    }

    /// No byte of a block belongs to two rows, and none is left over but for the alignment of the scales.
    #[test]
    fn rows_and_scales_tile_a_block() {
        for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
            for (key_dim, value_dim, block_tokens) in [(64, 64, 32), (128, 80, 32), (7, 5, 32), (7, 5, 5)] {
                // An odd number of rows of 5 tokens.
                let kv_heads = if block_tokens == 5 { 3 } else { 2 };
                let layout = BlockLayout { block_tokens, kv_heads, ..layout(element, key_dim, value_dim) };
                // Keys share their scales by 32 tokens in grouped formats.
                for format in block_formats().filter(|of| block_tokens == 32 || !of.keys.is_grouped()) {
                    let place = FormatLayout::new(format, &layout);
                    let planes = (0..3).flat_map(|layer| Plane::BOTH.map(|plane| (layer, plane)));
                    let rows = 0..layout.rows_per_plane();
                    let (mut raw, mut codes, mut scales) = (0, place.codes_offset, place.scales_offset);
                    for (layer, plane) in planes {
                        let (of_codes, of_scales) = place.places(&layout, layer, plane, &rows);
                        if format.of(&layout, layer, plane) == Format::Raw {
                            assert_eq!((of_codes.start, of_scales.len()), (raw, 0), "{format} {layer}");
                            raw = of_codes.end;
                        } else {
                            let alike = format.keys == format.values;
                            let begin = if alike { scales } else { scales.next_multiple_of(4) };
                            assert_eq!((of_codes.start, of_scales.start), (codes, begin), "{format} {layer}");
                            (codes, scales) = (of_codes.end, of_scales.end);
                        }
                    }
                    assert_eq!(raw, place.codes_offset, "{format}");
                    assert!(place.scales_offset - codes < 4, "{format}");
                    assert!(place.total_bytes - scales < 4, "{format}");
                    let runs = place.raw_runs(&layout).collect::<Vec<_>>();
                    assert_eq!(runs.iter().map(|run| run.2).sum::<usize>(), place.codes_offset, "{format}");
                    if format.is_raw() {
                        assert_eq!(runs, [(0, 0, layout.raw_bytes())]);
                        assert_eq!(place.total_bytes, layout.raw_bytes());
                    }
                }
            }
        }
    }

    #[test]
    fn names_tell_what_differs() {
        assert_eq!(BlockFormat::from(Format::Int8).to_string(), "int8");
        let mixed = BlockFormat { values: Format::Int4, raw_first_layers: 2, ..Format::R4.into() };
        assert_eq!(mixed.to_string(), "r4/int4+raw2:0");
        for format in block_formats() {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        for wrong in ["", "int8/", "int7/int8", "int8+raw", "int8+raw2", "int8+raw-1:2", "int8+raw70000:1"] {
            assert!(wrong.parse::<BlockFormat>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn bits_per_element_are_those_of_codes_and_scales() {
        let bits = |format: Format, element, dim| {
            BlockFormat::from(format).bits_per_element(&layout(element, dim, dim))
        };
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
