# shellcheck shell=bash
# What the scripts share. A script sources it; messages carry the script's own name.

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
# Removed in the end, so it must not come from the environment.
unset scratch

say() {
  printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2
}

fail() {
  say "$*"
  exit 1
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# need PROGRAM=PACKAGE...: installs the Debian packages of those programs that are missing.
need() {
  local pair packages=()
  for pair; do
    command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
  done
  [ ${#packages[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "please install: ${packages[*]}"
  say "installing ${packages[*]}"
  # Scripts that run side by side wait for each other: apt-get fails where another one is at work.
  exec {apt_lock}>"${TMPDIR:-/tmp}/envd-apt-$(id -u).lock"
  flock "$apt_lock"
  as_root apt-get update -q >&2
  as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -q --no-install-recommends "${packages[@]}" >&2
  exec {apt_lock}>&-
}

# need_rust_target TRIPLE: adds the target's standard library when it is missing.
need_rust_target() {
  if [ -d "$(rustc --print sysroot)/lib/rustlib/$1/lib" ]; then return; fi
  command -v rustup >/dev/null || fail "this Rust has no target $1, and there is no rustup to add it"
  say "adding the Rust target $1"
  rustup target add "$1" >&2
}

# key_of TEXT...: one key for all of the texts.
key_of() {
  printf '%s\0' "$@" | sha256sum | cut -c 1-64
}

# hash_of FILE...: one key for the contents of the files.
hash_of() {
  cat -- "$@" | sha256sum | cut -c 1-64
}

# serve ENVD ARGUMENT...: starts the daemon on a free TCP port of the loopback and waits until it is
# ready. Sets daemon (its pid), address (HOST:PORT), scratch (a directory, unless it is set) and log;
# all are gone when the script ends.
serve() {
  local envd=$1 deadline=$((SECONDS + 30))
  shift
  scratch=${scratch:-$(mktemp -d)}
  log=$scratch/log
  trap stop_serving EXIT
  "$envd" --listen tcp://127.0.0.1:0 "$@" 2>"$log" </dev/null &
  daemon=$!
  # The daemon logs that it is ready behind the addresses that it listens on.
  until grep -q '"message":"ready"' "$log"; do
    kill -0 "$daemon" 2>/dev/null || fail "envd ended: $(cat "$log")"
    [ "$SECONDS" -lt "$deadline" ] || fail "envd is not ready after 30 s: $(cat "$log")"
    sleep 0.05
  done
  address=$(sed -n 's|.*"address":"tcp://\([^"]*\)".*|\1|p' "$log" | head -n 1)
  [ -n "$address" ] || fail "no TCP address in the log: $(cat "$log")"
}

stop_serving() {
  if kill "$daemon" 2>/dev/null; then
    wait "$daemon" || say "envd ended with status $?"
  fi
  rm -rf "$scratch"
}
