//! TLS options of a migration.

use std::path::{Path, PathBuf};

use clap::Args;
use control::api::TlsPaths;
use vmm::{Security, Tls, TlsFiles};

use cli::failure::Failure;

/// Certificates for mutual TLS, or no TLS within one host.
#[derive(Debug, Args)]
pub(crate) struct SecurityArgs {
    /// This side's certificate (PEM)
    #[arg(long, value_name = "FILE", required_unless_present = "plain",
          requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,

    /// Private key of that certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// CA certificate that must have issued the other side's certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,

    /// Do not use TLS; only between processes of one host
    #[arg(long, conflicts_with = "tls_cert")]
    plain: bool,
}

impl SecurityArgs {
    /// Returns absolute paths of the files, for the VMM, which may have another working directory.
    pub(crate) fn paths(&self) -> Result<Option<TlsPaths>, Failure> {
        let (Some(authority), Some(certificate), Some(key)) =
            (&self.tls_ca, &self.tls_cert, &self.tls_key)
        else {
            return Ok(None);
        };
        Ok(Some(TlsPaths {
            authority: absolute(authority)?,
            certificate: absolute(certificate)?,
            key: absolute(key)?,
        }))
    }

    /// Reads the files.
    pub(crate) fn security(&self) -> Result<Security, Failure> {
        let (Some(authority), Some(certificate), Some(key)) =
            (&self.tls_ca, &self.tls_cert, &self.tls_key)
        else {
            return Ok(Security::PlainOnLoopback);
        };
        let files = TlsFiles {
            authority: authority.clone(),
            certificate: certificate.clone(),
            key: key.clone(),
        };
        let tls = Tls::from_files(&files);
        let hint = "give a certificate, its key and the CA certificate as PEM files";
        tls.map(Security::Tls).map_err(|error| Failure::new(&error, hint))
    }
}

/// Makes a path absolute, for a process that may have another working directory.
pub(crate) fn absolute(path: &Path) -> Result<String, Failure> {
    let hint = "use a path in UTF-8";
    let path = std::path::absolute(path).map_err(|error| Failure::new(&error, hint))?;
    path.into_os_string().into_string().map_err(|path| Failure {
        what: format!("{} is not UTF-8", path.display()),
        hint: hint.into(),
        exit: cli::failure::Exit::Failed,
    })
}
