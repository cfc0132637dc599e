//! One virtual machine, from its start to its end.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::UnixListener};

use crate::{
    checks,
    common::rpc::{Client, Wire},
    forward,
};

/// The port on which envd listens in the guest, on TCP and on vsock.
const PORT: u32 = 49983;
/// The vsock port of the host that the guest calls when it is ready.
const READY_PORT: u32 = 1024;
/// The longest that a boot may take under emulation, on a busy machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
/// The longest that an orderly power-off may take: OpenRC starts a dozen scripts for it.
const OFF_PATIENCE: Duration = Duration::from_secs(180);
/// The image's systemd behind an envd that has started its daemon first; the unit would start
/// another one.
const HANDOVER: &str =
    " envd.init=/usr/lib/envd/init envd.handover=/lib/systemd/systemd systemd.mask=envd.service";

/// What the guest is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Debian, with envd as a service of systemd.
    Systemd,
    /// Debian, with envd as a service of OpenRC.
    Openrc,
    /// Debian, with envd as PID 1.
    Pid1,
    /// Debian, with envd as the PID 1 that becomes systemd.
    Handover,
    /// An initramfs with envd, modules and one static program.
    Minimal,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::Openrc => "openrc",
            Self::Pid1 => "pid1",
            Self::Handover => "handover",
            Self::Minimal => "minimal",
        }
    }
}

/// What becomes of the root disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disk {
    /// There is none.
    None,
    /// Writes go to a file that is thrown away.
    Snapshot,
    /// Writes go to a copy that can be looked at afterwards.
    Copy,
}

/// A running guest, killed on drop.
pub(crate) struct Guest {
    kind: Kind,
    dir: TempDir,
    /// The vsock backend, then the machine; killed in the other order.
    children: Vec<Child>,
    disk: Option<PathBuf>,
    tcp: String,
    vsock: String,
    ready: Value,
    first_vsock: Duration,
    first_tcp: Duration,
}

/// A file or program that `scripts/vm.sh` has made.
fn given(name: &str) -> PathBuf {
    let value = std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: use make vm"));
    PathBuf::from(value)
}

/// A command that dies with this process, however that ends.
fn bound(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program).stdin(Stdio::null());
    command
}

/// Starts what serves the guest's vsock device; its socket comes a moment later.
fn start_backend(dir: &Path) -> Child {
    bound(&given("ENVD_VM_BACKEND"))
        .args(["--guest-cid", "3", "--uds-path"])
        .arg(dir.join("vsock"))
        .arg("--socket")
        .arg(dir.join("vhost.sock"))
        .stdout(fs::File::create(dir.join("backend.log")).unwrap())
        .stderr(fs::File::create(dir.join("backend.err")).unwrap())
        .spawn()
        .expect("the vsock backend can be executed")
}

