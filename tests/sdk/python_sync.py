"""The synchronous Python SDK against an envd in debug mode.

    E2B_DEBUG=true E2B_SANDBOX_URL=http://127.0.0.1:49983 python python_sync.py

Exits 0 when envd behaves as the SDK's users expect, and otherwise with the assertion that failed.
"""

import gzip
import hashlib
import io
import os
import time
import urllib.request

from e2b import (
    CommandExitException,
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    Sandbox,
    TimeoutException,
)

# A bound on everything that is waited for, in seconds.
DEADLINE = 30
# A pid that no process of a test machine has.
NOBODYS_PID = 999_999_999
# Another user than the default one, if the daemon may switch users.
TEST_USER = os.environ.get("ENVD_TEST_USER")


def raises(exception, call):
    """Returns the exception that the call must raise."""
    try:
        result = call()
    except exception as raised:
        return raised
    raise AssertionError(f"{exception.__name__} was not raised, the result is {result!r}")


def eventually(what, condition):
    """Asks until the condition holds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE} s: {what}"
        time.sleep(0.02)


class Output:
    """What a command or a terminal has printed so far, read as it is needed."""

    def __init__(self, handle):
        self.events = iter(handle)
        self.seen = ""

    def read_until(self, text):
        """Reads until the text was printed; the handle's own timeout bounds the wait."""
        while text not in self.seen:
            event = next(self.events, None)
            assert event is not None, f"ended without {text!r}: {self.seen!r}"
            stdout, stderr, pty = event
            self.seen += stdout or stderr or (pty or b"").decode("utf-8", "replace")

    def forget(self):
        self.seen = ""


def first_steps():
    """The program that the README shows."""
    sandbox = Sandbox.create()
    assert sandbox.commands.run("echo hello").stdout == "hello\n"

    path = sandbox.commands.run("mktemp -d").stdout.strip()
    sandbox.files.write(f"{path}/greeting.txt", "hello, file")
    assert sandbox.files.read(f"{path}/greeting.txt") == "hello, file"
    assert [entry.name for entry in sandbox.files.list(path)] == ["greeting.txt"]
    sandbox.files.remove(path)
    assert not sandbox.files.exists(path)

    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=DEADLINE)
    screen = Output(terminal)
    sandbox.pty.send_stdin(terminal.pid, b"echo sum=$((40 + 2))\n")
    screen.read_until("sum=42")
    sandbox.pty.resize(terminal.pid, PtySize(rows=40, cols=100))
    sandbox.pty.send_stdin(terminal.pid, b"stty size\n")
    screen.read_until("40 100")
    assert sandbox.pty.kill(terminal.pid)

    reader = sandbox.commands.run("cat", background=True, stdin=True, timeout=DEADLINE)
    assert reader.pid in [process.pid for process in sandbox.commands.list()]
    sandbox.commands.send_stdin(reader.pid, "hello, stdin\n")
    Output(reader).read_until("hello, stdin\n")
    assert sandbox.commands.kill(reader.pid)
    assert raises(CommandExitException, reader.wait).error == "signal: killed"


def sandbox_is_running(sandbox, _):
    assert sandbox.is_running()
    assert sandbox.sandbox_id == "debug_sandbox_id"


def commands_run_to_their_end(sandbox, directory):
    result = sandbox.commands.run("echo hello")
    assert (result.stdout, result.stderr, result.exit_code) == ("hello\n", "", 0)
    assert result.error is None

    result = sandbox.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")

    failed = raises(
        CommandExitException, lambda: sandbox.commands.run("echo why >&2; exit 7")
    )
    assert (failed.exit_code, failed.stderr) == (7, "why\n")
    assert failed.error == "exit status 7", failed.error

    missing = raises(CommandExitException, lambda: sandbox.commands.run("no-such-program"))
    assert missing.exit_code == 127 and "no-such-program" in missing.stderr

    result = sandbox.commands.run(
        'echo "$ONE/$TWO"', envs={"ONE": "1", "TWO": "zwei Wörter"}
    )
    assert result.stdout == "1/zwei Wörter\n"
    assert sandbox.commands.run("pwd", cwd=directory).stdout == f"{directory}\n"
    assert sandbox.commands.run("pwd").stdout == sandbox.commands.run("cd; pwd").stdout
    raises(
        InvalidArgumentException,
        lambda: sandbox.commands.run("pwd", cwd=f"{directory}/missing"),
    )

    text = "žluťoučký kůň 🐴 你好"
    assert sandbox.commands.run(f"echo '{text}'").stdout == f"{text}\n"
    # A character that begins at the end of one page and ends in the next.
    result = sandbox.commands.run("printf 'a%.0s' $(seq 8191); printf 'ž'")
    assert result.stdout == "a" * 8191 + "ž"

    parts = []
    sandbox.commands.run("echo one; echo two", on_stdout=parts.append)
    assert "".join(parts) == "one\ntwo\n"


