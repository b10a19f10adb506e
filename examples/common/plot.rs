//! Line plots as inline SVG: a frame, a few round ticks, one line a series. Colours come from the page's CSS.

use std::fmt::Write;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 26.0;
/// Between the frame and the outermost settings.
const MARGIN: f64 = 24.0;
/// Labels of settings that would be closer than this are left out.
const LABEL_WIDTH: f64 = 44.0;

/// How the vertical axis runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// By powers of ten, for values that differ by orders of magnitude.
    Logarithmic,
}

/// What runs from left to right.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Across<'a> {
    /// Seconds from zero, samples close to each other.
    Time {
        seconds: &'a [f64],
        /// A vertical rule: what came before is not in the totals' rates.
        measured_from_s: Option<f64>,
    },
    /// A few positive numbers in ascending order that somebody chose, by powers of ten; each has a tick, and dots.
    Settings {
        values: &'a [f64],
        /// Writes one with its unit.
        unit: fn(f64) -> String,
    },
}

impl Across<'_> {
    fn values(&self) -> &[f64] {
        match *self {
            Across::Time { seconds, .. } => seconds,
            Across::Settings { values, .. } => values,
        }
    }

    fn last(&self) -> f64 {
        self.values().last().copied().unwrap_or(1.0).max(1e-3)
    }

    fn label(&self, value: f64) -> String {
        match self {
            Across::Time { .. } => format!("{value:.1} s"),
            Across::Settings { unit, .. } => unit(value),
        }
    }

    /// Where `value` lies, in units of the drawing.
    fn place(&self, value: f64) -> f64 {
        let width = WIDTH - LEFT - RIGHT;
        match self {
            Across::Time { .. } => LEFT + value / self.last() * width,
            Across::Settings { values, .. } => {
                let (first, last) = (values.first().copied().unwrap_or(1.0), self.last());
                let share = if last > first { (value / first).ln() / (last / first).ln() } else { 0.5 };
                LEFT + MARGIN + share * (width - 2.0 * MARGIN)
            }
        }
    }

    /// Where the values under the pointer change to those of sample `index`.
    fn border(&self, index: usize) -> f64 {
        let (values, end) = (self.values(), WIDTH - RIGHT);
        match self {
            _ if index == 0 => LEFT,
            Across::Time { .. } => self.place(values[index - 1]),
            Across::Settings { .. } if index == values.len() => end,
            Across::Settings { .. } => (self.place(values[index - 1]) + self.place(values[index])) / 2.0,
        }
    }
}

/// One line.
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) values: Vec<f64>,
}

