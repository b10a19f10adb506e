//! Kernels against the CPU codecs, and their arithmetic against what it stands for.

use std::ops::Range;

use half::{bf16, f16};
use kv_cache_actors::format::{Format, GROUP};
use kv_cache_actors::geometry::Geometry;
use kv_cache_actors::pool::SLOT_ALIGN_BYTES;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::driver::usable_gpus;
use super::super::measure::upload;
use super::*;
use crate::backend::cpu::codec::Kernels as Codec;
use crate::backend::cpu::codec::fp8::to_e4m3;

/// The seal kernel multiplies where the CPU divides: for f16 that never shows.
#[test]
fn the_reciprocal_of_127_gives_the_same_f16_scales() {
    for bits in 0..f16::INFINITY.to_bits() {
        let most = f16::from_bits(bits).to_f32();
        assert_eq!(f16::from_f32(most * 0.007_874_016_f32), f16::from_f32(most / 127.0), "{most}");
    }
}

/// For bf16 and f32 it corrects the product once. Exponents only shift what the significand decides: at the floor of a scale
/// nothing of it is subnormal yet, and the largest is far from infinity.
#[test]
fn corrected_reciprocals_give_the_same_f32_scales() {
    // Of int8, fp8, int4 and int2.
    for codes in [127.0f32, 448.0, 7.5, 1.5] {
        let corrected = |most: f32| {
            let near = most * (1.0 / codes);
            near.mul_add(-codes, most).mul_add(1.0 / codes, near)
        };
        let one = 1.0f32.to_bits();
        for significand in 0..1 << 23 {
            let most = f32::from_bits(one + significand);
            assert_eq!(corrected(most).to_bits(), (most / codes).to_bits(), "{most} / {codes}");
        }
        for exponent in 0..255 {
            for significand in [0, 1, 0x2b_cdef, 0x7f_ffff] {
                let most = f32::from_bits(exponent << 23 | significand);
                let floor = 2f32.powi(-100);
                assert_eq!(corrected(most).max(floor), (most / codes).max(floor), "{most:e} / {codes}");
            }
        }
    }
}

/// A reciprocal as the kernels make it, from one that may be off by one in the last place.
fn near_reciprocal(x: f32, off: i32) -> f32 {
    let near = f32::from_bits(x.recip().to_bits().wrapping_add_signed(off));
    (-x).mul_add(near, 1.0).mul_add(near, near)
}

/// Codes of `int8` come without a division.
#[test]
fn products_with_the_reciprocal_give_the_same_int8_codes() {
    const WHOLE: f32 = 12_582_912.0;
    let corrected = |x: f32, scale: f32, inverse: f32| {
        let near = x * inverse;
        (-near).mul_add(scale, x).mul_add(inverse, near) + WHOLE
    };
    let code = |rounded: f32| (rounded.to_bits() as u8).cast_signed();
    let check = |x: f32, scale: f32, coded: f32| {
        let exact = (x / scale).round_ties_even();
        assert_eq!(f32::from(code(coded)), exact, "{x:e} / {scale:e}");
    };
    // What is left of an element in a scale, and not: exponents of both only shift it.
    let elements = |most: f32, bits: u32| {
        let one = 1.0f32.to_bits() >> (23 - bits);
        let all = (0..11 << bits).map(move |at| f32::from_bits((one + at) << (23 - bits)) / 8.0);
        all.take_while(move |x| *x <= most)
    };
    for off in [-1, 0, 1] {
        for scale in (0..1 << 10).map(|bits| f32::from_bits(1.0f32.to_bits() + (bits << 13))) {
            let inverse = near_reciprocal(scale, off);
            let most = (127.0 * scale) * (1.0 + 2f32.powi(-11));
            elements(most, 10).for_each(|x| check(x, scale, x.mul_add(inverse, 1536.0) + (WHOLE - 1536.0)));
        }
        for most in (0..1 << 7).map(|bits| f32::from_bits(0x42fe_0000 + (bits << 16))) {
            let scale = most / 127.0;
            let inverse = near_reciprocal(scale, off);
            elements(most, 7).for_each(|x| check(x, scale, corrected(x, scale, inverse)));
        }
    }
    // Of f32 some: around what is half of a code.
    let mut rng = SmallRng::seed_from_u64(1);
    for _ in 0..1 << 16 {
        let most = f32::from_bits(rng.random_range(0x4280_0000..0x4300_0000));
        let scale = most / 127.0;
        let half = (rng.random_range(0..127) as f32 + 0.5) * scale;
        for x in [half.next_down(), half, half.next_up()].into_iter().filter(|x| *x <= most) {
            check(x, scale, corrected(x, scale, scale.recip()));
        }
    }
}

