//! Uploads: `POST /files`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, symlink},
    },
    path::{Path, PathBuf},
};

use common::{
    Daemon, able, able_as_root, eventually,
    house::{BODY_IN_MEMORY, CUTS, Cut, House, gzip, rest_error, set_mode, written},
    noise,
    raw::{Answer, Raw},
    rpc::{Client, Messages, Wire},
};
use envd::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, WriteRequest, WriteResponse, write_request,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use reqwest::multipart;
use serde_json::json;

// Uploads.

#[tokio::test]
async fn a_body_becomes_a_file() {
    let house = House::new();
    let bytes = noise(3 << 20);
    for (name, content) in
        [("a/b/new", &bytes[..]), ("a/b/new", b"short"), ("a/b/new", &bytes), ("a/b/empty", b"")]
    {
        let path = house.at(name);
        let answer = written(house.upload(&path, &[], content).await).await;
        let base = Path::new(name).file_name().unwrap().to_str();
        assert_eq!(answer, json!([{ "name": base, "path": path, "type": "file" }]));
        assert!(fs::read(&path).unwrap() == content, "{name}");
    }
    assert_eq!(fs::metadata(house.at("a")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::metadata(house.at("a/b/new")).unwrap().mode() & 0o777 & !0o644, 0);
}

#[tokio::test]
async fn a_file_that_exists_stays_the_file_that_it_is() {
    let house = House::new();
    let path = house.put("file", "old and longer");
    set_mode(&path, 0o751);
    fs::hard_link(&path, house.at("hard")).unwrap();
    symlink("file", house.at("soft")).unwrap();
    let before = fs::metadata(&path).unwrap();
    let big = noise(BODY_IN_MEMORY + 1);
    for (target, content) in [(&path, &b"new"[..]), (&house.at("soft"), &big)] {
        written(house.upload(target, &[], content).await).await;
        assert!(fs::read(house.at("hard")).unwrap() == content);
    }
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.ino(), after.mode()), (before.ino(), before.mode()));
    assert!(fs::symlink_metadata(house.at("soft")).unwrap().is_symlink());
    // A link to nowhere leads to a new file.
    symlink("made", house.at("dangling")).unwrap();
    written(house.upload(&house.at("dangling"), &[], "x").await).await;
    assert_eq!(fs::read(house.at("made")).unwrap(), b"x");
}

#[tokio::test]
async fn uploads_belong_to_their_user() {
    if !able_as_root() {
        return;
    }
    let house = House::new();
    let uid = nix::unistd::User::from_name("nobody").unwrap().unwrap().uid.as_raw();
    let old = house.put("old", "");
    for (path, names) in [(house.at("a/b/new"), &["a", "a/b", "a/b/new"][..]), (old, &["old"])] {
        let url = house.files(&[("path", &path), ("username", "nobody")]);
        let request = house.http.post(url).header("content-type", "application/octet-stream");
        written(request.body("x").send().await.unwrap()).await;
        for name in names {
            assert_eq!(fs::metadata(house.at(name)).unwrap().uid(), uid, "{name}");
        }
    }
    assert_eq!(fs::metadata(house.dir()).unwrap().uid(), 0, "what was there stays its owner's");
}

#[tokio::test]
async fn compressed_bodies_are_decompressed() {
    let house = House::new();
    let bytes = noise(2 << 20);
    let path = house.at("file");
    let packed = gzip(&bytes);
    written(house.upload(&path, &[("content-encoding", "gzip")], packed.clone()).await).await;
    assert!(fs::read(&path).unwrap() == bytes);
    written(house.upload(&path, &[("content-encoding", "identity")], "plain").await).await;
    assert_eq!(fs::read(&path).unwrap(), b"plain");

    let text = rest_error(house.upload(&path, &[("content-encoding", "br")], "x").await, 400).await;
    let expected =
        "error decompressing request body: unsupported Content-Encoding: br, supported: [gzip]";
    assert_eq!(text, expected);
    for broken in [&b"no gzip at all"[..], &packed[..packed.len() / 2]] {
        let response = house.upload(&path, &[("content-encoding", "gzip")], broken).await;
        assert!(response.status().as_u16() >= 400);
    }
    assert_eq!(fs::read(&path).unwrap(), b"plain", "what did not arrive has harmed nothing");

    let boundary = "the-boundary";
    let form = format!(
        "--{boundary}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{}\"\r\n\r\n",
        house.at("in-form")
    );
    let form = [form.as_bytes(), &bytes, format!("\r\n--{boundary}--\r\n").as_bytes()].concat();
    let request = house.http.post(house.files(&[]));
    let request = request
        .header("content-type", format!("multipart/form-data; boundary={boundary}"))
        .header("content-encoding", "gzip");
    let response = common::soon("a form", request.body(gzip(&form)).send()).await.unwrap();
    assert_eq!(written(response).await[0]["path"], house.at("in-form"));
    assert!(fs::read(house.at("in-form")).unwrap() == bytes);
}

