//! File-system credentials of one thread: setfsuid(2), setfsgid(2), setgroups(2) and capset(2).
//!
//! The kernel keeps credentials per thread. libc's `setgroups`, `setresuid` and `setuid` change
//! every thread of the process (glibc and musl signal all of them), so this module makes raw system
//! calls only. `uid` and `euid` stay those of the daemon: signals, ptrace and /proc ownership are
//! decided by them, and a program of the user cannot touch the thread meanwhile.
//!
//! Two ways to act as a user:
//!
//! * [`FsCredentials::assume`]: the user's rights and nothing else. No capability is effective, so
//!   the kernel checks each permission against the user. This is what decides what a path of others
//!   may lead to.
//! * [`FsCredentials::create_as`]: the daemon's rights, but what is created belongs to the user from
//!   its first moment. There is no chown(2) afterwards that could hit something else.
//!
//! `setfsuid` reports no error. Each change is read back, and anything unexpected fails closed.
//! The guard restores on drop, panics included; capabilities first, because the rest needs them. A
//! thread that could not be restored is marked ([`thread_is_broken`]), is refused further changes,
//! and has to be ended by its pool. A daemon that does not run as root changes nothing.

use std::{
    cell::RefCell,
    marker::PhantomData,
    sync::{Arc, OnceLock},
};

use nix::errno::Errno;

/// `_LINUX_CAPABILITY_VERSION_3`: two words for each set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[cfg(any(target_arch = "x86", target_arch = "arm"))]
mod number {
    pub(super) const SETGROUPS: libc::c_long = libc::SYS_setgroups32;
    pub(super) const SETFSUID: libc::c_long = libc::SYS_setfsuid32;
    pub(super) const SETFSGID: libc::c_long = libc::SYS_setfsgid32;
}

#[cfg(not(any(target_arch = "x86", target_arch = "arm")))]
mod number {
    pub(super) const SETGROUPS: libc::c_long = libc::SYS_setgroups;
    pub(super) const SETFSUID: libc::c_long = libc::SYS_setfsuid;
    pub(super) const SETFSGID: libc::c_long = libc::SYS_setfsgid;
}

/// A user as the kernel knows one for files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsIdentity {
    /// The user id.
    pub uid: u32,
    /// The group of what is created.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
}

/// Which rights the thread has beside the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Capabilities {
    /// None is effective.
    None,
    /// The daemon's.
    Daemon,
}

/// What the thread acts with.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Thread {
    Daemon,
    Assumed(Arc<FsIdentity>, Capabilities),
    /// Could not be restored.
    Broken,
}

thread_local! {
    static THREAD: RefCell<Thread> = const { RefCell::new(Thread::Daemon) };
}

/// The two words of the three capability sets, as capset(2) takes them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// The daemon's own credentials. They are the same for its whole life.
#[derive(Debug)]
struct Baseline {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    capabilities: [CapabilitySets; 2],
}

static BASELINE: OnceLock<Option<Baseline>> = OnceLock::new();

/// The daemon's credentials; none where it is not root, or they cannot be read.
fn baseline() -> Option<&'static Baseline> {
    let read = || {
        let uid = nix::unistd::geteuid();
        uid.is_root().then(|| {
            let groups = own_groups().ok()?;
            let capabilities = get_capabilities().ok()?;
            let gid = nix::unistd::getegid().as_raw();
            Some(Baseline { uid: uid.as_raw(), gid, groups, capabilities })
        })?
    };
    BASELINE.get_or_init(read).as_ref()
}

/// Reads the daemon's own credentials. Call it at the start, before any thread has changed its own.
pub fn remember_own() {
    let _ = baseline();
}

/// Restores the credentials of a thread that was started by one that acted as a user: threads
/// inherit them. False when that fails; the thread has to end then.
#[must_use]
pub fn begin_thread() -> bool {
    let Some(baseline) = baseline() else { return true };
    let unchanged = current_fsuid() == baseline.uid
        && get_capabilities().is_ok_and(|now| now == baseline.capabilities);
    unchanged || restore(baseline).is_ok() || {
        THREAD.set(Thread::Broken);
        false
    }
}

/// Whether this thread could not be restored, and has to end.
#[must_use]
pub fn thread_is_broken() -> bool {
    THREAD.with_borrow(|thread| *thread == Thread::Broken)
}

/// Whether this thread acts with other credentials than the daemon's. No process may be started
/// from it then: it would inherit them.
#[must_use]
pub fn thread_is_changed() -> bool {
    THREAD.with_borrow(|thread| *thread != Thread::Daemon)
}

