//! Which monitor the demo shows: our own where hardware KVM boots guests, else User Mode Linux.

use lab::kvm;

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// Whatever this machine can do best.
    #[default]
    Auto,
    /// Our own monitor, in a machine with an emulated KVM where there is no other.
    Kvm,
    /// User Mode Linux.
    Uml,
}

/// What is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Our own monitor.
    Kvm {
        /// Whether User Mode Linux does as well, should this fail.
        or_uml: bool,
    },
    /// User Mode Linux.
    Uml {
        /// Why not our own monitor, where nobody asked for this.
        why: Option<String>,
    },
}

/// Chooses. Where a look shows that there can be no hardware KVM, that is all that it takes; else
/// a guest is booted.
pub fn choose(asked: Preference) -> Choice {
    let look = || kvm::look().map_err(|error| error.to_string());
    choose_by(asked, look, kvm::trouble)
}

fn choose_by<'a>(
    asked: Preference,
    look: impl FnOnce() -> Result<(), String>,
    trouble: impl FnOnce() -> Option<&'a str>,
) -> Choice {
    match asked {
        Preference::Kvm => return Choice::Kvm { or_uml: false },
        Preference::Uml => return Choice::Uml { why: None },
        Preference::Auto => {}
    }
    if let Err(why) = look() {
        return Choice::Uml { why: Some(why) };
    }
    match trouble() {
        None => Choice::Kvm { or_uml: true },
        Some(error) => {
            let why = format!("no guest boots on this machine's KVM: {}", in_short(error));
            Choice::Uml { why: Some(why) }
        }
    }
}

/// An error without what a guest printed, which is in the lines below.
fn in_short(error: &str) -> &str {
    let line = error.lines().next().unwrap_or_default();
    line.split_once("; its last lines").map_or(line, |(what, _)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_look() -> Result<(), String> {
        panic!("nobody has to look")
    }

    fn no_boot() -> Option<&'static str> {
        panic!("nobody has to boot anything")
    }

    #[test]
    fn who_asks_for_a_monitor_gets_it_without_a_look() {
        assert_eq!(choose_by(Preference::Kvm, no_look, no_boot), Choice::Kvm { or_uml: false });
        assert_eq!(choose_by(Preference::Uml, no_look, no_boot), Choice::Uml { why: None });
    }

    #[test]
    fn a_machine_without_hardware_kvm_boots_nothing_to_find_out() {
        let choice = choose_by(Preference::Auto, || Err("no vmx".to_owned()), no_boot);
        assert_eq!(choice, Choice::Uml { why: Some("no vmx".to_owned()) });
    }

    #[test]
    fn our_monitor_is_shown_only_where_a_guest_boots() {
        let found = choose_by(Preference::Auto, || Ok(()), || None);
        assert_eq!(found, Choice::Kvm { or_uml: true });
        let ended = "the guest ended (exit status: 1) during `boot`; its last lines:\n[1 s] oops";
        let choice = choose_by(Preference::Auto, || Ok(()), || Some(ended));
        let why =
            "no guest boots on this machine's KVM: the guest ended (exit status: 1) during `boot`";
        assert_eq!(choice, Choice::Uml { why: Some(why.to_owned()) });
    }
}
