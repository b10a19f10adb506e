//! Blocks for tiers where bytes are dear and a millisecond is not: host memory, disk, the network.
//!
//! Pure functions between the bytes of a block, as they lie in a slot, and a *frame*: a header that says what it is, a payload, and a
//! checksum over both. [`Codec::Lossless`] gives back every bit. The lossy ones keep a few levels an element: what they give back is never the first-hand
//! content of a block. A header also says what the block had been through before ([`History`]), so that no copy passes for more than it is.
//!
//! ```
//! use kv_cache::cold::{self, Codec, Element, Shape};
//! use kv_cache::{Format, History, half::bf16};
//!
//! let shape = Shape { layers: 2, kv_heads: 1, tokens: 32, key_dim: 64, value_dim: 64 };
//! let elements = (0..2 * 2 * 32 * 64).map(|x| bf16::from_f32((x as f32).sin()));
//! let block: Vec<u8> = elements.flat_map(bf16::to_le_bytes).collect();
//!
//! // It was sealed once, and decoded.
//! let history = History::of(&[Format::Int8.into()]).unwrap_or_default();
//! let mut frame = Vec::new();
//! cold::encode(Codec::Lossless, Element::Bf16, &shape, &history, &block, &mut frame)?;
//! let mut decoded = vec![0; block.len()];
//! let info = cold::decode(&frame, &mut decoded)?;
//! assert_eq!((info.shape, info.history, decoded), (shape, history, block));
//! # Ok::<(), cold::ColdError>(())
//! ```
//!
//! | codec | what is done |
//! |---|---|
//! | [`Codec::Lossless`] | sign and exponent (of f16 two bits of the mantissa too, of `int8` codes everything) are entropy-coded under what the same channel held in the two tokens before; the other bits are stored as they are |
//! | [`Codec::Lossy32`], [`Codec::Lossy16`] | after CacheGen ([Liu et al. 2024](https://arxiv.org/abs/2310.07240)): a step a token over all heads of a layer, keys and values apart, 31 or 15 levels, entropy-coded in the same way |
//! | [`LowRank`] | keys, turned back by their positions, as coefficients in few directions of a [`KeyBasis`] of the model, with a step a layer, entropy-coded in the same way; values in one of the codecs above |
//!
//! A sealed block of `int8` is two frames: its codes, and its scales as elements of their own type with a dim of 1.
//! Formats that rotate leave nothing for an entropy coder to find.
//!
//! # A frame
//!
//! Numbers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 0–3 | `kvcf` |
//! | 4–5 | version, 1 |
//! | 6 | codec: 1 lossless, 2 lossy with 32 bins, 3 lossy with 16, 4 keys of low rank |
//! | 7 | element: 1 f16, 2 bf16, 3 f32, 4 `int8` codes |
//! | 8–27 | layers, KV heads, tokens, key dim, value dim, 4 bytes each |
//! | 28–35 | bytes of the block |
//! | 36–43 | bytes of the payload, which follows at 64 |
//! | 44–63 | history: how many formats, 0 to 3; of each those of keys and of values, a byte each (0 raw, 1 `int8`, 2 `fp8`, 3 `r4`, 4 `r3`, 5 `r2`, 6 `int4`, 7 `int2`), and first and last raw layers, 2 bytes each; zeros |
//! | 64–80, of codec 4 | rank and position of the first token, 4 bytes each; the first 8 bytes of the hash of the basis; the values' codec, 1 to 3 |
//! | the last 8 | XXH3 (64 bits, no seed) of all bytes before |
//!
//! The checksum is for accidents: it has no key, and tells nothing about who wrote a frame. Decoding trusts nothing in a frame all the
//! same: whatever its bytes are, it ends with the block or with an error, and allocates little more than the block that its caller made
//! room for. A basis is another matter: who calibrates and loads it trusts it.

mod basis;
mod coder;
mod frame;
mod input;
mod lossless;
mod lossy;
mod low_rank;
mod tables;

use kv_cache_actors::format::History;
use kv_cache_actors::geometry::{BlockLayout, ElementType};

pub use basis::{BasisError, KeyBasis, KeyBasisBuilder};
pub use frame::{FrameCodec, FrameInfo};
pub use low_rank::{LowRank, LowRankInfo};

/// How a block becomes a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Every bit comes back, NaNs and their payloads too.
    Lossless,
    /// 31 levels an element (32 bins without the one that would make them uneven).
    Lossy32,
    /// 15 levels an element.
    Lossy16,
}

