//! Rate limit on log lines that guests, front ends, peers and clients can cause.
//!
//! A peer that can cause a line can repeat it indefinitely. So each kind of line has a limit per
//! period; at the end of the period one line reports how many were suppressed. A kind is a
//! callsite, together with the thread name and the guest named in the line: a process that serves
//! several guests has a thread named after each, so each guest has its own limit. Debug and trace
//! lines are not limited.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::{self, Write as _};
use std::hash::{Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::dispatcher::{self, Dispatch, WeakDispatch};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Lines per kind and period.
const LINES: u32 = 20;

/// Length of a period: at 20 lines a minute a kind produces some 5 MiB a day.
const PERIOD: Duration = Duration::from_secs(60);

/// Limit of tracked kinds. The code has some hundred callsites.
const MAX_KINDS: usize = 4096;

/// Bytes kept of the text of a suppressed line.
const MAX_TEXT_BYTES: usize = 120;

/// Target of the lines that report suppressed lines; they are not limited.
const TARGET: &str = "aerostat::log";

/// Kind of line: the callsite, and a hash of the thread's and the guest's name.
type Kind = (Identifier, u64);

/// Suppresses lines over the limit.
pub(crate) struct LineLimit {
    lines: u32,
    period: Duration,
    counts: Arc<Mutex<Counts>>,
    log: OnceLock<WeakDispatch>,
}

#[derive(Default)]
struct Counts {
    kinds: HashMap<Kind, Count>,
    /// A thread is waiting to report suppressed lines.
    reporter: bool,
}

struct Count {
    start: Instant,
    lines: u32,
    suppressed: u64,
    /// Text of the first suppressed line.
    text: String,
}

impl LineLimit {
    pub(crate) fn new() -> Self {
        Self::with(LINES, PERIOD)
    }

    fn with(lines: u32, period: Duration) -> Self {
        Self { lines, period, counts: Arc::default(), log: OnceLock::new() }
    }

    /// Returns whether to log this line.
    fn take(&self, event: &Event<'_>, now: Instant) -> bool {
        let mut line = Line::default();
        event.record(&mut line);
        let mut names = line.names;
        thread::current().name().hash(&mut names);
        let kind = (event.metadata().callsite(), names.finish());
        let mut counts = self.counts();
        if counts.kinds.len() >= MAX_KINDS && !counts.kinds.contains_key(&kind) {
            let period = self.period;
            counts.kinds.retain(|_, count| now.duration_since(count.start) < period);
        }
        if counts.kinds.len() >= MAX_KINDS && !counts.kinds.contains_key(&kind) {
            return false;
        }
        let new = || Count { start: now, lines: 0, suppressed: 0, text: String::new() };
        let count = counts.kinds.entry(kind).or_insert_with(new);
        if now.duration_since(count.start) >= self.period {
            (count.start, count.lines) = (now, 0);
        }
        if count.lines < self.lines {
            count.lines += 1;
            return true;
        }
        if count.suppressed == 0 {
            count.text = line.text;
        }
        count.suppressed = count.suppressed.saturating_add(1);
        let has_reporter = std::mem::replace(&mut counts.reporter, true);
        drop(counts);
        if !has_reporter {
            self.start_reporter();
        }
        false
    }

    /// Starts a thread that reports the suppressed lines at the end of each period and ends when
    /// there are none. If it cannot be started, the next suppressed line tries again.
    fn start_reporter(&self) {
        let (counts, period) = (Arc::clone(&self.counts), self.period);
        let log = self.log.get().cloned();
        let report = move || {
            loop {
                thread::sleep(period);
                let suppressed = take_suppressed(&counts);
                // The process is exiting.
                let Some(log) = log.as_ref().and_then(WeakDispatch::upgrade) else { return };
                if suppressed.is_empty() {
                    return;
                }
                dispatcher::with_default(&log, || {
                    for (lines, text) in suppressed {
                        tracing::warn!(target: TARGET, lines, text, "suppressed more lines like this");
                    }
                });
            }
        };
        if thread::Builder::new().name("log-limit".into()).spawn(report).is_err() {
            self.counts().reporter = false;
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        locked(&self.counts)
    }
}

/// Takes the number of suppressed lines of each kind; if empty, the reporting thread ends.
fn take_suppressed(counts: &Mutex<Counts>) -> Vec<(u64, String)> {
    let mut counts = locked(counts);
    let kinds = counts.kinds.values_mut().filter(|count| count.suppressed > 0);
    let take = |count: &mut Count| {
        (std::mem::take(&mut count.suppressed), std::mem::take(&mut count.text))
    };
    let suppressed: Vec<_> = kinds.map(take).collect();
    counts.reporter = !suppressed.is_empty();
    suppressed
}

fn locked(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    // Independent numbers, so the counts are consistent after a panic.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Subscriber> Layer<S> for LineLimit {
    fn on_register_dispatch(&self, log: &Dispatch) {
        let _ = self.log.set(log.downgrade());
    }

    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // More verbose levels are greater.
        let is_bounded = *metadata.level() <= Level::INFO && metadata.target() != TARGET;
        !is_bounded || self.take(event, Instant::now())
    }
}

/// The fields of a line that matter here.
#[derive(Default)]
struct Line {
    /// Hash of the guest's name, if the line has one.
    names: DefaultHasher,
    text: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => {
                // Writing to a string cannot fail.
                let _ = write!(self.text, "{value:?}");
                let end = (0..=MAX_TEXT_BYTES).rev().find(|end| self.text.is_char_boundary(*end));
                self.text.truncate(end.unwrap_or(0));
            }
            "name" => format!("{value:?}").hash(&mut self.names),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Text(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Text {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Text {
        fn count(&self, what: &str) -> usize {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().filter(|line| line.contains(what)).count()
        }
    }

    fn log(lines: u32, period: Duration) -> (Dispatch, Text) {
        let text = Text::default();
        let writer = text.clone();
        let log = tracing_subscriber::fmt()
            .with_max_level(Level::DEBUG)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish()
            .with(LineLimit::with(lines, period));
        (Dispatch::new(log), text)
    }

    #[test]
    fn each_kind_has_a_limit_and_suppressed_lines_are_reported() {
        let period = Duration::from_millis(300);
        let (log, text) = log(3, period);
        dispatcher::with_default(&log, || {
            for round in 0..100 {
                tracing::warn!(from = round, "refused");
                tracing::debug!(round, "polled");
                if round < 3 {
                    tracing::error!(round, "something else");
                }
            }
        });
        let lines = ["refused", "something else", "polled"].map(|what| text.count(what));
        assert_eq!(lines, [3, 3, 100]);
        let end = Instant::now() + Duration::from_secs(20);
        while text.count("lines=97 text=\"refused\"") == 0 {
            assert!(Instant::now() < end, "{text:?}", text = text.0.lock().unwrap());
            thread::sleep(Duration::from_millis(10));
        }
        // The next period has its own limit and report.
        thread::sleep(period);
        let before = text.count("WARN test");
        dispatcher::with_default(&log, || {
            (0..5).for_each(|round| tracing::warn!(target: "test", round, "again"));
        });
        assert_eq!(text.count("WARN test"), before + 3);
        while text.count("lines=2 text=\"again\"") == 0 {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn each_guest_has_its_own_limit() {
        let (log, text) = log(2, Duration::from_secs(600));
        dispatcher::with_default(&log, || {
            for round in 0..50 {
                tracing::info!(name = format!("vm{}", round % 5), "waiting for a front end");
            }
        });
        assert_eq!(text.count("waiting"), 10);
        thread::scope(|scope| {
            for guest in ["guest a", "guest b"] {
                let serve = || {
                    dispatcher::with_default(&log, || {
                        (0..50).for_each(|round| tracing::warn!(round, "queue stopped"));
                    });
                };
                thread::Builder::new().name(guest.into()).spawn_scoped(scope, serve).unwrap();
            }
        });
        assert_eq!(text.count("queue stopped"), 4);
    }

    #[test]
    fn a_long_text_is_truncated() {
        let line = "é".repeat(MAX_TEXT_BYTES);
        let (log, text) = log(0, Duration::from_millis(20));
        dispatcher::with_default(&log, || tracing::warn!("{line}"));
        let end = Instant::now() + Duration::from_secs(20);
        while text.count(&"é".repeat(MAX_TEXT_BYTES / 2)) == 0 {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(text.count(&"é".repeat(MAX_TEXT_BYTES / 2 + 1)), 0);
    }
}
