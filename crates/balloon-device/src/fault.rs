//! Protocol violations by the guest.

use balloon_abi::MessageStatus;

/// A fault of the guest. The message is counted and answered, and has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No readable bytes at all.
    #[error("guest: an empty message")]
    EmptyMessage,
    /// Longer than the limit of its format.
    #[error("guest: a message longer than its format allows")]
    OversizedMessage,
    /// A descriptor that points outside of guest memory, or a truncated chain.
    #[error("guest: a descriptor outside of guest memory, or a truncated chain")]
    BadDescriptor,
    /// Not a sequence of page-bitmap records.
    #[error("guest: malformed page-bitmap records")]
    MalformedRecord,
    /// A page outside of guest memory.
    #[error("guest: a page outside of guest memory")]
    OutsideMemory,
    /// A page twice in one page-bitmap message.
    #[error("guest: a page twice in one message")]
    RepeatedPage,
    /// A deflate of pages that are not in the balloon.
    #[error("guest: a deflate of pages that are not in the balloon")]
    NotInBalloon,
    /// A write outside of the driver's configuration fields.
    #[error("guest: a write to configuration space outside of the driver's fields")]
    ConfigWrite,
    /// A message about free pages that is neither a command nor pages.
    #[error("guest: a message about free pages that is neither a command nor pages")]
    MalformedFreePages,
    /// A command id for free page hints that the device did not issue, or a repeated one.
    #[error("guest: a hint command that was not issued, or was repeated")]
    StrayCommand,
    /// A statistics buffer while the device has one already.
    #[error("guest: more than one statistics buffer")]
    ExtraStats,
    /// An invalid vring.
    #[error("guest: an invalid vring")]
    BadRing,
    /// A chain on the request queue that is pending already.
    #[error("guest: a chain on the request queue twice")]
    RepeatedChain,
    /// More pending chains than the vring has entries.
    #[error("guest: more pending chains than the vring has entries")]
    TooManyWaiting,
    /// A malformed answer.
    #[error("guest: a malformed answer to a request")]
    MalformedAnswer,
    /// An answer to no request, or to one that ended too long ago.
    #[error("guest: an answer to a request that was not made")]
    UnknownRequest,
    /// An answer after the last one.
    #[error("guest: an answer after the last one to a request")]
    AnsweredTwice,
    /// A page named as free that is in the balloon.
    #[error("guest: a page named as free that is in the balloon")]
    FreeInBalloon,
    /// Answers to one request that name more than twice the guest's pages.
    #[error("guest: answers that name more than twice the guest's pages")]
    TooManyPages,
}

impl Fault {
    /// All kinds, in a fixed order.
    pub const ALL: [Self; 19] = [
        Self::EmptyMessage,
        Self::OversizedMessage,
        Self::BadDescriptor,
        Self::MalformedRecord,
        Self::OutsideMemory,
        Self::RepeatedPage,
        Self::NotInBalloon,
        Self::ConfigWrite,
        Self::MalformedFreePages,
        Self::StrayCommand,
        Self::ExtraStats,
        Self::BadRing,
        Self::RepeatedChain,
        Self::TooManyWaiting,
        Self::MalformedAnswer,
        Self::UnknownRequest,
        Self::AnsweredTwice,
        Self::FreeInBalloon,
        Self::TooManyPages,
    ];

    /// The name in the control API and the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EmptyMessage => "empty-message",
            Self::OversizedMessage => "oversized-message",
            Self::BadDescriptor => "bad-descriptor",
            Self::MalformedRecord => "malformed-record",
            Self::OutsideMemory => "outside-memory",
            Self::RepeatedPage => "repeated-page",
            Self::NotInBalloon => "not-in-balloon",
            Self::ConfigWrite => "config-write",
            Self::MalformedFreePages => "malformed-free-pages",
            Self::StrayCommand => "stray-command",
            Self::ExtraStats => "extra-stats",
            Self::BadRing => "bad-ring",
            Self::RepeatedChain => "repeated-chain",
            Self::TooManyWaiting => "too-many-waiting",
            Self::MalformedAnswer => "malformed-answer",
            Self::UnknownRequest => "unknown-request",
            Self::AnsweredTwice => "answered-twice",
            Self::FreeInBalloon => "free-in-balloon",
            Self::TooManyPages => "too-many-pages",
        }
    }

    /// The status in the answer to the message. A page in the balloon counts as outside of
    /// guest memory.
    pub(crate) const fn status(self) -> MessageStatus {
        match self {
            Self::OutsideMemory | Self::FreeInBalloon => MessageStatus::OutsideMemory,
            Self::RepeatedPage => MessageStatus::RepeatedPage,
            Self::UnknownRequest | Self::AnsweredTwice => MessageStatus::Unwanted,
            _ => MessageStatus::Malformed,
        }
    }
}

/// Count of each fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults([u64; Fault::ALL.len()]);

impl Faults {
    /// Counts one fault.
    pub fn count(&mut self, fault: Fault) {
        let slot = &mut self.0[fault as usize];
        *slot = slot.saturating_add(1);
    }

    /// Count of `fault`.
    pub const fn get(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }

    /// Iterates over all faults with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (Fault, u64)> + '_ {
        Fault::ALL.into_iter().map(|fault| (fault, self.get(fault)))
    }

    /// Sum over all faults.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, n| sum.saturating_add(*n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_own_counter() {
        let mut faults = Faults::default();
        for (i, fault) in Fault::ALL.into_iter().enumerate() {
            assert_eq!(fault as usize, i);
            for _ in 0..=i {
                faults.count(fault);
            }
        }
        for (i, (_, count)) in faults.iter().enumerate() {
            assert_eq!(count, i as u64 + 1);
        }
    }
}