impl Codec {
    /// All of them.
    pub const ALL: [Codec; 3] = [Codec::Lossless, Codec::Lossy32, Codec::Lossy16];

    /// Levels on each side of zero, of a lossy codec.
    const fn levels(self) -> u16 {
        match self {
            Codec::Lossless => 0,
            Codec::Lossy32 => 15,
            Codec::Lossy16 => 7,
        }
    }
}

/// What a block consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE 754 single precision.
    F32,
    /// Signed bytes: the codes of a block that is sealed in `int8`.
    Int8,
}

impl Element {
    /// All of them.
    pub const ALL: [Element; 4] = [Element::F16, Element::Bf16, Element::F32, Element::Int8];

    /// Bytes of one.
    pub const fn bytes(self) -> usize {
        match self {
            Element::F16 | Element::Bf16 => 2,
            Element::F32 => 4,
            Element::Int8 => 1,
        }
    }

    /// None of codes.
    const fn floats(self) -> Option<ElementType> {
        match self {
            Element::F16 => Some(ElementType::F16),
            Element::Bf16 => Some(ElementType::Bf16),
            Element::F32 => Some(ElementType::F32),
            Element::Int8 => None,
        }
    }

    /// The numbers that a lossy codec rounds.
    fn numbers(self, codec: Codec) -> Result<ElementType, ColdError> {
        self.floats().ok_or(ColdError::Unsupported { codec, element: self })
    }

    /// The numbers that keys of low rank are.
    fn keys(self) -> Result<ElementType, ColdError> {
        self.floats().ok_or(ColdError::CodesAsKeys)
    }
}

impl From<ElementType> for Element {
    fn from(element: ElementType) -> Self {
        match element {
            ElementType::F16 => Element::F16,
            ElementType::Bf16 => Element::Bf16,
            ElementType::F32 => Element::F32,
        }
    }
}

/// How the elements of a block lie: `[layers][keys, values][kv_heads][tokens][dim]`. A `value_dim` of 0 is for keys alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Layers.
    pub layers: u32,
    /// Key/value heads of a layer.
    pub kv_heads: u32,
    /// Tokens of the block.
    pub tokens: u32,
    /// Elements of a key head.
    pub key_dim: u32,
    /// Elements of a value head.
    pub value_dim: u32,
}

/// Keys or values of one layer.
#[derive(Debug, Clone)]
struct Plane {
    /// 0 for keys, 1 for values.
    kind: usize,
    dim: usize,
    /// Elements of the block before it.
    first: usize,
    /// Elements of one head.
    head: usize,
}

impl Shape {
    /// Elements of a block; none if they are more than can be counted.
    pub fn elements(&self) -> Option<usize> {
        let dims = u64::from(self.key_dim) + u64::from(self.value_dim);
        let elements = [self.layers, self.kv_heads, self.tokens]
            .into_iter()
            .try_fold(dims, |all, n| all.checked_mul(u64::from(n)));
        elements.and_then(|elements| usize::try_from(elements).ok())
    }

    fn bytes(&self, element: Element) -> Result<usize, ColdError> {
        let bytes = self.elements().and_then(|elements| elements.checked_mul(element.bytes()));
        bytes.filter(|bytes| *bytes <= isize::MAX as usize).ok_or(ColdError::Shape { shape: *self })
    }

    /// Bytes of `block`, which must be those of the shape.
    fn bytes_of(&self, element: Element, block: &[u8]) -> Result<usize, ColdError> {
        let (shape_bytes, given_bytes) = (self.bytes(element)?, block.len());
        if shape_bytes == given_bytes {
            return Ok(shape_bytes);
        }
        Err(ColdError::BlockBytes { shape_bytes, given_bytes })
    }

    /// Planes that hold elements. Of a shape whose bytes were counted.
    fn planes(&self) -> impl Iterator<Item = Plane> + use<> {
        let [heads, tokens] = [self.kv_heads, self.tokens].map(|n| n as usize);
        let dims = [self.key_dim, self.value_dim].map(|dim| dim as usize);
        let layer = heads.saturating_mul(tokens).saturating_mul(dims[0] + dims[1]);
        // A shape without elements may have any number of layers.
        let layers = if layer == 0 { 0 } else { self.layers as usize };
        (0..layers).flat_map(move |at| {
            let plane = move |kind: usize| Plane {
                kind,
                dim: dims[kind],
                first: at * layer + kind * heads * tokens * dims[0],
                head: tokens * dims[kind],
            };
            [0, 1].map(plane).into_iter().filter(|plane| plane.dim > 0)
        })
    }
}

