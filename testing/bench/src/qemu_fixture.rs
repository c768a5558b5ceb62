//! An emulated guest with a Debian kernel, on QEMU's own balloon device or on ours.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use control::{BALLOON_PAGE_BYTES, Client};
use lab::debian::DebianKernel;
use lab::qemu::VhostUserQemu;
use lab::{Guest, Scratch, guest_build};

use crate::backend::Backend;
use crate::error::{BenchError, Result, host};
use crate::proc_text::kib;
use crate::qmp::Qmp;
use crate::testbed::Driver;

/// Timeout of one balloon change in emulation, on used memory.
const CHANGE_LIMIT: Duration = Duration::from_secs(120);

/// QEMU 8.2 gives each queue of its generic device four entries. Linux needs 32 to report free
/// pages.
const WITHOUT: [&str; 2] = ["--without", "reporting"];

const MIB: u64 = 1 << 20;

/// Balloon device of an emulated guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// QEMU's own `virtio-balloon-pci`.
    Qemu,
    /// Our back end under QEMU's generic vhost-user device.
    VhostUser,
}

/// Options of an emulated guest.
#[derive(Clone, Debug)]
pub struct QemuFixtureOptions {
    /// The `aerostat` program, for the back end.
    pub program: PathBuf,
    /// The emulator.
    pub qemu: VhostUserQemu,
    /// The guest's kernel.
    pub kernel: DebianKernel,
    /// The guest's memory.
    pub memory_mib: u64,
    /// Kernel arguments.
    pub kernel_arguments: Vec<String>,
    /// A file that the guest sees as `/dev/vda`, read-only.
    pub disk: Option<PathBuf>,
}

/// A guest with its driver loaded.
pub struct QemuFixture {
    /// The guest. It ends before its device.
    pub guest: Guest,
    /// Module file of the driver.
    pub driver: PathBuf,
    device: Attached,
    memory_mib: u64,
    _directory: Scratch,
}

enum Attached {
    Qemu(Qmp),
    VhostUser(Backend, Client),
}

impl QemuFixture {
    /// Boots a guest with `device` and loads `driver`.
    ///
    /// # Errors
    /// A dependency is missing, or the guest does not boot.
    pub fn start(
        name: &str,
        device: Device,
        driver: Driver,
        options: &QemuFixtureOptions,
    ) -> Result<Self> {
        let directory = Scratch::new("bench")?;
        let driver = module(driver, &options.kernel)?;
        let disk = options.disk.iter().map(|_| "virtio_blk");
        let needed: Vec<_> = std::iter::once("virtio_pci").chain(disk).collect();
        let needed = options.kernel.modules(&needed)?;
        let memory =
            format!("memory-backend-memfd,id=memory,size={}M,share=on", options.memory_mib);
        let builder = Guest::qemu(&options.kernel)
            .qemu_program(&options.qemu.program)
            .memory_mib(options.memory_mib)
            .modules(&needed)
            .module(&driver)
            // Print warnings too.
            .kernel_argument("ignore_loglevel")
            // Thread names identify vCPU threads.
            .machine_arguments(["-name", "lab,debug-threads=on"])
            .machine_arguments(["-object", &memory, "-machine", "memory-backend=memory"]);
        let builder = options
            .kernel_arguments
            .iter()
            .fold(builder, |builder, word| builder.kernel_argument(word));
        let builder = match &options.disk {
            None => builder,
            Some(disk) => builder.machine_arguments(disk_arguments(disk)),
        };
        let mut backend = None;
        let socket = directory.path().join("qmp");
        let builder = match device {
            Device::Qemu => builder
                .machine_arguments(["-device", "virtio-balloon-pci,deflate-on-oom=on"])
                .machine_arguments([
                    "-qmp".to_owned(),
                    format!("unix:{},server=on,wait=off", socket.display()),
                ]),
            Device::VhostUser => {
                let started =
                    Backend::start_with(&options.program, name, directory.path(), &WITHOUT)?;
                let arguments = vhost_user_arguments(&options.qemu, started.socket());
                backend = Some(started);
                builder.machine_arguments(arguments)
            }
        };
        let mut guest = builder.boot()?;
        let device = match backend {
            None => Attached::Qemu(Qmp::connect(&socket)?),
            Some(backend) => {
                let client = backend.client()?;
                Attached::VhostUser(backend, client)
            }
        };
        guest.load(&needed)?;
        guest.load(std::slice::from_ref(&driver))?;
        let memory_mib = options.memory_mib;
        Ok(Self { guest, driver, device, memory_mib, _directory: directory })
    }

