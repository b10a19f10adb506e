//! Keys of low rank: what comes back, at which rank, and what is refused.

use std::sync::LazyLock;

use kv_cache::cold::{
    self, BasisError, Codec, ColdError, Element, FrameCodec, FrameInfo, KeyBasis, KeyBasisBuilder, LowRank,
    Shape,
};
use kv_cache::{ElementType, Geometry, Rope, RopeLayout};
use proptest::prelude::*;

use crate::kv::{BLOCK_TOKENS, Kv};
use crate::{bytes, cases, checked, past, shape, singles};

/// SmolLM2-135M's.
fn rope(dim: usize) -> Rope {
    Rope {
        inv_freq: (0..dim / 2).map(|i| 100_000f32.powf(-2.0 * i as f32 / dim as f32)).collect(),
        rotary_dims: dim as u32,
        layout: RopeLayout::Interleaved,
        attention_scale: 1.0,
    }
}

fn builder(kv: &Kv) -> KeyBasisBuilder {
    let mut geometry =
        Geometry::new(kv.layers.len() as u32, kv.heads as u32, kv.dim as u32, ElementType::F32);
    geometry.groups[0].rope = Some(rope(kv.dim));
    let mut builder = KeyBasisBuilder::new(&geometry).unwrap();
    for (layer, [keys, _]) in kv.layers.iter().enumerate() {
        // In two pieces: positions count.
        let (first, second) = keys.split_at(40 * kv.heads * kv.dim);
        builder.add(layer as u32, 0, first);
        builder.add(layer as u32, 40, second);
    }
    builder
}

/// Squared error of keys by half of the directions, over the keys' squares.
const HALF_LOSS: f64 = 0.01;
static KV: LazyLock<Kv> = LazyLock::new(|| Kv::fixture().unwrap());
/// Directions of a layer's keys in the fixture.
const WIDTH: u32 = 192;
/// By half of the directions.
static BASIS: LazyLock<KeyBasis> = LazyLock::new(|| builder(&KV).finish(WIDTH / 2).unwrap());

/// A model of two layers of two heads of six elements, four of which rotate; its basis has three directions.
fn small() -> KeyBasis {
    let mut geometry = Geometry::new(2, 2, 6, ElementType::F32);
    let rope = Rope { rotary_dims: 4, layout: RopeLayout::HalfSplit, attention_scale: 1.25, ..rope(4) };
    geometry.groups[0].rope = Some(rope);
    let mut builder = KeyBasisBuilder::new(&geometry).unwrap();
    for layer in 0..2 {
        builder.add(layer, 7, &singles(Element::F32, &bytes(Element::F32, 50 * 12, layer.into(), true)));
    }
    builder.finish(3).unwrap()
}

fn encoded(low_rank: LowRank<'_>, element: Element, shape: &Shape, position: u32, block: &[u8]) -> Vec<u8> {
    let mut frame = b"before".to_vec();
    low_rank.encode(element, shape, position, &past(), block, &mut frame).unwrap();
    frame.split_off(6)
}

/// The fixture's blocks through frames: squared error over squared distance from the mean, of all keys; bytes of the frames.
fn loss(basis: &KeyBasis, element: Element, values: Codec) -> (f64, usize) {
    let (mut error, mut all, mut stored) = (0.0, 0.0, 0);
    let shape = KV.shape();
    let plane = (shape.kv_heads * shape.tokens * shape.key_dim) as usize;
    for (at, block) in KV.blocks(element).iter().enumerate() {
        let low_rank = LowRank { basis, values };
        let position = (at * BLOCK_TOKENS) as u32;
        let frame = encoded(low_rank, element, &shape, position, block);
        let mut decoded = vec![0; block.len()];
        let info = low_rank.decode(&frame, position, &mut decoded).unwrap();
        assert_eq!((info.element, info.shape, info.block_bytes), (element, shape, block.len()));
        let FrameCodec::LowRank(of_keys) = info.codec else { panic!("{:?}", info.codec) };
        assert_eq!((of_keys.rank, of_keys.position, of_keys.values), (basis.rank(), position, values));
        assert_eq!(of_keys.basis, basis.hash()[..8]);
        let (x, y) = (singles(element, block), singles(element, &decoded));
        for (at, (x, y)) in x.chunks_exact(plane).zip(y.chunks_exact(plane)).enumerate() {
            if at % 2 == 0 {
                error += x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
                all += x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            } else if values == Codec::Lossless {
                assert!(x == y, "values came back changed");
            }
        }
        stored += frame.len();
    }
    (error / all, stored)
}

