//! Header and checksum.

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_64;

use kv_cache_actors::format::{BlockFormat, Format, History};

use super::input::Input;
use super::{Codec, ColdError, Element, LowRankInfo, Shape};

pub(super) const MAGIC: [u8; 4] = *b"kvcf";
const VERSION: u16 = 1;
pub(super) const HEADER_BYTES: usize = 64;
/// Of the header: how many formats a block has been through, and of each keys', values', first and last raw layers.
const HISTORY: Range<usize> = 44..HEADER_BYTES;
const PAST_BYTES: usize = 6;
const CHECKSUM_BYTES: usize = 8;
/// Of the payload of keys of low rank: rank and position, 4 bytes each, 8 of the hash of the basis, and the number of the values' codec.
pub(super) const LOW_RANK_HEAD_BYTES: usize = 17;

/// What made a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameCodec {
    /// [`encode`](super::encode), with this codec for keys and values.
    Block(Codec),
    /// [`LowRank::encode`](super::LowRank::encode).
    LowRank(LowRankInfo),
}

/// What a frame says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrameInfo {
    /// How the block was encoded.
    pub codec: FrameCodec,
    /// What it consists of.
    pub element: Element,
    /// How that lies.
    pub shape: Shape,
    /// What the block had been through before it was encoded. What a lossy [`FrameInfo::codec`] takes from it comes on top, and is for who decodes
    /// it to remember.
    pub history: History,
    /// Bytes of the block.
    pub block_bytes: usize,
}

impl FrameInfo {
    /// Reads the header of a whole frame, and checks all of its bytes against the checksum.
    ///
    /// # Errors
    /// What is wrong with the frame, but for its payload: [`ColdError::FrameBytes`], [`Magic`](ColdError::Magic),
    /// [`Version`](ColdError::Version), [`UnknownCodec`](ColdError::UnknownCodec), [`UnknownElement`](ColdError::UnknownElement),
    /// [`UnknownHistory`](ColdError::UnknownHistory), [`Checksum`](ColdError::Checksum), [`Shape`](ColdError::Shape), [`BlockBytes`](ColdError::BlockBytes),
    /// [`Unsupported`](ColdError::Unsupported), [`CodesAsKeys`](ColdError::CodesAsKeys), and [`PayloadEnds`](ColdError::PayloadEnds) for keys
    /// of low rank without their head.
    pub fn read(frame: &[u8]) -> Result<FrameInfo, ColdError> {
        let given_bytes = frame.len();
        let least = HEADER_BYTES + CHECKSUM_BYTES;
        let Some((body, checksum)) = frame.split_last_chunk().filter(|_| given_bytes >= least) else {
            return Err(ColdError::FrameBytes { frame_bytes: least as u64, given_bytes });
        };
        if body[..4] != MAGIC {
            return Err(ColdError::Magic { found: field(body, 0) });
        }
        let found = u16::from_le_bytes(field(body, 4));
        if found != VERSION {
            return Err(ColdError::Version { found, supported: VERSION });
        }
        let payload_bytes = u64::from_le_bytes(field(body, 36));
        if payload_bytes != (given_bytes - least) as u64 {
            let frame_bytes = payload_bytes.saturating_add(least as u64);
            return Err(ColdError::FrameBytes { frame_bytes, given_bytes });
        }
        let (stored, computed) = (u64::from_le_bytes(*checksum), xxh3_64(body));
        if stored != computed {
            return Err(ColdError::Checksum { stored, computed });
        }
        let codec = match body[6] {
            NUMBER_OF_LOW_RANK => FrameCodec::LowRank(low_rank(&body[HEADER_BYTES..])?),
            number => FrameCodec::Block(codec_of(number)?),
        };
        let element = Element::ALL.into_iter().find(|element| number_of_element(*element) == body[7]);
        let element = element.ok_or(ColdError::UnknownElement { found: body[7] })?;
        match codec {
            FrameCodec::Block(Codec::Lossless) => {}
            FrameCodec::Block(codec) => {
                element.numbers(codec)?;
            }
            FrameCodec::LowRank(_) => {
                element.keys()?;
            }
        }
        let dim = |at| u32::from_le_bytes(field(body, at));
        let shape = Shape {
            layers: dim(8),
            kv_heads: dim(12),
            tokens: dim(16),
            key_dim: dim(20),
            value_dim: dim(24),
        };
        let block_bytes = shape.bytes(element)?;
        let claimed = u64::from_le_bytes(field(body, 28));
        if claimed != block_bytes as u64 {
            let given_bytes = usize::try_from(claimed).unwrap_or(usize::MAX);
            return Err(ColdError::BlockBytes { shape_bytes: block_bytes, given_bytes });
        }
        let history = history(&body[HISTORY])?;
        Ok(FrameInfo { codec, element, shape, history, block_bytes })
    }

