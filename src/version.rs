//! What this envd calls itself: its own version, and the one of upstream's that it stands for.

/// envd's own version.
pub const OWN: &str = env!("CARGO_PKG_VERSION");

/// The commit that it was built from, or `unknown`.
pub const COMMIT: &str = match option_env!("ENVD_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// The version of upstream's envd up to which an SDK or an orchestrator may count on everything: what
/// `envd -version` and `X-Envd-Version` say. They compare it with the version in which upstream got
/// something, and use what is not newer, so it is an interface and nothing else. It may be raised to
/// the next line of this table only when what stands there works here.
///
/// | from | who asks | for what | here |
/// |---|---|---|---|
/// | 0.1.4 | SDK | recursive watches | yes |
/// | 0.1.5, 0.2.4, 0.5.9 | orchestrator, SDK | `/metrics`; bytes and disk; the cache | yes |
/// | 0.2.0 | API | access tokens, `secure` sandboxes | yes |
/// | 0.2.11 | orchestrator | a guest with kvm-clock, whose time `/init` sets | yes |
/// | 0.3.0 | SDK | `stdin: false` | yes |
/// | 0.4.0 | SDK | the default user is the daemon's | yes |
/// | 0.5.0 | API | snapshots: `/init` again and again | yes |
/// | 0.5.2 | SDK, CLI | `CloseStdin` | yes |
/// | 0.5.7 | SDK | raw uploads, and gzipped ones | yes |
/// | 0.5.13 | API | network rules: `caBundle` of `/init` | yes |
/// | 0.5.14 | API | volumes: `volumeMounts` of `/init` | yes |
/// | 0.6.2 | SDK | metadata of uploads | yes |
/// | 0.6.3 | orchestrator | `/freeze`, and that `/init` thaws | no |
/// | 0.6.3, 0.6.4 | SDK | `include_entry`, `allow_network_mounts` of watches | yes |
/// | 0.6.5 | orchestrator | `/collapse` | no |
/// | 0.6.6 | orchestrator | `/fsfreeze`, `/fsthaw` | no |
/// | 0.6.12 | orchestrator | `/upgrade` | no |
pub const E2B: &str = "0.6.2";
