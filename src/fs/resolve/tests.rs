use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink},
    sync::atomic::{AtomicBool, Ordering},
};

use super::*;
use crate::{
    fs::{FsError, actor::FileAccess},
    guest::users::User,
};

/// Nobody in particular.
const UID: u32 = 54_321;

fn actor_of(uid: u32, access: FileAccess) -> Actor {
    let user = User { name: "u".into(), uid, gid: uid, home: "/".into(), groups: vec![uid] };
    Actor::new(&user, access)
}

/// Whoever runs the tests.
pub(crate) fn own_actor() -> Actor {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let user = User { name: "me".into(), uid, gid, home: "/".into(), groups: vec![gid] };
    Actor::new(&user, FileAccess::Compatible)
}

fn user() -> Actor {
    actor_of(UID, FileAccess::Compatible)
}

/// A directory of root's with a `home` of the user's and an `etc` of root's; none without root.
fn world() -> Option<(tempfile::TempDir, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        crate::skipped::skip("root, to act as another user");
        return None;
    }
    let tmp = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(tmp.path()).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    for dir in ["home", "etc", "private"] {
        fs::create_dir(root.join(dir)).unwrap();
    }
    fs::set_permissions(root.join("private"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(root.join("etc/shadow"), "secret").unwrap();
    fs::set_permissions(root.join("etc/shadow"), fs::Permissions::from_mode(0o600)).unwrap();
    chown(root.join("home"), Some(UID), Some(UID)).unwrap();
    Some((tmp, root))
}

fn plant(target: impl AsRef<Path>, link: &Path, uid: u32) {
    symlink(target, link).unwrap();
    lchown(link, Some(uid), Some(uid)).unwrap();
}

fn content(place: &Place) -> nix::Result<String> {
    let (mut file, ..) = place.open(OFlag::O_RDONLY)?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|error| super::super::errno::of(&error))?;
    Ok(text)
}

#[test]
fn resolves_as_the_kernel_does() {
    let tmp = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(tmp.path()).unwrap();
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::write(root.join("a/b/f"), "f").unwrap();
    for (target, link) in
        [("a", "l"), ("b/f", "a/file"), ("../a/b/", "a/up"), ("nowhere", "no"), ("o", "o")]
    {
        symlink(target, root.join(link)).unwrap();
    }
    symlink(root.join("l/up"), root.join("absolute")).unwrap();
    let actor = own_actor();
    for path in [
        "",
        "/",
        ".",
        "a",
        "a/",
        "a/.",
        "a//b/./f",
        "l",
        "l/",
        "l/b/..",
        "l/file",
        "absolute/f",
        "absolute",
        "a/b/f/",
        "a/b/f/x",
        "a/b/f/..",
        "no",
        "no/",
        "no/x",
        "o",
        "o/x",
        "x",
        "x/y",
        "..",
        "../../../../../..",
        "a/up/../up/f",
    ] {
        let path = PathBuf::from(format!("{}/{path}", root.display()));
        for follow in [true, false] {
            let walk = Walk::new(&actor);
            let walk = if follow { walk } else { walk.no_follow() };
            let found = walk.to(&path).map_err(|error| error.errno).and_then(|place| {
                let found = place.found().ok_or(Errno::ENOENT)?;
                Ok((found.stat.st_dev, found.stat.st_ino))
            });
            let wanted = if follow { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
            let wanted = wanted
                .map(|meta| (meta.dev(), meta.ino()))
                .map_err(|error| super::super::errno::of(&error));
            assert_eq!(found, wanted, "{} {follow}", path.display());
            if let Ok(place) = walk.to(&path)
                && place.found().is_some()
                && follow
            {
                assert_eq!(place.real(), fs::canonicalize(&path).unwrap());
            }
        }
    }
    let long = root.join("x".repeat(256));
    assert_eq!(Walk::new(&actor).to(&long).unwrap_err().errno, Errno::ENAMETOOLONG);
}

#[test]
fn the_links_of_procfs_are_followed_by_who_has_not_switched() {
    let actor = own_actor();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "content").unwrap();
    use std::os::fd::AsRawFd;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_file().as_raw_fd()));
    let place = Walk::new(&actor).to(&path).unwrap();
    assert_eq!(place.found().unwrap().stat.st_ino, file.as_file().metadata().unwrap().ino());
    assert_eq!(content(&place).unwrap(), "content");
    let place = Walk::new(&actor).to(Path::new("/proc/self/cwd/..")).unwrap();
    assert_eq!(place.found().unwrap().stat.st_ino, fs::metadata("..").unwrap().ino());
}

