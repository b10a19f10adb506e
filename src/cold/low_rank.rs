//! Keys as coefficients in few directions.
//!
//! A payload's head says the rank, the position and the basis, and what values are coded in. Then come a step (bf16) of each token of each
//! layer, the coded levels of all coefficients, and the payload of the values: that of a block without keys.

use half::bf16;
use kv_cache_actors::format::History;
use kv_cache_actors::geometry::RopeLayout;

use super::basis::OfLayer;
use super::coder::{self, Alphabet, Decoder};
use super::frame::{self, FrameCodec, FrameInfo, LOW_RANK_HEAD_BYTES};
use super::input::Input;
use super::{Codec, ColdError, Element, KeyBasis, Shape, decode_payload, encode_payload, lossy};
use crate::backend::cpu::codec::{finite_max, store_row};
use crate::key_means::{dims_of, turns};

/// Levels on each side of zero: most coefficients take the few around it, which is what the entropy coder shortens.
const LEVELS: u16 = 127;
/// A step, in root mean squares of the layer's keys around their mean. Measured on SmolLM2: one step for all coefficients costs fewer bits
/// for the same divergence than one by each coefficient's spread, and a layer's than one by the largest of each token.
const STEP: f32 = 0.5;

/// Coefficients beyond are refused, for the sums of their products with a basis would be no numbers: far above any key.
const COEFFICIENT_MAX: f32 = f32::from_bits((127 + 100) << 23);

/// Frames whose keys are coefficients in the leading directions of a [`KeyBasis`], and whose values are in another codec.
///
/// A key of all heads of a layer is turned back by its position's rotation, the mean key is taken off, and what is left is projected on
/// the basis: `rank` coefficients for `kv_heads * key_dim` elements. They are rounded to multiples of half the root mean square that the
/// elements of the layer's keys have in the basis' calibration (of more, for a token that would take more than 127), and entropy-coded.
/// So a block is encoded and decoded *at a position*, that of its first token, and by the same basis.
///
/// ```
/// use kv_cache::cold::{Codec, Element, FrameInfo, KeyBasisBuilder, LowRank, Shape};
/// use kv_cache::{ElementType, Geometry, History};
///
/// let geometry = Geometry::new(1, 2, 4, ElementType::F32).block_tokens(2);
/// // Keys that lie in one direction: `[tokens, kv_heads, key_dim]`, and the same as in a block, `[kv_heads, tokens, key_dim]`.
/// let key = |x: f32| [x, 2.0 * x, 0.0, 1.0];
/// let keys = [key(1.0), key(1.5), key(-1.0), key(-1.5)].concat();
/// let mut builder = KeyBasisBuilder::new(&geometry)?;
/// builder.add(0, 0, &keys);
/// let basis = builder.finish(1)?;
///
/// let shape = Shape::from(&geometry.layout()?);
/// let in_block = [key(1.0), key(-1.0), key(1.5), key(-1.5)].concat();
/// let values = [0.5; 16];
/// let block: Vec<u8> = in_block.iter().chain(&values).flat_map(|x: &f32| x.to_le_bytes()).collect();
/// let low_rank = LowRank { basis: &basis, values: Codec::Lossless };
/// let mut frame = Vec::new();
/// low_rank.encode(Element::F32, &shape, 64, &History::default(), &block, &mut frame)?;
///
/// let mut decoded = vec![0; FrameInfo::read(&frame)?.block_bytes];
/// low_rank.decode(&frame, 64, &mut decoded)?;
/// assert_eq!(decoded[64..], block[64..]);
/// // Of the one coefficient a token, half a step is lost at most: a quarter of the spread.
/// let most = basis.spread(0).unwrap() / 4.0;
/// for (x, y) in decoded.chunks_exact(4).zip(in_block) {
///     assert!((f32::from_le_bytes(x.try_into()?) - y).abs() <= most);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// In which directions the model's keys lie.
    pub basis: &'a KeyBasis,
    /// How values are encoded. Decoding takes what a frame says.
    pub values: Codec,
}

