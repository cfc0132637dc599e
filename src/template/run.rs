//! From the start command to the answer.

use std::{fmt, future::pending, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::{
    MAX_TAIL, Source, State, Template,
    config::{Command, Config, Ready, Restart},
};
use crate::{
    blocking::Pool,
    process::{
        Channel, Ending, Event, Found, Manager, Process, StartSpec, Subscription,
        journal::{Attach, Piece},
    },
};

/// The tag of the start command among the processes.
const START_TAG: &str = "template-start";
/// The tag of a ready command.
const READY_TAG: &str = "template-ready";
/// The first pause before the start command is started again, and the longest that it grows to.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A start command that has run for this long has its first pause again.
const STEADY: Duration = Duration::from_secs(60);

/// What it takes to run a template's commands.
pub struct Launcher {
    /// Where they become processes.
    pub processes: Arc<Manager>,
    /// Where conditions are looked at.
    pub pool: Arc<Pool>,
    /// What a command and its arguments are as a process of this sandbox, or why they are none.
    pub spec: Specify,
}

/// Makes a program a process of this sandbox.
pub type Specify = Box<dyn Fn(&Config, Program) -> Result<StartSpec, String> + Send + Sync>;

impl fmt::Debug for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launcher").field("processes", &self.processes).finish_non_exhaustive()
    }
}

/// A command of the template's as a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its name or path.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Which of the two commands it is.
    pub source: Source,
}

impl Program {
    /// What its process is tagged with.
    pub fn tag(&self) -> &'static str {
        match self.source {
            Source::Start => START_TAG,
            Source::Ready => READY_TAG,
        }
    }

    fn new(command: &Command, source: Source) -> Self {
        match command {
            Command::Shell(text) => Self {
                cmd: "/bin/bash".to_owned(),
                args: vec!["-l".to_owned(), "-c".to_owned(), text.clone()],
                source,
            },
            Command::Program(words) => {
                let mut words = words.iter().cloned();
                Self { cmd: words.next().unwrap_or_default(), args: words.collect(), source }
            }
        }
    }
}

/// Why the template is not ready (any more).
enum Failure {
    /// The start command is gone.
    Start(String),
    /// The time is over.
    Late(String),
}

/// Runs the template until it has failed; if it never fails, for ever. Without a template it
/// returns at once.
pub async fn run(template: Arc<Template>, launcher: Launcher) {
    let Some(config) = template.config() else { return };
    let mut pause = BACKOFF.0;
    let mut deadline = Instant::now() + config.timeout;
    loop {
        let begun = Instant::now();
        let failure = round(&template, config, &launcher, deadline).await;
        let was_ready = template.status().state == State::Ready;
        let reason = match failure {
            Failure::Start(reason) if config.restart == Restart::OnFailure => {
                if was_ready {
                    deadline = Instant::now() + config.timeout;
                }
                if was_ready && begun.elapsed() >= STEADY {
                    pause = BACKOFF.0;
                }
                tracing::warn!(reason, ?pause, "the start command is started again");
                template.change(|status| {
                    status.state = State::Starting;
                    status.start_pid = None;
                    status.attempts = 0;
                    status.restarts = status.restarts.saturating_add(1);
                    status.last_error = Some(reason.clone());
                });
                if Instant::now() + pause < deadline {
                    sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF.1);
                    continue;
                }
                sleep_until(deadline).await;
                late(config, Some(&reason))
            }
            Failure::Start(reason) | Failure::Late(reason) => reason,
        };
        tracing::error!(reason, "the template has failed");
        template.change(|status| {
            status.state = State::Failed;
            status.reason = Some(reason.clone());
            status.last_error = Some(reason);
        });
        return;
    }
}

/// Starts the service and asks until it is ready; then waits until that is over.
async fn round(
    template: &Arc<Template>,
    config: &Config,
    launcher: &Launcher,
    deadline: Instant,
) -> Failure {
    let mut service = match &config.start {
        None => None,
        Some(command) => match start(config, launcher, command, Source::Start).await {
            Ok(running) => Some(running),
            Err(error) => return Failure::Start(format!("start command: {error}")),
        },
    };
    let pid = service.as_ref().map(|service| service.process.pid());
    tracing::info!(pid, "waiting for the template to be ready");
    template.change(|status| {
        status.state = State::Waiting;
        status.start_pid = pid;
    });
    let asking = ask(template, config, launcher, deadline);
    tokio::select! {
        // Whoever is gone cannot be ready.
        biased;
        reason = ended_badly(template, service.as_mut()) => return Failure::Start(reason),
        asked = asking => if let Err(reason) = asked {
            return Failure::Late(reason);
        },
    }
    tracing::info!("the template is ready");
    template.change(|status| {
        status.state = State::Ready;
        status.last_error = None;
    });
    Failure::Start(ended_badly(template, service.as_mut()).await)
}

/// Waits until the start command has ended with something else than 0, and says how.
async fn ended_badly(template: &Template, service: Option<&mut Running>) -> String {
    let Some(service) = service else { return pending().await };
    if service.ended {
        return pending().await;
    }
    let ending = service.follow(template, Source::Start).await;
    template.change(|status| status.start_pid = None);
    match ending {
        Ok(ending) if ending.exited && ending.exit_code == 0 => pending().await,
        Ok(ending) => {
            let said = String::from_utf8_lossy(&service.tail);
            let said = said.lines().rev().find(|line| !line.trim().is_empty());
            let said = said.map_or(String::new(), |line| format!(": {}", line.trim()));
            format!("start command failed: {}{said}", ending.status)
        }
        Err(error) => error,
    }
}

