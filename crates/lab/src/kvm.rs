//! A real KVM, also where the machine has none: a guest with its own.
//!
//! QEMU emulates the virtualisation extensions of AMD's processors, so that a kernel inside finds
//! a working KVM ("L1"). Programs of this machine run there on its own root file system, shared
//! read-only.
//!
//! A `/dev/kvm` of this machine may be there and useless, so [`hardware`] boots something. What
//! cannot be one is seen by a look ([`look`]), which costs nothing.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use crate::debian::{self, DebianKernel, Release};
use crate::error::{LabError, Result};
use crate::guest::Guest;
use crate::room;

/// Modules of the guest: KVM for the processor that QEMU emulates, and the shared root.
const MODULES: [&str; 6] = ["virtio_pci", "9pnet_virtio", "9p", "ccp", "kvm", "kvm_amd"];

/// The name of the shared root.
const ROOT_TAG: &str = "root";

/// While an alarm is set, the kernel has the HPET interrupt it 64 times a second
/// (CONFIG_HPET_EMULATE_RTC), besides the timer of its processor.
///
/// QEMU 7.2 forgets an interrupt now and then where it emulates SVM: as a guest exits, `do_vmexit`
/// takes a bit out of a word in which another thread puts those for interrupts, without a lock. What
/// it forgot comes with the next one; but a kernel arms its timer when it has gone off, so that there
/// may be none. Such machines halted until somebody typed, or gave no other thread the processor
/// while a guest was busy.
const ALARM: &str = "/sys/class/rtc/rtc0/wakealarm";
/// From now, in seconds: the chip knows no date, so within a day.
const ALARM_AFTER: &str = "+86000";

/// What the guest's kernel and a program need besides the memory of the program's own guests.
const OWN_MEMORY_MIB: u64 = 768;

/// What QEMU needs to emulate it, most of it for code that it translated: at most 1 GiB.
const EMULATOR_MIB: u64 = 1024;

/// What a monitor and a program beside it need of this machine, besides the guest's memory.
const MONITOR_MIB: u64 = 256;

/// How a processor says that it runs guests: Intel's word and AMD's.
const EXTENSIONS: [&str; 2] = ["vmx", "svm"];

const DEVICE: &str = "/dev/kvm";

/// A hardware KVM boots a small guest in about a second.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

/// Memory of the guest that is booted to probe.
const PROBE_MEMORY_MIB: u64 = 256;

/// How a program ended, and what it printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Lines of standard output and standard error, in their order.
    pub lines: Vec<String>,
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
}

/// A machine with a KVM, which ends when this is dropped.
pub struct KvmMachine {
    guest: Guest,
}

impl KvmMachine {
    /// Boots one with room for guests of this much memory.
    ///
    /// # Errors
    /// What is missing on this machine, or why the boot failed.
    pub fn boot(guests_mib: u64) -> Result<Self> {
        Self::boot_with(guests_mib, &[])
    }

    /// The same, with all of its memory there: what is measured first does not pay for it.
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

    /// Runs a program of this machine by its absolute path. Only `/run` can be written there,
    /// which is empty at first.
    ///
    /// # Errors
    /// When the machine ends, or does not say within the limit how the program ended.
    pub fn run(
        &mut self,
        program: &Path,
        arguments: &[&OsStr],
        variables: &[(&str, &OsStr)],
        limit: Duration,
    ) -> Result<Outcome> {
        self.run_telling(program, arguments, variables, limit, &mut |_| {})
    }

    /// The same; `tell` hears each line as it is printed.
    ///
    /// # Errors
    /// As those of [`run`](Self::run).
    pub fn run_telling(
        &mut self,
        program: &Path,
        arguments: &[&OsStr],
        variables: &[(&str, &OsStr)],
        limit: Duration,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Outcome> {
        let mut command = "program".to_owned();
        for (name, value) in variables {
            command += &format!(" {name}={}", encode(value));
        }
        for word in [program.as_os_str()].iter().chain(arguments) {
            command += &format!(" {}", encode(word));
        }
        let reply = self.guest.run_telling(&command, limit, tell)?;
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

    /// Everything the machine printed, with times.
    pub fn console_log(&self) -> String {
        self.guest.console_log()
    }
}

/// Whether this machine's own KVM boots a guest. Asked once for each process.
pub fn hardware() -> bool {
    trouble().is_none()
}

/// Why this machine's own KVM boots no guest, if it does not. Asked once for each process.
pub fn trouble() -> Option<&'static str> {
    static ANSWER: OnceLock<Option<String>> = OnceLock::new();
    let ask = || {
        let error = probe().err()?.to_string();
        tracing::info!("no use of {DEVICE}: {error}");
        Some(error)
    };
    ANSWER.get_or_init(ask).as_deref()
}

/// Looks for what hardware KVM cannot be without: a processor that runs guests, and a device that
/// this user may open. It boots nothing and needs no package.
///
/// `./demo` does the same before it installs anything.
///
/// # Errors
/// What is missing.
pub fn look() -> Result<()> {
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !runs_guests(&processors) {
        let advice = "its processor has neither vmx nor svm".to_owned();
        return Err(LabError::Host { what: "run guests on hardware".to_owned(), advice });
    }
    open_device()
}

/// Whether this machine has the memory for guests of this much at a time, on its own KVM or in a
/// [`KvmMachine`] that is [populated](KvmMachine::boot_populated).
///
/// # Errors
/// How much there is, and how much is needed.
pub fn has_room(guests_mib: u64) -> Result<()> {
    let more = if hardware() { MONITOR_MIB } else { OWN_MEMORY_MIB + EMULATOR_MIB };
    room::check(guests_mib + more)
}

fn runs_guests(processors: &str) -> bool {
    let flags = processors.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split_whitespace().any(|flag| EXTENSIONS.contains(&flag)))
}

fn open_device() -> Result<()> {
    let advice = match File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => return Ok(()),
        Err(error) => match error.kind() {
            ErrorKind::NotFound => "load the module kvm_intel or kvm_amd".to_owned(),
            ErrorKind::PermissionDenied => "run it as root, or as one of the group kvm".to_owned(),
            _ => error.to_string(),
        },
    };
    Err(LabError::Host { what: format!("open {DEVICE}"), advice })
}

/// Boots an unmodified kernel in QEMU, so that a fault of our own monitor is not taken for one of
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

/// A word as the guest's init takes it: `%XX` for bytes that separate words, and for `%`.
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
    fn a_processor_that_runs_guests_is_known_by_its_flags() {
        let of = |flags: &str| {
            format!("processor\t: 0\nmodel name\t: svm\nvmx flags\t: vnmi\nflags\t\t: {flags}\n")
        };
        assert!(runs_guests(&of("fpu vmx ssse3")));
        assert!(runs_guests(&of("fpu svm")));
        assert!(!runs_guests(&of("fpu svm_lock hypervisor")));
        assert!(!runs_guests(""));
    }

    #[test]
    fn words_are_encoded_so_that_they_stay_one_word() {
        assert_eq!(encode(OsStr::new("a b%\tc\n")), "a%20b%25%09c%0a");
        assert_eq!(encode(OsStr::new("/usr/bin/x-y_z=1")), "/usr/bin/x-y_z=1");
        assert_eq!(encode(OsStr::new("ä")), "%c3%a4");
    }
}
