#!/usr/bin/env bash
# Talks to a daemon as a person with the standard gRPC client would: over reflection, without the
# protos, over TCP and over a unix socket. Ends at the first answer that is not as expected.
#
#   scripts/grpcurl-session.sh [PATH OF ENVD]
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=v1.9.4

# shellcheck source=scripts/lib.sh
. scripts/lib.sh

target=${CARGO_TARGET_DIR:-target}
tools=$(mkdir -p "$target/tools" && cd "$target/tools" && pwd)
grpcurl=$tools/grpcurl-$VERSION
if [ ! -x "$grpcurl" ]; then
  command -v go >/dev/null || fail "go is not installed"
  GOBIN=$tools go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$VERSION"
  mv "$tools/grpcurl" "$grpcurl"
fi
envd=${1:-$target/debug/envd}
if [ $# -eq 0 ]; then
  cargo build --locked --bin envd
fi

scratch=$(mktemp -d)
socket=$scratch/envd.sock
serve "$envd" --listen "unix://$socket"

# call NAME ARGUMENT...: runs grpcurl and keeps what it prints in $answer, in one line.
call() {
  local name=$1 status=0
  shift
  answer=$("$grpcurl" -plaintext -max-time 30 "$@" 2>&1 </dev/null | tr -s ' \n' ' ') || status=$?
  [ "$status" -eq 0 ] || fail "$name: status $status: $answer"
}

# expect NAME TEXT...: each text occurs in the answer.
expect() {
  local name=$1 text
  shift
  for text in "$@"; do
    [[ $answer == *"$text"* ]] || fail "$name: no '$text' in: $answer"
  done
  echo "ok: $name"
}

session() {
  local transport=$1
  shift

  call "$transport: services" "$@" list
  expect "$transport: services" \
    process.Process filesystem.Filesystem grpc.health.v1.Health grpc.reflection.v1.ServerReflection

  call "$transport: process.Process" "$@" describe process.Process
  expect "$transport: process.Process" \
    'rpc Start ( .process.StartRequest ) returns ( stream .process.StartResponse );' \
    'rpc StreamInput ( stream .process.StreamInputRequest ) returns ( .process.StreamInputResponse );' \
    'rpc SendSignal ('

  call "$transport: filesystem.Filesystem" "$@" describe filesystem.Filesystem
  expect "$transport: filesystem.Filesystem" \
    'rpc ListDir ( .filesystem.ListDirRequest ) returns ( .filesystem.ListDirResponse );' \
    'rpc WatchDir ( .filesystem.WatchDirRequest ) returns ( stream .filesystem.WatchDirResponse );'

  # stdout is "hello\n" in base64.
  call "$transport: Start" -d '{"process": {"cmd": "echo", "args": ["hello"]}}' "$@" process.Process/Start
  expect "$transport: Start" '"start": { "pid":' '"stdout": "aGVsbG8K"' '"exited": true' '"status": "exit status 0"'
  [[ $answer == *'"start":'*'"data":'*'"end":'* ]] || fail "$transport: Start: not in order: $answer"

  call "$transport: List" "$@" process.Process/List
  [[ $answer == '{ }' || $answer == '{} ' ]] || fail "$transport: List: the command is still listed: $answer"
  echo "ok: $transport: List"

  call "$transport: ListDir" -d "{\"path\": \"$scratch\"}" "$@" filesystem.Filesystem/ListDir
  expect "$transport: ListDir" '"name": "log"' '"type": "FILE_TYPE_FILE"' "\"path\": \"$log\""

  call "$transport: health" "$@" grpc.health.v1.Health/Check
  expect "$transport: health" '"status": "SERVING"'

  # A failure has its code.
  local status=0
  answer=$("$grpcurl" -plaintext -max-time 30 -d "{\"path\": \"$scratch/missing\"}" \
    "$@" filesystem.Filesystem/Stat 2>&1 </dev/null | tr -s ' \n' ' ') || status=$?
  [ "$status" -ne 0 ] || fail "$transport: Stat of a missing file succeeded: $answer"
  expect "$transport: Stat of a missing file" 'Code: NotFound' "$scratch/missing"
}

# readme_block TEXT: runs the block of README.md in which the text stands, against this daemon, and keeps
# what it prints in $answer.
readme_block() {
  local script status=0
  script=$(awk -v part="$1" '
    /^```/ { if (inside && index(text, part)) printf "%s", text; inside = !inside; text = ""; next }
    inside { text = text $0 "\n" }' README.md)
  [ -n "$script" ] || fail "README.md has no block with '$1'"
  script=${script//localhost:49983/$address}
  answer=$(
    grpcurl() { "$grpcurl" -max-time 30 "$@"; }
    eval "$script" 2>&1 </dev/null
  ) || status=$?
  [ "$status" -eq 0 ] || fail "README.md: status $status of $script: $answer"
}

readme() {
  local first
  readme_block 'localhost:49983 list'
  expect "README: first calls" process.Process 'process.Process is a service' '"stdout": "' '/etc/passwd"'

  readme_block 'base64 -d'
  [ "$answer" = "$(uname -a)" ] || fail "README: base64: '$answer' is not '$(uname -a)'"
  echo "ok: README: base64"

  # The time stands in the answers of both calls, and again when both are repeated.
  readme_block '"process_id": "run-1"'
  first=$(sed -n 's/.*"stdout": "\(.*\)".*/\1/p' <<<"$answer" | sort -u)
  [ "$(grep -c '"stdout"' <<<"$answer")" -eq 2 ] || fail "README: process_id: $answer"
  readme_block '"process_id": "run-1"'
  [ "$(sed -n 's/.*"stdout": "\(.*\)".*/\1/p' <<<"$answer" | sort -u)" = "$first" ] ||
    fail "README: process_id: it ran again: $answer"
  [ "$(wc -l <<<"$first")" -eq 1 ] || fail "README: process_id: two outputs: $first"
  echo "ok: README: process_id"
}

readme
session tcp "$address"
session unix -unix "$socket"

kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
[ "$status" -eq 0 ] || fail "the daemon ended with status $status: $(cat "$log")"
echo "ok: the daemon ends when it is told to"
