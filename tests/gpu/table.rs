//! Exported block tables as the test kernel takes them.

use cudarc::driver::DeviceRepr;
use kv_cache::Format;
use kv_cache::cuda::{BlockStrides, DeviceBlockTable};

/// Mirrors `Strides` of `kernels/test.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Strides {
    key_token: u64,
    key_head: u64,
    values: u64,
    value_token: u64,
    value_head: u64,
    layer: u64,
}

impl From<BlockStrides> for Strides {
    fn from(strides: BlockStrides) -> Self {
        Strides {
            key_token: strides.key_token_bytes,
            key_head: strides.key_head_bytes,
            values: strides.values_bytes,
            value_token: strides.value_token_bytes,
            value_head: strides.value_head_bytes,
            layer: strides.layer_bytes,
        }
    }
}

/// Mirrors `Table` of `kernels/test.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Table {
    keys: u64,
    scales: u64,
    formats: u64,
    lengths: u64,
    dropped: u64,
    raw: Strides,
    codes: Strides,
    scale: Strides,
    max_blocks: u32,
    block_tokens: u32,
    layer: u32,
    padding: u32,
}

// SAFETY: plain integers, laid out as in the kernel's source.
unsafe impl DeviceRepr for Table {}

impl Table {
    /// For the kernel, `layer` layers behind the table's own.
    pub(crate) fn new(table: &DeviceBlockTable, layer: u32) -> Table {
        Table {
            keys: table.keys(),
            scales: table.scales(),
            formats: table.formats(),
            lengths: table.lengths(),
            dropped: table.dropped(),
            raw: table.strides(Format::Raw).into(),
            codes: table.strides(Format::Int8).into(),
            scale: table.scale_strides(Format::Int8).into(),
            max_blocks: table.max_blocks() as u32,
            block_tokens: table.block_tokens(),
            layer,
            padding: 0,
        }
    }
}
