//! `aerostat vhost-user`: the vhost-user back end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use control::{GuestName, Size, ensure_runtime_dir, socket_path};
use sandbox::{Network, Restricted, restrict_calls, restrict_files};
use vhost_device_balloon::{Error, Service, ServiceOptions};

use crate::balloon_arg::{Feature, ReleaseArgs, features};
use crate::guest_arg::guest_name;
use cli::failure::Failure;

/// Longest busy polling, in microseconds: a longer wait gains nothing over sleeping.
const MAX_BUSY_POLL_US: u64 = 10_000;

/// Serve a balloon to a VMM over vhost-user, until SIGTERM or SIGINT
#[derive(Debug, Args)]
pub(crate) struct VhostUserArgs {
    /// Socket for the VMM, created by this process unless --connect is given
    #[arg(long, value_name = "PATH", required_unless_present = "guests", requires = "name")]
    socket: Option<PathBuf>,

    /// Name of the guest, used by the other commands
    #[arg(long, value_parser = guest_name, requires = "socket")]
    name: Option<GuestName>,

    /// Another guest: its name, and the socket for its VMM
    #[arg(long = "guest", value_name = "NAME=SOCKET", value_parser = guest_and_socket)]
    guests: Vec<(GuestName, PathBuf)>,

    /// Connect to the socket instead of listening on it
    #[arg(long)]
    connect: bool,

    #[command(flatten)]
    release: ReleaseArgs,

    /// Balloon features not to offer to the guest, separated by commas
    #[arg(long, value_name = "FEATURE", value_enum, value_delimiter = ',')]
    without: Vec<Feature>,

    /// Control socket [default: NAME.sock in the runtime directory]
    #[arg(long, value_name = "PATH", conflicts_with = "guests")]
    control: Option<PathBuf>,

    /// Directory of the state files, NAME.state, which survive a restart [default: that
    /// of the control socket]
    #[arg(long, value_name = "DIRECTORY")]
    state: Option<PathBuf>,

    /// Use no state file: after a restart, the target and the size reported by the
    /// guest are 0 until they are set again
    #[arg(long, conflicts_with = "state")]
    no_state: bool,

    /// Whether to accept guest memory that the VMM can shrink, which would end the guest's session
    #[arg(long, value_enum, value_name = "WHAT")]
    unsealed_memory: Option<Unsealed>,

    /// Largest guest memory, such as 2TiB [default: four times the host's memory]. The
    /// back end needs up to 70 MiB of its own per TiB of guest memory
    #[arg(long, value_name = "SIZE")]
    max_guest_memory: Option<Size>,

    /// How long to poll for the guest's next message before sleeping, in microseconds; 0
    /// does not poll
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0,
        value_parser = clap::value_parser!(u64).range(..=MAX_BUSY_POLL_US))]
    busy_poll: u64,

    /// Do not restrict the process's file access (no Landlock)
    #[arg(long)]
    no_landlock: bool,

    /// Do not restrict the process's system calls (no seccomp)
    #[arg(long)]
    no_seccomp: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Unsealed {
    /// Accept it; default if the process serves one guest
    Accept,
    /// Refuse it; default if the process serves several guests
    Refuse,
}

fn guest_and_socket(text: &str) -> Result<(GuestName, PathBuf), String> {
    let (name, socket) = text.split_once('=').ok_or("use the form NAME=SOCKET")?;
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
        restrict_to_directories(&guests)?;
    }
    // Its thread inherits the file restriction, and gets the system call restriction with the
    // others.
    diagnostics::start_log();
    let service = Service::start(&guests).map_err(|error| match error {
        Error::Control(error) => error.into(),
        other => {
            Failure::new(&other, "check the paths of the sockets, and the limits of this user")
        }
    })?;
    if args.no_seccomp {
        tracing::warn!("system calls are not restricted: --no-seccomp");
    } else {
        let network = if args.connect { Network::Connects } else { Network::Accepts };
        diagnostics::hide_backtraces();
        restrict_calls(network).map_err(|error| {
            Failure::new(&error, "run without the restriction with --no-seccomp")
        })?;
    }
    service.serve().map_err(|error| Failure::new(&error, "see the log for each guest"))
}

impl VhostUserArgs {
    /// Builds the options of all guests.
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

/// Restricts the process to the directories of its sockets and state files. The process is still
/// single-threaded.
fn restrict_to_directories(guests: &[ServiceOptions]) -> Result<(), Failure> {
    let paths = guests.iter().flat_map(|guest| {
        // Connecting to a front end's socket does not open a file.
        let made = (!guest.connect).then_some(&guest.socket);
        made.into_iter().chain([&guest.control]).chain(&guest.state)
    });
    let mut directories: Vec<&Path> = paths.map(|path| parent(path)).collect();
    directories.sort_unstable();
    directories.dedup();
    match restrict_files(&directories) {
        Ok(Restricted::Fully) => Ok(()),
        Ok(Restricted::Partly) => {
            tracing::warn!(
                "file system access is only partly restricted: this kernel's Landlock is too old"
            );
            Ok(())
        }
        Ok(Restricted::Not) => {
            tracing::warn!("file system access is not restricted: this kernel has no Landlock");
            Ok(())
        }
        Err(error) => {
            let hint = "check that the directories of the sockets exist";
            Err(Failure::new(
                &error,
                format!("{hint}, or run without the restriction with --no-landlock"),
            ))
        }
    }
}

/// Returns the directory of a file.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
