//! Extract where it is hard: archives that break off, sparse files, what is in the way, and archives
//! that unpack to far more than they are.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs, io::Write, os::unix::fs::MetadataExt, path::Path, process::Command};

use bytes::Bytes;
use common::{
    eventually,
    house::{House, Mounted, set_mode},
    noise,
    raw::Raw,
    rpc::{Client, Failure, Messages, Wire, envelope},
};
use envd::proto::filesystem::{ExtractRequest, ExtractResponse, extract_request};
use prost::Message;

const EXTRACT: &str = "/filesystem.Filesystem/Extract";

fn begin(start: extract_request::Start) -> ExtractRequest {
    ExtractRequest { event: Some(extract_request::Event::Start(start)) }
}

fn data(bytes: &[u8]) -> ExtractRequest {
    let data = Bytes::copy_from_slice(bytes);
    ExtractRequest { event: Some(extract_request::Event::Data(data)) }
}

async fn extract_as(
    house: &House,
    start: extract_request::Start,
    archive: &[u8],
) -> Result<ExtractResponse, Failure> {
    let mut requests = vec![begin(start)];
    requests.extend(archive.chunks(100_000).map(data));
    let client = Client::new(&house.daemon, Wire::Grpc);
    let mut messages: Messages<ExtractResponse> = client.streams(EXTRACT, &requests).await?;
    Ok(messages.next().await?.expect("an answer"))
}

async fn extract(house: &House, path: &str, archive: &[u8]) -> Result<ExtractResponse, Failure> {
    extract_as(house, extract_request::Start { path: path.into(), ..Default::default() }, archive)
        .await
}

/// Sends the beginning of a call and neither more nor its end.
async fn half(house: &House, path: &str, archive: &[u8]) -> Raw {
    let start = begin(extract_request::Start { path: path.into(), ..Default::default() });
    let mut body = envelope(0, &start.encode_to_vec());
    for part in archive.chunks(100_000) {
        body.extend_from_slice(&envelope(0, &data(part).encode_to_vec()));
    }
    let mut raw = Raw::open(&house.daemon).await;
    let head = format!(
        "POST {EXTRACT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/connect+proto\r\n\
         content-length: {}\r\n\r\n",
        body.len() + 1
    );
    raw.send(head).await;
    raw.send(body).await;
    raw
}

