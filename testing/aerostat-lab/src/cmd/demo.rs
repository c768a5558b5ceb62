//! `aerostat-lab demo`: the four stages of an inflate, the old way and ours, and requests to the
//! guest's kernel; or a live migration.

mod kvm;
mod table;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bench::demo_migrate::{self, Parts};
use bench::inflate::{self, Case, CaseReport, HostPages, MemoryState, Report};
use bench::requests::{self, Tour};
use bench::vmm_choice::{self, Choice, Preference};
use clap::{Args, ValueEnum};
use control::Size;
use control::api::{BALLOON_PAGE_BYTES, FreePages};

use crate::cmd::bench::{failure, program};
use cli::failure::Failure;
use cli::memory_map;
use cli::migration_summary;
use cli::output::print;
use cli::progress::Steps;
use table::{Row, header};

/// Size of the guest and of the balloon, in MiB: those of the 2016 measurement.
const GUEST_MIB: u64 = 4096;

/// States of the guest's memory, and their titles.
const MEMORY: [MemoryState; 2] = [MemoryState::Idle, MemoryState::Touched];
const TITLES: [(MemoryState, &str); 2] = [
    (MemoryState::Idle, "Memory that the guest never used"),
    (MemoryState::Touched, "Memory that the guest used and freed"),
];

/// Boots a 4 GiB guest and balloons 3 GiB of it, the old and the new way
///
/// With --migrate, a guest answers while it migrates from one process to another.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// VMM of the guest
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "migrate")]
    monitor: MonitorArg,

    /// Show a live migration
    #[arg(long)]
    migrate: bool,

    /// Files of the guest to migrate, on a KVM: kernel, initramfs, modules
    #[arg(long, hide = true, num_args = 3.., requires = "migrate")]
    parts: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MonitorArg {
    /// `aerostat run` if hardware KVM boots a guest, else User Mode Linux
    Auto,
    /// `aerostat run`, on an emulated KVM if this machine has no usable one
    Kvm,
    /// User Mode Linux, with our vhost-user back end
    Uml,
}

impl From<MonitorArg> for Preference {
    fn from(monitor: MonitorArg) -> Self {
        match monitor {
            MonitorArg::Auto => Self::Auto,
            MonitorArg::Kvm => Self::Kvm,
            MonitorArg::Uml => Self::Uml,
        }
    }
}

pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    match (args.migrate, args.parts.as_slice()) {
        (false, _) => {
            let choice = choose(args.monitor.into())?;
            balloon(choice, kvm::show, |why| on_uml(why.as_deref()))
        }
        (true, [kernel, initramfs, modules @ ..]) => migrate(kernel, initramfs, modules),
        (true, _) => run_on_kvm(),
    }
}

/// Runs this program again on a KVM.
fn run_on_kvm() -> Result<(), Failure> {
    print("A guest migrates from one process to another, and answers meanwhile.\n")?;
    let words = |parts: &Parts| {
        let mut words: Vec<OsString> = ["demo", "--migrate", "--parts"].map(Into::into).into();
        words.extend([parts.kernel.clone().into(), parts.initramfs.clone().into()]);
        words.extend(parts.modules.iter().map(Into::into));
        words
    };
    // A closed output must not leave a guest running.
    let mut say = |line: &str| drop(print(&format!("{line}\n")));
    demo_migrate::show(words, &mut say).map_err(failure)
}

fn migrate(kernel: &Path, initramfs: &Path, modules: &[PathBuf]) -> Result<(), Failure> {
    let modules = modules.iter().map(|name| name.display().to_string()).collect();
    let parts = Parts { kernel: kernel.into(), initramfs: initramfs.into(), modules };
    let say = |line: &str| drop(print(&format!("{line}\n")));
    let summary = demo_migrate::carry_out(&program()?, &parts, &say).map_err(failure)?;
    print(&format!("\n{}", migration_summary::text("the guest", "the second process", &summary)))
}

fn choose(preference: Preference) -> Result<Choice, Failure> {
    let steps = Steps::start();
    let choice = vmm_choice::choose(preference);
    steps.end();
    if choice == (Choice::Kvm { or_uml: true }) {
        // User Mode Linux needs more memory, so it is no alternative.
        bench::kvm::check_memory(GUEST_MIB).map_err(failure)?;
    }
    Ok(choice)
}

