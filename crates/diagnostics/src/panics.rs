//! Panics: told in the log, counted, and contained where somebody answers for the work.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

static PANICS: AtomicU64 = AtomicU64::new(0);

static NO_BACKTRACES: AtomicBool = AtomicBool::new(false);

/// What the standard library says of a panic that ends the process: one while another was being
/// unwound, or where nothing may unwind.
const ENDS_THE_PROCESS: [&str; 2] =
    ["panic in a destructor during cleanup", "panic in a function that cannot unwind"];

/// From now on a panic of any thread is told in the log, and counted. The standard library's own
/// hook would write to standard error, and wait there for a reader.
pub fn watch_panics() {
    set_hook(Box::new(note));
}

/// No panic shows a backtrace from now on, whatever RUST_BACKTRACE says: naming its functions opens
/// and maps files, for which a sandbox ends the process.
pub fn hide_backtraces() {
    NO_BACKTRACES.store(true, Ordering::SeqCst);
}

/// Panics of any thread since [`watch_panics`]. What must not go on after one compares it with what
/// it was before.
#[must_use]
pub fn panics() -> u64 {
    PANICS.load(Ordering::SeqCst)
}

fn note(info: &PanicHookInfo<'_>) {
    PANICS.fetch_add(1, Ordering::SeqCst);
    let thread = thread::current();
    let name = thread.name().unwrap_or("without a name").to_owned();
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let what = message(info.payload());
    crate::say!("ERROR host: the thread `{name}` panicked at {place}: {what}");
    if !NO_BACKTRACES.load(Ordering::SeqCst) {
        // As RUST_BACKTRACE says.
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            crate::say!("{trace}");
        }
    }
    if ENDS_THE_PROCESS.contains(&what.as_str()) {
        crate::flush_log();
        // At once: what the standard library says before it does may wait for a reader.
        std::process::abort();
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "it does not say why".to_owned())
}

/// Something that was [contained](contain) panicked: a fault of this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked {
    what: String,
}

impl std::fmt::Display for Panicked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it panicked, which is a fault of this program: {}", self.what)
    }
}

impl std::error::Error for Panicked {}

/// Does `work`. Where that panics, the panic ends here; whoever calls it answers for what was under
/// way, and must not rely on what `work` changed.
///
/// # Errors
/// It panicked.
pub fn contain<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| Panicked { what: message(&*payload) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_panics_says_why_and_goes_no_further() {
        assert_eq!(contain(|| 5), Ok(5));
        let panicked = contain(|| panic!("page {}", 7)).unwrap_err();
        assert!(panicked.to_string().ends_with("a fault of this program: page 7"));
        let panicked = contain(|| std::panic::panic_any(7)).unwrap_err();
        assert!(panicked.to_string().ends_with("it does not say why"));
    }
}
