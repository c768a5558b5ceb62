//! The file of a snapshot until it is complete, under a name beside its final one.
//!
//! Other users may create files in the directory too (`/tmp`). So an existing name there is not
//! trusted: a part is a file that this process created (`O_EXCL`), or one of the same user that no
//! other user can write. All operations are relative to the opened directory.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Stat, fstat, linkat, openat, renameat_with,
    statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::error::MigrationError;
use crate::wire::control::MigrationId;

/// Only its owner can read and write it.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// The permission bits of a mode.
const PERMISSIONS: u32 = 0o7777;

/// Permissions of group and others.
const OTHER_USERS: u32 = 0o077;

/// Characters of a random part name.
const RANDOM_NAME_BYTES: usize = 8;

/// A file that gets its final name from [`name`](Self::name), and is removed if it never does.
#[derive(Debug)]
pub(super) struct Part {
    file: File,
    directory: OwnedFd,
    /// The final name.
    name: OsString,
    /// The name until then.
    part: OsString,
    /// The path that the operator gave.
    path: PathBuf,
}

/// How a file gets its final name without replacing another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `renameat2(RENAME_NOREPLACE)`. NFS and some FUSE file systems support no flags.
    Rename,
    /// A hard link, then the first name is removed. FAT, exFAT and some FUSE file systems have
    /// none.
    Link,
    /// Creates an empty file under the name, which fails if one exists, and replaces it.
    Claim,
}

impl Part {
    /// Creates the file for `path`, which must not exist.
    ///
    /// # Errors
    /// The file exists, is being written, or cannot be created.
    pub(super) fn create(path: &Path) -> Result<Self, MigrationError> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let Some(name) = path.file_name() else {
            let what = format!("{} has no file name: give a path with one", path.display());
            return Err(MigrationError::Operator { what });
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            openat(CWD, parent, flags, Mode::empty()).map_err(failed("opening", parent))?;
        // A dangling symbolic link exists too.
        if statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Err(exists(path));
        }
        let mut part = name.to_owned();
        part.push(".part");
        let shown = parent.join(&part);
        let (file, part) = match open_part(&directory, &part, &shown)? {
            Some(file) => (file, part),
            None => {
                let mut part = name.to_owned();
                part.push(format!(".{}.part", random_name()?));
                let file = create_new(&directory, &part);
                (file.map_err(failed("creating", &parent.join(&part)))?, part)
            }
        };
        lock(&file, &directory, &part, &shown)?;
        file.set_len(0).map_err(|source| file_error("emptying", &shown, source))?;
        if fstat(&file).is_ok_and(|found| found.st_mode & OTHER_USERS != 0) {
            let path = shown.display();
            tracing::warn!(%path, "host: other users can read the guest's memory there");
        }
        Ok(Self { file, directory, name: name.to_owned(), part, path: path.to_owned() })
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its final name, durably, if no other file has it.
    ///
    /// # Errors
    /// Another file has the name by now, or the directory cannot be written.
    pub(super) fn name(&self) -> Result<(), MigrationError> {
        self.name_by(&[Way::Rename, Way::Link, Way::Claim])?;
        match rustix::fs::fsync(&self.directory) {
            // This file system (CIFS) cannot sync a directory.
            Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => {
                self.remove(&self.name);
                Err(failed("syncing the directory of", &self.path)(errno))
            }
        }
    }

    /// Uses the first of `ways` that this file system supports.
    fn name_by(&self, ways: &[Way]) -> Result<(), MigrationError> {
        let mut last = Errno::OPNOTSUPP;
        for way in ways {
            match self.try_to_name(*way) {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => return Err(exists(&self.path)),
                Err(errno) if way.is_missing(errno) => last = errno,
                Err(errno) => return Err(failed("naming", &self.path)(errno)),
            }
        }
        Err(failed("naming", &self.path)(last))
    }

    fn try_to_name(&self, way: Way) -> Result<(), Errno> {
        let (directory, part, name) = (&self.directory, &self.part, &self.name);
        match way {
            Way::Rename => {
                renameat_with(directory, part, directory, name, RenameFlags::NOREPLACE)?;
            }
            Way::Link => linkat(directory, part, directory, name, AtFlags::empty())?,
            Way::Claim => {
                let claim = create_new(directory, name)?;
                let renamed = renameat_with(directory, part, directory, name, RenameFlags::empty());
                if let Err(errno) = renamed {
                    remove(directory, name, &claim);
                    return Err(errno);
                }
            }
        }
        // Another user of the directory may have put another file under the part's name.
        if is_at(directory, name, &self.file) { Ok(()) } else { Err(Errno::STALE) }
    }

