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
    /// Addresses of the layer's keys, and of its values.
    pub(crate) rows: [Vec<u64>; 2],
    /// Addresses of their scales; 0 for what is `raw`.
    pub(crate) scales: [Vec<u64>; 2],
    pub(crate) formats: [Vec<u8>; 2],
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
            rows: [0; 2].map(|zero| vec![zero; places]),
            scales: [0; 2].map(|zero| vec![zero; places]),
            formats: [Format::Raw; 2].map(|raw| vec![number(raw); places]),
            lengths: Vec::with_capacity(rows),
            dropped: Vec::with_capacity(2 * rows),
        };
        for (row, sequence) in table.sequences.iter().enumerate() {
            columns.lengths.push(sequence.tokens);
            columns.dropped.extend([sequence.dropped.start, sequence.dropped.end]);
            for block in &sequence.blocks {
                let place = row * max_blocks + block.first_token as usize / layout.block_tokens;
                let stored = FormatLayout::new(block.format, layout);
                for (at, plane) in Plane::BOTH.into_iter().enumerate() {
                    let format = block.format.of(layout, layer, plane);
                    let slot = block.address - (block.keys_offset_bytes - block.slot_offset_bytes) as u64;
                    columns.rows[at][place] = slot + stored.codes_at(layout, layer, plane) as u64;
                    columns.formats[at][place] = number(format);
                    if format != Format::Raw {
                        columns.scales[at][place] = slot + stored.scales_at(layout, layer, plane) as u64;
                    }
                }
            }
        }
        columns
    }
}
