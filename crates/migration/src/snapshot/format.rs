//! The file format.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::codec::{Reader, Writer};
use crate::error::MigrationError;
use crate::layout::GuestLayout;
use crate::limits::{
    DEFAULT_MAX_MEMORY_BYTES, MAX_BODY_BYTES, MAX_NAME_BYTES, MAX_STATE_BYTES, MAX_STATE_SECTIONS,
};
use crate::traits::StateSection;
use crate::wire::chunk::PAGE_BYTES;

/// Bytes of the header, and the offset of memory.
pub(super) const HEADER_BYTES: usize = PAGE_BYTES;

/// Bytes of a page's entry in the table.
pub(super) const ENTRY_BYTES: u64 = 8;

const MAGIC: [u8; 8] = *b"AEROSNAP";
const VERSION: u32 = 1;

/// Limit of the encoded state: sections with their names and lengths.
const MAX_ENCODED_STATE_BYTES: u64 =
    MAX_STATE_BYTES + (MAX_STATE_SECTIONS * (MAX_NAME_BYTES + 16) + 4) as u64;

/// Limit of a guest's pages: the whole table is read before anything else is checked, and a file
/// with holes can have a table of any size.
const MAX_PAGES: u64 = DEFAULT_MAX_MEMORY_BYTES / PAGE_BYTES as u64;

/// The first page of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Pages of the guest.
    pub(super) pages: u64,
    /// Checksum of the table.
    pub(super) table_sum: u64,
    pub(super) description_bytes: u64,
    pub(super) description_sum: u64,
    pub(super) state_bytes: u64,
    pub(super) state_sum: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let body = Writer::default().bytes(&MAGIC).u32(VERSION).u32(0).u64(self.pages);
        let body = body.u64(self.table_sum).u64(self.description_bytes).u64(self.description_sum);
        let body = body.u64(self.state_bytes).u64(self.state_sum).0;
        let mut page = [0; HEADER_BYTES];
        for (place, byte) in page.iter_mut().zip(body) {
            *place = byte;
        }
        let (text, sum) = page.split_at_mut(HEADER_BYTES - 8);
        sum.copy_from_slice(&xxh3_64_with_seed(text, 0).to_le_bytes());
        page
    }

    /// Decodes a header, and checks that its values are within their limits.
    pub(super) fn decode(page: &[u8; HEADER_BYTES], path: &Path) -> Result<Self, MigrationError> {
        let invalid = |what| MigrationError::Snapshot { path: path.to_owned(), what };
        let (text, sum) = page.split_at(HEADER_BYTES - 8);
        let mut body = Reader::new(text);
        let magic: [u8; 8] = body.array()?;
        if magic != MAGIC {
            let (found, known) = (magic.escape_ascii(), MAGIC.escape_ascii());
            return Err(invalid(format!("it begins with \"{found}\", not with \"{known}\"")));
        }
        let version = body.u32()?;
        if version != VERSION {
            let what =
                format!("it has version {version}, not {VERSION}: use the release that wrote it");
            return Err(invalid(what));
        }
        if sum != xxh3_64_with_seed(text, 0).to_le_bytes() {
            return Err(MigrationError::Damaged { what: "the snapshot's header" });
        }
        body.reserved(4)?;
        let head = Self {
            pages: body.u64()?,
            table_sum: body.u64()?,
            description_bytes: body.u64()?,
            description_sum: body.u64()?,
            state_bytes: body.u64()?,
            state_sum: body.u64()?,
        };
        let fits = head.pages <= MAX_PAGES
            && head.description_bytes <= MAX_BODY_BYTES as u64
            && head.state_bytes <= MAX_ENCODED_STATE_BYTES;
        if fits {
            Ok(head)
        } else {
            Err(MigrationError::Peer { what: "a size in its header exceeds the limit" })
        }
    }

    /// Offset of the table. Cannot overflow: pages are limited.
    pub(super) const fn table_at(&self) -> u64 {
        page_at(self.pages)
    }

    pub(super) const fn description_at(&self) -> u64 {
        self.table_at() + self.pages * ENTRY_BYTES
    }

    pub(super) const fn state_at(&self) -> u64 {
        self.description_at() + self.description_bytes
    }

    /// Bytes of the whole file.
    pub(super) const fn end(&self) -> u64 {
        self.state_at() + self.state_bytes
    }
}

