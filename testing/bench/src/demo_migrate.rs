//! `demo --migrate`: a guest that migrates from one process to another while it answers commands.
//!
//! [`show`] selects a KVM: this machine's own if it boots a guest, else that of a machine that QEMU
//! emulates. It runs the program there again, and [`carry_out`] does the migration.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use control::Client;
use control::api::{MigrationState, MigrationStatus, MigrationSummary, StartMigration};
use lab::debian::{self, Release};
use lab::kvm::{self, KvmMachine};
use lab::{Guest, LabError, Scratch, guest_build};

use crate::error::{BenchError, Result, wrong};
use crate::kvm_host;

/// Memory of the guest, size of a file in it, and its balloon, in MiB.
const GUEST_MIB: u64 = 512;
const KEPT_MIB: u64 = 64;
const BALLOON_MIB: u64 = 128;

/// Memory that the guest allocates, writes and frees all the time.
const BUSY_MIB: u64 = 8;

/// The pattern of the file.
const SEED: u64 = 1;

/// Modules of the guest in loading order, before our driver.
const NEEDED: [&str; 1] = ["virtio_mmio"];

/// Name of the guest.
const NAME: &str = "demo";

/// Timeout of everything, on an emulated KVM on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// Timeout of one answer, and of the start of one process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Commands before the guest migrates, and after.
const COMMANDS: usize = 4;

/// Between two commands, and between two polls of the migration.
const PAUSE: Duration = Duration::from_millis(250);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Files of the guest. The machine with KVM has them under the same paths.
#[derive(Clone, Debug)]
pub struct Parts {
    /// A kernel with a PVH entry point.
    pub kernel: PathBuf,
    /// Initramfs with init and the modules.
    pub initramfs: PathBuf,
    /// Modules in loading order.
    pub modules: Vec<String>,
}

/// Runs this program again on a KVM, with the arguments that `command` returns for the files. Calls
/// `say` with each line of its output, after a line about the KVM.
///
/// # Errors
/// There is no KVM, or the program fails.
pub fn show(command: impl Fn(&Parts) -> Vec<OsString>, say: &mut dyn FnMut(&str)) -> Result<()> {
    let directory = Scratch::new("demo")?;
    let parts = prepare(directory.path())?;
    let words = command(&parts);
    let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
    if kvm::hardware() {
        say("The guest runs in `aerostat run`, on the KVM of this machine.");
        return ended(kvm_host::start_again(&words, say)?);
    }
    say("This machine's KVM boots no guest, so QEMU emulates a machine with KVM;");
    say("the guest runs in it, in `aerostat run`, slower than on hardware.");
    let mut machine = KvmMachine::boot(2 * GUEST_MIB)?;
    let outcome = machine.run_with_lines(&kvm_host::this_program()?, &words, &[], LIMIT, say)?;
    ended(outcome.code)
}

fn ended(code: Option<i32>) -> Result<()> {
    match code {
        Some(0) => Ok(()),
        code => Err(wrong(format!("the guest was not migrated ({code:?})"))),
    }
}

fn prepare(directory: &Path) -> Result<Parts> {
    let kernel = debian::kernel(Release::Cloud6_12)?;
    let mut modules = kernel.modules(&NEEDED)?;
    modules.push(guest_build::balloon_module(&kernel.tree()?)?);
    let initramfs = directory.join("initramfs.cpio");
    Guest::qemu(&kernel).modules(&modules).write_initramfs(&initramfs)?;
    let names = modules.iter().filter_map(|path| path.file_stem()?.to_str().map(str::to_owned));
    Ok(Parts { kernel: kernel.vmlinux()?, initramfs, modules: names.collect() })
}

/// Boots the guest, migrates it, and prints each step.
///
/// # Errors
/// The migration fails, or the guest's memory has changed.
pub fn carry_out(
    program: &Path,
    parts: &Parts,
    say: &(dyn Fn(&str) + Sync),
) -> Result<MigrationSummary> {
    kvm_host::raise_loopback();
    let directory = Scratch::new("demo")?;
    let demo = Demo { began: Instant::now(), say, directory };
    demo.print("host", &format!("boots a guest of {GUEST_MIB} MiB in the first process"));
    let mut first = demo.boot(program, parts)?;
    demo.print("host", "starts the second process, which waits for the guest");
    let (mut second, address) = demo.receiver(program)?;
    for _ in 0..COMMANDS {
        demo.uptime(&mut first, "first process")?;
        thread::sleep(PAUSE);
    }
    let (last, summary) = demo.migrate_to(&mut first, &address)?;
    // The destination may answer the last command to the source.
    second.continue_from(&mut first);
    let pause = demo.uptime(&mut second, "second process")?.duration_since(last);
    for _ in 1..COMMANDS {
        thread::sleep(PAUSE);
        demo.uptime(&mut second, "second process")?;
    }
    first.wait()?;
    demo.print("host", "the first process has ended");
    second.run_within("idle", ANSWER_TIMEOUT)?;
    let verified = second.run_within(&format!("verify kept {KEPT_MIB} {SEED}"), ANSWER_TIMEOUT)?;
    if verified.text != "0" {
        let (name, file) = (NAME.to_owned(), "kept".to_owned());
        let pages = verified.text.parse().unwrap_or(0);
        return Err(BenchError::WrongPages { name, file, pages, named: verified.lines });
    }
    let kept = format!("all of the {KEPT_MIB} MiB that were written before are unchanged");
    demo.print("second process", &kept);
    second.power_off()?;
    let pause = pause.as_millis();
    demo.print(
        "host",
        &format!("{pause} ms from the source's last answer to the destination's first"),
    );
    Ok(summary)
}

