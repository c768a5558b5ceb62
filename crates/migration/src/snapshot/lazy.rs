//! A guest that runs before its memory is there: pages come when it touches them, and meanwhile in
//! their order.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use page_set::PageRange;

use super::read::SnapshotFile;
use crate::contained::contained;
use crate::destination::{DestinationConfig, check};
use crate::dirty::DirtyBitmap;
use crate::error::MigrationError;
use crate::observer::{Observer, Phase};
use crate::traits::{DestinationMachine, PlacePages};
use crate::wire::chunk::PAGE_BYTES;

/// Pages that come in their order between two looks at what the guest waits for.
const PAGES_PER_POLL: u64 = 8;

/// How long to wait for the guest when everything is there.
const IDLE_WAIT: Duration = Duration::from_millis(100);

/// How long the end waits for whoever fills: it may be in a read of a file that does not answer,
/// and nobody needs what it reads.
const JOIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How often it is looked whether it has come back.
const JOIN_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Memory that is still coming. It must be kept for as long as the guest runs: pages that are
/// discarded (balloon, reports) are missing anew, and the guest waits for them. Those are not placed
/// any more, and zeros when they are touched. Dropping it ends that, so the guest must be gone first.
#[derive(Debug)]
pub struct Filling {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<(), MigrationError>>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    stage: Mutex<Stage>,
    placed_pages: AtomicU64,
    pages: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// The monitor takes the state; it may touch memory, and must come back.
    #[default]
    Loading,
    /// The guest runs.
    Running,
    /// Filling failed before the guest ran, which it never will.
    Failed,
}

impl Shared {
    /// Goes from loading to `next`, and says where it stands.
    fn go_on(&self, next: Stage) -> Stage {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if *stage == Stage::Loading {
            *stage = next;
        }
        *stage
    }
}

/// Makes a guest from the file `path` and runs it at once.
///
/// # Errors
/// The guest does not run, and nothing of it is left.
pub fn restore_lazily<M: DestinationMachine>(
    config: &DestinationConfig,
    machine: &mut M,
    path: &Path,
    observer: &mut dyn Observer,
) -> Result<Filling, MigrationError> {
    let begun = begin(config, machine, path, observer);
    if begun.is_err() {
        machine.destroy();
    }
    begun
}

fn begin<M: DestinationMachine>(
    config: &DestinationConfig,
    machine: &mut M,
    path: &Path,
    observer: &mut dyn Observer,
) -> Result<Filling, MigrationError> {
    observer.phase(Phase::Negotiate);
    let snapshot = SnapshotFile::open(path)?;
    check(config, &machine.cpu_features(), snapshot.description())
        .map_err(|error| error.of_file(path))?;
    let state = snapshot.state()?;
    let memory = machine.create_missing(snapshot.description());
    let memory = memory.map_err(MigrationError::machine("making the guest"))?;
    let shared = Arc::new(Shared { pages: snapshot.pages(), ..Shared::default() });
    let filler = Filler {
        there: DirtyBitmap::none(&snapshot.description().layout),
        snapshot,
        memory,
        awaited: None,
        shared: Arc::clone(&shared),
    };
    // Before anything touches memory: loading state may read rings.
    let thread = thread::Builder::new().name("filling".to_owned()).spawn(|| filler.run());
    let thread =
        thread.map_err(|error| MigrationError::machine("starting a thread")(Box::new(error)))?;
    let filling = Filling { shared: Arc::clone(&shared), thread: Some(thread) };
    observer.phase(Phase::State);
    let loaded = machine.load_state(state);
    if shared.go_on(Stage::Running) == Stage::Failed {
        filling.finish()?;
        return Err(MigrationError::DamagedFile { path: path.to_owned(), what: "memory" });
    }
    loaded.map_err(MigrationError::machine("loading the guest's state"))?;
    machine.resume().map_err(MigrationError::machine("starting the guest"))?;
    Ok(filling)
}

impl Filling {
    /// Pages that are there or were discarded since, and how many there will be.
    #[must_use]
    pub fn pages(&self) -> (u64, u64) {
        (self.shared.placed_pages.load(Ordering::Relaxed), self.shared.pages)
    }

