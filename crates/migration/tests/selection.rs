//! Checks the safety argument of docs/migration.md with a model: a guest's kernel, its devices, its
//! balloon, and a source, with steps in any order. At the end the destination must have everything
//! that the guest may read.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};

use migration::dirty::{DirtyBitmap, Word};
use migration::layout::GuestLayout;
use migration::selection::{Plan, Selection, SelectionMark};
use migration::traits::FreePages;
use page_set::{PageRange, PageSet};
use proptest::prelude::*;

/// Pages that the steps use: at the borders of words and regions.
const PAGES: [u64; 10] = [0, 1, 2, 63, 64, 69, 100, 101, 163, 164];
const POISON: u32 = 0xaaaa_aaaa;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64),
    DeviceWrite(u64),
    Allocate(u64),
    Free(u64),
    Inflate {
        page: u64,
        discard: bool,
    },
    Deflate(u64),
    /// The device processes the deflate of a driver that did not wait for it.
    ProcessDeflate(u64),
    Report(u64),
    Hint(u64),
    EndHint(u64),
    Ask,
    AnswerFree {
        mask: u16,
    },
    AnswerHints,
    SkipBalloon,
    ReadLog,
    BeginRound,
    Send {
        at: u8,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let page = || prop::sample::select(&PAGES[..]);
    let step = prop_oneof![
        3 => page().prop_map(Step::Write),
        1 => page().prop_map(Step::DeviceWrite),
        3 => page().prop_map(Step::Allocate),
        3 => page().prop_map(Step::Free),
        1 => (page(), any::<bool>()).prop_map(|(page, discard)| Step::Inflate { page, discard }),
        1 => page().prop_map(Step::Deflate),
        1 => page().prop_map(Step::ProcessDeflate),
        1 => page().prop_map(Step::Report),
        1 => page().prop_map(Step::Hint),
        1 => page().prop_map(Step::EndHint),
        2 => Just(Step::Ask),
        2 => any::<u16>().prop_map(|mask| Step::AnswerFree { mask }),
        1 => Just(Step::AnswerHints),
        1 => Just(Step::SkipBalloon),
        2 => Just(Step::ReadLog),
        1 => Just(Step::BeginRound),
        3 => any::<u8>().prop_map(|at| Step::Send { at }),
    ];
    prop::collection::vec(step, 0..120)
}

/// The guest's use of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Free,
    /// Allocated. False until the owner has written to it; until then it does not read it.
    Used(bool),
    Balloon,
    /// Hinted, and kept by the driver.
    Hinted,
}

struct Model {
    /// The pattern with which the kernel fills free pages and which it expects there.
    fills_with: Option<u32>,
    must_tell: bool,
    uses: BTreeMap<u64, Use>,
    /// The ballooned pages according to the device.
    balloon: BTreeSet<u64>,
    source: BTreeMap<u64, u64>,
    destination: BTreeMap<u64, u64>,
    log: BTreeSet<u64>,
    next_value: u64,
    layout: GuestLayout,
    selection: Selection,
    asked: Option<SelectionMark>,
    free_since: BTreeSet<u64>,
    hinted: BTreeSet<u64>,
    /// The rest of the round, in any order: pages, and their fill pattern.
    round: Vec<(u64, Option<u32>)>,
}

impl Model {
    fn new(fills_with: Option<u32>, must_tell: bool, used: u16) -> Self {
        let range = |start, pages| PageRange::new(start, pages).unwrap();
        let layout = GuestLayout::new(vec![range(0, 70), range(100, 65)]).unwrap();
        let mut model = Self {
            fills_with,
            must_tell,
            uses: BTreeMap::new(),
            balloon: BTreeSet::new(),
            source: BTreeMap::new(),
            destination: PAGES.iter().map(|page| (*page, 0)).collect(),
            log: BTreeSet::new(),
            next_value: 1 << 40,
            selection: Selection::all(&layout),
            layout,
            asked: None,
            free_since: BTreeSet::new(),
            hinted: BTreeSet::new(),
            round: Vec::new(),
        };
        for (bit, page) in PAGES.into_iter().enumerate() {
            let is_used = used >> bit & 1 == 1;
            model.uses.insert(page, if is_used { Use::Used(true) } else { Use::Free });
            let value = if is_used { page + 1000 } else { model.fills_with.unwrap_or(77).into() };
            model.source.insert(page, value);
        }
        model
    }

    fn write(&mut self, page: u64, value: u64) {
        self.source.insert(page, value);
        self.log.insert(page);
    }

    /// The kernel frees a page.
    fn free(&mut self, page: u64) {
        if let Some(pattern) = self.fills_with {
            self.write(page, pattern.into());
        }
        self.uses.insert(page, Use::Free);
        if self.asked.is_some() {
            self.free_since.insert(page);
        }
    }

