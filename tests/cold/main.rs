//! Cold frames: what comes back, what is refused, and how much smaller real keys and values get.

#[path = "../common/kv.rs"]
mod kv;
mod low_rank;

use half::{bf16, f16};
use kv::Kv;
use kv_cache::cold::{self, Codec, ColdError, Element, FrameCodec, FrameInfo, Shape};
use kv_cache::{BlockFormat, Format, History};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

fn shape(layers: u32, kv_heads: u32, tokens: u32, key_dim: u32, value_dim: u32) -> Shape {
    Shape { layers, kv_heads, tokens, key_dim, value_dim }
}

fn encoded(codec: Codec, element: Element, shape: &Shape, block: &[u8]) -> Vec<u8> {
    let mut frame = b"before".to_vec();
    cold::encode(codec, element, shape, &past(), block, &mut frame).unwrap();
    frame.split_off(6)
}

/// What blocks have been through: sealed, and re-encoded to a format with all that one may have.
fn past() -> History {
    let colder =
        BlockFormat { values: Format::Int4, raw_first_layers: 2, raw_last_layers: 258, ..Format::R4.into() };
    History::of(&[Format::Int8.into(), colder]).unwrap()
}

/// Fails unless every bit comes back; gives the frame.
fn comes_back(element: Element, shape: &Shape, block: &[u8]) -> Vec<u8> {
    let frame = encoded(Codec::Lossless, element, shape, block);
    let (info, decoded) = cold::decode_to_vec(&frame, block.len()).unwrap();
    assert_eq!((info.codec, info.element, info.shape), (FrameCodec::Block(Codec::Lossless), element, *shape));
    assert_eq!(info.history, past());
    assert!(decoded == block, "{element:?} {shape:?} came back changed");
    assert!(frame.len() <= block.len() + 73);
    frame
}

/// Bytes like those of keys and values (`smooth`), or any.
fn bytes(element: Element, count: usize, seed: u64, smooth: bool) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let value = |at: usize, noise: u64| ((at % 7) as f32 - 3.0) * 4.0 + noise as f32 / (1u64 << 31) as f32;
    (0..count)
        .flat_map(|at| {
            let (noise, any) = (next(), next() as u32 ^ (next() as u32) << 13);
            let x = value(at, noise);
            match element {
                _ if !smooth => any.to_le_bytes()[..element.bytes()].to_vec(),
                Element::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
                Element::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
                Element::F32 => x.to_le_bytes().to_vec(),
                Element::Int8 => vec![x as i8 as u8],
            }
        })
        .collect()
}

/// A seed of its own: the same cases in every run.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(11), failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn every_bit_comes_back(
        which in 0usize..4,
        dims in (0u32..4, 0u32..4, 0u32..40, 0u32..20, 0u32..20),
        seed: u64,
        smooth: bool,
    ) {
        let element = Element::ALL[which];
        let shape = shape(dims.0, dims.1, dims.2, dims.3, dims.4);
        comes_back(element, &shape, &bytes(element, shape.elements().unwrap(), seed, smooth));
    }

    #[test]
    fn lossy_codecs_are_off_by_half_a_step(
        which in 0usize..3,
        lossy in 1usize..3,
        dims in (0u32..3, 0u32..3, 0u32..40, 0u32..20, 0u32..20),
        seed: u64,
    ) {
        let (element, codec) = (Element::ALL[which], Codec::ALL[lossy]);
        let shape = shape(dims.0, dims.1, dims.2, dims.3, dims.4);
        let block = bytes(element, shape.elements().unwrap(), seed, true);
        let frame = encoded(codec, element, &shape, &block);
        let (info, decoded) = cold::decode_to_vec(&frame, block.len()).unwrap();
        prop_assert_eq!((info.codec, info.element, info.shape), (FrameCodec::Block(codec), element, shape));
        let (x, y) = (singles(element, &block), singles(element, &decoded));
        // Of the largest that there can be: a step is that of a token.
        let most = if codec == Codec::Lossy32 { 13.0 / 30.0 } else { 13.0 / 14.0 };
        for (x, y) in x.iter().zip(&y) {
            prop_assert!((x - y).abs() <= most * 1.02 + 0.05, "{} {}", x, y);
        }
    }

    #[test]
    fn bytes_that_are_no_frame_are_errors(any in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(cold::decode_to_vec(&any, usize::MAX).is_err());
    }

    /// Whatever a payload holds, behind a checksum that is right: the block, or an error.
    #[test]
    fn payloads_of_any_bytes_never_panic(
        which in 0usize..4,
        lossy in 0usize..3,
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        end in any::<prop::sample::Index>(),
        cut: bool,
    ) {
        let element = Element::ALL[which];
        let codec = if element == Element::Int8 { Codec::Lossless } else { Codec::ALL[lossy] };
        let shape = shape(2, 2, 9, 11, 10);
        let block = bytes(element, shape.elements().unwrap(), 3, true);
        let mut frame = encoded(codec, element, &shape, &block);
        for (at, byte) in cuts {
            let at = 64 + at.index(frame.len() - 72);
            frame[at] = byte;
        }
        if cut {
            frame.truncate(72 + end.index(frame.len() - 72));
        }
        checked(&mut frame);
        let mut room = vec![0; block.len()];
        if let Err(error) = cold::decode(&frame, &mut room) {
            let of_payload = matches!(error, ColdError::Payload { .. } | ColdError::PayloadEnds { .. });
            prop_assert!(of_payload, "{}", error);
        }
    }
}

