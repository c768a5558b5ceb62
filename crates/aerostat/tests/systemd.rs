//! The unit in contrib/systemd, checked by systemd.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::path::Path;
use std::process::{Command, Output};

/// Highest exposure level accepted from `systemd-analyze security`, in tenths: 0 is fully
/// sandboxed, 100 is not sandboxed.
const EXPOSURE: &str = "15";

const UNIT: &str = "aerostat-vhost-user@.service";

fn contrib() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/systemd")
}

/// Returns the unit with the path of the program just built, since `verify` requires that it
/// exists.
fn unit() -> (tempfile::TempDir, std::path::PathBuf) {
    let text = std::fs::read_to_string(contrib().join(UNIT)).unwrap();
    assert!(text.contains("ExecStart=/usr/bin/aerostat "));
    let text = text.replace("/usr/bin/aerostat", env!("CARGO_BIN_EXE_aerostat"));
    let text = text.replace("Documentation=man:aerostat-vhost-user(1)\n", "");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(UNIT.replace('@', "@vm1"));
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

fn analyze(arguments: &[&str], path: &Path) -> (Output, String) {
    let mut command = Command::new("systemd-analyze");
    let output = command.args(arguments).arg(path).output();
    let output = output.expect("systemd-analyze is missing; apt-get install systemd");
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output, text)
}

#[test]
fn systemd_accepts_the_unit() {
    let (_dir, path) = unit();
    let (output, text) = analyze(&["verify", "--man=no"], &path);
    assert!(output.status.success(), "{text}");
    // systemd only warns about an unknown directive.
    let name = path.file_name().unwrap().to_str().unwrap();
    let ours: Vec<&str> = text.lines().filter(|line| line.contains(name)).collect();
    assert!(ours.is_empty(), "{ours:?}");
}

/// The OOM killer must choose the back end before a VMM, whose score is 0.
#[test]
fn the_unit_limits_memory_and_has_an_oom_score() {
    let text = std::fs::read_to_string(contrib().join(UNIT)).unwrap();
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    assert!(value("OOMScoreAdjust=").parse::<i32>().unwrap() > 0);
    assert!(value("MemoryMax=").ends_with('M'));
    assert_eq!(value("Restart="), "always");
}

#[test]
fn the_unit_is_hardened() {
    let (_dir, path) = unit();
    let threshold = format!("--threshold={EXPOSURE}");
    let (output, text) = analyze(&["security", "--offline=yes", "--no-pager", &threshold], &path);
    assert!(output.status.success(), "{text}");
}

/// The options in the unit's command line exist.
#[test]
fn the_command_line_of_the_unit_is_valid() {
    let text = std::fs::read_to_string(contrib().join(UNIT)).unwrap();
    let start = text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/aerostat "));
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("missing/vm1.sock");
    let words = start.unwrap().split(' ').filter(|word| !word.starts_with('$'));
    let words = words.map(|word| word.replace("%i", "vm1"));
    let words = words.map(|word| match word.strip_prefix("/run/") {
        Some(_) => socket.to_str().unwrap().to_owned(),
        None => word,
    });
    let mut program = Command::new(env!("CARGO_BIN_EXE_aerostat"));
    let output = program.args(words).env("AEROSTAT_RUNTIME_DIR", dir.path()).output().unwrap();
    // Not the exit code of wrong usage: only the directory is missing.
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}
