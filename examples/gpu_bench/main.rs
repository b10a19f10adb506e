//! What the CUDA backend reaches on the GPU of this machine, each figure beside what it is judged by, measured in the same run.
//!
//! ```text
//! cargo run --release --example gpu_bench              # a table
//! cargo run --release --example gpu_bench -- --json    # one JSON object per line
//! cargo run --release --example gpu_bench -- --only step,transfer
//! cargo run --release --example gpu_bench -- --only kernels --formats r4,int8+rc
//! cargo run --release --example gpu_bench -- --only prefix     # also without a GPU, on a CPU device
//! ```
//!
//! Without a GPU it says so, and measures what does not need one.

mod prefix;
mod step;
mod table;
mod transfer;
mod wake;

use std::str::FromStr;

use clap::Parser;
use kv_cache::{Devices, ElementType, Format, Geometry, Rope, RopeLayout};

use crate::table::Table;

/// Measures the CUDA backend.
#[derive(Debug, Parser)]
#[command(name = "gpu_bench")]
struct Options {
    /// One JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
    /// Only these groups: kernels, driver, wake, step, transfer, prefix.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Of the kernels only those of these formats; `+rc` for keys with means. All if there is none.
    #[arg(long, value_delimiter = ',')]
    formats: Vec<KernelsOf>,
}

/// Kernels of a format, for keys with means or without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KernelsOf {
    format: Format,
    means: bool,
}

impl FromStr for KernelsOf {
    type Err = String;

    fn from_str(name: &str) -> Result<KernelsOf, String> {
        let with_means = name.strip_suffix("+rc");
        Ok(KernelsOf { format: with_means.unwrap_or(name).parse()?, means: with_means.is_some() })
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let wanted = |group: &str| options.only.is_empty() || options.only.iter().any(|only| only == group);
    let mut table = Table::new(options.json);
    if let Err(reason) = Devices::gpus_found() {
        eprintln!("no GPU to measure: {reason}");
        if wanted("prefix") {
            prefix::measure(&mut table, Devices::cpu(1))?;
        }
        return Ok(());
    }
    if wanted("kernels") {
        kernels(&mut table, &options.formats)?;
    }
    if wanted("driver") {
        table.group("calls of the driver, medians");
        for (what, us) in kv_cache::cuda::driver_call_costs(0)? {
            table.row(what, us, "µs", None);
        }
    }
    if wanted("wake") {
        wake::measure(&mut table)?;
    }
    if wanted("step") {
        step::measure(&mut table)?;
    }
    if wanted("transfer") {
        transfer::measure(&mut table)?;
    }
    if wanted("prefix") {
        prefix::measure(&mut table, Devices::cuda(1))?;
    }
    Ok(())
}

/// The fused kernels over a GiB of tokens of 8 heads × 128, in one layer and in as many as models have, beside the device's own copies; then
/// with keys as differences from their means, whose pairs lie half a head apart, or in one layer beside each other.
fn kernels(table: &mut Table, wanted: &[KernelsOf]) -> anyhow::Result<()> {
    let shapes =
        [(ElementType::F16, 1), (ElementType::Bf16, 1), (ElementType::F16, 32), (ElementType::Bf16, 80)];
    let layouts = [None, Some(RopeLayout::HalfSplit), Some(RopeLayout::Interleaved)];
    for (layout, (element, layers)) in
        layouts.into_iter().flat_map(|layout| shapes.map(|shape| (layout, shape)))
    {
        if layout == Some(RopeLayout::Interleaved) && layers > 1 {
            continue;
        }
        let is_wanted = |&format: &Format| {
            wanted.is_empty() || wanted.contains(&KernelsOf { format, means: layout.is_some() })
        };
        let formats: Vec<Format> = Format::ALL.into_iter().filter(is_wanted).collect();
        if formats.is_empty() {
            continue;
        }
        let mut geometry = Geometry::new(layers, 8, 128, element);
        geometry.groups[0].rope = layout.map(|layout| Rope {
            inv_freq: (0..64).map(|pair| 10_000f32.powf(-pair as f32 / 64.0)).collect(),
            rotary_dims: 128,
            layout,
            attention_scale: 1.0,
        });
        let tokens = ((1 << 18) / layers as usize).next_multiple_of(32);
        let figures = kv_cache::cuda::kernel_figures(0, &geometry, &formats, tokens, 31)?;
        let copy = figures[0].gb_per_s;
        // Keys and values of 2 bytes an element.
        let raw_bytes = (tokens * layers as usize) as f64 * 8.0 * 128.0 * 2.0 * 2.0;
        let pairs = layout.map_or(String::new(), |layout| format!(", means, {layout:?}"));
        table.group(&format!(
            "kernels, {element:?}, {tokens} tokens × {layers} layers × 8 heads × 128{pairs}"
        ));
        for figure in &figures {
            let share = figure.gb_per_s / copy;
            let rotated = ["r4", "r3", "r2"].iter().any(|format| figure.what.contains(format));
            let reach = if rotated { "of the copy rate, reach 0.85" } else { "of the copy rate, reach 0.90" };
            table.row(&figure.what, figure.gb_per_s, "GB/s", Some((share, reach)));
            if ["seal r4", "seal int4"].contains(&figure.what.trim_end_matches("+rc")) {
                let faster = 2.0 * raw_bytes / (copy * 1e3) / figure.median_us;
                let of = "times as fast as a copy of what it reads, reach 1.35";
                table.row("the same against a copy", figure.median_us, "us", Some((faster, of)));
            }
        }
    }
    Ok(())
}
