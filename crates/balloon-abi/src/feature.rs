//! Feature bits.

use core::fmt;
use core::ops::{BitAnd, BitOr};

/// A set of virtio feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(pub u64);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// The guest must deflate a page before it uses the page (bit 0).
    pub const MUST_TELL_HOST: Self = Self::bit(0);
    /// A queue for guest memory statistics exists (bit 1).
    pub const STATS_VQ: Self = Self::bit(1);
    /// The guest deflates the balloon when it is out of memory (bit 2).
    pub const DEFLATE_ON_OOM: Self = Self::bit(2);
    /// A queue for free page hints exists (bit 3).
    pub const FREE_PAGE_HINT: Self = Self::bit(3);
    /// The guest fills free pages with `poison_val` (bit 4).
    pub const PAGE_POISON: Self = Self::bit(4);
    /// A queue for free page reports exists (bit 5).
    pub const REPORTING: Self = Self::bit(5);
    /// Indirect descriptors are allowed (bit 28, transport).
    pub const RING_INDIRECT_DESC: Self = Self::bit(28);
    /// `used_event` and `avail_event` suppress notifications (bit 29, transport).
    pub const RING_EVENT_IDX: Self = Self::bit(29);
    /// The device complies with virtio 1.0 or later (bit 32, transport).
    pub const VERSION_1: Self = Self::bit(32);
    /// Aerostat: inflate and deflate messages are page-bitmap records (bit 60).
    pub const PAGE_BITMAP: Self = Self::bit(60);
    /// Aerostat: a queue for the host's requests exists (bit 61).
    pub const REQUEST_VQ: Self = Self::bit(61);

    const fn bit(n: u32) -> Self {
        Self(1 << n)
    }

    /// Returns true if every bit of `other` is set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns the bits of `self` that are not in `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Returns the bits of both; usable in constants.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns the names of the known bits that are set, in bit order.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().filter(move |(bit, _)| self.contains(*bit)).map(|(_, name)| *name)
    }
}

/// Names, as in the control API.
const NAMES: &[(Features, &str)] = &[
    (Features::MUST_TELL_HOST, "must-tell-host"),
    (Features::STATS_VQ, "stats-vq"),
    (Features::DEFLATE_ON_OOM, "deflate-on-oom"),
    (Features::FREE_PAGE_HINT, "free-page-hint"),
    (Features::PAGE_POISON, "page-poison"),
    (Features::REPORTING, "reporting"),
    (Features::RING_INDIRECT_DESC, "ring-indirect-desc"),
    (Features::RING_EVENT_IDX, "ring-event-idx"),
    (Features::VERSION_1, "version-1"),
    (Features::PAGE_BITMAP, "page-bitmap"),
    (Features::REQUEST_VQ, "request-vq"),
];

impl BitOr for Features {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Features {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.names().enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}
