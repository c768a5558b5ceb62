//! Sandbox of a process that serves guests: Landlock limits file access to a few directories, and
//! seccomp allows only the system calls that serving a balloon or running a guest needs.
//!
//! A guest or front end that takes over the process gains access to its own memory and nothing
//! else. Restricting a process needs no privilege.

#![forbid(unsafe_code)]

mod calls;
mod files;

pub use calls::{Network, restrict_calls, restrict_vmm_calls};
pub use files::{Restricted, restrict_files};

/// The process could not be restricted.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel refused a rule for files.
    #[error("host: cannot restrict file system access (Landlock)")]
    Files(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel refused the filter for system calls.
    #[error("host: cannot restrict system calls (seccomp)")]
    Calls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There is no filter for this architecture.
    #[error("host: no system call filter exists for this architecture")]
    Architecture,
}
