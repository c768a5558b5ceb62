//! The table of both VMMs' demos.

use bench::inflate::StagesMs;

/// Result of one case.
pub(super) struct Row {
    pub(super) what: &'static str,
    pub(super) stages_ms: StagesMs,
    pub(super) wall_ms: f64,
    pub(super) messages: u64,
    /// vCPU exits, if counted.
    pub(super) exits: Option<f64>,
    pub(super) returned_mib: f64,
    pub(super) deflate_ms: f64,
}

/// Header of rows. `exits` adds their column.
pub(super) fn header(title: &str, exits: bool) -> String {
    let exits = if exits { format!("{:>9}", "exits") } else { String::new() };
    format!(
        "{title:<40}{:>10}{:>8}{:>11}{:>9}{:>10}{:>10}{exits}{:>10}{:>12}\n",
        "allocate",
        "send",
        "translate",
        "release",
        "total ms",
        "messages",
        "returned",
        "back in ms"
    )
}

impl Row {
    pub(super) fn line(&self) -> String {
        let Self { what, stages_ms: stages, wall_ms, messages, returned_mib, deflate_ms, .. } =
            self;
        let exits = self.exits.map(|exits| format!("{exits:>9.0}")).unwrap_or_default();
        format!(
            "  {what:<38}{:>10.1}{:>8.1}{:>11.1}{:>9.1}{wall_ms:>10.1}{messages:>10}{exits}\
             {returned_mib:>6.0} MiB{deflate_ms:>12.1}\n",
            stages.allocate, stages.send, stages.translate, stages.release,
        )
    }
}