#[test]
fn half_of_the_directions_hold_nearly_all_of_real_keys() {
    let whole = builder(&KV).finish(WIDTH).unwrap();
    for element in [Element::F16, Element::Bf16, Element::F32] {
        let (half, stored) = loss(&BASIS, element, Codec::Lossless);
        assert!(half < HALF_LOSS, "{element:?}: {half}");
        let (all, more) = loss(&whole, element, Codec::Lossless);
        assert!(all < half && stored < more, "{element:?}: {all} {half}");
    }
    let (_, lossless) = loss(&BASIS, Element::Bf16, Codec::Lossless);
    let (lossy, smaller) = loss(&BASIS, Element::Bf16, Codec::Lossy32);
    assert!(lossy < HALF_LOSS && smaller < lossless);
}

/// Each coefficient is off by half a step at most, and the basis keeps lengths.
#[test]
fn all_directions_give_keys_back_within_the_quantisers_step() {
    let whole = builder(&KV).finish(WIDTH).unwrap();
    let (shape, element) = (KV.shape(), Element::F32);
    let low_rank = LowRank { basis: &whole, values: Codec::Lossy16 };
    let [heads, dim, tokens] = [KV.heads, KV.dim, BLOCK_TOKENS];
    for (at, block) in KV.blocks(element).iter().enumerate() {
        let position = (at * BLOCK_TOKENS) as u32;
        let frame = encoded(low_rank, element, &shape, position, block);
        let mut decoded = vec![0; block.len()];
        low_rank.decode(&frame, position, &mut decoded).unwrap();
        let (x, y) = (singles(element, block), singles(element, &decoded));
        for layer in 0..KV.layers.len() {
            let mean = whole.mean(layer as u32).unwrap();
            let mean = mean.iter().map(|x| x * x).sum::<f32>().sqrt();
            let least = whole.spread(layer as u32).unwrap() / 2.0;
            for token in 0..tokens {
                let of_token = |block: &[f32]| -> Vec<f32> {
                    let row = |head: usize| ((layer * 2 * heads + head) * tokens + token) * dim;
                    (0..heads).flat_map(|head| block[row(head)..][..dim].to_vec()).collect()
                };
                let (x, y) = (of_token(&x), of_token(&y));
                let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                let off = length(&mut x.iter().zip(&y).map(|(x, y)| x - y));
                // No coefficient is larger than the key less the mean is long: 127 steps, if half a spread is less.
                let step = least.max((length(&mut x.iter().copied()) + mean) / 127.0);
                let most = 1.01 * step / 2.0 * (WIDTH as f32).sqrt();
                assert!(off <= most, "layer {layer} token {token}: {off} {most}");
            }
        }
    }
}

