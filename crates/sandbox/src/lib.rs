//! What a process that serves guests gives up before it does: the file system
//! but for a few directories (Landlock), and every system call that serving a
//! balloon, or running a guest, does not need (seccomp).
//!
//! A guest or a monitor that gets hold of the process finds there its own memory
//! and nothing else. No privilege is needed to give privileges up.

#![forbid(unsafe_code)]

mod calls;
mod files;

pub use calls::{Network, restrict_calls, restrict_calls_of_monitor};
pub use files::{Restricted, restrict_files};

/// The process could not give something up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel refused a rule for files.
    #[error("host: file system access cannot be given up (Landlock)")]
    Files(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel refused the filter for system calls.
    #[error("host: system calls cannot be given up (seccomp)")]
    Calls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No list of system calls exists for this machine.
    #[error("host: there is no list of system calls for this architecture")]
    Architecture,
}