/// Reciprocals of the scales of bf16 rows, of which all significands come from those of 128 elements, and of f16 rows, which have 11 bits.
#[test]
fn one_step_gives_the_reciprocals_of_scales() {
    let of_bf16 = (0..1 << 7).flat_map(|bits| {
        let most = f32::from_bits(0x3f80_0000 + (bits << 16));
        [most / 127.0, most / 448.0]
    });
    let of_f16 = (0..1 << 10).map(|bits| f32::from_bits(0x3f80_0000 + (bits << 13)));
    for (scale, off) in of_bf16.chain(of_f16).flat_map(|scale| [-1, 0, 1].map(|off| (scale, off))) {
        assert_eq!(near_reciprocal(scale, off), scale.recip(), "1 / {scale:e}, off by {off}");
    }
}

/// Codes of `fp8` come by additions.
#[test]
fn additions_give_the_same_fp8_codes() {
    let lows = [0, 1, 0x7_ffff, 0x8_0000, 0x8_0001, 0xf_ffff];
    let all = (0x3000_0000u32..0x43f0_0000).step_by(1 << 20).flat_map(|bits| lows.map(|low| bits | low));
    // From 464 on a code would be too large: no scale leaves as much.
    for bits in all.filter(|bits| *bits < 0x43e8_0000) {
        let magnitude = f32::from_bits(bits);
        let far = f32::from_bits((bits & 0x7f80_0000).max(0x3c80_0000) + (20 << 23));
        let code = ((magnitude + far - far) * 2f32.powi(-120)).to_bits() >> 20;
        assert_eq!(code, u32::from(to_e4m3(magnitude)), "{magnitude:e}");
    }
}

/// A source without its fast kernels. Plain ones, and `signal`, stay.
fn without_fast_kernels(source: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in source.lines() {
        let fast =
            line.contains(".entry ") && !line.contains(".entry plain_") && !line.contains(".entry signal");
        lines.push(if fast { line.replace(".entry ", ".entry gone_") } else { line.to_owned() });
    }
    lines.join("\n")
}

#[test]
fn every_fast_kernel_has_a_plain_twin() {
    let names = |text: &str| -> Vec<String> {
        let entries = text.lines().filter_map(|line| line.split(".entry ").nth(1));
        entries.filter_map(|entry| entry.split(['(', ' ']).next()).map(str::to_owned).collect()
    };
    let of_pairs = |name: &str| ["halves", "paired", "turned"].iter().any(|kind| name.starts_with(kind));
    for image in all_images() {
        let left = names(&without_fast_kernels(image.ptx));
        let (pairs, fast): (Vec<String>, Vec<String>) = names(image.ptx)
            .into_iter()
            .filter(|name| !name.starts_with("plain_") && name != "signal")
            .partition(|name| of_pairs(name));
        assert!(fast.len() == if std::ptr::eq(image, &CACHE) { 4 } else { 9 }, "{fast:?}");
        // Seals of rotated formats are the same for all pairs, and most kernels for some are for one of two lengths of rows.
        assert!([0, 6, 8, 12].contains(&pairs.len()), "{pairs:?}");
        for name in fast.iter().chain(&pairs) {
            let plain = name.find("_").filter(|_| of_pairs(name)).map_or(&name[..], |at| &name[at + 1..]);
            assert!(left.contains(&format!("plain_{plain}")), "{name}");
            assert!(left.contains(&format!("gone_{name}")) && !left.contains(name), "{name}");
        }
    }
}

