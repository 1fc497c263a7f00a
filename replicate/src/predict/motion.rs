//! Speed and direction, as in the paper: where a straight walk leaves the area in which this access point is nearest.
//!
//! A device hands over about where two access points are equally near, so a walk is a line through the midpoints of
//! the last pairs. Rays along it, spread by how uncertain a direction is, are followed to the first bisector between the
//! present access point and a neighbour: that neighbour is what the ray votes for, the more the better the distance
//! agrees with speed and time.

use super::visits::TRAIL;

/// Turns of the rays in radians, and their weights: a normal distribution of 0.45 rad.
const RAYS: [(f64, f64); 9] = [
    (0.0, 0.20),
    (0.16, 0.17),
    (-0.16, 0.17),
    (0.36, 0.12),
    (-0.36, 0.12),
    (0.62, 0.07),
    (-0.62, 0.07),
    (1.05, 0.04),
    (-1.05, 0.04),
];
/// A stay that long ends a walk, in seconds.
const PAUSE_S: f64 = 600.0;
/// Beyond that a coordinate is taken for nonsense, in metres.
const FARTHEST_M: f64 = 1e7;

/// A point or a vector, in metres.
pub type Point = [f64; 2];

/// A walk in a straight line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Walk {
    /// Where it was at the last handover.
    from: Point,
    /// Its direction, of length 1.
    heading: Point,
    /// Metres per second, where times tell.
    speed: Option<f64>,
}

/// A position that can be reckoned with.
pub fn sound(position_m: Point) -> Option<Point> {
    position_m.iter().all(|at| at.is_finite() && at.abs() <= FARTHEST_M).then_some(position_m)
}

/// Metres between two points.
pub fn distance(a: Point, b: Point) -> f64 {
    (a[0] - b[0]).hypot(a[1] - b[1])
}

fn dot(a: Point, b: Point) -> f64 {
    a[0] * b[0] + a[1] * b[1]
}

/// What the last arrivals tell of where the user is going: by the last two handovers, and by a line through up to five.
/// `trail`: access points' positions and when the user came there, in seconds, the present one last.
pub fn walks(trail: &[(Point, f64)]) -> [Option<Walk>; 2] {
    let mut midpoints: Vec<(Point, f64)> = Vec::with_capacity(TRAIL);
    for pair in trail.windows(2) {
        let ((before, came), (here, left)) = (pair[0], pair[1]);
        // In doubt a walk begins anew: after a pause, and where a clock was set back.
        if !(0.0..PAUSE_S).contains(&(left - came)) {
            midpoints.clear();
        }
        midpoints.push(([f64::midpoint(before[0], here[0]), f64::midpoint(before[1], here[1])], left));
    }
    let [.., (before, _), (here, _)] = trail else { return [None, None] };
    let Some(&(from, _)) = midpoints.last() else { return [None, None] };
    let between_aps = Walk::along(from, [here[0] - before[0], here[1] - before[1]], None);
    let [.., (first, began), (last, ended)] = midpoints[..] else { return [between_aps, between_aps] };
    let way = [last[0] - first[0], last[1] - first[1]];
    let speed = Some(dot(way, way).sqrt() / (ended - began));
    let short = Walk::along(last, way, speed).or(between_aps);
    [short, fitted(&midpoints).or(short)]
}

/// A line through midpoints by least squares over their times.
fn fitted(midpoints: &[(Point, f64)]) -> Option<Walk> {
    if midpoints.len() < 3 {
        return None;
    }
    let count = midpoints.len() as f64;
    let mean = |of: &dyn Fn(&(Point, f64)) -> f64| midpoints.iter().map(of).sum::<f64>() / count;
    let (x, y, t) = (mean(&|m| m.0[0]), mean(&|m| m.0[1]), mean(&|m| m.1));
    let spread = mean(&|m| (m.1 - t).powi(2));
    let velocity =
        [mean(&|m| (m.0[0] - x) * (m.1 - t)) / spread, mean(&|m| (m.0[1] - y) * (m.1 - t)) / spread];
    let since = midpoints.last()?.1 - t;
    let from = [x + velocity[0] * since, y + velocity[1] * since];
    Walk::along(from, velocity, Some(dot(velocity, velocity).sqrt()))
}

impl Walk {
    fn along(from: Point, way: Point, speed: Option<f64>) -> Option<Self> {
        let length = dot(way, way).sqrt();
        let heading = [way[0] / length, way[1] / length];
        let speed = speed.filter(|speed| speed.is_finite() && *speed > 0.01);
        let known = length > 1e-6 && heading.iter().chain(&from).all(|number| number.is_finite());
        known.then_some(Self { from, heading, speed })
    }

    /// Adds the votes of the rays for the places they lead to, to `votes`, which is as long as `around`; a vote for
    /// nowhere is lost. In all they are at most 1. With `elapsed_s`, the time since the last handover, by agreement.
    pub fn vote(&self, here: Point, around: &[Option<Point>], elapsed_s: Option<f64>, votes: &mut [f32]) {
        let expected = elapsed_s.zip(self.speed).map(|(elapsed, speed)| (elapsed.max(1.0) * speed).max(5.0));
        for (turn, weight) in RAYS {
            let (sine, cosine) = turn.sin_cos();
            let [x, y] = self.heading;
            let ray = [x * cosine - y * sine, x * sine + y * cosine];
            let Some((nearest, way)) = self.exit(ray, here, around) else { continue };
            let agreement = expected.map_or(1.0, |expected| {
                let off = ((way + 10.0) / (expected + 10.0)).ln() / 0.5;
                (-0.5 * off * off).exp()
            });
            if let Some(vote) = votes.get_mut(nearest) {
                #[expect(clippy::cast_possible_truncation, reason = "between 0 and 1")]
                let add = (weight * agreement) as f32;
                *vote += add;
            }
        }
    }

    /// The first bisector that a ray crosses, and after how many metres.
    fn exit(&self, ray: Point, here: Point, around: &[Option<Point>]) -> Option<(usize, f64)> {
        let mut first: Option<(usize, f64)> = None;
        for (index, place) in around.iter().enumerate() {
            let Some(place) = place else { continue };
            let across = [place[0] - here[0], place[1] - here[1]];
            let towards = dot(ray, across);
            if towards <= 1e-6 {
                continue;
            }
            let level = f64::midpoint(dot(*place, *place), -dot(here, here));
            let way = ((level - dot(self.from, across)) / towards).max(0.0);
            if first.is_none_or(|(_, shortest)| way < shortest) {
                first = Some((index, way));
            }
        }
        first
    }
}
