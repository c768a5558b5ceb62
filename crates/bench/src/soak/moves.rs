//! `soak --migrate`: guests of our monitor that are moved from process to process, again and again,
//! while they verify their memory and answer on their serial line; and what becomes of them when
//! something fails at any moment of it.
//!
//! Where this machine's KVM is of no use, all of it runs inside of a machine that has one: the
//! program is started there again, with what it needs named by variables.

mod case;
mod endure;
mod faults;
mod migrating_guest;
pub mod proxy;
mod report;
mod run_config;

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lab::Scratch;
use lab::debian::Release;
use lab::kvm::{self, KvmMachine};

pub use crate::kvm_host::raise_loopback;
pub use case::{CASES, Case};
pub use endure::{MEMORY_MIB, endure};
pub use faults::{fail, fail_at, faults};
pub use migrating_guest::{Conversation, Departure, MigratingGuest, Receiver, Said};
pub use report::{CaseReport, FaultCount, Report};
pub use run_config::RunConfig;

use crate::error::{Result, host, wrong};
use crate::kvm_host::this_program;

/// For a guest's boot and end in an emulated KVM, and for each of its moves.
const BASE_LIMIT: Duration = Duration::from_secs(600);
const MOVE_LIMIT: Duration = Duration::from_secs(120);

/// Guests that have memory at a time: one on its way.
const GUESTS: u64 = 2;

/// What to do.
#[derive(Clone, Debug)]
pub struct MoveOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Moves and faults of each guest.
    pub moves: usize,
    /// Kinds of guests.
    pub cases: Vec<Case>,
}

/// What the program is asked where a KVM is: one kind of guest.
pub type Inside<'a> = dyn Fn(&Case) -> Vec<OsString> + 'a;

/// Moves guests of all kinds, one after the other. `inside` makes the words that have the program
/// do it for one kind and print [`CaseReport`]s as JSON, each in a line; `told` hears how far it is.
///
/// # Errors
/// This machine has no room for files. All else that goes wrong, or is missing, is in the report.
pub fn run(
    options: &MoveOptions,
    inside: &Inside<'_>,
    told: &mut dyn FnMut(&str),
) -> Result<Report> {
    let directory = Scratch::new("moves")?;
    let mut kits: Vec<(Release, RunConfig)> = Vec::new();
    let mut reports = Vec::new();
    for case in &options.cases {
        told(&format!("{}: {} moves", case.name, options.moves));
        let told_of = kit_of(case, options, directory.path(), &mut kits)
            .and_then(|run_config| run_case(run_config, &inside(case), options.moves, told));
        reports.extend(told_of.unwrap_or_else(|error| {
            let mut report = CaseReport::new(case.name);
            report.failure = Some(error.to_string());
            vec![report]
        }));
    }
    Ok(Report::new(reports))
}

/// The files of a kind of guest, made once for each kernel.
fn kit_of<'a>(
    case: &Case,
    options: &MoveOptions,
    directory: &Path,
    kits: &'a mut Vec<(Release, RunConfig)>,
) -> Result<&'a RunConfig> {
    let is_there = |run_config: &(Release, RunConfig)| run_config.0 == case.release;
    if !kits.iter().any(is_there) {
        let run_config = RunConfig::prepare(&options.program, case.release, directory)?;
        kits.push((case.release, run_config));
    }
    let run_config = kits.iter().find(|run_config| run_config.0 == case.release);
    run_config.map(|run_config| &run_config.1).ok_or_else(|| wrong("a kernel is missing".into()))
}

/// Has the program do one kind where a KVM is.
fn run_case(
    run_config: &RunConfig,
    words: &[OsString],
    moves: usize,
    told: &mut dyn FnMut(&str),
) -> Result<Vec<CaseReport>> {
    let moves = u32::try_from(moves).unwrap_or(u32::MAX);
    let limit = MOVE_LIMIT.saturating_mul(moves).saturating_add(BASE_LIMIT);
    let variables = run_config.variables();
    let variables = RunConfig::borrowed(&variables);
    let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
    let mut lines = Vec::new();
    let mut hear = |line: &str| {
        if line.starts_with("move ") || line.starts_with("fault ") {
            told(line);
        }
        lines.push(line.to_owned());
    };
    let program = this_program()?;
    if kvm::hardware() {
        run_here(&program, &words, &variables, &mut hear)?;
    } else {
        let mut machine = KvmMachine::boot(GUESTS * MEMORY_MIB)?;
        machine.run_telling(&program, &words, &variables, limit, &mut hear)?;
    }
    let reports = lines.iter().filter_map(|line| serde_json::from_str(line).ok());
    match reports.collect::<Vec<CaseReport>>() {
        none if none.is_empty() => {
            Err(wrong(format!("the program told nothing:\n{}", lines.join("\n"))))
        }
        reports => Ok(reports),
    }
}

/// Runs a program of this machine; `each` hears what it prints.
fn run_here(
    program: &Path,
    words: &[&OsStr],
    variables: &[(&str, &OsStr)],
    each: &mut dyn FnMut(&str),
) -> Result<()> {
    let (read, write) = std::io::pipe().map_err(host("making a pipe"))?;
    let errors = write.try_clone().map_err(host("making a pipe"))?;
    let mut command = Command::new(program);
    command.args(words).envs(variables.iter().copied()).stdout(write).stderr(errors);
    let child = command.spawn();
    // Holds the pipe's other end, which would keep it open for ever.
    drop(command);
    let mut child = child.map_err(host("starting the program"))?;
    BufReader::new(read).lines().map_while(std::io::Result::ok).for_each(|line| each(&line));
    child.wait().map_err(host("waiting for the program")).map(drop)
}

/// The files that this process was given by [`run`].
///
/// # Errors
/// It was started by hand.
pub fn given_kit(program: &Path) -> Result<RunConfig> {
    RunConfig::given(program)
        .ok_or_else(|| wrong("this is started by `aerostat-lab soak --migrate`".into()))
}