fn part(content: impl Into<Vec<u8>>, name: &str) -> multipart::Part {
    multipart::Part::bytes(content.into()).file_name(name.to_owned())
}

#[tokio::test]
async fn a_form_uploads_files_under_their_full_names() {
    let house = House::new();
    let bytes = noise(2 << 20);
    let form = multipart::Form::new()
        .text("comment", "not a file")
        .part("file", part(&bytes[..], &house.at("x/one")))
        .part("other", part("not a file either", &house.at("other")))
        .part("file", part("two", &house.at("x/y/t w o")));
    let answer = written(house.upload_form(&[], form).await).await;
    assert_eq!(
        answer,
        json!([
            { "name": "one", "path": house.at("x/one"), "type": "file" },
            { "name": "t w o", "path": house.at("x/y/t w o"), "type": "file" },
        ])
    );
    assert!(fs::read(house.at("x/one")).unwrap() == bytes);
    assert_eq!(fs::read(house.at("x/y/t w o")).unwrap(), b"two");
    assert_eq!(house.names(), ["x"]);

    // The query's path wins over the name.
    let form = multipart::Form::new().part("file", part("named", "/no/such/name"));
    let answer = written(house.upload_form(&[("path", &house.at("chosen"))], form).await).await;
    assert_eq!(answer[0]["path"], house.at("chosen"));
    assert_eq!(fs::read(house.at("chosen")).unwrap(), b"named");

    let form = multipart::Form::new().text("comment", "alone");
    assert_eq!(written(house.upload_form(&[], form).await).await, json!([]));
}

/// A form as written, whose parts are headers and content.
async fn post_form(house: &House, line_end: &str, parts: &[(&str, &[u8])]) -> reqwest::Response {
    let mut body = Vec::new();
    for (head, content) in parts {
        let head = format!("--BOUND\n{head}\n\n").replace('\n', line_end);
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(line_end.as_bytes());
    }
    body.extend_from_slice(b"--BOUND--");
    let request = house.http.post(house.files(&[]));
    let request = request.header("content-type", "multipart/form-data; boundary=\"BOUND\"");
    common::soon("an upload", request.body(body).send()).await.unwrap()
}

