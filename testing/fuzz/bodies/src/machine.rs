//! Machine descriptions and states of a hostile peer.

use vmm::raw::{self, Devices};
use vmm::{MAX_CPUS, Section};

use crate::script::Script;

/// Memory of the machine, in bytes: the minimum.
const MEMORY_BYTES: u64 = 32 << 20;

/// vCPUs of the machine.
const CPUS: u8 = 1;

/// Changes of one script.
const MAX_CHANGES: usize = 32;

/// Widths of the numbers to change, in bytes.
const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// A description or a state.
///
/// # Panics
/// An invariant does not hold.
pub fn machine(data: &[u8]) {
    let mut script = Script::new(data);
    if script.pick([false, true, true, true]) {
        state(&mut script)
    } else {
        description(&mut script)
    }
}

fn description(script: &mut Script<'_>) {
    let cpus = script.pick([1, 2, 64, 0, 65, 255]);
    let memory_bytes = match script.u8() % 6 {
        0 => MEMORY_BYTES,
        1 => 4 << 30,
        2 => vmm::MAX_MEMORY_BYTES,
        3 => u64::MAX,
        4 => script.u64(),
        _ => u64::from(script.u16()) << 20,
    };
    // Impossible memory layouts are rejected before the description.
    let Ok(mut description) = raw::description(cpus, memory_bytes) else { return };
    let honest = description.clone();
    let max_cpus = script.pick([MAX_CPUS, 1, 2]);
    if script.flag() {
        change(script, &mut description.config);
    }
    match raw::take_description(&description, max_cpus) {
        Ok((cpus, memory_bytes)) => {
            assert!((1..=max_cpus).contains(&cpus) && memory_bytes <= vmm::MAX_MEMORY_BYTES);
            let pages = memory_bytes / 4096;
            assert_eq!(pages, description.layout.pages(), "memory differs from the description");
        }
        Err(error) => {
            // Exceeding the operator's limits is the operator's fault.
            let text = error.to_string();
            assert!(text.starts_with("sender: ") || text.starts_with("operator: "), "{text}");
            let is_honest = description == honest && (1..=max_cpus).contains(&cpus);
            assert!(!is_honest, "{error}");
        }
    }
}

fn state(script: &mut Script<'_>) {
    let mut devices = devices();
    let mut sections = devices.state();
    let honest = sections.clone();
    for _ in 0..MAX_CHANGES {
        if script.is_over() {
            break;
        }
        step(script, &mut sections);
    }
    match devices.take(&sections) {
        Ok(taken) => {
            // A state has several valid forms, and one canonical form.
            let again = self::devices().take(&taken);
            let is_same = again.is_ok_and(|again| again == taken);
            assert!(is_same, "the state saved again differs");
        }
        Err(error) => {
            assert!(error.to_string().starts_with("sender: "), "{error}");
            assert!(sections != honest, "{error}");
        }
    }
    assert!(devices.holds_only_memory());
}

/// Devices of a small machine.
fn devices() -> Devices {
    Devices::new(CPUS, MEMORY_BYTES).expect("a small machine")
}

fn step(script: &mut Script<'_>, sections: &mut Vec<Section>) {
    // Transport and balloon more often than state that KVM validates.
    let names = ["virtio0", "balloon", "virtio0", "balloon", "ports", "irqchip", "cpu0", "cpu1"];
    let name = script.pick(names);
    let at = sections.iter().position(|section| section.name == name);
    let what = script.u8() % 16;
    let Some(at) = at else {
        if what == 0 {
            let bytes = script.string().to_vec();
            sections.push(Section { name: name.to_owned(), version: 1, bytes });
        }
        return;
    };
    match what {
        0 => drop(sections.remove(at)),
        1 => sections.push(sections[at].clone()),
        2 => sections[at].version = u32::from(script.u8()),
        3 => sections[at].bytes = script.string().to_vec(),
        4 => sections.swap(at, 0),
        _ => change(script, &mut sections[at].bytes),
    }
}

/// Writes a number somewhere, truncates, or appends.
fn change(script: &mut Script<'_>, bytes: &mut Vec<u8>) {
    let at = usize::from(script.u16()) % bytes.len().max(1);
    match script.u8() % 8 {
        0 => bytes.truncate(at),
        1 => bytes.extend_from_slice(script.string()),
        2 => {
            let string = script.string();
            bytes.iter_mut().skip(at).zip(string).for_each(|(byte, new)| *byte = *new);
        }
        _ => {
            let number = match script.u8() % 8 {
                0 => 0,
                1 => u64::MAX,
                2 => 1,
                3 => 1 << (script.u8() % 64),
                4 => u64::from(script.u8()) << 12,
                _ => u64::from(script.u16()),
            };
            let width = script.pick(WIDTHS);
            let number = number.to_le_bytes();
            bytes.iter_mut().skip(at).zip(&number[..width]).for_each(|(byte, new)| *byte = *new);
        }
    }
}
