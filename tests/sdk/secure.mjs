// The JavaScript SDK in secure mode: the control plane has given out an access token.
//
//     E2B_API_URL=... E2B_API_KEY=... E2B_SANDBOX_URL=http://127.0.0.1:49983 node secure.mjs
//
// Exits 0 when envd behaves as the SDK's users expect, and otherwise with the assertion that failed.

import assert from 'node:assert/strict'

import { AuthenticationError, Sandbox } from 'e2b'

const ENVD = process.env.E2B_SANDBOX_URL

// A request to a signed URL, sent to where envd really is.
async function at(url, init) {
  const response = await fetch(`${ENVD}/files${new URL(url).search}`, init)
  return [response.status, await response.text()]
}

function form(content) {
  const body = new FormData()
  body.append('file', new Blob([content]), 'f')
  return { method: 'POST', body }
}

const sandbox = await Sandbox.create({ secure: true })
assert.equal(await sandbox.isRunning(), true)
const directory = (await sandbox.commands.run('mktemp -d')).stdout.trim()
await sandbox.files.write(`${directory}/x`, 'content')
assert.equal(await sandbox.files.read(`${directory}/x`), 'content')
assert.deepEqual((await sandbox.files.list(directory)).map((entry) => entry.name), ['x'])
console.log('ok: commands and files')

const path = `${directory}/a b+c ä.txt`
assert.equal((await at(await sandbox.uploadUrl(path), form('by url')))[0], 200)
assert.equal(await sandbox.files.read(path), 'by url')
assert.deepEqual(await at(await sandbox.downloadUrl(path)), [200, 'by url'])
const limited = await sandbox.downloadUrl(path, { useSignatureExpiration: 600 })
assert.deepEqual(await at(limited), [200, 'by url'])
const late = limited.replace('signature_expiration=', 'signature_expiration=9')
assert.deepEqual(await at(late), [401, '{"code":401,"message":"invalid signature"}\n'])
assert.equal((await at(await sandbox.downloadUrl(path), form('x')))[0], 401)
// With an expiration, and for a user.
const user = (await sandbox.commands.run('id -un')).stdout.trim()
for (const options of [{ useSignatureExpiration: 600 }, { user, useSignatureExpiration: 600 }]) {
  assert.equal((await at(await sandbox.uploadUrl(path, options), form('again')))[0], 200)
  assert.deepEqual(await at(await sandbox.downloadUrl(path, options)), [200, 'again'])
}
const soonOver = [
  [await sandbox.downloadUrl(path, { useSignatureExpiration: 1 }), undefined],
  [await sandbox.uploadUrl(path, { useSignatureExpiration: 1 }), form('too late')],
]
const end = Date.now() + 30_000
while ((await at(soonOver[0][0]))[0] === 200) {
  assert.ok(Date.now() < end, 'the signature never expires')
  await new Promise((resolve) => setTimeout(resolve, 100))
}
for (const [url, init] of soonOver) {
  assert.deepEqual(await at(url, init), [401, '{"code":401,"message":"signature is already expired"}\n'])
}
assert.equal(await sandbox.files.read(path), 'again')
// Without a path the form names the file.
const anywhere = new FormData()
anywhere.append('file', new Blob(['anywhere']), `${directory}/y`)
const answer = await at(await sandbox.uploadUrl(), { method: 'POST', body: anywhere })
assert.equal(answer[0], 200, answer[1])
assert.equal(await sandbox.files.read(`${directory}/y`), 'anywhere')
console.log('ok: signed urls')

const stranger = await Sandbox.create({ debug: true })
for (const call of [
  () => stranger.commands.run('echo hello'),
  () => stranger.commands.list(),
  () => stranger.files.list('/'),
  () => stranger.files.read('/etc/hostname'),
  () => stranger.files.write('/tmp/stranger', 'x'),
]) {
  await assert.rejects(call, AuthenticationError)
}
assert.equal(await stranger.isRunning(), true)
console.log('ok: without the token')
await sandbox.files.remove(directory)
await sandbox.kill()
