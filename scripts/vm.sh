#!/usr/bin/env bash
# Boots guests with envd in them and checks them from outside; `scripts/vm.sh SCENARIO...` runs
# some of the scenarios of tests/vm/main.rs, without any all of them.
#
# Makes what is missing: the static binary, the images, the vsock backend, a Python environment
# with the SDK, and a disk with the project's own tests, which run inside the guest.
#
# ENVD_GUEST_PROFILE and ENVD_FEATURES choose the cargo profile and the features of those tests, so that
# a run that has built them for the host already (as .ci/run has) builds them once. ENVD_VM_BOOTS is the
# number of boots of the scenario `boots`. `scripts/vm.sh --tools-only` makes the vsock backend and the
# Python environment and ends.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

BACKEND_VERSION=0.3.0
# The tests that need root, a real kernel or both, and no program that the guest lacks: there
# they are never skipped. Under emulation each takes many times as long, so the others stay outside.
CARRIED=(process trees users listeners init files_edges)
# Of the unit tests, those of processes and of the machine; the journal's need neither, and
# take a quarter of an hour under emulation.
UNITS='process:: sys:: guest:: --skip process::journal'
# Seconds after which something counts as hung, in a guest and in what calls one.
PATIENCE=600

tools_only=
if [ "${1:-}" = --tools-only ]; then tools_only=yes; fi

profile=${ENVD_GUEST_PROFILE:-guest}
features=()
if [ -n "${ENVD_FEATURES:-}" ]; then features=(--features "$ENVD_FEATURES"); fi

need qemu-system-x86_64=qemu-system-x86 setpriv=util-linux dumpe2fs=e2fsprogs mke2fs=e2fsprogs \
  python3=python3 strip=binutils
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
tools=$CARGO_TARGET_DIR/tools
mkdir -p "$tools"

export ENVD_VM_BACKEND=$tools/bin/vhost-device-vsock
if [ ! -x "$ENVD_VM_BACKEND" ]; then
  say "building vhost-device-vsock $BACKEND_VERSION"
  env -u CARGO_TARGET_DIR cargo install vhost-device-vsock --version "$BACKEND_VERSION" --locked \
    --root "$tools" >&2
fi

if scripts/kvm-probe.py >&2; then export ENVD_VM_ACCEL=kvm; else export ENVD_VM_ACCEL=tcg; fi

venv=$tools/sdk-$(hash_of tests/sdk/requirements.txt | cut -c 1-16)
if [ ! -e "$venv/complete" ]; then
  say "installing the Python SDK"
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --requirement tests/sdk/requirements.txt >&2
  touch "$venv/complete"
fi
export ENVD_VM_PYTHON=$venv/bin/python
if [ "$tools_only" ]; then exit; fi

[ -x "$CARGO_TARGET_DIR/static/envd" ] || scripts/static.sh
for init in systemd openrc envd; do rootfs/build.sh --init "$init"; done
images=$CARGO_TARGET_DIR/image
export ENVD_VM_SYSTEMD=$images/debian-systemd/rootfs.ext4
export ENVD_VM_OPENRC=$images/debian-openrc/rootfs.ext4
export ENVD_VM_PID1=$images/debian-envd/rootfs.ext4
export ENVD_VM_KERNEL=$images/debian-systemd/vmlinux
export ENVD_VM_INITRD=$images/debian-systemd/initrd.cpio
export ENVD_VM_MINIMAL=$images/debian-systemd/minimal.cpio

export ENVD_VM_KERNELS=$images/cache
cargo build --locked "${features[@]}" --examples
# One of them is carried into a guest.
export ENVD_VM_EXAMPLES=$tools/examples
mkdir -p "$ENVD_VM_EXAMPLES"
for example in unix vsock vsock_uds; do
  strip --strip-debug -o "$ENVD_VM_EXAMPLES/$example" "$CARGO_TARGET_DIR/debug/examples/$example"
done

