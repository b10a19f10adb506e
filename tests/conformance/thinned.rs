//! Token dropping by scores beside mean keys: sealed keys stay differences from the mean where their own positions have rotated it, wherever they
//! lie by now. Whatever runs a cache, the bytes are the same.

use std::collections::{BTreeMap, HashMap};

use kv_cache::half::{bf16, f16};
use kv_cache::*;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng};

use crate::common::{Combo, Number, Rig, SETUPS, Setup, eventually, geometry, is_wanted, whole_case};
use crate::mixed::error_share;

const DIM: usize = 64;

/// Root of the mean square of a mean key's elements, times as large as that of what keys have on top.
const MEAN: f32 = 150.0;

/// How keys are stored and rotated: `(format, element, block_tokens, layout, rotary_dims)`. With kernels of their own for pairs that lie half a row
/// apart, and without; with blocks that none of the fast ones takes.
type Case = (BlockFormat, ElementType, u32, RopeLayout, u32);

fn cases() -> Vec<Case> {
    use ElementType::{Bf16, F16, F32};
    use RopeLayout::{HalfSplit, Interleaved};
    let mixed = BlockFormat { values: Format::R4, raw_first_layers: 1, ..Format::Int8.into() };
    vec![
        (Format::Int8.into(), F16, 32, HalfSplit, 64),
        (Format::Int8.into(), F32, 12, Interleaved, 48),
        (Format::Fp8.into(), Bf16, 32, Interleaved, 64),
        (Format::R4.into(), F16, 32, HalfSplit, 64),
        (Format::R4.into(), Bf16, 32, Interleaved, 64),
        (Format::R4.into(), F32, 64, HalfSplit, 48),
        (Format::R3.into(), F16, 12, Interleaved, 48),
        (Format::R2.into(), Bf16, 32, HalfSplit, 64),
        (Format::Int4.into(), F16, 32, HalfSplit, 64),
        (Format::Int4.into(), F32, 32, Interleaved, 48),
        (Format::Int2.into(), Bf16, 64, HalfSplit, 64),
        (Format::Int4.into(), Bf16, 32, Interleaved, 64),
        (Format::Int2.into(), F16, 32, Interleaved, 64),
        (mixed, F32, 32, HalfSplit, 64),
    ]
}

fn geometry_of((_, element, block_tokens, layout, rotary_dims): Case) -> Geometry {
    let mut geometry = geometry((block_tokens, 2, 2, DIM as u32, 24), element);
    geometry.groups[0].rope = Some(Rope {
        inv_freq: (0..rotary_dims / 2)
            .map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary_dims as f32))
            .collect(),
        rotary_dims,
        layout,
        attention_scale: 1.0,
    });
    geometry
}

/// The key of a token in each layer and head, `[layers, kv_heads, dim]`: a large vector, rotated, and a little on top that the seed decides.
fn key(geometry: &Geometry, position: u32, seed: u64) -> Vec<f32> {
    let group = &geometry.groups[0];
    let rope = group.rope.as_ref().unwrap();
    let mut rng = SmallRng::seed_from_u64(seed << 32 | u64::from(position));
    let mut all = Vec::new();
    for row in 0..group.layers * group.kv_heads {
        let mean = |dim| if dim % 9 == 4 { f64::from(MEAN) + f64::from(row) } else { 0.5 };
        let mut key: Vec<f64> = (0..DIM).map(mean).collect();
        for (pair, freq) in rope.inv_freq.iter().enumerate() {
            let (a, b) = match rope.layout {
                RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                RopeLayout::HalfSplit => (pair, pair + rope.inv_freq.len()),
            };
            let (sin, cos) = (f64::from(position) * f64::from(*freq)).sin_cos();
            (key[a], key[b]) = (key[a] * cos - key[b] * sin, key[a] * sin + key[b] * cos);
        }
        // About normal, of variance 1.
        let mut noise = || (0..4).map(|_| rng.random_range(-0.86f64..0.86)).sum::<f64>();
        all.extend(key.into_iter().map(|x| (x + noise()) as f32));
    }
    all
}

