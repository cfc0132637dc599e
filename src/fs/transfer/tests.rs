//! Writers against each other, and what they leave.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use nix::{sys::stat::Mode, unistd::mkfifo};

use super::{
    body::{spool, spool_unlinked},
    *,
};
use crate::fs::{read, resolve::own_actor};

fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn put(path: &Path, content: &[u8]) -> Result<WriteInfo, FsError> {
    let mut writer = Writer::create(&Writers::new(), path, &own_actor())?;
    content.chunks(300_000).try_for_each(|chunk| writer.write(chunk))?;
    writer.finish(&none())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn writes_new_files_and_into_existing_ones() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("a/b/f");
    let info = put(&path, b"one").unwrap();
    assert_eq!((info.name.as_str(), info.path.as_str()), ("f", path.to_str().unwrap()));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o751)).unwrap();
    let before = fs::metadata(&path).unwrap();
    fs::hard_link(&path, tmp.path().join("hard")).unwrap();
    symlink("a/b/f", tmp.path().join("soft")).unwrap();

    let big: Vec<u8> = (0..3_000_000_u32).flat_map(|i| i.to_le_bytes()).collect();
    for content in [&b"two"[..], &big, &big[..MAX_BODY_IN_MEMORY], b""] {
        put(&tmp.path().join("soft"), content).unwrap();
        assert!(fs::read(tmp.path().join("hard")).unwrap() == content);
    }
    let after = fs::metadata(&path).unwrap();
    assert_eq!((before.ino(), before.mode()), (after.ino(), after.mode()));
    assert_eq!(names(&tmp.path().join("a/b")), ["f"]);
}

#[test]
fn an_abandoned_upload_leaves_no_half_file_and_the_old_one_whole() {
    let tmp = tempfile::tempdir().unwrap();
    let (new, old) = (tmp.path().join("new"), tmp.path().join("old"));
    fs::write(&old, "old").unwrap();
    for path in [&new, &old] {
        let mut writer = Writer::create(&Writers::new(), path, &own_actor()).unwrap();
        writer.write(&vec![1; 2 * MAX_BODY_IN_MEMORY]).unwrap();
    }
    assert_eq!(names(tmp.path()), ["old"]);
    assert_eq!(fs::read(&old).unwrap(), b"old");

    // Another file that took the place meanwhile stays.
    let writer = Writer::create(&Writers::new(), &new, &own_actor()).unwrap();
    fs::write(tmp.path().join("other"), "other").unwrap();
    fs::rename(tmp.path().join("other"), &new).unwrap();
    drop(writer);
    assert_eq!(fs::read(&new).unwrap(), b"other");
}

/// A creator that stalls, and another writer of the same file, of small and of long contents.
fn two_writers(check: impl Fn(&Path, Writer, Writer, [Vec<u8>; 2])) {
    for length in [5000, 2 * MAX_BODY_IN_MEMORY] {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("f");
        let writers = Writers::new();
        let contents = [vec![b'a'; 2 * length], vec![b'b'; length]];
        let mut first = Writer::create(&writers, &path, &own_actor()).unwrap();
        first.write(&contents[0][..length]).unwrap();
        let mut second = Writer::create(&writers, &path, &own_actor()).unwrap();
        second.write(&contents[1]).unwrap();
        assert_eq!(writers.live(), 2);
        check(&path, first, second, contents);
        assert_eq!(writers.live(), 0);
        assert!(writers.state.lock().files.is_empty());
    }
}

#[test]
fn the_file_of_one_who_finished_stays_when_its_creator_gives_up() {
    two_writers(|path, first, second, [_, b]| {
        second.finish(&none()).unwrap();
        assert!(fs::read(path).unwrap() == b);
        drop(first);
        assert!(fs::read(path).unwrap() == b);
    });
    // And when the creator gives up before.
    two_writers(|path, first, second, [_, b]| {
        drop(first);
        second.finish(&none()).unwrap();
        assert!(fs::read(path).unwrap() == b);
    });
    // Without anybody who finishes nothing stays, whoever leaves first.
    two_writers(|path, first, second, _| {
        drop((first, second));
        assert!(!path.exists());
    });
    two_writers(|path, first, second, _| {
        drop((second, first));
        assert!(!path.exists());
    });
}

