//! Which region backs which guest page.

use std::sync::Arc;

use page_set::{PAGE_BYTES, PageRange};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::observe::Observers;
use crate::{HostMemoryError, ObserveDiscards, Region};

/// All memory of a guest: regions by guest address, none overlapping. Copies are of the same
/// guest: who [observes](Self::observe) one hears of all.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    regions: Vec<Region>,
    /// This process answers for the memory; see [`committing`](Self::committing).
    pub(crate) commits: bool,
    pub(crate) observers: Arc<Observers>,
}

/// Pages that no region backs: the fault of who named them.
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
    /// Where the piece starts: an offset in the region's file, or an address in
    /// this process.
    #[must_use]
    pub fn start_bytes(&self) -> u64 {
        // Cannot overflow: the region was checked to its end.
        self.region.base_bytes() + (self.pages.start() - self.region.pages().start()) * PAGE_BYTES
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.pages.pages() * PAGE_BYTES
    }
}

impl MemoryMap {
    /// Puts regions in order.
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

    /// Memory that this process answers for: where the host never overcommits, what is
    /// [reserved](Self::reserve) again is committed. Who commits a page is charged for it (its
    /// control group), so a back end leaves that to the VMM whose memory it is.
    #[must_use]
    pub fn committing(self) -> Self {
        Self { commits: true, ..self }
    }

    /// The map of guest memory as vm-memory holds it.
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

    /// Has `observer` hear of every discard from now on, for as long as a copy of the map is there.
    pub fn observe(&self, observer: Arc<dyn ObserveDiscards>) {
        self.observers.add(observer);
    }

    /// How many pages the guest has.
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

    /// `pages` cut at region borders, lowest first: one look-up, then one step
    /// for each region that it touches. Pages that no region backs come as
    /// errors in their place, the rest still comes.
    #[must_use]
    pub fn translate(&self, pages: PageRange) -> Pieces<'_> {
        let first = self.regions.partition_point(|region| region.pages().end() <= pages.start());
        Pieces { regions: self.regions.get(first..).unwrap_or_default(), rest: pages }
    }

    /// The one page `page`, by one look-up.
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
    /// Takes the pages below `end` off the rest.
    fn cut(&mut self, end: u64) -> PageRange {
        let (low, high) = self.rest.split_at(end);
        self.rest = high;
        low
    }
}

impl std::iter::FusedIterator for Pieces<'_> {}
