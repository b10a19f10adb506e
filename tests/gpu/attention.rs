//! A paged attention kernel over exported block tables, against attention in f64 over the tensors that were appended.

use cudarc::driver::{LaunchConfig, PushKernelArg};
use kv_cache::cuda::DeviceBlockTable;
use kv_cache::half::f16;
use kv_cache::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::common::model::int8_encode;
use crate::common::{Model, Rig as CacheRig, Tokens, eventually, geometry};
use crate::device::{Device, rig};
use crate::table::Table;

const LAYERS: u32 = 3;
const KV_HEADS: u32 = 2;
const Q_HEADS: u32 = 6;
const KEY_DIM: u32 = 64;
const VALUE_DIM: u32 = 48;

/// Of values in -1..1: scores of 64 products differ by less than 1e-5 between f32 and f64, and so do their exponentials.
const ERROR_MAX: f64 = 1e-4;

type Rig = CacheRig<f16>;

fn shape(block_tokens: u32) -> Geometry {
    geometry((block_tokens, LAYERS, KV_HEADS, KEY_DIM, VALUE_DIM), ElementType::F16)
}

/// Tokens of keys and values in -1..1.
fn tokens(layout: BlockLayout, tokens: usize, seed: u64) -> Tokens<f16> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut plane = |dim| {
        let elements = layout.layers * tokens * layout.kv_heads * dim;
        (0..elements).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect::<Vec<_>>()
    };
    let (keys, values) = (plane(layout.key_dim), plane(layout.value_dim));
    Tokens { layout, ids: (0..tokens as u32).collect(), keys, values }
}

fn queries(sequences: usize) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(99);
    // Large enough that some tokens matter much more than others.
    (0..sequences * (Q_HEADS * KEY_DIM) as usize).map(|_| rng.random_range(-3.0..3.0)).collect()
}

async fn append(rig: &Rig, sequence: &Sequence, model: &mut Model<f16>, count: usize, seed: &mut u64) {
    *seed += 1;
    let new = tokens(rig.layout, count, *seed);
    sequence.append(&new.ids, &new.keys, &new.values).await.unwrap();
    model.push(&new);
}

/// What the kernel makes of a table, for the layer so many behind its own.
fn attend(device: &Device, table: &DeviceBlockTable, queries: &[f32], layer: u32) -> Vec<f32> {
    let sequences = table.sequences() as u32;
    let (input, output) =
        (device.memory_of(queries), device.memory::<f32>((sequences * Q_HEADS * VALUE_DIM) as usize));
    let (kernel, table, factor) = (device.kernel("paged_attention"), Table::new(table, layer), scale());
    let config =
        LaunchConfig { grid_dim: (sequences, Q_HEADS, 1), block_dim: (128, 1, 1), shared_mem_bytes: 0 };
    let mut launch = device.stream.launch_builder(&kernel);
    launch.arg(&table).arg(&input.address).arg(&output.address);
    launch.arg(&Q_HEADS).arg(&KV_HEADS).arg(&KEY_DIM).arg(&VALUE_DIM).arg(&factor);
    // SAFETY: the kernel's parameters; the table lives until the output was copied back, which waits for the stream.
    unsafe { launch.launch(config) }.unwrap();
    device.download(&output)
}

fn scale() -> f32 {
    1.0 / (KEY_DIM as f32).sqrt()
}

/// A row as it is stored.
fn stored(row: &[f16], format: Format) -> Vec<f64> {
    match format {
        Format::Int8 => {
            let (codes, scale) = int8_encode(row);
            codes.iter().map(|&code| f64::from(code) * f64::from(scale)).collect()
        }
        _ => row.iter().map(|x| x.to_f64()).collect(),
    }
}

