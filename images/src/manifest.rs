//! `image.toml`: what an image is made of, in words.
//!
//! ```toml
//! name = "default"
//! memory = "64MiB"                  # at least; a host's own [image] memory counts where it is larger
//! disk = "0"
//! files = "files"                   # this directory's content is the machine's tree
//!
//! [[program]]
//! name = "hello"
//! wasm = "hello.wasm"               # without it: the program of that name in the default image
//! aliases = ["hi"]
//!
//! [[service]]
//! name = "hello"
//! program = "hello"
//! arguments = ["--for-ever"]
//! environment = ["LANG=C"]
//! restart = "on-failure"            # never | on-failure | always
//! memory = "16MiB"
//!
//! [limits]
//! processes = 64
//! process_memory = "32MiB"
//! ```

use std::collections::BTreeSet;

use kage_machine::{Geometry, page::GeometryError};
use serde::{Deserialize, Serialize};

/// Most programs, aliases included.
const PROGRAMS: usize = 512;
/// Most services.
const SERVICES: usize = 64;
/// Longest name.
const NAME: usize = 64;
/// Longest argument list of a service, and environment.
const WORDS: usize = 4096;

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is no TOML, a field is unknown or missing, or has the wrong type.
    #[error("image.toml: {0}")]
    Toml(#[from] toml::de::Error),
    /// A field's value cannot be.
    #[error("image.toml: {field}: {reason}")]
    Value {
        /// The field.
        field: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

/// What an image is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name of the image.
    pub name: String,
    /// Bytes of memory a machine needs at least.
    #[serde(default = "default_memory", with = "size")]
    pub memory: u64,
    /// Bytes of its disk.
    #[serde(default, with = "size")]
    pub disk: u64,
    /// Directory beside the manifest whose content is the machine's tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<String>,
    /// Programs.
    #[serde(default, rename = "program", skip_serializing_if = "Vec::is_empty")]
    pub programs: Vec<Program>,
    /// Programs started with the machine.
    #[serde(default, rename = "service", skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
    /// Bounds for its processes.
    #[serde(default)]
    pub limits: Limits,
}

/// A program of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// What the shell calls it.
    pub name: String,
    /// Its WebAssembly module, beside the manifest; none: the program of that name in the default image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wasm: Option<String>,
    /// Further names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

/// A program started with the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Which program.
    pub program: String,
    /// Its arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// `NAME=value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
    /// When it is started again.
    #[serde(default)]
    pub restart: Restart,
    /// Most bytes of memory; none: as any process.
    #[serde(default, with = "optional_size", skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
}

/// When a service is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Not at all.
    Never,
    /// When it ended with another exit code than 0, or was killed.
    #[default]
    OnFailure,
    /// Whenever it ended.
    Always,
}

/// Bounds for an image's processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Most at a time; none: the machine's own bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    /// Most bytes of memory of one; none: the machine's own bound.
    #[serde(default, with = "optional_size", skip_serializing_if = "Option::is_none")]
    pub process_memory: Option<u64>,
}

fn default_memory() -> u64 {
    64 << 20
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// [`ManifestError`], with the line for what TOML finds wrong.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let manifest: Self = toml::from_str(text)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Names of all programs, first names and aliases.
    pub fn program_names(&self) -> impl Iterator<Item = &str> {
        self.programs.iter().flat_map(|program| {
            std::iter::once(program.name.as_str()).chain(program.aliases.iter().map(String::as_str))
        })
    }

    /// The page space that a machine needs at least.
    ///
    /// # Errors
    /// [`GeometryError`] for sizes that no machine has.
    pub fn geometry(&self) -> Result<Geometry, GeometryError> {
        Geometry::from_bytes(self.memory, self.disk)
    }

    fn check(&self) -> Result<(), ManifestError> {
        let refuse = |field: &str, reason: String| Err(ManifestError::Value { field: field.into(), reason });
        name("name", &self.name)?;
        if let Err(error) = self.geometry() {
            let field = match error {
                GeometryError::Memory { .. } => "memory",
                GeometryError::Disk { .. } => "disk",
            };
            return refuse(field, error.to_string());
        }
        if self.program_names().count() > PROGRAMS {
            return refuse("program", format!("more than {PROGRAMS} names"));
        }
        let mut names = BTreeSet::new();
        for program in self.program_names() {
            name("program", program)?;
            if !names.insert(program) {
                return refuse("program", format!("{program:?} is there twice"));
            }
        }
        if self.services.len() > SERVICES {
            return refuse("service", format!("more than {SERVICES}"));
        }
        let mut services = BTreeSet::new();
        for service in &self.services {
            name("service", &service.name)?;
            if !services.insert(&service.name) {
                return refuse("service", format!("{:?} is there twice", service.name));
            }
            if !names.contains(service.program.as_str()) {
                return refuse(
                    "service",
                    format!("{}: no program {:?}; add a [[program]]", service.name, service.program),
                );
            }
            for (field, words) in [("arguments", &service.arguments), ("environment", &service.environment)] {
                if words.iter().map(|word| word.len() + 1).sum::<usize>() > WORDS {
                    return refuse(field, format!("{}: longer than {WORDS} bytes", service.name));
                }
                if words.iter().any(|word| word.contains('\0')) {
                    return refuse(field, format!("{}: a zero byte", service.name));
                }
            }
            if service.environment.iter().any(|word| !word.contains('=')) {
                return refuse("environment", format!("{}: NAME=value is wanted", service.name));
            }
        }
        if self.limits.processes == Some(0) {
            return refuse("limits.processes", "at least 1".into());
        }
        if self.limits.process_memory == Some(0) {
            return refuse(
                "limits.process_memory",
                "no process runs in none; leave it away for no bound".into(),
            );
        }
        if let Some(service) = self.services.iter().find(|service| service.memory == Some(0)) {
            let reason = format!("{}: no process runs in none; leave it away for no bound", service.name);
            return refuse("service.memory", reason);
        }
        Ok(())
    }
}

