//! Initramfs and command line of a guest.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::debian::DebianKernel;
use crate::error::{Context, LabError, Result};
use crate::guest::{GuestBuilder, module_name};
use crate::guest_build;
use crate::initramfs::Initramfs;
use crate::tool;
use crate::uml::UmlKernel;

/// The virtio device type of a balloon (virtio 1.3, 5.5.1), for `virtio_uml.device`.
const BALLOON_DEVICE_TYPE: u32 = 5;

/// Arguments of every guest's kernel: few messages, and a panic instead of a hang. On a busy
/// machine an emulated vCPU stalls for longer than Linux's usual 20 s limits: the soft lockup
/// detector (twice `watchdog_thresh`) and the RCU stall detector.
const COMMON_ARGUMENTS: [&str; 5] =
    ["quiet", "oops=panic", "panic=1", "watchdog_thresh=60", "rcupdate.rcu_cpu_stall_timeout=120"];

/// CPU model of emulated guests, without `cmpxchg16b`: QEMU 7.2 computes wrong flags after it
/// (`gen_cmpxchg16b` in `target/i386/tcg/translate.c` does not set their source). An interrupt
/// right after it saves the wrong flags, and the kernel double faults when it restores them. Busy
/// guests in an emulated machine did within minutes.
const EMULATED_CPU: &str = "max,-cx16";

/// Debian package of the emulator.
const QEMU_PACKAGE: &str = "qemu-system-x86";

/// VMM of the guest.
#[derive(Debug, Clone)]
pub(crate) enum Machine {
    Uml(UmlKernel),
    Qemu(DebianKernel),
    Vmm {
        program: PathBuf,
        kernel: PathBuf,
    },
    /// `aerostat` with a guest that was booted before.
    Resumed {
        program: PathBuf,
        command: &'static str,
    },
}

/// Command line and environment of a guest.
pub(crate) struct Launch {
    pub(crate) words: Vec<OsString>,
    memory_dir: PathBuf,
}

