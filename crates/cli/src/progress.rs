//! What is going on: one line that changes on a terminal, lines elsewhere.

use std::cell::{Cell, RefCell};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use control::Size;
use indicatif::{ProgressBar, ProgressStyle};

/// Between two pictures of the spinner.
const TICK: Duration = Duration::from_millis(100);

/// Shows on standard error how far a long command is.
pub struct Steps {
    bar: Option<ProgressBar>,
    /// The least time between two lines.
    pause: Duration,
    last: Cell<Option<Instant>>,
}

impl Steps {
    /// Shows each step.
    pub fn start() -> Self {
        Self::sparse(Duration::ZERO)
    }

    /// Where there is no terminal, a line at most every `pause`.
    pub fn sparse(pause: Duration) -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::new_spinner);
        if let Some(bar) = &bar {
            // Cut where the terminal ends; one that does not parse leaves the default style.
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
            diagnostics::say!("{step}");
            self.last.set(Some(Instant::now()));
        }
    }

    /// Removes the line from a terminal.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A bar that begins anew with each phase; a line for each phase where there is no terminal.
pub struct Bar {
    bar: Option<ProgressBar>,
    phase: RefCell<String>,
}

impl Bar {
    /// Shows the bar on a terminal.
    pub fn start() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0));
        if let Some(bar) = &bar {
            // One that does not parse leaves the default style.
            let template = "{prefix:12} [{wide_bar}] {percent:>3} %  {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
        }
        Self { bar, phase: RefCell::default() }
    }

    /// Shows how far the phase is, and how much was sent in all.
    pub fn show(&self, phase: &str, done: u64, of: u64, sent: Size) {
        let is_new = *self.phase.borrow() != phase;
        phase.clone_into(&mut self.phase.borrow_mut());
        if let Some(bar) = &self.bar {
            bar.set_prefix(phase.to_owned());
            bar.set_length(of.max(1));
            bar.set_position(done);
            bar.set_message(format!("{sent:#} sent"));
        } else if is_new {
            diagnostics::say!("{phase}");
        }
    }

    /// Removes the line from a terminal.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