#[test]
fn a_link_of_the_users_leads_only_where_the_user_may_go() {
    let Some((_tmp, root)) = world() else { return };
    let home = root.join("home");
    plant(root.join("etc/shadow"), &home.join("file"), UID);
    plant("../etc", &home.join("dir"), UID);
    plant("../private", &home.join("private"), UID);
    plant("/proc/self/environ", &home.join("proc"), UID);
    plant("/proc/self/fd/0", &home.join("magic"), UID);
    fs::write(root.join("etc/public"), "public").unwrap();
    let user = user();

    let place = Walk::new(&user).to(&home.join("file")).unwrap();
    assert!(place.switched());
    assert_eq!(content(&place).unwrap_err(), Errno::EACCES);
    assert_eq!(place.open(OFlag::O_WRONLY).unwrap_err(), Errno::EACCES);
    let place = Walk::new(&user).to(&home.join("dir/public")).unwrap();
    assert_eq!(content(&place).unwrap(), "public");
    let error = Walk::new(&user).make_parents().to(&home.join("dir/new/x")).unwrap_err();
    assert_eq!((error.errno, error.step), (Errno::EACCES, Step::MakeDirectory));
    assert!(!root.join("etc/new").exists());
    let place = Walk::new(&user).make_parents().to(&home.join("dir/new")).unwrap();
    assert_eq!(place.create_new(OFlag::O_WRONLY, 0o666).unwrap_err(), Errno::EACCES);
    for name in ["private/x", "proc", "magic"] {
        let error = Walk::new(&user).to(&home.join(name)).unwrap_err();
        assert_eq!(error.errno, Errno::EACCES, "{name}");
    }
    // Whoever acts as root goes everywhere, and so do clients who name it themselves.
    let root_actor = actor_of(0, FileAccess::Strict);
    assert_eq!(content(&Walk::new(&root_actor).to(&home.join("file")).unwrap()).unwrap(), "secret");
    let place = Walk::new(&user).to(&root.join("etc/shadow")).unwrap();
    assert_eq!((place.switched(), content(&place).unwrap().as_str()), (false, "secret"));
    let strict = actor_of(UID, FileAccess::Strict);
    let place = Walk::new(&strict).to(&root.join("etc/shadow")).unwrap();
    assert_eq!(content(&place).unwrap_err(), Errno::EACCES);
    assert!(!crate::sys::fs_credentials::thread_is_changed());
}

#[test]
fn links_of_roots_and_directories_alone_switch_nothing() {
    let Some((_tmp, root)) = world() else { return };
    let home = root.join("home");
    symlink("etc", root.join("link")).unwrap();
    symlink(root.join("etc"), home.join("link")).unwrap();
    symlink("../etc", home.join("up")).unwrap();
    fs::create_dir(home.join("app")).unwrap();
    let user = user();
    for path in ["link/shadow", "home/link/shadow", "home/app/x", "etc/../home/app"] {
        let place = Walk::new(&user).to(&root.join(path)).unwrap();
        assert!(!place.switched(), "{path}");
    }
    // `..` out of a directory of the user's, which may have been moved meanwhile.
    for path in ["../etc/shadow", "up/shadow"] {
        assert!(Walk::new(&user).to(&home.join(path)).unwrap().switched(), "{path}");
    }
    assert!(!Walk::new(&user).to(&home.join("app/../x")).unwrap().switched());
    // A link of root's that somebody linked into their own directory has another meaning there.
    fs::hard_link(root.join("link"), home.join("moved")).unwrap();
    let error = Walk::new(&user).make_parents().to(&home.join("moved/x/y")).unwrap_err();
    assert_eq!(error.step, Step::Dangling);
    symlink(root.join("etc"), root.join("two")).unwrap();
    fs::hard_link(root.join("two"), home.join("two")).unwrap();
    assert!(Walk::new(&user).to(&home.join("two/shadow")).unwrap().switched());
    assert!(!Walk::new(&user).to(&root.join("two/shadow")).unwrap().switched());
}

