//! Kinds of guests that are moved, and what differs from one move to the next.

use lab::debian::Release;

use crate::testbed::Driver;

/// A kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its name, and that of its guests.
    pub name: &'static str,
    /// Its kernel. Debian builds those for clouds without page poisoning.
    pub release: Release,
    /// What serves the balloon in it, if anything does.
    pub driver: Option<Driver>,
    /// Words for its kernel.
    pub words: &'static [&'static str],
    /// It writes all the time, and faster than can be sent.
    pub busy: bool,
}

const CLOUD: Release = Release::Cloud6_12;
const OWN: Option<Driver> = Some(Driver::Own);
const STOCK: Option<Driver> = Some(Driver::Stock);

/// What finds in a free page what was not there when it was freed.
const CLEARED: &[&str] = &["init_on_free=1"];
const POISONED: &[&str] = &["page_poison=1"];

/// All kinds. Without words a kernel clears what it allocates, as Debian's do.
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

/// What backs the memory of a guest that comes.
const RECEIVERS: [&[&str]; 3] = [&[], &["--shared"], &["--huge"]];

/// How it is sent. Only our driver can be asked to drop caches.
const SENDERS: [&[&str]; 5] = [
    &[],
    &["--compress", "1"],
    &["--connections", "1"],
    &["--drop-caches"],
    &["--send-free", "--connections", "16"],
];

/// For a guest that writes faster than can be sent it takes a network that is slow, or the round is
/// over before it has written anything.
const SLOW: &[&str] = &["--bandwidth", "12MiB"];

/// What becomes of the balloon around a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// It stays.
    Stays,
    /// Reaches this part of what it can be, in per cent, before the guest leaves.
    Before(u64),
    /// Is asked for while the guest is on its way.
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

/// One move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) receiver: Vec<&'static str>,
    pub(super) sender: Vec<&'static str>,
    pub(super) target: Target,
}

impl Case {
    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        CASES.into_iter().find(|case| case.name == name)
    }

    /// The move with this number. The cycles have lengths that share no factor, so that everything
    /// comes together with everything within 105 moves.
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
    fn everything_comes_together_with_everything() {
        let mut turns: Vec<Turn> = Vec::new();
        for turn in (0..105).map(|number| CASES[0].turn(number)) {
            if !turns.contains(&turn) {
                turns.push(turn);
            }
        }
        // The balloon stays in two of the seven.
        assert_eq!(turns.len(), RECEIVERS.len() * SENDERS.len() * (TARGETS.len() - 1));
        assert!(
            (0..10).all(
                |number| Case::named("no-driver").unwrap().turn(number).target == Target::Stays
            )
        );
        assert!(Case::named("own-busy").unwrap().turn(1).sender.contains(&"12MiB"));
    }
}