/// Mean keys, of other tokens, in a file.
fn calibrated(geometry: &Geometry) -> tempfile::NamedTempFile {
    let mut means = KeyMeansBuilder::new(geometry).unwrap();
    for position in 1000..1400 {
        for (layer, keys) in key(geometry, position, 99).chunks(2 * DIM).enumerate() {
            means.add(layer as u32, position, keys);
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    means.finish().unwrap().save(file.path()).unwrap();
    file
}

/// What a sequence should have: of each position the seed of its token.
type Kept = BTreeMap<u32, u64>;

async fn append<E: Number>(rig: &Rig<E>, sequence: &Sequence, kept: &mut Kept, tokens: u32, seed: u64) {
    let first = sequence.len();
    let all: Vec<_> = (first..first + tokens).map(|at| key(&rig.combo.geometry, at, seed)).collect();
    let rows = |layer: usize| all.iter().flat_map(move |key| &key[layer * 2 * DIM..(layer + 1) * 2 * DIM]);
    let keys: Vec<E> = (0..2).flat_map(rows).map(|x| E::from_f32(*x)).collect();
    let values: Vec<E> =
        (0..2 * tokens * 2 * 24).map(|at| E::from_f32((at % 13) as f32 / 13.0 - 0.4)).collect();
    let ids: Vec<u32> = (first..first + tokens).collect();
    sequence.append_with(Some(first), &ids, None, &keys, &values).await.unwrap();
    kept.extend((first..first + tokens).map(|at| (at, seed)));
    sealed(rig, sequence).await;
}

async fn sealed<E: Number>(rig: &Rig<E>, sequence: &Sequence) {
    eventually("sealing", || {
        let info = sequence.info();
        info.sealed_blocks >= info.kept / rig.block()
    })
    .await;
}

async fn drop_tokens<E: Number>(rig: &Rig<E>, sequence: &Sequence, kept: &mut Kept, keep: u32, how: usize) {
    // A third of them, unevenly spread.
    let given = || (0..sequence.info().kept).map(|at| (at * at % 7 + at % 3) as f32).collect::<Vec<_>>();
    let scores = match how % 3 {
        0 => TokenScores::Given(given()),
        1 => KeyScore::Norm.into(),
        _ => KeyScore::Diff.into(),
    };
    assert_eq!(sequence.drop_tokens(keep, scores).await, Ok(keep), "{}", rig.combo);
    let positions = sequence.positions();
    kept.retain(|at, _| positions.contains(at));
    assert_eq!(kept.len(), keep as usize);
    sealed(rig, sequence).await;
}

/// Reads all that is there, keys and values, and holds keys against what they were. Views agree with reads.
async fn check<E: Number>(
    rig: &Rig<E>,
    sequence: &Sequence,
    kept: &Kept,
    keys_as: Format,
    what: &str,
) -> Vec<u8> {
    let positions = sequence.positions();
    assert!(positions.iter().eq(kept.keys()), "{what}: {}", rig.combo);
    // Of the length of what is left of a key without the mean. Rows have been through it more than once.
    let share = error_share(keys_as);
    // And what rounding large elements to their type adds, on both ways.
    let rounding = 0.2 * f64::from(MEAN * E::ROUNDING);
    let (mut bytes, mut square) = (Vec::new(), 0.0);
    for layer in 0..2 {
        let mut rows: HashMap<u32, Vec<E>> = HashMap::new();
        for run in positions.chunk_by(|a, b| a + 1 == *b) {
            let (keys, values) = sequence.read::<E>(layer, run[0]..run[0] + run.len() as u32).await.unwrap();
            bytes.extend_from_slice(bytemuck::cast_slice(&keys));
            bytes.extend_from_slice(bytemuck::cast_slice(&values));
            for (at, row) in run.iter().zip(keys.chunks(2 * DIM)) {
                let expected = key(&rig.combo.geometry, *at, kept[at]);
                let expected = &expected[layer as usize * 2 * DIM..][..2 * DIM];
                let off = row.iter().zip(expected).map(|(x, y)| f64::from(x.to_f32()) - f64::from(*y));
                square += off.map(|off| off * off).sum::<f64>();
                rows.insert(*at, row.to_vec());
            }
        }
        for block in sequence.view(layer).unwrap().blocks() {
            for head in 0..2 {
                let mut seen = vec![E::from_f32(0.0); block.tokens() as usize * DIM];
                block.decode_keys(head, &mut seen).unwrap();
                if let Rows::Coded { rows, skip, codes, scales } = block.keys::<E>(head).unwrap() {
                    differences_are_small(rows, skip, codes, scales);
                }
                for (at, row) in block.positions().zip(seen.chunks(DIM)) {
                    let read = &rows[&at][head * DIM..(head + 1) * DIM];
                    assert_eq!(row, read, "{what}: a view differs at {at}: {}", rig.combo);
                }
            }
        }
    }
    let error = (square / (2 * positions.len() * 2 * DIM) as f64).sqrt();
    let most = 2.0 * share + 2.0 * rounding;
    println!("{what}: off by {error}, {most} at most");
    assert!(error < most, "{what}: off by {error}, {most} at most: {}", rig.combo);
    bytes
}

/// What a caller finds who decodes the stored rows without their centres.
fn differences_are_small(rows: RowFormat, skip: usize, codes: &[u8], scales: Scales) {
    let row = rows.dim * rows.element.bytes();
    let mut decoded = vec![0; codes.len() / rows.row_bytes() * row];
    codec::Kernels::best().decode(rows, skip, codes, scales.bytes(), &mut decoded, row);
    let differences: Vec<f32> = match rows.element {
        ElementType::F32 => bytemuck::pod_collect_to_vec(&decoded),
        ElementType::F16 => {
            bytemuck::pod_collect_to_vec::<u8, f16>(&decoded).iter().map(|x| x.to_f32()).collect()
        }
        _ => bytemuck::pod_collect_to_vec::<u8, bf16>(&decoded).iter().map(|x| x.to_f32()).collect(),
    };
    let square = differences.iter().map(|x| x * x).sum::<f32>() / differences.len() as f32;
    assert!((0.1..4.0).contains(&square), "{rows:?}: mean square {square}");
    assert!(!rows.format.is_rotated() || rows.element == ElementType::F32, "{rows:?}");
}

/// A case in a cache with means.
async fn rig<E: Number>(
    setup: &'static Setup,
    case: Case,
    change: impl FnOnce(CacheBuilder) -> CacheBuilder,
) -> Option<Rig<E>> {
    let geometry = geometry_of(case);
    let file = calibrated(&geometry);
    let combo = Combo { setup, format: case.0, geometry };
    let builder = combo.builder()?;
    let builder = builder.configure(|c| c.quantisation.key_means = Some(file.path().to_owned()));
    Some(Rig::new(&combo, change(builder)).await)
}

/// A case runs on the first setup and then on all that are wanted, and everything that it gives is the same.
macro_rules! alike_on_every_setup {
    ($name:ident, $cases:expr) => {
        #[tokio::test]
        async fn $name() {
            let others = SETUPS.iter().skip(1).filter(|setup| is_wanted(setup));
            let setups: Vec<_> = SETUPS[..1].iter().chain(others).collect();
            for (number, case) in $cases.into_iter().enumerate() {
                let mut first: Option<Vec<Vec<u8>>> = None;
                for setup in &setups {
                    let what = format!("{} on {}, {case:?}", stringify!($name), setup.name);
                    let given = match case.1 {
                        ElementType::F16 => whole_case(&what, cases::$name::<f16>(setup, case, number)).await,
                        ElementType::Bf16 => {
                            whole_case(&what, cases::$name::<bf16>(setup, case, number)).await
                        }
                        ElementType::F32 => whole_case(&what, cases::$name::<f32>(setup, case, number)).await,
                    };
                    let Some(given) = given else { continue };
                    let first = first.get_or_insert_with(|| given.clone());
                    let differs = first.iter().zip(&given).position(|(a, b)| a != b);
                    assert_eq!((differs, first.len()), (None, given.len()), "{what}");
                }
            }
        }
    };
}

alike_on_every_setup!(keys_stay_where_they_stood, cases());
alike_on_every_setup!(thinned_blocks_are_re_encoded, {
    let halves = RopeLayout::HalfSplit;
    [
        (Format::Int8.into(), ElementType::F16, 32, halves, 64),
        (Format::Int8.into(), ElementType::F32, 32, RopeLayout::Interleaved, 48),
    ]
});
alike_on_every_setup!(a_cache_thins_out_by_itself, {
    let halves = RopeLayout::HalfSplit;
    [
        (Format::Int8.into(), ElementType::F16, 32, halves, 64),
        (Format::R4.into(), ElementType::F32, 32, halves, 48),
    ]
});

mod cases {
    use super::*;

    /// Thinned out, written to, forked, cut, thinned out again and moved to the host tier and back.
    pub(super) async fn keys_stay_where_they_stood<E: Number>(
        setup: &'static Setup,
        case: Case,
        number: usize,
    ) -> Option<Vec<Vec<u8>>> {
        let rig = rig::<E>(setup, case, |builder| builder).await?;
        let format = case.0.keys;
        let (sequence, mut kept, mut given) = (rig.open().await, Kept::new(), Vec::new());
        append(&rig, &sequence, &mut kept, 197, 1).await;
        given.push(check(&rig, &sequence, &kept, format, "sealed").await);
        drop_tokens(&rig, &sequence, &mut kept, 140, number).await;
        given.push(check(&rig, &sequence, &kept, format, "thinned out").await);
        // Into a block that holds some of them, and on.
        append(&rig, &sequence, &mut kept, 75, 2).await;
        given.push(check(&rig, &sequence, &kept, format, "appended").await);
        // A fork goes on in its own way from within what was thinned out: what it shares with the other is where it was for both.
        let (fork, mut of_fork) = (sequence.fork().await.unwrap(), kept.clone());
        append(&rig, &fork, &mut of_fork, 40, 3).await;
        given.push(check(&rig, &fork, &of_fork, format, "forked").await);
        let cut = sequence.positions()[rig.block() as usize + 9] + 1;
        fork.truncate(cut).await.unwrap();
        of_fork.retain(|at, _| *at < cut);
        given.push(check(&rig, &fork, &of_fork, format, "cut").await);
        append(&rig, &fork, &mut of_fork, 70, 4).await;
        given.push(check(&rig, &fork, &of_fork, format, "cut and appended").await);
        given.push(check(&rig, &sequence, &kept, format, "left alone").await);
        // Once more, of what is left and what is new.
        drop_tokens(&rig, &sequence, &mut kept, 128, number + 1).await;
        drop_tokens(&rig, &fork, &mut of_fork, 2 * rig.block() + 12, number + 2).await;
        for (sequence, kept) in [(&sequence, &kept), (&fork, &of_fork)] {
            let device = check(&rig, sequence, kept, format, "thinned out again").await;
            assert_eq!(sequence.offload().await.unwrap(), sequence.info().kept / rig.block());
            let host = check(&rig, sequence, kept, format, "in the host tier").await;
            sequence.prefetch().await.unwrap();
            assert!(device == host, "{}", rig.combo);
            given.push(device);
        }
        // From the host tier into a raw block, and sealed again.
        sequence.offload().await.unwrap();
        let cut = sequence.positions()[rig.block() as usize / 2] + 1;
        sequence.truncate(cut).await.unwrap();
        kept.retain(|at, _| *at < cut);
        append(&rig, &sequence, &mut kept, 2 * rig.block(), 5).await;
        given.push(check(&rig, &sequence, &kept, format, "copied from the host tier").await);
        // From its beginning on it is as any other.
        sequence.truncate(0).await.unwrap();
        kept.clear();
        append(&rig, &sequence, &mut kept, 2 * rig.block() + 1, 6).await;
        given.push(check(&rig, &sequence, &kept, format, "emptied and appended").await);
        drop((sequence, fork));
        rig.finish().await;
        Some(given)
    }

    /// Down a rung, and written to from there.
    pub(super) async fn thinned_blocks_are_re_encoded<E: Number>(
        setup: &'static Setup,
        case: Case,
        number: usize,
    ) -> Option<Vec<Vec<u8>>> {
        let rig = rig::<E>(setup, case, |builder| builder.colder_formats(&[Format::R4])).await?;
        let (sequence, mut kept, mut given) = (rig.open().await, Kept::new(), Vec::new());
        append(&rig, &sequence, &mut kept, 197, 1).await;
        drop_tokens(&rig, &sequence, &mut kept, 140, number).await;
        given.push(check(&rig, &sequence, &kept, Format::Int8, "thinned out").await);
        // Another on the same device leaves no room.
        let other = sequence.fork().await.unwrap();
        other.truncate(0).await.unwrap();
        let is_colder = || {
            let view = sequence.view(0).unwrap();
            view.blocks().take(4).all(|block| block.format() == Format::R4)
        };
        while !is_colder() {
            assert!(other.len() < 20_000, "{:?}", rig.cache.stats().total);
            append(&rig, &other, &mut Kept::new(), 64, 2).await;
            rig.all_sealed().await;
        }
        given.push(check(&rig, &sequence, &kept, Format::R4, "re-encoded").await);
        drop(other);
        let cut = sequence.positions()[40] + 1;
        sequence.truncate(cut).await.unwrap();
        kept.retain(|at, _| *at < cut);
        append(&rig, &sequence, &mut kept, 50, 3).await;
        given.push(check(&rig, &sequence, &kept, Format::R4, "appended").await);
        drop(sequence);
        rig.finish().await;
        Some(given)
    }

    /// Nobody has to ask for it.
    pub(super) async fn a_cache_thins_out_by_itself<E: Number>(
        setup: &'static Setup,
        case: Case,
        number: usize,
    ) -> Option<Vec<Vec<u8>>> {
        let method = [CompressionMethod::KeyNorm, CompressionMethod::KeyDiff][number % 2];
        let compression = Compression { enabled: true, ratio: 0.5, method };
        let rig = rig::<E>(setup, case, |builder| builder.compression(compression)).await?;
        let (sequence, mut kept, mut given) = (rig.open().await, Kept::new(), Vec::new());
        for (round, tokens) in [250, 1, 90, 60, 130].into_iter().enumerate() {
            append(&rig, &sequence, &mut kept, tokens, round as u64).await;
            let positions = sequence.positions();
            kept.retain(|at, _| positions.contains(at));
            given.push(check(&rig, &sequence, &kept, case.0.keys, "grown").await);
        }
        assert!(rig.stats().await.total.tokens_dropped > 200);
        drop(sequence);
        rig.finish().await;
        Some(given)
    }
}
