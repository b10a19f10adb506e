//! Tensors of candle to and from the cache.
//!
//! A layer over the interface for slices and device memory that knows nothing of it: tensors in host memory are appended as
//! slices, tensors in a GPU's memory (feature `candle-cuda`) where they lie, behind a point on candle's own stream.
//!
//! ```
//! # use kv_cache::{Cache, ElementType, Error, Geometry, OpenOptions};
//! # use candle_core::{Device, DType, Tensor};
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // 2 layers of 2 KV heads of 4 dims.
//! let cache = Cache::builder(Geometry::new(2, 2, 4, ElementType::F32)).memory_bytes_per_device(1 << 20).build().await?;
//! let sequence = cache.open("alice", OpenOptions::default()).await?;
//! // [layers, tokens, kv_heads, dim]
//! let keys = Tensor::arange(0f32, 48., &Device::Cpu)?.reshape((2, 3, 2, 4))?;
//! let values = keys.affine(-1., 0.)?;
//! sequence.append_tensors(&[7, 8, 9], &keys, &values).await?;
//! let (read, _values) = sequence.read_tensors(1, 0..3, &Device::Cpu).await?;
//! assert_eq!(read.flatten_all()?.to_vec1::<f32>()?, keys.get(1)?.flatten_all()?.to_vec1::<f32>()?);
//! // Attention computes [kv_heads, tokens, dim]: that is another shape, and is said to be one.
//! let attention = keys.transpose(1, 2)?;
//! assert!(matches!(sequence.append_tensors(&[1, 2, 3], &attention, &values).await, Err(Error::Dimensions { .. })));
//! # Ok(()) }
//! ```
//!
//! # Tensors on a GPU
//!
//! The cache reads a tensor on the GPU behind whatever the calling thread has put on candle's stream: call the methods on the
//! thread that computed the tensors. candle's plain device ([`Device::new_cuda`]) has a stream *per thread*; there a tensor
//! that the cache has finished with goes back to that thread, which frees it with its next call of these methods. A device with
//! a stream of its own ([`Device::new_cuda_with_stream`]) has neither rule.
//!
//! Tensors may be on a GPU and the sequence in host memory, or the other way round: reads then pass through host memory,
//! appends are refused.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use kv_cache_actors::batch::{EachTensors, HostTensor};
use kv_cache_actors::geometry::BlockLayout;

use crate::batch::{KeysValues, Outcome, ids};
use crate::columns::Columns;
use crate::sequence::unexpected;
use crate::view::BlockTable;
use crate::{BatchCacheOperations, Cache, ElementType, Error, Format, Plane, Sequence};

#[cfg(feature = "candle-cuda")]
use crate::backend::cuda::candle as on_gpu;

pub(crate) fn failed(error: candle_core::Error) -> Error {
    Error::Device(error.to_string().into())
}

/// Keys and values of an operation: contiguous, of one kind of memory, of the shape that it takes.
struct Pair {
    keys: Tensor,
    values: Tensor,
}

impl Pair {
    /// Checks both against `[..., kv_heads, dim]`.
    fn new(leading: &[usize], layout: &BlockLayout, keys: &Tensor, values: &Tensor) -> Result<Pair, Error> {
        let checked = |plane, tensor: &Tensor| {
            let expected = [leading, &[layout.kv_heads, layout.dim(plane)]].concat();
            if tensor.dims() != expected {
                let (given, expected) = (tensor.dims().into(), expected.into());
                return Err(Error::Dimensions { plane, given, expected });
            }
            let given = element_type(tensor)?;
            match given == layout.element {
                true => tensor.contiguous().map_err(failed),
                false => Err(Error::ElementType { given, expected: layout.element }),
            }
        };
        Ok(Pair { keys: checked(Plane::Key, keys)?, values: checked(Plane::Value, values)? })
    }