fn singles(element: Element, bytes: &[u8]) -> Vec<f32> {
    let of = |x: &[u8]| match element {
        Element::F16 => f16::from_le_bytes([x[0], x[1]]).to_f32(),
        Element::Bf16 => bf16::from_le_bytes([x[0], x[1]]).to_f32(),
        Element::F32 => f32::from_le_bytes([x[0], x[1], x[2], x[3]]),
        Element::Int8 => f32::from(x[0] as i8),
    };
    bytes.chunks_exact(element.bytes()).map(of).collect()
}

/// Gives an altered frame the length and the checksum of what it is now.
fn checked(frame: &mut [u8]) {
    let end = frame.len() - 8;
    let payload_bytes = (end - 64) as u64;
    frame[36..44].copy_from_slice(&payload_bytes.to_le_bytes());
    let checksum = xxhash_rust::xxh3::xxh3_64(&frame[..end]);
    frame[end..].copy_from_slice(&checksum.to_le_bytes());
}

#[test]
fn all_numbers_of_16_bits_come_back() {
    // NaNs with their payloads, infinities, denormals and both zeros are among them.
    let all = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect::<Vec<_>>();
    for element in [Element::F16, Element::Bf16] {
        for shape in [shape(2, 4, 64, 128, 0), shape(1, 1, 1, 65536, 0), shape(256, 1, 256, 0, 1)] {
            comes_back(element, &shape, &all);
        }
    }
}

#[test]
fn special_floats_come_back_in_f32() {
    let special = [
        0x0000_0000,
        0x8000_0000,
        1,
        0x807F_FFFF,
        0x7F80_0000,
        0xFF80_0000,
        0x7FC1_2345,
        0xFFA0_0001,
        0x3F80_0000u32,
    ];
    let block = special.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    comes_back(Element::F32, &shape(1, 1, 3, 3, 0), &block);
}

#[test]
fn blocks_of_one_value_and_of_nothing() {
    for element in Element::ALL {
        let shape = shape(2, 3, 32, 16, 24);
        let zeros = vec![0; shape.elements().unwrap() * element.bytes()];
        let frame = comes_back(element, &shape, &zeros);
        let tokens = u32::MAX;
        for nothing in [Shape { tokens, layers: 0, ..shape }, Shape { key_dim: 0, value_dim: 0, ..shape }] {
            comes_back(element, &nothing, &[]);
        }
        if element != Element::Int8 {
            for codec in [Codec::Lossy32, Codec::Lossy16] {
                let lossy = encoded(codec, element, &shape, &zeros);
                assert!(lossy.len() < frame.len());
                let (_, decoded) = cold::decode_to_vec(&lossy, zeros.len()).unwrap();
                assert!(singles(element, &decoded).iter().all(|x| *x == 0.0));
            }
        }
    }
}

