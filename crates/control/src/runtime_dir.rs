//! Directory of the control sockets of named guests.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::ControlError;
use crate::name::GuestName;

/// Environment variable with the directory.
pub const RUNTIME_DIR_VAR: &str = "AEROSTAT_RUNTIME_DIR";

/// File name suffix of a control socket.
const SOCKET_SUFFIX: &str = ".sock";

/// Permission bits that let users other than the owner write to a directory.
const OTHERS_WRITE: u32 = 0o022;

/// Returns the directory of the control sockets: `$AEROSTAT_RUNTIME_DIR`, else
/// `$XDG_RUNTIME_DIR/aerostat`, else `/run/aerostat` for root. It need not exist.
///
/// # Errors
/// [`ControlError::NoRuntimeDir`] if none of the three applies.
pub fn runtime_dir() -> Result<PathBuf, ControlError> {
    let is_root = rustix::process::geteuid().is_root();
    choose(env::var_os(RUNTIME_DIR_VAR), env::var_os("XDG_RUNTIME_DIR"), is_root)
}

fn choose(
    own: Option<OsString>,
    xdg: Option<OsString>,
    is_root: bool,
) -> Result<PathBuf, ControlError> {
    if let Some(own) = own.filter(|dir| !dir.is_empty()) {
        if Path::new(&own).is_absolute() {
            return Ok(own.into());
        }
        let why = format!("{RUNTIME_DIR_VAR} is {own:?}, which is not an absolute path");
        return Err(ControlError::NoRuntimeDir { why });
    }
    // The XDG specification asks to ignore a path that is not absolute.
    if let Some(xdg) = xdg.map(PathBuf::from).filter(|dir| dir.is_absolute()) {
        return Ok(xdg.join("aerostat"));
    }
    if is_root {
        return Ok("/run/aerostat".into());
    }
    let why = format!("neither {RUNTIME_DIR_VAR} nor XDG_RUNTIME_DIR is set");
    Err(ControlError::NoRuntimeDir { why })
}

/// Returns [`runtime_dir`], creating it with mode 0700 if it is missing. An existing one must
/// belong to this user or to root and not be writable by others, since a user who can write there
/// can impersonate a guest's control socket.
///
/// # Errors
/// [`ControlError::NoRuntimeDir`], or [`ControlError::Io`] if it cannot be created.
pub fn ensure_runtime_dir() -> Result<PathBuf, ControlError> {
    let dir = runtime_dir()?;
    make_private(&dir)?;
    Ok(dir)
}

fn make_private(dir: &Path) -> Result<(), ControlError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(ControlError::io("create", dir))?;
    let found = fs::metadata(dir).map_err(ControlError::io("read", dir))?;
    let refuse = |what| {
        let why = format!("{} {what}", dir.display());
        Err(ControlError::NoRuntimeDir { why })
    };
    if found.uid() != rustix::process::geteuid().as_raw() && found.uid() != 0 {
        return refuse("belongs to another user");
    }
    if found.mode() & OTHERS_WRITE != 0 {
        return refuse("is writable by other users");
    }
    Ok(())
}

/// Returns the path of a guest's control socket, whether or not it exists.
///
/// # Errors
/// [`ControlError::NoRuntimeDir`].
pub fn socket_path(name: &GuestName) -> Result<PathBuf, ControlError> {
    Ok(runtime_dir()?.join(format!("{name}{SOCKET_SUFFIX}")))
}

/// Lists the control sockets in the runtime directory, sorted by name, including those of exited
/// processes. Empty if the directory does not exist.
///
/// # Errors
/// [`ControlError::NoRuntimeDir`], or [`ControlError::Io`] if it cannot be read.
pub fn list_sockets() -> Result<Vec<(GuestName, PathBuf)>, ControlError> {
    list_in(&runtime_dir()?)
}

fn list_in(dir: &Path) -> Result<Vec<(GuestName, PathBuf)>, ControlError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(ControlError::io("list", dir)(source)),
    };
    let mut sockets = Vec::new();
    for entry in entries {
        let entry = entry.map_err(ControlError::io("list", dir))?;
        let file_name = entry.file_name();
        let name = file_name.to_str().and_then(|name| name.strip_suffix(SOCKET_SUFFIX));
        let name = name.and_then(|name| name.parse::<GuestName>().ok());
        // The file may have been removed since it was listed.
        let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        if let (Some(name), true) = (name, is_socket) {
            sockets.push((name, entry.path()));
        }
    }
    sockets.sort();
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_first_directory_that_applies_is_chosen() {
        let os = |text: &str| Some(OsString::from(text));
        assert_eq!(choose(os("/a"), os("/x"), true).unwrap(), Path::new("/a"));
        assert_eq!(choose(os(""), os("/x"), true).unwrap(), Path::new("/x/aerostat"));
        assert_eq!(choose(None, os("x"), true).unwrap(), Path::new("/run/aerostat"));
        assert_eq!(choose(None, None, true).unwrap(), Path::new("/run/aerostat"));
        assert!(choose(None, None, false).unwrap_err().to_string().contains(RUNTIME_DIR_VAR));
        assert!(choose(os("a"), os("/x"), true).unwrap_err().to_string().contains("absolute"));
    }

    #[test]
    fn the_directory_is_created_private_and_a_writable_one_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("a/b");
        make_private(&dir).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        make_private(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        let error = make_private(&dir).unwrap_err();
        assert!(error.to_string().contains("writable by other users"), "{error}");
    }

    #[test]
    fn only_sockets_with_valid_names_are_listed() {
        let base = tempfile::tempdir().unwrap();
        let _b = UnixListener::bind(base.path().join("b.sock")).unwrap();
        let _a = UnixListener::bind(base.path().join("a.sock")).unwrap();
        let _odd = UnixListener::bind(base.path().join(".x.sock")).unwrap();
        fs::write(base.path().join("c.sock"), "").unwrap();
        fs::write(base.path().join("d.txt"), "").unwrap();
        let found = list_in(base.path()).unwrap();
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(list_in(&base.path().join("none")).unwrap().is_empty());
    }
}
