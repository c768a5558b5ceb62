//! VMM of the demo: `aerostat run` if hardware KVM boots guests, else User Mode Linux.

use lab::kvm;

/// The user's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// The best that this machine can run.
    #[default]
    Auto,
    /// `aerostat run`, on an emulated KVM if there is no other.
    Kvm,
    /// User Mode Linux.
    Uml,
}

/// The selected VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// `aerostat run`.
    Kvm {
        /// Whether to use User Mode Linux if this fails.
        or_uml: bool,
    },
    /// User Mode Linux.
    Uml {
        /// Why not `aerostat run`, unless the user chose this.
        why: Option<String>,
    },
}

/// Selects the VMM. Checks the preconditions of hardware KVM first, and boots a guest only if they
/// are met.
pub fn choose(preference: Preference) -> Choice {
    let check = || kvm::check().map_err(|error| error.to_string());
    choose_by(preference, check, kvm::unusable)
}

fn choose_by<'a>(
    preference: Preference,
    check: impl FnOnce() -> Result<(), String>,
    unusable: impl FnOnce() -> Option<&'a str>,
) -> Choice {
    match preference {
        Preference::Kvm => return Choice::Kvm { or_uml: false },
        Preference::Uml => return Choice::Uml { why: None },
        Preference::Auto => {}
    }
    if let Err(why) = check() {
        return Choice::Uml { why: Some(why) };
    }
    match unusable() {
        None => Choice::Kvm { or_uml: true },
        Some(error) => {
            let why = format!("no guest boots on this machine's KVM: {}", in_short(error));
            Choice::Uml { why: Some(why) }
        }
    }
}

/// An error without the guest's output on the next lines.
fn in_short(error: &str) -> &str {
    let line = error.lines().next().unwrap_or_default();
    line.split_once("; its last lines").map_or(line, |(what, _)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_check() -> Result<(), String> {
        panic!("no check is needed")
    }

    fn no_boot() -> Option<&'static str> {
        panic!("no boot is needed")
    }

    #[test]
    fn an_explicit_choice_needs_no_check() {
        assert_eq!(choose_by(Preference::Kvm, no_check, no_boot), Choice::Kvm { or_uml: false });
        assert_eq!(choose_by(Preference::Uml, no_check, no_boot), Choice::Uml { why: None });
    }

    #[test]
    fn a_machine_without_hardware_kvm_boots_no_probe() {
        let choice = choose_by(Preference::Auto, || Err("no vmx".to_owned()), no_boot);
        assert_eq!(choice, Choice::Uml { why: Some("no vmx".to_owned()) });
    }

    #[test]
    fn kvm_is_selected_only_if_a_guest_boots() {
        let found = choose_by(Preference::Auto, || Ok(()), || None);
        assert_eq!(found, Choice::Kvm { or_uml: true });
        let ended = "the guest ended (exit status: 1) during `boot`; its last lines:\n[1 s] oops";
        let choice = choose_by(Preference::Auto, || Ok(()), || Some(ended));
        let why =
            "no guest boots on this machine's KVM: the guest ended (exit status: 1) during `boot`";
        assert_eq!(choice, Choice::Uml { why: Some(why.to_owned()) });
    }
}
