"""One program for every release of the Python SDK, old and new, against an envd in debug mode.

    E2B_DEBUG=true E2B_SANDBOX_URL=http://127.0.0.1:49983 ENVD_TEST_SELF=root python smoke.py

It uses what all releases from 1.0 on have. Releases up to 1.5.2 refuse answers with fields that they
do not know. ENVD_TEST_SELF is the name of the user as whom the daemon runs. Exits 0 when all is as the
SDK's users expect, and otherwise with the assertion that failed.
"""

import inspect
import os
import time
import urllib.parse

from e2b import CommandExitException, PtySize, Sandbox, TimeoutException

# A bound on everything that is waited for, in seconds.
DEADLINE = 60
ME = os.environ["ENVD_TEST_SELF"]


def connect():
    """The sandbox. Releases before E2B_SANDBOX_URL know a port of localhost only."""
    url = urllib.parse.urlsplit(os.environ["E2B_SANDBOX_URL"])
    Sandbox.envd_port = url.port
    # From 2.0 on the constructor is deprecated.
    create = Sandbox.create if "create" in vars(Sandbox) else Sandbox
    # Some releases look at the argument alone, and not at E2B_DEBUG.
    return create(debug=True)


def start(sandbox, command):
    """A command with an open stdin; older releases always open it."""
    options = {"user": ME, "background": True, "timeout": DEADLINE}
    if "stdin" in inspect.signature(sandbox.commands.run).parameters:
        options["stdin"] = True
    return sandbox.commands.run(command, **options)


def eventually(what, condition):
    """Asks until there is something."""
    end = time.monotonic() + DEADLINE
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"not within {DEADLINE} s: {what}"
        time.sleep(0.02)


def commands(sandbox):
    printed = []
    result = sandbox.commands.run(
        "echo out; echo err >&2; echo $GREETING; pwd",
        user=ME,
        cwd="/",
        envs={"GREETING": "hello"},
        on_stdout=printed.append,
        timeout=DEADLINE,
    )
    assert (result.stdout, result.stderr) == ("out\nhello\n/\n", "err\n"), result
    assert result.exit_code == 0 and "".join(printed) == "out\nhello\n/\n"
    try:
        sandbox.commands.run("echo no >&2; exit 7", user=ME, timeout=DEADLINE)
        raise AssertionError("exit code 7 is no error")
    except CommandExitException as error:
        assert (error.exit_code, error.stderr) == (7, "no\n"), error
    try:
        sandbox.commands.run("sleep 600", user=ME, timeout=1)
        raise AssertionError("no timeout")
    except TimeoutException:
        pass

    cat = start(sandbox, "cat")
    listed = [process for process in sandbox.commands.list() if process.pid == cat.pid]
    assert len(listed) == 1 and listed[0].args[-1] == "cat", listed
    sandbox.commands.send_stdin(cat.pid, "line\n")
    for stdout, _, _ in cat:
        assert stdout == "line\n", stdout
        break
    assert sandbox.commands.kill(cat.pid)
    eventually("the killed process is gone", lambda: not sandbox.commands.kill(cat.pid))

    sleeping = start(sandbox, "sleep 600")
    again = sandbox.commands.connect(sleeping.pid, timeout=DEADLINE)
    assert again.pid == sleeping.pid and again.kill()
    try:
        again.wait()
        raise AssertionError("a kill is no error")
    except CommandExitException as error:
        assert error.exit_code != 0, error


def terminals(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), user=ME, timeout=DEADLINE)
    sandbox.pty.resize(terminal.pid, PtySize(rows=11, cols=22))
    sandbox.pty.send_stdin(terminal.pid, b"stty size; exit\n")
    printed = b"".join(pty or b"" for _, _, pty in terminal)
    assert b"11 22" in printed, printed


def files(sandbox):
    top = sandbox.commands.run("mktemp -d", user=ME, timeout=DEADLINE).stdout.strip()
    here = {"user": ME}
    written = sandbox.files.write(f"{top}/a.txt", "content ä", ME)
    assert (written.name, written.path) == ("a.txt", f"{top}/a.txt"), written
    assert sandbox.files.read(f"{top}/a.txt", **here) == "content ä"
    assert bytes(sandbox.files.read(f"{top}/a.txt", format="bytes", **here)) == "content ä".encode()
    assert sandbox.files.make_dir(f"{top}/dir", **here)
    assert not sandbox.files.make_dir(f"{top}/dir", **here)
    moved = sandbox.files.rename(f"{top}/a.txt", f"{top}/dir/b.txt", **here)
    assert (moved.name, moved.path) == ("b.txt", f"{top}/dir/b.txt"), moved
    sandbox.commands.run(f"ln -s b.txt {top}/dir/link", user=ME, timeout=DEADLINE)
    listed = sandbox.files.list(f"{top}/dir", **here)
    assert [entry.name for entry in listed] == ["b.txt", "link"], listed
    assert [entry.type.value for entry in listed] == ["file", "file"], listed
    assert sandbox.files.exists(f"{top}/dir/b.txt", **here)

    watch = sandbox.files.watch_dir(top, **here)
    sandbox.files.write(f"{top}/new.txt", "new", ME)
    seen = []

    def created():
        seen.extend((event.type.value, event.name) for event in watch.get_new_events())
        return ("create", "new.txt") in seen and ("write", "new.txt") in seen

    eventually("the new file is reported", created)
    watch.stop()

    sandbox.files.remove(top, **here)
    assert not sandbox.files.exists(top, **here)


def main():
    sandbox = connect()
    commands(sandbox)
    terminals(sandbox)
    files(sandbox)
    print("all as expected")


main()
