//! Errors of migrations and snapshots. Each text begins with whose fault it was.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use diagnostics::visible;

use page_set::PAGE_BYTES;

use crate::cpu::CpuMismatch;
use crate::layout::LayoutError;
use crate::limits::VERSIONS;
use crate::traits::MachineError;

/// Why a migration, a snapshot or a restore failed. The state of the guest is reported separately.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// A connection failed.
    #[error("network: {what}")]
    Link {
        /// The operation.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Connecting to the peer failed.
    #[error("network: cannot connect")]
    Connect {
        /// The address, and the system's error.
        #[source]
        source: io::Error,
    },
    /// Listening failed.
    #[error("network: cannot listen on {address}")]
    Listen {
        /// The local address.
        address: SocketAddr,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection, or died.
    #[error("network: the peer closed the connection")]
    Closed,
    /// No byte was received, or none could be sent, until the timeout.
    #[error("network: the peer is silent")]
    Stalled,
    /// The downtime passed its limit while the peer was slow but not silent.
    #[error("network: the peer is too slow, the downtime was more than {} s", limit.as_secs())]
    TooSlow {
        /// The limit.
        limit: std::time::Duration,
    },
    /// A byte changed, or frames were lost, repeated or reordered.
    #[error("network: {what} arrived corrupted or out of order")]
    Damaged {
        /// What arrived.
        what: &'static str,
    },
    /// The peer violated the protocol.
    #[error("peer: {what}")]
    Peer {
        /// The violation.
        what: &'static str,
    },
    /// The peer, or this side's VMM, described an invalid memory layout.
    #[error("peer: invalid memory layout")]
    Layout(#[from] LayoutError),
    /// The arriving guest has another name than the expected one.
    #[error(
        "operator: the guest is named {guest:?} at its source, and {awaited:?} is expected: use \
         `receive --name {guest}`, or --guest-name {guest} to receive it under another --name"
    )]
    OtherName {
        /// The guest's name at its source.
        guest: String,
        /// The expected name.
        awaited: String,
    },
    /// The arriving guest has more memory than the limit.
    #[error(
        "operator: the guest has {} of memory, and the limit is {}: raise it with \
         `receive --max-memory`", size(*pages), size(*most)
    )]
    TooLarge {
        /// The guest's pages.
        pages: u64,
        /// The limit, in pages.
        most: u64,
    },
    /// The two sides have no version of the protocol in common.
    #[error(
        "peer: it supports protocol versions {min} to {max}, and this side {} to {}",
        VERSIONS.0, VERSIONS.1
    )]
    Version {
        /// The peer's oldest version.
        min: u16,
        /// The peer's newest version.
        max: u16,
    },
    /// The host's CPU cannot run the guest.
    #[error("the guest cannot run on this host")]
    Cpu(#[from] CpuMismatch),
    /// The peer aborted and sent the reason.
    #[error("the other side aborted: {reason}")]
    Aborted {
        /// The peer's error, as printable ASCII.
        reason: String,
    },
    /// The VMM of this side failed.
    #[error("VMM: {what}")]
    Machine {
        /// The operation.
        what: &'static str,
        /// The VMM's error.
        #[source]
        source: MachineError,
    },
    /// The guest writes memory faster than it can be sent.
    #[error(
        "guest: it writes memory faster than it can be sent: {remaining_pages} pages pending after \
         {rounds} rounds, vCPUs throttled by {throttle} %"
    )]
    NotConverging {
        /// Rounds that were sent.
        rounds: u32,
        /// Pages that were pending.
        remaining_pages: u64,
        /// Throttling of the vCPUs, in per cent.
        throttle: u8,
    },
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// The operator's request is invalid.
    #[error("operator: {what}")]
    Operator {
        /// What is invalid.
        what: String,
    },
    /// A file cannot be read or written.
    #[error("file: {what} {path}")]
    File {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A file is not a valid snapshot.
    #[error("file: {path} is not a snapshot of this program: {what}")]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What is invalid.
        what: String,
    },
    /// A snapshot is corrupted, or changed since it was opened.
    #[error("file: {path} is damaged: the checksum of {what} does not match")]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// The damaged part.
        what: &'static str,
    },
    /// A certificate or key file is unusable.
    #[error("tls: {what} {path}")]
    TlsFile {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A certificate or a key is unusable, or the peer's was refused.
    #[error("tls: {what}")]
    Tls {
        /// The operation.
        what: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl MigrationError {
    pub(crate) fn machine(what: &'static str) -> impl Fn(MachineError) -> Self {
        move |source| Self::Machine { what, source }
    }

    /// Converts an error of a peer to one of a file that has the same format.
    pub(crate) fn of_file(self, path: &Path) -> Self {
        let path = path.to_owned();
        match self {
            Self::Peer { what } => Self::Snapshot { path, what: what.to_owned() },
            Self::Damaged { what } => Self::DamagedFile { path, what },
            Self::Layout(why) => Self::Snapshot { path, what: why.to_string() },
            other => other,
        }
    }

    /// What the operator can do. If the VMM failed, its own error has a better hint.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Link { .. } | Self::Closed => {
                "see the log of the other side: it may have ended, not trust this side's \
                 certificate, or have --plain while this side has not"
            }
            Self::Connect { .. } => {
                "check the address, that `aerostat receive` listens there, and that both sides \
                 have certificates of one authority, or both --plain"
            }
            Self::Listen { .. } => {
                "choose an address of this host and a port that is free (--listen)"
            }
            Self::Stalled => {
                "check that the other side still runs, and the network between the hosts"
            }
            Self::TooSlow { .. } => {
                "check the load of the other side and of the network, or raise --max-downtime"
            }
            Self::Damaged { .. } => "check the network between the hosts, and retry",
            Self::Peer { .. } | Self::Version { .. } | Self::Layout(_) => {
                "run the same release of Aerostat on both sides"
            }
            Self::OtherName { .. } => "give `receive` the guest's name, or --guest-name",
            Self::TooLarge { .. } => "give `receive` a larger --max-memory",
            Self::Cpu(_) => "choose a host CPU with every feature exposed to the guest",
            Self::Aborted { .. } => "see the log of the other side, and retry",
            Self::Machine { .. } => "see the cause, and the log of the VMM",
            Self::NotConverging { .. } => {
                "raise --max-downtime or --bandwidth, or reduce the load of the guest during the \
                 migration"
            }
            Self::Cancelled => "the operator cancelled it, or its VMM ended; start it again",
            Self::Operator { .. } => "see docs/operations.md",
            Self::File { source, .. } => hint_of_file(source.kind()),
            Self::Snapshot { .. } => "give a complete file that `aerostat snapshot` has written",
            Self::DamagedFile { .. } => "give another copy of the file",
            Self::Tls { .. } | Self::TlsFile { .. } => {
                "give a certificate, its key and the authority's certificate as PEM files that the \
                 guest's VMM may read"
            }
        }
    }

    /// Converts a connection's I/O error by its kind.
    pub(crate) fn link(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Stalled,
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected => Self::Closed,
            _ => Self::Link { what, source },
        }
    }

    /// The error with its causes, on one line: for the peer, the log and the operator. Control
    /// characters are escaped, so a peer can hide nothing in it.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text += ": ";
            text += &cause.to_string();
            next = cause.source();
        }
        visible(&text)
    }
}

/// The size of `pages`, in MiB or KiB.
fn size(pages: u64) -> String {
    let kib = pages.saturating_mul(PAGE_BYTES >> 10);
    if kib.is_multiple_of(1 << 10) { format!("{} MiB", kib >> 10) } else { format!("{kib} KiB") }
}

const fn hint_of_file(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => "check the path, which the VMM resolves",
        io::ErrorKind::PermissionDenied => "check the permissions of the VMM's user there",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free space there, or choose another file system"
        }
        io::ErrorKind::FileTooLarge => {
            "choose another file system: this one, or a limit, allows no file of this size (FAT: 4 GiB)"
        }
        io::ErrorKind::ReadOnlyFilesystem => "choose a file system that can be written",
        _ => "check the file system, and the kernel's log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_an_error_are_escaped() {
        let what = "disk \u{202e}gmi.a\u{2028}\x1b[2J".to_owned();
        let chain = MigrationError::Operator { what }.chain();
        assert_eq!(chain, "operator: disk \\u{202e}gmi.a\\u{2028}\\u{1b}[2J");
    }
}
