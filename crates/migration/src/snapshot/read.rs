//! Restores a guest from a file. The file is as hostile as a peer.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use page_set::PageRange;
use rustix::fs::OFlags;
use xxhash_rust::xxh3::Xxh3Default;

use super::format::{self, ENTRY_BYTES, HEADER_BYTES, Header, index_of, page_at, page_sum};
use crate::codec::Reader;
use crate::destination::{DestinationConfig, check};
use crate::error::MigrationError;
use crate::observer::{Observer, Phase, Progress};
use crate::summary::us;
use crate::traits::{Description, DestinationMachine, StateSection, WritePages};
use crate::wire::chunk::PAGE_BYTES;
use crate::wire::control::decode_description;

/// Pages that are read at once.
const PAGES_AT_ONCE: u64 = 64;

/// Bytes of the table that share one checksum in memory, for 2 MiB of the guest: the file may
/// change after it was opened, and an entry of the table must not.
const BLOCK_BYTES: usize = 4096;

/// Statistics of a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Pages that were read from the file.
    pub read_pages: u64,
    /// Zero pages, which are not in the file.
    pub zero_pages: u64,
    /// From opening the file to the start of the guest, in microseconds.
    pub total_us: u64,
}

/// Creates a guest from the file `path`, and runs it.
///
/// # Errors
/// The guest does not run, and nothing of it is left.
pub fn restore<M: DestinationMachine>(
    config: &DestinationConfig,
    machine: &mut M,
    path: &Path,
    observer: &mut dyn Observer,
) -> Result<Restored, MigrationError> {
    let started = Instant::now();
    let restored = load(config, machine, path, observer).and_then(|mut restored| {
        machine.resume().map_err(MigrationError::machine("starting the guest"))?;
        restored.total_us = us(started.elapsed());
        Ok(restored)
    });
    if restored.is_err() {
        machine.destroy();
    }
    restored
}

fn load<M: DestinationMachine>(
    config: &DestinationConfig,
    machine: &mut M,
    path: &Path,
    observer: &mut dyn Observer,
) -> Result<Restored, MigrationError> {
    observer.phase(Phase::Negotiate);
    let snapshot = SnapshotFile::open(path)?;
    check(config, &machine.cpu_features(), snapshot.description())
        .map_err(|error| error.of_file(path))?;
    let state = snapshot.state()?;
    let memory = machine.create(snapshot.description());
    let memory = memory.map_err(MigrationError::machine("making the guest"))?;
    observer.phase(Phase::Round { number: 0 });
    let mut restored = Restored::default();
    for region in snapshot.description().layout.regions() {
        let mut rest = *region;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.start() + PAGES_AT_ONCE);
            let read = snapshot.copy(now, memory.as_ref())?;
            restored.read_pages += read;
            restored.zero_pages += now.pages() - read;
            rest = later;
            observer.progress(Progress {
                pages: restored.read_pages + restored.zero_pages,
                of_pages: snapshot.head.pages,
                wire_bytes: restored.read_pages * PAGE_BYTES as u64,
            });
        }
    }
    observer.phase(Phase::State);
    machine.load_state(state).map_err(MigrationError::machine("loading the guest's state"))?;
    Ok(restored)
}

/// A snapshot whose header, table and description were checked. Pages are checked when they are
/// read, in any order, so that they can be read when the guest touches them.
#[derive(Debug)]
pub struct SnapshotFile {
    file: File,
    path: PathBuf,
    head: Header,
    description: Description,
    /// Checksums of the table's blocks.
    blocks: Vec<u64>,
}

impl SnapshotFile {
    /// Opens the file `path`.
    ///
    /// # Errors
    /// It cannot be read, is not a snapshot, or is incomplete.
    pub fn open(path: &Path) -> Result<Self, MigrationError> {
        Self::open_checked(path).map_err(|error| error.of_file(path))
    }

