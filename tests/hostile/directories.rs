//! Programs of a user plant symlinks and swap directories for symlinks while clients act for that user:
//! making, moving, removing, listing and describing, attributes, links.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt, chown, lchown, symlink},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use envd::proto::filesystem::{
    CreateSymlinkRequest, CreateSymlinkResponse, EntryInfo, FileType, SetAttributesRequest,
    SetAttributesResponse,
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::common::{
    Daemon, able, basic,
    house::{House, set_mode},
    is_root,
    rpc::Failure,
};

/// Nobody in particular.
const UID: u32 = 54_321;
/// The calls of each race.
const ROUNDS: usize = 1_000;

/// A daemon whose client acts for a user, and a directory with a `home` of that user's; `etc` and
/// `private` (0700) are root's.
struct World(House);

impl World {
    fn new(args: &[&str]) -> Option<Self> {
        if !able("root, to act for another user", is_root()) {
            return None;
        }
        let mut house = House::with(Daemon::start(args));
        house.client = house.client.with("authorization", &basic(&format!("{UID}:{UID}")));
        for name in ["home", "etc", "etc/bin", "private"] {
            fs::create_dir(house.at(name)).unwrap();
        }
        set_mode(house.at("private"), 0o700);
        for name in ["etc/shadow", "etc/bin/tool", "private/secret", "private/program"] {
            set_mode(house.put(name, "of root"), 0o600);
        }
        chown(house.at("home"), Some(UID), Some(UID)).unwrap();
        Some(Self(house))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.dir().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.0.at(name)
    }

    /// A link of the user's.
    fn plant(&self, name: &str, target: impl AsRef<Path>) {
        symlink(target, self.at(name)).unwrap();
        lchown(self.at(name), Some(UID), Some(UID)).unwrap();
    }

    /// A directory of the user's.
    fn dir(&self, name: &str) {
        fs::create_dir_all(self.at(name)).unwrap();
        chown(self.at(name), Some(UID), Some(UID)).unwrap();
    }

    /// A file of the user's.
    fn file(&self, name: &str) {
        fs::write(self.at(name), "of the user").unwrap();
        chown(self.at(name), Some(UID), Some(UID)).unwrap();
    }

    /// All that is root's, with owner, mode and content.
    fn of_root(&self) -> BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        let mut todo = vec![self.at("etc"), self.at("private")];
        while let Some(path) = todo.pop() {
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if meta.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            found.insert(path, (meta.uid(), meta.gid(), meta.mode(), content));
        }
        found
    }

    async fn set(&self, request: SetAttributesRequest) -> Result<EntryInfo, Failure> {
        let answer: SetAttributesResponse =
            self.0.client.unary("/filesystem.Filesystem/SetAttributes", &request).await?;
        Ok(answer.entry.unwrap())
    }

    /// Gives what is at a path to the user, with all permissions.
    async fn give(&self, path: &str, no_follow: bool) -> Result<EntryInfo, Failure> {
        self.set(SetAttributesRequest {
            path: self.text(path),
            owner: Some(UID.to_string()),
            mode: Some(0o777),
            no_follow,
            ..SetAttributesRequest::default()
        })
        .await
    }

    async fn link(&self, path: &str, target: &str) -> Result<EntryInfo, Failure> {
        let (path, target) = (self.text(path), target.to_owned());
        let request = CreateSymlinkRequest { path, target, replace: true };
        let answer: CreateSymlinkResponse =
            self.0.client.unary("/filesystem.Filesystem/CreateSymlink", &request).await?;
        Ok(answer.entry.unwrap())
    }

    /// Calls again and again while somebody exchanges two names; the calls that succeeded and failed.
    async fn race(
        &self,
        (one, other): (&str, &str),
        mut call: impl AsyncFnMut(usize) -> bool,
    ) -> [usize; 2] {
        let (one, other) = (self.at(one), self.at(other));
        let (before, mut results) = (self.of_root(), [0; 2]);
        let swapper = Swapper::start(one, other);
        for round in 0..ROUNDS {
            let succeeded = call(round).await;
            results[usize::from(!succeeded)] += 1;
            assert_eq!(self.of_root(), before, "after call {round}");
        }
        drop(swapper);
        results
    }
}

