//! Which virtqueue has which number.
//!
//! This is the only place that knows. Linux 6.1 and 6.12 give numbers only to
//! the queues whose features were negotiated (`init_vqs` leaves the others
//! nameless and the transports skip those), so the number of, say, the reporting
//! queue depends on what else was negotiated. The specification's fixed numbers
//! (virtio 1.3, section 5.5.2) are the case where everything was.

use crate::feature::Features;

/// A virtqueue of the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vq {
    /// Pages that the guest gives.
    Inflate,
    /// Pages that the guest takes back.
    Deflate,
    /// Guest memory statistics.
    Stats,
    /// Free page hints.
    FreePage,
    /// Free page reports.
    Reporting,
    /// Aerostat's requests from the host.
    Request,
}

impl Vq {
    /// All queues in the order in which they are numbered.
    pub const ALL: [Self; 6] =
        [Self::Inflate, Self::Deflate, Self::Stats, Self::FreePage, Self::Reporting, Self::Request];

    /// Feature that the queue depends on; the first two always exist.
    pub const fn feature(self) -> Features {
        match self {
            Self::Inflate | Self::Deflate => Features::NONE,
            Self::Stats => Features::STATS_VQ,
            Self::FreePage => Features::FREE_PAGE_HINT,
            Self::Reporting => Features::REPORTING,
            Self::Request => Features::REQUEST_VQ,
        }
    }
}

/// The numbering of the queues for one set of negotiated features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    negotiated: Features,
}

impl QueueLayout {
    /// Most queues that any set of features asks for.
    pub const MAX_QUEUES: usize = Vq::ALL.len();

    /// The layout after `negotiated` features.
    pub const fn new(negotiated: Features) -> Self {
        Self { negotiated }
    }

    /// Queues that exist, in the order of their numbers.
    pub fn queues(self) -> impl Iterator<Item = Vq> {
        Vq::ALL.into_iter().filter(move |vq| self.negotiated.contains(vq.feature()))
    }

    /// Number of `vq`, or `None` where it does not exist.
    pub fn index(self, vq: Vq) -> Option<usize> {
        self.queues().position(|other| other == vq)
    }

    /// The queue with number `index`, or `None` where there is none.
    pub fn vq(self, index: usize) -> Option<Vq> {
        self.queues().nth(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_negotiated_queues_are_counted() {
        let layout = QueueLayout::new(Features::REPORTING | Features::REQUEST_VQ);
        assert_eq!(layout.index(Vq::Inflate), Some(0));
        assert_eq!(layout.index(Vq::Deflate), Some(1));
        assert_eq!(layout.index(Vq::Stats), None);
        assert_eq!(layout.index(Vq::FreePage), None);
        assert_eq!(layout.index(Vq::Reporting), Some(2));
        assert_eq!(layout.index(Vq::Request), Some(3));
        assert_eq!(layout.vq(4), None);
    }

    #[test]
    fn with_everything_negotiated_the_numbers_are_the_specifications() {
        let layout = QueueLayout::new(Features(u64::MAX));
        for (index, vq) in Vq::ALL.into_iter().enumerate() {
            assert_eq!(layout.index(vq), Some(index));
            assert_eq!(layout.vq(index), Some(vq));
        }
    }

    #[test]
    fn index_and_vq_are_inverse_for_every_subset() {
        for subset in 0..64u64 {
            let negotiated =
                Vq::ALL.into_iter().enumerate().fold(Features::NONE, |acc, (i, vq)| {
                    if subset >> i & 1 == 1 { acc | vq.feature() } else { acc }
                });
            let layout = QueueLayout::new(negotiated);
            for index in 0..Vq::ALL.len() {
                if let Some(vq) = layout.vq(index) {
                    assert_eq!(layout.index(vq), Some(index));
                }
            }
        }
    }
}