    fn remove(&self, name: &OsStr) {
        remove(&self.directory, name, &self.file);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.remove(&self.part);
    }
}

impl Way {
    /// True if the error means that the file system does not support this way.
    const fn is_missing(self, errno: Errno) -> bool {
        match self {
            Self::Rename => matches!(errno, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP),
            Self::Link => matches!(
                errno,
                Errno::PERM | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::MLINK
            ),
            Self::Claim => false,
        }
    }
}

/// Opens the part under its usual name: a new one, or one that a dead process of this user left.
/// `None` if the name is taken by anything else: a link, a pipe, or a file that others can write.
fn open_part(
    directory: &OwnedFd,
    part: &OsStr,
    shown: &Path,
) -> Result<Option<File>, MigrationError> {
    match create_new(directory, part) {
        Ok(file) => return Ok(Some(file)),
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed("creating", shown)(errno)),
    }
    // Do not block on the other end of a pipe.
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let found = openat(directory, part, flags, Mode::empty()).and_then(|fd| {
        let found = fstat(&fd)?;
        Ok((fd, found))
    });
    match found {
        Ok((fd, found)) if is_ours(&found) => return Ok(Some(File::from(fd))),
        Ok((_, found)) => {
            let (mode, uid) = (found.st_mode, found.st_uid);
            let path = shown.display();
            tracing::warn!(
                %path,
                mode = format_args!("{mode:o}"),
                uid,
                links = found.st_nlink,
                "not left by a snapshot of this user; using another name"
            );
        }
        Err(error) => {
            let path = shown.display();
            tracing::warn!(%path, %error, "cannot reuse this file; using another name");
        }
    }
    Ok(None)
}

/// True if only this user can have written the file, and can write it.
fn is_ours(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
        && found.st_uid == geteuid().as_raw()
        && found.st_nlink == 1
        && found.st_mode & PERMISSIONS == MODE.bits()
}

fn create_new(directory: &OwnedFd, name: &OsStr) -> Result<File, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    openat(directory, name, flags, MODE).map(File::from)
}

/// Locks the file for this guest. Otherwise two snapshots with the same name would write into the
/// same file, even after it has its final name.
fn lock(
    file: &File,
    directory: &OwnedFd,
    part: &OsStr,
    shown: &Path,
) -> Result<(), MigrationError> {
    let taken = || MigrationError::Operator {
        what: format!(
            "{} is being written by another process: wait for it, or give another name",
            shown.display()
        ),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(taken()),
        Err(TryLockError::Error(error)) => {
            tracing::warn!(%error, "host: cannot lock the file; no other process may write it");
        }
    }
    // The last owner of the lock may have removed the name before it released the lock.
    if is_at(directory, part, file) { Ok(()) } else { Err(taken()) }
}

/// True if `file` has this name.
fn is_at(directory: &OwnedFd, name: &OsStr, file: &File) -> bool {
    let named = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
    let (Ok(named), Ok(ours)) = (named, fstat(file)) else { return false };
    (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)
}

/// Removes `file`, if it still has this name.
fn remove(directory: &OwnedFd, name: &OsStr, file: &File) {
    if !is_at(directory, name, file) {
        return;
    }
    if let Err(error) = unlinkat(directory, name, AtFlags::empty()) {
        let name = name.display();
        tracing::warn!(%name, %error, "cannot remove the file");
    }
}

fn random_name() -> Result<String, MigrationError> {
    let mut name = MigrationId::random()?.to_string();
    name.truncate(RANDOM_NAME_BYTES);
    Ok(name)
}

