"""The published Python SDK against envd in a guest: what a user of a sandbox does first."""

import hashlib
import os
import random

from e2b import PtySize, Sandbox

sandbox = Sandbox.create()
assert sandbox.is_running()

done = sandbox.commands.run("echo hello; echo oops >&2; id -un")
assert (done.stdout, done.stderr, done.exit_code) == ("hello\nuser\n", "oops\n", 0), done

content = random.Random(1).randbytes(1 << 20)
sandbox.files.write("/home/user/data/random", content)
assert bytes(sandbox.files.read("/home/user/data/random", format="bytes")) == content
sums = sandbox.commands.run("sha256sum /home/user/data/random").stdout
assert sums.split()[0] == hashlib.sha256(content).hexdigest(), sums
assert [entry.name for entry in sandbox.files.list("/home/user/data")] == ["random"]

watch = sandbox.files.watch_dir("/home/user/data")
sandbox.files.write("/home/user/data/new", "x")
events = [(event.name, event.type.value) for event in watch.get_new_events()]
assert events == [("new", "create"), ("new", "chmod"), ("new", "write")], events
watch.stop()
sandbox.files.remove("/home/user/data")
assert not sandbox.files.exists("/home/user/data")

cat = sandbox.commands.run("cat", background=True, stdin=True)
assert cat.pid in [process.pid for process in sandbox.commands.list()]
sandbox.commands.send_stdin(cat.pid, "fed")
sandbox.commands.close_stdin(cat.pid)
assert cat.wait().stdout == "fed"

terminal = sandbox.pty.create(PtySize(cols=80, rows=24))
sandbox.pty.resize(terminal.pid, PtySize(cols=100, rows=30))
sandbox.pty.send_stdin(terminal.pid, b"stty size; exit\n")
screen = b"".join(output for _, _, output in terminal if output)
assert b"30 100" in screen, screen

print("all of it works")
