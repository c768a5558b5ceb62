//! `cargo xtask fuzz`: builds the fuzz targets with coverage and runs them.
//!
//! Works with a stable compiler and without cargo-fuzz: the coverage pass is part of LLVM, and the
//! flags below are those of cargo-fuzz.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{output, root};

/// Edge counters, comparison operands as hints, no sanitizer.
const COVERAGE_FLAGS: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1";

/// Maximum bytes of an input: a script of a few dozen steps.
const MAX_INPUT_BYTES: usize = 1024;
/// Memory limit of a target in MiB. Targets need about 30. The limit detects a device that
/// allocates without bound.
const RSS_LIMIT_MIB: usize = 512;
/// Timeout of one input in seconds. Inputs take milliseconds.
const INPUT_TIMEOUT_S: usize = 20;

/// Fuzzes the host side with hostile guests, front ends and peers.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Targets to run [default: all]
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Targets to run in parallel.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Minimize the corpus in testing/fuzz/corpus to the inputs that reach all covered edges.
    #[arg(long)]
    keep: bool,
}

/// Paths of a target.
struct Target {
    name: String,
    program: PathBuf,
    /// Committed inputs.
    corpus: PathBuf,
    /// Inputs found in this run, failing inputs, and its log.
    scratch: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let fuzz = root().join("testing/fuzz");
    let names = choose(&names(&fuzz)?, &args.targets)?;
    let programs = build(&fuzz, &names)?;
    let targets = names.into_iter().map(|name| Target {
        program: programs.join(&name),
        corpus: fuzz.join("corpus").join(&name),
        scratch: fuzz.join("target/scratch").join(&name),
        name,
    });
    let waiting = Mutex::new(targets.collect::<Vec<_>>().into_iter());
    let failures = Mutex::new(Vec::new());
    let next = || waiting.lock().ok()?.next();
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                while let Some(target) = next() {
                    match target.fuzz(args) {
                        Ok(line) => println!("{line}"),
                        Err(error) => failures.lock().iter_mut().for_each(|all| {
                            println!("{}: FAILED", target.name);
                            all.push(format!("{error:#}"));
                        }),
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// Names of all targets: one file each in `testing/fuzz/targets`.
fn names(fuzz: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(fuzz.join("targets")).context("testing/fuzz/targets")? {
        let path = entry?.path();
        names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

fn choose(all: &[String], wanted: &[String]) -> Result<Vec<String>> {
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("there is no fuzz target {unknown}; there are: {}", all.join(" "));
    }
    Ok(if wanted.is_empty() { all.to_vec() } else { wanted.to_vec() })
}

/// Builds the targets and returns the directory they are in.
fn build(fuzz: &Path, names: &[String]) -> Result<PathBuf> {
    let host = host_triple()?;
    let target_dir = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| fuzz.join("target"), |shared| PathBuf::from(shared).join("fuzz"));
    let mut cargo = Command::new("cargo");
    // With --target, build scripts and macros are built without the coverage flags.
    cargo.args(["build", "--release", "--quiet", "--target", &host]);
    cargo.arg("--manifest-path").arg(steady(fuzz, &target_dir)?.join("Cargo.toml"));
    cargo.arg("--target-dir").arg(&target_dir);
    names.iter().for_each(|name| {
        cargo.args(["--bin", name]);
    });
    cargo.env("RUSTFLAGS", COVERAGE_FLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS");
    let status = cargo.status().context("cannot run cargo")?;
    ensure!(status.success(), "the fuzz targets cannot be built");
    Ok(target_dir.join(host).join("release"))
}

/// Path to `fuzz` through a link in the target directory. Cargo identifies crates outside of a
/// workspace by their full path, and would rebuild everything for each clone.
fn steady(fuzz: &Path, target_dir: &Path) -> Result<PathBuf> {
    let (root, link) = (root(), target_dir.join("clone"));
    fs::create_dir_all(target_dir).with_context(|| target_dir.display().to_string())?;
    if fs::read_link(&link).ok().as_ref() != Some(&root) {
        let _ = fs::remove_file(&link);
        symlink(&root, &link).with_context(|| link.display().to_string())?;
    }
    Ok(link.join(fuzz.strip_prefix(&root)?))
}

fn host_triple() -> Result<String> {
    let (version, _) = output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

impl Target {
    /// Runs the target and returns a line with the result.
    fn fuzz(&self, args: &Args) -> Result<String> {
        let (found, artifacts) = (self.scratch.join("corpus"), self.scratch.join("artifacts"));
        if self.scratch.exists() {
            fs::remove_dir_all(&self.scratch)?;
        }
        for dir in [&found, &artifacts, &self.corpus] {
            fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        let started = Instant::now();
        let mut fuzzer = self.command(&artifacts);
        fuzzer.arg(format!("-max_total_time={}", args.seconds)).args([&found, &self.corpus]);
        let (status, log) = self.logged(fuzzer, "log")?;
        let reached = Reached::parse(&log);
        if !status.success() {
            bail!(self.failure(status, &log, &artifacts)?);
        }
        let Some(reached) = reached.filter(|reached| reached.edges > 0) else {
            bail!("{}: no coverage was counted, see {}", self.name, self.log("log").display());
        };
        if args.keep {
            self.keep(&found, &artifacts)?;
        }
        let files = fs::read_dir(&found)?.count();
        Ok(format!(
            "{:<14} {:>9} runs, {:>5} of {} edges, {files:>4} new inputs, {} s",
            self.name,
            reached.runs,
            reached.edges,
            reached.all_edges,
            started.elapsed().as_secs()
        ))
    }

    fn command(&self, artifacts: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(format!("-max_len={MAX_INPUT_BYTES}"))
            .arg(format!("-rss_limit_mb={RSS_LIMIT_MIB}"))
            .arg(format!("-timeout={INPUT_TIMEOUT_S}"));
        command
    }

    fn log(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Runs `command` with its output in a log. Returns its status and the log.
    fn logged(&self, mut command: Command, name: &str) -> Result<(ExitStatus, String)> {
        let path = self.log(name);
        let log = fs::File::create(&path)?;
        let status = command.stdout(log.try_clone()?).stderr(log).status();
        let status = status.with_context(|| self.program.display().to_string())?;
        Ok((status, String::from_utf8_lossy(&fs::read(&path)?).into_owned()))
    }

    /// Describes the failure, with the input and the command to reproduce it.
    fn failure(&self, status: ExitStatus, log: &str, artifacts: &Path) -> Result<String> {
        let why = log
            .lines()
            .find(|line| line.contains("panicked at") || line.contains("ERROR: libFuzzer"))
            .unwrap_or("it ended early");
        let mut text = format!("{}: {status}: {why}", self.name);
        for entry in fs::read_dir(artifacts)? {
            let input = entry?.path();
            text += &format!("\n  reproduce: {} {}", self.program.display(), input.display());
        }
        text += &format!("\n  log: {}", self.log("log").display());
        Ok(text)
    }

    /// Replaces the committed corpus with the fewest inputs, old and new, that reach all edges.
    fn keep(&self, found: &Path, artifacts: &Path) -> Result<()> {
        let merged = self.scratch.join("merged");
        fs::create_dir_all(&merged)?;
        let mut merge = self.command(artifacts);
        // Without counters, an input is kept for an edge, not for its hit count.
        merge.args(["-set_cover_merge=1", "-use_counters=0"]);
        merge.args([&merged, found, &self.corpus]);
        let (status, log) = self.logged(merge, "merge-log")?;
        ensure!(status.success(), "{}: cannot merge: {log}", self.name);
        fs::remove_dir_all(&self.corpus)?;
        fs::create_dir_all(&self.corpus)?;
        for entry in fs::read_dir(&merged)? {
            let entry = entry?;
            fs::copy(entry.path(), self.corpus.join(entry.file_name()))?;
        }
        Ok(())
    }
}

/// Final statistics of libFuzzer.
#[derive(Debug, PartialEq)]
struct Reached {
    runs: u64,
    edges: u64,
    all_edges: u64,
}

impl Reached {
    fn parse(log: &str) -> Option<Self> {
        let after = |line: &str, word: &str| {
            let rest = line.split_once(word)?.1.trim_start();
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        let loaded = log.lines().find(|line| line.contains("inline 8-bit counters"))?;
        let last =
            log.lines().rev().find(|line| line.starts_with('#') && line.contains("cov: "))?;
        Some(Self {
            runs: after(last, "#")?,
            edges: after(last, "cov: ")?,
            all_edges: after(loaded, "modules   (").or_else(|| after(loaded, "("))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_from_the_last_line() {
        let log = "INFO: Loaded 1 modules   (2181 inline 8-bit counters): 2181 [0x1, 0x2), \n\
            #2\tINITED cov: 77 ft: 77 corp: 1/1b exec/s: 0 rss: 27Mb\n\
            #435124\tDONE   cov: 756 ft: 2965 corp: 663/28Kb lim: 512 exec/s: 16735 rss: 29Mb\n\
            Done 435124 runs in 26 second(s)\n";
        let reached = Reached { runs: 435_124, edges: 756, all_edges: 2181 };
        assert_eq!(Reached::parse(log), Some(reached));
        assert_eq!(Reached::parse("INFO: no counters\n#2\tINITED exec/s: 0\n"), None);
    }

    #[test]
    fn unknown_targets_are_errors() {
        let all = ["a".to_owned(), "b".to_owned()];
        assert_eq!(choose(&all, &[]).unwrap(), all);
        assert_eq!(choose(&all, &["b".to_owned()]).unwrap(), ["b"]);
        assert!(choose(&all, &["c".to_owned()]).is_err());
    }
}
