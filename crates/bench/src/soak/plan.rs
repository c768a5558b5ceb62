//! What is done to a guest and its balloon, at random and yet the same for the same seed.
//!
//! The plan knows what files, balloon and hold take of the guest's memory after each step,
//! so that it never asks for more than there is: a guest whose only process is its init
//! does not survive running out of memory. It sees no guest; [`super::walk`] does what it
//! says.

use std::collections::{BTreeMap, VecDeque};

use control::ReleaseMode;
use control::api::Caches;
use fastrand::Rng;

use crate::fixture::REPORTED_MIB;
use crate::testbed::Driver;

/// Balloon pages in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// Part of the guest's memory that is left alone, where nobody says what is free: its
/// kernel, the allocator's reserves, and what is in lists of its processors.
const RESERVE_DIVISOR: u64 = 4;

/// Small changes of the target, in pages: within one of the host's huge pages
/// and over a few.
const NUDGE_PAGES: u32 = 2000;

/// Choices between two looks at every byte.
const CHECK_CHOICES: u32 = 5;

/// What the guest's other process may use, in MiB: a part of what there is, and enough
/// for whole blocks.
const CHURN_DIVISOR: u64 = 4;
const LEAST_CHURN_MIB: u64 = 16;

/// Linux reports where more is free than one report takes (32 blocks of 4 MiB) above its
/// low watermark (`page_reporting_process_zone`), so less room would report nothing.
const REPORTS_ROOM_MIB: u64 = 256;

/// What a hold leaves to the guest, in MiB.
const HOLD_RESERVE_MIB: std::ops::Range<u64> = 64..400;

/// How often the guest is asked for statistics, in milliseconds.
const STATISTICS_MS: std::ops::RangeInclusive<u64> = 100..=500;

/// Memory that holds a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatternFile {
    /// Its name in the guest.
    pub name: String,
    /// Its size in MiB.
    pub mib: u64,
    /// Which pattern.
    pub seed: u64,
}

/// One thing that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A new target, reached before the next step or not.
    Target {
        /// Balloon pages.
        pages: u32,
        /// Whether it is waited for.
        settle: bool,
    },
    /// Up and down again before the host can have released all, and the guest uses its
    /// pages at once.
    Bounce {
        /// Touched before: memory that the host really has takes it time to release.
        touch_mib: u64,
        /// The target on the way up.
        high: u32,
        /// What the guest has to have given when it turns.
        enough: u32,
        /// The target on the way down.
        low: u32,
        /// What it then fills: the allocator hands out first what came back last.
        file: Option<PatternFile>,
    },
    /// A new file takes some of the memory that is left.
    Fill(PatternFile),
    /// A file's memory is freed.
    Drop(String),
    /// One file is verified.
    Verify(PatternFile),
    /// The change is over, and every file is verified.
    Check,
    /// From now on the host releases so.
    Mode(ReleaseMode),
    /// The driver goes, with what it holds; what it gave back is used, and it comes back.
    Reload {
        /// What is filled and verified without it.
        interlude: PatternFile,
    },
    /// Free memory falls into pieces.
    Fragment,
    /// It is put together again.
    Defragment,
    /// A process of the guest begins to allocate, verify and free all the time.
    Churn {
        /// What it uses at most.
        mib: u64,
        /// Which sizes and patterns.
        seed: u64,
    },
    /// It ends.
    Calm,
    /// The guest is asked what it does not use, by the specification's hints.
    Hints,
    /// Memory is touched and freed, and the guest reports it by itself.
    Reports {
        /// How much.
        touch_mib: u64,
    },
    /// The guest is asked for statistics from now on.
    Statistics {
        /// How often.
        interval_ms: u64,
    },
    /// The guest's kernel drops caches.
    DropCaches(Caches),
    /// The guest's kernel names its free pages.
    Snapshot {
        /// No smaller blocks.
        min_block_bytes: Option<u64>,
    },
    /// The guest's driver takes its free pages and keeps them.
    Hold {
        /// What it leaves to the guest.
        reserve_mib: u64,
    },
    /// It gives them back, where the guest has not taken them before.
    ReleaseHold,
}