/// Shows the balloon with the selected VMM.
fn balloon(
    choice: Choice,
    on_kvm: impl FnOnce() -> Result<(), Failure>,
    on_uml: impl FnOnce(Option<String>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    match choice {
        Choice::Uml { why } => on_uml(why),
        Choice::Kvm { or_uml: false } => on_kvm(),
        Choice::Kvm { or_uml: true } => on_kvm().or_else(|failure| {
            diagnostics::log_line!("{failure}");
            on_uml(Some("`aerostat run` failed on this machine's KVM".to_owned()))
        }),
    }
}

fn on_uml(why: Option<&str>) -> Result<(), Failure> {
    let options = inflate::InflateOptions {
        program: program()?,
        rounds: 1,
        guest_mib: vec![GUEST_MIB],
        memory: MEMORY.to_vec(),
        backing: vec![HostPages::Small],
    };
    print(&format!(
        "Balloons 3 GiB of a 4 GiB guest, a real Linux kernel in user mode, and deflates.\n\
         No KVM is used{}.\n\
         `demo --monitor kvm` and `demo --migrate` show `aerostat run`, which needs KVM.\n\
         The first run builds that kernel, which takes a few minutes.\n\n",
        why.map(|why| format!(", because {why}")).unwrap_or_default()
    ))?;
    let steps = Steps::start();
    let report = inflate::run(&options, &mut |step| steps.show(step)).map_err(failure)?;
    steps.end();
    print(&picture(&report))?;
    let options = requests::RequestsOptions {
        program: program()?,
        rounds: 1,
        guest_mib: Vec::new(),
        storm: 0,
    };
    let steps = Steps::start();
    let tour = requests::tour(&options, &mut |step| steps.show(step)).map_err(failure)?;
    steps.end();
    print(&story(&tour))
}

fn picture(report: &Report) -> String {
    let mut text = String::new();
    for (memory, title) in TITLES {
        text += &header(title, false);
        let cases = report.cases.iter().filter(|case| case.memory == memory);
        cases.for_each(|case| text += &row(case).line());
        for floor in report.floors.iter().filter(|floor| floor.memory == memory) {
            text += &format!("  {:.0} times faster", floor.speedup);
            text += &match memory {
                MemoryState::Idle => "\n\n".to_owned(),
                _ => format!(
                    "; the host kernel alone needs {:.0} ms to release as much memory\n\n",
                    floor.floor_ms
                ),
            };
        }
    }
    text + "One run each; `aerostat-lab bench inflate` measures properly.\n"
}

/// The guest's memory before and after its caches are dropped, and with the balloon.
fn story(tour: &Tour) -> String {
    let (dropped, inflated) = (&tour.dropped, &tour.inflated);
    let mib = |bytes: u64| Size(bytes >> 20 << 20);
    let memory = |free: &FreePages| {
        format!(
            "{} of {} free, reported in {:.1} ms{}",
            mib(free.total_bytes),
            mib(free.memory_bytes),
            free.elapsed_ms,
            memory_map::draw(&free.map, memory_map::Style::of_output())
        )
    };
    format!(
        "\nFree memory of the guest after it has read a file: {}\n\
         On request it dropped its caches, which freed {} in {:.1} ms: {}\n\
         The balloon took {} in {:.1} ms: {}\n\
         On a guest of yours: aerostat free-pages NAME, aerostat drop-caches NAME,\n\
         aerostat balloon NAME 3GiB --drop-caches.\n",
        memory(&tour.cached),
        mib(dropped.freed_bytes),
        dropped.elapsed_ms,
        memory(&tour.after),
        Size(u64::from(inflated.to_pages) * BALLOON_PAGE_BYTES),
        inflated.wall_ms,
        memory(&tour.end),
    )
}

fn row(case: &CaseReport) -> Row {
    Row {
        what: match case.name {
            Case::Classic => "stock driver, host page by page",
            Case::Stock => "stock driver, Aerostat's device",
            Case::Bitmap => "Aerostat's driver and device",
        },
        stages_ms: case.stages_ms,
        wall_ms: case.wall_ms.median,
        messages: case.messages,
        exits: None,
        returned_mib: case.returned_mib,
        deflate_ms: case.deflate_ms.median,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use cli::failure::Exit;

    /// The demos shown in order, with `aerostat run` working or not, and whether the command
    /// succeeds.
    fn shown(choice: Choice, works: bool) -> (Vec<String>, bool) {
        let shown = RefCell::new(Vec::new());
        let on_kvm = || {
            shown.borrow_mut().push("kvm".to_owned());
            let failure = Failure { what: String::new(), hint: String::new(), exit: Exit::Failed };
            if works { Ok(()) } else { Err(failure) }
        };
        let on_uml = |why: Option<String>| {
            shown.borrow_mut().push(format!("uml {}", why.unwrap_or_default()));
            Ok(())
        };
        let is_ok = balloon(choice, on_kvm, on_uml).is_ok();
        (shown.into_inner(), is_ok)
    }

    #[test]
    fn user_mode_linux_is_shown_with_the_reason_if_kvm_fails() {
        let (both, is_ok) = shown(Choice::Kvm { or_uml: true }, false);
        assert!(is_ok && both.len() == 2 && both[0] == "kvm", "{both:?}");
        assert!(both[1].starts_with("uml `aerostat run` failed"), "{both:?}");
        assert_eq!(shown(Choice::Kvm { or_uml: true }, true), (vec!["kvm".to_owned()], true));
    }

    #[test]
    fn an_explicit_kvm_choice_fails_without_a_fallback() {
        assert_eq!(shown(Choice::Kvm { or_uml: false }, false), (vec!["kvm".to_owned()], false));
    }

    #[test]
    fn user_mode_linux_is_shown_with_the_reason() {
        let why = Choice::Uml { why: Some("of this".to_owned()) };
        assert_eq!(shown(why, true), (vec!["uml of this".to_owned()], true));
    }
}
