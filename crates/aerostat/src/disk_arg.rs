//! Disk option: a file, and whether it is read-only.

use std::path::PathBuf;

use vmm::DiskOptions;

/// Suffix of a read-only disk.
const READ_ONLY: &str = ",readonly";

/// Parses `FILE` or `FILE,readonly`.
pub(crate) fn disk(text: &str) -> Result<DiskOptions, String> {
    let (path, read_only) = match text.strip_suffix(READ_ONLY) {
        Some(path) => (path, true),
        None => (text, false),
    };
    if path.is_empty() {
        return Err("use the form FILE or FILE,readonly".into());
    }
    Ok(DiskOptions { path: PathBuf::from(path), read_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_file_with_an_optional_read_only_suffix() {
        let disk_of = |text| disk(text).map(|disk| (disk.path, disk.read_only));
        assert_eq!(disk_of("/a,b.img"), Ok(("/a,b.img".into(), false)));
        assert_eq!(disk_of("b.img,readonly"), Ok(("b.img".into(), true)));
        assert!(disk("").is_err() && disk(",readonly").is_err());
    }
}