fn all_images() -> impl Iterator<Item = &'static Image> {
    let all = [false, true].into_iter().flat_map(|centred| Format::ALL.map(|format| (format, centred)));
    all.map(|(format, centred)| image_of(format, centred).unwrap().unwrap_or(&CACHE))
}

#[test]
fn cubins_are_for_their_gpus_and_whole() {
    for (major, frame) in all_images().flat_map(|image| image.cubins) {
        let cubin = Image::unpack(frame).unwrap();
        // An ELF file, whose flags begin with the architecture: 80 or 90.
        assert_eq!(&cubin[..4], b"\x7fELF");
        assert_eq!(i32::from(cubin[48]), 10 * major);
    }
}

#[test]
fn broken_frames_are_errors() {
    let (_, frame) = CACHE.cubins[1];
    for cut in [0, 3, 20, frame.len() / 2, frame.len() - 1] {
        assert!(Image::unpack(&frame[..cut]).is_err(), "{cut} bytes of {}", frame.len());
    }
    // The last bytes are the checksum.
    for at in [frame.len() / 2, frame.len() - 1] {
        let mut frame = frame.to_vec();
        frame[at] ^= 1;
        assert!(Image::unpack(&frame).is_err(), "byte {at}");
    }
}

#[test]
fn a_broken_cubin_gives_way_to_the_ptx() {
    let Some(gpu) = gpu() else { return };
    let image = Image { cubins: CACHE.cubins.map(|(major, _)| (major, &b"nothing"[..])), ..CACHE };
    assert!(image.load(&gpu).unwrap().function("append").is_ok());
}

/// Elements of every size, zeros and the largest among them; calm ones are all about 1.
fn elements(element: ElementType, count: usize, seed: u64, calm: bool) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(count * element.bytes());
    for _ in 0..count {
        let most = match rng.random_range(if calm { 50..400 } else { 0..400 }) {
            0..10 => 0.0,
            10..20 => 60000.0,
            20..30 => 1e-7,
            30 if element != ElementType::F16 => 1e30,
            _ => 4.0,
        };
        let x = rng.random_range(-1.0f32..1.0) * most;
        match element {
            ElementType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
            ElementType::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
            ElementType::F32 => bytes.extend(x.to_le_bytes()),
        }
    }
    bytes
}

/// A GPU with memory for one block, raw and sealed, and for tensors of one.
struct Bench {
    stream: Stream,
    layout: BlockLayout,
    payload: DeviceMemory,
    raw: DeviceMemory,
    sealed: DeviceMemory,
    reopened: DeviceMemory,
    output: DeviceMemory,
    steps: DeviceMemory,
    flag: DeviceMemory,
    /// Which block of its sequence it is, or where the positions of its tokens are.
    index: u64,
}

impl Bench {
    fn new(gpu: &Arc<Gpu>, layout: BlockLayout, sealed: BlockFormat) -> Bench {
        let zeroed = |bytes| DeviceMemory::zeroed(gpu, bytes).unwrap();
        let (raw, sealed) = (layout.raw_bytes(), sealed.block_bytes(&layout));
        Bench {
            stream: Stream::new(gpu).unwrap(),
            layout,
            payload: zeroed(raw),
            raw: zeroed(raw),
            sealed: zeroed(sealed),
            reopened: zeroed(raw),
            output: zeroed(raw),
            steps: zeroed(256),
            flag: zeroed(64),
            index: INDEX,
        }
    }

    fn step<T: bytemuck::Pod>(&self, step: T) -> Descriptors {
        self.steps.write_on(&self.stream, bytemuck::bytes_of(&step)).unwrap();
        Descriptors { address: self.steps.address(), count: 1 }
    }

    fn bytes(&self, memory: &DeviceMemory) -> Vec<u8> {
        self.stream.synchronize().unwrap();
        let mut bytes = vec![0; memory.bytes()];
        memory.read(0, &mut bytes).unwrap();
        bytes
    }

