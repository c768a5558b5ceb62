//! A host that checks every answer against its request.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use balloon_abi::{AnswerHeader, Command, MessageStatus, Outcome, Records};

/// An answer that the driver has posted.
#[derive(Clone)]
pub(crate) struct Posted {
    pub(crate) header: AnswerHeader,
    /// Blocks named: first page, pages.
    pub(crate) blocks: Vec<(u64, u64)>,
}

/// The host's state.
#[derive(Default)]
pub(crate) struct Host {
    pub(crate) requested: BTreeMap<u32, Command>,
    pub(crate) in_flight: VecDeque<Posted>,
    /// Ids in the order of their last answers.
    pub(crate) ended: Vec<(u32, Outcome)>,
    /// Ids of requests with a refused answer.
    pub(crate) refused: BTreeSet<u32>,
    /// Blocks named for an id so far.
    pub(crate) named: BTreeMap<u32, Vec<(u64, u64)>>,
    /// The hold whose pages the host treats as free.
    pub(crate) relies_on: Option<u32>,
}

impl Host {
    /// Takes an answer from the queue, and checks everything that does not depend on
    /// the guest's memory.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> Posted {
        let (header, records) = AnswerHeader::split(bytes).expect("an answer");
        let command = *self.requested.get(&header.id).expect("an answer without a request");
        let before = self.ended.iter().filter(|(id, _)| *id == header.id).map(|(_, o)| *o);
        match before.collect::<Vec<_>>().as_slice() {
            [] => {}
            [Outcome::Done] => assert_eq!(header.outcome, Outcome::HoldLost, "answered twice"),
            other => panic!("answered {:?} after {other:?}", header.outcome),
        }
        let mut blocks = Vec::new();
        let mut pages = BTreeSet::new();
        for record in Records::new(records) {
            let record = record.expect("only records");
            let block_pages = record.header().block_pages();
            for (i, word) in record.words().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    let start = record.header().start_pfn.0 + (i as u64 * 64 + bit) * block_pages;
                    blocks.push((start, block_pages));
                    let fresh = (start..start + block_pages).all(|page| pages.insert(page));
                    assert!(fresh, "a page twice in one answer");
                }
            }
        }
        let named = self.named.entry(header.id).or_default();
        let smallest = named.last().map_or(u64::MAX, |(_, pages)| *pages);
        let in_order =
            blocks.iter().try_fold(
                smallest,
                |last, (_, pages)| {
                    if *pages <= last { Some(*pages) } else { None }
                },
            );
        assert!(in_order.is_some(), "a smaller block before a larger one");
        named.extend(&blocks);
        match command {
            Command::ReportFree { .. } | Command::HoldFree { .. }
                if matches!(header.outcome, Outcome::More | Outcome::Done) =>
            {
                let sum: u64 = named.iter().map(|(_, pages)| pages).sum();
                assert_eq!(header.values[0], sum, "pages named so far");
            }
            _ => assert!(blocks.is_empty(), "{:?} has records", header.outcome),
        }
        if matches!(command, Command::HoldFree { .. }) && !blocks.is_empty() {
            self.relies_on = Some(header.id);
        }
        if header.outcome != Outcome::More {
            self.ended.push((header.id, header.outcome));
        }
        let posted = Posted { header, blocks };
        self.in_flight.push_back(posted.clone());
        posted
    }

    /// Returns the oldest answer.
    pub(crate) fn give_back(&mut self, accept: bool) -> Option<(Posted, MessageStatus)> {
        let posted = self.in_flight.pop_front()?;
        let id = posted.header.id;
        if !accept {
            self.refused.insert(id);
        }
        let over = matches!(posted.header.outcome, Outcome::Cancelled | Outcome::HoldLost);
        if self.relies_on == Some(id) && (over || self.refused.contains(&id)) {
            self.relies_on = None;
        }
        let status = if self.refused.contains(&id) {
            MessageStatus::Unwanted
        } else {
            MessageStatus::Accepted
        };
        Some((posted, status))
    }
}
