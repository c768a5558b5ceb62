//! A guest that comes from another host.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use control::Server;
use migration::limits::STALL_PAUSED;
use migration::tcp::{Security, TcpAcceptor};
use migration::{DestinationConfig, DestinationGuest, ReceiveFailure, receive as arrive};

use crate::answer::{ANSWER_TIMEOUT, Answering};
use crate::controller::{Arrived, ControlApi, MigrationController, Watch};
use crate::error::Error;
use crate::machine::{End, serve_to_end};
use crate::options::HostOptions;
use crate::signals::Signals;
use crate::traits::MigrationTarget;

/// Migrations that came to nothing of which that is known: their sources are in doubt at most.
const MAX_GONE: usize = 64;

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
        let mut guest = MigrationTarget::new(options.host.clone(), options.max_cpus, &controller)?;
        let config = DestinationConfig {
            max_memory_bytes: options.max_memory_bytes,
            deadline,
            gone: gone.clone(),
            ..DestinationConfig::new(&options.guest_name)
        };
        controller.wait_for_source();
        let arrived =
            arrive(&config, &mut guest, &mut acceptor, &mut Watch(Arc::clone(&controller)));
        let failure = match arrived {
            Ok(received) => {
                tracing::info!(id = %received.ownership.id(), us = received.total_us, "arrived");
                let until = received.source_knows.then(|| Instant::now() + ANSWER_TIMEOUT);
                let arrived = Arrived { ownership: received.ownership, guest };
                if let Err((error, _)) =
                    Answering::start(&Arc::new(Mutex::new(arrived)), acceptor, until)
                {
                    // The guest runs on all the same.
                    tracing::error!(%error, "host: its source will not be answered");
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
            DestinationGuest::InDoubt(_) => ANSWER_TIMEOUT,
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
            controller.not_arrived(&error);
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
            controller.not_arrived(&error);
            tracing::warn!(error = error.chain(), "a guest could not be started");
            Ok(Some(acceptor))
        }
        DestinationGuest::InDoubt(ownership) => {
            tracing::error!(error = error.chain(), "whether the guest runs here is not known");
            let arrived = Arc::new(Mutex::new(Arrived { ownership, guest }));
            controller.arrived_in_doubt(&arrived, &error);
            let words = "the guest that came ends here; whether it runs at its source is not known, \
                         where `aerostat resolve` says what becomes of it";
            requests.ending().at_once_with(Some(words.to_owned()));
            let answering = answer_if_possible(&arrived, acceptor);
            if controller.until_resolved() {
                return Ok(None);
            }
            requests.ending().at_once_with(None);
            match answering {
                Ok(answering) => answering.join().map(Some),
                Err(acceptor) => Ok(Some(acceptor)),
            }
        }
    }
}

/// Has a source answered. A host that has no thread left must not end the guest: its operator can
/// still resolve it.
fn answer_if_possible(
    arrived: &Arc<Mutex<Arrived>>,
    acceptor: TcpAcceptor,
) -> Result<Answering, TcpAcceptor> {
    Answering::start(arrived, acceptor, None).map_err(|(error, acceptor)| {
        tracing::error!(%error, "host: its source is not answered; resolve it on both hosts");
        acceptor
    })
}

/// Serves the guest that came.
fn run(controller: &Arc<MigrationController>, requests: &Signals) -> Result<End, Error> {
    requests.take_stop();
    match controller.machine() {
        Some(machine) => serve_to_end(&machine, controller, requests),
        None => Err(Error::Unsupported { what: "a guest that is not there".into() }),
    }
}
