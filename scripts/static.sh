#!/usr/bin/env bash
# Builds the one static file that goes into images, and checks that it is one:
#
#   scripts/static.sh               builds target/static/envd and prints its sha256
#
# The same commit gives the same bytes: paths of this machine are mapped away, versions are locked
# and the commit is the only thing that is baked in. Then it checks that aarch64 compiles as well.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

TARGET=x86_64-unknown-linux-musl
CROSS=aarch64-unknown-linux-musl

need cc=build-essential readelf=binutils git=git
need_rust_target "$TARGET"
need_rust_target "$CROSS"

target=${CARGO_TARGET_DIR:-$PWD/target}
mkdir -p "$target/static"
target=$(cd "$target" && pwd)

# Flags given from outside would make another binary, so they are replaced. 0x1f separates them,
# which lets a path contain blanks. The last prefix that matches wins.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
ENVD_COMMIT=$(git describe --always --dirty --abbrev=40 --exclude='*')
flags=(
  "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
  "--remap-path-prefix=$(rustc --print sysroot)=/rust"
  "--remap-path-prefix=$PWD=/envd"
  "--remap-path-prefix=$target=/envd/target"
)
encoded=$(printf '%s\x1f' "${flags[@]}")
export SOURCE_DATE_EPOCH ENVD_COMMIT CARGO_ENCODED_RUSTFLAGS=${encoded%$'\x1f'}
export CARGO_TARGET_DIR=$target

say "building for $TARGET at $ENVD_COMMIT"
cargo build --locked --release --bin envd --target "$TARGET" >&2
built=$target/$TARGET/release/envd

# A static-pie has a dynamic section for its own relocations, but no loader and no library.
headers=$(readelf --wide --program-headers --dynamic "$built")
if grep -E '^ +INTERP|\(NEEDED\)' <<<"$headers" >&2; then
  fail "$built is not static"
fi

new=$target/static/envd.new.$$
trap 'rm -f "$new"' EXIT
install -m 0755 "$built" "$new"
mv "$new" "$target/static/envd"

say "checking that $CROSS compiles"
# In the release profile: host tools are built already, and a test build is not held up.
cargo check --locked --release --bin envd --target "$CROSS" >&2

say "$target/static/envd is static, $(stat -c %s "$target/static/envd") bytes"
sha256sum "$target/static/envd"