def commands_run_as_another_user(sandbox, directory):
    if not TEST_USER:
        print("    (ENVD_TEST_USER is not set)")
        return
    result = sandbox.commands.run("whoami; id -un", user=TEST_USER, cwd="/")
    assert result.stdout == f"{TEST_USER}\n{TEST_USER}\n"
    sandbox.files.write(f"{directory}/theirs.txt", "theirs", user=TEST_USER)
    assert sandbox.files.get_info(f"{directory}/theirs.txt").owner == TEST_USER


def large_output_arrives_whole(sandbox, directory):
    result = sandbox.commands.run(
        "head -c 786432 /dev/urandom | base64 -w 0 | tee large.txt", cwd=directory
    )
    assert len(result.stdout) == 1024 * 1024, len(result.stdout)
    expected = sandbox.commands.run("sha256sum < large.txt", cwd=directory).stdout.split()[0]
    assert hashlib.sha256(result.stdout.encode()).hexdigest() == expected


def background_command(sandbox, _):
    command = sandbox.commands.run(
        "cat", background=True, stdin=True, envs={"MARK": "listed"}, timeout=DEADLINE
    )
    listed = [process for process in sandbox.commands.list() if process.pid == command.pid]
    assert len(listed) == 1, listed
    assert (listed[0].cmd, listed[0].args) == ("/bin/bash", ["-l", "-c", "cat"])
    assert listed[0].envs == {"MARK": "listed"}

    output = Output(command)
    sandbox.commands.send_stdin(command.pid, "first\n")
    output.read_until("first\n")

    command.disconnect()
    again = sandbox.commands.connect(command.pid, timeout=DEADLINE)
    assert again.pid == command.pid
    again.send_stdin("second\n")
    Output(again).read_until("second\n")
    again.close_stdin()
    assert again.wait().exit_code == 0
    assert command.pid not in [process.pid for process in sandbox.commands.list()]


def large_input_arrives_whole(sandbox, _):
    text = "0123456789abcdef" * 65536
    command = sandbox.commands.run(
        "sha256sum", background=True, stdin=True, timeout=DEADLINE
    )
    command.send_stdin(text)
    command.close_stdin()
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert command.wait().stdout.split()[0] == expected


def streamed_input(sandbox, _):
    command = sandbox.commands.run("cat", background=True, stdin=True, timeout=DEADLINE)
    output = Output(command)

    def chunks():
        yield "typed\n"
        # The second chunk leaves only when the first has come back.
        output.read_until("typed\n")
        yield b"answered\n"

    sandbox.commands.stream_input(command.pid, chunks(), timeout=DEADLINE)
    output.read_until("answered\n")
    command.close_stdin()
    assert command.wait().exit_code == 0
    raises(
        NotFoundException, lambda: sandbox.commands.stream_input(NOBODYS_PID, ["lost"])
    )


def kill(sandbox, _):
    command = sandbox.commands.run(
        "echo started; exec sleep 300", background=True, timeout=DEADLINE
    )
    Output(command).read_until("started")
    assert command.kill()
    killed = raises(CommandExitException, command.wait)
    assert (killed.exit_code, killed.error) == (-1, "signal: killed"), killed
    raises(CommandExitException, lambda: sandbox.commands.run(f"kill -0 {command.pid}"))
    assert not sandbox.commands.kill(command.pid)
    assert not sandbox.commands.kill(NOBODYS_PID)
    raises(NotFoundException, lambda: sandbox.commands.connect(NOBODYS_PID))


