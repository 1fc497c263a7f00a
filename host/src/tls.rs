//! Mutual TLS between daemons: who a peer is, is what its certificate from the site's authority says.
//!
//! A host's name is the certificate's first dNSName. Both ends of every connection check the other's
//! chain; a caller that knows whom it wants also checks the name. ALPN tells what the connection is for:
//! [`FRAMES`] or [`HTTP`].

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kage_machine::HostName;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};

/// ALPN of frames between daemons.
pub const FRAMES: &[u8] = b"kage/1";
/// ALPN of the daemon's HTTP API.
pub const HTTP: &[u8] = b"http/1.1";

/// Why this host cannot show who it is, or does not believe a peer.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of `tls_dir`.
    #[error("{}: {cause}; `kage init` makes ca.pem, host.pem and host.key", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The files do not belong together.
    #[error("certificates in {}: {source}", dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// What rustls says.
        source: rustls::Error,
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
    server: Arc<ServerConfig>,
    frames: Arc<ClientConfig>,
    http: Arc<ClientConfig>,
}

impl Identity {
    /// Reads `ca.pem`, `host.pem` and `host.key`, and checks that the certificate names `name`.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(dir: &Path, name: &HostName) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Unusable { dir: dir.to_owned(), source };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&dir.join("ca.pem"))? {
            roots.add(certificate).map_err(unusable)?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&dir.join("host.pem"))?;
        let key_path = dir.join("host.key");
        let key = || {
            PrivateKeyDer::from_pem_slice(&bytes(&key_path)?)
                .map_err(|error| TlsError::File { path: key_path.clone(), cause: error.to_string() })
        };
        let found = chain.first().and_then(|first| name_of(first));
        if found.as_ref() != Some(name) {
            let found = found.map_or_else(|| "no host".to_owned(), |found| found.to_string());
            return Err(TlsError::OtherName { dir: dir.to_owned(), expected: name.clone(), found });
        }
        let failed =
            |error: rustls::server::VerifierBuilderError| unusable(rustls::Error::General(error.to_string()));
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(failed)?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key()?)
            .map_err(unusable)?;
        server.alpn_protocols = vec![FRAMES.to_vec(), HTTP.to_vec()];
        let servers =
            WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build().map_err(failed)?;
        let client = |alpn: &[u8]| -> Result<Arc<ClientConfig>, TlsError> {
            let mut config = ClientConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(unusable)?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyHost { inner: servers.clone() }))
                .with_client_auth_cert(chain.clone(), key()?)
                .map_err(unusable)?;
            config.alpn_protocols = vec![alpn.to_vec()];
            Ok(Arc::new(config))
        };
        Ok(Self {
            name: name.clone(),
            server: Arc::new(server),
            frames: client(FRAMES)?,
            http: client(HTTP)?,
        })
    }

    /// This host's name.
    #[must_use]
    pub const fn name(&self) -> &HostName {
        &self.name
    }

    /// For accepting peers.
    #[must_use]
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For calling a peer's HTTP API.
    #[must_use]
    pub fn http(&self) -> Arc<ClientConfig> {
        self.http.clone()
    }

    /// Connects to a peer for frames and finishes the handshake; blocks at most about `patience`.
    /// Returns whom it reached, which is `expected` where that is given.
    ///
    /// # Errors
    /// [`TlsError::Connect`], [`TlsError::Handshake`].
    pub fn connect(
        &self,
        address: SocketAddr,
        expected: Option<&HostName>,
        patience: Duration,
    ) -> Result<(std::net::TcpStream, ClientConnection, HostName), TlsError> {
        let refused = |source| TlsError::Connect { address, source };
        let handshake = |cause: String| TlsError::Handshake { address, cause };
        let mut stream = std::net::TcpStream::connect_timeout(&address, patience).map_err(refused)?;
        stream.set_nodelay(true).map_err(refused)?;
        stream.set_read_timeout(Some(patience)).map_err(refused)?;
        stream.set_write_timeout(Some(patience)).map_err(refused)?;
        let mut tls = ClientConnection::new(self.frames.clone(), server_name(expected))
            .map_err(|error| handshake(error.to_string()))?;
        while tls.is_handshaking() {
            tls.complete_io(&mut stream).map_err(|error| handshake(error.to_string()))?;
        }
        // TLS 1.3: the server judges our certificate after our Finished; its verdict comes with its first byte.
        let peer = peer_name(tls.peer_certificates())
            .ok_or_else(|| handshake("its certificate names no host".into()))?;
        if expected.is_some_and(|expected| *expected != peer) {
            return Err(handshake(format!("its certificate is for {peer}")));
        }
        stream.set_read_timeout(None).map_err(refused)?;
        stream.set_write_timeout(None).map_err(refused)?;
        Ok((stream, tls, peer))
    }
}

/// The name sent to a server; it matters to nobody, since certificates are compared by what they hold.
#[must_use]
pub fn server_name(expected: Option<&HostName>) -> ServerName<'static> {
    expected
        .and_then(|name| ServerName::try_from(name.to_string()).ok())
        .unwrap_or_else(|| ServerName::IpAddress(std::net::Ipv6Addr::LOCALHOST.into()))
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

fn bytes(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|error| TlsError::File { path: path.to_owned(), cause: error.to_string() })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |cause: String| TlsError::File { path: path.to_owned(), cause };
    let all: Vec<_> = CertificateDer::pem_slice_iter(&bytes(path)?)
        .collect::<Result<_, _>>()
        .map_err(|error| failed(error.to_string()))?;
    if all.is_empty() { Err(failed("holds no certificate".into())) } else { Ok(all) }
}

/// Accepts the certificate of any host of the site; [`Identity::connect`] then compares the name.
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
        for expected in [None, Some(a)] {
            let (address, thread) = accept_one(&server);
            let (_stream, tls, peer) = client.connect(address, expected, Duration::from_secs(5)).unwrap();
            assert_eq!((&peer, tls.alpn_protocol()), (a, Some(FRAMES)));
            assert_eq!(thread.join().unwrap().as_ref(), Some(b));
        }
        let (address, _thread) = accept_one(&server);
        let error = client.connect(address, Some(b), Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("its certificate is for a"), "{error}");
    }

    #[test]
    fn a_peer_of_another_site_is_refused() {
        let (ours, theirs) = (Scratch::new("tls-ours"), Scratch::new("tls-theirs"));
        let a = &"a".parse().unwrap();
        let server = Identity::load(&site(ours.path(), &[host("a")]).unwrap().tls_dir(a), a).unwrap();
        let client = Identity::load(&site(theirs.path(), &[host("a")]).unwrap().tls_dir(a), a).unwrap();
        let (address, thread) = accept_one(&server);
        let error = client.connect(address, None, Duration::from_secs(5)).unwrap_err();
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