impl From<&BlockLayout> for Shape {
    /// Of raw blocks, and of the codes of those sealed in `int8`.
    fn from(layout: &BlockLayout) -> Self {
        Shape {
            layers: layout.layers as u32,
            kv_heads: layout.kv_heads as u32,
            tokens: layout.block_tokens as u32,
            key_dim: layout.key_dim as u32,
            value_dim: layout.value_dim as u32,
        }
    }
}

/// Appends the frame of a block that has been through `history` to `out`.
///
/// A lossless frame is never longer than the block by more than 73 bytes.
///
/// # Errors
/// [`ColdError::Shape`] or [`ColdError::BlockBytes`] if `block` is none of that shape; [`ColdError::Unsupported`] for a lossy codec on codes;
/// [`ColdError::NotFinite`] for a lossy codec on what is no number. `out` is then as it was.
pub fn encode(
    codec: Codec,
    element: Element,
    shape: &Shape,
    history: &History,
    block: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), ColdError> {
    let bytes = shape.bytes_of(element, block)?;
    let first = frame::begin(FrameCodec::Block(codec), element, shape, history, bytes, out);
    let written = encode_payload(codec, element, shape, block, out);
    match written {
        Ok(()) => frame::end(first, out),
        Err(_) => out.truncate(first),
    }
    written
}

/// Of a block of that shape. What was written before an error stays.
fn encode_payload(
    codec: Codec,
    element: Element,
    shape: &Shape,
    block: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), ColdError> {
    match codec {
        Codec::Lossless => {
            lossless::encode(element, shape, block, out);
            Ok(())
        }
        Codec::Lossy32 | Codec::Lossy16 => lossy::encode(codec, element.numbers(codec)?, shape, block, out),
    }
}

/// Writes the block of a frame to `out`, which must be as long as the block.
///
/// # Errors
/// Those of [`FrameInfo::read`]; [`ColdError::Room`] if `out` is shorter or longer; [`ColdError::Payload`] and
/// [`ColdError::PayloadEnds`] if the payload is none of an encoder's: then `out` holds anything; [`ColdError::NeedsBasis`] for a frame that
/// [`LowRank::decode`] is for.
pub fn decode(frame: &[u8], out: &mut [u8]) -> Result<FrameInfo, ColdError> {
    let info = FrameInfo::read(frame)?;
    if info.block_bytes != out.len() {
        return Err(ColdError::Room { block_bytes: info.block_bytes, room_bytes: out.len() });
    }
    match info.codec {
        FrameCodec::Block(codec) => {
            decode_payload(codec, info.element, &info.shape, info.payload(frame), out)?
        }
        FrameCodec::LowRank(LowRankInfo { basis, .. }) => return Err(ColdError::NeedsBasis { basis }),
    }
    Ok(info)
}

/// `out` is as long as the shape says.
fn decode_payload(
    codec: Codec,
    element: Element,
    shape: &Shape,
    payload: &[u8],
    out: &mut [u8],
) -> Result<(), ColdError> {
    match codec {
        Codec::Lossless => lossless::decode(element, shape, payload, out),
        Codec::Lossy32 | Codec::Lossy16 => lossy::decode(codec, element.numbers(codec)?, shape, payload, out),
    }
}

/// The block of a frame, if it has at most `limit_bytes`.
///
/// # Errors
/// As [`decode`]; [`ColdError::Room`] if the block is larger.
pub fn decode_to_vec(frame: &[u8], limit_bytes: usize) -> Result<(FrameInfo, Vec<u8>), ColdError> {
    let info = FrameInfo::read(frame)?;
    if info.block_bytes > limit_bytes {
        return Err(ColdError::Room { block_bytes: info.block_bytes, room_bytes: limit_bytes });
    }
    let mut block = vec![0; info.block_bytes];
    let info = decode(frame, &mut block)?;
    Ok((info, block))
}