def timeout(sandbox, _):
    raises(TimeoutException, lambda: sandbox.commands.run("sleep 300", timeout=1))
    command = sandbox.commands.run("exec sleep 300", background=True, timeout=1)
    raises(TimeoutException, command.wait)
    eventually(
        "a command is killed at its timeout",
        lambda: command.pid not in [process.pid for process in sandbox.commands.list()],
    )


def files_are_written_and_read(sandbox, directory):
    path = f"{directory}/a folder/ünïcode + 100% \"quoted\".txt"
    info = sandbox.files.write(path, "text ✓")
    assert (info.path, info.name, info.type) == (path, os.path.basename(path), FileType.FILE)
    assert info.metadata is None
    assert sandbox.files.read(path) == "text ✓"
    sandbox.files.write(path, "shorter")
    assert sandbox.files.read(path) == "shorter"

    sandbox.files.write(f"{directory}/empty", "")
    assert sandbox.files.read(f"{directory}/empty") == ""

    data = os.urandom(5 * 1024 * 1024)
    sandbox.files.write(f"{directory}/random", data)
    assert bytes(sandbox.files.read(f"{directory}/random", format="bytes")) == data
    assert bytes(sandbox.files.read(f"{directory}/random", format="bytes", gzip=True)) == data
    assert b"".join(sandbox.files.read(f"{directory}/random", format="stream")) == data
    expected = sandbox.commands.run(f"sha256sum < {directory}/random").stdout.split()[0]
    assert hashlib.sha256(data).hexdigest() == expected

    # Text of this length comes compressed to those who accept it.
    lines = "one line of many ✓\n" * 100_000
    sandbox.files.write(f"{directory}/lines.txt", lines, gzip=True)
    for options in [{}, {"gzip": True}]:
        assert sandbox.files.read(f"{directory}/lines.txt", **options) == lines
        stream = sandbox.files.read(f"{directory}/lines.txt", format="stream", **options)
        assert b"".join(stream) == lines.encode()

    for name, options in [
        ("octets", {"use_octet_stream": True}),
        ("gzipped", {"gzip": True}),
    ]:
        sandbox.files.write(f"{directory}/{name}", data, **options)
        assert bytes(sandbox.files.read(f"{directory}/{name}", format="bytes")) == data, name
    sandbox.files.write(f"{directory}/file-like", io.BytesIO(data))
    assert sandbox.files.get_info(f"{directory}/file-like").size == len(data)
    sandbox.files.write(f"{directory}/iterable", (part for part in [b"one,", b"two"]))
    assert sandbox.files.read(f"{directory}/iterable") == "one,two"

    written = sandbox.files.write_files(
        [
            {"path": f"{directory}/batch/text", "data": "text"},
            {"path": f"{directory}/batch/bytes", "data": b"\x00\xff"},
            {"path": f"{directory}/batch/deep/er/file", "data": io.BytesIO(b"deep")},
        ]
    )
    assert [info.path for info in written] == [
        f"{directory}/batch/{name}" for name in ("text", "bytes", "deep/er/file")
    ]
    assert bytes(sandbox.files.read(f"{directory}/batch/bytes", format="bytes")) == b"\x00\xff"
    assert sandbox.files.read(f"{directory}/batch/deep/er/file") == "deep"

    missing = f"{directory}/missing"
    raises(FileNotFoundException, lambda: sandbox.files.read(missing))
    raises(FileNotFoundException, lambda: sandbox.files.get_info(missing))
    raises(FileNotFoundException, lambda: sandbox.files.list(missing))
    raises(FileNotFoundException, lambda: sandbox.files.rename(missing, f"{missing}-2"))
    raises(InvalidArgumentException, lambda: sandbox.files.read(directory))


def files_by_url(sandbox, directory):
    """The URLs that an SDK hands to a browser."""
    sandbox.files.write(f"{directory}/by url.txt", "by url")
    with urllib.request.urlopen(
        sandbox.download_url(f"{directory}/by url.txt"), timeout=DEADLINE
    ) as response:
        body = response.read()
        if response.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
    assert body == b"by url"


