//! The status as Prometheus text (exposition format 0.0.4).

use std::fmt::{Display, Write};

use crate::api::Status;

/// Content type of the exposition format.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders all metrics. Every sample has the label `guest`, so that the metrics of several guests
/// can be concatenated.
pub(crate) fn render(status: &Status) -> String {
    let mut page = Page { text: String::new(), guest: escape(&status.name) };
    guest(&mut page, status);
    balloon(&mut page, status);
    release(&mut page, status);
    stats(&mut page, status);
    reports(&mut page, status);
    requests(&mut page, status);
    faults(&mut page, status);
    page.text
}

fn guest(page: &mut Page, status: &Status) {
    let guest = &status.guest;
    page.gauge(
        "uptime_seconds",
        "Time since the process began to serve the balloon.",
        seconds(status.uptime_ms),
    );
    page.gauge(
        "guest_connected",
        "1 while a VMM is attached to the balloon.",
        u8::from(guest.connected),
    );
    page.head("guest_driver_info", "gauge", "Driver in the guest, as a label.");
    page.sample("guest_driver_info", &[("driver", guest.driver.as_str())], 1);
    page.gauge(
        "guest_memory_bytes",
        "Memory that the VMM shares with the balloon.",
        guest.memory_bytes,
    );
    if let Some(resident_bytes) = status.resident_bytes {
        page.gauge(
            "guest_resident_bytes",
            "Guest memory resident in the host's RAM.",
            resident_bytes,
        );
    }
    if let Some(exits) = status.exits {
        page.counter("guest_balloon_exits_total", "VM exits caused by the balloon.", exits);
    }
    if let Some(kicks) = status.kicks {
        page.counter(
            "guest_balloon_kicks_total",
            "VM exits caused by notifications of the balloon.",
            kicks,
        );
    }
}

fn balloon(page: &mut Page, status: &Status) {
    let balloon = &status.balloon;
    page.gauge("balloon_target_bytes", "Target size of the balloon.", balloon.target_bytes);
    page.gauge(
        "balloon_actual_bytes",
        "Size of the balloon reported by the guest.",
        balloon.actual_bytes,
    );
    page.gauge(
        "balloon_at_target",
        "1 if the last change is complete.",
        u8::from(balloon.at_target),
    );
    page.counter("balloon_changes_total", "Accepted target changes.", balloon.generation);
    if let Some(change) = &balloon.last_change {
        page.gauge(
            "balloon_last_change_seconds",
            "Duration of the last change, so far if it is in progress.",
            change.wall_ms / 1000.0,
        );
    }
}

fn release(page: &mut Page, status: &Status) {
    let release = &status.release;
    page.head("release_mode_info", "gauge", "When pages are released, as a label.");
    page.sample("release_mode_info", &[("mode", release.mode.as_str())], 1);
    page.gauge(
        "release_pending_bytes",
        "Acknowledged to the guest, not released yet.",
        release.pending_bytes,
    );
    page.gauge("release_in_flight_bytes", "In a release call now.", release.in_flight_bytes);
    page.gauge(
        "release_waiting_bytes",
        "Waiting for the rest of their huge page.",
        release.waiting_bytes,
    );
    page.counter("released_bytes_total", "Memory released to the host.", release.released_bytes);
    page.counter(
        "release_calls_total",
        "System calls that released memory.",
        release.release_calls,
    );
    page.counter("release_errors_total", "Release calls that failed.", release.release_errors);
}

/// Omits stale values, so that a graph has a gap instead of a flat line; their age remains.
fn stats(page: &mut Page, status: &Status) {
    let stats = &status.stats;
    page.gauge(
        "guest_stats_interval_seconds",
        "Polling interval of guest statistics, 0 if off.",
        seconds(stats.interval_ms),
    );
    let Some(age_ms) = stats.age_ms else { return };
    page.gauge("guest_stats_age_seconds", "Age of the guest's statistics.", seconds(age_ms));
    page.gauge(
        "guest_stats_stale",
        "1 if the guest's statistics are out of date.",
        u8::from(stats.stale),
    );
    if stats.stale || stats.values.is_empty() {
        return;
    }
    page.head("guest_stat", "gauge", "Memory statistics reported by the guest's kernel.");
    for (name, value) in &stats.values {
        page.sample("guest_stat", &[("stat", name)], value);
    }
}

fn reports(page: &mut Page, status: &Status) {
    let reports = &status.reports;
    page.counter("reports_total", "Reports received by free page reporting.", reports.messages);
    page.counter(
        "reported_bytes_total",
        "Memory reported by free page reporting.",
        reports.reported_bytes,
    );
    page.counter(
        "reports_released_bytes_total",
        "Memory released because it was reported.",
        reports.released_bytes,
    );
    page.counter(
        "reports_release_calls_total",
        "System calls that released memory.",
        reports.release_calls,
    );
    page.counter(
        "reports_poisoned_bytes_total",
        "Reported memory not released because of the guest's poison value.",
        reports.poisoned_bytes,
    );
    page.counter(
        "reports_partial_bytes_total",
        "Reported memory not released because it is part of a larger host page.",
        reports.partial_bytes,
    );
}

fn requests(page: &mut Page, status: &Status) {
    let requests = &status.requests;
    page.gauge("requests_waiting", "Requests queued for the guest.", requests.waiting);
    page.counter(
        "request_late_answers_total",
        "Responses of the guest that arrived after the timeout.",
        requests.late_answers,
    );
    page.head("requests_total", "counter", "Completed requests, by command and outcome.");
    for (command, outcomes) in &requests.ended {
        for (outcome, count) in outcomes {
            page.sample("requests_total", &[("command", command), ("outcome", outcome)], count);
        }
    }
}

fn faults(page: &mut Page, status: &Status) {
    page.head("faults_total", "counter", "Faults, by side and kind.");
    for (side, kinds) in status.faults.sides() {
        for (kind, count) in kinds {
            page.sample("faults_total", &[("side", side), ("kind", kind)], count);
        }
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// Escapes a label value as the format requires.
fn escape(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

struct Page {
    text: String,
    guest: String,
}

impl Page {
    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "counter", help);
        self.sample(name, &[], value);
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP aerostat_{name} {help}"));
        self.line(format_args!("# TYPE aerostat_{name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let mut all = format!("guest=\"{}\"", self.guest);
        for (label, text) in labels {
            all += &format!(",{label}=\"{}\"", escape(text));
        }
        self.line(format_args!("aerostat_{name}{{{all}}} {value}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}
