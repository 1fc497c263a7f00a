//! Reads traces of roaming: access points as `ap,host,x_m,y_m`, and rows `t_s,user,ap` in time order.
//!
//! Names are any text; they are numbered here, so that the predictor meets well-formed ones. A site that does not make
//! sense is refused with file and line. A trace may have holes: rows that do not make sense are left out and counted.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use kage_machine::{HostName, identity::ApName};
use kage_replicate::predict::{
    Place,
    trial::{Ap, Event, Site},
};
use serde::Serialize;

use crate::client::Failure;

/// Longest line that is read.
const LINE: u64 = 1024;
/// Most access points.
const APS: usize = 65_536;
/// Most users.
const USERS: usize = 5_000_000;
/// Largest time, in seconds.
const LATEST_S: f64 = 1e11;
/// Problems that are told with their lines.
const TOLD: usize = 5;

/// The access points of a trace.
#[derive(Debug)]
pub struct Aps {
    /// As the predictors see them.
    pub site: Site,
    numbers: BTreeMap<String, Ap>,
}

/// What was found in a trace.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Found {
    /// Rows in all.
    pub rows: u64,
    /// Users.
    pub users: usize,
    /// Rows that are none.
    pub junk: u64,
    /// Rows whose time lies before that of a row above.
    pub out_of_order: u64,
    /// Rows at an access point that the site does not have: the user is nowhere until the next row.
    pub unknown_aps: u64,
    /// The first of these, with file and line.
    pub problems: Vec<String>,
}

/// A trace, row by row.
pub struct Trace<'a> {
    lines: Lines,
    aps: &'a Aps,
    users: HashMap<String, u32>,
    latest_ms: u64,
    /// What was found so far.
    pub found: Found,
}

/// Lines of a file, numbered from 1.
struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    number: u64,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, Failure> {
        let failed = |error| Failure::new(format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), number: 0 })
    }

    /// The next line; `Some(None)` where it is too long or not text.
    fn next_line(&mut self) -> Result<Option<Option<String>>, Failure> {
        let failed = |path: &Path, error| Failure::new(format!("{}: {error}", path.display()));
        let mut line = Vec::new();
        let read = self.file.by_ref().take(LINE).read_until(b'\n', &mut line);
        if read.map_err(|error| failed(&self.path, error))? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let whole = line.ends_with(b"\n") || (line.len() as u64) < LINE;
        if !whole {
            self.file.skip_until(b'\n').map_err(|error| failed(&self.path, error))?;
        }
        Ok(Some(String::from_utf8(line).ok().filter(|_| whole)))
    }

    fn at(&self, problem: &str) -> String {
        format!("{}:{}: {problem}", self.path.display(), self.number)
    }
}

/// The cells of a line that has exactly so many; none of an empty line.
fn cells<const N: usize>(line: &str) -> Option<[&str; N]> {
    let cells: Vec<&str> = line.trim_end_matches(['\r', '\n']).split(',').map(str::trim).collect();
    cells.try_into().ok()
}

impl Aps {
    /// Reads access points.
    ///
    /// # Errors
    /// The file's, and any line that is not `ap,host,x_m,y_m` with a new name and finite coordinates.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let mut lines = Lines::open(path)?;
        let (mut numbers, mut hosts) = (BTreeMap::new(), BTreeMap::new());
        let mut aps: Vec<(ApName, Place)> = Vec::new();
        while let Some(line) = lines.next_line()? {
            let line = line.unwrap_or_else(|| ",".to_owned());
            if line.trim().is_empty() || (lines.number == 1 && line.starts_with("ap,host")) {
                continue;
            }
            let refused = |problem: &str| Failure::new(lines.at(problem));
            let Some([ap, host, x, y]) = cells(&line) else {
                return Err(refused("a line is `ap,host,x_m,y_m`"));
            };
            if ap.is_empty() || ap == "-" || host.is_empty() {
                return Err(refused("an access point and its host need names, and `-` is none"));
            }
            let metres = |cell: &str| cell.parse::<f64>().ok().filter(|at| at.is_finite());
            let Some(position_m) = metres(x).zip(metres(y)).map(|(x, y)| [x, y]) else {
                return Err(refused("coordinates are numbers of metres"));
            };
            if aps.len() == APS {
                return Err(refused(&format!("there may be {APS} access points")));
            }
            let next = hosts.len();
            let host = *hosts.entry(host.to_owned()).or_insert(next);
            let name: ApName = format!("ap-{}", aps.len()).parse().map_err(Failure::new)?;
            let host: HostName = format!("h-{host}").parse().map_err(Failure::new)?;
            let number = Ap::try_from(aps.len()).map_err(Failure::new)?;
            if numbers.insert(ap.to_owned(), number).is_some() {
                return Err(refused("this access point is there already; remove one of the lines"));
            }
            aps.push((name, Place { host, position_m }));
        }
        if aps.is_empty() {
            return Err(Failure::new(format!(
                "{}: no access points; lines are `ap,host,x_m,y_m`",
                path.display()
            )));
        }
        Ok(Self { site: Site::new(aps), numbers })
    }
}

