//! A model of the guest's kernel, with random events between two calls.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

use balloon_abi::{Caches, Command, MessageStatus, Pfn, Request};
use balloon_driver::{
    CachePages, Errno, HeldBlocks, Hold, Inbox, Intake, ReceivedRequest, RequestKernel,
    RequestQueue, Slice, Stop, Zone,
};

use crate::buddy::{Buddy, MAX_ORDER};
use crate::host::{Host, Posted};

pub(crate) const ANSWER_BYTES: usize = 4096;

/// Most answers in flight.
const ANSWERS: usize = 4;

/// Two zones with a hole between them, in pages.
pub(crate) const ZONES: [(u64, u64); 2] = [(0, 1024), (2048, 4096)];

/// An event outside of the driver.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// No event for this number of calls.
    Quiet(u8),
    Allocate(u32),
    Free(usize),
    Ask(Command),
    /// Cancels the request this number before the newest.
    Cancel(u32),
    /// The host returns an answer, accepted or not.
    Return(bool),
    /// The guest needs the memory of the hold.
    Pressure,
    /// The device breaks.
    Break,
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) buddy: Buddy,
    pub(crate) events: VecDeque<Event>,
    pub(crate) host: Host,
    pub(crate) hold: Hold,
    pub(crate) hold_blocks: Vec<(u64, u32)>,
    pub(crate) hold_named: usize,
    pub(crate) allocated: Vec<(u64, u32)>,
    pub(crate) caches: CachePages,
    pub(crate) refuses_to_drop: bool,
    pub(crate) gone: bool,
    pub(crate) last_id: u32,
    pub(crate) slices: u64,
    inbox: Inbox,
    quiet: u8,
    locked: bool,
    running: u32,
    /// Blocks that the running request saw as free.
    seen_free: BTreeSet<(u64, u64)>,
    now_ns: u64,
}

impl World {
    pub(crate) fn new(events: Vec<Event>) -> Rc<RefCell<Self>> {
        let caches = CachePages { page_cache: 500, slab: 90 };
        let world =
            Self { buddy: Buddy::new(&ZONES), events: events.into(), caches, ..Self::default() };
        Rc::new(RefCell::new(world))
    }

    pub(crate) fn ask(&mut self, command: Command) -> u32 {
        self.last_id += 1;
        self.host.requested.insert(self.last_id, command);
        let request = Request { id: self.last_id, command };
        if let Intake::Refuse(header) = self.inbox.take(&request.to_bytes()) {
            self.host.receive(&header.to_bytes());
        }
        self.last_id
    }

    /// Runs the next event.
    fn tick(&mut self) {
        self.now_ns += 1000;
        if self.quiet > 0 {
            self.quiet -= 1;
            return;
        }
        match self.events.pop_front() {
            None => {}
            Some(Event::Quiet(calls)) => self.quiet = calls,
            Some(Event::Allocate(order)) => {
                let block = self.buddy.allocate(order);
                self.allocated.extend(block.map(|block| (block, order)));
            }
            Some(Event::Free(index)) if !self.allocated.is_empty() => {
                let index = index % self.allocated.len();
                let (block, order) = self.allocated.swap_remove(index);
                // In small pieces, like real allocations.
                for page in block..block + (1 << order) {
                    self.buddy.free(page, 0);
                }
            }
            Some(Event::Free(_)) => {}
            Some(Event::Ask(command)) => drop(self.ask(command)),
            Some(Event::Cancel(back)) => {
                let id = self.last_id.saturating_sub(back).max(1);
                let _ = self.inbox.take(&Request { id, command: Command::Cancel }.to_bytes());
            }
            Some(Event::Return(accept)) => self.return_one(accept),
            Some(Event::Pressure) => self.pressure(),
            Some(Event::Break) => self.gone = true,
        }
    }

    pub(crate) fn return_one(&mut self, accept: bool) {
        let Some((posted, status)) = self.host.give_back(accept) else { return };
        if status != MessageStatus::Accepted {
            self.inbox.refuse(posted.header.id);
        }
        self.free_lost();
    }

    /// Handles memory pressure like the shim.
    pub(crate) fn pressure(&mut self) {
        if self.locked {
            return;
        }
        if let Some(header) = self.hold.lose(self.now_ns) {
            self.inbox.lose(header.id);
            self.host.receive(&header.to_bytes());
        }
    }

    fn free_lost(&mut self) {
        let lost_out = self
            .host
            .in_flight
            .iter()
            .any(|posted| posted.header.outcome == balloon_abi::Outcome::HoldLost);
        if !self.locked && self.hold.is_losing() && !lost_out {
            self.free_held();
            self.hold.emptied();
        }
    }

    fn free_held(&mut self) {
        assert_eq!(self.host.relies_on, None, "freed blocks that the host relies on");
        for (block, order) in std::mem::take(&mut self.hold_blocks) {
            self.buddy.free(block, order);
        }
        self.hold_named = 0;
    }

    fn stop(&self) -> Option<Stop> {
        if self.gone { Some(Stop::Gone) } else { self.inbox.stopped() }
    }

    fn must_stop(&self, last: bool) -> Result<(), Stop> {
        match self.stop() {
            Some(Stop::Cancelled) if last => Ok(()),
            Some(stop) => Err(stop),
            None => Ok(()),
        }
    }

    /// Waits until at most `most` answers are in flight.
    fn wait(&mut self, most: usize, last: bool) -> Result<(), Stop> {
        loop {
            self.tick();
            self.must_stop(last)?;
            if self.host.in_flight.len() <= most {
                return Ok(());
            }
            if self.events.is_empty() {
                self.return_one(true);
            }
        }
    }

