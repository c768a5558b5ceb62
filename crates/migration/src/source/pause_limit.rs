//! For how long a destination may keep a guest standing still.
//!
//! One that takes a few bytes now and then, or says that it is alive, is not silent, and could have
//! the guest stand still for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::MigrationError;
use crate::link::Closer;

/// Closes all connections when the time is over, unless it was [ended](Self::end) before.
pub(super) struct PauseLimit {
    is_over: Arc<AtomicBool>,
    ends: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PauseLimit {
    /// The time begins.
    pub(super) fn start(closers: &Arc<[Closer]>, limit: Duration) -> Result<Self, MigrationError> {
        let (ends, ended) = channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let (closers, over) = (Arc::clone(closers), Arc::clone(&is_over));
        let wait = move || {
            let waited = diagnostics::contain(|| {
                diagnostics::panic_point("pause limit");
                ended.recv_timeout(limit)
            });
            // Nobody keeps the time any more after a panic: it counts as over.
            if waited.is_err() || waited == Ok(Err(RecvTimeoutError::Timeout)) {
                over.store(true, Ordering::SeqCst);
                closers.iter().for_each(|close| close());
            }
        };
        let thread = thread::Builder::new().name("pause limit".to_owned()).spawn(wait);
        let thread = thread.map_err(MigrationError::link("starting a thread"))?;
        Ok(Self { is_over, ends: Some(ends), thread: Some(thread) })
    }

    /// Whether the time was over; nothing is closed any more after this.
    pub(super) fn end(&mut self) -> bool {
        drop(self.ends.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by the hook; the time counts as over.
            let ended = thread.join();
            self.is_over.fetch_or(ended.is_err(), Ordering::SeqCst);
        }
        self.is_over.load(Ordering::SeqCst)
    }
}

impl Drop for PauseLimit {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closers() -> (Arc<[Closer]>, Arc<AtomicBool>) {
        let closed = Arc::new(AtomicBool::new(false));
        let closes = Arc::clone(&closed);
        let close: Closer = Box::new(move || closes.store(true, Ordering::SeqCst));
        (Arc::from([close]), closed)
    }

    #[test]
    fn everything_is_closed_when_the_time_is_over() {
        let (closers, closed) = closers();
        let mut limit = PauseLimit::start(&closers, Duration::ZERO).unwrap();
        while !closed.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        assert!(limit.end());
    }

    #[test]
    fn nothing_is_closed_before() {
        let (closers, closed) = closers();
        let mut limit = PauseLimit::start(&closers, Duration::MAX).unwrap();
        assert!(!limit.end());
        drop(limit);
        assert!(!closed.load(Ordering::SeqCst));
    }
}
