//! What can go wrong, whose fault it is, and what to do about it.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use crate::size::Size;

/// Why what was asked of the guest has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// The present state does not allow it: no driver, no request queue, no hold.
    NotPossible,
    /// It was never asked.
    NotAsked,
    /// Too many requests wait.
    TooMany,
    /// The guest did not answer in time.
    TimedOut,
    /// It was stopped, or the guest went.
    Stopped,
    /// The guest refused, or broke the protocol.
    Refused,
}

impl WhyNot {
    const fn http_status(self) -> u16 {
        match self {
            Self::NotAsked => 404,
            Self::NotPossible | Self::Stopped => 409,
            Self::Refused => 502,
            Self::TooMany => 503,
            Self::TimedOut => 504,
        }
    }
}

/// Everything that can go wrong between a client and a balloon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    // The caller's fault, seen by the server.
    /// The target is more than the guest has.
    #[error(
        "a balloon of {} does not fit into a guest of {}",
        Size(*target_bytes), Size(*max_bytes)
    )]
    TargetTooLarge {
        /// What was asked for.
        target_bytes: u64,
        /// The largest target.
        max_bytes: u64,
    },
    /// The target is not a whole number of balloon pages.
    #[error("a balloon of {target_bytes} bytes is not a whole number of 4096-byte pages")]
    TargetUnaligned {
        /// What was asked for.
        target_bytes: u64,
    },
    /// The guest would be asked for statistics too often, or hardly ever.
    #[error("statistics every {interval_ms} ms are not possible")]
    StatsInterval {
        /// What was asked for.
        interval_ms: u64,
    },
    /// The guest would be given more time than it may have.
    #[error("a guest gets at most {limit_ms} ms for a request, and not {timeout_ms}")]
    TooLong {
        /// What was asked for.
        timeout_ms: u64,
        /// The limit.
        limit_ms: u128,
    },
    /// The request cannot be granted in the present state.
    #[error("{what}")]
    Refused {
        /// What was wrong.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// A size that cannot be.
    #[error("{what}")]
    BadSize {
        /// What was wrong.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// What was asked of the guest has no result.
    #[error("{what}")]
    Guest {
        /// The kind of reason.
        why: WhyNot,
        /// What was wrong, and whose fault it was.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// The request makes no sense.
    #[error("{what}")]
    BadRequest {
        /// What was wrong.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// No such path, or no such method on it.
    #[error("{what}")]
    NoSuchEndpoint {
        /// What was asked for.
        what: String,
        /// True when the path exists and only the method does not.
        method_only: bool,
    },
    /// The request body is over the limit.
    #[error("the request body is larger than {limit_bytes} bytes")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// The request did not arrive in time.
    #[error("the request did not arrive within {limit_ms} ms")]
    RequestTooSlow {
        /// The limit.
        limit_ms: u128,
    },
    /// Too many clients wait for changes.
    #[error("{limit} clients wait for a change already")]
    TooManyWaiters {
        /// The limit.
        limit: usize,
    },

    /// Others are served first.
    #[error("{what}")]
    Busy {
        /// What there is too much of.
        what: String,
        /// What to do about it.
        hint: String,
    },

    // The guest's fault.
    /// The guest did not answer in time.
    #[error("the guest did not answer within {limit_ms} ms")]
    GuestSilent {
        /// The time it had.
        limit_ms: u128,
    },

    // The server's fault.
    /// The balloon could not do it although it should have.
    #[error("{what}")]
    Failed {
        /// What was wrong.
        what: String,
        /// What to do about it.
        hint: String,
    },

    // Names and sockets.
    /// A guest's name has a form that is not accepted.
    #[error("{name:?} is not a name for a guest: {why}")]
    BadName {
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A socket's path is longer than the system can bind.
    #[error("the socket path {} has {} bytes, {limit_bytes} are possible", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// The limit.
        limit_bytes: usize,
    },
    /// There is no place for the sockets of guests.
    #[error("there is no directory for the sockets of guests: {why}")]
    NoRuntimeDir {
        /// What is missing.
        why: String,
    },
    /// Another process serves this socket.
    #[error("another process serves {} already", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is where the socket should be.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A thread or its event loop could not be started.
    #[error("cannot start the event loop of the control socket")]
    EventLoop {
        /// Why.
        source: io::Error,
    },

    // Seen by the client.
    /// There is no socket.
    #[error("there is no control socket at {}", path.display())]
    NotFound {
        /// Where it should be.
        path: PathBuf,
    },
    /// The socket is there, its process is not.
    #[error("nothing answers at {}: the process that served it is gone", path.display())]
    Dead {
        /// The socket.
        path: PathBuf,
    },
    /// The server did not answer in time.
    #[error("no answer from {} within {limit_ms} ms", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// The limit.
        limit_ms: u128,
    },
    /// The connection ended before the answer did.
    #[error("the connection to {} broke", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// How.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The server's answer makes no sense.
    #[error("the answer from {} is not what this API says", path.display())]
    BadAnswer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The server answered that it cannot or will not.
    #[error("{error}")]
    Answered {
        /// HTTP status of the answer.
        status: u16,
        /// What the server says was wrong.
        error: String,
        /// What the server says to do.
        hint: String,
    },
}

impl ControlError {
    /// Adds to an error of the operating system what was tried, and with what.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl Fn(E) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source: source.into() }
    }

    /// What to do about it, as one sentence without a full stop.
    pub fn hint(&self) -> String {
        match self {
            Self::TargetTooLarge { max_bytes, .. } => {
                format!(
                    "ask for less than {}; the guest needs some memory itself",
                    Size(*max_bytes)
                )
            }
            Self::TargetUnaligned { target_bytes: bytes @ ..4096 } => {
                let mib = Size(bytes << 20);
                format!("target_bytes counts bytes, {} of them are {mib:#}", mib.0)
            }
            Self::TargetUnaligned { target_bytes } => {
                format!("ask for {} bytes", target_bytes & !4095)
            }
            Self::TooLong { limit_ms, .. } => format!("set timeout_ms to {limit_ms} or less"),
            Self::Refused { hint, .. }
            | Self::BadSize { hint, .. }
            | Self::Guest { hint, .. }
            | Self::BadRequest { hint, .. }
            | Self::Busy { hint, .. }
            | Self::Failed { hint, .. }
            | Self::Answered { hint, .. } => hint.clone(),
            Self::NoSuchEndpoint { .. } => "see /v1/openapi.json for what exists".into(),
            Self::StatsInterval { .. } => "choose 100 to 86400000 ms, or 0 to ask no more".into(),
            Self::GuestSilent { .. } => {
                "check whether the guest runs, or give it more time by wait_ms".into()
            }
            Self::BodyTooLarge { .. } => "send only the fields that /v1/openapi.json names".into(),
            Self::RequestTooSlow { .. } => "send the whole request at once".into(),
            Self::TooManyWaiters { .. } => "ask without wait_ms, or again later".into(),
            Self::BadName { .. } => {
                "use up to 64 letters, digits, '.', '_' and '-', a letter or digit first".into()
            }
            Self::PathTooLong { .. } => {
                "choose a shorter path, or set AEROSTAT_RUNTIME_DIR to a shorter directory".into()
            }
            Self::NoRuntimeDir { .. } => {
                "set AEROSTAT_RUNTIME_DIR to a directory of your own, as an absolute path".into()
            }
            Self::SocketInUse { .. } => "stop that process, or choose another name".into(),
            Self::NotASocket { .. } => "remove it, or choose another path".into(),
            Self::Io { .. } => "check that the directory exists and that you may use it".into(),
            Self::EventLoop { .. } => "check the limits on threads and open files".into(),
            Self::NotFound { .. } => {
                "`aerostat status` lists the guests that run; check the name and the user".into()
            }
            Self::Dead { path } => {
                format!("start the guest's balloon again, or remove {}", path.display())
            }
            Self::NoAnswer { .. } => "check whether that process is stopped or overloaded".into(),
            Self::Broken { .. } => {
                "check whether that process still runs; where it does, ask again, since a client \
                 that is slow loses its connection when others need it"
                    .into()
            }
            Self::BadAnswer { .. } => {
                "check that client and server are of the same version of aerostat".into()
            }
        }
    }

    /// The HTTP status that tells a client of this error.
    pub fn http_status(&self) -> u16 {
        match self {
            Self::TargetTooLarge { .. }
            | Self::TargetUnaligned { .. }
            | Self::StatsInterval { .. }
            | Self::TooLong { .. }
            | Self::BadSize { .. } => 422,
            Self::Guest { why, .. } => why.http_status(),
            Self::BadRequest { .. } => 400,
            Self::NoSuchEndpoint { method_only: false, .. } => 404,
            Self::NoSuchEndpoint { method_only: true, .. } => 405,
            Self::RequestTooSlow { .. } => 408,
            Self::Refused { .. } => 409,
            Self::BodyTooLarge { .. } => 413,
            Self::TooManyWaiters { .. } | Self::Busy { .. } => 503,
            Self::GuestSilent { .. } => 504,
            _ => 500,
        }
    }
}
