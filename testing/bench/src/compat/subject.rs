//! A booted guest that runs the features.

use std::path::Path;
use std::time::{Duration, Instant};

use control::api::BalloonChange;
use control::{Client, Status};
use lab::{Backing, Guest, GuestMemoryDir, Scratch, Waker};

use super::Feature;
use super::target::{KernelChoice, Target, VmmChoice};
use crate::backend::Backend;
use crate::error::{BenchError, Result, host};
use crate::qemu_fixture::{Device, QemuFixture, QemuFixtureOptions};

/// Memory of the guests, in MiB: emulation is slow.
pub(super) const MEMORY_MIB: u64 = 512;

/// Size of a file in guest memory that is kept throughout.
const KEPT_MIB: u64 = 60;
const KEPT_SEED: u64 = 1;

/// Size of the file for the page cache.
pub(super) const CACHED_MIB: u64 = 64;

/// Timeout of any step in emulation, on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// Between two polls of the status.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Host memory allowed beyond the guest's own.
const RESIDENT_SLACK_BYTES: u64 = 8 << 20;

pub(super) const MIB: u64 = 1 << 20;

/// Kernel messages of a changed poison (mm/page_poison.c) or a bug.
const BAD_WORDS: [&str; 7] =
    ["WARNING:", "BUG:", "Oops", "pagealloc:", "corruption", "bit error", "refused"];

/// Fails with a reason unless `holds`.
pub(super) fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(BenchError::Wrong { what: what() }) }
}

/// A guest with its driver loaded and a filled file.
pub(super) struct Subject {
    target: Target,
    machine: Machine,
    pub(super) client: Client,
    /// Guest path of the file for the page cache.
    cached: &'static str,
    _files: Scratch,
}

enum Machine {
    Uml { guest: Box<Guest>, backend: Box<Backend>, _memory: GuestMemoryDir, _directory: Scratch },
    Qemu(Box<QemuFixture>),
}

/// A subject, or why this machine cannot boot it.
pub(super) type Started = std::result::Result<Subject, String>;

impl Subject {
    /// Boots the guest, loads its driver and fills the file.
    pub(super) fn start(target: &Target, program: &Path) -> Result<Started> {
        let files = Scratch::new("compat")?;
        let failed = host("making a file");
        let file = std::fs::File::create(files.path().join("cached")).map_err(failed)?;
        file.set_len((CACHED_MIB + 1) * MIB).map_err(failed)?;
        let (machine, client, cached) = match target.monitor {
            VmmChoice::Uml => match start_uml(target, program, files.path())? {
                Ok((machine, client)) => (machine, client, "/host/cached"),
                Err(why) => return Ok(Err(why)),
            },
            VmmChoice::Qemu => match start_qemu(target, program, files.path())? {
                Ok((machine, client)) => (machine, client, "/dev/vda"),
                Err(why) => return Ok(Err(why)),
            },
        };
        let mut subject = Self { target: *target, machine, client, cached, _files: files };
        subject.run(&format!("fill kept {KEPT_MIB} {KEPT_SEED}"))?;
        Ok(Ok(subject))
    }

    pub(super) const fn target(&self) -> &Target {
        &self.target
    }

    /// Before each feature: empties the balloon, and checks that the feature is negotiated.
    pub(super) fn begin(&mut self, feature: Feature) -> Result<()> {
        self.client.set_balloon(0, LIMIT)?;
        let Some(name) = negotiated_name(feature) else { return Ok(()) };
        let status = self.status()?;
        let names = &status.guest.features;
        ensure(names.iter().any(|have| have == name), || format!("not negotiated, but {names:?}"))
    }

    /// Runs a command in the guest.
    pub(super) fn run(&mut self, command: &str) -> Result<String> {
        Ok(self.guest().run(command)?.text)
    }

