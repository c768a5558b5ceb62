//! `demo --migrate`: a guest that moves from one process to another while somebody talks to it.
//!
//! [`show`] finds a KVM: this machine's own where it boots a guest, else that of a machine which
//! QEMU emulates. There the program is started once more, and [`carry_out`] does it.

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

/// Memory of the guest, what a file keeps of it, and what its balloon has.
const GUEST_MIB: u64 = 512;
const KEPT_MIB: u64 = 64;
const BALLOON_MIB: u64 = 128;

/// What the guest allocates, writes and frees all the time.
const BUSY_MIB: u64 = 8;

/// The pattern of the file.
const SEED: u64 = 1;

/// What the guest needs, in the order of loading; our driver comes last.
const NEEDED: [&str; 1] = ["virtio_mmio"];

/// Name of the guest.
const NAME: &str = "demo";

/// All of it, below an emulated KVM on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// One answer, or the start of one process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Questions before the guest leaves, and after it has come.
const QUESTIONS: usize = 4;

/// Between two questions, and between two looks how far the migration is.
const PAUSE: Duration = Duration::from_millis(250);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What the guest is made of: files that the machine with a KVM has under the same names.
#[derive(Clone, Debug)]
pub struct Parts {
    /// A kernel with a PVH entry.
    pub kernel: PathBuf,
    /// Init and modules.
    pub initramfs: PathBuf,
    /// Modules, in the order of loading.
    pub modules: Vec<String>,
}

/// Has this program started where a KVM is, with the words that `command` makes of the parts, and
/// tells what it prints; first of all whose KVM it is.
///
/// # Errors
/// There is no such machine, or the program failed there.
pub fn show(command: impl Fn(&Parts) -> Vec<OsString>, say: &mut dyn FnMut(&str)) -> Result<()> {
    let directory = Scratch::new("demo")?;
    let parts = prepare(directory.path())?;
    let words = command(&parts);
    let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
    if kvm::hardware() {
        say("The guest runs in our own monitor, on the KVM of this machine.");
        return ended(kvm_host::start_again(&words, say)?);
    }
    say("This machine's KVM boots no guest, so QEMU emulates a machine that has one;");
    say("the guest runs in it, in our own monitor, slower than on hardware.");
    let mut machine = KvmMachine::boot(2 * GUEST_MIB)?;
    let outcome = machine.run_telling(&kvm_host::this_program()?, &words, &[], LIMIT, say)?;
    ended(outcome.code)
}

fn ended(code: Option<i32>) -> Result<()> {
    match code {
        Some(0) => Ok(()),
        code => Err(wrong(format!("the guest was not moved ({code:?})"))),
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

/// Boots the guest, moves it, and tells so line by line.
///
/// # Errors
/// It could not be moved, or its memory is not what it was.
pub fn carry_out(
    program: &Path,
    parts: &Parts,
    say: &(dyn Fn(&str) + Sync),
) -> Result<MigrationSummary> {
    kvm_host::raise_loopback();
    let directory = Scratch::new("demo")?;
    let scene = Scene { began: Instant::now(), say, directory };
    scene.tell("host", &format!("boots a guest of {GUEST_MIB} MiB in the first process"));
    let mut first = scene.boot(program, parts)?;
    scene.tell("host", "starts the second process, which waits for the guest");
    let (mut second, address) = scene.receiver(program)?;
    for _ in 0..QUESTIONS {
        scene.ask(&mut first, "first process")?;
        thread::sleep(PAUSE);
    }
    let (last, summary) = scene.move_to(&mut first, &address)?;
    // What was asked of the first one last may be answered by the second.
    second.continue_from(&mut first);
    let silence = scene.ask(&mut second, "second process")?.duration_since(last);
    for _ in 1..QUESTIONS {
        thread::sleep(PAUSE);
        scene.ask(&mut second, "second process")?;
    }
    first.wait()?;
    scene.tell("host", "the first process has ended");
    second.run_within("idle", ANSWER_TIMEOUT)?;
    let verified = second.run_within(&format!("verify kept {KEPT_MIB} {SEED}"), ANSWER_TIMEOUT)?;
    if verified.text != "0" {
        let (name, file) = (NAME.to_owned(), "kept".to_owned());
        let pages = verified.text.parse().unwrap_or(0);
        return Err(BenchError::WrongPages { name, file, pages, named: verified.lines });
    }
    let kept = format!("all of the {KEPT_MIB} MiB that were written before are as they were");
    scene.tell("second process", &kept);
    second.power_off()?;
    let silence = silence.as_millis();
    scene.tell("host", &format!("{silence} ms from the first one's last answer to the other's"));
    Ok(summary)
}

/// What goes on, and when.
struct Scene<'a> {
    began: Instant,
    say: &'a (dyn Fn(&str) + Sync),
    directory: Scratch,
}

impl Scene<'_> {
    fn tell(&self, who: &str, what: &str) {
        (self.say)(&format!("{:7.2} s  {who:<15} {what}", self.began.elapsed().as_secs_f64()));
    }

    fn control(&self, process: &str) -> PathBuf {
        self.directory.path().join(process)
    }

    fn boot(&self, program: &Path, parts: &Parts) -> Result<Guest> {
        let control = self.control("first").display().to_string();
        let mut guest = Guest::monitor(program, &parts.kernel)
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
        self.tell(
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

    /// Asks the guest for its own clock; when it had answered.
    fn ask(&self, guest: &mut Guest, process: &str) -> Result<Instant> {
        let asked = Instant::now();
        let reply = guest.run_within("cat /proc/uptime", ANSWER_TIMEOUT)?;
        let up = reply.lines.first().and_then(|line| line.split(' ').next()).unwrap_or("?");
        let ms = asked.elapsed().as_millis();
        self.tell(process, &format!("the guest says: up for {up} s (answered in {ms} ms)"));
        Ok(Instant::now())
    }

    /// Moves the guest, and talks to it until it has left: when it answered last, and what it
    /// came to.
    fn move_to(&self, first: &mut Guest, address: &str) -> Result<(Instant, MigrationSummary)> {
        let client = Client::connect(&self.control("first"))?;
        client.start_migration(&StartMigration {
            to: address.to_owned(),
            drop_caches: true,
            ..StartMigration::default()
        })?;
        thread::scope(|scope| {
            // A client has a loop of its own, which one thread uses.
            let watching = scope.spawn(move || self.watch(&client));
            let mut last = Instant::now();
            let left = loop {
                match self.ask(first, "first process") {
                    Ok(when) => last = when,
                    // What was asked now is answered on the other side, to nobody.
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
            let why = || wrong(format!("the guest was not moved: {status:?}"));
            Ok((last, status.summary.clone().ok_or_else(why)?))
        })
    }

    /// Tells each phase until the migration is over.
    fn watch(&self, client: &Client) -> Result<MigrationStatus> {
        let mut told = String::new();
        loop {
            let status = client.migration()?;
            if status.state == MigrationState::Moved {
                self.tell("migration", "the guest runs in the second process");
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
            if !phase.is_empty() && phase != told {
                self.tell("migration", &phase);
                told = phase;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}
