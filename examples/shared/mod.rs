//! What the examples share: runs a command through a channel and prints what it says.

use envd::proto::process::{
    ProcessConfig, StartRequest, process_client::ProcessClient, process_event::Event,
    process_event::data_event::Output,
};
use std::{
    io::{self, Write},
    process::ExitCode,
};
use tonic::transport::Channel;

/// The error of an example.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs `command`, copies its output, and gives its exit code.
pub(crate) async fn run(channel: Channel, mut command: Vec<String>) -> Result<ExitCode, Failure> {
    if command.is_empty() {
        command.push("uname".to_owned());
    }
    let args = command.split_off(1);
    let process = ProcessConfig { cmd: command.remove(0), args, ..ProcessConfig::default() };
    let request = StartRequest { process: Some(process), ..StartRequest::default() };
    let mut events = ProcessClient::new(channel).start(request).await?.into_inner();
    while let Some(response) = events.message().await? {
        match response.event.and_then(|event| event.event) {
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes) | Output::Pty(bytes)) => {
                    io::stdout().write_all(&bytes)?;
                }
                Some(Output::Stderr(bytes)) => io::stderr().write_all(&bytes)?,
                None => {}
            },
            Some(Event::End(end)) => {
                writeln!(io::stderr(), "{}", end.status)?;
                // A signal's is negative, and the shell has no such.
                return Ok(u8::try_from(end.exit_code).map_or(ExitCode::FAILURE, ExitCode::from));
            }
            Some(Event::Start(_) | Event::Gap(_) | Event::Keepalive(_)) | None => {}
        }
    }
    Err("the stream ended before the command".into())
}
