use std::{os::unix::ffi::OsStringExt, path::Path};

use proptest::prelude::*;

use super::*;

const STAT: &[u8] = b"7 (a) S 1 (b) R 3 4 5 0 -1 0 0 0 0 0 11 12 13 14 20 0 3 0 99 0 0\n";

#[test]
fn the_name_of_a_process_may_hold_anything() {
    let stat = Stat::parse(STAT).unwrap();
    assert_eq!((stat.pid, stat.parent, stat.session, stat.state), (7, 3, 5, b'R'));
    assert_eq!((stat.threads, stat.started), (3, 99));
    assert_eq!((stat.user_ticks, stat.system_ticks), (24, 26));
    for name in [&b"\xff\xfe"[..], b")", b"(", b"\n", b") Z 1 1 1", "\u{fc}".as_bytes(), b""] {
        let line = [b"7 (", name, b") S 3 4 5 0 -1 0 0 0 0 0 11 12 13 14 20 0 3 0 99 0 0"].concat();
        let stat = Stat::parse(&line).unwrap();
        assert_eq!((stat.pid, stat.state, stat.started), (7, b'S', 99), "{name:?}");
    }
    for line in [&b"7 (x"[..], b"", b"x (y) S 1 1 1", b"7 (x) S", b")("] {
        assert_eq!(Stat::parse(line), None, "{line:?}");
    }
    let own = Stat::of(i32::try_from(std::process::id()).unwrap()).unwrap();
    assert!(own.is_alive() && own.threads > 1 && own.group() == Group::Runs);
    assert_eq!(Stat::read(i32::MAX).unwrap(), None);
}

#[test]
fn a_zombie_of_one_thread_is_dead() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    while Stat::of(pid).unwrap().is_alive() {
        std::thread::yield_now();
    }
    assert_eq!(Stat::of(pid).unwrap().group(), Group::Dead);
    child.wait().unwrap();
}

#[test]
fn sockets_of_the_tables_have_addresses() {
    let table = b"  sl  local_address rem_address   st tx_queue\n\
        \x20  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1\n\
        \x20  1: 00000000000000000000000001000000:0050 0:0 07 0:0 00:0 0 0 0 12 1\n\
        \x20  2: XX:50 0:0 07 0:0 00:0 0 0 0 12 1\n\
        \x20  3: 01:50 0:0 07 0:0 00:0 0 0 0 12 1\n\xff\n";
    let found: Vec<Socket> = sockets(table).collect();
    assert_eq!(found.len(), 2);
    #[cfg(target_endian = "little")]
    assert_eq!(found[0].local, "127.0.0.1:8080".parse().unwrap());
    assert_eq!((found[0].state, found[0].inode), (TCP_LISTEN, 4711));
    assert_eq!((found[1].state, found[1].local.port()), (UDP_UNCONNECTED, 80));
}

#[test]
fn mount_points_may_hold_anything() {
    let table = b"21 1 0:20 / /proc rw shared:5 - proc proc rw\n\
        36 21 8:1 /x /mnt/a\\040b\\134\xff rw,noatime - nfs4 host:/a\\040b rw\n\
        37 21 8:1 / /none rw - \n";
    let found: Vec<MountInfo> = mountinfo(table).collect();
    assert_eq!(found.len(), 2);
    assert_eq!((found[0].id, found[0].parent, &*found[0].kind), (21, 1, &b"proc"[..]));
    let point = std::ffi::OsString::from_vec(b"/mnt/a b\\\xff".to_vec());
    assert_eq!(found[1].mount_point, Path::new(&point));
    assert_eq!((&*found[1].kind, &*found[1].source), (&b"nfs4"[..], &b"host:/a b"[..]));
    let table = b"proc /proc proc rw,nosuid 0 0\ntmp\xff /a\\011b tmpfs ro 0 0\nbroken\n";
    let found: Vec<Mount> = mounts(table).collect();
    assert_eq!(found.len(), 2);
    assert!(!found[0].read_only && found[1].read_only);
    assert_eq!(found[1].mount_point, Path::new("/a\tb"));
}

#[test]
fn values_are_found_by_their_names() {
    let status = b"Name:\t\xff\nVmHWM:\t  12 kB\nCapEff:\t00ff\n";
    assert_eq!(entry_bytes(status, b"VmHWM:"), Some(12 * 1024));
    assert_eq!(entry(status, b"CapEff:"), Some(&b"00ff"[..]));
    assert_eq!(entry_number(status, b"Name:"), None);
    assert_eq!(newest_pid(b"0.10 0.20 0.30 1/200 4711\n"), Some(4711));
    let path = unified_cgroup(b"1:name=systemd:/x\n0::/a\xff/b\n").unwrap();
    assert_eq!(path.into_os_string().into_vec(), b"/a\xff/b");
    assert_eq!(unified_cgroup(b"1:cpu:/\n"), None);
    assert_eq!(cpu_times(b"cpu  1 2 3 10 5 6 7 8 1 2\ncpu0 1\n"), Some((27, 42)));
    assert_eq!(number(b"+1"), None);
    let kinds = block_filesystems(b"nodev\tsysfs\n\text3\nnodev\toverlay\n\txfs\n");
    assert_eq!(kinds, ["ext3", "xfs"]);
}

#[test]
fn the_children_of_a_process_are_listed_where_the_kernel_can() {
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    // Threads of other tests come and go, and have children of their own.
    let lists = Children::open(own, usize::MAX);
    if Path::new("/proc/thread-self/children").exists() {
        assert!(lists.read().contains(&i32::try_from(child.id()).unwrap()));
    } else {
        crate::skipped::skip("a kernel with CONFIG_PROC_CHILDREN");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

proptest! {
    /// What the kernel prints is read back, whatever the name is, and no bytes are too odd.
    #[test]
    fn a_line_is_read_back(
        pid in 1..i32::MAX, parent in 0..i32::MAX, session in 0..i32::MAX,
        name in proptest::collection::vec(1..=u8::MAX, 0..16),
        state in proptest::sample::select(b"RSDTtZX".to_vec()),
        ticks in 0..u64::MAX / 2, threads: u64, started: u64,
    ) {
        let head = format!("{pid} (");
        let rest = format!(
            ") {} {parent} 4 {session} 0 -1 0 0 0 0 0 {ticks} {ticks} {ticks} {ticks} 20 0 {threads} 0 {started} 0\n",
            char::from(state),
        );
        let line = [head.as_bytes(), &name, rest.as_bytes()].concat();
        let both = ticks * 2;
        let expected = Stat {
            pid, parent, session, state, user_ticks: both, system_ticks: both, threads, started,
        };
        prop_assert_eq!(Stat::parse(&line), Some(expected));
    }

    #[test]
    fn no_bytes_break_a_parser(text: Vec<u8>) {
        let _ = Stat::parse(&text);
        let _ = sockets(&text).count();
        let _ = (mountinfo(&text).count(), mounts(&text).count());
        let _ = (newest_pid(&text), unified_cgroup(&text), cpu_times(&text));
        let _ = (entry_bytes(&text, b"a"), block_filesystems(&text));
    }
}
