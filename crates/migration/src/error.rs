//! Why a migration failed, and whose fault it was.

use std::io;
use std::path::PathBuf;

use crate::cpu::CpuMismatch;
use crate::layout::LayoutError;
use crate::seams::MachineError;

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
    /// The peer closed the connection, or died.
    #[error("network: the peer closed the connection")]
    Closed,
    /// Nothing came, or nothing could be sent, for too long.
    #[error("network: the peer is silent")]
    Stalled,
    /// The guest stood still for too long, while the peer was slow but not silent.
    #[error("network: the peer is too slow, the guest stood still for more than {} s", limit.as_secs())]
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
    /// The peer's guest is larger than this side takes.
    #[error("the guest has {pages} pages of memory, {most} are allowed here")]
    TooLarge {
        /// Pages that it has.
        pages: u64,
        /// Pages that it may have.
        most: u64,
    },
    /// The two sides have no version of the protocol in common.
    #[error("peer: it speaks versions {min} to {max} of the protocol, which is not ours")]
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
    #[error("this side's monitor: {what}")]
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
    #[error("{what} {path}")]
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
    #[error("file: {what}")]
    Snapshot {
        /// What was wrong.
        what: &'static str,
    },
    /// A snapshot is not as it was written, or changed since it was opened.
    #[error("file: {what} is damaged")]
    DamagedFile {
        /// What it was.
        what: &'static str,
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
    pub(crate) fn of_file(self) -> Self {
        match self {
            Self::Peer { what } => Self::Snapshot { what },
            Self::Damaged { what } => Self::DamagedFile { what },
            Self::Layout(_) => Self::Snapshot { what: "it is of a guest with impossible memory" },
            other => other,
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

    /// The error with what caused it, on one line: what the peer is told and what is logged.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text += ": ";
            text += &cause.to_string();
            next = cause.source();
        }
        text
    }
}
