//! Why a migration failed, and whose fault it was.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use diagnostics::visible;

use crate::cpu::CpuMismatch;
use crate::layout::LayoutError;
use crate::traits::MachineError;
use crate::wire::chunk::PAGE_BYTES;
use crate::wire::control::VERSIONS;

/// A migration, a snapshot or a restore that came to nothing. What became of the guest is said
/// beside it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// A connection failed.
    #[error("network: {what}")]
    Link {
        /// What was done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no connection to the peer.
    #[error("network: cannot connect")]
    Connect {
        /// Where to, and what the system said.
        #[source]
        source: io::Error,
    },
    /// Nobody can connect to here.
    #[error("network: cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection, or died.
    #[error("network: the peer closed the connection")]
    Closed,
    /// Nothing came, or nothing could be sent, for too long.
    #[error("network: the peer is silent")]
    Stalled,
    /// The downtime passed its limit while the peer was slow but not silent.
    #[error("network: the peer is too slow, the downtime was more than {} s", limit.as_secs())]
    TooSlow {
        /// How long it may.
        limit: std::time::Duration,
    },
    /// What arrived is not what was sent: a byte changed, or frames were lost, repeated or mixed up.
    #[error("network: {what} arrived damaged or out of its order")]
    Damaged {
        /// What it was.
        what: &'static str,
    },
    /// The peer said what it must not.
    #[error("peer: {what}")]
    Peer {
        /// What was wrong.
        what: &'static str,
    },
    /// The peer named memory that no guest can have, or ours.
    #[error("peer: impossible memory")]
    Layout(#[from] LayoutError),
    /// The peer's guest is another one than is waited for.
    #[error(
        "operator: the guest is called {guest:?} where it comes from, and {awaited:?} is waited for: \
         `receive --name {guest}` waits for it, and --guest-name {guest} beside another --name \
         gives it that name"
    )]
    OtherName {
        /// Its name.
        guest: String,
        /// The name that is waited for.
        awaited: String,
    },
    /// The peer's guest is larger than this side takes.
    #[error(
        "operator: the guest has {} of memory, and at most {} may come here: \
         `receive --max-memory` allows more", size(*pages), size(*most)
    )]
    TooLarge {
        /// Pages that it has.
        pages: u64,
        /// Pages that it may have.
        most: u64,
    },
    /// The two sides have no version of the protocol in common.
    #[error(
        "peer: it speaks versions {min} to {max} of the protocol, and this side {} to {}",
        VERSIONS.0, VERSIONS.1
    )]
    Version {
        /// Its oldest.
        min: u16,
        /// Its newest.
        max: u16,
    },
    /// The host's processors cannot run the guest.
    #[error("the guest cannot run on this host")]
    Cpu(#[from] CpuMismatch),
    /// The peer gave up and said why.
    #[error("the other side gave up: {reason}")]
    GivenUp {
        /// In its own words, as printable ASCII.
        reason: String,
    },
    /// The monitor of this side failed.
    #[error("monitor: {what}")]
    Machine {
        /// What it was asked.
        what: &'static str,
        /// What it said.
        #[source]
        source: MachineError,
    },
    /// The guest writes faster than can be sent.
    #[error(
        "the guest writes faster than it can be moved: {remaining_pages} pages after {rounds} \
         rounds, held back by {throttle} %"
    )]
    NotConverging {
        /// Rounds that were sent.
        rounds: u32,
        /// Pages that were left.
        remaining_pages: u64,
        /// How far its processors were held back, in per cent.
        throttle: u8,
    },
    /// Somebody asked for the end.
    #[error("cancelled")]
    Cancelled,
    /// The operator asked for what cannot be.
    #[error("operator: {what}")]
    Operator {
        /// What is wrong with it.
        what: String,
    },
    /// A file cannot be read or written.
    #[error("file: {what} {path}")]
    File {
        /// What was done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is no snapshot that a guest can be made of.
    #[error("file: {path} is no snapshot of this program: {what}")]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        what: String,
    },
    /// A snapshot is not as it was written, or changed since it was opened.
    #[error("file: {path} is damaged: {what} is not as it was written")]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// What it was.
        what: &'static str,
    },
    /// A file of certificates or a key is none.
    #[error("tls: {what} {path}")]
    TlsFile {
        /// What was done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A certificate or a key is not usable, or the peer's was refused.
    #[error("tls: {what}")]
    Tls {
        /// What was done.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl MigrationError {
    pub(crate) fn machine(what: &'static str) -> impl Fn(MachineError) -> Self {
        move |source| Self::Machine { what, source }
    }

    /// The same of who is no peer: a file that is read as a peer is heard.
    pub(crate) fn of_file(self, path: &Path) -> Self {
        let path = path.to_owned();
        match self {
            Self::Peer { what } => Self::Snapshot { path, what: what.to_owned() },
            Self::Damaged { what } => Self::DamagedFile { path, what },
            Self::Layout(why) => Self::Snapshot { path, what: why.to_string() },
            other => other,
        }
    }

    /// What its operator can do about it. Where the monitor failed, that knows better.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Link { .. } | Self::Closed => {
                "see the log of the other side: it may have ended, not believe this side's \
                 certificate, or have --plain where this side has not"
            }
            Self::Connect { .. } => {
                "check the address, that `aerostat receive` waits there, and that both sides have \
                 certificates of one authority, or both --plain"
            }
            Self::Listen { .. } => {
                "choose an address of this host and a port that is free (--listen)"
            }
            Self::Stalled => "check that the other side still runs, and the network between",
            Self::TooSlow { .. } => {
                "check how busy the other side and the network are, or allow more (--max-downtime)"
            }
            Self::Damaged { .. } => "check the network between the hosts, and try again",
            Self::Peer { .. } | Self::Version { .. } | Self::Layout(_) => {
                "run the same release of Aerostat on both sides"
            }
            Self::OtherName { .. } => "give `receive` the guest's name, or --guest-name",
            Self::TooLarge { .. } => "give `receive` a larger --max-memory",
            Self::Cpu(_) => "choose a host whose processor can all that the guest was told",
            Self::GivenUp { .. } => "the reason is the other side's; see its log, and try again",
            Self::Machine { .. } => "see the reason, and the monitor's log",
            Self::NotConverging { .. } => {
                "let it stand still for longer (--max-downtime), give it more --bandwidth, or have \
                 the guest do less meanwhile"
            }
            Self::Cancelled => "it was stopped by its operator or with its monitor; start it again",
            Self::Operator { .. } => "see docs/operations.md",
            Self::File { source, .. } => hint_of_file(source.kind()),
            Self::Snapshot { .. } => "give a file that `aerostat snapshot` has written, whole",
            Self::DamagedFile { .. } => "give another copy of the file",
            Self::Tls { .. } | Self::TlsFile { .. } => {
                "give a certificate, its key and the authority's certificate as PEM files that the \
                 guest's monitor may read"
            }
        }
    }

    /// An error of a connection by its kind.
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

    /// The error with what caused it, on one line: what the peer is told, what is logged, and what an
    /// operator is answered. Nothing that a peer named can hide in it.
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

/// So many pages, in the words of a size.
fn size(pages: u64) -> String {
    let kib = pages.saturating_mul(PAGE_BYTES as u64 >> 10);
    if kib.is_multiple_of(1 << 10) { format!("{} MiB", kib >> 10) } else { format!("{kib} KiB") }
}

const fn hint_of_file(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => "check the path, which is looked up where the monitor runs",
        io::ErrorKind::PermissionDenied => "check what the monitor's user may do there",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room there, or choose another file system"
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
    fn nothing_hides_in_an_error() {
        let what = "disk \u{202e}gmi.a\u{2028}\x1b[2J".to_owned();
        let chain = MigrationError::Operator { what }.chain();
        assert_eq!(chain, "operator: disk \\u{202e}gmi.a\\u{2028}\\u{1b}[2J");
    }
}
