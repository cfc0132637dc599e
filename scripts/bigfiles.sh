#!/usr/bin/env bash
# Sends a large sparse file up and down, and shows that every byte arrives and how much memory the
# daemon takes for it:
#
#   scripts/bigfiles.sh [PATH OF ENVD] [GIBIBYTES]
#
# Then a reader of 200 KB/s, and a client that is killed in the middle of an upload. It needs twice
# the size on the disk of TMPDIR. Numbers are of this machine: both ends run on it.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

envd=${1:-${CARGO_TARGET_DIR:-target}/release/envd}
gibibytes=${2:-10}
[ -x "$envd" ] || fail "$envd is missing; 'cargo build --release' builds it"
need curl=curl

serve "$envd"
url="http://$address/files?path="

peak() {
  awk '$1 == "VmHWM:" { printf "%d KiB\n", $2 }' "/proc/$daemon/status"
}

# curl with its speed on stderr, in MB/s.
transfer() {
  curl -sS --fail --noproxy '*' -w '%{stderr}%{speed_upload} %{speed_download}\n' "$@" \
    2> >(awk '{ printf "  up %.0f MB/s, down %.0f MB/s\n", $1 / 1e6, $2 / 1e6 }' >&2)
}

upload() {
  transfer -X POST -H 'content-type: application/octet-stream' -T "$1" "$url$2" >"$scratch/answer"
}

hash() {
  sha256sum <"$1" | cut -c 1-64
}

say "idle: peak $(peak)"
source=$scratch/source
truncate -s "${gibibytes}G" "$source"
# Something at the beginning, at the end and between.
for place in 0 $((gibibytes * 512)) $((gibibytes * 1024 - 1)); do
  dd if=/dev/urandom of="$source" bs=1M seek="$place" count=1 conv=notrunc status=none
done
want=$(hash "$source")

say "upload of $gibibytes GiB"
upload "$source" "$scratch/up"
[ "$(hash "$scratch/up")" = "$want" ] || fail "the upload is another file"
say "upload is whole; peak $(peak)"
rm "$scratch/up"

say "download of $gibibytes GiB"
got=$(transfer "$url$source" | sha256sum | cut -c 1-64)
[ "$got" = "$want" ] || fail "the download is another file"
say "download is whole; peak $(peak)"
say "download without a reader that counts"
transfer -o /dev/null "$url$source"

say "a reader of 200 KB/s, 4 MiB"
dd if=/dev/urandom of="$scratch/small" bs=1M count=4 status=none
got=$(curl -sS --fail --noproxy '*' --limit-rate 200K "$url$scratch/small" | sha256sum | cut -c 1-64)
[ "$got" = "$(hash "$scratch/small")" ] || fail "the slow reader got another file"
say "every byte has arrived; peak $(peak)"

say "a client that is killed at 50 %"
half=$scratch/half
truncate -s 256M "$half"
before=$(hash "$scratch/small")
# What has come waits in a file without a name, and nowhere else.
spooled() {
  find "/proc/$daemon/fd" -lname '*(deleted)' -exec stat -L -c %s {} + 2>/dev/null | sort -n | tail -n 1
}
mkfifo "$scratch/pipe"
curl -sS --noproxy '*' -X POST -H 'content-type: application/octet-stream' \
  -T - "$url$scratch/small" <"$scratch/pipe" >"$scratch/answer" 2>&1 &
client=$!
exec 3>"$scratch/pipe"
head -c 128M "$half" >&3
until [ "$(spooled)" = $((128 << 20)) ]; do sleep 0.1; done
say "$(spooled) of $((256 << 20)) bytes have come"
kill -KILL "$client"
wait "$client" 2>/dev/null || true
exec 3>&-
until [ -z "$(spooled)" ]; do sleep 0.1; done
[ "$(hash "$scratch/small")" = "$before" ] || fail "the previous file is gone"
say "the previous file is there; peak $(peak)"
