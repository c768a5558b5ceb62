//! seccomp: the allowed system calls. Any other kills the process.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use crate::SandboxError;

mod vmm;

/// Which connections the process may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// It only accepts connections.
    Accepts,
    /// It also connects to Unix sockets.
    Connects,
}

/// Calls that are allowed with any arguments.
const ALLOWED: &[i64] = &[
    // Messages, kicks, interrupts, the control API.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_close,
    // Releasing and measuring memory, and the inflight region in the front end's memory.
    libc::SYS_fallocate,
    libc::SYS_madvise,
    libc::SYS_process_madvise,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    // Landlock restricts opening; sockets are removed at the end.
    libc::SYS_openat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    // The process's own memory, threads and time.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_membarrier,
    // Ending by a signal, and reporting a panic.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_getcwd,
    // Fails with an error, so that the C library uses `clone`; see below.
    libc::SYS_clone3,
];

/// Restricts all threads of the process to the system calls that serving balloons needs.
///
/// # Errors
/// The kernel has no seccomp, or no filter exists for this architecture.
pub fn restrict_calls(network: Network) -> Result<(), SandboxError> {
    restrict(|| rules(network), BTreeMap::new())
}

/// Restricts a process that runs a guest: also allows KVM, disks, and migration connections.
///
/// # Errors
/// As [`restrict_calls`].
pub fn restrict_vmm_calls() -> Result<(), SandboxError> {
    let failed = |error: seccompiler::BackendError| SandboxError::Calls(error.into());
    let refused = vmm::refused().map_err(failed)?;
    let allowed = || {
        let mut rules = rules(Network::Connects)?;
        vmm::add(&mut rules)?;
        Ok(rules)
    };
    restrict(allowed, refused)
}

/// Applies the filters: calls in `refused` fail with EACCES, calls not in `allowed` kill the
/// process.
fn restrict(
    allowed: impl FnOnce() -> Result<Rules, seccompiler::BackendError>,
    refused: Rules,
) -> Result<(), SandboxError> {
    let arch =
        TargetArch::try_from(std::env::consts::ARCH).map_err(|_| SandboxError::Architecture)?;
    if arch != TargetArch::x86_64 {
        return Err(SandboxError::Architecture);
    }
    // Needed for seccomp without privileges.
    rustix::thread::set_no_new_privs(true).map_err(|error| SandboxError::Calls(error.into()))?;
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| SandboxError::Calls(error);
    let kill = SeccompAction::KillProcess;
    let allowed = allowed().map_err(|error| failed(error.into()))?;
    // The flags of clone3 are in memory, which a filter cannot read. Without clone3 the C library
    // uses `clone` for threads.
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let denied = SeccompAction::Errno(libc::EACCES.cast_unsigned());
    for filter in [
        SeccompFilter::new(refused, SeccompAction::Allow, denied, arch),
        SeccompFilter::new(no_clone3, SeccompAction::Allow, unknown, arch),
        SeccompFilter::new(allowed, kill, SeccompAction::Allow, arch),
    ] {
        let filter = filter.map_err(|error| failed(error.into()))?;
        let program = BpfProgram::try_from(filter).map_err(|error| failed(error.into()))?;
        apply_filter_all_threads(&program).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A condition on the lower 32 bits of an argument.
type Condition = (SeccompCmpOp, u64);

fn is(value: i32) -> Condition {
    (SeccompCmpOp::Eq, u64::from(value.cast_unsigned()))
}

fn within(mask: i32, value: i32) -> Condition {
    let mask = u64::from(mask.cast_unsigned());
    (SeccompCmpOp::MaskedEq(mask), u64::from(value.cast_unsigned()))
}

/// Also allows a call if an argument matches one of these.
fn call_with(
    rules: &mut Rules,
    call: i64,
    argument: u8,
    values: &[Condition],
) -> Result<(), seccompiler::BackendError> {
    let rule = |(how, value): &Condition| {
        let condition =
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how.clone(), *value)?;
        SeccompRule::new(vec![condition])
    };
    let found: Vec<_> = values.iter().map(rule).collect::<Result<_, _>>()?;
    rules.entry(call).or_default().extend(found);
    Ok(())
}

fn rules(network: Network) -> Result<Rules, seccompiler::BackendError> {
    let mut rules: Rules = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let mut only = |call: i64, argument: u8, values: &[Condition]| {
        call_with(&mut rules, call, argument, values)
    };
    // No executable memory.
    only(libc::SYS_mmap, 2, &[within(libc::PROT_EXEC, 0)])?;
    only(libc::SYS_mprotect, 2, &[within(libc::PROT_EXEC, 0)])?;
    // Threads, but no processes.
    only(libc::SYS_clone, 0, &[within(libc::CLONE_THREAD, libc::CLONE_THREAD)])?;
    only(libc::SYS_prctl, 0, &[is(libc::PR_SET_NAME)])?;
    only(libc::SYS_ioctl, 1, &[(SeccompCmpOp::Eq, libc::FIONBIO)])?;
    // The standard library reads the limit of open files.
    only(libc::SYS_prlimit64, 0, &[is(0)])?;
    let fcntl = [
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
    ];
    only(libc::SYS_fcntl, 1, &fcntl.map(is))?;
    if network == Network::Connects {
        only(libc::SYS_socket, 0, &[is(libc::AF_UNIX)])?;
        rules.insert(libc::SYS_connect, Vec::new());
    }
    Ok(rules)
}
