//! A host's certificate and key, and whom it trusts.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use kage_machine::HostName;
use rustls::{
    AlertDescription, ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};

use crate::link::LinkError;

/// The protocol of links, beside HTTP on the same port.
pub const ALPN: &[u8] = b"kage/1";

/// The site's CA certificate.
const CA_FILE: &str = "ca.pem";
/// The host's certificate chain; its subject alternative names hold the host's name.
const CERTIFICATE_FILE: &str = "host.pem";
/// The host's private key.
const KEY_FILE: &str = "host.key";

/// Why a host's TLS files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("{}: {source}; `kage init` makes it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{what} is not usable: {detail}; `kage init` makes a new one")]
    Unusable {
        /// Which one.
        what: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

/// A host's certificate and key with the site's CA.
#[derive(Clone)]
pub struct TlsIdentity {
    client: Arc<ClientConfig>,
    server: ServerConfig,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsIdentity")
    }
}

impl TlsIdentity {
    /// Reads `ca.pem`, `host.pem` and `host.key` of a directory.
    ///
    /// # Errors
    /// [`TlsError`] names the file.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|source| TlsError::Read { path, source })
        };
        Self::from_pem(&read(CA_FILE)?, &read(CERTIFICATE_FILE)?, &read(KEY_FILE)?)
    }

    /// Takes the three files' contents.
    ///
    /// # Errors
    /// [`TlsError::Unusable`].
    pub fn from_pem(ca: &[u8], chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let unusable = |what: &'static str| move |detail: String| TlsError::Unusable { what, detail };
        let ca_error = unusable("the site's CA certificate");
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca).map_err(ca_error)? {
            roots.add(certificate).map_err(|error| ca_error(error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(chain).map_err(unusable("the host's certificate"))?;
        let key_error = unusable("the host's key");
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| key_error(error.to_string()))?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let pair_error = unusable("the host's certificate with its key");
        let client =
            client(&provider, &roots, &chain, &key).map_err(|error| pair_error(error.to_string()))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| ca_error(error.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| pair_error(error.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| pair_error(error.to_string()))?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Self { client: Arc::new(client), server })
    }

    /// For connecting links.
    #[must_use]
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    /// For accepting with those protocols, most wanted first.
    #[must_use]
    pub fn server_config(&self, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        let mut config = self.server.clone();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }
}

fn client(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain.to_vec(), key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    if found.is_empty() { Err("holds no certificate".to_owned()) } else { Ok(found) }
}

/// A host's name as certificates carry it.
pub(super) fn server_name(host: &HostName) -> Result<ServerName<'static>, LinkError> {
    match ServerName::try_from(host.as_str().to_owned()) {
        Ok(name @ ServerName::DnsName(_)) => Ok(name),
        _ => Err(LinkError::NameForm(host.clone())),
    }
}

/// Tells a certificate that is not trusted from other failures of TLS.
pub(super) fn classify(error: rustls::Error) -> LinkError {
    use AlertDescription as Alert;
    match &error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
            LinkError::Certificate(error)
        }
        rustls::Error::AlertReceived(
            Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::CertificateRequired
            | Alert::DecryptError
            | Alert::AccessDenied,
        ) => LinkError::Certificate(error),
        _ => LinkError::Tls(error),
    }
}
