#!/usr/bin/env python3
"""How long POST /init and GET /health take while processes stream.

    scripts/init-latency.py [--processes 64] [--calls 500] [--nice 0] [--flat-out | --burn]
                            [path of envd]

Starts an envd of its own on a free port of the loopback, has it run processes whose output is read
by one client, and measures calls on fresh connections, one after the other: first while they stream,
then on another envd while nothing runs. Paced processes write 4 KiB ten times a second each; with
--flat-out they write as fast as they can. With --burn they write nothing and take all the CPU there
is, as a hostile program would.

Prints the distribution of each in milliseconds. It judges nothing: a machine with something else to
do gives other figures, so compare those of one run.
"""

import argparse
import base64
import json
import multiprocessing
import os
import re
import selectors
import socket
import struct
import subprocess
import threading
import time

PACED = "exec 3<> <(:); while :; do printf '%4096s' x; read -t 0.1 -u 3; done"
FLAT_OUT = "exec yes"
# For half a minute at most, whatever becomes of this program.
BURN = "echo; exec timeout 30 yes >/dev/null"


def start(envd, nice, more=()):
    flags = ["--listen", "tcp://127.0.0.1:0", "-isnotfc", "--no-clock", *more]
    daemon = subprocess.Popen(
        ["nice", "-n", str(nice), envd, *flags],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    prefer(daemon.pid, nice)
    port = None
    for line in daemon.stderr:
        found = re.search(r"tcp://127\.0\.0\.1:(\d+)", line)
        port = port or (found and int(found.group(1)))
        if '"ready"' in line:
            break
    assert port, "envd did not start"
    # Its log must not fill the pipe.
    threading.Thread(target=lambda: [None for _ in daemon.stderr], daemon=True).start()
    return daemon, port


def prefer(pid, nice):
    """Where the kernel shares the CPU out by session (sched(7), autogroup), nice means little."""
    try:
        with open(f"/proc/{pid}/autogroup", "w") as file:
            file.write(str(nice))
    except OSError:
        pass


def stream(port, script):
    """A connection on which the output of a process comes."""
    process = {"cmd": "/bin/bash", "args": ["-c", script], "cwd": "/"}
    # They end with their connections.
    start = {"process": process, "stdin": False, "stopOnDisconnect": True}
    body = json.dumps(start).encode()
    body = struct.pack(">BI", 0, len(body)) + body
    head = (
        "POST /process.Process/Start HTTP/1.1\r\nHost: localhost\r\n"
        "Content-Type: application/connect+json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + body)
    return connection


def read_all(connections, counted, stop):
    selector = selectors.DefaultSelector()
    for connection in connections:
        selector.register(connection, selectors.EVENT_READ)
    while not stop.is_set():
        for key, _ in selector.select(timeout=0.1):
            counted.value += len(key.fileobj.recv(1 << 16))


def call(port, request, status):
    begun = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        answer = connection.recv(4096)
    took = time.perf_counter() - begun
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    return took * 1000


def measure(what, port, calls):
    env = {f"NAME_{number}": base64.b64encode(bytes(24)).decode() for number in range(20)}
    inits, healths = [], []
    for number in range(calls):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{number:09}Z"
        body = json.dumps({"envVars": env, "accessToken": "t", "timestamp": stamp}).encode()
        head = f"POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        inits.append(call(port, head.encode() + body, 204))
        healths.append(call(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 204))
    for name, times in [("POST /init", inits), ("GET /health", healths)]:
        times.sort()
        at = lambda share: times[min(len(times) - 1, int(share * len(times)))]
        print(
            f"{what:<28} {name:<12} p50 {at(0.5):7.2f}  p90 {at(0.9):7.2f}  p99 {at(0.99):7.2f}"
            f"  max {times[-1]:7.2f} ms  ({len(times)} calls)",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--nice", type=int, default=0, help="of envd; its systemd unit has -20")
    parser.add_argument("--flat-out", action="store_true")
    parser.add_argument("--burn", action="store_true")
    parser.add_argument("envd", nargs="?", default="target/debug/envd")
    args = parser.parse_args()
    daemon, port = start(args.envd, args.nice)
    try:
        script = FLAT_OUT if args.flat_out else BURN if args.burn else PACED
        # Before there is a token, which the streams would have to send.
        connections = [stream(port, script) for _ in range(args.processes)]
        # A process of its own: threads of Python would wait for each other.
        fork = multiprocessing.get_context("fork")
        counted, stop = fork.Value("Q", 0, lock=False), fork.Event()
        reader = fork.Process(target=read_all, args=(connections, counted, stop))
        reader.start()
        if args.nice < 0:
            # Or the client waits for a CPU, and not for envd.
            os.nice(args.nice)
            prefer("self", args.nice)
        deadline = time.monotonic() + 30
        enough = args.processes * (100 if args.burn else 4096)
        while counted.value < enough and time.monotonic() < deadline:
            time.sleep(0.05)
        begun, before = time.monotonic(), counted.value
        doing = "burn" if args.burn else "stream"
        measure(f"{args.processes} processes {doing}", port, args.calls)
        rate = (counted.value - before) / (time.monotonic() - begun) / 1e6
        print(f"meanwhile the client read {rate:.1f} MB/s")
        stop.set()
        reader.join()
        for connection in connections:
            connection.close()
        time.sleep(1)
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)
    daemon, port = start(args.envd, args.nice)
    try:
        measure("nothing else runs", port, args.calls)
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)


if __name__ == "__main__":
    main()
