#!/usr/bin/env bash
# Prints the size of the static binary and the memory that it has resident while it is idle:
#
#   scripts/size.sh [PATH OF ENVD]
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

envd=${1:-${CARGO_TARGET_DIR:-target}/static/envd}
[ -x "$envd" ] || fail "$envd is missing; 'make static' builds it"

serve "$envd"
# What it needed to start is given back or not within a moment; this is the idle state.
sleep 1

printf 'binary:   %s KiB (%s)\n' $(($(stat -c %s "$envd") / 1024)) "$envd"
awk '
  $1 == "VmRSS:" { printf "resident: %d KiB\n", $2 }
  $1 == "RssAnon:" { printf "  own:    %d KiB (RssAnon)\n", $2 }
  $1 == "RssFile:" { printf "  file:   %d KiB (RssFile, shared with the page cache)\n", $2 }
  $1 == "Threads:" { printf "threads:  %d\n", $2 }
' "/proc/$daemon/status"
