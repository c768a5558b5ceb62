//! One gigabyte of a set: 512 chunks of 512 pages.

use crate::bits::{BITS, Bits512};

/// Pages in a 2 MiB chunk.
pub(crate) const CHUNK_PAGES: usize = BITS;
/// Pages in a 1 GiB slab.
pub(crate) const SLAB_PAGES: usize = BITS * BITS;
/// The same as `u32`, the type of a slab's page count.
const CHUNK_PAGES_U32: u32 = 512;
const SLAB_PAGES_U32: u32 = CHUNK_PAGES_U32 * CHUNK_PAGES_U32;
const _: () =
    assert!(CHUNK_PAGES_U32 as usize == CHUNK_PAGES && SLAB_PAGES_U32 as usize == SLAB_PAGES);

/// Up to this many partial chunks of another slab are merged one by one (each may move the
/// tail of the list); beyond that, the list is rebuilt in one pass.
const MERGE_SINGLY_CHUNKS: u32 = 8;

/// A slab. `Full` has no data, so a full gigabyte costs one map entry.
///
/// The representation is canonical (a slab of all pages is `Full`, a chunk of all pages has
/// no page bitmap), so equal sets compare equal.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Slab {
    Full,
    Mixed(Box<Mixed>),
}

/// A slab that is not full.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Mixed {
    /// Number of pages in the slab.
    pages: u32,
    /// The full chunks, and their number.
    full: Bits512,
    full_chunks: u32,
    /// The partly filled chunks; disjoint from `full`.
    partial: Bits512,
    /// One page bitmap for each bit of `partial`, in order; none is empty or full.
    chunks: Vec<Bits512>,
}

/// The state of one chunk, or of a run of full ones.
pub(crate) enum Chunk {
    /// The chunks up to this one (exclusive) are full.
    FullUntil(usize),
    /// The chunk has some of its pages.
    Partial(Bits512),
}

impl Slab {
    pub(crate) fn empty() -> Self {
        Self::Mixed(Box::new(Mixed {
            pages: 0,
            full: Bits512::EMPTY,
            full_chunks: 0,
            partial: Bits512::EMPTY,
            chunks: Vec::new(),
        }))
    }

    pub(crate) fn pages(&self) -> u64 {
        match self {
            Self::Full => SLAB_PAGES as u64,
            Self::Mixed(mixed) => u64::from(mixed.pages),
        }
    }

