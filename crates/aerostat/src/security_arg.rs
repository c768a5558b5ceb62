//! How a migration's connections are secured.

use std::path::{Path, PathBuf};

use clap::Args;
use control::api::TlsPaths;
use vmm::{Security, Tls, TlsFiles};

use cli::failure::Failure;

/// Certificates on both sides, or one host.
#[derive(Debug, Args)]
pub(crate) struct SecurityArgs {
    /// Certificate of this side, as PEM
    #[arg(long, value_name = "FILE", required_unless_present = "plain",
          requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,

    /// Key of that certificate, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Certificate of the authority that the other side's must come from, as PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,

    /// Without TLS, which is possible between processes of one host only
    #[arg(long, conflicts_with = "tls_cert")]
    plain: bool,
}

impl SecurityArgs {
    /// The files, for the process that will read them, which may be in another directory.
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
        let hint = "give a certificate, its key and the authority's certificate as PEM files";
        tls.map(Security::Tls).map_err(|error| Failure::new(&error, hint))
    }
}

/// From the root, for a process that may be in another directory.
pub(crate) fn absolute(path: &Path) -> Result<String, Failure> {
    let hint = "give a path in UTF-8";
    let path = std::path::absolute(path).map_err(|error| Failure::new(&error, hint))?;
    path.into_os_string().into_string().map_err(|path| Failure {
        what: format!("{} is not in UTF-8", path.display()),
        hint: hint.into(),
        exit: cli::failure::Exit::Failed,
    })
}
