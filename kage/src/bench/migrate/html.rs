//! `--report`: one page that holds all of a run, and loads nothing from anywhere.

use std::fmt::Write;

use super::{
    MigrateReport,
    chart::{Point, Series, figure, plot},
    figures::{self, Row},
    matrix::{Axis, BASE},
    paper,
};
use crate::bench::Case;

/// Text as it stands between tags and within quotes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for at in text.chars() {
        match at {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Figures that are plotted over each property.
const PLOTTED: [&str; 4] = ["total", "gap", "client gap", "stall"];

/// The page. `rerun` is the command line.
pub fn page(report: &MigrateReport, rows: &[Row], rerun: &str) -> String {
    let machine = &report.report.machine;
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>kage bench migrate</title><style>{STYLE}</style></head><body>\n\
         <h1>kage bench migrate</h1>\n\
         <p>{}, {} MiB of memory. Both hosts and the device are network namespaces of this machine and share its \
         processors.</p>\n<p>Again: <code>{}</code></p>\n<p>{}</p>\n",
        escape(&machine.line()),
        machine.memory_bytes >> 20,
        escape(rerun),
        escape(MEANING),
    );
    page.push_str("<h2>Cases</h2>\n");
    let (header, cells) = figures::cells(rows);
    write_table(&mut page, &header, &cells);
    plots(&mut page, rows);
    if !report.paper.is_empty() {
        page.push_str(
            "<h2>Beside the paper's tables 3 and 4</h2>\n<p>Theirs are estimates, ours medians.</p>\n",
        );
        write_table(&mut page, &paper::HEADER, &paper::show(&report.paper));
    }
    page.push_str("<h2>All figures</h2>\n");
    let cells: Vec<_> = report.report.cases.iter().map(all_of).collect();
    write_table(&mut page, &["CASE", "RUNS", "MEDIAN", "MIN", "MAX", "PEER", "RATIO"], &cells);
    page.push_str("</body></html>\n");
    page
}

fn all_of(case: &Case) -> Vec<String> {
    let shown = |value: f64| format!("{} {}", figure(value), case.unit);
    vec![
        case.name.clone(),
        case.runs.to_string(),
        shown(case.median),
        shown(case.min),
        shown(case.max),
        case.peer.as_ref().map(|peer| format!("{} {}", peer.name, shown(peer.median))).unwrap_or_default(),
        case.ratio.map(figure).unwrap_or_default(),
    ]
}

/// A plot for each property of which at least two places were played with all others as in the base case.
fn plots(page: &mut String, rows: &[Row]) {
    let mut drawn = String::new();
    for axis in Axis::ALL {
        let varied = axis.varied();
        let found: Vec<_> = varied.iter().map(|kind| rows.iter().find(|row| row.kind == *kind)).collect();
        if found.iter().flatten().filter(|row| !row.played.moves.is_empty()).count() < 2 {
            continue;
        }
        let places: Vec<_> = varied.iter().map(|kind| axis.of(kind)).collect();
        let series = series(&found);
        let _ = writeln!(
            drawn,
            "<figure><figcaption>{}</figcaption>{}</figure>",
            escape(axis.name()),
            plot(&places, "ms", &series)
        );
    }
    if drawn.is_empty() {
        return;
    }
    let _ = write!(page, "<h2>One property varied</h2>\n<p>All others as in {}.", escape(&BASE.name()));
    for (number, name) in PLOTTED.iter().enumerate() {
        let _ = write!(page, " <span class=\"key c{}\">{}</span>", number + 1, escape(name));
    }
    let _ = writeln!(
        page,
        "; dashed: the peer. A mark is a median, the line through it goes from the least to the most.</p>\n<div class=\"plots\">\n{drawn}</div>"
    );
}

fn series(found: &[Option<&Row>]) -> Vec<Series> {
    let points = |figures: &dyn Fn(&Row) -> Vec<f64>| -> Vec<Point> {
        let of = |(place, row): (usize, &Option<&Row>)| {
            let all = figures((*row)?);
            let case = (!all.is_empty()).then(|| Case::of("", serde_json::Value::Null, "", all))?;
            Some(Point { place, median: case.median, min: case.min, max: case.max })
        };
        found.iter().enumerate().filter_map(of).collect()
    };
    let both = PLOTTED.iter().enumerate().flat_map(|(number, name)| {
        let ours = points(&|row| row.all(name));
        let theirs = points(&|row| row.peer(name).map(|peer| peer.figures.clone()).unwrap_or_default());
        let of = |name: String, dashed, points| Series { name, colour: number + 1, dashed, points };
        [of((*name).to_owned(), false, ours), of(format!("{name} of the peer"), true, theirs)]
    });
    both.filter(|series| !series.points.is_empty()).collect()
}

