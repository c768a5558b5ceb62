//! Random operations on a guest and its balloon, reproducible from a seed.
//!
//! The plan tracks the guest memory that files, balloon and hold use after each step, so that it
//! never uses more than there is: a guest whose only process is its init does not survive running
//! out of memory. It has no access to a guest. [`super::soak_run`] executes it.

use std::collections::{BTreeMap, VecDeque};

use control::ReleaseMode;
use control::api::Caches;
use fastrand::Rng;

use crate::fixture::REPORTED_MIB;
use crate::testbed::Driver;

/// Balloon pages in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// Part of the guest's memory that the plan does not use, if free memory is not measured: the
/// kernel, the allocator's reserves, and per-CPU lists.
const RESERVE_DIVISOR: u64 = 4;

/// Small changes of the target, in pages: within one huge page of the host and over a few.
const NUDGE_PAGES: u32 = 2000;

/// Choices between two verifications of all memory.
const CHECK_CHOICES: u32 = 5;

/// Memory of the guest's second process: a part of the usable memory, and enough for whole blocks.
const CHURN_DIVISOR: u64 = 4;
const LEAST_CHURN_MIB: u64 = 16;

/// Linux reports if more memory is free than one report takes (32 blocks of 4 MiB) above its low
/// watermark (`page_reporting_process_zone`), so with less free memory it would report nothing.
const REPORTS_FREE_MIB: u64 = 256;

/// Free memory that a hold leaves, in MiB.
const HOLD_RESERVE_MIB: std::ops::Range<u64> = 64..400;

/// Statistics interval, in milliseconds.
const STATISTICS_MS: std::ops::RangeInclusive<u64> = 100..=500;

/// A file filled with a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatternFile {
    /// Its name in the guest.
    pub name: String,
    /// Its size in MiB.
    pub mib: u64,
    /// Seed of the pattern.
    pub seed: u64,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Sets a new target.
    Target {
        /// Balloon pages.
        pages: u32,
        /// Whether to wait until it is reached.
        wait: bool,
    },
    /// Inflates and deflates before the host can have released all, and uses the deflated pages at
    /// once.
    Bounce {
        /// Touched before: allocated memory takes the host time to release.
        touch_mib: u64,
        /// Target of the inflate.
        high: u32,
        /// Balloon size at which the deflate starts.
        enough: u32,
        /// Target of the deflate.
        low: u32,
        /// File that is then filled: the allocator first reuses the last pages freed.
        file: Option<PatternFile>,
    },
    /// Fills a new file.
    Fill(PatternFile),
    /// Deletes a file.
    Drop(String),
    /// Verifies a file.
    Verify(PatternFile),
    /// Waits for the balloon and verifies every file.
    Check,
    /// Sets the host's release mode.
    Mode(ReleaseMode),
    /// Unloads the driver with its balloon, uses the memory, and loads the driver again.
    Reload {
        /// File that is filled and verified meanwhile.
        interlude: PatternFile,
    },
    /// Fragments free memory.
    Fragment,
    /// Ends the fragmentation.
    Defragment,
    /// Starts a guest process that allocates, verifies and frees all the time.
    Churn {
        /// Its maximum memory.
        mib: u64,
        /// Seed of its sizes and patterns.
        seed: u64,
    },
    /// Ends that process.
    Calm,
    /// Requests free page hints.
    Hints,
    /// Touches and frees memory, and waits for free page reporting.
    Reports {
        /// Memory to touch.
        touch_mib: u64,
    },
    /// Sets the statistics interval.
    Statistics {
        /// The interval, in milliseconds.
        interval_ms: u64,
    },
    /// Drops the guest's caches.
    DropCaches(Caches),
    /// Requests a free-page report.
    Snapshot {
        /// Minimum block size.
        min_block_bytes: Option<u64>,
    },
    /// Requests a hold.
    Hold {
        /// Free memory that it leaves.
        reserve_mib: u64,
    },
    /// Releases the hold, unless the guest has taken it back.
    ReleaseHold,
}

impl Step {
    /// Name of this kind of step.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Target { .. } => "target",
            Self::Bounce { .. } => "bounce",
            Self::Fill(_) => "fill",
            Self::Drop(_) => "drop",
            Self::Verify(_) => "verify",
            Self::Check => "check",
            Self::Mode(_) => "mode",
            Self::Reload { .. } => "reload",
            Self::Fragment => "fragment",
            Self::Defragment => "defragment",
            Self::Churn { .. } => "churn",
            Self::Calm => "calm",
            Self::Hints => "hints",
            Self::Reports { .. } => "reports",
            Self::Statistics { .. } => "statistics",
            Self::DropCaches(_) => "drop-caches",
            Self::Snapshot { .. } => "snapshot",
            Self::Hold { .. } => "hold",
            Self::ReleaseHold => "release-hold",
        }
    }
}

