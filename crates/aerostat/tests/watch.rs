//! `aerostat status NAME --watch`, with a fake balloon.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

#[path = "../../control/tests/fake/mod.rs"]
mod fake;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use control::{BalloonControl, Server};
use fake::{FakeBalloon, Guest};
use tempfile::TempDir;

const NAME: &str = "web-1";

struct Host {
    dir: TempDir,
    balloon: Arc<FakeBalloon>,
    _server: Server,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let balloon = Arc::new(FakeBalloon::new(NAME, Guest::Obeys));
        let socket: PathBuf = dir.path().join(format!("{NAME}.sock"));
        let server = Server::bind(&socket, Arc::clone(&balloon) as _).unwrap();
        Self { dir, balloon, _server: server }
    }

    fn aerostat(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aerostat"));
        command.args(args).env("AEROSTAT_RUNTIME_DIR", self.dir.path()).env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn interval_ms(&self) -> u64 {
        self.balloon.status().stats.interval_ms
    }

    /// Watches until the guest has been shown three times.
    fn watch(&self, args: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
        let mut child = self.aerostat(args).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        for _ in 0..3 {
            until_line(&mut out, "faults");
        }
        (child, out)
    }
}

fn until_line(out: &mut impl BufRead, start: &str) {
    let mut line = String::new();
    while !line.starts_with(start) {
        line.clear();
        assert_ne!(out.read_line(&mut line).unwrap(), 0, "it ended before {start}");
    }
}

fn interrupt(mut child: Child, signal: &str) -> ExitStatus {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    child.wait().unwrap()
}

#[test]
fn statistics_are_shown_with_their_age() {
    let host = Host::new();
    let shown = |host: &Host| {
        let output = host.aerostat(&["status", NAME]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(shown(&host).contains("statistics   none\n"), "{}", shown(&host));
    assert!(!shown(&host).contains("reported"), "{}", shown(&host));
    host.balloon.edit(|status| {
        status.stats.age_ms = Some(1500);
        status.stats.stale = true;
        let values = [("free_bytes", 3 << 30), ("major_faults", 7), ("tag_20", 1)];
        status.stats.values = values.map(|(name, value)| (name.into(), value)).into();
        status.reports.messages = 2;
        status.reports.reported_bytes = 8 << 20;
        status.reports.released_bytes = 4 << 20;
        status.reports.release_calls = 1;
        status.reports.poisoned_bytes = 4 << 20;
    });
    let text = shown(&host);
    let line = "statistics   free 3 GiB, major faults 7, tag 20 1 (1.5 s old, stale)\n";
    assert!(text.contains(line), "{text}");
    let line = "reported     8 MiB free, 4 MiB of it released in 1 call, \
                4 MiB not released because of the guest's poison value\n";
    assert!(text.contains(line), "{text}");
}

#[test]
fn watching_polls_statistics_until_it_ends() {
    for signal in ["-INT", "-TERM"] {
        let host = Host::new();
        let (child, _out) = host.watch(&["status", NAME, "--watch", "0.1"]);
        assert_eq!(host.interval_ms(), 100);
        assert!(interrupt(child, signal).success());
        assert_eq!(host.interval_ms(), 0);
    }
}

#[test]
fn watching_keeps_an_interval_set_by_another_client() {
    let host = Host::new();
    host.balloon.edit(|status| status.stats.interval_ms = 100);
    let (child, _out) = host.watch(&["status", NAME, "--watch", "0.2"]);
    assert_eq!(host.interval_ms(), 100, "it is polled more often already");
    assert!(interrupt(child, "-INT").success());
    assert_eq!(host.interval_ms(), 100);

    host.balloon.edit(|status| status.stats.interval_ms = 5000);
    let (child, _out) = host.watch(&["status", NAME, "--watch", "0.1"]);
    assert_eq!(host.interval_ms(), 100);
    host.balloon.edit(|status| status.stats.interval_ms = 777);
    assert!(interrupt(child, "-INT").success());
    assert_eq!(host.interval_ms(), 777, "another client has set it in the meantime");
}

/// As with `| head`.
#[test]
fn watching_ends_when_the_pipe_is_closed() {
    let host = Host::new();
    let (mut child, out) = host.watch(&["status", NAME, "--watch", "0.1"]);
    drop(out);
    assert!(child.wait().unwrap().success());
    assert_eq!(host.interval_ms(), 0);
}

#[test]
fn invalid_periods_are_refused() {
    let host = Host::new();
    for period in ["0", "0.05", "-1", "NaN", "inf", "86401", "soon"] {
        let watch = format!("--watch={period}");
        let output = host.aerostat(&["status", NAME, &watch]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{period}");
    }
    let output = host.aerostat(&["status", "--watch"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "all guests cannot be watched");
    assert_eq!(host.interval_ms(), 0);
}
