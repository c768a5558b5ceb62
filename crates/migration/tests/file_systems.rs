//! Snapshots on file systems that lack features.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::sync::Arc;

use common::{Destination, Source, World, compare, quick_destination, quick_source};
use lab::fuse::{Features, Fuse};
use migration::SourceGuest;
use migration::observer::Silent;
use migration::snapshot::{After, restore, snapshot};

/// FAT, exFAT and some CIFS; NFS and 9p; a file system with neither feature. None has holes, or can
/// sync a directory.
const FILE_SYSTEMS: [Features; 3] = [
    Features { links: false, rename_flags: true },
    Features { links: true, rename_flags: false },
    Features { links: false, rename_flags: false },
];

#[test]
fn a_snapshot_needs_no_hard_links_and_no_holes() {
    for has in FILE_SYSTEMS {
        let fuse = Fuse::mount(has).unwrap();
        let path = fuse.path().join("a");
        let world = Arc::new(World::default());
        let mut source = Source::new(&world, 500, 0);
        let written = snapshot(&quick_source(), &mut source, &path, After::Stop, &mut Silent);
        written.unwrap_or_else(|failure| panic!("{has:?}: {}", failure.error.chain()));
        assert_eq!(fuse.names(), ["a"], "{has:?}");
        let mut destination = Destination::new(&world);
        restore(&quick_destination(), &mut destination, &path, &mut Silent).unwrap();
        compare(&source, &destination);
    }
}

#[test]
fn a_snapshot_replaces_no_file_on_any_file_system() {
    for has in FILE_SYSTEMS {
        let fuse = Fuse::mount(has).unwrap();
        let path = fuse.path().join("a");
        let mut source = Source::new(&Arc::new(World::default()), 0, 0);
        // Another process takes the name while the guest is written.
        source.takes = Some(path.clone());
        let failed = snapshot(&quick_source(), &mut source, &path, After::Resume, &mut Silent);
        let failure = failed.unwrap_err();
        assert!(failure.error.to_string().contains("exists"), "{has:?}: {failure:?}");
        assert!(matches!(failure.guest, SourceGuest::Runs) && source.runs());
        assert_eq!(fs::read(&path).unwrap(), b"another's", "{has:?}");
        assert_eq!(fuse.names(), ["a"], "{has:?}");
    }
}