    /// Any bytes in place of a sealed block.
    fn seal_random(&self, rng: &mut SmallRng) -> Vec<u8> {
        let bytes: Vec<u8> = (0..self.sealed.bytes()).map(|_| rng.random()).collect();
        self.sealed.write_on(&self.stream, &bytes).unwrap();
        bytes
    }

    /// What the sealed block decodes to.
    fn reopened(&self, kernels: &Kernels) -> Vec<u8> {
        let reopen = self.step(abi::Convert {
            from: self.sealed.address(),
            to: self.reopened.address(),
            flag: 0,
            index: self.index,
        });
        // SAFETY: memory of this bench, which nobody else uses; everything is waited for before it is looked at.
        unsafe { kernels.reopen(&self.stream, 0, reopen) }.unwrap();
        self.bytes(&self.reopened)
    }

    /// Everything that the kernels write when `tokens` tokens are appended to a block that is sealed, reopened and read.
    fn run(&self, kernels: &Kernels, tokens: Range<usize>, calm: bool, bad: bool) -> Vec<Vec<u8>> {
        let layout = &self.layout;
        let [key_token, value_token] = Plane::BOTH.map(|plane| layout.token_bytes(plane));
        let count = tokens.len();
        let mut payload = elements(layout.element, layout.raw_bytes() / layout.element.bytes(), 7, calm);
        if bad {
            // The last key of the first token is infinite, or not a number.
            let end = key_token;
            payload[end - layout.element.bytes()..end].fill(0xFF);
        }
        self.payload.write_on(&self.stream, &payload).unwrap();
        for memory in [&self.raw, &self.sealed, &self.reopened, &self.output, &self.flag] {
            memory.write_on(&self.stream, &vec![0; memory.bytes()]).unwrap();
        }
        let stream = &self.stream;
        let values_at = self.payload.address() + (layout.layers * count * key_token) as u64;
        let append = self.step(abi::Append {
            source: [self.payload.address(), values_at],
            slot: self.raw.address(),
            flag: self.flag.address(),
            source_tokens: count as u32,
            first_layer: 0,
            layers: layout.layers as u32,
            first_token: tokens.start as u32,
            tokens: count as u32,
            padding: 0,
        });
        // SAFETY: memory of this bench, which nobody else uses; everything is waited for before it is looked at.
        unsafe { kernels.append(stream, append, layout.layers, count) }.unwrap();
        let mut written = vec![self.bytes(&self.raw), self.bytes(&self.flag)];
        self.flag.write_on(&self.stream, &[0; 64]).unwrap();
        let seal = self.step(abi::Convert {
            from: self.raw.address(),
            to: self.sealed.address(),
            flag: self.flag.address(),
            index: self.index,
        });
        // SAFETY: as above.
        unsafe { kernels.seal(stream, 0, seal) }.unwrap();
        written.extend([self.bytes(&self.sealed), self.bytes(&self.flag)]);
        written.push(self.reopened(kernels));
        for (raw, slot) in [(0b11, &self.raw), (0b00, &self.sealed)] {
            for layer in 0..layout.layers {
                let output = self.output.address();
                let read = self.step(abi::Read {
                    slot: [slot.address(); 2],
                    output: [output, output + (count * key_token) as u64],
                    layer: layer as u32,
                    first_token: tokens.start as u32,
                    tokens: count as u32,
                    raw,
                    index: self.index,
                });
                // SAFETY: as above; the output has room for a block of all layers.
                unsafe { kernels.read(stream, 0, read, count) }.unwrap();
                written.push(self.bytes(&self.output)[..count * (key_token + value_token)].to_vec());
            }
        }
        let moves = [
            abi::Move {
                from: self.raw.address(),
                to: self.reopened.address(),
                bytes: layout.raw_bytes() as u64,
            },
            abi::Move { from: 0, to: self.raw.address(), bytes: layout.raw_bytes() as u64 },
        ];
        for step in moves {
            let step = self.step(step);
            // SAFETY: as above.
            unsafe { kernels.move_blocks(stream, step, layout.raw_bytes()) }.unwrap();
            written.extend([self.bytes(&self.reopened), self.bytes(&self.raw)]);
        }
        written
    }
}

