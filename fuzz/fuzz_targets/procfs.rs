//! The parsers of what /proc says, which programs in the sandbox decide in part: names, mount points,
//! control groups.
#![no_main]

use envd::sys::procfs;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(stat) = procfs::Stat::parse(bytes) {
        // Whatever is in the name, what is behind the last parenthesis decides.
        let close = bytes.iter().rposition(|byte| *byte == b')').unwrap();
        let pid = bytes.iter().position(|byte| *byte == b'(').unwrap();
        let line = [&bytes[..pid], b"(\xff)", &bytes[close + 1..]].concat();
        assert_eq!(procfs::Stat::parse(&line), Some(stat));
    }
    for socket in procfs::sockets(bytes) {
        let _ = socket.local.to_string();
    }
    for mount in procfs::mountinfo(bytes) {
        assert!(mount.mount_point.as_os_str().len() <= bytes.len());
    }
    let _ = procfs::mounts(bytes).count();
    let _ = procfs::newest_pid(bytes);
    let _ = procfs::cpu_times(bytes);
    let _ = procfs::unified_cgroup(bytes);
    let _ = procfs::block_filesystems(bytes);
    let _ = procfs::entry_bytes(bytes, b"VmHWM:");
});
