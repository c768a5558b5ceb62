//! A changed snapshot.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::OnceLock;

use migration::observer::Silent;
use migration::raw::seal_snapshot;
use migration::snapshot::{After, restore, snapshot};
use migration::{DestinationConfig, SourceConfig};
use rustix::fs::{MemfdFlags, memfd_create};

use super::machine::{Destination, MACHINE, MAX_BYTES, Source};
use crate::script::Script;

/// An unchanged snapshot.
fn whole() -> &'static [u8] {
    static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("snapshot");
        let mut machine = Source { runs: true, relinquished: false };
        let config = SourceConfig::default();
        snapshot(&config, &mut machine, &path, After::Stop, &mut Silent).expect("a snapshot");
        std::fs::read(path).expect("the snapshot")
    })
}

pub(super) fn run(script: &mut Script<'_>) {
    let mut bytes = whole().to_vec();
    let tail = 9 * 4096;
    while !script.is_over() {
        let at = match script.u8() % 6 {
            0 => usize::from(script.u8()),
            1..=3 => tail + usize::from(script.u8()),
            4 => usize::from(script.u16()),
            _ => {
                let len = bytes.len().saturating_sub(script.u8().into());
                bytes.truncate(len);
                continue;
            }
        };
        let value = script.u8();
        if let Some(byte) = bytes.get_mut(at) {
            *byte = value;
        }
    }
    seal_snapshot(&mut bytes);
    let file = memfd_create("snapshot", MemfdFlags::CLOEXEC).expect("a memfd");
    let mut file = std::fs::File::from(file);
    file.write_all(&bytes).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mut machine = Destination::default();
    let config =
        DestinationConfig { max_memory_bytes: MAX_BYTES, ..DestinationConfig::new(MACHINE) };
    match restore(&config, &mut machine, &path, &mut Silent) {
        Ok(_) => assert!(machine.runs),
        Err(_) => assert!(!machine.made && !machine.runs),
    }
}
