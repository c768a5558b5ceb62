//! End-to-end tests of Aerostat on real kernels: guests in User Mode Linux with the vhost-user back
//! end, unmodified Debian kernels in QEMU, and the same in `aerostat run` on a real KVM.
//!
//! `AEROSTAT_PROGRAM` names the `aerostat` program, by default the release build.
//! `AEROSTAT_E2E_MINUTES` sets the duration of each random test instead of a number of steps,
//! `AEROSTAT_E2E_SEED` repeats one.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod bare;
mod bare_control;
mod bare_disks;
mod bare_errors;
mod bare_host_memory;
mod bare_memory;
mod bare_platform;
mod benches;
mod command_line;
mod debian;
mod debian_requests;
mod fixture;
mod integrity;
mod kvm;
mod kvm_move;
mod kvm_restore;
mod kvm_saved;
mod life;
mod monitor;
mod notification_blocker;
mod package;
mod page_types;
mod panics;
mod pressure;
mod program;
mod requests;
mod soak;
mod specification;
mod stuck;
