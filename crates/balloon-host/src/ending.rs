//! A process ends within ten seconds of SIGTERM or SIGINT, whatever it waits for.
//!
//! Each wait on the way to the end has a timeout of its own: a peer, a disk, a console's reader. A
//! watchdog covers the rest: after [`CUT_OFF`] it logs what the process was waiting for, and ends it.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level;

/// When the watchdog ends the process: a second before the ten in which a process ends.
const CUT_OFF: Duration = Duration::from_millis(8500);

/// How long all that an end waits for by itself may take: what is left is for what has no limit.
const ORDERLY: Duration = Duration::from_secs(7);

/// How long the last word of the watchdog may take: the log may be what the process waits for.
const FINAL_LOG_TIMEOUT: Duration = Duration::from_millis(500);

/// How often it is looked whether that was said.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// What the watchdog ends the process with.
const CUT_OFF_CODE: i32 = 1;

/// The end of this process.
#[derive(Debug)]
pub struct Ending {
    state: Mutex<State>,
    /// Readable once the process was told to end.
    told: UnixStream,
    tells: UnixStream,
    /// Where a signal goes.
    asks: UnixStream,
}

#[derive(Debug)]
struct State {
    /// Somebody waits for the word, and ends the process in order.
    is_orderly: bool,
    /// What is said where nobody does.
    at_once: Option<String>,
    asked: Option<Instant>,
    waits_for: &'static str,
}

impl Ending {
    /// Takes the signals. Until somebody [ends the process in order](Self::in_order) they end it
    /// at once, as they do where nobody takes them.
    ///
    /// From here on the calling thread, and those that it makes, leave the signals to the watchdog:
    /// the kernel gives a signal to any thread that may take it, and one that waits for a disk which
    /// does not answer would not wake up for it.
    ///
    /// # Errors
    /// The host has no file descriptor or no thread left.
    pub fn watch() -> io::Result<Arc<Self>> {
        let (ending, signals) = Self::new()?;
        for signal in [SIGTERM, SIGINT] {
            low_level::pipe::register(signal, ending.asks.try_clone()?)?;
        }
        let theirs = Arc::clone(&ending);
        thread::Builder::new().name("end".into()).spawn(move || theirs.wait(&signals))?;
        taken().thread_block()?;
        Ok(ending)
    }

    /// The same without signals and without a watchdog.
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn unwatched() -> io::Result<Arc<Self>> {
        Ok(Self::new()?.0)
    }

    fn new() -> io::Result<(Arc<Self>, UnixStream)> {
        let (told, tells) = UnixStream::pair()?;
        tells.set_nonblocking(true)?;
        let (signals, asks) = UnixStream::pair()?;
        asks.set_nonblocking(true)?;
        let state =
            State { is_orderly: false, at_once: None, asked: None, waits_for: "the device loop" };
        Ok((Arc::new(Self { state: Mutex::new(state), told, tells, asks }), signals))
    }

    /// From now on somebody waits for [`told`](Self::told), and ends the process in order.
    pub fn in_order(&self) {
        self.state().is_orderly = true;
    }

    /// What to say if the process is ended before that.
    pub fn at_once_with(&self, words: Option<String>) {
        self.state().at_once = words;
    }

    /// Becomes readable when the process is to end in order, and stays so.
    pub fn told(&self) -> BorrowedFd<'_> {
        self.told.as_fd()
    }

    /// Asks for the end, as a signal does.
    pub fn ask(&self) {
        // A stream that is full has been asked already.
        let _ = (&self.asks).write(&[1]);
    }

    /// Has the process end in order, without anybody who waits for it.
    pub fn end(&self) {
        let _ = (&self.tells).write(&[1]);
    }

    /// How long something of the end may be waited for that is worth `usual` where nobody has
    /// asked for the end. Says what it is, if it takes too long all the same.
    pub fn patience(&self, waits_for: &'static str, usual: Duration) -> Duration {
        let mut state = self.state();
        state.waits_for = waits_for;
        let left = state.asked.map(|asked| ORDERLY.saturating_sub(asked.elapsed()));
        left.map_or(usual, |left| usual.min(left))
    }

    /// Somebody waits for the end.
    pub fn was_asked(&self) -> bool {
        self.state().asked.is_some()
    }

    /// What is behind it is whole at any moment.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The watchdog's work.
    fn wait(&self, mut signals: &UnixStream) {
        // The thread that started this one may have blocked them. On an error the mask stays.
        let _ = taken().thread_unblock();
        loop {
            match signals.read(&mut [0; 8]) {
                Ok(1..) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nobody can ask any more.
                Ok(0) | Err(_) => return,
            }
        }
        let mut state = self.state();
        if !state.is_orderly {
            let words = state.at_once.take();
            drop(state);
            if let Some(words) = words {
                say(move || tracing::error!("{words}"));
            }
            // What the signal does where nobody takes it.
            let _ = low_level::emulate_default_handler(SIGTERM);
            low_level::exit(CUT_OFF_CODE);
        }
        state.asked = Some(Instant::now());
        drop(state);
        self.end();
        thread::sleep(CUT_OFF);
        let waits_for = self.state().waits_for;
        say(move || {
            tracing::error!(
                waits_for,
                "host: the process did not end in time after it was told to, and is cut off; \
                 what was under way is lost"
            );
        });
        low_level::exit(CUT_OFF_CODE);
    }
}

fn taken() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

/// Says it, but does not wait for a log that nobody reads.
fn say(word: impl FnOnce() + Send + 'static) {
    let word = || {
        word();
        diagnostics::flush_log();
    };
    let Ok(thread) = thread::Builder::new().spawn(word) else { return };
    let until = Instant::now() + FINAL_LOG_TIMEOUT;
    while !thread.is_finished() && Instant::now() < until {
        thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_long_once_the_end_was_asked_for() {
        let ending = Ending::unwatched().unwrap();
        let long = Duration::from_secs(3600);
        assert_eq!(ending.patience("a peer", long), long);
        ending.state().asked = Some(Instant::now());
        assert!(ending.was_asked());
        assert!(ending.patience("a peer", long) <= ORDERLY);
        assert_eq!(ending.patience("a peer", Duration::from_millis(1)), Duration::from_millis(1));
        ending.state().asked = Instant::now().checked_sub(CUT_OFF);
        assert_eq!(ending.patience("a peer", long), Duration::ZERO);
        assert_eq!(ending.state().waits_for, "a peer");
    }
}