#[test]
fn a_basis_is_orthonormal_and_its_leading_directions_are_those_of_a_lower_rank() {
    let low = builder(&KV).finish(20).unwrap();
    assert_eq!((low.rank(), low.width(), BASIS.rank()), (20, WIDTH, WIDTH / 2));
    for layer in 0..KV.layers.len() as u32 {
        let directions = BASIS.directions(layer).unwrap();
        assert_eq!(directions[..20 * WIDTH as usize], *low.directions(layer).unwrap());
        let rows = directions.chunks_exact(WIDTH as usize).collect::<Vec<_>>();
        for (at, a) in rows.iter().enumerate() {
            for (other, b) in rows.iter().enumerate() {
                let dot = a.iter().zip(*b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                let expected = if at == other { 1.0 } else { 0.0 };
                assert!((dot - expected).abs() < 1e-5, "{at} {other}: {dot}");
            }
        }
    }
    assert_eq!((BASIS.directions(3), BASIS.mean(3)), (None, None));
    assert_ne!(low.hash(), BASIS.hash());
}

#[test]
fn what_cannot_be_calibrated_is_told() {
    let kv = &KV;
    let of_all = builder(kv);
    for rank in [0, WIDTH + 1, u32::MAX] {
        assert_eq!(of_all.finish(rank), Err(BasisError::Rank { rank, width: WIDTH }));
    }
    let mut builder = KeyBasisBuilder::new(&Geometry::new(2, 1, 4, ElementType::F16)).unwrap();
    builder.add(0, 0, &[1.0; 9]);
    builder.add(7, 0, &[1.0; 8]);
    assert_eq!(builder.finish(1), Err(BasisError::Keys { layer: 1, tokens: 0 }));
    builder.add(1, 0, &[f32::NAN, 0.0, 0.0, 0.0]);
    assert_eq!(builder.finish(1), Err(BasisError::Keys { layer: 1, tokens: 1 }));
    assert!(KeyBasisBuilder::new(&Geometry::new(0, 1, 4, ElementType::F16)).is_err());
}

#[test]
fn what_is_of_another_basis_position_or_shape_is_told() {
    let basis = small();
    let low_rank = LowRank { basis: &basis, values: Codec::Lossless };
    let of = shape(2, 2, 5, 6, 3);
    let block = bytes(Element::F16, of.elements().unwrap(), 1, true);
    let frame = encoded(low_rank, Element::F16, &of, 64, &block);
    let mut room = vec![0; block.len()];

    assert_eq!(low_rank.decode(&frame, 64, &mut room).unwrap().shape, of);
    let wrong = low_rank.decode(&frame, 65, &mut room);
    assert_eq!(wrong, Err(ColdError::OtherPosition { frame: 64, given: 65 }));
    let other = LowRank { basis: &BASIS, ..low_rank };
    let given = BASIS.hash()[..8].try_into().unwrap();
    let name = basis.hash()[..8].try_into().unwrap();
    assert_eq!(other.decode(&frame, 64, &mut room), Err(ColdError::OtherBasis { frame: name, given }));
    assert_eq!(cold::decode(&frame, &mut room), Err(ColdError::NeedsBasis { basis: name }));
    let small_room = low_rank.decode(&frame, 64, &mut room[1..]);
    assert_eq!(small_room, Err(ColdError::Room { block_bytes: block.len(), room_bytes: block.len() - 1 }));
    let mut without = Vec::new();
    cold::encode(Codec::Lossless, Element::F16, &of, &past(), &block, &mut without).unwrap();
    assert_eq!(low_rank.decode(&without, 64, &mut room), Err(ColdError::NoLowRank));

    let mut out = vec![7];
    let mut refused = |element, shape: &Shape, block: &[u8], values| {
        LowRank { basis: &basis, values }.encode(element, shape, 0, &past(), block, &mut out).unwrap_err()
    };
    for other in [Shape { layers: 1, ..of }, Shape { kv_heads: 4, key_dim: 3, ..of }] {
        let block = vec![0; 2 * other.elements().unwrap()];
        let error = refused(Element::F16, &other, &block, Codec::Lossless);
        assert_eq!(error, ColdError::BasisShape { basis: [2, 2, 6], shape: other });
    }
    let codes = vec![0; of.elements().unwrap()];
    assert_eq!(refused(Element::Int8, &of, &codes, Codec::Lossless), ColdError::CodesAsKeys);
    let error = refused(Element::F16, &of, &block[2..], Codec::Lossless);
    assert_eq!(error, ColdError::BlockBytes { shape_bytes: 360, given_bytes: 358 });
    // A layer is 60 elements of keys and 30 of values.
    let mut numbers = singles(Element::F16, &block);
    for (at, x, values) in [
        (95, f32::NAN, Codec::Lossless),
        (153, f32::INFINITY, Codec::Lossy32),
        (13, f32::MAX, Codec::Lossless),
    ] {
        let before = std::mem::replace(&mut numbers[at], x);
        let block = numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
        let error = refused(Element::F32, &of, &block, values);
        // A key that is too large is told by its first element.
        let at = if x == f32::MAX { 12 } else { at };
        assert!(matches!(error, ColdError::NotFinite { at: found, .. } if found == at), "{error}");
        numbers[at] = before;
        numbers[13] = 0.0;
    }
    assert_eq!(out, [7]);
}

#[test]
fn blocks_of_nothing_and_of_keys_alone() {
    let basis = small();
    let low_rank = LowRank { basis: &basis, values: Codec::Lossy16 };
    for of in [shape(2, 2, 0, 6, 6), shape(2, 2, 9, 6, 0), shape(2, 2, 1, 6, 1)] {
        let block = bytes(Element::Bf16, of.elements().unwrap(), 1, true);
        let frame = encoded(low_rank, Element::Bf16, &of, u32::MAX, &block);
        let mut decoded = vec![0; block.len()];
        assert_eq!(low_rank.decode(&frame, u32::MAX, &mut decoded).unwrap().shape, of);
    }
}

/// What version 1 of both looks like on disk: a file and a frame that later versions must read.
#[test]
fn a_known_basis_and_frame() {
    // A layer, a head of 4 elements, 2 directions, no rotation; 9 tokens; a spread of 1, no mean, and the first two dims.
    let words = [1u32, 1, 4, 2, 0].into_iter().flat_map(u32::to_le_bytes);
    let mut file =
        [b"kvkb".to_vec(), vec![1, 0, 0, 0], words.collect(), 1f32.to_le_bytes().to_vec()].concat();
    file.extend(9u64.to_le_bytes());
    let numbers = [1.0f32, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0];
    file.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
    file.extend(blake3::hash(&file.clone()).as_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("known.kvkb");
    std::fs::write(&path, &file).unwrap();
    let basis = KeyBasis::load(&path).unwrap();
    basis.save(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), file);

    let keys = [1.0f32, 2.1, 0.0, 0.5, -0.6, 3.0, 7.0, 0.0];
    let block = keys.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    let low_rank = LowRank { basis: &basis, values: Codec::Lossless };
    let frame = encoded(low_rank, Element::F32, &shape(1, 1, 2, 4, 0), 258, &block);
    let hex = frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex, KNOWN);
    let mut decoded = vec![0; block.len()];
    low_rank.decode(&frame, 258, &mut decoded).unwrap();
    assert_eq!(singles(Element::F32, &decoded), [1.0, 2.0, 0.0, 0.0, -0.5, 3.0, 0.0, 0.0]);
}