/// Why a block is not encoded or a frame not decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ColdError {
    /// More elements than memory can hold.
    #[error("{shape:?} has more bytes than can be addressed")]
    Shape {
        /// What was asked for.
        shape: Shape,
    },
    /// The block is not of the shape.
    #[error("the shape has {shape_bytes} bytes, the block {given_bytes}")]
    BlockBytes {
        /// Bytes of a block of that shape.
        shape_bytes: usize,
        /// Bytes of this one, or those that the header claims.
        given_bytes: usize,
    },
    /// The codec is not for these elements.
    #[error("{codec:?} does not code {element:?}")]
    Unsupported {
        /// Which codec.
        codec: Codec,
        /// Which elements.
        element: Element,
    },
    /// Lossy codecs need numbers.
    #[error("element {at} is {bits:#x}, which is no finite number")]
    NotFinite {
        /// The element's place in the block.
        at: usize,
        /// Its bits as an f32.
        bits: u32,
    },
    /// Too short for a header and a checksum, or not as long as its header says.
    #[error("the frame has {given_bytes} bytes instead of {frame_bytes}")]
    FrameBytes {
        /// Bytes that there should be.
        frame_bytes: u64,
        /// Bytes that there are.
        given_bytes: usize,
    },
    /// Something else.
    #[error("a frame begins with {expected:?}, this with {found:?}", expected = frame::MAGIC)]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// Of another version.
    #[error("the frame is of version {found}, {supported} is understood")]
    Version {
        /// The frame's.
        found: u16,
        /// The one that is understood.
        supported: u16,
    },
    /// A codec of no known number.
    #[error("there is no codec {found}")]
    UnknownCodec {
        /// The number.
        found: u8,
    },
    /// An element of no known number.
    #[error("there is no element type {found}")]
    UnknownElement {
        /// The number.
        found: u8,
    },
    /// A format of no known number, or more of them than there is room for.
    #[error("a history of the format {found}, or of so many, is not known")]
    UnknownHistory {
        /// The number.
        found: u8,
    },
    /// Bytes have changed.
    #[error("the checksum is {stored:#018x}, the bytes have {computed:#018x}")]
    Checksum {
        /// The one in the frame.
        stored: u64,
        /// That of the frame's bytes.
        computed: u64,
    },
    /// The caller has no room, or more than the block.
    #[error("the block has {block_bytes} bytes, there is room for {room_bytes}")]
    Room {
        /// Bytes of the block.
        block_bytes: usize,
        /// Bytes that the caller allows.
        room_bytes: usize,
    },
    /// The payload is too short.
    #[error("{needed_bytes} bytes are needed at byte {at_byte} of the payload, {left_bytes} are left")]
    PayloadEnds {
        /// How far it was read.
        at_byte: usize,
        /// Bytes that follow in a payload of an encoder.
        needed_bytes: usize,
        /// Bytes that follow in this.
        left_bytes: usize,
    },
    /// The payload holds what no encoder writes.
    #[error("at byte {at_byte} of the payload: {what} is {found}, expected {least} to {most}")]
    Payload {
        /// What was read.
        what: &'static str,
        /// How far it was read.
        at_byte: usize,
        /// What is there.
        found: usize,
        /// The least that there may be.
        least: usize,
        /// The most.
        most: usize,
    },
    /// Keys of low rank are decoded by [`LowRank::decode`], with their basis.
    #[error("the frame's keys are coefficients in the basis {basis:02x?}, which is needed")]
    NeedsBasis {
        /// The first bytes of the basis' hash.
        basis: [u8; 8],
    },
    /// The frame has its keys as they are: [`decode`] is for it.
    #[error("the frame's keys are no coefficients")]
    NoLowRank,
    /// Codes are no keys that can be projected.
    #[error("keys of low rank are made of floats")]
    CodesAsKeys,
    /// Another basis than the frame's.
    #[error("the frame's keys are coefficients in the basis {frame:02x?}, not in {given:02x?}")]
    OtherBasis {
        /// The first bytes of the hash of the frame's.
        frame: [u8; 8],
        /// Those of the given one's.
        given: [u8; 8],
    },
    /// Another position than the frame's.
    #[error("the frame's block begins at token {frame}, not {given}")]
    OtherPosition {
        /// The frame's.
        frame: u32,
        /// The given one.
        given: u32,
    },
    /// The basis is of keys of another shape.
    #[error("the basis has [layers, kv_heads, key_dim] {basis:?}, which is not {shape:?}")]
    BasisShape {
        /// Layers, KV heads and key dim of the basis.
        basis: [u32; 3],
        /// The block's.
        shape: Shape,
    },
}
