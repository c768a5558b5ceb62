//! Answers a source that asks whether its guest runs here.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use diagnostics::{contain, panic_point};
use migration::limits::STALL_PAUSED;
use migration::link::Accept as _;
use migration::tcp::{TcpAcceptor, TcpLink};
use migration::{MigrationError, Resolution, ResolveRequest};

use crate::controller::{Arrived, locked};
use crate::error::Error;

/// How long a source may ask again after it was sent that its guest runs here: that answer may be
/// lost.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// How often the thread checks whether the operator has resolved the guest.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The thread that answers, until the guest is discarded or [`ANSWER_TIMEOUT`] is over.
pub(crate) struct Answering(JoinHandle<Option<TcpAcceptor>>);

impl Answering {
    /// # Errors
    /// The thread cannot be started; returns the acceptor.
    pub(crate) fn start(
        arrived: &Arc<Mutex<Arrived>>,
        acceptor: TcpAcceptor,
        until: Option<Instant>,
    ) -> Result<Self, (io::Error, TcpAcceptor)> {
        let arrived = Arc::clone(arrived);
        // In a slot: a closure whose thread does not start would drop the acceptor.
        let slot = Arc::new(Mutex::new(Some(acceptor)));
        let taken = Arc::clone(&slot);
        let answering = move || {
            let mut acceptor = locked(&taken).take()?;
            answer(&arrived, &mut acceptor, until);
            Some(acceptor)
        };
        match thread::Builder::new().name("answer".into()).spawn(answering) {
            Ok(thread) => Ok(Self(thread)),
            Err(error) => match locked(&slot).take() {
                Some(acceptor) => Err((error, acceptor)),
                None => unreachable!("a thread that did not start has not taken the acceptor"),
            },
        }
    }

    /// Waits for the thread's end.
    ///
    /// # Errors
    /// The thread panicked.
    pub(crate) fn join(self) -> Result<TcpAcceptor, Error> {
        let panicked = || Error::Host {
            what: "answering the source",
            source: io::Error::other("a thread panicked"),
        };
        self.0.join().ok().flatten().ok_or_else(panicked)
    }
}

fn answer(arrived: &Mutex<Arrived>, acceptor: &mut TcpAcceptor, mut until: Option<Instant>) {
    let is_over = |until: Option<Instant>| until.is_some_and(|end| Instant::now() >= end);
    while !is_over(until) && locked(arrived).ownership.resolution() != Resolution::NeverRan {
        let next = Instant::now() + POLL_INTERVAL;
        let link = match acceptor.accept(Some(until.map_or(next, |end| end.min(next)))) {
            Ok(link) => link,
            Err(error) if error.kind() == ErrorKind::TimedOut => continue,
            Err(error) => {
                // Retried: no other thread answers.
                tracing::error!(%error, "host: cannot accept a connection of a source");
                thread::sleep(POLL_INTERVAL);
                continue;
            }
        };
        let answered = contain(|| {
            panic_point("answer");
            answer_one(link, arrived)
        });
        let resolution = locked(arrived).ownership.resolution();
        match answered {
            // The answer may be lost; the source then asks again.
            Ok(Ok(())) if resolution == Resolution::RunsAtDestination => {
                until = Some(Instant::now() + ANSWER_TIMEOUT);
            }
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = error.chain(), "cannot answer the source"),
            // The source asks again.
            Err(panicked) => tracing::error!(%panicked, "cannot answer the source"),
        }
    }
}

fn answer_one(link: TcpLink, arrived: &Mutex<Arrived>) -> Result<(), MigrationError> {
    // Not under the lock: a slow peer would block the operator.
    let asking = ResolveRequest::read(link, STALL_PAUSED)?;
    let mut arrived = locked(arrived);
    let Arrived { ownership, guest } = &mut *arrived;
    ownership.answer_to(asking, guest)
}