/// Recomputes the checksums of a changed snapshot, as far as its header still has valid offsets.
#[cfg(feature = "raw")]
pub(crate) fn seal(bytes: &mut [u8]) {
    let number = |bytes: &[u8], at: usize| {
        let word = bytes.get(at..at + 8).and_then(|word| word.first_chunk());
        word.map_or(0, |word| u64::from_le_bytes(*word))
    };
    let pages = number(bytes, 16).min(1 << 40);
    let table_at = page_at(pages);
    let description_at = table_at + pages * ENTRY_BYTES;
    let state_at = description_at.saturating_add(number(bytes, 32));
    let end = state_at.saturating_add(number(bytes, 48));
    for (at, from, to) in
        [(24, table_at, description_at), (40, description_at, state_at), (56, state_at, end)]
    {
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let Some(new) = bytes.get(place(from)..place(to)).map(sum) else { continue };
        if let Some(old) = bytes.get_mut(at..at + 8) {
            old.copy_from_slice(&new.to_le_bytes());
        }
    }
    if let Some((text, sum_of)) =
        bytes.get_mut(..HEADER_BYTES).and_then(|head| head.split_last_chunk_mut::<8>())
    {
        *sum_of = sum(text).to_le_bytes();
    }
}

/// Offset of the page with this index.
pub(super) const fn page_at(index: u64) -> u64 {
    HEADER_BYTES as u64 + index * PAGE_BYTES as u64
}

/// A page's table entry; 0 means a zero page.
pub(super) fn page_sum(contents: &[u8], page: u64) -> u64 {
    xxh3_64_with_seed(contents, page).max(1)
}

pub(super) fn sum(bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, 0)
}

/// Index of `page` among the pages that exist.
pub(super) fn index_of(layout: &GuestLayout, page: u64) -> Option<u64> {
    let mut before = 0;
    for region in layout.regions() {
        if region.contains(page) {
            return Some(before + page - region.start());
        }
        before += region.pages();
    }
    None
}

pub(super) fn encode_state(state: &[StateSection]) -> Vec<u8> {
    let each = |body: Writer, section: &StateSection| {
        let body = body.text(&section.name, MAX_NAME_BYTES).u32(section.version);
        body.u64(section.bytes.len() as u64).bytes(&section.bytes)
    };
    state.iter().fold(Writer::default().count(state.len()), each).0
}

pub(super) fn decode_state(bytes: &[u8]) -> Result<Vec<StateSection>, MigrationError> {
    let mut body = Reader::new(bytes);
    let mut state = Vec::new();
    for _ in 0..body.count(MAX_STATE_SECTIONS)? {
        let (name, version) = (body.text(MAX_NAME_BYTES)?, body.u32()?);
        let len = usize::try_from(body.u64()?).unwrap_or(usize::MAX);
        state.push(StateSection { name, version, bytes: body.bytes(len)?.to_vec() });
    }
    body.finish()?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use page_set::PageRange;

    use super::*;

    fn head() -> Header {
        Header {
            pages: 5,
            table_sum: 1,
            description_bytes: 2,
            description_sum: 3,
            state_bytes: 4,
            state_sum: 5,
        }
    }

    #[test]
    fn a_header_is_decoded_as_encoded_and_changes_are_detected() {
        let page = head().encode();
        assert_eq!(Header::decode(&page, Path::new("a")).unwrap(), head());
        assert_eq!(head().end(), 4096 * 6 + 40 + 6);
        for at in [0, 9, 20, 63, 100, 4095] {
            let mut changed = page;
            changed[at] ^= 1;
            assert!(Header::decode(&changed, Path::new("a")).is_err(), "{at}");
        }
        let refused = |head: Header| Header::decode(&head.encode(), Path::new("a")).is_err();
        assert!(refused(Header { pages: u64::MAX, ..head() }));
        // A file with holes, whose table takes days to read.
        assert!(refused(Header { pages: MAX_PAGES + 1, ..head() }));
        assert!(refused(Header { description_bytes: 1 << 40, ..head() }));
        assert!(refused(Header { state_bytes: 1 << 40, ..head() }));
    }

    #[test]
    fn page_indices_skip_the_gaps_between_regions() {
        let range = |start, pages| PageRange::new(start, pages).unwrap();
        let layout = GuestLayout::new(vec![range(10, 5), range(100, 5)]).unwrap();
        let index = |page| index_of(&layout, page);
        assert_eq!([index(10), index(14), index(100), index(104)], [0, 4, 5, 9].map(Some));
        assert_eq!([index(9), index(15), index(105)], [None; 3]);
    }

    #[test]
    fn state_is_decoded_as_encoded() {
        let section = |name: &str, bytes: &[u8]| StateSection {
            name: name.to_owned(),
            version: 2,
            bytes: bytes.to_vec(),
        };
        let state = vec![section("cpu0", b"abc"), section("clock", b"")];
        let bytes = encode_state(&state);
        assert_eq!(decode_state(&bytes).unwrap(), state);
        for len in 0..bytes.len() {
            assert!(decode_state(&bytes[..len]).is_err());
        }
    }
}
