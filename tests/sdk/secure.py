"""Both Python SDKs in secure mode: the control plane has given out an access token.

    E2B_API_URL=... E2B_API_KEY=... E2B_SANDBOX_URL=http://127.0.0.1:49983 python secure.py

Exits 0 when envd behaves as the SDK's users expect, and otherwise with the assertion that failed.
"""

import asyncio
import os
import time
import urllib.error
import urllib.parse
import urllib.request

from e2b import AsyncSandbox, AuthenticationException, Sandbox

ENVD = os.environ["E2B_SANDBOX_URL"]


def fetch(url, data=None, headers=None):
    """Status and text of a request to a signed URL, sent to where envd really is."""
    query = urllib.parse.urlsplit(url).query
    request = urllib.request.Request(f"{ENVD}/files?{query}", data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def upload(url, content):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    return fetch(url, body, {"Content-Type": "multipart/form-data; boundary=x"})


def signed_urls(sandbox, directory):
    path = f"{directory}/a b+c ä.txt"
    assert upload(sandbox.upload_url(path), b"by url")[0] == 200
    assert sandbox.files.read(path) == "by url"
    assert fetch(sandbox.download_url(path)) == (200, "by url")
    url = sandbox.download_url(path, use_signature_expiration=600)
    assert fetch(url) == (200, "by url")
    late = url.replace("signature_expiration=", "signature_expiration=9")
    assert fetch(late) == (401, '{"code":401,"message":"invalid signature"}\n')
    assert upload(sandbox.download_url(path), b"x")[0] == 401
    # With an expiration, for a user, and as a body without a form.
    user = sandbox.commands.run("id -un").stdout.strip()
    for number, options in enumerate(
        [{}, {"use_signature_expiration": 600}, {"user": user, "use_signature_expiration": 600}]
    ):
        content = f"upload {number}"
        assert upload(sandbox.upload_url(path, **options), content.encode())[0] == 200, options
        assert fetch(sandbox.download_url(path, **options)) == (200, content), options
        octets = {"Content-Type": "application/octet-stream"}
        assert fetch(sandbox.upload_url(path, **options), b"octets", octets)[0] == 200, options
        assert sandbox.files.read(path) == "octets"
    # A signature is of one path, one user and one direction.
    other = sandbox.upload_url(path).replace(urllib.parse.quote(path, safe=""), "%2Ftmp%2Fother")
    assert fetch(other, b"x", {"Content-Type": "application/octet-stream"})[0] == 401
    assert fetch(sandbox.upload_url(path))[0] == 401
    unsigned = urllib.parse.urlencode({"path": path})
    missing = '{"code":401,"message":"missing signature query parameter"}\n'
    assert fetch(f"http://x/files?{unsigned}") == (401, missing)
    upload_soon_over = sandbox.upload_url(path, use_signature_expiration=1)
    soon_over = sandbox.download_url(path, use_signature_expiration=1)
    end = time.monotonic() + 30
    while fetch(soon_over)[0] == 200:
        assert time.monotonic() < end, "the signature never expires"
        time.sleep(0.1)
    expired = '{"code":401,"message":"signature is already expired"}\n'
    assert fetch(soon_over) == (401, expired)
    assert upload(upload_soon_over, b"too late") == (401, expired)
    assert sandbox.files.read(path) == "octets"


def commands_and_files(sandbox, directory):
    assert sandbox.is_running()
    assert sandbox.commands.run("echo hello").stdout == "hello\n"
    sandbox.files.write(f"{directory}/x", "content")
    assert sandbox.files.read(f"{directory}/x") == "content"
    assert [entry.name for entry in sandbox.files.list(directory)] == ["x"]
    process = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.send_stdin(process.pid, "in\n")
    assert sandbox.commands.kill(process.pid)


def without_the_token(sandbox):
    """The same client in debug mode has no token, and gets nowhere."""
    stranger = Sandbox.create(debug=True)
    for call in [
        lambda: stranger.commands.run("echo hello"),
        lambda: stranger.commands.list(),
        lambda: stranger.files.list("/"),
        lambda: stranger.files.read("/etc/hostname"),
        lambda: stranger.files.write("/tmp/stranger", "x"),
    ]:
        try:
            result = call()
        except AuthenticationException:
            continue
        raise AssertionError(f"a stranger got {result!r}")
    assert stranger.is_running()


async def asynchronous():
    sandbox = await AsyncSandbox.create(secure=True)
    assert (await sandbox.commands.run("echo async")).stdout == "async\n"
    path = (await sandbox.commands.run("mktemp")).stdout.strip()
    await sandbox.files.write(path, "content")
    assert await sandbox.files.read(path) == "content"
    for options in [{}, {"use_signature_expiration": 600}]:
        assert fetch(sandbox.download_url(path, **options)) == (200, "content")
        assert upload(sandbox.upload_url(path, **options), b"content")[0] == 200
    await sandbox.files.remove(path)
    await sandbox.kill()


def main():
    sandbox = Sandbox.create(secure=True)
    directory = sandbox.commands.run("mktemp -d").stdout.strip()
    commands_and_files(sandbox, directory)
    print("ok: commands and files")
    signed_urls(sandbox, directory)
    print("ok: signed urls")
    without_the_token(sandbox)
    print("ok: without the token")
    sandbox.files.remove(directory)
    sandbox.kill()
    asyncio.run(asynchronous())
    print("ok: asynchronous")


if __name__ == "__main__":
    main()