    /// Sets the balloon to `mib` MiB. Returns the time from the request until the guest has
    /// inflated (or deflated) and the host has released them.
    ///
    /// # Errors
    /// The target is not reached in time.
    pub fn inflate_to(&mut self, mib: u64) -> Result<Duration> {
        match &mut self.device {
            Attached::Qemu(qmp) => {
                let began = Instant::now();
                qmp.balloon((self.memory_mib - mib) * MIB)?;
                Ok(began.elapsed())
            }
            Attached::VhostUser(_, client) => settle(client, mib * MIB),
        }
    }

    /// Runs a command in the guest whose answer is a number.
    ///
    /// # Errors
    /// The command fails, or the answer is no number.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.guest.run(command)?.text;
        let number = answer.parse();
        number.map_err(|_| BenchError::GuestAnswer { command: command.to_owned(), answer })
    }

    /// Powers the guest off and stops our back end. Returns the exit status of the back end, or of
    /// the guest if there is none.
    ///
    /// # Errors
    /// One of them does not end.
    pub fn end(self) -> Result<ExitStatus> {
        let ended = self.guest.power_off()?;
        match self.device {
            Attached::Qemu(_) => Ok(ended),
            Attached::VhostUser(backend, _) => backend.stop(),
        }
    }

    /// Host memory of the guest, in MiB: QEMU's shared memory (proc(5), `status`).
    ///
    /// # Errors
    /// The kernel returns an error.
    pub fn resident_mib(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.guest.pid());
        let text = std::fs::read_to_string(path).map_err(host("reading the memory of QEMU"))?;
        Ok(kib(&text, "RssShmem").unwrap_or(0) >> 10)
    }

    /// Ids of the VMM and back end processes.
    pub fn processes(&self) -> Vec<u32> {
        let backend = self.backend().map(Backend::pid);
        std::iter::once(self.guest.pid()).chain(backend).collect()
    }

    /// Our back end, if any.
    pub const fn backend_mut(&mut self) -> Option<&mut Backend> {
        match &mut self.device {
            Attached::Qemu(_) => None,
            Attached::VhostUser(backend, _) => Some(backend),
        }
    }

    /// Our back end, if any.
    pub const fn backend(&self) -> Option<&Backend> {
        match &self.device {
            Attached::Qemu(_) => None,
            Attached::VhostUser(backend, _) => Some(backend),
        }
    }

    /// Client of our back end's control API, if any.
    pub const fn client(&self) -> Option<&Client> {
        match &self.device {
            Attached::Qemu(_) => None,
            Attached::VhostUser(_, client) => Some(client),
        }
    }
}

/// QEMU arguments that attach a back end at `socket` as a balloon.
pub fn vhost_user_arguments(qemu: &VhostUserQemu, socket: &Path) -> [String; 4] {
    let device = qemu.device;
    [
        "-chardev".to_owned(),
        format!("socket,id=balloon,path={}", socket.display()),
        "-device".to_owned(),
        format!("{device},chardev=balloon,virtio-id=5,num_vqs=6,config_size=16"),
    ]
}

fn disk_arguments(disk: &Path) -> [String; 4] {
    [
        "-drive".to_owned(),
        format!("file={},if=none,id=disk,format=raw,read-only=on", disk.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=disk".to_owned(),
    ]
}

/// Module file of a driver for a Debian kernel.
fn module(driver: Driver, kernel: &DebianKernel) -> Result<PathBuf> {
    match driver {
        Driver::Own => Ok(guest_build::balloon_module(&kernel.tree()?)?),
        Driver::Stock => {
            let modules = kernel.modules(&[driver.module_name()])?;
            modules.into_iter().next_back().ok_or(BenchError::NotHere {
                what: "the stock driver",
                why: "it is built in".to_owned(),
            })
        }
    }
}

fn settle(client: &Client, target_bytes: u64) -> Result<Duration> {
    let end = Instant::now() + CHANGE_LIMIT;
    let mut balloon = client.set_balloon(target_bytes, CHANGE_LIMIT)?;
    while !balloon.at_target && Instant::now() < end {
        balloon = client.wait(balloon.generation, CHANGE_LIMIT)?;
    }
    let reached = u64::from(balloon.actual_pages) * BALLOON_PAGE_BYTES == target_bytes;
    let change = balloon.last_change.filter(|_| balloon.at_target && reached);
    let change = change.ok_or(BenchError::NotReached {
        name: "the emulated guest".to_owned(),
        actual_pages: balloon.actual_pages,
        target_pages: balloon.target_pages,
    })?;
    Ok(Duration::from_secs_f64(change.wall_ms / 1e3))
}