/// A random choice of one or more steps.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Target,
    Bounce,
    Nudge,
    Fill,
    Refill,
    Drop,
    Verify,
    Mode,
    Reload,
    Fragment,
    Churn,
    Hints,
    Reports,
    Statistics,
    DropCaches,
    Snapshot,
    Hold,
}

/// Choices with their weights.
type Weights = &'static [(Choice, u32)];

/// Choices for the balloon alone.
const BALLOON: Weights = &[
    (Choice::Target, 5),
    (Choice::Bounce, 5),
    (Choice::Nudge, 3),
    (Choice::Fill, 4),
    (Choice::Refill, 3),
    (Choice::Drop, 3),
    (Choice::Verify, 2),
    (Choice::Mode, 3),
    (Choice::Reload, 1),
    (Choice::Fragment, 1),
];

/// Further choices with the stock driver.
const SPECIFICATION: Weights =
    &[(Choice::Churn, 2), (Choice::Hints, 4), (Choice::Reports, 1), (Choice::Statistics, 2)];

/// Further choices with our driver.
const REQUESTS: Weights =
    &[(Choice::Churn, 2), (Choice::DropCaches, 3), (Choice::Snapshot, 4), (Choice::Hold, 3)];

/// An endless plan.
#[derive(Clone, Debug)]
pub struct Plan {
    rng: Rng,
    weights: Vec<(Choice, u32)>,
    /// Memory for files, balloon and churn together, in MiB.
    usable_mib: u64,
    files: BTreeMap<String, PatternFile>,
    files_made: u64,
    /// Current target.
    target: u32,
    /// Maximum size of the balloon until it reaches the target.
    peak: u32,
    churn_mib: u64,
    fragmented: bool,
    /// Whether there may be a hold. The guest may take it back at any time.
    held: bool,
    choices_since_check: u32,
    planned: VecDeque<Step>,
}

impl Plan {
    /// Plan for the balloon alone, with any driver, in a guest with `free_mib` MiB free while there
    /// is no hold. Other threads may send requests meanwhile.
    pub fn of_balloon(seed: u64, free_mib: u64) -> Self {
        Self::new(seed, free_mib - free_mib / 8 - REPORTED_MIB, BALLOON.to_vec())
    }

    /// Plan of all operations on a guest of `memory_mib` MiB with this driver.
    pub fn of_everything(seed: u64, memory_mib: u64, driver: Driver) -> Self {
        let besides = match driver {
            Driver::Stock => SPECIFICATION,
            Driver::Own => REQUESTS,
        };
        let mut plan = Self::new(seed, Self::usable_mib(memory_mib), [BALLOON, besides].concat());
        plan.churn();
        plan
    }

    /// Maximum memory that [`of_everything`](Self::of_everything) uses, in MiB.
    pub const fn usable_mib(memory_mib: u64) -> u64 {
        memory_mib - memory_mib / RESERVE_DIVISOR
    }

