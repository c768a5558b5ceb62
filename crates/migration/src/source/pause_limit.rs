//! The limit of the downtime that a destination can cause.
//!
//! A destination that accepts a few bytes now and then, or sends keepalives, never stalls, and
//! could keep the guest paused infinitely.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::MigrationError;
use crate::link::Closer;

/// Closes all connections when the time expires, unless it was [ended](Self::end) before.
pub(super) struct PauseLimit {
    has_expired: Arc<AtomicBool>,
    ends: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PauseLimit {
    /// Starts the timer.
    pub(super) fn start(closers: &Arc<[Closer]>, limit: Duration) -> Result<Self, MigrationError> {
        let (ends, ended) = channel();
        let has_expired = Arc::new(AtomicBool::new(false));
        let (closers, over) = (Arc::clone(closers), Arc::clone(&has_expired));
        let wait = move || {
            let waited = diagnostics::contain(|| {
                diagnostics::panic_point("pause limit");
                ended.recv_timeout(limit)
            });
            // After a panic no thread measures the time: it counts as expired.
            if waited.is_err() || waited == Ok(Err(RecvTimeoutError::Timeout)) {
                over.store(true, Ordering::SeqCst);
                closers.iter().for_each(|close| close());
            }
        };
        let thread = thread::Builder::new().name("pause limit".to_owned()).spawn(wait);
        let thread = thread.map_err(MigrationError::link("starting a thread"))?;
        Ok(Self { has_expired, ends: Some(ends), thread: Some(thread) })
    }

    /// Returns whether the time had expired. Closes nothing after this.
    pub(super) fn end(&mut self) -> bool {
        drop(self.ends.take());
        if let Some(thread) = self.thread.take() {
            // The hook has printed a panic; the time counts as expired.
            let ended = thread.join();
            self.has_expired.fetch_or(ended.is_err(), Ordering::SeqCst);
        }
        self.has_expired.load(Ordering::SeqCst)
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
    fn all_connections_are_closed_when_the_time_expires() {
        let (closers, closed) = closers();
        let mut limit = PauseLimit::start(&closers, Duration::ZERO).unwrap();
        while !closed.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        assert!(limit.end());
    }

    #[test]
    fn nothing_is_closed_before_the_time_expires() {
        let (closers, closed) = closers();
        let mut limit = PauseLimit::start(&closers, Duration::MAX).unwrap();
        assert!(!limit.end());
        drop(limit);
        assert!(!closed.load(Ordering::SeqCst));
    }
}
