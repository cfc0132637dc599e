#!/usr/bin/env bash
# Builds images from small bases that are not Debian, and checks what is in them (needs root, and
# the static binary):
#
#   scripts/bases.sh
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

need busybox=busybox-static setcap=libcap2-bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# base DIRECTORY: the least that is a root file system.
base() {
  mkdir -p "$1"/{bin,etc,tmp,root,home,usr}
  cp "$(command -v busybox)" "$1/bin/busybox"
  ln -s busybox "$1/bin/sh"
  printf 'root:x:0:0:root:/root:/bin/sh\n' >"$1/etc/passwd"
  printf 'root:x:0:\n' >"$1/etc/group"
}

# build BASE OUTPUT: the same image from the base each time; what it says only if it fails.
build() {
  rootfs/build.sh --init envd --size 64M --base "$1" --output "$2" >"$work/log" 2>&1 ||
    fail "$1: $(cat "$work/log")"
}

# is WHAT WANTED FOUND
is() {
  [ "$2" = "$3" ] || fail "$1: '$3' instead of '$2'"
  printf 'test %s ... ok\n' "$1"
}

# content OUTPUT PATH: what a file of the image holds.
content() {
  tar -xOf "$1/rootfs.tar" "./$2" 2>/dev/null || printf 'no such file'
}

# row OUTPUT PATH: mode and owner of a file of the image.
row() {
  tar --numeric-owner -tvf "$1/rootfs.tar" | awk -v path="./$2" '$NF == path { print $1, $2 }'
}

base "$work/base"
mkdir -p "$work/base/opt/app/dev" "$work/base/dev" "$work/base/home/user" "$work/base/var/lib/dbus"
echo kept >"$work/base/opt/app/dev/settings"
echo gone >"$work/base/dev/node"
echo 0123456789abcdef0123456789abcdef | tee "$work/base/etc/machine-id" >"$work/base/var/lib/dbus/machine-id"
chmod 0700 "$work/base"
tar -C "$work/base" -cf "$work/v1:base.tar" .

build "$work/base" "$work/from-directory"
(cd "$work" && "$OLDPWD/rootfs/build.sh" --init envd --size 64M --base v1:base.tar --output from-tar) \
  >"$work/log" 2>&1 || fail "v1:base.tar: $(cat "$work/log")"
for from in directory tar; do
  out=$work/from-$from
  is "a $from: a directory named dev that is not the root's" kept "$(content "$out" opt/app/dev/settings)"
  is "a $from: the root's /dev is empty" "no such file" "$(content "$out" dev/node)"
  is "a $from: anybody may enter the root" "drwxr-xr-x 0/0" "$(row "$out" '')"
  is "a $from: a home that was there is the user's" "drwxr-xr-x 1000/1000" "$(row "$out" home/user/)"
  is "a $from: clones are told apart" "" "$(content "$out" etc/machine-id)"
  is "a $from: no other place has the identity" "no such file" "$(content "$out" var/lib/dbus/machine-id)"
done

# What changes without another size or time is another base; also behind a link.
ln -s base "$work/current"
for version in 1 2; do
  echo "version $version" >"$work/base/etc/version"
  touch -d @1 "$work/base/etc/version"
  build "$work/current" "$work/versions"
  is "version $version of a file with the same time" "version $version" "$(content "$work/versions" etc/version)"
done
setcap cap_net_raw+ep "$work/base/bin/busybox"
build "$work/current" "$work/versions"
mkdir "$work/unpacked"
tar -C "$work/unpacked" --xattrs --xattrs-include='*' -xpf "$work/versions/rootfs.tar" ./bin/busybox
is "a new capability" "cap_net_raw=ep" "$(getcap "$work/unpacked/bin/busybox" | awk '{ print $NF }')"
stamp=$(stat -c %Y%i "$work/versions/rootfs.ext4")
build "$work/current" "$work/versions"
is "the same base again is not built again" "$stamp" "$(stat -c %Y%i "$work/versions/rootfs.ext4")"

cache=${CARGO_TARGET_DIR:-target}/image/cache
mkdir "$cache/work.abandoned"
build "$work/current" "$work/versions"
is "what a killed build has left is removed" "" "$(ls -d "$cache"/work.* 2>/dev/null || true)"
