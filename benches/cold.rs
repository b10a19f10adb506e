//! How much smaller cold codecs make real keys and values, and how fast, on one core beside `memcpy`.
//!
//! `cargo bench --bench cold` takes the tensors that lie beside the tests (three layers of SmolLM2-135M, 128 tokens of text), one frame a block of
//! 32 tokens. `KV_CACHE_KV=FILE` takes all that `quality --dump-kv FILE` has written instead. Rates are bytes of the block a second, for
//! `memcpy` too; medians over turns.

#[path = "../tests/common/kv.rs"]
mod kv;

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use half::{bf16, f16};
use kv::Kv;
use kv_cache::cold::{self, Codec, Element};

const TURNS: usize = 7;
/// What a turn goes through, at least.
const TURN_BYTES: usize = 8 << 20;

fn main() -> anyhow::Result<()> {
    let file = std::env::var_os("KV_CACHE_KV");
    let kv = file.as_ref().map_or_else(Kv::fixture, |file| Kv::read(Path::new(file)))?;
    // `cargo test --benches` only checks that things run.
    let (turns, turn_bytes) =
        if std::env::args().any(|arg| arg == "--bench") { (TURNS, TURN_BYTES) } else { (1, 1) };
    println!("{} layers, {} tokens, blocks of {} tokens", kv.layers.len(), kv.tokens, kv::BLOCK_TOKENS);
    println!(
        "| codec | element | times smaller | bits/element | encode MB/s | decode MB/s | memcpy MB/s | error |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for codec in Codec::ALL {
        for element in Element::ALL {
            if codec == Codec::Lossless || matches!(element, Element::F16 | Element::Bf16) {
                measure(&kv, codec, element, turns, turn_bytes)?;
            }
        }
    }
    Ok(())
}

fn measure(kv: &Kv, codec: Codec, element: Element, turns: usize, turn_bytes: usize) -> anyhow::Result<()> {
    let (blocks, shape) = (kv.blocks(element), kv.shape());
    let total = blocks.iter().map(Vec::len).sum::<usize>();
    let rounds = turn_bytes.div_ceil(total);
    let mut frames = vec![Vec::new(); blocks.len()];
    // A place of its own for every block of a turn.
    let mut room = vec![1u8; rounds * total];
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..turns {
        let start = Instant::now();
        for _ in 0..rounds {
            for (block, frame) in blocks.iter().zip(&mut frames) {
                frame.clear();
                cold::encode(codec, element, &shape, black_box(block), frame)?;
            }
        }
        times[0].push(start.elapsed().as_secs_f64());
        let mut places = room.chunks_exact_mut(blocks[0].len());
        let start = Instant::now();
        for _ in 0..rounds {
            for (frame, place) in frames.iter().zip(places.by_ref()) {
                cold::decode(black_box(frame), place)?;
            }
        }
        times[1].push(start.elapsed().as_secs_f64());
        let mut places = room.chunks_exact_mut(blocks[0].len());
        let start = Instant::now();
        for _ in 0..rounds {
            for (block, place) in blocks.iter().zip(places.by_ref()) {
                place.copy_from_slice(black_box(block));
            }
        }
        black_box(&room);
        times[2].push(start.elapsed().as_secs_f64());
    }
    let mut place = vec![0; blocks[0].len()];
    let mut decoded = Vec::with_capacity(total);
    for frame in &frames {
        cold::decode(frame, &mut place)?;
        decoded.extend_from_slice(&place);
    }
    let error = error(element, &blocks, &decoded);
    anyhow::ensure!(codec != Codec::Lossless || error == 0.0, "{codec:?} {element:?} has lost something");
    let stored = frames.iter().map(Vec::len).sum::<usize>();
    let bits = 8.0 * stored as f64 / (total / element.bytes()) as f64;
    let [encode, decode, memcpy] = times.map(|times| (rounds * total) as f64 / 1e6 / median(times));
    let ratio = total as f64 / stored as f64;
    println!(
        "| {codec:?} | {element:?} | {ratio:.3} | {bits:.2} | {encode:.0} | {decode:.0} | {memcpy:.0} | {error:.4} |"
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
