//! Precision by place and by means: blocks that stay raw, and sealed keys as differences from the model's mean keys.

use kv_cache::half::{bf16, f16};
use kv_cache::*;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng};

use crate::common::{
    Combo, ELEMENTS, FORMATS, Number, Rig, SETUPS, eventually, fitting, geometry, whole_case,
};

/// Every setup with every format that has codes, in one element type each.
fn runs() -> impl Iterator<Item = (Combo, ElementType)> {
    let setups = SETUPS.iter().filter(|setup| crate::common::is_wanted(setup)).enumerate();
    setups.flat_map(|(number, setup)| {
        let formats = FORMATS.into_iter().filter(|format| !format.is_raw()).enumerate();
        formats.map(move |(at, format)| {
            let element = ELEMENTS[(number + at) % ELEMENTS.len()];
            let mut geometry = geometry((32, 2, 2, 64, 24), element);
            let layout = [RopeLayout::Interleaved, RopeLayout::HalfSplit][(number / 3 + at) % 2];
            geometry.groups[0].rope = Some(Rope {
                inv_freq: (0..24).map(|i| 10_000f32.powf(-2.0 * i as f32 / 48.0)).collect(),
                rotary_dims: 48,
                layout,
                attention_scale: 1.0,
            });
            (Combo { setup, format: fitting(format, 2), geometry }, element)
        })
    })
}

macro_rules! on_every_setup {
    ($($name:ident),* $(,)?) => {
        mod on_every_setup {
            use super::{ElementType, bf16, f16, whole_case};
            $(
                #[tokio::test]
                async fn $name() {
                    for (combo, element) in super::runs() {
                        let case = format!("{} on {combo}", stringify!($name));
                        match element {
                            ElementType::F16 => whole_case(case, super::$name::<f16>(combo)).await,
                            ElementType::Bf16 => whole_case(case, super::$name::<bf16>(combo)).await,
                            ElementType::F32 => whole_case(case, super::$name::<f32>(combo)).await,
                        }
                    }
                }
            )*
        }
    };
}

/// Keys that are a large vector, rotated, and a little on top; values that are anything.
struct Text<E> {
    ids: Vec<u32>,
    keys: Vec<E>,
    values: Vec<E>,
    /// Root of the mean square of what is on top.
    spread: f64,
}

const DIM: usize = 64;

fn text<E: Number>(geometry: &Geometry, first: u32, tokens: u32, seed: u64) -> Text<E> {
    let group = &geometry.groups[0];
    let rope = group.rope.as_ref().unwrap();
    let mut rng = SmallRng::seed_from_u64(seed);
    // About normal.
    let mut noise = || (0..4).map(|_| rng.random_range(-0.86f64..0.86)).sum::<f64>();
    let (mut keys, mut square) = (Vec::new(), 0.0);
    for layer in 0..group.layers {
        for token in first..first + tokens {
            for head in 0..group.kv_heads {
                let mut key: Vec<f64> = (0..DIM)
                    .map(|dim| if dim % 9 == 4 { 20.0 + f64::from(layer + head) } else { 0.5 })
                    .collect();
                for (pair, freq) in rope.inv_freq.iter().enumerate() {
                    let (a, b) = match rope.layout {
                        RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                        RopeLayout::HalfSplit => (pair, pair + 24),
                    };
                    let (sin, cos) = (f64::from(token) * f64::from(*freq)).sin_cos();
                    (key[a], key[b]) = (key[a] * cos - key[b] * sin, key[a] * sin + key[b] * cos);
                }
                for x in key {
                    let small = noise();
                    square += small * small;
                    keys.push(E::from_f32((x + small) as f32));
                }
            }
        }
    }
    let count = (group.layers * tokens * group.kv_heads * group.value_dim) as usize;
    Text {
        ids: (first..first + tokens).collect(),
        spread: (square / keys.len() as f64).sqrt(),
        values: (0..count).map(|_| E::from_f32(rng.random_range(-1.0..1.0))).collect(),
        keys,
    }
}

