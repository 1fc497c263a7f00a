//! The daemon's configuration: `host.toml`, read and checked once.
//!
//! Every component is handed its own small part. What cannot be meant (an unknown key, a bare number,
//! an access point twice) is refused at start, with file, line and cure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use kage_machine::{Geometry, HostName, SitePrefix, UserName, identity::ApName, page::GeometryError};
use serde::Deserialize;
use toml::Spanned;

use crate::units::{Rate, Size, Span};

mod subnet;

pub use subnet::{Ipv4Pool, Subnet};

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}; give the path of a host.toml (`kage init` writes a sample)", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Something in it cannot be meant.
    #[error("{}:{line}: {message}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What, and what to do.
        message: String,
    },
}

/// A whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[host]`.
    pub host: Host,
    /// `[api]`.
    pub api: Api,
    /// `[peer]`.
    pub peer: Peer,
    /// `[cluster]`.
    pub cluster: Cluster,
    /// `[network]`.
    pub network: Network,
    /// `[image]`.
    pub image: Image,
    /// `[[user]]`.
    pub users: Vec<User>,
    /// `[migrate]`.
    pub migrate: Migrate,
    /// `[replicate]`.
    pub replicate: Replicate,
    /// `dwell` of `[roam]`: how long a user stays where ping-pong leads to before the machine follows.
    pub dwell: Span,
    /// `[roam.radius]`, absent: no listener.
    pub radius: Option<Radius>,
    /// `[[ap]]`.
    pub aps: Vec<Ap>,
    /// `[telemetry]`.
    pub telemetry: Telemetry,
}

/// Who this host is and where it keeps things.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name, as in its certificate.
    pub name: HostName,
    /// What outlives a restart of the machine.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Sockets.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
}

/// The API beside the unix socket.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Api {
    /// Mutual TLS; absent: unix socket (and the peer port) only.
    pub listen: Option<SocketAddr>,
}

/// The one port other daemons talk to.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Where it listens.
    #[serde(default = "default_peer_listen")]
    pub listen: SocketAddr,
    /// What peers connect to; its address is this host's end of every tunnel.
    pub advertise: SocketAddr,
    /// `ca.pem`, `host.pem`, `host.key`.
    #[serde(default = "default_tls_dir")]
    pub tls_dir: PathBuf,
}

/// Which directory the site uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectoryKind {
    /// One daemon serves it to its peers.
    #[default]
    Embedded,
    /// An etcd cluster.
    Etcd,
}

/// What a lease-bound image does without its directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnPartition {
    /// It waits.
    #[default]
    Pause,
    /// It ends.
    Stop,
}

/// The site's directory.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Which kind.
    pub directory: DirectoryKind,
    /// Embedded: the peer address of the host that serves it.
    pub endpoints: Vec<SocketAddr>,
    /// Length of a host's lease.
    pub lease: Span,
    /// For lease-bound images.
    pub on_partition: OnPartition,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCluster {
    directory: DirectoryKind,
    endpoints: Vec<Spanned<String>>,
    lease: Span,
    on_partition: OnPartition,
}

impl Default for RawCluster {
    fn default() -> Self {
        Self {
            directory: DirectoryKind::default(),
            endpoints: Vec::new(),
            lease: Span::from_millis(5_000),
            on_partition: OnPartition::default(),
        }
    }
}

/// The fabric.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The site's prefix, in which every VID lies.
    pub prefix: SitePrefix,
    /// The interface tunnels leave by.
    pub underlay: String,
    /// Network from which images get an IPv4 address; absent: only those of `[[user]]`.
    #[serde(default)]
    pub ipv4: Option<Ipv4Pool>,
    /// How long a source forwards after a move.
    #[serde(default = "default_forward_after_move")]
    pub forward_after_move: Span,
}

/// What happens to an unprotected image when its host fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Failover {
    /// Nothing until the host is back or an operator says so.
    #[default]
    None,
    /// It restarts elsewhere once its lease has ended.
    Restart,
}

/// What a new image is made of.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Image {
    /// Name of the image file; `default` is the one installed with the binary.
    pub default: String,
    /// Read-write memory.
    pub memory: Size,
    /// Disk: sparse, so that it takes what was written. 0: none.
    pub disk: Size,
    /// x86-64 level every host of the site has.
    pub cpu_baseline: CpuBaseline,
    /// When the host fails.
    pub failover: Failover,
    /// Copies of the disk.
    pub disk_replicas: u8,
    /// Public key that may enter every machine.
    pub operator_key_file: Option<PathBuf>,
    /// Keys whose images are taken; the default image is part of the program.
    pub trusted_keys: Vec<TrustedKey>,
    /// Most bytes of code kept of modules that users brought.
    pub code_cache: Size,
}

