//! The balloon: fills towards the host's target, leaks, and yields to pressure.

use balloon_abi::limits::{MAX_GRANULE_SHIFT, MIN_GRANULE_SHIFT};
use balloon_abi::page::BALLOON_PAGE_SHIFT;
use balloon_abi::{Features, Pfn, Vq};

use crate::message::Messages;
use crate::traits::{Gone, PageAllocator, Queues};

/// Orders a kernel may have, plus one: more than any configuration of Linux.
const MAX_ORDERS: u32 = 20;

/// Balloon pages that one pass takes at most before it looks at the target
/// again (16 GiB), so that the host can change its mind.
const MAX_PASS_PAGES: u64 = 1 << 22;

/// Balloon pages given back at least when the OOM killer is about to run
/// (1 MiB): what Linux's own driver gives.
const OOM_PAGES: u64 = 256;

/// What the kernel's allocator hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the guest's page size in bytes.
    pub page_shift: u32,
    /// Largest order that can be allocated.
    pub max_order: u32,
}

impl Geometry {
    /// The same with the orders whose blocks the wire can name, and no more than
    /// there are counters for.
    pub(crate) const fn within_limits(self) -> Self {
        let page_shift = match self.page_shift {
            small if small < MIN_GRANULE_SHIFT => MIN_GRANULE_SHIFT,
            large if large > MAX_GRANULE_SHIFT => MAX_GRANULE_SHIFT,
            shift => shift,
        };
        let nameable = MAX_GRANULE_SHIFT - page_shift;
        let most = if nameable < MAX_ORDERS { nameable } else { MAX_ORDERS - 1 };
        let max_order = if self.max_order < most { self.max_order } else { most };
        Self { page_shift, max_order }
    }

    /// All orders, smallest first.
    pub(crate) fn orders(self) -> core::ops::RangeInclusive<u32> {
        0..=self.max_order
    }

    /// log2 of a block's bytes.
    pub(crate) const fn granule_shift(self, order: u32) -> u32 {
        self.page_shift + order
    }

    /// Balloon pages of a block.
    pub(crate) const fn block_pages(self, order: u32) -> u64 {
        1 << (self.granule_shift(order) - BALLOON_PAGE_SHIFT)
    }
}

/// Where a call to [`Balloon::run`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The balloon has the size that the host wants, as near as the guest's
    /// page size allows.
    Settled,
    /// The guest has no more memory to give now; call again after a while.
    Starved,
    /// The guest took pages back for itself; only a new target ends that.
    Yielded,
}

/// A balloon and the counts of its blocks.
pub struct BalloonDriver {
    geometry: Geometry,
    messages: Messages,
    /// Blocks held per order.
    blocks: [u64; MAX_ORDERS as usize],
    /// Balloon pages held.
    pages: u64,
    /// Target that was reached last.
    reached: Option<u32>,
    /// Target at which the guest took pages back for itself.
    yielded_at: Option<u32>,
}

impl BalloonDriver {
    /// An empty balloon. Orders whose blocks the wire cannot name are not used.
    pub fn new(negotiated: Features, geometry: Geometry) -> Self {
        Self {
            geometry: geometry.within_limits(),
            messages: Messages::new(negotiated),
            blocks: [0; MAX_ORDERS as usize],
            pages: 0,
            reached: None,
            yielded_at: None,
        }
    }

    /// Balloon pages held now.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Goes towards the host's target until it is reached or memory runs out.
    pub fn run(
        &mut self,
        memory: &mut impl PageAllocator,
        queues: &mut impl Queues,
    ) -> Result<Progress, Gone> {
        loop {
            let target = queues.num_pages();
            let wanted = u64::from(target) / self.unit() * self.unit();
            if wanted == self.pages {
                self.reached = Some(target);
                return Ok(Progress::Settled);
            }
            if wanted < self.pages {
                self.yielded_at = None;
                self.leak_balloon(self.pages - wanted, memory, queues)?;
                continue;
            }
            if self.yielded_at == Some(target) {
                return Ok(Progress::Yielded);
            }
            self.yielded_at = None;
            let missing = (wanted - self.pages).min(MAX_PASS_PAGES);
            if self.fill_balloon(missing, memory, queues)? < missing {
                return Ok(Progress::Starved);
            }
        }
    }

