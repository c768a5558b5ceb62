//! A working KVM, on any machine: the machine's own, or that of a nested guest.
//!
//! QEMU emulates the virtualisation extensions of AMD's CPUs, so a kernel inside has a working KVM
//! ("L1"). Programs of the host run there on the host's root file system, shared read-only.
//!
//! A host's `/dev/kvm` may exist and not work, so [`hardware`] boots a guest. [`check`] detects a
//! missing KVM without a boot.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use crate::available_memory;
use crate::debian::{self, DebianKernel, Release};
use crate::error::{LabError, Result};
use crate::guest::Guest;

/// Modules of the guest: KVM for the emulated CPU, and the shared root.
const MODULES: [&str; 6] = ["virtio_pci", "9pnet_virtio", "9p", "ccp", "kvm", "kvm_amd"];

/// Mount tag of the shared root.
const ROOT_TAG: &str = "root";

/// While an alarm is set, the kernel has the HPET interrupt 64 times a second
/// (CONFIG_HPET_EMULATE_RTC), in addition to the timer of its CPU.
///
/// QEMU 7.2 sometimes loses an interrupt when it emulates SVM: on a guest exit, `do_vmexit` clears
/// a bit in a word in which another thread sets interrupt bits, without a lock. The next interrupt
/// recovers the lost one. But a kernel arms its timer only after the timer has fired, so there may
/// be no next one. Such machines hung until a key was typed, or ran no other thread while a guest
/// was busy.
const ALARM: &str = "/sys/class/rtc/rtc0/wakealarm";
/// Seconds from now: the chip keeps no date, so less than a day.
const ALARM_AFTER: &str = "+86000";

/// Memory of the L1 kernel and a program, in addition to that of the program's guests.
const OWN_MEMORY_MIB: u64 = 768;

/// Memory of QEMU's emulation. Most is translated code: at most 1 GiB.
const EMULATOR_MIB: u64 = 1024;

/// Memory of a VMM and a benchmark program, in addition to the guest's.
const MONITOR_MIB: u64 = 256;

/// CPU flags for virtualisation: Intel's and AMD's.
const EXTENSIONS: [&str; 2] = ["vmx", "svm"];

const DEVICE: &str = "/dev/kvm";

/// A hardware KVM boots a small guest in about a second.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// Memory of the guest that is booted to probe.
const PROBE_MEMORY_MIB: u64 = 256;

/// Output and exit code of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Lines of standard output and standard error, in order.
    pub lines: Vec<String>,
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
}

/// A machine with KVM. Dropping this ends it.
pub struct KvmMachine {
    guest: Guest,
}

impl KvmMachine {
    /// Boots a machine with memory for guests of `guests_mib` in total.
    ///
    /// # Errors
    /// A dependency is missing, or the boot fails.
    pub fn boot(guests_mib: u64) -> Result<Self> {
        Self::boot_with(guests_mib, &[])
    }

    /// Boots a machine with all of its memory populated, so that the first measurement does not pay
    /// for page faults.
    ///
    /// # Errors
    /// As those of [`boot`](Self::boot).
    pub fn boot_populated(guests_mib: u64) -> Result<Self> {
        Self::boot_with(guests_mib, &["-mem-prealloc"])
    }

    fn boot_with(guests_mib: u64, arguments: &[&str]) -> Result<Self> {
        let kernel = debian::kernel(Release::Full6_12)?;
        let modules = kernel.modules(&MODULES)?;
        let root = format!(
            "local,path=/,mount_tag={ROOT_TAG},security_model=none,readonly=on,multidevs=remap"
        );
        let mut guest = Guest::qemu(&kernel)
            .memory_mib(OWN_MEMORY_MIB + guests_mib)
            .modules(&modules)
            .machine_arguments(["-virtfs", &root])
            .machine_arguments(arguments.iter().copied())
            .boot()?;
        guest.run(&format!("write {ALARM} {ALARM_AFTER}"))?;
        guest.load(&modules)?;
        guest.run(&format!("mount-root {ROOT_TAG}"))?;
        Ok(Self { guest })
    }

    /// Runs a program of the host by its absolute path. Only `/run` is writable, and empty at
    /// first.
    ///
    /// # Errors
    /// The machine ends, or the program does not end in time.
    pub fn run(
        &mut self,
        program: &Path,
        arguments: &[&OsStr],
        variables: &[(&str, &OsStr)],
        limit: Duration,
    ) -> Result<Outcome> {
        self.run_with_lines(program, arguments, variables, limit, &mut |_| {})
    }

