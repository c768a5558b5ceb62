//! A guest that comes from another host.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use control::Server;
use diagnostics::{contain, panic_point};
use migration::limits::STALL_PAUSED;
use migration::link::Accept as _;
use migration::tcp::{Security, TcpAcceptor, TcpLink};
use migration::{
    Asking, DestinationConfig, DestinationGuest, MigrationError, ReceiveFailure, Resolution,
    receive as arrive,
};

use crate::controller::{ControlApi, Kept, MigrationController, Watch, locked};
use crate::error::Error;
use crate::machine::{End, serve_to_end};
use crate::options::HostOptions;
use crate::signals::Signals;
use crate::traits::MigrationTarget;

/// How long a source that was told that its guest runs here may still ask: the word may be lost
/// on its way.
const ANSWER_TIME: Duration = Duration::from_secs(600);

/// Migrations that came to nothing of which that is known: their sources are in doubt at most.
const MAX_GONE: usize = 64;

/// How often it is looked whether an operator has resolved a doubt.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Between two guests that fail to arrive, so that whatever fails at once does not fail without end.
const PAUSE: Duration = Duration::from_millis(100);

/// Which guest is taken, and how.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// What is this host's to choose, the guest's name among it.
    pub host: HostOptions,
    /// What the guest is called where it comes from.
    pub guest_name: String,
    /// Where sources connect to.
    pub listen: SocketAddr,
    /// Who may connect.
    pub security: Security,
    /// Memory that the guest may have, in bytes.
    pub max_memory_bytes: u64,
    /// Processors that it may have.
    pub max_cpus: u8,
    /// How long to wait for a guest; for ever where there is none.
    pub wait: Option<Duration>,
}

/// Waits for a guest and runs it to its end. What comes before the guest that arrives, and fails,
/// is logged. `listens` is told where sources can connect to.
///
/// # Errors
/// What is wrong with the options, or with the host; and no guest within the time.
pub fn receive(options: &ReceiveOptions, listens: impl Fn(SocketAddr)) -> Result<End, Error> {
    let mut acceptor = TcpAcceptor::new(options.listen, options.security.clone())?;
    let requests = Signals::before_guest().map_err(Error::host("signal handling"))?;
    let controller = MigrationController::new(None);
    // Before anything comes, so that a guest which has come can be asked.
    let _control =
        Server::bind_monitor(&options.host.control, Arc::new(ControlApi(Arc::clone(&controller))))?;
    let address = acceptor.address().map_err(Error::host("asking for the address"))?;
    listens(address);
    let mut deadline = options.wait.map(|wait| Instant::now() + wait);
    let mut gone = Vec::new();
    loop {
        let mut guest = MigrationTarget::new(options.host.clone(), options.max_cpus)?;
        let config = DestinationConfig {
            max_memory_bytes: options.max_memory_bytes,
            deadline,
            gone: gone.clone(),
            ..DestinationConfig::new(&options.guest_name)
        };
        controller.waits();
        let arrived =
            arrive(&config, &mut guest, &mut acceptor, &mut Watch(Arc::clone(&controller)));
        let failure = match arrived {
            Ok(received) => {
                tracing::info!(id = %received.ownership.id(), us = received.total_us, "arrived");
                controller.came(guest.machine().cloned());
                let until = received.source_knows.then(|| Instant::now() + ANSWER_TIME);
                let kept = Kept { ownership: received.ownership, guest };
                if let Err(error) =
                    answer(&Arc::new(Mutex::new(kept)), acceptor, until, &controller)
                {
                    // The guest runs, and goes on whoever asks.
                    tracing::error!(%error, "its source will not be answered");
                }
                return run(&controller, &requests);
            }
            Err(failure) => failure,
        };
        // What is known of a guest that did not come, unless it came after all.
        gone.extend(failure.id);
        gone.drain(..gone.len().saturating_sub(MAX_GONE));
        let may_be_asked = match failure.guest {
            DestinationGuest::Destroyed => Duration::ZERO,
            // Its source has most likely heard it.
            DestinationGuest::Refused(_) => STALL_PAUSED * 2,
            DestinationGuest::InDoubt(_) => ANSWER_TIME,
        };
        match failed(failure, guest, acceptor, deadline, (&controller, &requests))? {
            Some(free) => acceptor = free,
            None => return run(&controller, &requests),
        }
        deadline = deadline.map(|end| end.max(Instant::now() + may_be_asked));
    }
}

