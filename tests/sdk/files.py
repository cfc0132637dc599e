"""Every method of `files` of both Python SDKs, with every parameter, against an envd in debug mode.

    E2B_DEBUG=true E2B_SANDBOX_URL=http://127.0.0.1:49983 python files.py

What is called is recorded and compared with what the SDK has: a method or parameter that a new
release adds makes it fail. Exits 0 when envd behaves as the SDK's users expect.
"""

import asyncio
import inspect
import io
import os

from e2b import (
    AsyncSandbox,
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    Sandbox,
    TimeoutException,
)

# A bound on everything that is waited for, in seconds.
DEADLINE = 30
# The user that calls are made as; another one, where the daemon may switch users.
USER = os.environ.get("ENVD_TEST_USER")
# Text of this length comes compressed to those who accept it.
LINES = "one line of many ✓\n" * 5_000
DATA = os.urandom(256 * 1024)


class Recorder:
    """The `files` of a sandbox; remembers the parameters that its methods were called with."""

    def __init__(self, files):
        self.files = files
        self.used = {}

    def __getattr__(self, name):
        method = getattr(self.files, name)
        signature = inspect.signature(method)

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            self.used.setdefault(name, set()).update(bound.arguments)
            return method(*args, **kwargs)

        return call

    def check(self):
        """Everything that there is has been used."""
        methods = inspect.getmembers(type(self.files), inspect.isfunction)
        for name, method in methods:
            if name.startswith("_"):
                continue
            there = set(inspect.signature(method).parameters) - {"self"}
            missing = there - self.used.get(name, set())
            assert not missing, f"{name} was not tried with {sorted(missing)}"


# What both are asked. The calls of the asynchronous one are waited for by `asynchronous`.


async def value(result):
    return await result if inspect.isawaitable(result) else result


async def raises(exception, call):
    """Returns the exception that the call must raise."""
    try:
        result = await value(call())
    except exception as raised:
        return raised
    raise AssertionError(f"{exception.__name__} was not raised, the result is {result!r}")


async def joined(stream):
    stream = await value(stream)
    if hasattr(stream, "__aiter__"):
        return b"".join([bytes(part) async for part in stream])
    return b"".join(bytes(part) for part in stream)