/// A plot; all lines share both axes.
pub(crate) struct Plot<'a> {
    pub(crate) title: &'static str,
    pub(crate) across: Across<'a>,
    pub(crate) lines: Vec<Line>,
    pub(crate) scale: Scale,
    /// Lines lie on top of each other and fill what is under them.
    pub(crate) stacked: bool,
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
        let (title, samples) = (self.title, self.across.values());
        let _ = write!(out, r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">"#);
        if matches!(self.across, Across::Time { .. }) && samples.len() < 2 {
            let (x, y) = (WIDTH / 2.0, HEIGHT / 2.0);
            let _ = write!(
                out,
                r#"<text x="{x}" y="{y}" text-anchor="middle">too short a run for a plot</text></svg>"#
            );
            return;
        }
        let levels = self.levels();
        let axis = Axis::new(self.scale, &levels);
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
        self.ticks_across(out);
        // The topmost of a stack is drawn first, so that the areas under it cover its lower part.
        for (index, values) in levels.iter().enumerate().rev() {
            let points: Vec<_> =
                samples.iter().zip(values).map(|(at, value)| (self.across.place(*at), y(*value))).collect();
            self.line(out, index, &points);
        }
        self.hover(out);
        out.push_str("</svg>");
    }

    fn ticks_across(&self, out: &mut String) {
        let mut tick = |at: f64, label: &str| {
            let floor = HEIGHT - 8.0;
            let _ = write!(out, r#"<text x="{at:.1}" y="{floor:.1}" text-anchor="middle">{label}</text>"#);
        };
        match self.across {
            Across::Time { measured_from_s, .. } => {
                let duration = self.across.last();
                for seconds in round_steps(duration, 6) {
                    tick(self.across.place(seconds), &format!("{seconds} s"));
                }
                if let Some(at) = measured_from_s.filter(|at| *at > 0.02 * duration && *at < duration) {
                    let (at, floor) = (self.across.place(at), HEIGHT - BOTTOM);
                    let _ = write!(out, r#"<path class="rule" d="M{at:.1} {TOP}V{floor:.1}"/>"#);
                    let _ =
                        write!(out, r#"<text x="{:.1}" y="{:.1}">measured →</text>"#, at + 4.0, floor - 6.0);
                }
            }
            Across::Settings { values, unit } => {
                let mut free_from = 0.0;
                for value in values {
                    let at = self.across.place(*value);
                    if at >= free_from {
                        tick(at, &unit(*value));
                        free_from = at + LABEL_WIDTH;
                    }
                }
            }
        }
    }

    fn line(&self, out: &mut String, index: usize, points: &[(f64, f64)]) {
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "{}{x:.1} {y:.1}", if path.is_empty() { "M" } else { "L" });
        }
        if let (true, Some((first, _)), Some((last, _))) = (self.stacked, points.first(), points.last()) {
            let floor = HEIGHT - BOTTOM;
            let _ = write!(
                out,
                r#"<path class="area s{index}" d="{path}L{last:.1} {floor}L{first:.1} {floor}Z"/>"#
            );
        }
        let _ = write!(out, r#"<path class="line s{index}" d="{path}"/>"#);
        if matches!(self.across, Across::Settings { .. }) {
            for (x, y) in points {
                let _ = write!(out, r#"<circle class="dot s{index}" cx="{x:.1}" cy="{y:.1}" r="3"/>"#);
            }
        }
    }

    /// Columns that show nothing but their values under the pointer.
    fn hover(&self, out: &mut String) {
        for (index, at) in self.across.values().iter().enumerate() {
            let (from, to) = (self.across.border(index), self.across.border(index + 1));
            let values: Vec<String> = self
                .lines
                .iter()
                .map(|line| format!("{} {}", line.name, (self.unit)(line.values[index])))
                .collect();
            let _ = write!(
                out,
                r#"<rect class="hover" x="{from:.1}" y="{TOP}" width="{:.1}" height="{:.1}"><title>{}: {}</title></rect>"#,
                (to - from).max(0.1),
                HEIGHT - TOP - BOTTOM,
                self.across.label(*at),
                values.join(", ")
            );
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
            let across = Across::Time { seconds, measured_from_s: Some(1.0) };
            Plot { title: "t", across, lines, scale, stacked, unit }.figure()
        };
        assert!(plot(&[], &[]).contains("too short"));
        assert!(!plot(&[1.0, 2.0], &[0.0, 0.0]).contains("NaN"));
        assert_eq!(plot(&[1.0, 2.0], &[3.0, 4.0]).matches("class=\"line").count(), 2);
    }
    #[test]
    fn settings_lie_by_powers_of_ten_and_have_dots() {
        let values = [10.0, 100.0, 1000.0];
        let across = Across::Settings { values: &values, unit: |value| format!("{value}") };
        let at = values.map(|value| across.place(value));
        assert!((at[2] - at[1] - (at[1] - at[0])).abs() < 1e-9);
        assert_eq!((across.border(0), across.border(3)), (LEFT, WIDTH - RIGHT));
        for values in [&values[..], &values[..1]] {
            let across = Across::Settings { values, unit: |value| format!("{value}") };
            let lines = vec![Line { name: "a", values: values.to_vec() }];
            let unit = |value: f64| format!("{value}");
            let drawn =
                Plot { title: "t", across, lines, scale: Scale::Linear, stacked: false, unit }.figure();
            assert_eq!(drawn.matches("<circle").count(), values.len());
            assert!(!drawn.contains("NaN"));
        }
    }
}
