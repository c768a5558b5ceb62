//! Progress of long commands: one updated line on a terminal, separate lines elsewhere.

use std::cell::{Cell, RefCell};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use control::Size;
use indicatif::{ProgressBar, ProgressStyle};

/// Spinner interval.
const TICK: Duration = Duration::from_millis(100);

/// Shows the steps of a long command on standard error.
pub struct Steps {
    bar: Option<ProgressBar>,
    /// Minimum time between two lines.
    pause: Duration,
    last: Cell<Option<Instant>>,
}

impl Steps {
    /// Starts to show every step.
    pub fn start() -> Self {
        Self::sparse(Duration::ZERO)
    }

    /// Starts to show steps; without a terminal, a line at most every `pause`.
    pub fn sparse(pause: Duration) -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::new_spinner);
        if let Some(bar) = &bar {
            // Truncated at the terminal's width. A template that does not parse leaves the default
            // style.
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
                bar.set_style(style);
            }
            bar.set_message("preparing the guest");
            bar.enable_steady_tick(TICK);
        }
        Self { bar, pause, last: Cell::new(None) }
    }

    /// Shows one step.
    pub fn show(&self, step: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(step.to_owned());
        } else if self.last.get().is_none_or(|last| last.elapsed() >= self.pause) {
            diagnostics::log_line!("{step}");
            self.last.set(Some(Instant::now()));
        }
    }

    /// Clears the line on a terminal.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A bar that restarts with each phase; without a terminal, a line per phase.
pub struct Bar {
    bar: Option<ProgressBar>,
    phase: RefCell<String>,
}

impl Bar {
    /// Starts to show progress.
    pub fn start() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0));
        if let Some(bar) = &bar {
            // A template that does not parse leaves the default style.
            let template = "{prefix:12} [{wide_bar}] {percent:>3} %  {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
        }
        Self { bar, phase: RefCell::default() }
    }

    /// Shows the progress of the phase and the bytes sent so far.
    pub fn show(&self, phase: &str, done: u64, of: u64, sent: Size) {
        let is_new = *self.phase.borrow() != phase;
        phase.clone_into(&mut self.phase.borrow_mut());
        if let Some(bar) = &self.bar {
            bar.set_prefix(phase.to_owned());
            bar.set_length(of.max(1));
            bar.set_position(done);
            bar.set_message(format!("{sent:#} sent"));
        } else if is_new {
            diagnostics::log_line!("{phase}");
        }
    }

    /// Clears the line on a terminal.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
