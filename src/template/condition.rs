//! What envd can see by itself, with no program of the image: a port that is listened on, an answer
//! over HTTP, a process, a file, that time has passed.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use crate::{blocking::Pool, sys::procfs};

/// How long one request of a URL may take.
const REQUEST: Duration = Duration::from_secs(10);
/// The bytes of a process's name that the kernel keeps (`TASK_COMM_LEN` without its NUL).
const MAX_NAME: usize = 15;

/// A condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Somebody listens on this TCP port, or has bound this UDP port, whatever the address.
    Port(u16),
    /// A GET is answered with this status.
    Url {
        /// Where.
        url: Uri,
        /// The status.
        status: u16,
    },
    /// A process has this name: as the kernel knows it, or as its program's file is called.
    Process(String),
    /// There is a regular file, perhaps behind links.
    File(PathBuf),
    /// This much time has passed.
    Delay(Duration),
}

/// What is no condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConditionError {
    /// No port.
    #[error("port: {0} is not between 1 and 65535")]
    Port(String),
    /// No URL, or of a scheme that is not spoken.
    #[error("url: '{0}' is not http://HOST[:PORT][/PATH]")]
    Url(String),
    /// No status.
    #[error("status: {0} is not between 100 and 999")]
    Status(i64),
    /// No name.
    #[error("process: the name is empty or contains a slash")]
    Process,
    /// Not absolute.
    #[error("file: '{0}' is not absolute")]
    File(String),
    /// No time.
    #[error("delay: '{0}' is no time; write 2s or 500ms")]
    Delay(String),
    /// None of these.
    #[error(
        "'{0}' is no condition; write port:N, url:http://..., process:NAME, file:/PATH or delay:2s"
    )]
    Unknown(String),
}

impl Condition {
    /// A port.
    ///
    /// # Errors
    /// [`ConditionError::Port`].
    pub fn port(port: i64) -> Result<Self, ConditionError> {
        match u16::try_from(port) {
            Ok(port) if port > 0 => Ok(Self::Port(port)),
            _ => Err(ConditionError::Port(port.to_string())),
        }
    }

    /// A URL and the status that it shall have.
    ///
    /// # Errors
    /// [`ConditionError::Url`], [`ConditionError::Status`].
    pub fn url(text: &str, status: i64) -> Result<Self, ConditionError> {
        let url: Uri = text.parse().map_err(|_| ConditionError::Url(text.to_owned()))?;
        if url.scheme_str() != Some("http") || url.host().is_none_or(str::is_empty) {
            return Err(ConditionError::Url(text.to_owned()));
        }
        match u16::try_from(status) {
            Ok(status @ 100..=999) => Ok(Self::Url { url, status }),
            _ => Err(ConditionError::Status(status)),
        }
    }

    /// A process.
    ///
    /// # Errors
    /// [`ConditionError::Process`].
    pub fn process(name: &str) -> Result<Self, ConditionError> {
        match name.is_empty() || name.contains(['/', '\0']) {
            true => Err(ConditionError::Process),
            false => Ok(Self::Process(name.to_owned())),
        }
    }

    /// A file.
    ///
    /// # Errors
    /// [`ConditionError::File`].
    pub fn file(path: &str) -> Result<Self, ConditionError> {
        match path.starts_with('/') && !path.contains('\0') {
            true => Ok(Self::File(path.into())),
            false => Err(ConditionError::File(path.to_owned())),
        }
    }

