//! Values in /proc files.

/// Value of `name` in a text like /proc/meminfo or a process's `status` (proc(5)), in KiB.
pub(crate) fn kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_by_its_whole_name() {
        let text = "MemFree2:  1 kB\nMemFree:    2048 kB\nVmFlags: rd wr\n";
        assert_eq!(kib(text, "MemFree"), Some(2048));
        assert_eq!(kib(text, "Mem"), None);
        assert_eq!(kib(text, "VmFlags"), None);
    }
}
