//! Report of migrations and faults.

use control::api::MigrationStatus;
use serde::{Deserialize, Serialize};

use crate::sample::Spread;

/// Number of quoted error lines. The others are counted.
const NAMED: usize = 5;

/// Report of all kinds of guests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Reports per kind of guest, of migrations and of faults.
    pub cases: Vec<CaseReport>,
    /// All problems, one line each.
    pub problems: Vec<String>,
}

/// Report of one kind of guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The kind.
    pub name: String,
    /// Successful migrations.
    pub moves: u64,
    /// Their duration.
    pub total_ms: Spread,
    /// Downtime.
    pub downtime_ms: Spread,
    /// Sent page contents, in total.
    pub sent_bytes: u64,
    /// Bytes on the network, in total.
    pub wire_bytes: u64,
    /// Maximum rounds of a migration.
    pub most_rounds: u64,
    /// Maximum vCPU throttling, in percent.
    pub most_throttle: u8,
    /// Commands that the guest answered during migrations.
    pub answered: u64,
    /// Commands typed after the guest had left, and lost.
    pub unheard: u64,
    /// Verified bytes.
    pub verified_bytes: u64,
    /// Pages with wrong contents.
    pub wrong_pages: u64,
    /// Injected faults by outcome.
    pub faults: Vec<FaultCount>,
    /// Seed of the faults.
    pub seed: Option<u64>,
    /// Error lines of guests and VMMs.
    pub complaints: Vec<String>,
    /// Total time, in seconds.
    pub took_s: f64,
    /// The error that ended it early.
    pub failure: Option<String>,
    #[serde(default, skip)]
    samples: Vec<(f64, f64)>,
}

/// Number of faults with the same outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCount {
    /// Stage, fault and outcome.
    pub what: String,
    /// Their number.
    pub count: u64,
}

impl Report {
    /// Sums up the cases.
    pub fn new(cases: Vec<CaseReport>) -> Self {
        let problems = cases.iter().flat_map(CaseReport::problems).collect();
        Self { cases, problems }
    }
}

impl CaseReport {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Adds a successful migration.
    pub(super) fn add(&mut self, status: &MigrationStatus) {
        let summary = status.summary.clone().unwrap_or_default();
        self.moves += 1;
        self.samples.push((summary.total_ms, summary.downtime.total_ms));
        self.total_ms = Spread::of(self.samples.iter().map(|sample| sample.0));
        self.downtime_ms = Spread::of(self.samples.iter().map(|sample| sample.1));
        self.sent_bytes += summary.sent_bytes;
        self.wire_bytes += summary.wire_bytes;
        self.most_rounds = self.most_rounds.max(summary.rounds.len() as u64);
        self.most_throttle = self.most_throttle.max(summary.throttle_percent);
    }

    /// Adds a fault with its outcome.
    pub(super) fn count_fault(&mut self, what: &str) {
        match self.faults.iter_mut().find(|fault| fault.what == what) {
            Some(fault) => fault.count += 1,
            None => self.faults.push(FaultCount { what: what.to_owned(), count: 1 }),
        }
    }

    /// All problems.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.failure.iter().cloned().collect();
        if self.wrong_pages > 0 {
            problems.push(format!("{} wrong pages", self.wrong_pages));
        }
        if !self.complaints.is_empty() {
            let some: Vec<&str> =
                self.complaints.iter().take(NAMED).map(|line| line.trim_end()).collect();
            problems.push(format!("{} error lines: {}", self.complaints.len(), some.join("; ")));
        }
        problems.iter().map(|problem| format!("{}: {problem}", self.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_is_a_problem() {
        let good = CaseReport::new("own");
        assert!(good.problems().is_empty());
        let wrongs = [
            CaseReport { failure: Some("ended".into()), ..good.clone() },
            CaseReport { wrong_pages: 1, ..good.clone() },
            CaseReport { complaints: vec!["BUG".into()], ..good },
        ];
        let problems = Report::new(wrongs.to_vec()).problems;
        assert_eq!(problems, ["own: ended", "own: 1 wrong pages", "own: 1 error lines: BUG"]);
    }

    #[test]
    fn faults_with_the_same_outcome_are_counted_together() {
        let mut report = CaseReport::new("own");
        ["cut", "stalled", "cut"].iter().for_each(|what| report.count_fault(what));
        let counts: Vec<_> = report.faults.iter().map(|fault| fault.count).collect();
        assert_eq!(counts, [2, 1]);
    }
}
