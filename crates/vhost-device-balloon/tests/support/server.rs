//! The back end under test, in its own threads.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use control::BalloonControl;
use control::api::{PartialHuge, ReleaseMode, Status};
use vhost_device_balloon::{Backend, End, SessionError};

use super::TEST_TIMEOUT;
use super::front_end::FrontEnd;

/// One guest's back end, which serves one connection after the other.
pub(crate) struct Server {
    backend: Arc<Backend>,
    pub(crate) balloon: Arc<dyn BalloonControl>,
    /// A byte in `.1` stops the back end.
    stop: Arc<(UnixStream, UnixStream)>,
}

/// A connection that the back end serves.
pub(crate) struct Served {
    thread: JoinHandle<()>,
    outcome: mpsc::Receiver<Result<End, SessionError>>,
    /// `/proc` directory of the serving thread.
    pub(crate) task: PathBuf,
}

impl Server {
    pub(crate) fn new(release: ReleaseMode) -> Self {
        let backend = Backend::new("test", release, PartialHuge::Split).unwrap();
        let balloon = backend.balloon();
        let stop = Arc::new(UnixStream::pair().unwrap());
        Self { backend: Arc::new(backend), balloon, stop }
    }

    pub(crate) fn connect(&self) -> (FrontEnd, Served) {
        let (front, back) = UnixStream::pair().unwrap();
        (FrontEnd::new(front), self.serve(back))
    }

    pub(crate) fn serve(&self, stream: UnixStream) -> Served {
        let (backend, stop) = (Arc::clone(&self.backend), Arc::clone(&self.stop));
        let (send_task, task) = mpsc::channel();
        let (send_outcome, outcome) = mpsc::channel();
        let thread = thread::spawn(move || {
            send_task.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
            // A failed test has dropped the receiver.
            let _ = send_outcome.send(backend.serve(&stream, &stop.0));
        });
        let task = PathBuf::from("/proc").join(task.recv_timeout(TEST_TIMEOUT).unwrap());
        Served { thread, outcome, task }
    }

    pub(crate) fn backend(&self) -> Arc<Backend> {
        Arc::clone(&self.backend)
    }

    pub(crate) fn stop(&self) {
        use std::io::Write;
        (&self.stop.1).write_all(&[1]).unwrap();
    }

    pub(crate) fn status(&self) -> Status {
        self.balloon.status()
    }

    pub(crate) fn front_end_faults(&self, name: &str) -> u64 {
        self.status().faults.front_end.get(name).copied().unwrap_or(0)
    }

    pub(crate) fn guest_faults(&self, name: &str) -> u64 {
        self.status().faults.guest.get(name).copied().unwrap_or(0)
    }

    /// Waits until all inflated pages are released. Polls, because there is no
    /// notification.
    pub(crate) fn settle(&self) {
        let end = Instant::now() + TEST_TIMEOUT;
        loop {
            let release = self.status().release;
            if release.pending_bytes == 0 && release.in_flight_bytes == 0 {
                return;
            }
            assert!(Instant::now() < end, "not released: {release:?}");
            thread::sleep(std::time::Duration::from_micros(200));
        }
    }
}

impl Served {
    /// Waits for the session's outcome; panics on a timeout.
    pub(crate) fn outcome(self) -> Result<End, SessionError> {
        let outcome = self.outcome.recv_timeout(TEST_TIMEOUT);
        if let Err(mpsc::RecvTimeoutError::Timeout) = outcome {
            panic!("the back end does not end the session");
        }
        self.thread.join().expect("the back end panicked");
        outcome.unwrap()
    }

    /// CPU time of the serving thread, in nanoseconds
    /// (Documentation/scheduler/sched-stats.rst).
    pub(crate) fn cpu_ns(&self) -> u64 {
        let text = std::fs::read_to_string(self.task.join("schedstat")).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    }
}
