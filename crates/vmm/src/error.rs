//! Errors that keep a guest from starting or end it, and whose fault each is.

use std::io;
use std::path::PathBuf;

use migration::MigrationError;

/// The first call to KVM, which fails for other reasons than later calls.
pub(crate) const OPENING_KVM: &str = "opening /dev/kvm";

/// The hint for a migration, snapshot or restore that failed: the machine's hint, if the machine
/// failed.
pub(crate) fn hint_of(error: &MigrationError) -> String {
    if let MigrationError::Machine { source, .. } = error
        && let Some(error) = source.downcast_ref::<Error>()
    {
        return error.hint();
    }
    error.hint().to_owned()
}

/// The VMM cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An invalid option.
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
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Another guest uses this disk.
    #[error("operator: {path} is in use: another guest has this disk")]
    InUse {
        /// The disk's file.
        path: PathBuf,
    },
    /// A disk lost some of the guest's writes.
    #[error("host: {path} lost writes of the guest, whose next flush will fail")]
    Lost {
        /// The disk's file.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A file that is not a bootable kernel.
    #[error("operator: {path} is not a bootable kernel: {why}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel or initrd does not fit into the guest's memory.
    #[error("operator: {what} of {bytes} bytes does not fit into the guest's memory")]
    TooSmall {
        /// The kernel or initrd.
        what: &'static str,
        /// Its size.
        bytes: u64,
    },
    /// KVM is missing, or refuses a call.
    #[error("host: {what} failed")]
    Kvm {
        /// The call.
        what: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses a system call.
    #[error("host: {what} failed")]
    Host {
        /// The call.
        what: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The guest's memory cannot be allocated or accessed.
    #[error("host: {what} of the guest's memory failed")]
    Memory {
        /// The step.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The balloon could not be created.
    #[error(transparent)]
    Balloon(#[from] balloon_host::HostError),
    /// The control socket could not be served.
    #[error(transparent)]
    Control(#[from] control::ControlError),
    /// A migration or restore failed.
    #[error(transparent)]
    Migration(#[from] migration::MigrationError),
    /// An operation did not finish in time.
    #[error("host: {what}")]
    Stuck {
        /// The operation and the time waited.
        what: String,
    },
    /// A guest or state that this host cannot save or restore.
    #[error("host: cannot save or restore {what}")]
    Unsupported {
        /// The guest or the part of its state.
        what: String,
    },
    /// A guest with nested virtualization enabled, whose nested state is not saved.
    #[error(
        "guest: vCPU {cpu} has virtualization enabled ({register} is {value:#x}) and cannot be \
         migrated or saved: remove kvm_amd or kvm_intel in the guest (rmmod), or boot it without \
         --nested"
    )]
    Nested {
        /// The vCPU's number.
        cpu: usize,
        /// The register that enables it.
        register: &'static str,
        /// The register's value.
        value: u64,
    },
    /// An invalid state; the sender's fault.
    #[error("sender: the state of {section} is invalid: {why}")]
    State {
        /// The name of the section.
        section: String,
        /// What is wrong with it.
        why: String,
    },
    /// A guest whose machine or state has another version.
    #[error(
        "sender: the guest's {what} has version {theirs}, but this program has version {ours}: \
         use the program that booted the guest, or reboot the guest"
    )]
    Version {
        /// The machine or the state.
        what: &'static str,
        /// The guest's version.
        theirs: u32,
        /// The version that this program supports.
        ours: u32,
    },
    /// A vCPU stopped and cannot continue.
    #[error("guest: vCPU {cpu} stopped: {why}")]
    Vcpu {
        /// The vCPU's number.
        cpu: u8,
        /// The exit reason.
        why: String,
    },
}

impl Error {
    /// What the operator can do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        let hint = match self {
            Self::Control(error) => return error.hint(),
            Self::Migration(error) => return hint_of(error),
            Self::Option { .. } => "see --help of the command, and docs/operations.md",
            Self::File { .. } => "check the path and who may read it",
            Self::InUse { .. } => "end that guest first, or give this guest a copy of the file",
            Self::Lost { .. } => {
                "check the host's disk and the kernel's log; run `sync` in the guest, which \
                 reports the error there, then migrate it again"
            }
            Self::Kernel { .. } => "give a vmlinuz, or a vmlinux built with CONFIG_PVH",
            Self::TooSmall { .. } => "give the guest more --memory",
            Self::Kvm { what, .. } if *what == OPENING_KVM => {
                "check that /dev/kvm exists and that this user may use it"
            }
            Self::Kvm { .. } => "see the kernel's log; another kernel release may be needed",
            Self::Memory { .. } => "check how much memory and how many huge pages are free",
            Self::Vcpu { .. } => "see the guest's console output",
            Self::Version { .. } | Self::State { .. } => {
                "use the same release of Aerostat on both hosts, or the one that wrote the file"
            }
            Self::Nested { .. } => {
                "remove kvm_amd or kvm_intel in the guest (rmmod), or boot it without --nested"
            }
            Self::Stuck { .. } => "check what the disk or process on the host waits for",
            Self::Unsupported { .. } => "use another host, or a guest without the named feature",
            Self::Balloon(_) | Self::Host { .. } => {
                "check this user's limits (ulimit -a) and the kernel's log"
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
    fn a_failed_migration_has_the_hint_of_the_machine_error() {
        let of = |source| Error::from(MigrationError::Machine { what: "making the guest", source });
        let option = || Error::Option { what: "the guest had another disk".to_owned() };
        assert_eq!(of(Box::new(option())).hint(), option().hint());
        let host = || Error::host::<io::Error>("fork")(io::Error::other("limits"));
        assert_eq!(of(Box::new(host())).hint(), host().hint());
        let other = of(Box::new(io::Error::other("broken"))).hint();
        assert!(!other.is_empty() && other != option().hint() && other != host().hint(), "{other}");
    }
}
