//! `aerostat receive`: waits for a migrating guest and runs it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use control::Server;
use migration::limits::STALL_PAUSED;
use migration::tcp::{Security, TcpAcceptor};
use migration::{DestinationConfig, DestinationGuest, ReceiveFailure, receive as arrive};

use crate::answer::{ANSWER_TIMEOUT, Answering};
use crate::controller::{Arrived, ControlApi, MigrationController, MigrationTarget, Watch};
use crate::error::Error;
use crate::machine::End;
use crate::options::HostOptions;
use crate::run::serve_to_end;
use crate::signals::Signals;

/// Failed migrations that are remembered, to answer sources that are in-doubt about them.
const MAX_GONE: usize = 64;

/// Delay after a failed migration, so that a failure that repeats at once does not loop without a
/// pause.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// Which guest to receive, and how.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// The options that this host chooses, with the guest's name here.
    pub host: HostOptions,
    /// The guest's name at the source.
    pub guest_name: String,
    /// The address to listen on.
    pub listen: SocketAddr,
    /// Which sources may connect.
    pub security: Security,
    /// Maximum guest memory, in bytes.
    pub max_memory_bytes: u64,
    /// Maximum number of vCPUs.
    pub max_cpus: u8,
    /// How long to wait for a guest; without a timeout if `None`.
    pub wait: Option<Duration>,
}

/// Waits for a guest and runs it until it ends. Logs migrations that fail before one succeeds.
/// Calls `listens` with the address that sources can connect to.
///
/// # Errors
/// The options are invalid, the host fails, or no guest arrives in time.
pub fn receive(options: &ReceiveOptions, listens: impl Fn(SocketAddr)) -> Result<End, Error> {
    let mut acceptor = TcpAcceptor::new(options.listen, options.security.clone())?;
    let requests = Signals::before_guest().map_err(Error::host("signal handling"))?;
    let controller = MigrationController::new(None);
    // Before the guest arrives, so that the control API is available as soon as it runs.
    let _control =
        Server::bind_vmm(&options.host.control, Arc::new(ControlApi(Arc::clone(&controller))))?;
    let address = acceptor.address().map_err(Error::host("getsockname"))?;
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
                let until = received.source_notified.then(|| Instant::now() + ANSWER_TIMEOUT);
                let arrived = Arrived { ownership: received.ownership, guest };
                if let Err((error, _)) =
                    Answering::start(&Arc::new(Mutex::new(arrived)), acceptor, until)
                {
                    // The guest runs anyway.
                    tracing::error!(%error, "host: cannot answer the source if it asks");
                }
                return run(&controller, &requests);
            }
            Err(failure) => failure,
        };
        // Remembers a guest that did not arrive. Not used if it is resolved to run here after all.
        gone.extend(failure.id);
        gone.drain(..gone.len().saturating_sub(MAX_GONE));
        let may_ask = match failure.guest {
            DestinationGuest::Destroyed => Duration::ZERO,
            // The source has most likely received the refusal.
            DestinationGuest::Refused(_) => STALL_PAUSED * 2,
            DestinationGuest::InDoubt(_) => ANSWER_TIMEOUT,
        };
        match failed(failure, guest, acceptor, deadline, (&controller, &requests))? {
            Some(free) => acceptor = free,
            None => return run(&controller, &requests),
        }
        deadline = deadline.map(|end| end.max(Instant::now() + may_ask));
    }
}

/// Handles a failed migration. Returns the acceptor for the next one, or `None` if the guest was
/// resolved to run here.
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
            // No source connected in time.
            if deadline.is_some_and(|end| Instant::now() >= end) {
                return Err(error.into());
            }
            tracing::warn!(error = error.chain(), "a guest did not arrive");
            std::thread::sleep(RETRY_DELAY);
            Ok(Some(acceptor))
        }
        // A source that did not receive the refusal asks again on the next connection.
        DestinationGuest::Refused(_) => {
            controller.not_arrived(&error);
            tracing::warn!(error = error.chain(), "a guest could not be started");
            Ok(Some(acceptor))
        }
        DestinationGuest::InDoubt(ownership) => {
            tracing::error!(
                error = error.chain(),
                "in-doubt: whether the guest runs here is unknown"
            );
            let arrived = Arc::new(Mutex::new(Arrived { ownership, guest }));
            controller.arrived_in_doubt(&arrived, &error);
            let message = "the in-doubt guest ends here; whether it runs at its source is unknown: \
                         resolve it there with `aerostat resolve`";
            requests.ending().set_exit_message(Some(message.to_owned()));
            let answering = answer_if_possible(&arrived, acceptor);
            if controller.until_resolved() {
                return Ok(None);
            }
            requests.ending().set_exit_message(None);
            match answering {
                Ok(answering) => answering.join().map(Some),
                Err(acceptor) => Ok(Some(acceptor)),
            }
        }
    }
}

/// Starts answering the source. Without a thread for that the guest must not end: the operator can
/// still resolve it.
fn answer_if_possible(
    arrived: &Arc<Mutex<Arrived>>,
    acceptor: TcpAcceptor,
) -> Result<Answering, TcpAcceptor> {
    Answering::start(arrived, acceptor, None).map_err(|(error, acceptor)| {
        tracing::error!(%error, "host: cannot answer the source; resolve the guest on both hosts");
        acceptor
    })
}

/// Serves the guest that arrived.
fn run(controller: &Arc<MigrationController>, requests: &Signals) -> Result<End, Error> {
    requests.take_stop();
    match controller.machine() {
        Some(machine) => serve_to_end(&machine, controller, requests),
        None => Err(Error::Unsupported { what: "a guest that was not created".into() }),
    }
}