    /// Has `write` put the operation into `batch`, with the tensors as they lie in memory.
    fn write(
        &self,
        batch: &mut BatchCacheOperations,
        write: impl FnOnce(&mut BatchCacheOperations, EachTensors<'_>),
    ) -> Result<(), Error> {
        match (self.keys.device(), self.values.device()) {
            (Device::Cpu, Device::Cpu) => on_host(&self.keys, |keys| {
                on_host(&self.values, |values| write(batch, EachTensors::Host(keys, values)))
            })?,
            #[cfg(feature = "candle-cuda")]
            (Device::Cuda(_), Device::Cuda(_)) => {
                let (keys, values) = on_gpu::accept(batch, &self.keys, &self.values)?;
                write(batch, EachTensors::Device(keys, values));
                Ok(())
            }
            _ => Err(Error::Unsupported {
                what: "keys and values of this kind of memory, or of two kinds",
                instead: "give both on candle's CPU device, or (with the feature `candle-cuda`) both on one GPU",
            }),
        }
    }
}

pub(crate) fn element_type(tensor: &Tensor) -> Result<ElementType, Error> {
    match tensor.dtype() {
        DType::F16 => Ok(ElementType::F16),
        DType::BF16 => Ok(ElementType::Bf16),
        DType::F32 => Ok(ElementType::F32),
        _ => Err(Error::Unsupported {
            what: "a tensor of another type than f16, bf16 and f32",
            instead: "convert it with `Tensor::to_dtype`",
        }),
    }
}

pub(crate) fn dtype(element: ElementType) -> DType {
    match element {
        ElementType::F16 => DType::F16,
        ElementType::Bf16 => DType::BF16,
        ElementType::F32 => DType::F32,
    }
}

/// Shows the elements of a contiguous tensor in host memory. Its storage is locked for reading meanwhile.
fn on_host<R>(tensor: &Tensor, show: impl FnOnce(HostTensor<'_>) -> R) -> Result<R, Error> {
    let (storage, layout) = tensor.storage_and_layout();
    let elements = layout.start_offset()..layout.start_offset() + tensor.elem_count();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::Unsupported {
            what: "a tensor that is not in host memory",
            instead: "move it there",
        });
    };
    let element = element_type(tensor)?;
    let bytes = match storage {
        CpuStorage::F16(all) => bytemuck::cast_slice(&all[elements]),
        CpuStorage::BF16(all) => bytemuck::cast_slice(&all[elements]),
        CpuStorage::F32(all) => bytemuck::cast_slice(&all[elements]),
        _ => return Err(Error::Unsupported { what: "a tensor of this type", instead: "convert it" }),
    };
    Ok(show(HostTensor { element, bytes }))
}

/// Operations on tensors of candle. They are checked, and made contiguous, at the call; a tensor that does not fit makes its
/// operation's result an error ([`Error::Dimensions`], [`Error::ElementType`]), like any other.
impl BatchCacheOperations {
    /// [`BatchCacheOperations::append`] of tensors `[layers, tokens, kv_heads, dim]`.
    pub fn append_tensors(
        self,
        sequence: &Sequence,
        token_ids: &[u32],
        keys: &Tensor,
        values: &Tensor,
    ) -> Self {
        let layout = sequence.layout();
        let pair = Pair::new(&[layout.layers, token_ids.len()], layout, keys, values);
        self.with(pair, 1, |batch, tensors| match tensors {
            EachTensors::Host(keys, values) => {
                batch.0.append(sequence.id(), None, token_ids, None, keys, values);
            }
            EachTensors::Device(keys, values) => {
                batch.0.append_device(sequence.id(), token_ids, None, keys, values);
            }
            EachTensors::Region(..) => {}
        })
    }

    /// [`BatchCacheOperations::append_each`] of tensors `[layers, sequences, kv_heads, dim]`.
    pub fn append_each_tensors(
        self,
        sequences: &[&Sequence],
        token_ids: &[u32],
        keys: &Tensor,
        values: &Tensor,
    ) -> Self {
        let Some(layout) = sequences.first().map(|sequence| sequence.layout()) else { return self };
        let pair = Pair::new(&[layout.layers, sequences.len()], layout, keys, values);
        self.with(pair, sequences.len(), |batch, tensors| {
            batch.0.append_each(ids(sequences), token_ids, tensors);
        })
    }

    /// [`BatchCacheOperations::stage`] of tensors `[tokens, kv_heads, dim]`.
    pub fn stage_tensors(self, sequence: &Sequence, layer: u32, keys: &Tensor, values: &Tensor) -> Self {
        let layout = sequence.layout();
        let tokens = keys.dims().first().copied().unwrap_or_default();
        let pair = Pair::new(&[tokens], layout, keys, values);
        self.with(pair, 1, |batch, tensors| match tensors {
            EachTensors::Host(keys, values) => {
                batch.0.stage(sequence.id(), layer, tokens as u32, keys, values);
            }
            EachTensors::Device(keys, values) => {
                batch.0.stage_device(sequence.id(), layer, tokens as u32, keys, values);
            }
            EachTensors::Region(..) => {}
        })
    }