impl Launch {
    /// Environment variables of the guest's process.
    pub(crate) fn variables(&self) -> [(&'static str, &OsStr); 1] {
        [("TMPDIR", self.memory_dir.as_os_str())]
    }
}

/// Writes the initramfs into `directory` and builds the command line.
pub(crate) fn prepare(guest: &GuestBuilder, directory: &Path) -> Result<Launch> {
    let initramfs = match (&guest.initramfs, &guest.machine) {
        (Some(path), _) => path.clone(),
        // A resumed guest has unpacked its own.
        (None, Machine::Resumed { .. }) => PathBuf::new(),
        (None, _) => {
            let path = directory.join("initramfs.cpio");
            write_initramfs(guest, &path)?;
            path
        }
    };
    let mut words: Vec<OsString> = Vec::new();
    if let Some(cpu) = guest.cpu {
        words.extend(["taskset".into(), "--cpu-list".into(), cpu.to_string().into()]);
    }
    match &guest.machine {
        Machine::Uml(kernel) => words.extend(uml_words(guest, kernel, &initramfs, directory)?),
        Machine::Qemu(kernel) => words.extend(qemu_words(guest, kernel, &initramfs)?),
        Machine::Vmm { program, kernel } => {
            words.extend(vmm_words(guest, program, kernel, &initramfs)?);
        }
        Machine::Resumed { program, command } => {
            words.extend([program.into(), (*command).into()]);
            words.extend(guest.machine_arguments.iter().map(Into::into));
        }
    }
    Ok(Launch { words, memory_dir: guest.memory_dir.clone() })
}

/// Writes the guest's initramfs.
pub(crate) fn write_initramfs(guest: &GuestBuilder, path: &Path) -> Result<()> {
    std::fs::write(path, pack(guest)?).context_path("write", path)
}

fn pack(guest: &GuestBuilder) -> Result<Vec<u8>> {
    let mut archive = Initramfs::new();
    // The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.host_file("init", 0o755, &guest_build::init()?)?;
    archive.directory("modules")?;
    for module in &guest.modules {
        let name = module_name(module)?;
        archive.host_file(&format!("modules/{name}.ko"), 0o644, module)?;
    }
    archive.finish()
}

/// Kernel messages go to standard error through a serial line, so that they never mix with init's
/// console on standard input and output.
fn uml_words(
    guest: &GuestBuilder,
    kernel: &UmlKernel,
    initramfs: &Path,
    directory: &Path,
) -> Result<Vec<OsString>> {
    if !guest.machine_arguments.is_empty() {
        return Err(unsupported("give QEMU's arguments to User Mode Linux"));
    }
    let mut words: Vec<OsString> = vec![kernel.linux.clone().into()];
    words.push(format!("mem={}M", guest.memory_mib).into());
    words.push(joined("initrd=", initramfs, ""));
    words.push(joined("uml_dir=", directory, ""));
    words.extend(["con=null", "con0=fd:0,fd:1"].map(Into::into));
    words.extend(["ssl=null", "ssl0=null,fd:2", "console=ttyS0"].map(Into::into));
    words.extend(COMMON_ARGUMENTS.map(Into::into));
    for socket in &guest.balloons {
        let device = format!(":{BALLOON_DEVICE_TYPE}");
        words.push(joined("virtio_uml.device=", socket, &device));
    }
    words.extend(guest.kernel_arguments.iter().map(Into::into));
    Ok(words)
}

fn qemu_words(
    guest: &GuestBuilder,
    kernel: &DebianKernel,
    initramfs: &Path,
) -> Result<Vec<OsString>> {
    if !guest.balloons.is_empty() {
        return Err(unsupported("attach a vhost-user balloon to QEMU"));
    }
    let program = match &guest.qemu_program {
        Some(path) => path.clone().into_os_string(),
        None => {
            tool::program_version("qemu-system-x86_64", QEMU_PACKAGE)?;
            "qemu-system-x86_64".into()
        }
    };
    let mut words: Vec<OsString> = vec![program];
    words.extend(["-no-user-config", "-nodefaults", "-no-reboot"].map(Into::into));
    words.extend(["-machine", "q35", "-display", "none", "-smp", "1"].map(Into::into));
    // One thread: with several, emulation races with the kernel's patching of its own code.
    let (accelerator, cpu) =
        if guest.hardware { ("kvm", "max") } else { ("tcg,thread=single", EMULATED_CPU) };
    words.extend(["-accel", accelerator, "-cpu", cpu].map(Into::into));
    words.extend(["-m".into(), format!("{}M", guest.memory_mib).into()]);
    words.extend(["-kernel".into(), kernel.vmlinuz.clone().into()]);
    words.extend(["-initrd".into(), initramfs.into()]);
    // The first serial line carries the kernel's messages, the second one is init's console.
    words.extend(["-serial", "file:/dev/stderr"].map(Into::into));
    words.extend(
        ["-chardev", "stdio,id=init,signal=off", "-serial", "chardev:init"].map(Into::into),
    );
    // On a busy machine an emulated timer is late. The kernel would take it for a broken one and
    // panic.
    let mut arguments = vec!["console=ttyS0", "LAB_CONSOLE=ttyS1", "no_timer_check"];
    arguments.extend(COMMON_ARGUMENTS);
    arguments.extend(guest.kernel_arguments.iter().map(String::as_str));
    words.extend(["-append".into(), arguments.join(" ").into()]);
    if let Some(address) = &guest.incoming {
        words.extend(["-incoming".into(), address.into()]);
    }
    words.extend(guest.machine_arguments.iter().map(Into::into));
    Ok(words)
}

/// A guest of `aerostat run` has one serial line, which init shares with the kernel's messages.
fn vmm_words(
    guest: &GuestBuilder,
    program: &Path,
    kernel: &Path,
    initramfs: &Path,
) -> Result<Vec<OsString>> {
    if !guest.balloons.is_empty() {
        return Err(unsupported("attach a vhost-user balloon to aerostat run"));
    }
    let mut arguments = vec!["console=ttyS0", "LAB_CONSOLE=ttyS0"];
    arguments.extend(COMMON_ARGUMENTS);
    arguments.extend(guest.kernel_arguments.iter().map(String::as_str));
    let mut words: Vec<OsString> = vec![program.into(), "run".into()];
    words.extend(["--memory".into(), format!("{}MiB", guest.memory_mib).into()]);
    words.extend(["--kernel".into(), kernel.into(), "--initrd".into(), initramfs.into()]);
    words.extend(["--cmdline".into(), arguments.join(" ").into()]);
    words.extend(guest.machine_arguments.iter().map(Into::into));
    Ok(words)
}

fn joined(before: &str, path: &Path, after: &str) -> OsString {
    let mut word = OsString::from(before);
    word.push(path);
    word.push(after);
    word
}

fn unsupported(what: &str) -> LabError {
    LabError::Host { what: what.to_owned(), advice: "use the other kind of guest".to_owned() }
}
