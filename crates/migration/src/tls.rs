//! Mutual TLS: both sides present a certificate from an authority that the operator chose. TLS 1.3
//! only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use crate::error::MigrationError;

/// Limit of certificates in a file: a chain, or a few authorities.
const MAX_CERTIFICATES: usize = 64;

/// Bytes that a connection buffers for encryption: a chunk fits.
const BUFFER_BYTES: usize = 512 << 10;

/// Paths of one side's PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The authority that must have signed the other side's certificate.
    pub authority: PathBuf,
    /// This side's certificate, and its chain to the authority.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// One side's certificate and the authority that it trusts, for either role. The certificate must
/// allow both roles (extended key usage), and name the destination's host.
#[derive(Clone, Debug)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

fn error<E>(what: &'static str) -> impl Fn(E) -> MigrationError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| MigrationError::Tls { what, source: source.into() }
}

fn file_error<E>(what: &'static str, path: &Path) -> impl Fn(E) -> MigrationError + use<E>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let path = path.to_owned();
    move |source| MigrationError::TlsFile { what, path: path.clone(), source: source.into() }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file cannot be read or is invalid, or the key does not match the certificate.
    pub fn from_files(files: &TlsFiles) -> Result<Self, MigrationError> {
        let key = PrivateKeyDer::from_pem_file(&files.key);
        let key = key.map_err(file_error("reading the key in", &files.key))?;
        Self::new(&certificates(&files.authority)?, certificates(&files.certificate)?, key)
    }

    /// Uses certificates that were read already.
    ///
    /// # Errors
    /// A certificate is invalid, or the key does not match.
    pub fn new(
        authorities: &[CertificateDer<'static>],
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, MigrationError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority.clone()).map_err(error("loading the authority's certificate"))?;
        }
        let roots = Arc::new(roots);
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let clients = clients.build().map_err(error("loading the authority's certificate"))?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let servers = servers.build().map_err(error("loading the authority's certificate"))?;
        let versions = &[&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(error("choosing TLS 1.3"))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(error("loading the certificate and its key"))?;
        // No client resumes a session.
        server.send_tls13_tickets = 0;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(error("choosing TLS 1.3"))?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain, key)
            .map_err(error("loading the certificate and its key"))?;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// A client session with `host`, whose certificate must name it.
    pub(crate) fn client(&self, host: &str) -> Result<ClientConnection, MigrationError> {
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(error("the host's name is not one that a certificate can have"))?;
        let connection = ClientConnection::new(Arc::clone(&self.client), name);
        let mut connection = connection.map_err(error("starting a session"))?;
        connection.set_buffer_limit(Some(BUFFER_BYTES));
        Ok(connection)
    }

    pub(crate) fn server(&self) -> Result<ServerConnection, MigrationError> {
        let mut connection =
            ServerConnection::new(Arc::clone(&self.server)).map_err(error("starting a session"))?;
        connection.set_buffer_limit(Some(BUFFER_BYTES));
        Ok(connection)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, MigrationError> {
    let failed = file_error("reading a certificate in", path);
    let all = CertificateDer::pem_file_iter(path).map_err(&failed)?;
    let all: Result<Vec<_>, _> = all.take(MAX_CERTIFICATES).collect();
    let all = all.map_err(failed)?;
    if all.is_empty() {
        return Err(file_error("reading a certificate in", path)("it contains none"));
    }
    Ok(all)
}
