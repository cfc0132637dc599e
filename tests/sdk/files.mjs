// Every method of `files` of the JavaScript SDK, with every option, against an envd in debug mode.
//
//     E2B_DEBUG=true E2B_SANDBOX_URL=http://127.0.0.1:49983 node files.mjs
//
// Exits 0 when envd behaves as the SDK's users expect. A method that a new release adds makes it fail.

import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'

import {
  FileNotFoundError,
  FilesystemEventType,
  FileType,
  InvalidArgumentError,
  Sandbox,
  TimeoutError,
} from 'e2b'

// A bound on everything that is waited for, in milliseconds.
const DEADLINE = 30_000
// The user that calls are made as; another one, where the daemon may switch users.
const user = process.env.ENVD_TEST_USER
const common = { user, requestTimeoutMs: DEADLINE, signal: AbortSignal.timeout(120_000) }
// Text of this length comes compressed to those who accept it.
const LINES = 'one line of many ✓\n'.repeat(5_000)
const DATA = randomBytes(256 * 1024)

async function rejection(type, promise) {
  await assert.rejects(promise, (error) => {
    return error instanceof type || assert.fail(`not a ${type.name}: ${error.stack}`)
  })
}

async function joined(stream) {
  const parts = []
  for await (const part of stream) parts.push(part)
  return Buffer.concat(parts)
}

const exactly = (buffer) => buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.byteLength)

// Waits for what callbacks bring.
class News {
  events = []
  ends = []
  #wake = () => {}

  event = (event) => {
    this.events.push(event)
    this.#wake()
  }

  end = (error) => {
    this.ends.push(error)
    this.#wake()
  }

  get told() {
    return this.events.map(({ name, type }) => [name, type])
  }

  async until(what, condition) {
    const end = Date.now() + DEADLINE
    while (!condition()) {
      assert.ok(Date.now() < end, `not within ${DEADLINE} ms: ${what}; got ${JSON.stringify(this.told)}`)
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, 1_000)
        this.#wake = () => {
          clearTimeout(timer)
          resolve()
        }
      })
    }
  }
}

async function everything(files, top) {
  assert.equal(await files.makeDir(top, common), true)
  assert.equal(await files.makeDir(top, common), false)
  assert.equal(await files.exists(top, common), true)
  assert.equal(await files.exists(`${top}/missing`, common), false)

  // write and read, in every form.
  const path = `${top}/a folder/ünïcode + 100% "quoted".txt`
  const metadata = { author: 'ada', with: 'a space, and ~!@#' }
  for (const options of [{}, { useOctetStream: true }, { useOctetStream: false }, { gzip: true }]) {
    for (const [form, want] of [
      [() => 'text ✓', Buffer.from('text ✓')],
      [() => '', Buffer.alloc(0)],
      [() => LINES, Buffer.from(LINES)],
      [() => exactly(DATA), DATA],
      [() => new Blob([DATA]), DATA],
      [() => new Blob(['one,', 'two']).stream(), Buffer.from('one,two')],
    ]) {
      const what = JSON.stringify([options, want.length])
      const data = form()
      const info = await files.write(path, data, { metadata, ...options, ...common })
      assert.deepEqual(info, { name: path.split('/').at(-1), path, type: FileType.FILE, metadata }, what)
      // All ways to read what was written in one way, and one way for the others.
      const all = Object.keys(options).length === 0
      if (!all) {
        assert.ok(want.equals(await files.read(path, { format: 'bytes' })), what)
      }
      for (const gzip of all ? [false, true] : []) {
        const read = (format) => files.read(path, { format, gzip, ...common })
        assert.ok(want.equals(await read('bytes')), what)
        assert.ok(want.equals(Buffer.from(await (await read('blob')).arrayBuffer())), what)
        const stream = await files.read(path, {
          format: 'stream',
          gzip,
          streamIdleTimeoutMs: DEADLINE,
          ...common,
        })
        assert.ok(want.equals(await joined(stream)), what)
        if (want !== DATA) {
          assert.equal(await read('text'), want.toString(), what)
        }
      }
    }
  }

  const info = await files.getInfo(path, common)
  assert.deepEqual(
    [info.path, info.type, info.size, info.mode, info.permissions, info.metadata],
    [path, FileType.FILE, 7, 0o644, '-rw-r--r--', metadata],
  )
  if (user) assert.equal(info.owner, user)
  await files.write(path, 'without')
  assert.equal((await files.getInfo(path)).metadata, undefined)

  // Several at once.
  const names = ['text', 'deep/er/bytes', 'blob', 'empty']
  const batchOptions = [{}, { useOctetStream: true }, { useOctetStream: false }, { gzip: true }]
  for (const [number, options] of batchOptions.entries()) {
    const batch = `${top}/batch ${number}`
    const entries = [
      { path: `${batch}/text`, data: 'text' },
      { path: `${batch}/deep/er/bytes`, data: exactly(DATA) },
      { path: `${batch}/blob`, data: new Blob(['blob']) },
      { path: `${batch}/empty`, data: '' },
    ]
    const all = { metadata: { batch: `${number}` }, ...options, ...common }
    for (const written of [await files.writeFiles(entries, all), await files.write(entries, all)]) {
      assert.deepEqual(written.map(({ path }) => path), names.map((name) => `${batch}/${name}`))
      assert.ok(written.every(({ metadata }) => metadata.batch === `${number}`))
    }
    assert.ok(DATA.equals(await files.read(`${batch}/deep/er/bytes`, { format: 'bytes' })))
    assert.equal(await files.read(`${batch}/blob`), 'blob')
    assert.equal(await files.read(`${batch}/empty`), '')
  }

  // list.
  const batch = `${top}/batch 0`
  for (const [depth, want] of [
    [undefined, ['blob', 'deep', 'empty', 'text']],
    [1, ['blob', 'deep', 'empty', 'text']],
    [2, ['blob', 'deep', 'deep/er', 'empty', 'text']],
    [9, ['blob', 'deep', 'deep/er', 'deep/er/bytes', 'empty', 'text']],
  ]) {
    const entries = await files.list(batch, { depth, ...common })
    assert.deepEqual(entries.map(({ path }) => path.slice(batch.length + 1)), want)
  }
  await rejection(InvalidArgumentError, files.list(batch, { depth: 0 }))
  await rejection(InvalidArgumentError, files.list(`${batch}/text`))

  // rename and remove.
  const moved = await files.rename(`${batch}/text`, `${top}/new/place`, common)
  assert.deepEqual([moved.path, moved.name, moved.size], [`${top}/new/place`, 'place', 4])
  await files.rename(`${top}/new/place`, `${batch}/empty`)
  assert.equal(await files.read(`${batch}/empty`), 'text')
  await files.remove(`${batch}/empty`, common)
  await files.remove(`${batch}/empty`)
  await files.remove(batch)
  assert.equal(await files.exists(batch), false)

  // What is not there, or is something else.
  const missing = `${top}/missing`
  for (const format of ['text', 'bytes', 'blob', 'stream']) {
    await rejection(FileNotFoundError, files.read(missing, { format }))
  }
  await rejection(FileNotFoundError, files.getInfo(missing))
  await rejection(FileNotFoundError, files.list(missing))
  await rejection(FileNotFoundError, files.rename(missing, `${top}/x`))
  await rejection(InvalidArgumentError, files.read(top))
  await rejection(InvalidArgumentError, files.write(top, 'x'))
  await assert.rejects(files.read(path, { signal: AbortSignal.abort() }))
}