    pub(crate) fn full_chunks(&self) -> u64 {
        match self {
            Self::Full => BITS as u64,
            Self::Mixed(mixed) => u64::from(mixed.full_chunks),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pages() == 0
    }

    pub(crate) fn contains(&self, page: usize) -> bool {
        match self {
            Self::Full => true,
            Self::Mixed(mixed) => mixed.page_bits(page / CHUNK_PAGES).get(page % CHUNK_PAGES),
        }
    }

    /// The first chunk at or after `from` that is not empty, with its number.
    pub(crate) fn next_chunk(&self, from: usize) -> Option<(usize, Chunk)> {
        match self {
            Self::Full if from < BITS => Some((from, Chunk::FullUntil(BITS))),
            Self::Full => None,
            Self::Mixed(mixed) => {
                let chunk = mixed.full.or(mixed.partial).next_set(from)?;
                let what = if mixed.full.get(chunk) {
                    Chunk::FullUntil(mixed.full.next_clear(chunk))
                } else {
                    Chunk::Partial(mixed.page_bits(chunk))
                };
                Some((chunk, what))
            }
        }
    }

    /// Adds pages `start..end` of this slab.
    pub(crate) fn insert(&mut self, start: usize, end: usize) {
        self.edit_unless_full(|mixed| {
            let parts = Parts::of(start, end);
            for (chunk, bits) in parts.edges() {
                mixed.or_chunk(chunk, bits);
            }
            mixed.fill_chunks(parts.first_whole, parts.end_whole);
        });
    }

    /// Removes pages `start..end` of this slab.
    pub(crate) fn remove(&mut self, start: usize, end: usize) {
        let mixed = self.edit();
        let parts = Parts::of(start, end);
        for (chunk, bits) in parts.edges() {
            mixed.and_not_chunk(chunk, bits);
        }
        mixed.empty_chunks(parts.first_whole, parts.end_whole);
        self.normalise();
    }

    /// Adds `bits` of chunk `chunk`.
    pub(crate) fn or_chunk(&mut self, chunk: usize, bits: Bits512) {
        self.edit_unless_full(|mixed| mixed.or_chunk(chunk, bits));
    }

    /// Adds every page of the chunks in `chunks`.
    pub(crate) fn or_full_chunks(&mut self, chunks: Bits512) {
        self.edit_unless_full(|mixed| mixed.or_full_chunks(chunks));
    }

    pub(crate) fn union_with(&mut self, other: &Self) {
        match other {
            Self::Full => *self = Self::Full,
            Self::Mixed(other) => self.edit_unless_full(|mixed| mixed.union_with(other)),
        }
    }

    pub(crate) fn subtract(&mut self, other: &Self) {
        match other {
            Self::Full => *self = Self::empty(),
            Self::Mixed(other) => {
                self.edit().subtract(other);
                self.normalise();
            }
        }
    }

    pub(crate) fn intersects(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Full, slab) | (slab, Self::Full) => !slab.is_empty(),
            (Self::Mixed(a), Self::Mixed(b)) => a.intersects(b),
        }
    }

    pub(crate) fn intersects_range(&self, start: usize, end: usize) -> bool {
        let Self::Mixed(mixed) = self else { return start < end };
        let parts = Parts::of(start, end);
        let whole = Bits512::range(parts.first_whole, parts.end_whole);
        !mixed.full.or(mixed.partial).and(whole).is_empty()
            || parts.edges().any(|(chunk, bits)| !mixed.page_bits(chunk).and(bits).is_empty())
    }

    /// Removes and returns the lowest `chunks` full chunks.
    pub(crate) fn take_full_chunks(&mut self, chunks: u64) -> Self {
        let mixed = self.edit();
        let lowest = mixed.full.lowest(chunks);
        mixed.full = mixed.full.and_not(lowest);
        mixed.full_chunks -= lowest.count();
        mixed.pages -= lowest.count() * CHUNK_PAGES_U32;
        self.normalise();
        let mut taken = Self::empty();
        taken.or_full_chunks(lowest);
        taken
    }

    /// The lowest page number below which the slab has `pages` pages.
    pub(crate) fn position_of(&self, pages: u64) -> usize {
        let mut left = pages;
        let mut chunk = 0;
        while let Some((at, what)) = self.next_chunk(chunk) {
            let (held, next) = match &what {
                Chunk::FullUntil(end) => ((end - at) as u64 * CHUNK_PAGES as u64, *end),
                Chunk::Partial(bits) => (u64::from(bits.count()), at + 1),
            };
            if held >= left {
                return at * CHUNK_PAGES
                    + match what {
                        // `left <= held <= SLAB_PAGES`, so it fits.
                        Chunk::FullUntil(_) => usize::try_from(left).unwrap_or(SLAB_PAGES),
                        Chunk::Partial(bits) => {
                            bits.lowest(left).ones().last().map_or(0, |last| last + 1)
                        }
                    };
            }
            left -= held;
            chunk = next;
        }
        SLAB_PAGES
    }

    fn edit_unless_full(&mut self, change: impl FnOnce(&mut Mixed)) {
        if let Self::Mixed(mixed) = self {
            change(mixed);
            self.normalise();
        }
    }

    /// The slab as `Mixed`; `normalise` must follow.
    fn edit(&mut self) -> &mut Mixed {
        if matches!(self, Self::Full) {
            *self = Self::Mixed(Box::new(Mixed {
                pages: SLAB_PAGES_U32,
                full: Bits512::FULL,
                full_chunks: CHUNK_PAGES_U32,
                partial: Bits512::EMPTY,
                chunks: Vec::new(),
            }));
        }
        match self {
            Self::Mixed(mixed) => mixed,
            Self::Full => unreachable!("replaced just above"),
        }
    }

    fn normalise(&mut self) {
        if self.pages() == SLAB_PAGES as u64 {
            *self = Self::Full;
        }
    }
}

impl Mixed {
    fn page_bits(&self, chunk: usize) -> Bits512 {
        if self.full.get(chunk) {
            Bits512::FULL
        } else if self.partial.get(chunk) {
            self.chunks[self.partial.rank(chunk)]
        } else {
            Bits512::EMPTY
        }
    }

    /// Sets the pages of chunk `chunk` to `bits`.
    fn set_page_bits(&mut self, chunk: usize, bits: Bits512) {
        let rank = self.partial.rank(chunk);
        let was_full = self.full.get(chunk);
        let was_partial = self.partial.get(chunk);
        let held = match self.chunks.get(rank) {
            Some(old) if was_partial => old.count(),
            _ if was_full => CHUNK_PAGES_U32,
            _ => 0,
        };
        let holds = bits.count();
        self.pages = self.pages - held + holds;
        let is_full = holds == CHUNK_PAGES_U32;
        let is_partial = !is_full && holds > 0;
        if is_full != was_full {
            self.full.assign(chunk, is_full);
            self.full_chunks = self.full_chunks + u32::from(is_full) - u32::from(was_full);
        }
        self.partial.assign(chunk, is_partial);
        match (was_partial, is_partial) {
            (true, true) => self.chunks[rank] = bits,
            (true, false) => {
                self.chunks.remove(rank);
            }
            (false, true) => self.chunks.insert(rank, bits),
            (false, false) => {}
        }
    }

