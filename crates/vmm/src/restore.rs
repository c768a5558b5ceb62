//! A guest that comes out of a file.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use control::Server;
use diagnostics::{contain, panic_point};
use migration::DestinationConfig;
use migration::observer::Silent;
use migration::snapshot::{self, Filling, SnapshotFile};

use crate::controller::{ControlApi, MigrationController};
use crate::error::Error;
use crate::layout::{MAX_CPUS, MAX_MEMORY_BYTES};
use crate::machine::{End, Machine, serve_to_end};
use crate::options::HostOptions;
use crate::signals::Signals;
use crate::traits::MigrationTarget;

/// Between two looks whether memory still comes.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long a guest whose memory comes no more may take to come to a stop.
const STOP_TIME: Duration = Duration::from_secs(2);

/// Which guest, and how.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// What is this host's to choose; the name may be another than the guest had.
    pub host: HostOptions,
    /// What it was written to.
    pub file: PathBuf,
    /// Runs it at once; its memory comes when it is touched, and meanwhile in its order. The file
    /// must stay.
    pub lazy: bool,
}

/// Runs the guest to its end, from where it was when it was written.
///
/// # Errors
/// What is wrong with the file, the options, or the host; nothing of the guest was run then,
/// unless it ran lazily and the file turned out to be damaged.
pub fn restore(options: &RestoreOptions) -> Result<End, Error> {
    // Until the guest runs nothing is lost with this process, which may wait for the file.
    let requests = Signals::before_guest().map_err(Error::host("signal handling"))?;
    let machine = SnapshotFile::open(&options.file)?.description().machine.clone();
    let controller = MigrationController::new(None);
    let _control =
        Server::bind_monitor(&options.host.control, Arc::new(ControlApi(Arc::clone(&controller))))?;
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
        tracing::info!(us = began.elapsed().as_micros(), "runs; its memory is still coming");
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

/// Serves a guest whose memory is still coming.
fn fill(
    mut guest: MigrationTarget,
    filling: Filling,
    controller: &Arc<MigrationController>,
    requests: &Signals,
) -> Result<End, Error> {
    let machine = guest.machine().cloned().ok_or_else(no_machine)?;
    let stop = requests.stopper();
    let over = AtomicBool::new(false);
    let end = std::thread::scope(|scope| {
        scope.spawn(|| {
            if watch_whatever_panics(&filling, &machine, &over) {
                stop();
                // Whoever waits for a page that never comes is let go, and finds zeros: no
                // processor runs any more that could.
                let until = Instant::now() + STOP_TIME;
                while !over.load(Ordering::Relaxed) && Instant::now() < until {
                    machine.halt();
                    std::thread::sleep(POLL_INTERVAL);
                }
                // One that moves or writes the guest waits for such a page as well, and would take
                // the zeros for the guest's.
                controller.close("its memory cannot be read any more");
                guest.let_go();
            }
        });
        // Also where serving panics, which would wait for the thread for ever.
        let _over = Over(&over);
        serve_to_end(&machine, controller, requests)
    });
    // The guest first, which may still wait for its memory.
    controller.drop_machine();
    drop((machine, guest));
    filling.finish()?;
    end
}

/// Says that a guest is not served any more, when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits for the end; true where memory comes no more before that. The guest is halted then.
fn watch(filling: &Filling, machine: &Machine, over: &AtomicBool) -> bool {
    while !over.load(Ordering::Relaxed) {
        panic_point("watch");
        if filling.has_failed() {
            tracing::error!("the guest's memory cannot be read any more: it ends");
            machine.halt();
            return true;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    false
}

/// The same, looked at anew after a panic.
fn watch_whatever_panics(filling: &Filling, machine: &Machine, over: &AtomicBool) -> bool {
    loop {
        match contain(|| watch(filling, machine, over)) {
            Ok(is_lost) => return is_lost,
            Err(_) if over.load(Ordering::Relaxed) => return false,
            Err(_) => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

fn no_machine() -> Error {
    Error::Unsupported { what: "a guest that is not there".into() }
}
