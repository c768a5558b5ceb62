//! Reassembles the machine state from its parts.

use crate::error::MigrationError;
use crate::limits::{MAX_STATE_BYTES, MAX_STATE_SECTIONS};
use crate::traits::StateSection;
use crate::wire::chunk::StatePart;

/// Sections so far; the last one may be incomplete.
#[derive(Debug, Default)]
pub(crate) struct StateParts {
    sections: Vec<StateSection>,
    /// Announced bytes of the last section.
    total: u64,
    /// Announced bytes of all sections so far.
    announced: u64,
}

const UNEXPECTED_PART: MigrationError =
    MigrationError::Peer { what: "parts of state out of order" };

impl StateParts {
    /// Adds a part: the next of the last section, or the first of the next section.
    pub(crate) fn add(&mut self, body: &[u8], bytes: &[u8]) -> Result<(), MigrationError> {
        let part = StatePart::decode(body)?;
        if part.sum_of(bytes) != part.sum {
            return Err(MigrationError::Damaged { what: "state" });
        }
        let next = u64::from(part.index) == self.sections.len() as u64;
        if next && part.offset == 0 && self.is_whole() {
            self.begin(&part)?;
        }
        let number = u64::from(part.index) + 1;
        let total = self.total;
        let here = number == self.sections.len() as u64;
        let section = self.sections.last_mut().filter(|_| here).ok_or(UNEXPECTED_PART)?;
        let fits = section.name == part.name
            && section.version == part.version
            && part.total == total
            && part.offset == section.bytes.len() as u64
            && part.offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= total)
            && (!bytes.is_empty() || total == 0);
        if !fits {
            return Err(UNEXPECTED_PART);
        }
        // Allocate only for what arrived: the total is only announced.
        section.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// The whole state.
    pub(crate) fn finish(
        self,
        sections: u32,
        bytes: u64,
    ) -> Result<Vec<StateSection>, MigrationError> {
        let whole = self.is_whole()
            && u64::from(sections) == self.sections.len() as u64
            && bytes == self.announced;
        if whole { Ok(self.sections) } else { Err(MigrationError::Damaged { what: "state" }) }
    }

    fn is_whole(&self) -> bool {
        self.sections.last().is_none_or(|last| last.bytes.len() as u64 == self.total)
    }

    fn begin(&mut self, part: &StatePart) -> Result<(), MigrationError> {
        let announced = self.announced.saturating_add(part.total);
        if self.sections.len() >= MAX_STATE_SECTIONS || announced > MAX_STATE_BYTES {
            return Err(MigrationError::Peer { what: "more state than the limit" });
        }
        self.announced = announced;
        self.total = part.total;
        let (name, version) = (part.name.clone(), part.version);
        self.sections.push(StateSection { name, version, bytes: Vec::new() });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(index: u32, total: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
        let name = format!("s{index}");
        let mut part = StatePart { index, version: 1, total, offset, sum: 0, name };
        part.sum = part.sum_of(bytes);
        part.encode()
    }

    fn add(parts: &mut StateParts, index: u32, total: u64, offset: u64, bytes: &[u8]) -> bool {
        parts.add(&part(index, total, offset, bytes), bytes).is_ok()
    }

    #[test]
    fn parts_are_reassembled_into_sections() {
        let mut parts = StateParts::default();
        assert!(add(&mut parts, 0, 5, 0, b"abc"));
        assert!(add(&mut parts, 0, 5, 3, b"de"));
        assert!(add(&mut parts, 1, 0, 0, b""));
        assert!(add(&mut parts, 2, 1, 0, b"f"));
        let state = parts.finish(3, 6).unwrap();
        let bytes: Vec<_> = state.iter().map(|section| section.bytes.clone()).collect();
        assert_eq!(bytes, [b"abcde".to_vec(), vec![], b"f".to_vec()]);
        assert_eq!(state[2].name, "s2");
    }

    #[test]
    fn parts_out_of_order_or_size_are_refused() {
        // A part that does not begin a section, of the wrong section, too long, repeated, or empty.
        for (index, total, offset, bytes) in [
            (0, 5, 3, &b"x"[..]),
            (0, 5, 2, b"xyzu"),
            (1, 5, 0, b"x"),
            (0, 5, 2, b""),
            (0, 4, 2, b"x"),
            (2, 5, 0, b"x"),
            (0, 5, u64::MAX, b"x"),
        ] {
            let mut parts = StateParts::default();
            assert!(add(&mut parts, 0, 5, 0, b"ab"));
            assert!(!add(&mut parts, index, total, offset, bytes), "{index} {total} {offset}");
        }
        let mut parts = StateParts::default();
        assert!(add(&mut parts, 0, 5, 0, b"ab"));
        assert!(parts.finish(1, 5).is_err(), "unfinished");
        assert!(StateParts::default().finish(1, 0).is_err(), "missing");
    }

    #[test]
    fn an_announced_size_allocates_nothing() {
        let mut parts = StateParts::default();
        assert!(add(&mut parts, 0, MAX_STATE_BYTES, 0, b"a"));
        assert!(parts.sections[0].bytes.capacity() < 100);
        let mut parts = StateParts::default();
        assert!(add(&mut parts, 0, 1, 0, b"a"));
        assert!(!add(&mut parts, 1, MAX_STATE_BYTES, 0, b"a"));
    }
}
