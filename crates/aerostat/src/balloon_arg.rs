//! How a guest's balloon is served, whoever runs the guest.

use clap::{Args, ValueEnum};
use control::{PartialHuge, ReleaseMode};
use vhost_device_balloon::Features;

/// When and how memory goes back to the host.
#[derive(Debug, Args)]
pub(crate) struct ReleaseArgs {
    /// When pages that the guest gave are released
    #[arg(long, value_enum, default_value_t = Release::Background)]
    release: Release,

    /// What becomes of parts of the host's huge pages
    #[arg(long, value_enum, default_value_t = Partial::Split)]
    partial_huge: Partial,
}

impl ReleaseArgs {
    pub(crate) const fn mode(&self) -> ReleaseMode {
        match self.release {
            Release::Background => ReleaseMode::Background,
            Release::Immediate => ReleaseMode::Immediate,
            Release::PerPage => ReleaseMode::PerPage,
        }
    }

    pub(crate) const fn partial_huge(&self) -> PartialHuge {
        match self.partial_huge {
            Partial::Split => PartialHuge::Split,
            Partial::Wait => PartialHuge::Wait,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Release {
    /// After the guest was answered, many messages together
    Background,
    /// Before the guest is answered, a message at a time
    Immediate,
    /// Before the guest is answered, page by page; for comparison only
    PerPage,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Partial {
    /// Released once nothing more adds up; the host splits the huge page
    Split,
    /// Kept until the huge page is complete
    Wait,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Feature {
    /// Statistics of the guest's memory
    Stats,
    /// Free page hints, which the host asks for
    Hint,
    /// Free page reports, which the guest sends by itself
    Reporting,
    /// What the guest fills free pages with; a guest that does so reports none then
    Poison,
    /// Taking pages back when the guest is out of memory
    DeflateOnOom,
    /// Messages of Aerostat's own driver
    PageBitmap,
    /// Requests to Aerostat's own driver
    Request,
}

/// All of them.
pub(crate) fn features(features: &[Feature]) -> Features {
    let features = features.iter().map(|feature| Features::from(*feature));
    features.fold(Features::NONE, Features::union)
}

impl From<Feature> for Features {
    fn from(feature: Feature) -> Self {
        match feature {
            Feature::Stats => Self::STATS_VQ,
            Feature::Hint => Self::FREE_PAGE_HINT,
            Feature::Reporting => Self::REPORTING,
            Feature::Poison => Self::PAGE_POISON,
            Feature::DeflateOnOom => Self::DEFLATE_ON_OOM,
            Feature::PageBitmap => Self::PAGE_BITMAP,
            Feature::Request => Self::REQUEST_VQ,
        }
    }
}