async fn wait_for(file: &Path) {
    let deadline = Instant::now() + BOOT_PATIENCE;
    while !file.exists() {
        assert!(Instant::now() < deadline, "there is no {}", file.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Guest {
    /// Boots and waits until envd has answered over both transports.
    pub(crate) async fn boot(kind: Kind, disk: Disk) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (socket, uds) = (at("vhost.sock"), at("vsock"));
        // The guest calls the host's port N; the backend looks for a unix socket named for it.
        let ready = UnixListener::bind(at(&format!("vsock_{READY_PORT}"))).unwrap();

        let start = Instant::now();
        let backend = start_backend(dir.path());
        let mut guest = Self {
            kind,
            children: vec![backend],
            disk: None,
            tcp: String::new(),
            vsock: String::new(),
            ready: Value::Null,
            first_vsock: Duration::ZERO,
            first_tcp: Duration::ZERO,
            dir,
        };
        wait_for(&socket).await;
        let port = free_port();
        guest.tcp = format!("127.0.0.1:{port}");
        let machine = guest.start_machine(disk, &socket, port);
        guest.children.push(machine);

        // Before the ready signal the backend must be left alone: it loses connections to a guest
        // whose driver is not there yet, and itself with them.
        let signal = tokio::time::timeout(BOOT_PATIENCE, async {
            let (mut stream, _) = ready.accept().await?;
            let mut line = String::new();
            stream.read_to_string(&mut line).await?;
            io::Result::Ok(line)
        });
        let ended = guest.wait(BOOT_PATIENCE);
        let line = tokio::select! {
            line = signal => line.map_err(|_| "no ready signal in time".to_owned()),
            status = ended => Err(format!("the machine has ended: {status}")),
        };
        let line = match line {
            Ok(line) => line.unwrap(),
            Err(why) => {
                guest.print_console();
                panic!("{why}");
            }
        };
        guest.ready = serde_json::from_str(&line).expect("the ready signal is JSON");
        guest.vsock = forward::listen(uds, PORT).await;
        checks::hello(&guest.vsock).await;
        guest.first_vsock = start.elapsed();
        checks::hello(&guest.tcp).await;
        guest.first_tcp = start.elapsed();
        guest
    }

    fn start_machine(&mut self, disk: Disk, socket: &Path, port: u16) -> Child {
        let memory = if self.kind == Kind::Minimal { "256M" } else { "1G" };
        let mut append = String::from(
            "console=ttyS0 panic=-1 quiet loglevel=3 mitigations=off nokaslr no_timer_check random.trust_cpu=on \
             lsm=capability cryptomgr.notests 8250.nr_uarts=1 i8042.noaux i8042.nokbd \
             envd.hostname=sandbox envd.ip=10.0.2.15/24 envd.gateway=10.0.2.2",
        );
        let initrd = match self.kind {
            Kind::Minimal => given("ENVD_VM_MINIMAL"),
            _ => given("ENVD_VM_INITRD"),
        };
        let mut machine = bound(Path::new("qemu-system-x86_64"));
        let accelerator = std::env::var("ENVD_VM_ACCEL").unwrap_or_else(|_| "tcg".to_owned());
        let cpu = if accelerator == "kvm" {
            "host"
        } else {
            // An emulator translates a program again for each address that it is loaded to, and
            // walks a fifth level of page tables for each page: without both, starting one takes a
            // fifth of the time.
            append.push_str(" norandmaps");
            "max,la57=off"
        };
        machine
            .args(["-accel", &accelerator, "-M", "q35", "-cpu", cpu, "-smp", "1", "-m", memory])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-serial")
            .arg(format!("file:{}", self.console().display()))
            .arg("-kernel")
            .arg(given("ENVD_VM_KERNEL"))
            .arg("-initrd")
            .arg(initrd)
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=mem0,size={memory},share=on"))
            .args(["-machine", "memory-backend=mem0"])
            .arg("-chardev")
            .arg(format!("socket,id=vs,path={}", socket.display()))
            // Behind a port of its own it can be removed and come back.
            .args(["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"])
            .args(["-device", "vhost-user-vsock-pci,chardev=vs,id=vsock,bus=rp0"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", self.dir.path().join("qmp").display()))
            .arg("-netdev")
            .arg(format!("user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{PORT}"))
            .args(["-device", "virtio-net-pci,netdev=n0,romfile="])
            .args(["-device", "virtio-rng-pci"]);
        let root = match self.kind {
            Kind::Systemd | Kind::Handover => Some(given("ENVD_VM_SYSTEMD")),
            Kind::Openrc => Some(given("ENVD_VM_OPENRC")),
            Kind::Pid1 => Some(given("ENVD_VM_PID1")),
            Kind::Minimal => None,
        };
        if let Some(root) = root {
            append.push_str(" envd.root=/dev/vda rw");
            if self.kind == Kind::Handover {
                append.push_str(HANDOVER);
            }
            let (file, snapshot) = match disk {
                Disk::Copy => {
                    let copy = self.dir.path().join("disk.ext4");
                    let mut copying = Command::new("cp");
                    copying.arg("--sparse=always").arg(&root).arg(&copy);
                    assert!(copying.status().unwrap().success(), "the disk cannot be copied");
                    self.disk = Some(copy.clone());
                    (copy, "off")
                }
                Disk::Snapshot | Disk::None => (root, "on"),
            };
            let drive = |file: &Path, id: &str, snapshot: &str| {
                let file = file.display();
                format!("file={file},format=raw,if=none,id={id},snapshot={snapshot},cache=unsafe")
            };
            machine.arg("-drive").arg(drive(&file, "d0", snapshot));
            machine.args(["-device", "virtio-blk-pci,drive=d0"]);
            if let Some(tests) = std::env::var_os("ENVD_VM_TESTS") {
                machine.arg("-drive").arg(drive(Path::new(&tests), "d1", "on"));
                machine.args(["-device", "virtio-blk-pci,drive=d1"]);
            }
        }
        machine
            .arg("-append")
            .arg(append)
            .stdout(fs::File::create(self.dir.path().join("qemu.log")).unwrap())
            .stderr(fs::File::create(self.dir.path().join("qemu.err")).unwrap())
            .spawn()
            .expect("qemu can be executed")
    }

    /// `HOST:PORT` that leads to envd over the guest's network.
    ///
    /// Connections to it are opened one after another, each used before the next: QEMU listens with
    /// a backlog of one. When it is slow to accept, the host's kernel answers more with SYN cookies,
    /// drops what completes the handshake, and resets a connection that the client holds for open.
    pub(crate) fn tcp(&self) -> String {
        self.tcp.clone()
    }

    /// `HOST:PORT` that leads to envd over vsock.
    pub(crate) fn vsock(&self) -> String {
        self.vsock.clone()
    }

    /// The unix socket that stands for the guest's vsock.
    pub(crate) fn vsock_socket(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// Takes the vsock device away, as a snapshot does, and gives the guest a new one, served by a
    /// new backend.
    pub(crate) async fn replace_vsock(&mut self) {
        let mut qmp = Qmp::connect(&self.dir.path().join("qmp")).await;
        qmp.execute("device_del", &serde_json::json!({ "id": "vsock" })).await;
        qmp.event("DEVICE_DELETED", "vsock").await;
        qmp.execute("chardev-remove", &serde_json::json!({ "id": "vs" })).await;
        let old = &mut self.children[0];
        let _ = old.kill();
        let _ = old.wait();
        for name in ["vsock", "vhost.sock"] {
            let _ = fs::remove_file(self.dir.path().join(name));
        }
        let socket = self.dir.path().join("vhost.sock");
        self.children[0] = start_backend(self.dir.path());
        wait_for(&socket).await;
        let address = serde_json::json!({ "type": "unix", "data": { "path": socket } });
        let data = serde_json::json!({ "addr": address, "server": false });
        let backend = serde_json::json!({ "type": "socket", "data": data });
        qmp.execute("chardev-add", &serde_json::json!({ "id": "vs", "backend": backend })).await;
        let device = serde_json::json!({
            "driver": "vhost-user-vsock-pci", "chardev": "vs", "id": "vsock", "bus": "rp0"
        });
        qmp.execute("device_add", &device).await;
    }

    /// From the start of the machine to the first answer over vsock and over TCP.
    pub(crate) fn answered(&self) -> (Duration, Duration) {
        (self.first_vsock, self.first_tcp)
    }

    /// Where the time went, in words.
    pub(crate) fn timings(&self) -> String {
        format!(
            "first answer over vsock after {:.2} s, over tcp after {:.2} s; the guest says {}",
            self.first_vsock.as_secs_f32(),
            self.first_tcp.as_secs_f32(),
            self.ready
        )
    }

    /// Asks the guest to end, through envd, and waits until the machine has.
    pub(crate) async fn power_off(&mut self) {
        let (program, args): (_, &[&str]) = match self.kind {
            Kind::Systemd | Kind::Handover => ("systemctl", &["poweroff"]),
            Kind::Openrc => ("poweroff", &[]),
            Kind::Pid1 => ("envd", &["poweroff"]),
            Kind::Minimal => ("/init", &["poweroff"]),
        };
        let client = Client::at(&self.vsock, Wire::Grpc).with("authorization", "Basic cm9vdDo=");
        // The answer may be cut by what it asks for.
        checks::fire(&client, program, args).await;
        let status = self.wait(OFF_PATIENCE).await;
        assert!(status.success(), "qemu: {status}");
    }

    async fn wait(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            let machine = self.children.last_mut().unwrap();
            if let Some(status) = machine.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "nothing of it within {patience:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// After a power-off: the root file system needs no replay of its journal.
    pub(crate) fn assert_clean(&self) {
        let disk = self.disk.as_ref().expect("a copy of the disk");
        let output = Command::new("dumpe2fs").arg("-h").arg(disk).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
        };
        assert_eq!(field("Filesystem state:"), "clean");
        let features = field("Filesystem features:");
        assert!(features.contains("has_journal"), "{features}");
        assert!(!features.contains("needs_recovery"), "{features}");
        // It was written to: an untouched disk would prove nothing.
        assert_ne!(field("Mount count:"), "0");
    }

    fn console(&self) -> PathBuf {
        self.dir.path().join("console.log")
    }

    /// What the guest has said on its console.
    pub(crate) fn console_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.console()).unwrap()).into_owned()
    }

    /// Prints what the guest, the machine and the backend have said.
    pub(crate) fn print_console(&self) {
        for name in ["console.log", "qemu.err", "backend.log", "backend.err"] {
            let bytes = fs::read(self.dir.path().join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<_> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(80)..];
            println!("--- {name} of {}, last {} lines", self.kind.name(), last.len());
            for line in last {
                println!("{line}");
            }
        }
        println!("---");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A port that was free a moment ago. QEMU cannot be given a socket, so a race remains.
pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The machine's monitor (QEMU's QMP).
struct Qmp {
    lines: tokio::io::Lines<tokio::io::BufReader<tokio::net::unix::OwnedReadHalf>>,
    input: tokio::net::unix::OwnedWriteHalf,
}

impl Qmp {
    async fn connect(socket: &Path) -> Self {
        use tokio::io::AsyncBufReadExt;
        let (output, input) = tokio::net::UnixStream::connect(socket).await.unwrap().into_split();
        let mut qmp = Self { lines: tokio::io::BufReader::new(output).lines(), input };
        assert!(qmp.next().await.get("QMP").is_some(), "the greeting comes first");
        qmp.execute("qmp_capabilities", &Value::Null).await;
        qmp
    }

    async fn next(&mut self) -> Value {
        let line = tokio::time::timeout(BOOT_PATIENCE, self.lines.next_line()).await;
        let line = line.expect("the monitor answers").unwrap().expect("the machine runs");
        serde_json::from_str(&line).unwrap()
    }

    async fn execute(&mut self, command: &str, arguments: &Value) {
        use tokio::io::AsyncWriteExt;
        let mut message = serde_json::json!({ "execute": command });
        if !arguments.is_null() {
            message["arguments"] = arguments.clone();
        }
        self.input.write_all(message.to_string().as_bytes()).await.unwrap();
        loop {
            let answer = self.next().await;
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return;
            }
        }
    }

    async fn event(&mut self, name: &str, device: &str) {
        loop {
            let message = self.next().await;
            if message["event"] == name && message["data"]["device"] == device {
                return;
            }
        }
    }
}
