//! What came of moving guests.

use control::api::MigrationStatus;
use serde::{Deserialize, Serialize};

use crate::sample::Spread;

/// Complaints that are quoted; the others are counted.
const NAMED: usize = 5;

/// What came of all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Each kind of guest: what came of moving it, and of letting its migrations fail.
    pub cases: Vec<CaseReport>,
    /// Everything that went wrong, in a line each; empty where nothing did.
    pub problems: Vec<String>,
}

/// What came of one kind of guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The kind.
    pub name: String,
    /// Moves that went well.
    pub moves: u64,
    /// How long they took.
    pub total_ms: Spread,
    /// How long the guest stood still.
    pub downtime_ms: Spread,
    /// Contents that were sent, in all moves together.
    pub sent_bytes: u64,
    /// On the network, in all moves together.
    pub wire_bytes: u64,
    /// Most rounds of a move.
    pub most_rounds: u64,
    /// How far the guest was held back at most, in per cent.
    pub most_throttle: u8,
    /// What the guest was asked while it was on its way, and answered.
    pub answered: u64,
    /// What was typed while nobody was there to hear it.
    pub unheard: u64,
    /// Bytes whose contents were looked at.
    pub verified_bytes: u64,
    /// Pages that did not hold what the guest had written.
    pub wrong_pages: u64,
    /// Faults of the network or of a side, by what came of them.
    pub faults: Vec<FaultCount>,
    /// What they were chosen by.
    pub seed: Option<u64>,
    /// Lines of guests and monitors that complain.
    pub complaints: Vec<String>,
    /// How long it took.
    pub took_s: f64,
    /// What ended it before its time.
    pub failure: Option<String>,
    #[serde(default, skip)]
    samples: Vec<(f64, f64)>,
}

/// Faults of a kind that ended in the same way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCount {
    /// What was done, when, and what came of it.
    pub what: String,
    /// How often.
    pub count: u64,
}

impl Report {
    /// Sums up.
    pub fn new(cases: Vec<CaseReport>) -> Self {
        let problems = cases.iter().flat_map(CaseReport::problems).collect();
        Self { cases, problems }
    }
}

impl CaseReport {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// One more move that went well.
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

    /// One more fault, with what came of it.
    pub(super) fn count_fault(&mut self, what: &str) {
        match self.faults.iter_mut().find(|fault| fault.what == what) {
            Some(fault) => fault.count += 1,
            None => self.faults.push(FaultCount { what: what.to_owned(), count: 1 }),
        }
    }

    /// All that went wrong.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.failure.iter().cloned().collect();
        if self.wrong_pages > 0 {
            problems.push(format!("{} wrong pages", self.wrong_pages));
        }
        if !self.complaints.is_empty() {
            let some: Vec<&str> =
                self.complaints.iter().take(NAMED).map(|line| line.trim_end()).collect();
            problems.push(format!("{} complaints: {}", self.complaints.len(), some.join("; ")));
        }
        problems.iter().map(|problem| format!("{}: {problem}", self.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_that_is_wrong_is_a_problem() {
        let good = CaseReport::new("own");
        assert!(good.problems().is_empty());
        let wrongs = [
            CaseReport { failure: Some("ended".into()), ..good.clone() },
            CaseReport { wrong_pages: 1, ..good.clone() },
            CaseReport { complaints: vec!["BUG".into()], ..good },
        ];
        let problems = Report::new(wrongs.to_vec()).problems;
        assert_eq!(problems, ["own: ended", "own: 1 wrong pages", "own: 1 complaints: BUG"]);
    }

    #[test]
    fn faults_of_a_kind_are_counted_together() {
        let mut report = CaseReport::new("own");
        ["cut", "stalled", "cut"].iter().for_each(|what| report.count_fault(what));
        let counts: Vec<_> = report.faults.iter().map(|fault| fault.count).collect();
        assert_eq!(counts, [2, 1]);
    }
}
