//! `aerostat restore`: runs a guest from a VM snapshot.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use control::Server;
use diagnostics::{contain, panic_point};
use migration::DestinationConfig;
use migration::observer::Silent;
use migration::snapshot::{self, LazyRestore, SnapshotFile};

use crate::controller::{ControlApi, MigrationController, MigrationTarget};
use crate::error::Error;
use crate::layout::{MAX_CPUS, MAX_MEMORY_BYTES};
use crate::machine::{End, Machine};
use crate::options::HostOptions;
use crate::run::serve_to_end;
use crate::signals::Signals;

/// How often to check whether reading the memory has failed.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long a guest whose memory cannot be read may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Which guest to restore, and how.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The options that this host chooses; the name may differ from the saved guest's.
    pub host: HostOptions,
    /// The snapshot file.
    pub file: PathBuf,
    /// Runs the guest at once and reads its memory on access, and in the background by address. The
    /// file must stay in place until all of it is read.
    pub lazy: bool,
}

/// Restores the guest and runs it until it ends.
///
/// # Errors
/// The file or the options are invalid, or the host fails. The guest has not run then, unless the
/// restore is lazy and the file is damaged.
pub fn restore(options: &RestoreOptions) -> Result<End, Error> {
    // Until the guest runs, a signal may end this process, which may wait for the file.
    let requests = Signals::before_guest().map_err(Error::host("signal handling"))?;
    let machine = SnapshotFile::open(&options.file)?.description().machine.clone();
    let controller = MigrationController::new(None);
    let _control =
        Server::bind_vmm(&options.host.control, Arc::new(ControlApi(Arc::clone(&controller))))?;
    let mut guest = MigrationTarget::new(options.host.clone(), MAX_CPUS, &controller)?.copy();
    let config = DestinationConfig {
        max_memory_bytes: MAX_MEMORY_BYTES,
        ..DestinationConfig::new(&machine)
    };
    let file = &options.file;
    let began = Instant::now();
    if options.lazy {
        let filling = snapshot::restore_lazily(&config, &mut guest, file, &mut Silent)?;
        requests.take_stop();
        tracing::info!(
            us = began.elapsed().as_micros(),
            "runs; reading its memory in the background"
        );
        return fill(guest, filling, &controller, &requests);
    }
    let restored = snapshot::restore(&config, &mut guest, file, &mut Silent)?;
    requests.take_stop();
    tracing::info!(us = restored.total_us, pages = restored.read_pages, "restored");
    match guest.machine() {
        Some(machine) => serve_to_end(machine, &controller, &requests),
        None => Err(no_machine()),
    }
}

/// Serves a guest while its memory is read.
fn fill(
    mut guest: MigrationTarget,
    filling: LazyRestore,
    controller: &Arc<MigrationController>,
    requests: &Signals,
) -> Result<End, Error> {
    let machine = guest.machine().cloned().ok_or_else(no_machine)?;
    let stop = requests.stopper();
    let over = AtomicBool::new(false);
    let end = std::thread::scope(|scope| {
        scope.spawn(|| {
            if watch_across_panics(&filling, &machine, &over) {
                stop();
                // Halt the vCPUs, then release the threads that wait for a page: they read zeros,
                // which no vCPU may see.
                let until = Instant::now() + STOP_TIMEOUT;
                while !over.load(Ordering::Relaxed) && Instant::now() < until {
                    machine.halt();
                    std::thread::sleep(POLL_INTERVAL);
                }
                // A migration or snapshot also waits for such a page, and must not take the zeros
                // for the guest's memory.
                controller.close("its memory cannot be read");
                guest.drop_missing();
            }
        });
        // Also if serving panics: the scope would wait for the thread without end.
        let _set_on_drop = SetOnDrop(&over);
        serve_to_end(&machine, controller, requests)
    });
    // The guest first: it may still wait for its memory.
    controller.drop_machine();
    drop((machine, guest));
    filling.finish()?;
    end
}

/// Sets the flag on drop: the guest is no longer served.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits for the guest's end. Returns true, with the guest halted, if reading its memory fails
/// before.
fn watch(filling: &LazyRestore, machine: &Machine, over: &AtomicBool) -> bool {
    while !over.load(Ordering::Relaxed) {
        panic_point("watch");
        if filling.has_failed() {
            tracing::error!("the guest's memory cannot be read; the guest ends");
            machine.halt();
            return true;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    false
}

/// As [`watch`], but starts again after a panic.
fn watch_across_panics(filling: &LazyRestore, machine: &Machine, over: &AtomicBool) -> bool {
    loop {
        match contain(|| watch(filling, machine, over)) {
            Ok(is_lost) => return is_lost,
            Err(_) if over.load(Ordering::Relaxed) => return false,
            Err(_) => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

fn no_machine() -> Error {
    Error::Unsupported { what: "a guest that was not created".into() }
}
