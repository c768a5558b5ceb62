//! The file of a snapshot until it is whole, beside the name that it is to have.
//!
//! The directory may be one in which others make files too (`/tmp`). So what is under a name there
//! counts for nothing: a part is a file that this process made (`O_EXCL`), or one of its own user's
//! that nobody else can write, and everything is done relative to the directory that was opened.

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

/// Read and written by its owner, and by nobody else.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Permissions that a part has: all bits but those of its type.
const PERMISSIONS: u32 = 0o7777;

/// Permissions of others than the owner.
const OTHER_USERS: u32 = 0o077;

/// Bytes of a random name: nobody has taken it.
const RANDOM_NAME_BYTES: usize = 8;

/// A file that has its name once it is [named](Self::name), and is gone if it never is.
#[derive(Debug)]
pub(super) struct Part {
    file: File,
    directory: OwnedFd,
    /// The name that it is to have.
    name: OsString,
    /// The one that it has until then.
    part: OsString,
    /// What its operator calls it.
    path: PathBuf,
}

/// How a file gets its name in place of no other file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `renameat2(RENAME_NOREPLACE)`. NFS and some FUSE file systems have no flags.
    Rename,
    /// A second name, and the first one goes. FAT, exFAT and some FUSE file systems have none.
    Link,
    /// An empty file is made under the name, which fails where there is one, and is replaced.
    Claim,
}

impl Part {
    /// Makes the file for `path`, which must not exist.
    ///
    /// # Errors
    /// There is such a file, it is being written, or none can be made there.
    pub(super) fn create(path: &Path) -> Result<Self, MigrationError> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let Some(name) = path.file_name() else {
            let what = format!("{} names no file: give a path with a name", path.display());
            return Err(MigrationError::Operator { what });
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            openat(CWD, parent, flags, Mode::empty()).map_err(failed("opening", parent))?;
        // Also one that leads nowhere.
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
                (file.map_err(failed("making", &parent.join(&part)))?, part)
            }
        };
        lock(&file, &directory, &part, &shown)?;
        file.set_len(0).map_err(|source| file_error("emptying", &shown, source))?;
        if fstat(&file).is_ok_and(|found| found.st_mode & OTHER_USERS != 0) {
            let path = shown.display();
            tracing::warn!(%path, "host: this file system lets other users at the guest's memory");
        }
        Ok(Self { file, directory, name: name.to_owned(), part, path: path.to_owned() })
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name, for good, where nothing has it.
    ///
    /// # Errors
    /// Something came to have it, or the directory cannot be written.
    pub(super) fn name(&self) -> Result<(), MigrationError> {
        self.name_by(&[Way::Rename, Way::Link, Way::Claim])?;
        match rustix::fs::fsync(&self.directory) {
            // A directory that cannot be synced on this file system, as of CIFS.
            Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => {
                self.remove(&self.name);
                Err(failed("syncing the directory of", &self.path)(errno))
            }
        }
    }

    /// By the first of these that this file system has.
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
        // Whoever may write in the directory may have put another file under the part's name.
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
    /// Whether the error says that a file system does not have it.
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

/// Opens the part of the usual name: a new one, or what a monitor of this user left that died.
/// `None` where the name is another's, be it a link, a pipe, or a file that others can write.
fn open_part(
    directory: &OwnedFd,
    part: &OsStr,
    shown: &Path,
) -> Result<Option<File>, MigrationError> {
    match create_new(directory, part) {
        Ok(file) => return Ok(Some(file)),
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed("making", shown)(errno)),
    }
    // Of a pipe nobody waits for the other end.
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
                "not left by a snapshot of this user: it stays, and another name is taken"
            );
        }
        Err(error) => {
            let path = shown.display();
            tracing::warn!(%path, %error, "no part of a snapshot: it stays, and another name is taken");
        }
    }
    Ok(None)
}

/// Whether nobody but this user can have written the file, or write it.
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

/// Has the file for this guest alone: two that were told the same name would write into one
/// another's file, also when that has its name.
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
            tracing::warn!(%error, "host: no lock; take care that nobody else writes this file");
        }
    }
    // Who had it may have ended between the two, and taken the name away.
    if is_at(directory, part, file) { Ok(()) } else { Err(taken()) }
}

/// Whether `file` has this name.
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
        tracing::warn!(%name, %error, "cannot be removed");
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
    fn whichever_way_a_file_is_named_it_replaces_none() {
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
            fs::write(&path, "somebody's").unwrap();
            let error = part.name_by(&[way]).unwrap_err().to_string();
            assert!(error.contains("b exists: give another name"), "{way:?}: {error}");
            drop(part);
            assert_eq!(names(directory.path()), ["a", "b"], "{way:?}");
            assert_eq!(fs::read(&path).unwrap(), b"somebody's");
        }
    }

    /// What is under the part's name, and whose it is; root can give files away.
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
            "a link that leads nowhere" => symlink(&other, part).unwrap(),
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
    fn what_is_not_ours_never_becomes_the_snapshot() {
        let mut kinds = vec!["writable", "a symbolic link", "a link that leads nowhere"];
        kinds.extend(["a hard link", "a pipe", "a directory"]);
        // Only root gives files to another user; in CI and in a lab it is root.
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
    fn what_a_dead_process_of_this_user_left_is_written_over() {
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
    fn a_name_that_leads_nowhere_is_taken_as_well() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        symlink("nowhere", &path).unwrap();
        let error = Part::create(&path).unwrap_err().to_string();
        assert!(error.starts_with("operator: ") && error.contains("exists"), "{error}");
        assert!(Part::create(Path::new("/")).is_err());
        assert_eq!(names(directory.path()), ["a"]);
    }
}
