//! Report of a soak.

use std::path::PathBuf;

use control::Faults;
use serde::{Deserialize, Serialize};

use super::SoakOptions;
use super::resident::{MAX_RISE_BYTES, Resident};
use super::soak_run::Tally;
use crate::inflate::HostPages;
use crate::testbed::Driver;

/// What `soak --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Seed, to repeat the soak.
    pub seed: u64,
    /// Memory of each guest.
    pub memory_mib: u64,
    /// One per guest.
    pub guests: Vec<GuestReport>,
    /// All problems. A good soak has none.
    pub problems: Vec<String>,
}

/// Report of one guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestReport {
    /// Its name: driver and backing.
    pub name: String,
    /// Its driver.
    pub driver: Driver,
    /// The host's page size.
    pub backing: HostPages,
    /// Duration of the steps, without boot and final verification.
    pub walked_s: f64,
    /// Steps and results.
    #[serde(flatten)]
    pub tally: Tally,
    /// Memory released by free page reporting.
    pub reported_bytes: u64,
    /// Faults that the device counted.
    pub faults: Faults,
    /// Error lines of the guest's log.
    pub guest_complaints: Vec<String>,
    /// Error lines of the back end's log.
    pub backend_complaints: Vec<String>,
    /// Memory of the back end.
    pub resident: Resident,
    /// The error that ended the soak early.
    pub failure: Option<String>,
    /// Directory of its logs, if there are problems.
    pub logs: Option<PathBuf>,
}

impl Report {
    /// Sums up the reports. `expected` is the number of guests, some of which may have none.
    pub(super) fn new(options: &SoakOptions, expected: usize, guests: Vec<GuestReport>) -> Self {
        let mut problems: Vec<String> = guests.iter().flat_map(GuestReport::problems).collect();
        if guests.len() < expected {
            problems.push(format!("{} guests have no report", expected - guests.len()));
        }
        Self { seed: options.seed, memory_mib: options.memory_mib, guests, problems }
    }
}

impl GuestReport {
    pub(super) fn new(name: &str, driver: Driver, backing: HostPages) -> Self {
        Self {
            name: name.to_owned(),
            driver,
            backing,
            walked_s: 0.0,
            tally: Tally::default(),
            reported_bytes: 0,
            faults: Faults::default(),
            guest_complaints: Vec::new(),
            backend_complaints: Vec::new(),
            resident: Resident::default(),
            failure: None,
            logs: None,
        }
    }

    /// Problems of this guest.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.failure.iter().cloned().collect();
        for (kind, count) in self.tally.steps.iter().filter(|(_, count)| count.failed > 0) {
            problems.push(format!("{} of {} steps of {kind} failed", count.failed, count.steps));
        }
        if self.tally.wrong_pages > 0 {
            problems.push(format!("{} wrong pages", self.tally.wrong_pages));
        }
        if self.faults.total() > 0 {
            problems.push(format!("the device counted faults: {:?}", self.faults));
        }
        for (whose, lines) in
            [("guest", &self.guest_complaints), ("back end", &self.backend_complaints)]
        {
            if let Some(first) = lines.first() {
                problems.push(format!("{} error lines of the {whose}: {first}", lines.len()));
            }
        }
        // The samples of a failed run are too few to judge the memory.
        if self.failure.is_none() && !self.resident.flat {
            problems.push(format!(
                "the back end's memory is not flat: it rose by {:.0} KiB, {:.0} are allowed",
                self.resident.rise_bytes / 1024.0,
                MAX_RISE_BYTES / 1024.0
            ));
        }
        problems.iter().map(|problem| format!("{}: {problem}", self.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::soak_run::Count;
    use super::*;

    fn good() -> GuestReport {
        let mut guest = GuestReport::new("own-4k", Driver::Own, HostPages::Small);
        guest.resident.flat = true;
        guest.tally.steps.insert("target".to_owned(), Count { steps: 3, failed: 0 });
        guest
    }

    #[test]
    fn a_good_guest_has_no_problem() {
        assert_eq!(good().problems(), Vec::<String>::new());
    }

    #[test]
    fn every_error_is_a_problem() {
        type Make = fn(&mut GuestReport);
        let wrongs: [(&str, Make); 7] = [
            ("ended", |guest| guest.failure = Some("the guest ended".to_owned())),
            ("2 of 5 steps of fill failed", |guest| {
                guest.tally.steps.insert("fill".to_owned(), Count { steps: 5, failed: 2 });
            }),
            ("1 wrong pages", |guest| guest.tally.wrong_pages = 1),
            ("faults", |guest| {
                guest.faults.guest.insert("malformed".to_owned(), 1);
            }),
            ("of the guest", |guest| guest.guest_complaints.push("BUG".to_owned())),
            ("of the back end", |guest| guest.backend_complaints.push("WARN".to_owned())),
            ("not flat", |guest| guest.resident.flat = false),
        ];
        for (word, make) in wrongs {
            let mut guest = good();
            make(&mut guest);
            let problems = guest.problems();
            assert_eq!(problems.len(), 1, "{word}: {problems:?}");
            assert!(problems[0].starts_with("own-4k: ") && problems[0].contains(word), "{word}");
        }
    }

    #[test]
    fn a_guest_without_a_report_is_a_problem() {
        let options = SoakOptions {
            program: "aerostat".into(),
            duration: std::time::Duration::ZERO,
            seed: 7,
            drivers: vec![Driver::Own],
            backings: vec![HostPages::Small],
            memory_mib: 512,
        };
        assert!(Report::new(&options, 1, vec![good()]).problems.is_empty());
        assert_eq!(Report::new(&options, 2, vec![good()]).problems, ["1 guests have no report"]);
    }
}
