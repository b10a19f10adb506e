//! A block table as arrays: what kernels take, whoever carries it to their memory.

use kv_cache_actors::format::FormatLayout;
use kv_cache_actors::geometry::{BlockLayout, Plane};

use crate::Format;
use crate::view::BlockTable;

/// A format's number in `formats`: its place in [`Format::ALL`].
pub(crate) fn number(format: Format) -> u8 {
    Format::ALL.iter().position(|known| *known == format).unwrap_or_default() as u8
}

/// Arrays of a table: `[sequences, max_blocks]` unless said otherwise, 0 where there is no block.
#[derive(Debug)]
pub(crate) struct Columns {
    pub(crate) max_blocks: usize,
    /// Addresses of the layer's keys.
    pub(crate) keys: Vec<u64>,
    /// Addresses of the scales of the layer's keys; 0 for `raw` blocks.
    pub(crate) scales: Vec<u64>,
    pub(crate) formats: Vec<u8>,
    /// `[sequences]`.
    pub(crate) lengths: Vec<u32>,
    /// `[sequences, 2]`: first dropped token, and the first one behind it that is there.
    pub(crate) dropped: Vec<u32>,
}

impl Columns {
    pub(crate) fn new(layout: &BlockLayout, layer: usize, table: &BlockTable) -> Columns {
        let rows = table.sequences.len();
        let blocks = table.sequences.iter().map(|row| layout.blocks_for(row.tokens as usize)).max();
        let max_blocks = blocks.unwrap_or_default().max(1);
        let places = rows * max_blocks;
        let mut columns = Columns {
            max_blocks,
            keys: vec![0; places],
            scales: vec![0; places],
            formats: vec![number(Format::Raw); places],
            lengths: Vec::with_capacity(rows),
            dropped: Vec::with_capacity(2 * rows),
        };
        for (row, sequence) in table.sequences.iter().enumerate() {
            columns.lengths.push(sequence.tokens);
            columns.dropped.extend([sequence.dropped.start, sequence.dropped.end]);
            for block in &sequence.blocks {
                let place = row * max_blocks + block.first_token as usize / layout.block_tokens;
                columns.keys[place] = block.address;
                columns.formats[place] = number(block.format);
                if block.format != Format::Raw {
                    let sealed = FormatLayout::new(block.format, layout);
                    // Scales stand behind all codes of all layers.
                    let behind = sealed.scales_at(layout, layer, Plane::Key)
                        - sealed.codes_at(layout, layer, Plane::Key);
                    columns.scales[place] = block.address + behind as u64;
                }
            }
        }
        columns
    }
}
