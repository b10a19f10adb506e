//! Prints figures as a table or as JSON.

use serde_json::json;

/// Where figures go.
pub(crate) struct Table {
    json: bool,
    group: String,
}

impl Table {
    pub(crate) fn new(json: bool) -> Self {
        Table { json, group: String::new() }
    }

    /// Starts a group of rows.
    pub(crate) fn group(&mut self, name: &str) {
        self.group = name.to_owned();
        if !self.json {
            println!("\n{name}");
        }
    }

    /// One figure, with what it is judged by.
    pub(crate) fn row(&mut self, what: &str, value: f64, unit: &str, judged: Option<(f64, &str)>) {
        if self.json {
            let (ratio, by) = judged.unzip();
            println!(
                "{}",
                json!({ "group": self.group, "what": what, "value": value, "unit": unit, "ratio": ratio, "ratio_of": by })
            );
            return;
        }
        let judged = judged.map_or(String::new(), |(ratio, by)| format!("{ratio:>9.2} {by}"));
        println!("  {what:<64} {value:>10.1} {unit:<5}{judged}");
    }
}

/// The middle of some times, in microseconds.
pub(crate) fn median(times: &mut [f64]) -> f64 {
    quantile(times, 0.5)
}

/// The value below which `share` of them lie.
pub(crate) fn quantile(times: &mut [f64], share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times[((times.len() - 1) as f64 * share).round() as usize]
}
