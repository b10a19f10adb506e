//! Block tables in a GPU's memory: what a paged attention kernel of somebody else needs to read the cache in place.
//!
#![doc = include_str!("table.md")]

use std::sync::{Arc, Mutex, PoisonError};

use kv_cache_actors::format::{BlockFormat, RowFormat};
use kv_cache_actors::geometry::{BlockLayout, Plane};

use super::Slab;
use super::driver::{DeviceMemory, DriverError, Gpu, Stream};
use crate::backend::Memory;
use crate::columns::Columns;
use crate::view::BlockTable;
use crate::{Cache, Error, Format, Sequence};

/// Arrays begin at multiples of this.
const ALIGN_BYTES: usize = 16;
/// Buffers are powers of two from here on: a table of a few thousand blocks.
const BUFFER_BYTES_MIN: usize = 64 << 10;
/// Buffers kept for later tables: one for each layer of a deep model.
const SPARE_BUFFERS_MAX: usize = 128;

/// Distances in bytes inside one layer of a block, for kernels. The same for every block of a format.
///
/// `values_bytes` and `layer_bytes` are those of blocks that are in one format as a whole: where keys and values have formats of their own, or
/// some layers stay raw, take the addresses of values, and a table for each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockStrides {
    /// From a head's key of a token to that of the next token.
    pub key_token_bytes: u64,
    /// From a head's keys to those of the next head.
    pub key_head_bytes: u64,
    /// From the keys of the layer to its values.
    pub values_bytes: u64,
    /// From a head's value of a token to that of the next token.
    pub value_token_bytes: u64,
    /// From a head's values to those of the next head.
    pub value_head_bytes: u64,
    /// From the keys of a layer to those of the next layer: one table serves all layers, as far as tokens are committed.
    pub layer_bytes: u64,
}

impl BlockStrides {
    /// For rows of `key` and `value` bytes.
    fn new(layout: &BlockLayout, key: usize, value: usize) -> Self {
        Self::grouped(layout, (key, 1), (value, 1))
    }

    /// For `bytes` that so many tokens have in common.
    fn grouped(layout: &BlockLayout, key: (usize, usize), value: (usize, usize)) -> Self {
        let of_head = |(bytes, tokens): (usize, usize)| (layout.block_tokens / tokens * bytes) as u64;
        let (keys, values, heads) = (of_head(key), of_head(value), layout.kv_heads as u64);
        BlockStrides {
            key_token_bytes: key.0 as u64,
            key_head_bytes: keys,
            values_bytes: heads * keys,
            value_token_bytes: value.0 as u64,
            value_head_bytes: values,
            layer_bytes: heads * (keys + values),
        }
    }
}

/// Where one layer of some sequences lies, in the memory of the GPU that holds them. See the layout in [`kv_cache::cuda`](crate::cuda).
///
/// The blocks and the arrays stay where they are while this lives, **and no longer**: keep it until the kernels that were given its
/// addresses have ended, not merely until they were launched.
#[derive(Debug)]
pub struct DeviceBlockTable {
    arrays: Arrays,
    max_blocks: usize,
    layer: usize,
    layout: BlockLayout,
    memory: Option<DeviceMemory>,
    slab: Arc<Slab>,
    // Last: it lets the blocks go.
    host: BlockTable,
}

/// Addresses of the arrays.
#[derive(Debug, Clone, Copy, Default)]
struct Arrays {
    /// Keys and values, as the next two.
    rows: [u64; 2],
    scales: [u64; 2],
    formats: [u64; 2],
    lengths: u64,
    dropped: u64,
}

impl DeviceBlockTable {
    /// The number of `raw` blocks in the `formats` array. A format's number is its place in [`Format::ALL`].
    pub const RAW: u8 = 0;
    /// The number of `int8` blocks in the `formats` array.
    pub const INT8: u8 = 1;
    /// The number of `fp8` blocks in the `formats` array.
    pub const FP8: u8 = 2;
    /// The number of `r4` blocks in the `formats` array.
    pub const R4: u8 = 3;
    /// The number of `r3` blocks in the `formats` array.
    pub const R3: u8 = 4;
    /// The number of `r2` blocks in the `formats` array.
    pub const R2: u8 = 5;
    /// The number of `int4` blocks in the `formats` array.
    pub const INT4: u8 = 6;
    /// The number of `int2` blocks in the `formats` array.
    pub const INT2: u8 = 7;