/// Exchanges two names until it is dropped.
struct Swapper(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Swapper {
    fn start(one: PathBuf, other: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let flags = RenameFlags::RENAME_EXCHANGE;
                let _ = renameat2(AT_FDCWD, &one, AT_FDCWD, &other, flags);
            }
        });
        Self(stop, Some(thread))
    }
}

impl Drop for Swapper {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        let _ = self.1.take().map(JoinHandle::join);
    }
}

fn is_refused<T: std::fmt::Debug>(result: Result<T, Failure>) {
    let failure = result.unwrap_err();
    let texts = ["permission denied", "operation not permitted"];
    assert!(texts.iter().any(|text| failure.message.ends_with(text)), "{failure:?}");
}

#[tokio::test]
async fn links_that_a_user_has_planted_lead_only_where_that_user_may_go() {
    let Some(world) = World::new(&[]) else { return };
    let house = &world.0;
    world.plant("home/proj", world.at("etc"));
    world.plant("home/data", "../private");
    world.plant("home/file", world.at("etc/shadow"));
    world.plant("home/new", world.at("etc/ld.so.preload"));
    world.plant("home/up", "..");
    world.file("home/own");
    let before = world.of_root();
    let at = |name: &str| world.text(name);

    is_refused(house.make_dir(&at("home/proj/cron.d")).await);
    is_refused(house.make_dir(&at("home/proj/a/b")).await);
    is_refused(house.make_dir(&at("home/up/etc/a")).await);
    // Out of a directory of the user's, which may have been moved anywhere meanwhile.
    is_refused(house.make_dir(&at("home/../etc/a")).await);
    house.make_dir(&at("home/new")).await.unwrap_err();
    is_refused(house.rename(&at("home/data/secret"), &at("home/moved")).await);
    is_refused(house.rename(&at("home/own"), &at("home/proj/own")).await);
    is_refused(house.rename(&at("home/own"), &at("home/proj/shadow")).await);
    is_refused(house.rename(&at("home/own"), &at("home/proj/new/own")).await);
    is_refused(house.remove(&at("home/proj/shadow")).await);
    is_refused(house.remove(&at("home/proj/bin")).await);
    is_refused(house.remove(&at("home/data/secret")).await);
    is_refused(world.give("home/file", false).await);
    is_refused(world.give("home/proj", false).await);
    is_refused(world.give("home/proj/shadow", true).await);
    is_refused(world.give("home/data/secret", false).await);
    is_refused(world.link("home/proj/link", "x").await);
    is_refused(world.link("home/proj/shadow", "x").await);
    is_refused(world.link("home/proj/new/x", "x").await);
    is_refused(house.stat(&at("home/data/secret")).await);
    is_refused(house.list(&at("home/data"), 1).await);
    assert_eq!(world.of_root(), before);

    // What the user may do there is done.
    let names = house.list(&at("home/proj"), 1).await.unwrap();
    assert_eq!(names.len(), 2);
    assert_eq!(house.stat(&at("home/proj/shadow")).await.unwrap().size, 7);
    world.plant("home/here", ".");
    house.make_dir(&at("home/here/a/b")).await.unwrap();
    assert_eq!(fs::metadata(at("home/a/b")).unwrap().uid(), UID);
    // The links themselves are the user's.
    for name in ["proj", "data", "file", "new", "up", "here"] {
        house.remove(&at(&format!("home/{name}"))).await.unwrap();
    }
    assert_eq!(world.of_root(), before);
}

