//! A disk of a guest: a file, and whether the guest may write to it.

use std::path::PathBuf;

use vmm::DiskOptions;

/// What behind a file's name makes it read-only.
const READ_ONLY: &str = ",readonly";

/// Reads `FILE` or `FILE,readonly`.
pub(crate) fn disk(text: &str) -> Result<DiskOptions, String> {
    let (path, read_only) = match text.strip_suffix(READ_ONLY) {
        Some(path) => (path, true),
        None => (text, false),
    };
    if path.is_empty() {
        return Err("it has the form FILE or FILE,readonly".into());
    }
    Ok(DiskOptions { path: PathBuf::from(path), read_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_file_that_may_be_read_only() {
        let disk_of = |text| disk(text).map(|disk| (disk.path, disk.read_only));
        assert_eq!(disk_of("/a,b.img"), Ok(("/a,b.img".into(), false)));
        assert_eq!(disk_of("b.img,readonly"), Ok(("b.img".into(), true)));
        assert!(disk("").is_err() && disk(",readonly").is_err());
    }
}