    /// Runs a command whose answer is a number.
    pub(super) fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.run(command)?;
        let number = answer.parse();
        number.map_err(|_| BenchError::GuestAnswer { command: command.to_owned(), answer })
    }

    pub(super) fn guest(&mut self) -> &mut Guest {
        match &mut self.machine {
            Machine::Uml { guest, .. } => guest,
            Machine::Qemu(fixture) => &mut fixture.guest,
        }
    }

    /// A second client, to use while the guest is borrowed.
    pub(super) fn second_client(&self) -> Result<Client> {
        let backend = match &self.machine {
            Machine::Uml { backend, .. } => Some(&**backend),
            Machine::Qemu(fixture) => fixture.backend(),
        };
        let backend = backend.ok_or(BenchError::Wrong { what: "no back end".to_owned() })?;
        backend.client()
    }

    /// Kills the back end.
    pub(super) fn kill_back_end(&mut self) -> Result<()> {
        match &mut self.machine {
            Machine::Uml { backend, .. } => backend.kill(),
            Machine::Qemu(fixture) => fixture.backend_mut().map_or(Ok(()), Backend::kill),
        }
    }

    /// Loads the driver.
    pub(super) fn load_driver(&mut self) -> Result<()> {
        let command = format!("insmod {}", self.target.driver.module_name());
        self.run(&command).map(drop)
    }

    pub(super) fn unload_driver(&mut self) -> Result<()> {
        let command = format!("rmmod {}", self.target.driver.module_name());
        self.run(&command).map(drop)
    }

    /// Suspends and wakes the guest.
    pub(super) fn sleep(&mut self) -> Result<()> {
        match &mut self.machine {
            Machine::Uml { guest, .. } => Ok(guest.sleep(Waker::Signal)?),
            Machine::Qemu(fixture) => Ok(fixture.guest.sleep(Waker::SerialLine("ttyS1"))?),
        }
    }

    pub(super) fn status(&self) -> Result<Status> {
        Ok(self.client.status()?)
    }

    /// Waits until `done`.
    pub(super) fn until(
        &self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Status) -> bool,
    ) -> Result<Status> {
        let end = Instant::now() + limit;
        loop {
            let status = self.status()?;
            if done(&status) {
                return Ok(status);
            }
            ensure(Instant::now() < end, || format!("not {what} within {limit:?}"))?;
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Sets the balloon to this many MiB and waits. Checks that ballooned pages cost the host
    /// nothing, and that there are no faults.
    pub(super) fn balloon(&mut self, mib: u64) -> Result<BalloonChange> {
        let set = self.client.set_balloon(mib * MIB, LIMIT)?;
        let settled = self.client.wait(set.generation, LIMIT)?;
        let reached = settled.at_target && settled.actual_bytes == mib * MIB;
        let change = settled.last_change.filter(|_| reached);
        let change = change.ok_or_else(|| BenchError::NotReached {
            name: self.target.kernel_name(),
            actual_pages: settled.actual_pages,
            target_pages: settled.target_pages,
        })?;
        let most = (MEMORY_MIB - mib) * MIB + RESIDENT_SLACK_BYTES;
        self.until("released", LIMIT, |status| {
            status.resident_bytes.is_some_and(|bytes| bytes <= most)
        })?;
        self.no_faults()?;
        Ok(change)
    }

    /// Fills and verifies `mib` MiB of free memory, and verifies the kept file. Returns the MiB
    /// verified.
    pub(super) fn use_and_verify(&mut self, mib: u64, seed: u64) -> Result<u64> {
        self.run(&format!("fill used {mib} {seed}"))?;
        let wrong = self.number(&format!("verify used {mib} {seed}"));
        self.run("drop used")?;
        ensure(wrong? == 0, || "deflated memory has wrong contents".to_owned())?;
        self.verify_kept()?;
        Ok(mib + KEPT_MIB)
    }

    /// Verifies the kept file.
    pub(super) fn verify_kept(&mut self) -> Result<()> {
        let wrong = self.number(&format!("verify kept {KEPT_MIB} {KEPT_SEED}"))?;
        ensure(wrong == 0, || format!("{wrong} pages of {KEPT_MIB} MiB have wrong contents"))
    }

    /// Checks that the device counted no faults and the guest's kernel logged no error.
    pub(super) fn no_faults(&mut self) -> Result<()> {
        let faults = self.status()?.faults;
        ensure(faults.total() == 0, || format!("{faults:?}"))?;
        let log = self.guest().console_log();
        let bad = log.lines().find(|line| BAD_WORDS.iter().any(|word| line.contains(word)));
        ensure(bad.is_none(), || format!("the guest's kernel: {}", bad.unwrap_or_default()))
    }

    /// Makes the guest read a file into its page cache.
    pub(super) fn read_file(&mut self) -> Result<()> {
        let command = format!("read-file {} {CACHED_MIB}", self.cached);
        self.run(&command).map(drop)
    }
}

/// The device's name of a feature that is negotiated.
const fn negotiated_name(feature: Feature) -> Option<&'static str> {
    Some(match feature {
        Feature::MustTellHost => "must-tell-host",
        Feature::PageBitmap => "page-bitmap",
        Feature::RingEventIdx => "ring-event-idx",
        Feature::RingIndirectDesc => "ring-indirect-desc",
        Feature::Stats => "stats-vq",
        Feature::FreePageHint => "free-page-hint",
        Feature::PagePoison => "page-poison",
        Feature::Reporting => "reporting",
        Feature::DropCaches | Feature::FreePages | Feature::HoldPages => "request-vq",
        Feature::DeflateOnOom => "deflate-on-oom",
        Feature::InflateDeflate
        | Feature::DriverReload
        | Feature::Sleep
        | Feature::BackEndKilled
        | Feature::BackEndReconnect => return None,
    })
}

