//! Expensive artifacts, made once and kept outside of the clone.
//!
//! Each artifact is a directory whose name holds a hash of all its inputs. It is made under a lock
//! in a directory of another name, which is renamed when it is complete. So two processes do not
//! make it twice, and an interrupted one leaves nothing that looks finished.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Context, LabError, Result};

/// Environment variable: directory of the artifacts.
pub const CACHE_VARIABLE: &str = "AEROSTAT_CACHE";

/// Hash bytes in a directory name: 64 bits are ample for a few hundred artifacts.
const NAME_HASH_BYTES: usize = 8;

/// Hash of all inputs of an artifact.
#[derive(Clone)]
pub struct Key(Sha256);

impl Key {
    /// Starts a key for this version of the recipe. Raise it when the recipe changes.
    pub fn new(recipe_version: u32) -> Self {
        Self(Sha256::new()).with("recipe", recipe_version.to_string())
    }

    /// Adds one named input.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        // Lengths first, so that two lists of inputs never hash the same bytes.
        for part in [name.as_bytes(), value.as_ref()] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds the relative paths and contents of all files in a directory.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn with_directory(mut self, directory: &Path) -> Result<Self> {
        for path in files_below(directory)? {
            let contents = fs::read(&path).context_path("read", &path)?;
            let name = path.strip_prefix(directory).unwrap_or(&path);
            self = self.with(&name.to_string_lossy(), contents);
        }
        Ok(self)
    }

    fn hex(&self) -> String {
        let hash = self.0.clone().finalize();
        hash.iter().take(NAME_HASH_BYTES).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Directory of the artifacts: `$AEROSTAT_CACHE`, else `$XDG_CACHE_HOME/aerostat`, else
/// `~/.cache/aerostat`.
///
/// # Errors
/// When none of the three is set.
pub fn root() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    variable(CACHE_VARIABLE)
        .map(PathBuf::from)
        .or_else(|| variable("XDG_CACHE_HOME").map(|path| Path::new(&path).join("aerostat")))
        .or_else(|| variable("HOME").map(|path| Path::new(&path).join(".cache/aerostat")))
        .ok_or_else(|| LabError::Host {
            what: "find a place for its cache".to_owned(),
            advice: format!("set {CACHE_VARIABLE} or HOME"),
        })
}

/// Returns the directory of the artifact, which `make` fills when it does not exist yet.
///
/// `make` receives an empty directory, which has another name until it is complete.
///
/// # Errors
/// The cache cannot be written, or `make` fails.
pub fn artifact(kind: &str, key: &Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    artifact_in(&root()?, kind, key, make)
}

fn artifact_in(
    root: &Path,
    kind: &str,
    key: &Key,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let name = format!("{kind}-{}", key.hex());
    let finished = root.join(&name);
    if finished.is_dir() {
        return Ok(finished);
    }
    fs::create_dir_all(root).context_path("make", root)?;
    let _lock = lock(&root.join(format!(".{name}.lock")))?;
    // Another process may have made it while this one waited for the lock.
    if finished.is_dir() {
        return Ok(finished);
    }
    let unfinished = root.join(format!(".{name}.unfinished"));
    remove_directory(&unfinished)?;
    fs::create_dir(&unfinished).context_path("make", &unfinished)?;
    tracing::info!("making {name} in {}", root.display());
    make(&unfinished)?;
    fs::rename(&unfinished, &finished).context_path("rename", &unfinished)?;
    Ok(finished)
}

/// Waits for the lock. Closing the file releases it, also when the process dies.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).context_path("make", path)?;
    file.lock().context_path("lock", path)?;
    Ok(file)
}

fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context_path("remove", path)
        }
        _ => Ok(()),
    }
}

/// All files below a directory, in an order that does not depend on the file system.
pub(crate) fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).context_path("list", &directory)? {
            let path = entry.context_path("list", &directory)?.path();
            match path.is_dir() {
                true => waiting.push(path),
                false => files.push(path),
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_key_depends_on_every_input_and_its_boundary() {
        let base = Key::new(1).with("a", "bc");
        assert_eq!(base.hex(), Key::new(1).with("a", "bc").hex());
        assert_ne!(base.hex(), Key::new(2).with("a", "bc").hex());
        assert_ne!(base.hex(), Key::new(1).with("ab", "c").hex());
        assert_ne!(base.hex(), Key::new(1).with("a", "b").with("", "c").hex());
    }

    #[test]
    fn a_key_depends_on_file_names_and_contents() {
        let directory = tempfile::tempdir().unwrap();
        let hash = || Key::new(1).with_directory(directory.path()).unwrap().hex();
        fs::create_dir(directory.path().join("sub")).unwrap();
        fs::write(directory.path().join("sub/a"), "x").unwrap();
        let first = hash();
        assert_eq!(first, hash());
        fs::write(directory.path().join("sub/a"), "y").unwrap();
        let second = hash();
        assert_ne!(first, second);
        fs::rename(directory.path().join("sub/a"), directory.path().join("sub/b")).unwrap();
        assert_ne!(second, hash());
    }

    #[test]
    fn a_failed_build_leaves_nothing_that_looks_finished() {
        let root = tempfile::tempdir().unwrap();
        let key = Key::new(1);
        let failed = artifact_in(root.path(), "thing", &key, |directory| {
            fs::write(directory.join("half"), "").unwrap();
            Err(LabError::Host { what: "go on".to_owned(), advice: String::new() })
        });
        assert!(failed.is_err());
        let made = artifact_in(root.path(), "thing", &key, |directory| {
            assert!(!directory.join("half").exists());
            fs::write(directory.join("whole"), "").context_path("write", directory)
        });
        assert!(made.unwrap().join("whole").exists());
    }

    #[test]
    fn concurrent_callers_make_an_artifact_once() {
        let root = tempfile::tempdir().unwrap();
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    artifact_in(root.path(), "thing", &Key::new(1), |_| {
                        made.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}