def file_metadata(sandbox, directory):
    path = f"{directory}/described"
    info = sandbox.files.write(path, "1", metadata={"author": "ada", "stage": "draft"})
    assert info.metadata == {"author": "ada", "stage": "draft"}
    assert sandbox.files.get_info(path).metadata == {"author": "ada", "stage": "draft"}
    sandbox.files.write(path, "2", metadata={"stage": "final"}, use_octet_stream=True)
    (listed,) = [entry for entry in sandbox.files.list(directory) if entry.path == path]
    assert listed.metadata == {"stage": "final"}
    sandbox.files.write(path, "3")
    assert sandbox.files.get_info(path).metadata is None


def directories(sandbox, directory):
    top = f"{directory}/top"
    assert sandbox.files.make_dir(f"{top}/middle/bottom")
    assert not sandbox.files.make_dir(f"{top}/middle/bottom")
    sandbox.files.write(f"{top}/middle/file.txt", "12345")
    sandbox.commands.run("ln -s middle/file.txt link", cwd=top)

    names = [entry.path.removeprefix(f"{top}/") for entry in sandbox.files.list(top)]
    assert names == ["link", "middle"], names
    names = [entry.path.removeprefix(f"{top}/") for entry in sandbox.files.list(top, depth=2)]
    assert names == ["link", "middle", "middle/bottom", "middle/file.txt"], names

    info = sandbox.files.get_info(f"{top}/middle/file.txt")
    assert (info.name, info.type, info.size) == ("file.txt", FileType.FILE, 5)
    assert (info.mode, info.permissions) == (0o644, "-rw-r--r--"), info
    owner = sandbox.commands.run("id -un; id -gn").stdout.split()
    assert [info.owner, info.group] == owner
    assert abs(info.modified_time.timestamp() - time.time()) < 60
    assert sandbox.files.get_info(f"{top}/middle").type == FileType.DIR
    assert sandbox.files.get_info(f"{top}/link").symlink_target == f"{top}/middle/file.txt"

    moved = sandbox.files.rename(f"{top}/middle/file.txt", f"{top}/moved.txt")
    assert (moved.path, moved.name) == (f"{top}/moved.txt", "moved.txt")
    assert not sandbox.files.exists(f"{top}/middle/file.txt")
    assert sandbox.files.read(f"{top}/moved.txt") == "12345"

    sandbox.files.remove(f"{top}/moved.txt")
    assert not sandbox.files.exists(f"{top}/moved.txt")
    sandbox.files.remove(f"{top}/moved.txt")
    sandbox.files.remove(top)
    assert not sandbox.files.exists(top)


def watch(sandbox, directory):
    watched = f"{directory}/watched"
    sandbox.files.make_dir(watched)
    handle = sandbox.files.watch_dir(watched)
    sandbox.files.write(f"{watched}/new.txt", "new")
    events = [(event.name, event.type) for event in handle.get_new_events()]
    assert events == [
        ("new.txt", FilesystemEventType.CREATE),
        ("new.txt", FilesystemEventType.CHMOD),
        ("new.txt", FilesystemEventType.WRITE),
    ], events
    assert handle.get_new_events() == []

    sandbox.files.rename(f"{watched}/new.txt", f"{watched}/old.txt")
    events = [(event.name, event.type) for event in handle.get_new_events()]
    assert ("new.txt", FilesystemEventType.RENAME) in events, events
    assert ("old.txt", FilesystemEventType.CREATE) in events, events
    sandbox.files.remove(f"{watched}/old.txt")
    events = [(event.name, event.type) for event in handle.get_new_events()]
    assert ("old.txt", FilesystemEventType.REMOVE) in events, events
    handle.stop()

    with_entries = sandbox.files.watch_dir(watched, recursive=True, include_entry=True)
    sandbox.files.make_dir(f"{watched}/nested")
    sandbox.files.write(f"{watched}/nested/file.txt", "nested")
    written = [
        event
        for event in with_entries.get_new_events()
        if (event.name, event.type) == ("nested/file.txt", FilesystemEventType.WRITE)
    ]
    assert written, "no WRITE of nested/file.txt"
    assert written[-1].entry.path == f"{watched}/nested/file.txt"
    assert written[-1].entry.type == FileType.FILE
    with_entries.stop()

    raises(FileNotFoundException, lambda: sandbox.files.watch_dir(f"{directory}/missing"))
    sandbox.files.write(f"{directory}/plain", "")
    raises(InvalidArgumentException, lambda: sandbox.files.watch_dir(f"{directory}/plain"))