    /// The same table on the host, and which sequence each row is.
    pub fn host(&self) -> &BlockTable {
        &self.host
    }

    /// The GPU that it is on, by the driver's number.
    pub fn ordinal(&self) -> usize {
        self.slab.gpu().ordinal()
    }

    /// Rows of every array.
    pub fn sequences(&self) -> usize {
        self.host.sequences.len()
    }

    /// Columns of `keys`, `values` and of their scales and formats: at least 1.
    pub fn max_blocks(&self) -> usize {
        self.max_blocks
    }

    /// Tokens in a block.
    pub fn block_tokens(&self) -> u32 {
        self.host.block_tokens
    }

    /// Whether keys or values of any block are stored in `format` in this layer: a kernel that reads only `raw` ones wants to know.
    pub fn has(&self, format: Format) -> bool {
        let mut formats = self.host.sequences.iter().flat_map(|row| &row.blocks).map(|block| block.format);
        let of = |block: BlockFormat, plane| block.of(&self.layout, self.layer, plane);
        formats.any(|block| Plane::BOTH.into_iter().any(|plane| of(block, plane) == format))
    }

    /// Device address of `u64[sequences][max_blocks]`: where the layer's keys begin.
    pub fn keys(&self) -> u64 {
        self.arrays.rows[0]
    }

    /// Device address of `u64[sequences][max_blocks]`: where the layer's values begin.
    pub fn values(&self) -> u64 {
        self.arrays.rows[1]
    }

    /// Device address of `u64[sequences][max_blocks]`: where the scales of the layer's keys begin.
    pub fn scales(&self) -> u64 {
        self.arrays.scales[0]
    }

    /// Device address of `u64[sequences][max_blocks]`: where the scales of the layer's values begin.
    pub fn value_scales(&self) -> u64 {
        self.arrays.scales[1]
    }

    /// Device address of `u8[sequences][max_blocks]`: formats of the layer's keys.
    pub fn formats(&self) -> u64 {
        self.arrays.formats[0]
    }

    /// Device address of `u8[sequences][max_blocks]`: formats of the layer's values.
    pub fn value_formats(&self) -> u64 {
        self.arrays.formats[1]
    }

    /// Device address of `u32[sequences]`.
    pub fn lengths(&self) -> u64 {
        self.arrays.lengths
    }

    /// Device address of `u32[sequences][2]`.
    pub fn dropped(&self) -> u64 {
        self.arrays.dropped
    }

    /// Strides of codes in blocks of `format`, or of elements for `raw`.
    pub fn strides(&self, format: Format) -> BlockStrides {
        let row = |plane| format.row_bytes(self.layout.element, self.layout.dim(plane));
        BlockStrides::new(&self.layout, row(Plane::Key), row(Plane::Value))
    }

    /// Strides of scales in blocks of `format`; all 0 for `raw`, which has none. 32 tokens of a head have their key scales in common in
    /// `int4` and `int2`: there `key_token_bytes` leads from those of 32 tokens to those of the next 32.
    pub fn scale_strides(&self, format: Format) -> BlockStrides {
        let scales = |plane| {
            let rows = RowFormat::new(format, &self.layout, plane);
            (rows.scale_bytes(), rows.scale_rows())
        };
        BlockStrides::grouped(&self.layout, scales(Plane::Key), scales(Plane::Value))
    }
}

impl Drop for DeviceBlockTable {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.slab.tables().give_back(memory);
        }
    }
}

