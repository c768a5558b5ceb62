//! `aerostat-lab demo`: the four stages of taking memory, the old way and ours, and
//! what a guest's kernel can be asked for; or a guest that moves.

mod kvm;
mod table;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bench::demo_move::{self, Parts};
use bench::inflate::{self, Case, CaseReport, HostPages, MemoryState, Report};
use bench::monitor_choice::{self, Choice, Preference};
use bench::requests::{self, Tour};
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

/// Size of the guest, and of the balloon, in MiB: those of the measurement of 2016.
const GUEST_MIB: u64 = 4096;

/// States of the guest's memory, and what is said of them.
const MEMORY: [MemoryState; 2] = [MemoryState::Idle, MemoryState::Touched];
const TITLES: [(MemoryState, &str); 2] = [
    (MemoryState::Idle, "MemoryState that the guest never used"),
    (MemoryState::Touched, "MemoryState that the guest used and freed"),
];

/// Boots a 4 GiB guest and takes 3 GiB from it, the old way and the new one
///
/// With --migrate, a guest answers while it moves from one process to another.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// What runs the guest
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "migrate")]
    monitor: MonitorArg,

    /// Show a guest that moves while it runs
    #[arg(long)]
    migrate: bool,

    /// What the guest that moves is made of, where a KVM was found: kernel,
    /// initial RAM disk, modules
    #[arg(long, hide = true, num_args = 3.., requires = "migrate")]
    parts: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MonitorArg {
    /// Our own monitor where hardware KVM boots a guest, else User Mode Linux
    Auto,
    /// Our own monitor, in a machine with an emulated KVM where this one's is of no use
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
        (true, [kernel, initramfs, modules @ ..]) => moves(kernel, initramfs, modules),
        (true, _) => finds_a_kvm(),
    }
}

/// Starts this program once more where a guest can be moved.
fn finds_a_kvm() -> Result<(), Failure> {
    print("A guest moves from one process to another, and answers meanwhile.\n")?;
    let words = |parts: &Parts| {
        let mut words: Vec<OsString> = ["demo", "--migrate", "--parts"].map(Into::into).into();
        words.extend([parts.kernel.clone().into(), parts.initramfs.clone().into()]);
        words.extend(parts.modules.iter().map(Into::into));
        words
    };
    // A reader that has gone is no reason to leave a guest behind.
    let mut say = |line: &str| drop(print(&format!("{line}\n")));
    demo_move::show(words, &mut say).map_err(failure)
}

fn moves(kernel: &Path, initramfs: &Path, modules: &[PathBuf]) -> Result<(), Failure> {
    let modules = modules.iter().map(|name| name.display().to_string()).collect();
    let parts = Parts { kernel: kernel.into(), initramfs: initramfs.into(), modules };
    let say = |line: &str| drop(print(&format!("{line}\n")));
    let summary = demo_move::carry_out(&program()?, &parts, &say).map_err(failure)?;
    print(&format!("\n{}", migration_summary::text("the guest", "the second process", &summary)))
}

fn choose(asked: Preference) -> Result<Choice, Failure> {
    let steps = Steps::start();
    let choice = monitor_choice::choose(asked);
    steps.end();
    if choice == (Choice::Kvm { or_uml: true }) {
        // User Mode Linux needs more memory, so it is no way out.
        bench::kvm::has_room(GUEST_MIB).map_err(failure)?;
    }
    Ok(choice)
}

/// Shows the balloon on the monitor that was chosen.
fn balloon(
    choice: Choice,
    on_kvm: impl FnOnce() -> Result<(), Failure>,
    on_uml: impl FnOnce(Option<String>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    match choice {
        Choice::Uml { why } => on_uml(why),
        Choice::Kvm { or_uml: false } => on_kvm(),
        Choice::Kvm { or_uml: true } => on_kvm().or_else(|failure| {
            diagnostics::say!("{failure}");
            on_uml(Some("our own monitor failed on this machine's KVM".to_owned()))
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
        "Takes 3 GiB from a 4 GiB guest, a real Linux kernel in user mode, and gives them back.\n\
         No KVM is used{}.\n\
         `demo --monitor kvm` and `demo --migrate` show our own monitor, which needs one.\n\
         The first run builds that kernel, which takes some minutes.\n\n",
        why.map(|why| format!(", since {why}")).unwrap_or_default()
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
                    "; the host kernel alone needs {:.0} ms to take so much memory back\n\n",
                    floor.floor_ms
                ),
            };
        }
    }
    text + "One run each; `aerostat-lab bench inflate` measures properly.\n"
}

/// The guest's memory before its caches are dropped, after, and with the balloon.
fn story(tour: &Tour) -> String {
    let (dropped, inflated) = (&tour.dropped, &tour.inflated);
    let mib = |bytes: u64| Size(bytes >> 20 << 20);
    let memory = |free: &FreePages| {
        format!(
            "{} of {} free, asked in {:.1} ms{}",
            mib(free.total_bytes),
            mib(free.memory_bytes),
            free.elapsed_ms,
            memory_map::draw(&free.map, memory_map::Style::of_output())
        )
    };
    format!(
        "\nWhat the guest's kernel says of its memory after it has read a file: {}\n\
         It was asked to drop its caches, and gave up {} in {:.1} ms: {}\n\
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

    /// What is shown, in its order, where our monitor works or does not; and how it ends.
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
    fn where_our_monitor_fails_user_mode_linux_is_shown_and_the_reason_said() {
        let (both, is_ok) = shown(Choice::Kvm { or_uml: true }, false);
        assert!(is_ok && both.len() == 2 && both[0] == "kvm", "{both:?}");
        assert!(both[1].starts_with("uml our own monitor failed"), "{both:?}");
        assert_eq!(shown(Choice::Kvm { or_uml: true }, true), (vec!["kvm".to_owned()], true));
    }

    #[test]
    fn who_asked_for_our_monitor_hears_of_its_failure() {
        assert_eq!(shown(Choice::Kvm { or_uml: false }, false), (vec!["kvm".to_owned()], false));
    }

    #[test]
    fn user_mode_linux_is_told_why_it_is_shown() {
        let why = Choice::Uml { why: Some("of this".to_owned()) };
        assert_eq!(shown(why, true), (vec!["uml of this".to_owned()], true));
    }
}