/// The thread's changed credentials; dropped, it acts as the daemon again.
#[derive(Debug)]
#[must_use = "the credentials are restored when this is dropped"]
pub struct FsCredentials {
    /// Whether this guard restores; an inner one for the same identity does not.
    restores: bool,
    /// Bound to the thread.
    _not_send: PhantomData<*const ()>,
}

impl FsCredentials {
    /// Acts with the user's own rights, without any effective capability.
    ///
    /// # Errors
    /// What the kernel said; `EPERM` where it said nothing and did not do it, or where the thread
    /// acts as somebody else already. The thread is unchanged then.
    pub fn assume(identity: &Arc<FsIdentity>) -> nix::Result<Self> {
        Self::change(identity, Capabilities::None)
    }

    /// Acts with the daemon's rights; what is created belongs to the user.
    ///
    /// # Errors
    /// As [`Self::assume`].
    pub fn create_as(identity: &Arc<FsIdentity>) -> nix::Result<Self> {
        Self::change(identity, Capabilities::Daemon)
    }

    fn guard(restores: bool) -> Self {
        Self { restores, _not_send: PhantomData }
    }

    fn change(identity: &Arc<FsIdentity>, capabilities: Capabilities) -> nix::Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(Self::guard(false));
        }
        // -1 means "no change" to the kernel.
        if identity.uid == u32::MAX || identity.gid == u32::MAX {
            return Err(Errno::EINVAL);
        }
        let baseline = baseline().ok_or(Errno::EPERM)?;
        let wanted = Thread::Assumed(Arc::clone(identity), capabilities);
        match THREAD.with_borrow(Thread::clone) {
            Thread::Daemon => {}
            now if now == wanted => return Ok(Self::guard(false)),
            now => {
                tracing::error!(?now, "refused to change file-system credentials twice");
                return Err(Errno::EPERM);
            }
        }
        // From here on the guard restores, whatever happens.
        THREAD.set(wanted);
        let guard = Self::guard(true);
        if capabilities == Capabilities::None {
            set_groups(&identity.groups)?;
        }
        set_fsgid(identity.gid)?;
        set_fsuid(identity.uid)?;
        let mut sets = baseline.capabilities;
        if capabilities == Capabilities::None {
            sets.iter_mut().for_each(|set| set.effective = 0);
        }
        // setfsuid dropped the capabilities for files only, and only where securebits let it.
        set_capabilities(&sets)?;
        keep_undumpable();
        Ok(guard)
    }
}

impl Drop for FsCredentials {
    fn drop(&mut self) {
        if !self.restores {
            return;
        }
        let restored = baseline().ok_or(Errno::EPERM).and_then(restore);
        THREAD.set(match restored {
            Ok(()) => Thread::Daemon,
            Err(error) => {
                tracing::error!(%error, "could not restore a thread's credentials: it ends");
                Thread::Broken
            }
        });
    }
}

fn restore(baseline: &Baseline) -> nix::Result<()> {
    // First: the rest needs CAP_SETUID and CAP_SETGID.
    set_capabilities(&baseline.capabilities)?;
    set_fsuid(baseline.uid)?;
    set_fsgid(baseline.gid)?;
    set_groups(&baseline.groups)?;
    // Back at root the kernel makes all permitted file capabilities effective.
    if get_capabilities()? != baseline.capabilities {
        set_capabilities(&baseline.capabilities)?;
    }
    keep_undumpable();
    Ok(())
}

/// A change of credentials sets the process's dumpable flag to fs.suid_dumpable, which may be 1.
fn keep_undumpable() {
    // Cannot fail with these arguments.
    let _ = nix::sys::prctl::set_dumpable(false);
}

fn set_groups(groups: &[u32]) -> nix::Result<()> {
    // SAFETY: the kernel reads `len` group ids from the slice, which lives during the call. The raw
    // call changes this thread only, and no invariant of memory rests on credentials.
    let result = unsafe { libc::syscall(number::SETGROUPS, groups.len(), groups.as_ptr()) };
    Errno::result(result).map(drop)
}

fn own_groups() -> nix::Result<Vec<u32>> {
    Ok(nix::unistd::getgroups()?.into_iter().map(nix::unistd::Gid::as_raw).collect())
}

fn set_fsuid(uid: u32) -> nix::Result<()> {
    // SAFETY: takes a number and changes this thread's credentials only.
    unsafe { libc::syscall(number::SETFSUID, libc::c_ulong::from(uid)) };
    if current_fsuid() == uid { Ok(()) } else { Err(Errno::EPERM) }
}

