//! Whom calls act as: names, numbers, groups, and what is no user.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use base64::{Engine, engine::general_purpose::STANDARD};
use common::{
    Daemon, able, able_as_root, basic, me,
    rpc::{Client, Failure, WIRES, Wire},
};
use envd::proto::process::{
    ProcessConfig, StartRequest, StartResponse,
    process_event::{Event, data_event::Output},
};

const START: &str = "/process.Process/Start";

/// What a shell says as the caller.
async fn said(client: &Client, script: &str) -> Result<String, Failure> {
    // The home of nobody is not there.
    said_in(client, script, Some("/")).await
}

async fn said_in(client: &Client, script: &str, cwd: Option<&str>) -> Result<String, Failure> {
    let process = ProcessConfig {
        cmd: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        cwd: cwd.map(str::to_owned),
        ..ProcessConfig::default()
    };
    let request = StartRequest { process: Some(process), ..StartRequest::default() };
    let mut messages = client.stream::<_, StartResponse>(START, &request).await?;
    let mut text = Vec::new();
    while let Some(message) = messages.next().await? {
        if let Event::Data(data) = message.event.unwrap().event.unwrap()
            && let Output::Stdout(bytes) = data.output.unwrap()
        {
            text.extend_from_slice(&bytes);
        }
    }
    Ok(String::from_utf8(text).unwrap())
}

#[tokio::test]
async fn numbers_and_groups_name_users_in_every_protocol() {
    let nobody = nix::unistd::User::from_name("nobody").unwrap();
    if !able_as_root() || !able("the user nobody", nobody.is_some()) {
        return;
    }
    let nobody = nobody.unwrap();
    let daemon = Daemon::start(&[]);
    let script = "id -u; id -g; id -G; echo $USER; echo $HOME";
    let (uid, gid) = (nobody.uid, nobody.gid);
    for wire in WIRES {
        let as_user = |name: &str| Client::new(&daemon, wire).with("authorization", &basic(name));
        // One without a line in the files.
        let text = said(&as_user("54321"), script).await.unwrap();
        assert_eq!(text, "54321\n54321\n54321\n54321\n/\n");
        let text = said(&as_user("54321:65"), script).await.unwrap();
        assert_eq!(text, "54321\n65\n65\n54321\n/\n");
        // One with a line, by its number: it is that user.
        let text = said(&as_user(&uid.to_string()), "id -un; id -g").await.unwrap();
        assert_eq!(text, format!("nobody\n{gid}\n"));
        let text = said(&as_user("nobody:root"), "id -un; id -G").await.unwrap();
        assert_eq!(text, "nobody\n0\n");
    }
}

#[tokio::test]
async fn a_user_without_a_home_directory_starts_in_the_root() {
    let nobody = nix::unistd::User::from_name("nobody").unwrap();
    let homeless = |user: &nix::unistd::User| !user.dir.exists();
    if !able_as_root()
        || !able("the user nobody without a home", nobody.is_some_and(|user| homeless(&user)))
    {
        return;
    }
    let daemon = Daemon::start(&[]);
    let client = Client::new(&daemon, Wire::Grpc).with("authorization", &basic("nobody"));
    for cwd in [None, Some("")] {
        let text = said_in(&client, "pwd; echo $PWD", cwd).await.unwrap();
        assert_eq!(text, "/\n/\n");
    }
    // It is not there when it is asked for.
    let failure = said_in(&client, "pwd", Some("~")).await.unwrap_err();
    assert_eq!(failure.code, "invalid_argument");
}

#[tokio::test]
async fn what_is_no_user_is_told_with_its_name() {
    let daemon = Daemon::start(&[]);
    let root = able_as_root();
    for (name, text) in [
        ("nobody-at-all", "invalid username: 'nobody-at-all'"),
        ("4294967295", "invalid username: '4294967295'"),
        ("4294967295:root", "invalid username: '4294967295:root'"),
        ("me:4294967295", "unknown group 4294967295"),
        ("-1", "invalid username: '-1'"),
        ("me:no-such-group", "unknown group no-such-group"),
    ] {
        let name = name.replace("me", &me().name);
        let client = Client::new(&daemon, Wire::Grpc).with("authorization", &basic(&name));
        let failure = said(&client, "true").await.unwrap_err();
        assert_eq!(failure.code, "unauthenticated");
        assert!(failure.message.contains(text), "{failure:?}");
    }
    if !root {
        let other = nix::unistd::geteuid().as_raw() + 1;
        let client =
            Client::new(&daemon, Wire::Grpc).with("authorization", &basic(&other.to_string()));
        let failure = said(&client, "true").await.unwrap_err();
        assert!(failure.message.contains("runs without root"), "{failure:?}");
    }
}

#[tokio::test]
async fn a_password_means_nothing() {
    let daemon = Daemon::start(&[]);
    for password in ["", "secret", "a:b", "a:b:", ":"] {
        let credentials = STANDARD.encode(format!("{}:{password}", me().name));
        let client = Client::new(&daemon, Wire::Connect { json: true })
            .with("authorization", &format!("Basic {credentials}"));
        assert_eq!(said(&client, "id -un").await.unwrap(), format!("{}\n", me().name));
    }
}
