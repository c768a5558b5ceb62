//! Kinds of guests that migrate, and the variations between migrations.

use lab::debian::Release;

use crate::testbed::Driver;

/// A kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its name, and that of its guests.
    pub name: &'static str,
    /// Its kernel. Debian's cloud kernels are built without page poisoning.
    pub release: Release,
    /// Its balloon driver, if any.
    pub driver: Option<Driver>,
    /// Its kernel arguments.
    pub words: &'static [&'static str],
    /// Whether it writes all the time, and faster than the network sends.
    pub busy: bool,
}

const CLOUD: Release = Release::Cloud6_12;
const OWN: Option<Driver> = Some(Driver::Own);
const STOCK: Option<Driver> = Some(Driver::Stock);

/// Kernel arguments that detect changes of free pages.
const CLEARED: &[&str] = &["init_on_free=1"];
const POISONED: &[&str] = &["page_poison=1"];

/// All kinds. Debian's kernels clear allocated pages by default.
pub const CASES: [Case; 9] = [
    Case { name: "own", release: CLOUD, driver: OWN, words: &[], busy: false },
    Case { name: "stock", release: CLOUD, driver: STOCK, words: &[], busy: false },
    Case { name: "own-cleared", release: CLOUD, driver: OWN, words: CLEARED, busy: false },
    Case { name: "stock-cleared", release: CLOUD, driver: STOCK, words: CLEARED, busy: false },
    Case {
        name: "own-poisoned",
        release: Release::Full6_12,
        driver: OWN,
        words: POISONED,
        busy: false,
    },
    Case {
        name: "stock-poisoned",
        release: Release::Full6_12,
        driver: STOCK,
        words: POISONED,
        busy: false,
    },
    Case { name: "no-driver", release: CLOUD, driver: None, words: &[], busy: false },
    Case { name: "own-busy", release: CLOUD, driver: OWN, words: &[], busy: true },
    Case { name: "stock-busy", release: CLOUD, driver: STOCK, words: &[], busy: true },
];

/// Memory options of the destination.
const RECEIVERS: [&[&str]; 3] = [&[], &["--shared"], &["--huge"]];

/// Options of the source. Only our driver can drop caches.
const SENDERS: [&[&str]; 5] = [
    &[],
    &["--compress", "1"],
    &["--connections", "1"],
    &["--drop-caches"],
    &["--send-free", "--connections", "16"],
];

/// A guest that writes faster than the network sends needs a slow network. Else the round ends
/// before it has written anything.
const SLOW: &[&str] = &["--bandwidth", "12MiB"];

/// Balloon target of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Unchanged.
    Stays,
    /// Reaches this percentage of the maximum before the migration.
    Before(u64),
    /// Is set during the migration.
    Meanwhile(u64),
}

const TARGETS: [Target; 7] = [
    Target::Before(100),
    Target::Meanwhile(0),
    Target::Stays,
    Target::Meanwhile(50),
    Target::Stays,
    Target::Meanwhile(100),
    Target::Before(0),
];

/// Options of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) receiver: Vec<&'static str>,
    pub(super) sender: Vec<&'static str>,
    pub(super) target: Target,
}

impl Case {
    /// The kind with this name.
    pub fn named(name: &str) -> Option<Self> {
        CASES.into_iter().find(|case| case.name == name)
    }

    /// Options of migration `number`. The cycle lengths have no common factor, so all combinations
    /// occur within 105 migrations.
    pub(super) fn turn(&self, number: usize) -> Turn {
        fn of<T: Copy>(all: &[T], number: usize) -> T {
            all[number % all.len()]
        }
        let mut sender = of(&SENDERS, number).to_vec();
        if self.driver != OWN {
            sender.retain(|word| *word != "--drop-caches");
        }
        if self.busy {
            sender.extend(SLOW);
        }
        let target = of(&TARGETS, number);
        Turn {
            receiver: of(&RECEIVERS, number).to_vec(),
            sender,
            target: if self.driver.is_some() { target } else { Target::Stays },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_option_combinations_occur() {
        let mut turns: Vec<Turn> = Vec::new();
        for turn in (0..105).map(|number| CASES[0].turn(number)) {
            if !turns.contains(&turn) {
                turns.push(turn);
            }
        }
        // The target is unchanged in two of seven.
        assert_eq!(turns.len(), RECEIVERS.len() * SENDERS.len() * (TARGETS.len() - 1));
        assert!(
            (0..10).all(
                |number| Case::named("no-driver").unwrap().turn(number).target == Target::Stays
            )
        );
        assert!(Case::named("own-busy").unwrap().turn(1).sender.contains(&"12MiB"));
    }
}
