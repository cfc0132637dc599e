//! On whose behalf an operation on files is done, and with whose rights.
//!
//! See [`super::resolve`] for the rule that decides between the daemon's rights and the user's.

use std::{fmt, io, str::FromStr, sync::Arc};

use nix::errno::Errno;

use crate::{
    guest::users::User,
    sys::fs_credentials::{FsCredentials, FsIdentity},
};

/// When operations of non-root users are done with the user's own rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileAccess {
    /// From the point on at which others may decide where a path leads. Before it, and on paths that
    /// the client named without such a point, root's reach holds, as E2B's clients rely on.
    #[default]
    Compatible,
    /// Always.
    Strict,
}

impl FromStr for FileAccess {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "compatible" => Ok(Self::Compatible),
            "strict" => Ok(Self::Strict),
            _ => Err("is neither compatible nor strict"),
        }
    }
}

impl fmt::Display for FileAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Compatible => "compatible",
            Self::Strict => "strict",
        })
    }
}

/// The user of an operation on files.
#[derive(Debug, Clone)]
pub struct Actor {
    identity: Arc<FsIdentity>,
    access: FileAccess,
    /// Whether the daemon has rights that the user lacks.
    less_than_daemon: bool,
}

impl Actor {
    /// Acts for `user`.
    #[must_use]
    pub fn new(user: &User, access: FileAccess) -> Self {
        let identity = FsIdentity { uid: user.uid, gid: user.gid, groups: user.groups.clone() };
        let less_than_daemon = nix::unistd::geteuid().is_root() && user.uid != 0;
        Self { identity: Arc::new(identity), access, less_than_daemon }
    }

    /// The user's id.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.identity.uid
    }

    /// The user and group that own what is created.
    #[must_use]
    pub fn owner(&self) -> (u32, u32) {
        (self.identity.uid, self.identity.gid)
    }

    /// Whether the user has fewer rights than the daemon, so that there is something to switch to.
    #[must_use]
    pub fn may_switch(&self) -> bool {
        self.less_than_daemon
    }

    /// Whether nothing at all is done with the daemon's rights.
    #[must_use]
    pub fn is_strict(&self) -> bool {
        self.less_than_daemon && self.access == FileAccess::Strict
    }

    /// The rights before any path is walked.
    #[must_use]
    pub fn rights(&self) -> Rights {
        Rights { actor: self.clone(), switched: self.is_strict() }
    }

    /// The user's own rights.
    #[must_use]
    pub fn own_rights(&self) -> Rights {
        Rights { actor: self.clone(), switched: self.less_than_daemon }
    }

    pub(super) fn assume(&self) -> nix::Result<FsCredentials> {
        FsCredentials::assume(&self.identity)
    }
}

/// With whose rights system calls are made: the daemon's, or after a switch the user's own.
#[derive(Debug, Clone)]
pub struct Rights {
    actor: Actor,
    switched: bool,
}

impl Rights {
    pub(super) fn new(actor: Actor, switched: bool) -> Self {
        Self { actor, switched }
    }

    /// The daemon's own, for its own business.
    #[must_use]
    pub fn of_daemon() -> Self {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let identity = Arc::new(FsIdentity { uid, gid, groups: Vec::new() });
        let access = FileAccess::Compatible;
        Self { actor: Actor { identity, access, less_than_daemon: false }, switched: false }
    }

    /// For whom.
    #[must_use]
    pub fn actor(&self) -> &Actor {
        &self.actor
    }

    /// Whether these are the user's own rights.
    #[must_use]
    pub fn switched(&self) -> bool {
        self.switched
    }

    /// The rights for a call that takes two paths, such as rename(2): the user's if either has them.
    #[must_use]
    pub fn both(&self, other: &Self) -> Self {
        Self { actor: self.actor.clone(), switched: self.switched || other.switched }
    }

    /// Makes system calls with these rights. Nothing in `work` may start a thread or a process, wait
    /// for another thread, or act for somebody else.
    ///
    /// # Errors
    /// Those of `work`; `EPERM` when the thread could not take on the rights, and `work` was not run.
    pub fn act<T, E: From<RightsRefused>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        if !self.switched {
            return work();
        }
        let _rights = self.actor.assume().map_err(RightsRefused::new)?;
        work()
    }

    /// As [`Self::act`], and what `work` creates belongs to the user from its first moment, also when
    /// it is created with the daemon's rights.
    ///
    /// # Errors
    /// As [`Self::act`].
    pub fn create<T, E: From<RightsRefused>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        if self.switched || !self.actor.less_than_daemon {
            return self.act(work);
        }
        let _rights = FsCredentials::create_as(&self.actor.identity).map_err(RightsRefused::new)?;
        work()
    }

    /// As [`Self::act`], for what cannot fail otherwise. None when the thread could not take on the
    /// rights.
    pub fn perform<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        self.act(|| Ok::<_, Errno>(work())).ok()
    }
}

/// The thread could not take on a user's rights, and nothing was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this envd cannot act with the rights of that user")]
pub struct RightsRefused;

impl RightsRefused {
    fn new(error: Errno) -> Self {
        tracing::warn!(%error, "could not act with a user's rights: the call is refused");
        Self
    }
}

impl From<RightsRefused> for Errno {
    fn from(_: RightsRefused) -> Self {
        Self::EPERM
    }
}

impl From<RightsRefused> for io::Error {
    fn from(refused: RightsRefused) -> Self {
        Errno::from(refused).into()
    }
}
