//! Balloon options shared by `run`, `receive`, `restore` and `vhost-user`.

use clap::{Args, ValueEnum};
use control::{PartialHuge, ReleaseMode};
use vhost_device_balloon::Features;

/// When and how memory is released to the host.
#[derive(Debug, Args)]
pub(crate) struct ReleaseArgs {
    /// When to release the pages that the guest inflates
    #[arg(long, value_enum, default_value_t = Release::Background)]
    release: Release,

    /// What to do with part of a host huge page
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
    /// After replying to the guest, merged across messages
    Background,
    /// Before replying to the guest, merged within a message
    Immediate,
    /// Before replying to the guest, page by page; for comparison only
    PerPage,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Partial {
    /// Release it when the guest reaches its target or pauses; the host splits the huge page
    Split,
    /// Keep it until the whole huge page is in the balloon
    Wait,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Feature {
    /// Memory statistics
    Stats,
    /// Free page hints, on request of the host
    Hint,
    /// Free page reporting
    Reporting,
    /// Page poison; without it, a guest that poisons free pages does not report them
    Poison,
    /// Deflating when the guest is out of memory
    DeflateOnOom,
    /// Page-bitmap messages (Aerostat's driver)
    PageBitmap,
    /// Request queue (Aerostat's driver)
    Request,
}

/// Combines the features.
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
