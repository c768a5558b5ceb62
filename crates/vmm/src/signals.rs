//! What is asked of this process: by signals, or by a key.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use balloon_host::Ending;
use signal_hook::consts::{SIGUSR1, SIGUSR2};

/// What is asked of this process: by signals, or by a key.
pub struct Signals {
    /// SIGTERM, SIGINT, or at the terminal: the end.
    ending: Arc<Ending>,
    /// SIGUSR1: the guest pauses.
    pub(crate) pause: SignalPipe,
    /// SIGUSR2: it goes on.
    pub(crate) resume: SignalPipe,
}

/// Becomes readable when a signal came.
pub(crate) struct SignalPipe(UnixStream);

impl Signals {
    /// Takes the signals from now on.
    ///
    /// # Errors
    /// The host has no file descriptor or no thread left.
    pub fn new() -> io::Result<Self> {
        let requests = Self::before_guest()?;
        requests.take_stop();
        Ok(requests)
    }

    /// Takes those that are for a guest, before there is one: whoever sees that it has come may
    /// send one at once, which would end a process that does not take it, and the guest with it.
    /// What asks for the end ends the process, as long as it is not [taken](Self::take_stop) too.
    pub(crate) fn before_guest() -> io::Result<Self> {
        let (pause, resume) = (SignalPipe::of(SIGUSR1)?, SignalPipe::of(SIGUSR2)?);
        Ok(Self { ending: Ending::watch()?, pause, resume })
    }

    /// There is a guest, which ends in order from now on.
    pub(crate) fn take_stop(&self) {
        self.ending.in_order();
    }

    /// How this process ends.
    pub(crate) fn ending(&self) -> &Ending {
        &self.ending
    }

    /// Asks for the end, as an operator does.
    pub(crate) fn asker(&self) -> impl Fn() + Send + Sync + use<> {
        let ending = Arc::clone(&self.ending);
        move || ending.ask()
    }

    /// Has the process end, for which nobody waits.
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

    /// Takes all signals that came.
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
    fn a_pause_that_comes_before_its_guest_ends_nothing() {
        let requests = Signals::before_guest().unwrap();
        signal_hook::low_level::raise(SIGUSR1).unwrap();
        assert_eq!(io::Read::read(&mut &requests.pause.0, &mut [0; 8]).unwrap(), 1);
    }
}
