//! The command line as seen from a shell, with fake balloons.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

#[path = "../../control/tests/fake/mod.rs"]
mod fake;

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use control::api::{DEFAULT_RESERVE_BYTES, FreeKind};
use control::{GuestErrorKind, GuestRequest, Server, Status};
use fake::{FakeBalloon, Guest};
use serde_json::Value;
use tempfile::TempDir;

/// A runtime directory with fake guests.
struct Host {
    dir: TempDir,
    servers: Vec<Server>,
}

impl Host {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), servers: Vec::new() }
    }

    fn start(&mut self, name: &str, guest: Guest) -> Arc<FakeBalloon> {
        let balloon = Arc::new(FakeBalloon::new(name, guest));
        let server = Server::bind(&self.socket(name), Arc::clone(&balloon) as _).unwrap();
        self.servers.push(server);
        balloon
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aerostat"));
        command.args(args).env("AEROSTAT_RUNTIME_DIR", self.dir.path()).env_remove("RUST_LOG");
        command.stdin(Stdio::null());
        command
    }

    /// Returns exit code, standard output and standard error.
    fn run(&self, args: &[&str]) -> (i32, String, String) {
        result_of(&self.command(args).output().unwrap())
    }
}

fn result_of(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn an_implausibly_small_size_does_not_change_the_balloon() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Obeys);
    assert_eq!(host.run(&["balloon", "web-1", "2GiB"]).0, 0);
    for size in ["1024", "4095", "1k", "1", "0.9k"] {
        assert_eq!(host.run(&["balloon", "web-1", size]).0, 2, "{size}");
        assert_eq!(
            control::BalloonControl::status(&*balloon).balloon.target_pages,
            1 << 19,
            "{size}"
        );
    }
    assert_eq!(host.run(&["balloon", "web-1", "1.3GiB"]).0, 0, "rounded to whole pages");
    assert_eq!(host.run(&["balloon", "web-1", "0"]).0, 0);
    assert_eq!(control::BalloonControl::status(&*balloon).balloon.target_pages, 0);
}

#[test]
fn balloon_inflates_shows_and_deflates() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let (code, out, err) = host.run(&["balloon", "web-1", "3GiB"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, "web-1: inflated from 0 B to 3 GiB in 12.5 ms, 1 message, 2 release calls\n");
    let (code, out, _) = host.run(&["balloon", "web-1"]);
    assert_eq!(code, 0);
    assert_eq!(out, "web-1: the balloon holds 3 GiB of a guest of 4 GiB, its target is 3 GiB\n");
    let (_, out, _) = host.run(&["balloon", "web-1", "1.5G"]);
    assert!(out.starts_with("web-1: deflated from 3 GiB to 1536 MiB in"), "{out}");
    // Rounded to whole pages, and the path of a socket instead of a name.
    let socket = host.socket("web-1");
    let (code, out, err) = host.run(&["balloon", socket.to_str().unwrap(), "9.8KiB", "--json"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let balloon = json(&out);
    assert_eq!(balloon["actual_bytes"], 8192);
    assert_eq!(balloon["at_target"], true);
    assert_eq!(balloon["last_change"]["direction"], "deflate");
    let (_, again, _) = host.run(&["balloon", "web-1", "--json"]);
    assert_eq!(json(&again), balloon);
}

#[test]
fn waiting_for_a_slow_guest_prints_progress_lines() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Waits);
    let guest = thread::spawn(move || {
        balloon.until_target(1 << 18);
        balloon.reach(1 << 17);
        balloon.until_waits(2);
        balloon.reach(1 << 18);
    });
    let (code, out, err) = host.run(&["balloon", "web-1", "1GiB", "--timeout", "60s"]);
    guest.join().unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("inflated from 0 B to 1 GiB"), "{out}");
    assert!(err.lines().last().unwrap().ends_with("of 1 GiB"), "{err}");
}