async def everything(files, top, chunks):
    common = {"user": USER, "request_timeout": DEADLINE}
    # The directory belongs to whoever the calls are made as.
    assert await value(files.make_dir(top, **common))
    assert not await value(files.make_dir(top, **common))
    assert await value(files.exists(top, **common))
    assert not await value(files.exists(f"{top}/missing", **common))

    # write and read, in every form.
    path = f"{top}/a folder/ünïcode + 100% \"quoted\".txt"
    for options in [
        {},
        {"use_octet_stream": True},
        {"use_octet_stream": False},
        {"gzip": True},
    ]:
        for data, want in [
            ("text ✓", "text ✓".encode()),
            ("", b""),
            (LINES, LINES.encode()),
            (DATA, DATA),
            (io.BytesIO(DATA), DATA),
            (io.StringIO("text ✓"), "text ✓".encode()),
            (chunks(), b"one,two"),
        ]:
            if options.get("use_octet_stream") is False and want == b"one,two":
                # The SDK streams what it is given piece by piece in no other way.
                await raises(InvalidArgumentException, lambda: files.write(path, data, **options))
                continue
            metadata = {"author": "ada", "with": "a space, and ~!@#"}
            info = await value(files.write(path, data, metadata=metadata, **options, **common))
            assert (info.path, info.name) == (path, os.path.basename(path)), info
            assert (info.type, info.metadata) == (FileType.FILE, metadata), info
            # All ways to read what was written in one way, and one way for the others.
            for gzip in [] if options else [False, True]:
                got = await value(files.read(path, format="bytes", gzip=gzip, **common))
                assert bytes(got) == want, (options, len(want), gzip)
                stream = files.read(
                    path, format="stream", gzip=gzip, stream_idle_timeout=DEADLINE, **common
                )
                assert await joined(stream) == want, (options, len(want), gzip)
                if want != DATA:
                    got = await value(files.read(path, format="text", gzip=gzip, **common))
                    assert got == want.decode(), (options, len(want), gzip)
            if options:
                got = await value(files.read(path, format="bytes"))
                assert bytes(got) == want, (options, len(want))

    info = await value(files.get_info(path, **common))
    assert (info.name, info.path, info.type) == (os.path.basename(path), path, FileType.FILE)
    assert (info.size, info.mode, info.permissions) == (7, 0o644, "-rw-r--r--"), info
    assert info.metadata == {"author": "ada", "with": "a space, and ~!@#"}, info
    assert info.symlink_target is None
    if USER:
        assert info.owner == USER, info
    await value(files.write(path, "without"))
    assert (await value(files.get_info(path))).metadata is None

    # Several at once.
    for number, options in enumerate(
        [{}, {"use_octet_stream": True}, {"use_octet_stream": False}, {"gzip": True}]
    ):
        batch = f"{top}/batch {number}"
        written = await value(
            files.write_files(
                [
                    {"path": f"{batch}/text", "data": "text"},
                    {"path": f"{batch}/deep/er/bytes", "data": b"\x00\xff"},
                    {"path": f"{batch}/file-like", "data": io.BytesIO(DATA)},
                    {"path": f"{batch}/empty", "data": b""},
                ],
                metadata={"batch": str(number)},
                **options,
                **common,
            )
        )
        names = ["text", "deep/er/bytes", "file-like", "empty"]
        assert [info.path for info in written] == [f"{batch}/{name}" for name in names]
        assert all(info.metadata == {"batch": str(number)} for info in written), written
        contents = [await value(files.read(f"{batch}/{name}", "bytes")) for name in names]
        assert [bytes(content) for content in contents] == [b"text", b"\x00\xff", DATA, b""]
    assert await value(files.write_files([])) == []

    # list.
    batch = f"{top}/batch 0"
    for depth, names in [
        (1, ["deep", "empty", "file-like", "text"]),
        (None, ["deep", "empty", "file-like", "text"]),
        (2, ["deep", "deep/er", "empty", "file-like", "text"]),
        (9, ["deep", "deep/er", "deep/er/bytes", "empty", "file-like", "text"]),
    ]:
        entries = await value(files.list(batch, depth=depth, **common))
        assert [entry.path.removeprefix(f"{batch}/") for entry in entries] == names, depth
        kinds = [entry.type == FileType.DIR for entry in entries]
        assert kinds == [name in ("deep", "deep/er") for name in names], depth
    await raises(InvalidArgumentException, lambda: files.list(batch, depth=0))
    await raises(InvalidArgumentException, lambda: files.list(f"{batch}/text"))

    # rename and remove.
    moved = await value(files.rename(f"{batch}/text", f"{top}/new/place", **common))
    assert (moved.path, moved.name, moved.size) == (f"{top}/new/place", "place", 4)
    assert not await value(files.exists(f"{batch}/text"))
    await value(files.rename(f"{top}/new/place", f"{batch}/empty"))
    assert await value(files.read(f"{batch}/empty")) == "text"
    await value(files.remove(f"{batch}/empty", **common))
    await value(files.remove(f"{batch}/empty"))
    await value(files.remove(batch))
    assert not await value(files.exists(batch))

    # What is not there, or is something else.
    missing = f"{top}/missing"
    for call in [
        lambda: files.read(missing),
        lambda: files.read(missing, format="bytes"),
        lambda: joined(files.read(missing, format="stream")),
        lambda: files.get_info(missing),
        lambda: files.list(missing),
        lambda: files.rename(missing, f"{top}/x"),
    ]:
        await raises(FileNotFoundException, call)
    await raises(InvalidArgumentException, lambda: files.read(top))
    await raises(InvalidArgumentException, lambda: files.write(top, "x"))
    await raises(
        InvalidArgumentException,
        lambda: files.write(f"{top}/x", "x", metadata={"k": "not ASCII: ✓"}),
    )


CREATE, WRITE, REMOVE, RENAME, CHMOD = (
    FilesystemEventType.CREATE,
    FilesystemEventType.WRITE,
    FilesystemEventType.REMOVE,
    FilesystemEventType.RENAME,
    FilesystemEventType.CHMOD,
)