/// `(block_tokens, layers, kv_heads, key_dim, value_dim)`.
const SHAPES: [(u32, u32, u32, u32, u32); 21] = [
    (32, 1, 1, 64, 64),
    (32, 1, 1, 80, 80),
    (32, 1, 1, 128, 128),
    (32, 1, 1, 256, 256),
    (32, 2, 3, 64, 80),
    (32, 2, 3, 128, 256),
    (5, 3, 2, 80, 16),
    (1, 1, 1, 8, 8),
    (1, 2, 1, 1, 3),
    (5, 1, 3, 7, 33),
    (32, 1, 1, 512, 520),
    (6, 2, 3, 64, 64),
    (7, 2, 5, 128, 128),
    (1, 1, 1, 128, 64),
    (32, 1, 3, 32, 32),
    (64, 1, 9, 128, 128),
    (8, 2, 3, 64, 64),
    (24, 1, 2, 256, 128),
    // As many means as a thread block keeps.
    (16, 1, 32, 128, 128),
    // Neighbouring dims are pairs where there are two heads.
    (32, 2, 2, 64, 64),
    (64, 1, 2, 128, 128),
];

/// Where the block of a bench stands in its sequence.
const INDEX: u64 = 5;

/// Some means; half of the dims rotate, or all that can.
fn some_centres(geometry: &Geometry) -> Centres {
    let (mut geometry, dim) = (geometry.clone(), geometry.groups[0].key_dim);
    let rotary_dims = if dim % 3 == 0 { dim / 2 } else { dim } / 2 * 2;
    geometry.groups[0].rope = Some(crate::Rope {
        inv_freq: (0..rotary_dims / 2).map(|i| 100f32.powf(-(i as f32) / dim as f32)).collect(),
        rotary_dims,
        layout: match dim % 32 == 0 && geometry.groups[0].kv_heads != 2 {
            true => RopeLayout::HalfSplit,
            false => RopeLayout::Interleaved,
        },
        attention_scale: 1.0,
    });
    let mut means = crate::KeyMeansBuilder::new(&geometry).unwrap();
    for layer in 0..geometry.groups[0].layers {
        let count = geometry.groups[0].kv_heads * dim;
        let keys: Vec<f32> = (0..count).map(|at| ((at + layer) % 23) as f32 - 9.0).collect();
        means.add(layer, 7, &keys);
    }
    Centres::new(&means.finish().unwrap(), &geometry, 1000).unwrap()
}

/// None, and why, without one.
fn gpu() -> Option<Arc<Gpu>> {
    usable_gpus().inspect_err(|reason| println!("skipped: {reason}")).ok()?;
    Some(Gpu::shared(0).unwrap())
}

/// A test for each format, so that they run beside each other, and a sanitizer over some.
macro_rules! of_each_format {
    ($test:ident) => {
        mod $test {
            super::of_each_format!($test, int8: Int8, fp8: Fp8, int4: Int4, int2: Int2, r4: R4, r3: R3, r2: R2);
        }
    };
    ($test:ident, $($name:ident: $format:ident),*) => {
        $(
            #[test]
            fn $name() {
                if let Some(gpu) = super::gpu() {
                    super::$test(&gpu, super::Format::$format);
                }
            }
        )*
    };
}
use of_each_format;

of_each_format!(plain_kernels_give_the_same_bytes);
of_each_format!(plain_kernels_with_means_give_the_same_bytes);
of_each_format!(tokens_with_positions_of_their_own_give_the_same_bytes);
of_each_format!(blocks_are_sealed_alike_alone_and_among_others);
of_each_format!(random_bytes_decode_as_on_the_cpu);

fn plain_kernels_give_the_same_bytes(gpu: &Arc<Gpu>, format: Format) {
    plain_kernels_of(gpu, format, false);
}

fn plain_kernels_with_means_give_the_same_bytes(gpu: &Arc<Gpu>, format: Format) {
    plain_kernels_of(gpu, format, true);
}