impl Cache {
    /// [`Cache::block_table`] in the memory of the GPU that holds the sequences, for attention kernels.
    ///
    /// Blocks this thread for one small copy on a stream of its own (some ten microseconds), and at first for an allocation; the
    /// cache's lanes and the caller's streams go on meanwhile. When it returns the arrays and the blocks may be read by any stream.
    ///
    /// # Errors
    /// As [`Cache::block_table`]; [`Error::Unsupported`] for no sequences, for sequences on different shards and for those of a shard in
    /// host memory; [`Error::Device`].
    pub fn device_block_table(&self, sequences: &[&Sequence], layer: u32) -> Result<DeviceBlockTable, Error> {
        let host = self.block_table(sequences, layer)?;
        let runtime = self.runtime();
        let Some(shard) = host.sequences.first().map(|row| row.sequence.shard()) else {
            return Err(Error::Unsupported {
                what: "a block table of no sequences",
                instead: "name one at least",
            });
        };
        if host.sequences.iter().any(|row| row.sequence.shard() != shard) {
            return Err(Error::Unsupported {
                what: "a block table in device memory over several shards",
                instead: "make one for the sequences of each shard",
            });
        }
        let Memory::Cuda(slab) = &runtime.memories[shard as usize] else {
            return Err(Error::Unsupported {
                what: "a block table in device memory of a shard in host memory",
                instead: "use the addresses of `Cache::block_table`",
            });
        };
        let layout = runtime.layout;
        let columns = Columns::new(&layout, layer as usize, &host);
        let max_blocks = columns.max_blocks;
        let (image, at) = image(&columns);
        let memory = slab.tables().put(slab.gpu(), &image);
        let memory = memory.map_err(|error| Error::Device(error.to_string().into()))?;
        let [keys, scales, lengths, dropped, formats, values, value_scales, value_formats] =
            at.map(|at| memory.address() + at as u64);
        let arrays = Arrays {
            rows: [keys, values],
            scales: [scales, value_scales],
            formats: [formats, value_formats],
            lengths,
            dropped,
        };
        let (layer, memory, slab) = (layer as usize, Some(memory), slab.clone());
        Ok(DeviceBlockTable { arrays, max_blocks, layer, layout, memory, slab, host })
    }
}

/// The bytes of a table, and where in them its arrays begin.
fn image(columns: &Columns) -> (Vec<u8>, [usize; 8]) {
    let mut image = Vec::new();
    let mut put = |bytes: &[u8]| {
        let at = image.len();
        image.extend_from_slice(bytes);
        image.resize(image.len().next_multiple_of(ALIGN_BYTES), 0);
        at
    };
    let at = [
        put(bytemuck::cast_slice(&columns.rows[0])),
        put(bytemuck::cast_slice(&columns.scales[0])),
        put(bytemuck::cast_slice(&columns.lengths)),
        put(bytemuck::cast_slice(&columns.dropped)),
        put(&columns.formats[0]),
        put(bytemuck::cast_slice(&columns.rows[1])),
        put(bytemuck::cast_slice(&columns.scales[1])),
        put(&columns.formats[1]),
    ];
    (image, at)
}

/// Memory for tables, and the stream on which they are written. Buffers are used again: allocating may wait for the whole device.
#[derive(Debug, Default)]
pub(super) struct Tables(Mutex<Spare>);

#[derive(Debug, Default)]
struct Spare {
    stream: Option<Stream>,
    buffers: Vec<DeviceMemory>,
}

impl Tables {
    /// A buffer that holds `image`, once that has arrived there.
    fn put(&self, gpu: &Arc<Gpu>, image: &[u8]) -> Result<DeviceMemory, DriverError> {
        let _entered = gpu.enter()?;
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = spare.buffers.iter().position(|buffer| buffer.bytes() >= image.len());
        let memory = match found {
            Some(at) => spare.buffers.swap_remove(at),
            None => DeviceMemory::uninitialised(gpu, image.len().next_power_of_two().max(BUFFER_BYTES_MIN))?,
        };
        let stream = match spare.stream.take() {
            Some(stream) => stream,
            None => Stream::new(gpu)?,
        };
        memory.write_on(&stream, image)?;
        spare.stream = Some(stream);
        Ok(memory)
    }