    /// As [`run`](Self::run), and calls `each` with each line at once.
    ///
    /// # Errors
    /// As those of [`run`](Self::run).
    pub fn run_with_lines(
        &mut self,
        program: &Path,
        arguments: &[&OsStr],
        variables: &[(&str, &OsStr)],
        limit: Duration,
        each: &mut dyn FnMut(&str),
    ) -> Result<Outcome> {
        let mut command = "program".to_owned();
        for (name, value) in variables {
            command += &format!(" {name}={}", encode(value));
        }
        for word in [program.as_os_str()].iter().chain(arguments) {
            command += &format!(" {}", encode(word));
        }
        let reply = self.guest.run_with_lines(&command, limit, each)?;
        let code = match reply.text.split_once('=') {
            Some(("exit", code)) => code.parse().ok(),
            Some(("signal", _)) => None,
            _ => {
                let what = "the end of a program".to_owned();
                return Err(LabError::Unexpected { what, detail: reply.text });
            }
        };
        Ok(Outcome { lines: reply.lines, code })
    }

    /// All output of the machine, with times.
    pub fn console_log(&self) -> String {
        self.guest.console_log()
    }
}

/// Whether this machine's own KVM boots a guest. Probed once per process.
pub fn hardware() -> bool {
    unusable().is_none()
}

/// Why this machine's own KVM boots no guest, `None` if it does. Probed once per process.
pub fn unusable() -> Option<&'static str> {
    static ANSWER: OnceLock<Option<String>> = OnceLock::new();
    let ask = || {
        let error = probe().err()?.to_string();
        tracing::info!("{DEVICE} is unusable: {error}");
        Some(error)
    };
    ANSWER.get_or_init(ask).as_deref()
}

/// Checks the preconditions of hardware KVM: a CPU with virtualisation, and a device that this
/// user may open. Boots nothing and needs no package.
///
/// `./demo` checks the same before it installs anything.
///
/// # Errors
/// A precondition is not met; the error names it.
pub fn check() -> Result<()> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualisation(&cpuinfo) {
        let advice = "its CPU has neither vmx nor svm".to_owned();
        return Err(LabError::Host { what: "run guests on hardware".to_owned(), advice });
    }
    open_device()
}

/// Checks that this machine has the memory for guests of this size at a time, on its own KVM or in
/// a [populated](KvmMachine::boot_populated) [`KvmMachine`].
///
/// # Errors
/// The error has the needed and the available amount.
pub fn check_memory(guests_mib: u64) -> Result<()> {
    let more = if hardware() { MONITOR_MIB } else { OWN_MEMORY_MIB + EMULATOR_MIB };
    available_memory::check(guests_mib + more)
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split_whitespace().any(|flag| EXTENSIONS.contains(&flag)))
}

fn open_device() -> Result<()> {
    let advice = match File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => return Ok(()),
        Err(error) => match error.kind() {
            ErrorKind::NotFound => "load the module kvm_intel or kvm_amd".to_owned(),
            ErrorKind::PermissionDenied => {
                "run it as root, or add the user to the group kvm".to_owned()
            }
            _ => error.to_string(),
        },
    };
    Err(LabError::Host { what: format!("open {DEVICE}"), advice })
}

/// Boots an unmodified kernel in QEMU, so that a bug of our own VMM is not taken for a failure of
/// the machine.
fn probe() -> Result<()> {
    open_device()?;
    let kernel: DebianKernel = debian::kernel(Release::Cloud6_12)?;
    let guest = Guest::qemu(&kernel)
        .memory_mib(PROBE_MEMORY_MIB)
        .hardware(true)
        .boot_limit(PROBE_LIMIT)
        .boot()?;
    guest.power_off().map(drop)
}

/// Encodes a word for the guest's init: `%XX` for bytes that separate words, and for `%`.
fn encode(word: &OsStr) -> String {
    let mut text = String::new();
    for byte in word.as_bytes() {
        match byte {
            b'%' | 0..=b' ' | 0x7f.. => {
                // Writing to a string cannot fail.
                let _ = write!(text, "%{byte:02x}");
            }
            _ => text.push(char::from(*byte)),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_flags_show_virtualisation() {
        let of = |flags: &str| {
            format!("processor\t: 0\nmodel name\t: svm\nvmx flags\t: vnmi\nflags\t\t: {flags}\n")
        };
        assert!(has_virtualisation(&of("fpu vmx ssse3")));
        assert!(has_virtualisation(&of("fpu svm")));
        assert!(!has_virtualisation(&of("fpu svm_lock hypervisor")));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn an_encoded_word_stays_one_word() {
        assert_eq!(encode(OsStr::new("a b%\tc\n")), "a%20b%25%09c%0a");
        assert_eq!(encode(OsStr::new("/usr/bin/x-y_z=1")), "/usr/bin/x-y_z=1");
        assert_eq!(encode(OsStr::new("ä")), "%c3%a4");
    }
}
