//! Which of two files is the disk that a guest had.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::NamedTempFile;

use super::*;

const SECTORS: u64 = 4 << 11;

const GOES_ON: &dyn Fn() -> io::Result<()> = &|| Ok(());

fn image(seed: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let words = (0..SECTORS * 64).map(|at| at ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    fs::write(file.path(), words.flat_map(u64::to_le_bytes).collect::<Vec<_>>()).unwrap();
    file
}

fn identity(file: &NamedTempFile, token: Option<u64>) -> DiskIdentity {
    DiskIdentity::of(file.path(), file.as_file(), SECTORS, token, GOES_ON).unwrap()
}

fn candidate(file: &File, read_only: bool) -> Candidate<'_> {
    Candidate::new(file, read_only, SECTORS, GOES_ON)
}

fn copy_of(file: &NamedTempFile) -> NamedTempFile {
    let copy = NamedTempFile::new().unwrap();
    fs::copy(file.path(), copy.path()).unwrap();
    copy
}

#[test]
fn on_one_host_a_disk_that_is_written_is_locked() {
    let (file, other) = (image(1), image(2));
    let had = identity(&file, Some(7));
    had.check(&candidate(file.as_file(), false), Locks::ThisDisk).unwrap();
    // Also not by its numbers: a copy of the host, as one out of a VM snapshot, has the same.
    for wrong in [other.as_file(), copy_of(&file).as_file(), file.as_file()] {
        let why = had.check(&candidate(wrong, false), Locks::Unseen).unwrap_err();
        let inode = file.as_file().metadata().unwrap().ino();
        assert!(why.contains(&format!("has inode {inode} of ")), "{why}");
        assert!(why.contains("not locked by the guest's source"), "{why}");
    }
}

#[test]
fn where_it_could_not_be_locked_its_numbers_say_which_it_is() {
    let file = image(1);
    let had = identity(&file, None);
    file.as_file().write_all_at(&[0x55; 1 << 20], 0).unwrap();
    // By another name, and whatever is in it by now.
    let link = file.path().with_extension("link");
    fs::hard_link(file.path(), &link).unwrap();
    had.check(&candidate(&File::open(&link).unwrap(), false), Locks::Unseen).unwrap();
    fs::remove_file(link).unwrap();
    assert!(had.check(&candidate(copy_of(&file).as_file(), false), Locks::Unseen).is_err());
}

#[test]
fn a_lock_that_is_seen_says_that_it_is_the_same() {
    let (file, other) = (image(1), image(2));
    let had = identity(&file, Some(7));
    had.check(&candidate(other.as_file(), false), Locks::ThisDisk).unwrap();
    // But what is only read has to have the same in it.
    assert!(had.check(&candidate(other.as_file(), true), Locks::ThisDisk).is_err());
}

#[test]
fn between_hosts_contents_decide_where_nothing_else_does() {
    let file = image(1);
    let elsewhere = identity(&file, Some(7)).elsewhere();
    let there = copy_of(&file);
    elsewhere.check(&candidate(there.as_file(), false), Locks::Unseen).unwrap();
    // The guest writes on.
    there.as_file().write_all_at(&[0x55; 64 << 10], 8192).unwrap();
    elsewhere.check(&candidate(there.as_file(), false), Locks::Unseen).unwrap();
    let other = image(2);
    let why = elsewhere.check(&candidate(other.as_file(), false), Locks::Unseen).unwrap_err();
    assert!(why.contains("192 of 192 samples differ"), "{why}");
    // An empty disk is not one with anything on it, nor the other way round.
    let empty = NamedTempFile::new().unwrap();
    empty.as_file().set_len(SECTORS * 512).unwrap();
    assert!(elsewhere.check(&candidate(empty.as_file(), false), Locks::Unseen).is_err());
    let nothing = identity(&empty, None).elsewhere();
    nothing.check(&candidate(empty.as_file(), false), Locks::Unseen).unwrap();
    assert!(nothing.check(&candidate(file.as_file(), false), Locks::Unseen).is_err());
}

#[test]
fn a_disk_that_is_only_read_may_be_a_copy_and_nothing_else() {
    let file = image(1);
    let had = identity(&file, None);
    let copy = copy_of(&file);
    had.check(&candidate(copy.as_file(), true), Locks::Unseen).unwrap();
    // Changed since, be it the same file.
    for changed in [&copy, &file] {
        changed.as_file().write_all_at(&[1], 1080).unwrap();
        let why = had.check(&candidate(changed.as_file(), true), Locks::Unseen).unwrap_err();
        assert!(why.contains("1 of 192 samples differ (sum "), "{why}");
    }
    assert!(
        had.check(&candidate(File::open("/proc/self/mem").as_ref().unwrap(), true), Locks::Unseen)
            .is_err()
    );
}

#[test]
fn samples_are_of_the_whole_disk_and_within_it() {
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
fn an_identity_is_read_as_it_was_written_or_refused() {
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

/// On both sides alike: what one tells is what the other has, whatever the host's names are.
#[test]
fn names_of_any_length_are_told_and_told_apart() {
    let (long, file) = (format!("nvme.1344-{}", "e".repeat(300)), image(1));
    let names = [long.clone(), format!("{long}2"), "é".repeat(200), "a\u{202e}\n".repeat(30)];
    let told = names.each_ref().map(|name| told_name(name));
    for (at, name) in told.iter().enumerate() {
        assert!(name.len() <= MAX_NAME_BYTES && !told[..at].contains(name), "{told:?}");
        let identity = DiskIdentity { name: name.clone(), ..identity(&file, None) };
        assert_eq!(there_and_back(&identity).unwrap(), identity);
    }
    assert_eq!(told_name("wwid"), "wwid");
    let path = format!("/{}/disk", "é\u{2028}".repeat(200));
    let long = DiskIdentity::of(Path::new(&path), file.as_file(), SECTORS, None, GOES_ON).unwrap();
    assert!(long.path.starts_with("...") && long.path.ends_with("/disk"), "{long:?}");
    assert!(long.path.contains("\\u{2028}"), "{long:?}");
    assert_eq!(there_and_back(&long).unwrap(), long);
}

/// What a hostile source says reaches the log and the operator.
#[test]
fn nothing_hides_in_what_a_peer_says() {
    let hostile = "/mnt/\u{202e}gmi\u{2066}.\u{200b}a\u{2028}\x1b[31m\u{9b}";
    let identity = DiskIdentity {
        path: hostile.into(),
        boot: hostile.into(),
        name: hostile.into(),
        ..DiskIdentity::default()
    };
    let read = there_and_back(&identity).unwrap();
    for text in [read.path, read.boot, read.name] {
        assert!(text.is_ascii() && !text.contains(|c: char| c.is_control()), "{text}");
        assert!(text.starts_with("/mnt/\\u{202e}gmi\\u{2066}."), "{text}");
    }
}

fn there_and_back(identity: &DiskIdentity) -> Result<DiskIdentity, Malformed> {
    let mut writer = Writer::default();
    identity.encode(&mut writer);
    let bytes = writer.finish();
    DiskIdentity::decode(&mut Reader::new(&bytes))
}
