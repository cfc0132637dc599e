#!/usr/bin/env bash
# Runs the public Connect conformance suite, in server mode, against envd's wire layer:
#
#   scripts/conformance.sh          builds the server under test and runs the suite
#   scripts/conformance.sh clippy   lints the server under test
#
# The suite and its protos come as a Go module; both are kept in target/tools.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=v1.0.7
MODULE=connectrpc.com/conformance
# The features in suite.yaml select more cases than this; fewer mean that some were lost.
LEAST_CASES=1900

fail() {
  echo "conformance: $*" >&2
  exit 1
}

target=${CARGO_TARGET_DIR:-target}
tools=$(mkdir -p "$target/tools" && cd "$target/tools" && pwd)
command -v go >/dev/null || fail "go is not installed"

module_dir=$(go mod download -json "$MODULE@$VERSION" | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",\{0,1\}$/\1/p')
[ -d "$module_dir/proto" ] || fail "$MODULE@$VERSION has no protos in '$module_dir'"
export CONFORMANCE_PROTO=$module_dir/proto

# Features of envd to build with, so that a run that has built them already builds them once.
features=()
if [ -n "${ENVD_FEATURES:-}" ]; then features=(--features "$ENVD_FEATURES"); fi

case ${1:-run} in
clippy) exec cargo clippy --locked -p envd-conformance "${features[@]}" --all-targets -- -D warnings ;;
run) ;;
*) fail "'$1' is not a command" ;;
esac

suite=$tools/connectconformance-$VERSION
if [ ! -x "$suite" ]; then
  GOBIN=$tools go install "$MODULE/cmd/connectconformance@$VERSION"
  mv "$tools/connectconformance" "$suite"
fi
cargo build --locked -p envd-conformance "${features[@]}"

report=$tools/conformance.txt
status=0
"$suite" --mode server --conf tests/conformance/suite.yaml -- \
  "$target/debug/envd-conformance" >"$report" 2>&1 </dev/null || status=$?

totals=$(sed -n '/^Total cases: /,$p' "$report")
cases=$(sed -n 's/^Total cases: \([0-9]*\)$/\1/p' <<<"$totals")
if [ "$status" -ne 0 ] || [ -z "$cases" ]; then
  tail -n 200 "$report"
  fail "the suite ended with status $status; all of its output is in $report"
fi
echo "$totals"
[ "$cases" -ge "$LEAST_CASES" ] || fail "only $cases cases ran, at least $LEAST_CASES were expected"
grep -q "^$cases passed, 0 failed$" <<<"$totals" || fail "not every case passed"
