//! A CPU cache and a GPU cache store the same bytes for the same tokens, and give the same bytes back.

use std::path::Path;

use kv_cache::half::{bf16, f16};
use kv_cache::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::common::{Combo, FORMATS, Number, Rig, SETUPS, Tokens, eventually, fitting, shaped};
use crate::device::OnDevice;

/// `(block_tokens, layers, kv_heads, key_dim, value_dim)`: every width that a kernel treats on its own, also with rows that no warp or
/// thread block comes out even with, and odd ones.
const SHAPES: [(u32, u32, u32, u32, u32); 18] = [
    (32, 2, 2, 16, 16),
    (32, 2, 2, 64, 80),
    (32, 1, 2, 128, 128),
    (32, 1, 1, 256, 512),
    (16, 1, 1, 512, 64),
    (32, 1, 3, 33, 7),
    (5, 2, 3, 8, 24),
    (1, 1, 1, 1, 2),
    (3, 1, 1, 520, 1000),
    (64, 1, 1, 96, 192),
    (32, 1, 3, 32, 256),
    (6, 2, 3, 64, 64),
    (7, 2, 5, 128, 128),
    (7, 1, 5, 128, 64),
    (1, 1, 1, 64, 128),
    (32, 5, 3, 64, 64),
    (32, 1, 33, 128, 16),
    (32, 1, 2, 128, 128),
];

/// One more or less than the bits of `x`: its neighbours, if it is not zero.
fn neighbour<E: Number>(x: E, step: i32) -> E {
    let mut bytes = bytemuck::bytes_of(&x).to_vec();
    let low = bytes[0];
    bytes[0] = low.saturating_add_signed(step as i8);
    bytemuck::pod_read_unaligned(&bytes)
}

/// Kinds of rows that are neither zero nor far from 1: what kernels do without when a row beside them is, they do only among these.
const CALM: [u32; 6] = [5, 6, 7, 8, 9, 11];

/// A row of one of the kinds that codecs get wrong, or of the calm ones among them.
fn row<E: Number>(rng: &mut SmallRng, dim: usize, calm: bool) -> Vec<E> {
    let kind = if calm { CALM[rng.random_range(0..CALM.len())] } else { rng.random_range(0..13) };
    let exponent = rng.random_range(-12..4);
    let mut uniform = |most: f32| E::from_f32(rng.random_range(-1.0f32..1.0) * most);
    match kind {
        0 => vec![E::from_f32(0.0); dim],
        1 => (0..dim).map(|at| E::from_f32(if at % 2 == 0 { -0.0 } else { 0.0 })).collect(),
        // Denormals of the element type.
        2 => (0..dim).map(|_| neighbour(E::from_f32(0.0), rng.random_range(0..100))).collect(),
        3 => (0..dim).map(|at| E::from_f32(if at % 3 == 0 { -E::MAX } else { E::MAX })).collect(),
        4 => (0..dim).map(|_| uniform(E::MAX)).collect(),
        // One channel that dwarfs the others.
        5 | 6 => {
            let mut row: Vec<E> = (0..dim).map(|_| uniform(1.0)).collect();
            row[dim / 2] = E::from_f32(if kind == 5 { 300.0 } else { -30.0 });
            row
        }
        // Quotients at ties, and right beside them: the scale is a power of two.
        7 | 8 => {
            let scale = 2f32.powi(exponent);
            let tie = |rng: &mut SmallRng| {
                let x = E::from_f32((rng.random_range(-127..127) as f32 + 0.5) * scale);
                if kind == 7 { x } else { neighbour(x, rng.random_range(-1..=1)) }
            };
            let mut row: Vec<E> = (0..dim).map(|_| tie(rng)).collect();
            row[dim - 1] = E::from_f32(127.0 * scale);
            row
        }
        // Scales that are subnormal in f16, and below the floor of f32.
        9 => (0..dim).map(|_| uniform(2f32.powi(-9))).collect(),
        10 => (0..dim).map(|_| uniform(1e-30)).collect(),
        // Squares that come to 2^-80 or 2^100, and to their neighbours: beyond these, rows of bf16 and f32 are scaled.
        12 => {
            let exponent = if rng.random() { rng.random_range(-45..-37) } else { rng.random_range(44..51) };
            let x = E::from_f32(2f32.powi(exponent).min(E::MAX));
            let mut row = vec![E::from_f32(0.0); dim];
            row[dim / 2] = x;
            row[dim / 3] = x;
            row
        }
        _ => (0..dim).map(|_| uniform(8.0)).collect(),
    }
}

