//! The figures as JSON, as a table, and as a page with plots.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use crate::llm::score::Score;
use crate::page::{self, escaped};
use crate::plot::{Across, Line, Plot, Scale};

/// What a format costs.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) format: String,
    /// Of a sealed block, scales included.
    pub(crate) bits_per_element: f64,
    /// Of all that was stored: with the blocks that stay raw.
    pub(crate) bits_per_element_with_raw: f64,
    #[serde(flatten)]
    pub(crate) score: Score,
}

pub(crate) const HEAD: &str = "format       bits  with raw    KL mean     KL p99    top 1       PPL   tokens";

impl Row {
    pub(crate) fn line(&self) -> String {
        let Score { kl_mean, kl_p99, top1_agreement, delta_ppl_percent, tokens_scored } = self.score;
        format!(
            "{:<11} {:>5.2} {:>9.2} {kl_mean:>10.5} {kl_p99:>10.5} {:>7.2}% {delta_ppl_percent:>+8.2}% {tokens_scored:>8}",
            self.format,
            self.bits_per_element,
            self.bits_per_element_with_raw,
            100.0 * top1_agreement,
        )
    }
}

/// Writes the page, and its folder if that is missing.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write(path: &Path, what: &str, rows: &[Row]) -> anyhow::Result<()> {
    page::write(path, "kv-cache quality", &body(what, rows))
}

fn body(what: &str, rows: &[Row]) -> String {
    let mut out = format!("<h1>What storage formats cost</h1>\n<p>{}</p>\n", escaped(what));
    let _ = writeln!(out, "<div class=plots>\n{}</div>", figures(rows));
    out.push_str("<h2>Figures</h2><div class=tables><table>");
    out.push_str("<tr><th>format<th>bits<th>with raw<th>KL mean<th>KL p99<th>same token first<th>perplexity");
    for row in rows {
        let _ = write!(
            out,
            "<tr><td>{}<td>{:.2}<td>{:.2}<td>{:.5}<td>{:.5}<td>{:.2} %<td>{:+.2} %",
            escaped(&row.format),
            row.bits_per_element,
            row.bits_per_element_with_raw,
            row.score.kl_mean,
            row.score.kl_p99,
            100.0 * row.score.top1_agreement,
            row.score.delta_ppl_percent
        );
    }
    out.push_str("</table></div>\n");
    out
}

/// Formats in order of their bits: what each bit buys.
fn figures(rows: &[Row]) -> String {
    let is_centred = |row: &Row| row.format.contains("+rc");
    let mut out = String::new();
    for (centred, title) in [
        (false, "Divergence from the raw cache, over bits an element"),
        (true, "The same with the model's mean keys"),
    ] {
        let mut rows: Vec<&Row> = rows.iter().filter(|row| is_centred(row) == centred).collect();
        rows.sort_by(|a, b| a.bits_per_element_with_raw.total_cmp(&b.bits_per_element_with_raw));
        if rows.is_empty() {
            continue;
        }
        let bits: Vec<f64> = rows.iter().map(|row| row.bits_per_element_with_raw).collect();
        let line = |name, of: fn(&Score) -> f64| Line {
            name,
            values: rows.iter().map(|row| of(&row.score).max(1e-9)).collect(),
        };
        let plot = Plot {
            title,
            across: Across::Settings { values: &bits, unit: |bits| format!("{bits:.2}") },
            lines: vec![line("mean", |score| score.kl_mean), line("p99", |score| score.kl_p99)],
            scale: Scale::Logarithmic,
            stacked: false,
            unit: |value| format!("{value:.0e}"),
        };
        out.push_str(&plot.figure());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(format: &str, bits: f64) -> Row {
        let (kl_mean, kl_p99) = (0.01 / bits, 0.1 / bits);
        let (top1_agreement, delta_ppl_percent, tokens_scored) = (0.99, 0.1, 4096);
        let score = Score { kl_mean, kl_p99, top1_agreement, delta_ppl_percent, tokens_scored };
        Row { format: format.into(), bits_per_element: bits, bits_per_element_with_raw: bits + 0.3, score }
    }

    #[test]
    fn a_row_is_one_json_object_with_its_fields_in_order() {
        let json = serde_json::to_string(&row("r4+rc", 4.25)).unwrap();
        let fields: Vec<usize> = [
            "format",
            "bits_per_element",
            "bits_per_element_with_raw",
            "delta_ppl_percent",
            "kl_mean",
            "kl_p99",
            "top1_agreement",
            "tokens_scored",
        ]
        .into_iter()
        .map(|field| json.find(&format!("\"{field}\":")).unwrap_or_else(|| panic!("{field}: {json}")))
        .collect();
        assert!(fields.is_sorted(), "{json}");
    }

    #[test]
    fn a_page_plots_both_ways_of_storing_keys() {
        let rows = [row("int8", 8.25), row("r4", 4.25), row("r4+rc", 4.25)];
        let page = body("a < b", &rows);
        assert_eq!(page.matches("<figure>").count(), 2);
        assert_eq!(page.matches("<tr><td>").count(), 3);
        assert!(page.contains("a &lt; b") && !page.contains("NaN"));
    }
}
