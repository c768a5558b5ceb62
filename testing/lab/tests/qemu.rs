//! Boots unmodified Debian kernels in QEMU.

#![allow(clippy::unwrap_used)]

use lab::Guest;
use lab::debian::{self, DebianKernel, Release};

/// Emulation is slow, so guests are small.
const MEMORY_MIB: u64 = 512;

/// Memory that the test fills.
const FILLED_MIB: u64 = 200;

fn number(guest: &mut Guest, command: &str) -> u64 {
    guest.run(command).unwrap().text.parse().unwrap()
}

fn debian_lab_module(kernel: &DebianKernel) -> std::path::PathBuf {
    lab::guest_build::lab_module(&kernel.tree().unwrap()).unwrap()
}

#[test]
fn debian_kernels_boot_and_keep_memory() {
    for release in [Release::Cloud6_12, Release::Cloud6_1] {
        let kernel = debian::kernel(release).unwrap();
        let balloon = kernel.modules(&["virtio_pci", "virtio_balloon"]).unwrap();
        let mut guest = Guest::qemu(&kernel)
            .memory_mib(MEMORY_MIB)
            .modules(&balloon)
            .module(debian_lab_module(&kernel))
            .machine_arguments(["-device", "virtio-balloon-pci"])
            .boot()
            .unwrap();
        let running = guest.run("cat /proc/sys/kernel/osrelease").unwrap().lines.join("");
        assert_eq!(running, kernel.release);
        guest.load(&balloon).unwrap();
        let devices = guest.run("ls /sys/bus/virtio/drivers/virtio_balloon").unwrap().lines;
        assert!(devices.contains(&"virtio0".to_owned()), "{devices:?}");
        guest.run(&format!("fill data {FILLED_MIB} 3")).unwrap();
        assert_eq!(number(&mut guest, &format!("verify data {FILLED_MIB} 3")), 0);
        guest.run("drop data").unwrap();
        guest.run("insmod lab_memory").unwrap();
        let free_mib = number(&mut guest, "free-mib");
        let pinned = guest.fragment(64).unwrap();
        assert!(pinned.abs_diff((free_mib - 64) / 4) <= 16, "{pinned} of {free_mib} MiB");
        assert!(guest.power_off().unwrap().success());
    }
}
