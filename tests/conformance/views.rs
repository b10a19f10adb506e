//! Looking at stored blocks in place: they agree with what is read, and hold still while somebody looks.

use kv_cache::*;

use crate::common::model::int8_decode;
use crate::common::{Number, Rig, combos, eventually};

crate::conformance!(combos:
    a_view_agrees_with_a_read,
    a_view_holds_still_while_its_sequence_changes,
    a_view_of_staged_tokens_holds_still_while_a_fork_writes,
    a_block_table_agrees_with_the_view,
    a_block_table_keeps_its_blocks_in_place,
    looking_at_what_is_not_there,
);

/// `[tokens, kv_heads, dim]` keys and values, decoded, and every stored byte.
pub(super) struct Seen<E> {
    pub keys: Vec<E>,
    pub values: Vec<E>,
    pub stored: Vec<u8>,
}

fn decoded<E: Number>(block: &BlockView<'_>, plane: Plane, head: usize, dim: usize) -> Vec<E> {
    let mut rows = vec![E::from_f32(0.0); block.tokens() as usize * dim];
    match plane {
        Plane::Key => block.decode_keys(head, &mut rows).unwrap(),
        Plane::Value => block.decode_values(head, &mut rows).unwrap(),
    }
    let short = block.decode_keys(head, &mut rows[..1][..0]);
    assert!(matches!(short, Err(Error::Shape { .. })), "{short:?}");
    rows
}

pub(super) fn look<E: Number>(layout: &BlockLayout, view: &View) -> Seen<E> {
    let mut seen = Seen { keys: Vec::new(), values: Vec::new(), stored: Vec::new() };
    for block in view.blocks() {
        let tokens = block.tokens() as usize;
        for (plane, out) in [(Plane::Key, &mut seen.keys), (Plane::Value, &mut seen.values)] {
            let dim = layout.dim(plane);
            let mut heads = Vec::new();
            for head in 0..layout.kv_heads {
                let rows = match plane {
                    Plane::Key => block.keys::<E>(head).unwrap(),
                    Plane::Value => block.values::<E>(head).unwrap(),
                };
                heads.push(match rows {
                    Rows::Raw(rows) => {
                        seen.stored.extend_from_slice(bytemuck::cast_slice(rows));
                        rows.to_vec()
                    }
                    Rows::Int8 { codes, scales } => {
                        seen.stored.extend_from_slice(bytemuck::cast_slice(codes));
                        let scales: Vec<f32> = match scales {
                            Scales::F16(scales) => scales.iter().map(|s| s.to_f32()).collect(),
                            Scales::Bf16(_) => panic!("no scales of int8"),
                            Scales::F32(scales) => scales.to_vec(),
                        };
                        seen.stored.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
                        assert_eq!(scales.len(), tokens);
                        let rows = codes.chunks(dim).zip(scales);
                        rows.flat_map(|(codes, scale)| int8_decode::<E>(codes, scale)).collect()
                    }
                    Rows::Coded { rows, skip, codes, scales } => {
                        assert_eq!(
                            rows,
                            RowFormat { format: block.format_of(plane), element: E::TYPE, plane, dim }
                        );
                        assert_eq!(codes.len(), tokens * rows.row_bytes());
                        assert_eq!(scales.bytes().len(), rows.scales_bytes(skip + tokens));
                        seen.stored.extend_from_slice(codes);
                        seen.stored.extend_from_slice(scales.bytes());
                        decoded(&block, plane, head, dim)
                    }
                    other => panic!("rows of a new kind: {other:?}"),
                });
                let decoded = decoded(&block, plane, head, dim);
                assert_eq!(
                    bytemuck::cast_slice::<E, u8>(&decoded),
                    bytemuck::cast_slice::<E, u8>(&heads[head]),
                    "{plane:?} {head}"
                );
                assert_eq!(heads[head].len(), tokens * dim);
            }
            for token in 0..tokens {
                heads.iter().for_each(|head| out.extend_from_slice(&head[token * dim..(token + 1) * dim]));
            }
        }
    }
    seen
}