/// A key that signs images.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct TrustedKey(pub kage_images::PublicKey);

impl TryFrom<String> for TrustedKey {
    type Error = kage_images::KeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

/// An x86-64 microarchitecture level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuBaseline {
    /// AVX2.
    #[default]
    V3,
}

impl Default for Image {
    fn default() -> Self {
        Self {
            default: "default".to_owned(),
            memory: Size(64 << 20),
            disk: Size(1 << 30),
            cpu_baseline: CpuBaseline::default(),
            failover: Failover::default(),
            disk_replicas: 0,
            operator_key_file: None,
            trusted_keys: Vec::new(),
            code_cache: Size(512 << 20),
        }
    }
}

impl Image {
    /// Whose images are taken.
    #[must_use]
    pub fn trust(&self) -> kage_images::Trust {
        kage_images::Trust::Keys(self.trusted_keys.iter().map(|key| key.0).collect())
    }

    /// The page space of a new image.
    ///
    /// # Errors
    /// [`GeometryError`] for sizes outside what a guest's memory map carries.
    pub fn geometry(&self) -> Result<Geometry, GeometryError> {
        Geometry::from_bytes(self.memory.0, self.disk.0)
    }
}

/// An identity of the access network that belongs to a user here.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// As in Chargeable-User-Identity, Class or User-Name.
    pub identity: String,
    /// The user, and so the image.
    pub image: UserName,
    /// IPv4 address of the image.
    #[serde(default)]
    pub ipv4: Option<Ipv4Addr>,
}

/// How a move is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Pre-copy, as long as it converges.
    #[default]
    Auto,
    /// Every page before the switch.
    Precopy,
    /// Pages after the switch.
    Postcopy,
}

/// Defaults of a move.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Migrate {
    /// Longest pause aimed at.
    pub blackout: Span,
    /// Longest move.
    pub timeout: Span,
    /// How.
    pub mode: Mode,
}

impl Default for Migrate {
    fn default() -> Self {
        Self { blackout: Span::from_millis(10), timeout: Span::from_millis(30_000), mode: Mode::default() }
    }
}

/// Keeping copies.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Replicate {
    /// Mirrors per image.
    pub followers: u8,
    /// Most that replication may take of a link; absent: what the link carries.
    pub max_rate: Option<Rate>,
    /// Most memory that mirrors of one image take of other hosts together; absent: as many as `followers` says.
    pub max_memory: Option<Size>,
    /// Predictor.
    pub model: Model,
}

/// Whether it is foreseen where users go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// From habits, everybody's and the user's own, and from speed and direction, as each has been right.
    #[default]
    Auto,
    /// Nothing is learned, and no mirrors are made ahead.
    Off,
}

impl Default for Replicate {
    fn default() -> Self {
        Self { followers: 2, max_rate: None, max_memory: None, model: Model::default() }
    }
}

/// The accounting listener.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Radius {
    /// Where it listens.
    #[serde(default = "default_radius_listen")]
    pub listen: SocketAddr,
    /// How long after a Stop a machine is kept.
    #[serde(default = "default_logout_grace")]
    pub logout_grace: Span,
    /// Which attributes name a user, the first one first.
    #[serde(default = "default_identity")]
    pub identity: Vec<IdentityKind>,
    /// Whether the first Start of a user without an image makes one; else only users of `[[user]]` get one by it.
    #[serde(default = "default_first_use")]
    pub first_use: bool,
    /// Who may send.
    #[serde(default, rename = "client")]
    pub clients: Vec<RadiusClient>,
}

/// An attribute of accounting that can name a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdentityKind {
    /// Chargeable-User-Identity.
    Cui,
    /// Class.
    Class,
    /// User-Name.
    UserName,
}

/// Access points that may send accounting.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RadiusClient {
    /// Where from.
    pub from: Subnet,
    /// Holds their shared secret.
    pub secret_file: PathBuf,
}

/// How a device's address follows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mobility {
    /// The access network keeps it reachable.
    #[default]
    L2,
    /// The host where it attaches routes it.
    Route,
}

/// An access point.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ap {
    /// Its name.
    pub id: ApName,
    /// How it names itself in accounting: NAS-Identifier, else its address, else Called-Station-Id; absent: its name.
    pub nas: Option<String>,
    /// The edge host nearest to it.
    pub host: HostName,
    /// Where it stands, for prediction.
    pub position_m: Option<[f64; 2]>,
    /// How devices keep their address.
    #[serde(default)]
    pub mobility: Mobility,
    /// The bridge its devices attach to, when it belongs to this host.
    pub bridge: Option<String>,
}

