//! Archives of any bytes: nothing is written outside of the target, and nothing panics.
#![no_main]

use std::{fs, path::PathBuf, sync::atomic::AtomicBool};

use envd::{
    fs::{
        actor::{Actor, FileAccess},
        archive::{Compression, extract},
    },
    guest::users::User,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (compression, bytes) = input;
    let compression = match compression % 4 {
        0 => None,
        1 => Some(Compression::None),
        2 => Some(Compression::Gzip),
        _ => Some(Compression::Zstd),
    };
    let top = PathBuf::from(format!("/tmp/envd-fuzz-{}", std::process::id()));
    let user = User { name: "me".into(), uid: 0, gid: 0, home: "/".into(), groups: vec![0] };
    let actor = Actor::new(&user, FileAccess::Compatible);
    let _ =
        extract(&top.join("target"), &actor, bytes, compression, false, &AtomicBool::new(false));
    for entry in fs::read_dir(&top).into_iter().flatten().flatten() {
        assert_eq!(entry.file_name(), "target");
    }
    let _ = fs::remove_dir_all(&top);
});
