//! How much smaller cold codecs make real keys and values, and how fast, on one core beside `memcpy`.
//!
//! `cargo bench --bench cold` takes the tensors that lie beside the tests (three layers of SmolLM2-135M, 128 tokens of text), one frame a block of
//! 32 tokens. `KV_CACHE_KV=FILE` takes all that `quality --dump-kv FILE` has written instead. Rates are bytes of the block a second, for
//! `memcpy` too, each block in the fastest of many turns: what else runs on a machine disturbs the others. Keys of low rank are in half of the
//! directions that these very keys lie in: that row is there for its rates, and `quality` for what it loses.

#[path = "../tests/common/kv.rs"]
mod kv;

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use half::{bf16, f16};
use kv::Kv;
use kv_cache::History;
use kv_cache::cold::{self, Codec, ColdError, Element, KeyBasis, KeyBasisBuilder, LowRank, Shape};
use kv_cache::{ElementType, Geometry, Rope, RopeLayout};

const TURNS: usize = 60;
/// What is copied in one go: more than a core's own caches hold.
const COPY_BYTES: usize = 16 << 20;

fn main() -> anyhow::Result<()> {
    let file = std::env::var_os("KV_CACHE_KV");
    let kv = file.as_ref().map_or_else(Kv::fixture, |file| Kv::read(Path::new(file)))?;
    // `cargo test --benches` only checks that things run.
    let (turns, copy_bytes) =
        if std::env::args().any(|arg| arg == "--bench") { (TURNS, COPY_BYTES) } else { (1, 1) };
    println!("{} layers, {} tokens, blocks of {} tokens", kv.layers.len(), kv.tokens, kv::BLOCK_TOKENS);
    println!(
        "| codec | element | times smaller | bits/element | encode MB/s | decode MB/s | memcpy MB/s | error |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for codec in Codec::ALL {
        for element in Element::ALL {
            if codec == Codec::Lossless || matches!(element, Element::F16 | Element::Bf16) {
                measure(&kv, Way::Codec(codec), element, turns, copy_bytes)?;
            }
        }
    }
    let basis = basis(&kv)?;
    let low_rank = LowRank { basis: &basis, values: Codec::Lossy32 };
    measure(&kv, Way::LowRank(low_rank), Element::Bf16, turns, copy_bytes)
}

#[derive(Debug, Clone, Copy)]
enum Way<'a> {
    Codec(Codec),
    LowRank(LowRank<'a>),
}

impl Way<'_> {
    fn name(self) -> String {
        match self {
            Way::Codec(codec) => format!("{codec:?}"),
            Way::LowRank(LowRank { basis, values }) => {
                format!("LowRank ({} of {}), {values:?}", basis.rank(), basis.width())
            }
        }
    }

    fn encode(
        self,
        element: Element,
        shape: &Shape,
        at: usize,
        block: &[u8],
        frame: &mut Vec<u8>,
    ) -> Result<(), ColdError> {
        match self {
            Way::Codec(codec) => cold::encode(codec, element, shape, &History::default(), block, frame),
            Way::LowRank(low_rank) => {
                let at = (at * kv::BLOCK_TOKENS) as u32;
                low_rank.encode(element, shape, at, &History::default(), block, frame)
            }
        }
    }

    fn decode(self, at: usize, frame: &[u8], block: &mut [u8]) -> Result<(), ColdError> {
        match self {
            Way::Codec(_) => cold::decode(frame, block)?,
            Way::LowRank(low_rank) => low_rank.decode(frame, (at * kv::BLOCK_TOKENS) as u32, block)?,
        };
        Ok(())
    }
}