impl Ap {
    /// The name it gives itself in accounting.
    #[must_use]
    pub fn nas(&self) -> &str {
        self.nas.as_deref().unwrap_or(self.id.as_str())
    }
}

/// Where figures go.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// Plain HTTP for a scraper; absent: `/metrics` of the API only.
    pub prometheus: Option<SocketAddr>,
    /// OTLP endpoint; must be empty in this version.
    pub otlp: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    host: Host,
    #[serde(default)]
    api: Api,
    peer: Peer,
    #[serde(default)]
    cluster: RawCluster,
    network: Network,
    #[serde(default)]
    image: Image,
    #[serde(default)]
    user: Vec<Spanned<User>>,
    #[serde(default)]
    migrate: Migrate,
    #[serde(default)]
    replicate: Replicate,
    #[serde(default)]
    roam: RawRoam,
    #[serde(default)]
    ap: Vec<Spanned<Ap>>,
    #[serde(default)]
    telemetry: Telemetry,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRoam {
    dwell: Span,
    radius: Option<Radius>,
}

impl Default for RawRoam {
    fn default() -> Self {
        Self { dwell: Span::from_millis(3_000), radius: None }
    }
}

/// Longest dwell time: somebody who stays that long stays.
const MAX_DWELL: Span = Span::from_millis(300_000);

/// Most mirrors of one image.
const MAX_FOLLOWERS: u8 = 16;

fn default_state_dir() -> PathBuf {
    "/var/lib/kage".into()
}
fn default_run_dir() -> PathBuf {
    "/run/kage".into()
}
fn default_tls_dir() -> PathBuf {
    "/etc/kage/tls".into()
}
fn default_peer_listen() -> SocketAddr {
    SocketAddr::from(([0u16; 8], 7701))
}
fn default_radius_listen() -> SocketAddr {
    SocketAddr::from(([0u16; 8], 1813))
}
fn default_forward_after_move() -> Span {
    Span::from_millis(5_000)
}
fn default_identity() -> Vec<IdentityKind> {
    vec![IdentityKind::Cui, IdentityKind::Class, IdentityKind::UserName]
}
fn default_first_use() -> bool {
    true
}
fn default_logout_grace() -> Span {
    Span::from_millis(120_000)
}

