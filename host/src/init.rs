//! A site's keys and certificates, as `kage init` and the testbed make them.
//!
//! ```text
//! DIR/ca.pem  ca.key                      the site's certificate authority
//! DIR/operator  operator.pub              OpenSSH key that may enter every machine
//! DIR/image.key  image.pub               signs images that hosts of the site take
//! DIR/radius.secret                       shared with access points
//! DIR/<host>/tls/{ca.pem,host.pem,host.key}
//! DIR/<host>/host.toml                    a complete sample, when the host's address is known
//! ```
//!
//! Idempotent: what is there is kept, never overwritten; private files are made with mode 0600.

mod operator;

use std::{
    fs,
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use kage_images::{PublicKey, SigningKey};
use kage_machine::HostName;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

/// Name of the file with the key that signs images; its public half ends in `.pub`.
pub const IMAGE_KEY: &str = "image.key";

/// Why a site could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A file or directory.
    #[error("{}: {source}; choose a directory you may write with --dir", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Half of a pair is missing or damaged.
    #[error("{} is damaged or its pair is missing: {cause}; restore it, or remove both to make new ones", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// A host's name cannot stand in a certificate.
    #[error("host name {0} cannot stand in a certificate; use letters, digits, '-' and '.'")]
    Name(HostName),
    /// Making a key or certificate failed.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// A host that gets a certificate.
#[derive(Clone, Debug)]
pub struct HostSpec {
    /// Its name, which becomes the certificate's dNSName.
    pub name: HostName,
    /// Its peer address; with it a sample `host.toml` is written.
    pub advertise: Option<SocketAddr>,
}

/// Where a site's files are.
#[derive(Clone, Debug)]
pub struct Site {
    /// The directory.
    pub dir: PathBuf,
    /// What this call created; everything else was there.
    pub created: Vec<PathBuf>,
}

impl Site {
    /// The authority's certificate.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// The operator's private key.
    #[must_use]
    pub fn operator_key(&self) -> PathBuf {
        self.dir.join("operator")
    }

    /// The operator's public key.
    #[must_use]
    pub fn operator_public(&self) -> PathBuf {
        self.dir.join("operator.pub")
    }

    /// The key that signs images.
    #[must_use]
    pub fn image_key(&self) -> PathBuf {
        self.dir.join(IMAGE_KEY)
    }

    /// Its public half.
    #[must_use]
    pub fn image_public(&self) -> PathBuf {
        self.image_key().with_extension("pub")
    }

    /// The secret shared with access points.
    #[must_use]
    pub fn radius_secret(&self) -> PathBuf {
        self.dir.join("radius.secret")
    }

    /// A host's `tls_dir`.
    #[must_use]
    pub fn tls_dir(&self, host: &HostName) -> PathBuf {
        self.dir.join(host.as_str()).join("tls")
    }

    /// A host's sample configuration.
    #[must_use]
    pub fn config(&self, host: &HostName) -> PathBuf {
        self.dir.join(host.as_str()).join("host.toml")
    }

    /// Writes a file unless it is there.
    fn put(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<(), InitError> {
        let file = |source| InitError::File { path: path.to_owned(), source };
        match fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
            Ok(mut opened) => {
                opened.write_all(bytes).and_then(|()| opened.sync_all()).map_err(file)?;
                self.created.push(path.to_owned());
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(file(error)),
        }
    }
}

/// Makes what is missing of a site under `dir`, with a certificate for every host.
///
/// # Errors
/// [`InitError`]; files made before stay.
pub fn site(dir: &Path, hosts: &[HostSpec]) -> Result<Site, InitError> {
    make_dir(dir)?;
    let mut site = Site { dir: dir.to_owned(), created: Vec::new() };
    let issuer = authority(&mut site)?;
    for host in hosts {
        certificate(&mut site, &issuer, host)?;
    }
    if !site.operator_key().exists() {
        let (private, public) = operator::key_pair("kage operator")?;
        site.put(&site.operator_key(), 0o600, private.as_bytes())?;
        // A public key without its private half is of no use: replace it.
        let _ = fs::remove_file(site.operator_public());
        site.put(&site.operator_public(), 0o644, public.as_bytes())?;
    }
    let image_key = image_key(&mut site)?;
    if !site.radius_secret().exists() {
        let mut bytes = [0u8; 16];
        random(&mut bytes);
        let secret: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        site.put(&site.radius_secret(), 0o600, format!("{secret}\n").as_bytes())?;
    }
    let first = hosts.first().and_then(|host| host.advertise);
    for host in hosts {
        if let (Some(advertise), Some(first)) = (host.advertise, first) {
            let text = sample(&site, host, advertise, first, &image_key);
            site.put(&site.config(&host.name), 0o644, text.as_bytes())?;
        }
    }
    Ok(site)
}

/// Fills `bytes` from the kernel's generator.
pub fn random(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        // Without GRND_NONBLOCK getrandom fails only by EINTR.
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
}

fn make_dir(path: &Path) -> Result<(), InitError> {
    fs::create_dir_all(path).map_err(|source| InitError::File { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<String, InitError> {
    fs::read_to_string(path)
        .map_err(|error| InitError::Damaged { path: path.to_owned(), cause: error.to_string() })
}

/// The site's authority: read, or made when neither half is there.
fn authority(site: &mut Site) -> Result<Issuer<'static, KeyPair>, InitError> {
    let (certificate, key) = (site.ca(), site.dir.join("ca.key"));
    if certificate.exists() || key.exists() {
        let damaged = |path: &Path, error: rcgen::Error| InitError::Damaged {
            path: path.to_owned(),
            cause: error.to_string(),
        };
        let pair = KeyPair::from_pem(&read(&key)?).map_err(|error| damaged(&key, error))?;
        return Issuer::from_ca_cert_pem(&read(&certificate)?, pair)
            .map_err(|error| damaged(&certificate, error));
    }
    let pair = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name("Kage site authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&pair)?.pem();
    site.put(&key, 0o600, pair.serialize_pem().as_bytes())?;
    site.put(&certificate, 0o644, pem.as_bytes())?;
    Ok(Issuer::new(params, pair))
}

fn certificate(site: &mut Site, issuer: &Issuer<'static, KeyPair>, host: &HostSpec) -> Result<(), InitError> {
    rustls::pki_types::DnsName::try_from(host.name.as_str())
        .map_err(|_| InitError::Name(host.name.clone()))?;
    let tls = site.tls_dir(&host.name);
    make_dir(&tls)?;
    let authority = read(&site.ca())?;
    site.put(&tls.join("ca.pem"), 0o644, authority.as_bytes())?;
    let (certificate, key) = (tls.join("host.pem"), tls.join("host.key"));
    match (certificate.exists(), key.exists()) {
        (true, true) => return Ok(()),
        (false, false) => {}
        (there, _) => {
            let path = if there { key } else { certificate };
            return Err(InitError::Damaged { path, cause: "missing".to_owned() });
        }
    }
    let pair = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![host.name.to_string()])?;
    params.distinguished_name = common_name(host.name.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let pem = params.signed_by(&pair, issuer)?.pem();
    site.put(&key, 0o600, pair.serialize_pem().as_bytes())?;
    site.put(&certificate, 0o644, pem.as_bytes())
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// The key that signs images, made unless it is there; returns its public half.
fn image_key(site: &mut Site) -> Result<PublicKey, InitError> {
    let (path, public) = (site.image_key(), site.image_public());
    if !path.exists() {
        let mut seed = [0; 32];
        random(&mut seed);
        site.put(&path, 0o600, SigningKey::from_seed(&seed).to_text().as_bytes())?;
        let _ = fs::remove_file(&public);
    }
    let key = SigningKey::read(&path)
        .map_err(|error| InitError::Damaged { path, cause: error.to_string() })?
        .public();
    site.put(&public, 0o644, format!("{key}\n").as_bytes())?;
    Ok(key)
}

fn sample(
    site: &Site,
    host: &HostSpec,
    advertise: SocketAddr,
    first: SocketAddr,
    image_key: &PublicKey,
) -> String {
    let name = &host.name;
    format!(
        r#"# Configuration of edge host {name}. What is commented out shows the default.

[host]
name = "{name}"
# state_dir = "/var/lib/kage"
# run_dir = "/run/kage"

[peer]
listen = "[::]:{port}"
advertise = "{advertise}"
tls_dir = "{tls}"

[cluster]
directory = "embedded"
endpoints = ["{first}"]   # the host that advertises the first endpoint serves the directory

[network]
prefix = "fd4b:6167:6500::/48"
# ipv4 = "10.77.0.0/24"      # IPv4 addresses for images
underlay = "eth0"         # the interface towards the other hosts

[image]
memory = "64MiB"
# disk = "1GiB"             # takes on the host what was written to it; at most 2GiB, "0" for none
operator_key_file = "{operator}"
trusted_keys = ["{image_key}"]   # whose images are taken; files lie in <state_dir>/images

# [[user]]                # an identity of the access network, and its user here
# identity = "alice@example.org"
# image = "alice"

# [migrate]
# blackout = "10ms"
# timeout = "30s"

# [replicate]
# followers = 2             # hosts that keep a copy of each machine ahead of its user
# max_rate = "50mbit"

# [roam]
# dwell = "3s"              # how long a user stays before the machine joins a ping-pong between two hosts

# [roam.radius]
# listen = "[::]:1813"
# logout_grace = "120s"
# identity = ["cui", "class", "user-name"]
# first_use = true
# [[roam.radius.client]]
# from = "10.0.0.0/8"
# secret_file = "{secret}"

# [[ap]]
# id = "ap-1"
# nas = "ap-1"
# host = "{name}"
# position_m = [0, 0]
# mobility = "l2"
"#,
        port = advertise.port(),
        tls = site.tls_dir(name).display(),
        operator = site.operator_public().display(),
        secret = site.radius_secret().display(),
    )
}

#[cfg(test)]
mod tests;
