//! `aerostat vhost-user`: serves a balloon to any monitor.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use control::{GuestName, Size, ensure_runtime_dir, socket_path};
use sandbox::{Network, Restricted, restrict_calls, restrict_files};
use vhost_device_balloon::{Error, Service, ServiceOptions};

use crate::balloon_arg::{Feature, ReleaseArgs, features};
use crate::guest_arg::guest_name;
use cli::failure::Failure;

/// Longest time to look for a message, in microseconds: more is no latency that anybody
/// could notice.
const MAX_BUSY_POLL_US: u64 = 10_000;

/// Serves a balloon to a monitor over vhost-user, until SIGTERM or SIGINT
#[derive(Debug, Args)]
pub(crate) struct VhostUserArgs {
    /// Socket the monitor connects to; it is made here
    #[arg(long, value_name = "PATH", required_unless_present = "guests", requires = "name")]
    socket: Option<PathBuf>,

    /// Name of the guest, for the other commands
    #[arg(long, value_parser = guest_name, requires = "socket")]
    name: Option<GuestName>,

    /// A further guest: its name, and the socket that its monitor connects to
    #[arg(long = "guest", value_name = "NAME=SOCKET", value_parser = guest_and_socket)]
    guests: Vec<(GuestName, PathBuf)>,

    /// The monitor listens on the socket, and the back end connects to it
    #[arg(long)]
    connect: bool,

    #[command(flatten)]
    release: ReleaseArgs,

    /// Features that the guest is not offered, separated by commas
    #[arg(long, value_name = "FEATURE", value_enum, value_delimiter = ',')]
    without: Vec<Feature>,

    /// Control socket; by the name, in the runtime directory, if it is not given
    #[arg(long, value_name = "PATH", conflicts_with = "guests")]
    control: Option<PathBuf>,

    /// Directory of the files that outlive the process, NAME.state; that of the
    /// control socket if it is not given
    #[arg(long, value_name = "DIRECTORY")]
    state: Option<PathBuf>,

    /// Keep nothing: after a restart the target is 0, and so is what a guest is
    /// believed to hold until it says more
    #[arg(long, conflicts_with = "state")]
    no_state: bool,

    /// Whether memory is taken that its monitor can shrink, which ends this guest's session
    #[arg(long, value_enum, value_name = "WHAT")]
    unsealed_memory: Option<Unsealed>,

    /// Most memory that a guest may have, such as 2TiB; four times the host's memory unless
    /// given. What is kept of a guest grows with it, by at most 70 MiB for each TiB
    #[arg(long, value_name = "SIZE")]
    max_guest_memory: Option<Size>,

    /// How long to look for a guest's next message, in microseconds, before sleeping
    /// until it comes; not at all unless given
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(..=MAX_BUSY_POLL_US))]
    busy_poll: u64,

    /// Leave the process all files that its user may use (no Landlock)
    #[arg(long)]
    no_landlock: bool,

    /// Leave the process all system calls (no seccomp)
    #[arg(long)]
    no_seccomp: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Unsealed {
    /// Taken; the default for one guest, who is alone in the process
    Accept,
    /// Refused; the default for several, who share a process
    Refuse,
}

fn guest_and_socket(text: &str) -> Result<(GuestName, PathBuf), String> {
    let (name, socket) = text.split_once('=').ok_or("it has the form NAME=SOCKET")?;
    if socket.is_empty() {
        return Err("the socket has no path".into());
    }
    Ok((guest_name(name)?, socket.into()))
}

pub(crate) fn run(args: &VhostUserArgs) -> Result<(), Failure> {
    let guests = args.options()?;
    if args.no_landlock {
        tracing::warn!("file system access is not restricted: --no-landlock");
    } else {
        give_up_files(&guests)?;
    }
    // Its thread has given up the files too, and gives up the system calls with the others.
    diagnostics::start_log();
    let service = Service::start(&guests).map_err(|error| match error {
        Error::Control(error) => error.into(),
        other => Failure::new(&other, "check the paths of the sockets, and this user's limits"),
    })?;
    if args.no_seccomp {
        tracing::warn!("system calls are not restricted: --no-seccomp");
    } else {
        let network = if args.connect { Network::Connects } else { Network::Accepts };
        diagnostics::hide_backtraces();
        restrict_calls(network)
            .map_err(|error| Failure::new(&error, "--no-seccomp goes on without"))?;
    }
    service.serve().map_err(|error| Failure::new(&error, "see the log for each guest"))
}

impl VhostUserArgs {
    /// The guests that are asked for.
    fn options(&self) -> Result<Vec<ServiceOptions>, Failure> {
        let first = self.name.clone().zip(self.socket.clone());
        let guests: Vec<_> = first.into_iter().chain(self.guests.iter().cloned()).collect();
        let sealed_only = match self.unsealed_memory {
            Some(what) => what == Unsealed::Refuse,
            None => guests.len() > 1,
        };
        if self.control.is_none() {
            ensure_runtime_dir()?;
        }
        let without = features(&self.without);
        let options = guests.into_iter().map(|(name, socket)| {
            let control = match &self.control {
                Some(path) => path.clone(),
                None => socket_path(&name)?,
            };
            Ok(ServiceOptions {
                socket,
                connect: self.connect,
                state: self.state_file(&name, &control),
                name: name.to_string(),
                control,
                release: self.release.mode(),
                partial_huge: self.release.partial_huge(),
                without,
                sealed_only,
                max_memory_bytes: self.max_guest_memory.map(|size| size.0),
                busy_poll: Duration::from_micros(self.busy_poll),
            })
        });
        options.collect()
    }

    fn state_file(&self, name: &GuestName, control: &Path) -> Option<PathBuf> {
        let directory = self.state.as_deref().or(control.parent())?;
        (!self.no_state).then(|| directory.join(format!("{name}.state")))
    }
}

/// Restricts the process to the directories of its sockets and state files. It has
/// one thread yet.
fn give_up_files(guests: &[ServiceOptions]) -> Result<(), Failure> {
    let paths = guests.iter().flat_map(|guest| {
        // A monitor's socket is connected to, which is not opening it.
        let made = (!guest.connect).then_some(&guest.socket);
        made.into_iter().chain([&guest.control]).chain(&guest.state)
    });
    let mut directories: Vec<&Path> = paths.map(|path| parent(path)).collect();
    directories.sort_unstable();
    directories.dedup();
    match restrict_files(&directories) {
        Ok(Restricted::Fully) => Ok(()),
        Ok(Restricted::Partly) => {
            tracing::warn!("this kernel's Landlock is old: it restricts files, but not all uses");
            Ok(())
        }
        Ok(Restricted::Not) => {
            tracing::warn!("file system access is not restricted: this kernel has no Landlock");
            Ok(())
        }
        Err(error) => {
            let hint = "see whether the directories of the sockets exist";
            Err(Failure::new(&error, format!("{hint}; --no-landlock goes on without")))
        }
    }
}

/// The directory that a file is in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