fn set_fsgid(gid: u32) -> nix::Result<()> {
    let set = |gid: u32| {
        // SAFETY: takes a number and changes this thread's credentials only.
        unsafe { libc::syscall(number::SETFSGID, libc::c_ulong::from(gid)) }
    };
    set(gid);
    // An invalid id changes nothing; the answer is the one in force.
    if set(u32::MAX) == libc::c_long::from(gid) { Ok(()) } else { Err(Errno::EPERM) }
}

fn current_fsuid() -> u32 {
    // SAFETY: takes a number; an invalid id changes nothing, and the answer is the one in force.
    let now = unsafe { libc::syscall(number::SETFSUID, libc::c_ulong::from(u32::MAX)) };
    u32::try_from(now).unwrap_or(u32::MAX)
}

fn get_capabilities() -> nix::Result<[CapabilitySets; 2]> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    let mut sets = [CapabilitySets::default(); 2];
    // SAFETY: version 3 writes two sets, which are there; both live during the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    Errno::result(result).map(|_| sets)
}

fn set_capabilities(sets: &[CapabilitySets; 2]) -> nix::Result<()> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    // SAFETY: version 3 reads two sets, which are there; pid 0 is this thread, whose credentials no
    // invariant of memory rests on.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt},
        panic::{AssertUnwindSafe, catch_unwind},
    };

    use super::*;

    /// A user that owns nothing, with a group and another.
    fn stranger() -> Arc<FsIdentity> {
        Arc::new(FsIdentity { uid: 54_321, gid: 54_322, groups: vec![54_322, 54_323] })
    }

    fn is_root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            crate::skipped::skip("root, to act as another user");
        }
        root
    }

    /// The thread's line of /proc/thread-self/status.
    fn status(name: &str) -> String {
        let text = fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_users_rights_are_the_kernels_decision_and_end_with_the_guard() {
        if !is_root() {
            return;
        }
        remember_own();
        let before = ["Uid:", "Gid:", "Groups:", "CapEff:", "CapPrm:"].map(status);
        let tmp = tempfile::tempdir().unwrap();
        fs::set_permissions(tmp.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let secret = tmp.path().join("secret");
        fs::write(&secret, "s").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        let user = stranger();
        {
            let _rights = FsCredentials::assume(&user).unwrap();
            assert!(thread_is_changed());
            let refused = |error: std::io::Error| error.raw_os_error();
            assert_eq!(fs::read(&secret).map_err(refused), Err(Some(libc::EACCES)));
            assert_eq!(
                fs::write(tmp.path().join("x"), "").map_err(refused),
                Err(Some(libc::EACCES))
            );
            // The same again is no change; another one is refused.
            let inner = FsCredentials::assume(&user).unwrap();
            drop(inner);
            assert_eq!(FsCredentials::create_as(&user).unwrap_err(), Errno::EPERM);
            fs::read(&secret).unwrap_err();
            let other = std::thread::spawn({
                let secret = secret.clone();
                // It inherits the rights, and gives them up.
                move || {
                    let inherited = fs::read(&secret).is_err();
                    (inherited, begin_thread(), fs::read(&secret).is_ok())
                }
            });
            assert_eq!(other.join().unwrap(), (true, true, true));
        }
        assert!(!thread_is_changed() && !thread_is_broken());
        assert_eq!(["Uid:", "Gid:", "Groups:", "CapEff:", "CapPrm:"].map(status), before);
        fs::read(&secret).unwrap();
    }

    #[test]
    fn what_is_created_belongs_to_the_user_at_once() {
        if !is_root() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("f");
        let user = stranger();
        {
            let _rights = FsCredentials::create_as(&user).unwrap();
            fs::write(&path, "x").unwrap();
        }
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (user.uid, user.gid));
        fs::write(&path, "y").unwrap();
        assert_eq!(fs::metadata(tmp.path()).unwrap().uid(), 0);
    }

    #[test]
    fn a_panic_restores_and_the_daemon_stays_undumpable() {
        if !is_root() {
            return;
        }
        let before = status("CapEff:");
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _rights = FsCredentials::assume(&stranger()).unwrap();
            assert!(status("CapEff:").trim_start_matches('0').is_empty());
            panic!("as it happens");
        }));
        assert!(panicked.is_err() && !thread_is_changed());
        assert_eq!(status("CapEff:"), before);
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
    }

    #[test]
    fn an_id_that_the_kernel_refuses_fails_closed() {
        if !is_root() {
            return;
        }
        let nobody = Arc::new(FsIdentity { uid: u32::MAX, gid: 1, groups: vec![1] });
        assert_eq!(FsCredentials::assume(&nobody).unwrap_err(), Errno::EINVAL);
        assert!(!thread_is_changed());
        assert_eq!(status("Uid:"), "0 0 0 0");
    }
}