async function watching(files, top) {
  const { CREATE, CHMOD, WRITE, REMOVE, RENAME } = FilesystemEventType
  await files.makeDir(`${top}/sub`, { user })
  const news = new News()
  const handle = await files.watchDir(top, news.event, {
    ...common,
    timeoutMs: 0,
    recursive: true,
    includeEntry: true,
    allowNetworkMounts: true,
    onExit: news.end,
  })
  const seen = (name, type) => () => news.told.some((event) => event[0] === name && event[1] === type)
  await files.write(`${top}/f`, '1', { user })
  await files.write(`${top}/sub/g`, '1', { user })
  await news.until('the write of sub/g', seen('sub/g', WRITE))
  const kinds = [CREATE, CHMOD, WRITE]
  assert.deepEqual(news.told, [
    ...kinds.map((kind) => ['f', kind]),
    ...kinds.map((kind) => ['sub/g', kind]),
  ])
  assert.equal(news.events.at(-1).entry.path, `${top}/sub/g`)
  await files.rename(`${top}/f`, `${top}/h`, { user })
  await files.remove(`${top}/h`, { user })
  await news.until('the removal of h', seen('h', REMOVE))
  assert.deepEqual(news.told.slice(6), [['f', RENAME], ['h', CREATE], ['h', REMOVE]])
  await handle.stop()
  await news.until('the end of the watch', () => news.ends.length > 0)

  // One that ends by itself.
  const short = new News()
  await files.watchDir(top, short.event, { user, timeoutMs: 1_000, onExit: short.end })
  await short.until('the end of a watch of one second', () => short.ends.length > 0)
  assert.ok(short.ends[0] instanceof TimeoutError, short.ends[0])

  await rejection(FileNotFoundError, files.watchDir(`${top}/missing`, news.event))
  await files.write(`${top}/plain`, '')
  await rejection(InvalidArgumentError, files.watchDir(`${top}/plain`, news.event))
}

const sandbox = await Sandbox.create()
const made = await sandbox.commands.run('d=$(mktemp -d); chmod 777 $d; echo $d')
const directory = made.stdout.trim()
const used = new Set()
const recorder = new Proxy(sandbox.files, {
  get(files, name) {
    used.add(name)
    const value = files[name]
    return typeof value === 'function' ? value.bind(files) : value
  },
})
await everything(recorder, `${directory}/files`)
console.log('ok: everything')
await watching(recorder, `${directory}/watched`)
console.log('ok: watching')
const methods = Object.getOwnPropertyNames(Object.getPrototypeOf(sandbox.files))
const missing = methods.filter((name) => !used.has(name) && name !== 'constructor')
assert.deepEqual(missing, [], 'methods that were not tried')
await sandbox.files.remove(directory)
