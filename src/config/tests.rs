use std::{ffi::OsString, path::PathBuf};

use super::*;
use crate::guest::mmds;

fn parse(args: &[&str]) -> Result<Command, String> {
    Config::parse(args.iter().map(OsString::from)).map_err(|error| error.to_string())
}

fn config(args: &[&str]) -> Config {
    match parse(args) {
        Ok(Command::Run(config)) => *config,
        other => panic!("{args:?}: {other:?}"),
    }
}

#[test]
fn upstream_flags_with_one_dash_and_two() {
    let upstream =
        config(&["-isnotfc", "--no-cgroups", "-port", "1234", "-cgroup-root=/cg", "stray"]);
    assert!(upstream.is_not_fc && upstream.no_cgroups && !upstream.verbose);
    assert_eq!(upstream.listen, ["tcp://0.0.0.0:1234".parse().unwrap()]);
    assert_eq!(upstream.cgroup_root, PathBuf::from("/cg"));
    assert!(!config(&["-verbose=false"]).verbose);
    for (flag, text) in [
        ("-version", "0.6.2"),
        ("-version=true", "0.6.2"),
        ("--version=false", ""),
        ("--version", "envd "),
    ] {
        match parse(&[flag]) {
            Ok(Command::Print(printed)) => assert!(printed.starts_with(text), "{flag}: {printed}"),
            other => assert!(text.is_empty(), "{flag}: {other:?}"),
        }
    }
    assert!(matches!(parse(&["-commit"]), Ok(Command::Print(_))));
    assert_eq!(parse(&["-h"]), Ok(Command::Help));
    assert_eq!(parse(&["--help"]), Ok(Command::Help));
}

#[test]
fn listens_on_upstreams_port_unless_told_otherwise() {
    assert_eq!(config(&[]).listen, ["tcp://0.0.0.0:49983".parse().unwrap()]);
    let two = config(&["--listen", "unix:///a", "--listen=vsock://5?optional"]);
    assert_eq!(two.listen.len(), 2);
}

#[test]
fn whom_to_let_in() {
    assert_eq!(config(&[]).trust, Trust::default());
    let flags = ["--require-token", "--trust-uid=0", "--trust-uid=7", "--trust-cid", "2"];
    let strict = config(&flags);
    assert!(strict.require_token && !strict.resume_handover);
    assert_eq!((strict.trust.uids, strict.trust.cids), (vec![0, 7], vec![2]));
    assert!(config(&["-resume-handover"]).resume_handover);
}

#[test]
fn where_the_metadata_is() {
    assert_eq!(config(&[]).mmds, Some(mmds::ADDRESS));
    assert_eq!(config(&["-isnotfc"]).mmds, None);
    assert_eq!(config(&["--mmds", "none"]).mmds, None);
    let given = config(&["--mmds=127.0.0.1:1", "-isnotfc"]);
    assert_eq!(given.mmds, Some("127.0.0.1:1".parse().unwrap()));
}

#[test]
fn whom_to_tell() {
    assert_eq!(config(&[]).ready, None);
    let ready = config(&["--ready", "vsock://2:1024?optional"]).ready.unwrap();
    assert!(ready.optional && ready.to_string() == "vsock://2:1024");
}

#[test]
fn bad_flags_are_named() {
    for (args, name) in [
        (&["--what"][..], "--what"),
        (&["-port", "99999"], "99999"),
        (&["-port"], "--port"),
        (&["-isnotfc=maybe"], "maybe"),
        (&["--listen", "nowhere"], "nowhere"),
        (&["--listen", "unix:///a", "-port", "1"], "--port"),
        (&["--ready", "1024"], "--ready"),
        (&["--max-connections", "0"], "--max-connections"),
        (&["--max-message-bytes", "1"], "--max-message-bytes"),
        (&["--output-window", "1"], "--output-window"),
        (&["--retention", "29"], "--retention"),
        (&["--drain-grace", "60001"], "--drain-grace"),
        (&["--default-workdir", "relative"], "--default-workdir"),
        (&["--default-user", ""], "--default-user"),
        (&["--mmds", "nowhere"], "nowhere"),
        (&["--trust-uid", "root"], "root"),
    ] {
        let error = parse(args).unwrap_err();
        assert!(error.contains(name), "{args:?}: {error}");
    }
}
