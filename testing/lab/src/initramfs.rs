//! Writes an initramfs: a cpio archive in the "newc" format.
//!
//! The format is described in the kernel's Documentation/driver-api/early-userspace/
//! buffer-format.rst: a header of 13 numbers of eight hexadecimal digits each, the name with a
//! zero byte, the contents. Name and contents are padded to a multiple of four bytes.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::{Context, LabError, Result};

/// Start of every header.
const MAGIC: &[u8; 6] = b"070701";

/// Name of the last entry.
const TRAILER: &str = "TRAILER!!!";

/// Alignment of names and contents.
const ALIGNMENT_BYTES: usize = 4;

/// File type bits of the mode (stat.h).
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Builds an archive entry by entry. Paths have no leading slash.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Initramfs {
    /// Returns an archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and its parents, unless they exist.
    ///
    /// # Errors
    /// The archive is too large for its format.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        let ends = path.match_indices('/').map(|(index, _)| index).chain([path.len()]);
        for end in ends {
            let name = &path[..end];
            if !name.is_empty() && self.directories.insert(name.to_owned()) {
                self.entry(name, DIRECTORY | 0o755, &[], (0, 0))?;
            }
        }
        Ok(())
    }

    /// Adds a file with these permission bits, and its parent directories.
    ///
    /// # Errors
    /// The contents are too large for the format.
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.entry(path, FILE | permissions, contents, (0, 0))
    }

    /// Adds a file of the host.
    ///
    /// # Errors
    /// The file cannot be read or is too large for the format.
    pub fn host_file(&mut self, path: &str, permissions: u32, source: &Path) -> Result<()> {
        let contents = std::fs::read(source).context_path("read", source)?;
        self.file(path, permissions, &contents)
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// The archive is too large for its format.
    pub fn character_device(
        &mut self,
        path: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> Result<()> {
        self.parents(path)?;
        self.entry(path, CHARACTER_DEVICE | permissions, &[], (major, minor))
    }

    /// Ends the archive and returns its bytes.
    ///
    /// # Errors
    /// The archive is too large for its format.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry(TRAILER, 0, &[], (0, 0))?;
        Ok(self.bytes)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8], device: (u32, u32)) -> Result<()> {
        let too_large = || LabError::Unexpected {
            what: format!("the initramfs entry {name}"),
            detail: "it is too large for the cpio format".to_owned(),
        };
        let size = u32::try_from(contents.len()).map_err(|_| too_large())?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| too_large())?;
        self.entries += 1;
        let (inode, links, owner, time, checksum) = (self.entries, 1, 0, 0, 0);
        let fields = [
            inode, mode, owner, owner, links, time, size, 0, 0, device.0, device.1, name_size,
            checksum,
        ];
        self.bytes.extend_from_slice(MAGIC);
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(ALIGNMENT_BYTES);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, contents and device of a parsed entry.
    type Entry = (String, u32, Vec<u8>, (u32, u32));

    fn parse(bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(at % ALIGNMENT_BYTES, 0);
            assert_eq!(&bytes[at..at + 6], MAGIC);
            let field = |index: usize| {
                let start = at + 6 + 8 * index;
                let digits = std::str::from_utf8(&bytes[start..start + 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name_at = at + 110;
            assert_eq!(bytes[name_at + name_size - 1], 0);
            let name = String::from_utf8(bytes[name_at..name_at + name_size - 1].to_vec()).unwrap();
            let contents_at = (name_at + name_size).next_multiple_of(ALIGNMENT_BYTES);
            let contents = bytes[contents_at..contents_at + size].to_vec();
            entries.push((name, mode, contents, (field(9), field(10))));
            at = (contents_at + size).next_multiple_of(ALIGNMENT_BYTES);
        }
        entries
    }

    #[test]
    fn an_archive_parses_to_the_entries_written() {
        let mut archive = Initramfs::new();
        archive.character_device("dev/console", 0o600, 5, 1).unwrap();
        archive.file("a/b/c", 0o755, b"hello").unwrap();
        archive.file("a/b/d", 0o644, b"").unwrap();
        let entries = parse(&archive.finish().unwrap());
        let names: Vec<&str> = entries.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "a", "a/b", "a/b/c", "a/b/d", TRAILER]);
        assert_eq!(entries[1].1, 0o020_600);
        assert_eq!(entries[1].3, (5, 1));
        assert_eq!(entries[4].1, 0o100_755);
        assert_eq!(entries[4].2, b"hello");
        assert_eq!(entries[0].1, 0o040_755);
    }

    #[test]
    fn the_error_names_a_missing_file() {
        let error = Initramfs::new().host_file("x", 0o644, Path::new("/no/such")).unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