#[test]
fn contents_of_two_writers_never_mix_and_the_last_one_stays() {
    two_writers(|path, mut first, second, [a, b]| {
        second.finish(&none()).unwrap();
        first.write(&a[b.len()..]).unwrap();
        assert!(fs::read(path).unwrap() == b);
        first.finish(&none()).unwrap();
        assert!(fs::read(path).unwrap() == a);
    });
    two_writers(|path, mut first, second, [a, b]| {
        first.write(&a[b.len()..]).unwrap();
        first.finish(&none()).unwrap();
        assert!(fs::read(path).unwrap() == a);
        second.finish(&none()).unwrap();
        assert!(fs::read(path).unwrap() == b);
    });
}

#[test]
fn many_writers_at_once_leave_one_whole_content() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("f");
    let writers = Writers::new();
    for _ in 0..50 {
        std::thread::scope(|scope| {
            for id in 0..4_u8 {
                let (path, writers) = (&path, &writers);
                scope.spawn(move || {
                    let mut writer = Writer::create(writers, path, &own_actor()).unwrap();
                    (0..20).for_each(|_| writer.write(&[id; 1000]).unwrap());
                    if id > 0 {
                        writer.finish(&none()).unwrap();
                    }
                });
            }
        });
        let content = fs::read(&path).unwrap();
        assert_eq!(content.len(), 20_000);
        assert!(content[0] > 0 && content.iter().all(|byte| *byte == content[0]));
        fs::remove_file(&path).unwrap();
    }
    assert!(writers.state.lock().files.is_empty());
}

#[test]
fn a_link_to_nowhere_is_created_where_it_leads() {
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir(tmp.path().join("d")).unwrap();
    symlink("d/two", tmp.path().join("one")).unwrap();
    symlink("three", tmp.path().join("d/two")).unwrap();
    symlink("loop", tmp.path().join("loop")).unwrap();
    put(&tmp.path().join("one"), b"x").unwrap();
    assert_eq!(fs::read(tmp.path().join("d/three")).unwrap(), b"x");
    let error = put(&tmp.path().join("loop"), b"").unwrap_err().to_string();
    assert!(error.ends_with("too many levels of symbolic links"), "{error}");
}

#[test]
fn directories_fifos_and_devices() {
    let tmp = tempfile::tempdir().unwrap();
    let shown = tmp.path().display();
    let fifo = tmp.path().join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let error = put(tmp.path(), b"").unwrap_err();
    assert_eq!(error.to_string(), format!("path is a directory: {shown}"));
    let slash = PathBuf::from(format!("{shown}/new/"));
    let error = put(&slash, b"").unwrap_err();
    assert_eq!(error.to_string(), format!("path is a directory: {shown}/new/"));
    assert!(slash.is_dir());
    let not_regular = format!("path '{shown}/fifo' is not a regular file");
    assert_eq!(put(&fifo, b"x").unwrap_err().to_string(), not_regular);
    assert_eq!(read::open(&fifo, &own_actor()).unwrap_err().to_string(), not_regular);
    put(Path::new("/dev/null"), b"x").unwrap();

    let error = put(&fifo.join("x"), b"").unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("error ensuring directories: path is a file: {shown}/fifo")
    );
}

#[test]
fn metadata_is_replaced_and_told() {
    let tmp = tempfile::tempdir_in(".").unwrap();
    let path = tmp.path().join("f");
    let author = BTreeMap::from([("author".to_owned(), "me".to_owned())]);
    let told =
        Writer::create(&Writers::new(), &path, &own_actor()).unwrap().finish(&author).unwrap();
    assert_eq!(told.metadata, author);
    assert_eq!(put(&path, b"x").unwrap().metadata, none());
}

#[test]
fn a_full_disk_is_told_with_the_announced_length() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        return;
    }
    let mut writer = Writer::create(&Writers::new(), full, &own_actor()).unwrap();
    let error = writer.write(b"x").unwrap_err();
    assert_eq!(error.to_string(), "not enough disk space available");
    writer.expect_bytes(7);
    let error = writer.write(b"x").unwrap_err();
    assert_eq!(error.to_string(), "attempted to write 7 bytes: not enough disk space available");
    assert_eq!(error.kind(), super::super::Kind::NoSpace);
}

#[test]
fn both_spools_have_no_name() {
    let tmp = tempfile::tempdir().unwrap();
    let place = Walk::new(&own_actor()).to(&tmp.path().join("f")).unwrap();
    let unlinked = spool_unlinked(place.dir(), place.rights());
    for mut spool in [spool(&place).unwrap(), unlinked.unwrap()] {
        spool.write_all(b"x").unwrap();
    }
    assert!(names(tmp.path()).is_empty());
}
