//! What the tests of files share: a daemon with a directory, and its calls in one word.

use std::{fs, io::Write, os::unix::fs::PermissionsExt, path::Path};

use envd::proto::filesystem::{
    EntryInfo, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest,
    MoveResponse, RemoveRequest, RemoveResponse, StatRequest, StatResponse,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use reqwest::{Method, Response, multipart};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    Daemon, able, able_as_root,
    raw::Raw,
    rpc::{Client, Failure, Wire},
    soon,
};

/// Beyond it, a body for a file that exists waits on the disk.
pub const BODY_IN_MEMORY: usize = 1 << 20;

/// A daemon, its clients, and a directory to work in.
pub struct House {
    pub daemon: Daemon,
    pub client: Client,
    pub http: reqwest::Client,
    pub tmp: TempDir,
}

impl House {
    pub fn new() -> Self {
        Self::with(Daemon::start(&[]))
    }

    pub fn with(daemon: Daemon) -> Self {
        let client = Client::new(&daemon, Wire::Connect { json: true });
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let tmp = tempfile::tempdir().unwrap();
        fs::set_permissions(tmp.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self { daemon, client, http, tmp }
    }

    pub fn dir(&self) -> &Path {
        self.tmp.path()
    }

    /// The path of a name in the directory.
    pub fn at(&self, name: &str) -> String {
        self.dir().join(name).to_str().unwrap().to_owned()
    }

    pub fn put(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.dir().join(name), content).unwrap();
        self.at(name)
    }

    pub async fn stat(&self, path: &str) -> Result<EntryInfo, Failure> {
        let request = StatRequest { path: path.to_owned() };
        let answer: StatResponse =
            self.client.unary("/filesystem.Filesystem/Stat", &request).await?;
        Ok(answer.entry.unwrap())
    }

    pub async fn make_dir(&self, path: &str) -> Result<EntryInfo, Failure> {
        let request = MakeDirRequest { path: path.to_owned() };
        let answer: MakeDirResponse =
            self.client.unary("/filesystem.Filesystem/MakeDir", &request).await?;
        Ok(answer.entry.unwrap())
    }

    pub async fn rename(&self, from: &str, to: &str) -> Result<EntryInfo, Failure> {
        let request = MoveRequest { source: from.to_owned(), destination: to.to_owned() };
        let answer: MoveResponse =
            self.client.unary("/filesystem.Filesystem/Move", &request).await?;
        Ok(answer.entry.unwrap())
    }

    pub async fn list(&self, path: &str, depth: u32) -> Result<Vec<EntryInfo>, Failure> {
        let request = ListDirRequest { path: path.to_owned(), depth, ..ListDirRequest::default() };
        let answer: ListDirResponse =
            self.client.unary("/filesystem.Filesystem/ListDir", &request).await?;
        Ok(answer.entries)
    }

    pub async fn remove(&self, path: &str) -> Result<(), Failure> {
        let request = RemoveRequest { path: path.to_owned() };
        let answer = self.client.unary("/filesystem.Filesystem/Remove", &request).await;
        answer.map(|_: RemoveResponse| ())
    }

    /// The URL of `/files` with these parameters.
    pub fn files(&self, parameters: &[(&str, &str)]) -> reqwest::Url {
        let url = self.daemon.url("/files");
        reqwest::Url::parse_with_params(&url, parameters).unwrap()
    }

    pub async fn download(&self, path: &str) -> Response {
        let url = self.files(&[("path", path)]);
        soon("a download", self.http.get(url).send()).await.unwrap()
    }

    /// An upload of one body, with more parameters and headers.
    pub async fn upload(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Vec<u8>>,
    ) -> Response {
        let mut request = self.http.post(self.files(&[("path", path)]));
        request = request.header("content-type", "application/octet-stream");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        soon("an upload", request.body(body.into()).send()).await.unwrap()
    }

    pub async fn upload_form(
        &self,
        parameters: &[(&str, &str)],
        form: multipart::Form,
    ) -> Response {
        let request = self.http.post(self.files(parameters)).multipart(form);
        soon("an upload", request.send()).await.unwrap()
    }

