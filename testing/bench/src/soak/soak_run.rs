//! Executes a plan on a guest and its balloon, and checks the invariants.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use control::api::{Caches, FreeKind, FreePagesRequest};
use control::{ControlError, HintOutcome, Status};
use serde::{Deserialize, Serialize};

use super::plan::{PatternFile, Plan, Step};
use crate::error::{BenchError, Result};
use crate::fixture::Fixture;
use crate::host::LIMIT;
use crate::testbed::Driver;

/// Part of the guest's memory that is not fragmented. A part of free memory would be nothing during
/// a hold.
const UNFRAGMENTED_DIVISOR: u64 = 8;

/// Part of the guest's memory that Linux may keep in per-CPU lists, above all after the stock
/// driver deflated single pages: `MemFree` does not count it.
const UNCOUNTED_DIVISOR: u64 = 8;

/// Memory that the guest may use meanwhile.
const SLACK_MIB: u64 = 32;

/// Prints the free blocks of each order. The last column is order 10, 4 MiB.
const FREE_BLOCKS: &str = "cat /proc/buddyinfo";
const BLOCK_MIB: u64 = 4;

/// Minimum memory in touched whole blocks for which a report is expected.
const LEAST_REPORTED_MIB: u64 = 64;

/// Between two commands to the guest.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Number of steps of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Started.
    pub steps: u64,
    /// Failed.
    pub failed: u64,
}

/// Results so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Steps by kind.
    pub steps: BTreeMap<String, Count>,
    /// Verified bytes.
    pub verified_bytes: u64,
    /// Pages with wrong contents.
    pub wrong_pages: u64,
}

impl Tally {
    fn verified_mib(&mut self, mib: u64) {
        self.verified_bytes += mib << 20;
    }

    /// Steps of all kinds.
    pub fn steps_begun(&self) -> u64 {
        self.steps.values().map(|count| count.steps).sum()
    }
}

/// Execution of a plan on a guest with its driver loaded.
pub struct SoakRun<'a, 'b> {
    fixture: &'a mut Fixture<'b>,
    plan: Plan,
    /// Existing files.
    files: BTreeMap<String, PatternFile>,
    churn_mib: u64,
    tally: Tally,
}

impl<'a, 'b> SoakRun<'a, 'b> {
    /// Starts with an empty balloon and no files.
    pub fn new(fixture: &'a mut Fixture<'b>, plan: Plan) -> Self {
        Self { fixture, plan, files: BTreeMap::new(), churn_mib: 0, tally: Tally::default() }
    }

    /// Executes the next step. Calls `started` with it first.
    ///
    /// # Errors
    /// The step fails. The guest's state then differs from the plan's.
    pub fn step(&mut self, started: &mut dyn FnMut(&Step)) -> Result<()> {
        let step = self.plan.next_step();
        self.take(&step, started)
    }

