//! In which directions the keys of a model lie: a calibration, made once from any text, and its file.

use std::path::Path;

use kv_cache_actors::geometry::{Geometry, Rope, RopeLayout};
use nalgebra::{DMatrix, SymmetricEigen};

use super::{ColdError, Shape};
use crate::key_means::{turns, unrotate};

/// An orthonormal basis of each layer's keys before rotation, all KV heads of the layer joined: [`rank`](KeyBasis::rank) directions of
/// [`width`](KeyBasis::width) `= kv_heads * key_dim` elements, those in which keys differ most first, and the mean key that differences are
/// taken from. Made by a [`KeyBasisBuilder`], used by [`LowRank`](super::LowRank).
///
/// Before rotation: a rotation by position spreads what lies in few directions over many. All heads: they share directions.
///
/// # The file
///
/// Numbers are little-endian, floats single; a number that is no finite one is refused.
///
/// | bytes | what |
/// |---|---|
/// | 0–3 | `kvkb` |
/// | 4–5 | version, 1 |
/// | 6 | how keys are rotated: 0 not at all, 1 interleaved, 2 half-split |
/// | 7 | 0 |
/// | 8–27 | layers, KV heads, key dim, rank, pairs that rotate, 4 bytes each |
/// | 28–31 | factor on the rotation's cosine and sine |
/// | 32–39 | tokens that it was made from |
/// | from 40 | inverse frequencies, `[pairs]` |
/// | then | spreads, `[layers]`, means, `[layers, width]` |
/// | then | directions, `[layers, rank, width]` |
/// | the last 32 | BLAKE3 of all bytes before: the basis' [`hash`](KeyBasis::hash) |
#[derive(Debug, Clone, PartialEq)]
pub struct KeyBasis {
    layers: u32,
    kv_heads: u32,
    key_dim: u32,
    rank: u32,
    rope: Option<Rope>,
    tokens: u64,
    /// `[layers]`
    spreads: Vec<f32>,
    means: Vec<f32>,
    directions: Vec<f32>,
    hash: [u8; 32],
}

/// What a basis says of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct OfLayer<'a> {
    pub(super) spread: f32,
    /// `[width]`
    pub(super) mean: &'a [f32],
    /// `[rank, width]`
    pub(super) directions: &'a [f32],
}

const MAGIC: [u8; 4] = *b"kvkb";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 40;
const HASH_BYTES: usize = 32;

