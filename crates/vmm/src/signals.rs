//! Requests to this process: by signals or the terminal.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use balloon_host::Ending;
use signal_hook::consts::{SIGUSR1, SIGUSR2};

/// Requests to this process: by signals or the terminal.
pub struct Signals {
    /// SIGTERM, SIGINT, or the terminal's escape sequence: stop.
    ending: Arc<Ending>,
    /// SIGUSR1: pause the guest.
    pub(crate) pause: SignalPipe,
    /// SIGUSR2: resume the guest.
    pub(crate) resume: SignalPipe,
}

/// Becomes readable when a signal arrives.
pub(crate) struct SignalPipe(UnixStream);

impl Signals {
    /// Starts handling all signals.
    ///
    /// # Errors
    /// The host has no file descriptors or threads left.
    pub fn new() -> io::Result<Self> {
        let requests = Self::before_guest()?;
        requests.take_stop();
        Ok(requests)
    }

    /// Starts handling the signals for a guest, before there is one: an operator may send one as
    /// soon as the guest exists, and an unhandled signal would kill the process. Stop signals still
    /// end the process at once, until [`take_stop`](Self::take_stop).
    pub(crate) fn before_guest() -> io::Result<Self> {
        let (pause, resume) = (SignalPipe::of(SIGUSR1)?, SignalPipe::of(SIGUSR2)?);
        Ok(Self { ending: Ending::watch()?, pause, resume })
    }

    /// From now on stop signals end the guest cleanly.
    pub(crate) fn take_stop(&self) {
        self.ending.set_orderly();
    }

    /// The stop request and its timeouts.
    pub(crate) fn ending(&self) -> &Ending {
        &self.ending
    }

    /// Returns a function that stops this process like the operator.
    pub(crate) fn operator_stopper(&self) -> impl Fn() + Send + Sync + use<> {
        let ending = Arc::clone(&self.ending);
        move || ending.request()
    }

    /// Returns a function that stops this process without a request of the operator.
    pub fn stopper(&self) -> impl Fn() + Send + Sync + use<> {
        let ending = Arc::clone(&self.ending);
        move || ending.end()
    }
}

impl SignalPipe {
    fn of(signal: i32) -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(signal, write)?;
        Ok(Self(read))
    }

    /// Consumes all signals that have arrived.
    pub(crate) fn clear(&self) {
        while matches!(io::Read::read(&mut &self.0, &mut [0; 64]), Ok(1..)) {}
    }
}

impl AsRawFd for SignalPipe {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_signal_before_the_guest_starts_does_not_end_the_process() {
        let requests = Signals::before_guest().unwrap();
        signal_hook::low_level::raise(SIGUSR1).unwrap();
        assert_eq!(io::Read::read(&mut &requests.pause.0, &mut [0; 8]).unwrap(), 1);
    }
}
