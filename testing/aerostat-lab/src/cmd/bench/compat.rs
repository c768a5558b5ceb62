//! `aerostat-lab bench compat`: features by kernel, VMM and driver.

use std::collections::BTreeMap;

use bench::compat::{self, Report, Row, Verdict};
use clap::Args;

use super::{failure, program};
use cli::failure::Failure;
use cli::output::{print, print_json};

/// Tests every feature with every kernel, VMM and driver
#[derive(Debug, Args)]
pub(super) struct CompatArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,

    /// Only this kernel, by its name in the report (repeatable)
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,

    /// Only this VMM (repeatable)
    #[arg(long, value_name = "NAME")]
    monitor: Vec<String>,

    /// Only this driver, stock or ours
    #[arg(long, value_name = "NAME")]
    driver: Vec<String>,

    /// Only this feature (repeatable)
    #[arg(long, value_name = "NAME")]
    feature: Vec<String>,
}

pub(super) fn run(args: &CompatArgs) -> Result<(), Failure> {
    let options = compat::CompatOptions {
        program: program()?,
        kernels: args.kernel.clone(),
        monitors: args.monitor.clone(),
        drivers: args.driver.clone(),
        features: args.feature.clone(),
    };
    let report =
        compat::run(&options, &mut |step| diagnostics::log_line!("{step}")).map_err(failure)?;
    if args.json {
        print_json(&report)?
    } else {
        print(&table(&report))?
    }
    let failed = report.rows.iter().filter(|row| row.result == Verdict::Fail).count();
    match failed {
        0 => Ok(()),
        some => {
            let what = std::io::Error::other(format!("{some} of {} failed", report.rows.len()));
            Err(Failure::new(&what, "see the details of the failed rows"))
        }
    }
}

/// Markdown table: a row per guest, a column per feature, and the reasons of cases not run.
fn table(report: &Report) -> String {
    let mut features: Vec<&str> = Vec::new();
    let mut guests: Vec<[&str; 3]> = Vec::new();
    for row in &report.rows {
        if !features.contains(&row.feature.as_str()) {
            features.push(&row.feature);
        }
        if !guests.contains(&guest(row)) {
            guests.push(guest(row));
        }
    }
    let cells: BTreeMap<_, _> =
        report.rows.iter().map(|row| ((guest(row), row.feature.as_str()), row.result)).collect();
    let mut text = format!("| kernel | VMM | driver | {} |\n", features.join(" | "));
    text += &format!("|{}\n", "---|".repeat(features.len() + 3));
    for guest in guests {
        let marks = features.iter().map(|feature| match cells.get(&(guest, *feature)) {
            Some(Verdict::Pass) => "pass",
            Some(Verdict::Fail) => "**fail**",
            Some(Verdict::NotRun) | None => "-",
        });
        let marks: Vec<_> = marks.collect();
        text += &format!("| {} | {} |\n", guest.join(" | "), marks.join(" | "));
    }
    for (title, verdict) in [("Failed", Verdict::Fail), ("Not run", Verdict::NotRun)] {
        text += &reasons(report, title, verdict);
    }
    text
}

/// Each reason once, with its cases.
fn reasons(report: &Report, title: &str, verdict: Verdict) -> String {
    let mut whys: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for row in report.rows.iter().filter(|row| row.result == verdict) {
        let what = match verdict {
            Verdict::Fail => format!("{} with {}", row.feature, guest(row).join(", ")),
            _ => row.feature.clone(),
        };
        let known = whys.entry(&row.detail).or_default();
        if !known.contains(&what) {
            known.push(what);
        }
    }
    let mut text = String::new();
    if !whys.is_empty() {
        text += &format!("\n{title}:\n\n");
    }
    for (why, what) in whys {
        text += &format!("- {}: {why}\n", what.join(", "));
    }
    text
}

fn guest(row: &Row) -> [&str; 3] {
    [&row.kernel, &row.monitor, &row.driver]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kernel: &str, feature: &str, result: Verdict, detail: &str) -> Row {
        Row {
            kernel: kernel.to_owned(),
            monitor: "uml".to_owned(),
            driver: "stock".to_owned(),
            feature: feature.to_owned(),
            result,
            detail: detail.to_owned(),
        }
    }

    #[test]
    fn a_table_has_a_row_per_guest_and_the_reasons() {
        let report = Report {
            rows: vec![
                row("a", "stats", Verdict::Pass, "14 values"),
                row("a", "reporting", Verdict::NotRun, "no queue"),
                row("b", "stats", Verdict::Fail, "no values"),
                row("b", "reporting", Verdict::NotRun, "no queue"),
            ],
        };
        let text = table(&report);
        assert!(text.contains("| a | uml | stock | pass | - |\n"), "{text}");
        assert!(text.contains("| b | uml | stock | **fail** | - |\n"), "{text}");
        assert!(text.contains("\nFailed:\n\n- stats with b, uml, stock: no values\n"), "{text}");
        assert!(text.ends_with("\nNot run:\n\n- reporting: no queue\n"), "{text}");
    }
}