    /// Looks whether it holds; what blocks does so on `pool`. A delay holds when it has passed.
    ///
    /// # Errors
    /// Why it does not hold, in words.
    pub async fn check(&self, pool: &Arc<Pool>) -> Result<(), String> {
        let look: Box<dyn FnOnce() -> Result<(), String> + Send> = match self {
            Self::Delay(delay) => {
                tokio::time::sleep(*delay).await;
                return Ok(());
            }
            Self::Url { url, status } => {
                let answer = timeout(REQUEST, get(url)).await;
                let url = without_secrets(url);
                return match answer {
                    Ok(Ok(answered)) if answered == *status => Ok(()),
                    Ok(Ok(answered)) => Err(format!("{url} answered {answered}, not {status}")),
                    Ok(Err(error)) => Err(format!("{url}: {error}")),
                    Err(_) => Err(format!("{url} did not answer within 10 s")),
                };
            }
            Self::Port(port) => {
                let port = *port;
                Box::new(move || match is_bound(port) {
                    true => Ok(()),
                    false => Err(format!("nobody listens on port {port}")),
                })
            }
            Self::Process(name) => {
                let name = name.clone();
                Box::new(move || match is_running(&name) {
                    true => Ok(()),
                    false => Err(format!("no process is called '{name}'")),
                })
            }
            Self::File(path) => {
                let path = path.clone();
                Box::new(move || match fs::metadata(&path) {
                    Ok(meta) if meta.is_file() => Ok(()),
                    Ok(_) => Err(format!("'{}' is no regular file", path.display())),
                    Err(error) => Err(format!("'{}': {error}", path.display())),
                })
            }
        };
        pool.run(look).await.unwrap_or_else(|busy| Err(busy.to_string()))
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "port:{port}"),
            Self::Url { url, .. } => write!(f, "url:{url}"),
            Self::Process(name) => write!(f, "process:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Delay(delay) => write!(f, "delay:{}", humantime::format_duration(*delay)),
        }
    }
}

/// As on the command line: `port:8080`. A URL's status is 200.
impl FromStr for Condition {
    type Err = ConditionError;

    fn from_str(text: &str) -> Result<Self, ConditionError> {
        let unknown = || ConditionError::Unknown(text.to_owned());
        let (kind, value) = text.split_once(':').ok_or_else(unknown)?;
        match kind {
            "port" => match value.parse() {
                Ok(port) => Self::port(port),
                Err(_) => Err(ConditionError::Port(format!("'{value}'"))),
            },
            "url" => Self::url(value, 200),
            "process" => Self::process(value),
            "file" => Self::file(value),
            "delay" => match humantime::parse_duration(value) {
                Ok(delay) => Ok(Self::Delay(delay)),
                Err(_) => Err(ConditionError::Delay(value.to_owned())),
            },
            _ => Err(unknown()),
        }
    }
}

/// A URL as everybody may read it in `/health`: a password or a key may be in the rest.
fn without_secrets(url: &Uri) -> String {
    let authority = url.authority().map_or("", http::uri::Authority::as_str);
    let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
    format!("http://{place}{}", url.path())
}