/// What a frame of [`LowRank`] says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LowRankInfo {
    /// Directions of its basis.
    pub rank: u32,
    /// Of the block's first token.
    pub position: u32,
    /// The first bytes of its basis' hash.
    pub basis: [u8; 8],
    /// How its values were encoded.
    pub values: Codec,
}

impl LowRank<'_> {
    /// Appends the frame of a block whose first token is at `position`, and which has been through `history`, to `out`.
    ///
    /// # Errors
    /// [`ColdError::Shape`] or [`ColdError::BlockBytes`] if `block` is none of that shape; [`ColdError::BasisShape`] if the basis is another
    /// model's; [`ColdError::CodesAsKeys`] for [`Element::Int8`]; [`ColdError::NotFinite`] if a key (with a lossy codec for values, also
    /// a value) is no finite number, or so large (2^100) that a coefficient would be none. `out` is then as it was.
    pub fn encode(
        &self,
        element: Element,
        shape: &Shape,
        position: u32,
        history: &History,
        block: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), ColdError> {
        let bytes = shape.bytes_of(element, block)?;
        self.basis.fits(shape)?;
        let first = out.len();
        let (rank, basis) = (self.basis.rank(), self.basis.name());
        let info = LowRankInfo { rank, position, basis, values: self.values };
        frame::begin(FrameCodec::LowRank(info), element, shape, history, bytes, out);
        let written = self.encode_keys(element, shape, position, block, out).and_then(|()| {
            let values = without_keys(element, shape, block);
            encode_payload(self.values, element, &Shape { key_dim: 0, ..*shape }, &values, out)
                .map_err(|error| in_block(error, shape))
        });
        match written {
            Ok(()) => frame::end(first, out),
            Err(_) => out.truncate(first),
        }
        written
    }

    fn encode_keys(
        &self,
        element: Element,
        shape: &Shape,
        position: u32,
        block: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), ColdError> {
        let element = element.keys()?;
        let (tokens, rank) = (shape.tokens as usize, self.basis.rank() as usize);
        let back = Turns::new(self.basis, position, tokens, true);
        let (mut rows, mut keys, mut coefficients) = (Vec::new(), Vec::new(), Vec::new());
        let mut symbols = Vec::new();
        for (plane, OfLayer { spread, mean, directions }) in
            shape.planes().filter(|plane| plane.kind == 0).zip(self.basis.of_layers())
        {
            lossy::load(element, shape, &plane, block, &mut rows)?;
            keys.clear();
            for head in rows.chunks_exact(plane.head) {
                keys.extend(
                    (0..plane.dim)
                        .flat_map(|dim| (0..tokens).map(move |token| head[token * plane.dim + dim])),
                );
            }
            back.turn(&mut keys, plane.dim);
            for (keys, mean) in keys.chunks_exact_mut(tokens).zip(mean) {
                keys.iter_mut().for_each(|x| *x -= mean);
            }
            coefficients.clear();
            coefficients.resize(rank * tokens, 0.0);
            for (direction, coefficients) in
                directions.chunks_exact(mean.len()).zip(coefficients.chunks_exact_mut(tokens))
            {
                for (x, keys) in direction.iter().zip(keys.chunks_exact(tokens)) {
                    add_times(coefficients, *x, keys);
                }
            }
            if let Some(at) = coefficients.iter().position(|x| x.is_nan() || x.abs() > COEFFICIENT_MAX) {
                let (at, bits) = (plane.first + at % tokens * plane.dim, coefficients[at].to_bits());
                return Err(ColdError::NotFinite { at, bits });
            }
            for token in 0..tokens {
                let of_token = coefficients[token..].iter().step_by(tokens);
                let largest = of_token.clone().fold(0f32, |largest, x| largest.max(x.abs()));
                let step = lossy::step(largest.max(f32::from(LEVELS) * STEP * spread), LEVELS);
                out.extend(step.to_le_bytes());
                let step = step.to_f32();
                symbols.extend(of_token.map(|x| lossy::level(*x, step, LEVELS)));
            }
        }
        coder::encode(&alphabet(), tokens * rank, rank, &symbols, out);
        Ok(())
    }

    /// Writes the block of a frame to `out`, which must be as long as the block ([`FrameInfo::block_bytes`]). `position` is that of the
    /// block's first token, as it was when the frame was made. Allocates a few times what one layer takes, and the bytes of the values.
    ///
    /// # Errors
    /// Those of [`FrameInfo::read`]; [`ColdError::NoLowRank`] for a frame of [`encode`](super::encode); [`ColdError::OtherBasis`],
    /// [`ColdError::BasisShape`] and [`ColdError::OtherPosition`] if the frame was made with another basis or at another position;
    /// [`ColdError::Room`] if `out` is shorter or longer; [`ColdError::Payload`] and [`ColdError::PayloadEnds`] if the payload is none of
    /// an encoder's: then `out` holds anything.
    pub fn decode(&self, frame: &[u8], position: u32, out: &mut [u8]) -> Result<FrameInfo, ColdError> {
        let info = FrameInfo::read(frame)?;
        let FrameCodec::LowRank(of_keys) = info.codec else { return Err(ColdError::NoLowRank) };
        if of_keys.basis != self.basis.name() {
            return Err(ColdError::OtherBasis { frame: of_keys.basis, given: self.basis.name() });
        }
        if of_keys.position != position {
            return Err(ColdError::OtherPosition { frame: of_keys.position, given: position });
        }
        self.basis.fits(&info.shape)?;
        if info.block_bytes != out.len() {
            return Err(ColdError::Room { block_bytes: info.block_bytes, room_bytes: out.len() });
        }
        let mut input = Input::new(info.payload(frame));
        input.take(LOW_RANK_HEAD_BYTES)?;
        let rank = self.basis.rank() as usize;
        input.within("the rank", of_keys.rank as usize, rank..=rank)?;
        self.decode_keys(&info, position, &mut input, out)?;

        let (bytes, shape) = (info.element.bytes(), Shape { key_dim: 0, ..info.shape });
        let planes = || info.shape.planes().filter(|plane| plane.kind == 1);
        let heads = shape.kv_heads as usize;
        let mut values = vec![0; planes().map(|plane| heads * plane.head * bytes).sum()];
        decode_payload(of_keys.values, info.element, &shape, input.rest(), &mut values)?;
        let mut from = &values[..];
        for plane in planes() {
            let (of_plane, behind) = from.split_at(heads * plane.head * bytes);
            out[plane.first * bytes..][..of_plane.len()].copy_from_slice(of_plane);
            from = behind;
        }
        Ok(info)
    }

    fn decode_keys(
        &self,
        info: &FrameInfo,
        position: u32,
        input: &mut Input<'_>,
        out: &mut [u8],
    ) -> Result<(), ColdError> {
        if out.is_empty() {
            return Ok(());
        }
        let (shape, element) = (&info.shape, info.element.keys()?);
        let (tokens, rank, width) =
            (shape.tokens as usize, self.basis.rank() as usize, self.basis.width() as usize);
        let mut steps = Input::new(input.take(2 * tokens * shape.layers as usize)?);
        let mut decoder = Decoder::new(alphabet(), rank, input)?;
        let forth = Turns::new(self.basis, position, tokens, false);
        let most = finite_max(element);
        let (mut symbols, mut keys) = (vec![0; tokens * rank], vec![0.0; width * tokens]);
        let (mut step_of, mut coefficients, mut rows) = (vec![0.0; tokens], vec![0.0; tokens], Vec::new());
        for (plane, OfLayer { mean, directions, .. }) in
            shape.planes().filter(|plane| plane.kind == 0).zip(self.basis.of_layers())
        {
            for (step, bytes) in step_of.iter_mut().zip(steps.take(2 * tokens)?.chunks_exact(2)) {
                let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
                let [least, most] = [bf16::MIN_POSITIVE, bf16::MAX].map(|step| usize::from(step.to_bits()));
                steps.within("a step", usize::from(bits), least..=most)?;
                *step = bf16::from_bits(bits).to_f32();
            }
            decoder.plane(&mut symbols);
            for (keys, mean) in keys.chunks_exact_mut(tokens).zip(mean) {
                keys.fill(*mean);
            }
            for (at, direction) in directions.chunks_exact(width).enumerate() {
                let symbols = symbols[at..].iter().step_by(rank);
                for ((coefficient, symbol), step) in coefficients.iter_mut().zip(symbols).zip(&step_of) {
                    *coefficient = (f32::from(*symbol) - f32::from(LEVELS)) * step;
                }
                for (x, keys) in direction.iter().zip(keys.chunks_exact_mut(tokens)) {
                    add_times(keys, *x, &coefficients);
                }
            }
            forth.turn(&mut keys, plane.dim);
            rows.clear();
            for head in keys.chunks_exact(plane.head) {
                rows.extend(
                    (0..tokens).flat_map(|token| (0..plane.dim).map(move |dim| head[dim * tokens + token])),
                );
            }
            rows.iter_mut().for_each(|x: &mut f32| *x = x.clamp(-most, most));
            store_row(
                element,
                &rows,
                &mut out[plane.first * element.bytes()..][..rows.len() * element.bytes()],
            );
        }
        decoder.finish(input)
    }
}

