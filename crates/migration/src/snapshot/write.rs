//! Writes a guest to a file while it runs.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use page_set::PageRange;
use rustix::fs::{FallocateFlags, fallocate};
use xxhash_rust::xxh3::Xxh3Default;

use super::format::{self, Header, index_of, page_at, page_sum};
use super::part::Part;
use crate::contained::contained;
use crate::error::MigrationError;
use crate::layout::GuestLayout;
use crate::observer::{Observer, Progress};
use crate::selection::Plan;
use crate::source::{
    Job, RoundContext, Sink, SourceConfig, SourceFailure, SourceGuest, SwitchoverResult,
    check_state, describe, no_doubt, read_word,
};
use crate::summary::{RoundSummary, Summary};
use crate::traits::{Description, SourceMachine, StateSection};
use crate::wire::chunk::PAGE_BYTES;
use crate::wire::control::{MigrationId, encode_description};

/// Words between two checks for a cancellation.
const WORDS_AT_ONCE: usize = 64;

/// What happens to the guest when the file is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// It runs on here.
    Resume,
    /// It exists only in the file from then on, and stays paused here.
    Stop,
}

/// Writes a guest to the file `path`, which must not exist. Ignores the connections, the
/// compression, and the peer's timeouts in `config`.
///
/// # Errors
/// There is no file. The guest runs on; if not, the failure has its state.
pub fn snapshot<M: SourceMachine>(
    config: &SourceConfig,
    machine: &mut M,
    path: &Path,
    after: After,
    observer: &mut dyn Observer,
) -> Result<Summary, SourceFailure> {
    let runs = |error| SourceFailure { error, guest: SourceGuest::Runs };
    config.check().map_err(runs)?;
    let id = MigrationId::random().map_err(runs)?;
    let started = Instant::now();
    let described = contained("describing the guest", || describe(machine));
    config.not_cancelled().map_err(runs)?;
    let description = described.map_err(runs)?;
    let mut file = SnapshotSink::create(path, after).map_err(runs)?;
    let mut job = Job::new(config, machine, &mut file, observer, started);
    job.summary.id = id.to_string();
    let outcome = job.run(&description);
    job.finish(outcome, no_doubt(id, config))
}

/// The file that is being written.
struct SnapshotSink {
    part: Part,
    path: PathBuf,
    after: After,
    layout: Option<GuestLayout>,
    description: Vec<u8>,
    /// The table entry of each page.
    table: Vec<u64>,
    written_bytes: u64,
}

impl SnapshotSink {
    fn create(path: &Path, after: After) -> Result<Self, MigrationError> {
        let (part, path) = (Part::create(path)?, path.to_owned());
        let (layout, description) = (None, Vec::new());
        let (table, written_bytes) = (Vec::new(), 0);
        Ok(Self { part, path, after, layout, description, table, written_bytes })
    }

    fn error(&self, what: &'static str) -> impl Fn(io::Error) -> MigrationError + use<> {
        let path = self.path.clone();
        move |source| MigrationError::File { what, path: path.clone(), source }
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> Result<(), MigrationError> {
        self.written_bytes += bytes.len() as u64;
        self.part.file().write_all_at(bytes, at).map_err(self.error("writing"))
    }

    /// Writes contiguous pages of one region.
    fn write_run(&mut self, run: PageRange, contents: &[u8]) -> Result<(), MigrationError> {
        let index = self.index(run.start())?;
        for ((place, page), contents) in
            (index..).zip(run.start()..run.end()).zip(contents.chunks(PAGE_BYTES))
        {
            self.set_entry(place, page_sum(contents, page));
        }
        self.write(contents, page_at(index))
    }

    /// Makes pages of one region zeros.
    fn clear_run(&mut self, run: PageRange) -> Result<(), MigrationError> {
        let index = self.index(run.start())?;
        let places = index..index + run.pages();
        let entry = |place: u64| usize::try_from(place).ok().and_then(|at| self.table.get(at));
        if places.clone().all(|place| entry(place) == Some(&0)) {
            return Ok(());
        }
        places.for_each(|place| self.set_entry(place, 0));
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, len) = (page_at(index), run.pages() * PAGE_BYTES as u64);
        // Retry after a signal.
        let punched = rustix::io::retry_on_intr(|| fallocate(self.part.file(), flags, at, len));
        if punched.is_ok() {
            return Ok(());
        }
        // Not every file system has holes.
        let zeros = vec![0; usize::try_from(len).unwrap_or(0)];
        self.write(&zeros, at)
    }

    fn set_entry(&mut self, place: u64, sum: u64) {
        if let Some(entry) = usize::try_from(place).ok().and_then(|at| self.table.get_mut(at)) {
            *entry = sum;
        }
    }