    pub async fn call(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
        let mut request = self.http.request(method, self.daemon.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        soon(path, request.send()).await.unwrap()
    }

    pub async fn is_well(&self) {
        assert_eq!(self.call(Method::GET, "/health", &[]).await.status(), 204);
        assert_eq!(self.stat("/").await.unwrap().path, "/");
    }

    /// How many of the daemon's descriptors lead to a path that `check` likes.
    pub fn opened(&self, check: impl Fn(&Path) -> bool) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).unwrap();
        fds.filter(|fd| {
            let target = fs::read_link(fd.as_ref().unwrap().path());
            target.is_ok_and(|target| check(&target))
        })
        .count()
    }

    /// The names in the directory.
    pub fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.dir()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Whether files here can have metadata.
    pub fn keeps_metadata(&self) -> bool {
        let probe = self.put("probe", "");
        let possible = xattr::set(&probe, "user.probe", b"x").is_ok();
        fs::remove_file(probe).unwrap();
        able("a file system with extended attributes under the temporary directory", possible)
    }
}

/// A mount that goes with the test.
pub struct Mounted(String);

impl Mounted {
    /// What is mounted already.
    pub fn there(at: &str) -> Self {
        Self(at.to_owned())
    }

    pub fn path(&self) -> &str {
        &self.0
    }

    /// A small disk; none where this machine allows no mounts.
    pub fn tmpfs(at: &str, options: &str) -> Option<Self> {
        if !able_as_root() {
            return None;
        }
        fs::create_dir_all(at).unwrap();
        let done = mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options));
        able("the right to mount", done.is_ok()).then(|| Self(at.to_owned()))
    }

    pub fn remount_read_only(&self) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, self.0.as_str(), None::<&str>, flags, None::<&str>).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(self.0.as_str(), MntFlags::MNT_DETACH);
    }
}

pub fn failure(code: &str, message: impl Into<String>) -> Failure {
    Failure { code: code.to_owned(), message: message.into() }
}

pub fn set_mode(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

pub fn group_name() -> String {
    let gid = nix::unistd::getegid();
    nix::unistd::Group::from_gid(gid).unwrap().map_or_else(|| gid.to_string(), |group| group.name)
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The message of a REST error, once its shape has been checked.
pub async fn rest_error(response: Response, status: u16) -> String {
    assert_eq!(response.status(), status, "{response:?}");
    assert_eq!(response.headers()["content-type"], "application/json; charset=utf-8");
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    let text = response.text().await.unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let message = value["message"].as_str().unwrap().to_owned();
    assert_eq!(value, json!({ "code": status, "message": message }));
    assert!(text.ends_with("}\n"), "{text:?}");
    message
}

pub async fn written(response: Response) -> Value {
    let status = response.status();
    let text = response.text().await.unwrap();
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// A way to send the beginning of an upload.
#[derive(Debug, Clone, Copy)]
pub enum Cut {
    Length,
    Chunked,
    Gzip,
    Form,
}

impl Cut {
    /// Sends the whole head and a part of the body.
    pub async fn send(self, house: &House, path: &str, body: &[u8]) -> Raw {
        let mut raw = Raw::open(&house.daemon).await;
        let mut head = format!("POST /files?path={path} HTTP/1.1\r\nhost: localhost\r\n");
        head += match self {
            Self::Form => "content-type: multipart/form-data; boundary=b\r\n",
            _ => "content-type: application/octet-stream\r\n",
        };
        let (packed, form);
        let body = match self {
            Self::Gzip => {
                head += "content-encoding: gzip\r\n";
                packed = gzip(body);
                &packed[..packed.len() - 4]
            }
            Self::Form => {
                let start =
                    "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n";
                form = [start.as_bytes(), body].concat();
                &form
            }
            _ => body,
        };
        if let Self::Chunked = self {
            raw.send(head + "transfer-encoding: chunked\r\n\r\n").await;
            raw.send_chunk(body).await;
        } else {
            raw.send(head + &format!("content-length: {}\r\n\r\n", body.len() + 1)).await;
            raw.send(body).await;
        }
        raw
    }
}

pub const CUTS: [Cut; 4] = [Cut::Length, Cut::Chunked, Cut::Gzip, Cut::Form];