/// Half of the directions of the keys, which SmolLM2 has rotated.
fn basis(kv: &Kv) -> anyhow::Result<KeyBasis> {
    let mut geometry =
        Geometry::new(kv.layers.len() as u32, kv.heads as u32, kv.dim as u32, ElementType::F32);
    geometry.groups[0].rope = Some(Rope {
        inv_freq: (0..kv.dim / 2).map(|i| 100_000f32.powf(-2.0 * i as f32 / kv.dim as f32)).collect(),
        rotary_dims: kv.dim as u32,
        layout: RopeLayout::Interleaved,
        attention_scale: 1.0,
    });
    let mut builder = KeyBasisBuilder::new(&geometry)?;
    for (layer, [keys, _]) in kv.layers.iter().enumerate() {
        builder.add(layer as u32, 0, keys);
    }
    Ok(builder.finish((kv.heads * kv.dim / 2) as u32)?)
}

fn measure(kv: &Kv, way: Way<'_>, element: Element, turns: usize, copy_bytes: usize) -> anyhow::Result<()> {
    let (blocks, shape) = (kv.blocks(element), kv.shape());
    let total = blocks.iter().map(Vec::len).sum::<usize>();
    let mut frames = vec![Vec::new(); blocks.len()];
    let mut room = vec![1; blocks[0].len()];
    let (source, mut copy) = (vec![1u8; copy_bytes], vec![2u8; copy_bytes]);
    // Of encoding and decoding each block, and of copying.
    let mut fastest =
        [vec![f64::INFINITY; blocks.len()], vec![f64::INFINITY; blocks.len()], vec![f64::INFINITY]];
    for _ in 0..turns {
        for (at, (block, frame)) in blocks.iter().zip(&mut frames).enumerate() {
            frame.clear();
            let start = Instant::now();
            way.encode(element, &shape, at, black_box(block), frame)?;
            let encoded = Instant::now();
            way.decode(at, black_box(frame), &mut room)?;
            let times = [encoded - start, encoded.elapsed()].map(|time| time.as_secs_f64());
            for (fastest, time) in fastest.iter_mut().zip(times) {
                fastest[at] = fastest[at].min(time);
            }
        }
        let start = Instant::now();
        copy.copy_from_slice(black_box(&source));
        black_box(&copy);
        fastest[2][0] = fastest[2][0].min(start.elapsed().as_secs_f64());
    }
    let rate = |bytes: usize, times: &[f64]| bytes as f64 / 1e6 / times.iter().sum::<f64>();
    let [encode, decode] = [0, 1].map(|at| rate(total, &fastest[at]));
    let memcpy = rate(copy_bytes, &fastest[2]);
    let mut decoded = Vec::with_capacity(total);
    for (at, frame) in frames.iter().enumerate() {
        way.decode(at, frame, &mut room)?;
        decoded.extend_from_slice(&room);
    }
    let error = error(element, &blocks, &decoded);
    let (name, lossless) = (way.name(), matches!(way, Way::Codec(Codec::Lossless)));
    anyhow::ensure!(!lossless || error == 0.0, "{name} {element:?} has lost something");
    let stored = frames.iter().map(Vec::len).sum::<usize>();
    let bits = 8.0 * stored as f64 / (total / element.bytes()) as f64;
    let ratio = total as f64 / stored as f64;
    println!(
        "| {name} | {element:?} | {ratio:.3} | {bits:.2} | {encode:.0} | {decode:.0} | {memcpy:.0} | {error:.4} |"
    );
    Ok(())
}

/// Root of the mean squared error, of that of the elements.
fn error(element: Element, blocks: &[Vec<u8>], decoded: &[u8]) -> f64 {
    let single = |x: &[u8]| match element {
        Element::F16 => f16::from_le_bytes([x[0], x[1]]).to_f64(),
        Element::Bf16 => bf16::from_le_bytes([x[0], x[1]]).to_f64(),
        Element::F32 => f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]])),
        Element::Int8 => f64::from(x[0] as i8),
    };
    let (mut noise, mut power) = (0.0, 0.0);
    let bytes = element.bytes();
    for (block, decoded) in blocks.iter().zip(decoded.chunks_exact(blocks[0].len())) {
        for (x, y) in block.chunks_exact(bytes).zip(decoded.chunks_exact(bytes)) {
            noise += (single(x) - single(y)).powi(2);
            power += single(x).powi(2);
        }
    }
    (noise / power).sqrt()
}