impl<'a> Trace<'a> {
    /// Opens a trace.
    ///
    /// # Errors
    /// The file's.
    pub fn open(path: &Path, aps: &'a Aps) -> Result<Self, Failure> {
        let lines = Lines::open(path)?;
        Ok(Self { lines, aps, users: HashMap::new(), latest_ms: 0, found: Found::default() })
    }

    /// The next thing that happened.
    ///
    /// # Errors
    /// The file's; more users than can be held.
    pub fn next_event(&mut self) -> Result<Option<Event>, Failure> {
        while let Some(line) = self.lines.next_line()? {
            let blank = line.as_ref().is_some_and(|line| line.trim().is_empty());
            let header = self.lines.number == 1 && line.as_ref().is_some_and(|line| line.starts_with("t_s,"));
            if blank || header {
                continue;
            }
            self.found.rows += 1;
            match line.as_deref().and_then(row) {
                None => {
                    self.found.junk += 1;
                    self.tell("no row; rows are `t_s,user,ap`");
                }
                Some((at_ms, ..)) if at_ms < self.latest_ms => {
                    self.found.out_of_order += 1;
                    self.tell("a time before that of a row above");
                }
                Some((at_ms, user, ap)) => {
                    self.latest_ms = at_ms;
                    let user = self.user(user)?;
                    let known = self.aps.numbers.get(ap).copied();
                    if known.is_none() && ap != "-" {
                        self.found.unknown_aps += 1;
                        self.tell("an access point that is not among the site's");
                    }
                    return Ok(Some(Event { at_ms, user, ap: known }));
                }
            }
        }
        Ok(None)
    }

    fn user(&mut self, name: &str) -> Result<u32, Failure> {
        if let Some(&user) = self.users.get(name) {
            return Ok(user);
        }
        if self.users.len() == USERS {
            return Err(Failure::new(self.lines.at(&format!("there may be {USERS} users; split the trace"))));
        }
        let user = u32::try_from(self.users.len()).map_err(Failure::new)?;
        self.users.insert(name.to_owned(), user);
        self.found.users = self.users.len();
        Ok(user)
    }

    fn tell(&mut self, problem: &str) {
        if self.found.problems.len() < TOLD {
            self.found.problems.push(self.lines.at(problem));
        }
    }
}

/// Time in milliseconds, user and access point of a row.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "held between 0 and the latest")]
fn row(line: &str) -> Option<(u64, &str, &str)> {
    let [at_s, user, ap] = cells(line)?;
    let at_s: f64 = at_s.parse().ok()?;
    let sound = (0.0..=LATEST_S).contains(&at_s) && !user.is_empty() && !ap.is_empty();
    sound.then_some(((at_s * 1000.0).round() as u64, user, ap))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kage-trace-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn a_site_that_makes_no_sense_is_refused_with_its_line() {
        for (text, line) in [
            ("ap,host,x_m,y_m\na,h,0,0\na,h,1,1\n", ":3: "),
            ("a,h,0\n", ":1: "),
            ("a,h,0,0\nb,h,NaN,0\n", ":2: "),
            ("a,h,0,inf\n", ":1: "),
            ("-,h,0,0\n", ":1: "),
            ("", "no access points"),
        ] {
            let path = file("aps", text.as_bytes());
            let message = Aps::read(&path).unwrap_err().message;
            std::fs::remove_file(&path).unwrap();
            assert!(message.contains(line), "{text:?}: {message}");
        }
    }

    #[test]
    fn rows_that_make_no_sense_are_left_out_and_counted() {
        let path = file("site", b"ap,host,x_m,y_m\r\nA 1,h,0,0\r\nB:2,h,50,0\r\n");
        let aps = Aps::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut text =
            b"t_s,user,ap\n1,u,A 1\n2.5,u,B:2\n\xff\xfe\nx,u,A 1\n2,u,A 1\nNaN,u,A 1\n-1,u,A 1\n3,v,C\n4,u\n"
                .to_vec();
        text.extend(vec![b'x'; 5000]);
        text.extend(b"\n5,u,-\n6,v,A 1");
        let path = file("trace", &text);
        let mut trace = Trace::open(&path, &aps).unwrap();
        let mut events = Vec::new();
        while let Some(event) = trace.next_event().unwrap() {
            events.push((event.at_ms, event.user, event.ap));
        }
        std::fs::remove_file(&path).unwrap();
        let expected =
            [(1000, 0, Some(0)), (2500, 0, Some(1)), (3000, 1, None), (5000, 0, None), (6000, 1, Some(0))];
        assert_eq!(events, expected);
        let found = trace.found;
        assert_eq!((found.rows, found.users), (12, 2));
        assert_eq!((found.junk, found.out_of_order, found.unknown_aps), (6, 1, 1));
        assert!(found.problems[0].ends_with(":4: no row; rows are `t_s,user,ap`"), "{:?}", found.problems);
        assert_eq!(found.problems.len(), TOLD);
    }
}
