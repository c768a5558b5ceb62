//! The OpenAPI file and the metrics.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod fake;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use control::{Client, Server};
use fake::{FakeBalloon, Guest};
use serde_json::Value;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

fn ask(path: &Path, method: &str, target: &str) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    let request = format!("{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn the_openapi_file_is_what_the_server_serves() {
    let dir = tempfile::tempdir().unwrap();
    let balloon = Arc::new(FakeBalloon::new("a", Guest::Obeys));
    let server = Server::bind(&dir.path().join("s"), balloon).unwrap();
    let answer = ask(server.path(), "GET", "/v1/openapi.json");
    let (head, served) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("application/json"), "{head}");
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(FILE, served).unwrap();
    }
    let file = std::fs::read_to_string(FILE).unwrap();
    assert!(
        file == served,
        "docs/openapi.json is out of date; run \
         `UPDATE_OPENAPI=1 cargo test -p control --test describe` and review the change"
    );
}

#[test]
fn every_described_endpoint_exists() {
    let dir = tempfile::tempdir().unwrap();
    let balloon = Arc::new(FakeBalloon::new("a", Guest::Obeys));
    let free = fake::free_pages(1, control::api::FreeKind::Snapshot);
    balloon.requests(|requests| requests.newest = Some(free));
    let server = Server::bind(&dir.path().join("s"), balloon).unwrap();
    let api: Value = serde_json::from_str(control::openapi_text()).unwrap();
    let mut described = BTreeSet::new();
    for (path, methods) in api["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let answer = ask(server.path(), &method.to_uppercase(), path);
            let status: u16 = answer[9..12].parse().unwrap();
            // An empty body is invalid, so an existing PUT returns 400. There is nothing to
            // cancel. Hints need no body.
            let expected = match (method.as_str(), path.as_str()) {
                (_, "/v1/cancel") | ("delete", "/v1/migration") => 409,
                (_, "/v1/hints") => 200,
                ("put" | "post", _) => 400,
                _ => 200,
            };
            assert_eq!(status, expected, "{method} {path}");
            described.insert(format!("{method} {path}"));
            for (code, response) in api["paths"][path][method]["responses"].as_object().unwrap() {
                let description = response["description"].as_str().unwrap_or_default();
                assert!(
                    !description.is_empty(),
                    "{method} {path} {code}: OpenAPI requires a description"
                );
            }
        }
    }
    let all = [
        "delete /v1/free-pages",
        "delete /v1/migration",
        "get /v1/balloon",
        "get /v1/free-pages",
        "get /v1/free-pages/bitmap",
        "get /v1/free-pages/picture",
        "get /v1/metrics",
        "get /v1/migration",
        "get /v1/openapi.json",
        "get /v1/release",
        "get /v1/stats",
        "get /v1/status",
        "post /v1/cancel",
        "post /v1/drop-caches",
        "post /v1/free-pages",
        "post /v1/hints",
        "post /v1/migration",
        "post /v1/migration/resolve",
        "post /v1/snapshot",
        "put /v1/balloon",
        "put /v1/release",
        "put /v1/stats",
    ];
    assert_eq!(described, all.map(String::from).into());
}

#[test]
fn every_reference_in_the_description_resolves() {
    let api: Value = serde_json::from_str(control::openapi_text()).unwrap();
    let mut found = 0;
    let mut rest = vec![&api];
    while let Some(value) = rest.pop() {
        match value {
            Value::Object(fields) => rest.extend(fields.values()),
            Value::Array(items) => rest.extend(items),
            Value::String(text) if text.starts_with("#/") => {
                found += 1;
                assert!(api.pointer(&text[1..]).is_some(), "{text}");
            }
            _ => {}
        }
    }
    assert!(found > 10, "only {found} references");
}

