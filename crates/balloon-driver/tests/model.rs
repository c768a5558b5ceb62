//! The driver with a model of a kernel and of a host. For any target and any memory
//! shortage, host and guest agree on the balloon's pages, and no page is used again
//! before it was deflated.

use std::collections::BTreeSet;

use balloon_abi::{Features, Pfn, Records, Vq, pfn_array};
use balloon_driver::{BalloonDriver, Geometry, Gone, PageAllocator, Progress, Queues};
use proptest::prelude::*;

const MAX_ORDER: u32 = 10;
const BUFFER_BYTES: usize = 4096;

/// A buddy allocator that does not merge blocks that the test took.
struct Buddy {
    page_shift: u32,
    free: Vec<BTreeSet<u64>>,
    balloon: Vec<Vec<u64>>,
    leaving: Vec<(u64, u32)>,
    freed: BTreeSet<u64>,
}

impl Buddy {
    fn new(page_shift: u32, blocks: u64) -> Self {
        let mut free = vec![BTreeSet::new(); MAX_ORDER as usize + 1];
        free[MAX_ORDER as usize] = (0..blocks).map(|block| block << MAX_ORDER).collect();
        let balloon = vec![Vec::new(); MAX_ORDER as usize + 1];
        Self { page_shift, free, balloon, leaving: Vec::new(), freed: BTreeSet::new() }
    }

    fn unit(&self) -> u64 {
        1 << (self.page_shift - 12)
    }

    /// Pins one page in the middle of every `nth` block of the largest order.
    fn fragment(&mut self, nth: usize) {
        let all = std::mem::take(&mut self.free[MAX_ORDER as usize]);
        for (i, block) in all.into_iter().enumerate() {
            if i % nth > 0 {
                self.free[MAX_ORDER as usize].insert(block);
                continue;
            }
            for order in 0..MAX_ORDER {
                self.free[order as usize].insert(block + (1 << order));
            }
        }
    }

    fn balloon_pages(&self, block: u64, order: u32) -> impl Iterator<Item = u64> + use<> {
        let unit = self.unit();
        block * unit..(block + (1 << order)) * unit
    }

    fn held(&self) -> BTreeSet<u64> {
        let blocks = self.balloon.iter().zip(0..).flat_map(|(l, o)| l.iter().map(move |b| (*b, o)));
        blocks.flat_map(|(block, order)| self.balloon_pages(block, order)).collect()
    }

    fn free_pages(&self) -> u64 {
        self.free.iter().zip(0u32..).map(|(blocks, order)| (blocks.len() as u64) << order).sum()
    }
}

impl PageAllocator for Buddy {
    fn allocate(&mut self, order: u32) -> Option<Pfn> {
        let from = (order..=MAX_ORDER).find(|o| !self.free[*o as usize].is_empty())?;
        let block = self.free[from as usize].pop_last()?;
        for lower in order..from {
            self.free[lower as usize].insert(block + (1 << lower));
        }
        self.balloon[order as usize].push(block);
        Some(Pfn(block * self.unit()))
    }

    fn withdraw(&mut self, order: u32) -> Option<Pfn> {
        let block = self.balloon[order as usize].pop()?;
        self.leaving.push((block, order));
        Some(Pfn(block * self.unit()))
    }

    fn free_withdrawn(&mut self) {
        for (block, order) in std::mem::take(&mut self.leaving) {
            self.freed.extend(self.balloon_pages(block, order));
            let (mut block, mut order) = (block, order);
            while order < MAX_ORDER && self.free[order as usize].remove(&(block ^ (1 << order))) {
                block &= !(1 << order);
                order += 1;
            }
            self.free[order as usize].insert(block);
        }
    }
}

/// A host that checks and records every message.
struct Host {
    negotiated: Features,
    buffer: [u8; BUFFER_BYTES],
    posted: Vec<(Vq, Vec<u8>)>,
    inflated: BTreeSet<u64>,
    messages: usize,
    num_pages: u32,
    actual: u32,
    /// Number of messages after which the device breaks.
    breaks_after: Option<usize>,
}

