//! Downloads: `GET /files`.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs, os::unix::fs::symlink};

use common::{
    able_at_home,
    house::{House, rest_error},
    me, noise,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use reqwest::Method;

// Downloads.

#[tokio::test]
async fn a_file_is_downloaded_as_it_is() {
    let house = House::new();
    let bytes = noise(3 << 20);
    for (name, content, disposition) in [
        ("file.txt", &b"text"[..], "inline; filename=file.txt"),
        ("two words", &bytes, "inline; filename=\"two words\""),
        ("empty", b"", "inline; filename=empty"),
        ("\u{e4}", b"x", "inline; filename*=utf-8''%C3%A4"),
    ] {
        let path = house.put(name, content);
        let url = house.files(&[("path", &path)]);
        let request = house.http.get(url).header("accept-encoding", "gzip, deflate, br");
        let response = common::soon(name, request.send()).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-length"], content.len().to_string(), "{name}");
        assert_eq!(response.headers()["content-disposition"], disposition);
        assert_eq!(response.headers()["vary"], "Accept-Encoding", "{name}");
        assert!(!response.headers().contains_key("content-encoding"));
        assert!(response.bytes().await.unwrap() == content, "{name}");
    }
    // Through links, and with `~`.
    symlink("file.txt", house.at("link")).unwrap();
    let response = house.download(&house.at("link")).await;
    assert_eq!(response.text().await.unwrap(), "text");
}

#[tokio::test]
async fn files_that_say_they_are_empty_and_are_not() {
    let house = House::new();
    let response = house.download("/proc/version").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.bytes().await.unwrap(), fs::read("/proc/version").unwrap());
}

#[tokio::test]
async fn files_that_say_they_are_longer_than_they_are() {
    let house = House::new();
    // Those of /sys say 4096.
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    if !common::able("sysfs with transparent huge pages", fs::metadata(path).is_ok()) {
        return;
    }
    let content = fs::read(path).unwrap();
    assert!(fs::metadata(path).unwrap().len() > content.len() as u64);
    for headers in [&[][..], &[("range", "bytes=0-3")]] {
        let response = house.get(path, headers).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.bytes().await.unwrap(), content);
    }
    let request = envd::proto::filesystem::ReadRequest { path: path.into(), ..Default::default() };
    let mut messages: common::rpc::Messages<envd::proto::filesystem::ReadResponse> =
        house.client.stream("/filesystem.Filesystem/Read", &request).await.unwrap();
    let mut read = Vec::new();
    while let Some(message) = messages.next().await.unwrap() {
        if let Some(envd::proto::filesystem::read_response::Event::Data(data)) = message.event {
            read.extend_from_slice(&data);
        }
    }
    assert_eq!(read, content);
}

#[tokio::test]
async fn what_cannot_be_downloaded() {
    let house = House::new();
    let missing = house.at("<missing> & gone");
    let response = house.download(&missing).await;
    assert_eq!(rest_error(response, 404).await, format!("path '{missing}' does not exist"));
    let raw = house.download(&missing).await.text().await.unwrap();
    assert!(raw.contains(r"\u003cmissing\u003e \u0026 gone"), "{raw}");

    let response = house.download(&house.at("")).await;
    assert_eq!(rest_error(response, 400).await, format!("path '{}' is a directory", house.at("")));
    let fifo = house.at("fifo");
    mkfifo(fifo.as_str(), Mode::from_bits_truncate(0o666)).unwrap();
    let response = house.download(&fifo).await;
    assert_eq!(rest_error(response, 400).await, format!("path '{fifo}' is not a regular file"));

    let below = format!("{}/x", house.put("file", ""));
    let text = rest_error(house.download(&below).await, 500).await;
    let expected =
        format!("error checking if path exists '{below}': stat {below}: not a directory");
    assert_eq!(text, expected);
    let text = rest_error(house.download("~other/x").await, 400).await;
    assert!(text.starts_with("error expanding and resolving path '~other/x': "), "{text}");
    // No path is the home directory.
    if able_at_home() {
        let response = house.call(Method::GET, "/files", &[]).await;
        let expected = format!("path '{}' is a directory", me().dir.display());
        assert_eq!(rest_error(response, 400).await, expected);
    }
}