/// The status that a GET is answered with.
async fn get(url: &Uri) -> Result<u16, String> {
    let text = |error: &dyn fmt::Display| error.to_string();
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let address = (host, url.port_u16().unwrap_or(80));
    let stream = TcpStream::connect(address).await.map_err(|error| text(&error))?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
    let request = Request::builder()
        .uri(url.path_and_query().map_or("/", http::uri::PathAndQuery::as_str))
        .header(header::HOST, url.authority().map_or(host, http::uri::Authority::as_str))
        .header(header::USER_AGENT, concat!("envd/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| text(&error))?;
    let answer = sender.send_request(request);
    tokio::pin!(answer);
    tokio::select! {
        biased;
        answer = &mut answer => answer.map(|answer| answer.status().as_u16()).map_err(|error| text(&error)),
        ended = connection => {
            ended.map_err(|error| text(&error))?;
            answer.await.map(|answer| answer.status().as_u16()).map_err(|error| text(&error))
        }
    }
}

/// What `ss -tuln` would show: proc_net_tcp of the kernel's documentation.
fn is_bound(port: u16) -> bool {
    use procfs::{TCP_LISTEN, UDP_UNCONNECTED};
    let tables = [
        ("tcp", TCP_LISTEN),
        ("tcp6", TCP_LISTEN),
        ("udp", UDP_UNCONNECTED),
        ("udp6", UDP_UNCONNECTED),
    ];
    tables.into_iter().any(|(table, state)| {
        let table = fs::read(Path::new("/proc/net").join(table)).unwrap_or_default();
        let is_it = |socket: procfs::Socket| socket.local.port() == port && socket.state == state;
        procfs::sockets(&table).any(is_it)
    })
}

fn is_running(name: &str) -> bool {
    let Ok(mut pids) = procfs::pids() else { return false };
    pids.any(|pid| is_called(&Path::new("/proc").join(pid.to_string()), name).unwrap_or(false))
}

/// By the name that the kernel keeps, which a thread may change, or by the first argument.
fn is_called(process: &Path, name: &str) -> io::Result<bool> {
    let comm = fs::read(process.join("comm"))?;
    let comm = comm.strip_suffix(b"\n").unwrap_or(&comm);
    if comm == name.as_bytes() {
        return Ok(true);
    }
    // Only a name that was cut leaves room for doubt.
    let cut = name.as_bytes().get(..MAX_NAME);
    if name.len() > MAX_NAME && cut != Some(comm) {
        return Ok(false);
    }
    let cmdline = fs::read(process.join("cmdline"))?;
    let program = cmdline.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(program.rsplit(|byte| *byte == b'/').next() == Some(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_command_line() {
        for text in
            ["port:80", "url:http://localhost:1/a?b=c", "process:nginx", "file:/a b", "delay:2s"]
        {
            assert_eq!(text.parse::<Condition>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "port",
            "port:",
            "port:0",
            "port:x",
            "url:https://x",
            "url:/x",
            "process:",
            "process:a/b",
            "file:x",
            "delay:x",
            "what:x",
        ] {
            assert!(text.parse::<Condition>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn what_a_url_may_hide_is_not_told() {
        let pool = Pool::new("test", 0, 1);
        let url = Condition::url("http://user:secret@127.0.0.1:1/up?key=secret", 200).unwrap();
        let error = url.check(&pool).await.unwrap_err();
        assert!(error.starts_with("http://127.0.0.1:1/up: "), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[tokio::test]
    async fn conditions_of_this_very_process() {
        let pool = Pool::new("test", 0, 1);
        // Once it is free, another test may be given the port: one of several is nobody's.
        let mut free = Ok(());
        for _ in 0..20 {
            let listener = std::net::TcpListener::bind("[::1]:0")
                .or_else(|_| std::net::TcpListener::bind("127.0.0.1:0"))
                .unwrap();
            let port = Condition::Port(listener.local_addr().unwrap().port());
            port.check(&pool).await.unwrap();
            drop(listener);
            free = port.check(&pool).await;
            if free.is_err() {
                break;
            }
        }
        assert!(free.unwrap_err().contains("nobody listens"));
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        Condition::Port(socket.local_addr().unwrap().port()).check(&pool).await.unwrap();

        let comm = fs::read_to_string("/proc/self/comm").unwrap();
        Condition::Process(comm.trim_end().to_owned()).check(&pool).await.unwrap();
        let exe = std::env::current_exe().unwrap();
        let exe = exe.file_name().unwrap().to_str().unwrap();
        Condition::Process(exe.to_owned()).check(&pool).await.unwrap();
        Condition::Process("no-such-process".into()).check(&pool).await.unwrap_err();

        Condition::File("/proc/self/comm".into()).check(&pool).await.unwrap();
        let error = Condition::File("/proc".into()).check(&pool).await.unwrap_err();
        assert!(error.contains("no regular file"), "{error}");
        Condition::Delay(Duration::from_millis(1)).check(&pool).await.unwrap();
        let closed = Condition::url("http://127.0.0.1:1/", 200).unwrap();
        assert!(closed.check(&pool).await.unwrap_err().contains("127.0.0.1:1"));
    }
}