/// Mean keys of another text, in a file.
fn calibrated(geometry: &Geometry) -> tempfile::NamedTempFile {
    let other = text::<f32>(geometry, 500, 400, 99);
    let mut means = KeyMeansBuilder::new(geometry).unwrap();
    for (layer, keys) in other.keys.chunks(other.keys.len() / 2).enumerate() {
        means.add(layer as u32, 500, keys);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    means.finish().unwrap().save(file.path()).unwrap();
    file
}

async fn rig<E: Number>(combo: &Combo, change: impl FnOnce(&mut CacheConfig)) -> Option<Rig<E>> {
    let builder = combo.builder()?.configure(change);
    Some(Rig::new(combo, builder).await)
}

/// Root of the mean square error of the keys that a sequence reads, and of all layers its reads and its views agree.
async fn error<E: Number>(rig: &Rig<E>, sequence: &Sequence, text: &Text<E>) -> f64 {
    let (heads, tokens) = (rig.layout.kv_heads, sequence.len());
    let mut square = 0.0;
    for (layer, expected) in text.keys.chunks(text.keys.len() / 2).enumerate() {
        let (keys, _) = sequence.read::<E>(layer as u32, 0..tokens).await.unwrap();
        for (got, expected) in keys.iter().zip(expected) {
            square += (f64::from(got.to_f32()) - f64::from(expected.to_f32())).powi(2);
        }
        for block in sequence.view(layer as u32).unwrap().blocks() {
            for head in 0..heads {
                let mut rows = vec![E::from_f32(0.0); block.tokens() as usize * DIM];
                block.decode_keys(head, &mut rows).unwrap();
                for (token, row) in (block.first_token() as usize..).zip(rows.chunks_exact(DIM)) {
                    let read = &keys[(token * heads + head) * DIM..][..DIM];
                    assert_eq!(row, read, "{}: a view differs, token {token}", rig.combo);
                }
                let is_int8 = matches!(block.keys::<E>(head).unwrap(), Rows::Int8 { .. });
                assert!(!is_int8, "codes of differences pass for codes of keys");
            }
        }
    }
    (square / text.keys.len() as f64).sqrt()
}

/// The error of keys less their means in a format, as a share of a row's length.
pub(crate) fn error_share(format: Format) -> f64 {
    match format {
        Format::Raw => 0.0,
        Format::Int8 => 0.015,
        Format::Fp8 => 0.04,
        Format::R4 => 0.115,
        Format::R3 => 0.22,
        Format::Int4 => 0.10,
        Format::Int2 => 0.50,
        _ => 0.40,
    }
}

on_every_setup!(means_take_what_all_keys_share, some_blocks_stay_raw);

async fn means_take_what_all_keys_share<E: Number>(combo: Combo) {
    let file = calibrated(&combo.geometry);
    let with_means = |c: &mut CacheConfig| c.quantisation.key_means = Some(file.path().to_owned());
    let Some(rig) = rig::<E>(&combo, with_means).await else { return };
    // Errors of the format itself, and what rounding to the element type adds.
    let share = error_share(combo.format.keys);
    let rounding = if E::TYPE == ElementType::Bf16 { 0.08 } else { 0.01 };
    let text = text::<E>(&combo.geometry, 0, 32 * 6 + 5, 1);
    let sequence = rig.cache.open("tenant", OpenOptions::default().prompt(&text.ids)).await.unwrap();
    sequence.append(&text.ids, &text.keys, &text.values).await.unwrap();
    rig.sealed(&sequence).await;
    let once = error(&rig, &sequence, &text).await;
    assert!(once < share * text.spread + rounding, "{combo}: {once}, spread {}", text.spread);

    // Who finds the prefix reads the same, also where blocks have moved to the host.
    sequence.offload().await.unwrap();
    let other = rig.cache.open("tenant", OpenOptions::default().prompt(&text.ids)).await.unwrap();
    assert_eq!(other.len(), 192);
    for layer in 0..2 {
        let [mine, theirs] = [&sequence, &other].map(|sequence| sequence.read::<E>(layer, 0..192));
        assert_eq!(mine.await.unwrap(), theirs.await.unwrap(), "{combo}");
    }
    sequence.prefetch().await.unwrap();
    // Into a sealed block: it is decoded, written to and encoded again, at its own place.
    other.truncate(32 * 4 + 7).await.unwrap();
    let per_token = [text.keys.len() / 2 / text.ids.len(), text.values.len() / 2 / text.ids.len()];
    let rest = |all: &[E], per_token: usize| -> Vec<E> {
        all.chunks(all.len() / 2).flat_map(|layer| &layer[(32 * 4 + 7) * per_token..]).copied().collect()
    };
    let (keys, values) = (rest(&text.keys, per_token[0]), rest(&text.values, per_token[1]));
    other.append(&text.ids[32 * 4 + 7..], &keys, &values).await.unwrap();
    rig.sealed(&other).await;
    let twice = error(&rig, &other, &text).await;
    assert!(twice < 1.2 * (share * text.spread + rounding), "{combo}: {twice} after {once}");
    drop((sequence, other));
    rig.finish().await;

    // What it would be without them.
    if combo.format.keys.is_rotated()
        && let Some(rig) = self::rig::<E>(&combo, |_| {}).await
    {
        let sequence = rig.cache.open("tenant", OpenOptions::default()).await.unwrap();
        sequence.append(&text.ids, &text.keys, &text.values).await.unwrap();
        rig.sealed(&sequence).await;
        let without = error(&rig, &sequence, &text).await;
        assert!(without > 2.0 * once, "{combo}: {without} without means, {once} with them");
        drop(sequence);
        rig.finish().await;
    }
}

async fn some_blocks_stay_raw<E: Number>(combo: Combo) {
    let keep = |c: &mut CacheConfig| {
        (c.quantisation.raw_sinks, c.quantisation.raw_window_blocks) = (Some(true), Some(2));
    };
    let Some(rig) = rig::<E>(&combo, keep).await else { return };
    let text = text::<E>(&combo.geometry, 0, 32 * 6 + 5, 2);
    let options = || OpenOptions::default().prompt(&text.ids);
    let sequence = rig.cache.open("tenant", options()).await.unwrap();
    sequence.append(&text.ids, &text.keys, &text.values).await.unwrap();
    eventually("the middle to be sealed", || sequence.info().sealed_blocks == 3).await;
    let formats = |sequence: &Sequence| -> Vec<bool> {
        let view = sequence.view(0).unwrap();
        view.blocks().map(|block| block.format() == Format::Raw).collect()
    };
    assert_eq!(formats(&sequence), [true, false, false, false, true, true, true], "{combo}");
    assert_eq!(sequence.info().blocks_to_seal, 0);
    let (keys, _) = sequence.read::<E>(0, 0..197).await.unwrap();
    let per_token = rig.layout.kv_heads * DIM;
    let expected = &text.keys[..197 * per_token];
    assert_eq!(keys[..32 * per_token], expected[..32 * per_token]);
    assert_eq!(keys[128 * per_token..], expected[128 * per_token..]);
    // A fork has a window of its own: what it grows past is sealed for both.
    let fork = sequence.fork().await.unwrap();
    let more = self::text::<E>(&combo.geometry, 197, 59, 3);
    fork.append(&more.ids, &more.keys, &more.values).await.unwrap();
    eventually("the window to have moved on", || fork.info().sealed_blocks == 5).await;
    assert_eq!(formats(&fork), [true, false, false, false, false, false, true, true], "{combo}");
    // Cut back, and grown again.
    fork.truncate(98).await.unwrap();
    drop(fork);
    // Once nobody has it open only the sinks are raw.
    drop(sequence);
    eventually("what is left in the cache to be sealed", || {
        let total = rig.cache.stats().total;
        (total.blocks_used, total.blocks_sealed) == (8, 7)
    })
    .await;
    let again = rig.cache.open("tenant", options()).await.unwrap();
    assert_eq!(again.len(), 192);
    assert_eq!(formats(&again), [true, false, false, false, false, false], "{combo}");
    drop(again);
    rig.cache.invalidate(Invalidate::All).await.unwrap();
    rig.finish().await;
}

#[tokio::test]
async fn a_file_of_another_model_is_refused() {
    let geometry = geometry((16, 2, 2, 64, 24), ElementType::F16);
    let file = tempfile::NamedTempFile::new().unwrap();
    let of_other = Geometry::new(3, 2, 64, ElementType::F16);
    let mut means = KeyMeansBuilder::new(&of_other).unwrap();
    means.add(0, 0, &[1.0; 128]);
    means.finish().unwrap().save(file.path()).unwrap();
    let build = |path: std::path::PathBuf, format| {
        let builder =
            Cache::builder(geometry.clone()).devices(Devices::cpu(1)).memory_bytes_per_device(1 << 20);
        builder.sealed_format(format).configure(|c| c.quantisation.key_means = Some(path)).build()
    };
    for path in [file.path().to_owned(), "no/such/file".into()] {
        let refused = build(path.clone(), Format::R4).await.unwrap_err();
        assert!(matches!(&refused, BuildError::KeyMeans { file, .. } if *file == path.display().to_string()));
    }
    // Raw blocks need none.
    build("no/such/file".into(), Format::Raw).await.unwrap();
}

/// Blocks of every format on every shape, read and looked at: however widths of codes and scales meet, rows are where they belong.
#[tokio::test]
async fn every_format_on_every_shape() {
    for combo in crate::common::all_combos().filter(|combo| ["cpu", "cuda"].contains(&combo.setup.name)) {
        let Some(builder) = combo.builder() else { continue };
        let case = format!("every format on every shape, on {combo}");
        match combo.geometry.groups[0].element {
            ElementType::F16 => whole_case(case, looked_at::<f16>(&combo, builder)).await,
            ElementType::Bf16 => whole_case(case, looked_at::<bf16>(&combo, builder)).await,
            ElementType::F32 => whole_case(case, looked_at::<f32>(&combo, builder)).await,
        }
    }
}

async fn looked_at<E: Number>(combo: &Combo, builder: CacheBuilder) {
    let rig = Rig::<E>::new(combo, builder).await;
    let (sequence, model) = rig.filled(2 * rig.block() + 1).await;
    rig.sealed(&sequence).await;
    rig.check(&sequence, &model).await;
    for layer in 0..rig.layers() {
        let seen = super::views::look::<E>(&rig.layout, &sequence.view(layer).unwrap());
        model.compare(layer, 0..model.len(), &seen.keys, &seen.values, rig.format);
    }
    drop(sequence);
    rig.finish().await;
}