/// Every plane of a raw block by the CPU codec, and whether all of it is finite.
fn sealed_on_cpu(layout: &BlockLayout, format: Format, raw: &[u8]) -> (Vec<u8>, bool) {
    let place = FormatLayout::new(format.into(), layout);
    let mut sealed = vec![0; place.format().block_bytes(layout)];
    let mut finite = true;
    for (layer, plane) in planes(layout) {
        let [codes, scales] = places(&place, layout, layer, plane);
        let from = layout.plane_offset(layer, plane);
        let (head, tail) = sealed.split_at_mut(scales.start);
        let (codes, scales) = (&mut head[codes], &mut tail[..scales.len()]);
        let rows = &raw[from..from + layout.plane_bytes(plane)];
        finite &= Codec::best().encode(place.rows(layout, layer, plane), rows, codes, scales);
    }
    (sealed, finite)
}

/// The other way round.
fn decoded_on_cpu(layout: &BlockLayout, format: Format, sealed: &[u8]) -> Vec<u8> {
    let place = FormatLayout::new(format.into(), layout);
    let mut raw = vec![0; layout.raw_bytes()];
    for (layer, plane) in planes(layout) {
        let [codes, scales] = places(&place, layout, layer, plane);
        let from = layout.plane_offset(layer, plane);
        let rows = &mut raw[from..from + layout.plane_bytes(plane)];
        let (of, stride) = (place.rows(layout, layer, plane), layout.row_bytes(plane));
        Codec::best().decode(of, 0, &sealed[codes], &sealed[scales], rows, stride);
    }
    raw
}

fn planes(layout: &BlockLayout) -> impl Iterator<Item = (usize, Plane)> {
    (0..layout.layers).flat_map(|layer| Plane::BOTH.map(|plane| (layer, plane)))
}

fn places(place: &FormatLayout, layout: &BlockLayout, layer: usize, plane: Plane) -> [Range<usize>; 2] {
    place.places(layout, layer, plane, &(0..layout.kv_heads * layout.block_tokens)).into()
}

/// Many blocks in one launch are those that they are each in its own, each has its own flag, and all are as the CPU has them.
fn blocks_are_sealed_alike_alone_and_among_others(gpu: &Arc<Gpu>, format: Format) {
    for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
        for dim in [if format.is_rotated() { 64 } else { 80 }, 128] {
            many_blocks(gpu, format, element, dim);
        }
    }
}

fn many_blocks(gpu: &Arc<Gpu>, format: Format, element: ElementType, dim: u32) {
    // More rows than all warps of a GPU seal at once.
    let blocks = 30 + 2 * gpu.multiprocessors().unwrap() as usize;
    let what = format!("{format}, {element:?}, heads of {dim}");
    let layout = Geometry::new(2, 3, dim, element).block_tokens(32).layout().unwrap();
    let kernels = Kernels::load(gpu, &layout, format, None).unwrap();
    let stream = Stream::new(gpu).unwrap();
    let slot = |bytes: usize| bytes.next_multiple_of(SLOT_ALIGN_BYTES);
    let block_bytes = BlockFormat::from(format).block_bytes(&layout);
    let (raw_bytes, sealed_bytes) = (slot(layout.raw_bytes()), slot(block_bytes));
    let raw = DeviceMemory::zeroed(gpu, blocks * raw_bytes).unwrap();
    let of_block = |block| elements(element, raw_bytes / element.bytes(), block, !block.is_multiple_of(7));
    let mut bytes: Vec<u8> = (0..blocks as u64).flat_map(of_block).collect();
    let bad = [0, blocks / 2, blocks - 1];
    bad.iter().for_each(|block| bytes[block * raw_bytes..][..element.bytes()].fill(0xFF));
    raw.write(0, &bytes).unwrap();
    let sealed = |at_once: usize| {
        let sealed = DeviceMemory::zeroed(gpu, blocks * sealed_bytes).unwrap();
        let flags = DeviceMemory::zeroed(gpu, blocks * 4).unwrap();
        let converts: Vec<_> = (0..blocks as u64)
            .map(|block| abi::Convert {
                from: raw.address() + block * raw_bytes as u64,
                to: sealed.address() + block * sealed_bytes as u64,
                flag: flags.address() + block * 4,
                index: block,
            })
            .collect();
        let memory = upload(gpu, &converts).unwrap();
        for first in (0..blocks).step_by(at_once) {
            let address = memory.address() + (first * size_of::<abi::Convert>()) as u64;
            let steps = Descriptors { address, count: at_once.min(blocks - first) };
            // SAFETY: memory of this test; everything is waited for before it is looked at.
            unsafe { kernels.seal(&stream, 0, steps) }.unwrap();
        }
        stream.synchronize().unwrap();
        [sealed, flags].map(|memory| {
            let mut bytes = vec![0; memory.bytes()];
            memory.read(0, &mut bytes).unwrap();
            bytes
        })
    };
    let [together, flags] = sealed(blocks);
    let raised = flags.chunks_exact(4).enumerate().filter(|(_, flag)| flag[0] == 1).map(|(block, _)| block);
    assert_eq!(raised.collect::<Vec<_>>(), bad, "{what}");
    for (block, raw) in bytes.chunks_exact(raw_bytes).enumerate() {
        let (on_cpu, finite) = sealed_on_cpu(&layout, format, raw);
        assert_eq!(finite, !bad.contains(&block), "{what}: block {block}");
        let on_gpu = &together[block * sealed_bytes..][..block_bytes];
        let differs = on_gpu.iter().zip(&on_cpu).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{what}: block {block}, of bytes {block_bytes}");
    }
    assert!([together, flags] == sealed(1), "{what}");
}

