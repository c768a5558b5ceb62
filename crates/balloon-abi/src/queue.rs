//! Indices of the virtqueues.
//!
//! Linux 6.1 and 6.12 assign indices only to queues whose features were negotiated
//! (`init_vqs` leaves the others without a name, and the transports skip those). So the index
//! of the reporting queue, for example, depends on the other features. The specification's
//! fixed indices (virtio 1.3, section 5.5.2) result if all features were negotiated.

use crate::feature::Features;

/// A virtqueue of the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vq {
    /// Pages that enter the balloon.
    Inflate,
    /// Pages that leave the balloon.
    Deflate,
    /// Guest memory statistics.
    Stats,
    /// Free page hints.
    FreePage,
    /// Free page reports.
    Reporting,
    /// Aerostat's requests of the host.
    Request,
}

impl Vq {
    /// All queues, in order of their indices.
    pub const ALL: [Self; 6] =
        [Self::Inflate, Self::Deflate, Self::Stats, Self::FreePage, Self::Reporting, Self::Request];

    /// Returns the feature that the queue depends on; the first two always exist.
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

/// The queue indices for a set of negotiated features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    negotiated: Features,
}

impl QueueLayout {
    /// Most queues for any set of features.
    pub const MAX_QUEUES: usize = Vq::ALL.len();

    /// Creates the layout for `negotiated` features.
    pub const fn new(negotiated: Features) -> Self {
        Self { negotiated }
    }

    /// Iterates over the existing queues, in order of their indices.
    pub fn queues(self) -> impl Iterator<Item = Vq> {
        Vq::ALL.into_iter().filter(move |vq| self.negotiated.contains(vq.feature()))
    }

    /// Returns the index of `vq`; `None` if it does not exist.
    pub fn index(self, vq: Vq) -> Option<usize> {
        self.queues().position(|other| other == vq)
    }

    /// Returns the queue with this index, if it exists.
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
    fn with_all_features_the_indices_are_those_of_the_specification() {
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