    /// The payload of the frame that this was read from.
    pub(super) fn payload(self, frame: &[u8]) -> &[u8] {
        &frame[HEADER_BYTES..frame.len() - CHECKSUM_BYTES]
    }
}

const NUMBER_OF_LOW_RANK: u8 = 4;

fn codec_of(number: u8) -> Result<Codec, ColdError> {
    let codec = Codec::ALL.into_iter().find(|codec| number_of_codec(*codec) == number);
    codec.ok_or(ColdError::UnknownCodec { found: number })
}

fn low_rank(payload: &[u8]) -> Result<LowRankInfo, ColdError> {
    let head = Input::new(payload).take(LOW_RANK_HEAD_BYTES)?;
    let [rank, position] = [0, 4].map(|at| u32::from_le_bytes(field(head, at)));
    Ok(LowRankInfo { rank, position, basis: field(head, 8), values: codec_of(head[16])? })
}

const fn number_of_codec(codec: Codec) -> u8 {
    match codec {
        Codec::Lossless => 1,
        Codec::Lossy32 => 2,
        Codec::Lossy16 => 3,
    }
}

const fn number_of_element(element: Element) -> u8 {
    match element {
        Element::F16 => 1,
        Element::Bf16 => 2,
        Element::F32 => 3,
        Element::Int8 => 4,
    }
}

const fn number_of_format(format: Format) -> u8 {
    match format {
        Format::Raw => 0,
        Format::Int8 => 1,
        Format::Fp8 => 2,
        Format::R4 => 3,
        Format::R3 => 4,
        Format::R2 => 5,
        Format::Int4 => 6,
        Format::Int2 => 7,
        // Of a newer core: nothing knows it, and nothing takes it for another.
        _ => u8::MAX,
    }
}

fn put_history(history: &History, out: &mut Vec<u8>) {
    let end = out.len() + HISTORY.len();
    out.push(history.formats().len() as u8);
    for BlockFormat { keys, values, raw_first_layers, raw_last_layers } in history.formats() {
        out.extend([*keys, *values].map(number_of_format));
        out.extend([*raw_first_layers, *raw_last_layers].map(u16::to_le_bytes).as_flattened());
    }
    out.resize(end, 0);
}

fn history(bytes: &[u8]) -> Result<History, ColdError> {
    let unknown = |found| ColdError::UnknownHistory { found };
    let format = |number: u8| {
        let known = Format::ALL.into_iter().find(|format| number_of_format(*format) == number);
        known.ok_or(unknown(number))
    };
    let past = bytes[1..].chunks_exact(PAST_BYTES).take(usize::from(bytes[0])).map(|past| {
        let [raw_first_layers, raw_last_layers] = [2, 4].map(|at| u16::from_le_bytes(field(past, at)));
        Ok(BlockFormat {
            keys: format(past[0])?,
            values: format(past[1])?,
            raw_first_layers,
            raw_last_layers,
        })
    });
    let past = past.collect::<Result<Vec<_>, ColdError>>()?;
    let whole = past.len() == usize::from(bytes[0]);
    History::of(&past).filter(|_| whole).ok_or(unknown(bytes[0]))
}

/// Of bytes that are long enough.
fn field<const N: usize>(body: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&body[at..at + N]);
    field
}

/// Appends a header, of low rank the payload's head too; the payload is still to come. Gives where it begins.
pub(super) fn begin(
    codec: FrameCodec,
    element: Element,
    shape: &Shape,
    history: &History,
    block_bytes: usize,
    out: &mut Vec<u8>,
) -> usize {
    let first = out.len();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    let number = match codec {
        FrameCodec::Block(codec) => number_of_codec(codec),
        FrameCodec::LowRank(_) => NUMBER_OF_LOW_RANK,
    };
    out.extend([number, number_of_element(element)]);
    for dim in [shape.layers, shape.kv_heads, shape.tokens, shape.key_dim, shape.value_dim] {
        out.extend(dim.to_le_bytes());
    }
    out.extend((block_bytes as u64).to_le_bytes());
    out.extend(0u64.to_le_bytes());
    put_history(history, out);
    if let FrameCodec::LowRank(info) = codec {
        out.extend(info.rank.to_le_bytes());
        out.extend(info.position.to_le_bytes());
        out.extend(info.basis);
        out.push(number_of_codec(info.values));
    }
    first
}

/// Ends the frame that [`begin`] has begun at `first`.
pub(super) fn end(first: usize, out: &mut Vec<u8>) {
    let payload_bytes = (out.len() - first - HEADER_BYTES) as u64;
    out[first + 36..first + HISTORY.start].copy_from_slice(&payload_bytes.to_le_bytes());
    let checksum = xxh3_64(&out[first..]);
    out.extend(checksum.to_le_bytes());
}
