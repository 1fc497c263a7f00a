//! `kage bench`: measurements whose figures mean what SURFACE says they mean.
//!
//! - [`files`]: files in a machine beside the same on its host, the store beneath them, and what a disk costs in a move.
//! - [`predict`]: how often forecasts of where users go are right, and what they cost.
//! - [`start`]: from a login to the machine's first answer, and what an idle machine costs.
//! - [`processes`]: programs in a machine beside the same programs on its host, and what they do to others.

mod desk;
pub mod files;
pub mod predict;
pub mod processes;
pub mod start;
mod store;
mod trace;

use serde::Serialize;

use crate::output::table;

/// Answer of a bench.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: MachineInfo,
    /// What was measured.
    pub cases: Vec<Case>,
}

/// The machine underneath.
#[derive(Clone, Debug, Serialize)]
pub struct MachineInfo {
    /// Processor.
    pub cpu: String,
    /// How many of it.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// How this program was built.
    pub build: &'static str,
}

/// One measured quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// What it was measured with.
    pub params: serde_json::Value,
    /// How often.
    pub runs: usize,
    /// Of the figures.
    pub unit: &'static str,
    /// Middle figure.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// 99th percentile, of enough runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99: Option<f64>,
    /// The same by somebody else, in the same run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
    /// How much better than the peer: above 1 is better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Of a predictor, how often it was right; the figures are then its hits in percent.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<predict::Prediction>,
}

/// Who a case is compared with.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its middle figure.
    pub median: f64,
}

impl Case {
    /// From figures in any order.
    #[must_use]
    pub fn of(name: &str, params: serde_json::Value, unit: &'static str, mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let at = |share: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "an index"
            )]
            let index = ((figures.len() as f64 - 1.0) * share).round() as usize;
            figures.get(index).copied().unwrap_or_default()
        };
        Self {
            name: name.to_owned(),
            params,
            runs: figures.len(),
            unit,
            median: at(0.5),
            min: at(0.0),
            max: at(1.0),
            p99: (figures.len() >= 100).then(|| at(0.99)),
            peer: None,
            ratio: None,
            prediction: None,
        }
    }

    /// Beside a peer's figures, of which the smaller are the better.
    #[must_use]
    pub fn beside(self, peer: &str, figures: Vec<f64>) -> Self {
        let median = Self::of(peer, serde_json::Value::Null, self.unit, figures).median;
        Self { ratio: Some(median / self.median), peer: Some(Peer { name: peer.to_owned(), median }), ..self }
    }
}

impl Case {
    /// Beside a peer's figures, of which the larger are the better.
    #[must_use]
    pub fn ahead_of(self, peer: &str, figures: Vec<f64>) -> Self {
        let case = self.beside(peer, figures);
        Self { ratio: case.ratio.map(|ratio| 1.0 / ratio), ..case }
    }
}

impl MachineInfo {
    /// This machine.
    #[must_use]
    pub fn here() -> Self {
        let field = |path: &str, name: &str| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).map(str::to_owned);
            line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned())).unwrap_or_default()
        };
        let memory_kib: u64 = field("/proc/meminfo", "MemTotal")
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        Self {
            cpu: field("/proc/cpuinfo", "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_kib << 10,
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
        }
    }
}

/// A report for people.
#[must_use]
pub fn show(report: &Report) -> String {
    let rows: Vec<_> = report
        .cases
        .iter()
        .map(|case| {
            let figure = |value: f64| format!("{value:.2} {}", case.unit);
            vec![
                case.name.clone(),
                case.runs.to_string(),
                figure(case.median),
                figure(case.min),
                case.p99.map(figure).unwrap_or_default(),
                figure(case.max),
                case.peer
                    .as_ref()
                    .map(|peer| format!("{} {}", peer.name, figure(peer.median)))
                    .unwrap_or_default(),
                case.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            ]
        })
        .collect();
    let machine = &report.machine;
    format!(
        "{}, {} CPUs, Linux {}, {} build\n{}",
        machine.cpu,
        machine.cpus,
        machine.kernel,
        machine.build,
        table(&["CASE", "RUNS", "MEDIAN", "MIN", "P99", "MAX", "PEER", "RATIO"], &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_ordered_before_they_are_summed_up() {
        let case = Case::of("x", serde_json::Value::Null, "ms", vec![3.0, 1.0, 2.0]);
        assert_eq!((case.median, case.min, case.max, case.p99), (2.0, 1.0, 3.0, None));
        let many = Case::of("x", serde_json::Value::Null, "ms", (1..=100).map(f64::from).collect());
        assert_eq!(many.p99, Some(99.0));
        assert_eq!(Case::of("x", serde_json::Value::Null, "ms", Vec::new()).runs, 0);
        let case = Case::of("x", serde_json::Value::Null, "ms", vec![4.0]).beside("y", vec![9.0, 2.0, 1.0]);
        assert_eq!((case.peer.map(|peer| peer.median), case.ratio), (Some(2.0), Some(0.5)));
    }
}
