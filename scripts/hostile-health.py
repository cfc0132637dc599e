#!/usr/bin/env python3
"""How long GET /health takes while a hostile program of the sandbox does its worst.

    scripts/hostile-health.py [--seconds 8] [--attackers 4] [--nice -20] [--user nobody]
                              [--only NAME] [path of envd]

Starts an envd of its own, with a token, on a free port of the loopback and on a unix socket, and for
each attack runs programs against it, as another user and at nice 0. Meanwhile it calls GET /health on
fresh connections, one after the other: over TCP, where the attackers are, and over the unix socket,
where they are not, as the host is over vsock. Prints the distribution of both in milliseconds, and how
many calls over TCP were refused. Everything is bounded: in time, in programs and in connections.

It judges nothing: a machine with something else to do gives other figures, so compare those of one
run with those of the attack `nothing`.
"""

import argparse
import importlib.util
import os
import pathlib
import pwd
import signal
import socket
import tempfile
import time

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HELD = 400  # connections of one attacker


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.settimeout(1)
    return connection


def nothing(port):
    time.sleep(1)


def idle(port):
    """Opens all the connections it gets, and again those that are closed."""
    held = []
    while True:
        try:
            held.append(connect(port))
        except OSError:
            time.sleep(0.01)
        if len(held) >= HELD:
            time.sleep(1)
            held.clear()


def churn(port):
    """Connects and leaves, as fast as it can."""
    while True:
        connect(port).close()


def slow(port):
    """Sends the heads of many requests, a byte at a time."""
    held = [connect(port) for _ in range(HELD // 2)]
    for connection in held:
        connection.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
    while True:
        for connection in held:
            connection.send(b"x")


def heads(port):
    """Sends heads of 120 KiB, which are read to the end."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (120 << 10) + b"\r\n\r\n"
    while True:
        with connect(port) as connection:
            for _ in range(20):
                connection.sendall(head)
                connection.recv(4096)


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def resets(port):
    """Takes HTTP/2 requests back as it sends them."""
    bytes_ = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    for number in range(5000):
        bytes_ += frame(1, 5, 2 * number + 1, b"\x82\x86\x84\x41\x01x")
        bytes_ += frame(3, 0, 2 * number + 1, (8).to_bytes(4, "big"))
    while True:
        with connect(port) as connection:
            connection.sendall(bytes_)
            while connection.recv(65536):
                pass


def calls(port):
    """Calls what it may, and what it may not, without a pause and without waiting."""
    batch = (HEALTH + b"POST /process.Process/List HTTP/1.1\r\nHost: localhost\r\n"
             b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}") * 50
    while True:
        with connect(port) as connection:
            for _ in range(50):
                connection.sendall(batch)
                connection.recv(1 << 20)


def inits(port):
    """Tries tokens."""
    body = b'{"accessToken":"wrong","envVars":{"A":"' + b"x" * 30000 + b'"}}'
    head = b"POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    while True:
        with connect(port) as connection:
            for _ in range(100):
                connection.sendall(head + body)
                connection.recv(4096)


def burn(port):
    """Takes all the CPU there is."""
    while True:
        pass


ATTACKS = [nothing, idle, churn, slow, heads, resets, calls, inits, burn]


def attack(action, port, user):
    """A program that does this, whatever goes wrong, until it is killed."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
        # Also when whoever started it is no more.
        signal.alarm(120)
        while True:
            try:
                action(port)
            except OSError:
                pass
    finally:
        os._exit(0)


def call(make):
    begun = time.perf_counter()
    try:
        with make() as connection:
            connection.settimeout(10)
            connection.sendall(HEALTH)
            answer = connection.recv(4096)
    except OSError:
        answer = b""
    took = (time.perf_counter() - begun) * 1000
    return took, answer.startswith(b"HTTP/1.1 204 ")


def over_unix(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--attackers", type=int, default=4)
    parser.add_argument("--nice", type=int, default=0, help="of envd; its systemd unit has -20")
    parser.add_argument("--user", default="nobody", help="who attacks, when this runs as root")
    parser.add_argument("--only", help="one attack: " + ", ".join(a.__name__ for a in ATTACKS))
    parser.add_argument("envd", nargs="?", default="target/debug/envd")
    args = parser.parse_args()
    # Where the other script is, with how to start one.
    place = pathlib.Path(__file__).with_name("init-latency.py")
    spec = importlib.util.spec_from_file_location("init_latency", place)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    user = pwd.getpwnam(args.user)
    with tempfile.TemporaryDirectory() as directory:
        path, token = f"{directory}/socket", f"{directory}/token"
        pathlib.Path(token).write_text("token")
        more = ["--listen", f"unix://{path}", "--access-token-file", token, "--mmds", "none"]
        for action in ATTACKS:
            if args.only not in (None, action.__name__):
                continue
            daemon, port = other.start(args.envd, args.nice, more)
            attackers = [attack(action, port, user) for _ in range(args.attackers)]
            try:
                if args.nice < 0:
                    os.nice(args.nice - os.nice(0))
                    other.prefer("self", args.nice)
                time.sleep(1)
                tcp, unix, refused = [], [], 0
                end = time.monotonic() + args.seconds
                while time.monotonic() < end:
                    took, answered = call(lambda: socket.create_connection(("127.0.0.1", port), 10))
                    tcp.append(took)
                    refused += not answered
                    took, answered = call(lambda: over_unix(path))
                    assert answered, "refused over the unix socket"
                    unix.append(took)
                    time.sleep(0.005)
            finally:
                for attacker in attackers:
                    os.kill(attacker, signal.SIGKILL)
                    os.waitpid(attacker, 0)
                daemon.terminate()
                daemon.wait(timeout=30)
            for name, times in [("tcp", tcp), ("unix", unix)]:
                times.sort()
                at = lambda share: times[min(len(times) - 1, int(share * len(times)))]
                print(
                    f"{action.__name__:<8} {name:<5} p50 {at(0.5):7.2f}  p90 {at(0.9):7.2f}"
                    f"  p99 {at(0.99):7.2f}  max {times[-1]:7.2f} ms  ({len(times)} calls"
                    + (f", {refused} refused)" if name == "tcp" else ")"),
                    flush=True,
                )


if __name__ == "__main__":
    main()
