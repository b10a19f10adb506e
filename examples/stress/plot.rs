//! Line plots over time as inline SVG: a frame, a few round ticks, one line a series. Colours come from the page's CSS.

use std::fmt::Write;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 26.0;

/// How the vertical axis runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// By powers of ten, for values that differ by orders of magnitude.
    Logarithmic,
}

/// One line.
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) values: Vec<f64>,
}

/// A plot; all lines share `seconds` and the vertical axis.
pub(crate) struct Plot<'a> {
    pub(crate) title: &'static str,
    pub(crate) seconds: &'a [f64],
    pub(crate) lines: Vec<Line>,
    pub(crate) scale: Scale,
    /// Lines lie on top of each other and fill what is under them.
    pub(crate) stacked: bool,
    /// A vertical rule: what came before is not in the totals' rates.
    pub(crate) measured_from_s: Option<f64>,
    /// Writes a value with its unit.
    pub(crate) unit: fn(f64) -> String,
}

impl Plot<'_> {
    /// A `<figure>` with caption, legend and drawing.
    pub(crate) fn figure(&self) -> String {
        let mut out = format!("<figure><figcaption>{}</figcaption>", self.title);
        if self.lines.len() > 1 {
            out.push_str("<div class=legend>");
            for (index, line) in self.lines.iter().enumerate() {
                let _ = write!(out, "<span><i class=s{index}></i>{}</span>", line.name);
            }
            out.push_str("</div>");
        }
        self.svg(&mut out);
        out.push_str("</figure>\n");
        out
    }

    fn svg(&self, out: &mut String) {
        let title = self.title;
        let _ =
            write!(out, r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over time">"#);
        if self.seconds.len() < 2 {
            let (x, y) = (WIDTH / 2.0, HEIGHT / 2.0);
            let _ = write!(
                out,
                r#"<text x="{x}" y="{y}" text-anchor="middle">too short a run for a plot</text></svg>"#
            );
            return;
        }
        let levels = self.levels();
        let axis = Axis::new(self.scale, &levels);
        let duration = self.seconds.last().copied().unwrap_or(1.0).max(1e-3);
        let x = |s: f64| LEFT + s / duration * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM);

        for tick in axis.ticks() {
            let (at, label) = (y(tick), (self.unit)(tick));
            let end = WIDTH - RIGHT;
            let _ = write!(out, r#"<path class="grid" d="M{LEFT} {at:.1}H{end}"/>"#);
            let _ = write!(
                out,
                r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#,
                LEFT - 6.0,
                at + 3.5
            );
        }
        for tick in round_steps(duration, 6) {
            let _ = write!(
                out,
                r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{tick} s</text>"#,
                x(tick),
                HEIGHT - 8.0
            );
        }
        if let Some(at) = self.measured_from_s.filter(|at| *at > 0.02 * duration && *at < duration) {
            let (at, floor) = (x(at), HEIGHT - BOTTOM);
            let _ = write!(out, r#"<path class="rule" d="M{at:.1} {TOP}V{floor:.1}"/>"#);
            let _ = write!(out, r#"<text x="{:.1}" y="{:.1}">measured →</text>"#, at + 4.0, floor - 6.0);
        }
        // The topmost of a stack is drawn first, so that the areas under it cover its lower part.
        for (index, values) in levels.iter().enumerate().rev() {
            let mut path = String::new();
            for (at, value) in self.seconds.iter().zip(values) {
                let _ =
                    write!(path, "{}{:.1} {:.1}", if path.is_empty() { "M" } else { "L" }, x(*at), y(*value));
            }
            if self.stacked {
                let (first, last, floor) = (x(self.seconds[0]), x(duration), HEIGHT - BOTTOM);
                let _ = write!(
                    out,
                    r#"<path class="area s{index}" d="{path}L{last:.1} {floor}L{first:.1} {floor}Z"/>"#
                );
            }
            let _ = write!(out, r#"<path class="line s{index}" d="{path}"/>"#);
        }
        self.hover(out, x);
        out.push_str("</svg>");
    }

    /// Columns that show nothing but their values under the pointer.
    fn hover(&self, out: &mut String, x: impl Fn(f64) -> f64) {
        let mut from = LEFT;
        for (index, at) in self.seconds.iter().enumerate() {
            let to = x(*at);
            let values: Vec<String> = self
                .lines
                .iter()
                .map(|line| format!("{} {}", line.name, (self.unit)(line.values[index])))
                .collect();
            let _ = write!(
                out,
                r#"<rect class="hover" x="{from:.1}" y="{TOP}" width="{:.1}" height="{:.1}"><title>{at:.1} s: {}</title></rect>"#,
                (to - from).max(0.1),
                HEIGHT - TOP - BOTTOM,
                values.join(", ")
            );
            from = to;
        }
    }

    /// What is drawn: the values, or their running sums.
    fn levels(&self) -> Vec<Vec<f64>> {
        let mut levels: Vec<Vec<f64>> = Vec::new();
        for line in &self.lines {
            let level = match levels.last().filter(|_| self.stacked) {
                Some(below) => below.iter().zip(&line.values).map(|(a, b)| a + b).collect(),
                None => line.values.clone(),
            };
            levels.push(level);
        }
        levels
    }
}

struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Axis {
    fn new(scale: Scale, levels: &[Vec<f64>]) -> Self {
        let values = || levels.iter().flatten().copied().filter(|value| *value > 0.0);
        let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
        match scale {
            _ if most == 0.0 => Axis { scale: Scale::Linear, low: 0.0, high: 1.0 },
            Scale::Linear => Axis { scale, low: 0.0, high: most * 1.08 },
            Scale::Logarithmic => {
                let (low, high) = (10f64.powf(least.log10().floor()), 10f64.powf(most.log10().ceil()));
                Axis { scale, low, high: high.max(low * 10.0) }
            }
        }
    }

    /// From 0 at the bottom to 1 at the top.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => value / self.high,
            Scale::Logarithmic => (value.max(self.low) / self.low).log10() / (self.high / self.low).log10(),
        }
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => round_steps(self.high, 4),
            Scale::Logarithmic => {
                let decades = (self.high / self.low).log10().round() as i32;
                (0..=decades).map(|decade| self.low * 10f64.powi(decade)).collect()
            }
        }
    }
}