async fn a_view_agrees_with_a_read<E: Number>(rig: Rig<E>) {
    let (sequence, model) = rig.filled(3 * rig.block() + 2).await;
    for sealed in [false, true] {
        if sealed {
            rig.sealed(&sequence).await;
        }
        for layer in 0..rig.layers() {
            let view = sequence.view(layer).unwrap();
            assert_eq!(view.tokens(), model.len());
            let mut next = 0;
            for block in view.blocks() {
                assert_eq!((block.first_token(), block.first_token() % rig.block()), (next, 0));
                next += block.tokens();
                if sealed {
                    let full = block.tokens() == rig.block();
                    assert_eq!(block.format(), if full { rig.format } else { BlockFormat::RAW });
                }
            }
            assert_eq!(next, model.len());
            let seen = look::<E>(&rig.layout, &view);
            model.compare(layer, 0..model.len(), &seen.keys, &seen.values, rig.format);
            if sealed {
                let (keys, values) = sequence.read::<E>(layer, 0..model.len()).await.unwrap();
                assert_eq!((seen.keys, seen.values), (keys, values));
            }
        }
    }
    drop(sequence);
    rig.finish().await;
}

async fn a_view_holds_still_while_its_sequence_changes<E: Number>(rig: Rig<E>) {
    let (sequence, mut model) = rig.filled(2 * rig.block() + rig.block().div_ceil(2)).await;
    let layer = rig.layers() - 1;
    let mut views = Vec::new();
    let mut keep = |sequence: &Sequence| {
        let view = sequence.view(layer).unwrap();
        let seen = look::<E>(&rig.layout, &view);
        views.push((view, seen));
    };
    // Before and after sealing; with tokens cut off and written anew in the open block; in a sealed block; and dropped.
    keep(&sequence);
    rig.sealed(&sequence).await;
    keep(&sequence);
    for cut in [model.len() - 1, rig.block() + 1, rig.block() - 1, 0] {
        sequence.truncate(cut).await.unwrap();
        model.truncate(cut);
        rig.append(&sequence, &mut model, 2 * rig.block()).await;
        keep(&sequence);
        rig.check(&sequence, &model).await;
    }
    let other = rig.filled(4 * rig.block()).await.0;
    let open = rig.cache.stats().sequences_open;
    drop(sequence);
    eventually("closing", || rig.cache.stats().sequences_open == open - 1).await;
    // Their slots must not be given to others.
    let others = rig.filled(8 * rig.block()).await.0;
    rig.sealed(&others).await;
    for (view, before) in &views {
        let now = look::<E>(&rig.layout, view);
        assert!(now.stored == before.stored, "stored bytes changed under a view");
    }
    drop((views, other, others));
    rig.finish().await;
}

/// The parent's staged tokens lie in the block that it shares with its fork. Once the parent is gone the block is the fork's
/// alone, but the view still shows the parent's rows.
async fn a_view_of_staged_tokens_holds_still_while_a_fork_writes<E: Number>(rig: Rig<E>) {
    let (parent, mut model) = rig.filled(rig.block() + 1).await;
    let staged = rig.tokens(rig.block());
    rig.stage_all(&parent, &staged).await;
    let fork = parent.fork().await.unwrap();
    let view = parent.view(0).unwrap();
    let before = look::<E>(&rig.layout, &view);
    parent.close().await.unwrap();
    rig.append(&fork, &mut model, rig.block()).await;
    let now = look::<E>(&rig.layout, &view);
    assert!(now.stored == before.stored, "stored bytes changed under a view");
    rig.check(&fork, &model).await;
    drop((view, fork));
    rig.finish().await;
}