    fn or_chunk(&mut self, chunk: usize, bits: Bits512) {
        if !self.full.get(chunk) {
            self.set_page_bits(chunk, self.page_bits(chunk).or(bits));
        }
    }

    fn and_not_chunk(&mut self, chunk: usize, bits: Bits512) {
        let old = self.page_bits(chunk);
        if !old.is_empty() {
            self.set_page_bits(chunk, old.and_not(bits));
        }
    }

    fn or_full_chunks(&mut self, chunks: Bits512) {
        for chunk in self.partial.and(chunks).ones() {
            self.set_page_bits(chunk, Bits512::EMPTY);
        }
        self.add_full(chunks.and_not(self.full));
    }

    fn fill_chunks(&mut self, first: usize, end: usize) {
        self.empty_chunks(first, end);
        self.add_full(Bits512::range(first, end));
    }

    /// Adds whole chunks that are empty.
    fn add_full(&mut self, chunks: Bits512) {
        self.full = self.full.or(chunks);
        self.full_chunks += chunks.count();
        self.pages += chunks.count() * CHUNK_PAGES_U32;
    }

    fn empty_chunks(&mut self, first: usize, end: usize) {
        if first >= end {
            return;
        }
        let gone = Bits512::range(first, end);
        let stored = self.partial.rank(first)..self.partial.rank(end);
        let partial: u32 = self.chunks.drain(stored).map(|bits| bits.count()).sum();
        let full = self.full.and(gone).count();
        self.pages -= partial + full * CHUNK_PAGES_U32;
        self.full_chunks -= full;
        self.full = self.full.and_not(gone);
        self.partial = self.partial.and_not(gone);
    }

    fn union_with(&mut self, other: &Self) {
        self.or_full_chunks(other.full);
        let touched = other.partial.and_not(self.full);
        if touched.count() <= MERGE_SINGLY_CHUNKS {
            touched.ones().for_each(|chunk| self.or_chunk(chunk, other.page_bits(chunk)));
        } else {
            self.rebuild(touched, |chunk, bits| bits.or(other.page_bits(chunk)));
        }
    }

    fn subtract(&mut self, other: &Self) {
        let touched = self.full.or(self.partial).and(other.full.or(other.partial));
        if touched.count() <= MERGE_SINGLY_CHUNKS {
            touched.ones().for_each(|chunk| self.and_not_chunk(chunk, other.page_bits(chunk)));
        } else {
            self.rebuild(touched, |chunk, bits| bits.and_not(other.page_bits(chunk)));
        }
    }

    /// Applies `change` to every chunk in `touched`, in one pass over the list.
    fn rebuild(&mut self, touched: Bits512, change: impl Fn(usize, Bits512) -> Bits512) {
        let mut full = self.full.and_not(touched);
        let mut partial = Bits512::EMPTY;
        let mut chunks = Vec::with_capacity(self.chunks.len());
        let mut pages = full.count() * CHUNK_PAGES_U32;
        for chunk in self.partial.or(touched).ones() {
            let old = self.page_bits(chunk);
            let bits = if touched.get(chunk) { change(chunk, old) } else { old };
            pages += bits.count();
            if bits.is_full() {
                full.set(chunk);
            } else if !bits.is_empty() {
                partial.set(chunk);
                chunks.push(bits);
            }
        }
        *self = Self { pages, full, full_chunks: full.count(), partial, chunks };
    }

    fn intersects(&self, other: &Self) -> bool {
        let (mine, theirs) = (self.full.or(self.partial), other.full.or(other.partial));
        let sure = self.full.and(theirs).or(other.full.and(mine));
        !sure.is_empty()
            || self
                .partial
                .and(other.partial)
                .ones()
                .any(|chunk| !self.page_bits(chunk).and(other.page_bits(chunk)).is_empty())
    }
}

/// Pages `start..end` of a slab as a partial chunk, whole chunks, and a partial chunk.
struct Parts {
    start: usize,
    end: usize,
    first_whole: usize,
    end_whole: usize,
}

impl Parts {
    fn of(start: usize, end: usize) -> Self {
        Self { start, end, first_whole: start.div_ceil(CHUNK_PAGES), end_whole: end / CHUNK_PAGES }
    }

    fn edges(&self) -> impl Iterator<Item = (usize, Bits512)> {
        let (head, tail) = (self.start / CHUNK_PAGES, self.end / CHUNK_PAGES);
        let within = |chunk: usize| {
            let base = chunk * CHUNK_PAGES;
            Bits512::range(self.start.saturating_sub(base), self.end.saturating_sub(base))
        };
        let head_bits = (!self.start.is_multiple_of(CHUNK_PAGES)).then(|| (head, within(head)));
        let tail_bits = (!self.end.is_multiple_of(CHUNK_PAGES)
            && (tail != head || head_bits.is_none()))
        .then(|| (tail, within(tail)));
        head_bits.into_iter().chain(tail_bits)
    }
}
