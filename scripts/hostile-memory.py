#!/usr/bin/env python3
"""How much memory the daemon takes while callers do their worst, and how long GET /health takes meanwhile.

    scripts/hostile-memory.py [--seconds 6] [--nice -20] [--buffered 268435456] [--only NAME]
                              [path of envd]

For each attack it starts an envd of its own, with a token, on a free port of the loopback and a unix
socket, and runs one program against it for some seconds. Meanwhile it calls GET /health on fresh
connections, over TCP and over the unix socket in turn. It prints the resident memory before, at its peak
(VmHWM) and 10 s after the attack, in MiB, and the distribution of /health in milliseconds. Resident memory has to stay
below 128 MiB + twice --buffered, and to come back to within 16 MiB of the start; `BOUND` and `KEPT` mark
what does not (after `lists` its processes still run, and their arguments are kept). Everything is bounded: in time, in programs and in connections.
"""

import argparse
import importlib.util
import os
import pathlib
import resource
import signal
import socket
import struct
import tempfile
import threading
import time

TOKEN = "token"
AUTH = b"X-Access-Token: " + TOKEN.encode() + b"\r\n"


def module(name):
    place = pathlib.Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(name.replace("-", "_")[:-3], place)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def connect(port, timeout=30):
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.settimeout(timeout)
    return connection


def varint(number):
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def start_request(cmd, args):
    return field(1, field(1, cmd.encode()) + args)


def post(path, kind, body, auth=AUTH):
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    ).encode()
    return head + auth + b"\r\n" + body


def enveloped(message):
    return struct.pack(">BI", 0, len(message)) + message


def start_call(message):
    return post("/process.Process/Start", "application/connect+proto", enveloped(message))


def many(number, action):
    """Runs an action on so many threads, again and again."""

    def again():
        while True:
            try:
                action()
            except OSError:
                time.sleep(0.01)

    for _ in range(number):
        threading.Thread(target=again, daemon=True).start()
    while True:
        time.sleep(1)


def answer(connection):
    """Reads until there is nothing more."""
    while connection.recv(1 << 20):
        pass


def nothing(port, directory):
    time.sleep(1000)


def starts(port, directory):
    """40 Starts at a time, each with 2 million empty arguments."""
    call = start_call(start_request("/bin/true", b"\x12\x00" * 2_000_000))

    def one():
        with connect(port, 5) as connection:
            connection.sendall(call)
            connection.recv(4096)

    many(40, one)


def json_starts(port, directory):
    """The same in JSON."""
    message = b'{"process":{"cmd":"/bin/true","args":[' + b",".join([b'""'] * 1_300_000) + b"]}}"
    call = post("/process.Process/Start", "application/connect+json", enveloped(message))

    def one():
        with connect(port, 5) as connection:
            connection.sendall(call)
            connection.recv(4096)

    many(40, one)


def lists(port, directory):
    """30 processes with arguments of 1.9 MB, and 40 Lists at a time, of which every fourth is not read."""
    args = b"".join(field(2, b"x" * 127_000) for _ in range(14)) + field(2, b"y" * 100_000)
    sleep = start_request("/bin/sh", field(2, b"-c") + field(2, b"sleep 100") + field(2, b"sh") + args)
    held = []
    for _ in range(30):
        held.append(connect(port))
        held[-1].sendall(start_call(sleep))
        held[-1].recv(4096)
    numbers = iter(range(1 << 30))

    def one():
        number = next(numbers)
        kind = "application/proto" if number % 2 else "application/json"
        with connect(port, 10) as connection:
            connection.sendall(post("/process.Process/List", kind, b"" if number % 2 else b"{}"))
            if number % 4 == 0:
                connection.recv(1000)
                time.sleep(3)
            else:
                answer(connection)

    many(40, one)


def heads(port, directory):
    """1,024 connections without the token, each in the middle of a head of 120 KiB."""
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (120 << 10)
    held = []
    while len(held) < 1024:
        try:
            held.append(connect(port))
            held[-1].setblocking(False)
            held[-1].send(head)
        except OSError:
            pass
    time.sleep(1000)


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def blocks(port, directory):
    """The same with HTTP/2: header blocks that never end."""
    held = []
    block = frame(1, 0, 1, b"\x82\x86\x84\x41\x01x") + b"".join(
        frame(9, 0, 1, b"\x00\x01a\x7f\xff\x7a" + b"x" * 15_870) for _ in range(7)
    )
    while len(held) < 1024:
        try:
            held.append(connect(port))
            held[-1].setblocking(False)
            held[-1].send(PREFACE + frame(4, 0, 0) + block)
        except OSError:
            pass
    time.sleep(1000)


