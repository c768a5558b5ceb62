//! `bench compat`: features by kernel, VMM and driver.
//!
//! Each [`Target`] is booted once and runs all features in order. A feature passes if it was used
//! and the guest's memory was verified after it.

mod balloon_checks;
mod request_checks;
mod restart_checks;
mod specification_checks;
mod subject;
mod target;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use target::{ABSENT, Absent, KernelChoice, Target, VmmChoice};

use crate::error::Result;
use crate::testbed::Driver;
use subject::Subject;

/// Features, in test order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// Inflate and deflate.
    InflateDeflate,
    /// Memory is deflated before the host can have released it.
    MustTellHost,
    /// Messages are page-bitmap records.
    PageBitmap,
    /// Event index (`VIRTIO_F_EVENT_IDX`).
    RingEventIdx,
    /// Indirect descriptors.
    RingIndirectDesc,
    /// Statistics of the guest's kernel.
    Stats,
    /// Free page hints.
    FreePageHint,
    /// Page poison.
    PagePoison,
    /// Free page reporting.
    Reporting,
    /// The guest drops its caches on request.
    DropCaches,
    /// The guest reports its free pages on request.
    FreePages,
    /// The guest holds free pages on request.
    HoldPages,
    /// The guest deflates under memory pressure.
    DeflateOnOom,
    /// The driver unloads with an inflated balloon, and loads again.
    DriverReload,
    /// The guest suspends with an inflated balloon, and wakes.
    Sleep,
    /// The back end is killed while the guest runs.
    BackEndKilled,
    /// The next back end serves the same guest.
    BackEndReconnect,
}

impl Feature {
    /// All features.
    pub const ALL: [Self; 17] = [
        Self::InflateDeflate,
        Self::MustTellHost,
        Self::PageBitmap,
        Self::RingEventIdx,
        Self::RingIndirectDesc,
        Self::Stats,
        Self::FreePageHint,
        Self::PagePoison,
        Self::Reporting,
        Self::DropCaches,
        Self::FreePages,
        Self::HoldPages,
        Self::DeflateOnOom,
        Self::DriverReload,
        Self::Sleep,
        Self::BackEndKilled,
        Self::BackEndReconnect,
    ];

    /// Name in JSON.
    pub fn name(self) -> String {
        word(&self)
    }
}

/// Result of a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It works, and the guest's memory was verified.
    Pass,
    /// It does not work.
    Fail,
    /// Not run; the detail is the reason.
    NotRun,
}

/// One entry of the matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The guest's kernel, with its kernel arguments.
    pub kernel: String,
    /// The VMM.
    pub monitor: String,
    /// `stock` or `ours`.
    pub driver: String,
    /// The feature.
    pub feature: String,
    /// The result.
    pub result: Verdict,
    /// Measured values, or the reason.
    pub detail: String,
}

/// What `bench compat --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// One entry for each kernel, VMM, driver and feature.
    pub rows: Vec<Row>,
}

/// What to run. Empty lists mean all.
#[derive(Clone, Debug, Default)]
pub struct CompatOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Kernels by their names in the report.
    pub kernels: Vec<String>,
    /// VMMs by their names in the report.
    pub monitors: Vec<String>,
    /// Drivers by their names in the report.
    pub drivers: Vec<String>,
    /// Features by their names in the report.
    pub features: Vec<String>,
}

/// Start of the line with the reason of a kernel's death.
const DYING: [&str; 3] = ["Kernel panic", "kernel BUG at", "BUG:"];

/// Result of a check without an error. An error is a failure.
enum Outcome {
    Passed(String),
    NotRun(String),
}

