//! `aerostat run`: boots a guest with its balloon in the same process.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use control::{GuestName, Size, ensure_runtime_dir, socket_path};
use vmm::{DiskOptions, End, Error, MAX_CPUS, MemoryKind, Options};

use crate::cmd::vhost_user::{Feature, Partial, Release, features, guest_name};
use crate::disk_arg::disk;
use crate::failure::{Exit, Failure};

/// Boots a Linux guest on KVM, with its balloon, and serves it to its end
///
/// The guest's serial line is standard input and output; at a terminal, Ctrl-A x
/// ends the guest. Ends with 0 when the guest switched itself off or asked for a
/// reset, when it was moved to another host, or when this process was asked to
/// end; with 1 when the guest's kernel panicked.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Name of the guest, for the other commands
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// Memory of the guest, such as 1GiB; a multiple of 2 MiB
    #[arg(long, value_name = "SIZE")]
    memory: Size,

    /// Processors of the guest
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    cpus: u8,

    /// Kernel: a bzImage (vmlinuz), or a vmlinux with a PVH entry; the newest in
    /// /boot, with its initial RAM disk, if it is not given
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,

    /// Command line of the kernel
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1")]
    cmdline: String,

    /// A disk: a raw file of whole sectors of 512 bytes, or a block device; may be
    /// given up to seven times
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = disk)]
    disks: Vec<DiskOptions>,

    /// Keep the guest's memory in a file that other processes can be given
    #[arg(long)]
    shared: bool,

    /// Use huge pages for the guest's memory: transparent ones, or with --shared
    /// those that the host has set aside
    #[arg(long)]
    huge: bool,

    /// When pages that the guest gave are released
    #[arg(long, value_enum, default_value_t = Release::Background)]
    release: Release,

    /// What becomes of parts of the host's huge pages
    #[arg(long, value_enum, default_value_t = Partial::Split)]
    partial_huge: Partial,

    /// Features that the guest is not offered, separated by commas
    #[arg(long, value_name = "FEATURE", value_enum, value_delimiter = ',')]
    without: Vec<Feature>,

    /// Control socket; by the name, in the runtime directory, if it is not given
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Leave the process all system calls (no seccomp)
    #[arg(long)]
    no_seccomp: bool,
}

/// Where distributions install kernels, and how Debian names them.
const BOOT: &str = "/boot";
const KERNEL_PREFIX: &str = "vmlinuz-";
const INITRD_PREFIX: &str = "initrd.img-";

pub(crate) fn run(args: RunArgs) -> Result<(), Failure> {
    let (kernel, initrd) = match args.kernel {
        Some(kernel) => (kernel, args.initrd),
        None => {
            let (kernel, initrd) = installed(Path::new(BOOT))?;
            (kernel, args.initrd.or(initrd))
        }
    };
    let options = Options {
        name: args.name.to_string(),
        control: control_socket(args.control, &args.name)?,
        memory_bytes: args.memory.0,
        memory: MemoryKind { shared: args.shared, huge: args.huge },
        cpus: args.cpus,
        kernel,
        initrd,
        command_line: args.cmdline,
        disks: args.disks,
        release: args.release.into(),
        partial_huge: args.partial_huge.into(),
        without: features(&args.without),
    };
    give_up_calls(args.no_seccomp)?;
    ended(&options.name, vmm::run(&options))
}

/// Restricts the process to what running a guest needs. Before anything is made, so that no
/// thread escapes it.
pub(crate) fn give_up_calls(no_seccomp: bool) -> Result<(), Failure> {
    if no_seccomp {
        tracing::warn!("system calls are not restricted: --no-seccomp");
        return Ok(());
    }
    sandbox::restrict_calls_of_monitor()
        .map_err(|error| Failure::new(&error, "--no-seccomp goes on without"))
}

/// Where the control API listens.
pub(crate) fn control_socket(given: Option<PathBuf>, name: &GuestName) -> Result<PathBuf, Failure> {
    match given {
        Some(path) => Ok(path),
        None => {
            ensure_runtime_dir()?;
            Ok(socket_path(name)?)
        }
    }
}

/// What a guest's end says of this process.
pub(crate) fn ended(name: &str, end: Result<End, Error>) -> Result<(), Failure> {
    match end.map_err(failure)? {
        End::PoweredOff | End::Reset | End::Stopped => Ok(()),
        End::Moved => {
            eprintln!("{name}: runs on another host now");
            Ok(())
        }
        End::Panicked => Err(Failure {
            what: format!("guest: the kernel of {name} panicked"),
            hint: "see what it printed".into(),
            exit: Exit::Failed,
        }),
    }
}

fn failure(error: Error) -> Failure {
    let hint = match error {
        Error::Control(error) => return error.into(),
        Error::Option { .. } => "see `aerostat run --help`",
        Error::File { .. } => "check the path and who may read it",
        Error::InUse { .. } => "end that guest first, or give this one a copy of the file",
        Error::Kernel { .. } => "give a vmlinuz, or a vmlinux built with CONFIG_PVH",
        Error::TooSmall { .. } => "give the guest more --memory",
        Error::Kvm { .. } => "check that /dev/kvm exists and that this user may use it",
        Error::Memory { .. } => "check how much memory, and how many huge pages, the host has",
        Error::Migration(_) => "check the address, the certificates and --wait",
        Error::Processor { .. } => "see what the guest printed",
        _ => "check the limits of this user",
    };
    Failure::new(&error, hint)
}

/// The newest kernel in a directory, and its initial RAM disk if it has one.
fn installed(directory: &Path) -> Result<(PathBuf, Option<PathBuf>), Failure> {
    let missing = || Failure {
        what: format!("there is no {KERNEL_PREFIX}* in {}", directory.display()),
        hint: "give one with --kernel, or install linux-image-cloud-amd64".into(),
        exit: Exit::Failed,
    };
    let entries = fs::read_dir(directory).map_err(|_| missing())?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let versions = names.filter_map(|name| Some(name.strip_prefix(KERNEL_PREFIX)?.to_owned()));
    let newest = versions.max_by_key(|version| numbers(version)).ok_or_else(missing)?;
    let initrd = directory.join(format!("{INITRD_PREFIX}{newest}"));
    let kernel = directory.join(format!("{KERNEL_PREFIX}{newest}"));
    Ok((kernel, initrd.exists().then_some(initrd)))
}

/// The numbers in a version, by which versions are ordered.
fn numbers(version: &str) -> Vec<u64> {
    let digits = version.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
    digits.map(|word| word.parse().unwrap_or(u64::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_found_with_its_ram_disk() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        assert!(installed(directory.path()).unwrap_err().what.contains("vmlinuz-"));
        for name in ["vmlinuz-6.1.0-56-cloud-amd64", "initrd.img-6.1.0-56-cloud-amd64", "config"] {
            fs::write(path(name), "").unwrap();
        }
        let old = path("vmlinuz-6.1.0-56-cloud-amd64");
        let initrd = path("initrd.img-6.1.0-56-cloud-amd64");
        assert_eq!(installed(directory.path()).unwrap(), (old, Some(initrd)));
        fs::write(path("vmlinuz-6.12.117+deb12-cloud-amd64"), "").unwrap();
        let new = path("vmlinuz-6.12.117+deb12-cloud-amd64");
        assert_eq!(installed(directory.path()).unwrap(), (new, None));
    }
}
