//! The command line with a real guest.

use bench::Driver;
use control::{BalloonStatus, Direction, Status};
use lab::Backing;
use serde::de::DeserializeOwned;

use crate::fixture::Host;

/// Memory of the guest, in MiB.
const MEMORY_MIB: u64 = 1024;

/// Balloon target.
const BALLOON_BYTES: u64 = 512 << 20;

/// Maximum messages of our driver for that.
const MOST_MESSAGES: u64 = 10;

const NAME: &str = "command-line";

#[test]
fn status_and_balloon_work_on_a_guest() {
    let host = Host::start(NAME, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    fixture.run("touch 900");

    let balloon: BalloonStatus = json(&host, &["balloon", NAME, "512MiB", "--json"]);
    assert!(balloon.at_target);
    assert_eq!((balloon.target_bytes, balloon.actual_bytes), (BALLOON_BYTES, BALLOON_BYTES));
    let change = balloon.last_change.unwrap();
    assert_eq!((change.direction, change.from_pages), (Direction::Inflate, 0));
    assert!((1..=MOST_MESSAGES).contains(&change.messages), "{change:?}");
    assert_eq!(change.released_bytes, BALLOON_BYTES);

    let status: Status = json(&host, &["status", NAME, "--json"]);
    assert_eq!((status.name.as_str(), status.pid), (NAME, host.backend.pid()));
    assert_eq!((status.guest.connected, status.guest.driver), (true, control::Driver::Aerostat));
    assert_eq!(status.balloon.actual_bytes, BALLOON_BYTES);
    assert!(status.resident_bytes.unwrap() <= (MEMORY_MIB << 20) - BALLOON_BYTES);
    assert_eq!(status.faults.total(), 0, "{:?}", status.faults);

    let table = done(&host, &["status"]);
    let row: Vec<_> = table.lines().nth(1).unwrap().split("  ").map(str::trim).collect();
    let row: Vec<_> = row.into_iter().filter(|cell| !cell.is_empty()).collect();
    assert_eq!((row[0], row[1], row[2]), (NAME, "running", "aerostat"), "{table}");
    assert_eq!((row[4], row[5], row[7]), ("512 MiB", "512 MiB", "0"), "{table}");
    let details = done(&host, &["status", NAME]);
    assert!(details.contains("512 MiB of 512 MiB, at target"), "{details}");
    assert!(details.contains("driver aerostat (must-tell-host"), "{details}");

    figures(&host);
    let said = done(&host, &["balloon", NAME, "0"]);
    assert!(said.starts_with("command-line: deflated from 512 MiB to 0 B in "), "{said}");
    fixture.fill_and_verify("data", 800, 1);
}

#[test]
fn balloon_times_out_without_a_driver() {
    let host = Host::start(NAME, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Own);
    let (code, _, err) = host.aerostat(&["balloon", NAME, "512MiB", "--timeout", "100ms"]);
    assert_eq!(code, Some(4), "{err}");
    assert!(err.contains("or its driver has not started; the target stays set"), "{err}");
    done(&host, &["balloon", NAME, "0"]);
    let (code, _, err) = host.aerostat(&["balloon", NAME, "256MiB", "--timeout", "100ms"]);
    assert_eq!(code, Some(4), "{err}");
    fixture.load_driver();
    assert_eq!(host.wait_at_target().balloon.actual_bytes, 256 << 20);
}

#[test]
fn impossible_targets_are_errors() {
    let host = Host::start(NAME, Backing::Small, MEMORY_MIB);
    let mut fixture = host.boot(Driver::Own);
    fixture.load_driver();
    let (code, out, err) = host.aerostat(&["balloon", "other", "1GiB"]);
    assert_eq!((code, out.as_str()), (Some(3), ""), "{err}");
    assert!(err.contains("`aerostat status` lists the running guests"), "{err}");
    let (code, _, err) = host.aerostat(&["balloon", NAME, "2GiB"]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.starts_with("error: a balloon of 2 GiB does not fit into a guest of "), "{err}");
    // The target is unchanged.
    let balloon = host.wait_at_target().balloon;
    assert_eq!((balloon.generation, balloon.target_pages), (0, 0));
}

/// Checks the metrics.
fn figures(host: &Host) {
    let text = host.client.metrics().unwrap();
    for (name, labels, value) in [
        ("guest_connected", "", "1"),
        ("guest_driver_info", ",driver=\"aerostat\"", "1"),
        ("balloon_target_bytes", "", "536870912"),
        ("balloon_actual_bytes", "", "536870912"),
        ("balloon_at_target", "", "1"),
        ("released_bytes_total", "", "536870912"),
        ("release_errors_total", "", "0"),
    ] {
        let line = format!("aerostat_{name}{{guest=\"{NAME}\"{labels}}} {value}");
        assert!(text.lines().any(|seen| seen == line), "{line} is not in\n{text}");
    }
    let faults = text.lines().find(|line| line.starts_with("aerostat_faults_total"));
    assert_eq!(faults, None);
}

/// Output of a command that must succeed without an error text.
fn done(host: &Host, arguments: &[&str]) -> String {
    let (code, out, err) = host.aerostat(arguments);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{arguments:?}: {out}");
    out
}

fn json<T: DeserializeOwned>(host: &Host, arguments: &[&str]) -> T {
    let text = done(host, arguments);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}
