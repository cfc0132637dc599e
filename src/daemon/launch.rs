//! The template's life beside the daemon's: its commands as the sandbox's processes, and who is
//! told how it stands.

use std::sync::Arc;

use tokio::task::AbortHandle;

use crate::{
    fs::path,
    guest::{
        boot::Times,
        notify,
        ready::{self, Message},
    },
    process::{self, StartSpec, Stdio, journal::Bounds},
    sandbox::Sandbox,
    template::{self, Config, Launcher, Program, Source, State, config::StartAfter},
    wire::{dial, listen::Address},
};

/// Runs the sandbox's template, from now or from the first `/init` on, until it is aborted: a
/// daemon that ends starts nothing again. Without a template it does nothing.
pub(super) fn template(sandbox: &Arc<Sandbox>) -> Option<AbortHandle> {
    let config = sandbox.template.config()?;
    let after_init = config.start_after == StartAfter::Init;
    let sandbox = Arc::clone(sandbox);
    let running = tokio::spawn(async move {
        if after_init {
            tracing::info!("the template waits for /init");
            let _ = sandbox.access.initialised().wait_for(|initialised| *initialised).await;
        }
        template::run(Arc::clone(&sandbox.template), launcher(&sandbox)).await;
    });
    Some(running.abort_handle())
}

fn launcher(sandbox: &Arc<Sandbox>) -> Launcher {
    Launcher {
        processes: Arc::clone(&sandbox.processes),
        pool: Arc::clone(&sandbox.files),
        spec: Box::new({
            let sandbox = Arc::clone(sandbox);
            move |config, program| spec(&sandbox, config, program)
        }),
    }
}

/// A command of the template's as whoever calls would start it.
fn spec(sandbox: &Sandbox, config: &Config, program: Program) -> Result<StartSpec, String> {
    let defaults = sandbox.defaults.get();
    let name = config.user.as_ref().unwrap_or(&defaults.user);
    let user = sandbox.user_named(name).map_err(|error| error.message())?;
    let workdir = config.workdir.as_ref().or(defaults.workdir.as_ref());
    let cwd =
        path::resolve("", &user, workdir.map(String::as_str)).map_err(|error| error.to_string())?;
    // E2B's orchestrator leaves the input of a start command open; some programs end with it.
    let stdin = program.source == Source::Start;
    let tag = Some(program.tag().to_owned());
    Ok(StartSpec {
        cmd: program.cmd,
        args: program.args,
        requested_env: config.env.clone(),
        requested_cwd: config.workdir.clone(),
        env: defaults.environment(&user, &config.env),
        cwd,
        user,
        stdio: Stdio::Pipes { stdin },
        tag,
        id: None,
        output: Bounds { memory: sandbox.processes.options().output_window, disk: 0, block: false },
        timeout: None,
        time_limit: None,
        limits: process::Limits::default(),
        charge: None,
    })
}

/// Tells the service manager how the template stands, each time that this changes. READY was told
/// when the daemon listened: a template may take longer than a manager waits for a start.
pub(super) fn tell_manager(sandbox: &Arc<Sandbox>, manager: Arc<notify::Manager>) {
    if sandbox.template.config().is_none() {
        return;
    }
    let mut changes = sandbox.template.changes();
    tokio::spawn(async move {
        let mut told = None;
        loop {
            let status = changes.borrow_and_update().clone();
            if told.replace(status.state) != Some(status.state) {
                let reason = status.reason.map_or(String::new(), |reason| format!(": {reason}"));
                manager.status(&format!("template {}{reason}", status.state.name())).await;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    });
}

/// Tells the host that calls are served, and again when the template is ready or has failed.
pub(super) fn tell_host(sandbox: &Arc<Sandbox>, times: Times, addresses: &[String], host: Address) {
    let template = Arc::clone(&sandbox.template);
    let addresses = addresses.to_vec();
    tokio::spawn(async move {
        let mut changes = template.changes();
        let mut status = changes.borrow_and_update().clone();
        loop {
            let reason = status.reason.as_deref();
            let line = Message::new(times, &addresses, status.state.name(), reason).line();
            match ready::tell(&line, || dial::connect(host.clone())).await {
                Ok(()) => tracing::info!(address = %host, "the host knows that this is ready"),
                Err(error) => tracing::warn!(address = %host, %error, "the host cannot be told"),
            }
            let settled = |state| matches!(state, State::Ready | State::Failed);
            if settled(status.state) {
                return;
            }
            match changes.wait_for(|status| settled(status.state)).await {
                Ok(settled) => status = settled.clone(),
                Err(_) => return,
            }
        }
    });
}