# The guest has this system's C library, so the test binaries run there as they are. They look for
# the daemon where cargo has put it: place.sh makes that path lead to the copy. Both are built with
# the profile `guest`, unless another one is chosen: it optimises a little, since emulated code is slow.
carry() {
  local tree=$1 flags=(--lib) name executable daemon=$CARGO_TARGET_DIR/$profile/envd
  [ "$profile" != dev ] || daemon=$CARGO_TARGET_DIR/debug/envd
  for name in "${CARRIED[@]}"; do flags+=(--test "$name"); done
  mkdir -p "$tree/bin"
  cargo test --locked --profile "$profile" "${features[@]}" --no-run --message-format json "${flags[@]}" \
    >"$tree/messages"
  scripts/test-binaries.py <"$tree/messages" | while read -r name executable; do
    strip --strip-debug -o "$tree/bin/$name" "$executable"
    [ "$name" != unit ] || name="$name $UNITS"
    printf '%s\n' "$name" >>"$tree/list"
  done
  rm "$tree/messages"
  strip --strip-debug -o "$tree/bin/envd" "$daemon"
  printf 'set -e\nmkdir -p %q\nln -sf /mnt/tests/bin/envd %q\n' \
    "$(dirname "$daemon")" "$daemon" >"$tree/place.sh"
}

# Podman for the scenario `containers`, in $podman: with a store of its own, no bridge of the host, and
# limits that an engine without privileges of its own can set.
wrap_podman() {
  local store=$CARGO_TARGET_DIR/containers
  podman=$tools/podman
  cat >"$podman" <<WRAPPER
#!/bin/sh
# Podman with the store of scripts/vm.sh.
verb=\$1
shift
[ "\$verb" != run ] || set -- --network slirp4netns --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 "\$@"
exec podman --root '$store/images' --runroot '$store/run' --runtime runc --cgroup-manager cgroupfs "\$verb" "\$@"
WRAPPER
  chmod +x "$podman"
}

# can_run_containers DIRECTORY: whether a container with nothing but busybox runs; otherwise prints
# what this machine says to it.
can_run_containers() {
  mkdir -p "$1/bin"
  cp "$(command -v busybox)" "$1/bin/busybox"
  printf 'FROM scratch\nCOPY bin /bin\n' >"$1/Dockerfile"
  "$podman" build --quiet --tag localhost/probe "$1" 2>&1 &&
    "$podman" run --rm localhost/probe /bin/busybox true 2>&1
}

# The two images, from the same Dockerfiles that a user has.
build_containers() {
  cp rootfs/scratch/Dockerfile "$CARGO_TARGET_DIR/static/envd" "$1"
  printf 'root:x:0:0:root:/:/bin/sh\n' >"$1/passwd"
  "$podman" build --quiet --tag localhost/envd-scratch "$1" >&2
  "$podman" build --quiet --tag localhost/envd-debian "$images/debian-systemd" >&2
  "$podman" image prune --force >/dev/null
}

# wants SCENARIO: whether it is among those that were asked for.
scenarios=("$@")
wants() {
  [ ${#scenarios[@]} -eq 0 ] || [[ " ${scenarios[*]} " == *" $1 "* ]]
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if wants containers; then
  need podman=podman runc=runc slirp4netns=slirp4netns busybox=busybox-static
  wrap_podman
  if lacking=$(can_run_containers "$work/scratch"); then
    build_containers "$work/scratch"
    export ENVD_VM_PODMAN=$podman
  else
    export ENVD_VM_NO_CONTAINERS="no container can be run here: $lacking"
  fi
fi

if wants inside; then
  say "collecting the tests that run inside"
  carry "$work/tree"
  mke2fs -q -t ext4 -F -O ^has_journal -d "$work/tree" "$work/tests.ext4" 1G
  export ENVD_VM_TESTS=$work/tests.ext4
fi

for image in "$ENVD_VM_SYSTEMD" "$ENVD_VM_OPENRC" "$ENVD_VM_PID1" "$ENVD_VM_INITRD" "$ENVD_VM_MINIMAL"; do
  say "$image: $(du -h --apparent-size "$image" | cut -f 1), $(du -h "$image" | cut -f 1) on disk"
done
ENVD_TEST_PATIENCE=$PATIENCE cargo test --locked "${features[@]}" --test vm -- "${scenarios[@]}"
