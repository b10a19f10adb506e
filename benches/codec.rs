//! The CPU codec against the machine's own copy rate.
//!
//! `cargo bench --bench codec` runs criterion's groups on one plane of a block (8 heads of 32 tokens, in cache) and
//! on the row copies of a decode step. It ends with a table: 256 MiB of elements, far beyond the caches, coded in
//! calls of one plane each as the runtime does (of one head each where keys are told apart from centres, `+rc`), and `memcpy` of as much, measured in turns. Rates count bytes read
//! plus bytes written, for all three.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use half::{bf16, f16};
use kv_cache::codec::{Kernels, RowCentres};
use kv_cache::{ElementType, Format, Plane, RopeLayout, RowFormat};

const BLOCK_TOKENS: usize = 32;
const PLANE_ROWS: usize = 8 * BLOCK_TOKENS;
const LARGE_BYTES: usize = 256 << 20;
const TURNS: usize = 15;
const SLOW_TURNS: usize = 3;
const CASES: [(ElementType, &str); 3] =
    [(ElementType::F16, "f16"), (ElementType::Bf16, "bf16"), (ElementType::F32, "f32")];

/// A page-aligned part of a buffer whose pages are all present.
struct Buffer {
    bytes: Vec<u8>,
    at: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        // Ones: an allocation of zeros would share the zero page until it is written.
        let bytes = vec![1; len + 4096];
        let at = bytes.as_ptr().align_offset(4096);
        Self { bytes, at }
    }

    fn get(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.at..][..len]
    }
}

/// Fills with values in [-4, 4), repeating after 1 MiB.
fn fill(element: ElementType, bytes: &mut [u8]) {
    let period = bytes.len().min(1 << 20);
    let mut state = 1u32;
    for out in bytes[..period].chunks_exact_mut(element.bytes()) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = (state >> 8) as f32 / (1 << 21) as f32 - 4.0;
        match element {
            ElementType::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            ElementType::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            ElementType::F32 => out.copy_from_slice(&value.to_le_bytes()),
        }
    }
    for at in (period..bytes.len()).step_by(period) {
        let len = period.min(bytes.len() - at);
        bytes.copy_within(..len, at);
    }
}

/// `int8` of one plane, in cache, by every kernel set.
fn plane(criterion: &mut Criterion) {
    for (element, label) in CASES {
        for dim in [64, 128] {
            let elements = PLANE_ROWS * dim;
            let (raw_bytes, scale_bytes) = (elements * element.bytes(), PLANE_ROWS * element.scale_bytes());
            let (mut src, mut dst) = (Buffer::new(raw_bytes), Buffer::new(raw_bytes));
            let (mut codes, mut scales) = (Buffer::new(elements), Buffer::new(scale_bytes));
            let (src, dst) = (src.get(raw_bytes), dst.get(raw_bytes));
            let (codes, scales) = (codes.get(elements), scales.get(scale_bytes));
            fill(element, src);

            let rows = RowFormat { format: Format::Int8, element, plane: Plane::Value, dim };
            let mut group = criterion.benchmark_group(format!("int8 plane {label} D={dim}"));
            group.throughput(Throughput::Bytes((raw_bytes + elements + scale_bytes) as u64));
            for kernels in Kernels::candidates() {
                group.bench_function(BenchmarkId::new("encode", kernels.name()), |bench| {
                    bench.iter(|| kernels.encode(rows, black_box(src), codes, scales));
                });
                group.bench_function(BenchmarkId::new("decode", kernels.name()), |bench| {
                    let stride = dim * element.bytes();
                    bench.iter(|| kernels.decode(rows, 0, black_box(codes), scales, dst, stride));
                });
            }
            group.finish();
        }
    }
}