/// Attention of one sequence in f64: `[q_heads, value_dim]`.
fn reference(model: &Model<f16>, row: &SequenceRows, layer: u32, block: u32, queries: &[f32]) -> Vec<f64> {
    let formats = |token: u32| {
        let entry = row.blocks.iter().find(|entry| entry.first_token == token / block * block);
        entry.map(|entry| entry.format.keys)
    };
    let kept: Vec<(u32, Format)> = (0..row.tokens)
        .filter(|token| !row.dropped.contains(token))
        .map(|token| (token, formats(token).expect("a block for every token that is there")))
        .collect();
    let mut output = Vec::new();
    for (q_head, query) in queries.chunks(KEY_DIM as usize).enumerate() {
        let head = q_head / (Q_HEADS / KV_HEADS) as usize;
        let of = |plane: Plane, dim: u32, token: u32, format| {
            let rows = model.rows(plane, layer, token..token + 1);
            stored(&rows[head * dim as usize..(head + 1) * dim as usize], format)
        };
        let score = |&(token, format): &(u32, Format)| {
            let key = of(Plane::Key, KEY_DIM, token, format);
            key.iter().zip(query).map(|(k, q)| k * f64::from(*q)).sum::<f64>() * f64::from(scale())
        };
        let scores: Vec<f64> = kept.iter().map(score).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut total = vec![0.0; VALUE_DIM as usize];
        for (weight, &(token, format)) in weights.iter().zip(&kept) {
            let value = of(Plane::Value, VALUE_DIM, token, format);
            total.iter_mut().zip(value).for_each(|(total, v)| *total += weight / sum * v);
        }
        output.extend(total);
    }
    output
}

/// Every layer, through the table of layer 0, agrees with the models.
fn check(device: &Device, table: &DeviceBlockTable, models: &[&Model<f16>]) {
    let queries = queries(models.len());
    for layer in 0..LAYERS {
        let output = attend(device, table, &queries, layer);
        let rows = table.host().sequences.iter().zip(models);
        let per_query = (Q_HEADS * KEY_DIM) as usize;
        for (at, (row, model)) in rows.enumerate() {
            let query = &queries[at * per_query..][..per_query];
            let expected = reference(model, row, layer, table.block_tokens(), query);
            let output = &output[at * expected.len()..][..expected.len()];
            for (place, (got, expected)) in output.iter().zip(&expected).enumerate() {
                let error = (f64::from(*got) - expected).abs();
                assert!(
                    error <= ERROR_MAX,
                    "layer {layer}, sequence {at}, place {place}: {got} for {expected}"
                );
            }
        }
    }
}

/// Sequences of several lengths whose blocks lie among each other's.
async fn scattered(rig: &Rig) -> Vec<(Sequence, Model<f16>)> {
    let mut rows = Vec::new();
    for _ in 0..7 {
        rows.push((rig.open().await, rig.model()));
    }
    let mut seed = 0;
    for round in 0..6 {
        for (at, (sequence, model)) in rows.iter_mut().enumerate() {
            // The first stays empty.
            let count = [0, 1, 2, 7, 11, 16, 19][at];
            if count > 0 && (round > 0 || at > 1) {
                append(rig, sequence, model, count, &mut seed).await;
            }
        }
    }
    rows
}

fn parts(rows: &[(Sequence, Model<f16>)]) -> (Vec<&Sequence>, Vec<&Model<f16>>) {
    rows.iter().map(|(sequence, model)| (sequence, model)).unzip()
}