/// An archive of files and, where there is no content, directories.
fn tar_of(entries: &[(&str, u32, Option<&[u8]>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, mode, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(*mode);
        header.set_entry_type(match content {
            Some(_) => tar::EntryType::Regular,
            None => tar::EntryType::Directory,
        });
        let content = content.unwrap_or_default();
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn names(dir: &str) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Lesson: an upload destroys the old file first and leaves half of one.
#[tokio::test]
async fn an_archive_that_breaks_off_leaves_the_old_file_and_no_half_one() {
    let house = House::new();
    let to = house.at("to");
    fs::create_dir(&to).unwrap();
    let content = noise(300_000);
    let whole = tar_of(&[("first", 0o644, Some(b"1")), ("file", 0o644, Some(&content))]);
    let cut = &whole[..200_000];
    for (old, left) in [(false, vec!["first"]), (true, vec!["file", "first"])] {
        if old {
            fs::write(format!("{to}/file"), "old").unwrap();
        }
        let error = extract(&house, &to, cut).await.unwrap_err();
        assert_eq!(error.code, "invalid_argument", "{error:?}");
        assert_eq!(names(&to), left);
        // A client that goes away.
        let raw = half(&house, &to, cut).await;
        eventually("it is being unpacked", || {
            (house.opened(|path| path.starts_with(&to)) > 0).then_some(())
        });
        drop(raw);
        eventually("it is given up", || {
            (house.opened(|path| path.starts_with(&to)) == 0).then_some(())
        });
        assert_eq!(names(&to), left);
    }
    assert_eq!(fs::read(format!("{to}/file")).unwrap(), b"old");
    extract(&house, &to, &whole).await.unwrap();
    assert!(fs::read(format!("{to}/file")).unwrap() == content);
    assert_eq!(names(&to), ["file", "first"]);
}

#[tokio::test]
async fn what_is_in_the_way_is_replaced_and_never_written_through() {
    let house = House::new();
    let to = house.at("to");
    fs::create_dir(&to).unwrap();
    let other = house.put("other", "old");
    fs::hard_link(&other, format!("{to}/file")).unwrap();
    let held = fs::File::open(format!("{to}/file")).unwrap();
    extract(&house, &to, &tar_of(&[("file", 0o600, Some(b"new"))])).await.unwrap();
    assert_eq!(fs::read(format!("{to}/file")).unwrap(), b"new");
    assert_eq!(fs::read(&other).unwrap(), b"old");
    assert_eq!(held.metadata().unwrap().nlink(), 1);
    // The second of one name replaces the first.
    let twice = tar_of(&[("file", 0o644, Some(b"1")), ("file", 0o644, Some(b"22"))]);
    assert_eq!(extract(&house, &to, &twice).await.unwrap().entries, 2);
    assert_eq!(fs::read(format!("{to}/file")).unwrap(), b"22");
    assert_eq!(names(&to), ["file"]);
}

#[tokio::test]
async fn a_directory_that_exists_stays_as_it_is_unless_it_is_to_be_kept_as_packed() {
    let house = House::new();
    let to = house.at("to");
    fs::create_dir_all(format!("{to}/there")).unwrap();
    set_mode(format!("{to}/there"), 0o1777);
    let packed =
        tar_of(&[("there", 0o755, None), ("there/file", 0o644, Some(b"x")), ("new", 0o711, None)]);
    let mode = |name: &str| fs::metadata(format!("{to}/{name}")).unwrap().mode() & 0o7777;
    extract(&house, &to, &packed).await.unwrap();
    assert_eq!((mode("there"), mode("new")), (0o1777, 0o711));
    let start = extract_request::Start { path: to.clone(), preserve: true, ..Default::default() };
    // The archive says that it is root's.
    if common::able_as_root() {
        extract_as(&house, start, &packed).await.unwrap();
        assert_eq!((mode("there"), mode("new")), (0o755, 0o711));
    }
}

#[tokio::test]
async fn an_owner_that_is_no_id_is_refused_and_not_taken_for_the_callers() {
    let house = House::new();
    let of = |uid: u64, gid: u64| {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_size(1);
        archive.append_data(&mut header, "file", &b"x"[..]).unwrap();
        archive.into_inner().unwrap()
    };
    let none = u64::from(u32::MAX);
    for (number, (uid, gid, named)) in
        [(none, 0, "uid 4294967295"), (0, none, "gid 4294967295"), (none + 1, 0, "uid 4294967296")]
            .into_iter()
            .enumerate()
    {
        let to = house.at(&format!("to{number}"));
        let start =
            extract_request::Start { path: to.clone(), preserve: true, ..Default::default() };
        let error = extract_as(&house, start, &of(uid, gid)).await.unwrap_err();
        assert_eq!(error.code, "invalid_argument", "{error:?}");
        assert!(error.message.contains(&format!("file: {named} is not an id")), "{error:?}");
        assert!(!Path::new(&to).join("file").exists(), "{named}");
        // Where owners are not kept the number means nothing.
        extract(&house, &to, &of(uid, gid)).await.unwrap();
        assert!(Path::new(&to).join("file").exists(), "{named}");
    }
}

#[tokio::test]
async fn sparse_files_of_every_tar_come_back_with_their_holes() {
    let house = House::new();
    fs::create_dir(house.at("from")).unwrap();
    let file = fs::File::create(house.at("from/sparse")).unwrap();
    (&file).write_all(b"start").unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"middle", 5_000_000).unwrap();
    file.set_len(12 << 20).unwrap();
    let want = fs::read(house.at("from/sparse")).unwrap();
    for (number, (program, options, readable)) in [
        ("tar", &["--format=gnu", "-S"][..], true),
        ("tar", &["--format=posix", "-S"], true),
        ("tar", &["--format=posix", "-S", "--sparse-version=0.1"], true),
        ("tar", &["--format=posix", "-S", "--sparse-version=0.0"], false),
        ("bsdtar", &["--format=pax"], true),
    ]
    .into_iter()
    .enumerate()
    {
        if Command::new(program).arg("--version").output().is_err() {
            common::skipped::skip(&format!("{program}, for its archives"));
            continue;
        }
        let archive = house.at("archive");
        let mut command = Command::new(program);
        command.args(options).args(["-cf", &archive, "-C", &house.at("from"), "sparse"]);
        assert!(command.status().unwrap().success());
        let to = house.at(&format!("to{number}"));
        let answer = extract(&house, &to, &fs::read(&archive).unwrap()).await;
        if !readable {
            let error = answer.unwrap_err();
            assert_eq!(error.code, "invalid_argument", "{error:?}");
            assert!(error.message.contains("format is not known"), "{error:?}");
            continue;
        }
        assert_eq!(answer.unwrap().bytes, want.len() as u64, "{program} {options:?}");
        assert_eq!(names(&to), ["sparse"], "{program} {options:?}");
        let path = format!("{to}/sparse");
        assert!(fs::read(&path).unwrap() == want, "{program} {options:?}");
        let blocks = fs::metadata(&path).unwrap().blocks();
        assert!(blocks * 512 < 4 << 20, "{program} {options:?}: {blocks} blocks");
    }
}

#[tokio::test]
async fn compressions_that_are_not_known_are_named() {
    let house = House::new();
    for (start, name) in [(&b"BZh91AY&SY"[..], "bzip2"), (b"\xfd7zXZ\0\0\x04", "xz")] {
        let archive = [start, &noise(2000)].concat();
        let error = extract(&house, &house.at("to"), &archive).await.unwrap_err();
        assert_eq!(error.code, "invalid_argument", "{error:?}");
        let told = format!("compression not supported: {name}");
        assert!(error.message.contains(&told), "{error:?}");
        assert_eq!(names(&house.at("to")), [""; 0]);
    }
}

#[tokio::test]
async fn maps_of_sparse_files_that_lie_are_refused() {
    let house = House::new();
    let pax = |records: &[(&str, &str)], content: &[u8]| {
        let mut builder = tar::Builder::new(Vec::new());
        let records = records.iter().map(|(key, value)| (*key, value.as_bytes()));
        builder.append_pax_extensions(records).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, "GNUSparseFile.0/x", content).unwrap();
        builder.into_inner().unwrap()
    };
    let one = |size: &str, content: &[u8]| {
        let records = [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "x"),
            ("GNU.sparse.realsize", size),
        ];
        pax(&records, content)
    };
    let block = |text: &str| {
        let mut block = text.as_bytes().to_vec();
        block.resize(block.len().next_multiple_of(512), 0);
        block
    };
    let with = |map: &str, content: &str| [block(map), content.as_bytes().to_vec()].concat();
    for bytes in [
        one("x", &with("1\n0\n4\n", "data")),
        one("99999999999999999999999", &with("1\n0\n4\n", "data")),
        // Behind the end, backwards, over one another, more than there is, no numbers, no end.
        one("10", &with("1\n8\n4\n", "data")),
        one("10", &with("2\n6\n2\n0\n2\n", "data")),
        one("10", &with("2\n0\n4\n2\n4\n", "datadata")),
        one("10", &with("1\n0\n8\n", "data")),
        one("10", &with("1\n-1\n4\n", "data")),
        one("10", &with("1\n18446744073709551615\n4\n", "data")),
        one("10", &with("99999999\n", "data")),
        one("10", b"1\n0"),
        one("10", &vec![b'1'; 3 << 20]),
        pax(&[("GNU.sparse.map", "0,4,8"), ("GNU.sparse.size", "10")], b"data"),
        pax(&[("GNU.sparse.map", "0,x"), ("GNU.sparse.size", "10")], b"data"),
        pax(&[("GNU.sparse.map", "0,4")], b"data"),
        pax(&[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")], b"data"),
    ] {
        let error = extract(&house, &house.at("to"), &bytes).await.unwrap_err();
        assert_eq!(error.code, "invalid_argument", "{error:?}");
        assert_eq!(names(&house.at("to")), [""; 0]);
    }
    let name = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "../out"),
        ("GNU.sparse.realsize", "4"),
    ];
    let bytes = pax(&name, &with("1\n0\n4\n", "data"));
    let error = extract(&house, &house.at("to"), &bytes).await.unwrap_err();
    assert!(error.message.contains("leads out of the target"), "{error:?}");
    extract(&house, &house.at("to"), &one("10", &with("1\n2\n4\n", "data"))).await.unwrap();
    assert_eq!(fs::read(house.at("to/x")).unwrap(), b"\0\0data\0\0\0\0");
}

