//! Tests of comparing disks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::NamedTempFile;

use super::*;

const SECTORS: u64 = 4 << 11;

const CONTINUE: &dyn Fn() -> io::Result<()> = &|| Ok(());

fn image(seed: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let words = (0..SECTORS * 64).map(|at| at ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    fs::write(file.path(), words.flat_map(u64::to_le_bytes).collect::<Vec<_>>()).unwrap();
    file
}

fn identity(file: &NamedTempFile, token: Option<u64>) -> DiskIdentity {
    DiskIdentity::of(file.path(), file.as_file(), SECTORS, token, CONTINUE).unwrap()
}

fn candidate(file: &File, read_only: bool) -> Candidate<'_> {
    Candidate::new(file, read_only, SECTORS, CONTINUE)
}

fn copy_of(file: &NamedTempFile) -> NamedTempFile {
    let copy = NamedTempFile::new().unwrap();
    fs::copy(file.path(), copy.path()).unwrap();
    copy
}

#[test]
fn on_one_host_a_writable_disk_needs_the_sources_lock() {
    let (file, other) = (image(1), image(2));
    let described = identity(&file, Some(7));
    described.check(&candidate(file.as_file(), false), Locks::ThisDisk).unwrap();
    // Device and inode do not count: a copy of the host, as from a VM snapshot, has the same.
    for wrong in [other.as_file(), copy_of(&file).as_file(), file.as_file()] {
        let why = described.check(&candidate(wrong, false), Locks::Unseen).unwrap_err();
        let inode = file.as_file().metadata().unwrap().ino();
        assert!(why.contains(&format!("has locked inode {inode} of ")), "{why}");
        assert!(why.contains("not locked by the guest's source"), "{why}");
    }
}

#[test]
fn without_lock_support_device_and_inode_identify_a_disk() {
    let file = image(1);
    let described = identity(&file, None);
    file.as_file().write_all_at(&[0x55; 1 << 20], 0).unwrap();
    // By another name, and with other contents.
    let link = file.path().with_extension("link");
    fs::hard_link(file.path(), &link).unwrap();
    described.check(&candidate(&File::open(&link).unwrap(), false), Locks::Unseen).unwrap();
    fs::remove_file(link).unwrap();
    assert!(described.check(&candidate(copy_of(&file).as_file(), false), Locks::Unseen).is_err());
}

#[test]
fn the_sources_lock_identifies_a_disk() {
    let (file, other) = (image(1), image(2));
    let described = identity(&file, Some(7));
    described.check(&candidate(other.as_file(), false), Locks::ThisDisk).unwrap();
    // But a read-only disk must have the same contents.
    assert!(described.check(&candidate(other.as_file(), true), Locks::ThisDisk).is_err());
}

#[test]
fn between_hosts_contents_identify_a_disk_without_lock_or_name() {
    let file = image(1);
    let elsewhere = identity(&file, Some(7)).elsewhere();
    let there = copy_of(&file);
    elsewhere.check(&candidate(there.as_file(), false), Locks::Unseen).unwrap();
    // The guest writes meanwhile.
    there.as_file().write_all_at(&[0x55; 64 << 10], 8192).unwrap();
    elsewhere.check(&candidate(there.as_file(), false), Locks::Unseen).unwrap();
    let other = image(2);
    let why = elsewhere.check(&candidate(other.as_file(), false), Locks::Unseen).unwrap_err();
    assert!(why.contains("192 of 192 samples differ"), "{why}");
    // An empty disk differs from one with contents, in both directions.
    let empty = NamedTempFile::new().unwrap();
    empty.as_file().set_len(SECTORS * 512).unwrap();
    assert!(elsewhere.check(&candidate(empty.as_file(), false), Locks::Unseen).is_err());
    let nothing = identity(&empty, None).elsewhere();
    nothing.check(&candidate(empty.as_file(), false), Locks::Unseen).unwrap();
    assert!(nothing.check(&candidate(file.as_file(), false), Locks::Unseen).is_err());
}