impl KeyBasis {
    /// Reads a file that [`KeyBasis::save`] has written.
    ///
    /// # Errors
    /// [`BasisError::Io`] if it cannot be read, [`BasisError::File`] if it holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, BasisError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| BasisError::io(path, &error))?;
        Self::parse(&bytes).map_err(|reason| BasisError::File { file: path.display().to_string(), reason })
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`BasisError::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), BasisError> {
        let path = path.as_ref();
        let bytes = [self.body(), self.hash.to_vec()].concat();
        std::fs::write(path, bytes).map_err(|error| BasisError::io(path, &error))
    }

    /// Directions that are kept of each layer.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Elements of a key of a layer, all heads joined.
    pub fn width(&self) -> u32 {
        self.kv_heads * self.key_dim
    }

    /// BLAKE3 of everything in it. Frames hold the first 8 bytes.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// The mean key of a layer before rotation, `[kv_heads, key_dim]`; none if there is no such layer.
    pub fn mean(&self, layer: u32) -> Option<&[f32]> {
        self.means.chunks_exact(self.width() as usize).nth(layer as usize)
    }

    /// Root mean square of the elements of a layer's keys around their mean; none if there is no such layer.
    pub fn spread(&self, layer: u32) -> Option<f32> {
        self.spreads.get(layer as usize).copied()
    }

    /// The directions of a layer, `[rank, kv_heads, key_dim]`; none if there is no such layer.
    pub fn directions(&self, layer: u32) -> Option<&[f32]> {
        self.directions.chunks_exact(self.rank as usize * self.width() as usize).nth(layer as usize)
    }

    pub(super) fn rope(&self) -> Option<&Rope> {
        self.rope.as_ref()
    }

    /// What frames name it by.
    pub(super) fn name(&self) -> [u8; 8] {
        let mut name = [0; 8];
        name.copy_from_slice(&self.hash[..8]);
        name
    }

    pub(super) fn of_layers(&self) -> impl Iterator<Item = OfLayer<'_>> {
        let width = self.width() as usize;
        let directions = self.directions.chunks_exact(self.rank as usize * width);
        let both = self.means.chunks_exact(width).zip(directions);
        self.spreads.iter().zip(both).map(|(spread, (mean, directions))| OfLayer {
            spread: *spread,
            mean,
            directions,
        })
    }

    /// Refuses blocks of another model.
    pub(super) fn fits(&self, shape: &Shape) -> Result<(), ColdError> {
        let basis = [self.layers, self.kv_heads, self.key_dim];
        if basis == [shape.layers, shape.kv_heads, shape.key_dim] {
            return Ok(());
        }
        Err(ColdError::BasisShape { basis, shape: *shape })
    }

    /// The file but for the hash.
    fn body(&self) -> Vec<u8> {
        let (layout, inv_freq, scale) = match &self.rope {
            None => (0, &[][..], 1.0),
            Some(rope) => (number_of_layout(rope.layout), &rope.inv_freq[..], rope.attention_scale),
        };
        let mut body = MAGIC.to_vec();
        body.extend(VERSION.to_le_bytes());
        body.extend([layout, 0]);
        for dim in [self.layers, self.kv_heads, self.key_dim, self.rank, inv_freq.len() as u32] {
            body.extend(dim.to_le_bytes());
        }
        body.extend(scale.to_le_bytes());
        body.extend(self.tokens.to_le_bytes());
        let numbers = [inv_freq, &self.spreads, &self.means, &self.directions];
        body.extend(numbers.into_iter().flatten().flat_map(|x| x.to_le_bytes()));
        body
    }

    /// # Errors
    /// In words: what is wrong.
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let Some((body, hash)) =
            bytes.split_last_chunk::<HASH_BYTES>().filter(|(body, _)| body.len() >= HEADER_BYTES)
        else {
            return Err(format!("{} bytes are fewer than a header has", bytes.len()));
        };
        if body[..4] != MAGIC {
            return Err(format!("it begins with {:?} instead of {MAGIC:?}", &body[..4]));
        }
        let version = u16::from_le_bytes([body[4], body[5]]);
        if version != VERSION {
            return Err(format!("it is of version {version}, {VERSION} is understood"));
        }
        let word = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
        let [layers, kv_heads, key_dim, rank, pairs] = [8, 12, 16, 20, 24].map(word);
        let mut geometry =
            Geometry::new(layers, kv_heads, key_dim, kv_cache_actors::geometry::ElementType::F32);
        geometry.block_tokens = 1;
        geometry.layout().map_err(|error| error.to_string())?;
        // Each below 4 Mi now: the products below fit 64 bits.
        let width = u64::from(kv_heads) * u64::from(key_dim);
        if rank == 0 || u64::from(rank) > width || u64::from(pairs) * 2 > u64::from(key_dim) {
            return Err(format!("rank {rank} and {pairs} pairs for {kv_heads} heads of {key_dim}"));
        }
        let numbers = u64::from(pairs) + u64::from(layers) * (1 + width + width * u64::from(rank));
        let found = body.len() - HEADER_BYTES;
        if numbers * 4 != found as u64 {
            return Err(format!("{found} bytes behind the header instead of {}", numbers * 4));
        }
        let hash_found = *blake3::hash(body).as_bytes();
        if hash_found != *hash {
            return Err("its bytes are not those that were written".to_owned());
        }
        let numbers =
            body[HEADER_BYTES..].chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]));
        let mut inv_freq = numbers.collect::<Vec<_>>();
        if let Some(at) = inv_freq.iter().position(|x| !x.is_finite()) {
            return Err(format!("number {at} is {}", inv_freq[at]));
        }
        let mut spreads = inv_freq.split_off(pairs as usize);
        let mut means = spreads.split_off(layers as usize);
        let directions = means.split_off((u64::from(layers) * width) as usize);
        let scale = f32::from_bits(word(28));
        let rope = match (body[6], body[7]) {
            (0, 0) if pairs == 0 => None,
            (layout @ 1..=2, 0) => {
                let layout = if layout == 1 { RopeLayout::Interleaved } else { RopeLayout::HalfSplit };
                Some(Rope { inv_freq, rotary_dims: 2 * pairs, layout, attention_scale: scale })
            }
            (layout, more) => return Err(format!("a rotation of kind {layout}, {more} with {pairs} pairs")),
        };
        if !scale.is_normal() {
            return Err(format!("a factor of {scale} on the rotation"));
        }
        let tokens = u64::from_le_bytes([
            body[32], body[33], body[34], body[35], body[36], body[37], body[38], body[39],
        ]);
        Ok(KeyBasis {
            layers,
            kv_heads,
            key_dim,
            rank,
            rope,
            tokens,
            spreads,
            means,
            directions,
            hash: hash_found,
        })
    }
}

const fn number_of_layout(layout: RopeLayout) -> u8 {
    match layout {
        RopeLayout::Interleaved => 1,
        RopeLayout::HalfSplit => 2,
    }
}

/// Gathers in which directions the keys of a model lie from what it computes on some text: some thousand tokens, several times the
/// width. Takes 8 bytes a layer and square of the width.
///
/// ```
/// use kv_cache::cold::KeyBasisBuilder;
/// use kv_cache::{ElementType, Geometry};
///
/// let geometry = Geometry::new(1, 1, 4, ElementType::F16);
/// let mut keys = KeyBasisBuilder::new(&geometry)?;
/// // Keys of three tokens of layer 0, as the model would append them: `[tokens, kv_heads, key_dim]`.
/// keys.add(0, 0, &[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 6.0, 1.0, 2.0, 3.0, 8.0]);
/// let basis = keys.finish(1)?;
/// assert_eq!(basis.mean(0), Some(&[1.0, 2.0, 3.0, 6.0][..]));
/// assert_eq!(basis.directions(0).unwrap()[3].abs(), 1.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct KeyBasisBuilder {
    layers: u32,
    kv_heads: u32,
    key_dim: u32,
    rope: Option<Rope>,
    of_layers: Vec<Sums>,
}

