//! Users and groups, read from `/etc/passwd` and `/etc/group` directly.
//!
//! libc's `getpwnam` is not used: a static glibc crashes in it (it loads NSS modules), and a
//! sandbox image has no name service but these two files. The files are parsed once and again only
//! when they have changed, so a directory listing costs one `stat` an entry at most, not one parse.
//!
//! A user is named as `NAME`, or by number as `UID` where no user has that name; and either may be
//! followed by `:GROUP` or `:GID`, which then is the only group. A number needs no line in the
//! files: it gets the group of the same number and the home `/`.
//!
//! Formats: passwd(5), group(5). Lines that do not parse are skipped, as libc does.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

/// Why a user cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// user: unknown user {0}
    #[error("user: unknown user {0}")]
    Unknown(String),
    /// group: unknown group {0}
    #[error("group: unknown group {0}")]
    UnknownGroup(String),
    /// A daemon without root cannot take on another group.
    #[error("group {wanted}: this envd runs without root and can act only with its group {own}")]
    NotOwnGroup {
        /// The group that was asked for.
        wanted: u32,
        /// The daemon's.
        own: u32,
    },
    /// The user exists, but a daemon without root cannot become them.
    #[error(
        "user '{wanted}': this envd runs without root, as '{own}', and can act only as that user"
    )]
    NotOwn {
        /// The user that was asked for.
        wanted: String,
        /// The user that the daemon runs as.
        own: String,
    },
}

/// A user that a process can run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The login name.
    pub name: String,
    /// The user id.
    pub uid: u32,
    /// The primary group id.
    pub gid: u32,
    /// The home directory.
    pub home: PathBuf,
    /// The groups to set for a process: the primary group first, then every group of
    /// `/etc/group` that lists the user.
    pub groups: Vec<u32>,
}

/// What tells that a file is still the one that was parsed.
type Stamp = Option<(u64, u64, i64, i64, u64)>;

#[derive(Debug, Default)]
struct Tables {
    stamps: (Stamp, Stamp),
    users: HashMap<String, User>,
    user_names: HashMap<u32, Arc<str>>,
    group_names: HashMap<u32, Arc<str>>,
    group_ids: HashMap<String, u32>,
}

/// The users and groups of one root directory, cached.
#[derive(Debug)]
pub struct Users {
    passwd: PathBuf,
    group: PathBuf,
    /// The user whom a daemon without root is bound to.
    bound_to: Option<u32>,
    tables: Mutex<Arc<Tables>>,
}

impl Users {
    /// The users of this machine, as the process that calls may use them: all of them for root,
    /// else only its own.
    pub fn system() -> Self {
        let own = nix::unistd::geteuid();
        Self::at(Path::new("/"), (!own.is_root()).then_some(own.as_raw()))
    }

    /// The users described below `root`; with `bound_to`, only that user can be used.
    pub fn at(root: &Path, bound_to: Option<u32>) -> Self {
        Self {
            passwd: root.join("etc/passwd"),
            group: root.join("etc/group"),
            bound_to,
            tables: Mutex::default(),
        }
    }