/// An archive of one entry, of which nearly all is a hole of a tebibyte.
fn bomb() -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_path("bomb").unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_size(512);
    let octal = |field: &mut [u8], number: u64| {
        field.copy_from_slice(format!("{number:011o}\0").as_bytes());
    };
    let gnu = header.as_gnu_mut().unwrap();
    // In base 256: eleven digits of octal end at 8 GiB.
    let big = |field: &mut [u8; 12], number: u64| {
        *field = [0; 12];
        field[0] = 0x80;
        field[4..].copy_from_slice(&number.to_be_bytes());
    };
    big(&mut gnu.sparse[0].offset, (1 << 40) - 512);
    octal(&mut gnu.sparse[0].numbytes, 512);
    big(&mut gnu.realsize, 1 << 40);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(bytes.len() + 512, b'x');
    bytes
}

#[tokio::test]
async fn a_bomb_fills_no_disk_and_ends_when_its_client_leaves() {
    let house = House::new();
    // Where it would fill something, that is small.
    let Some(disk) = Mounted::tmpfs(&house.at("disk"), "size=2m") else { return };
    let open = || house.opened(|path| path.starts_with(disk.path()));
    // More than may be unpacked at a time.
    for number in 0..6 {
        let to = format!("{}/{number}", disk.path());
        let raw = half(&house, &to, &bomb()).await;
        eventually("it is being unpacked", || house.daemon.unnamed(to.as_ref()));
        drop(raw);
        eventually("it is given up", || (open() == 0).then_some(()));
        assert_eq!(names(&to), [""; 0]);
    }
    // Zeros that are data do fill it, which is told, and goes again.
    let zeros = tar_of(&[("zeros", 0o644, Some(&vec![0; 4 << 20]))]);
    let error = extract(&house, disk.path(), &zeros).await.unwrap_err();
    assert_eq!(error.code, "resource_exhausted", "{error:?}");
    assert!(!Path::new(disk.path()).join("zeros").exists());
}
