//! Free page reporting (virtio 1.3, section 5.5.6.7): the guest names pages that
//! are free and does not use them until the message comes back. There is no other
//! word about them, so they are released before it does, and are nobody's then.
//! A chain holds less than 4 GiB, so that takes a second at worst.

use page_set::PageSet;

use crate::fault::Fault;
use crate::reclaim::Reclaim;

/// What was reported so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reports {
    /// Messages, refused ones too.
    pub messages: u64,
    /// Balloon pages that were reported as free.
    pub pages: u64,
    /// Those of them that were not released, because the guest expects to find its
    /// poison in them.
    pub poisoned_pages: u64,
}

impl Reports {
    /// The guest reports `pages`.
    pub(crate) fn take(
        &mut self,
        pages: &PageSet,
        held: &PageSet,
        may_turn_to_zeros: bool,
        reclaim: &mut impl Reclaim,
    ) -> Result<(), Fault> {
        if pages.intersects(held) {
            return Err(Fault::FreeInBalloon);
        }
        self.pages += pages.len();
        if may_turn_to_zeros {
            reclaim.release_free(pages);
        } else {
            self.poisoned_pages += pages.len();
        }
        Ok(())
    }
}
