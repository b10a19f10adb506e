//! `target/stress-report.html`: figures, plots over time and totals.

use std::fmt::Write;
use std::path::Path;

use crate::page::{self, escaped, grouped};
use crate::plot::{Across, Line, Plot, Scale};
use crate::recorder::Sample;
use crate::totals::{Totals, micros};

/// Writes the report, and the folder if it is missing.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write(
    path: &Path,
    totals: &Totals,
    samples: &[Sample],
    measured_from_s: f64,
) -> anyhow::Result<()> {
    page::write(path, "kv-cache stress", &body(totals, samples, measured_from_s))
}

fn body(totals: &Totals, samples: &[Sample], measured_from_s: f64) -> String {
    let mut out = String::from("<h1>kv-cache under load</h1>");
    let _ = writeln!(
        out,
        "<p>{} run, {} sequences, {}, sealed as {}, seed {}</p>",
        totals.mode,
        grouped(totals.sequences),
        totals.geometry,
        totals.format,
        totals.seed
    );
    tiles(&mut out, totals);
    let _ = writeln!(out, "<div class=plots>\n{}</div>", figures(samples, measured_from_s));
    tables(&mut out, totals);
    out
}

fn tiles(out: &mut String, totals: &Totals) {
    let leaks = totals.leaked_blocks + totals.leaked_permits + totals.leaked_sequences;
    let faults = [("errors", totals.errors), ("mismatches", totals.mismatches), ("leaks", leaks)];
    out.push_str("<div class=tiles>");
    for (name, value) in [
        ("operations per second", grouped(totals.operations_per_second as u64)),
        ("appended tokens per second", grouped(totals.append_tokens_per_second as u64)),
        ("latency p50", micros(totals.p50_us)),
        ("latency p99", micros(totals.p99_us)),
        ("open with sealed blocks, peak", grouped(totals.peak_open_with_sealed_blocks)),
        ("operations in a batch", format!("{:.1}", totals.batch_mean)),
        ("prefix blocks found", format!("{:.1} %", 100.0 * totals.prefix_hit_ratio)),
    ] {
        let _ = write!(out, "<div class=tile><b>{value}</b><span>{name}</span></div>");
    }
    for (name, value) in faults {
        let (class, mark) = if value == 0 { ("good", "✓") } else { ("bad", "✗") };
        let _ = write!(
            out,
            "<div class=tile><b class={class}>{mark} {}</b><span>{name}</span></div>",
            grouped(value)
        );
    }
    out.push_str("</div>\n");
}

fn figures(samples: &[Sample], measured_from_s: f64) -> String {
    let seconds: Vec<f64> = samples.iter().map(|sample| sample.at_s).collect();
    let line = |name, of: fn(&Sample) -> f64| Line { name, values: samples.iter().map(of).collect() };
    let count: fn(f64) -> String = |value| grouped(value.round() as u64);
    let plot = |title, lines, unit| Plot {
        title,
        across: Across::Time { seconds: &seconds, measured_from_s: Some(measured_from_s) },
        lines,
        scale: Scale::Linear,
        stacked: false,
        unit,
    };
    let latency = vec![line("p50", |s| s.p50_us), line("p99", |s| s.p99_us)];
    // In MiB already here, so that the ticks are round.
    const MIB: f64 = (1 << 20) as f64;
    let memory =
        vec![line("raw blocks", |s| s.raw_bytes / MIB), line("sealed blocks", |s| s.sealed_bytes / MIB)];
    [
        plot("Operations per second", vec![line("operations", |s| s.operations_per_second)], count),
        plot("Appended tokens per second", vec![line("tokens", |s| s.append_tokens_per_second)], count),
        Plot { scale: Scale::Logarithmic, ..plot("Latency of an operation", latency, micros) },
        Plot { stacked: true, ..plot("Memory in use", memory, |mib| format!("{mib:.0} MiB")) },
        plot("Operations in a batch", vec![line("mean", |s| s.batch_mean)], |value| format!("{value:.1}")),
        plot("Open sequences", vec![line("open", |s| s.sequences_open)], count),
    ]
    .iter()
    .map(Plot::figure)
    .collect()
}

fn tables(out: &mut String, totals: &Totals) {
    out.push_str("<h2>Totals and options</h2><div class=tables><table>");
    for (name, value) in totals.rows() {
        let _ = write!(out, "<tr><td>{name}<td>{}", escaped(&value));
    }
    out.push_str("</table>\n<table><tr><th>operation<th>count<th>p50<th>p99");
    for (name, kind) in totals.by_kind.iter().filter(|(_, kind)| kind.operations > 0) {
        let (count, p50, p99) = (grouped(kind.operations), micros(kind.p50_us), micros(kind.p99_us));
        let _ = write!(out, "<tr><td>{name}<td>{count}<td>{p50}<td>{p99}");
    }
    out.push_str("</table></div>\n");
    if !totals.messages.is_empty() {
        let _ = write!(
            out,
            "<h2>What went wrong</h2><div class=tables><pre>{}</pre></div>",
            escaped(&totals.messages.join("\n"))
        );
    }
}