def watch_by_asking(files, top):
    """The synchronous SDK asks for what has come."""
    files.make_dir(f"{top}/sub", user=USER)
    flat = files.watch_dir(top, user=USER, request_timeout=DEADLINE)
    deep = files.watch_dir(
        top,
        user=USER,
        request_timeout=DEADLINE,
        recursive=True,
        include_entry=True,
        allow_network_mounts=True,
    )

    def told(handle):
        events = [(event.name, event.type) for event in handle.get_new_events(DEADLINE)]
        # To truncate and to write are two, which the kernel makes one of where it can.
        return [event for before, event in zip([None] + events, events) if before != event]

    files.write(f"{top}/f", "1", user=USER)
    new = [("f", CREATE), ("f", CHMOD), ("f", WRITE)]
    events = told(flat)
    assert events == new, events
    assert told(deep) == new
    files.write(f"{top}/f", "2", user=USER, metadata={"k": "v"})
    events = told(flat)
    assert events == [("f", CHMOD), ("f", WRITE), ("f", CHMOD)], events
    deep.get_new_events()
    files.write(f"{top}/sub/g", "1", user=USER)
    assert told(flat) == []
    events = deep.get_new_events()
    assert {event.name for event in events} == {"sub/g"}, events
    assert all(event.entry.path == f"{top}/sub/g" for event in events), events
    files.rename(f"{top}/f", f"{top}/h", user=USER)
    assert told(flat) == [("f", RENAME), ("h", CREATE)]
    files.remove(f"{top}/h", user=USER)
    assert told(flat) == [("h", REMOVE)]
    files.remove(f"{top}/sub", user=USER)
    names = {name for name, kind in told(deep) if kind == REMOVE}
    assert {"h", "sub/g", "sub"} <= names, names
    for handle in [flat, deep]:
        handle.stop(DEADLINE)
    raised = None
    try:
        flat.get_new_events()
    except Exception as error:  # the SDK's own refusal, before any request
        raised = error
    assert raised is not None


async def watch_by_being_told(files, top):
    """The asynchronous one is called back."""
    await files.make_dir(f"{top}/sub", user=USER)
    events, ends, news = [], [], asyncio.Event()

    async def on_event(event):
        events.append(event)
        news.set()

    async def on_exit(error):
        ends.append(error)
        news.set()

    async def until(what, condition):
        try:
            async with asyncio.timeout(DEADLINE):
                while not condition():
                    news.clear()
                    await news.wait()
        except TimeoutError:
            raise AssertionError(f"not within {DEADLINE} s: {what}; got {events}") from None

    def told():
        return [(event.name, event.type) for event in events]

    handle = await files.watch_dir(
        top,
        on_event=on_event,
        on_exit=on_exit,
        user=USER,
        request_timeout=DEADLINE,
        timeout=0,
        recursive=True,
        include_entry=True,
        allow_network_mounts=True,
    )
    await files.write(f"{top}/f", "1", user=USER)
    await files.write(f"{top}/sub/g", "1", user=USER)
    await until("the write of sub/g", lambda: ("sub/g", WRITE) in told())
    kinds = [CREATE, CHMOD, WRITE]
    assert told() == [("f", kind) for kind in kinds] + [("sub/g", kind) for kind in kinds], events
    assert events[-1].entry.path == f"{top}/sub/g", events
    await files.rename(f"{top}/f", f"{top}/h", user=USER)
    await files.remove(f"{top}/h", user=USER)
    await until("the removal of h", lambda: ("h", REMOVE) in told())
    assert told()[6:] == [("f", RENAME), ("h", CREATE), ("h", REMOVE)], events
    await handle.stop()
    assert ends == [None], ends

    # One that ends by itself.
    ends.clear()
    await files.watch_dir(top, on_event=on_event, on_exit=on_exit, user=USER, timeout=1)
    await until("the end of a watch of one second", lambda: ends)
    assert isinstance(ends[0], TimeoutException), ends

    for path, exception in [
        (f"{top}/missing", FileNotFoundException),
        (f"{top}/plain", InvalidArgumentException),
    ]:
        await files.write(f"{top}/plain", "")
        await raises(exception, lambda: files.watch_dir(path, on_event=on_event))


def synchronous():
    sandbox = Sandbox.create()
    directory = sandbox.commands.run("d=$(mktemp -d); chmod 777 $d; echo $d").stdout.strip()
    files = Recorder(sandbox.files)
    asyncio.run(everything(files, f"{directory}/files", lambda: iter([b"one,", b"two"])))
    watch_by_asking(files, f"{directory}/watched")
    files.check()
    sandbox.files.remove(directory)


async def asynchronous():
    sandbox = await AsyncSandbox.create()
    directory = (await sandbox.commands.run("d=$(mktemp -d); chmod 777 $d; echo $d")).stdout.strip()
    files = Recorder(sandbox.files)

    async def chunks():
        yield b"one,"
        yield b"two"

    await everything(files, f"{directory}/files", chunks)
    await watch_by_being_told(files, f"{directory}/watched")
    files.check()
    await sandbox.files.remove(directory)


if __name__ == "__main__":
    synchronous()
    print("ok: synchronous", flush=True)
    asyncio.run(asynchronous())
    print("ok: asynchronous", flush=True)