/// The rows one decode step appends: one token, 8 heads, D = 64.
fn step_rows(criterion: &mut Criterion) {
    let row_bytes = 128;
    let (mut src, mut dst) = (Buffer::new(8 * row_bytes), Buffer::new(PLANE_ROWS * row_bytes));
    let (src, dst) = (src.get(8 * row_bytes), dst.get(PLANE_ROWS * row_bytes));
    fill(ElementType::F16, src);
    let mut group = criterion.benchmark_group("copy f16 rows of 128 bytes");
    for kernels in Kernels::candidates() {
        for rows in [1, 8] {
            group.bench_function(BenchmarkId::new(kernels.name(), rows), |bench| {
                let dst_stride = 32 * row_bytes;
                bench.iter(|| {
                    let src = black_box(&*src);
                    kernels.copy_rows(ElementType::F16, src, row_bytes, dst, dst_stride, row_bytes, rows)
                });
            });
        }
    }
    group.finish();
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What keys of one head of a block are told apart from.
struct Centres {
    mean: Vec<f32>,
    turn: Vec<[f32; 2]>,
    row_turns: [Vec<f32>; 2],
}

impl Centres {
    fn new(dim: usize) -> Self {
        let freq = |pair: usize| 10_000f32.powf(-2.0 * pair as f32 / dim as f32);
        let of_token = |token: usize| (0..dim / 2).map(move |pair| (token as f32 * freq(pair)).sin_cos());
        let (sin, cos) = (0..BLOCK_TOKENS).flat_map(of_token).unzip();
        Centres {
            mean: (0..dim).map(|at| (at % 7) as f32 - 3.0).collect(),
            turn: of_token(5 * BLOCK_TOKENS).map(|(sin, cos)| [cos, sin]).collect(),
            row_turns: [cos, sin],
        }
    }

    fn of_head(&self) -> RowCentres<'_> {
        let row_turns = self.row_turns.each_ref().map(|of_all| &of_all[..]);
        let (mean, turn) = (&self.mean, &self.turn);
        RowCentres { rows: BLOCK_TOKENS, mean, turn, row_turns, layout: RopeLayout::HalfSplit }
    }
}

