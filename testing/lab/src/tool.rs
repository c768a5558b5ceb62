//! Runs build tools and package tools of Debian.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Context, LabError, Result};

/// Lines of a failed program's output quoted in the error.
const TAIL_LINES: usize = 25;

/// Variables of a surrounding cargo or make that would affect the program.
const FOREIGN_VARIABLES: [&str; 8] = [
    "ARCH",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "KBUILD_OUTPUT",
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "RUSTFLAGS",
];

/// Returns a command without the variables of a surrounding build.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    for name in FOREIGN_VARIABLES {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs a command to its end and appends its output to `log`.
///
/// # Errors
/// The program fails, or is missing; then the error names `package`.
pub(crate) fn run(command: &mut Command, package: &str, log: &Path) -> Result<()> {
    let line = describe(command);
    let mut options = File::options();
    let output = options.create(true).append(true).open(log).context_path("write the log", log)?;
    let errors = output.try_clone().context_path("write the log", log)?;
    let status = command
        .stdout(output)
        .stderr(errors)
        .status()
        .map_err(|error| start_error(command, package, error))?;
    if status.success() {
        return Ok(());
    }
    let text = fs::read(log).unwrap_or_default();
    let tail = tail(&String::from_utf8_lossy(&text), TAIL_LINES);
    Err(LabError::Tool { command: line, status, log: log.to_owned(), tail })
}

/// Runs a command and returns its output, `None` if it fails.
///
/// # Errors
/// The program is missing; the error names `package`.
pub(crate) fn capture(command: &mut Command, package: &str) -> Result<Option<String>> {
    let output = command.output().map_err(|error| start_error(command, package, error))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(output.status.success().then_some(text))
}

/// Returns the version of an installed Debian package.
///
/// # Errors
/// The package is not installed; the error names it.
pub(crate) fn package_version(package: &str) -> Result<String> {
    let mut query = command("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Abbrev}${Version}", package]);
    let answer = capture(&mut query, "dpkg")?.unwrap_or_default();
    match answer.strip_prefix("ii ") {
        Some(version) => Ok(version.trim().to_owned()),
        None => Err(LabError::Missing {
            what: format!("the package {package}"),
            package: package.to_owned(),
        }),
    }
}

/// Returns the first line of `PROGRAM --version`.
///
/// # Errors
/// The program is missing; the error names `package`.
pub(crate) fn program_version(program: &str, package: &str) -> Result<String> {
    let text = capture(command(program).arg("--version"), package)?.unwrap_or_default();
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Returns the last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn start_error(command: &Command, package: &str, error: std::io::Error) -> LabError {
    let program = command.get_program().to_string_lossy().into_owned();
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            LabError::Missing { what: program, package: package.to_owned() }
        }
        _ => LabError::Io { what: format!("start {program}"), source: error },
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_missing_program_names_its_package() {
        let error = program_version("no-such-program", "some-package").unwrap_err();
        assert!(error.to_string().contains("apt-get install some-package"), "{error}");
    }

    #[test]
    fn the_error_names_a_missing_package() {
        let error = package_version("no-such-package").unwrap_err();
        assert!(error.to_string().contains("apt-get install no-such-package"), "{error}");
    }

    #[test]
    fn the_error_of_a_failed_program_has_its_last_lines() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut shell = command("sh");
        shell.args(["-c", "echo first; echo why >&2; exit 3"]);
        let error = run(&mut shell, "dash", log.path()).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }
}
