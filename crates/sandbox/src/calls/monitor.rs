//! What a monitor of a guest needs beyond what serving a balloon does.
//!
//! Its operator may have it move the guest, or write it to a file, at any time: so it makes
//! connections, and opens files that are named then.

use super::{Rules, call_with, is, within};

/// Calls that are allowed whatever their arguments.
const ALLOWED: &[i64] = &[
    // Control socket, and connections of a migration.
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_socketpair,
    libc::SYS_fchmod,
    libc::SYS_flock,
    // Names of hosts, as the C library looks them up.
    libc::SYS_uname,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_readlink,
    libc::SYS_access,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    // Disks and snapshots; an end of a snapshot is its name.
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fadvise64,
    libc::SYS_linkat,
    libc::SYS_renameat2,
    // Memory that comes when it is touched.
    libc::SYS_userfaultfd,
];

/// KVM's own calls, by the byte that names a driver in the number of an `ioctl`
/// (`include/uapi/linux/kvm.h`, KVMIO), and those of userfaultfd.
const KVM: i32 = 0xae;
const USERFAULTFD: i32 = 0xaa;
const DRIVER_SHIFT: u32 = 8;
const DRIVER_MASK: i32 = 0xff << DRIVER_SHIFT;

/// Terminals: asked for their mode and set to another, and nothing else, least of all typed into
/// (TIOCSTI). The last two are `TCGETS2` and `TCSETS2` (`asm-generic/ioctls.h`).
const TERMINAL: [i32; 4] = [0x5401, 0x5402, 0x802c_542a_u32.cast_signed(), 0x402c_542b];

/// How much has come, which the C library asks when a name server has answered (`FIONREAD`).
const HAS_COME: i32 = 0x541b;

/// TCP, Unix sockets, and what the C library asks the kernel for its addresses.
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// `PR_GET_AUXV` (`linux/prctl.h`): how large the host's pages are.
const GET_AUXV: i32 = 0x4155_5856;

/// Memory that can be run is refused, and does not end the process: the C library may try to load
/// a way to look up names (`/etc/nsswitch.conf`), and goes on without.
pub(super) fn refused() -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        call_with(&mut rules, call, 2, &[within(libc::PROT_EXEC, libc::PROT_EXEC)])?;
    }
    Ok(rules)
}

pub(super) fn add(rules: &mut Rules) -> Result<(), seccompiler::BackendError> {
    // With what is refused of them taken out.
    rules.extend([libc::SYS_mmap, libc::SYS_mprotect].map(|call| (call, Vec::new())));
    rules.extend(ALLOWED.iter().map(|call| (*call, Vec::new())));
    call_with(rules, libc::SYS_socket, 0, &FAMILIES.map(is))?;
    call_with(rules, libc::SYS_prctl, 0, &[is(GET_AUXV)])?;
    // Locks on disks.
    let locks = [libc::F_OFD_SETLK, libc::F_OFD_GETLK];
    call_with(rules, libc::SYS_fcntl, 1, &locks.map(is))?;
    let driver = |driver: i32| within(DRIVER_MASK, driver << DRIVER_SHIFT);
    let terminal = TERMINAL.map(is);
    call_with(rules, libc::SYS_ioctl, 1, &[driver(KVM), driver(USERFAULTFD)])?;
    call_with(rules, libc::SYS_ioctl, 1, &terminal)?;
    call_with(rules, libc::SYS_ioctl, 1, &[is(HAS_COME)])
}
