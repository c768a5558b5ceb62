//! A guest that sends arbitrary messages, compared with a model: a `BTreeSet` of pages.
//!
//! The model decodes messages with `guest_ring::naive`.

use std::collections::BTreeSet;

use balloon_abi::{Features, MessageStatus, Vq};
use balloon_device::Fault;
use guest_ring::{Buffer, NEXT, naive};
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;

use crate::guest::*;

type Pages = BTreeSet<u64>;

/// Layout of a message's bytes in a chain.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Whole,
    NoStatus,
    Split(u16),
    /// Another buffer follows that is outside of guest memory.
    Nowhere,
    /// The last descriptor's `next` is outside of the descriptor table.
    BreaksOff,
    /// Another buffer of 4 GiB follows.
    Oversized,
}

#[derive(Clone, Debug)]
enum Op {
    Message { deflate: bool, bytes: Vec<u8>, shape: Shape },
    Reset { bitmap: bool },
}

/// The model's verdict on a message, with the device's faults as reasons.
enum Meaning {
    Pages(Pages, u64),
    Refused(Vec<Fault>),
}

fn exists(page: u64) -> bool {
    (FIRST_PAGE..END_PAGE).contains(&page) && !GAP.contains(&page)
}

/// Decodes a message in this shape.
fn meaning(bitmap: bool, bytes: &[u8], shape: Shape) -> Meaning {
    match shape {
        Shape::Nowhere | Shape::BreaksOff => Meaning::Refused(vec![Fault::BadDescriptor]),
        Shape::Oversized => Meaning::Refused(vec![Fault::OversizedMessage]),
        _ if bytes.is_empty() => Meaning::Refused(vec![Fault::EmptyMessage]),
        _ if bitmap => naive::records(bytes, exists).into(),
        _ => naive::page_numbers(bytes, exists).into(),
    }
}

impl From<naive::Meaning> for Meaning {
    fn from(meaning: naive::Meaning) -> Self {
        let fault = |reason| match reason {
            naive::Reason::Malformed => Fault::MalformedRecord,
            naive::Reason::Outside => Fault::OutsideMemory,
            naive::Reason::Repeated => Fault::RepeatedPage,
        };
        match meaning {
            naive::Meaning::Pages(pages, outside) => Self::Pages(pages, outside),
            naive::Meaning::Refused(reasons) => {
                Self::Refused(reasons.into_iter().map(fault).collect())
            }
        }
    }
}

struct Run {
    guest: Guest,
    held: Pages,
    deflates: u16,
}

impl Run {
    fn step(&mut self, op: &Op) {
        self.guest.balloon.reclaim_mut().events.clear();
        match op {
            Op::Reset { bitmap } => {
                self.guest.balloon.reset(if *bitmap { BITMAP } else { CLASSIC });
                let kept = std::mem::take(&mut self.held);
                assert_eq!(self.guest.balloon.reclaim().events, [self.retain(&kept)]);
            }
            Op::Message { deflate, bytes, shape } => {
                let vq = if *deflate { Vq::Deflate } else { Vq::Inflate };
                self.message(vq, bytes, *shape);
                self.deflates += u16::from(*deflate);
                if *shape == Shape::BreaksOff {
                    let memory = self.guest.memory.clone();
                    self.guest.side(vq).set_up(&memory);
                    self.deflates = if *deflate { 0 } else { self.deflates };
                }
            }
        }
        let held: Pages =
            self.guest.balloon.held().ranges().flat_map(|r| r.start()..r.end()).collect();
        assert_eq!(held, self.held);
    }

    fn message(&mut self, vq: Vq, bytes: &[u8], shape: Shape) {
        let bitmap = self.guest.uses_bitmap();
        let before = *self.guest.balloon.faults();
        let status = send(&mut self.guest, vq, bytes, shape);
        let mut faults = before;
        let (expected, mut statuses) = match meaning(bitmap, bytes, shape) {
            Meaning::Pages(pages, outside) => {
                (0..outside).for_each(|_| faults.count(Fault::OutsideMemory));
                let events = self.accept(vq, &pages, &mut faults);
                assert_eq!(*self.guest.balloon.faults(), faults);
                (events, vec![MessageStatus::Accepted as u32])
            }
            Meaning::Refused(reasons) => {
                let one_of = reasons.iter().map(|fault| {
                    let mut faults = before;
                    faults.count(*fault);
                    faults
                });
                let seen = *self.guest.balloon.faults();
                assert!(one_of.into_iter().any(|faults| faults == seen), "{reasons:?} {seen:?}");
                let all = self.held.clone();
                let keeps = vq == Vq::Deflate && !bitmap;
                let events = if keeps { vec![self.cancel(&all)] } else { vec![] };
                (events, reasons.into_iter().map(status_of).collect())
            }
        };
        assert_eq!(self.guest.balloon.reclaim().events, expected);
        if !bitmap || shape == Shape::NoStatus {
            statuses = vec![NO_STATUS];
        }
        assert!(statuses.contains(&status), "{status} is not of {statuses:?}");
    }

    /// Applies an accepted message to the model. Returns the expected calls of the device.
    fn accept(&mut self, vq: Vq, pages: &Pages, faults: &mut balloon_device::Faults) -> Vec<Event> {
        if vq == Vq::Inflate {
            self.held.extend(pages);
            return vec![Event::Release(set(pages.iter().map(|page| (*page, 1))))];
        }
        let mut events = vec![];
        let unexpected: Pages = pages.difference(&self.held).copied().collect();
        if !unexpected.is_empty() {
            faults.count(Fault::NotInBalloon);
            events.push(self.cancel(&unexpected));
        }
        events.push(self.retain(&pages.intersection(&self.held).copied().collect()));
        self.held.retain(|page| !pages.contains(page));
        events
    }

