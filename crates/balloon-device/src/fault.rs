//! What went wrong, and whose fault it was. Every kind here is the guest's.

use balloon_abi::MessageStatus;

/// A fault of the guest: counted, answered, and never acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No readable bytes at all.
    #[error("guest: a message without bytes")]
    EmptyMessage,
    /// Longer than the limit of its form.
    #[error("guest: a message longer than its form allows")]
    OversizedMessage,
    /// A descriptor that points outside of guest memory, or a chain of them that
    /// does not end as it should.
    #[error("guest: a descriptor outside of guest memory, or a chain that breaks off")]
    BadDescriptor,
    /// No run of page-bitmap records.
    #[error("guest: bytes that are no page-bitmap records")]
    MalformedRecord,
    /// A page outside of guest memory.
    #[error("guest: a page outside of guest memory")]
    OutsideMemory,
    /// A page twice in one page-bitmap message.
    #[error("guest: a page twice in one message")]
    RepeatedPage,
    /// A deflate of pages that the balloon does not hold.
    #[error("guest: a deflate of pages that are not in the balloon")]
    NotInBalloon,
    /// A write to a configuration field that is not the driver's, or to none.
    #[error("guest: a write to configuration space outside of the driver's fields")]
    ConfigWrite,
    /// A message about free pages that is neither a command nor pages.
    #[error("guest: a message about free pages that is neither a command nor pages")]
    MalformedFreePages,
    /// A command for free page hints that the device did not give.
    #[error("guest: a hint command that was not given, or was given once and came twice")]
    StrayCommand,
    /// A buffer of statistics while the device has one already.
    #[error("guest: more than one buffer of statistics")]
    ExtraStats,
    /// A ring that cannot be followed.
    #[error("guest: a ring that makes no sense")]
    BadRing,
    /// A waiting chain that waits already.
    #[error("guest: a chain on the request queue twice")]
    RepeatedChain,
    /// More waiting chains than the ring has entries.
    #[error("guest: more waiting chains than the ring has entries")]
    TooManyWaiting,
    /// Bytes that are no answer to what was asked.
    #[error("guest: bytes that are no answer to the request")]
    MalformedAnswer,
    /// An answer to what was never asked, or so long ago that nobody knows.
    #[error("guest: an answer to a request that was not made")]
    UnknownRequest,
    /// One more answer after the last one.
    #[error("guest: a second last answer to a request")]
    AnsweredTwice,
    /// A page named as free that is in the balloon.
    #[error("guest: a page named as free that is in the balloon")]
    FreeInBalloon,
    /// Answers to one request that name twice as many pages as there are.
    #[error("guest: answers that name more than twice as many pages as there are")]
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

    /// The word that the control API and the metrics use.
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

    /// What a message with this fault is answered. A page in the balloon is no
    /// memory of the guest's for as long as it is there.
    pub(crate) const fn status(self) -> MessageStatus {
        match self {
            Self::OutsideMemory | Self::FreeInBalloon => MessageStatus::OutsideMemory,
            Self::RepeatedPage => MessageStatus::RepeatedPage,
            Self::UnknownRequest | Self::AnsweredTwice => MessageStatus::Unwanted,
            _ => MessageStatus::Malformed,
        }
    }
}

/// How often each fault was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults([u64; Fault::ALL.len()]);

impl Faults {
    /// Counts one fault.
    pub fn count(&mut self, fault: Fault) {
        let slot = &mut self.0[fault as usize];
        *slot = slot.saturating_add(1);
    }

    /// Times that `fault` was seen.
    pub const fn get(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }

    /// All faults with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (Fault, u64)> + '_ {
        Fault::ALL.into_iter().map(|fault| (fault, self.get(fault)))
    }

    /// Faults of all kinds.
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