async fn a_block_table_agrees_with_the_view<E: Number>(rig: Rig<E>) {
    let (a, _) = rig.filled(3 * rig.block() + 1).await;
    let (b, _) = rig.filled(1).await;
    let empty = rig.open().await;
    rig.sealed(&a).await;
    rig.sealed(&b).await;
    let element = rig.layout.element.bytes();
    for layer in 0..rig.layers() {
        let table = rig.cache.block_table(&[&a, &empty, &b, &a], layer).unwrap();
        assert_eq!(table.block_tokens, rig.block());
        assert_eq!(table.value_offset_bytes, rig.layout.plane_bytes(Plane::Key));
        assert_eq!(table.base_addresses.len(), rig.cache.stats().shards.len());
        assert_eq!(table.sequences.len(), 4);
        for (row, sequence) in table.sequences.iter().zip([&a, &empty, &b, &a]) {
            assert_eq!((row.sequence, row.tokens, &row.dropped), (sequence.id(), sequence.len(), &(0..0)));
            let view = sequence.view(layer).unwrap();
            assert_eq!(row.blocks.len(), view.blocks().count());
            let base = table.base_addresses[sequence.id().shard() as usize];
            for (entry, block) in row.blocks.iter().zip(view.blocks()) {
                assert_eq!((entry.first_token, entry.format), (block.first_token(), block.format()));
                if !rig.combo.setup.host_memory {
                    continue;
                }
                for head in 0..rig.layout.kv_heads {
                    let rows = head * rig.layout.block_tokens;
                    let at = |plane, offset| {
                        let format = entry.format.of(&rig.layout, layer as usize, plane);
                        let row_bytes = (rig.layout.dim(plane) * code_bits(format, element)).div_ceil(8);
                        base + offset + rows * row_bytes
                    };
                    let keys = at(Plane::Key, entry.keys_offset_bytes);
                    let values = at(Plane::Value, entry.values_offset_bytes);
                    for (rows, expected) in [(block.keys::<E>(head), keys), (block.values::<E>(head), values)]
                    {
                        let address = match rows.unwrap() {
                            Rows::Raw(rows) => rows.as_ptr() as usize,
                            Rows::Int8 { codes, .. } => codes.as_ptr() as usize,
                            Rows::Coded { codes, .. } => codes.as_ptr() as usize,
                            other => panic!("{other:?}"),
                        };
                        assert_eq!(address, expected);
                    }
                    if entry.format.is_raw() {
                        let apart = entry.values_offset_bytes - entry.keys_offset_bytes;
                        assert_eq!(apart, table.value_offset_bytes);
                    }
                }
            }
        }
    }
    let layers = rig.layers();
    let error = rig.cache.block_table(&[&a], layers).unwrap_err();
    assert_eq!(error, Error::Layer { layer: layers, layers });
    drop((a, b, empty));
    rig.finish().await;
}

fn code_bits(format: Format, element_bytes: usize) -> usize {
    match format {
        Format::Int8 | Format::Fp8 => 8,
        Format::R4 | Format::Int4 => 4,
        Format::R3 => 3,
        Format::R2 | Format::Int2 => 2,
        _ => 8 * element_bytes,
    }
}

async fn a_block_table_keeps_its_blocks_in_place<E: Number>(rig: Rig<E>) {
    let (a, _) = rig.filled(2 * rig.block()).await;
    rig.sealed(&a).await;
    let table = rig.cache.block_table(&[&a], 0).unwrap();
    let (shard, held) = (a.id().shard(), table.sequences[0].blocks.clone());
    a.close().await.unwrap();
    let mut others = Vec::new();
    while !others.iter().any(|other: &Sequence| other.id().shard() == shard) {
        others.push(rig.filled(6 * rig.block()).await.0);
    }
    let later = rig.cache.block_table(&others.iter().collect::<Vec<_>>(), 0).unwrap();
    for row in later.sequences.iter().filter(|row| row.sequence.shard() == shard) {
        for entry in &row.blocks {
            assert!(held.iter().all(|block| block.slot_offset_bytes != entry.slot_offset_bytes), "{entry:?}");
        }
    }
    drop((table, later, others));
    rig.finish().await;
}

async fn looking_at_what_is_not_there<E: Number>(rig: Rig<E>) {
    let (sequence, _) = rig.filled(1).await;
    let layers = rig.layers();
    for layer in [layers, u32::MAX] {
        assert_eq!(sequence.view(layer).unwrap_err(), Error::Layer { layer, layers });
    }
    let view = sequence.view(0).unwrap();
    let block = view.blocks().next().unwrap();
    assert!(matches!(block.keys::<E>(rig.layout.kv_heads), Err(Error::Unsupported { .. })));
    assert!(matches!(block.values::<E>(usize::MAX), Err(Error::Unsupported { .. })));
    let wrong = match rig.layout.element {
        ElementType::F32 => block.keys::<half::f16>(0).err(),
        _ => block.keys::<f32>(0).err(),
    };
    assert!(matches!(wrong, Some(Error::ElementType { expected, .. }) if expected == rig.layout.element));
    drop(view);
    let id = sequence.id();
    let batch = BatchCacheOperations::new().close(&sequence);
    assert!(matches!(rig.cache.submit(batch).await.unwrap()[0], Ok(Outcome::Closed)));
    assert_eq!(sequence.view(0).unwrap_err(), Error::ClosedSequence(id));
    assert_eq!(rig.cache.block_table(&[&sequence], 0).unwrap_err(), Error::ClosedSequence(id));
    drop(sequence);
    rig.finish().await;
}
