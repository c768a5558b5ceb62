//! The report as an SVG picture: one bar per case, on a logarithmic scale.

use std::fmt::Write;

use crate::inflate::{Case, CaseReport, HostPages, MemoryState, Report};

const WIDTH: f64 = 860.0;
/// Width of the labels on the left and for the figures on the right.
const LABELS: f64 = 250.0;
const FIGURES: f64 = 90.0;
const BAR: f64 = 16.0;
const GAP: f64 = 4.0;
const TITLE: f64 = 30.0;
/// Start of the scale, and its number of decades.
const LEAST_MS: f64 = 0.1;
const DECADES: u32 = 5;

/// Draws the report for guests of `guest_mib` as SVG.
pub fn svg(report: &Report, guest_mib: u64) -> String {
    let mut body = String::new();
    let mut y = 28.0;
    for backing in HostPages::ALL {
        for memory in MemoryState::ALL {
            let of_group = |case: &&CaseReport| {
                case.backing == backing && case.memory == memory && case.guest_mib == guest_mib
            };
            let cases: Vec<_> = report.cases.iter().filter(of_group).collect();
            if cases.is_empty() {
                continue;
            }
            text(&mut body, 8.0, y + 14.0, "start", "600", &title(memory, backing));
            y += TITLE - 8.0;
            for case in cases {
                bar(&mut body, y, case);
                y += BAR + GAP;
            }
            y += TITLE / 2.0;
        }
    }
    let scale = scale(y);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n{scale}{body}</svg>\n",
        height = y + 24.0,
    )
}

fn title(memory: MemoryState, backing: HostPages) -> String {
    let memory = match memory {
        MemoryState::Idle => "idle",
        MemoryState::Touched => "touched",
        MemoryState::Fragmented => "fragmented",
    };
    let backing = match backing {
        HostPages::Small => "4 KiB host pages",
        HostPages::Huge => "huge host pages",
    };
    format!("{memory} memory, {backing}")
}

fn bar(body: &mut String, y: f64, case: &CaseReport) {
    let (label, colour) = match case.name {
        Case::Classic => ("stock driver, page by page", "#9aa0a6"),
        Case::Stock => ("stock driver, Aerostat's device", "#5b8def"),
        Case::Bitmap => ("Aerostat's driver and device", "#1b7f4b"),
    };
    let end = position(case.wall_ms.median);
    let width = (end - LABELS).max(1.0);
    text(body, LABELS - 8.0, y + 12.0, "end", "400", label);
    let _ = writeln!(
        body,
        "<rect x=\"{LABELS}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
    );
    text(body, end + 6.0, y + 12.0, "start", "400", &format!("{:.1} ms", case.wall_ms.median));
}

/// Lines at the powers of ten, with their values.
fn scale(bottom: f64) -> String {
    let mut lines = String::new();
    for decade in 0..=DECADES {
        let ms = LEAST_MS * 10f64.powi(i32::try_from(decade).unwrap_or(0));
        let x = position(ms);
        let _ = writeln!(
            lines,
            "<line x1=\"{x:.1}\" y1=\"24\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"#e3e5e8\"/>"
        );
        text(&mut lines, x, 16.0, "middle", "400", &format!("{ms} ms"));
    }
    lines
}

fn position(ms: f64) -> f64 {
    let decades = (ms.max(LEAST_MS) / LEAST_MS).log10().min(f64::from(DECADES));
    LABELS + decades / f64::from(DECADES) * (WIDTH - LABELS - FIGURES)
}

fn text(into: &mut String, x: f64, y: f64, anchor: &str, weight: &str, words: &str) {
    let _ = writeln!(
        into,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\">{words}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_grows_with_its_time_and_stays_in_the_picture() {
        assert!(position(1.0) < position(10.0));
        assert!(position(0.0) >= LABELS);
        assert!(position(1e9) + FIGURES <= WIDTH);
    }
}
