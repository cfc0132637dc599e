//! The text for people who ask for it.

/// What `-help` prints.
pub const USAGE: &str = "\
Usage: envd [flags]
       envd init [flags]               as PID 1, with the flags for the daemon
       envd wait CONDITION...          wait for a port, URL, process, file or time
       envd poweroff | reboot | halt   ask PID 1 to end the machine

Where to listen:
  --listen ADDRESS        tcp://HOST:PORT, unix:///PATH[?mode=0660], vsock://[CID:]PORT;
                          tls://HOST:PORT?cert=PATH&key=PATH[&client_ca=PATH], if it was built in;
                          may be given several times; `?optional` behind an address makes
                          it no error that it cannot be had (default tcp://0.0.0.0:49983)
  --port N                short for --listen tcp://0.0.0.0:N
  --ready ADDRESS         connect there once calls are served, and write one line of JSON
                          with version, times since boot and addresses; vsock://PORT is
                          the host's

Whom to serve:
  --default-user NAME     the user for calls that name none: NAME or UID, and :GROUP or :GID
                          behind it if need be
                          (default root, or without root the user who runs envd)
  --default-workdir PATH  where relative paths and processes start (default the user's home)
  --file-access MODE      strict: operations on files have their user's own rights always;
                          compatible: root's, until others could decide where a path leads
                          (default compatible)

Whom to let in:
  --access-token-file PATH
                          the access token from the start; its first line is read
  --require-token         serve nobody but health and /init while there is no access token
  --trust-uid N           a user who needs none over unix sockets; may be given several times
  --trust-cid N           a machine that needs none over vsock, 2 is the host; as above
  --trust-certificates    clients of a tls:// listener with client_ca need none

What the host may set up:
  --template PATH         the template's start and ready commands, with drop-ins beside it in
                          a directory of the same name that ends in .d
                          (default /etc/envd/template.toml, if it is there)
  --mmds HOST:PORT        Firecracker's metadata service, or none
                          (default 169.254.169.254:80, with -isnotfc none)
  --no-clock              /init does not set the clock
  --guest-root PATH       where /etc and /run are, for what /init writes (default /)

Limits:
  --max-connections N     connections at the same time, over all listeners (default 1024)
  --max-message-bytes N   the largest request message (default 67108864)
  --max-buffered-bytes N  all request messages that wait in memory, together
                          (default 268435456)
  --header-timeout N      seconds that a client may take for the head of a request (default 30)
  --stall-timeout N       seconds that a client may take nothing while nothing is short (default
                          14400), or send nothing of a message that it has begun (at most 60)
  --idle-timeout N        seconds that a connection without a call stays open (default 640)
  --shutdown-grace N      seconds that unary calls and transfers may go on after SIGTERM (default:
                          they end at once, as streams do)
  --watcher-expiry N      seconds that a watcher is kept that nobody polls (default 3600)
  --cursor-retention N    seconds that a watch with cursors is kept without its stream
                          (default 300)

Processes:
  --keep-processes        SIGTERM to the daemon leaves them running; otherwise they get SIGHUP and
                          SIGTERM, and SIGKILL half a second later
  --max-processes N       at the same time (default 4096)
  --kill-scope SCOPE      what dies of a SIGKILL that names no scope, and of a call's deadline:
                          process, as upstream has it, or tree, with all that descends from it
                          (default what the template says, or process)
  --output-window N       bytes of output that a process's journal keeps in memory, and that a
                          reader may be behind (default 1048576)
  --output-total N        bytes of output of all processes in memory; beyond it what nobody reads
                          goes sooner (default 268435456)
  --output-stall-timeout N  seconds that a reader may hold up a process without taking anything
                          (default 30 while another reader waits or memory is short, else 14400)
  --spill-dir PATH        where output goes that a client wants kept on disk
                          (default /run/envd/journal)
  --drain-grace N         milliseconds that the end of a process waits for background children
                          that hold its output open, while they are silent and use no
                          processor time (default 500)
  --drain-limit N         milliseconds that it waits for them in all, at least the grace
                          (default 5000)
  --retention N           seconds that an ended process is kept, with its output
                          (default 600, at least 30)
  --max-retained N        ended processes that are kept (default 256)

Telemetry:
  --otlp ADDRESS          an OpenTelemetry collector (gRPC), if that was built in:
                          http://HOST:PORT, unix:///PATH or vsock://[CID:]PORT
                          (default OTEL_EXPORTER_OTLP_ENDPOINT of the environment)

Other:
  -isnotfc                not in a Firecracker VM
  -resume-handover        closed until /init: this envd goes on for another one
  -no-cgroups             do not use cgroups
  -cgroup-root PATH       where cgroup2 is mounted (default /sys/fs/cgroup)
  -verbose                log more
  -version                print the version of E2B's envd that this one stands for
  --version               print that, and its own on a line of its own
  -commit                 print the commit that it was built from
  -help                   print this and exit

Every flag may be written with one dash or two.
";