    fn open_checked(path: &Path) -> Result<Self, MigrationError> {
        let error = |source| MigrationError::File { what: "reading", path: path.into(), source };
        // Do not block on the other end of a pipe.
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path);
        let file = file.map_err(error)?;
        let metadata = file.metadata().map_err(error)?;
        let invalid = |what| MigrationError::Snapshot { path: path.to_owned(), what };
        if !metadata.is_file() {
            return Err(invalid("it is no regular file".to_owned()));
        }
        let len = metadata.len();
        if len < HEADER_BYTES as u64 {
            let what = format!("it has {len} bytes, fewer than the {HEADER_BYTES} of its header");
            return Err(invalid(what));
        }
        let mut page = [0; HEADER_BYTES];
        file.read_exact_at(&mut page, 0).map_err(error)?;
        let head = Header::decode(&page, path)?;
        if len != head.end() {
            let written = head.end();
            let what =
                format!("it has {len} bytes of the {written} that were written: copy it again");
            return Err(invalid(what));
        }
        let mut bytes = vec![0; usize::try_from(head.description_bytes).unwrap_or(0)];
        file.read_exact_at(&mut bytes, head.description_at()).map_err(error)?;
        if format::sum(&bytes) != head.description_sum {
            return Err(MigrationError::Damaged { what: "the description of the guest" });
        }
        let mut body = Reader::new(&bytes);
        let description = decode_description(&mut body)?;
        body.finish()?;
        if description.layout.pages() != head.pages {
            return Err(MigrationError::Peer {
                what: "its table does not fit the size of the memory",
            });
        }
        let (path, blocks) = (path.to_owned(), Vec::new());
        let mut snapshot = Self { file, path, head, description, blocks };
        snapshot.blocks = snapshot.check_table()?;
        Ok(snapshot)
    }

    /// The guest's description.
    #[must_use]
    pub const fn description(&self) -> &Description {
        &self.description
    }

    /// The state of the machine.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn state(&self) -> Result<Vec<StateSection>, MigrationError> {
        let mut bytes = vec![0; usize::try_from(self.head.state_bytes).unwrap_or(0)];
        self.read(&mut bytes, self.head.state_at())?;
        if format::sum(&bytes) != self.head.state_sum {
            return Err(self.damaged("state"));
        }
        format::decode_state(&bytes).map_err(|error| error.of_file(&self.path))
    }

    /// Reads one page. Returns false and does not change `out` if it is zeros.
    ///
    /// # Errors
    /// The page does not exist, cannot be read, or is damaged.
    pub fn read_page(&self, page: u64, out: &mut [u8; PAGE_BYTES]) -> Result<bool, MigrationError> {
        let index = self.index(page)?;
        let entry = self.entries(index, 1)?.first().copied().unwrap_or(0);
        if entry == 0 {
            return Ok(false);
        }
        self.read(out, page_at(index))?;
        self.check_page(out, page, entry)?;
        Ok(true)
    }

    /// Copies at most [`PAGES_AT_ONCE`] pages of one region; returns how many were not zeros.
    fn copy(&self, pages: PageRange, memory: &dyn WritePages) -> Result<u64, MigrationError> {
        let index = self.index(pages.start())?;
        let entries = self.entries(index, usize::try_from(pages.pages()).unwrap_or(0))?;
        let bits = entries.iter().enumerate().filter(|(_, entry)| **entry != 0);
        let bits = bits.fold(0u64, |bits, (bit, _)| bits | 1 << bit);
        let mut contents = Vec::new();
        for run in (crate::dirty::Word { start: pages.start(), bits }).runs() {
            let first = run.start() - pages.start();
            contents.resize(usize::try_from(run.pages()).unwrap_or(0) * PAGE_BYTES, 0);
            self.read(&mut contents, page_at(index + first))?;
            let entries = entries.iter().skip(usize::try_from(first).unwrap_or(usize::MAX));
            let each = contents.chunks(PAGE_BYTES).zip(entries);
            for ((bytes, entry), page) in each.zip(run.start()..) {
                self.check_page(bytes, page, *entry)?;
            }
            memory
                .write_pages(run, &contents)
                .map_err(MigrationError::machine("writing memory"))?;
        }
        Ok(u64::from(bits.count_ones()))
    }

    fn index(&self, page: u64) -> Result<u64, MigrationError> {
        let index = index_of(&self.description.layout, page);
        let outside = MigrationError::Peer { what: "pages outside the guest's memory" };
        index.ok_or(outside).map_err(|error| error.of_file(&self.path))
    }

    pub(super) fn damaged(&self, what: &'static str) -> MigrationError {
        MigrationError::DamagedFile { path: self.path.clone(), what }
    }

    pub(super) fn pages(&self) -> u64 {
        self.head.pages
    }

    fn check_page(&self, contents: &[u8], page: u64, entry: u64) -> Result<(), MigrationError> {
        if page_sum(contents, page) != entry {
            return Err(self.damaged("memory"));
        }
        Ok(())
    }

    /// The table entries of `count` pages; fails if they changed since the file was opened.
    fn entries(&self, index: u64, count: usize) -> Result<Vec<u64>, MigrationError> {
        let place = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let first = place(index * ENTRY_BYTES) / BLOCK_BYTES;
        let offset = place(index * ENTRY_BYTES) % BLOCK_BYTES;
        let end = (offset + count * 8).next_multiple_of(BLOCK_BYTES);
        let all = place(self.head.pages * ENTRY_BYTES);
        let mut bytes = vec![0; end.min(all.saturating_sub(first * BLOCK_BYTES))];
        self.read(&mut bytes, self.head.table_at() + (first * BLOCK_BYTES) as u64)?;
        let known = self.blocks.get(first..).unwrap_or_default();
        let mut sums = bytes.chunks(BLOCK_BYTES).map(format::sum).enumerate();
        if !sums.all(|(at, sum)| known.get(at) == Some(&sum)) {
            return Err(self.damaged("the table of page checksums"));
        }
        let (entries, _) = bytes.get(offset..).unwrap_or_default().as_chunks::<8>();
        Ok(entries.iter().take(count).map(|entry| u64::from_le_bytes(*entry)).collect())
    }

    /// Checks the whole table, since it defines the zero pages. Returns the checksums of its
    /// blocks.
    fn check_table(&self) -> Result<Vec<u64>, MigrationError> {
        let (mut hash, mut blocks) = (Xxh3Default::new(), Vec::new());
        let mut left = self.head.pages * ENTRY_BYTES;
        let mut bytes = vec![0; 64 << 10];
        while left > 0 {
            let at = self.head.description_at() - left;
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            let part = bytes.get_mut(..len).unwrap_or_default();
            self.read(part, at)?;
            hash.update(part);
            blocks.extend(part.chunks(BLOCK_BYTES).map(format::sum));
            left -= len as u64;
        }
        let whole = hash.digest() == self.head.table_sum;
        if whole {
            Ok(blocks)
        } else {
            Err(MigrationError::Damaged { what: "the table of page checksums" })
        }
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<(), MigrationError> {
        let read = self.file.read_exact_at(bytes, at);
        let path = || self.path.clone();
        read.map_err(|source| MigrationError::File { what: "reading", path: path(), source })
    }
}