fn tokens<E: Number>(layout: BlockLayout, tokens: usize, seed: u64, calm: bool) -> Tokens<E> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let rows = layout.layers * tokens * layout.kv_heads;
    let mut plane = |dim| (0..rows).flat_map(|_| row::<E>(&mut rng, dim, calm)).collect::<Vec<E>>();
    let (keys, values) = (plane(layout.key_dim), plane(layout.value_dim));
    Tokens { layout, ids: (0..tokens as u32).collect(), keys, values }
}

/// Everything that is stored of one layer, and how.
fn stored<E: Number>(layout: &BlockLayout, view: &View) -> Vec<(BlockFormat, Vec<u8>, Vec<u8>)> {
    let mut blocks = Vec::new();
    for block in view.blocks() {
        for head in 0..layout.kv_heads {
            for rows in [block.keys::<E>(head).unwrap(), block.values::<E>(head).unwrap()] {
                blocks.push(match rows {
                    Rows::Raw(elements) => {
                        (block.format(), bytemuck::cast_slice(elements).to_vec(), Vec::new())
                    }
                    Rows::Int8 { codes, scales } => {
                        (block.format(), bytemuck::cast_slice(codes).to_vec(), scales.bytes().to_vec())
                    }
                    Rows::Coded { codes, scales, .. } => {
                        (block.format(), codes.to_vec(), scales.bytes().to_vec())
                    }
                    other => panic!("{other:?}"),
                });
            }
        }
    }
    blocks
}

async fn rig<E: Number>(
    setup: &str,
    format: BlockFormat,
    geometry: Geometry,
    means: Option<&Path>,
) -> Option<Rig<E>> {
    let setup = SETUPS.iter().find(|known| known.name == setup).unwrap();
    let combo = Combo { setup, format, geometry };
    let builder = combo.builder()?.configure(|c| c.quantisation.key_means = means.map(Path::to_owned));
    Some(Rig::new(&combo, builder).await)
}

