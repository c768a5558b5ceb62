//! `aerostat-lab bench` with its smallest cases: it runs, and its JSON has the documented shape.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::program::{lab_program, succeed};

/// Runs `aerostat-lab bench` and returns its JSON.
fn bench(arguments: &[&str]) -> Value {
    let mut command = Command::new(lab_program());
    command.arg("bench").args(arguments).arg("--json").stdin(Stdio::null());
    let (out, err) = succeed(&mut command);
    println!("{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

#[test]
fn compat_has_one_passing_row_for_every_case() {
    const KERNELS: [&str; 2] = ["uml-6.12", "uml-6.12 page_poison=1"];
    const FEATURES: [&str; 7] = [
        "inflate-deflate",
        "page-bitmap",
        "page-poison",
        "free-page-hint",
        "drop-caches",
        "sleep",
        "back-end-reconnect",
    ];
    let mut arguments = vec!["compat"];
    arguments.extend(KERNELS.iter().flat_map(|name| ["--kernel", name]));
    arguments.extend(FEATURES.iter().flat_map(|name| ["--feature", name]));
    let report = bench(&arguments);
    let rows = report["rows"].as_array().unwrap();
    let mut seen = BTreeSet::new();
    let mut passed = 0;
    for row in rows {
        let word = |key: &str| row[key].as_str().unwrap_or_else(|| panic!("{key}: {row}"));
        assert_eq!(row.as_object().unwrap().len(), 6, "{row}");
        assert!(KERNELS.contains(&word("kernel")) && word("monitor") == "uml", "{row}");
        assert!(["stock", "ours"].contains(&word("driver")), "{row}");
        assert!(seen.insert([word("kernel"), word("driver"), word("feature")]), "twice: {row}");
        match word("result") {
            "pass" => assert!(word("detail").contains("MiB verified"), "{row}"),
            "not-run" => assert!(!word("detail").is_empty(), "{row}"),
            _ => panic!("{row}"),
        }
        passed += u32::from(word("result") == "pass");
    }
    assert_eq!(seen.len(), KERNELS.len() * 2 * FEATURES.len(), "{report}");
    // Aerostat: inflate, bitmaps, caches, sleep, twice, and poison. Stock: inflate, hints
    // and sleep, twice, and poison.
    assert_eq!(passed, 9 + 7, "{report}");
}

#[test]
fn compat_lists_missing_vmms_with_the_reason() {
    let report = bench(&["compat", "--monitor", "cloud-hypervisor", "--monitor", "crosvm"]);
    let rows = report["rows"].as_array().unwrap();
    let monitors: BTreeSet<_> = rows.iter().map(|row| row["monitor"].as_str().unwrap()).collect();
    assert_eq!(monitors, BTreeSet::from(["cloud-hypervisor", "crosvm"]));
    let reasons = |row: &Value| row["result"] == "not-run" && row["detail"] != "";
    assert!(rows.iter().all(reasons), "{report}");
}

#[test]
fn vmms_are_compared_on_the_same_guest() {
    if let Err(why) = lab::qemu::vhost_user().unwrap() {
        println!("not run, {why}");
        return;
    }
    let report = bench(&["monitors", "--rounds", "1", "--guest", "512MiB", "--memory", "touched"]);
    let cases = report["cases"].as_array().unwrap();
    let names: Vec<_> = cases.iter().map(|case| case["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["qemu", "aerostat"]);
    for case in cases {
        for time in ["wall_ms", "cpu_ms", "vcpu_ms", "beside_ms", "deflate_ms"] {
            for figure in ["min", "median", "max"] {
                assert!(case[time][figure].as_f64().unwrap() > 0.0, "{time} of {case}");
            }
        }
        // The host must have back what was touched and then ballooned.
        let (asked, returned) = (&case["asked_mib"], &case["returned_mib"]);
        assert!(returned.as_f64().unwrap() >= asked.as_f64().unwrap() * 0.8, "{case}");
        for key in ["speedup", "speedup_limit"] {
            assert!(case[key].as_f64().unwrap() > 0.0, "{key} of {case}");
        }
    }
}

#[test]
fn the_cost_of_free_page_reporting_is_measured() {
    let small = ["--guest", "1GiB", "--freed", "256MiB", "--backing", "4k", "--rounds", "1"];
    let report = bench(&[&["reporting"][..], &small].concat());
    let case = &report["cases"][0];
    for key in ["cpu_percent", "floor_percent", "own_percent", "own_cpu_ms_per_gib"] {
        assert!(case[key].as_f64().unwrap() > 0.0, "{key} of {case}");
    }
    // At least half of it, even if a busy machine delays the guest.
    assert!(case["back_percent"].as_f64().unwrap() > 50.0, "{case}");
}

/// Median of a figure, which is positive.
fn median(case: &Value, key: &str) -> f64 {
    let figures = ["min", "median", "max"].map(|figure| case[key][figure].as_f64());
    let [Some(min), Some(median), Some(max)] = figures else { panic!("{key} of {case}") };
    assert!(0.0 < min && min <= median && median <= max, "{key} of {case}");
    median
}

/// `aerostat` skips free memory, and sends little more than used memory.
#[test]
fn guests_migrate_with_aerostat_and_with_qemu() {
    let small = ["--guest", "256MiB", "--rounds", "1", "--state", "dirtied-then-freed"];
    let cases = ["--case", "skip", "--case", "qemu-hint"];
    let report = bench(&[&["migrate"][..], &small, &cases].concat());
    let cases = report["cases"].as_array().unwrap();
    let names: Vec<_> = cases.iter().map(|case| case["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["skip", "qemu-hint"]);
    for case in cases {
        assert_eq!(case["guest"], "dirtied-then-freed");
        for key in ["total_ms", "downtime_ms"] {
            median(case, key);
        }
        let (sent, floor) = (median(case, "bytes_sent"), median(case, "floor_bytes"));
        assert!(sent > floor * 0.9, "less than what is in use: {case}");
        assert!(case["pages_skipped"]["free"].as_u64().unwrap() > 0, "{case}");
    }
    let skip = &cases[0];
    let least = median(skip, "floor_bytes") * 1.05 + median(skip, "written_bytes");
    assert!(median(skip, "bytes_sent") <= least, "{skip}");
}

#[test]
fn exits_of_our_vmms_guests_are_counted() {
    let small = ["--guest", "512MiB", "--rounds", "1", "--memory", "touched"];
    let report = bench(&[&["inflate", "--monitor", "kvm"][..], &small].concat());
    let cases = report["cases"].as_array().unwrap();
    let [stock, ours] = &cases[..] else { panic!("{report}") };
    assert_eq!([&stock["name"], &ours["name"]], ["stock", "bitmap"]);
    // A message has 256 pages and costs five exits.
    let messages = 384.0 * 256.0 / 256.0;
    assert!(median(stock, "kicks") >= messages, "{stock}");
    assert!(median(stock, "exits") <= 5.5 * messages, "{stock}");
    assert!(median(ours, "exits") <= 100.0 && median(ours, "kicks") <= 20.0, "{ours}");
    for case in cases {
        assert!(case["returned_mib"].as_f64().unwrap() > 192.0, "{case}");
    }
}
