//! Targets that are run, and those that cannot be, with the reason.

use lab::debian::Release;

use super::{CompatOptions, Feature, Row, Verdict, chosen, driver_name};
use crate::testbed::Driver;

/// A guest kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelChoice {
    /// User Mode Linux 6.1 as Debian packages it.
    UmlPackaged,
    /// User Mode Linux 6.12, built from Debian's sources.
    UmlBuilt,
    /// Debian's cloud kernel.
    Debian(Release),
}

impl KernelChoice {
    const fn name(self) -> &'static str {
        match self {
            Self::UmlPackaged => "uml-6.1",
            Self::UmlBuilt => "uml-6.12",
            Self::Debian(Release::Cloud6_1) => "debian-6.1-cloud",
            Self::Debian(Release::Cloud6_12) => "debian-6.12-cloud",
            Self::Debian(Release::Full6_12) => "debian-6.12",
        }
    }
}

/// A VMM that is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmChoice {
    /// User Mode Linux, without another VMM.
    Uml,
    /// QEMU's generic vhost-user device, in emulation.
    Qemu,
}

impl VmmChoice {
    /// The name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uml => "uml",
            Self::Qemu => "qemu-8.2",
        }
    }
}

/// One guest configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its kernel.
    pub kernel: KernelChoice,
    /// Its VMM.
    pub monitor: VmmChoice,
    /// Its driver.
    pub driver: Driver,
    /// Its kernel argument about free pages.
    pub poison: Option<&'static str>,
}

/// A VMM that is not run with any kernel and driver.
#[derive(Clone, Copy, Debug)]
pub struct Absent {
    /// Its name in the report.
    pub monitor: &'static str,
    /// The reason.
    pub why: &'static str,
}

/// VMMs that no package registry has.
pub const ABSENT: [Absent; 3] = [
    Absent {
        monitor: "qemu-9+",
        why: "in no registry: Debian's 10.0 does not let users create vhost-user-device",
    },
    Absent {
        monitor: "cloud-hypervisor",
        why: "in no registry, and needs KVM; its messages are replayed by tests/front_end",
    },
    Absent {
        monitor: "crosvm",
        why: "in no registry, and needs KVM; its messages are replayed by tests/front_end",
    },
];

/// Kernel arguments that make the kernel write to freed or allocated pages. Debian's kernels are
/// built without `page_poison`, and clear allocated pages by default.
const POISONS: [&str; 3] = ["page_poison=1", "init_on_free=1", "init_on_alloc=1"];

const DRIVERS: [Driver; 2] = [Driver::Stock, Driver::Own];

impl Target {
    /// All targets, in the order of the report.
    pub fn all() -> Vec<Self> {
        let (uml, qemu) = (VmmChoice::Uml, VmmChoice::Qemu);
        let newest = KernelChoice::Debian(Release::Cloud6_12);
        let kernels = [
            (KernelChoice::UmlPackaged, uml, &[][..]),
            (KernelChoice::UmlBuilt, uml, &POISONS[..]),
            (KernelChoice::Debian(Release::Cloud6_1), qemu, &[]),
            (newest, qemu, &POISONS[1..2]),
        ];
        let mut targets = Vec::new();
        for (kernel, monitor, poisons) in kernels {
            let boots = std::iter::once(None).chain(poisons.iter().copied().map(Some));
            for poison in boots {
                for driver in DRIVERS {
                    targets.push(Self { kernel, monitor, driver, poison });
                }
            }
        }
        targets
    }

    /// The kernel's name in the report.
    pub fn kernel_name(&self) -> String {
        match self.poison {
            None => self.kernel.name().to_owned(),
            Some(word) => format!("{} {word}", self.kernel.name()),
        }
    }

    /// The poison value that the driver reports for its kernel (drivers/virtio/virtio_balloon.c,
    /// `virtballoon_probe`).
    pub fn poison_val(&self) -> Option<u32> {
        match self.poison {
            Some("page_poison=1") => Some(0xaaaa_aaaa),
            Some("init_on_free=1") => Some(0),
            _ => None,
        }
    }

    /// Why a feature is impossible with this kernel, VMM or driver.
    pub fn cannot(&self, feature: Feature) -> Option<&'static str> {
        let (stock, uml) = (self.driver == Driver::Stock, self.monitor == VmmChoice::Uml);
        match feature {
            Feature::PageBitmap | Feature::DropCaches | Feature::FreePages | Feature::HoldPages
                if stock =>
            {
                Some("Linux's own driver has no such feature")
            }
            Feature::Stats | Feature::FreePageHint | Feature::Reporting if !stock => {
                Some("our driver does not negotiate it: the request queue replaces it")
            }
            Feature::RingIndirectDesc if stock => {
                Some("Linux's own driver turns it off, so as not to allocate while it reports")
            }
            Feature::Reporting if !uml => {
                Some("QEMU 8.2's queues have 4 entries, and Linux starts none with under 32")
            }
            Feature::PagePoison if self.poison_val().is_none() => {
                Some("this kernel writes nothing to freed pages")
            }
            Feature::BackEndReconnect if uml => {
                Some("virtio_uml does not reconnect; crates/aerostat/tests/back_end does")
            }
            Feature::BackEndReconnect => Some(
                "QEMU does not reinitialise its generic device; crates/aerostat/tests/back_end does",
            ),
            _ => None,
        }
    }
}

impl Absent {
    /// One row per driver and feature.
    pub(super) fn rows(&self, options: &CompatOptions) -> Vec<Row> {
        let mut rows = Vec::new();
        for driver in DRIVERS.map(driver_name).into_iter().filter(|d| chosen(&options.drivers, d)) {
            for feature in Feature::ALL.map(Feature::name) {
                if chosen(&options.features, &feature) {
                    rows.push(Row {
                        kernel: "any".to_owned(),
                        monitor: self.monitor.to_owned(),
                        driver: driver.to_owned(),
                        feature,
                        result: Verdict::NotRun,
                        detail: self.why.to_owned(),
                    });
                }
            }
        }
        rows
    }
}