    /// True where it ended by itself: the file cannot be read or is not as it was written, and the
    /// guest waits for ever. It must be ended; [`finish`](Self::finish) says why.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it, after the guest is gone.
    ///
    /// # Errors
    /// What it failed at before.
    pub fn finish(mut self) -> Result<(), MigrationError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), MigrationError> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let began = Instant::now();
        while !thread.is_finished() {
            if began.elapsed() >= JOIN_TIMEOUT {
                tracing::error!("host: the snapshot's file does not answer, and is left as it is");
                return Ok(());
            }
            thread::sleep(JOIN_POLL_INTERVAL);
        }
        let panicked = |_| MigrationError::machine("filling memory")("a thread panicked".into());
        thread.join().map_err(panicked)?
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(error = error.chain(), "memory of the guest could not be filled");
        }
    }
}

/// The thread's own.
struct Filler {
    snapshot: SnapshotFile,
    memory: Arc<dyn PlacePages>,
    /// Pages that were placed once, or discarded before that. One of them that is missing is zeros.
    there: DirtyBitmap,
    /// What somebody waits for at this moment.
    awaited: Option<u64>,
    shared: Arc<Shared>,
}

impl Filler {
    fn run(mut self) -> Result<(), MigrationError> {
        let filled = contained("filling memory", || self.fill());
        if filled.is_err() && self.shared.go_on(Stage::Failed) == Stage::Failed {
            // No guest sees this; a monitor that waits for a page must not wait for ever.
            if let Some(page) = self.awaited {
                self.put_zeros(page)?;
            }
            self.there = DirtyBitmap::all(&self.snapshot.description().layout);
            while self.serve(IDLE_WAIT)? {}
        }
        filled
    }

    fn fill(&mut self) -> Result<(), MigrationError> {
        let regions = self.snapshot.description().layout.regions().to_vec();
        for region in regions {
            let mut rest = region;
            while !rest.is_empty() {
                if !self.serve(Duration::ZERO)? {
                    return Ok(());
                }
                let (now, later) = rest.split_at(rest.start() + PAGES_PER_POLL);
                diagnostics::panic_point("filling");
                for page in now.start()..now.end() {
                    if !self.there.contains(page) {
                        self.place(page)?;
                    }
                }
                rest = later;
            }
        }
        while self.serve(IDLE_WAIT)? {}
        Ok(())
    }

    /// Gives the guest what it waits for; false when it is over.
    fn serve(&mut self, wait: Duration) -> Result<bool, MigrationError> {
        let mut wait = wait;
        while !self.shared.stop.load(Ordering::Relaxed) {
            let missing = self.memory.next_missing(wait);
            self.awaited =
                missing.map_err(MigrationError::machine("finding out what is missing"))?;
            let Some(page) = self.awaited else { return Ok(true) };
            if self.there.contains(page) || !self.place(page)? {
                self.put_zeros(page)?;
            }
            self.awaited = None;
            wait = Duration::ZERO;
        }
        Ok(false)
    }

    /// What the file has of a page, for the first time; false where it was discarded. Contents that
    /// are read before a discard and placed behind it would stay, so the memory itself looks again.
    fn place(&mut self, page: u64) -> Result<bool, MigrationError> {
        let mut placed = false;
        if !self.memory.was_discarded(page) {
            let mut contents = [0; PAGE_BYTES];
            let found = self.snapshot.read_page(page, &mut contents)?;
            let done = self.memory.place_page(page, found.then_some(&contents));
            placed = done.map_err(MigrationError::machine("placing a page"))?;
        }
        if let Ok(one) = PageRange::new(page, 1) {
            self.there.insert(one);
        }
        self.shared.placed_pages.fetch_add(1, Ordering::Relaxed);
        Ok(placed)
    }

    fn put_zeros(&self, page: u64) -> Result<(), MigrationError> {
        self.memory.place_zeros(page).map_err(MigrationError::machine("placing zeros"))
    }
}
