//! Plots as SVG text: a few series over named places, on a logarithmic scale. Pure.

use std::fmt::Write;

use super::html::escape;

/// Size of a plot, and of what stands around its field.
const WIDTH: f64 = 440.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 34.0;
/// Smaller figures are drawn there: a logarithm has no place for nothing.
const LEAST: f64 = 0.01;

/// What a plot shows at one place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// The place, by number.
    pub place: usize,
    /// Middle figure.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

/// Figures of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// What they are.
    pub name: String,
    /// Drawn in this of the page's colours, from 1.
    pub colour: usize,
    /// Whether it is somebody else's.
    pub dashed: bool,
    /// In order of their places.
    pub points: Vec<Point>,
}

/// A plot of series over places; a place at which one has no figure interrupts its line.
pub fn plot(places: &[String], unit: &str, series: &[Series]) -> String {
    let scale = Scale::over(series);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        escape(&series.iter().map(|series| series.name.as_str()).collect::<Vec<_>>().join(", "))
    );
    for decade in scale.low..=scale.high {
        let (y, label) = (scale.y(10_f64.powi(decade)), label(decade));
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label} {}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 3.5,
            escape(unit),
        );
    }
    for (place, name) in places.iter().enumerate() {
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(place, places.len()),
            HEIGHT - BOTTOM + 18.0,
            escape(name)
        );
    }
    for series in series {
        draw(&mut svg, series, &scale, places.len());
    }
    svg.push_str("</svg>");
    svg
}

fn draw(svg: &mut String, series: &Series, scale: &Scale, places: usize) {
    let at = |point: &Point| (x(point.place, places), scale.y(point.median));
    let dash = if series.dashed { " dashed" } else { "" };
    for pair in series.points.windows(2).filter(|pair| pair[1].place == pair[0].place + 1) {
        let ((x1, y1), (x2, y2)) = (at(&pair[0]), at(&pair[1]));
        let _ = write!(
            svg,
            "<line class=\"line c{}{dash}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>",
            series.colour
        );
    }
    for point in &series.points {
        let (x, y) = at(point);
        let _ = write!(
            svg,
            "<g class=\"c{}\"><line class=\"range\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
             <circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"><title>{}: {} ({} … {})</title></circle></g>",
            series.colour,
            scale.y(point.min),
            scale.y(point.max),
            escape(&series.name),
            figure(point.median),
            figure(point.min),
            figure(point.max),
        );
    }
}

fn x(place: usize, places: usize) -> f64 {
    let step = (WIDTH - LEFT - RIGHT) / places.max(1) as f64;
    LEFT + step * (place as f64 + 0.5)
}

/// Whole decades that hold all figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    low: i32,
    high: i32,
}

impl Scale {
    fn over(series: &[Series]) -> Self {
        let points = || series.iter().flat_map(|series| &series.points);
        let low = points().map(|point| point.min.max(LEAST)).fold(f64::INFINITY, f64::min);
        let high = points().map(|point| point.max.max(LEAST)).fold(LEAST, f64::max);
        let low = if low.is_finite() { low.log10().floor() as i32 } else { 0 };
        Self { low, high: (high.log10().ceil() as i32).max(low + 1) }
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value.max(LEAST).log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        HEIGHT - BOTTOM - share.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
    }
}

fn label(decade: i32) -> String {
    if decade < 0 {
        format!("{:.*}", decade.unsigned_abs() as usize, 10_f64.powi(decade))
    } else {
        format!("{:.0}", 10_f64.powi(decade))
    }
}

/// A figure with about three digits.
pub fn figure(value: f64) -> String {
    match value.abs() {
        small if small < 1.0 => format!("{value:.3}"),
        small if small < 10.0 => format!("{value:.2}"),
        small if small < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: &[(usize, f64)]) -> Series {
        let points = points.iter().map(|&(place, median)| Point {
            place,
            median,
            min: median / 2.0,
            max: median * 2.0,
        });
        Series { name: "total <ms>".to_owned(), colour: 1, dashed: false, points: points.collect() }
    }

    #[test]
    fn a_scale_holds_all_figures_in_whole_decades() {
        assert_eq!(Scale::over(&[series(&[(0, 3.0), (1, 4000.0)])]), Scale { low: 0, high: 4 });
        assert_eq!(Scale::over(&[series(&[(0, 0.0)])]), Scale { low: -2, high: -1 });
        assert_eq!(Scale::over(&[]), Scale { low: 0, high: 1 });
        let scale = Scale { low: 0, high: 2 };
        assert!(scale.y(100.0) < scale.y(10.0) && scale.y(10.0) < scale.y(1.0));
        assert!((scale.y(100.0) - TOP).abs() < 1e-9 && (scale.y(0.0) - (HEIGHT - BOTTOM)).abs() < 1e-9);
    }

    #[test]
    fn a_line_is_interrupted_where_a_figure_is_missing() {
        let places = ["a", "b", "c", "<d>"].map(str::to_owned);
        let svg = plot(&places, "ms", &[series(&[(0, 1.0), (1, 2.0), (3, 3.0)])]);
        assert_eq!(svg.matches("class=\"line c1\"").count(), 1);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("&lt;d&gt;") && !svg.contains("<d>") && !svg.contains("<ms>"));
    }

    #[test]
    fn figures_have_about_three_digits() {
        let shown = [0.1234, 1.234, 12.34, 1234.5].map(figure);
        assert_eq!(shown, ["0.123", "1.23", "12.3", "1234"]);
        assert_eq!([label(-2), label(0), label(3)], ["0.01", "1", "1000"]);
    }
}
