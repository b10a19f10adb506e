//! `target/stress-report.html`: one file with its plots inside, light and dark, nothing loaded from anywhere.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use crate::plot::{Line, Plot, Scale};
use crate::recorder::Sample;
use crate::totals::{Totals, grouped, micros};

const STYLE: &str = "
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d1d1b; --muted: #6b6a66; --grid: #e5e4e0;
  --s0: #2a78d6; --s1: #d9601f; --good: #0a7a3d; --bad: #c22b2b; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #20201e; --ink: #efeeea; --muted: #a3a29c;
  --grid: #383835; --s0: #4d97ee; --s1: #ee7f45; --good: #45b877; --bad: #f0706f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 60px; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 32px 0 10px; }
p { margin: 0 0 18px; color: var(--muted); }
.tiles, .plots { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); margin-top: 14px; }
.tile, figure, .tables > * { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 22px; font-weight: 600; }
.tile span { color: var(--muted); font-size: 13px; } .good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 0; padding: 12px 14px 6px; } figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--muted); font-size: 11px; }
.legend { font-size: 12px; color: var(--muted); } .legend span { margin-right: 14px; }
.legend i { display: inline-block; width: 12px; height: 3px; margin-right: 5px; vertical-align: middle; }
.legend .s0 { background: var(--s0); } .legend .s1 { background: var(--s1); }
.grid { stroke: var(--grid); } .rule { stroke: var(--muted); stroke-dasharray: 3 4; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); }
.area.s0 { fill: color-mix(in srgb, var(--s0) 30%, var(--card)); } .area.s1 { fill: color-mix(in srgb, var(--s1) 30%, var(--card)); }
.hover { fill: transparent; } .hover:hover { fill: var(--muted); fill-opacity: .18; }
.tables { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: 5px 14px; text-align: right; border-bottom: 1px solid var(--grid); font-weight: normal; }
td:first-child, th:first-child { text-align: left; color: var(--muted); } th { color: var(--muted); } tr:last-child td { border: 0; }
pre { padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
";

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
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    std::fs::write(path, page(totals, samples, measured_from_s))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn page(totals: &Totals, samples: &[Sample], measured_from_s: f64) -> String {
    let mut out =
        String::from("<!doctype html><html lang=en><meta charset=utf-8><title>kv-cache stress</title>");
    out.push_str("<meta name=viewport content=\"width=device-width, initial-scale=1\">");
    let _ = write!(out, "<style>{STYLE}</style>\n<h1>kv-cache under load</h1>");
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
    out.push_str("</html>\n");
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
        seconds: &seconds,
        lines,
        scale: Scale::Linear,
        stacked: false,
        measured_from_s: Some(measured_from_s),
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

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