    /// [`BatchCacheOperations::stage_each`] of tensors `[sequences, kv_heads, dim]`.
    pub fn stage_each_tensors(
        self,
        sequences: &[&Sequence],
        layer: u32,
        keys: &Tensor,
        values: &Tensor,
    ) -> Self {
        let Some(layout) = sequences.first().map(|sequence| sequence.layout()) else { return self };
        let pair = Pair::new(&[sequences.len()], layout, keys, values);
        self.with(pair, sequences.len(), |batch, tensors| {
            batch.0.stage_each(ids(sequences), layer, tensors);
        })
    }

    fn with(
        mut self,
        pair: Result<Pair, Error>,
        results: usize,
        write: impl FnOnce(&mut BatchCacheOperations, EachTensors<'_>),
    ) -> Self {
        if let Err(error) = pair.and_then(|pair| pair.write(&mut self, write)) {
            (0..results).for_each(|_| self.0.refused(error.clone()));
        }
        self
    }
}

impl Sequence {
    /// [`Sequence::append`] of tensors `[layers, tokens, kv_heads, dim]`.
    ///
    /// # Errors
    /// As [`Sequence::append`], and [`Error::Dimensions`].
    pub async fn append_tensors(
        &self,
        token_ids: &[u32],
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<u32, Error> {
        let batch = BatchCacheOperations::new().append_tensors(self, token_ids, keys, values);
        match self.submit_one(batch).await? {
            Outcome::Appended { committed } => Ok(committed),
            other => Err(unexpected(&other)),
        }
    }

    /// [`Sequence::stage`] of tensors `[tokens, kv_heads, dim]`.
    ///
    /// # Errors
    /// As [`Sequence::stage`], and [`Error::Dimensions`].
    pub async fn stage_tensors(&self, layer: u32, keys: &Tensor, values: &Tensor) -> Result<u32, Error> {
        let batch = BatchCacheOperations::new().stage_tensors(self, layer, keys, values);
        match self.submit_one(batch).await? {
            Outcome::Staged { staged } => Ok(staged),
            other => Err(unexpected(&other)),
        }
    }

    /// [`Sequence::read`] into tensors on `device`: keys `[tokens, kv_heads, key_dim]` and values
    /// `[tokens, kv_heads, value_dim]`, of the cache's element type.
    ///
    /// On the GPU that holds the sequence nothing passes through host memory. The tensors are complete when this returns, for
    /// every stream.
    ///
    /// # Errors
    /// As [`Sequence::read`]; [`Error::Device`] if candle cannot allocate them.
    pub async fn read_tensors(
        &self,
        layer: u32,
        tokens: Range<u32>,
        device: &Device,
    ) -> Result<(Tensor, Tensor), Error> {
        #[cfg(feature = "candle-cuda")]
        if let Device::Cuda(gpu) = device
            && self.device() == Some(gpu.cuda_stream().context().ordinal() as u16)
        {
            return on_gpu::read(self, layer, tokens, gpu).await;
        }
        let batch = BatchCacheOperations::new().read(self, layer, tokens.clone());
        match self.submit_one(batch).await? {
            Outcome::Read(read) => to_tensors(&read, self.layout(), tokens.len(), device),
            other => Err(unexpected(&other)),
        }
    }
}

fn to_tensors(
    read: &KeysValues,
    layout: &BlockLayout,
    tokens: usize,
    device: &Device,
) -> Result<(Tensor, Tensor), Error> {
    let tensor = |plane, bytes: &[u8]| {
        let shape = [tokens, layout.kv_heads, layout.dim(plane)];
        Tensor::from_raw_buffer(bytes, dtype(layout.element), &shape, device).map_err(failed)
    };
    Ok((tensor(Plane::Key, read.key_bytes())?, tensor(Plane::Value, read.value_bytes())?))
}

/// [`Cache::block_table`] as tensors, for kernels that candle launches. The strides inside a block are those that
/// [`BlockTable`] tells, and for GPUs `kv_cache::cuda`.
///
/// The blocks stay where they are while this lives, **and no longer**: keep it until the kernels that were given the tensors have
/// ended.
#[derive(Debug)]
pub struct TableTensors {
    /// `i64 [sequences, max_blocks]`: addresses of the layer's keys of each block, 0 where there is none.
    pub keys: Tensor,
    /// `i64 [sequences, max_blocks]`: addresses of the key scales of sealed blocks, 0 for `raw` ones.
    pub scales: Tensor,
    /// `u8 [sequences, max_blocks]`: the keys' format by its place in [`Format::ALL`], so 0 for `raw`, 1 for `int8`.
    pub formats: Tensor,
    /// As [`TableTensors::keys`], of the layer's values.
    pub values: Tensor,
    /// As [`TableTensors::scales`], of the layer's values.
    pub value_scales: Tensor,
    /// As [`TableTensors::formats`], of the layer's values.
    pub value_formats: Tensor,
    /// `u32 [sequences]`: tokens, dropped ones included.
    pub lengths: Tensor,
    /// `u32 [sequences, 2]`: the first dropped token, and the first one behind it that is there.
    pub dropped: Tensor,
    /// `i64 [tokens of all sequences]`, one sequence after the other: the address of each token's row in the first head's keys
    /// (elements or codes), 0 if it was dropped. Values have places of their own: `values`, and the strides of their format.
    pub slot_mapping: Tensor,
    /// The same table on the host, and which sequence each row is.
    pub host: BlockTable,
}

impl Cache {
    /// [`Cache::block_table`] and the slot mapping as tensors on `device`.
    ///
    /// # Errors
    /// As [`Cache::block_table`]; [`Error::Device`] if candle cannot make them.
    pub fn table_tensors(
        &self,
        sequences: &[&Sequence],
        layer: u32,
        device: &Device,
    ) -> Result<TableTensors, Error> {
        let host = self.block_table(sequences, layer)?;
        let layout = &self.runtime().layout;
        if host.sequences.iter().any(|row| !row.positions.is_empty()) {
            return Err(Error::Unsupported {
                what: "a table as tensors of a sequence whose tokens were dropped by their scores",
                instead: "use `Cache::block_table`, which says where its tokens stood",
            });
        }
        let columns = Columns::new(layout, layer as usize, &host);
        let slots = slot_mapping(layout, &columns);
        let (rows, blocks) = (host.sequences.len(), columns.max_blocks);
        let wide = |column: Vec<u64>, shape: &[usize]| {
            let column: Vec<i64> = bytemuck::allocation::cast_vec(column);
            Tensor::from_vec(column, shape, device).map_err(failed)
        };
        let of_blocks = [rows, blocks];
        let all = [slots.len()];
        let narrow = |column: Vec<u8>| Tensor::from_vec(column, &of_blocks, device).map_err(failed);
        let ([keys, values], [scales, value_scales]) = (columns.rows, columns.scales);
        let [formats, value_formats] = columns.formats;
        Ok(TableTensors {
            keys: wide(keys, &of_blocks)?,
            scales: wide(scales, &of_blocks)?,
            formats: narrow(formats)?,
            values: wide(values, &of_blocks)?,
            value_scales: wide(value_scales, &of_blocks)?,
            value_formats: narrow(value_formats)?,
            lengths: Tensor::from_vec(columns.lengths, rows, device).map_err(failed)?,
            dropped: Tensor::from_vec(columns.dropped, (rows, 2), device).map_err(failed)?,
            slot_mapping: wide(slots, &all)?,
            host,
        })
    }
}

fn slot_mapping(layout: &BlockLayout, columns: &Columns) -> Vec<u64> {
    let tokens = columns.lengths.iter().map(|length| *length as usize).sum();
    let mut slots = Vec::with_capacity(tokens);
    for (row, &length) in columns.lengths.iter().enumerate() {
        let dropped = columns.dropped[2 * row]..columns.dropped[2 * row + 1];
        for token in 0..length {
            let place = row * columns.max_blocks + token as usize / layout.block_tokens;
            let format = Format::ALL[columns.formats[0][place] as usize];
            let row_bytes = format.row_bytes(layout.element, layout.key_dim);
            let inside = (token as usize % layout.block_tokens * row_bytes) as u64;
            let gone = columns.rows[0][place] == 0 || dropped.contains(&token);
            slots.push(if gone { 0 } else { columns.rows[0][place] + inside });
        }
    }
    slots
}