    fn give_back(&self, memory: DeviceMemory) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.buffers.len() < SPARE_BUFFERS_MAX {
            spare.buffers.push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use kv_cache_actors::format::{FormatLayout, History};

    use super::*;
    use crate::view::{BlockEntry, SequenceRows};
    use crate::{ElementType, Geometry, OpenOptions, SequenceId, Tier};

    fn read<T: bytemuck::Pod>(image: &[u8], at: usize, count: usize) -> Vec<T> {
        image[at..at + count * size_of::<T>()]
            .chunks(size_of::<T>())
            .map(bytemuck::pod_read_unaligned)
            .collect()
    }

    #[test]
    fn blocks_stand_at_their_place_in_the_sequence() {
        let layout = Geometry::new(3, 2, 8, ElementType::F16).block_tokens(4).layout().unwrap();
        let slab = 1 << 40;
        let block = |first_token, format, slot_offset_bytes, inside| BlockEntry {
            first_token,
            format: BlockFormat::from(format),
            history: History::default(),
            tier: Tier::Device,
            slot_offset_bytes,
            keys_offset_bytes: slot_offset_bytes + inside,
            values_offset_bytes: 0,
            address: slab + (slot_offset_bytes + inside) as u64,
        };
        let raw_keys = layout.plane_offset(1, Plane::Key);
        let codes = raw_keys / 2;
        let row = |tokens, dropped, blocks| SequenceRows {
            sequence: SequenceId::from_u64(0),
            tokens,
            dropped,
            blocks,
            positions: Vec::new(),
        };
        let host = BlockTable::for_tests(
            4,
            vec![
                // Tokens 5..13 were dropped, and the block of 8..12 with them.
                row(
                    14,
                    5..13,
                    vec![
                        block(0, Format::Int8, 1024, codes),
                        block(4, Format::Raw, 4096, raw_keys),
                        block(12, Format::Raw, 8192, raw_keys),
                    ],
                ),
                row(0, 0..0, vec![]),
            ],
        );
        let (image, at) = image(&Columns::new(&layout, 1, &host));
        assert!(at.iter().all(|at| at % ALIGN_BYTES == 0));
        let keys =
            [slab + 1024 + codes as u64, slab + 4096 + raw_keys as u64, 0, slab + 8192 + raw_keys as u64];
        assert_eq!(read::<u64>(&image, at[0], 8), [&keys[..], &[0; 4]].concat());
        let int8 = FormatLayout::new(Format::Int8.into(), &layout);
        let scales = slab + 1024 + int8.scales_at(&layout, 1, Plane::Key) as u64;
        assert_eq!(read::<u64>(&image, at[1], 8), [scales, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read::<u32>(&image, at[2], 2), [14, 0]);
        assert_eq!(read::<u32>(&image, at[3], 4), [5, 13, 0, 0]);
        assert_eq!(read::<u8>(&image, at[4], 8), [1, 0, 0, 0, 0, 0, 0, 0]);
        let raw_values = layout.plane_bytes(Plane::Key) as u64;
        let values = [keys[0] + raw_values / 2, keys[1] + raw_values, 0, keys[3] + raw_values];
        assert_eq!(read::<u64>(&image, at[5], 8), [&values[..], &[0; 4]].concat());
        let scales = slab + 1024 + int8.scales_at(&layout, 1, Plane::Value) as u64;
        assert_eq!(read::<u64>(&image, at[6], 8), [scales, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read::<u8>(&image, at[7], 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// The strides name the same bytes as the layouts of `format.rs` and `geometry.rs`.
    #[test]
    fn strides_agree_with_the_block_layouts() {
        let mut geometry = Geometry::new(3, 2, 8, ElementType::F16).block_tokens(4);
        geometry.groups[0].value_dim = 5;
        let layout = geometry.layout().unwrap();
        let int8 = FormatLayout::new(Format::Int8.into(), &layout);
        let scale = layout.element.scale_bytes();
        type At<'a> = &'a dyn Fn(usize, Plane) -> usize;
        let cases: [(usize, usize, At<'_>); 3] = [
            (16, 10, &|layer, plane| layout.plane_offset(layer, plane)),
            (8, 5, &|layer, plane| int8.codes_at(&layout, layer, plane)),
            (scale, scale, &|layer, plane| int8.scales_at(&layout, layer, plane)),
        ];
        for (key, value, at) in cases {
            let strides = BlockStrides::new(&layout, key, value);
            for layer in 0..3 {
                let keys = at(0, Plane::Key) + layer * strides.layer_bytes as usize;
                assert_eq!(keys, at(layer, Plane::Key));
                assert_eq!(keys + strides.values_bytes as usize, at(layer, Plane::Value));
            }
            assert_eq!((strides.key_token_bytes, strides.key_head_bytes), (key as u64, 4 * key as u64));
            assert_eq!(
                (strides.value_token_bytes, strides.value_head_bytes),
                (value as u64, 4 * value as u64)
            );
        }
    }

    /// A table of a cache in host memory, whose addresses can be followed here: what a kernel would read is what was appended.
    #[tokio::test]
    async fn following_a_table_gives_what_a_read_gives() {
        let mut geometry = Geometry::new(3, 2, 8, ElementType::F16).block_tokens(4);
        geometry.groups[0].value_dim = 5;
        let builder =
            Cache::builder(geometry).devices(crate::Devices::cpu(1)).memory_bytes_per_device(1 << 20);
        let cache = builder.sealed_format(Format::Int8).build().await.unwrap();
        let layout = cache.runtime().layout;
        let [raw, codes, scale] =
            [(16, 10), (8, 5), (2, 2)].map(|(key, value)| BlockStrides::new(&layout, key, value));
        let mut sequences = Vec::new();
        for tokens in [0usize, 3, 8, 30] {
            let sequence = cache.open("tenant", OpenOptions::default()).await.unwrap();
            let of = |dim: usize| -> Vec<f16> {
                (0..3 * tokens * 2 * dim).map(|at| f16::from_f32((at * 37 % 101) as f32 - 50.0)).collect()
            };
            if tokens > 0 {
                sequence.append(&vec![7; tokens], &of(8), &of(5)).await.unwrap();
            }
            while (sequence.info().sealed_blocks as usize) < tokens / 4 {
                tokio::task::yield_now().await;
            }
            sequences.push(sequence);
        }
        let host = cache.block_table(&sequences.iter().collect::<Vec<_>>(), 0).unwrap();
        let (image, at) = image(&Columns::new(&layout, 0, &host));
        let (keys, scales) = (read::<u64>(&image, at[0], 32), read::<u64>(&image, at[1], 32));
        let (lengths, formats) = (read::<u32>(&image, at[2], 4), read::<u8>(&image, at[4], 32));
        assert_eq!(lengths, [0, 3, 8, 30]);
        for (row, sequence) in sequences.iter().enumerate() {
            let length = lengths[row];
            for layer in 0..3u64 {
                let (read_keys, read_values) = sequence.read::<f16>(layer as u32, 0..length).await.unwrap();
                for (plane, rows, dim) in [(Plane::Key, &read_keys, 8), (Plane::Value, &read_values, 5)] {
                    for (place, expected) in rows.chunks(dim).enumerate() {
                        let (token, head) = (place / 2, (place % 2) as u64);
                        let (block, inside) = (row * 8 + token / 4, (token % 4) as u64);
                        let at = |strides: &BlockStrides| {
                            layer * strides.layer_bytes
                                + match plane {
                                    Plane::Key => {
                                        head * strides.key_head_bytes + inside * strides.key_token_bytes
                                    }
                                    Plane::Value => {
                                        strides.values_bytes
                                            + head * strides.value_head_bytes
                                            + inside * strides.value_token_bytes
                                    }
                                }
                        };
                        let got: Vec<f16> = match formats[block] {
                            DeviceBlockTable::INT8 => {
                                let scale = (scales[block] + at(&scale)) as *const f16;
                                let codes = (keys[block] + at(&codes)) as *const i8;
                                // SAFETY: inside the slab's blocks that the table pins, which nobody writes to.
                                let (scale, codes) =
                                    unsafe { (scale.read(), std::slice::from_raw_parts(codes, dim)) };
                                codes
                                    .iter()
                                    .map(|code| f16::from_f32(f32::from(*code) * scale.to_f32()))
                                    .collect()
                            }
                            _ => {
                                let elements = (keys[block] + at(&raw)) as *const f16;
                                // SAFETY: as above.
                                unsafe { std::slice::from_raw_parts(elements, dim) }.to_vec()
                            }
                        };
                        assert_eq!(
                            got, expected,
                            "row {row}, layer {layer}, {plane:?}, token {token}, head {head}"
                        );
                    }
                }
            }
        }
        assert!(formats.contains(&DeviceBlockTable::INT8) && formats.contains(&DeviceBlockTable::RAW));
    }

    #[tokio::test]
    async fn sequences_in_host_memory_and_none_at_all_are_refused() {
        let geometry = Geometry::new(1, 1, 8, ElementType::F16);
        let builder =
            Cache::builder(geometry).devices(crate::Devices::cpu(1)).memory_bytes_per_device(1 << 20);
        let cache = builder.build().await.unwrap();
        let sequence = cache.open("tenant", OpenOptions::default()).await.unwrap();
        for sequences in [&[&sequence][..], &[]] {
            let refused = cache.device_block_table(sequences, 0).unwrap_err();
            assert!(matches!(refused, Error::Unsupported { .. }), "{refused:?}");
        }
        assert_eq!(
            cache.device_block_table(&[&sequence], 1).unwrap_err(),
            Error::Layer { layer: 1, layers: 1 }
        );
    }
}