/// The text and path being read, to say where something is wrong.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn refuse(&self, at: usize, message: impl fmt::Display) -> ConfigError {
        let before = self.text.as_bytes().get(..at).unwrap_or_default();
        let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
        ConfigError::Refused { path: self.path.to_owned(), line, message: message.to_string() }
    }

    /// The line where a key stands, for cross-checks that no span covers.
    fn key(&self, key: &str) -> usize {
        self.text.find(key).unwrap_or(0)
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Checks the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::Refused`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let source = Source { path, text };
        let raw: Raw = toml::from_str(text).map_err(|error| {
            source.refuse(error.span().map_or(text.len(), |span| span.start), cure(error.message()))
        })?;
        check(&source, raw)
    }

    /// Whether this host serves the embedded directory: it advertises the first endpoint, or is alone.
    #[must_use]
    pub fn serves_directory(&self) -> bool {
        self.cluster.directory == DirectoryKind::Embedded
            && self.cluster.endpoints.first().is_none_or(|first| *first == self.peer.advertise)
    }

    /// Whether images may have IPv4 addresses.
    #[must_use]
    pub fn uses_ipv4(&self) -> bool {
        self.network.ipv4.is_some() || self.users.iter().any(|user| user.ipv4.is_some())
    }

    /// The unix socket of the API.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.host.run_dir.join("host.sock")
    }
}

/// Adds the cure to messages of the TOML reader that lack one.
fn cure(message: &str) -> String {
    let message = message.trim_end();
    if message.contains("unknown field") {
        format!("{message}; correct or remove it")
    } else if message.contains("missing field") {
        format!("{message}; add it (`kage init` writes a complete sample)")
    } else if message.contains("unknown variant") {
        format!("{message}; use one of those")
    } else {
        message.to_owned()
    }
}

fn check(source: &Source<'_>, raw: Raw) -> Result<Config, ConfigError> {
    raw.image.geometry().map_err(|error| {
        let key = match error {
            GeometryError::Memory { .. } => "memory",
            GeometryError::Disk { .. } => "disk",
        };
        source.refuse(source.key(key), error)
    })?;
    if raw.image.failover == Failover::Restart {
        return Err(source
            .refuse(source.key("failover"), "failover = \"restart\" is not in this version; use \"none\""));
    }
    if raw.migrate.mode == Mode::Postcopy {
        return Err(
            source.refuse(source.key("mode"), "mode = \"postcopy\" is not in this version; use \"auto\"")
        );
    }
    if raw.migrate.timeout <= raw.migrate.blackout {
        return Err(source.refuse(
            source.key("[migrate]"),
            "a move may not last shorter than its pause; make timeout longer than blackout",
        ));
    }
    if raw.replicate.followers > MAX_FOLLOWERS {
        let message =
            format!("followers = {} is too many; use at most {MAX_FOLLOWERS}", raw.replicate.followers);
        return Err(source.refuse(source.key("followers"), message));
    }
    if raw.roam.dwell > MAX_DWELL {
        let message = format!("a machine would hardly follow its user; make dwell at most {MAX_DWELL}");
        return Err(source.refuse(source.key("dwell"), message));
    }
    if !raw.telemetry.otlp.is_empty() {
        return Err(source.refuse(source.key("otlp"), "otlp is not in this version; leave it empty"));
    }
    if raw.peer.advertise.ip().is_unspecified() || raw.peer.advertise.port() == 0 {
        return Err(source.refuse(
            source.key("advertise"),
            format!(
                "peers cannot connect to {}; advertise an address of this host and a port",
                raw.peer.advertise
            ),
        ));
    }
    let cluster = cluster(source, raw.cluster)?;
    let mut names = BTreeSet::new();
    for ap in &raw.ap {
        let (at, ap) = (ap.span().start, ap.get_ref());
        if !names.insert(format!("id {}", ap.id)) {
            return Err(source.refuse(at, format!("access point {} is there twice; remove one", ap.id)));
        }
        if !names.insert(format!("nas {}", ap.nas())) {
            return Err(source.refuse(at, format!("nas {:?} names two access points; rename one", ap.nas())));
        }
        if ap.position_m.is_some_and(|position| position.iter().any(|metres| !metres.is_finite())) {
            return Err(source.refuse(at, "position_m must be two finite numbers of metres"));
        }
    }
    let mut identities = BTreeSet::new();
    let mut addresses = BTreeMap::new();
    for user in &raw.user {
        if !identities.insert(user.get_ref().identity.clone()) {
            let message = format!("identity {:?} is there twice; remove one", user.get_ref().identity);
            return Err(source.refuse(user.span().start, message));
        }
        let Some(address) = user.get_ref().ipv4 else { continue };
        if address.is_link_local()
            || address.is_multicast()
            || address.is_loopback()
            || address.is_unspecified()
        {
            let message = format!("ipv4 = {address} is no address for an image; use one of your own network");
            return Err(source.refuse(user.span().start, message));
        }
        let owner = addresses.entry(address).or_insert_with(|| user.get_ref().image.clone());
        if *owner != user.get_ref().image {
            let message = format!("ipv4 = {address} is there twice; remove one");
            return Err(source.refuse(user.span().start, message));
        }
    }
    if raw.roam.radius.as_ref().is_some_and(|radius| radius.identity.is_empty()) {
        return Err(source.refuse(
            source.key("identity"),
            "identity names no attribute; list some of \"cui\", \"class\", \"user-name\", or remove it",
        ));
    }
    if let Some(radius) = &raw.roam.radius
        && radius.clients.is_empty()
    {
        return Err(source.refuse(
            source.key("[roam.radius]"),
            "nobody may send accounting; add [[roam.radius.client]] with from and secret_file, or remove [roam.radius]",
        ));
    }
    Ok(Config {
        host: raw.host,
        api: raw.api,
        peer: raw.peer,
        cluster,
        network: raw.network,
        image: raw.image,
        users: raw.user.into_iter().map(Spanned::into_inner).collect(),
        migrate: raw.migrate,
        replicate: raw.replicate,
        dwell: raw.roam.dwell,
        radius: raw.roam.radius,
        aps: raw.ap.into_iter().map(Spanned::into_inner).collect(),
        telemetry: raw.telemetry,
    })
}

fn cluster(source: &Source<'_>, raw: RawCluster) -> Result<Cluster, ConfigError> {
    if raw.directory == DirectoryKind::Etcd {
        return Err(source
            .refuse(source.key("etcd"), "directory = \"etcd\" is not in this version; use \"embedded\""));
    }
    let endpoints = raw
        .endpoints
        .iter()
        .map(|text| {
            let bare = text.get_ref().trim_start_matches("https://");
            bare.parse().map_err(|_| {
                let message = format!(
                    "{:?} is no endpoint; write the peer address of the host that serves the directory, as [2001:db8::a]:7701",
                    text.get_ref()
                );
                source.refuse(text.span().start, message)
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Cluster { directory: raw.directory, endpoints, lease: raw.lease, on_partition: raw.on_partition })
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
