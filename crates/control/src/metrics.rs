//! The status as Prometheus text (exposition format 0.0.4).

use std::fmt::{Display, Write};

use crate::api::Status;

/// What a scraper is told about the format.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders every figure. All samples carry the label `guest`, so that the
/// figures of several guests can be put together.
pub(crate) fn render(status: &Status) -> String {
    let mut page = Page { text: String::new(), guest: escape(&status.name) };
    guest(&mut page, status);
    balloon(&mut page, status);
    release(&mut page, status);
    faults(&mut page, status);
    page.text
}

fn guest(page: &mut Page, status: &Status) {
    let guest = &status.guest;
    page.gauge("uptime_seconds", "Time since the balloon is served.", seconds(status.uptime_ms));
    page.gauge(
        "guest_connected",
        "1 while a monitor is attached to the balloon.",
        u8::from(guest.connected),
    );
    page.head("guest_driver_info", "gauge", "Driver in the guest, as a label.");
    page.sample("guest_driver_info", &[("driver", guest.driver.as_str())], 1);
    page.gauge("guest_memory_bytes", "Memory the monitor has shared.", guest.memory_bytes);
    if let Some(resident_bytes) = status.resident_bytes {
        page.gauge(
            "guest_resident_bytes",
            "Guest memory in the RAM of the host, measured on the host.",
            resident_bytes,
        );
    }
    if let Some(exits) = status.exits {
        page.counter(
            "guest_balloon_exits_total",
            "Times the guest left its processor because of the balloon.",
            exits,
        );
    }
}

fn balloon(page: &mut Page, status: &Status) {
    let balloon = &status.balloon;
    page.gauge("balloon_target_bytes", "What the balloon shall hold.", balloon.target_bytes);
    page.gauge("balloon_actual_bytes", "What the guest says it holds.", balloon.actual_bytes);
    page.gauge("balloon_settled", "1 when the last change is over.", u8::from(balloon.settled));
    page.counter("balloon_changes_total", "Accepted changes of the target.", balloon.generation);
    if let Some(change) = &balloon.last_change {
        page.gauge(
            "balloon_last_change_seconds",
            "Time the last change took, or takes until now.",
            change.wall_ms / 1000.0,
        );
    }
}

fn release(page: &mut Page, status: &Status) {
    let release = &status.release;
    page.head("release_mode_info", "gauge", "When pages are released, as a label.");
    page.sample("release_mode_info", &[("mode", release.mode.as_str())], 1);
    page.gauge("release_pending_bytes", "Acknowledged, not released yet.", release.pending_bytes);
    page.gauge("release_in_flight_bytes", "In a release call now.", release.in_flight_bytes);
    page.gauge(
        "release_waiting_bytes",
        "Waiting for the rest of their huge page.",
        release.waiting_bytes,
    );
    page.counter("released_bytes_total", "Memory given back to the host.", release.released_bytes);
    page.counter("release_calls_total", "System calls that gave it back.", release.release_calls);
    page.counter(
        "release_errors_total",
        "Calls among them that the host refused.",
        release.release_errors,
    );
}

fn faults(page: &mut Page, status: &Status) {
    page.head("faults_total", "counter", "What went wrong, by whose fault and by kind.");
    for (side, kinds) in status.faults.sides() {
        for (kind, count) in kinds {
            page.sample("faults_total", &[("side", side), ("kind", kind)], count);
        }
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// A label's value with the three characters escaped that the format names.
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
