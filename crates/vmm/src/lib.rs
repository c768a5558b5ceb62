//! A small KVM VMM for x86-64 Linux guests, with the balloon in its process.
//!
//! [`run`] boots a kernel and serves the guest until it ends. The guest finds its vCPUs and
//! virtio-mmio devices through ACPI, so distribution kernels run unchanged. Its console is a serial
//! port on standard input and output.
//!
//! The balloon device itself is in `balloon-device`, shared through `balloon_host::Shared`, as in
//! the vhost-user back end.

#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod acpi;
mod answer;
mod balloon;
mod block;
mod boot;
mod bus;
mod codec;
mod console;
mod controller;
mod cpu;
mod cpuid;
mod description;
mod disk_reads;
mod disks;
mod error;
mod firmware;
mod generation;
mod kvm;
mod layout;
mod machine;
mod memory;
mod migrate;
mod mmio;
mod options;
mod output;
mod ports;
mod preflight;
#[cfg(feature = "raw")]
pub mod raw;
mod receive;
mod restore;
mod run;
mod signals;
mod state;
mod threads;
mod throttle;
mod vcpu;

pub use balloon_abi::Features;
pub use block::{DiskOptions, MAX_DISKS};
pub use cpuid::CpuFeatures;
pub use error::Error;
pub use layout::{MAX_CPUS, MAX_MEMORY_BYTES};
pub use machine::{End, Machine};
pub use memory::MemoryKind;
pub use migrate::GuestRam;
pub use migration::tcp::Security;
pub use migration::tls::{Tls, TlsFiles};
pub use options::{HostOptions, RunOptions};
pub use receive::{ReceiveOptions, receive};
pub use restore::{RestoreOptions, restore};
pub use run::run;
pub use signals::Signals;
pub use state::Section;
