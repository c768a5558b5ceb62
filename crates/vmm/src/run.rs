//! `aerostat run`: boots a guest and serves it until it ends or has moved.

use std::sync::Arc;
use std::time::Duration;

use balloon_host::Ending;
use control::Server;

use crate::console::Console;
use crate::controller::{ControlApi, MigrationController};
use crate::error::Error;
use crate::machine::{End, Machine};
use crate::options::RunOptions;
use crate::output::{LostOutput, standard_output};
use crate::signals::Signals;

/// How long a process whose guest has ended waits for the console's reader.
const CONSOLE_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The same if the process was asked to stop.
const CONSOLE_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Boots a guest and serves it until it ends. SIGUSR1 pauses the guest, SIGUSR2 resumes it. The
/// control API is available meanwhile.
///
/// # Errors
/// The options are invalid, the host fails, or a vCPU stops with an error.
pub fn run(options: &RunOptions) -> Result<End, Error> {
    let requests = Signals::before_guest().map_err(Error::host("signal handling"))?;
    let machine = Machine::new(options, standard_output().map_err(Error::host("dup"))?)?;
    machine.take_new_disks()?;
    machine.load_kernel(options)?;
    let machine = Arc::new(machine);
    let controller = MigrationController::new(Some(Arc::clone(&machine)));
    requests.take_stop();
    let _control =
        Server::bind_vmm(&options.host.control, Arc::new(ControlApi(Arc::clone(&controller))))?;
    tracing::info!(
        name = options.host.name,
        cpus = options.cpus,
        memory_mib = options.memory_bytes >> 20,
        "booting"
    );
    controller.start_guest(&machine)?;
    serve_to_end(&machine, &controller, &requests)
}

/// Serves a running guest until it ends or has moved.
pub(crate) fn serve_to_end(
    machine: &Arc<Machine>,
    controller: &Arc<MigrationController>,
    requests: &Signals,
) -> Result<End, Error> {
    controller.set_stop(requests.stopper());
    // Without a console the guest still runs, only without input.
    let console = Console::start(&machine.bus, requests.operator_stopper());
    let _console =
        console.inspect_err(|error| tracing::error!(%error, "the console takes no input"));
    let end = machine.serve_with(requests, &|pause| controller.pause_or_resume(machine, pause));
    let has_moved = controller.end(requests.ending());
    end_console(machine, requests.ending());
    if has_moved { Ok(End::Moved) } else { end }
}

/// Waits until the console's reader has received all output of a guest that has ended.
fn end_console(machine: &Machine, ending: &Ending) {
    let usual = if ending.is_requested() { CONSOLE_STOP_TIMEOUT } else { CONSOLE_DRAIN_TIMEOUT };
    let limit = ending.limit_wait("the console's reader", usual);
    let LostOutput { dropped, left } = machine.bus.ports.finish_output(limit);
    if dropped > 0 || left > 0 {
        tracing::warn!(dropped, left, "host: the console was not read in time; output is lost");
    }
    ending.limit_wait("the control socket, and the threads of the guest", Duration::MAX);
}