/// Runs what `options` selects. Calls `progress` with each entry.
///
/// # Errors
/// This machine cannot build guests. Failures of a guest are in the report.
pub fn run(options: &CompatOptions, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let mut report = Report::default();
    for target in Target::all() {
        let wanted = chosen(&options.kernels, &target.kernel_name())
            && chosen(&options.monitors, target.monitor.name())
            && chosen(&options.drivers, driver_name(target.driver));
        if wanted {
            progress(&format!(
                "booting {} on {}, driver {}",
                target.kernel_name(),
                target.monitor.name(),
                driver_name(target.driver)
            ));
            let rows = rows_of(&target, options, progress)?;
            report.rows.extend(rows);
        }
    }
    for absent in ABSENT {
        if chosen(&options.monitors, absent.monitor) && options.kernels.is_empty() {
            report.rows.extend(absent.rows(options));
        }
    }
    Ok(report)
}

fn rows_of(
    target: &Target,
    options: &CompatOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Row>> {
    let mut subject = match Subject::start(target, &options.program) {
        Ok(Ok(subject)) => Ok(subject),
        Ok(Err(not_here)) => Err((Verdict::NotRun, not_here)),
        Err(error) => Err((Verdict::Fail, one_line(&error.to_string()))),
    };
    let mut rows = Vec::new();
    for feature in Feature::ALL {
        if !chosen(&options.features, &feature.name()) {
            continue;
        }
        let (result, detail) = match &mut subject {
            Err((verdict, why)) => (*verdict, why.clone()),
            Ok(subject) => attempt(feature, subject),
        };
        progress(&format!("  {}: {} ({detail})", feature.name(), word(&result)));
        rows.push(Row {
            kernel: target.kernel_name(),
            monitor: target.monitor.name().to_owned(),
            driver: driver_name(target.driver).to_owned(),
            feature: feature.name(),
            result,
            detail,
        });
    }
    Ok(rows)
}

fn attempt(feature: Feature, subject: &mut Subject) -> (Verdict, String) {
    if let Some(why) = subject.target().cannot(feature) {
        return (Verdict::NotRun, why.to_owned());
    }
    let tried = subject.begin(feature).and_then(|()| match feature {
        Feature::InflateDeflate => balloon_checks::inflates_and_deflates(subject),
        Feature::MustTellHost => balloon_checks::deflates_at_once(subject),
        Feature::PageBitmap => balloon_checks::sends_bitmaps(subject),
        Feature::RingEventIdx | Feature::RingIndirectDesc => balloon_checks::uses_ring(subject),
        Feature::DeflateOnOom => balloon_checks::deflates_under_pressure(subject),
        Feature::DriverReload => balloon_checks::reloads(subject),
        Feature::Sleep => balloon_checks::sleeps(subject),
        Feature::Stats => specification_checks::reports_statistics(subject),
        Feature::FreePageHint => specification_checks::hints(subject),
        Feature::PagePoison => specification_checks::poisons(subject),
        Feature::Reporting => specification_checks::reports(subject),
        Feature::DropCaches => request_checks::drops_caches(subject),
        Feature::FreePages => request_checks::reports_free_pages(subject),
        Feature::HoldPages => request_checks::holds_free_pages(subject),
        Feature::BackEndKilled => restart_checks::outlives_the_back_end(subject),
        Feature::BackEndReconnect => Ok(Outcome::NotRun("no such VMM here".to_owned())),
    });
    match tried {
        Ok(Outcome::Passed(detail)) => (Verdict::Pass, detail),
        Ok(Outcome::NotRun(why)) => (Verdict::NotRun, why),
        Err(error) => (Verdict::Fail, one_line(&error.to_string())),
    }
}

/// Name of a driver in the report.
pub const fn driver_name(driver: Driver) -> &'static str {
    match driver {
        Driver::Stock => "stock",
        Driver::Own => "ours",
    }
}

fn chosen(asked: &[String], name: &str) -> bool {
    asked.is_empty() || asked.iter().any(|asked| asked == name)
}

/// The first line of an error, and the reason of a kernel's death. Omits console logs.
fn one_line(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default().to_owned();
    let dying = text.lines().find(|line| DYING.iter().any(|word| line.contains(word)));
    dying.map_or(first.clone(), |line| format!("{first} {}", line.trim()))
}

fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    value.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
}