/// `to += x * from`
fn add_times(to: &mut [f32], x: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += x * from);
}

/// Rotation of the keys of a block by their positions, or back.
struct Turns {
    tokens: usize,
    layout: RopeLayout,
    /// `[pairs, tokens]`, cosine and sine.
    turns: Vec<[f32; 2]>,
}

impl Turns {
    fn new(basis: &KeyBasis, position: u32, tokens: usize, back: bool) -> Turns {
        let Some(rope) = basis.rope() else {
            return Turns { tokens, layout: RopeLayout::Interleaved, turns: Vec::new() };
        };
        let mut of_pairs = vec![[0.0; 2]; rope.inv_freq.len() * tokens];
        let length = f64::from(rope.attention_scale) * f64::from(rope.attention_scale);
        for token in 0..tokens {
            let turns = turns(rope, f64::from(position) + token as f64);
            for ((cos, sin), to) in turns.into_iter().zip(of_pairs[token..].iter_mut().step_by(tokens)) {
                let (cos, sin) = if back { (cos / length, -sin / length) } else { (cos, sin) };
                *to = [cos as f32, sin as f32];
            }
        }
        Turns { tokens, layout: rope.layout, turns: of_pairs }
    }

    /// Keys are `[kv_heads, key_dim, tokens]`.
    fn turn(&self, keys: &mut [f32], key_dim: usize) {
        let tokens = self.tokens;
        let pairs = self.turns.len() / tokens;
        for head in keys.chunks_exact_mut(key_dim * tokens) {
            for (pair, turns) in self.turns.chunks_exact(tokens).enumerate() {
                let (a, b) = dims_of(self.layout, pairs, pair);
                let (before, behind) = head.split_at_mut(b * tokens);
                let (a, b) = (&mut before[a * tokens..][..tokens], &mut behind[..tokens]);
                for ((x, y), [cos, sin]) in a.iter_mut().zip(b).zip(turns) {
                    (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
                }
            }
        }
    }
}

/// The values of a block, in their order.
fn without_keys(element: Element, shape: &Shape, block: &[u8]) -> Vec<u8> {
    let (bytes, heads) = (element.bytes(), shape.kv_heads as usize);
    let values = shape.planes().filter(|plane| plane.kind == 1);
    values.flat_map(|plane| &block[plane.first * bytes..][..heads * plane.head * bytes]).copied().collect()
}

/// An error about values alone as one about the block.
fn in_block(error: ColdError, shape: &Shape) -> ColdError {
    let ColdError::NotFinite { at, bits } = error else { return error };
    let mut planes = shape.planes().filter(|plane| plane.kind == 1);
    let elements = shape.kv_heads as usize * shape.tokens as usize * shape.value_dim as usize;
    let first = planes.nth(at / elements.max(1)).map_or(0, |plane| plane.first);
    ColdError::NotFinite { at: first + at % elements.max(1), bits }
}

/// A coefficient as a context: how large it is. Its sign says nothing about the next token's.
fn alphabet() -> Alphabet {
    Alphabet::new(2 * LEVELS + 1, |symbol| symbol.abs_diff(LEVELS) as u8)
}
