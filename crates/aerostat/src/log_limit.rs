//! Bounds what guests, front ends, peers and clients can make the log say.
//!
//! A peer that can cause a line can repeat it without end. So each kind of line has a limit for each
//! period; at its end one line says how many more there were. A kind is one place in the code, in
//! threads of one name and for the guest that the line names: a guest of a process that serves
//! several has a thread of its name, and so a limit of its own. Debug and trace lines have no limit.

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

/// Lines of one kind in one period: enough to see what happens.
const LINES: u32 = 20;

/// Length of a period: at 20 lines a minute a kind fills some 5 MiB a day.
const PERIOD: Duration = Duration::from_secs(60);

/// Kinds that are known at a time. There are some hundred places in the code.
const MAX_KINDS: usize = 4096;

/// Bytes of a line's text that are kept to say what was left out.
const MAX_TEXT_BYTES: usize = 120;

/// Lines under this target say what was left out, and are not bounded.
const TARGET: &str = "aerostat::log";

/// One kind of line: where it is in the code, and a hash of the names of thread and guest.
type Kind = (Identifier, u64);

/// Leaves lines out.
pub(crate) struct LineLimit {
    lines: u32,
    period: Duration,
    counts: Arc<Mutex<Counts>>,
    log: OnceLock<WeakDispatch>,
}

#[derive(Default)]
struct Counts {
    kinds: HashMap<Kind, Count>,
    /// A thread waits to tell what was left out.
    teller: bool,
}

struct Count {
    start: Instant,
    lines: u32,
    left_out: u64,
    /// Of the first line that was left out.
    text: String,
}

impl LineLimit {
    pub(crate) fn new() -> Self {
        Self::with(LINES, PERIOD)
    }

    fn with(lines: u32, period: Duration) -> Self {
        Self { lines, period, counts: Arc::default(), log: OnceLock::new() }
    }

    /// True where this line may go to the log.
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
        let new = || Count { start: now, lines: 0, left_out: 0, text: String::new() };
        let count = counts.kinds.entry(kind).or_insert_with(new);
        if now.duration_since(count.start) >= self.period {
            (count.start, count.lines) = (now, 0);
        }
        if count.lines < self.lines {
            count.lines += 1;
            return true;
        }
        if count.left_out == 0 {
            count.text = line.text;
        }
        count.left_out = count.left_out.saturating_add(1);
        let has_teller = std::mem::replace(&mut counts.teller, true);
        drop(counts);
        if !has_teller {
            self.tell_later();
        }
        false
    }

    /// Says at the end of each period what was left out in it, in a thread that ends when nothing
    /// was. Without one it is said by the next that can be started.
    fn tell_later(&self) {
        let (counts, period) = (Arc::clone(&self.counts), self.period);
        let log = self.log.get().cloned();
        let tell = move || {
            loop {
                thread::sleep(period);
                let left_out = take_left_out(&counts);
                // The log is gone with the process.
                let Some(log) = log.as_ref().and_then(WeakDispatch::upgrade) else { return };
                if left_out.is_empty() {
                    return;
                }
                dispatcher::with_default(&log, || {
                    for (lines, text) in left_out {
                        tracing::warn!(target: TARGET, lines, text, "more such lines were left out");
                    }
                });
            }
        };
        if thread::Builder::new().name("log-limit".into()).spawn(tell).is_err() {
            self.counts().teller = false;
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        locked(&self.counts)
    }
}

/// How many lines of each kind were left out; none ends the thread that asks.
fn take_left_out(counts: &Mutex<Counts>) -> Vec<(u64, String)> {
    let mut counts = locked(counts);
    let kinds = counts.kinds.values_mut().filter(|count| count.left_out > 0);
    let take =
        |count: &mut Count| (std::mem::take(&mut count.left_out), std::mem::take(&mut count.text));
    let left_out: Vec<_> = kinds.map(take).collect();
    counts.teller = !left_out.is_empty();
    left_out
}

fn locked(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    // Numbers; no half-made structure.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Subscriber> Layer<S> for LineLimit {
    fn on_register_dispatch(&self, log: &Dispatch) {
        let _ = self.log.set(log.downgrade());
    }

    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // More talkative levels are greater.
        let is_bounded = *metadata.level() <= Level::INFO && metadata.target() != TARGET;
        !is_bounded || self.take(event, Instant::now())
    }
}

/// What of a line matters here.
#[derive(Default)]
struct Line {
    /// Of the guest, where one is named.
    names: DefaultHasher,
    text: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => {
                // Writing to a text does not fail.
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
    fn each_kind_has_its_lines_and_what_is_left_out_is_told() {
        let period = Duration::from_millis(300);
        let (log, text) = log(3, period);
        dispatcher::with_default(&log, || {
            for round in 0..100 {
                tracing::warn!(from = round, "sent away");
                tracing::debug!(round, "looked at");
                if round < 3 {
                    tracing::error!(round, "something else");
                }
            }
        });
        let lines = ["sent away", "something else", "looked at"].map(|what| text.count(what));
        assert_eq!(lines, [3, 3, 100]);
        let end = Instant::now() + Duration::from_secs(20);
        while text.count("lines=97 text=\"sent away\"") == 0 {
            assert!(Instant::now() < end, "{text:?}", text = text.0.lock().unwrap());
            thread::sleep(Duration::from_millis(10));
        }
        // The next period has its lines again, and what is left out then is told as well.
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
    fn guests_have_lines_of_their_own() {
        let (log, text) = log(2, Duration::from_secs(600));
        dispatcher::with_default(&log, || {
            for round in 0..50 {
                tracing::info!(name = format!("vm{}", round % 5), "waiting for a monitor");
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
    fn a_long_text_is_cut() {
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