    fn index(&self, page: u64) -> Result<u64, MigrationError> {
        let index = self.layout.as_ref().and_then(|layout| index_of(layout, page));
        index.ok_or(MigrationError::Peer { what: "pages outside the guest's memory" })
    }

    fn fill(&mut self, run: PageRange, pattern: u32) -> Result<(), MigrationError> {
        if pattern == 0 {
            return self.clear_run(run);
        }
        let page: Vec<u8> =
            std::iter::repeat_n(pattern.to_le_bytes(), PAGE_BYTES / 4).flatten().collect();
        for page_number in run.start()..run.end() {
            let one = PageRange::new(page_number, 1);
            let one = one.map_err(|_| MigrationError::Peer { what: "an invalid page number" })?;
            self.write_run(one, &page)?;
        }
        Ok(())
    }

    /// Syncs the file, then gives it its final name.
    fn commit(&mut self) -> Result<(), MigrationError> {
        self.part.file().sync_all().map_err(self.error("syncing"))?;
        self.part.name()
    }
}

impl Sink for SnapshotSink {
    fn open(&mut self, description: &Description) -> Result<(), MigrationError> {
        let pages = usize::try_from(description.layout.pages()).unwrap_or(usize::MAX);
        self.table = vec![0; pages];
        self.layout = Some(description.layout.clone());
        self.description = encode_description(description).0;
        Ok(())
    }

    fn round(
        &mut self,
        context: &mut RoundContext<'_>,
        plan: &Plan,
    ) -> Result<RoundSummary, MigrationError> {
        let mut sum = RoundSummary::default();
        let mut space = Vec::new();
        let mut pages = 0;
        for (number, &word) in plan.words.iter().enumerate() {
            if number % WORDS_AT_ONCE == 0 {
                context.not_cancelled()?;
                let wire_bytes = self.written_bytes;
                context.observer.progress(Progress { pages, of_pages: plan.pages, wire_bytes });
            }
            let (data, zeros, contents) = read_word(context.memory, word, &mut space)?;
            let mut rest = contents;
            for run in (crate::dirty::Word { start: word.start, bits: data }).runs() {
                let len = usize::try_from(run.pages()).unwrap_or(0) * PAGE_BYTES;
                let (bytes, behind) = rest.split_at(len.min(rest.len()));
                self.write_run(run, bytes)?;
                rest = behind;
            }
            for run in (crate::dirty::Word { start: word.start, bits: zeros }).runs() {
                self.clear_run(run)?;
            }
            sum.sent_pages += u64::from(data.count_ones());
            sum.zero_pages += u64::from(zeros.count_ones());
            pages += u64::from(word.bits.count_ones());
        }
        for (&pattern, set) in &plan.fills {
            for region in context.layout.regions() {
                for run in set.ranges_in(*region) {
                    self.fill(run, pattern)?;
                    sum.filled_pages += run.pages();
                }
            }
        }
        Ok(sum)
    }

    fn paused(&mut self, _paused: bool) -> Result<(), MigrationError> {
        Ok(())
    }

    fn state(&mut self, state: &[StateSection]) -> Result<Duration, MigrationError> {
        check_state(state)?;
        let encoded = format::encode_state(state);
        let mut hash = Xxh3Default::new();
        let table: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        hash.update(&table);
        let head = Header {
            pages: self.table.len() as u64,
            table_sum: hash.digest(),
            description_bytes: self.description.len() as u64,
            description_sum: format::sum(&self.description),
            state_bytes: encoded.len() as u64,
            state_sum: format::sum(&encoded),
        };
        self.write(&table, head.table_at())?;
        let description = std::mem::take(&mut self.description);
        self.write(&description, head.description_at())?;
        self.write(&encoded, head.state_at())?;
        self.write(&head.encode(), 0)?;
        Ok(Duration::ZERO)
    }

    fn switch_over(&mut self) -> SwitchoverResult {
        match self.after {
            After::Resume => SwitchoverResult::Copied,
            After::Stop => match self.commit() {
                Err(error) => SwitchoverResult::Refused(error),
                Ok(()) => SwitchoverResult::Taken(Duration::ZERO),
            },
        }
    }

    /// Everything was read from the guest already, which need not wait for the disk.
    fn keep(&mut self) -> Result<(), MigrationError> {
        self.commit()
    }

    fn abort(&mut self, _error: &MigrationError) {}

    fn runs_elsewhere(&self) -> bool {
        false
    }

    fn wire_bytes(&self) -> u64 {
        self.written_bytes
    }
}