/// The table of the large buffers: `int8` on every element type, the other formats on f16.
fn large() {
    let kernels = Kernels::tuned();
    let (mut src, mut dst, mut copy) =
        (Buffer::new(LARGE_BYTES), Buffer::new(LARGE_BYTES), Buffer::new(LARGE_BYTES));
    let (mut codes, mut scales) = (Buffer::new(LARGE_BYTES / 2), Buffer::new(LARGE_BYTES / 16));
    let (src, dst, copy) = (src.get(LARGE_BYTES), dst.get(LARGE_BYTES), copy.get(LARGE_BYTES));

    println!(
        "\n{} kernels, {} MiB, medians over {TURNS} turns of int8 and {SLOW_TURNS} of others (of the rates, and of the ratio within a turn), bytes read + written",
        kernels.name(),
        LARGE_BYTES >> 20
    );
    for (element, label) in CASES {
        fill(element, src);
        let formats = Format::ALL.into_iter().filter(|format| match format {
            Format::Raw => false,
            Format::Int8 => true,
            _ => element == ElementType::F16,
        });
        // Planes differ in formats with scales for groups alone.
        let planes = |format: Format| if format.is_grouped() { &Plane::BOTH[..] } else { &Plane::BOTH[1..] };
        let cases = formats.flat_map(|format| planes(format).iter().map(move |plane| (format, *plane)));
        // Of formats whose speeds lie far apart.
        let centred = |format| matches!(format, Format::Int8 | Format::R4);
        let cases = cases.flat_map(|(format, plane)| {
            let both = if centred(format) { &[false, true][..] } else { &[false] };
            both.iter().map(move |centred| (format, plane, *centred))
        });
        for ((format, plane, centred), dim) in cases.flat_map(|case| [64, 128].map(|dim| (case, dim))) {
            let rows = LARGE_BYTES / element.bytes() / dim;
            let of = RowFormat { format, element, plane, dim };
            let row_bytes = of.row_bytes();
            let (codes, scales) = (codes.get(rows * row_bytes), scales.get(of.scales_bytes(rows)));
            let (plane_raw, plane_codes) = (PLANE_ROWS * dim * element.bytes(), PLANE_ROWS * row_bytes);
            let plane_scales = of.scales_bytes(PLANE_ROWS);
            let (head_raw, head_codes) = (BLOCK_TOKENS * dim * element.bytes(), BLOCK_TOKENS * row_bytes);
            let differences = of.of_differences();
            let head_less = BLOCK_TOKENS * dim * differences.element.bytes();
            let head_scales = of.scales_bytes(BLOCK_TOKENS);
            let (centres, mut less) = (Centres::new(dim), Buffer::new(head_less));
            let less = less.get(head_less);

            let mut times = [const { Vec::new() }; 3];
            for _ in 0..if format == Format::Int8 { TURNS } else { SLOW_TURNS } {
                times[0].push(seconds(|| copy.copy_from_slice(black_box(src))));
                times[1].push(seconds(|| {
                    if centred {
                        let outputs = codes.chunks_mut(head_codes).zip(scales.chunks_mut(head_scales));
                        for (src, (codes, scales)) in src.chunks(head_raw).zip(outputs) {
                            let elements = [element, differences.element];
                            kernels.subtract_centres(elements, &centres.of_head(), src, less);
                            assert!(kernels.encode(differences, less, codes, scales));
                        }
                        return;
                    }
                    let outputs = codes.chunks_mut(plane_codes).zip(scales.chunks_mut(plane_scales));
                    for (src, (codes, scales)) in src.chunks(plane_raw).zip(outputs) {
                        assert!(kernels.encode(of, src, codes, scales));
                    }
                }));
                times[2].push(seconds(|| {
                    let row = dim * element.bytes();
                    if centred {
                        let inputs = codes.chunks(head_codes).zip(scales.chunks(head_scales));
                        for (dst, (codes, scales)) in dst.chunks_mut(head_raw).zip(inputs) {
                            if !format.is_rotated() {
                                kernels.decode(of, 0, codes, scales, dst, row);
                                kernels.add_centres_in_place(element, &centres.of_head(), dst, row);
                                continue;
                            }
                            kernels.decode(differences, 0, codes, scales, less, dim * 4);
                            kernels.add_centres(element, &centres.of_head(), less, dst, row);
                        }
                        return;
                    }
                    let inputs = codes.chunks(plane_codes).zip(scales.chunks(plane_scales));
                    for (dst, (codes, scales)) in dst.chunks_mut(plane_raw).zip(inputs) {
                        kernels.decode(of, 0, codes, scales, dst, row);
                    }
                }));
            }
            black_box((&*dst, &*copy));
            let coded = (LARGE_BYTES + codes.len() + scales.len()) as f64 / 1e9;
            let [memcpy, encode, decode] = times;
            let what = match format {
                _ if centred => format!("{format}+rc"),
                _ if format.is_grouped() => format!("{format} ({plane:?})"),
                _ => format.to_string(),
            };
            report(&format!("{what} encode {label} D={dim}"), coded, encode, &memcpy);
            report(&format!("{what} decode {label} D={dim}"), coded, decode, &memcpy);
        }
    }
    fill(ElementType::F16, src);
    let mut times = [const { Vec::new() }; 2];
    for _ in 0..TURNS {
        times[0].push(seconds(|| copy.copy_from_slice(black_box(src))));
        times[1].push(seconds(|| {
            for (src, dst) in src.chunks(256 * PLANE_ROWS).zip(dst.chunks_mut(256 * PLANE_ROWS)) {
                assert!(kernels.copy_rows(ElementType::F16, src, 256, dst, 256, 256, PLANE_ROWS));
            }
        }));
    }
    let [memcpy, rows] = times;
    report("copy_rows f16 D=128", 2.0 * LARGE_BYTES as f64 / 1e9, rows, &memcpy);
}

/// Prints the rate at which `gigabytes` were moved, beside that of `memcpy` in the same turns.
fn report(what: &str, gigabytes: f64, times: Vec<f64>, memcpy: &[f64]) {
    let copied = 2.0 * LARGE_BYTES as f64 / 1e9;
    // Within a turn: what disturbs the machine for longer than that disturbs both.
    let turns = times.iter().zip(memcpy);
    let ratio = median(turns.map(|(time, memcpy)| gigabytes / time / (copied / memcpy)).collect());
    let (rate, memcpy) = (gigabytes / median(times), copied / median(memcpy.to_vec()));
    println!("{what}: {rate:.1} GB/s, memcpy {memcpy:.1} GB/s, ratio {ratio:.2}");
}

fn main() {
    let mut criterion = Criterion::default()
        // What keeps this short: the analysis costs more than the measurements.
        .nresamples(2000)
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(200))
        .configure_from_args();
    plane(&mut criterion);
    step_rows(&mut criterion);
    criterion.final_summary();
    // `cargo test --benches` only checks that things run.
    if !std::env::args().any(|arg| arg == "--test") {
        large();
    }
}