    /// Waits for the balloon and verifies every byte of every file.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn check(&mut self) -> Result<()> {
        self.fixture.host.wait_at_target()?;
        let files: Vec<_> = self.files.values().cloned().collect();
        files.iter().try_for_each(|file| self.verify(file))
    }

    /// Empties the balloon, verifies all files, and frees them.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn end(&mut self, started: &mut dyn FnMut(&Step)) -> Result<()> {
        for step in self.plan.clone().ending() {
            self.take(&step, started)?;
        }
        Ok(())
    }

    /// Results so far.
    pub const fn tally(&self) -> &Tally {
        &self.tally
    }

    fn take(&mut self, step: &Step, started: &mut dyn FnMut(&Step)) -> Result<()> {
        started(step);
        let done = self.act(step);
        let count = self.tally.steps.entry(step.name().to_owned()).or_default();
        count.steps += 1;
        count.failed += u64::from(done.is_err());
        if let Err(BenchError::WrongPages { pages, .. }) = &done {
            self.tally.wrong_pages += pages;
        }
        done
    }

    fn act(&mut self, step: &Step) -> Result<()> {
        let host = self.fixture.host;
        match step {
            Step::Target { pages, wait } => {
                host.set_target(*pages)?;
                if *wait {
                    host.wait_at_target()?;
                }
                Ok(())
            }
            Step::Bounce { touch_mib, high, enough, low, file } => {
                self.bounce(*touch_mib, [*high, *enough, *low], file.as_ref())
            }
            Step::Fill(file) => self.fill(file),
            Step::Drop(name) => {
                self.files.remove(name);
                self.fixture.run(&format!("drop {name}")).map(drop)
            }
            Step::Verify(file) => self.verify(file),
            Step::Check => self.check(),
            Step::Mode(mode) => Ok(host.client.set_release(*mode).map(drop)?),
            Step::Reload { interlude } => self.reload(interlude),
            Step::Fragment => self.fixture.fragment(host.memory_mib() / UNFRAGMENTED_DIVISOR),
            Step::Defragment => self.fixture.defragment(),
            Step::Churn { mib, seed } => {
                self.churn_mib = *mib;
                self.fixture.run(&format!("churn {mib} {seed}")).map(drop)
            }
            Step::Calm => self.calm(),
            Step::Hints => self.hints(),
            Step::Reports { touch_mib } => self.reports(*touch_mib),
            Step::Statistics { interval_ms } => self.statistics(*interval_ms),
            Step::DropCaches(what) => self.drop_caches(*what),
            Step::Snapshot { min_block_bytes } => {
                self.free_pages(FreeKind::Snapshot, *min_block_bytes, None)
            }
            Step::Hold { reserve_mib } => {
                self.free_pages(FreeKind::Hold, None, Some(reserve_mib << 20))
            }
            Step::ReleaseHold => self.release_hold(),
        }
    }

    fn bounce(
        &mut self,
        touch_mib: u64,
        [high, enough, low]: [u32; 3],
        file: Option<&PatternFile>,
    ) -> Result<()> {
        let host = self.fixture.host;
        host.wait_at_target()?;
        self.fixture.run(&format!("touch {touch_mib}"))?;
        host.set_target(high)?;
        host.until("inflating", |status| status.balloon.actual_pages >= enough)?;
        host.set_target(low)?;
        // Does not wait for the release, as the guest does not.
        host.until("down again", |status| status.balloon.actual_pages == low)?;
        match file {
            Some(file) => self.fill(file).and_then(|()| self.verify(file)),
            None => Ok(()),
        }
    }

    fn reload(&mut self, interlude: &PatternFile) -> Result<()> {
        let host = self.fixture.host;
        self.fixture.unload_driver()?;
        let actual_pages = host.status()?.balloon.actual_pages;
        if actual_pages != 0 {
            let name = host.name().to_owned();
            return Err(BenchError::NotReached { name, actual_pages, target_pages: 0 });
        }
        self.fill(interlude)?;
        self.verify(interlude)?;
        self.files.remove(&interlude.name);
        self.fixture.run(&format!("drop {}", interlude.name))?;
        self.fixture.load_ready_driver()
    }

    fn fill(&mut self, file: &PatternFile) -> Result<()> {
        let PatternFile { name, mib, seed } = file;
        self.fixture.run(&format!("fill {name} {mib} {seed}"))?;
        self.files.insert(name.clone(), file.clone());
        Ok(())
    }

    fn verify(&mut self, file: &PatternFile) -> Result<()> {
        self.tally.verified_mib(file.mib);
        self.fixture.verify(&file.name, file.mib, file.seed)
    }

    fn calm(&mut self) -> Result<()> {
        let reply = self.fixture.guest.run("calm")?;
        self.churn_mib = 0;
        let number = |name| {
            let word = reply.text.split_whitespace().find_map(|word| word.strip_prefix(name));
            word.and_then(|word| word.parse::<u64>().ok())
        };
        let (Some(pages), Some(wrong)) = (number("pages="), number("wrong=")) else {
            let command = "calm".to_owned();
            return Err(BenchError::GuestAnswer { command, answer: reply.text });
        };
        self.tally.verified_bytes += pages * control::BALLOON_PAGE_BYTES;
        match wrong {
            0 => Ok(()),
            _ => Err(self.fixture.wrong_pages("the churn file", wrong, reply.lines)),
        }
    }

    fn hints(&mut self) -> Result<()> {
        let host = self.fixture.host;
        self.wait_for_driver()?;
        let before_mib = self.free_or_in_balloon_mib()?;
        let hints = host.client.hints(LIMIT)?;
        if hints.outcome != HintOutcome::Complete {
            return Err(host.timeout_error("given hints", host.status()?));
        }
        // The stock driver returns the pages a moment after the end. LazyRestore free memory before
        // that would exhaust it.
        let enough = before_mib.saturating_sub(SLACK_MIB + self.uncounted_mib());
        let end = Instant::now() + LIMIT;
        while self.free_or_in_balloon_mib()? < enough {
            if Instant::now() >= end {
                let what = format!("free of hints ({enough} of {before_mib} MiB)");
                return Err(host.timeout_error(&what, host.status()?));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Tolerance of the guest's free memory.
    fn uncounted_mib(&self) -> u64 {
        self.churn_mib + self.fixture.host.memory_mib() / UNCOUNTED_DIVISOR
    }

    /// Free and ballooned memory, a constant while the balloon changes.
    fn free_or_in_balloon_mib(&mut self) -> Result<u64> {
        let balloon_bytes = self.fixture.host.status()?.balloon.actual_bytes;
        Ok(self.fixture.free_mib()? + (balloon_bytes >> 20))
    }

    fn reports(&mut self, touch_mib: u64) -> Result<()> {
        let host = self.fixture.host;
        self.wait_for_driver()?;
        let before = host.status()?.reports.messages;
        let (free_mib, blocks_mib) = (self.fixture.free_mib()?, self.whole_blocks_mib()?);
        self.fixture.run(&format!("touch {touch_mib}"))?;
        // Linux reports whole blocks used since the last report. Fragmented free memory is touched
        // first, so more must be touched to reach whole blocks.
        let pieces_mib = free_mib.saturating_sub(blocks_mib) + self.uncounted_mib();
        if touch_mib < pieces_mib + LEAST_REPORTED_MIB {
            return Ok(());
        }
        let reported = host.until("reported", |status| status.reports.messages > before);
        match reported {
            Err(BenchError::NotInTime { name, what, status, log }) => {
                let free = self.fixture.guest.run(FREE_BLOCKS)?.lines.join("; ");
                let what = format!("{what} ({touch_mib} MiB touched, free blocks: {free})");
                Err(BenchError::NotInTime { name, what, status, log })
            }
            other => other.map(drop),
        }
    }

    /// Free memory in blocks of the guest allocator's largest order.
    fn whole_blocks_mib(&mut self) -> Result<u64> {
        let reply = self.fixture.guest.run(FREE_BLOCKS)?;
        let of_zone = |line: &String| line.split_whitespace().next_back()?.parse::<u64>().ok();
        let blocks = reply.lines.iter().map(of_zone).sum::<Option<u64>>();
        blocks.map(|blocks| blocks * BLOCK_MIB).ok_or_else(|| BenchError::GuestAnswer {
            command: FREE_BLOCKS.to_owned(),
            answer: reply.lines.join("; "),
        })
    }

    /// Waits for statistics taken after this call: the next may be on their way, so those after
    /// them.
    fn statistics(&mut self, interval_ms: u64) -> Result<()> {
        let host = self.fixture.host;
        self.wait_for_driver()?;
        host.client.set_stats(interval_ms)?;
        for _ in 0..2 {
            let asked = Instant::now();
            host.until("reporting statistics", |status| {
                let age = status.stats.age_ms.map(Duration::from_millis);
                // The age is in whole milliseconds, rounded down.
                let age = age.map(|age| age + Duration::from_millis(1));
                !status.stats.stale && age.is_some_and(|age| age < asked.elapsed())
            })?;
        }
        Ok(())
    }

    fn drop_caches(&mut self, what: Caches) -> Result<()> {
        self.wait_for_driver()?;
        Ok(self.fixture.host.client.drop_caches(what, LIMIT).map(drop)?)
    }

    fn free_pages(
        &mut self,
        kind: FreeKind,
        min_block_bytes: Option<u64>,
        reserve_bytes: Option<u64>,
    ) -> Result<()> {
        self.wait_for_driver()?;
        let timeout_ms = u64::try_from(LIMIT.as_millis()).unwrap_or(u64::MAX);
        let ask = FreePagesRequest { kind, min_block_bytes, reserve_bytes, timeout_ms };
        Ok(self.fixture.host.client.request_free_pages(&ask).map(drop)?)
    }

    fn release_hold(&mut self) -> Result<()> {
        let host = self.fixture.host;
        match host.client.release_free_pages(LIMIT) {
            // The guest has taken it back.
            Err(ControlError::Answered { .. }) if host.status()?.requests.hold.is_none() => Ok(()),
            outcome => Ok(outcome.map(drop)?),
        }
    }

    /// Waits until the driver accepts requests. It may be loading.
    fn wait_for_driver(&self) -> Result<()> {
        let driver = self.fixture.driver;
        let is_there = |status: &Status| match driver {
            Driver::Stock => status.guest.features.iter().any(|name| name == "free-page-hint"),
            Driver::Own => status.requests.possible,
        };
        self.fixture.host.until("ready for requests", is_there).map(drop)
    }
}
