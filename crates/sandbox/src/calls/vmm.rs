//! The additional system calls of a process that runs a guest.
//!
//! The operator may start a migration or a snapshot at any time, so it makes connections and opens
//! files that are named only then.

use super::{Rules, call_with, is, within};

/// Calls that are allowed with any arguments.
const ALLOWED: &[i64] = &[
    // Control socket, and connections of a migration.
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_socketpair,
    libc::SYS_fchmod,
    libc::SYS_flock,
    // Resolving host names, by the C library.
    libc::SYS_uname,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_readlink,
    libc::SYS_access,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    // Disks and snapshots; a complete snapshot file gets its name.
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fadvise64,
    libc::SYS_linkat,
    libc::SYS_renameat2,
    // Lazily restored memory.
    libc::SYS_userfaultfd,
];

/// The type byte of `ioctl` numbers, for KVM (`include/uapi/linux/kvm.h`, KVMIO) and userfaultfd.
const KVM: i32 = 0xae;
const USERFAULTFD: i32 = 0xaa;
const DRIVER_SHIFT: u32 = 8;
const DRIVER_MASK: i32 = 0xff << DRIVER_SHIFT;

/// Terminals: only getting and setting the mode, and no typing into them (TIOCSTI). The last two
/// are `TCGETS2` and `TCSETS2` (`asm-generic/ioctls.h`).
const TERMINAL: [i32; 4] = [0x5401, 0x5402, 0x802c_542a_u32.cast_signed(), 0x402c_542b];

/// `FIONREAD`, which the C library uses to read a name server's answer.
const FIONREAD: i32 = 0x541b;

/// TCP, Unix sockets, and netlink, from which the C library reads the host's addresses.
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// `PR_GET_AUXV` (`linux/prctl.h`), for the host's page size.
const GET_AUXV: i32 = 0x4155_5856;

/// Mapping executable memory fails, but does not kill the process: the C library may try to load a
/// name service module (`/etc/nsswitch.conf`), and continues without it.
pub(super) fn refused() -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        call_with(&mut rules, call, 2, &[within(libc::PROT_EXEC, libc::PROT_EXEC)])?;
    }
    Ok(rules)
}

pub(super) fn add(rules: &mut Rules) -> Result<(), seccompiler::BackendError> {
    // The `refused` filter already excludes executable mappings.
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
    call_with(rules, libc::SYS_ioctl, 1, &[is(FIONREAD)])
}