    /// Gives back at least `wanted` pages where there are as many, because the
    /// guest is out of memory. Returns the balloon pages freed.
    ///
    /// A balloon that had reached its target is then left alone until the target
    /// changes. One that had not may have caused the shortage by itself, with the
    /// last that there was to take; it goes on later.
    pub fn yield_pages(
        &mut self,
        wanted: u64,
        memory: &mut impl PageAllocator,
        queues: &mut impl Queues,
    ) -> Result<u64, Gone> {
        if self.pages == 0 {
            return Ok(0);
        }
        let target = queues.num_pages();
        if self.reached == Some(target) {
            self.yielded_at = Some(target);
        }
        self.leak_balloon(wanted.max(OOM_PAGES).min(self.pages), memory, queues)
    }

    /// Gives everything back, for good.
    pub fn empty(
        &mut self,
        memory: &mut impl PageAllocator,
        queues: &mut impl Queues,
    ) -> Result<(), Gone> {
        while self.pages > 0 {
            if self.leak_balloon(self.pages, memory, queues)? == 0 {
                return Err(Gone);
            }
        }
        Ok(())
    }

    /// Takes up to `wanted` pages, largest blocks first, and tells the host.
    /// Returns the pages taken.
    fn fill_balloon(
        &mut self,
        wanted: u64,
        memory: &mut impl PageAllocator,
        queues: &mut impl Queues,
    ) -> Result<u64, Gone> {
        let before = self.pages;
        for order in self.geometry.orders().rev() {
            let block_pages = self.geometry.block_pages(order);
            while wanted - (self.pages - before) >= block_pages {
                let Some(pfn) = memory.allocate(order) else { break };
                self.hold(order, 1);
                if !self.messages.can_name(Pfn(pfn.0.saturating_add(block_pages))) {
                    // The host will never hear of it, so it can go at once.
                    memory.withdraw(order);
                    memory.free_withdrawn();
                    self.release(order);
                    break;
                }
                self.messages.add(queues, Vq::Inflate, pfn, self.geometry.granule_shift(order))?;
            }
        }
        let taken = self.pages - before;
        if taken > 0 {
            self.messages.tell_host(queues, Vq::Inflate)?;
            self.report_actual(queues);
        }
        Ok(taken)
    }

    /// Gives back at least `wanted` pages: tells the host of all of them first,
    /// then frees them as one list. Gives more only where no smaller block is
    /// held than what is still wanted; `run` then takes the difference again in
    /// smaller blocks. Returns the pages freed.
    fn leak_balloon(
        &mut self,
        wanted: u64,
        memory: &mut impl PageAllocator,
        queues: &mut impl Queues,
    ) -> Result<u64, Gone> {
        let before = self.pages;
        let target = before.saturating_sub(wanted);
        while self.pages > target {
            let Some(order) = self.order_to_leak(self.pages - target) else { break };
            let Some(pfn) = memory.withdraw(order) else { break };
            self.release(order);
            self.messages.add(queues, Vq::Deflate, pfn, self.geometry.granule_shift(order))?;
        }
        self.messages.tell_host(queues, Vq::Deflate)?;
        memory.free_withdrawn();
        self.report_actual(queues);
        Ok(before - self.pages)
    }

    /// The largest held block that is not larger than `wanted`, else the
    /// smallest.
    fn order_to_leak(&self, wanted: u64) -> Option<u32> {
        let held = |order: &u32| self.blocks[*order as usize] > 0;
        let orders = self.geometry.orders();
        orders
            .clone()
            .rev()
            .filter(held)
            .find(|order| self.geometry.block_pages(*order) <= wanted)
            .or_else(|| orders.clone().find(held))
    }

    fn report_actual(&self, queues: &mut impl Queues) {
        queues.set_actual(u32::try_from(self.pages).unwrap_or(u32::MAX));
    }

    fn hold(&mut self, order: u32, blocks: u64) {
        self.blocks[order as usize] += blocks;
        self.pages += blocks * self.geometry.block_pages(order);
    }

    fn release(&mut self, order: u32) {
        self.blocks[order as usize] -= 1;
        self.pages -= self.geometry.block_pages(order);
    }

    /// Balloon pages of the guest's smallest block.
    const fn unit(&self) -> u64 {
        self.geometry.block_pages(0)
    }
}