/// Asks until the answer is yes, or the time is over.
async fn ask(
    template: &Template,
    config: &Config,
    launcher: &Launcher,
    deadline: Instant,
) -> Result<(), String> {
    let is_command = matches!(config.ready, Ready::Command(_));
    let mut last: Option<String> = None;
    loop {
        let begun = Instant::now();
        let number = template.attempt_begins();
        let limit = config.attempt_timeout.and_then(|limit| begun.checked_add(limit));
        let limit = limit.map_or(deadline, |limit| limit.min(deadline));
        let mut output = Bytes::new();
        let asked = timeout_at(limit, attempt(template, config, launcher, &mut output)).await;
        let took = begun.elapsed();
        let answer = asked.unwrap_or_else(|_| {
            Err(format!("not done within {}", humantime::format_duration(rounded(took))))
        });
        let error = answer.as_ref().err().map(String::as_str);
        template.attempt_ends(took, error, output);
        match error {
            None => {
                tracing::info!(attempt = number, "the template answers that it is ready");
                return Ok(());
            }
            // A native condition is looked at many times: what is not news is no line of the log.
            Some(error) if last.as_deref() == Some(error) && !is_command => {
                tracing::debug!(attempt = number, error, "the template is not ready");
            }
            Some(error) => {
                tracing::info!(attempt = number, error, "the template is not ready");
                last = Some(error.to_owned());
            }
        }
        if Instant::now() + config.interval >= deadline {
            sleep_until(deadline).await;
            return Err(late(config, error));
        }
        sleep(config.interval).await;
    }
}

fn late(config: &Config, error: Option<&str>) -> String {
    let timeout = humantime::format_duration(config.timeout);
    let error = error.map_or(String::new(), |error| format!(": {error}"));
    format!("ready command timed out after {timeout}{error}")
}

/// To the millisecond: nobody reads more.
fn rounded(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// Asks once. Dropped before the answer, it kills the command with its tree.
async fn attempt(
    template: &Template,
    config: &Config,
    launcher: &Launcher,
    output: &mut Bytes,
) -> Result<(), String> {
    let command = match &config.ready {
        Ready::Condition(condition) => return condition.check(&launcher.pool).await,
        Ready::Command(command) => command,
    };
    let running = start(config, launcher, command, Source::Ready).await?;
    let mut running = KillOnDrop(running);
    let ending = running.0.follow(template, Source::Ready).await;
    *output = running.0.tail.clone().freeze();
    match ending? {
        ending if ending.exited && ending.exit_code == 0 => Ok(()),
        ending => Err(ending.status),
    }
}

/// A command that runs.
struct Running {
    process: Arc<Process>,
    events: Subscription,
    /// The last [`MAX_TAIL`] bytes that it wrote.
    tail: BytesMut,
    ended: bool,
}

impl Running {
    /// Passes its output on until it has ended.
    async fn follow(&mut self, template: &Template, source: Source) -> Result<Ending, String> {
        loop {
            match self.events.next().await {
                Some(Event::Output(Piece { channel, data, .. })) => {
                    self.keep(&data);
                    log(source, channel, &data);
                    template.wrote(source, channel, data);
                }
                Some(Event::End(end)) => {
                    self.ended = true;
                    return Ok(end.ending);
                }
                Some(Event::Gap { .. }) => {}
                // It does not happen to one who always takes at once; if it does, the end is not
                // missed.
                Some(Event::Detached) => match self.process.subscribe(Attach::Now) {
                    Ok(events) => self.events = events,
                    Err(error) => return Err(error.to_string()),
                },
                None => {
                    self.ended = true;
                    return Err("its end was missed".to_owned());
                }
            }
        }
    }

    fn keep(&mut self, data: &[u8]) {
        let data = data.get(data.len().saturating_sub(MAX_TAIL)..).unwrap_or(data);
        let over = (self.tail.len() + data.len()).saturating_sub(MAX_TAIL);
        let _ = self.tail.split_to(over);
        self.tail.extend_from_slice(data);
    }
}

fn log(source: Source, channel: Channel, data: &[u8]) {
    if tracing::enabled!(tracing::Level::DEBUG) {
        let text = String::from_utf8_lossy(data);
        tracing::debug!(?source, ?channel, text = text.trim_end(), "the template wrote");
    }
}

/// A command that must not outlive the interest in it.
struct KillOnDrop(Running);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if !self.0.ended {
            self.0.process.kill_tree();
        }
    }
}

async fn start(
    config: &Config,
    launcher: &Launcher,
    command: &Command,
    source: Source,
) -> Result<Running, String> {
    let spec = (launcher.spec)(config, Program::new(command, source))?;
    let started = launcher.processes.start(spec).await;
    let (found, events) = started.map_err(|error| error.to_string())?;
    let Found::Live(process) = found else {
        // It would take an identity that was chosen, and none was.
        return Err("it has ended before it began".to_owned());
    };
    Ok(Running { process, events, tail: BytesMut::new(), ended: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e2bs_shell_and_plain_programs() {
        let shell = Program::new(&Command::Shell("a b".into()), Source::Ready);
        assert_eq!((shell.cmd.as_str(), shell.args.join("|")), ("/bin/bash", "-l|-c|a b".into()));
        let words = ["/bin/a", "b c"].map(str::to_owned).to_vec();
        let program = Program::new(&Command::Program(words), Source::Start);
        assert_eq!((program.cmd.as_str(), program.args), ("/bin/a", vec!["b c".to_owned()]));
    }
}
