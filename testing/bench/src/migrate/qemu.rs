//! Migrates a guest from QEMU to QEMU.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use lab::{Guest, GuestBuilder};

use super::{MigrationSample, Scenario, SkippedPages};
use crate::error::{Result, host};
use crate::kvm::{GuestFiles, command};
use crate::qmp::{QemuMigration, Qmp};
use crate::testbed::Driver;

/// Memory of two QEMU processes in addition to their guests', in MiB.
pub(super) const OWN_MEMORY_MIB: u64 = 256;

/// Its dependencies on PCI are built in.
const DRIVER: Driver = Driver::Stock;

/// A guest and its destination process.
pub(super) struct Fixture {
    pub(super) source: Guest,
    destination: Guest,
    address: String,
    qmp: Qmp,
    _directory: lab::Scratch,
}

impl Fixture {
    pub(super) fn start(hint: bool, scenario: Scenario, files: &GuestFiles) -> Result<Self> {
        let directory = lab::Scratch::new("bench")?;
        let socket = directory.path().join("source");
        let mut source =
            builder(hint, scenario, files).machine_arguments(qmp_arguments(&socket)).boot()?;
        command(&mut source, &format!("insmod {}", DRIVER.module_name()))?;
        let address = format!("tcp:127.0.0.1:{}", free_port()?);
        let there = directory.path().join("destination");
        let destination = builder(hint, scenario, files)
            .machine_arguments(qmp_arguments(&there))
            .incoming(&address)
            .boot()?;
        // It answers once it listens.
        Qmp::wait(&there)?.query_status()?;
        let qmp = Qmp::connect(&socket)?;
        Ok(Self { source, destination, address, qmp, _directory: directory })
    }

    /// Migrates the guest and returns it at its destination.
    pub(super) fn go(mut self) -> Result<(Guest, MigrationSample)> {
        let moved = self.qmp.migrate(&self.address)?;
        drop(self.source);
        Ok((self.destination, moved.into()))
    }
}

fn qmp_arguments(socket: &Path) -> [String; 2] {
    ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())]
}

/// QEMU's version.
pub(super) fn version() -> Result<String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output();
    let output = output.map_err(host("running QEMU"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Builds either side. Hints need an I/O thread (`hw/virtio/virtio-balloon.c`).
fn builder(hint: bool, scenario: Scenario, files: &GuestFiles) -> GuestBuilder {
    let builder = files.qemu(scenario.guest_mib);
    // Thread names help profiling.
    let builder = builder.machine_arguments(["-name", "lab,debug-threads=on"]);
    if hint {
        builder.machine_arguments(["-object", "iothread,id=hints"]).machine_arguments([
            "-device",
            "virtio-balloon-pci,id=balloon,iothread=hints,free-page-hint=on",
        ])
    } else {
        builder.machine_arguments(["-device", "virtio-balloon-pci,id=balloon"])
    }
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(host("listening"))?;
    Ok(listener.local_addr().map_err(host("listening"))?.port())
}

impl From<QemuMigration> for MigrationSample {
    fn from(moved: QemuMigration) -> Self {
        let QemuMigration { total_ms, downtime_ms, bytes_sent, memory_pages, .. } = moved;
        let QemuMigration { normal_pages, zero_pages, rounds, .. } = moved;
        let free = memory_pages.saturating_sub(normal_pages + zero_pages);
        Self {
            total_ms,
            downtime_ms,
            bytes_sent,
            skipped: SkippedPages { free, ballooned: 0, zero: zero_pages },
            written_bytes: None,
            throttle_percent: moved.throttle_percent,
            detail: format!("{rounds} rounds, setup {:.0} ms", moved.setup_ms),
        }
    }
}
