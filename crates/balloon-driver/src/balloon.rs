//! The balloon: inflates and deflates to the host's target, and deflates under memory
//! pressure.

use balloon_abi::limits::{MAX_GRANULE_SHIFT, MIN_GRANULE_SHIFT};
use balloon_abi::page::BALLOON_PAGE_SHIFT;
use balloon_abi::{Features, Pfn, Vq};

use crate::message::Messages;
use crate::traits::{Gone, PageAllocator, Queues};

/// Most orders that are supported: more than any configuration of Linux has.
const MAX_ORDERS: u32 = 20;

/// Most balloon pages that are inflated before the driver reads the target again (16 GiB), so
/// that the host can change it.
const MAX_PASS_PAGES: u64 = 1 << 22;

/// Minimum number of balloon pages that are freed before the OOM killer runs (1 MiB), as in
/// Linux's own driver.
const OOM_PAGES: u64 = 256;

/// Block sizes of the kernel's allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the guest's page size in bytes.
    pub page_shift: u32,
    /// Largest order that can be allocated.
    pub max_order: u32,
}

impl Geometry {
    /// Restricts the orders to those that a message can name and that have a counter.
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

    /// Iterates over all orders, smallest first.
    pub(crate) fn orders(self) -> core::ops::RangeInclusive<u32> {
        0..=self.max_order
    }

    /// Returns log2 of a block's bytes.
    pub(crate) const fn granule_shift(self, order: u32) -> u32 {
        self.page_shift + order
    }

    /// Returns the balloon pages of a block.
    pub(crate) const fn block_pages(self, order: u32) -> u64 {
        1 << (self.granule_shift(order) - BALLOON_PAGE_SHIFT)
    }
}

/// The result of [`BalloonDriver::run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The balloon has the target size, up to the granularity of the guest's page size.
    AtTarget,
    /// The guest has no more free memory now; call again after a delay.
    Starved,
    /// The guest deflated under memory pressure; the driver inflates again only to a new
    /// target.
    Yielded,
}

/// A balloon and the counts of its blocks.
pub struct BalloonDriver {
    geometry: Geometry,
    messages: Messages,
    /// Blocks in the balloon, by order.
    blocks: [u64; MAX_ORDERS as usize],
    /// Balloon pages in the balloon.
    pages: u64,
    /// The target that was reached last.
    reached: Option<u32>,
    /// The target at which the guest deflated under memory pressure.
    yielded_at: Option<u32>,
}

impl BalloonDriver {
    /// Creates an empty balloon. Does not use orders that a message cannot name.
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

    /// Balloon pages in the balloon.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Inflates or deflates until the target is reached or memory runs out.
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
                return Ok(Progress::AtTarget);
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

    /// Frees at least `wanted` pages, or all, because the guest is out of memory. Returns
    /// the balloon pages freed.
    ///
    /// If the balloon had reached its target, it does not inflate again until the target
    /// changes. If it had not, its own inflation may have caused the shortage, and it
    /// inflates again later.
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

    /// Deflates the balloon completely.
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

    /// Allocates up to `wanted` pages, largest blocks first, and inflates them. Returns the
    /// number of pages.
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
                    // The host is never sent this block, so it can be freed immediately.
                    memory.withdraw(order);
                    memory.free_withdrawn();
                    self.release(order);
                    break;
                }
                self.messages.add(queues, Vq::Inflate, pfn, self.geometry.granule_shift(order))?;
            }
        }
        let inflated = self.pages - before;
        if inflated > 0 {
            self.messages.tell_host(queues, Vq::Inflate)?;
            self.report_actual(queues);
        }
        Ok(inflated)
    }

    /// Deflates at least `wanted` pages: sends all of them to the host first, then frees
    /// them as one list. Frees more only if every block in the balloon is larger than the rest;
    /// `run` then inflates the difference again in smaller blocks. Returns the pages freed.
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

    /// Returns the order of the largest block of at most `wanted` pages, else of the
    /// smallest block.
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

    /// Returns the balloon pages of the guest's smallest block.
    const fn unit(&self) -> u64 {
        self.geometry.block_pages(0)
    }
}
