//! What a host decides of a guest that it runs, wherever the guest comes from.

use std::path::PathBuf;

use clap::Args;
use control::{GuestName, ensure_runtime_dir, socket_path};
use vmm::{DiskOptions, HostOptions, MemoryKind};

use crate::balloon_arg::ReleaseArgs;
use cli::failure::Failure;

/// Of the guest's memory, its control socket, and the process that runs it.
#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Keep the guest's memory in a file that other processes can be given
    #[arg(long)]
    shared: bool,

    /// Use huge pages for the guest's memory: transparent ones, or with --shared
    /// those that the host has set aside
    #[arg(long)]
    huge: bool,

    #[command(flatten)]
    release: ReleaseArgs,

    /// Control socket; by the name, in the runtime directory, if it is not given
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Leave the process all system calls (no seccomp)
    #[arg(long)]
    no_seccomp: bool,
}

impl HostArgs {
    /// The options, for the guest `name` with these disks. Makes the directory of its control
    /// socket, if it is the runtime directory.
    pub(crate) fn options(
        &self,
        name: &GuestName,
        disks: Vec<DiskOptions>,
    ) -> Result<HostOptions, Failure> {
        let control = match &self.control {
            Some(path) => path.clone(),
            None => {
                ensure_runtime_dir()?;
                socket_path(name)?
            }
        };
        Ok(HostOptions {
            name: name.to_string(),
            control,
            memory: MemoryKind { shared: self.shared, huge: self.huge },
            disks,
            accept_disks: false,
            release: self.release.mode(),
            partial_huge: self.release.partial_huge(),
        })
    }

    /// Restricts the process to what running a guest needs. Before anything is made, so that no
    /// thread escapes it; then the log has its own.
    pub(crate) fn give_up_calls(&self) -> Result<(), Failure> {
        if self.no_seccomp {
            tracing::warn!("system calls are not restricted: --no-seccomp");
        } else {
            diagnostics::hide_backtraces();
            sandbox::restrict_calls_of_monitor()
                .map_err(|error| Failure::new(&error, "--no-seccomp goes on without"))?;
        }
        diagnostics::start_log();
        Ok(())
    }
}