#[test]
fn an_invalid_guest_is_refused_before_its_socket_is_created() {
    let host = Host::new();
    let run = ["run", "--name", "web-1", "--kernel", "/none", "--memory"];
    let (code, out, err) = host.run(&[&run[..], &["1GB"]].concat());
    assert_eq!((code, out.as_str()), (2, ""), "{err}");
    let (code, out, err) = host.run(&[&run[..], &["1000MiB", "--cpus", "0"]].concat());
    assert_eq!((code, out.as_str()), (2, ""), "{err}");
    let (code, out, err) = host.run(&[&run[..], &["4097KiB"]].concat());
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("operator: a guest cannot have 4195328 bytes"), "{err}");
    assert!(!host.socket("web-1").exists());
}

#[test]
fn a_timeout_reports_the_progress() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Waits);
    balloon.reach(1 << 17);
    let command = ["balloon", "web-1", "1GiB", "--timeout", "20ms"];
    let (code, out, err) = host.run(&command);
    assert_eq!((code, out.as_str()), (4, ""));
    let what = "error: the balloon of web-1 holds 512 MiB, not 1 GiB, after 20ms\n  hint: ";
    assert!(err.contains(what), "{err}");
    assert!(err.contains("driver"), "{err}");
    let (code, out, err) = host.run(&[&command[..], &["--json"]].concat());
    assert_eq!((code, json(&out)["at_target"].clone()), (4, Value::Bool(false)));
    assert!(err.starts_with("error: "), "no progress with --json: {err}");
    balloon.edit(|status| status.balloon.max_bytes = None);
    let (code, _, err) = host.run(&command);
    assert_eq!(code, 4);
    assert!(err.contains("no guest is connected"), "{err}");
}

#[test]
fn a_target_that_another_client_replaced_is_a_failure() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Waits);
    let other = thread::spawn(move || {
        balloon.until_target(1 << 18);
        balloon.until_waits(1);
        control::BalloonControl::set_target(&*balloon, 1 << 19).unwrap();
    });
    let start = Instant::now();
    let (code, out, err) = host.run(&["balloon", "web-1", "1GiB", "--timeout", "60s"]);
    other.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(30), "it does not wait for the other change");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("another client set the balloon of web-1 to 2 GiB"), "{err}");
}

#[test]
fn a_server_error_is_printed_with_its_hint() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let (code, out, err) = host.run(&["balloon", "web-1", "5GiB"]);
    assert_eq!((code, out.as_str()), (1, ""));
    let what = "error: a balloon of 5 GiB does not fit into a guest of 4 GiB\n  hint: ask for less";
    assert!(err.starts_with(what), "{err}");
}

#[test]
fn a_missing_guest_is_exit_code_3() {
    let host = Host::new();
    let (code, out, err) = host.run(&["balloon", "nobody", "1GiB"]);
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.starts_with("error: there is no control socket at "), "{err}");
    assert!(
        err.contains("\n  hint: check the name and the user; `aerostat status` lists"),
        "{err}"
    );
    drop(UnixListener::bind(host.socket("dead")).unwrap());
    let (code, _, err) = host.run(&["status", "dead"]);
    assert_eq!(code, 3);
    assert!(err.contains("the one that did has exited"), "{err}");
}