    /// The kernel allocates a page, and checks the pattern.
    fn take(&mut self, page: u64, to: Use) {
        if let Some(pattern) = self.fills_with {
            assert_eq!(self.source[&page], u64::from(pattern), "the model's own kernel is wrong");
        }
        self.uses.insert(page, to);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(page) | Step::DeviceWrite(page) => {
                if matches!(self.uses[&page], Use::Used(_)) {
                    self.next_value += 1;
                    self.write(page, self.next_value);
                    self.uses.insert(page, Use::Used(true));
                }
            }
            Step::Allocate(page) if self.uses[&page] == Use::Free => {
                self.take(page, Use::Used(self.fills_with.is_some()));
            }
            Step::Free(page) if matches!(self.uses[&page], Use::Used(_)) => self.free(page),
            Step::Inflate { page, discard } if self.uses[&page] == Use::Free => {
                self.take(page, Use::Balloon);
                self.balloon.insert(page);
                if discard {
                    self.source.insert(page, 0);
                }
            }
            Step::Deflate(page) if self.uses[&page] == Use::Balloon => {
                if self.must_tell {
                    self.balloon.remove(&page);
                }
                self.free(page);
            }
            Step::ProcessDeflate(page) if self.uses[&page] != Use::Balloon => {
                self.balloon.remove(&page);
            }
            Step::Report(page) if self.uses[&page] == Use::Free => {
                if self.fills_with.unwrap_or(0) == 0 {
                    self.source.insert(page, 0);
                }
            }
            Step::Hint(page) if self.uses[&page] == Use::Free && self.asked.is_some() => {
                self.take(page, Use::Hinted);
                self.hinted.insert(page);
            }
            // Also when the guest is short of memory, independently of the hint.
            Step::EndHint(page) if self.uses[&page] == Use::Hinted => self.free(page),
            other => self.host_step(other),
        }
    }

    fn host_step(&mut self, step: Step) {
        match step {
            Step::Ask => {
                self.asked = Some(self.selection.mark());
                let is_free = |(page, state): (&u64, &Use)| (*state == Use::Free).then_some(*page);
                self.free_since = self.uses.iter().filter_map(is_free).collect();
                self.hinted.clear();
            }
            Step::AnswerFree { mask } => {
                let named = PAGES.iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1);
                let named = named.map(|(_, page)| *page);
                let pages = set(named.filter(|page| self.free_since.contains(page)));
                self.skip(FreePages { pages, pattern: self.fills_with.unwrap_or(0) });
            }
            Step::AnswerHints => {
                let pages = set(self.hinted.iter().copied());
                self.skip(FreePages { pages, pattern: 0 });
            }
            // The set is read now, after the log.
            Step::SkipBalloon if self.must_tell => {
                let asked = self.selection.mark();
                let pages = set(self.balloon.iter().copied());
                self.selection.skip(asked, &FreePages { pages, pattern: 0 });
            }
            Step::ReadLog => self.read_log(),
            Step::BeginRound if self.round.is_empty() => self.begin_round(),
            Step::Send { at } if !self.round.is_empty() => {
                let item = self.round.swap_remove(usize::from(at) % self.round.len());
                self.send(item);
            }
            _ => {}
        }
    }

    fn skip(&mut self, free: FreePages) {
        if let Some(asked) = self.asked {
            self.selection.skip(asked, &free);
        }
    }

    fn read_log(&mut self) {
        let mut written = DirtyBitmap::none(&self.layout);
        for page in std::mem::take(&mut self.log) {
            written.insert(PageRange::new(page, 1).unwrap());
        }
        self.selection.add_written(&written);
    }

    fn begin_round(&mut self) {
        let Plan { words, fills, .. } = self.selection.take_round();
        let each = |range: PageRange| range.start()..range.end();
        let sent = words.into_iter().flat_map(Word::runs).flat_map(each);
        self.round.extend(sent.map(|page| (page, None)));
        for (pattern, pages) in &fills {
            let filled = pages.ranges().flat_map(each);
            self.round.extend(filled.map(|page| (page, Some(*pattern))));
        }
        let once: BTreeSet<_> = self.round.iter().map(|(page, _)| page).collect();
        assert_eq!(once.len(), self.round.len(), "a page twice in one round");
        self.round.retain(|(page, _)| PAGES.contains(page));
    }

    fn send(&mut self, (page, fill): (u64, Option<u32>)) {
        let value = fill.map_or(self.source[&page], u64::from);
        self.destination.insert(page, value);
    }

    /// The guest is paused, and the last round is sent.
    fn finish(&mut self) {
        for item in std::mem::take(&mut self.round) {
            self.send(item);
        }
        self.read_log();
        self.begin_round();
        for item in std::mem::take(&mut self.round) {
            self.send(item);
        }
    }

    fn check(&self) {
        for (page, state) in &self.uses {
            let relied_on = match state {
                Use::Used(true) => Some(self.source[page]),
                Use::Used(false) | Use::Free => self.fills_with.map(u64::from),
                Use::Balloon | Use::Hinted => None,
            };
            if let Some(value) = relied_on {
                assert_eq!(self.destination[page], value, "page {page}, which is {state:?}");
            }
        }
    }
}

fn set(pages: impl Iterator<Item = u64>) -> PageSet {
    pages.map(|page| PageRange::new(page, 1).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn the_destination_has_what_the_guest_may_read(
        steps in steps(),
        fills_with in prop::sample::select(vec![None, Some(0), Some(POISON)]),
        must_tell: bool,
        used: u16,
    ) {
        let mut model = Model::new(fills_with, must_tell, used);
        for step in steps {
            model.step(step);
        }
        model.finish();
        model.check();
    }
}