#[test]
fn the_largest_numbers_stay_finite_in_lossy_codecs() {
    let shape = shape(1, 1, 1, 3, 0);
    for (element, most) in
        [(Element::F16, 65504.0), (Element::Bf16, bf16::MAX.to_f32()), (Element::F32, f32::MAX)]
    {
        let block: Vec<u8> = [most, -most, 0.0f32]
            .iter()
            .flat_map(|x| match element {
                Element::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
                Element::Bf16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
                _ => x.to_le_bytes().to_vec(),
            })
            .collect();
        for codec in [Codec::Lossy32, Codec::Lossy16] {
            let (_, decoded) = cold::decode_to_vec(&encoded(codec, element, &shape, &block), 12).unwrap();
            let decoded = singles(element, &decoded);
            assert!(decoded[0] > 0.99 * most && decoded[0].is_finite(), "{decoded:?}");
            assert_eq!((decoded[1], decoded[2]), (-decoded[0], 0.0));
        }
    }
}

/// What version 1 looks like on disk: a frame that later versions must read.
#[test]
fn a_known_frame() {
    let block = [1.0f32, -2.0, 1.5, -2.5, 1.25, -3.0, 0.0, f32::NAN];
    let block = block.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect::<Vec<_>>();
    let shape = shape(1, 1, 4, 2, 0);
    let frame = encoded(Codec::Lossless, Element::Bf16, &shape, &block);
    let hex = frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex, KNOWN_AS_IT_IS);
    // Large enough to be split and coded.
    let shape = Shape { tokens: 32, key_dim: 16, ..shape };
    let block =
        (0..512).flat_map(|at| bf16::from_f32((at % 16) as f32 - 7.5).to_le_bytes()).collect::<Vec<_>>();
    let frame = encoded(Codec::Lossless, Element::Bf16, &shape, &block);
    assert_eq!((frame.len(), frame[64], checksum(&frame)), KNOWN_SPLIT);
    let frame = encoded(Codec::Lossy16, Element::Bf16, &shape, &block);
    assert_eq!((frame.len(), frame[64], checksum(&frame)), KNOWN_LOSSY);
}

const KNOWN_AS_IT_IS: &str = "6b76636601000102010000000100000004000000020000000000000010000000000000001100000000000000020101000000000306020002010000000000000000803f00c0c03f20c0a03f40c00000c07f671222b270bbe203";
const KNOWN_SPLIT: (usize, u8, u64) = (687, 1, 17_321_284_465_659_301_300);
const KNOWN_LOSSY: (usize, u8, u64) = (292, 137, 8_127_821_814_557_955_458);

fn checksum(frame: &[u8]) -> u64 {
    u64::from_le_bytes(*frame.last_chunk().unwrap())
}

#[test]
fn every_altered_byte_and_every_cut_is_told() {
    let shape = shape(1, 2, 8, 8, 4);
    let block = bytes(Element::Bf16, shape.elements().unwrap(), 5, true);
    for codec in Codec::ALL {
        let frame = encoded(codec, Element::Bf16, &shape, &block);
        let mut room = vec![0; block.len()];
        for at in 0..frame.len() {
            for flip in [1u8, 0x80, 0xFF] {
                let mut altered = frame.clone();
                altered[at] ^= flip;
                let error = cold::decode(&altered, &mut room).unwrap_err();
                match at {
                    0..4 => assert!(matches!(error, ColdError::Magic { .. }), "{error}"),
                    4..6 => assert!(matches!(error, ColdError::Version { .. }), "{error}"),
                    36..44 => assert!(matches!(error, ColdError::FrameBytes { .. }), "{error}"),
                    _ => assert!(matches!(error, ColdError::Checksum { .. }), "{error}"),
                }
            }
            let error = cold::decode(&frame[..at], &mut room).unwrap_err();
            assert!(
                matches!(error, ColdError::FrameBytes { given_bytes, .. } if given_bytes == at),
                "{error}"
            );
        }
        let longer = [&frame[..], &[0]].concat();
        assert!(matches!(cold::decode(&longer, &mut room), Err(ColdError::FrameBytes { .. })));
    }
}

