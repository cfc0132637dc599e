// The JavaScript SDK against an envd in debug mode.
//
//     E2B_DEBUG=true E2B_SANDBOX_URL=http://127.0.0.1:49983 node javascript.mjs
//
// Exits 0 when envd behaves as the SDK's users expect, and otherwise with the assertion that failed.

import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'

import {
  CommandExitError,
  FileNotFoundError,
  FilesystemEventType,
  FileType,
  InvalidArgumentError,
  NotFoundError,
  Sandbox,
  TimeoutError,
} from 'e2b'

// A bound on everything that is waited for, in milliseconds.
const DEADLINE = 30_000
// A pid that no process of a test machine has.
const NOBODYS_PID = 999_999_999
// Another user than the default one, if the daemon may switch users.
const TEST_USER = process.env.ENVD_TEST_USER

const sha256 = (data) => createHash('sha256').update(data).digest('hex')

// The error that the promise must be rejected with.
async function rejection(type, promise) {
  let error
  await assert.rejects(promise, (rejected) => {
    error = rejected
    return rejected instanceof type || assert.fail(`not a ${type.name}: ${rejected.stack}`)
  })
  return error
}

// Keeps what a callback is given, and lets a test wait for it.
class Collector {
  items = []
  #wake = () => {}
  #decoder = new TextDecoder()