#[test]
fn a_file_with_several_names_is_the_users_or_lies_with_root() {
    let Some((_tmp, root)) = world() else { return };
    let home = root.join("home");
    fs::hard_link(root.join("etc/shadow"), home.join("hard")).unwrap();
    let user = user();
    let place = Walk::new(&user).to(&home.join("hard")).unwrap();
    assert!(place.switched());
    assert_eq!(content(&place).unwrap_err(), Errno::EACCES);
    // By its name of root's it is what the client named.
    let place = Walk::new(&user).to(&root.join("etc/shadow")).unwrap();
    assert_eq!(content(&place).unwrap(), "secret");
    fs::write(home.join("mine"), "mine").unwrap();
    chown(home.join("mine"), Some(UID), None).unwrap();
    fs::hard_link(home.join("mine"), home.join("mine2")).unwrap();
    assert!(!Walk::new(&user).to(&home.join("mine")).unwrap().switched());
    // Where anybody may have linked it, it does not matter whose the directory is.
    let sticky = root.join("sticky");
    fs::create_dir(&sticky).unwrap();
    fs::set_permissions(&sticky, fs::Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(root.join("etc/shadow"), sticky.join("hard")).unwrap();
    let place = Walk::new(&user).to(&sticky.join("hard")).unwrap();
    assert!(place.switched());
    assert_eq!(content(&place).unwrap_err(), Errno::EACCES);
    // Put there after the walk: what counts is what was opened.
    fs::write(home.join("x"), "x").unwrap();
    let place = Walk::new(&user).to(&home.join("x")).unwrap();
    assert!(!place.switched());
    fs::rename(home.join("hard"), home.join("x")).unwrap();
    assert_eq!(place.open(OFlag::O_RDONLY).unwrap_err(), Errno::EACCES);
    fs::remove_file(home.join("x")).unwrap();
    symlink(root.join("etc/shadow"), home.join("x")).unwrap();
    assert_eq!(place.open(OFlag::O_RDONLY).unwrap_err(), Errno::ELOOP);
}

#[test]
fn what_is_made_is_the_users_and_errors_are_those_that_clients_know() {
    let Some((_tmp, root)) = world() else { return };
    let user = user();
    let place = Walk::new(&user).make_parents().to(&root.join("private/a/b/f")).unwrap();
    assert_eq!((place.made(), place.found().is_none(), place.switched()), (2, true, false));
    let mut file = place.create_new(OFlag::O_WRONLY, 0o666).unwrap();
    file.write_all(b"x").unwrap();
    place.sync_names(place.made()).unwrap();
    for path in ["private/a", "private/a/b", "private/a/b/f"] {
        let meta = fs::metadata(root.join(path)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (UID, UID), "{path}");
    }
    assert_eq!(place.create_new(OFlag::O_WRONLY, 0o666).unwrap_err(), Errno::EEXIST);
    let place = Walk::new(&user).make_all().to(&root.join("home/new/")).unwrap();
    assert!(place.last_was_made() && place.found().unwrap().is_dir());

    let making = |path: &str| {
        let error = Walk::new(&user).make_all().to(&root.join(path)).unwrap_err();
        error.of_making_directories().to_string()
    };
    fs::write(root.join("file"), "").unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    let shown = root.display();
    assert_eq!(making("file/x"), format!("path is a file: {shown}/file"));
    assert_eq!(
        making("dangling/x"),
        format!("failed to chown directory: chown {shown}/dangling: no such file or directory")
    );
    assert_eq!(
        making("new/../x"),
        format!("failed to create directory: mkdir {shown}/new: no such file or directory")
    );
    assert!(!root.join("new").exists());
}

#[test]
fn a_mount_that_does_not_answer_is_named() {
    let busy = MountBusy { mount: "/mnt/x".to_owned(), calls: 3 };
    let error = WalkError { busy: Some(busy), ..WalkError::early(Path::new("/"), Errno::EBUSY) };
    assert!(matches!(error.of_making_directories(), FsError::MountBusy(_)));
}

/// Somebody exchanges a directory for a link to a directory of root's, again and again.
#[test]
fn nothing_of_roots_is_reached_in_a_race() {
    let Some((_tmp, root)) = world() else { return };
    let home = root.join("home");
    fs::create_dir(home.join("p")).unwrap();
    fs::write(home.join("p/shadow"), "mine").unwrap();
    for path in ["p", "p/shadow"] {
        chown(home.join(path), Some(UID), Some(UID)).unwrap();
    }
    plant(root.join("etc"), &home.join("l"), UID);
    let user = user();
    let stop = AtomicBool::new(false);
    let mut seen = [0; 2];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use nix::fcntl::{RenameFlags, renameat2};
            while !stop.load(Ordering::Relaxed) {
                let (p, l) = (home.join("p"), home.join("l"));
                let _ = renameat2(AT_FDCWD, &p, AT_FDCWD, &l, RenameFlags::RENAME_EXCHANGE);
            }
        });
        for _ in 0..5000 {
            let path = home.join("p/shadow");
            match Walk::new(&user).to(&path).map_err(|e| e.errno).and_then(|p| content(&p)) {
                Ok(text) => {
                    assert_eq!(text, "mine");
                    seen[0] += 1;
                }
                Err(_) => seen[1] += 1,
            }
            let _ = Walk::new(&user).make_all().to(&home.join("p/new/x"));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    assert!(!root.join("etc/new").exists());
    assert_eq!(fs::metadata(root.join("etc")).unwrap().uid(), 0);
}

