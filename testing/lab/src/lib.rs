//! Boots real kernels for the demo, the tests and the benchmarks.
//!
//! [`uml::kernel`] builds User Mode Linux once, [`debian::kernel`] fetches an unmodified Debian
//! kernel once; [`Guest::uml`] and [`Guest::qemu`] boot them; [`Guest::run`] runs a command in the
//! guest. [`kvm::KvmMachine`] provides a KVM for the VMM. A guest ends with its [`Guest`] and with
//! the process that booted it, even if that one is killed.
//!
//! ```no_run
//! let kernel = lab::uml::kernel()?;
//! let mut guest = lab::Guest::uml(&kernel).memory_mib(4096).boot()?;
//! guest.run("touch 3400")?;
//! println!("{} MiB free", guest.run("free-mib")?.text);
//! # Ok::<(), lab::LabError>(())
//! ```

#![forbid(unsafe_code)]

pub mod bare;
pub mod cache;
pub mod console;
pub mod debian;
pub mod fuse;
pub mod guest;
pub mod guest_build;
pub mod huge_pool;
pub mod initramfs;
pub mod kvm;
pub mod memory_dir;
pub mod qemu;
pub mod scratch;
pub mod uml;

mod available_memory;
mod boot;
mod error;
mod keeper;
mod sleep;
mod tool;

pub use console::Reply;
pub use error::{LabError, Result};
pub use guest::{Guest, GuestBuilder};
pub use memory_dir::{Backing, GuestMemoryDir};
pub use scratch::Scratch;
pub use sleep::Waker;