/// Parses Prometheus text strictly: every family has HELP, then TYPE, then its samples
/// together. Returns the types, and the samples by name and labels.
fn parse(text: &str) -> (BTreeMap<String, String>, BTreeMap<(String, String), f64>) {
    let (mut kinds, mut samples) = (BTreeMap::new(), BTreeMap::new());
    let (mut helped, mut current) = (String::new(), String::new());
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            assert!(!help.is_empty() && !kinds.contains_key(name), "{line}");
            helped = name.into();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, helped, "{line}");
            assert!(["gauge", "counter"].contains(&kind), "{line}");
            kinds.insert(name.into(), kind.into());
            current = name.into();
        } else {
            let (name, rest) = line.split_once('{').unwrap();
            let (labels, value) = rest.rsplit_once("} ").unwrap();
            assert_eq!(name, current, "{line}");
            let value: f64 = value.parse().unwrap();
            assert!(samples.insert((name.into(), labels.into()), value).is_none(), "{line}");
        }
    }
    (kinds, samples)
}

#[test]
fn the_metrics_are_prometheus_text_with_the_values_of_the_status() {
    let dir = tempfile::tempdir().unwrap();
    let balloon = Arc::new(FakeBalloon::new("a\"b\\c\nd", Guest::Obeys));
    balloon.edit(|status| {
        status.faults.guest.insert("page_outside_memory".into(), 3);
        status.faults.front_end.insert("unknown_request".into(), 1);
        status.stats.age_ms = Some(250);
        status.stats.values = [("free_bytes".into(), 7), ("tag_77".into(), u64::MAX)].into();
        status.reports.released_bytes = 1 << 22;
        status.requests.late_answers = 2;
        let outcomes = [("done".into(), 5), ("timed_out".into(), 1)];
        status.requests.ended.insert("drop-caches".into(), outcomes.into());
    });
    let server = Server::bind(&dir.path().join("s"), Arc::clone(&balloon) as _).unwrap();
    let client = Client::connect(server.path()).unwrap();
    client.set_balloon(3 << 30, std::time::Duration::ZERO).unwrap();
    let text = client.metrics().unwrap();
    let (kinds, samples) = parse(&text);

    for (name, kind) in &kinds {
        assert!(name.starts_with("aerostat_"), "{name}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
    }
    let guest = r#"guest="a\"b\\c\nd""#;
    let value = |name: &str, more: &str| {
        let labels = format!("{guest}{more}");
        *samples.get(&(name.into(), labels.clone())).unwrap_or_else(|| panic!("{name} {labels}"))
    };
    assert_eq!(value("aerostat_uptime_seconds", ""), 61.5);
    assert_eq!(value("aerostat_guest_driver_info", r#",driver="aerostat""#), 1.0);
    assert_eq!(value("aerostat_balloon_target_bytes", ""), 3221225472.0);
    assert_eq!(value("aerostat_balloon_changes_total", ""), 1.0);
    assert_eq!(value("aerostat_balloon_last_change_seconds", ""), 0.0125);
    assert_eq!(value("aerostat_released_bytes_total", ""), 8192.0);
    assert_eq!(value("aerostat_guest_stats_age_seconds", ""), 0.25);
    assert_eq!(value("aerostat_guest_stat", r#",stat="free_bytes""#), 7.0);
    assert_eq!(value("aerostat_guest_stat", r#",stat="tag_77""#), 18446744073709551615.0);
    assert_eq!(value("aerostat_reports_released_bytes_total", ""), 4194304.0);
    assert_eq!(value("aerostat_request_late_answers_total", ""), 2.0);
    let ended = r#",command="drop-caches",outcome="timed_out""#;
    assert_eq!(value("aerostat_requests_total", ended), 1.0);
    let kind = r#",side="guest",kind="page_outside_memory""#;
    assert_eq!(value("aerostat_faults_total", kind), 3.0);
    let kind = r#",side="front_end",kind="unknown_request""#;
    assert_eq!(value("aerostat_faults_total", kind), 1.0);

    balloon.edit(|status| status.stats.stale = true);
    let stale = client.metrics().unwrap();
    assert!(!stale.contains("guest_stat{") && stale.contains("guest_stats_stale{"), "{stale}");
    balloon.edit(|status| status.stats.stale = false);

    let scraped = ask(server.path(), "GET", "/metrics");
    assert!(scraped.contains("content-type: text/plain; version=0.0.4"), "{scraped}");
    assert_eq!(parse(scraped.split_once("\r\n\r\n").unwrap().1).0, kinds);
}
