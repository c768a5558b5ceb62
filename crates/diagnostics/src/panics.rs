//! Panics: logged, counted, and contained where a caller handles the failure.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

static PANICS: AtomicU64 = AtomicU64::new(0);

static NO_BACKTRACES: AtomicBool = AtomicBool::new(false);

/// The standard library's messages for panics that abort: one during unwinding, or in a function
/// that cannot unwind.
const ENDS_THE_PROCESS: [&str; 2] =
    ["panic in a destructor during cleanup", "panic in a function that cannot unwind"];

/// Installs a hook that logs and counts panics of all threads. The standard library's hook would
/// block on standard error if nothing reads it.
pub fn watch_panics() {
    set_hook(Box::new(log_panic));
}

/// Disables backtraces, whatever RUST_BACKTRACE says: symbolizing opens and maps files, for which a
/// sandbox kills the process.
pub fn hide_backtraces() {
    NO_BACKTRACES.store(true, Ordering::SeqCst);
}

/// The number of panics since [`watch_panics`]. Work that must not continue after a panic compares
/// it with an earlier value.
#[must_use]
pub fn panics() -> u64 {
    PANICS.load(Ordering::SeqCst)
}

fn log_panic(info: &PanicHookInfo<'_>) {
    PANICS.fetch_add(1, Ordering::SeqCst);
    let thread = thread::current();
    let name = thread.name().unwrap_or("without a name").to_owned();
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let what = message(info.payload());
    crate::log_line!("ERROR host: the thread `{name}` panicked at {place}: {what}");
    if !NO_BACKTRACES.load(Ordering::SeqCst) {
        // Respects RUST_BACKTRACE.
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            crate::log_line!("{trace}");
        }
    }
    if ENDS_THE_PROCESS.contains(&what.as_str()) {
        crate::flush_log();
        // At once: the standard library would first write to standard error, and could block.
        std::process::abort();
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "without a message".to_owned())
}

/// [Contained](contain) work panicked: a bug of this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    what: String,
}

impl std::fmt::Display for Panicked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a thread panicked, which is a bug of this program: {}", self.what)
    }
}

impl std::error::Error for Panicked {}

/// Calls `work` and catches a panic. The caller must handle the failure, and must not rely on data
/// that `work` changed.
///
/// # Errors
/// `work` panicked.
pub fn contain<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| Panicked { what: message(&*payload) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contain_returns_the_panic_message() {
        assert_eq!(contain(|| 5), Ok(5));
        let panicked = contain(|| panic!("page {}", 7)).unwrap_err();
        assert!(panicked.to_string().ends_with("a bug of this program: page 7"));
        let panicked = contain(|| std::panic::panic_any(7)).unwrap_err();
        assert!(panicked.to_string().ends_with("without a message"));
    }
}