#[test]
fn headers_that_lie_are_told_before_anything_is_made_room_for() {
    let shape = shape(1, 1, 2, 4, 4);
    let block = bytes(Element::F16, 16, 1, true);
    let frame = encoded(Codec::Lossless, Element::F16, &shape, &block);
    let altered = |at: usize, with: &[u8]| {
        let mut frame = frame.clone();
        frame[at..at + with.len()].copy_from_slice(with);
        checked(&mut frame);
        FrameInfo::read(&frame).unwrap_err()
    };
    assert_eq!(altered(6, &[9]), ColdError::UnknownCodec { found: 9 });
    assert_eq!(altered(7, &[0]), ColdError::UnknownElement { found: 0 });
    // More formats than fit, one that is none, and one that loses nothing.
    assert_eq!(altered(44, &[4]), ColdError::UnknownHistory { found: 4 });
    assert_eq!(altered(45, &[8]), ColdError::UnknownHistory { found: 8 });
    assert!(matches!(altered(45, &[0, 0]), ColdError::UnknownHistory { .. }));
    assert!(matches!(altered(6, &[2, 4]), ColdError::Unsupported { .. }));
    assert_eq!(altered(28, &64u64.to_le_bytes()), ColdError::BlockBytes { shape_bytes: 32, given_bytes: 64 });
    assert_eq!(altered(16, &3u32.to_le_bytes()), ColdError::BlockBytes { shape_bytes: 48, given_bytes: 32 });
    assert!(matches!(altered(8, &[0xFF; 12]), ColdError::Shape { .. }));
    // A frame of 4 TiB that is consistent: it is the caller who says how much there may be.
    let mut large = frame.clone();
    large[8..12].copy_from_slice(&(1u32 << 31).to_le_bytes());
    large[12..16].copy_from_slice(&64u32.to_le_bytes());
    large[28..36].copy_from_slice(&(32u64 << 37).to_le_bytes());
    checked(&mut large);
    let error = cold::decode_to_vec(&large, 1 << 20).unwrap_err();
    assert_eq!(error, ColdError::Room { block_bytes: 32 << 37, room_bytes: 1 << 20 });
    assert_eq!(cold::decode(&frame, &mut [0; 31]), Err(ColdError::Room { block_bytes: 32, room_bytes: 31 }));
}

#[test]
fn what_cannot_be_encoded_is_told_and_leaves_nothing() {
    let mut out = vec![7];
    let of = shape(1, 1, 2, 2, 0);
    let short = cold::encode(Codec::Lossless, Element::F16, &of, &past(), &[0; 7], &mut out);
    assert_eq!(short, Err(ColdError::BlockBytes { shape_bytes: 8, given_bytes: 7 }));
    let huge = cold::encode(
        Codec::Lossless,
        Element::F16,
        &shape(u32::MAX, u32::MAX, 9, 9, 9),
        &past(),
        &[],
        &mut out,
    );
    assert!(matches!(huge, Err(ColdError::Shape { .. })));
    let codes = cold::encode(Codec::Lossy16, Element::Int8, &of, &past(), &[0; 4], &mut out);
    assert_eq!(codes, Err(ColdError::Unsupported { codec: Codec::Lossy16, element: Element::Int8 }));
    let numbers = [1.0, 2.0, f32::INFINITY, 3.0].map(f32::to_le_bytes).concat();
    let infinite = cold::encode(Codec::Lossy32, Element::F32, &of, &past(), &numbers, &mut out);
    assert_eq!(infinite, Err(ColdError::NotFinite { at: 2, bits: 0x7F80_0000 }));
    assert_eq!(out, [7]);
}

/// The codecs' reason: how much smaller the keys and values of a real model get.
#[test]
fn real_keys_and_values_get_smaller() {
    let kv = Kv::fixture().unwrap();
    let smaller = |codec, element: Element| {
        let blocks = kv.blocks(element);
        let frames = blocks.iter().map(|block| encoded(codec, element, &kv.shape(), block));
        let stored = frames.map(|frame| frame.len()).sum::<usize>();
        blocks.iter().map(Vec::len).sum::<usize>() as f64 / stored as f64
    };
    for (codec, element, least) in [
        (Codec::Lossless, Element::Bf16, 1.5),
        (Codec::Lossless, Element::F16, 1.15),
        (Codec::Lossless, Element::F32, 1.2),
        (Codec::Lossless, Element::Int8, 1.1),
        (Codec::Lossy32, Element::Bf16, 4.3),
        (Codec::Lossy16, Element::Bf16, 6.0),
    ] {
        let smaller = smaller(codec, element);
        assert!(smaller >= least, "{codec:?} {element:?}: {smaller:.3} times smaller");
    }
    for element in Element::ALL {
        for block in kv.blocks(element) {
            comes_back(element, &kv.shape(), &block);
        }
    }
}
