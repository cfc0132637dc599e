//! The clone itself, in the two forms that the kernel has for it.
//!
//! `clone(2)` through libc starts a child where the daemon is. `clone3(2)` with CLONE_INTO_CGROUP
//! starts it inside another control group, so that not one page or processor tick of it is counted
//! elsewhere, and without the kernel's lock over all processes that a later move takes. libc has no
//! wrapper for it that switches stacks, so the switch is written here.
//!
//! A system call filter or an old kernel may refuse `clone3`; then the child moves itself
//! ([`Joining::Moved`]).

use std::{
    arch::asm,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use libc::c_int;
use nix::sys::signal::{SigSet, SigmaskHow};

use super::{
    child::{self, Plan},
    spawn::Mode,
    stack::{self, Stack},
};

/// How a child comes into its control group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joining {
    /// It is born there.
    Born,
    /// It goes there before it does anything else.
    Moved,
}

/// `CLONE_INTO_CGROUP`, which not every libc has, since it does not fit into the flags of clone(2).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of the kernel, up to the member that Linux 5.7 added.
#[repr(C)]
#[derive(Debug, Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// CLONE_ARGS_SIZE_VER2 of the kernel.
const _: () = assert!(size_of::<CloneArgs>() == 88);

/// Makes a child that runs [`child::run`]: in `cgroup` by clone3, or without one by clone. The
/// pidfd is missing on kernels that know none.
pub(super) fn clone(
    plan: &mut Plan,
    mode: Mode,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<(c_int, Option<OwnedFd>)> {
    let stack = Stack::new()?;
    let mut pidfd: c_int = -1;
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let result = match cgroup {
        // SAFETY: as the two functions demand, and see `child::run`: the plan is borrowed mutably
        // for the call, and this thread sleeps (vfork) or the child has its own copy (fork). The
        // stack is the child's alone.
        Some(cgroup) => unsafe { clone_into(plan, mode, cgroup, &stack, &mut pidfd) },
        // SAFETY: as above.
        None => unsafe { clone_here(plan, mode, &stack, &mut pidfd) },
    };
    // Fails for an unknown `how` alone; and an error here would lose a child.
    let _ = mask.thread_set_mask();
    let pid = result?;
    // SAFETY: a kernel that knows CLONE_PIDFD has stored a new descriptor, one that does not has
    // left -1.
    let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
    Ok((pid, pidfd))
}

fn flags(mode: Mode, plan: &Plan) -> c_int {
    const VFORK: c_int = libc::CLONE_VM | libc::CLONE_VFORK;
    let files = if plan.shares_descriptors() { libc::CLONE_FILES } else { 0 };
    files
        | match mode {
            Mode::Vfork => libc::CLONE_PIDFD | VFORK,
            Mode::Fork => libc::CLONE_PIDFD,
            Mode::VforkByPid => VFORK,
            Mode::ForkByPid => 0,
        }
}

/// # Safety
/// `plan` meets the contract of [`child::run`], and nobody else uses the stack.
unsafe fn clone_here(
    plan: &mut Plan,
    mode: Mode,
    stack: &Stack,
    pidfd: &mut c_int,
) -> io::Result<c_int> {
    let flags = flags(mode, plan) | libc::SIGCHLD;
    // SAFETY: as the contract above says; `pidfd` is a valid place for the one variable argument
    // that CLONE_PIDFD asks for.
    let pid = unsafe {
        libc::clone(
            child::run,
            stack.top(),
            flags,
            ptr::from_mut(plan).cast(),
            ptr::from_mut(pidfd),
        )
    };
    // Read before anything else can change errno; the child may have set it, but only in a clone
    // that succeeded.
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) }
}

/// # Safety
/// As [`clone_here`].
unsafe fn clone_into(
    plan: &mut Plan,
    mode: Mode,
    cgroup: BorrowedFd<'_>,
    stack: &Stack,
    pidfd: &mut c_int,
) -> io::Result<c_int> {
    let args = CloneArgs {
        flags: u64::from(flags(mode, plan).unsigned_abs()) | CLONE_INTO_CGROUP,
        pidfd: address(ptr::from_mut(pidfd)),
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        stack: address(stack.bottom()),
        stack_size: stack::SIZE as u64,
        cgroup: u64::from(cgroup.as_raw_fd().unsigned_abs()),
        ..CloneArgs::default()
    };
    // SAFETY: `args` is what the kernel expects, and lives through the call.
    let result = unsafe { clone3(&args, ptr::from_mut(plan)) };
    c_int::try_from(result).ok().filter(|pid| *pid >= 0).ok_or_else(|| {
        io::Error::from_raw_os_error(c_int::try_from(-result).unwrap_or(libc::EINVAL))
    })
}

/// The system call, and in the child, which wakes up behind it on its own stack, a call of
/// [`child::run`] that does not return. Gives the child's pid or a negative error number.
///
/// # Safety
/// `args` is valid for clone3 and names an empty stack; `plan` meets the contract of
/// [`child::run`].
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(args: &CloneArgs, plan: *mut Plan) -> i64 {
    let result: i64;
    // SAFETY: The parent sees a system call that changes rax, rcx and r11 alone and comes back
    // when the child is done with the shared memory. The child has the parent's registers but for
    // rax and rsp: rsp is the end of a page, so aligned as the ABI wants it before a call, and
    // nothing of the parent's stack is touched. A zero rbp ends backtraces.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") ptr::from_ref(args),
            in("rsi") size_of::<CloneArgs>(),
            in("r12") plan,
            in("r13") child::run as extern "C" fn(*mut libc::c_void) -> c_int,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// As for x86_64.
///
/// # Safety
/// As for x86_64.
#[cfg(target_arch = "aarch64")]
unsafe fn clone3(args: &CloneArgs, plan: *mut Plan) -> i64 {
    let result: i64;
    // SAFETY: as for x86_64: the kernel keeps every register but x0, and gives the child the stack
    // pointer of `args`, the end of a page. Zeros in x29 and x30 end backtraces.
    unsafe {
        asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x30, xzr",
            "mov x0, x9",
            "blr x10",
            "brk #1",
            "2:",
            inlateout("x0") ptr::from_ref(args) => result,
            in("x1") size_of::<CloneArgs>(),
            in("x8") libc::SYS_clone3,
            in("x9") plan,
            in("x10") child::run as extern "C" fn(*mut libc::c_void) -> c_int,
        );
    }
    result
}

/// No way to switch stacks: the caller falls back.
///
/// # Safety
/// Any arguments.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn clone3(_: &CloneArgs, _: *mut Plan) -> i64 {
    -i64::from(libc::ENOSYS)
}

fn address<T>(pointer: *mut T) -> u64 {
    pointer.expose_provenance() as u64
}
