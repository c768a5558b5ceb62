//! What ends a guest otherwise than by its own wish, and whose fault it was.

use std::io;
use std::path::PathBuf;

use migration::MigrationError;

/// The first call to KVM, which fails for other reasons than the others do.
pub(crate) const OPENING_KVM: &str = "opening /dev/kvm";

/// What an operator can do about a migration, a snapshot or a restore that failed: where the
/// machine failed in it, what the machine knows.
pub(crate) fn hint_of(error: &MigrationError) -> String {
    if let MigrationError::Machine { source, .. } = error
        && let Some(error) = source.downcast_ref::<Error>()
    {
        return error.hint();
    }
    error.hint().to_owned()
}

/// The monitor cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option that no guest can have.
    #[error("operator: {what}")]
    Option {
        /// What is wrong with it.
        what: String,
    },
    /// A file that the operator named cannot be read.
    #[error("operator: cannot read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A disk that another guest has.
    #[error("operator: {path} is in use: another guest has this disk")]
    InUse {
        /// Its file.
        path: PathBuf,
    },
    /// A disk to which not all could be written that the guest wrote.
    #[error(
        "host: not all that the guest wrote to {path} is there; it is told so when it flushes next"
    )]
    Lost {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file that is no kernel which this monitor can boot.
    #[error("operator: {path} is no kernel that can be booted: {why}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// What is to be loaded does not fit into the guest's memory.
    #[error("operator: {what} of {bytes} bytes does not fit into the guest's memory")]
    TooSmall {
        /// What is to be loaded.
        what: &'static str,
        /// Its size.
        bytes: u64,
    },
    /// KVM is missing, or refuses a call.
    #[error("host: {what} failed")]
    Kvm {
        /// The call.
        what: &'static str,
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
    /// The guest's memory cannot be had.
    #[error("host: {what} of the guest's memory failed")]
    Memory {
        /// The step.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The balloon could not be made.
    #[error(transparent)]
    Balloon(#[from] balloon_host::HostError),
    /// The control socket could not be served.
    #[error(transparent)]
    Control(#[from] control::ControlError),
    /// A guest could not come here.
    #[error(transparent)]
    Migration(#[from] migration::MigrationError),
    /// Something that the guest has to wait for does not come.
    #[error("host: {what}")]
    Stuck {
        /// What, and for how long it was waited for.
        what: String,
    },
    /// Something that this monitor cannot do with this host or guest.
    #[error("host: this monitor cannot save or restore {what}")]
    Unsupported {
        /// What it cannot.
        what: String,
    },
    /// A guest that is ready to run guests of its own, whose state is more than is saved.
    #[error(
        "guest: processor {cpu} has virtualization switched on ({register} is {value:#x}), which \
         can be neither moved nor written to a file: remove kvm_amd or kvm_intel in the guest \
         (rmmod), or boot it without --nested"
    )]
    Nested {
        /// Its number.
        cpu: usize,
        /// Where that is.
        register: &'static str,
        /// What is there.
        value: u64,
    },
    /// A state that no machine of this monitor can have: the fault of who sent it.
    #[error("sender: the state of {section} makes no sense: {why}")]
    State {
        /// The part of it.
        section: String,
        /// What is wrong with it.
        why: String,
    },
    /// A guest whose machine was made by another version of this monitor.
    #[error(
        "sender: the guest's {what} is of version {theirs}, and this program has version {ours}: \
         use the program that the guest was booted with, or boot the guest anew"
    )]
    Version {
        /// Its machine, or its state.
        what: &'static str,
        /// The guest's.
        theirs: u32,
        /// The one that this monitor makes and takes.
        ours: u32,
    },
    /// A processor of the guest stopped in a way from which it cannot go on.
    #[error("guest: processor {cpu} stopped: {why}")]
    Processor {
        /// Its number.
        cpu: u8,
        /// What KVM said.
        why: String,
    },
}

impl Error {
    /// What its operator can do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        let hint = match self {
            Self::Control(error) => return error.hint(),
            Self::Migration(error) => return hint_of(error),
            Self::Option { .. } => "see --help of the command, and docs/operations.md",
            Self::File { .. } => "check the path and who may read it",
            Self::InUse { .. } => "end that guest first, or give this one a copy of the file",
            Self::Lost { .. } => {
                "check the host's disk and the kernel's log; once the guest has flushed (`sync` in \
                 it) and knows of the error, it can be moved"
            }
            Self::Kernel { .. } => "give a vmlinuz, or a vmlinux built with CONFIG_PVH",
            Self::TooSmall { .. } => "give the guest more --memory",
            Self::Kvm { what, .. } if *what == OPENING_KVM => {
                "check that /dev/kvm exists and that this user may use it"
            }
            Self::Kvm { .. } => "see the kernel's log; another release of it may be needed",
            Self::Memory { .. } => "check how much memory, and how many huge pages, the host has",
            Self::Processor { .. } => "see what the guest printed",
            Self::Version { .. } | Self::State { .. } => {
                "have the same release of Aerostat on both sides, or that which wrote the file"
            }
            Self::Nested { .. } => {
                "remove kvm_amd or kvm_intel in the guest (rmmod), or boot it without --nested"
            }
            Self::Stuck { .. } => "find out what the host's disk or process waits for",
            Self::Unsupported { .. } => "run the guest on another host, or without what is named",
            Self::Balloon(_) | Self::Host { .. } => {
                "check the limits of this user (ulimit -a), and the kernel's log"
            }
        };
        hint.to_owned()
    }

    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { what, source: error.into() }
    }

    pub(crate) fn host<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::Host { what, source: error.into() }
    }

    pub(crate) fn memory<E>(what: &'static str) -> impl Fn(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |error| Self::Memory { what, source: error.into() }
    }
}

#[cfg(test)]
mod tests {
    use migration::MigrationError;

    use super::*;

    #[test]
    fn the_hint_is_that_of_what_kept_a_guest_from_coming() {
        let of = |source| Error::from(MigrationError::Machine { what: "making the guest", source });
        let option = || Error::Option { what: "the guest had another disk".to_owned() };
        assert_eq!(of(Box::new(option())).hint(), option().hint());
        let host = || Error::host::<io::Error>("fork")(io::Error::other("limits"));
        assert_eq!(of(Box::new(host())).hint(), host().hint());
        let other = of(Box::new(io::Error::other("broken"))).hint();
        assert!(!other.is_empty() && other != option().hint() && other != host().hint(), "{other}");
    }
}
