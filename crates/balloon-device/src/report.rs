//! Free page reporting (virtio 1.3, section 5.5.6.7): the guest names free pages and does
//! not use them until the device returns the message. It may use them then without
//! notice, so the device releases them before it returns the message and does not track
//! them. A chain names less than 4 GiB, so this takes at most a second.

use page_set::PageSet;

use crate::fault::Fault;
use crate::reclaim::Reclaim;

/// Totals of free page reporting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reports {
    /// Messages, including refused ones.
    pub messages: u64,
    /// Balloon pages that were reported as free.
    pub pages: u64,
    /// Reported pages that were not released because the guest expects its poison in
    /// them.
    pub poisoned_pages: u64,
}

impl Reports {
    /// Releases the reported `pages`.
    pub(crate) fn take(
        &mut self,
        pages: &PageSet,
        held: &PageSet,
        may_read_as_zeros: bool,
        reclaim: &mut impl Reclaim,
    ) -> Result<(), Fault> {
        if pages.intersects(held) {
            return Err(Fault::FreeInBalloon);
        }
        self.pages += pages.len();
        if may_read_as_zeros {
            reclaim.release_free(pages);
        } else {
            self.poisoned_pages += pages.len();
        }
        Ok(())
    }
}
