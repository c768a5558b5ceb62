//! What a soak did and found.

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
    /// Repeats it.
    pub seed: u64,
    /// Memory of each guest.
    pub memory_mib: u64,
    /// One for each guest.
    pub guests: Vec<GuestReport>,
    /// All that went wrong; a good soak has none.
    pub problems: Vec<String>,
}

/// One guest's part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestReport {
    /// Its name: driver and backing.
    pub name: String,
    /// Its driver.
    pub driver: Driver,
    /// The host's pages behind it.
    pub backing: HostPages,
    /// How long the walk took, without booting and the last look.
    pub walked_s: f64,
    /// What was done and seen.
    #[serde(flatten)]
    pub tally: Tally,
    /// What the guest reported by itself and the host released.
    pub reported_bytes: u64,
    /// What the device counted.
    pub faults: Faults,
    /// Lines of the guest's log that complain.
    pub guest_complaints: Vec<String>,
    /// Lines of the back end's log that complain.
    pub backend_complaints: Vec<String>,
    /// Memory of the back end.
    pub resident: Resident,
    /// What ended the walk before its time.
    pub failure: Option<String>,
    /// Where its logs are, where something went wrong.
    pub logs: Option<PathBuf>,
}

impl Report {
    /// Sums up what `expected` guests did, of which some may have told nothing.
    pub(super) fn new(options: &SoakOptions, expected: usize, guests: Vec<GuestReport>) -> Self {
        let mut problems: Vec<String> = guests.iter().flat_map(GuestReport::problems).collect();
        if guests.len() < expected {
            problems.push(format!("{} guests told nothing", expected - guests.len()));
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

    /// All that went wrong with this guest.
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
                problems.push(format!("{} complaints of the {whose}: {first}", lines.len()));
            }
        }
        // Of a walk that failed, what there is of it says nothing of the memory.
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
    fn each_thing_that_is_wrong_is_a_problem() {
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
    fn a_guest_that_tells_nothing_is_a_problem() {
        let options = SoakOptions {
            program: "aerostat".into(),
            duration: std::time::Duration::ZERO,
            seed: 7,
            drivers: vec![Driver::Own],
            backings: vec![HostPages::Small],
            memory_mib: 512,
        };
        assert!(Report::new(&options, 1, vec![good()]).problems.is_empty());
        assert_eq!(Report::new(&options, 2, vec![good()]).problems, ["1 guests told nothing"]);
    }
}
