//! Reports: one HTML file with its plots inside, light and dark, nothing loaded from anywhere.

use std::path::Path;

use anyhow::Context;

const STYLE: &str = "
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d1d1b; --muted: #6b6a66; --grid: #e5e4e0;
  --s0: #2a78d6; --s1: #d9601f; --s2: #2f9254; --s3: #8b4fc4; --s4: #b88a00; --s5: #c2417f;
  --good: #0a7a3d; --bad: #c22b2b; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #20201e; --ink: #efeeea; --muted: #a3a29c;
  --grid: #383835; --s0: #4d97ee; --s1: #ee7f45; --s2: #52bf7c; --s3: #b286e6; --s4: #dcb33a; --s5: #ea78ad;
  --good: #45b877; --bad: #f0706f; } }
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
.legend i { background: var(--series); }
.s0 { --series: var(--s0); } .s1 { --series: var(--s1); } .s2 { --series: var(--s2); }
.s3 { --series: var(--s3); } .s4 { --series: var(--s4); } .s5 { --series: var(--s5); }
.grid { stroke: var(--grid); } .rule { stroke: var(--muted); stroke-dasharray: 3 4; }
.line { fill: none; stroke: var(--series); stroke-width: 1.8; stroke-linejoin: round; } .dot { fill: var(--series); }
.area { fill: color-mix(in srgb, var(--series) 30%, var(--card)); }
.hover { fill: transparent; } .hover:hover { fill: var(--muted); fill-opacity: .18; }
.tables { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: 5px 14px; text-align: right; border-bottom: 1px solid var(--grid); font-weight: normal; }
td:first-child, th:first-child { text-align: left; color: var(--muted); } th { color: var(--muted); } tr:last-child td { border: 0; }
pre { padding: 12px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
";

/// Writes a page, and its folder if that is missing.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write(path: &Path, title: &str, body: &str) -> anyhow::Result<()> {
    let page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>\
         <meta name=viewport content=\"width=device-width, initial-scale=1\"><style>{STYLE}</style>\n{body}</html>\n"
    );
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))
}

/// Text that a page shows as it is.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three() {
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
