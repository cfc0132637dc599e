"""The asynchronous Python SDK against an envd in debug mode.

    E2B_DEBUG=true E2B_SANDBOX_URL=http://127.0.0.1:49983 python python_async.py

Exits 0 when envd behaves as the SDK's users expect, and otherwise with the assertion that failed.
"""

import asyncio
import hashlib
import io
import os

from e2b import (
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    TimeoutException,
)

# A bound on everything that is waited for, in seconds.
DEADLINE = 30
# A pid that no process of a test machine has.
NOBODYS_PID = 999_999_999
# Another user than the default one, if the daemon may switch users.
TEST_USER = os.environ.get("ENVD_TEST_USER")


async def raises(exception, call):
    """Returns the exception that the call must raise."""
    try:
        result = await call
    except exception as raised:
        return raised
    raise AssertionError(f"{exception.__name__} was not raised, the result is {result!r}")


class Collector:
    """A callback that keeps what it is given, and lets a task wait for it."""

    def __init__(self):
        self.items = []
        self.arrived = asyncio.Event()

    def __call__(self, item):
        self.items.append(item)
        self.arrived.set()

    @property
    def text(self):
        """The items as the text that they are pieces of."""
        if self.items and isinstance(self.items[0], bytes):
            return b"".join(self.items).decode("utf-8", "replace")
        return "".join(self.items)

    async def until(self, what, condition):
        """Waits until the condition holds for this collector."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not condition(self):
                    self.arrived.clear()
                    await self.arrived.wait()
        except TimeoutError:
            raise AssertionError(f"not within {DEADLINE} s: {what}; got {self.items}") from None

    async def until_text(self, text):
        await self.until(repr(text), lambda collector: text in collector.text)


async def pids(sandbox):
    return [process.pid for process in await sandbox.commands.list()]


async def commands_run_to_their_end(sandbox, directory):
    assert await sandbox.is_running()

    stdout, stderr = Collector(), Collector()
    result = await sandbox.commands.run(
        "echo hello; echo oops >&2", on_stdout=stdout, on_stderr=stderr
    )
    assert (result.stdout, result.stderr, result.exit_code) == ("hello\n", "oops\n", 0)
    assert (stdout.text, stderr.text) == ("hello\n", "oops\n")

    failed = await raises(CommandExitException, sandbox.commands.run("exit 7"))
    assert (failed.exit_code, failed.error) == (7, "exit status 7")

    result = await sandbox.commands.run("echo $MARK; pwd", envs={"MARK": "x y"}, cwd=directory)
    assert result.stdout == f"x y\n{directory}\n"
    text = "žluťoučký kůň 🐴 你好"
    assert (await sandbox.commands.run(f"echo '{text}'")).stdout == f"{text}\n"
    if TEST_USER:
        result = await sandbox.commands.run("whoami", user=TEST_USER, cwd="/")
        assert result.stdout == f"{TEST_USER}\n"


async def large_output_arrives_whole(sandbox, directory):
    result = await sandbox.commands.run(
        "head -c 786432 /dev/urandom | base64 -w 0 | tee large.txt", cwd=directory
    )
    assert len(result.stdout) == 1024 * 1024, len(result.stdout)
    expected = await sandbox.commands.run("sha256sum < large.txt", cwd=directory)
    assert hashlib.sha256(result.stdout.encode()).hexdigest() == expected.stdout.split()[0]


async def many_commands_at_once(sandbox, directory):
    results = await asyncio.gather(
        *(
            sandbox.commands.run(f"echo {number} | tee {number}.txt", cwd=directory)
            for number in range(12)
        )
    )
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(12)]
    contents = await asyncio.gather(
        *(sandbox.files.read(f"{directory}/{number}.txt") for number in range(12))
    )
    assert contents == [f"{number}\n" for number in range(12)]


async def background_command(sandbox, _):
    output = Collector()
    command = await sandbox.commands.run(
        "cat", background=True, stdin=True, on_stdout=output, timeout=DEADLINE
    )
    assert command.pid in await pids(sandbox)
    await command.send_stdin("first\n")
    await output.until_text("first\n")
    await command.disconnect()

    output = Collector()
    again = await sandbox.commands.connect(command.pid, on_stdout=output, timeout=DEADLINE)
    watcher_output = Collector()
    watcher = await sandbox.commands.connect(
        command.pid, on_stdout=watcher_output, timeout=DEADLINE
    )
    await again.send_stdin("second\n")
    await asyncio.gather(output.until_text("second\n"), watcher_output.until_text("second\n"))
    await again.close_stdin()
    assert (await again.wait()).exit_code == 0
    assert (await watcher.wait()).exit_code == 0
    assert command.pid not in await pids(sandbox)


async def streamed_input(sandbox, _):
    output = Collector()
    command = await sandbox.commands.run(
        "cat", background=True, stdin=True, on_stdout=output, timeout=DEADLINE
    )

    stdin = sandbox.commands.stream_input(command.pid, timeout=DEADLINE)
    await stdin.send("typed\n")
    # It comes back while the stream of input is still open.
    await output.until_text("typed\n")
    await stdin.send(b"answered\n")
    await stdin.close()
    await output.until_text("answered\n")
    await command.close_stdin()
    assert (await command.wait()).stdout == "typed\nanswered\n"

    async def to_nobody():
        lost = sandbox.commands.stream_input(NOBODYS_PID, timeout=DEADLINE)
        await lost.send("lost")
        await lost.close()

    await raises(NotFoundException, to_nobody())


async def kill_and_timeout(sandbox, _):
    command = await sandbox.commands.run(
        "exec sleep 300", background=True, timeout=DEADLINE
    )
    assert await command.kill()
    killed = await raises(CommandExitException, command.wait())
    assert (killed.exit_code, killed.error) == (-1, "signal: killed"), killed
    assert not await sandbox.commands.kill(command.pid)
    assert not await sandbox.commands.kill(NOBODYS_PID)
    await raises(NotFoundException, sandbox.commands.connect(NOBODYS_PID))
    await raises(TimeoutException, sandbox.commands.run("sleep 300", timeout=1))


async def files_are_written_and_read(sandbox, directory):
    path = f"{directory}/a folder/text.txt"
    info = await sandbox.files.write(path, "text ✓", metadata={"author": "ada"})
    assert (info.path, info.metadata) == (path, {"author": "ada"})
    assert await sandbox.files.read(path) == "text ✓"

    data = os.urandom(5 * 1024 * 1024)
    for name, options in [
        ("multipart", {}),
        ("octets", {"use_octet_stream": True}),
        ("gzipped", {"gzip": True}),
    ]:
        await sandbox.files.write(f"{directory}/{name}", data, **options)
        assert await sandbox.files.read(f"{directory}/{name}", format="bytes") == data, name
    parts = [part async for part in await sandbox.files.read(f"{directory}/octets", "stream")]
    assert b"".join(parts) == data

    lines = "one line of many\n" * 100_000
    await sandbox.files.write(f"{directory}/lines.txt", lines)
    assert await sandbox.files.read(f"{directory}/lines.txt") == lines
    parts = [part async for part in await sandbox.files.read(f"{directory}/lines.txt", "stream")]
    assert b"".join(parts) == lines.encode()

    async def stream():
        for _ in range(64):
            yield b"x" * 65536

    await sandbox.files.write(f"{directory}/streamed", stream())
    assert (await sandbox.files.get_info(f"{directory}/streamed")).size == 64 * 65536
    info = await sandbox.files.write(
        f"{directory}/streamed", stream(), metadata={"stage": "final"}, gzip=True
    )
    assert info.metadata == {"stage": "final"}
    assert await sandbox.files.read(f"{directory}/streamed") == "x" * 64 * 65536

    written = await sandbox.files.write_files(
        [
            {"path": f"{directory}/batch/text", "data": "text"},
            {"path": f"{directory}/batch/deep/bytes", "data": io.BytesIO(b"bytes")},
        ]
    )
    assert [info.name for info in written] == ["text", "bytes"]
    names = [
        (entry.path.removeprefix(f"{directory}/batch/"), entry.type)
        for entry in await sandbox.files.list(f"{directory}/batch", depth=2)
    ]
    assert names == [
        ("deep", FileType.DIR),
        ("deep/bytes", FileType.FILE),
        ("text", FileType.FILE),
    ], names
    assert await sandbox.files.make_dir(f"{directory}/made")
    assert not await sandbox.files.make_dir(f"{directory}/made")
    await sandbox.files.rename(f"{directory}/batch/text", f"{directory}/made/moved")
    assert not await sandbox.files.exists(f"{directory}/batch/text")
    assert await sandbox.files.read(f"{directory}/made/moved") == "text"
    await sandbox.files.remove(f"{directory}/made")
    assert not await sandbox.files.exists(f"{directory}/made")
    await raises(FileNotFoundException, sandbox.files.read(f"{directory}/missing"))
    await raises(FileNotFoundException, sandbox.files.get_info(f"{directory}/missing"))


def told(name, kind):
    """The condition that this event is among the collected ones."""
    return lambda collector: (name, kind) in [
        (event.name, event.type) for event in collector.items
    ]


async def watch(sandbox, directory):
    watched = f"{directory}/watched"
    await sandbox.files.make_dir(watched)
    events, ends = Collector(), Collector()
    handle = await sandbox.files.watch_dir(
        watched, on_event=events, on_exit=ends, recursive=True, include_entry=True
    )
    await sandbox.files.write(f"{watched}/new.txt", "new")
    nested = "nested/deeper/file.txt"
    await sandbox.files.write(f"{watched}/{nested}", "nested")
    await events.until("a CREATE of the nested file", told(nested, FilesystemEventType.CREATE))
    # The first write may come before the new directories are watched; a later one may not.
    await sandbox.files.write(f"{watched}/{nested}", "again")
    await events.until("a WRITE of the nested file", told(nested, FilesystemEventType.WRITE))
    of_new = [event for event in events.items if event.name == "new.txt"]
    assert [event.type for event in of_new] == [
        FilesystemEventType.CREATE,
        FilesystemEventType.CHMOD,
        FilesystemEventType.WRITE,
    ], of_new
    assert of_new[0].entry.path == f"{watched}/new.txt"

    await sandbox.files.remove(f"{watched}/new.txt")
    await events.until("a REMOVE", told("new.txt", FilesystemEventType.REMOVE))
    await handle.stop()
    assert ends.items == [None]

    await raises(
        FileNotFoundException,
        sandbox.files.watch_dir(f"{directory}/missing", on_event=events),
    )
    await sandbox.files.write(f"{directory}/plain", "")
    await raises(
        InvalidArgumentException,
        sandbox.files.watch_dir(f"{directory}/plain", on_event=events),
    )


async def terminal(sandbox, directory):
    screen = Collector()
    pty = await sandbox.pty.create(
        PtySize(rows=24, cols=80), on_data=screen, cwd=directory, timeout=DEADLINE
    )
    await sandbox.pty.send_stdin(pty.pid, b'echo "in=$PWD"; stty size\n')
    await screen.until_text(f"in={directory}")
    await screen.until_text("24 80")
    await sandbox.pty.resize(pty.pid, PtySize(rows=50, cols=132))
    await sandbox.pty.send_stdin(pty.pid, b"stty size\n")
    await screen.until_text("50 132")
    await pty.disconnect()

    screen = Collector()
    pty = await sandbox.pty.connect(pty.pid, on_data=screen, timeout=DEADLINE)
    keyboard = sandbox.pty.stream_input(pty.pid, timeout=DEADLINE)
    await keyboard.send(b"echo again=$((6")
    await keyboard.send(b" * 7))\n")
    await keyboard.close()
    await screen.until_text("again=42")
    await sandbox.pty.send_stdin(pty.pid, b"exit\n")
    assert (await pty.wait()).exit_code == 0


async def git(sandbox, directory):
    origin, copy = f"{directory}/origin", f"{directory}/copy"
    await sandbox.git.init(origin, initial_branch="main")
    await sandbox.files.write(f"{origin}/README.md", "# read\n")
    await sandbox.git.add(origin)
    await sandbox.git.commit(origin, "first", author_name="Ada", author_email="ada@example.com")
    assert (await sandbox.git.status(origin)).is_clean
    await sandbox.git.clone(origin, path=copy)
    assert await sandbox.files.read(f"{copy}/README.md") == "# read\n"
    assert (await sandbox.git.branches(copy)).current_branch == "main"


async def main():
    sandbox = await AsyncSandbox.create()
    directory = (await sandbox.commands.run("mktemp -d")).stdout.strip()
    for check in [
        commands_run_to_their_end,
        large_output_arrives_whole,
        many_commands_at_once,
        background_command,
        streamed_input,
        kill_and_timeout,
        files_are_written_and_read,
        watch,
        terminal,
        git,
    ]:
        await check(sandbox, directory)
        print(f"ok: {check.__name__.replace('_', ' ')}", flush=True)
    await sandbox.files.remove(directory)


if __name__ == "__main__":
    asyncio.run(main())
