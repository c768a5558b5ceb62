//! `bench compat`: what works with which kernel, monitor and driver.
//!
//! Each [`Target`] is booted once and goes through all features, one after the other;
//! a feature passes when it was used and the guest's memory was verified after it.

mod balloon_checks;
mod request_checks;
mod restart_checks;
mod specification_checks;
mod subject;
mod target;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use target::{ABSENT, Absent, KernelChoice, MonitorChoice, Target};

use crate::error::Result;
use crate::testbed::Driver;
use subject::Subject;

/// What is tried, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// Memory goes to the host and comes back.
    InflateDeflate,
    /// Memory is taken back before the host can have released it.
    MustTellHost,
    /// Messages are page-bitmap records.
    PageBitmap,
    /// Notifications by event index.
    RingEventIdx,
    /// Tables of descriptors.
    RingIndirectDesc,
    /// Statistics of the guest's kernel.
    Stats,
    /// Free page hints.
    FreePageHint,
    /// What the guest fills free pages with.
    PagePoison,
    /// Free page reports.
    Reporting,
    /// The guest drops its caches when asked.
    DropCaches,
    /// The guest names its free pages when asked.
    FreePages,
    /// The guest holds its free pages when asked.
    HoldPages,
    /// The guest takes memory back that it needs.
    DeflateOnOom,
    /// The driver goes with what it holds, and comes again.
    DriverReload,
    /// The guest sleeps with what the balloon holds, and wakes.
    Sleep,
    /// The back end is killed while the guest runs.
    BackEndKilled,
    /// The next back end serves the same guest.
    BackEndReconnect,
}

impl Feature {
    /// All of them.
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

    /// The word in JSON.
    pub fn name(self) -> String {
        word(&self)
    }
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Done, and the guest's memory verified.
    Pass,
    /// Not as it has to be.
    Fail,
    /// Not tried; the detail says why.
    NotRun,
}

/// One entry of the matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The guest's kernel, with the words it was booted with.
    pub kernel: String,
    /// What runs the guest.
    pub monitor: String,
    /// `stock` or `ours`.
    pub driver: String,
    /// What was tried.
    pub feature: String,
    /// How it went.
    pub result: Verdict,
    /// What was seen, or why nothing was tried.
    pub detail: String,
}

/// What `bench compat --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// One entry for each kernel, monitor, driver and feature.
    pub rows: Vec<Row>,
}

/// What to try. Empty lists mean all.
#[derive(Clone, Debug, Default)]
pub struct CompatOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Kernels by their names in the report.
    pub kernels: Vec<String>,
    /// Monitors by their names in the report.
    pub monitors: Vec<String>,
    /// Drivers by their names in the report.
    pub drivers: Vec<String>,
    /// Features by their names in the report.
    pub features: Vec<String>,
}

/// How the line begins that says what a kernel dies of.
const DYING: [&str; 3] = ["Kernel panic", "kernel BUG at", "BUG:"];

/// What a check comes to if it is not an error, which is a failure.
enum Outcome {
    Passed(String),
    NotRun(String),
}

/// Tries what `options` asks for; `progress` hears of each entry.
///
/// # Errors
/// Only where this machine has no lab; what goes wrong with a guest is in the report.
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
        Feature::MustTellHost => balloon_checks::takes_back_at_once(subject),
        Feature::PageBitmap => balloon_checks::sends_bitmaps(subject),
        Feature::RingEventIdx | Feature::RingIndirectDesc => balloon_checks::uses_ring(subject),
        Feature::DeflateOnOom => balloon_checks::yields(subject),
        Feature::DriverReload => balloon_checks::reloads(subject),
        Feature::Sleep => balloon_checks::sleeps(subject),
        Feature::Stats => specification_checks::tells_statistics(subject),
        Feature::FreePageHint => specification_checks::hints(subject),
        Feature::PagePoison => specification_checks::poisons(subject),
        Feature::Reporting => specification_checks::reports(subject),
        Feature::DropCaches => request_checks::drops_caches(subject),
        Feature::FreePages => request_checks::names_free_pages(subject),
        Feature::HoldPages => request_checks::holds_free_pages(subject),
        Feature::BackEndKilled => restart_checks::outlives_the_back_end(subject),
        Feature::BackEndReconnect => Ok(Outcome::NotRun("no such monitor here".to_owned())),
    });
    match tried {
        Ok(Outcome::Passed(detail)) => (Verdict::Pass, detail),
        Ok(Outcome::NotRun(why)) => (Verdict::NotRun, why),
        Err(error) => (Verdict::Fail, one_line(&error.to_string())),
    }
}

/// The word for a driver in the report.
pub const fn driver_name(driver: Driver) -> &'static str {
    match driver {
        Driver::Stock => "stock",
        Driver::Own => "ours",
    }
}

fn chosen(asked: &[String], name: &str) -> bool {
    asked.is_empty() || asked.iter().any(|asked| asked == name)
}

/// Console logs are no detail, but what a kernel dies of is.
fn one_line(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default().to_owned();
    let dying = text.lines().find(|line| DYING.iter().any(|word| line.contains(word)));
    dying.map_or(first.clone(), |line| format!("{first} {}", line.trim()))
}

fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    value.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
}
