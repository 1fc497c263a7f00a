//! From paths to inodes.
//!
//! A walk starts in a directory and has a ceiling, which neither `..` nor a link leads out of. An absolute path, and
//! a link to one, leads on from the root, so only a walk whose ceiling that is can follow it.

use alloc::{rc::Rc, string::String, vec::Vec};

use super::{
    FileError, MAX_NAME, MAX_PATH,
    store::Number,
    tree::{Kind, Tree},
};

/// Links followed in one walk.
const MAX_LINKS: usize = 32;
/// Bytes of a path and of all links on its way.
const MAX_BYTES: usize = MAX_PATH * 2;

/// Makes `path` absolute from `base`, without `.` and `..`; links are not looked at.
pub fn resolve(base: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let base = if path.starts_with('/') { "" } else { base };
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let mut whole = String::from("/");
    whole.push_str(&parts.join("/"));
    whole
}

/// Where a path leads.
pub struct Found {
    /// The directory of its last name.
    pub directory: Number,
    /// Its last name; none where that is `.`, `..` or nothing, and so can be neither made nor removed.
    pub name: Option<String>,
    /// What is there.
    pub number: Option<Number>,
    /// It ends with a slash: what is there is a directory, or nothing.
    pub slash: bool,
}

impl Found {
    /// The inode.
    ///
    /// # Errors
    /// [`FileError::NotFound`].
    pub fn number(&self) -> Result<Number, FileError> {
        self.number.ok_or(FileError::NotFound)
    }

    /// The name to make, remove or move.
    ///
    /// # Errors
    /// `otherwise` for a path that ends in no name.
    pub fn name(&self, otherwise: FileError) -> Result<&str, FileError> {
        self.name.as_deref().ok_or(otherwise)
    }
}

/// What of a path is still to be walked: its parts, the next one last.
struct Rest {
    parts: Vec<Part>,
    links: usize,
    bytes: usize,
}

/// A part of a path, which may be a part of a link's target.
struct Part {
    path: Rc<str>,
    from: usize,
    to: usize,
}

impl Part {
    fn text(&self) -> &str {
        self.path.get(self.from..self.to).unwrap_or_default()
    }
}

impl Rest {
    fn push(&mut self, path: &Rc<str>) -> Result<(), FileError> {
        self.bytes += path.len();
        if path.len() > MAX_PATH || self.bytes > MAX_BYTES {
            return Err(FileError::NameTooLong);
        }
        let at = self.parts.len();
        let mut from = 0;
        for part in path.split('/') {
            let to = from + part.len();
            if !part.is_empty() {
                self.parts.push(Part { path: Rc::clone(path), from, to });
            }
            from = to + 1;
        }
        if let Some(new) = self.parts.get_mut(at..) {
            new.reverse();
        }
        Ok(())
    }
}

impl Tree {
    /// Walks `path` from the directory `start`, below `ceiling`. A last name that is a link is followed when `follow`
    /// says so, or a slash after it.
    pub fn walk(
        &self,
        (start, ceiling): (Number, Number),
        path: &str,
        follow: bool,
    ) -> Result<Found, FileError> {
        if self.mounting {
            return Err(FileError::NotReady);
        }
        if path.is_empty() || path.contains('\0') {
            return Err(if path.is_empty() { FileError::NotFound } else { FileError::Invalid });
        }
        let free = ceiling == self.root();
        let start = if path.starts_with('/') { ceiling } else { start };
        if path.starts_with('/') && !free {
            return Err(FileError::Outside);
        }
        let mut slash = path.ends_with('/');
        let mut rest = Rest { parts: Vec::new(), links: 0, bytes: 0 };
        rest.push(&Rc::from(path))?;
        let mut at = start;
        let mut found = Found { directory: start, name: None, number: Some(start), slash };
        while let Some(part) = rest.parts.pop() {
            let last = rest.parts.is_empty();
            if self.kind(at)? != Kind::Directory {
                return Err(FileError::NotDirectory);
            }
            let next = match part.text() {
                "." => at,
                ".." if at == ceiling => return Err(FileError::Outside),
                ".." => self.parent(at)?,
                name if name.len() > MAX_NAME => return Err(FileError::NameTooLong),
                name => {
                    let number = self.find(at, name)?;
                    let link = match number {
                        Some(number) => self.kind(number)? == Kind::Link && (!last || follow || slash),
                        None => false,
                    };
                    if let (Some(number), true) = (number, link) {
                        rest.links += 1;
                        if rest.links > MAX_LINKS {
                            return Err(FileError::Loop);
                        }
                        let target = self.target(number)?;
                        if target.starts_with('/') {
                            if !free {
                                return Err(FileError::Outside);
                            }
                            at = self.root();
                        }
                        slash |= last && target.ends_with('/');
                        rest.push(&target)?;
                        found = Found { directory: at, name: None, number: Some(at), slash };
                        continue;
                    }
                    found = Found { directory: at, name: Some(String::from(name)), number, slash };
                    match number {
                        Some(number) => at = number,
                        None if last => return Ok(found),
                        None => return Err(FileError::NotFound),
                    }
                    continue;
                }
            };
            at = next;
            found = Found { directory: at, name: None, number: Some(at), slash };
        }
        if found.slash && self.kind(found.number()?)? != Kind::Directory {
            return Err(FileError::NotDirectory);
        }
        Ok(found)
    }
}