fn write_table(page: &mut String, header: &[&str], rows: &[Vec<String>]) {
    page.push_str("<div class=\"wide\"><table><tr>");
    for cell in header {
        let _ = write!(page, "<th>{}</th>", escape(cell));
    }
    page.push_str("</tr>\n");
    for row in rows {
        page.push_str("<tr>");
        for cell in row {
            let _ = write!(page, "<td>{}</td>", escape(cell));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
}

const MEANING: &str = "A case is a machine that rewrites so many pages a second of a share of its memory, moved over a \
    link of that rate to a host that holds nothing of it (none), what it left there (old) or a mirror in step (fresh). \
    Total: from the request to the last page at the target. Gap: the machine's own longest heartbeat gap over that time \
    and a second more; client gap: the longest silence of a 1 kHz probe at the user's device over the same time. Floor: \
    the bytes sent over the bandwidth, plus the delay, plus 0.4 ms for the switch itself. A peer has no mirrors: it begins with \
    nothing wherever that stands beside a case. Each of its figures is by the setting that is best for it, which can be \
    another for total and gap. Its guest never idles, its stream is not encrypted, and its bytes are counted with the \
    network's headers, ours before encryption.";

const STYLE: &str = ":root{--bg:#fff;--fg:#1d2125;--dim:#666e76;--grid:#d9dde1;--1:#1b66c9;--2:#c2410c;--3:#0d7d5a;--4:#8a3fa8}\
    @media(prefers-color-scheme:dark){:root{--bg:#15181b;--fg:#e4e7ea;--dim:#98a1a9;--grid:#343a40;--1:#6aa9ff;--2:#ff9a62;\
    --3:#4fd0a2;--4:#d493ee}}\
    body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}\
    table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}\
    th,td{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--grid);white-space:nowrap}\
    td:last-child{white-space:normal}th{color:var(--dim);font-weight:600}.wide{overflow-x:auto}\
    .plots{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:27rem;max-width:100%}figcaption{font-weight:600}\
    svg{width:100%}.tick{font-size:10px;fill:var(--dim)}.grid{stroke:var(--grid)}.line{stroke-width:2}.dashed{stroke-dasharray:5 4}\
    .c1{stroke:var(--1);color:var(--1)}.c2{stroke:var(--2);color:var(--2)}.c3{stroke:var(--3);color:var(--3)}\
    .c4{stroke:var(--4);color:var(--4)}g circle{fill:currentColor}.key{font-weight:600;margin-left:.6rem}code{font-size:13px}";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        MachineInfo, Report,
        migrate::{
            figures::{Failed, tests::row},
            matrix::{Kind, Work},
        },
    };

    fn report(rows: &[Row]) -> MigrateReport {
        let cases = rows.iter().flat_map(Row::cases).collect();
        MigrateReport {
            report: Report { machine: MachineInfo::here(), cases },
            failed: rows.iter().filter_map(Row::failed).collect::<Vec<Failed>>(),
            paper: paper::lines(rows),
            moves: Vec::new(),
        }
    }

    #[test]
    fn nothing_of_a_text_is_markup() {
        assert_eq!(escape("a<b>&\"c\"'d'"), "a&lt;b&gt;&amp;&quot;c&quot;&#39;d&#39;");
    }

    #[test]
    fn a_page_holds_everything_and_loads_nothing() {
        let busy = Kind { work: Work { writes_per_s: 5_000, ..BASE.work }, ..BASE };
        let mut failed = row(busy, &[]);
        failed.played.failure = Some(crate::client::Failure::new("<script>alert(1)</script>"));
        let rows = [row(BASE, &[(4_000.0, 9.0)]), failed];
        let text = page(&report(&rows), &rows, "kage bench migrate --case '<x>'");
        assert!(!text.contains("<script") && text.contains("&lt;script&gt;alert(1)"));
        assert!(text.contains("--case &#39;&lt;x&gt;&#39;"));
        assert!(!text.contains("http:") && !text.contains("https:") && !text.contains("url("));
        assert!(!text.contains("<figure>"), "one place is no plot");
        assert!(text.contains("tables 3 and 4"));
        let rows = [row(BASE, &[(4_000.0, 9.0)]), row(busy, &[(6_000.0, 30.0)])];
        let text = page(&report(&rows), &rows, "kage bench migrate");
        assert_eq!(text.matches("<figure>").count(), 1);
    }
}