#[tokio::test]
async fn over_scattered_blocks() {
    for format in [Format::Raw, Format::Int8] {
        for block in [5, 32] {
            let Some((device, rig)) = rig::<f16>(format, shape(block), |b| b).await else { return };
            let rows = scattered(&rig).await;
            let (sequences, models) = parts(&rows);
            for sequence in &sequences {
                rig.sealed(sequence).await;
            }
            let table = rig.cache.device_block_table(&sequences, 0).unwrap();
            assert_eq!((table.sequences(), table.block_tokens()), (rows.len(), block));
            assert_eq!(table.has(Format::Int8), format == Format::Int8);
            assert!(table.has(Format::Raw));
            let order: Vec<usize> =
                table.host().sequences[6].blocks.iter().map(|entry| entry.slot_offset_bytes).collect();
            let slot = order.iter().zip(&order[1..]).map(|(a, b)| b.wrapping_sub(*a)).min().unwrap();
            let neighbours = order.windows(2).all(|pair| pair[1].wrapping_sub(pair[0]) == slot);
            assert!(format == Format::Int8 || !neighbours, "the blocks are not scattered: {order:?}");
            check(&device, &table, &models);
            drop(table);
            // The same sequences in another order, one of them twice.
            let again = [6, 1, 6, 0].map(|at| (sequences[at], models[at]));
            let table = rig.cache.device_block_table(&again.map(|(sequence, _)| sequence), 0).unwrap();
            check(&device, &table, &again.map(|(_, model)| model));
            drop((table, rows));
            rig.finish().await;
        }
    }
}

#[tokio::test]
async fn after_forks_and_copies_on_write() {
    for format in [Format::Raw, Format::Int8] {
        let Some((device, rig)) = rig::<f16>(format, shape(32), |b| b).await else { return };
        let (mut seed, mut rows) = (1000, Vec::new());
        let (sequence, mut model) = (rig.open().await, rig.model());
        append(&rig, &sequence, &mut model, 80, &mut seed).await;
        rig.sealed(&sequence).await;
        for tokens in [1, 40] {
            let fork = sequence.fork().await.unwrap();
            let mut model = model.clone();
            append(&rig, &fork, &mut model, tokens, &mut seed).await;
            rows.push((fork, model));
        }
        append(&rig, &sequence, &mut model, 3, &mut seed).await;
        rows.push((sequence, model));
        for (sequence, _) in &rows {
            rig.sealed(sequence).await;
        }
        let (sequences, models) = parts(&rows);
        let table = rig.cache.device_block_table(&sequences, 0).unwrap();
        let first = |row: usize| table.host().sequences[row].blocks[0];
        assert_eq!(first(0), first(2), "the common prefix is shared");
        let open = |row: usize| table.host().sequences[row].blocks[2];
        assert_ne!(open(0), open(2), "the open block is not");
        check(&device, &table, &models);
        drop((table, rows));
        rig.finish().await;
    }
}

/// A table shows what was there when it was made, whatever happens to the sequences.
#[tokio::test]
async fn a_table_holds_still() {
    let Some((device, rig)) = rig::<f16>(Format::Int8, shape(32), |b| b).await else { return };
    let (mut seed, mut rows) = (2000, Vec::new());
    for tokens in [20, 31, 50] {
        let (sequence, mut model) = (rig.open().await, rig.model());
        append(&rig, &sequence, &mut model, tokens, &mut seed).await;
        rows.push((sequence, model));
    }
    let before: Vec<_> = rows.iter().map(|(_, model)| model.clone()).collect();
    let (sequences, _) = parts(&rows);
    let table = rig.cache.device_block_table(&sequences, 0).unwrap();
    let before: Vec<_> = before.iter().collect();
    check(&device, &table, &before);
    // One is filled up and sealed, one is cut and written over, one is closed; others take whatever is free.
    let mut rows = rows.into_iter();
    let [(grown, mut grown_model), (cut, _), (closed, _)] = std::array::from_fn(|_| rows.next().unwrap());
    append(&rig, &grown, &mut grown_model, 20, &mut seed).await;
    rig.sealed(&grown).await;
    cut.truncate(10).await.unwrap();
    append(&rig, &cut, &mut rig.model(), 15, &mut seed).await;
    closed.close().await.unwrap();
    let (other, mut other_model) = (rig.open().await, rig.model());
    append(&rig, &other, &mut other_model, 300, &mut seed).await;
    rig.sealed(&other).await;
    check(&device, &table, &before);
    let now = rig.cache.device_block_table(&[&grown, &other], 0).unwrap();
    check(&device, &now, &[&grown_model, &other_model]);
    drop((table, now, grown, cut, other));
    rig.finish().await;
}