#[tokio::test]
async fn links_are_described_and_what_is_behind_them_is_not() {
    let Some(world) = World::new(&[]) else { return };
    let house = &world.0;
    let (real, at) = (fs::canonicalize(house.dir()).unwrap(), |name: &str| world.text(name));
    world.dir("private/dir");
    symlink("secret", world.at("private/inner")).unwrap();
    let _ = xattr::set(at("private/secret"), "user.e2b.key", b"value");
    set_mode(at("private/secret"), 0o604);
    set_mode(at("private/dir"), 0o750);
    for (name, target) in [
        ("secret", "private/secret"),
        ("dir", "private/dir"),
        ("inner", "private/inner"),
        ("nowhere", "private/nowhere"),
        ("public", "etc/shadow"),
    ] {
        world.plant(&format!("home/{name}"), world.at(target));
    }
    world.plant("home/environment", "/proc/self/environ");
    let entries = house.list(&at("home"), 1).await.unwrap();
    let mut told = Vec::new();
    for entry in &entries {
        assert!(entry.is_symlink && entry.metadata.is_empty(), "{entry:?}");
        assert_eq!(entry, &house.stat(&entry.path).await.unwrap());
        let target = Path::new(entry.symlink_target.as_ref().unwrap());
        let target = target.strip_prefix(&real).unwrap_or(target).to_str().unwrap();
        told.push((entry.name.as_str(), entry.r#type(), entry.mode, target));
    }
    let (file, directory, unknown) = (FileType::File, FileType::Directory, FileType::Unspecified);
    // Where `inner` leads is told by its own target, which the user cannot read.
    let expected = [
        ("dir", directory, 0o750, "private/dir"),
        ("environment", unknown, 0, "/proc/self/environ"),
        ("inner", file, 0o604, "private/inner"),
        ("nowhere", unknown, 0, "private/nowhere"),
        ("public", file, 0o600, "etc/shadow"),
        ("secret", file, 0o604, "private/secret"),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_hard_link_to_a_file_of_roots_is_not_given_away() {
    let Some(world) = World::new(&[]) else { return };
    fs::hard_link(world.at("etc/shadow"), world.at("home/hard")).unwrap();
    let before = world.of_root();
    is_refused(world.give("home/hard", false).await);
    is_refused(world.give("home/hard", true).await);
    assert_eq!(world.of_root(), before);
    world.0.remove(&world.text("home/hard")).await.unwrap();
    // Where root has put it, it is what the client has named.
    world.give("etc/shadow", false).await.unwrap();
}

#[tokio::test]
async fn what_the_client_names_without_links_is_within_roots_reach() {
    let Some(world) = World::new(&[]) else { return };
    let house = &world.0;
    let at = |name: &str| world.text(name);
    fs::create_dir(at("home/app")).unwrap();
    for path in ["private/a/b", "home/app/a"] {
        house.make_dir(&at(path)).await.unwrap();
        assert_eq!(fs::metadata(at(path)).unwrap().uid(), UID, "{path}");
    }
    house.rename(&at("private/secret"), &at("home/app/moved")).await.unwrap();
    world.give("home/app/moved", false).await.unwrap();
    assert_eq!(fs::metadata(at("home/app/moved")).unwrap().uid(), UID);
    let link = world.link("private/link", "program").await.unwrap();
    assert_eq!((link.r#type(), link.owner), (FileType::File, UID.to_string()));
    assert_eq!(house.list(&at("private"), 2).await.unwrap().len(), 4);
    house.remove(&at("home/app")).await.unwrap();
    house.remove(&at("private/a")).await.unwrap();
    // A link of root's.
    symlink("private", at("roots")).unwrap();
    house.make_dir(&at("roots/c")).await.unwrap();
}

#[tokio::test]
async fn with_strict_file_access_a_user_has_no_other_rights() {
    let Some(world) = World::new(&["--file-access", "strict"]) else { return };
    let house = &world.0;
    let at = |name: &str| world.text(name);
    let before = world.of_root();
    world.file("home/own");
    is_refused(house.make_dir(&at("etc/a/b")).await);
    is_refused(house.rename(&at("etc/shadow"), &at("home/x")).await);
    is_refused(house.rename(&at("home/own"), &at("etc/x")).await);
    is_refused(house.remove(&at("etc/bin")).await);
    is_refused(house.stat(&at("private/secret")).await);
    is_refused(house.list(&at("private"), 1).await);
    is_refused(world.give("etc/shadow", false).await);
    is_refused(world.link("etc/link", "x").await);
    assert_eq!(world.of_root(), before);
    house.make_dir(&at("home/a/b")).await.unwrap();
    house.rename(&at("home/own"), &at("home/a/own")).await.unwrap();
    world.give("home/a/own", false).await.unwrap();
    world.link("home/link", "a").await.unwrap();
    house.remove(&at("home/a")).await.unwrap();
}

#[tokio::test]
async fn a_change_of_the_owner_leaves_no_set_id_bits_and_only_a_mode_sets_them() {
    let Some(mut world) = World::new(&[]) else { return };
    let plain = world.0.client.clone();
    world.0.client = plain.with("authorization", &basic("root"));
    world.file("home/program");
    let path = world.text("home/program");
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let request = |owner: u32, mode| SetAttributesRequest {
        path: path.clone(),
        owner: Some(owner.to_string()),
        mode,
        ..SetAttributesRequest::default()
    };
    for bits in [0o4777, 0o2777, 0o6777, 0o2707, 0o4000] {
        chown(&path, Some(UID), Some(UID)).unwrap();
        set_mode(&path, bits);
        world.set(request(0, None)).await.unwrap();
        assert_eq!(mode(), bits & 0o777, "{bits:o}");
    }
    world.set(request(0, Some(0o4755))).await.unwrap();
    assert_eq!(mode(), 0o4755);
    let failure = world.set(request(u32::MAX, None)).await.unwrap_err();
    assert!(failure.message.starts_with("owner: "), "{failure:?}");
    assert_eq!(mode(), 0o4755);
}

/// A directory `home/p` of the user's, and a link `home/l` to root's `etc`, which are exchanged all the
/// time. Gives a path to what was `home/p`, whatever its name is.
fn swapped(world: &World) -> (File, String) {
    world.dir("home/p");
    world.plant("home/l", world.at("etc"));
    let held = File::open(world.at("home/p")).unwrap();
    let path = format!("/proc/self/fd/{}", held.as_raw_fd());
    (held, path)
}

#[tokio::test]
async fn directories_are_made_in_no_directory_of_roots_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    let (_held, inside) = swapped(&world);
    let results = world
        .race(("home/p", "home/l"), async |round| {
            // One that root has, one that nobody has, and several at once.
            let name = ["bin", "new", "new/a/b"][round % 3];
            let made = world.0.make_dir(&world.text(&format!("home/p/{name}"))).await.is_ok();
            for name in ["bin", "new"] {
                let made = format!("{inside}/{name}");
                if let Ok(meta) = fs::metadata(&made) {
                    assert_eq!(meta.uid(), UID);
                    fs::remove_dir_all(&made).unwrap();
                }
            }
            made
        })
        .await;
    assert!(results[0] > 0 && results[1] > 0, "{results:?}");
}

#[tokio::test]
async fn nothing_of_roots_is_moved_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    let (_held, inside) = swapped(&world);
    world.file("home/other");
    let results = world
        .race(("home/p", "home/l"), async |round| {
            if !Path::new(&inside).join("shadow").exists() {
                fs::write(format!("{inside}/shadow"), "of the user").unwrap();
                chown(format!("{inside}/shadow"), Some(UID), Some(UID)).unwrap();
            }
            let (from, to) = match round % 2 {
                0 => ("home/p/shadow", "home/moved"),
                _ => ("home/other", "home/p/shadow"),
            };
            let moved = world.0.rename(&world.text(from), &world.text(to)).await.is_ok();
            if let Ok(text) = fs::read_to_string(world.at("home/moved")) {
                assert_eq!(text, "of the user");
            }
            if !world.at("home/other").exists() {
                world.file("home/other");
            }
            moved
        })
        .await;
    assert!(results[0] > 0 && results[1] > 0, "{results:?}");
}

#[tokio::test]
async fn nothing_of_roots_is_removed_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    world.dir("home/top");
    world.dir("home/top/p");
    world.plant("home/l", world.at("etc"));
    // Complete before they have the names that are exchanged.
    let begin_dir = |name: &str| {
        world.dir("home/next");
        let _ = fs::rename(world.at("home/next"), world.at(name));
    };
    let begin_link = |name: &str| {
        world.plant("home/next", world.at("etc"));
        let _ = fs::rename(world.at("home/next"), world.at(name));
    };
    let is_link = |name: &str| {
        fs::symlink_metadata(world.at(name)).ok().map(|meta| meta.file_type().is_symlink())
    };
    let results = world
        .race(("home/top/p", "home/l"), async |round| {
            // One directory and one link, whatever has been removed.
            world.dir("home/top");
            let _ = fs::remove_file(world.at("home/next"));
            let _ = fs::remove_dir(world.at("home/next"));
            match (is_link("home/top/p"), is_link("home/l")) {
                (None, None | Some(true)) => begin_dir("home/top/p"),
                (None, Some(false)) => begin_link("home/top/p"),
                (Some(false), None) => begin_link("home/l"),
                (Some(true), None) => begin_dir("home/l"),
                (Some(false), Some(false)) => drop(fs::remove_dir_all(world.at("home/l"))),
                (Some(true), Some(_)) | (Some(false), Some(true)) => {}
            }
            let options = libc::O_DIRECTORY | libc::O_NOFOLLOW;
            let options = File::options().read(true).custom_flags(options).clone();
            if let Ok(held) = options.open(world.at("home/top/p")) {
                let inside = format!("/proc/self/fd/{}", held.as_raw_fd());
                let _ = fs::create_dir(format!("{inside}/bin"));
                for name in ["bin/tool", "shadow"] {
                    let _ = fs::write(format!("{inside}/{name}"), "of the user");
                }
            }
            // The whole tree, a directory in it that root has too, and a file.
            let name = ["top/p/shadow", "top/p/bin", "top"][round % 3];
            world.0.remove(&world.text(&format!("home/{name}"))).await.is_ok()
        })
        .await;
    assert!(results[0] > 0 && results[1] > 0, "{results:?}");
}

#[tokio::test]
async fn nothing_of_roots_is_changed_by_attributes_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    let (_held, inside) = swapped(&world);
    fs::write(format!("{inside}/shadow"), "of the user").unwrap();
    let results = world
        .race(("home/p", "home/l"), async |round| {
            world.give("home/p/shadow", round % 2 == 0).await.is_ok()
        })
        .await;
    assert!(results[0] > 0 && results[1] > 0, "{results:?}");
    // The last name itself, and a directory.
    world.file("home/f");
    world.plant("home/link", world.at("etc/shadow"));
    let results = world
        .race(("home/f", "home/link"), async |round| {
            world.give("home/f", round % 2 == 0).await.is_ok()
        })
        .await;
    assert!(results[0] > 0 && results[1] > 0, "{results:?}");
    let results =
        world.race(("home/p", "home/l"), async |_| world.give("home/p", false).await.is_ok()).await;
    assert!(results[0] > 0 && results[1] > 0, "{results:?}");
}

#[tokio::test]
async fn links_are_made_in_no_directory_of_roots_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    let (_held, inside) = swapped(&world);
    let results = world
        .race(("home/p", "home/l"), async |round| {
            let name = ["shadow", "new", "a/new"][round % 3];
            world.link(&format!("home/p/{name}"), "target").await.is_ok()
        })
        .await;
    assert!(results[0] > 0 && results[1] > 0, "{results:?}");
    let names = fs::read_dir(&inside).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!names.into_iter().any(|name| name.to_string_lossy().starts_with(".envd")));
}

#[tokio::test]
async fn no_name_of_a_private_directory_is_listed_in_a_race() {
    let Some(world) = World::new(&[]) else { return };
    world.dir("home/p");
    world.plant("home/l", world.at("private"));
    world.file("home/p/own");
    let results = world
        .race(("home/p", "home/l"), async |round| {
            let (path, depth) = [("home/p", 1), ("home", 3), ("home/p/.", 1)][round % 3];
            let listed = world.0.list(&world.text(path), depth).await;
            for entry in listed.iter().flatten() {
                assert!(["p", "l", "own"].contains(&entry.name.as_str()), "{entry:?}");
            }
            if let Ok(entry) = world.0.stat(&world.text("home/p/secret")).await {
                panic!("{entry:?}");
            }
            listed.is_ok()
        })
        .await;
    assert!(results[0] > 0, "{results:?}");
}