const KNOWN: &str = "6b7663660100040301000000010000000200000004000000000000002000000000000000630000000000000002010100000000030602000201000000000000000200000002010000a4acf902ed139f6d01003f003f01000000000000000000000000000000402a000000000000000000000000000000c140c140c140c1400000000000021000001c100000000100000001000000010000000100000001000000010000f4d9d01df9c02ecc";

#[test]
fn files_come_back_as_they_were_and_wrong_ones_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.kvkb");
    let mut without_rope = KeyBasisBuilder::new(&Geometry::new(1, 1, 4, ElementType::F16)).unwrap();
    without_rope.add(0, 0, &[1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0, 0.0]);
    for basis in [&*BASIS, &small(), &without_rope.finish(2).unwrap()] {
        basis.save(&path).unwrap();
        assert_eq!(KeyBasis::load(&path).unwrap(), *basis);
    }
    let good = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        match KeyBasis::load(&path).unwrap_err() {
            BasisError::File { file, reason } => {
                assert!(file.ends_with("keys.kvkb"));
                reason
            }
            error => panic!("{error}"),
        }
    };
    for at in 0..good.len() {
        let mut altered = good.clone();
        altered[at] ^= 0x41;
        refused(&altered);
        refused(&good[..at]);
    }
    refused(&[&good[..], &[0]].concat());
    // Altered, with a hash that is right.
    let hashed = |at: usize, with: &[u8]| {
        let mut altered = good[..good.len() - 32].to_vec();
        altered[at..at + with.len()].copy_from_slice(with);
        altered.extend(blake3::hash(&altered.clone()).as_bytes());
        refused(&altered)
    };
    assert!(hashed(0, b"kvcf").contains("begins with"));
    assert!(hashed(4, &[2]).contains("version 2"));
    assert!(hashed(6, &[3]).contains("kind 3"));
    assert!(hashed(8, &[0xFF; 16]).contains("layers"));
    assert!(hashed(8, &1024u32.to_le_bytes()).contains("bytes behind the header"));
    assert!(hashed(20, &5u32.to_le_bytes()).contains("rank 5"));
    assert!(hashed(24, &u32::MAX.to_le_bytes()).contains("pairs"));
    assert!(hashed(28, &0f32.to_le_bytes()).contains("factor"));
    assert!(hashed(40, &f32::NAN.to_le_bytes()).contains("number 0 is NaN"));
    assert!(matches!(KeyBasis::load(folder.path().join("none")), Err(BasisError::Io { .. })));
    assert!(matches!(BASIS.save(folder.path()), Err(BasisError::Io { .. })));
}