impl Host {
    fn new(negotiated: Features) -> Self {
        Self {
            negotiated,
            buffer: [0; BUFFER_BYTES],
            posted: Vec::new(),
            inflated: BTreeSet::new(),
            messages: 0,
            num_pages: 0,
            actual: 0,
            breaks_after: None,
        }
    }

    fn pages(&self, message: &[u8]) -> Vec<u64> {
        if !self.negotiated.contains(Features::PAGE_BITMAP) {
            return pfn_array::decode(message).map(|pfn| pfn.0).collect();
        }
        let mut pages = Vec::new();
        for record in Records::new(message) {
            let record = record.expect("the driver sends only records");
            let header = record.header();
            for (i, word) in record.words().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    let start = header.start_pfn.0 + (i as u64 * 64 + bit) * header.block_pages();
                    pages.extend(start..start + header.block_pages());
                }
            }
        }
        pages
    }
}

impl Queues for Host {
    fn buffer(&mut self, _: Vq) -> Result<&mut [u8], Gone> {
        Ok(&mut self.buffer)
    }

    fn post(&mut self, vq: Vq, len: usize) -> Result<(), Gone> {
        assert!(len > 0, "an empty message");
        self.posted.push((vq, self.buffer[..len].to_vec()));
        Ok(())
    }

    fn tell_host(&mut self, vq: Vq) -> Result<(), Gone> {
        for (posted_to, message) in std::mem::take(&mut self.posted) {
            assert_eq!(posted_to, vq);
            if self.breaks_after.is_some_and(|limit| self.messages >= limit) {
                return Err(Gone);
            }
            self.messages += 1;
            for page in self.pages(&message) {
                let changed = match vq {
                    Vq::Inflate => self.inflated.insert(page),
                    Vq::Deflate => self.inflated.remove(&page),
                    _ => panic!("message on {vq:?}"),
                };
                assert!(changed, "page {page} was sent twice on {vq:?}");
            }
        }
        Ok(())
    }

    fn num_pages(&mut self) -> u32 {
        self.num_pages
    }

    fn set_actual(&mut self, pages: u32) {
        self.actual = pages;
    }
}

fn agree(balloon: &BalloonDriver, memory: &Buddy, host: &Host) {
    assert_eq!(host.inflated, memory.held(), "host and guest disagree");
    assert_eq!(balloon.pages(), memory.held().len() as u64);
    assert_eq!(u64::from(host.actual), balloon.pages());
    assert!(memory.leaving.is_empty());
    assert!(memory.freed.is_disjoint(&host.inflated), "freed while it is inflated");
}

fn small_pages(negotiated: Features, blocks: u64) -> (BalloonDriver, Buddy, Host) {
    let geometry = Geometry { page_shift: 12, max_order: MAX_ORDER };
    (BalloonDriver::new(negotiated, geometry), Buddy::new(12, blocks), Host::new(negotiated))
}

#[test]
fn three_gibibytes_are_one_message() {
    let (mut balloon, mut memory, mut host) = small_pages(Features::PAGE_BITMAP, 1024);
    host.num_pages = 3 << 18;
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::AtTarget));
    assert_eq!(host.messages, 1);
    agree(&balloon, &memory, &host);
    host.num_pages = 0;
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::AtTarget));
    assert_eq!(host.messages, 2);
    assert_eq!(memory.free_pages(), 1024 << MAX_ORDER);
}

#[test]
fn a_target_smaller_than_a_large_block_is_reached_exactly() {
    let (mut balloon, mut memory, mut host) = small_pages(Features::PAGE_BITMAP, 4);
    for target in [3 << 10, 3000, 1, 4095, 0] {
        host.num_pages = target;
        assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::AtTarget));
        memory.freed.clear();
        agree(&balloon, &memory, &host);
        assert_eq!(host.actual, target);
    }
}

#[test]
fn after_pressure_the_balloon_inflates_only_to_a_new_target() {
    let (mut balloon, mut memory, mut host) = small_pages(Features::PAGE_BITMAP, 4);
    host.num_pages = 4096;
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::AtTarget));
    let freed = balloon.yield_pages(1, &mut memory, &mut host).unwrap();
    assert!(freed >= 256);
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::Yielded));
    assert_eq!(balloon.pages(), 4096 - freed);
    host.num_pages = 4095;
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::AtTarget));
    assert_eq!(balloon.pages(), 4095);
}