#[test]
fn a_read_only_disk_may_be_a_copy_with_the_same_contents() {
    let file = image(1);
    let described = identity(&file, None);
    let copy = copy_of(&file);
    described.check(&candidate(copy.as_file(), true), Locks::Unseen).unwrap();
    // Changed since, even if it is the same file.
    for changed in [&copy, &file] {
        changed.as_file().write_all_at(&[1], 1080).unwrap();
        let why = described.check(&candidate(changed.as_file(), true), Locks::Unseen).unwrap_err();
        assert!(why.contains("1 of 192 samples differ (hash "), "{why}");
    }
    assert!(
        described
            .check(&candidate(File::open("/proc/self/mem").as_ref().unwrap(), true), Locks::Unseen)
            .is_err()
    );
}

#[test]
fn samples_span_the_disk_and_lie_within_it() {
    for bytes in [512, 4096, 4608, 192 * 4096, 192 * 4096 + 512, 1 << 30, (1 << 50) + 512, !511] {
        let places = sample_places(bytes);
        assert!(places.len() <= MAX_SAMPLES as usize && places.is_sorted(), "{bytes}");
        assert!(places.iter().all(|at| *at < bytes), "{bytes}");
        assert_eq!(places[0], 0);
        let last = *places.last().unwrap();
        assert!(bytes - last <= SAMPLE_BYTES as u64, "{bytes}");
    }
}

#[test]
fn an_identity_round_trips_and_a_truncated_one_is_refused() {
    let file = image(1);
    for token in [None, Some(u64::MAX)] {
        let identity = identity(&file, token);
        let mut writer = Writer::default();
        identity.encode(&mut writer);
        let bytes = writer.finish();
        let mut reader = Reader::new(&bytes);
        assert_eq!(DiskIdentity::decode(&mut reader).unwrap(), identity);
        reader.finish().unwrap();
        for len in 0..bytes.len() {
            DiskIdentity::decode(&mut Reader::new(&bytes[..len])).unwrap_err();
        }
    }
}

/// Both sides shorten names in the same way.
#[test]
fn names_of_any_length_stay_distinct() {
    let (long, file) = (format!("nvme.1344-{}", "e".repeat(300)), image(1));
    let names = [long.clone(), format!("{long}2"), "é".repeat(200), "a\u{202e}\n".repeat(30)];
    let short = names.each_ref().map(|name| short_name(name));
    for (at, name) in short.iter().enumerate() {
        assert!(name.len() <= MAX_NAME_BYTES && !short[..at].contains(name), "{short:?}");
        let identity = DiskIdentity { name: name.clone(), ..identity(&file, None) };
        assert_eq!(round_trip(&identity).unwrap(), identity);
    }
    assert_eq!(short_name("wwid"), "wwid");
    let path = format!("/{}/disk", "é\u{2028}".repeat(200));
    let long = DiskIdentity::of(Path::new(&path), file.as_file(), SECTORS, None, CONTINUE).unwrap();
    assert!(long.path.starts_with("...") && long.path.ends_with("/disk"), "{long:?}");
    assert!(long.path.contains("\\u{2028}"), "{long:?}");
    assert_eq!(round_trip(&long).unwrap(), long);
}

/// A hostile source's text reaches the log and the operator.
#[test]
fn unprintable_characters_of_a_peer_are_escaped() {
    let hostile = "/mnt/\u{202e}gmi\u{2066}.\u{200b}a\u{2028}\x1b[31m\u{9b}";
    let identity = DiskIdentity {
        path: hostile.into(),
        boot: hostile.into(),
        name: hostile.into(),
        ..DiskIdentity::default()
    };
    let read = round_trip(&identity).unwrap();
    for text in [read.path, read.boot, read.name] {
        assert!(text.is_ascii() && !text.contains(|c: char| c.is_control()), "{text}");
        assert!(text.starts_with("/mnt/\\u{202e}gmi\\u{2066}."), "{text}");
    }
}

fn round_trip(identity: &DiskIdentity) -> Result<DiskIdentity, Malformed> {
    let mut writer = Writer::default();
    identity.encode(&mut writer);
    let bytes = writer.finish();
    DiskIdentity::decode(&mut Reader::new(&bytes))
}