#[test]
fn wrong_usage_is_exit_code_2_and_names_the_valid_forms() {
    let host = Host::new();
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage: aerostat"),
        (&["balon"], "balloon"),
        (&["balloon"], "<GUEST>"),
        (&["balloon", "web-1", "3GB"], "use a form like 3GiB, 512MiB, 1.5G or 1048576"),
        (&["balloon", "web-1", "much"], "use a form like 3GiB"),
        (&["balloon", "web 1", "3GiB"], "use up to 64 letters"),
        (&["balloon", ".."], "use up to 64 letters"),
        (&["balloon", "web-1", "3GiB", "--timeout", "30"], "time unit needed"),
        (&["balloon", "web-1", "1024"], "did you mean 1024MiB?"),
        (&["balloon", "web-1", "4095"], "did you mean 4095MiB?"),
        (&["balloon", "web-1", "1k"], "did you mean 1MiB?"),
        (&["balloon", "web-1", "3000000000"], "did you mean 2999996416B?"),
        (&["run", "--name", "a", "--memory", "1024"], "did you mean 1024MiB?"),
        (&["free-pages", "web-1", "--hold", "--reserve", "128"], "did you mean 128MiB?"),
        (&["migrate", "web-1", "localhost:1", "--plain", "--bandwidth", "100"], "mean 100MiB?"),
        (&["receive", "--name", "a", "--listen", "localhost:1", "--max-memory", "64"], "64MiB?"),
        (&["drop-caches", "web-1", "--timeout", "11min"], "can be at most 10m"),
        (&["free-pages", "web-1", "--timeout", "601s"], "can be at most 10m"),
        (&["vhost-user", "--name", "a"], "--socket <PATH>"),
        (&["vhost-user", "--socket", "s", "--name", "a/b"], "use up to 64 letters"),
        (&["vhost-user", "--socket", "s", "--name", "a", "--release", "x"], "per-page"),
        (&["status", "--log", "control=loud"], "--log"),
    ];
    for (args, text) in cases {
        let (code, out, err) = host.run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
        assert!(err.contains(text), "{args:?}: {err}");
    }
}

#[test]
fn help_lists_the_exit_codes() {
    let (code, out, _) = Host::new().run(&["--help"]);
    assert_eq!(code, 0);
    assert!(out.contains("4  timed out"), "{out}");
    let (code, out, _) = Host::new().run(&["--version"]);
    assert_eq!((code, out.as_str()), (0, concat!("aerostat ", env!("CARGO_PKG_VERSION"), "\n")));
}

#[test]
fn status_shows_one_guest() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Obeys);
    control::BalloonControl::set_target(&*balloon, 3 << 18).unwrap();
    balloon.edit(|status| {
        status.faults.guest.insert("page_outside_memory".into(), 3);
        status.faults.host.insert("discard_failed".into(), 1);
    });
    let (code, out, _) = host.run(&["status", "web-1"]);
    assert_eq!(code, 0);
    for line in [
        "name         web-1",
        "guest        driver aerostat (must-tell-host, page-bitmap)",
        "memory       4 GiB, 1 GiB of it in host memory",
        "balloon      3 GiB of 3 GiB, at target",
        "last change  0 B to 3 GiB in 12.5 ms (allocate 0.0, send 0.0, translate 0.0, release 0.0), \
         1 message, 2 release calls",
        "release      background, parts of huge pages: split",
        "unreleased   0 B pending, 0 B in flight, 0 B waiting",
        "released     8 KiB in 0 calls, 0 errors",
        "faults       guest page_outside_memory 3, host discard_failed 1",
    ] {
        assert!(out.lines().any(|seen| seen == line), "{line:?} is not in\n{out}");
    }
    let (code, out, _) = host.run(&["status", "web-1", "--json"]);
    assert_eq!(code, 0);
    let status: Status = serde_json::from_str(&out).unwrap();
    assert_eq!(status, control::BalloonControl::status(&*balloon));
}