    /// The expected call that cancels the release of `pages`.
    fn cancel(&self, pages: &Pages) -> Event {
        let pages = set(pages.iter().map(|page| (*page, 1)));
        Event::Cancel { pages, returned: self.deflates }
    }

    /// The expected call that retains `pages`, before the driver sees the message returned.
    fn retain(&self, pages: &Pages) -> Event {
        let pages = set(pages.iter().map(|page| (*page, 1)));
        Event::Retain { pages, returned: self.deflates }
    }
}

fn status_of(fault: Fault) -> u32 {
    match fault {
        Fault::OutsideMemory => MessageStatus::OutsideMemory as u32,
        Fault::RepeatedPage => MessageStatus::RepeatedPage as u32,
        _ => MessageStatus::Malformed as u32,
    }
}

/// Sends the message, expects its chain back, and returns the status word.
fn send(guest: &mut Guest, vq: Vq, bytes: &[u8], shape: Shape) -> u32 {
    guest.write(MESSAGE, bytes);
    guest.write(STATUS, &NO_STATUS.to_le_bytes());
    let len = u32::try_from(bytes.len()).unwrap();
    let (message, status) = (Buffer::readable(MESSAGE, len), Buffer::writable(STATUS, 4));
    let written = match shape {
        Shape::Whole => guest.send_chain(vq, &[message, status]),
        Shape::NoStatus => guest.send_chain(vq, &[message]),
        Shape::Split(at) => {
            let at = u32::from(at) % (len + 1);
            let rest = Buffer::readable(MESSAGE + u64::from(at), len - at);
            guest.send_chain(vq, &[Buffer::readable(MESSAGE, at), status, rest])
        }
        Shape::Nowhere => guest.send_chain(vq, &[message, Buffer::readable(NOWHERE, 8), status]),
        Shape::Oversized => {
            guest.send_chain(vq, &[status, message, Buffer::readable(MESSAGE, u32::MAX - 65536)])
        }
        Shape::BreaksOff => {
            let memory = guest.memory.clone();
            let ring = &mut guest.side(vq).ring;
            ring.write_descriptor(&memory, 0, Descriptor::new(STATUS, 4, NEXT | 2, 1));
            ring.write_descriptor(&memory, 1, Descriptor::new(MESSAGE, len, NEXT, RING_SIZE));
            ring.publish(&memory, 0);
            guest.kick_for(vq, 0)
        }
    };
    let status = guest.status();
    assert_eq!(written, if status == NO_STATUS { 0 } else { 4 });
    status
}

/// Records near guest memory, most of them valid.
fn records() -> impl Strategy<Value = Vec<u8>> {
    let shift = prop_oneof![6 => Just(12u64), 2 => 13..=16u64, 3 => Just(21u64), 1 => 10..=31u64];
    let word = prop_oneof![Just(0u64), Just(u64::MAX), Just(1u64), any::<u64>()];
    let record =
        (shift, 0..0x1000u64, vec(word, 0..=3), 0..40u8).prop_map(|(shift, page, words, twist)| {
            let align = shift.saturating_sub(12).min(18);
            let start = if twist == 0 { page } else { page >> align << align };
            let count = words.len() as u64 + u64::from(twist == 1);
            let mut bytes = raw_header(start, shift, count);
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            bytes
        });
    vec(record, 1..4).prop_map(|records| records.concat())
}

fn page_numbers() -> impl Strategy<Value = Vec<u8>> {
    let run = (0..0x1000u64, 1..80u64, any::<bool>()).prop_map(|(start, pages, down)| {
        let run = pfns(start..start + pages);
        if down { run.rchunks(4).flatten().copied().collect() } else { run }
    });
    vec(run, 1..4).prop_map(|runs| runs.concat())
}

fn ops(bitmap: bool) -> impl Strategy<Value = Op> {
    let form = if bitmap { records().boxed() } else { page_numbers().boxed() };
    let bytes = prop_oneof![12 => form, 1 => vec(any::<u8>(), 0..40)];
    let shape = prop_oneof![
        12 => Just(Shape::Whole),
        2 => Just(Shape::NoStatus),
        4 => any::<u16>().prop_map(Shape::Split),
        1 => Just(Shape::Nowhere),
        1 => Just(Shape::BreaksOff),
        1 => Just(Shape::Oversized),
    ];
    let message = (any::<bool>(), bytes, shape).prop_map(|(deflate, bytes, shape)| Op::Message {
        deflate,
        bytes,
        shape,
    });
    prop_oneof![20 => message, 1 => any::<bool>().prop_map(|bitmap| Op::Reset { bitmap })]
}

fn run(form: Features, ops: &[Op]) {
    let mut run = Run { guest: Guest::new(form), held: Pages::new(), deflates: 0 };
    ops.iter().for_each(|op| run.step(op));
    // A message may have inflated the page that `still_works` uses.
    run.guest.balloon.reset(form);
    run.guest.inflate.set_up(&run.guest.memory);
    run.guest.deflate.set_up(&run.guest.memory);
    run.guest.still_works();
}

proptest! {
    #[test]
    fn bitmap_messages_match_the_model(ops in vec(ops(true), 1..40)) {
        run(BITMAP, &ops);
    }

    #[test]
    fn classic_messages_match_the_model(ops in vec(ops(false), 1..40)) {
        run(CLASSIC, &ops);
    }
}