type Booted = std::result::Result<(Machine, Client), String>;

fn start_uml(target: &Target, program: &Path, files: &Path) -> Result<Booted> {
    let kernel = match target.kernel {
        KernelChoice::UmlPackaged => lab::uml::packaged()?,
        _ => lab::uml::kernel()?,
    };
    if target.driver == crate::Driver::Own && !kernel.builds_modules() {
        return Ok(Err("Debian's package of this kernel has no headers to build a module".into()));
    }
    let directory = Scratch::new("compat")?;
    let memory = GuestMemoryDir::mount(Backing::Small, MEMORY_MIB)?;
    let backend = Backend::start(program, "compat", directory.path())?;
    let client = backend.client()?;
    let mut builder = Guest::uml(&kernel)
        .memory_mib(MEMORY_MIB)
        .memory_dir(memory.path())
        .balloon(backend.socket())
        .modules(target.driver.modules(&kernel)?)
        .kernel_argument("ignore_loglevel");
    if let Some(word) = target.poison {
        builder = builder.kernel_argument(word);
    }
    let mut guest = builder.boot()?;
    guest.run(&format!("insmod {}", target.driver.module_name()))?;
    if target.driver == crate::Driver::Own {
        guest.run(&format!("mount-host {}", files.display()))?;
    }
    let (guest, backend) = (Box::new(guest), Box::new(backend));
    let machine = Machine::Uml { guest, backend, _memory: memory, _directory: directory };
    Ok(Ok((machine, client)))
}

fn start_qemu(target: &Target, program: &Path, files: &Path) -> Result<Booted> {
    let qemu = match lab::qemu::vhost_user()? {
        Ok(qemu) => qemu,
        Err(why) => return Ok(Err(why)),
    };
    let KernelChoice::Debian(release) = target.kernel else {
        return Ok(Err("QEMU runs no User Mode Linux".to_owned()));
    };
    let options = QemuFixtureOptions {
        program: program.to_owned(),
        qemu,
        kernel: lab::debian::kernel(release)?,
        memory_mib: MEMORY_MIB,
        kernel_arguments: target.poison.map(str::to_owned).into_iter().collect(),
        disk: Some(files.join("cached")),
    };
    let fixture = QemuFixture::start("compat", Device::VhostUser, target.driver, &options)?;
    let client = fixture.backend().map(Backend::client).transpose()?;
    let client = client.ok_or(BenchError::Wrong { what: "no back end was started".to_owned() })?;
    Ok(Ok((Machine::Qemu(Box::new(fixture)), client)))
}
