//! The figures as JSON, as a table, and as a page with plots.

use std::fmt::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::driver::{Round, Setup};
use crate::page::{self, escaped, grouped};
use crate::plot::{Across, Line, Plot, Scale};
use crate::workload::Workload;

/// One policy at one capacity. Field names are the JSON's.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    trace: String,
    policy: &'static str,
    capacity_blocks: u32,
    blocks: usize,
    hit_blocks: usize,
    hit_ratio: f64,
    ns_per_block: f64,
    hash_ns_per_block: f64,
    threads: u16,
    requests: usize,
    /// How blocks are stored, in a whole cache.
    format: String,
}

impl Row {
    pub(crate) fn new(workload: &Workload, setup: &Setup<'_>, round: Round) -> Self {
        let blocks = workload.blocks();
        Row {
            trace: workload.name.clone(),
            policy: setup.policy.name(),
            capacity_blocks: setup.capacity_blocks,
            blocks,
            hit_blocks: round.hit_blocks,
            hit_ratio: round.hit_blocks as f64 / blocks as f64,
            ns_per_block: round.wall.as_nanos() as f64 / blocks as f64,
            hash_ns_per_block: workload.hash_ns_per_block(),
            threads: setup.threads,
            requests: workload.requests.len(),
            format: setup.stored.to_string(),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (capacity, hits) = (grouped(self.capacity_blocks.into()), grouped(self.hit_blocks as u64));
        write!(
            f,
            "{:<14}{capacity:>12}{:>9}{hits:>12}{:>9.4}{:>11.0}",
            self.policy, self.threads, self.hit_ratio, self.ns_per_block
        )
    }
}

/// What the rows are about, and the names of their columns.
pub(crate) fn print_heading(workload: &Workload) {
    println!("{}", summary(workload));
    println!(
        "{:<14}{:>12}{:>9}{:>12}{:>9}{:>11}",
        "policy", "capacity", "threads", "hits", "ratio", "ns/block"
    );
}

fn summary(workload: &Workload) -> String {
    format!(
        "{}: {} requests, {} blocks; hashing {:.0} ns a block, not part of ns/block",
        workload.name,
        grouped(workload.requests.len() as u64),
        grouped(workload.blocks() as u64),
        workload.hash_ns_per_block()
    )
}

/// Writes the page, and its folder if that is missing.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write(path: &Path, workload: &Workload, rows: &[Row]) -> anyhow::Result<()> {
    page::write(path, "kv-cache replay", &body(&summary(workload), rows))
}

fn body(summary: &str, rows: &[Row]) -> String {
    let mut out = format!("<h1>Prefixes found in the cache</h1>\n<p>{}</p>\n", escaped(summary));
    let _ = writeln!(out, "<div class=plots>\n{}</div>", figures(rows));
    out.push_str("<h2>Figures</h2><div class=tables><table>");
    out.push_str("<tr><th>policy<th>capacity, blocks<th>threads<th>blocks hit<th>share<th>ns a block");
    for row in rows {
        let _ = write!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{:.4}<td>{:.0}",
            row.policy,
            grouped(row.capacity_blocks.into()),
            row.threads,
            grouped(row.hit_blocks as u64),
            row.hit_ratio,
            row.ns_per_block
        );
    }
    out.push_str("</table></div>\n");
    out
}

/// All policies ran at the same capacities, in the same order.
fn figures(rows: &[Row]) -> String {
    let by_policy: Vec<&[Row]> = rows.chunk_by(|a, b| a.policy == b.policy).collect();
    let capacities: Vec<f64> = by_policy
        .first()
        .into_iter()
        .flat_map(|rows| rows.iter())
        .map(|row| row.capacity_blocks.into())
        .collect();
    let blocks = |value: f64| grouped(value as u64);
    let plot = |title, of: fn(&Row) -> f64, unit| {
        let line = |rows: &&[Row]| Line { name: rows[0].policy, values: rows.iter().map(of).collect() };
        Plot {
            title,
            across: Across::Settings { values: &capacities, unit: blocks },
            lines: by_policy.iter().map(line).collect(),
            scale: Scale::Linear,
            stacked: false,
            unit,
        }
        .figure()
    };
    let percent: fn(f64) -> String = |value| format!("{value:.1} %");
    plot("Share of blocks hit, over capacity in blocks", |row| 100.0 * row.hit_ratio, percent)
        + &plot(
            "Time a block, over capacity in blocks",
            |row| row.ns_per_block,
            |value| format!("{value:.0} ns"),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(policy: &'static str, capacity_blocks: u32) -> Row {
        Row {
            trace: "t.jsonl".into(),
            policy,
            capacity_blocks,
            blocks: 8,
            hit_blocks: 2,
            hit_ratio: 0.25,
            ns_per_block: 10.5,
            hash_ns_per_block: 900.0,
            threads: 1,
            requests: 4,
            format: "raw".into(),
        }
    }

    #[test]
    fn a_row_is_one_json_object_with_its_fields_in_order() {
        let json = serde_json::to_string(&row("lru", 1000)).unwrap();
        let start = r#"{"trace":"t.jsonl","policy":"lru","capacity_blocks":1000,"blocks":8,"hit_blocks":2,"hit_ratio":0.25,"ns_per_block":10.5,"#;
        assert!(json.starts_with(start), "{json}");
    }

    #[test]
    fn a_page_has_a_line_for_each_policy_in_each_plot() {
        let rows = [row("lru", 1000), row("lru", 5000), row("clairvoyant", 1000), row("clairvoyant", 5000)];
        let page = body("a < b", &rows);
        assert_eq!(page.matches("class=\"line").count(), 4);
        assert_eq!(page.matches("<tr><td>").count(), 4);
        assert!(page.contains("a &lt; b") && !page.contains("NaN"));
    }
}