impl Step {
    /// The word for steps of this kind.
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

/// What the dice decide; one or more steps each.
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

/// Choices with how often each is taken.
type Shares = &'static [(Choice, u32)];

/// What concerns the balloon alone.
const BALLOON: Shares = &[
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

/// What the stock driver can do besides.
const SPECIFICATION: Shares =
    &[(Choice::Churn, 2), (Choice::Hints, 4), (Choice::Reports, 1), (Choice::Statistics, 2)];

/// What our driver can do besides.
const REQUESTS: Shares =
    &[(Choice::Churn, 2), (Choice::DropCaches, 3), (Choice::Snapshot, 4), (Choice::Hold, 3)];

/// An endless plan.
#[derive(Clone, Debug)]
pub struct Plan {
    rng: Rng,
    shares: Vec<(Choice, u32)>,
    /// What files, balloon and churn may take together, in MiB.
    usable_mib: u64,
    files: BTreeMap<String, PatternFile>,
    files_made: u64,
    /// The target.
    target: u32,
    /// The most that the balloon may still hold on its way there.
    peak: u32,
    churn_mib: u64,
    fragmented: bool,
    /// True where there may be a hold: the guest takes one back when it needs it.
    held: bool,
    choices_since_check: u32,
    planned: VecDeque<Step>,
}

impl Plan {
    /// What can be done to the balloon of a guest in which `free_mib` MiB are free when
    /// nothing is held for the host, with whatever driver, where others ask the guest for something meanwhile.
    pub fn of_balloon(seed: u64, free_mib: u64) -> Self {
        Self::new(seed, free_mib - free_mib / 8 - REPORTED_MIB, BALLOON.to_vec())
    }

    /// All that can be done with a guest of `memory_mib` MiB with this driver.
    pub fn of_everything(seed: u64, memory_mib: u64, driver: Driver) -> Self {
        let besides = match driver {
            Driver::Stock => SPECIFICATION,
            Driver::Own => REQUESTS,
        };
        let mut plan = Self::new(seed, Self::usable_mib(memory_mib), [BALLOON, besides].concat());
        plan.churn();
        plan
    }

    /// What [`of_everything`](Self::of_everything) takes of a guest at most, in MiB.
    pub const fn usable_mib(memory_mib: u64) -> u64 {
        memory_mib - memory_mib / RESERVE_DIVISOR
    }

    fn new(seed: u64, usable_mib: u64, shares: Vec<(Choice, u32)>) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            shares,
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

    /// What comes next.
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
            // Room for balloons: files alone are soon all there is.
            while self.files_mib() > self.usable_mib / 2 {
                self.drop_one();
            }
            self.choose();
        }
    }

    /// What brings the guest to an end where all of its memory is free and was verified.
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

    /// The files that there are once all that is planned was done.
    pub fn files(&self) -> impl Iterator<Item = &PatternFile> {
        self.files.values()
    }

