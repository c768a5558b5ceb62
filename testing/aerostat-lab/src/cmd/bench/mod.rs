//! `aerostat-lab bench`: benchmarks with real guests.

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

/// Boots guests and measures
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

/// Host page size of guest memory.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum BackingArg {
    /// tmpfs with 4 KiB pages
    #[value(name = "4k")]
    Small,
    /// tmpfs with huge pages
    Huge,
}

impl BackingArg {
    /// The selected sizes, or all if none was selected.
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

/// The measured program.
const AEROSTAT: &str = "aerostat";

/// Path of the measured `aerostat`, in this program's directory.
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
    Failure::new(&error, "run ./check once as root, which installs all that a benchmark needs")
}

/// The selected values, or all if none was selected.
fn chosen<A: Copy, T: Copy>(asked: &[A], all: &[T], each: impl Fn(A) -> T) -> Vec<T> {
    if asked.is_empty() { all.to_vec() } else { asked.iter().map(|arg| each(*arg)).collect() }
}

/// Name in JSON.
fn name(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}
