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
    assert_eq!(upstream.ignored, ["stray"]);
    assert!(upstream.is_not_fc && upstream.no_cgroups && !upstream.verbose);
    assert_eq!(upstream.listen, ["tcp://0.0.0.0:1234".parse().unwrap()]);
    assert_eq!(upstream.cgroup_root, PathBuf::from("/cg"));
    assert!(!config(&["-verbose=false"]).verbose);
    for (flag, text) in [
        ("-version", "0.6.2"),
        ("-version=true", "0.6.2"),
        ("--version=false", ""),
        ("--version", "0.6.2\nenvd "),
    ] {
        match parse(&[flag]) {
            Ok(Command::Print(printed)) => assert!(printed.starts_with(text), "{flag}: {printed}"),
            other => assert!(text.is_empty(), "{flag}: {other:?}"),
        }
    }
    assert!(matches!(parse(&["-commit"]), Ok(Command::Print(_))));
    for help in ["-h", "-help", "--help"] {
        assert_eq!(parse(&[help]), Ok(Command::Print(USAGE.to_owned())));
        assert_eq!(parse(&["--verbose", help]), Ok(Command::Print(USAGE.to_owned())));
    }
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
fn a_value_is_not_taken_for_a_flag() {
    let odd = config(&["--access-token-file", "-x", "--guest-root", "-version", "--", "--listen"]);
    assert_eq!(odd.access_token_file, Some("-x".into()));
    assert_eq!(odd.guest_root, PathBuf::from("-version"));
    assert_eq!(odd.ignored, ["--listen"]);
    // As with Go, a switch takes its value behind `=` only.
    let switch = config(&["-isnotfc", "false"]);
    assert!(switch.is_not_fc);
    assert_eq!(switch.ignored, ["false"]);
}

#[test]
fn a_first_word_must_be_a_subcommand_and_later_ones_are_ignored() {
    for (args, said) in [
        (&["version"][..], "'version' is not a subcommand; did you mean 'envd --version'?"),
        (&["help"], "'help' is not a subcommand; did you mean 'envd --help'?"),
        (&["powerof", "-isnotfc"], "'powerof' is not a subcommand; did you mean 'envd poweroff'?"),
        (&["serve"], "'serve' is not a subcommand; the daemon is run without one"),
        (&["--", "serve"], "'serve' is not a subcommand; the daemon is run without one"),
        (&["-"], "'-' is not a subcommand; the daemon is run without one"),
        (&[""], "'' is not a subcommand; the daemon is run without one"),
        (&["a\nb"], "'a\\nb' is not a subcommand; the daemon is run without one"),
    ] {
        assert_eq!(parse(args).unwrap_err(), said);
    }
    assert_eq!(config(&["-isnotfc", "version", "help"]).ignored, ["version", "help"]);
}

#[test]
fn bad_flags_are_named() {
    for (args, flag, value) in [
        (&["--what"][..], "--what", ""),
        (&["-what=1"], "--what", ""),
        (&["-port", "99999"], "--port", "99999"),
        (&["-port"], "--port", ""),
        (&["-port", "\n"], "--port", "\\n"),
        (&["-port="], "--port", ""),
        (&["-isnotfc=maybe"], "--isnotfc", "maybe"),
        (&["-version=maybe"], "--version", "maybe"),
        (&["--help=maybe"], "--help", "maybe"),
        (&["--listen", "nowhere"], "--listen", "nowhere"),
        (&["--listen", "unix:///a", "-port", "1"], "--port", ""),
        (&["--ready", "1024"], "--ready", "1024"),
        (&["--max-connections", "0"], "--max-connections", "0"),
        (&["--max-message-bytes", "1"], "--max-message-bytes", "1"),
        (&["--max-buffered-bytes", "many"], "--max-buffered-bytes", "many"),
        (&["--output-window", "1"], "--output-window", "1"),
        (&["--retention", "29"], "--retention", "29"),
        (&["--idle-timeout", "-1"], "--idle-timeout", "-1"),
        (&["--drain-grace", "60001"], "--drain-grace", "60001"),
        (&["--kill-scope", "all"], "--kill-scope", "all"),
        (&["--default-workdir", "relative"], "--default-workdir", ""),
        (&["--default-user", ""], "--default-user", ""),
        (&["--template="], "--template", ""),
        (&["--mmds", "nowhere"], "--mmds", "nowhere"),
        (&["--trust-uid", "root"], "--trust-uid", "root"),
        (&["--trust-uid", "4294967295"], "--trust-uid", "4294967295"),
        (&["--trust-cid", "-1"], "--trust-cid", "-1"),
        (&["--otlp", "nowhere"], "--otlp", ""),
        (
            &["--otlp", "no\nwhere"],
            "--otlp",
            if cfg!(feature = "otlp") { "no\\nwhere" } else { "" },
        ),
    ] {
        let error = parse(args).unwrap_err();
        assert!(error.starts_with(flag) && error.contains(value), "{args:?}: {error}");
    }
}

