//! A log line of a process that touched memory which the host cannot back.

use std::io;
use std::mem;
use std::ptr;

/// A constant: a signal handler cannot format text.
const MESSAGE: &[u8] = b"host: cannot back the guest's memory (SIGBUS): the pool of huge pages is \
    empty, the commit limit is reached, or a memory module failed; see vm.nr_hugepages, CommitLimit \
    in /proc/meminfo, and the kernel's log\n";

/// Installs a handler that writes a line to standard error before SIGBUS ends the process.
///
/// # Errors
/// `sigaction` fails.
pub fn log_bus_errors() -> io::Result<()> {
    // SAFETY: all zeros are a valid `sigaction`: no handler, an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = write_message as *const () as usize;
    action.sa_flags = libc::SA_RESETHAND;
    // SAFETY: `write_message` has the signature of a handler without SA_SIGINFO, makes only calls
    // that a handler may make (signal-safety(7)), and the old action is not requested.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The default action is restored before this runs (`SA_RESETHAND`): the instruction that touched
/// the memory is repeated and ends the process.
extern "C" fn write_message(_signal: libc::c_int) {
    let mut stderr = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one structure that lives until the call returns, and a static message. Writes nothing
    // if standard error would block: a process that ends must not wait.
    unsafe {
        if libc::poll(&raw mut stderr, 1, 0) == 1 && stderr.revents & libc::POLLOUT != 0 {
            libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;

    /// Set in the process that ends.
    const INSIDE: &str = "HOST_MEMORY_TEST_BUS_ERROR";

    #[test]
    fn a_process_that_touches_unbacked_memory_logs_and_ends() {
        if std::env::var_os(INSIDE).is_some() {
            log_bus_errors().unwrap();
            let file = std::fs::File::from(memfd_create("gone", MemfdFlags::CLOEXEC).unwrap());
            ftruncate(&file, 8192).unwrap();
            let part = FileOffset::new(file.try_clone().unwrap(), 0);
            let ranges = [(GuestAddress(0), 8192, Some(part))];
            let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
            ftruncate(&file, 4096).unwrap();
            memory.write_obj(1u8, GuestAddress(4096)).unwrap();
            return;
        }
        let name = "bus_error::tests::a_process_that_touches_unbacked_memory_logs_and_ends";
        let mut inside = Command::new(std::env::current_exe().unwrap());
        let inside = inside.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
        let output = inside.output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGBUS));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("vm.nr_hugepages"), "{stderr}");
    }
}
