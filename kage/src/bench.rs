//! `kage bench`: measurements whose figures mean what SURFACE says they mean.
//!
//! - [`drain`]: a host with many machines is emptied.
//! - [`files`]: files in a machine beside the same on its host, the store beneath them, and what a disk costs in a move.
//! - [`migrate`]: moves of a working machine over shaped links, and what of each somebody feels.
//! - [`predict`]: how often forecasts of where users go are right, and what they cost.
//! - [`start`]: from a login to the machine's first answer, and what an idle machine costs.
//! - [`processes`]: programs in a machine beside the same programs on its host, and what they do to others.
//! - [`replicate`]: what mirrors cost: bytes, and the owner's processor.
//! - [`walk`]: users who walk a campus, each with a machine that works; moves to where mirrors are and to elsewhere.

mod desk;
pub mod drain;
pub mod files;
pub mod migrate;
mod mirrored;
pub mod predict;
pub mod processes;
mod processor;
pub mod replicate;
pub mod start;
mod store;
mod trace;
pub mod walk;

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
    /// Mean, where it is that which counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<f64>,
    /// 95 % confidence interval of the mean, by Student's t.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ci95: Option<[f64; 2]>,
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
            mean: None,
            ci95: None,
            peer: None,
            ratio: None,
            prediction: None,
        }
    }

    /// From independent figures in any order, of which the mean counts.
    #[must_use]
    pub fn of_mean(name: &str, params: serde_json::Value, unit: &'static str, figures: Vec<f64>) -> Self {
        let interval = interval(&figures);
        let case = Self::of(name, params, unit, figures);
        let Some((mean, half)) = interval else { return case };
        Self { mean: Some(mean), ci95: half.map(|half| [mean - half, mean + half]), ..case }
    }

    /// Beside a peer's figures, of which the smaller are the better.
    #[must_use]
    pub fn beside(self, peer: &str, figures: Vec<f64>) -> Self {
        let median = Self::of(peer, serde_json::Value::Null, self.unit, figures).median;
        let ratio = Some(median / self.median).filter(|ratio| ratio.is_finite());
        Self { ratio, peer: Some(Peer { name: peer.to_owned(), median }), ..self }
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

/// Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom.
const STUDENT: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// The mean of figures, and half the width of its 95 % confidence interval where there are at least two.
fn interval(figures: &[f64]) -> Option<(f64, Option<f64>)> {
    if figures.is_empty() {
        return None;
    }
    let count = figures.len() as f64;
    let mean = figures.iter().sum::<f64>() / count;
    let freedom = figures.len() - 1;
    if freedom == 0 {
        return Some((mean, None));
    }
    let squares: f64 = figures.iter().map(|figure| (figure - mean).powi(2)).sum();
    // Beyond the table it is within 2 % of the normal distribution's, and this a little wider.
    let student = STUDENT.get(freedom - 1).copied().unwrap_or(2.042);
    Some((mean, Some(student * (squares / freedom as f64 / count).sqrt())))
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

impl MachineInfo {
    /// In one line.
    #[must_use]
    pub fn line(&self) -> String {
        format!("{}, {} CPUs, Linux {}, {} build", self.cpu, self.cpus, self.kernel, self.build)
    }
}

/// A report for people.
#[must_use]
pub fn show(report: &Report) -> String {
    let rows: Vec<_> = report
        .cases
        .iter()
        .map(|case| {
            let figure = |value: f64| format!("{} {}", shown_figure(value), case.unit);
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
                case.mean.map(|mean| shown_mean(case, mean)).unwrap_or_default(),
            ]
        })
        .collect();
    let machine = &report.machine;
    // Without a mean in it the last column says nothing.
    let means = report.cases.iter().any(|case| case.mean.is_some());
    let header = ["CASE", "RUNS", "MEDIAN", "MIN", "P99", "MAX", "PEER", "RATIO", "MEAN (95 %)"];
    let header = &header[..header.len() - usize::from(!means)];
    let rows: Vec<_> = rows.into_iter().map(|row| row[..header.len()].to_vec()).collect();
    format!("{}\n{}", machine.line(), table(header, &rows))
}

/// A figure with as many places as it needs to be told from none.
fn shown_figure(value: f64) -> String {
    if value != 0.0 && value.abs() < 0.1 { format!("{value:.4}") } else { format!("{value:.2}") }
}

/// A mean with its confidence interval.
fn shown_mean(case: &Case, mean: f64) -> String {
    let (mean, unit) = (shown_figure(mean), case.unit);
    case.ci95.map_or_else(
        || format!("{mean} {unit}"),
        |[low, high]| format!("{mean} {unit} ({} … {})", shown_figure(low), shown_figure(high)),
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
    #[test]
    fn a_mean_comes_with_its_interval() {
        let mean = |figures: &[f64]| Case::of_mean("x", serde_json::Value::Null, "%", figures.to_vec());
        // Worked by hand: s² = 2.5, t(4) = 2.776, half = 2.776·√(2.5/5) = 1.963.
        let case = mean(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        let [low, high] = case.ci95.unwrap();
        assert!((low - 1.037).abs() < 1e-3 && (high - 4.963).abs() < 1e-3, "{low} … {high}");
        assert_eq!((case.mean, case.median), (Some(3.0), 3.0));
        assert_eq!((mean(&[7.0]).mean, mean(&[7.0]).ci95, mean(&[]).mean), (Some(7.0), None, None));
        let report = Report { machine: MachineInfo::here(), cases: vec![case] };
        assert!(show(&report).contains("3.00 % (1.04 … 4.96)"), "{}", show(&report));
        let report =
            Report { cases: vec![Case::of("y", serde_json::Value::Null, "ms", vec![1.0])], ..report };
        assert!(!show(&report).contains("MEAN"));
    }
}
