//! `aerostat-lab bench`: measures on real guests.

mod compat;
mod inflate;
mod inside;
mod migrate;
mod monitors;
mod reporting;
mod requests;

use std::path::PathBuf;

use bench::inflate::HostPages;
use clap::{Args, Subcommand, ValueEnum};

use cli::failure::{Exit, Failure};

/// Measures on real guests, which it boots
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Compat(compat::CompatArgs),
    Inflate(inflate::InflateArgs),
    #[command(hide = true)]
    Inside(inside::InsideArgs),
    Migrate(migrate::MigrateArgs),
    Monitors(monitors::MonitorsArgs),
    Reporting(reporting::ReportingArgs),
    Requests(requests::RequestsArgs),
}

/// The host's pages behind guests.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum BackingArg {
    /// tmpfs with 4 KiB pages
    #[value(name = "4k")]
    Small,
    /// tmpfs with huge pages
    Huge,
}

impl BackingArg {
    /// All kinds where none was asked for.
    pub(crate) fn chosen(asked: &[Self]) -> Vec<HostPages> {
        chosen(asked, &HostPages::ALL, |backing| match backing {
            Self::Small => HostPages::Small,
            Self::Huge => HostPages::Huge,
        })
    }
}

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    match &args.what {
        What::Compat(args) => compat::run(args),
        What::Inflate(args) => inflate::run(args),
        What::Inside(args) => inside::run(args),
        What::Migrate(args) => migrate::run(args),
        What::Monitors(args) => monitors::run(args),
        What::Reporting(args) => reporting::run(args),
        What::Requests(args) => requests::run(args),
    }
}

/// The program that operators run.
const AEROSTAT: &str = "aerostat";

/// The `aerostat` beside this program, which is what is measured.
pub(crate) fn program() -> Result<PathBuf, Failure> {
    let this = std::env::current_exe()
        .map_err(|error| Failure::new(&error, "run aerostat-lab by its full path"))?;
    let program = this.with_file_name(AEROSTAT);
    if program.is_file() {
        return Ok(program);
    }
    Err(Failure {
        what: format!("there is no {} to measure", program.display()),
        hint: "build it with the same profile: `cargo build --release --package aerostat`".into(),
        exit: Exit::Failed,
    })
}

pub(crate) fn failure(error: bench::BenchError) -> Failure {
    Failure::new(&error, "./check sets up all that a bench needs; it has to run as root")
}

/// What was asked for; all of it where nothing was.
fn chosen<A: Copy, T: Copy>(asked: &[A], all: &[T], each: impl Fn(A) -> T) -> Vec<T> {
    if asked.is_empty() { all.to_vec() } else { asked.iter().map(|arg| each(*arg)).collect() }
}

/// The word that JSON has for it.
fn name(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}