proptest! {
    #![proptest_config(cases(1000))]

    /// Whatever a payload holds, behind a checksum that is right: the block, or an error.
    #[test]
    fn payloads_of_any_bytes_never_panic(
        which in 0usize..3,
        values in 0usize..3,
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        end in any::<prop::sample::Index>(),
        cut: bool,
    ) {
        let (basis, element) = (small(), Element::ALL[which]);
        let low_rank = LowRank { basis: &basis, values: Codec::ALL[values] };
        let shape = shape(2, 2, 9, 6, 10);
        let block = bytes(element, shape.elements().unwrap(), 3, true);
        let mut frame = encoded(low_rank, element, &shape, 32, &block);
        for (at, byte) in cuts {
            let at = 64 + at.index(frame.len() - 72);
            frame[at] = byte;
        }
        if cut {
            frame.truncate(72 + end.index(frame.len() - 72));
        }
        checked(&mut frame);
        let mut room = vec![0; block.len()];
        let _ = FrameInfo::read(&frame);
        if let Err(error) = low_rank.decode(&frame, 32, &mut room) {
            let of_payload = matches!(
                error,
                ColdError::Payload { .. }
                    | ColdError::PayloadEnds { .. }
                    | ColdError::OtherBasis { .. }
                    | ColdError::OtherPosition { .. }
                    | ColdError::UnknownCodec { .. }
            );
            prop_assert!(of_payload, "{}", error);
        }
    }

    /// Steps and levels of any value, and shapes of any size: bounded by the room that the caller has made.
    #[test]
    fn frames_of_any_bytes_never_panic(
        head in proptest::collection::vec(any::<u8>(), 81..82),
        rest in proptest::collection::vec(any::<u8>(), 8..400),
        fitting: bool,
    ) {
        let basis = small();
        let low_rank = LowRank { basis: &basis, values: Codec::Lossless };
        let shape = shape(2, 2, 9, 6, 10);
        let block = bytes(Element::F32, shape.elements().unwrap(), 3, true);
        let good = encoded(low_rank, Element::F32, &shape, 0, &block);
        let head = if fitting { &good[..81] } else { &[&good[..8], &head[8..]].concat()[..] };
        let mut frame = [head, &rest].concat();
        checked(&mut frame);
        prop_assert!(low_rank.decode(&frame, 0, &mut vec![0; block.len()]).is_err());
    }
}
