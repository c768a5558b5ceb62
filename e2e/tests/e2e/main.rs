//! The whole of Aerostat on real kernels: guests in User Mode Linux with the
//! back end of the release build, unmodified Debian kernels in QEMU, and the same
//! in our own monitor on a real KVM.
//!
//! `AEROSTAT_PROGRAM` names the back end's program; without it, it is built.
//! `AEROSTAT_E2E_MINUTES` lets each random test run so long instead of for a
//! number of steps, `AEROSTAT_E2E_SEED` repeats one.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

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
mod package;
mod page_types;
mod panics;
mod pressure;
mod program;
mod requests;
mod silence;
mod soak;
mod specification;
mod stuck;
