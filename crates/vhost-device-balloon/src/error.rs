//! Errors of the back end and of a session, and whose fault they are.

use std::io;
use std::path::PathBuf;

/// Why the back end cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Cannot connect to the front end's socket.
    #[error("host: cannot connect to {path}")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The limit of open files is too low for so many guests.
    #[error("host: the guests may need {wanted} open files, and the hard limit is {limit}")]
    TooManyGuests {
        /// Most files that the guests may need.
        wanted: u64,
        /// The hard limit.
        limit: u64,
    },
    /// The state file cannot be opened or read.
    #[error("host: cannot use the state file {path}")]
    State {
        /// The file's path.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A basic resource of the host was refused.
    #[error("host: {what} failed")]
    Host {
        /// The failed operation.
        what: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The balloon could not be created.
    #[error(transparent)]
    Balloon(#[from] balloon_host::HostError),
    /// A socket could not be created or served.
    #[error(transparent)]
    Control(#[from] control::ControlError),
}

/// Why a front end's session ended with an error.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The front end violated the protocol.
    #[error("front end: {0}")]
    Violation(#[from] Violation),
    /// The connection ended in the middle of a message.
    #[error("front end: closed the connection in the middle of a message")]
    Truncated,
    /// Receiving failed.
    #[error("front end: cannot receive")]
    Receive(#[source] io::Error),
    /// An answer could not be sent.
    #[error("front end: cannot send")]
    Send(#[source] io::Error),
    /// The session's code panicked, so its position in the message stream is lost.
    #[error("host: serving the front end failed")]
    Panicked(#[source] diagnostics::Panicked),
    /// Guest memory could not be mapped.
    #[error("front end: guest memory cannot be mapped")]
    Map(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An access to mapped guest memory raised SIGBUS.
    #[error(
        "host: there is no memory behind guest address {address:#x}: the file was truncated, \
         or the host is out of memory (huge pages: see vm.nr_hugepages and HugePages_Free in \
         /proc/meminfo; tmpfs: its size; else vm.overcommit_memory and CommitLimit)"
    )]
    Unbacked {
        /// The first inaccessible guest physical address.
        address: u64,
    },
    /// A host operation failed.
    #[error("host: {what} failed")]
    Host {
        /// The operation.
        what: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// How a front end violated the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Wrong version or direction in a header.
    #[error("a header with invalid flags {flags:#x}")]
    Header {
        /// The flags.
        flags: u32,
    },
    /// A payload that is too long, or too short for its request.
    #[error("request {request} with an invalid payload of {size} bytes")]
    PayloadSize {
        /// The request.
        request: u32,
        /// Bytes in the header, or bytes left.
        size: usize,
    },
    /// More file descriptors than a message may carry.
    #[error("too many file descriptors in one message")]
    TooManyFds,
    /// The wrong number of file descriptors for the request.
    #[error("request {request} with a wrong number of file descriptors: {count}")]
    FdCount {
        /// The request.
        request: u32,
        /// File descriptors received.
        count: usize,
    },
    /// A request that is unknown or was not negotiated.
    #[error("request {request}, which is unknown or was not negotiated")]
    UnknownRequest {
        /// The request.
        request: u32,
    },
    /// Features that were not offered.
    #[error("features {features:#x}, which were not offered")]
    Features {
        /// The bits that were not offered.
        features: u64,
    },
    /// A change of features while queues run.
    #[error("a change of features while queues run")]
    FeaturesWhileRunning,
    /// A queue that does not exist.
    #[error("queue {index}, which does not exist")]
    NoSuchQueue {
        /// Its index.
        index: u32,
    },
    /// An invalid size, base or address of a queue.
    #[error("queue {index} with an invalid size, base or address")]
    QueueSetup {
        /// Its index.
        index: u32,
    },
    /// An address in no region of the memory table.
    #[error("address {address:#x} is in no memory region")]
    NoSuchAddress {
        /// The front end's address.
        address: u64,
    },
    /// An invalid memory table.
    #[error("an invalid memory table")]
    MemoryTable,
    /// A region in hugetlbfs that is not aligned to huge pages.
    #[error(
        "a memory region of {bytes:#x} bytes at file offset {file_offset:#x} that is not aligned \
         to its huge pages of {page_bytes:#x} bytes"
    )]
    PartialHugePages {
        /// Bytes of the region.
        bytes: u64,
        /// Its offset in the file.
        file_offset: u64,
        /// Bytes of a huge page.
        page_bytes: u64,
    },
    /// More guest memory than the limit.
    #[error(
        "{bytes} bytes of guest memory, more than the limit of {limit}; raise it with \
         `--max-guest-memory`"
    )]
    TooMuchMemory {
        /// Bytes of all regions.
        bytes: u64,
        /// The limit: the operator's, or derived from the host's memory.
        limit: u64,
    },
    /// Guest memory that is not sealed, although the operator requires it.
    #[error("guest memory that is not sealed against shrinking (F_SEAL_SHRINK)")]
    UnsealedMemory,
    /// A kick or call file that is no eventfd, pipe or socket.
    #[error("queue {index} with a kick or call file that is no eventfd, pipe or socket")]
    NotifyFile {
        /// Its index.
        index: u32,
    },
    /// An invalid inflight region, or one that became inaccessible.
    #[error("an invalid or inaccessible inflight region")]
    Inflight,
    /// A queue without a kick file descriptor, which requests polling.
    #[error("queue {index} without a kick file descriptor")]
    NoKick {
        /// Its index.
        index: u32,
    },
}

impl SessionError {
    /// Returns true if the front end exited or closed the connection with messages in flight,
    /// as a killed VMM does.
    pub fn is_hang_up(&self) -> bool {
        let (Self::Receive(error) | Self::Send(error)) = self else { return false };
        matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
    }

    /// The name in the control API and the metrics.
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