/// Mean keys, some of which are zero, and how keys of the geometry rotate: where `in_part` only half of their dims.
fn some_means(geometry: &mut Geometry, layout: RopeLayout, in_part: bool) -> tempfile::NamedTempFile {
    let group = &mut geometry.groups[0];
    let (rotary_dims, attention_scale) =
        if in_part { (group.key_dim / 4 * 2, 1.25) } else { (group.key_dim / 2 * 2, 1.0) };
    group.rope = Some(Rope {
        inv_freq: (0..rotary_dims / 2).map(|i| 100f32.powf(-(i as f32) / rotary_dims as f32)).collect(),
        rotary_dims,
        layout,
        attention_scale,
    });
    let (layers, count) = (group.layers, group.kv_heads * group.key_dim);
    let mut means = KeyMeansBuilder::new(geometry).unwrap();
    for layer in 0..layers {
        let mean = |at| if at % 16 < 4 { 0.0 } else { ((at * 7 + layer) % 31) as f32 - 12.0 };
        let keys: Vec<f32> = (0..count).map(mean).collect();
        means.add(layer, 3, &keys);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    means.finish().unwrap().save(file.path()).unwrap();
    file
}

/// A cache on the CPU and one on a GPU, whose keys have means and turn in the layout if there is one, store and give the same.
async fn same_bytes<E: OnDevice>(format: BlockFormat, at: usize, rope: Option<RopeLayout>) {
    let shape = SHAPES[at];
    let format = fitting(format, shape.1);
    let mut geometry = shaped(format, shape, E::TYPE);
    let file = rope.map(|layout| some_means(&mut geometry, layout, at % 8 == 7));
    let means = file.as_ref().map(tempfile::NamedTempFile::path);
    let Some(gpu) = rig::<E>("cuda", format, geometry.clone(), means).await else { return };
    let cpu = rig::<E>("cpu", format, geometry, means).await.unwrap();
    for calm in [false, true] {
        let seed = 10 * at as u64 + if calm { 5 } else { 0 };
        let what = format!("{}, turned: {rope:?}, calm: {calm}, seed {seed}", gpu.combo);
        same_rows([&cpu, &gpu], calm, seed, &what).await;
    }
    cpu.finish().await;
    gpu.finish().await;
}

/// A sequence of either cache with the same tokens, sealed, read, written to again, sealed and read again, thinned out, sealed and read once more.
async fn same_rows<E: OnDevice>(pair: [&Rig<E>; 2], calm: bool, seed: u64, what: &str) {
    let (layout, block_tokens) = (pair[0].layout, pair[0].block());
    let count = (3 * block_tokens).max(40) + 1;
    let new = tokens::<E>(layout, count as usize, seed, calm);
    let mut sequences = Vec::new();
    for rig in pair {
        let sequence = rig.open().await;
        sequence.append(&new.ids, &new.keys, &new.values).await.unwrap();
        rig.sealed(&sequence).await;
        sequences.push(sequence);
    }
    assert_same::<E>(&sequences, &layout, what, "sealed").await;
    // Back into a sealed block: it is decoded, written to, and encoded once more.
    let more = tokens::<E>(layout, 2 * block_tokens as usize, seed + 1, calm);
    for (rig, sequence) in pair.into_iter().zip(&sequences) {
        sequence.truncate(block_tokens + block_tokens / 2).await.unwrap();
        sequence.append(&more.ids, &more.keys, &more.values).await.unwrap();
        rig.sealed(sequence).await;
    }
    assert_same::<E>(&sequences, &layout, what, "reopened and sealed again").await;
    // Two blocks and a few tokens of three and a half, from here and there.
    for sequence in &sequences {
        let scores: Vec<f32> = (0..sequence.len()).map(|at| (at * at % 11) as f32).collect();
        sequence.drop_tokens(2 * block_tokens + block_tokens / 4, scores).await.unwrap();
        let info = || sequence.info();
        eventually("sealing", || info().sealed_blocks >= info().kept / block_tokens).await;
    }
    assert_same::<E>(&sequences, &layout, what, "thinned out and sealed again").await;
}

/// Two sequences are stored, and read, as the same bytes.
async fn assert_same<E: OnDevice>(sequences: &[Sequence], layout: &BlockLayout, what: &str, round: &str) {
    let positions = sequences[0].positions();
    assert_eq!(positions, sequences[1].positions());
    for layer in 0..layout.layers as u32 {
        let [on_cpu, on_gpu] = [0, 1].map(|at| stored::<E>(layout, &sequences[at].view(layer).unwrap()));
        for (at, (cpu, gpu)) in on_cpu.iter().zip(&on_gpu).enumerate() {
            assert_eq!(cpu, gpu, "{what}: rows {at} of layer {layer}, {round}");
        }
        assert_eq!(on_cpu.len(), on_gpu.len());
        for run in positions.chunk_by(|a, b| a + 1 == *b) {
            let mut read = Vec::new();
            for sequence in sequences {
                let (keys, values) =
                    sequence.read::<E>(layer, run[0]..run[0] + run.len() as u32).await.unwrap();
                read.push([keys, values].map(|plane| bytemuck::cast_slice::<E, u8>(&plane).to_vec()));
            }
            assert_eq!(read[0], read[1], "{what}: layer {layer}, read from {} on, {round}", run[0]);
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn every_shape<E: OnDevice>(format: BlockFormat) {
    for at in 0..SHAPES.len() {
        for rope in [None, Some(RopeLayout::HalfSplit), Some(RopeLayout::Interleaved)] {
            same_bytes::<E>(format, at, rope).await;
        }
    }
}

macro_rules! same_bytes {
    ($($name:ident: $element:ty),*) => {
        $(
            #[test]
            fn $name() {
                // A thread for each: it is the CPU that has most to do.
                std::thread::scope(|scope| {
                    for format in FORMATS.into_iter().filter(|format| !format.is_raw()) {
                        scope.spawn(move || every_shape::<$element>(format));
                    }
                });
            }
        )*
    };
}

same_bytes!(of_f16: f16, of_bf16: bf16, of_f32: f32);
