//! `soak --migrate`: migrates guests of `aerostat run` repeatedly from process to process while
//! they verify their memory and answer on their serial line, and injects faults at every stage.
//!
//! On a machine without a usable KVM, all of it runs inside an emulated machine with KVM: the
//! program runs there again, and environment variables name its files.

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
pub use migrating_guest::{
    CommandOutput, ConsoleCommands, MigrateCommand, MigratingGuest, Receiver,
};
pub use report::{CaseReport, FaultCount, Report};
pub use run_config::RunConfig;

use crate::error::{Result, host, wrong};
use crate::kvm_host::this_program;

/// Timeouts of a guest's boot and end on an emulated KVM, and of each migration.
const BASE_LIMIT: Duration = Duration::from_secs(600);
const MOVE_LIMIT: Duration = Duration::from_secs(120);

/// Guests with memory at a time: source and destination.
const GUESTS: u64 = 2;

/// Options of the soak.
#[derive(Clone, Debug)]
pub struct MoveOptions {
    /// The `aerostat` program.
    pub program: PathBuf,
    /// Migrations and faults of each guest.
    pub moves: usize,
    /// Kinds of guests.
    pub cases: Vec<Case>,
}

/// Arguments of the program on a KVM: one kind of guest.
pub type Inside<'a> = dyn Fn(&Case) -> Vec<OsString> + 'a;

/// Migrates guests of all kinds, one after the other. `inside` returns the arguments with which the
/// program does one kind and prints [`CaseReport`]s as JSON lines. Calls `progress` with each line.
///
/// # Errors
/// A temporary directory cannot be made. All other errors are in the report.
pub fn run(
    options: &MoveOptions,
    inside: &Inside<'_>,
    progress: &mut dyn FnMut(&str),
) -> Result<Report> {
    let directory = Scratch::new("moves")?;
    let mut run_configs: Vec<(Release, RunConfig)> = Vec::new();
    let mut reports = Vec::new();
    for case in &options.cases {
        progress(&format!("{}: {} migrations", case.name, options.moves));
        let result = run_config_for(case, options, directory.path(), &mut run_configs)
            .and_then(|run_config| run_case(run_config, &inside(case), options.moves, progress));
        reports.extend(result.unwrap_or_else(|error| {
            let mut report = CaseReport::new(case.name);
            report.failure = Some(error.to_string());
            vec![report]
        }));
    }
    Ok(Report::new(reports))
}

/// Files of a kind of guest, made once per kernel.
fn run_config_for<'a>(
    case: &Case,
    options: &MoveOptions,
    directory: &Path,
    run_configs: &'a mut Vec<(Release, RunConfig)>,
) -> Result<&'a RunConfig> {
    let is_there = |run_config: &(Release, RunConfig)| run_config.0 == case.release;
    if !run_configs.iter().any(is_there) {
        let run_config = RunConfig::prepare(&options.program, case.release, directory)?;
        run_configs.push((case.release, run_config));
    }
    let run_config = run_configs.iter().find(|run_config| run_config.0 == case.release);
    run_config.map(|run_config| &run_config.1).ok_or_else(|| wrong("a kernel is missing".into()))
}

/// Runs the program for one kind on a KVM.
fn run_case(
    run_config: &RunConfig,
    words: &[OsString],
    moves: usize,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<CaseReport>> {
    let moves = u32::try_from(moves).unwrap_or(u32::MAX);
    let limit = MOVE_LIMIT.saturating_mul(moves).saturating_add(BASE_LIMIT);
    let variables = run_config.variables();
    let variables = RunConfig::borrowed(&variables);
    let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
    let mut lines = Vec::new();
    let mut each = |line: &str| {
        if line.starts_with("migration ") || line.starts_with("fault ") {
            progress(line);
        }
        lines.push(line.to_owned());
    };
    let program = this_program()?;
    if kvm::hardware() {
        run_here(&program, &words, &variables, &mut each)?;
    } else {
        let mut machine = KvmMachine::boot(GUESTS * MEMORY_MIB)?;
        machine.run_with_lines(&program, &words, &variables, limit, &mut each)?;
    }
    let reports = lines.iter().filter_map(|line| serde_json::from_str(line).ok());
    match reports.collect::<Vec<CaseReport>>() {
        none if none.is_empty() => {
            Err(wrong(format!("the program printed no report:\n{}", lines.join("\n"))))
        }
        reports => Ok(reports),
    }
}

/// Runs a program on this machine. Calls `each` with each line of its output.
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
    // The command holds the pipe's write end, which would keep it open.
    drop(command);
    let mut child = child.map_err(host("starting the program"))?;
    BufReader::new(read).lines().map_while(std::io::Result::ok).for_each(|line| each(&line));
    child.wait().map_err(host("waiting for the program")).map(drop)
}

/// The files that [`run`] named in the environment.
///
/// # Errors
/// The process was started by hand.
pub fn given_run_config(program: &Path) -> Result<RunConfig> {
    RunConfig::given(program)
        .ok_or_else(|| wrong("this command is started by `aerostat-lab soak --migrate`".into()))
}