/// Also what no seal ever wrote decodes, and to the same bytes: scales that are no numbers among it.
fn random_bytes_decode_as_on_the_cpu(gpu: &Arc<Gpu>, format: Format) {
    let mut rng = SmallRng::seed_from_u64(5);
    for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
        for dim in [32, 64, 80, 128, 256, 7] {
            let layout = Geometry::new(2, 3, dim, element).block_tokens(32).layout().unwrap();
            let bench = Bench::new(gpu, layout, format.into());
            let kernels = Kernels::load(gpu, &layout, format, None).unwrap();
            for _ in 0..8 {
                let bytes = bench.seal_random(&mut rng);
                let on_gpu = bench.reopened(&kernels);
                let on_cpu = decoded_on_cpu(&layout, format, &bytes);
                let differs = on_gpu.iter().zip(&on_cpu).position(|(a, b)| a != b);
                assert_eq!(differs, None, "{format}, {element:?}, heads of {dim}");
            }
        }
    }
}

/// A block that says of each of its tokens where it stands is what it is without, if they stand one after the other. If they do not, keys are others.
fn tokens_with_positions_of_their_own_give_the_same_bytes(gpu: &Arc<Gpu>, format: Format) {
    for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
        for (block_tokens, layers, heads, key_dim, value_dim) in SHAPES {
            let block_tokens =
                if format.is_grouped() { block_tokens.next_multiple_of(32) } else { block_tokens };
            let mut geometry = Geometry::new(layers, heads, key_dim, element).block_tokens(block_tokens);
            geometry.groups[0].value_dim = value_dim;
            let layout = geometry.layout().unwrap();
            let kernels = Kernels::load(gpu, &layout, format, Some(&some_centres(&geometry))).unwrap();
            let mut bench = Bench::new(gpu, layout, format.into());
            let first = INDEX as u32 * block_tokens;
            let positions: Vec<u32> = (first..first + block_tokens).collect();
            let elsewhere: Vec<u32> = positions.iter().map(|at| 7 * at % 600).collect();
            let [positions, elsewhere] = [positions, elsewhere].map(|each| upload(gpu, &each).unwrap());
            for (calm, bad) in [(true, false), (false, true)] {
                let what =
                    format!("{format}, {element:?}, {block_tokens} tokens, heads of {key_dim}, calm: {calm}");
                let mut runs = Vec::new();
                let at = |memory: &DeviceMemory| abi::POSITIONS_PER_TOKEN | memory.address();
                for index in [INDEX, at(&positions), at(&elsewhere)] {
                    bench.index = index;
                    runs.push(bench.run(&kernels, 0..layout.block_tokens, calm, bad));
                }
                for (part, (one, other)) in runs[0].iter().zip(&runs[1]).enumerate() {
                    assert!(one == other, "{what}: part {part} differs");
                }
                // Part 2 is what was sealed.
                assert!(
                    bad || key_dim == 1 || runs[0][2] != runs[2][2],
                    "{what}: sealed as if it stood elsewhere"
                );
            }
        }
    }
}