  push = (item) => {
    this.items.push(item instanceof Uint8Array ? this.#decoder.decode(item, { stream: true }) : item)
    this.#wake()
  }

  get text() {
    return this.items.join('')
  }

  async until(what, condition) {
    let timer
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => {
        reject(new Error(`not within ${DEADLINE} ms: ${what}; got ${JSON.stringify(this.items)}`))
      }, DEADLINE)
    })
    try {
      while (!condition(this)) {
        await Promise.race([new Promise((resolve) => (this.#wake = resolve)), late])
      }
    } finally {
      clearTimeout(timer)
    }
  }

  untilText(text) {
    return this.until(JSON.stringify(text), () => this.text.includes(text))
  }
}

const pids = async (sandbox) => (await sandbox.commands.list()).map((process) => process.pid)

async function commandsRunToTheirEnd(sandbox, directory) {
  assert.equal(await sandbox.isRunning(), true)

  const stdout = new Collector()
  const stderr = new Collector()
  const result = await sandbox.commands.run('echo hello; echo oops >&2', {
    onStdout: stdout.push,
    onStderr: stderr.push,
  })
  assert.equal(result.exitCode, 0)
  assert.deepEqual([result.stdout, result.stderr], ['hello\n', 'oops\n'])
  assert.deepEqual([stdout.text, stderr.text], ['hello\n', 'oops\n'])

  const failed = await rejection(CommandExitError, sandbox.commands.run('echo why >&2; exit 7'))
  assert.deepEqual([failed.exitCode, failed.stderr, failed.error], [7, 'why\n', 'exit status 7'])

  const placed = await sandbox.commands.run('echo "$MARK"; pwd', {
    envs: { MARK: 'zwei Wörter' },
    cwd: directory,
  })
  assert.equal(placed.stdout, `zwei Wörter\n${directory}\n`)
  const text = 'žluťoučký kůň 🐴 你好'
  assert.equal((await sandbox.commands.run(`echo '${text}'`)).stdout, `${text}\n`)
  if (TEST_USER) {
    const theirs = await sandbox.commands.run('whoami', { user: TEST_USER, cwd: '/' })
    assert.equal(theirs.stdout, `${TEST_USER}\n`)
  }
}

async function largeOutputArrivesWhole(sandbox, directory) {
  const result = await sandbox.commands.run(
    'head -c 786432 /dev/urandom | base64 -w 0 | tee large.txt',
    { cwd: directory },
  )
  assert.equal(result.stdout.length, 1024 * 1024)
  const expected = await sandbox.commands.run('sha256sum < large.txt', { cwd: directory })
  assert.equal(sha256(result.stdout), expected.stdout.split(' ')[0])
}

async function backgroundCommand(sandbox) {
  const output = new Collector()
  const command = await sandbox.commands.run('cat', {
    background: true,
    stdin: true,
    envs: { MARK: 'listed' },
    onStdout: output.push,
    timeoutMs: DEADLINE,
  })
  const listed = (await sandbox.commands.list()).find(({ pid }) => pid === command.pid)
  assert.deepEqual([listed.cmd, listed.args], ['/bin/bash', ['-l', '-c', 'cat']])
  assert.deepEqual(listed.envs, { MARK: 'listed' })
  await command.sendStdin('first\n')
  await output.untilText('first\n')
  await command.disconnect()

  const more = new Collector()
  const again = await sandbox.commands.connect(command.pid, {
    onStdout: more.push,
    timeoutMs: DEADLINE,
  })
  await sandbox.commands.sendStdin(command.pid, new TextEncoder().encode('second\n'))
  await more.untilText('second\n')
  await again.closeStdin()
  assert.equal((await again.wait()).exitCode, 0)
  assert.ok(!(await pids(sandbox)).includes(command.pid))
}

async function killAndTimeout(sandbox) {
  const command = await sandbox.commands.run('exec sleep 300', {
    background: true,
    timeoutMs: DEADLINE,
  })
  assert.equal(await command.kill(), true)
  const killed = await rejection(CommandExitError, command.wait())
  assert.deepEqual([killed.exitCode, killed.error], [-1, 'signal: killed'])
  assert.equal(await sandbox.commands.kill(command.pid), false)
  assert.equal(await sandbox.commands.kill(NOBODYS_PID), false)
  await rejection(NotFoundError, sandbox.commands.connect(NOBODYS_PID))
  await rejection(TimeoutError, sandbox.commands.run('sleep 300', { timeoutMs: 1000 }))
}

async function filesAreWrittenAndRead(sandbox, directory) {
  const path = `${directory}/a folder/ünïcode + 100%.txt`
  assert.deepEqual(await sandbox.files.write(path, 'text ✓'), {
    name: 'ünïcode + 100%.txt',
    type: FileType.FILE,
    path,
    metadata: undefined,
  })
  assert.equal(await sandbox.files.read(path), 'text ✓')
  await sandbox.files.write(`${directory}/empty`, '')
  assert.equal(await sandbox.files.read(`${directory}/empty`), '')

  const data = randomBytes(5 * 1024 * 1024)
  const buffer = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength)
  for (const [name, opts] of [
    ['multipart', {}],
    ['octets', { useOctetStream: true }],
    ['gzipped', { gzip: true }],
  ]) {
    await sandbox.files.write(`${directory}/${name}`, buffer, opts)
    const read = await sandbox.files.read(`${directory}/${name}`, { format: 'bytes' })
    assert.equal(sha256(read), sha256(data), name)
  }
  await sandbox.files.write(`${directory}/streamed`, new Blob([data]).stream())
  const hash = createHash('sha256')
  for await (const part of await sandbox.files.read(`${directory}/streamed`, { format: 'stream' })) {
    hash.update(part)
  }
  assert.equal(hash.digest('hex'), sha256(data))

  // Text of this length comes compressed to those who accept it.
  const lines = 'one line of many ✓\n'.repeat(100_000)
  await sandbox.files.write(`${directory}/lines.txt`, lines, { gzip: true })
  assert.equal(await sandbox.files.read(`${directory}/lines.txt`), lines)
  const blob = await sandbox.files.read(`${directory}/lines.txt`, { format: 'blob', gzip: true })
  assert.equal(await blob.text(), lines)
  const parts = []
  for await (const part of await sandbox.files.read(`${directory}/lines.txt`, { format: 'stream' })) {
    parts.push(part)
  }
  assert.equal(Buffer.concat(parts).toString(), lines)

  const written = await sandbox.files.writeFiles([
    { path: `${directory}/batch/text`, data: 'text' },
    { path: `${directory}/batch/deep/bytes`, data: new Blob(['bytes']) },
  ])
  assert.deepEqual(written.map(({ name }) => name), ['text', 'bytes'])
  assert.equal(await sandbox.files.read(`${directory}/batch/deep/bytes`), 'bytes')

  const described = await sandbox.files.write(`${directory}/described`, '1', {
    metadata: { author: 'ada' },
  })
  assert.deepEqual(described.metadata, { author: 'ada' })
  const info = await sandbox.files.getInfo(`${directory}/described`)
  assert.deepEqual([info.metadata, info.size, info.mode], [{ author: 'ada' }, 1, 0o644])
  assert.ok(Math.abs(info.modifiedTime.getTime() - Date.now()) < 60_000)

  await rejection(FileNotFoundError, sandbox.files.read(`${directory}/missing`))
  await rejection(FileNotFoundError, sandbox.files.getInfo(`${directory}/missing`))
  await rejection(FileNotFoundError, sandbox.files.list(`${directory}/missing`))
}

async function directories(sandbox, directory) {
  const top = `${directory}/top`
  assert.equal(await sandbox.files.makeDir(`${top}/middle`), true)
  assert.equal(await sandbox.files.makeDir(`${top}/middle`), false)
  await sandbox.files.write(`${top}/middle/file.txt`, '12345')
  const names = (await sandbox.files.list(top, { depth: 2 })).map((entry) => entry.path)
  assert.deepEqual(names, [`${top}/middle`, `${top}/middle/file.txt`])
  const moved = await sandbox.files.rename(`${top}/middle/file.txt`, `${top}/moved.txt`)
  assert.deepEqual([moved.path, moved.type, moved.size], [`${top}/moved.txt`, FileType.FILE, 5])
  assert.equal(await sandbox.files.exists(`${top}/middle/file.txt`), false)
  await sandbox.files.remove(`${top}/moved.txt`)
  await sandbox.files.remove(`${top}/moved.txt`)
  await sandbox.files.remove(top)
  assert.equal(await sandbox.files.exists(top), false)
}

async function watch(sandbox, directory) {
  const watched = `${directory}/watched`
  await sandbox.files.makeDir(watched)
  const events = new Collector()
  const ends = new Collector()
  const handle = await sandbox.files.watchDir(watched, events.push, {
    recursive: true,
    includeEntry: true,
    onExit: ends.push,
  })
  const seen = (name, type) => () =>
    events.items.some((event) => event.name === name && event.type === type)
  await sandbox.files.write(`${watched}/new.txt`, 'new')
  const nested = 'nested/deeper/file.txt'
  await sandbox.files.write(`${watched}/${nested}`, 'nested')
  await events.until('a create of the nested file', seen(nested, FilesystemEventType.CREATE))
  // The first write may come before the new directories are watched; a later one may not.
  await sandbox.files.write(`${watched}/${nested}`, 'again')
  await events.until('a write of the nested file', seen(nested, FilesystemEventType.WRITE))
  const ofNew = events.items.filter(({ name }) => name === 'new.txt')
  assert.deepEqual(
    ofNew.map(({ type }) => type),
    [FilesystemEventType.CREATE, FilesystemEventType.CHMOD, FilesystemEventType.WRITE],
  )
  assert.equal(ofNew[0].entry.path, `${watched}/new.txt`)
  await sandbox.files.rename(`${watched}/new.txt`, `${watched}/old.txt`)
  await events.until('a rename of new.txt', seen('new.txt', FilesystemEventType.RENAME))
  await sandbox.files.remove(`${watched}/old.txt`)
  await events.until('a remove of old.txt', seen('old.txt', FilesystemEventType.REMOVE))
  await handle.stop()
  // This SDK reports its own abort of the stream as the reason.
  await ends.until('the end of the watch', () => ends.items.length > 0)

  await rejection(FileNotFoundError, sandbox.files.watchDir(`${directory}/missing`, events.push))
  await sandbox.files.write(`${directory}/plain`, '')
  await rejection(InvalidArgumentError, sandbox.files.watchDir(`${directory}/plain`, events.push))
}

async function terminal(sandbox, directory) {
  const type = (pid, text) => sandbox.pty.sendInput(pid, new TextEncoder().encode(text))
  const screen = new Collector()
  const pty = await sandbox.pty.create({
    cols: 80,
    rows: 24,
    cwd: directory,
    onData: screen.push,
    timeoutMs: DEADLINE,
  })
  const { pid } = pty
  await type(pid, 'echo "in=$PWD"; stty size\n')
  await screen.untilText(`in=${directory}`)
  await screen.untilText('24 80')
  await sandbox.pty.resize(pid, { cols: 132, rows: 50 })
  await type(pid, 'stty size\n')
  await screen.untilText('50 132')
  await pty.disconnect()

  const more = new Collector()
  const again = await sandbox.pty.connect(pid, { onData: more.push, timeoutMs: DEADLINE })
  await type(pid, 'echo again=$((6 * 7))\n')
  await more.untilText('again=42')
  await type(pid, 'exit\n')
  assert.equal((await again.wait()).exitCode, 0)
  assert.equal(await sandbox.pty.kill(pid), false)
}

async function git(sandbox, directory) {
  const [origin, copy] = [`${directory}/origin`, `${directory}/copy`]
  await sandbox.git.init(origin, { initialBranch: 'main' })
  await sandbox.files.write(`${origin}/README.md`, '# read\n')
  await sandbox.git.add(origin)
  await sandbox.git.commit(origin, "the first 'commit'", {
    authorName: 'Ada',
    authorEmail: 'ada@example.com',
  })
  assert.equal((await sandbox.git.status(origin)).isClean, true)
  await sandbox.git.clone(origin, { path: copy })
  assert.equal(await sandbox.files.read(`${copy}/README.md`), '# read\n')
  assert.equal((await sandbox.git.branches(copy)).currentBranch, 'main')
}

const sandbox = await Sandbox.create()
const directory = (await sandbox.commands.run('mktemp -d')).stdout.trim()
for (const check of [
  commandsRunToTheirEnd,
  largeOutputArrivesWhole,
  backgroundCommand,
  killAndTimeout,
  filesAreWrittenAndRead,
  directories,
  watch,
  terminal,
  git,
]) {
  await check(sandbox, directory)
  console.log(`ok: ${check.name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`)}`)
}
await sandbox.files.remove(directory)