/// Refuses what is no name of an image, program or service: it may be part of paths.
fn name(field: &str, name: &str) -> Result<(), ManifestError> {
    let good = |at: char| at.is_ascii_alphanumeric() || "-_.+[".contains(at);
    if (1..=NAME).contains(&name.len()) && name.chars().all(good) && !name.starts_with(['.', '-']) {
        return Ok(());
    }
    let reason = format!("{name:?} is no name: 1 to {NAME} letters, digits, and - _ . + within");
    Err(ManifestError::Value { field: field.into(), reason })
}

/// Sizes are numbers with a unit: `64MiB`.
mod size {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

    pub fn parse(text: &str) -> Option<u64> {
        if text == "0" {
            return Some(0);
        }
        let (unit, factor) = UNITS.iter().find(|(unit, _)| text.ends_with(unit))?;
        text.strip_suffix(unit)?.trim().parse::<u64>().ok()?.checked_mul(*factor)
    }

    pub fn text(bytes: u64) -> String {
        let fits = |(_, factor): &&(&str, u64)| bytes > 0 && bytes.is_multiple_of(*factor);
        UNITS
            .iter()
            .find(fits)
            .map_or_else(|| bytes.to_string(), |(unit, factor)| format!("{}{unit}", bytes / factor))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        parse(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no size, as \"64MiB\" is")))
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub fn serialize<S: Serializer>(bytes: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&text(*bytes))
    }
}

mod optional_size {
    use serde::{Deserializer, Serializer};

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        super::size::deserialize(from).map(Some)
    }

    #[expect(clippy::ref_option, reason = "serde's signature")]
    pub fn serialize<S: Serializer>(bytes: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => super::size::serialize(bytes, to),
            None => to.serialize_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_reads_as_it_was_written() {
        let text = include_str!("../default/image.toml");
        let manifest = Manifest::parse(text).unwrap();
        let again = toml::to_string(&manifest).unwrap();
        assert_eq!(Manifest::parse(&again).unwrap(), manifest);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_field() {
        for (text, named) in [
            ("", "name"),
            ("name = 'a/b'", "a/b"),
            ("name = 'a'\nmemory = '1MiB'", "memory"),
            ("name = 'a'\nmemory = '65MiB'", "multiple of 2MiB"),
            ("name = 'a'\ndisk = '3GiB'", "disk"),
            ("name = 'a'\ndisk = '1KiB'", "multiple of 4KiB"),
            ("name = 'a'\nmemory = '64M'", "64M"),
            ("name = 'a'\ncolour = 1", "colour"),
            ("name = 'a'\n[[program]]\nname = 'x'\naliases = ['x']", "twice"),
            ("name = 'a'\n[[service]]\nname = 'x'\nprogram = 'y'", "no program"),
            (
                "name = 'a'\n[[program]]\nname='y'\n[[service]]\nname='x'\nprogram='y'\nenvironment=['A']",
                "NAME=value",
            ),
            ("name = 'a'\n[limits]\nprocesses = 0", "limits.processes"),
            ("name = 'a'\n[limits]\nprocess_memory = '0'", "limits.process_memory"),
            (
                "name = 'a'\n[[program]]\nname='y'\n[[service]]\nname='x'\nprogram='y'\nmemory='0B'",
                "service.memory",
            ),
        ] {
            let error = Manifest::parse(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
