//! Lazy restore: the guest runs before its memory is loaded. Pages are placed when the guest
//! touches them, and meanwhile in order.

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

/// Pages that are placed in order between two polls for missing pages.
const PAGES_PER_POLL: u64 = 8;

/// How long to wait for a missing page once every page was placed.
const IDLE_WAIT: Duration = Duration::from_millis(100);

/// How long to wait for the thread to end: it may block in a read of a file that does not answer,
/// and its result is not needed.
const JOIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Interval of checks whether the thread has ended.
const JOIN_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// A guest's memory that is being loaded. Keep it as long as the guest runs: pages that are
/// discarded (balloon, reports) are missing again, and the guest blocks when it touches them. They
/// are filled with zeros then, never from the file. Dropping this ends that, so the guest must have
/// ended first.
#[derive(Debug)]
pub struct LazyRestore {
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
    /// The VMM loads the state. It may touch memory, and must not block infinitely.
    #[default]
    Loading,
    /// The guest runs.
    Running,
    /// Loading memory failed before the guest ran. It never will.
    Failed,
}

impl Shared {
    /// Changes from loading to `next`; returns the stage after that.
    fn advance(&self, next: Stage) -> Stage {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if *stage == Stage::Loading {
            *stage = next;
        }
        *stage
    }
}

/// Creates a guest from the file `path` and runs it at once.
///
/// # Errors
/// The guest does not run, and nothing of it is left.
pub fn restore_lazily<M: DestinationMachine>(
    config: &DestinationConfig,
    machine: &mut M,
    path: &Path,
    observer: &mut dyn Observer,
) -> Result<LazyRestore, MigrationError> {
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
) -> Result<LazyRestore, MigrationError> {
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
    // Before anything touches memory: loading state may read virtqueues.
    let thread = thread::Builder::new().name("filling".to_owned()).spawn(|| filler.run());
    let thread =
        thread.map_err(|error| MigrationError::machine("starting a thread")(Box::new(error)))?;
    let filling = LazyRestore { shared: Arc::clone(&shared), thread: Some(thread) };
    observer.phase(Phase::State);
    let loaded = machine.load_state(state);
    if shared.advance(Stage::Running) == Stage::Failed {
        filling.finish()?;
        return Err(MigrationError::DamagedFile { path: path.to_owned(), what: "memory" });
    }
    loaded.map_err(MigrationError::machine("loading the guest's state"))?;
    machine.resume().map_err(MigrationError::machine("starting the guest"))?;
    Ok(filling)
}

impl LazyRestore {
    /// Pages that were placed or discarded, and all pages.
    #[must_use]
    pub fn pages(&self) -> (u64, u64) {
        (self.shared.placed_pages.load(Ordering::Relaxed), self.shared.pages)
    }

    /// True if loading failed: the file cannot be read or is damaged, and the guest blocks
    /// infinitely. The VMM must end it; [`finish`](Self::finish) returns the error.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends loading, after the guest has ended.
    ///
    /// # Errors
    /// The error of an earlier failure.
    pub fn finish(mut self) -> Result<(), MigrationError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), MigrationError> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let began = Instant::now();
        while !thread.is_finished() {
            if began.elapsed() >= JOIN_TIMEOUT {
                tracing::error!(
                    "host: the snapshot's file does not answer; its reader is left running"
                );
                return Ok(());
            }
            thread::sleep(JOIN_POLL_INTERVAL);
        }
        let panicked = |_| MigrationError::machine("filling memory")("a thread panicked".into());
        thread.join().map_err(panicked)?
    }
}

impl Drop for LazyRestore {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(error = error.chain(), "cannot load the guest's memory");
        }
    }
}

/// State of the loading thread.
struct Filler {
    snapshot: SnapshotFile,
    memory: Arc<dyn PlacePages>,
    /// Pages that were placed once, or discarded before that. If one of them is missing, it is
    /// zeros.
    there: DirtyBitmap,
    /// The page that a thread waits for now.
    awaited: Option<u64>,
    shared: Arc<Shared>,
}

impl Filler {
    fn run(mut self) -> Result<(), MigrationError> {
        let filled = contained("filling memory", || self.fill());
        if filled.is_err() && self.shared.advance(Stage::Failed) == Stage::Failed {
            // No guest runs; but the VMM may wait for a page, and must not block infinitely.
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

    /// Places the pages that threads wait for; false once loading was ended.
    fn serve(&mut self, wait: Duration) -> Result<bool, MigrationError> {
        let mut wait = wait;
        while !self.shared.stop.load(Ordering::Relaxed) {
            let missing = self.memory.next_missing(wait);
            self.awaited = missing.map_err(MigrationError::machine("polling for missing pages"))?;
            let Some(page) = self.awaited else { return Ok(true) };
            if self.there.contains(page) || !self.place(page)? {
                self.put_zeros(page)?;
            }
            self.awaited = None;
            wait = Duration::ZERO;
        }
        Ok(false)
    }

    /// Places a page from the file for the first time; false if it was discarded. Contents read
    /// before a discard and placed after it would be stale, so [`PlacePages::place_page`] checks
    /// again.
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
