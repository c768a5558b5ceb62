//! `aerostat demo`: the four stages of taking memory, the old way and ours, and
//! what a guest's kernel can be asked for; or a guest that moves.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bench::demo_move::{self, Parts};
use bench::inflate::{self, Case, CaseReport, HostPages, Memory, Report};
use bench::requests::{self, Tour};
use clap::Args;
use control::Size;
use control::api::{BALLOON_PAGE_BYTES, FreePages};

use crate::cmd::bench::{failure, program};
use crate::cmd::migrate;
use crate::failure::Failure;
use crate::memory_map;
use crate::output::print;
use crate::progress::Steps;

/// Size of the guest, and of the balloon, in MiB: those of the measurement of 2016.
const GUEST_MIB: u64 = 4096;

/// Boots a 4 GiB guest and takes 3 GiB from it, the old way and the new one
///
/// With --migrate, a guest answers while it moves from one process to another.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Show a guest that moves while it runs
    #[arg(long)]
    migrate: bool,

    /// What the guest that moves is made of, where a KVM was found: kernel,
    /// initial RAM disk, modules
    #[arg(long, hide = true, num_args = 3.., requires = "migrate")]
    parts: Vec<PathBuf>,
}

pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    match (args.migrate, args.parts.as_slice()) {
        (false, _) => balloon(),
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
    demo_move::show(&program()?, words, &mut say).map_err(failure)
}

fn moves(kernel: &Path, initramfs: &Path, modules: &[PathBuf]) -> Result<(), Failure> {
    let modules = modules.iter().map(|name| name.display().to_string()).collect();
    let parts = Parts { kernel: kernel.into(), initramfs: initramfs.into(), modules };
    let say = |line: &str| drop(print(&format!("{line}\n")));
    let summary = demo_move::carry_out(&program()?, &parts, &say).map_err(failure)?;
    print(&format!("\n{}", migrate::text("the guest", "the second process", &summary)))
}

fn balloon() -> Result<(), Failure> {
    let options = inflate::Options {
        program: program()?,
        rounds: 1,
        guest_mib: vec![GUEST_MIB],
        memory: vec![Memory::Idle, Memory::Touched],
        backing: vec![HostPages::Small],
    };
    print(
        "Takes 3 GiB from a 4 GiB guest, a real Linux kernel in user mode, and gives them back.\n\
         No KVM is used; `demo --migrate` shows our own monitor, which needs one.\n\
         The first run builds that kernel, which takes some minutes.\n\n",
    )?;
    let steps = Steps::start();
    let report = inflate::run(&options, &mut |step| steps.show(step)).map_err(failure)?;
    steps.end();
    print(&picture(&report))?;
    let options =
        requests::Options { program: program()?, rounds: 1, guest_mib: Vec::new(), storm: 0 };
    let steps = Steps::start();
    let tour = requests::tour(&options, &mut |step| steps.show(step)).map_err(failure)?;
    steps.end();
    print(&story(&tour))
}

fn picture(report: &Report) -> String {
    let mut text = String::new();
    for (memory, title) in [
        (Memory::Idle, "Memory that the guest never used"),
        (Memory::Touched, "Memory that the guest used and freed"),
    ] {
        text += &format!(
            "{title:<40}{:>10}{:>8}{:>11}{:>9}{:>10}{:>10}{:>10}{:>12}\n",
            "allocate",
            "send",
            "translate",
            "release",
            "total ms",
            "messages",
            "returned",
            "back in ms"
        );
        let cases = report.cases.iter().filter(|case| case.memory == memory);
        cases.for_each(|case| text += &row(case));
        for floor in report.floors.iter().filter(|floor| floor.memory == memory) {
            text += &format!("  {:.0} times faster", floor.speedup);
            text += &match memory {
                Memory::Idle => "\n\n".to_owned(),
                _ => format!(
                    "; the host kernel alone needs {:.0} ms to take so much memory back\n\n",
                    floor.floor_ms
                ),
            };
        }
    }
    text + "One run each; `aerostat bench inflate` measures properly.\n"
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

fn row(case: &CaseReport) -> String {
    let what = match case.name {
        Case::Classic => "stock driver, host page by page",
        Case::Stock => "stock driver, Aerostat's device",
        Case::Bitmap => "Aerostat's driver and device",
    };
    let stages = case.stages_ms;
    format!(
        "  {what:<38}{:>10.1}{:>8.1}{:>11.1}{:>9.1}{:>10.1}{:>10}{:>6.0} MiB{:>12.1}\n",
        stages.allocate,
        stages.send,
        stages.translate,
        stages.release,
        case.wall_ms.median,
        case.messages,
        case.returned_mib,
        case.deflate_ms.median,
    )
}