/// State of the demo.
struct Demo<'a> {
    began: Instant,
    say: &'a (dyn Fn(&str) + Sync),
    directory: Scratch,
}

impl Demo<'_> {
    fn print(&self, who: &str, what: &str) {
        (self.say)(&format!("{:7.2} s  {who:<15} {what}", self.began.elapsed().as_secs_f64()));
    }

    fn control(&self, process: &str) -> PathBuf {
        self.directory.path().join(process)
    }

    fn boot(&self, program: &Path, parts: &Parts) -> Result<Guest> {
        let control = self.control("first").display().to_string();
        let mut guest = Guest::vmm(program, &parts.kernel)
            .memory_mib(GUEST_MIB)
            .initramfs(&parts.initramfs)
            .machine_arguments(["--name", NAME, "--control", &control])
            .boot()?;
        for module in &parts.modules {
            guest.run_within(&format!("insmod {module}"), ANSWER_TIMEOUT)?;
        }
        guest.run_within(&format!("fill kept {KEPT_MIB} {SEED}"), ANSWER_TIMEOUT)?;
        let client = Client::connect(&self.control("first"))?;
        let balloon = client.set_balloon(BALLOON_MIB << 20, ANSWER_TIMEOUT)?;
        let (actual_pages, target_pages) = (balloon.actual_pages, balloon.target_pages);
        if actual_pages != target_pages {
            return Err(BenchError::NotReached { name: NAME.into(), actual_pages, target_pages });
        }
        guest.run_within(&format!("busy {BUSY_MIB}"), ANSWER_TIMEOUT)?;
        self.print(
            "first process",
            &format!(
                "the guest keeps {KEPT_MIB} MiB with a pattern, its balloon has {BALLOON_MIB} MiB, \
                 and a program in it writes all the time"
            ),
        );
        Ok(guest)
    }

    fn receiver(&self, program: &Path) -> Result<(Guest, String)> {
        let control = self.control("second").display().to_string();
        let words = ["--name", NAME, "--control", &control, "--listen", "127.0.0.1:0", "--plain"];
        let receiver = Guest::receiver(program).machine_arguments(words).boot()?;
        let address = kvm_host::address_of(&receiver)?;
        Ok((receiver, address))
    }

    /// Reads the guest's uptime. Returns the time of the answer.
    fn uptime(&self, guest: &mut Guest, process: &str) -> Result<Instant> {
        let sent = Instant::now();
        let reply = guest.run_within("cat /proc/uptime", ANSWER_TIMEOUT)?;
        let up = reply.lines.first().and_then(|line| line.split(' ').next()).unwrap_or("?");
        let ms = sent.elapsed().as_millis();
        self.print(process, &format!("the guest answers: up for {up} s (answered in {ms} ms)"));
        Ok(Instant::now())
    }

    /// Migrates the guest, and sends it commands until it has left. Returns the time of its last
    /// answer, and the result.
    fn migrate_to(&self, first: &mut Guest, address: &str) -> Result<(Instant, MigrationSummary)> {
        let client = Client::connect(&self.control("first"))?;
        client.start_migration(&StartMigration {
            to: address.to_owned(),
            drop_caches: true,
            ..StartMigration::default()
        })?;
        thread::scope(|scope| {
            // A client has its own event loop for one thread.
            let watching = scope.spawn(move || self.watch(&client));
            let mut last = Instant::now();
            let left = loop {
                match self.uptime(first, "first process") {
                    Ok(when) => last = when,
                    // The destination answers this command, and the answer is not read.
                    Err(BenchError::Lab(LabError::Ended { .. })) => break Ok(()),
                    Err(error) => break Err(error),
                }
                if watching.is_finished() {
                    break Ok(());
                }
                thread::sleep(PAUSE);
            };
            let panicked = |_| wrong("a thread panicked".into());
            let status = watching.join().map_err(panicked)??;
            left?;
            let why = || wrong(format!("the guest was not migrated: {status:?}"));
            Ok((last, status.summary.clone().ok_or_else(why)?))
        })
    }

    /// Prints each phase until the migration ends.
    fn watch(&self, client: &Client) -> Result<MigrationStatus> {
        let mut printed = String::new();
        loop {
            let status = client.migration()?;
            if status.state == MigrationState::Moved {
                self.print("migration", "the guest runs in the second process");
            }
            if status.state.is_over() {
                return Ok(status);
            }
            let phase = status.phase.map(|phase| phase.as_str().replace('-', " "));
            let phase = match phase {
                Some(name) if name == "round" => format!("round {}", status.round),
                Some(name) => name,
                None => String::new(),
            };
            if !phase.is_empty() && phase != printed {
                self.print("migration", &phase);
                printed = phase;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}
