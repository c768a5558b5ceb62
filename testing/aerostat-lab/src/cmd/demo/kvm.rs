//! The balloon in `aerostat run`: a Debian guest on KVM, with the stock driver and with ours.

use bench::kvm::KvmLocation;
use bench::kvm_inflate::{self, Case, CaseReport, KERNEL_ARGUMENT, KvmInflateOptions, Report};

use super::table::{Row, header};
use super::{GUEST_MIB, MEMORY};
use crate::cmd::bench::failure;
use cli::failure::Failure;
use cli::output::print;
use cli::progress::Steps;

/// Inflates the balloons of both guests and shows the times.
pub(super) fn show() -> Result<(), Failure> {
    print(
        "Balloons 3 GiB of a 4 GiB guest, an unmodified Debian kernel in `aerostat run`, and\n\
         deflates. The first run fetches that kernel.\n",
    )?;
    let steps = Steps::start();
    let place = KvmLocation::find();
    steps.end();
    print(&format!("{}\n\n", where_it_runs(place)))?;
    let options =
        KvmInflateOptions { rounds: 1, guest_mib: vec![GUEST_MIB], memory: MEMORY.to_vec() };
    let words = [KERNEL_ARGUMENT.to_owned()];
    let steps = Steps::start();
    let report = kvm_inflate::measure(options, &words, &mut |step| steps.show(step));
    steps.end();
    print(&picture(&report.map_err(failure)?, place))
}

const fn where_it_runs(place: KvmLocation) -> &'static str {
    match place {
        KvmLocation::Hardware => "The guest runs on the KVM of this machine.",
        KvmLocation::Emulated => {
            "This machine's KVM boots no guest, so QEMU emulates a machine with KVM. The guest runs\n\
             in it, much slower than on hardware: all of it takes a few minutes."
        }
    }
}

fn picture(report: &Report, place: KvmLocation) -> String {
    let mut text = String::new();
    for (memory, title) in super::TITLES {
        text += &header(title, true);
        let case =
            |name| report.cases.iter().find(|case| (case.memory, case.name) == (memory, name));
        for case in Case::ALL.into_iter().filter_map(case) {
            text += &row(case).line();
        }
        if let (Some(stock), Some(own)) = (case(Case::Stock), case(Case::Bitmap)) {
            text += &format!("  {:.0} times faster\n\n", stock.wall_ms.median / own.wall_ms.median);
        }
    }
    text += &format!(
        "Exits: vCPU exits because of the balloon. The guest's kernel, {}, has\n\
         {}. One run each; `aerostat-lab bench inflate --monitor kvm` measures properly.\n",
        report.kernel,
        report.kernel_arguments.join(" "),
    );
    text += match place {
        KvmLocation::Hardware => {
            "All of it ran on hardware KVM: the times are those of this machine.\n"
        }
        KvmLocation::Emulated => {
            "All of it ran in an L1, a machine with KVM that QEMU emulates: the times are of the \
             emulation.\n"
        }
    };
    text
}

fn row(case: &CaseReport) -> Row {
    Row {
        what: match case.name {
            Case::Stock => "stock driver, Aerostat's device",
            Case::Bitmap => "Aerostat's driver and device",
        },
        stages_ms: case.stages_ms,
        wall_ms: case.wall_ms.median,
        messages: case.messages,
        exits: Some(case.exits.median),
        returned_mib: case.returned_mib,
        deflate_ms: case.deflate_ms.median,
    }
}

#[cfg(test)]
mod tests {
    use bench::Spread;
    use bench::inflate::{MemoryState, StagesMs};

    use super::*;

    fn case(name: Case, memory: MemoryState, wall_ms: f64) -> CaseReport {
        let spread = |figure| Spread { min: figure, median: figure, max: figure };
        CaseReport {
            name,
            memory,
            guest_mib: GUEST_MIB,
            asked_mib: 3072,
            wall_ms: spread(wall_ms),
            stages_ms: StagesMs { allocate: 1.0, send: 2.0, translate: 3.0, release: 4.0 },
            exits: spread(15_340.0),
            kicks: spread(3072.0),
            deflate_ms: spread(5.0),
            deflate_exits: spread(6.0),
            messages: 7,
            release_calls: 8,
            returned_mib: 3071.6,
        }
    }

    fn report() -> Report {
        let cases = MEMORY
            .map(|memory| [case(Case::Stock, memory, 2500.0), case(Case::Bitmap, memory, 10.0)]);
        Report {
            rounds: 1,
            kernel: "6.12".to_owned(),
            kernel_arguments: vec![KERNEL_ARGUMENT.to_owned()],
            cases: cases.concat(),
        }
    }

    #[test]
    fn the_table_has_both_drivers_idle_and_touched() {
        let text = picture(&report(), KvmLocation::Hardware);
        let lines: Vec<&str> = text.lines().collect();
        for (title, from) in [("never used", 0), ("used and freed", 5)] {
            let words: Vec<&str> = lines[from].split_whitespace().rev().take(9).collect();
            assert!(lines[from].contains(title), "{text}");
            assert!(words.contains(&"exits"), "{text}");
            // Figures are aligned with the end of their title.
            for row in [1, 2] {
                assert_eq!(lines[from + row].len(), lines[from].len(), "{text}");
            }
            assert!(lines[from + 1].ends_with("2500.0         7    15340  3072 MiB         5.0"));
            assert!(lines[from + 1].contains("stock driver"), "{text}");
            assert!(lines[from + 2].contains("Aerostat's driver"), "{text}");
            assert_eq!(lines[from + 3], "  250 times faster");
        }
    }

    #[test]
    fn the_last_line_names_the_kvm() {
        let last = |place| picture(&report(), place).lines().last().unwrap_or_default().to_owned();
        assert!(last(KvmLocation::Hardware).contains("ran on hardware KVM"));
        assert!(last(KvmLocation::Emulated).contains("ran in an L1"));
        assert!(last(KvmLocation::Emulated).ends_with("the times are of the emulation."));
    }
}