#[test]
fn a_template_that_is_named_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("template.toml");
    let flag = |path: &std::path::Path| format!("--template={}", path.display());
    for missing in [&file, &dir.path().join("none/template.toml")] {
        let error = config(&[&flag(missing)]).check_files().unwrap_err().to_string();
        let said = format!("--template: '{}': no such file or directory", missing.display());
        assert_eq!(error, said);
    }
    std::fs::write(&file, "nonsense").unwrap();
    assert_eq!(config(&[&flag(&file)]).check_files(), Ok(()));
    let below = config(&[&flag(&file.join("x"))]).check_files().unwrap_err().to_string();
    assert!(below.contains("not a directory"), "{below}");
    assert_eq!(config(&[]).check_files(), Ok(()));
}

mod properties {
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;

    use super::*;

    /// Every flag of the usage text.
    fn flags() -> Vec<&'static str> {
        let lines = USAGE.lines().filter_map(|line| line.strip_prefix("  "));
        lines
            .filter_map(|line| line.split(' ').next().filter(|name| name.starts_with('-')))
            .collect()
    }

    fn argument() -> impl Strategy<Value = OsString> {
        let flag = (prop::sample::select(flags()), any::<bool>(), "(=?[ -~\\n]{0,12})?").prop_map(
            |(flag, one, value)| {
                let name = flag.trim_start_matches('-');
                OsString::from(format!("{}{name}{value}", if one { "-" } else { "--" }))
            },
        );
        let value = prop::sample::select(vec![
            "1",
            "0",
            "true",
            "none",
            "tcp://127.0.0.1:1",
            "/a",
            "root",
            "--",
            "-",
            "",
            "init",
            "99999999999999999999",
            "unix:///a?mode=0660",
            "vsock://1",
        ]);
        prop_oneof![
            4 => flag,
            4 => value.prop_map(OsString::from),
            1 => prop::collection::vec(any::<u8>(), 0..12).prop_map(OsString::from_vec),
        ]
    }

    proptest! {
        /// Whatever the arguments are: an answer, and an error is one line that names an argument.
        #[test]
        fn any_command_line_is_understood_or_refused_in_one_line(
            args in prop::collection::vec(argument(), 0..6),
        ) {
            let line: Vec<OsString> = [OsString::from("envd")].into_iter().chain(args.clone()).collect();
            let subcommand = Subcommand::of(&line, 7);
            prop_assert!(Subcommand::of(&line, 1).is_ok(), "PID 1 goes on");
            let error = match subcommand {
                Ok(Subcommand::Daemon(args)) => Config::parse(args).err(),
                Ok(_) => None,
                Err(error) => Some(error),
            };
            let Some(error) = error else { return Ok(()) };
            let said = error.to_string();
            prop_assert!(said.lines().count() == 1 && !said.contains('\r'), "{said:?}");
            prop_assert!(said.len() < 8 * crate::quote::MAX_QUOTED, "{said}");
            let known = |name: &str| flags().iter().any(|flag| flag.trim_start_matches('-') == name);
            match error {
                ConfigError::Value { flag, .. } => prop_assert!(known(&flag) || flag == "h", "{flag}"),
                ConfigError::Unknown(name) => prop_assert!(!known(&name), "{name}"),
                // A `--` behind another is a word as any.
                ConfigError::Word { word, .. } => {
                    prop_assert!(args.iter().any(|arg| crate::quote::line(arg) == word), "{word}");
                }
                ConfigError::Unexpected { .. } => {}
            }
        }

        /// A flag means the same with one dash and two, and with its value behind `=` or a space.
        #[test]
        fn dashes_and_equals_signs_do_not_matter(value in "[0-9]{1,6}") {
            for flag in flags().into_iter().filter(|flag| flag.trim_start_matches('-') != "version") {
                let name = flag.trim_start_matches('-');
                let read = |args: [String; 2]| {
                    let args: Vec<OsString> = args.into_iter().filter(|arg| !arg.is_empty()).map(Into::into).collect();
                    Config::parse(args)
                };
                let spelt = read([format!("--{name}={value}"), String::new()]);
                prop_assert_eq!(&read([format!("-{name}={value}"), String::new()]), &spelt);
                let apart = read([format!("--{name}"), value.clone()]);
                let is_switch = matches!(&apart, Ok(Command::Run(config)) if !config.ignored.is_empty());
                let prints = matches!(&apart, Ok(Command::Print(_)));
                prop_assert!(is_switch || prints || apart == spelt, "{name}: {apart:?} {spelt:?}");
            }
        }
    }
}
