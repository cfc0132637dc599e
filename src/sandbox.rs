//! What the RPC services and the REST routes share: the parts of the domain, and the sandbox's
//! defaults.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::{
    blocking::Pool,
    fs::{transfer::Writers, watch::Hub},
    guest::users::{User, UserError, Users},
    process::Manager,
};

/// The uploads at a time; beyond it they are refused. Each may hold
/// [`MAX_BODY_IN_MEMORY`](crate::fs::transfer::MAX_BODY_IN_MEMORY) and two descriptors.
pub const MAX_UPLOADS: usize = 64;

/// The listings at a time; others wait. Each may hold
/// [`MAX_LIST_ENTRIES`](crate::fs::dir::MAX_LIST_ENTRIES) entries.
pub const MAX_LISTINGS: usize = 4;

/// The sandbox that this daemon serves.
#[derive(Debug)]
pub struct Sandbox {
    /// Its users.
    pub users: Arc<Users>,
    /// Its processes.
    pub processes: Arc<Manager>,
    /// Its watches.
    pub watches: Arc<Hub>,
    /// Where work on files runs, since it may block.
    pub files: Arc<Pool>,
    /// The uploads that are under way.
    pub writers: Arc<Writers>,
    /// Who may upload: [`MAX_UPLOADS`] at a time.
    pub uploads: Arc<Semaphore>,
    /// Who may list directories: [`MAX_LISTINGS`] at a time.
    pub listings: Arc<Semaphore>,
    /// What a call gets that says nothing else.
    pub defaults: Defaults,
}

/// What a call gets that says nothing else.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// The user that acts where the caller names none.
    pub user: String,
    /// The directory that relative paths and processes start from; without it the user's home.
    pub workdir: Option<String>,
    /// Variables of every process, over PATH, HOME, USER and LOGNAME.
    pub env: Vec<(String, String)>,
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
        let name = &self.defaults.user;
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