/// Multiples of 1, 2 or 5 times a power of ten, from 0 up to `most`, about `count` of them.
fn round_steps(most: f64, count: u32) -> Vec<f64> {
    let rough = most / f64::from(count);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(rough);
    // Ticks are computed from their number, and rounded, so that 0.1 × 3 is not 0.30000000000000004.
    (0..)
        .map(|n| (f64::from(n) * step / power).round() * power)
        .take_while(|tick| *tick <= most)
        .map(tidy)
        .collect()
}

fn tidy(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(round_steps(10.0, 4), [0.0, 5.0, 10.0]);
        assert_eq!(round_steps(0.9, 3), [0.0, 0.5]);
        assert_eq!(round_steps(1.3e6, 4), [0.0, 5e5, 1e6]);
        let axis = Axis::new(Scale::Logarithmic, &[vec![30.0, 4000.0, 0.0]]);
        assert_eq!(axis.ticks(), [10.0, 100.0, 1000.0, 10000.0]);
        assert!((axis.place(1000.0) - 2.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn a_plot_is_drawn_also_without_data() {
        let plot = |seconds: &[f64], values: &[f64]| {
            let lines = vec![
                Line { name: "a", values: values.to_vec() },
                Line { name: "b", values: values.to_vec() },
            ];
            let unit = |value: f64| format!("{value}");
            let (scale, stacked) = (Scale::Linear, true);
            Plot { title: "t", seconds, lines, scale, stacked, measured_from_s: Some(1.0), unit }.figure()
        };
        assert!(plot(&[], &[]).contains("too short"));
        assert!(!plot(&[1.0, 2.0], &[0.0, 0.0]).contains("NaN"));
        assert_eq!(plot(&[1.0, 2.0], &[3.0, 4.0]).matches("class=\"line").count(), 2);
    }
}