    /// Finds a user by name or number, perhaps with a group, for running processes and owning
    /// files.
    ///
    /// # Errors
    /// [`UserError::Unknown`] and [`UserError::UnknownGroup`] when the files have no such name and
    /// it is no number, [`UserError::NotOwn`] and [`UserError::NotOwnGroup`] when the daemon has no
    /// right to become them.
    pub fn by_name(&self, name: &str) -> Result<User, UserError> {
        let tables = self.tables();
        let (user_name, group) = match name.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (name, None),
        };
        let user = match tables.users.get(user_name).or_else(|| tables.by_number(user_name)) {
            Some(user) => user.clone(),
            // A container started with a bare uid has no line in /etc/passwd.
            None if self.bound_to.is_some() && user_name == self.own_name() => self.unlisted(),
            None => match id(user_name) {
                Some(uid) => User {
                    name: uid.to_string(),
                    uid,
                    gid: uid,
                    home: PathBuf::from("/"),
                    groups: vec![uid],
                },
                None => return Err(UserError::Unknown(user_name.to_owned())),
            },
        };
        if self.bound_to.is_some_and(|own| own != user.uid) {
            return Err(UserError::NotOwn { wanted: user_name.to_owned(), own: self.own_name() });
        }
        let Some(group) = group else { return Ok(user) };
        let gid = tables.group_ids.get(group).copied().or_else(|| id(group));
        let gid = gid.ok_or_else(|| UserError::UnknownGroup(group.to_owned()))?;
        if self.bound_to.is_some() {
            let own = nix::unistd::getegid().as_raw();
            // Its groups are what they are.
            return match gid == own {
                true => Ok(User { gid, ..user }),
                false => Err(UserError::NotOwnGroup { wanted: gid, own }),
            };
        }
        Ok(User { gid, groups: vec![gid], ..user })
    }

    /// The name that a daemon uses for itself: that of its effective user.
    pub fn own_name(&self) -> String {
        self.user_name(self.bound_to.unwrap_or(0)).to_string()
    }

    /// The name of a user id, or the number in decimal where it has none.
    pub fn user_name(&self, uid: u32) -> Arc<str> {
        let known = self.tables().user_names.get(&uid).cloned();
        known.unwrap_or_else(|| uid.to_string().into())
    }

    /// The name of a group id, or the number in decimal where it has none.
    pub fn group_name(&self, gid: u32) -> Arc<str> {
        let known = self.tables().group_names.get(&gid).cloned();
        known.unwrap_or_else(|| gid.to_string().into())
    }

    /// The id of a group, by its name.
    pub fn gid_of(&self, name: &str) -> Option<u32> {
        let tables = self.tables();
        tables.group_names.iter().find(|(_, known)| known.as_ref() == name).map(|(gid, _)| *gid)
    }

    fn unlisted(&self) -> User {
        let gid = nix::unistd::getegid().as_raw();
        User {
            name: self.own_name(),
            uid: self.bound_to.unwrap_or(0),
            gid,
            home: std::env::var_os("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from),
            groups: vec![gid],
        }
    }

    fn tables(&self) -> Arc<Tables> {
        let stamps = (stamp(&self.passwd), stamp(&self.group));
        let mut tables = self.tables.lock();
        if tables.stamps != stamps || stamps == (None, None) {
            *tables = Arc::new(Tables::parse(stamps, &read(&self.passwd), &read(&self.group)));
        }
        Arc::clone(&tables)
    }
}

/// The number that is no id: chown(2), setresuid(2) and their like take it for "no change".
pub const NO_ID: u32 = u32::MAX;

/// A user or group id in decimal, never [`NO_ID`].
pub fn id(text: &str) -> Option<u32> {
    // Not even a plus sign.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|id| digits && *id != NO_ID)
}

impl Tables {
    /// The user whose number this is.
    fn by_number(&self, text: &str) -> Option<&User> {
        self.users.get(&**self.user_names.get(&id(text)?)?)
    }

    fn parse(stamps: (Stamp, Stamp), passwd: &str, group: &str) -> Self {
        let mut tables = Self { stamps, ..Self::default() };
        for line in passwd.lines() {
            let Some(user) = parse_user(line) else {
                continue;
            };
            tables.user_names.entry(user.uid).or_insert_with(|| user.name.as_str().into());
            tables.users.entry(user.name.clone()).or_insert(user);
        }
        // An image made from nothing has no /etc/passwd, and root all the same.
        if !tables.user_names.contains_key(&0) && !tables.users.contains_key("root") {
            let root = User {
                name: "root".to_owned(),
                uid: 0,
                gid: 0,
                home: PathBuf::from("/"),
                groups: vec![0],
            };
            tables.user_names.insert(0, root.name.as_str().into());
            tables.users.insert(root.name.clone(), root);
        }
        for line in group.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, gid, members] = fields[..] else {
                continue;
            };
            let Some(gid) = id(gid) else {
                continue;
            };
            tables.group_names.entry(gid).or_insert_with(|| name.into());
            tables.group_ids.entry(name.to_owned()).or_insert(gid);
            for member in members.split(',') {
                let Some(user) = tables.users.get_mut(member.trim()) else {
                    continue;
                };
                if !user.groups.contains(&gid) {
                    user.groups.push(gid);
                }
            }
        }
        tables
    }
}

fn parse_user(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, _] = fields[..] else {
        return None;
    };
    let (uid, gid) = (id(uid)?, id(gid)?);
    (!name.is_empty() && !name.starts_with('#')).then(|| User {
        name: name.to_owned(),
        uid,
        gid,
        home: PathBuf::from(home),
        groups: vec![gid],
    })
}

fn stamp(path: &Path) -> Stamp {
    let meta = fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size()))
}