    fn choose(&mut self) {
        let mut ticket = self.rng.u32(0..self.shares.iter().map(|(_, share)| share).sum());
        let chosen = self.shares.iter().find(|(_, share)| {
            let hit = ticket < *share;
            ticket = ticket.wrapping_sub(*share);
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
        let settle = self.rng.bool();
        self.set_target(pages, settle);
    }

    fn bounce(&mut self) {
        self.release_hold();
        self.peak = self.target;
        let touch_mib = self.room_mib();
        let most = self.most_pages();
        let high = self.rng.u32(most / 2..=most);
        let (enough, low) = (self.rng.u32(0..=high), self.rng.u32(0..=high / 2));
        (self.target, self.peak) = (low, low);
        let freed_mib = u64::from((high - low).div_ceil(PAGES_PER_MIB));
        let mib = self.rng.u64(freed_mib / 2..=freed_mib).min(self.room_mib());
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
        let mib = self.rng.u64(0..=self.room_mib());
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
        // The driver may hold the most until it is gone, and the host go on for a moment.
        let (mib, seed) = (self.room_mib(), self.rng.u64(..));
        let interlude = PatternFile { name: "interlude".to_owned(), mib, seed };
        self.planned.push_back(Step::Reload { interlude });
        (self.peak, self.held) = (self.target, false);
    }

    fn fragment(&mut self) {
        // The lab's module takes all that is free for a moment.
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
        let most = self.room_mib().min(self.usable_mib / CHURN_DIVISOR);
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
        let touch_mib = self.room_mib();
        if touch_mib >= REPORTS_ROOM_MIB && !self.fragmented {
            self.planned.push_back(Step::Reports { touch_mib });
        }
    }

    fn hold(&mut self) {
        // A balloon that grows would have to take from the hold.
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

    fn set_target(&mut self, pages: u32, settle: bool) {
        self.release_hold();
        self.planned.push_back(Step::Target { pages, settle });
        self.target = pages;
        self.peak = if settle { pages } else { self.peak.max(pages) };
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

    /// What the balloon may hold beside the rest.
    fn most_pages(&self) -> u32 {
        let mib = self.usable_mib.saturating_sub(self.files_mib() + self.churn_mib);
        u32::try_from(mib).unwrap_or(u32::MAX).saturating_mul(PAGES_PER_MIB)
    }

    /// What files may still take beside the rest.
    fn room_mib(&self) -> u64 {
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
        // What is planned already belongs to the ending.
        steps.extend(plan.ending());
        steps
    }

    /// A guest as the steps leave it, told by them alone.
    #[derive(Default)]
    struct Model {
        files: BTreeMap<String, PatternFile>,
        names: BTreeSet<String>,
        target: u32,
        /// The most that the balloon may hold until it has settled.
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
            assert!(!self.held || pages <= self.target, "grows beside a hold");
            self.target = pages;
            self.peak = self.peak.max(pages);
            self.fits(0);
        }

        fn settle(&mut self) {
            self.peak = self.target;
        }

        fn apply(&mut self, step: &Step, driver: Driver) {
            match step {
                Step::Target { pages, settle } => {
                    self.target(*pages);
                    if *settle {
                        self.settle();
                    }
                }
                Step::Bounce { touch_mib, high, enough, low, file } => {
                    assert!(!self.held && enough <= high && low <= high);
                    self.settle();
                    self.fits(*touch_mib);
                    self.target(*high);
                    self.target(*low);
                    // It waits until the guest holds that; the touched is free again.
                    self.settle();
                    file.iter().for_each(|file| self.fill(file));
                }
                Step::Fill(file) => self.fill(file),
                Step::Drop(name) => drop(self.files.remove(name).unwrap()),
                Step::Verify(file) => assert_eq!(self.files.get(&file.name), Some(file)),
                Step::Check => self.settle(),
                Step::Mode(mode) => assert_ne!(*mode, ReleaseMode::PerPage),
                Step::Reload { interlude } => {
                    self.fits(interlude.mib);
                    self.held = false;
                    self.settle();
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
        fn no_step_asks_for_what_is_not_there(seed: u64, stock: bool, count in 0usize..400) {
            let driver = if stock { Driver::Stock } else { Driver::Own };
            let mut model = Model::default();
            for step in steps(plan(seed, driver), count) {
                model.apply(&step, driver);
            }
            // All is verified and given back in the end.
            prop_assert_eq!((model.files.len(), model.used_mib(), model.target), (0, 0, 0));
            prop_assert!(!model.fragmented && !model.held);
        }

        #[test]
        fn a_seed_has_one_plan(seed: u64) {
            let again = || steps(plan(seed, Driver::Own), 200);
            prop_assert_eq!(again(), again());
            prop_assert_ne!(again(), steps(plan(seed ^ 1, Driver::Own), 200));
        }

        #[test]
        fn every_byte_is_looked_at_again_and_again(seed: u64) {
            // Each choice is a few steps.
            let seen = steps(plan(seed, Driver::Stock), 400);
            let checks = seen.iter().filter(|step| **step == Step::Check).count();
            prop_assert!(checks >= 400 / 40, "{checks}");
        }
    }

    #[test]
    fn every_kind_of_step_comes() {
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
    fn the_balloon_alone_needs_no_particular_driver() {
        let mut plan = Plan::of_balloon(3, 800);
        let mut model = Model::default();
        for _ in 0..500 {
            let step = plan.next_step();
            // Neither driver can do what is the other's.
            model.apply(&step, Driver::Own);
            model.apply(&Step::Check, Driver::Stock);
            assert!(!matches!(
                step,
                Step::Churn { .. } | Step::Hold { .. } | Step::Snapshot { .. }
            ));
        }
    }
}
