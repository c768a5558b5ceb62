//! Host options shared by `run`, `receive` and `restore`.

use std::path::PathBuf;

use clap::Args;
use control::{GuestName, ensure_runtime_dir, socket_path};
use vmm::{DiskOptions, HostOptions, MemoryKind};

use crate::balloon_arg::ReleaseArgs;
use cli::failure::Failure;

/// Options for the guest's memory, its control socket and the VMM process.
#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Keep the guest's memory in a memfd that can be shared with other processes
    #[arg(long)]
    shared: bool,

    /// Use huge pages for the guest's memory: transparent ones, or with --shared
    /// 2 MiB pages of the host's hugetlbfs pool
    #[arg(long)]
    huge: bool,

    #[command(flatten)]
    release: ReleaseArgs,

    /// Control socket [default: NAME.sock in the runtime directory]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Do not restrict the process's system calls (no seccomp)
    #[arg(long)]
    no_seccomp: bool,
}

impl HostArgs {
    /// Builds the options for the guest `name` with these disks. Creates the runtime directory if
    /// the control socket is there.
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

    /// Restricts the process to the system calls that running a guest needs, then starts the log
    /// thread. Called before any thread exists, so that none escapes the restriction.
    pub(crate) fn restrict_calls(&self) -> Result<(), Failure> {
        if self.no_seccomp {
            tracing::warn!("system calls are not restricted: --no-seccomp");
        } else {
            diagnostics::hide_backtraces();
            sandbox::restrict_vmm_calls().map_err(|error| {
                Failure::new(&error, "run without the restriction with --no-seccomp")
            })?;
        }
        diagnostics::start_log();
        Ok(())
    }
}