    fn new(seed: u64, usable_mib: u64, weights: Vec<(Choice, u32)>) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            weights,
            usable_mib,
            files: BTreeMap::new(),
            files_made: 0,
            target: 0,
            peak: 0,
            churn_mib: 0,
            fragmented: false,
            held: false,
            choices_since_check: 0,
            planned: VecDeque::new(),
        }
    }

    /// Returns the next step.
    pub fn next_step(&mut self) -> Step {
        loop {
            if let Some(step) = self.planned.pop_front() {
                return step;
            }
            if self.choices_since_check == CHECK_CHOICES {
                self.choices_since_check = 0;
                self.check();
                continue;
            }
            self.choices_since_check += 1;
            // Frees memory for balloons, which files would soon use up.
            while self.files_mib() > self.usable_mib / 2 {
                self.drop_one();
            }
            self.choose();
        }
    }

    /// Final steps: verify and free all memory.
    pub fn ending(mut self) -> impl Iterator<Item = Step> {
        self.calm();
        self.release_hold();
        self.set_target(0, false);
        self.check();
        for name in std::mem::take(&mut self.files).into_keys() {
            self.planned.push_back(Step::Drop(name));
        }
        if self.fragmented {
            self.planned.push_back(Step::Defragment);
        }
        self.planned.into_iter()
    }

    /// Files that exist after all planned steps.
    pub fn files(&self) -> impl Iterator<Item = &PatternFile> {
        self.files.values()
    }

    fn choose(&mut self) {
        let mut ticket = self.rng.u32(0..self.weights.iter().map(|(_, weight)| weight).sum());
        let chosen = self.weights.iter().find(|(_, weight)| {
            let hit = ticket < *weight;
            ticket = ticket.wrapping_sub(*weight);
            hit
        });
        match chosen.map_or(Choice::Verify, |(choice, _)| *choice) {
            Choice::Target => self.new_target(),
            Choice::Bounce => self.bounce(),
            Choice::Nudge => self.nudge(),
            Choice::Fill => self.fill_some(),
            Choice::Refill => {
                self.drop_one();
                self.fill_some();
            }
            Choice::Drop => self.drop_one(),
            Choice::Verify => self.verify_one(),
            Choice::Mode => self.mode(),
            Choice::Reload => self.reload(),
            Choice::Fragment => self.fragment(),
            Choice::Churn if self.churn_mib > 0 => self.calm(),
            Choice::Churn => self.churn(),
            Choice::Hints => self.planned.push_back(Step::Hints),
            Choice::Reports => self.reports(),
            Choice::Statistics => {
                let interval_ms = self.rng.u64(STATISTICS_MS);
                self.planned.push_back(Step::Statistics { interval_ms });
            }
            Choice::DropCaches => {
                let all = [Caches::PageCache, Caches::Slab, Caches::All];
                let what = all[self.rng.usize(0..all.len())];
                self.planned.push_back(Step::DropCaches(what));
            }
            Choice::Snapshot => {
                let shift = self.rng.u32(12..=22);
                let min_block_bytes = self.rng.bool().then_some(1 << shift);
                self.planned.push_back(Step::Snapshot { min_block_bytes });
            }
            Choice::Hold if self.held => self.release_hold(),
            Choice::Hold => self.hold(),
        }
    }

    fn new_target(&mut self) {
        let most = self.most_pages();
        let pages = if self.rng.u8(0..4) == 0 { 0 } else { self.rng.u32(0..=most) };
        let wait = self.rng.bool();
        self.set_target(pages, wait);
    }

    fn bounce(&mut self) {
        self.release_hold();
        self.peak = self.target;
        let touch_mib = self.available_mib();
        let most = self.most_pages();
        let high = self.rng.u32(most / 2..=most);
        let (enough, low) = (self.rng.u32(0..=high), self.rng.u32(0..=high / 2));
        (self.target, self.peak) = (low, low);
        let freed_mib = u64::from((high - low).div_ceil(PAGES_PER_MIB));
        let mib = self.rng.u64(freed_mib / 2..=freed_mib).min(self.available_mib());
        let file = self.new_file(mib);
        self.planned.push_back(Step::Bounce { touch_mib, high, enough, low, file });
    }

    fn nudge(&mut self) {
        let by = self.rng.u32(1..=NUDGE_PAGES);
        let pages = match self.rng.bool() {
            true => (self.target + by).min(self.most_pages()),
            false => self.target.saturating_sub(by),
        };
        self.set_target(pages, false);
    }

    fn fill_some(&mut self) {
        let mib = self.rng.u64(0..=self.available_mib());
        let file = self.new_file(mib);
        self.planned.extend(file.map(Step::Fill));
    }

    fn drop_one(&mut self) {
        if let Some(file) = self.any_file() {
            self.files.remove(&file.name);
            self.planned.push_back(Step::Drop(file.name));
        }
    }

    fn verify_one(&mut self) {
        let file = self.any_file();
        self.planned.extend(file.map(Step::Verify));
    }

    fn mode(&mut self) {
        let modes = [ReleaseMode::Background, ReleaseMode::Immediate];
        let mode = modes[self.rng.usize(0..modes.len())];
        self.planned.push_back(Step::Mode(mode));
    }

    fn reload(&mut self) {
        // The balloon may have its maximum size until the driver unloads, and shrinks after that.
        let (mib, seed) = (self.available_mib(), self.rng.u64(..));
        let interlude = PatternFile { name: "interlude".to_owned(), mib, seed };
        self.planned.push_back(Step::Reload { interlude });
        (self.peak, self.held) = (self.target, false);
    }

    fn fragment(&mut self) {
        // The module `lab_memory` allocates all free memory for a moment.
        let churned = self.churn_mib > 0;
        self.calm();
        self.release_hold();
        self.set_target(self.target, true);
        let step = if self.fragmented { Step::Defragment } else { Step::Fragment };
        self.planned.push_back(step);
        self.fragmented = !self.fragmented;
        if churned {
            self.churn();
        }
    }

    fn churn(&mut self) {
        let most = self.available_mib().min(self.usable_mib / CHURN_DIVISOR);
        if most >= LEAST_CHURN_MIB {
            self.churn_mib = self.rng.u64(LEAST_CHURN_MIB..=most);
            let seed = self.rng.u64(..);
            self.planned.push_back(Step::Churn { mib: self.churn_mib, seed });
        }
    }

    fn calm(&mut self) {
        if self.churn_mib > 0 {
            self.churn_mib = 0;
            self.planned.push_back(Step::Calm);
        }
    }

    fn reports(&mut self) {
        let touch_mib = self.available_mib();
        if touch_mib >= REPORTS_FREE_MIB && !self.fragmented {
            self.planned.push_back(Step::Reports { touch_mib });
        }
    }

    fn hold(&mut self) {
        // A growing balloon would take the hold's pages.
        self.set_target(self.target, true);
        let reserve_mib = self.rng.u64(HOLD_RESERVE_MIB);
        self.planned.push_back(Step::Hold { reserve_mib });
        self.held = true;
    }

    fn release_hold(&mut self) {
        if self.held {
            self.held = false;
            self.planned.push_back(Step::ReleaseHold);
        }
    }

    fn check(&mut self) {
        self.peak = self.target;
        self.planned.push_back(Step::Check);
    }

    fn set_target(&mut self, pages: u32, wait: bool) {
        self.release_hold();
        self.planned.push_back(Step::Target { pages, wait });
        self.target = pages;
        self.peak = if wait { pages } else { self.peak.max(pages) };
    }

    fn new_file(&mut self, mib: u64) -> Option<PatternFile> {
        if mib == 0 {
            return None;
        }
        self.files_made += 1;
        let name = format!("file{}", self.files_made);
        let file = PatternFile { name: name.clone(), mib, seed: self.rng.u64(..) };
        self.files.insert(name, file.clone());
        Some(file)
    }

    fn any_file(&mut self) -> Option<PatternFile> {
        let index = self.rng.usize(0..self.files.len().max(1));
        self.files.values().nth(index).cloned()
    }

    fn files_mib(&self) -> u64 {
        self.files.values().map(|file| file.mib).sum()
    }

    /// Maximum balloon size next to the files.
    fn most_pages(&self) -> u32 {
        let mib = self.usable_mib.saturating_sub(self.files_mib() + self.churn_mib);
        u32::try_from(mib).unwrap_or(u32::MAX).saturating_mul(PAGES_PER_MIB)
    }

    /// Memory left for more files.
    fn available_mib(&self) -> u64 {
        let peak_mib = u64::from(self.peak.div_ceil(PAGES_PER_MIB));
        self.usable_mib.saturating_sub(self.files_mib() + self.churn_mib + peak_mib)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const MEMORY_MIB: u64 = 1024;

    fn plan(seed: u64, driver: Driver) -> Plan {
        Plan::of_everything(seed, MEMORY_MIB, driver)
    }

    fn steps(mut plan: Plan, count: usize) -> Vec<Step> {
        let mut steps: Vec<_> = (0..count).map(|_| plan.next_step()).collect();
        // Steps planned already belong to the ending.
        steps.extend(plan.ending());
        steps
    }

    /// Guest memory derived from the steps alone.
    #[derive(Default)]
    struct Model {
        files: BTreeMap<String, PatternFile>,
        names: BTreeSet<String>,
        target: u32,
        /// Maximum balloon size until it reaches its target.
        peak: u32,
        churn_mib: u64,
        fragmented: bool,
        held: bool,
    }

    impl Model {
        fn used_mib(&self) -> u64 {
            let files: u64 = self.files.values().map(|file| file.mib).sum();
            files + self.churn_mib + u64::from(self.peak.div_ceil(PAGES_PER_MIB))
        }

        fn fits(&self, more_mib: u64) {
            assert!(self.used_mib() + more_mib <= Plan::usable_mib(MEMORY_MIB));
        }

        fn fill(&mut self, file: &PatternFile) {
            assert!(file.mib > 0 && self.names.insert(file.name.clone()), "{file:?}");
            self.files.insert(file.name.clone(), file.clone());
            self.fits(0);
        }

        fn target(&mut self, pages: u32) {
            assert!(!self.held || pages <= self.target, "grows during a hold");
            self.target = pages;
            self.peak = self.peak.max(pages);
            self.fits(0);
        }

        fn wait(&mut self) {
            self.peak = self.target;
        }

        fn apply(&mut self, step: &Step, driver: Driver) {
            match step {
                Step::Target { pages, wait } => {
                    self.target(*pages);
                    if *wait {
                        self.wait();
                    }
                }
                Step::Bounce { touch_mib, high, enough, low, file } => {
                    assert!(!self.held && enough <= high && low <= high);
                    self.wait();
                    self.fits(*touch_mib);
                    self.target(*high);
                    self.target(*low);
                    // It waits for that size. The touched memory is free again.
                    self.wait();
                    file.iter().for_each(|file| self.fill(file));
                }
                Step::Fill(file) => self.fill(file),
                Step::Drop(name) => drop(self.files.remove(name).unwrap()),
                Step::Verify(file) => assert_eq!(self.files.get(&file.name), Some(file)),
                Step::Check => self.wait(),
                Step::Mode(mode) => assert_ne!(*mode, ReleaseMode::PerPage),
                Step::Reload { interlude } => {
                    self.fits(interlude.mib);
                    self.held = false;
                    self.wait();
                }
                Step::Fragment | Step::Defragment => {
                    assert!(!self.held && self.churn_mib == 0 && self.peak == self.target);
                    assert_eq!(self.fragmented, *step == Step::Defragment);
                    self.fragmented = !self.fragmented;
                }
                Step::Churn { mib, .. } => {
                    assert!(self.churn_mib == 0 && *mib > 0);
                    self.churn_mib = *mib;
                    self.fits(0);
                }
                Step::Calm => assert!(std::mem::take(&mut self.churn_mib) > 0),
                Step::Reports { touch_mib } => {
                    assert!(!self.fragmented && driver == Driver::Stock);
                    self.fits(*touch_mib);
                }
                Step::Hints | Step::Statistics { .. } => assert_eq!(driver, Driver::Stock),
                Step::DropCaches(_) | Step::Snapshot { .. } => assert_eq!(driver, Driver::Own),
                Step::Hold { .. } => {
                    assert!(driver == Driver::Own && self.peak == self.target);
                    assert!(!std::mem::replace(&mut self.held, true));
                }
                Step::ReleaseHold => assert!(std::mem::take(&mut self.held)),
            }
        }
    }

    proptest! {
        #[test]
        fn no_step_uses_more_than_the_free_memory(seed: u64, stock: bool, count in 0usize..400) {
            let driver = if stock { Driver::Stock } else { Driver::Own };
            let mut model = Model::default();
            for step in steps(plan(seed, driver), count) {
                model.apply(&step, driver);
            }
            // The ending verifies and frees all memory.
            prop_assert_eq!((model.files.len(), model.used_mib(), model.target), (0, 0, 0));
            prop_assert!(!model.fragmented && !model.held);
        }

        #[test]
        fn the_same_seed_gives_the_same_plan(seed: u64) {
            let again = || steps(plan(seed, Driver::Own), 200);
            prop_assert_eq!(again(), again());
            prop_assert_ne!(again(), steps(plan(seed ^ 1, Driver::Own), 200));
        }

        #[test]
        fn all_memory_is_verified_repeatedly(seed: u64) {
            // Each choice is a few steps.
            let seen = steps(plan(seed, Driver::Stock), 400);
            let checks = seen.iter().filter(|step| **step == Step::Check).count();
            prop_assert!(checks >= 400 / 40, "{checks}");
        }
    }

    #[test]
    fn a_plan_has_every_kind_of_step() {
        let kinds = |driver| -> BTreeSet<_> {
            steps(plan(1, driver), 2000).iter().map(Step::name).collect()
        };
        let common = [
            "target",
            "bounce",
            "fill",
            "drop",
            "verify",
            "check",
            "mode",
            "reload",
            "fragment",
            "defragment",
            "churn",
            "calm",
        ];
        let of = |more: &[&'static str]| common.iter().chain(more).copied().collect();
        let stock: BTreeSet<_> = of(&["hints", "reports", "statistics"]);
        assert_eq!(kinds(Driver::Stock), stock);
        let own: BTreeSet<_> = of(&["drop-caches", "snapshot", "hold", "release-hold"]);
        assert_eq!(kinds(Driver::Own), own);
    }

    #[test]
    fn a_balloon_plan_works_with_both_drivers() {
        let mut plan = Plan::of_balloon(3, 800);
        let mut model = Model::default();
        for _ in 0..500 {
            let step = plan.next_step();
            // Neither driver supports the other's features.
            model.apply(&step, Driver::Own);
            model.apply(&Step::Check, Driver::Stock);
            assert!(!matches!(
                step,
                Step::Churn { .. } | Step::Hold { .. } | Step::Snapshot { .. }
            ));
        }
    }
}