    /// Checks that blocks named by a report were free, and that blocks named by a hold are
    /// held.
    fn check_blocks(&self, posted: &Posted) {
        for block in &posted.blocks {
            match self.host.requested[&posted.header.id] {
                Command::ReportFree { .. } => {
                    assert!(self.seen_free.contains(block), "{block:?} was not free");
                }
                _ => {
                    let held = self.hold_blocks.iter().map(|(start, order)| (*start, 1 << order));
                    assert!(held.clone().any(|held| held == *block), "{block:?} is not held");
                }
            }
        }
    }
}

/// Implements the kernel's trait.
pub(crate) struct Kernel(pub(crate) Rc<RefCell<World>>);

/// Implements the queue's trait.
pub(crate) struct Queue {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) buffer: Box<[u8; ANSWER_BYTES]>,
}

/// The hold's blocks while it is locked.
pub(crate) struct Blocks(Rc<RefCell<World>>);

impl RequestKernel for Kernel {
    type Blocks = Blocks;

    fn cache_pages(&mut self) -> CachePages {
        self.0.borrow().caches
    }

    fn drop_caches(&mut self, cache: Caches) -> Result<(), Errno> {
        let mut world = self.0.borrow_mut();
        world.tick();
        if world.refuses_to_drop {
            return Err(Errno(2));
        }
        match cache {
            Caches::PAGE_CACHE => world.caches.page_cache = 5,
            Caches::SLAB => world.caches.slab = 7,
            _ => panic!("two caches at once"),
        }
        Ok(())
    }

    fn free_pages(&mut self) -> u64 {
        self.0.borrow().buddy.pages()
    }

    fn total_pages(&mut self) -> u64 {
        ZONES.iter().map(|(start, end)| end - start).sum()
    }

    fn reserved_pages(&mut self) -> u64 {
        10
    }

    fn zone(&mut self, number: u32) -> Option<Zone> {
        let (start, end) = ZONES.get(number as usize)?;
        Some(Zone { start: Pfn(*start), end: Pfn(*end) })
    }

    fn has_free(&mut self, order: u32) -> bool {
        let mut world = self.0.borrow_mut();
        world.tick();
        world.buddy.has(order)
    }

    fn scan(&mut self, zone: u32, from: Pfn, order: u32, visits: u32, found: &mut [Pfn]) -> Slice {
        let mut world = self.0.borrow_mut();
        world.tick();
        world.slices += 1;
        let end = ZONES[zone as usize].1;
        let mut page = from.0.next_multiple_of(1 << order);
        let mut count = 0;
        for _ in 0..visits {
            if page >= end || count == found.len() {
                break;
            }
            let free = world.buddy.order_at(page);
            if free == Some(order) {
                found[count] = Pfn(page);
                count += 1;
                world.seen_free.insert((page, 1 << order));
            }
            page += 1 << free.unwrap_or(order).max(order);
        }
        Slice { next: Pfn(page), found: count, lock_ns: 100 }
    }

    fn with_hold<R>(&mut self, act: impl FnOnce(&mut Hold, &mut Blocks) -> R) -> R {
        let mut hold = {
            let mut world = self.0.borrow_mut();
            world.tick();
            world.locked = true;
            std::mem::take(&mut world.hold)
        };
        let result = act(&mut hold, &mut Blocks(self.0.clone()));
        let mut world = self.0.borrow_mut();
        world.hold = hold;
        world.locked = false;
        result
    }
}

impl HeldBlocks for Blocks {
    fn take(&mut self, order: u32) -> bool {
        let mut world = self.0.borrow_mut();
        world.tick();
        let Some(block) = world.buddy.allocate(order) else { return false };
        world.hold_blocks.push((block, order));
        true
    }

    fn name(&mut self, order: u32) -> Option<Pfn> {
        let mut world = self.0.borrow_mut();
        let next = world.hold_blocks.get(world.hold_named).filter(|block| block.1 == order);
        let pfn = Pfn(next?.0);
        world.hold_named += 1;
        Some(pfn)
    }

    fn free_all(&mut self) {
        self.0.borrow_mut().free_held();
    }
}

impl RequestQueue for Queue {
    fn begin_next(&mut self) -> Option<ReceivedRequest> {
        let mut world = self.world.borrow_mut();
        world.tick();
        world.seen_free.clear();
        let requested = world.inbox.begin_next();
        world.running = requested.map_or(0, |requested| requested.id);
        // The host does not rely on a hold that it releases.
        if let Some(ReceivedRequest { command: Ok(Command::ReleaseHold { hold }), .. }) = requested
            && world.host.relies_on == Some(hold)
        {
            world.host.relies_on = None;
        }
        requested
    }

    fn stopped(&mut self) -> Result<(), Stop> {
        let mut world = self.world.borrow_mut();
        world.tick();
        world.must_stop(false)
    }

    fn buffer(&mut self, last: bool) -> Result<&mut [u8], Stop> {
        self.world.borrow_mut().wait(ANSWERS - 1, last)?;
        Ok(&mut self.buffer[..])
    }

    fn post(&mut self, id: u32, len: usize) -> Result<(), Stop> {
        let mut world = self.world.borrow_mut();
        world.must_stop(true)?;
        assert_eq!(id, world.running);
        assert!(!world.host.refused.contains(&id), "answered after a refusal");
        let posted = world.host.receive(&self.buffer[..len]);
        assert_eq!(posted.header.id, id);
        world.check_blocks(&posted);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Stop> {
        self.world.borrow_mut().wait(0, true)
    }

    fn now_ns(&mut self) -> u64 {
        self.world.borrow().now_ns
    }
}

/// The orders of the model.
pub(crate) fn orders() -> std::ops::RangeInclusive<u32> {
    0..=MAX_ORDER
}
