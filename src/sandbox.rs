//! What the RPC services and the REST routes share: the parts of the domain, and the sandbox's
//! defaults.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use parking_lot::RwLock;

use crate::{
    access::Access,
    blocking::{JobSlots, Pool},
    fs::{
        actor::{Actor, FileAccess},
        transfer::Writers,
        watch::Hub,
    },
    guest::{
        handover::Handover,
        metrics::Meter,
        users::{User, UserError, Users},
    },
    process::Manager,
    setup::Setup,
    slots::Slots,
    sys,
    template::Template,
    wire::{Limits, memory::Memory},
};

/// The uploads at a time; beyond it the slowest is evicted if it drips ([`crate::slots`]), and else a
/// newcomer is refused. Each may hold
/// [`MAX_BODY_IN_MEMORY`](crate::fs::transfer::MAX_BODY_IN_MEMORY) and three descriptors.
pub const MAX_UPLOADS: usize = 64;

/// The listings at a time; others wait. Each may hold
/// [`MAX_LIST_ENTRIES`](crate::fs::dir::MAX_LIST_ENTRIES) entries.
pub const MAX_LISTINGS: usize = 4;

/// The searches at a time; others wait, and one whose client drips makes room for them. Each may hold two
/// threads, and in each a line of 8 MiB.
pub const MAX_SEARCHES: usize = 4;

/// The sandbox that this daemon serves.
#[derive(Debug)]
pub struct Sandbox {
    /// Its users.
    pub users: Arc<Users>,
    /// Its processes.
    pub processes: Arc<Manager>,
    /// Its watches.
    pub watches: Arc<Hub>,
    /// When operations on files have the rights of their user only.
    pub file_access: FileAccess,
    /// Where work on files runs, since it may block.
    pub files: Arc<Pool>,
    /// The uploads that are under way.
    pub writers: Arc<Writers>,
    /// Who may upload: [`MAX_UPLOADS`] at a time.
    pub uploads: Arc<Slots>,
    /// Who may list directories: [`MAX_LISTINGS`] at a time.
    pub listings: JobSlots,
    /// Who may search: [`MAX_SEARCHES`] at a time.
    pub searches: Arc<Slots>,
    /// What was taken over from the daemon before this one, if there was one.
    pub handover: Option<Handover>,
    /// Who may call.
    pub access: Arc<Access>,
    /// Its template, and whether that is ready.
    pub template: Arc<Template>,
    /// The limits of the wire, to be told.
    pub limits: Limits,
    /// What requests may take of the daemon's memory.
    pub memory: Memory,
    /// When the daemon started.
    pub started: SystemTime,
    /// What the host tells it to be.
    pub setup: Setup,
    /// What it uses of the machine.
    pub meter: Arc<Meter>,
    /// What a call gets that says nothing else.
    pub defaults: DefaultsCell,
}

/// What a call gets that says nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// The user that acts where the caller names none.
    pub user: String,
    /// The directory that relative paths and processes start from; without it the user's home.
    pub workdir: Option<String>,
    /// Variables of every process, over PATH, HOME, USER and LOGNAME, that the sandbox's owner has
    /// set. They may hold secrets.
    pub user_env: BTreeMap<String, String>,
    /// Variables of every process that say which sandbox this is; nobody else can set them.
    pub own_env: BTreeMap<String, String>,
}

impl Defaults {
    /// The variables of every process; of two of one name the later wins.
    pub fn env(&self) -> impl Iterator<Item = (&String, &String)> {
        self.user_env.iter().chain(&self.own_env)
    }

    /// The whole environment of a process that `user` runs: theirs, then the sandbox's, then what
    /// was asked for.
    pub fn environment<'a>(
        &'a self,
        user: &User,
        requested: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Vec<(String, String)> {
        let path = std::env::var("PATH").unwrap_or_else(|_| sys::DEFAULT_PATH.to_owned());
        let home = user.home.to_string_lossy().into_owned();
        [
            ("PATH", path),
            ("HOME", home),
            ("USER", user.name.clone()),
            ("LOGNAME", user.name.clone()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .chain(self.env().chain(requested).map(|(name, value)| (name.clone(), value.clone())))
        .collect()
    }
}

/// The defaults as they are now. They are replaced as a whole: a call that reads them once sees
/// those of one moment.
#[derive(Debug)]
pub struct DefaultsCell(RwLock<Arc<Defaults>>);

impl DefaultsCell {
    /// Begins with these.
    pub fn new(defaults: Defaults) -> Self {
        Self(RwLock::new(Arc::new(defaults)))
    }

    /// Those of this moment.
    pub fn get(&self) -> Arc<Defaults> {
        Arc::clone(&self.0.read())
    }

    /// Replaces them by what `change` makes of them, in one step.
    pub fn update(&self, change: impl FnOnce(&mut Defaults)) {
        let mut current = self.0.write();
        let mut next = Defaults::clone(&current);
        change(&mut next);
        *current = Arc::new(next);
    }
}

/// Why a call has no user to act as.
#[derive(Debug, thiserror::Error)]
pub enum NoUser {
    /// The caller named one.
    #[error("invalid username: '{0}'")]
    Named(String, #[source] UserError),
    /// The caller named none, and the default is no user.
    #[error("invalid default user: '{0}'")]
    Default(String, #[source] UserError),
}

impl Sandbox {
    /// The user of an operation on files.
    pub fn actor(&self, user: &User) -> Actor {
        Actor::new(user, self.file_access)
    }

    /// The name of a pool that runs nothing any more: all its threads are in calls that do not
    /// return. One mount that does not answer does not bring that about.
    pub async fn dead_pool(&self) -> Option<&'static str> {
        let [spawners, directories, trees] = self.processes.pools();
        let pools = [&self.files, spawners, directories, trees];
        let looks = pools.map(|pool| async { (!pool.is_alive().await).then(|| pool.name()) });
        futures_util::future::join_all(looks).await.into_iter().flatten().next()
    }

    /// The user that a caller names.
    ///
    /// # Errors
    /// [`NoUser::Named`].
    pub fn user_named(&self, name: &str) -> Result<User, NoUser> {
        self.users.by_name(name).map_err(|error| NoUser::Named(name.to_owned(), error))
    }

    /// The user for a caller that names none.
    ///
    /// # Errors
    /// [`NoUser::Default`].
    pub fn default_user(&self) -> Result<User, NoUser> {
        let defaults = self.defaults.get();
        let name = &defaults.user;
        self.users.by_name(name).map_err(|error| NoUser::Default(name.clone(), error))
    }
}

impl NoUser {
    /// The message for the caller: upstream's text, and behind it what upstream does not know,
    /// that the user exists and envd may not act as them.
    pub fn message(&self) -> String {
        let (Self::Named(_, reason) | Self::Default(_, reason)) = self;
        match reason {
            UserError::Unknown(_) => self.to_string(),
            UserError::NotOwn { .. }
            | UserError::UnknownGroup(_)
            | UserError::NotOwnGroup { .. } => format!("{self}: {reason}"),
        }
    }
}
