//! Maps guest pages to regions.

use std::sync::Arc;

use page_set::{PAGE_BYTES, PageRange};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::observe::Observers;
use crate::{HostMemoryError, ObserveDiscards, Region};

/// All memory of a guest: regions by guest address, none overlapping. Clones are of the same guest:
/// an [observer](Self::observe) of one is notified of the discards of all.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    regions: Vec<Region>,
    /// This process is charged for the memory; see [`committing`](Self::committing).
    pub(crate) commits: bool,
    pub(crate) observers: Arc<Observers>,
}

/// Pages that no region backs: the fault of the side that named them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {:#x} lies outside guest memory", .pages.start())]
pub struct OutsideMemory {
    /// The pages, none of which is backed.
    pub pages: PageRange,
}

/// A run of guest pages inside one region.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The region.
    pub region: &'a Region,
    /// The guest pages, all inside it.
    pub pages: PageRange,
}

impl Piece<'_> {
    /// Start of the piece: an offset in the region's file, or an address in
    /// this process.
    #[must_use]
    pub fn start_bytes(&self) -> u64 {
        // Cannot overflow: the region's end was checked.
        self.region.base_bytes() + (self.pages.start() - self.region.pages().start()) * PAGE_BYTES
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.pages.pages() * PAGE_BYTES
    }
}

impl MemoryMap {
    /// Sorts the regions.
    ///
    /// # Errors
    /// [`HostMemoryError::Overlap`].
    pub fn new(mut regions: Vec<Region>) -> Result<Self, HostMemoryError> {
        regions.retain(|region| !region.pages().is_empty());
        regions.sort_by_key(|region| region.pages().start());
        for pair in regions.windows(2) {
            if let [first, second] = pair
                && first.pages().end() > second.pages().start()
            {
                return Err(HostMemoryError::Overlap {
                    first: first.pages(),
                    second: second.pages(),
                });
            }
        }
        Ok(Self { regions, commits: false, observers: Arc::default() })
    }

    /// Memory for which this process is charged: on a host that never overcommits, pages that are
    /// [reserved](Self::reserve) again are committed. The control group of the committing process
    /// is charged for a page, so only the VMM that owns the memory does this, not a back end.
    #[must_use]
    pub fn committing(self) -> Self {
        Self { commits: true, ..self }
    }

    /// The map of guest memory in vm-memory's form.
    ///
    /// # Errors
    /// As [`Region::of_mapping`].
    pub fn of_guest_memory<B>(memory: &GuestMemoryMmap<B>) -> Result<Self, HostMemoryError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        Self::new(memory.iter().map(Region::of_mapping).collect::<Result<_, _>>()?)
    }

    /// The regions, by guest address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Notifies `observer` of every discard from now on, as long as a clone of the map exists.
    pub fn observe(&self, observer: Arc<dyn ObserveDiscards>) {
        self.observers.add(observer);
    }

    /// Number of pages of the guest.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages().pages()).sum()
    }

    /// Checks that every page of `pages` is backed.
    ///
    /// # Errors
    /// The first run of pages that is not.
    pub fn check(&self, pages: PageRange) -> Result<(), OutsideMemory> {
        self.translate(pages).find_map(Result::err).map_or(Ok(()), Err)
    }

    /// Splits `pages` at region borders, lowest first: one look-up, then one step for
    /// each region. Pages that no region backs are yielded as errors in their place;
    /// the rest follows.
    #[must_use]
    pub fn translate(&self, pages: PageRange) -> Pieces<'_> {
        let first = self.regions.partition_point(|region| region.pages().end() <= pages.start());
        Pieces { regions: self.regions.get(first..).unwrap_or_default(), rest: pages }
    }

    /// Looks up one page.
    #[must_use]
    pub fn find(&self, page: u64) -> Option<Piece<'_>> {
        let pages = PageRange::new(page, 1).ok()?;
        self.translate(pages).next()?.ok()
    }
}

/// Iterator of [`MemoryMap::translate`].
#[derive(Clone, Debug)]
pub struct Pieces<'a> {
    regions: &'a [Region],
    rest: PageRange,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Result<Piece<'a>, OutsideMemory>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let Some((region, after)) = self.regions.split_first() else {
            return Some(Err(OutsideMemory { pages: self.cut(self.rest.end()) }));
        };
        if region.pages().start() > self.rest.start() {
            let gap_end = region.pages().start().min(self.rest.end());
            return Some(Err(OutsideMemory { pages: self.cut(gap_end) }));
        }
        let end = region.pages().end().min(self.rest.end());
        self.regions = after;
        Some(Ok(Piece { region, pages: self.cut(end) }))
    }
}

impl Pieces<'_> {
    /// Removes the pages below `end` from the rest, and returns them.
    fn cut(&mut self, end: u64) -> PageRange {
        let (low, high) = self.rest.split_at(end);
        self.rest = high;
        low
    }
}

impl std::iter::FusedIterator for Pieces<'_> {}
