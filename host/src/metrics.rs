//! Figures in Prometheus's text format (exposition format 0.0.4). Labels are hosts, modes, results; never users.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Upper bounds of the buckets of every histogram, in seconds.
const BUCKETS: [f64; 14] =
    [0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// Names, kinds and meanings of all figures.
const FAMILIES: [(&str, &str, &str); 18] = [
    ("kage_images", "gauge", "Images on this host by state; mirrors of others' among them."),
    ("kage_pool_ready", "gauge", "Machines that wait for a login, shells that wait for an arrival."),
    ("kage_logins_total", "counter", "Logins answered."),
    ("kage_login_start_seconds", "histogram", "Login to the machine's first answer."),
    ("kage_handovers_total", "counter", "Handovers this host was the source of."),
    ("kage_handover_total_seconds", "histogram", "Request to the last page at the target."),
    ("kage_handover_blackout_seconds", "histogram", "Last exit at the source to first entry at the target."),
    ("kage_handover_bytes_total", "counter", "Bytes on the wire by phase."),
    (
        "kage_replica_bytes_total",
        "counter",
        "Bytes to mirrors, and what one that is sent every page found written would take.",
    ),
    ("kage_replica_lag_seconds", "histogram", "Age of a mirror's oldest difference when an epoch was sent."),
    (
        "kage_prediction_total",
        "counter",
        "Changes of access point: first in the forecast, among its first three, missed.",
    ),
    ("kage_restarts_total", "counter", "Machines started again after their process ended."),
    ("kage_route_switch_seconds", "histogram", "Changing an image's route to its new host."),
    ("kage_forwarded_frames_total", "counter", "Frames forwarded from a source's tap after a move."),
    ("kage_lost_frames_total", "counter", "Frames lost in moves."),
    ("kage_directory_seconds", "histogram", "Directory calls by operation."),
    ("kage_radius_packets_total", "counter", "Accounting packets by type and result."),
    ("kage_api_requests_total", "counter", "API requests by status."),
];

#[derive(Clone, Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

#[derive(Default)]
struct Inner {
    /// By family and rendered labels.
    numbers: BTreeMap<(&'static str, String), f64>,
    histograms: BTreeMap<(&'static str, String), Histogram>,
}

/// All figures of this host.
#[derive(Default)]
pub struct Metrics {
    inner: Mutex<Inner>,
}

/// Pairs of a label's name and value.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

fn render(labels: Labels<'_>) -> String {
    let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect::<Vec<_>>().join(",")
}

impl Metrics {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to a counter.
    pub fn add(&self, family: &'static str, labels: Labels<'_>, amount: u64) {
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53")]
        let amount = amount as f64;
        *self.inner().numbers.entry((family, render(labels))).or_default() += amount;
    }

    /// Sets a gauge.
    pub fn set(&self, family: &'static str, labels: Labels<'_>, value: f64) {
        self.inner().numbers.insert((family, render(labels)), value);
    }

    /// Adds an observation to a histogram.
    pub fn observe(&self, family: &'static str, labels: Labels<'_>, value: Duration) {
        let seconds = value.as_secs_f64();
        let mut inner = self.inner();
        let histogram = inner.histograms.entry((family, render(labels))).or_default();
        histogram.count += 1;
        histogram.sum += seconds;
        if let Some(bucket) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            histogram.buckets[bucket] += 1;
        }
    }

    /// All figures as text.
    #[must_use]
    pub fn text(&self) -> String {
        let inner = self.inner();
        let mut text = String::new();
        // Writing into a String cannot fail.
        for (family, kind, help) in FAMILIES {
            let _ = writeln!(text, "# HELP {family} {help}\n# TYPE {family} {kind}");
            for ((name, labels), value) in &inner.numbers {
                if *name == family {
                    let _ = writeln!(text, "{family}{} {value}", braces(labels, None));
                }
            }
            for ((name, labels), histogram) in &inner.histograms {
                if *name != family {
                    continue;
                }
                let mut below = 0;
                for (bound, count) in BUCKETS.iter().zip(histogram.buckets) {
                    below += count;
                    let _ =
                        writeln!(text, "{family}_bucket{} {below}", braces(labels, Some(&bound.to_string())));
                }
                let _ = writeln!(text, "{family}_bucket{} {}", braces(labels, Some("+Inf")), histogram.count);
                let _ = writeln!(text, "{family}_sum{} {}", braces(labels, None), histogram.sum);
                let _ = writeln!(text, "{family}_count{} {}", braces(labels, None), histogram.count);
            }
        }
        text
    }
}

fn braces(labels: &str, bound: Option<&str>) -> String {
    let bound = bound.map(|bound| format!("le=\"{bound}\""));
    let all: Vec<&str> =
        [labels, bound.as_deref().unwrap_or_default()].into_iter().filter(|part| !part.is_empty()).collect();
    if all.is_empty() { String::new() } else { format!("{{{}}}", all.join(",")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_gauges_and_histograms_are_shown() {
        let metrics = Metrics::default();
        metrics.add("kage_logins_total", &[], 2);
        metrics.set("kage_images", &[("state", "running")], 1.0);
        metrics.observe("kage_handover_blackout_seconds", &[("mode", "a\"b")], Duration::from_micros(1500));
        let text = metrics.text();
        for line in [
            "kage_logins_total 2",
            "kage_images{state=\"running\"} 1",
            "kage_handover_blackout_seconds_bucket{mode=\"a\\\"b\",le=\"0.001\"} 0",
            "kage_handover_blackout_seconds_bucket{mode=\"a\\\"b\",le=\"0.002\"} 1",
            "kage_handover_blackout_seconds_bucket{mode=\"a\\\"b\",le=\"+Inf\"} 1",
            "kage_handover_blackout_seconds_count{mode=\"a\\\"b\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