def downloads(port, directory):
    """8,192 downloads of a large file, 256 on a connection, that nobody reads."""
    path = f"{directory}/large"
    query = f"/files?path={path}&username=root".encode()
    token = b"\x00\x0ex-access-token" + bytes([len(TOKEN)]) + TOKEN.encode()
    request = b"\x82\x86\x04" + bytes([len(query)]) + query + b"\x41\x01x" + token
    window = frame(4, 0, 0, struct.pack(">HI", 4, 1 << 20)) + frame(8, 0, 0, struct.pack(">I", 1 << 30))
    held = []
    for _ in range(32):
        connection = connect(port)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(PREFACE + window)
        for number in range(256):
            connection.sendall(frame(1, 5, 2 * number + 1, request))
        held.append(connection)
    time.sleep(1000)


def inits(port, directory):
    """/init with a wrong token and 4 MiB of variables, on 16 connections."""
    pairs = b",".join(b'"a%07d":""' % number for number in range(290_000))
    body = b'{"accessToken":"wrong","envVars":{' + pairs + b"}}"
    call = post("/init", "application/json", body[: 4 << 20], b"")

    def one():
        with connect(port) as connection:
            while True:
                connection.sendall(call)
                if not connection.recv(4096):
                    return

    many(16, one)


ATTACKS = [nothing, starts, json_starts, lists, heads, blocks, downloads, inits]


def attack(action, port, directory):
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        # Also when whoever started it is no more.
        signal.alarm(120)
        action(port, directory)
    except BaseException as error:
        print(action.__name__, repr(error), flush=True)
    finally:
        os._exit(0)


def memory(pid, name):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    return 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--nice", type=int, default=0, help="of envd; its systemd unit has -20")
    parser.add_argument("--buffered", type=int, default=256 << 20, help="--max-buffered-bytes")
    parser.add_argument("--only", help="one attack: " + ", ".join(a.__name__ for a in ATTACKS))
    parser.add_argument("envd", nargs="?", default="target/debug/envd")
    args = parser.parse_args()
    health, other = module("hostile-health.py"), module("init-latency.py")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    bound = 128 + 2 * args.buffered / (1 << 20)
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/large", "wb") as file:
            file.truncate(64 << 20)
        path, token = f"{directory}/socket", f"{directory}/token"
        pathlib.Path(token).write_text(TOKEN)
        more = ["--listen", f"unix://{path}", "--access-token-file", token, "--mmds", "none"]
        more += ["--max-buffered-bytes", str(args.buffered)]
        for action in ATTACKS:
            if args.only not in (None, action.__name__):
                continue
            daemon, port = other.start(args.envd, args.nice, more)
            if args.nice < 0:
                os.nice(args.nice - os.nice(0))
                other.prefer("self", args.nice)
            for _ in range(20):
                health.call(lambda: health.over_unix(path))
            time.sleep(1)
            before = memory(daemon.pid, "VmRSS")
            attacker = attack(action, port, directory)
            times = []
            try:
                end = time.monotonic() + args.seconds
                while time.monotonic() < end:
                    for make in [lambda: connect(port), lambda: health.over_unix(path)]:
                        times.append(health.call(make)[0])
                    time.sleep(0.005)
            finally:
                os.kill(attacker, signal.SIGKILL)
                os.waitpid(attacker, 0)
            time.sleep(10)
            peak, after = memory(daemon.pid, "VmHWM"), memory(daemon.pid, "VmRSS")
            daemon.terminate()
            daemon.wait(timeout=30)
            times.sort()
            at = lambda share: times[min(len(times) - 1, int(share * len(times)))]
            marks = " BOUND" * (peak > bound) + " KEPT" * (after > before + 16)
            print(
                f"{action.__name__:<12} before {before:6.1f}  peak {peak:7.1f}  after {after:6.1f} MiB"
                f"   /health p50 {at(0.5):6.2f}  p99 {at(0.99):7.2f}  max {times[-1]:7.2f} ms"
                f"  ({len(times)} calls){marks}",
                flush=True,
            )


if __name__ == "__main__":
    main()
