//! A last word of a process that touched memory which the host cannot back.

use std::io;
use std::mem;
use std::ptr;

/// Written as it is: a signal handler cannot put words together.
const WORDS: &[u8] = b"host: the guest's memory could not be backed (SIGBUS): the pool of huge \
    pages is empty, the memory that the host may promise is used up, or a memory module failed; \
    see vm.nr_hugepages, CommitLimit in /proc/meminfo, and the kernel's log\n";

/// From now on a process that is ended by SIGBUS says so on standard error before.
///
/// # Errors
/// The kernel refuses.
pub fn say_missing_memory() -> io::Result<()> {
    // SAFETY: all zeros are a valid `sigaction`: no handler, an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = say as *const () as usize;
    action.sa_flags = libc::SA_RESETHAND;
    // SAFETY: `say` has the signature of a handler without SA_SIGINFO, makes only calls that a
    // handler may make (signal-safety(7)), and the old action is not asked for.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The signal's usual action is back when this begins (`SA_RESETHAND`): the instruction that touched
/// the memory is tried again, and ends the process as it would have without this.
extern "C" fn say(_signal: libc::c_int) {
    let mut stderr = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one structure that lives until the call returns; and words that are static. Where
    // nobody reads standard error nothing is written: a process that ends must not wait.
    unsafe {
        if libc::poll(&raw mut stderr, 1, 0) == 1 && stderr.revents & libc::POLLOUT != 0 {
            libc::write(libc::STDERR_FILENO, WORDS.as_ptr().cast(), WORDS.len());
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

    /// Set in the process that is to end.
    const INSIDE: &str = "HOST_MEMORY_TEST_BUS_ERROR";

    #[test]
    fn a_process_that_touches_missing_memory_says_so_and_ends() {
        if std::env::var_os(INSIDE).is_some() {
            say_missing_memory().unwrap();
            let file = std::fs::File::from(memfd_create("gone", MemfdFlags::CLOEXEC).unwrap());
            ftruncate(&file, 8192).unwrap();
            let part = FileOffset::new(file.try_clone().unwrap(), 0);
            let ranges = [(GuestAddress(0), 8192, Some(part))];
            let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
            ftruncate(&file, 4096).unwrap();
            memory.write_obj(1u8, GuestAddress(4096)).unwrap();
            return;
        }
        let name = "bus_error::tests::a_process_that_touches_missing_memory_says_so_and_ends";
        let mut inside = Command::new(std::env::current_exe().unwrap());
        let inside = inside.args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
        let output = inside.output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGBUS));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("vm.nr_hugepages"), "{said}");
    }
}