def terminal(sandbox, directory):
    pty = sandbox.pty.create(
        PtySize(rows=24, cols=80), cwd=directory, envs={"COLOUR": "green"}, timeout=DEADLINE
    )
    screen = Output(pty)
    sandbox.pty.send_stdin(pty.pid, b"echo colour=$COLOUR term=$TERM\n")
    screen.read_until("colour=green term=xterm-256color")
    sandbox.pty.send_stdin(pty.pid, b'echo "in=$PWD"; stty size\n')
    screen.read_until(f"in={directory}")
    screen.read_until("24 80")

    sandbox.pty.resize(pty.pid, PtySize(rows=50, cols=132))
    sandbox.pty.send_stdin(pty.pid, b"stty size\n")
    screen.read_until("50 132")

    pty.disconnect()
    pty = sandbox.pty.connect(pty.pid, timeout=DEADLINE)
    screen = Output(pty)
    sandbox.pty.stream_input(pty.pid, [b"echo again=$((6", b" * 7))\n"], timeout=DEADLINE)
    screen.read_until("again=42")

    # ^C ends what runs in the foreground and not the shell. What says that it runs is the command
    # itself: between two of them the shell may miss the signal.
    screen.forget()
    command = b"sh -c 'echo before=$((1 + 1)); exec sleep 300'\n"
    sandbox.pty.send_stdin(pty.pid, command)
    screen.read_until("before=2")
    sandbox.pty.send_stdin(pty.pid, b"\x03")
    sandbox.pty.send_stdin(pty.pid, b"echo after=$((1 + 1))\n")
    screen.read_until("after=2")

    sandbox.pty.send_stdin(pty.pid, b"exit\n")
    assert pty.wait().exit_code == 0
    assert not sandbox.pty.kill(pty.pid)


def git(sandbox, directory):
    origin, copy = f"{directory}/origin", f"{directory}/copy"
    sandbox.git.init(origin, initial_branch="main")
    sandbox.files.write(f"{origin}/README.md", "# it's read\n")
    assert sandbox.git.status(origin).has_untracked
    sandbox.git.add(origin)
    sandbox.git.commit(
        origin, "the first 'commit'", author_name="Ada", author_email="ada@example.com"
    )
    assert sandbox.git.status(origin).is_clean
    sandbox.git.create_branch(origin, "topic")
    branches = sandbox.git.branches(origin)
    assert branches.current_branch == "topic"
    assert sorted(branches.branches) == ["main", "topic"]

    sandbox.git.clone(origin, path=copy, branch="main")
    assert sandbox.files.read(f"{copy}/README.md") == "# it's read\n"
    assert sandbox.git.status(copy).current_branch == "main"
    log = sandbox.commands.run("git log --format='%an: %s'", cwd=copy).stdout
    assert log == "Ada: the first 'commit'\n"


def main():
    first_steps()
    print("ok: first steps")
    sandbox = Sandbox.create()
    directory = sandbox.commands.run("mktemp -d").stdout.strip()
    for check in [
        sandbox_is_running,
        commands_run_to_their_end,
        commands_run_as_another_user,
        large_output_arrives_whole,
        background_command,
        large_input_arrives_whole,
        streamed_input,
        kill,
        timeout,
        files_are_written_and_read,
        files_by_url,
        file_metadata,
        directories,
        watch,
        terminal,
        git,
    ]:
        check(sandbox, directory)
        print(f"ok: {check.__name__.replace('_', ' ')}", flush=True)
    sandbox.files.remove(directory)
    assert sandbox.kill()


if __name__ == "__main__":
    main()