#[test]
fn after_pressure_below_the_target_the_balloon_inflates_again() {
    let (mut balloon, mut memory, mut host) = small_pages(Features::PAGE_BITMAP, 4);
    host.num_pages = 100;
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::AtTarget));
    host.num_pages = 5000;
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::Starved));
    assert!(balloon.yield_pages(1, &mut memory, &mut host).unwrap() >= 256);
    memory.free[MAX_ORDER as usize].insert(4 << MAX_ORDER);
    memory.freed.clear();
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::AtTarget));
    assert_eq!(balloon.pages(), 5000);
    agree(&balloon, &memory, &host);
}

#[test]
fn pages_above_32_bits_are_not_inflated() {
    let geometry = Geometry { page_shift: 12, max_order: 0 };
    let mut memory = Buddy::new(12, 0);
    memory.free[0].extend([7, 1 << 32]);
    let (mut balloon, mut host) =
        (BalloonDriver::new(Features::NONE, geometry), Host::new(Features::NONE));
    host.num_pages = 2;
    assert_eq!(balloon.run(&mut memory, &mut host), Ok(Progress::Starved));
    assert!(memory.free[0].contains(&(1 << 32)));
    assert!(host.inflated.iter().all(|page| *page == 7));
}

#[test]
fn a_broken_device_frees_no_page_before_its_deflate() {
    let (mut balloon, mut memory, mut host) = small_pages(Features::NONE, 4);
    host.num_pages = 4096;
    balloon.run(&mut memory, &mut host).unwrap();
    host.breaks_after = Some(host.messages + 3);
    assert_eq!(balloon.empty(&mut memory, &mut host), Err(Gone));
    assert!(memory.freed.is_empty());
    assert_eq!(memory.leaving.len(), 4, "still on the list, to be freed after the reset");
}

#[derive(Clone, Debug)]
enum Step {
    Target(u32),
    Yield(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..40_000u32).prop_map(Step::Target),
        1 => (0..5_000u64).prop_map(Step::Yield),
    ];
    prop::collection::vec(step, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn host_and_guest_agree_after_every_step(
        steps in steps(),
        bitmap in any::<bool>(),
        fragment in prop::option::of(1..4usize),
        page_shift in prop_oneof![Just(12u32), Just(14)],
    ) {
        let negotiated = if bitmap { Features::PAGE_BITMAP } else { Features::NONE };
        let geometry = Geometry { page_shift, max_order: MAX_ORDER };
        let mut balloon = BalloonDriver::new(negotiated, geometry);
        let mut memory = Buddy::new(page_shift, 24 >> (page_shift - 12));
        let mut host = Host::new(negotiated);
        if let Some(nth) = fragment {
            memory.fragment(nth);
        }
        let total = memory.free_pages() * memory.unit();
        for step in steps {
            memory.freed.clear();
            match step {
                Step::Target(target) => {
                    host.num_pages = target;
                    let progress = balloon.run(&mut memory, &mut host).unwrap();
                    let wanted = u64::from(target) / memory.unit() * memory.unit();
                    match progress {
                        Progress::AtTarget => prop_assert_eq!(balloon.pages(), wanted),
                        Progress::Starved => {
                            prop_assert!(wanted > total);
                            prop_assert_eq!(memory.free_pages(), 0);
                        }
                        Progress::Yielded => prop_assert!(balloon.pages() < wanted),
                    }
                }
                Step::Yield(pages) => {
                    let held = balloon.pages();
                    let freed = balloon.yield_pages(pages, &mut memory, &mut host).unwrap();
                    prop_assert!(freed >= pages.min(held));
                    prop_assert_eq!(balloon.pages(), held - freed);
                }
            }
            // A page freed in an overshoot may be in the balloon again.
            memory.freed.clear();
            agree(&balloon, &memory, &host);
            prop_assert_eq!(memory.free_pages() * memory.unit() + balloon.pages(), total);
        }
    }
}
