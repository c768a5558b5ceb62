//! `aerostat run`: the VMM. Boots a guest with its balloon in the same process.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use control::{GuestName, Size};
use vmm::{DiskOptions, End, Error, MAX_CPUS, RunOptions};

use crate::balloon_arg::{Feature, features};
use crate::disk_arg::disk;
use crate::guest_arg::guest_name;
use crate::host_arg::HostArgs;
use cli::failure::{Exit, Failure};

/// Boot and run a Linux guest on KVM, with its balloon
///
/// The guest's serial line is standard input and output; on a terminal, Ctrl-A x
/// ends the guest. Exits with 0 after the guest has powered off, requested a reset
/// or been migrated, and on SIGTERM or SIGINT; with 1 if the guest's kernel
/// panicked.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Name of the guest, used by the other commands
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// Guest memory, such as 1GiB; a multiple of 2 MiB
    #[arg(long, value_name = "SIZE")]
    memory: Size,

    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    cpus: u8,

    /// Kernel: a bzImage (vmlinuz), or a vmlinux with a PVH entry [default: the newest
    /// in /boot, with its initrd]
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Initrd
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1")]
    cmdline: String,

    /// A disk: a raw file whose size is a multiple of 512 bytes, or a block device; up
    /// to seven times
    #[arg(long = "disk", value_name = "FILE[,readonly]", value_parser = disk)]
    disks: Vec<DiskOptions>,

    /// Balloon features not to offer to the guest, separated by commas
    #[arg(long, value_name = "FEATURE", value_enum, value_delimiter = ',')]
    without: Vec<Feature>,

    /// Offer nested virtualisation (SVM, VMX) to the guest. While its kernel has KVM
    /// loaded, the guest can be neither migrated nor saved
    #[arg(long)]
    nested: bool,

    #[command(flatten)]
    host: HostArgs,
}

/// Directory of installed kernels, and Debian's file names.
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
    let options = RunOptions {
        host: args.host.options(&args.name, args.disks)?,
        memory_bytes: args.memory.0,
        cpus: args.cpus,
        kernel,
        initrd,
        command_line: args.cmdline,
        without: features(&args.without),
        nested: args.nested,
    };
    args.host.restrict_calls()?;
    ended(&options.host.name, vmm::run(&options))
}

/// Converts the end of a guest into the result of the command.
pub(crate) fn ended(name: &str, end: Result<End, Error>) -> Result<(), Failure> {
    match end.map_err(failure)? {
        End::PoweredOff | End::Reset | End::Stopped => Ok(()),
        End::Moved => {
            diagnostics::log_line!("{name}: migrated to another host");
            Ok(())
        }
        End::Panicked => Err(Failure {
            what: format!("guest: the kernel of {name} panicked"),
            hint: "see the guest's console".into(),
            exit: Exit::Failed,
        }),
    }
}

fn failure(error: Error) -> Failure {
    match error {
        Error::Control(error) => error.into(),
        error => Failure::new(&error, error.hint()),
    }
}

/// Returns the newest kernel in a directory, and its initrd if it has one.
fn installed(directory: &Path) -> Result<(PathBuf, Option<PathBuf>), Failure> {
    let missing = || Failure {
        what: format!("no {KERNEL_PREFIX}* in {}", directory.display()),
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

/// Returns the numbers in a version, for comparison.
fn numbers(version: &str) -> Vec<u64> {
    let digits = version.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
    digits.map(|word| word.parse().unwrap_or(u64::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_found_with_its_initrd() {
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
