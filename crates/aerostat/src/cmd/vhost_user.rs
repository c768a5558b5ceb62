//! `aerostat vhost-user`: serves a balloon to any monitor.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use control::{GuestName, PartialHuge, ReleaseMode, ensure_runtime_dir, socket_path};
use vhost_device_balloon::{Error, Options};

use crate::failure::Failure;

/// Serves a balloon to a monitor over vhost-user, until SIGTERM or SIGINT
#[derive(Debug, Args)]
pub(crate) struct VhostUserArgs {
    /// Socket the monitor connects to; it is made here
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Name of the guest, for the other commands
    #[arg(long, value_parser = guest_name)]
    name: GuestName,

    /// When pages that the guest gave are released
    #[arg(long, value_enum, default_value_t = Release::Background)]
    release: Release,

    /// What becomes of parts of the host's huge pages
    #[arg(long, value_enum, default_value_t = Partial::Split)]
    partial_huge: Partial,

    /// Control socket; by the name, in the runtime directory, if it is not given
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Release {
    /// After the guest was answered, many messages together
    Background,
    /// Before the guest is answered, a message at a time
    Immediate,
    /// Before the guest is answered, page by page; for comparison only
    PerPage,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Partial {
    /// Released once nothing more adds up; the host splits the huge page
    Split,
    /// Kept until the huge page is complete
    Wait,
}

impl From<Release> for ReleaseMode {
    fn from(release: Release) -> Self {
        match release {
            Release::Background => Self::Background,
            Release::Immediate => Self::Immediate,
            Release::PerPage => Self::PerPage,
        }
    }
}

impl From<Partial> for PartialHuge {
    fn from(partial: Partial) -> Self {
        match partial {
            Partial::Split => Self::Split,
            Partial::Wait => Self::Wait,
        }
    }
}

pub(crate) fn guest_name(text: &str) -> Result<GuestName, String> {
    text.parse().map_err(|error: control::ControlError| format!("{error}; {}", error.hint()))
}

pub(crate) fn run(args: VhostUserArgs) -> Result<(), Failure> {
    let control = match args.control {
        Some(path) => path,
        None => {
            ensure_runtime_dir()?;
            socket_path(&args.name)?
        }
    };
    let options = Options {
        socket: args.socket,
        name: args.name.to_string(),
        control,
        release: args.release.into(),
        partial_huge: args.partial_huge.into(),
    };
    vhost_device_balloon::run(&options).map_err(|error| match error {
        Error::Control(error) => error.into(),
        other => Failure::new(&other, "check the path of --socket, and the limits of this user"),
    })
}