/// Of the keys of one layer before rotation.
#[derive(Debug, Clone)]
struct Sums {
    tokens: u64,
    /// `[width]`
    sum: Vec<f64>,
    /// `[width, width]` products, of which those right of the diagonal and on it are kept.
    products: Vec<f64>,
}

impl KeyBasisBuilder {
    /// For a model of this geometry, whose [`Rope`] says how keys are rotated.
    ///
    /// # Errors
    /// [`ConfigError`](crate::ConfigError) for a geometry that no cache would take.
    pub fn new(geometry: &Geometry) -> Result<Self, crate::ConfigError> {
        geometry.layout()?;
        let group = &geometry.groups[0];
        let width = group.kv_heads as usize * group.key_dim as usize;
        let sums = Sums { tokens: 0, sum: vec![0.0; width], products: vec![0.0; width * width] };
        Ok(KeyBasisBuilder {
            layers: group.layers,
            kv_heads: group.kv_heads,
            key_dim: group.key_dim,
            rope: group.rope.clone(),
            of_layers: vec![sums; group.layers as usize],
        })
    }

    /// Adds keys of one layer, rotated, of consecutive tokens from `position` on: `[tokens, kv_heads, key_dim]`. What is left over of
    /// an incomplete token, or of a layer that does not exist, is not looked at.
    pub fn add(&mut self, layer: u32, position: u32, keys: &[f32]) {
        let Some(Sums { tokens, sum, products }) = self.of_layers.get_mut(layer as usize) else { return };
        let width = sum.len();
        for (at, token) in keys.chunks_exact(width).enumerate() {
            let mut key = token.iter().copied().map(f64::from).collect::<Vec<_>>();
            if let Some(rope) = &self.rope {
                let turns = turns(rope, f64::from(position) + at as f64);
                for key in key.chunks_exact_mut(self.key_dim as usize) {
                    unrotate(rope, &turns, key);
                }
            }
            *tokens += 1;
            for (at, (x, products)) in key.iter().zip(products.chunks_exact_mut(width)).enumerate() {
                sum[at] += x;
                products[at..].iter_mut().zip(&key[at..]).for_each(|(product, y)| *product += x * y);
            }
        }
    }

