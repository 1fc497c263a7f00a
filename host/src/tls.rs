//! Mutual TLS between daemons: who a peer is, is what its certificate from the site's authority says.
//!
//! A host's name is its certificate's dNSName. Frames go over `kage-replicate`'s links; this module adds
//! what the daemon's listener and the HTTP API between daemons need, on the same files. ALPN tells what a
//! connection is for: [`kage_replicate::link::ALPN`] or [`HTTP`].

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kage_machine::HostName;
use kage_replicate::link::{ALPN, TlsIdentity};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};

/// ALPN of the daemon's HTTP API.
pub const HTTP: &[u8] = b"http/1.1";

/// Why this host cannot show who it is, or does not believe a peer.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The files cannot be used.
    #[error("tls_dir {}: {cause}; `kage init` makes ca.pem, host.pem and host.key", dir.display())]
    Files {
        /// The directory.
        dir: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The certificate is another host's.
    #[error("the certificate in {} is for {found}, and [host] name is {expected}; correct one of them", dir.display())]
    OtherName {
        /// The directory.
        dir: PathBuf,
        /// The configured name.
        expected: HostName,
        /// The certificate's.
        found: String,
    },
    /// A peer cannot be reached.
    #[error("{address} does not answer: {source}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A peer's certificate, or ours, was refused.
    #[error("{address} and this host do not accept each other: {cause}")]
    Handshake {
        /// Where.
        address: SocketAddr,
        /// Why.
        cause: String,
    },
}

/// This host's keys and the authority it believes.
#[derive(Clone)]
pub struct Identity {
    name: HostName,
    links: TlsIdentity,
    server: Arc<ServerConfig>,
    http: Arc<ClientConfig>,
}

impl Identity {
    /// Reads `ca.pem`, `host.pem` and `host.key`, and checks that the certificate names `name`.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(dir: &Path, name: &HostName) -> Result<Self, TlsError> {
        let failed = |cause: String| TlsError::Files { dir: dir.to_owned(), cause };
        let links = TlsIdentity::load(dir).map_err(|error| failed(error.to_string()))?;
        let chain = certificates(&dir.join("host.pem")).map_err(failed)?;
        let found = chain.first().and_then(name_of);
        if found.as_ref() != Some(name) {
            let found = found.map_or_else(|| "no host".to_owned(), |found| found.to_string());
            return Err(TlsError::OtherName { dir: dir.to_owned(), expected: name.clone(), found });
        }
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&dir.join("ca.pem")).map_err(failed)? {
            roots.add(certificate).map_err(|error| failed(error.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| failed(error.to_string()))?;
        let mut http = ClientConfig::clone(&links.client_config());
        http.alpn_protocols = vec![HTTP.to_vec()];
        http.dangerous().set_certificate_verifier(Arc::new(AnyHost { inner }));
        Ok(Self {
            name: name.clone(),
            server: links.server_config(&[ALPN, HTTP]),
            links,
            http: Arc::new(http),
        })
    }

    /// This host's name.
    #[must_use]
    pub const fn name(&self) -> &HostName {
        &self.name
    }

    /// For links of frames.
    #[must_use]
    pub const fn links(&self) -> &TlsIdentity {
        &self.links
    }

    /// For accepting peers.
    #[must_use]
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For calling a peer's HTTP API; accepts any host of the site, so compare [`peer_name`].
    #[must_use]
    pub fn http(&self) -> Arc<ClientConfig> {
        self.http.clone()
    }

    /// Asks who listens at an address: connects, checks the certificate, reads its name. Blocks.
    ///
    /// # Errors
    /// [`TlsError::Connect`], [`TlsError::Handshake`].
    pub fn who_is(&self, address: SocketAddr, patience: Duration) -> Result<HostName, TlsError> {
        let refused = |source| TlsError::Connect { address, source };
        let handshake = |cause: String| TlsError::Handshake { address, cause };
        let mut stream = std::net::TcpStream::connect_timeout(&address, patience).map_err(refused)?;
        stream.set_read_timeout(Some(patience)).map_err(refused)?;
        stream.set_write_timeout(Some(patience)).map_err(refused)?;
        let mut tls =
            ClientConnection::new(self.http(), any_name()).map_err(|error| handshake(error.to_string()))?;
        while tls.is_handshaking() {
            tls.complete_io(&mut stream).map_err(|error| handshake(error.to_string()))?;
        }
        peer_name(tls.peer_certificates()).ok_or_else(|| handshake("its certificate names no host".into()))
    }
}

