//! What ends a session, and whose fault it was.

use std::io;
use std::path::PathBuf;

/// The back end cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The monitor's socket cannot be connected to.
    #[error("host: cannot connect to {path}")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The limit of open files does not do for so many guests.
    #[error("host: the guests may need {wanted} open files, and this user may have {limit}")]
    TooManyGuests {
        /// Files that are needed at worst.
        wanted: u64,
        /// The hard limit.
        limit: u64,
    },
    /// The file that outlives the process could not be read.
    #[error("host: cannot keep state in {path}")]
    State {
        /// The file's path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something that every process has was refused.
    #[error("host: {what} failed")]
    Host {
        /// The call.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The balloon could not be made.
    #[error(transparent)]
    Balloon(#[from] balloon_host::HostError),
    /// A socket could not be made or served.
    #[error(transparent)]
    Control(#[from] control::ControlError),
}

/// One front end's connection ended otherwise than by hanging up.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The front end broke the protocol.
    #[error("front end: {0}")]
    Violation(#[from] Violation),
    /// The connection ended in the middle of a message.
    #[error("front end: hung up in the middle of a message")]
    Truncated,
    /// The connection broke.
    #[error("front end: cannot receive")]
    Receive(#[source] io::Error),
    /// An answer could not be sent.
    #[error("front end: cannot send")]
    Send(#[source] io::Error),
    /// The back end itself failed, and lost its place in what this front end said.
    #[error("host: serving the monitor failed")]
    Panicked(#[source] diagnostics::Panicked),
    /// Guest memory could not be mapped.
    #[error("front end: guest memory cannot be mapped")]
    Map(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Guest memory was mapped, and when it was touched nothing was behind it.
    #[error(
        "host: there is no memory behind guest address {address:#x}: the file was shortened, \
         or the host has none to give (huge pages: see vm.nr_hugepages and HugePages_Free in \
         /proc/meminfo; a tmpfs: its size; else vm.overcommit_memory and CommitLimit)"
    )]
    Unbacked {
        /// The first address that was touched in vain.
        address: u64,
    },
    /// Something of the host's failed.
    #[error("host: {what} failed")]
    Host {
        /// The call.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// How a front end broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Version or direction of a header.
    #[error("a header with flags {flags:#x}")]
    Header {
        /// The flags.
        flags: u32,
    },
    /// A payload that is too long, or too short for its request.
    #[error("request {request} with a payload of {size} bytes")]
    PayloadSize {
        /// The request.
        request: u32,
        /// Bytes announced or left.
        size: usize,
    },
    /// More file descriptors than a message may carry.
    #[error("too many file descriptors in one message")]
    TooManyFds,
    /// Not exactly the file descriptors that the request needs.
    #[error("request {request} with {count} file descriptors")]
    FdCount {
        /// The request.
        request: u32,
        /// How many came.
        count: usize,
    },
    /// A request that was not negotiated or that no version knows.
    #[error("request {request}, which was not negotiated")]
    UnknownRequest {
        /// The request.
        request: u32,
    },
    /// Features that were not offered.
    #[error("features {features:#x}, which were not offered")]
    Features {
        /// The bits too many.
        features: u64,
    },
    /// Another set of features while queues run.
    #[error("other features while queues run")]
    FeaturesWhileRunning,
    /// A queue that does not exist.
    #[error("queue {index}, which does not exist")]
    NoSuchQueue {
        /// Its number.
        index: u32,
    },
    /// A size, base or address that no queue can have.
    #[error("queue {index} cannot be set up so")]
    QueueSetup {
        /// Its number.
        index: u32,
    },
    /// An address in no region of the memory table.
    #[error("address {address:#x} is in no memory region")]
    NoSuchAddress {
        /// The front end's address.
        address: u64,
    },
    /// A memory table that no guest can have.
    #[error("a memory table that makes no sense")]
    MemoryTable,
    /// A part of a file of huge pages that is not made of whole ones.
    #[error(
        "a memory region of {bytes:#x} bytes at {file_offset:#x} of its file, whose huge pages \
         are of {page_bytes:#x}: both must be multiples of that"
    )]
    PartialHugePages {
        /// Bytes of the region.
        bytes: u64,
        /// Where it starts in the file.
        file_offset: u64,
        /// Bytes of a page.
        page_bytes: u64,
    },
    /// More guest memory than is taken here.
    #[error(
        "{bytes} bytes of guest memory, of which at most {limit} are taken for one guest; \
         `--max-guest-memory` takes more"
    )]
    TooMuchMemory {
        /// Bytes of all regions.
        bytes: u64,
        /// The limit, which follows from the host or is the operator's.
        limit: u64,
    },
    /// Guest memory that can shrink, where it must not.
    #[error("guest memory that is not sealed against shrinking (F_SEAL_SHRINK)")]
    UnsealedMemory,
    /// A kick or call file that cannot notify: no event file, pipe or socket.
    #[error("queue {index} with a file that cannot notify")]
    NotifyFile {
        /// Its number.
        index: u32,
    },
    /// Memory for inflight tracking that cannot be it, or is not any more.
    #[error("memory for inflight tracking that makes no sense")]
    Inflight,
    /// A queue was to be polled, without a file descriptor for kicks.
    #[error("queue {index} without a file descriptor for kicks")]
    NoKick {
        /// Its number.
        index: u32,
    },
}

impl SessionError {
    /// Whether the front end's process ended, or closed the connection, with
    /// messages under way. A guest that is killed does that.
    pub fn is_hang_up(&self) -> bool {
        let (Self::Receive(error) | Self::Send(error)) = self else { return false };
        matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
    }

    /// The word that the control API and the metrics count it under.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Violation(_) => "protocol_violation",
            Self::Truncated => "truncated_message",
            Self::Receive(_) | Self::Send(_) => "broken_connection",
            Self::Panicked(_) => "session_panicked",
            Self::Map(_) => "unmappable_memory",
            Self::Unbacked { .. } => "unbacked_memory",
            Self::Host { .. } => "host_call_failed",
        }
    }
}