/// A guest did not arrive. What takes the next one, or `None` where it runs here after all.
fn failed(
    failure: ReceiveFailure,
    guest: MigrationTarget,
    acceptor: TcpAcceptor,
    deadline: Option<Instant>,
    (controller, requests): (&Arc<MigrationController>, &Signals),
) -> Result<Option<TcpAcceptor>, Error> {
    let ReceiveFailure { error, guest: left, .. } = failure;
    match left {
        DestinationGuest::Destroyed => {
            controller.failed(&error);
            // Nobody came, or nobody can come.
            if deadline.is_some_and(|end| Instant::now() >= end) {
                return Err(error.into());
            }
            tracing::warn!(error = error.chain(), "a guest did not arrive");
            std::thread::sleep(PAUSE);
            Ok(Some(acceptor))
        }
        // A source that did not hear it asks who takes the next one.
        DestinationGuest::Refused(_) => {
            controller.failed(&error);
            tracing::warn!(error = error.chain(), "a guest could not be started");
            Ok(Some(acceptor))
        }
        DestinationGuest::InDoubt(ownership) => {
            tracing::error!(error = error.chain(), "whether the guest runs here is not known");
            controller.set_machine(guest.machine().cloned());
            let kept = Arc::new(Mutex::new(Kept { ownership, guest }));
            controller.doubts(&kept, &error);
            let words = "the guest that came ends here; whether it runs at its source is not known, \
                         where `aerostat resolve` says what becomes of it";
            requests.ending().at_once_with(Some(words.to_owned()));
            let answering = answer(&kept, acceptor, None, controller)?;
            if controller.until_resolved() == Resolution::Runs {
                return Ok(None);
            }
            requests.ending().at_once_with(None);
            controller.set_machine(None);
            joined(answering).map(Some)
        }
    }
}

/// Serves the guest that came.
fn run(controller: &Arc<MigrationController>, requests: &Signals) -> Result<End, Error> {
    requests.take_stop();
    match controller.machine() {
        Some(machine) => serve_to_end(&machine, controller, requests),
        None => Err(Error::Unsupported { what: "a guest that is not there".into() }),
    }
}

type Answering = JoinHandle<TcpAcceptor>;

/// Answers a source that asks what became of its guest, in a thread: until that is gone, which is
/// known later as well (`gone`), or for as long as a source may ask whether it runs.
fn answer(
    kept: &Arc<Mutex<Kept>>,
    mut acceptor: TcpAcceptor,
    mut until: Option<Instant>,
    controller: &Arc<MigrationController>,
) -> Result<Answering, Error> {
    let (kept, controller) = (Arc::clone(kept), Arc::clone(controller));
    let answering = move || {
        let is_over = |until: Option<Instant>| until.is_some_and(|end| Instant::now() >= end);
        // Its operator may have resolved it as well, and its source be dead.
        while !is_over(until) && locked(&kept).ownership.resolved() != Resolution::Gone {
            let look = Instant::now() + POLL_INTERVAL;
            let link = match acceptor.accept(Some(until.map_or(look, |end| end.min(look)))) {
                Ok(link) => link,
                Err(error) if error.kind() == ErrorKind::TimedOut => continue,
                Err(error) => {
                    // Nobody else answers it.
                    tracing::error!(%error, "host: no source can ask for its guest now");
                    std::thread::sleep(POLL_INTERVAL);
                    continue;
                }
            };
            let answered = contain(|| {
                panic_point("answer");
                answer_one(link, &kept)
            });
            let resolved = locked(&kept).ownership.resolved();
            controller.heard(resolved);
            match answered {
                // What was sent may be lost, and then it asks again.
                Ok(Ok(())) if resolved == Resolution::Runs => {
                    until = Some(Instant::now() + ANSWER_TIME);
                }
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = error.chain(), "a source was not answered");
                }
                // It asks again, and is answered then.
                Err(panicked) => tracing::error!(%panicked, "a source was not answered"),
            }
        }
        acceptor
    };
    let thread = std::thread::Builder::new().name("answer".into()).spawn(answering);
    thread.map_err(Error::host::<std::io::Error>("starting a thread"))
}

fn answer_one(link: TcpLink, kept: &Mutex<Kept>) -> Result<(), MigrationError> {
    // Not under the lock: whoever takes long to say a word would keep the operator's away.
    let asking = Asking::hear(link, STALL_PAUSED)?;
    let mut kept = locked(kept);
    let Kept { ownership, guest } = &mut *kept;
    ownership.answer_to(asking, guest)
}

fn joined(answering: Answering) -> Result<TcpAcceptor, Error> {
    let panicked = |_| Error::Host {
        what: "answering the source",
        source: std::io::Error::other("a thread panicked"),
    };
    answering.join().map_err(panicked)
}