/// A server name to send where the name is judged by what the certificate holds.
#[must_use]
pub fn any_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv6Addr::LOCALHOST.into())
}

/// The host that a peer's certificates name.
#[must_use]
pub fn peer_name(certificates: Option<&[CertificateDer<'_>]>) -> Option<HostName> {
    name_of(certificates?.first()?)
}

fn name_of(certificate: &CertificateDer<'_>) -> Option<HostName> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    certificate.valid_dns_names().next()?.parse().ok()
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// Accepts the certificate of any host of the site.
#[derive(Debug)]
struct AnyHost {
    inner: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AnyHost {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unnamed = || rustls::Error::InvalidCertificate(rustls::CertificateError::NotValidForName);
        let name = name_of(end_entity).ok_or_else(unnamed)?;
        let name = ServerName::try_from(name.to_string()).map_err(|_| unnamed())?;
        self.inner.verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        init::{HostSpec, site},
        scratch::Scratch,
    };
    use std::net::TcpListener;

    fn host(name: &str) -> HostSpec {
        HostSpec { name: name.parse().unwrap(), advertise: None }
    }

    fn accept_one(identity: &Identity) -> (SocketAddr, std::thread::JoinHandle<Option<HostName>>) {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let address = listener.local_addr().unwrap();
        let config = identity.server();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut tls = rustls::ServerConnection::new(config).unwrap();
            while tls.is_handshaking() {
                if tls.complete_io(&mut stream).is_err() {
                    return None;
                }
            }
            peer_name(tls.peer_certificates())
        });
        (address, thread)
    }

    #[test]
    fn both_ends_learn_each_others_name() {
        let dir = Scratch::new("tls-names");
        let site = site(dir.path(), &[host("a"), host("b")]).unwrap();
        let (a, b) = (&"a".parse().unwrap(), &"b".parse().unwrap());
        let server = Identity::load(&site.tls_dir(a), a).unwrap();
        let client = Identity::load(&site.tls_dir(b), b).unwrap();
        let (address, thread) = accept_one(&server);
        assert_eq!(client.who_is(address, Duration::from_secs(5)).unwrap(), *a);
        assert_eq!(thread.join().unwrap().as_ref(), Some(b));
    }

    #[test]
    fn a_peer_of_another_site_is_refused() {
        let (ours, theirs) = (Scratch::new("tls-ours"), Scratch::new("tls-theirs"));
        let a = &"a".parse().unwrap();
        let server = Identity::load(&site(ours.path(), &[host("a")]).unwrap().tls_dir(a), a).unwrap();
        let client = Identity::load(&site(theirs.path(), &[host("a")]).unwrap().tls_dir(a), a).unwrap();
        let (address, thread) = accept_one(&server);
        let error = client.who_is(address, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(error, TlsError::Handshake { .. }), "{error}");
        assert_eq!(thread.join().unwrap(), None);
    }

    #[test]
    fn another_hosts_certificate_is_refused_at_start() {
        let dir = Scratch::new("tls-other");
        let site = site(dir.path(), &[host("a")]).unwrap();
        let error =
            Identity::load(&site.tls_dir(&"a".parse().unwrap()), &"b".parse().unwrap()).err().unwrap();
        assert!(error.to_string().contains("is for a, and [host] name is b"), "{error}");
    }
}