fn exists(path: &Path) -> MigrationError {
    let what = format!("{} exists: give another name, or remove it", path.display());
    MigrationError::Operator { what }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(Errno) -> MigrationError + use<> {
    let path = path.to_owned();
    move |errno| file_error(what, &path, errno.into())
}

fn file_error(what: &'static str, path: &Path, source: io::Error) -> MigrationError {
    MigrationError::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn no_way_of_naming_replaces_a_file() {
        for way in [Way::Rename, Way::Link, Way::Claim] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("a");
            let part = Part::create(&path).unwrap();
            let inode = part.file().metadata().unwrap().ino();
            part.name_by(&[way]).unwrap();
            drop(part);
            assert_eq!(names(directory.path()), ["a"], "{way:?}");
            assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
            let path = directory.path().join("b");
            let part = Part::create(&path).unwrap();
            fs::write(&path, "another's").unwrap();
            let error = part.name_by(&[way]).unwrap_err().to_string();
            assert!(error.contains("b exists: give another name"), "{way:?}: {error}");
            drop(part);
            assert_eq!(names(directory.path()), ["a", "b"], "{way:?}");
            assert_eq!(fs::read(&path).unwrap(), b"another's");
        }
    }

    /// Puts something under the part's name. Only root can create another user's file.
    fn plant(part: &Path, kind: &str) {
        let other = part.with_file_name("other");
        match kind {
            "writable" => {
                fs::write(part, "theirs").unwrap();
                fs::set_permissions(part, fs::Permissions::from_mode(0o666)).unwrap();
            }
            "another user's" => {
                fs::write(part, "theirs").unwrap();
                fs::set_permissions(part, fs::Permissions::from_mode(0o600)).unwrap();
                std::os::unix::fs::chown(part, Some(12_345), None).unwrap();
            }
            "a symbolic link" => {
                fs::write(&other, "theirs").unwrap();
                symlink(&other, part).unwrap();
            }
            "a dangling link" => symlink(&other, part).unwrap(),
            "a hard link" => {
                fs::write(&other, "theirs").unwrap();
                fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).unwrap();
                fs::hard_link(&other, part).unwrap();
            }
            "a pipe" => {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mkfifoat(rustix::fs::CWD, part, mode).unwrap();
            }
            _ => fs::create_dir(part).unwrap(),
        }
    }

    #[test]
    fn another_users_file_never_becomes_the_snapshot() {
        let mut kinds = vec!["writable", "a symbolic link", "a dangling link"];
        kinds.extend(["a hard link", "a pipe", "a directory"]);
        // Only root can change the owner; CI and the lab run as root.
        if geteuid().is_root() {
            kinds.push("another user's");
        }
        for kind in kinds {
            let directory = tempfile::tempdir().unwrap();
            let (path, planted) = (directory.path().join("a"), directory.path().join("a.part"));
            plant(&planted, kind);
            let before = fs::symlink_metadata(&planted).unwrap();
            let part = Part::create(&path).unwrap();
            assert_ne!(part.part, "a.part", "{kind}");
            part.name().unwrap();
            drop(part);
            let made = fs::symlink_metadata(&path).unwrap();
            assert!(made.is_file() && made.nlink() == 1, "{kind}");
            assert_eq!((made.mode() & PERMISSIONS, made.uid()), (0o600, geteuid().as_raw()));
            let after = fs::symlink_metadata(&planted).unwrap();
            assert_eq!((after.ino(), after.size()), (before.ino(), before.size()), "{kind}");
            if let Ok(other) = fs::read(directory.path().join("other")) {
                assert_eq!(other, b"theirs", "{kind}");
            }
        }
    }

    #[test]
    fn the_part_of_a_dead_process_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (path, left) = (directory.path().join("a"), directory.path().join("a.part"));
        fs::write(&left, "left").unwrap();
        fs::set_permissions(&left, fs::Permissions::from_mode(0o600)).unwrap();
        let inode = fs::metadata(&left).unwrap().ino();
        let part = Part::create(&path).unwrap();
        assert_eq!(part.file().metadata().unwrap().len(), 0);
        part.name().unwrap();
        drop(part);
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        assert_eq!(names(directory.path()), ["a"]);
    }

    #[test]
    fn a_dangling_link_counts_as_an_existing_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        symlink("nowhere", &path).unwrap();
        let error = Part::create(&path).unwrap_err().to_string();
        assert!(error.starts_with("operator: ") && error.contains("exists"), "{error}");
        assert!(Part::create(Path::new("/")).is_err());
        assert_eq!(names(directory.path()), ["a"]);
    }
}