fn plain_kernels_of(gpu: &Arc<Gpu>, format: Format, centred: bool) {
    let twins = |image: &Image| {
        let plain = Module::load_ptx(gpu, &without_fast_kernels(image.ptx)).unwrap();
        [image.load(gpu).unwrap(), plain].map(Arc::new)
    };
    let ([fast, plain], [fast_format, plain_format]) =
        (twins(&CACHE), twins(image_of(format, centred).unwrap().unwrap()));
    for name in ["append", "move_blocks", "read_raw"] {
        assert!(fast.function(name).is_ok() && plain.function(name).is_err(), "{name}");
    }
    for name in ["seal_f16", "reopen_bf16", "read_f32"] {
        assert!(fast_format.function(name).is_ok() && plain_format.function(name).is_err(), "{name}");
    }
    for element in [ElementType::F16, ElementType::Bf16, ElementType::F32] {
        for shape in SHAPES {
            let (mut block_tokens, layers, heads, key_dim, value_dim) = shape;
            if format.is_grouped() {
                block_tokens = block_tokens.next_multiple_of(GROUP as u32);
            }
            let mut geometry = Geometry::new(layers, heads, key_dim, element).block_tokens(block_tokens);
            geometry.groups[0].value_dim = value_dim;
            let layout = geometry.layout().unwrap();
            let bench = Bench::new(gpu, layout, format.into());
            let kernels = [(&fast, &fast_format), (&plain, &plain_format)].map(|(cache, of_format)| {
                let tables = centred.then(|| Tables::upload(gpu, &some_centres(&geometry)).unwrap());
                let modules = [Some(of_format.clone()), Some(of_format.clone())];
                Kernels::of(cache.clone(), vec![(format.into(), modules)], &layout, tables, 1).unwrap()
            });
            let mut rng = SmallRng::seed_from_u64(3);
            for _ in 0..2 {
                bench.seal_random(&mut rng);
                let [fast, plain] = kernels.each_ref().map(|kernels| bench.reopened(kernels));
                let what = format!("{format}, centred: {centred}, {element:?}, {shape:?}: random bytes");
                let differs = fast.iter().zip(&plain).position(|(a, b)| a != b);
                assert_eq!(
                    differs.map(|at| (at, &fast[at & !3..][..4], &plain[at & !3..][..4])),
                    None,
                    "{what}"
                );
            }
            let block = layout.block_tokens;
            // Rows that are not written stay zeros, which are not calm.
            let parts = [
                (0..1, false),
                (0..block, false),
                (0..block, true),
                (block - 1..block, false),
                (block / 3..(2 * block).div_ceil(3), false),
            ];
            for (tokens, calm) in parts.into_iter().filter(|(tokens, _)| !tokens.is_empty()) {
                for bad in [false, true] {
                    let [fast, plain] =
                        kernels.each_ref().map(|kernels| bench.run(kernels, tokens.clone(), calm, bad));
                    let what = format!(
                        "{format}, centred: {centred}, {element:?}, {shape:?}, tokens {tokens:?}, calm: {calm}, not finite: {bad}"
                    );
                    assert_eq!(fast[1][0] != 0, bad, "{what}: the flag of the append");
                    assert_eq!(fast[3][0] != 0, bad, "{what}: the flag of the seal");
                    for (part, (fast, plain)) in fast.iter().zip(&plain).enumerate() {
                        assert!(fast == plain, "{what}: part {part} differs");
                    }
                }
            }
        }
    }
}
