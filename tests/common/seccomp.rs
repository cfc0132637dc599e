//! A kernel that knows fewer system calls, or a container that forbids them: a seccomp filter in the
//! daemon that a test starts, and so in all that the daemon starts.

#![allow(unsafe_code)]

use std::{io, os::unix::process::CommandExt, process::Command};

use libc::{sock_filter, sock_fprog};

/// A call that is refused.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    number: libc::c_long,
    /// Which of its arguments decides, by the bits that must (any of them) be set or the value that it
    /// must have.
    argument: Option<(u32, Test)>,
    errno: i32,
}

#[derive(Debug, Clone, Copy)]
enum Test {
    Has(u32),
    Is(u32),
}

impl Refused {
    /// Whatever its arguments are.
    pub fn call(number: libc::c_long, errno: i32) -> Self {
        Self { number, argument: None, errno }
    }

    /// If this argument has one of these bits.
    pub fn with_bits(number: libc::c_long, argument: u32, bits: u32, errno: i32) -> Self {
        Self { number, argument: Some((argument, Test::Has(bits))), errno }
    }

    /// If this argument is this.
    pub fn with_value(number: libc::c_long, argument: u32, value: u32, errno: i32) -> Self {
        Self { number, argument: Some((argument, Test::Is(value))), errno }
    }
}

/// The calls that Linux has learned since 4.18 and that the daemon, its libraries or its C library make
/// use of, all refused with the same error.
pub fn newer_than_4_18(errno: i32) -> Vec<Refused> {
    let calls = [
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_send_signal,
        libc::SYS_pidfd_getfd,
        libc::SYS_clone3,
        libc::SYS_close_range,
        libc::SYS_openat2,
        libc::SYS_faccessat2,
        libc::SYS_epoll_pwait2,
        libc::SYS_fsopen,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_mount_setattr,
        libc::SYS_io_uring_setup,
        libc::SYS_rseq,
        libc::SYS_futex_waitv,
        libc::SYS_landlock_create_ruleset,
        // Older, and missing in gVisors and file systems of the time.
        libc::SYS_statx,
        libc::SYS_copy_file_range,
        libc::SYS_renameat2,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        // fchmodat2 of Linux 6.6.
        452,
    ];
    // glibc starts no thread where clone3 is EPERM, so that filters have to say ENOSYS.
    let errno_of = |number| if number == libc::SYS_clone3 { libc::ENOSYS } else { errno };
    let mut refused: Vec<Refused> =
        calls.into_iter().map(|number| Refused::call(number, errno_of(number))).collect();
    // waitid(P_PIDFD), and CLONE_PIDFD.
    refused.push(Refused::with_value(libc::SYS_waitid, 0, 3, libc::EINVAL));
    refused.push(Refused::with_bits(libc::SYS_clone, 0, 0x1000, libc::EINVAL));
    refused
}

/// The error for [`newer_than_4_18`] in every daemon of the tests, as ENVD_TEST_REFUSE has it: `ENOSYS`
/// or `EPERM`.
pub fn from_env() -> Option<i32> {
    match std::env::var("ENVD_TEST_REFUSE").ok()?.as_str() {
        "" => None,
        "ENOSYS" => Some(libc::ENOSYS),
        "EPERM" => Some(libc::EPERM),
        other => panic!("ENVD_TEST_REFUSE is '{other}', neither ENOSYS nor EPERM"),
    }
}

/// Makes a command start behind a filter that refuses these calls.
pub fn behind(command: &mut Command, refused: &[Refused]) {
    let program = program(refused);
    // SAFETY: prctl is a plain system call, and the program was made before.
    unsafe { command.pre_exec(move || install(&program)) };
}

fn install(program: &[sock_filter]) -> io::Result<()> {
    let filter = sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: both calls read integers, and the second one a program that outlives it.
    let installed = unsafe {
        // Root needs no such promise, and its absence lets a test change users with set-uid programs.
        (libc::geteuid() == 0 || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn program(refused: &[Refused]) -> Vec<sock_filter> {
    let mut program = vec![load(0)];
    for Refused { number, argument, errno } in refused {
        let number = u32::try_from(*number).unwrap();
        let deny =
            op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs());
        match argument {
            None => program.extend([jump(libc::BPF_JEQ, number, 0, 1), deny]),
            Some((place, test)) => {
                let test = match test {
                    Test::Has(bits) => jump(libc::BPF_JSET, *bits, 0, 1),
                    Test::Is(value) => jump(libc::BPF_JEQ, *value, 0, 1),
                };
                // The lower half of an argument, on machines of this byte order.
                let low = 16 + place * 8 + if cfg!(target_endian = "big") { 4 } else { 0 };
                // And back to the number for the next.
                program.extend([jump(libc::BPF_JEQ, number, 0, 4), load(low), test, deny, load(0)]);
            }
        }
    }
    program.push(op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    program
}

/// Loads a word of `struct seccomp_data`.
fn load(offset: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn jump(test: u32, value: u32, yes: u8, no: u8) -> sock_filter {
    op(libc::BPF_JMP | test | libc::BPF_K, yes, no, value)
}

fn op(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k }
}