/// Buffers of tables are used again, and not while a table has them.
#[tokio::test]
async fn many_tables_at_once() {
    let Some((device, rig)) = rig::<f16>(Format::Raw, shape(32), |b| b).await else { return };
    let rows = scattered(&rig).await;
    for round in 0..4 {
        let tables: Vec<_> =
            rows.iter().map(|(sequence, _)| rig.cache.device_block_table(&[sequence], 0).unwrap()).collect();
        for (table, (_, model)) in tables.iter().zip(&rows).skip(round) {
            check(&device, table, &[model]);
        }
    }
    drop(rows);
    rig.finish().await;
}

/// Kernels read blocks of the host tier where they are, also those that move back while a table shows them.
#[tokio::test]
async fn over_blocks_in_the_host_tier() {
    for format in [Format::Raw, Format::Int8] {
        let Some((device, rig)) = rig::<f16>(format, shape(32), |b| b).await else { return };
        let (mut seed, mut rows) = (4000, Vec::new());
        for tokens in [80, 100] {
            let (sequence, mut model) = (rig.open().await, rig.model());
            append(&rig, &sequence, &mut model, tokens, &mut seed).await;
            rig.sealed(&sequence).await;
            rows.push((sequence, model));
        }
        let (sequences, models) = parts(&rows);
        assert_eq!(sequences[1].offload().await.unwrap(), 3);
        let table = rig.cache.device_block_table(&sequences, 0).unwrap();
        let blocks = || table.host().sequences.iter().flat_map(|row| &row.blocks);
        assert_eq!(blocks().filter(|block| block.tier == Tier::Host).count(), 3);
        check(&device, &table, &models);
        assert_eq!(sequences[1].prefetch().await.unwrap(), 3);
        assert_eq!(sequences[0].offload().await.unwrap(), 2);
        check(&device, &table, &models);
        drop((table, rows));
        rig.finish().await;
    }
}

#[tokio::test]
async fn with_dropped_tokens() {
    let dropping = |builder: CacheBuilder| {
        builder.compression(Compression { enabled: true, ratio: 0.5, ..Compression::default() })
    };
    for format in [Format::Raw, Format::Int8] {
        let Some((device, rig)) = rig::<f16>(format, shape(5), dropping).await else { return };
        let (mut seed, mut rows) = (3000, Vec::new());
        for steps in [1, 5, 12] {
            let (sequence, mut model) = (rig.open().await, rig.model());
            for _ in 0..steps {
                append(&rig, &sequence, &mut model, 7, &mut seed).await;
            }
            rows.push((sequence, model));
        }
        let (sequences, models) = parts(&rows);
        eventually("sealing", || sequences[2].info().sealed_blocks > 0).await;
        let table = rig.cache.device_block_table(&sequences, 0).unwrap();
        let dropped: usize = table.host().sequences.iter().map(|row| row.dropped.len()).sum();
        assert!(dropped > 0, "nothing was dropped");
        check(&device, &table, &models);
        drop((table, rows));
        rig.finish().await;
    }
}

#[tokio::test]
async fn tables_that_cannot_be() {
    let Some((_, rig)) = rig::<f16>(Format::Raw, shape(32), |b| b).await else { return };
    let (sequence, _) = rig.filled(3).await;
    assert!(matches!(rig.cache.device_block_table(&[], 0), Err(Error::Unsupported { .. })));
    let layers = LAYERS;
    let error = rig.cache.device_block_table(&[&sequence], layers).unwrap_err();
    assert_eq!(error, Error::Layer { layer: layers, layers });
    let id = sequence.id();
    let close = BatchCacheOperations::new().close(&sequence);
    assert!(matches!(rig.cache.submit(close).await.unwrap()[0], Ok(Outcome::Closed)));
    assert_eq!(rig.cache.device_block_table(&[&sequence], 0).unwrap_err(), Error::ClosedSequence(id));
    drop(sequence);
    rig.finish().await;
}
