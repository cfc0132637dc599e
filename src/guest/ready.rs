//! Telling the host that the daemon is ready.
//!
//! A host cannot see when its guest can be called: some transports accept a connection long before
//! anybody listens behind it. So the daemon calls the host once, with one line of JSON:
//!
//! ```json
//! {"version":"0.1.0","kernel_us":310000,"init_us":350000,"ready_us":370000,"addresses":["tcp://0.0.0.0:49983","vsock://49983"],"state":"ready"}
//! ```
//!
//! `state` is that of the template. Where it is not `ready` yet, the daemon calls a second time when
//! it is `ready` or has `failed`, then with a `reason`.

use std::{io, time::Duration};

use serde::Serialize;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time::{Instant, sleep, timeout_at},
};

use super::boot::Times;

/// How long it is tried.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one try may take.
const ONE_TRY: Duration = Duration::from_secs(5);
/// The first pause between tries, and the longest that it grows to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The message.
#[derive(Debug, Serialize)]
pub struct Message<'a> {
    /// envd's version.
    version: &'static str,
    kernel_us: Option<u64>,
    init_us: Option<u64>,
    ready_us: u64,
    addresses: &'a [String],
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

impl<'a> Message<'a> {
    /// What a daemon with these times and listeners has to tell, and how its template stands.
    pub fn new(
        times: Times,
        addresses: &'a [String],
        state: &'static str,
        reason: Option<&'a str>,
    ) -> Self {
        let Times { kernel_us, init_us, ready_us } = times;
        let version = crate::version::OWN;
        Self { version, kernel_us, init_us, ready_us, addresses, state, reason }
    }

    /// As one line.
    pub fn line(&self) -> String {
        // Numbers and strings always serialise.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }
}

/// Connects and writes the line, again and again until it has worked once or the time is over.
///
/// # Errors
/// What the last try failed with.
pub async fn tell<S, F>(line: &str, mut connect: impl FnMut() -> F) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
    F: Future<Output = io::Result<S>>,
{
    let deadline = Instant::now() + PATIENCE;
    let mut pause = PAUSES.0;
    loop {
        let end = deadline.min(Instant::now() + ONE_TRY);
        let told = timeout_at(end, async {
            let mut stream = connect().await?;
            stream.write_all(line.as_bytes()).await?;
            stream.shutdown().await
        });
        let error = match told.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
        if Instant::now() + pause >= deadline {
            return Err(error);
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}