fn text_of(place: &Place) -> nix::Result<String> {
    place.found().ok_or(Errno::ENOENT)?;
    content(place)
}

#[test]
fn a_confined_walk_is_led_out_by_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir_all(tmp.path().join("root/a/b")).unwrap();
    fs::write(tmp.path().join("secret"), "secret").unwrap();
    fs::write(tmp.path().join("root/a/b/f"), "inside").unwrap();
    let at = |name: &str| tmp.path().join("root").join(name);
    symlink("a/b", at("link")).unwrap();
    symlink("../secret", at("up")).unwrap();
    symlink(tmp.path(), at("absolute")).unwrap();
    symlink("/proc/self/root", at("magic")).unwrap();
    symlink("..", at("a/dots")).unwrap();
    let actor = own_actor();
    let root = fs::File::open(at("")).unwrap();
    let walk = |path: &str| Walk::new(&actor).confined().from(&root, &at(""), Path::new(path));
    for path in ["a/b/f", "a/./b/f", "link/f", "a/dots/a/b/f", "link/../b/f"] {
        assert_eq!(text_of(&walk(path).unwrap()).unwrap(), "inside", "{path}");
    }
    for path in
        ["../secret", "up", "absolute/secret", "a/dots/../secret", "magic/etc", "link/../../.."]
    {
        assert_eq!(walk(path).unwrap_err().errno, Errno::EXDEV, "{path}");
    }
    let make =
        |path: &str| Walk::new(&actor).confined().make_all().from(&root, &at(""), Path::new(path));
    assert_eq!(make("x/y/z").unwrap().made(), 3);
    for path in ["a/dots/../x", "absolute/x", "x/../../y"] {
        make(path).unwrap_err();
    }
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2);
    assert_eq!(make(&"d/".repeat(MAX_CONFINED_LEVELS + 2)).unwrap_err().errno, Errno::ENAMETOOLONG);
}

/// Checked, then swapped for a link, then used; and moved out while the walk is in it.
#[test]
fn a_confined_walk_is_led_out_by_nobody_in_a_race() {
    use nix::fcntl::{RenameFlags, renameat2};
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    for dir in ["root/d/e", "outside/e"] {
        fs::create_dir_all(at(dir)).unwrap();
    }
    fs::write(at("root/d/e/f"), "inside").unwrap();
    fs::write(at("root/f"), "inside").unwrap();
    for name in ["outside/e/f", "outside/f", "f"] {
        fs::write(at(name), "secret").unwrap();
    }
    symlink(at("outside"), at("root/l")).unwrap();
    symlink("..", at("root/d/e/up")).unwrap();
    let (actor, root) = (own_actor(), fs::File::open(at("root")).unwrap());
    // The very directory, whatever its name is.
    let held = fs::File::open(at("root/d")).unwrap();
    let deep = crate::sys::path_fd::proc_path(&held).join("e");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let flags = RenameFlags::RENAME_EXCHANGE;
                let _ = renameat2(AT_FDCWD, &at("root/d"), AT_FDCWD, &at("root/l"), flags);
                let _ = fs::rename(&deep, at("outside/moved"));
                let _ = fs::rename(at("outside/moved"), &deep);
            }
        });
        let mut inside = 0;
        for _ in 0..5000 {
            for path in ["d/e/f", "d/e/up/../f"] {
                let walk = Walk::new(&actor).confined();
                let place = walk.from(&root, &at("root"), Path::new(path));
                if let Ok(Ok(text)) = place.as_ref().map(text_of) {
                    assert_eq!(text, "inside");
                    inside += 1;
                }
            }
            let walk = Walk::new(&actor).confined().make_all();
            let _ = walk.from(&root, &at("root"), Path::new("d/new/x"));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(inside > 0);
    });
    assert!(!at("outside/new").exists());
}