fn read(path: &Path) -> String {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "cannot be read");
            }
            String::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root_with(passwd: &str, group: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        fs::write(root.path().join("etc/group"), group).unwrap();
        root
    }

    #[test]
    fn finds_users_with_all_their_groups_and_skips_broken_lines() {
        let root = root_with(
            "root:x:0:0:root:/root:/bin/bash\nbroken\n:x:1:1::/:\nuser:x:1000:1001::/home/user:/bin/sh\n",
            "root:x:0:\nsudo:x:27:other,user\nnonsense:x:y:user\nuser:x:1001:user\n",
        );
        let users = Users::at(root.path(), None);
        let user = users.by_name("user").unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1001));
        assert_eq!(user.groups, [1001, 27]);
        assert_eq!(user.home, Path::new("/home/user"));
        assert_eq!(users.by_name("broken"), Err(UserError::Unknown("broken".into())));
        assert_eq!(users.by_name(""), Err(UserError::Unknown(String::new())));
        assert_eq!(&*users.group_name(27), "sudo");
        assert_eq!(&*users.user_name(4242), "4242");
    }

    #[test]
    fn numbers_are_users_too_and_a_group_may_be_given() {
        let root = root_with(
            "root:x:0:0::/root:\nuser:x:1000:1001::/home/user:/bin/sh\n77:x:5:5::/odd:\n",
            "sudo:x:27:user\nuser:x:1001:\n",
        );
        let users = Users::at(root.path(), None);
        assert_eq!(users.by_name("1000"), users.by_name("user"));
        assert_eq!(users.by_name("user").unwrap().groups, [1001, 27]);
        // A name goes before a number.
        assert_eq!(users.by_name("77").unwrap().uid, 5);
        let bare = users.by_name("4321").unwrap();
        assert_eq!((bare.name.as_str(), bare.uid, bare.gid), ("4321", 4321, 4321));
        assert_eq!((bare.home.as_path(), &bare.groups[..]), (Path::new("/"), &[4321][..]));
        for (name, uid, gid) in [
            ("user:sudo", 1000, 27),
            ("user:27", 1000, 27),
            ("1000:1000", 1000, 1000),
            ("4321:sudo", 4321, 27),
            ("root:0", 0, 0),
        ] {
            let user = users.by_name(name).unwrap();
            assert_eq!((user.uid, user.gid, user.groups), (uid, gid, vec![gid]), "{name}");
        }
        let unknown = |name: &str| users.by_name(name).unwrap_err().to_string();
        assert_eq!(unknown("user:wheel"), "group: unknown group wheel");
        assert_eq!(unknown("user:"), "group: unknown group ");
        for name in ["-1", "+5", "4294967295", "4294967296", "0x0", "1 ", "#1000", " "] {
            assert_eq!(unknown(name), format!("user: unknown user {name}"));
        }
        assert_eq!(unknown(":sudo"), "user: unknown user ");
    }

    #[test]
    fn without_files_there_is_root_and_nobody_else() {
        let root = tempfile::tempdir().unwrap();
        let users = Users::at(root.path(), None);
        assert_eq!(users.own_name(), "root");
        let user = users.by_name("root").unwrap();
        assert_eq!((user.uid, user.home.as_path()), (0, Path::new("/")));
        assert_eq!(users.by_name("user"), Err(UserError::Unknown("user".into())));
        // A user id 0 by another name is not doubled.
        let other = root_with("toor:x:0:0::/root:/bin/sh\n", "");
        let users = Users::at(other.path(), None);
        assert_eq!(users.own_name(), "toor");
        assert_eq!(users.by_name("root"), Err(UserError::Unknown("root".into())));
    }

    #[test]
    fn sees_a_user_that_was_added_later() {
        let root = root_with("root:x:0:0::/root:/bin/sh\n", "");
        let users = Users::at(root.path(), None);
        assert_eq!(users.by_name("late"), Err(UserError::Unknown("late".into())));
        let passwd = root.path().join("etc/passwd");
        fs::write(&passwd, "root:x:0:0::/root:/bin/sh\nlate:x:5:5::/:/bin/sh\n").unwrap();
        assert_eq!(users.by_name("late").unwrap().uid, 5);
    }

    #[test]
    fn without_root_only_the_own_user_can_be_used() {
        let root = root_with("root:x:0:0::/root:\nme:x:7:7::/me:/bin/sh\n", "");
        let users = Users::at(root.path(), Some(7));
        assert_eq!(users.by_name("me").unwrap().uid, 7);
        for name in ["root", "0", "99", "root:7"] {
            let error = users.by_name(name).unwrap_err().to_string();
            assert!(error.contains("can act only as that user"), "{error}");
            assert!(error.contains("'me'"), "{error}");
        }
        assert_eq!(users.by_name("7").unwrap().name, "me");
        let own = nix::unistd::getegid();
        assert_eq!(users.by_name(&format!("me:{own}")).unwrap().gid, own.as_raw());
        let other = own.as_raw() + 1;
        let not_own = UserError::NotOwnGroup { wanted: other, own: own.as_raw() };
        assert_eq!(users.by_name(&format!("7:{other}")), Err(not_own));
    }
}