#[tokio::test]
async fn names_in_forms_are_what_their_senders_meant() {
    let house = House::new();
    let dir = house.at("d");
    let escaped: String = dir.bytes().map(|byte| format!("%{byte:02X}")).collect();
    for (parameters, wanted) in [
        (format!(r#"filename="{dir}/a b+c%41;d.txt""#), "a b+c%41;d.txt"),
        (format!(r#"filename="{dir}/back\\slash""#), r"back\slash"),
        (format!(r#"filename="{dir}/one\slash""#), r"one\slash"),
        (format!(r#"filename="{dir}/esc\"quote""#), r#"esc"quote"#),
        (format!(r#"filename="{dir}/q%22uote""#), "q%22uote"),
        (format!(r#"filename="{dir}/é漢""#), "é漢"),
        (format!("filename*=UTF-8''{escaped}/%E7%8E%B0%41"), "现A"),
        (format!(r#"filename="/no/such"; filename*=utf-8'en'{escaped}/%C3%A9"#), "é"),
    ] {
        for line_end in ["\r\n", "\n"] {
            let head = format!("Content-Disposition: form-data; name=\"file\"; {parameters}");
            let content = b"line\r\n--BOUNDless\n";
            let answer = post_form(&house, line_end, &[(&head, content)]).await;
            let told = written(answer).await;
            assert_eq!(told[0]["path"], format!("{dir}/{wanted}"), "{parameters}");
            assert_eq!(fs::read(format!("{dir}/{wanted}")).unwrap(), content, "{parameters}");
            fs::remove_dir_all(&dir).unwrap();
        }
    }
    // Bytes that are not UTF-8, and a part that is encoded for mail.
    let mut name = house.at("caf").into_bytes();
    name.push(0xe9);
    let body = [
        b"--BOUND\r\nContent-Transfer-Encoding: quoted-printable\r\n\
          Content-Disposition: form-data; name=file; filename=\"",
        &name[..],
        b"\"\r\n\r\na=3Db=\r\nc\r\n--BOUND--\r\n",
    ]
    .concat();
    let request = house.http.post(house.files(&[])).body(body);
    let request = request.header("content-type", "multipart/form-data; boundary=BOUND");
    written(common::soon("an upload", request.send()).await.unwrap()).await;
    assert_eq!(fs::read(OsStr::from_bytes(&name)).unwrap(), b"a=bc");
    // A part of another name is not stored.
    let other = format!("Content-Disposition: form-data; name=\"other\"; filename=\"{dir}\"");
    assert_eq!(written(post_form(&house, "\r\n", &[(&other, b"x")]).await).await, json!([]));
    assert_eq!(fs::metadata(&dir).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

#[tokio::test]
async fn a_new_file_has_the_mode_that_was_asked_for() {
    let house = House::new();
    let mode = |path: &str| fs::metadata(path).unwrap().mode() & 0o7777;
    let path = house.at("new");
    let upload = |asked: &str, body: &'static str| {
        let request = house.http.post(house.files(&[("path", &path), ("mode", asked)]));
        let request = request.header("content-type", "application/octet-stream").body(body);
        common::soon("an upload", request.send())
    };
    for (asked, wanted) in [("0600", 0o600), ("777", 0o777), ("0o4755", 0o755), ("0", 0)] {
        written(upload(asked, "x").await.unwrap()).await;
        assert_eq!(mode(&path), wanted, "{asked}");
        fs::remove_file(&path).unwrap();
    }
    let form = multipart::Form::new().part("file", part("x", &path));
    written(house.upload_form(&[("mode", "640")], form).await).await;
    assert_eq!(mode(&path), 0o640);
    // One that exists keeps its own.
    written(upload("777", "y").await.unwrap()).await;
    assert_eq!((mode(&path), fs::read(&path).unwrap()), (0o640, b"y".to_vec()));
}

#[tokio::test]
async fn names_that_are_not_utf_8_are_the_bytes_that_were_escaped() {
    let house = House::new();
    let dir = house.at("d");
    let file = |name: &[u8]| [dir.as_bytes(), b"/", name].concat();
    let read = |name: &[u8]| fs::read(OsStr::from_bytes(&file(name))).unwrap();
    let url = |name: &str| house.daemon.url(&format!("/files?path={dir}/{name}"));
    let send = |name: &str, body: &'static str| {
        let request = house.http.post(url(name));
        request.header("content-type", "application/octet-stream").body(body).send()
    };
    written(send("caf%e9", "latin").await.unwrap()).await;
    written(send("caf%C3%A9", "utf-8").await.unwrap()).await;
    assert_eq!(read(b"caf\xe9"), b"latin");
    assert_eq!(read("café".as_bytes()), b"utf-8");
    let got = common::soon("a download", house.http.get(url("caf%e9")).send()).await.unwrap();
    assert_eq!(got.headers()["content-disposition"], "inline; filename*=utf-8''caf%E9");
    assert_eq!(got.text().await.unwrap(), "latin");
    let form = multipart::Form::new().part("file", part("form", "ignored"));
    let request = house.http.post(url("%ff")).multipart(form);
    written(common::soon("an upload", request.send()).await.unwrap()).await;
    assert_eq!(read(b"\xff"), b"form");
    // JSON has no bytes: Python writes each as a lone surrogate.
    let body = r#"{"source_paths":["DIR/caf\udce9","DIR/\udcff"],"destination":"DIR/whole\udcfe"}"#;
    let request = house.http.post(house.daemon.url("/files/compose"));
    let request = request.body(body.replace("DIR", &dir));
    let answer = common::soon("a composition", request.send()).await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
    assert_eq!(read(b"whole\xfe"), b"latinform");
}

#[tokio::test]
async fn forms_that_are_refused() {
    let house = House::new();
    let path = house.at("same");
    let form = multipart::Form::new()
        .part("file", part("first", &path))
        .part("file", part("second", &path));
    let text = rest_error(house.upload_form(&[], form).await, 400).await;
    let expected = format!(
        "you cannot upload multiple files to the same path '{path}' in one upload request, only \
         the first specified file was uploaded"
    );
    assert_eq!(text, expected);
    assert_eq!(fs::read(&path).unwrap(), b"first");

    let form = multipart::Form::new().part("file", multipart::Part::bytes(b"x".to_vec()));
    let text = rest_error(house.upload_form(&[], form).await, 400).await;
    let expected = "error getting multipart custom part file name: filename not found in \
                    Content-Disposition header";
    assert_eq!(text, expected);
    for content_type in ["multipart/form-data", "multipart/form-data; boundary=b"] {
        let request = house.http.post(house.files(&[])).header("content-type", content_type);
        let response = request.body("no form").send().await.unwrap();
        rest_error(response, 500).await;
    }
}

#[tokio::test]
async fn uploads_that_are_refused() {
    let house = House::new();
    let path = house.at("file");
    let post = async |parameters: &[(&str, &str)], content_type: Option<&str>| {
        let mut request = house.http.post(house.files(parameters)).body("x");
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        request.send().await.unwrap()
    };
    let octets = Some("application/octet-stream");
    for content_type in [Some("text/plain"), None] {
        let text = rest_error(post(&[("path", &path)], content_type).await, 400).await;
        let shown = content_type.unwrap_or_default();
        let expected = format!(
            "unsupported content type: {shown}, expected multipart/form-data or \
             application/octet-stream"
        );
        assert_eq!(text, expected);
    }
    for parameters in [&[][..], &[("path", "")]] {
        let text = rest_error(post(parameters, octets).await, 400).await;
        assert_eq!(text, "path query parameter is required for raw body upload");
    }
    let text = rest_error(post(&[("path", &house.at(""))], octets).await, 400).await;
    assert_eq!(text, format!("path is a directory: {}", house.at("")));
    assert_eq!(house.names(), [""; 0]);
    let fifo = house.at("fifo");
    mkfifo(fifo.as_str(), Mode::from_bits_truncate(0o666)).unwrap();
    rest_error(post(&[("path", &fifo)], octets).await, 400).await;
    let below = format!("{}/x", house.put("plain", ""));
    let text = rest_error(post(&[("path", &below)], octets).await, 500).await;
    assert!(text.starts_with("error ensuring directories: path is a file: "), "{text}");
}

#[tokio::test]
async fn metadata_of_an_upload_is_kept_and_replaced() {
    let house = House::new();
    if !house.keeps_metadata() {
        return;
    }
    let path = house.at("file");
    let headers = [("X-Metadata-Purpose", "a test"), ("x-metadata-b", "2"), ("x-metadata-", "no")];
    let expected = BTreeMap::from([("purpose", "a test"), ("b", "2")]);
    let answer = written(house.upload(&path, &headers, "x").await).await;
    assert_eq!(answer[0]["metadata"], json!(expected));
    let told: BTreeMap<_, _> = house.stat(&path).await.unwrap().metadata.into_iter().collect();
    assert_eq!(json!(told), json!(expected));
    assert_eq!(xattr::get(&path, "user.e2b.b").unwrap().as_deref(), Some(&b"2"[..]));

    // The next upload's is all that stays, and a bad one is refused before anything is written.
    let long = "v".repeat(5000);
    for value in ["\u{e4}", &long] {
        let response = house.upload(&path, &[("x-metadata-c", value)], "bad").await;
        let text = rest_error(response, 400).await;
        assert!(text.starts_with("invalid metadata: "), "{text}");
    }
    let key = format!("x-metadata-{}", "k".repeat(247));
    rest_error(house.upload(&path, &[(&key, "v")], "bad").await, 400).await;
    assert_eq!(fs::read(&path).unwrap(), b"x");
    written(house.upload(&path, &[("x-metadata-b", "3")], "y").await).await;
    let told: BTreeMap<_, _> = house.stat(&path).await.unwrap().metadata.into_iter().collect();
    assert_eq!(json!(told), json!({ "b": "3" }));
    written(house.upload(&path, &[], "z").await).await;
    assert!(house.stat(&path).await.unwrap().metadata.is_empty());

    let (one, two) = (house.at("one"), house.at("two"));
    let form = multipart::Form::new().part("file", part("1", &one)).part("file", part("2", &two));
    let request = house.http.post(house.files(&[])).header("x-metadata-form", "yes");
    let answer = written(request.multipart(form).send().await.unwrap()).await;
    for entry in answer.as_array().unwrap() {
        assert_eq!(entry["metadata"], json!({ "form": "yes" }));
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_the_old_file() {
    let house = House::new();
    for cut in CUTS {
        for length in [1000, BODY_IN_MEMORY + 100_000] {
            let path = house.put("old", "old");
            let raw = cut.send(&house, &path, &noise(length)).await;
            eventually("the file is open", || {
                (house.opened(|opened| opened == Path::new(&path)) > 0).then_some(())
            });
            if length > BODY_IN_MEMORY {
                // It waits in a file without a name.
                let spool = |opened: &Path| {
                    opened.starts_with(house.dir())
                        && opened.to_string_lossy().ends_with("(deleted)")
                };
                eventually("the body is spooled", || (house.opened(spool) > 0).then_some(()));
            }
            assert_eq!(fs::read(&path).unwrap(), b"old", "{cut:?} {length}: before the end");
            drop(raw);
            eventually("the upload is given up", || {
                (house.opened(|opened| opened.starts_with(house.dir())) == 0).then_some(())
            });
            assert_eq!(fs::read(&path).unwrap(), b"old", "{cut:?} {length}");
            assert_eq!(house.names(), ["old"], "{cut:?} {length}");
        }
    }
    house.is_well().await;
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_no_half_file() {
    let house = House::new();
    for cut in CUTS {
        for length in [100_000, BODY_IN_MEMORY + 100_000] {
            let path = house.at("new");
            let raw = cut.send(&house, &path, &noise(length)).await;
            // A form's last bytes could be its boundary, and are held back.
            let come = |size: u64| size > length as u64 / 2;
            eventually("it is being written", || {
                house.daemon.unnamed(house.dir()).filter(|s| come(*s))
            });
            assert_eq!(house.names(), [""; 0], "{cut:?} {length}: before the end");
            drop(raw);
            eventually("it is gone", || house.daemon.unnamed(house.dir()).is_none().then_some(()));
            assert_eq!(house.names(), [""; 0], "{cut:?} {length}");
        }
    }
    house.is_well().await;
}

#[tokio::test]
async fn sixty_four_mebibytes_there_and_back_in_bounded_memory() {
    let house = House::new();
    let bytes = noise(64 << 20);
    let path = house.at("big");
    // To a new file, and into one that exists.
    for _ in 0..2 {
        written(house.upload(&path, &[], bytes.clone()).await).await;
        let mut response = house.download(&path).await;
        assert_eq!(response.headers()["content-length"], bytes.len().to_string());
        let mut at = 0;
        while let Some(chunk) = common::soon("a chunk", response.chunk()).await.unwrap() {
            assert!(bytes[at..at + chunk.len()] == chunk, "changed behind {at}");
            at += chunk.len();
        }
        assert_eq!(at, bytes.len());
    }
    let peak = house.daemon.memory("VmHWM");
    assert!(peak < 48 << 10, "the daemon grew to {peak} KiB");
}

#[tokio::test]
async fn a_big_form_in_bounded_memory() {
    let house = House::new();
    let path = house.at("big");
    let head = format!(
        "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{path}\"\r\n\r\n"
    );
    let form = |content: &[u8]| [head.as_bytes(), content, b"\r\n--b--\r\n"].concat();
    // What compresses well is small on the wire and as big as it is here.
    for (content, packed) in [(noise(64 << 20), false), (vec![0; 64 << 20], true)] {
        let mut request = house.http.post(house.files(&[]));
        request = request.header("content-type", "multipart/form-data; boundary=b");
        let mut body = form(&content);
        if packed {
            body = gzip(&body);
            request = request.header("content-encoding", "gzip");
        }
        let response = common::soon("a form", request.body(body).send()).await.unwrap();
        assert_eq!(written(response).await[0]["path"], path);
        assert!(fs::read(&path).unwrap() == content);
        let peak = house.daemon.memory("VmHWM");
        assert!(peak < 48 << 10, "the daemon grew to {peak} KiB");
    }
}

#[tokio::test]
async fn a_form_of_more_files_than_can_be_told_ends_and_keeps_what_came() {
    let house = House::new();
    // What is told of each file has its metadata.
    let value = "v".repeat(4000);
    let part = |number: usize| {
        let path = house.at(&number.to_string());
        let head = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=";
        format!("{head}\"{path}\"\r\n\r\n{number}\r\n")
    };
    if !house.keeps_metadata() {
        return;
    }
    let body: String = (0..4500).map(part).collect::<String>() + "--b--\r\n";
    let request = house.http.post(house.files(&[])).header("x-metadata-k", &value);
    let request = request.header("content-type", "multipart/form-data; boundary=b");
    // Thousands of files on a busy disk take longer than anything else here.
    let sent = tokio::time::timeout(4 * *common::PATIENCE, request.body(body).send()).await;
    let text = rest_error(sent.expect("the form ends").unwrap(), 413).await;
    assert!(text.starts_with("too many files in one form: "), "{text}");
    let count = house.names().len();
    assert!((3000..4500).contains(&count), "{count} files");
    assert_eq!(fs::read(house.at("2999")).unwrap(), b"2999");
}

// What one client cannot take from the others.

/// As `MAX_UPLOADS`.
const UPLOADS: usize = 64;

#[tokio::test]
async fn uploads_that_stall_leave_the_threads_to_others() {
    let house = House::new();
    let mut stalled = Vec::new();
    for number in 0..UPLOADS {
        let cut = CUTS[number % CUTS.len()];
        stalled.push(cut.send(&house, &house.at(&number.to_string()), &noise(1000)).await);
    }
    // Each has its directory too.
    let files = |opened: &Path| opened.starts_with(house.dir()) && opened != house.dir();
    eventually("all are open", || (house.opened(files) == UPLOADS).then_some(()));
    // A newcomer takes the place of one of them.
    assert_eq!(house.upload(&house.at("one more"), &[], "x").await.status(), 200);
    house.is_well().await;
    eventually("the file of that one is gone", || {
        (house.opened(files) == UPLOADS - 1).then_some(())
    });
    // Those who leave make room.
    drop(stalled);
    common::in_time("the others have gone", async || {
        (house.upload(&house.at("late"), &[], "x").await.status() == 200).then_some(())
    })
    .await;
    eventually("nothing else is left", || (house.names() == ["late", "one more"]).then_some(()));
}

#[tokio::test]
async fn without_new_threads_calls_are_answered() {
    let house = House::new();
    // No room for another stack, which is what a thread needs first.
    let room = (house.daemon.memory("VmSize") + 1024) * 1024;
    let limited = std::process::Command::new("prlimit")
        .args(["--pid", &house.daemon.pid().to_string(), &format!("--as={room}")])
        .status();
    if !able("prlimit", limited.is_ok_and(|status| status.success())) {
        return;
    }
    for _ in 0..10 {
        let calls = (0..20).map(|_| house.stat("/"));
        for answer in futures_util::future::join_all(calls).await {
            assert_eq!(answer.unwrap().path, "/");
        }
    }
}

#[tokio::test]
async fn an_upload_survives_that_of_another_who_gives_up() {
    let house = House::new();
    for cut in CUTS {
        let path = house.at("file");
        let first = cut.send(&house, &path, &noise(100_000)).await;
        eventually("it is being written", || {
            house.daemon.unnamed(house.dir()).filter(|size| *size > 50_000)
        });
        written(house.upload(&path, &[], "whole").await).await;
        drop(first);
        eventually("the other is given up", || {
            (house.opened(|opened| opened.starts_with(house.dir())) == 0).then_some(())
        });
        assert_eq!(fs::read(&path).unwrap(), b"whole", "{cut:?}");
        fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn the_last_of_two_uploads_is_there_and_whole() {
    let house = House::new();
    for length in [100_000, BODY_IN_MEMORY + 100_000] {
        let path = house.at("file");
        let mut body = noise(length);
        let mut first = Cut::Length.send(&house, &path, &body).await;
        eventually("it is being written", || {
            house.daemon.unnamed(house.dir()).filter(|size| *size == length as u64)
        });
        written(house.upload(&path, &[], noise(2 * length).split_off(length)).await).await;
        first.send("x").await;
        body.push(b'x');
        assert_eq!(first.answer().await.status, 200);
        assert!(fs::read(&path).unwrap() == body, "{length}");
        fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn the_end_of_the_daemon_leaves_no_half_file() {
    for cut in CUTS {
        let mut house = House { daemon: Daemon::start(&["--shutdown-grace", "0"]), ..House::new() };
        let (new, old) = (house.at("new"), house.put("old", "old"));
        let _uploads = [
            cut.send(&house, &new, &noise(100_000)).await,
            cut.send(&house, &old, &noise(100_000)).await,
        ];
        eventually("it is being written", || {
            house.daemon.unnamed(house.dir()).filter(|size| *size > 50_000)
        });
        house.daemon.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(house.daemon.wait().success());
        assert_eq!(house.names(), ["old"], "{cut:?}");
        assert_eq!(fs::read(&old).unwrap(), b"old", "{cut:?}");
    }
}

#[tokio::test]
async fn a_daemon_that_is_killed_leaves_no_half_file() {
    for cut in CUTS {
        let mut house = House::new();
        let (new, old) = (house.at("new"), house.put("old", "old"));
        let _uploads = [
            cut.send(&house, &new, &noise(100_000)).await,
            cut.send(&house, &old, &noise(BODY_IN_MEMORY + 100_000)).await,
        ];
        let spooled = BODY_IN_MEMORY as u64 / 2;
        eventually("both are being written", || {
            house.daemon.unnamed(house.dir()).filter(|size| *size > spooled)
        });
        house.daemon.signal(nix::sys::signal::Signal::SIGKILL);
        assert!(!house.daemon.wait().success());
        assert_eq!(house.names(), ["old"], "{cut:?}");
        assert_eq!(fs::read(&old).unwrap(), b"old", "{cut:?}");
    }
}

/// What was removed, or put in the way, while a body came.
#[tokio::test]
async fn the_place_of_an_upload_may_change_meanwhile() {
    let house = House::new();
    let being_written = || {
        eventually("it is being written", || {
            house.daemon.unnamed(house.dir()).filter(|size| *size == 1000)
        });
    };
    let body = [noise(1000), b"x".to_vec()].concat();
    // Its directory is removed, and made again.
    let path = house.at("dir/file");
    let mut upload = Cut::Length.send(&house, &path, &body[..1000]).await;
    being_written();
    fs::remove_dir(house.at("dir")).unwrap();
    upload.send("x").await;
    assert_eq!(upload.answer().await.status, 200);
    assert!(fs::read(&path).unwrap() == body);
    // Another file takes the name.
    let path = house.at("taken");
    let mut upload = Cut::Length.send(&house, &path, &body[..1000]).await;
    being_written();
    house.put("taken", "others'");
    set_mode(&path, 0o600);
    upload.send("x").await;
    assert_eq!(upload.answer().await.status, 200);
    assert!(fs::read(&path).unwrap() == body);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    // A directory does, and keeps it.
    let path = house.at("made");
    let mut upload = Cut::Length.send(&house, &path, &body[..1000]).await;
    being_written();
    fs::create_dir(&path).unwrap();
    upload.send("x").await;
    assert_eq!(upload.answer().await.status, 400);
    // One that was there is gone.
    let path = house.put("gone", "old");
    let mut upload = Cut::Length.send(&house, &path, &body[..1000]).await;
    eventually("it is looked at", || {
        (house.opened(|opened| opened == Path::new(&path)) > 0).then_some(())
    });
    fs::remove_file(&path).unwrap();
    upload.send("x").await;
    assert_eq!(upload.answer().await.status, 200);
    assert!(fs::read(&path).unwrap() == body);
    assert_eq!(house.names(), ["dir", "gone", "made", "taken"]);
}

/// A program that runs, killed at the end.
struct Program(std::process::Child);

impl Program {
    fn run(path: &str) -> Self {
        let run = || std::process::Command::new(path).arg("1000").spawn();
        // Another test's child may hold a descriptor of it for a moment.
        Self(eventually("it runs", || run().ok()))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_program_that_runs_is_replaced_and_runs_on() {
    let house = House::new();
    let sleep = fs::read("/bin/sleep").unwrap();
    let watch = CreateWatcherRequest { path: house.at("watched"), ..Default::default() };
    fs::create_dir(house.at("watched")).unwrap();
    let watcher: CreateWatcherResponse =
        house.client.unary("/filesystem.Filesystem/CreateWatcher", &watch).await.unwrap();
    assert!(!watcher.watcher_id.is_empty());
    for name in ["plain", "watched/program", "linked"] {
        let path = house.put(name, &sleep);
        set_mode(&path, 0o755);
        if name == "linked" {
            fs::hard_link(&path, house.at("other-name")).unwrap();
        }
        let mut program = Program::run(&path);
        written(house.upload(&path, &[], "new").await).await;
        assert_eq!(fs::read(&path).unwrap(), b"new", "{name}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755, "{name}");
        assert!(program.0.try_wait().unwrap().is_none(), "{name} runs on");
    }
    assert!(fs::read(house.at("other-name")).unwrap() == sleep, "it is another file by now");
    // With RPC too.
    let path = house.put("rpc", &sleep);
    set_mode(&path, 0o755);
    fs::hard_link(&path, house.at("rpc-link")).unwrap();
    let _program = Program::run(&path);
    let start = write_request::Start { path: path.clone(), ..write_request::Start::default() };
    let chunk = write_request::Chunk { data: "new".into(), ..write_request::Chunk::default() };
    let requests = [
        write_request::Event::Start(start),
        write_request::Event::Chunk(chunk),
        write_request::Event::Commit(write_request::Commit::default()),
    ];
    let requests = requests.map(|event| WriteRequest { event: Some(event) });
    let grpc = Client::new(&house.daemon, Wire::Grpc);
    let mut answer: Messages<WriteResponse> =
        grpc.streams("/filesystem.Filesystem/Write", &requests).await.unwrap();
    assert!(answer.next().await.unwrap().unwrap().committed);
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

/// A body that comes slowly keeps nobody from running what it is to replace.
#[tokio::test]
async fn a_program_can_be_started_while_it_is_being_replaced() {
    let house = House::new();
    let path = house.put("program", fs::read("/bin/sleep").unwrap());
    set_mode(&path, 0o755);
    let mut upload = Cut::Length.send(&house, &path, &noise(1000)).await;
    eventually("it is looked at", || {
        (house.opened(|opened| opened == Path::new(&path)) > 0).then_some(())
    });
    let _program = Program::run(&path);
    upload.send("x").await;
    assert_eq!(upload.answer().await.status, 200);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1001);
}

#[tokio::test]
async fn an_expected_100_comes_when_the_body_is_wanted() {
    let house = House::new();
    let path = house.at("file");
    let mut raw = Raw::open(&house.daemon).await;
    let head = format!(
        "POST /files?path={path} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n\
         content-type: application/octet-stream\r\ncontent-length: 5\r\n\r\n"
    );
    raw.send(&head).await;
    assert_eq!(raw.head().await.0, 100);
    raw.send("hello").await;
    let Answer { status, body, .. } = raw.answer().await;
    assert_eq!(status, 200, "{body:?}");
    assert_eq!(fs::read(PathBuf::from(path)).unwrap(), b"hello");
}