#[tokio::test]
async fn the_query_of_files() {
    let house = House::new();
    let name = me().name;
    for (file, written) in
        [("a b", "a+b"), ("a b", "a%20b"), ("a+b", "a%2Bb"), ("\u{e4}", "%C3%A4")]
    {
        house.put(file, file);
        let path = format!("/files?path={}/{written}&username={name}", house.at(""));
        let response = house.call(Method::GET, &path, &[]).await;
        assert_eq!(response.text().await.unwrap(), file, "{written}");
    }
    let file = house.put("file", "x");
    let own = house.files(&[("path", &file), ("signature", "v1_x"), ("other", "y")]);
    assert_eq!(house.http.get(own).send().await.unwrap().status(), 200);
    for user in ["nobody-at-all", ""] {
        let url = house.files(&[("path", &file), ("username", user)]);
        let text = rest_error(house.http.get(url.clone()).send().await.unwrap(), 401).await;
        let expected = format!("error looking up user '{user}': user: unknown user {user}");
        assert_eq!(text, expected);
        let upload = house.http.post(url).header("content-type", "application/octet-stream");
        assert_eq!(rest_error(upload.body("new").send().await.unwrap(), 401).await, expected);
    }
    for twice in
        [[("path", file.as_str()), ("path", &file)], [("username", &name), ("username", &name)]]
    {
        let response = house.http.get(house.files(&twice)).send().await.unwrap();
        assert_eq!(response.status(), 400, "{twice:?}");
    }
    for query in ["fsync=1", "mode=rw", "username=%ff"] {
        let path = format!("/files?path={file}&{query}");
        let text = rest_error(house.call(Method::GET, &path, &[]).await, 400).await;
        let (name, _) = query.split_once('=').unwrap();
        assert!(text.starts_with("invalid query: ") && text.contains(name), "{text}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"x");
}

#[tokio::test]
async fn the_type_of_a_file_is_that_of_its_name_or_of_its_content() {
    let house = House::new();
    for (name, content, wanted) in [
        ("a.mjs", &b"x"[..], "text/javascript; charset=utf-8"),
        ("a.HTML", b"", "text/html; charset=utf-8"),
        ("a.wasm", b"", "application/wasm"),
        ("page", b"\n<!DOCTYPE html>", "text/html; charset=utf-8"),
        ("latin", b"caf\xe9", "text/plain; charset=utf-8"),
        ("program", b"\x7fELF\x02", "application/octet-stream"),
        ("font.no-such-extension", b"wOF2\0\x01", "font/woff2"),
    ] {
        let answer = house.download(&house.put(name, content)).await;
        assert_eq!(answer.headers()["content-type"], wanted, "{name}");
    }
}

// Parts, conditions and compression.

impl House {
    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> reqwest::Response {
        let mut request = self.http.get(self.files(&[("path", path)]));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        common::soon("a download", request.send()).await.unwrap()
    }
}

#[tokio::test]
async fn parts_of_a_file() {
    let house = House::new();
    let content = noise(300_000);
    let path = house.put("file", &content);
    for (range, start, end) in [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=299990-", 299_990, 300_000),
        ("bytes=-5", 299_995, 300_000),
        ("bytes=10-999999999", 10, 300_000),
    ] {
        let response = house.get(&path, &[("range", range), ("accept-encoding", "gzip")]).await;
        assert_eq!(response.status(), 206, "{range}");
        let told = format!("bytes {start}-{}/300000", end - 1);
        assert_eq!(response.headers()["content-range"], told);
        assert_eq!(response.headers()["content-length"], (end - start).to_string());
        assert_eq!(response.headers()["accept-ranges"], "bytes");
        assert!(!response.headers().contains_key("content-encoding"));
        assert!(response.bytes().await.unwrap() == content[start..end], "{range}");
    }
    // All of it, where the ranges are more than that.
    let response = house.get(&path, &[("range", "bytes=0-200000,100000-")]).await;
    assert_eq!(response.status(), 200);
    assert!(response.bytes().await.unwrap() == content);

    let response = house.get(&path, &[("range", "bytes=300000-")]).await;
    assert_eq!(response.status(), 416);
    assert_eq!(response.headers()["content-range"], "bytes */300000");
    assert_eq!(response.text().await.unwrap(), "invalid range: failed to overlap\n");
    let response = house.get(&path, &[("range", "bytes=2-1")]).await;
    assert_eq!(response.status(), 416);
    assert_eq!(response.text().await.unwrap(), "invalid range\n");
    let response = house.get(&house.put("empty", ""), &[("range", "bytes=0-5")]).await;
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn several_parts_at_once() {
    let house = House::new();
    let path = house.put("file.html", "0123456789");
    let response = house.get(&path, &[("range", "bytes=1-2, 5-5,-2")]).await;
    assert_eq!(response.status(), 206);
    let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
    let boundary = kind.strip_prefix("multipart/byteranges; boundary=").unwrap();
    let length: usize = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
    let body = response.text().await.unwrap();
    let part = |range: &str, text: &str| {
        format!(
            "--{boundary}\r\nContent-Range: bytes {range}/10\r\n\
             Content-Type: text/html; charset=utf-8\r\n\r\n{text}\r\n"
        )
    };
    let expected = part("1-2", "12") + &part("5-5", "5") + &part("8-9", "89");
    assert_eq!(body, format!("{expected}--{boundary}--\r\n"));
    assert_eq!(body.len(), length);
}

#[tokio::test]
async fn conditions_on_a_file() {
    let house = House::new();
    let path = house.put("file", "content");
    let response = house.get(&path, &[]).await;
    let tag = response.headers()["etag"].to_str().unwrap().to_owned();
    let modified = response.headers()["last-modified"].to_str().unwrap().to_owned();
    let long_ago = "Sun, 09 Sep 2001 01:46:40 GMT";
    for (headers, status) in [
        (&[("if-none-match", tag.as_str())][..], 304),
        (&[("if-none-match", "\"other\"")], 200),
        (&[("if-modified-since", modified.as_str())], 304),
        (&[("if-modified-since", long_ago)], 200),
        (&[("if-match", tag.as_str())], 200),
        (&[("if-match", "\"other\"")], 412),
        (&[("if-unmodified-since", long_ago)], 412),
        (&[("range", "bytes=0-1"), ("if-range", tag.as_str())], 206),
        (&[("range", "bytes=0-1"), ("if-range", "\"other\"")], 200),
        (&[("range", "bytes=0-1"), ("if-range", modified.as_str())], 206),
        (&[("range", "bytes=0-1"), ("if-none-match", tag.as_str())], 304),
    ] {
        let response = house.get(&path, headers).await;
        assert_eq!(response.status(), status, "{headers:?}");
        assert_eq!(response.headers()["vary"], "Accept-Encoding", "{headers:?}");
        assert_eq!(response.headers()["etag"], tag, "{headers:?}");
        if status == 304 || status == 412 {
            assert_eq!(response.bytes().await.unwrap(), "");
        }
    }
    // Another content of the same length is another file.
    fs::write(house.at("other"), "CONTENT").unwrap();
    fs::rename(house.at("other"), &path).unwrap();
    assert_eq!(house.get(&path, &[("if-none-match", &tag)]).await.status(), 200);
}

#[tokio::test]
async fn what_gets_smaller_is_compressed_for_those_who_accept_it() {
    use std::io::Read;
    let house = House::new();
    let text = "all work and no play makes jack a dull boy\n".repeat(5000);
    let long = house.put("long.txt", &text);
    let short = house.put("short.txt", "short");
    let image = house.put("image.png", &text);
    let unknown = house.put("unknown", noise(200_000));
    for (path, accepts, gzip) in [
        (&long, "gzip, deflate", true),
        (&long, "GZIP;q=0.3", true),
        (&long, "identity, gzip", false),
        (&long, "br", false),
        (&short, "gzip", false),
        (&short, "gzip, identity;q=0", true),
        (&image, "gzip", false),
        (&image, "*;q=0, gzip", true),
        (&unknown, "gzip", false),
    ] {
        let response = house.get(path, &[("accept-encoding", accepts)]).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers().contains_key("content-encoding"), gzip, "{path} {accepts}");
        let body = response.bytes().await.unwrap();
        let content = fs::read(path).unwrap();
        if gzip {
            let mut plain = Vec::new();
            flate2::read::GzDecoder::new(body.as_ref()).read_to_end(&mut plain).unwrap();
            assert!(plain == content, "{path} {accepts}");
            assert!(body.len() < content.len() + 30);
        } else {
            assert!(body == content, "{path} {accepts}");
        }
    }
    let response = house.get(&long, &[("accept-encoding", "identity;q=0")]).await;
    let expected = "error parsing Accept-Encoding: no acceptable encoding found, supported: [gzip]";
    assert_eq!(rest_error(response, 406).await, expected);
    let headers = [("accept-encoding", "gzip, identity;q=0"), ("range", "bytes=0-1")];
    let expected = "identity encoding not acceptable for Range or conditional request";
    assert_eq!(rest_error(house.get(&long, &headers).await, 406).await, expected);
}

#[tokio::test]
async fn a_head_is_the_answer_without_its_body() {
    let house = House::new();
    let path = house.put("file.json", "{}");
    let url = house.files(&[("path", &path)]);
    let response = common::soon("a head", house.http.head(url).send()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-length"], "2");
    assert_eq!(response.headers()["content-type"], "application/json");
    assert!(response.headers().contains_key("etag"));
    let url = house.files(&[("path", &house.at("no"))]);
    assert_eq!(house.http.head(url).send().await.unwrap().status(), 404);
}