#[test]
fn status_lists_all_guests_and_marks_dead_ones() {
    let mut host = Host::new();
    let (code, out, _) = host.run(&["status"]);
    assert_eq!((code, out), (0, format!("no guests in {}\n", host.dir.path().display())));
    host.start("web-1", Guest::Obeys);
    host.start("db", Guest::Obeys).edit(|status| status.guest.connected = false);
    drop(UnixListener::bind(host.socket("old")).unwrap());
    fs::write(host.dir.path().join("note.txt"), "").unwrap();
    let (code, out, err) = host.run(&["status"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let rows: Vec<Vec<_>> = out.lines().map(|line| line.split("  ").collect()).collect();
    let rows = rows.into_iter().map(|row| {
        row.into_iter().map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>().join("|")
    });
    let expected = [
        "NAME|STATE|DRIVER|MEMORY|BALLOON|TARGET|RESIDENT|FAULTS",
        "db|running|-|4 GiB|0 B|0 B|1 GiB|0",
        "old|dead|-|-|-|-|-|-",
        "web-1|running|aerostat|4 GiB|0 B|0 B|1 GiB|0",
    ];
    assert_eq!(rows.collect::<Vec<_>>(), expected);
    let (code, out, _) = host.run(&["status", "--json"]);
    assert_eq!(code, 0);
    let rows = json(&out);
    assert_eq!(rows[1]["name"], "old");
    assert_eq!(rows[1]["state"], "dead");
    assert_eq!(rows[1]["status"], Value::Null);
    assert!(rows[1]["error"].as_str().unwrap().contains("has exited"));
    assert_eq!(rows[2]["status"]["guest"]["driver"], "aerostat");
}

#[test]
fn hanging_guests_do_not_delay_the_table_for_long() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let hangs = |number: u32| UnixListener::bind(host.socket(&format!("hangs-{number}"))).unwrap();
    let _hanging: Vec<_> = (0..20).map(hangs).collect();
    let start = Instant::now();
    let (code, out, _) = host.run(&["status", "--json"]);
    assert_eq!(code, 0);
    let rows = json(&out);
    let states: Vec<_> = rows.as_array().unwrap().iter().map(|row| &row["state"]).collect();
    assert_eq!(states.iter().filter(|state| **state == "unreachable").count(), 20);
    assert_eq!((rows[20]["name"].as_str(), states[20].as_str()), (Some("web-1"), Some("running")));
    // In sequence they would take 40 s.
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

#[test]
fn a_closed_pipe_is_not_a_failure() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let mut child = host.command(&["status", "web-1"]);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let (code, _, err) = result_of(&child.wait_with_output().unwrap());
    assert_eq!((code, err.as_str()), (0, ""));
}

#[test]
fn without_a_runtime_directory_the_hint_names_the_variable() {
    let host = Host::new();
    let run = |dir: &Path| {
        result_of(&host.command(&["status"]).env("AEROSTAT_RUNTIME_DIR", dir).output().unwrap())
    };
    let (code, _, err) = run(Path::new("relative"));
    assert_eq!(code, 1);
    assert!(err.contains("not an absolute path\n  hint: set AEROSTAT_RUNTIME_DIR"), "{err}");
    let (code, out, _) = run(&host.dir.path().join("none"));
    assert_eq!(code, 0);
    assert!(out.starts_with("no guests in "), "{out}");
}

#[test]
fn a_back_end_is_reached_by_its_name_until_sigterm() {
    let host = Host::new();
    let socket = host.dir.path().join("monitor");
    let args = ["vhost-user", "--socket", socket.to_str().unwrap(), "--name", "web-1"];
    let mut command = host.command(&[&args[..], &["--release", "immediate"]].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It logs its first line when the sockets exist.
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    assert!(line.contains("web-1"), "{line}");
    let (code, out, err) = host.run(&["status", "web-1", "--json"]);
    assert_eq!(code, 0, "{err}");
    let status: Status = serde_json::from_str(&out).unwrap();
    assert_eq!(status.pid, child.id());
    assert_eq!((status.guest.connected, status.release.mode.as_str()), (false, "immediate"));
    let (code, _, err) = host.run(&args);
    assert_eq!(code, 1, "a second one with the same name is refused: {err}");
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    // Its exit closes its log; the timeout is for a process that hangs.
    let (ended, end) = mpsc::channel();
    thread::spawn(move || ended.send(io::read_to_string(log)));
    if end.recv_timeout(Duration::from_secs(20)).is_err() {
        child.kill().unwrap();
        panic!("the back end does not end on SIGTERM");
    }
    assert!(child.wait().unwrap().success());
    assert!(!host.socket("web-1").exists() && !socket.exists());
}

#[test]
fn caches_are_dropped_and_their_sizes_shown() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let (code, out, err) = host.run(&["drop-caches", "web-1"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "web-1: freed 770 MiB in 12.5 ms\n\
         \x20 page cache  1 GiB before, 256 MiB after, 768 MiB freed\n\
         \x20 slab        4 MiB before, 2 MiB after, 2 MiB freed\n"
    );
    let (code, out, _) = host.run(&["drop-caches", "web-1", "--what", "slab", "--json"]);
    assert_eq!(code, 0);
    assert_eq!(json(&out)["freed_bytes"], 2 << 20);
    let (code, out, err) = host.run(&["balloon", "web-1", "3GiB", "--drop-caches"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[0], "web-1: freed 770 MiB in 12.5 ms");
    assert!(lines[1].starts_with("web-1: inflated from 0 B to 3 GiB in"), "{out}");
}

#[test]
fn a_failed_request_prints_the_reason_and_sets_the_exit_code() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Waits);
    let reasons = [
        (
            GuestErrorKind::NotPossible,
            1,
            "the guest's driver cannot drop caches: it has no request queue",
        ),
        (GuestErrorKind::TimedOut, 4, "the guest did not drop caches within 30000 ms"),
        (GuestErrorKind::Refused, 1, "the guest's kernel refused to drop caches"),
    ];
    for (why, expected, what) in reasons {
        for command in [&["drop-caches", "web-1"][..], &["balloon", "web-1", "1G", "--drop-caches"]]
        {
            balloon.requests(|requests| requests.refuse = Some((why, what)));
            let (code, out, err) = host.run(command);
            assert_eq!((code, out.as_str()), (expected, ""));
            assert_eq!(err, format!("error: {what}\n  hint: do better\n"));
        }
    }
    // The target is unchanged, because the caches were not dropped.
    assert_eq!(control::BalloonControl::status(&*balloon).balloon.target_pages, 0);
    let (code, _, err) = host.run(&["cancel", "web-1"]);
    assert_eq!(code, 1);
    assert!(err.contains("there is no request to stop"), "{err}");
}

#[test]
fn a_request_is_cancelled_from_another_terminal() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Waits);
    let waiting = host.command(&["drop-caches", "web-1"]).stderr(Stdio::piped()).spawn().unwrap();
    balloon.until_open(1);
    let (code, out, _) = host.run(&["cancel", "web-1"]);
    assert_eq!((code, out.as_str()), (0, "web-1: cancelled drop-caches (request 1)\n"));
    let (code, _, err) = result_of(&waiting.wait_with_output().unwrap());
    assert_eq!(code, 1);
    assert!(err.contains("the request was stopped"), "{err}");
}