    /// The basis of the `rank` leading directions of each layer. The keys stay, for another rank.
    ///
    /// # Errors
    /// [`BasisError::Rank`] if `rank` is 0 or more than the width, [`BasisError::Keys`] if a layer has no keys, or some that are no finite
    /// numbers.
    pub fn finish(&self, rank: u32) -> Result<KeyBasis, BasisError> {
        let width = self.kv_heads * self.key_dim;
        if rank == 0 || rank > width {
            return Err(BasisError::Rank { rank, width });
        }
        let (mut spreads, mut means, mut directions) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, sums) in self.of_layers.iter().enumerate() {
            let found = sums.directions();
            let (spread, found) =
                found.ok_or(BasisError::Keys { layer: layer as u32, tokens: sums.tokens })?;
            spreads.push(spread);
            means.extend(sums.mean().map(|mean| mean as f32));
            directions.extend(found.into_iter().take(rank as usize).flatten());
        }
        let (layers, kv_heads, key_dim) = (self.layers, self.kv_heads, self.key_dim);
        let tokens = self.of_layers.iter().map(|sums| sums.tokens).max().unwrap_or_default();
        let rope = self.rope.clone();
        let mut basis = KeyBasis {
            layers,
            kv_heads,
            key_dim,
            rank,
            rope,
            tokens,
            spreads,
            means,
            directions,
            hash: [0; 32],
        };
        basis.hash = *blake3::hash(&basis.body()).as_bytes();
        Ok(basis)
    }
}

impl Sums {
    fn mean(&self) -> impl Iterator<Item = f64> {
        self.sum.iter().map(|sum| sum / self.tokens as f64)
    }

    /// Root of the mean variance, and eigenvectors of the covariance, those of the largest eigenvalues first; none if it has none.
    fn directions(&self) -> Option<(f32, Vec<Vec<f32>>)> {
        let (width, mean) = (self.sum.len(), self.mean().collect::<Vec<_>>());
        let covariance = DMatrix::from_fn(width, width, |a, b| {
            let (a, b) = (a.min(b), a.max(b));
            self.products[a * width + b] / self.tokens as f64 - mean[a] * mean[b]
        });
        // The iteration would not end on what is no number.
        if !covariance.iter().all(|x| x.is_finite()) {
            return None;
        }
        let spread = (covariance.trace() / width as f64).max(0.0).sqrt() as f32;
        let eigen = SymmetricEigen::try_new(covariance, f64::EPSILON, 1000 * width)?;
        let mut order = (0..width).collect::<Vec<_>>();
        order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
        let direction = |at: usize| eigen.eigenvectors.column(at).iter().map(|x| *x as f32).collect();
        Some((spread, order.into_iter().map(direction).collect()))
    }
}

/// Why there is no basis.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BasisError {
    /// The file cannot be read or written.
    #[error("{file}: {reason}")]
    Io {
        /// Which file.
        file: String,
        /// What the system says.
        reason: String,
    },
    /// The file is something else, or has changed.
    #[error("{file}: no basis of keys: {reason}")]
    File {
        /// Which file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// There are not so many directions, or none are asked for.
    #[error("a rank of {rank} for keys of {width} elements: use 1 to {width}")]
    Rank {
        /// Directions that were asked for.
        rank: u32,
        /// Elements of a key of a layer, all heads joined.
        width: u32,
    },
    /// A layer without keys, or with some that are no finite numbers.
    #[error(
        "no directions can be found in the keys of {tokens} tokens of layer {layer}: add finite ones of every layer"
    )]
    Keys {
        /// Which layer.
        layer: u32,
        /// Tokens whose keys were added.
        tokens: u64,
    },
}

impl BasisError {
    fn io(path: &Path, error: &std::io::Error) -> Self {
        BasisError::Io { file: path.display().to_string(), reason: error.to_string() }
    }
}