#[test]
fn free_pages_are_counted_by_block_size_and_drawn() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let (code, out, err) = host.run(&["free-pages", "web-1"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[0], "web-1: 2304 MiB of 4 GiB free, in 12.5 ms");
    assert_eq!(lines[1], "  snapshot 1");
    assert_eq!(lines[2], "  2312 MiB free according to the guest, 512 MiB in the balloon");
    assert_eq!(lines[3], "     4 MiB        512 blocks  2GiB");
    assert_eq!(lines[4], "     2 MiB        128 blocks  256MiB");
    assert!(out.is_ascii(), "no Unicode without a terminal");
    let map: Vec<_> = lines[7..].iter().map(|line| &line[15..]).collect();
    let row = |mark: &str| mark.repeat(64);
    let expected = [row("#"), row("#"), row("."), row("."), row("."), row("."), row("+"), row("o")];
    assert_eq!(map, expected);
    let (code, out, _) = host.run(&["free-pages", "web-1", "--json"]);
    assert_eq!((code, json(&out)["kind"].as_str()), (0, Some("snapshot")));
}

#[test]
fn free_pages_are_held_released_and_written_to_files() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let (svg, bits) = (host.dir.path().join("a.svg"), host.dir.path().join("a.bits"));
    let (svg_text, bits_text) = (svg.to_str().unwrap(), bits.to_str().unwrap());
    let command = ["free-pages", "web-1", "--hold", "--svg", svg_text, "--bitmap", bits_text];
    let (code, out, err) = host.run(&command);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("web-1: 2304 MiB of 4 GiB held free, in 12.5 ms\n"), "{out}");
    assert!(out.contains("hold 1 until --release, or until the guest needs it"), "{out}");
    assert!(fs::read_to_string(&svg).unwrap().starts_with("<svg "));
    assert_eq!(fs::read(&bits).unwrap().len(), (1 << 20) / 8);
    let (code, out, _) = host.run(&["free-pages", "web-1", "--release"]);
    assert_eq!((code, out.as_str()), (0, "web-1: released 2 GiB in 12.5 ms\n"));
    let nowhere = host.dir.path().join("no/a.svg");
    let (code, _, err) = host.run(&["free-pages", "web-1", "--svg", nowhere.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(err.contains("cannot write") && err.contains("no/a.svg"), "{err}");
    // Wrong usage.
    for args in
        [&["--hold", "--release"][..], &["--reserve", "1G"], &["--hold", "--min-block", "4K"]]
    {
        let (code, ..) = host.run(&[&["free-pages", "web-1"], args].concat());
        assert_eq!(code, 2, "{args:?}");
    }
}

#[test]
fn a_hold_request_has_the_given_reserve() {
    let mut host = Host::new();
    let balloon = host.start("web-1", Guest::Waits);
    for (args, reserve_bytes) in
        [(&["--hold"][..], DEFAULT_RESERVE_BYTES), (&["--hold", "--reserve", "1GiB"], 1 << 30)]
    {
        let args = [&["free-pages", "web-1"], args].concat();
        let waiting = host.command(&args).stdout(Stdio::piped()).spawn().unwrap();
        balloon.until_open(1);
        let ask = balloon.requests(|requests| requests.open.values().next().unwrap().0);
        assert_eq!(ask, GuestRequest::Hold { reserve_bytes });
        balloon.requests(fake::Requests::answer);
        assert!(waiting.wait_with_output().unwrap().status.success());
    }
    assert_eq!(fake::free_pages(1, FreeKind::Hold).summary.id, 1);
}

#[test]
fn only_guests_of_aerostat_run_are_migrated() {
    let mut host = Host::new();
    host.start("web-1", Guest::Obeys);
    let (code, _, err) = host.run(&["migrate", "web-1", "127.0.0.1:7000", "--plain"]);
    assert_eq!(code, 1);
    assert!(err.contains("only the guest's balloon") && err.contains("hint: "), "{err}");
    let (code, _, err) = host.run(&["resolve", "web-1"]);
    assert_eq!(code, 1);
    assert!(err.contains("only the guest's balloon"), "{err}");
    // TLS options are required, and must be complete.
    for wrong in [&[][..], &["--tls-cert", "a"], &["--plain", "--tls-cert", "a"]] {
        let words = ["migrate", "web-1", "127.0.0.1:7000"].iter().chain(wrong);
        let (code, _, err) = host.run(&words.copied().collect::<Vec<_>>());
        assert_eq!(code, 2, "{wrong:?}: {err}");
    }
    let (code, _, err) =
        host.run(&["receive", "--name", "vm1", "--listen", "0.0.0.0:0", "--plain"]);
    assert_eq!(code, 1);
    assert!(err.contains("can be reached by other hosts") && err.contains("--tls-cert"), "{err}");
}
