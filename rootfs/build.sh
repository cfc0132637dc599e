#!/usr/bin/env bash
# Builds images that have envd baked in:
#
#   rootfs/build.sh [--base debian|DIR|TAR] [--init systemd|openrc|envd] [--size 1G]
#                   [--output DIR] [--envd PATH] [--applets "NAME..."] [--fetch-only]
#
# With --fetch-only it downloads what it needs, the Debian base and the kernel, into its cache and ends;
# envd need not be built yet.
#
# In the output directory, by default target/image/NAME OF THE BASE-INIT, it leaves
#
#   rootfs.ext4   the root file system, with a journal; made without mounting anything
#   rootfs.tar    the same for containers, and a Dockerfile that takes it
#   initrd.cpio   envd as the /init that loads the drivers, mounts the root and goes on there
#   minimal.cpio  the smallest case: envd as /init for good, the drivers, and one static program,
#                 /bin/busybox; --applets gives it links of those names
#   vmlinux       Debian's cloud kernel as the ELF file that hypervisors start directly
#
# What has not changed since the last time is kept. An interrupt leaves no half of anything.
set -euo pipefail
shopt -s inherit_errexit
umask 022
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/lib.sh
. "$here/../scripts/lib.sh"

SUITE=bookworm
KERNEL=linux-image-cloud-amd64
# What E2B's SDKs and templates count on finding; each kind of init adds its own.
PACKAGES=(bash ca-certificates curl git iproute2 procps python3-minimal sudo)
# What a guest needs before it has a disk to load modules from, and fuse, with which sandboxes mount
# buckets: no module is on the disk. What they need comes with them.
MODULES=(virtio_pci virtio_mmio virtio_blk virtio_net vmw_vsock_virtio_transport virtio-rng ext4 fuse)

base=debian init=systemd size=1G output='' applets='' fetch_only=''
target=${CARGO_TARGET_DIR:-$here/../target}
envd=$target/static/envd
while [ $# -gt 0 ]; do
  case $1 in
  --base | --init | --size | --output | --envd | --applets)
    [ $# -ge 2 ] || fail "$1 needs a value"
    printf -v "${1#--}" %s "$2"
    shift 2
    ;;
  --fetch-only)
    fetch_only=yes
    shift
    ;;
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
  *) fail "'$1' is not a flag; --help lists them" ;;
  esac
done
case $init in
systemd | openrc | envd) ;;
*) fail "--init: '$init' is none of systemd, openrc, envd" ;;
esac
[[ $size =~ ^[1-9][0-9]*[KMG]?$ ]] || fail "--size: '$size' is not a size like 512M or 1G"
[ -n "$fetch_only" ] || [ -x "$envd" ] || fail "$envd is missing; 'make static' builds it"
if [ "$base" != debian ] && [ ! -d "$base" ] && [ ! -f "$base" ]; then
  fail "--base: '$base' is neither 'debian' nor a directory nor a tar file"
fi
# Owners and device nodes of the image are kept while it lies in a directory.
[ "$(id -u)" -eq 0 ] || fail "this needs root, or a user namespace in which it is root"
[ "$(uname -m)" = x86_64 ] || fail "only x86-64 images are built so far, and on such a machine"

need mmdebstrap=mmdebstrap mke2fs=e2fsprogs cpio=cpio depmod=kmod python3=python3 \
  lz4=lz4 zstd=zstd xz=xz-utils busybox=busybox-static

name=$(basename -- "$base")
name=${name%%.tar*}
# Without symbolic links in it, and with nothing that a program takes for a flag or a host.
[ "$base" = debian ] || base=$(realpath -- "$base")
output=${output:-$target/image/$name-$init}
mkdir -p "$output" "$target/image/cache"
output=$(cd "$output" && pwd)
cache=$(cd "$target/image/cache" && pwd)

exec {lock}>"$cache/lock"
flock --nonblock "$lock" || {
  say "waiting for another build to end"
  flock "$lock"
}

# Nobody else builds here now: a build that was killed has left them.
rm -rf "$cache"/work.*
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

own_key=$(hash_of "$here/build.sh" "$here/../scripts/lib.sh")
bake_key=$(hash_of "$here/bake.py" "$here/systemd/envd.service" "$here/systemd/80-envd.network" "$here/openrc/envd")

# is_current FILE KEY: FILE in the output directory was made from what KEY stands for.
is_current() {
  [ -e "$output/$1" ] && [ -e "$output/.$1.key" ] && [ "$(<"$output/.$1.key")" = "$2" ]
}

# deliver FILE KEY: moves FILE from the work directory to the output directory, which may be on
# another file system, and gives it its name when all of it is there.
deliver() {
  rm -f "$output/.$1.key"
  mv "$work/$1" "$output/.$1.new"
  mv "$output/.$1.new" "$output/$1"
  printf '%s\n' "$2" >"$output/.$1.key"
  say "$output/$1: $(du -h --apparent-size "$output/$1" | cut -f 1), $(du -h "$output/$1" | cut -f 1) on disk"
}

# ------------------------------------------------------------------------------ root file system

# Prints the path of a tar of the Debian base; mmdebstrap makes it at most once for its packages.
debian_base() {
  local own=() packages key
  case $init in
  systemd) own=(dbus kmod systemd systemd-resolved systemd-sysv udev) ;;
  openrc) own=(ifupdown openrc sysvinit-core udhcpc) ;;
  envd) ;;
  esac
  packages=$(printf '%s\n' "${PACKAGES[@]}" "${own[@]}" | sort | paste -sd ,)
  key=$(key_of "$SUITE" minbase "$packages")
  local tar=$cache/debian-${key:0:16}.tar
  if [ ! -e "$tar" ]; then
    say "making the Debian base: $packages"
    # Documentation, translations and caches are of no use in a sandbox.
    mmdebstrap --variant=minbase --include="$packages" \
      --dpkgopt='path-exclude=/usr/share/doc/*' \
      --dpkgopt='path-exclude=/usr/share/info/*' \
      --dpkgopt='path-exclude=/usr/share/locale/*' \
      --dpkgopt='path-exclude=/usr/share/man/*' \
      "$SUITE" "$work/debian.tar" >&2
    mv "$work/debian.tar" "$tar"
  fi
  printf '%s\n' "$tar"
}

# pack_tree DIRECTORY: a tar of all that is in it, the same for the same tree.
pack_tree() {
  tar -C "$1" --one-file-system --sort=name --numeric-owner --xattrs --xattrs-include='*' --acls \
    --pax-option='exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime' -cf - .
}

# unpack_tree DIRECTORY TAR: of /dev, which every init mounts itself, only the directory is wanted.
unpack_tree() {
  tar -C "$1" --force-local --numeric-owner --xattrs --xattrs-include='*' --acls \
    --anchored --exclude='./dev/?*' --exclude='dev/?*' --exclude='/dev/?*' -xpf "$2"
}

# The key of a directory is that of its tar.
base_key() {
  if [ -d "$1" ]; then
    pack_tree "$1" | sha256sum | cut -c 1-64
  else
    hash_of "$1"
  fi
}

build_rootfs() {
  local from=$base key uuid root=$work/root
  if [ "$base" = debian ]; then from=$(debian_base); fi
  key=$(key_of "$own_key" "$bake_key" "$envd_key" "$(base_key "$from")" "$init" "$size")
  if is_current rootfs.ext4 "$key" && is_current rootfs.tar "$key" && is_current Dockerfile "$key"; then
    say "the root file system is up to date"
    return
  fi
  say "copying $from"
  mkdir "$root"
  if [ -d "$from" ]; then
    pack_tree "$from" | unpack_tree "$root" -
  else
    unpack_tree "$root" "$from"
  fi
  # Whoever may enter the directory that the base lies in, the root is everybody's.
  chown 0:0 "$root"
  chmod 0755 "$root"

  say "baking envd in, with $init as init"
  local options=()
  if [ "$base" = debian ]; then options+=(--debian); fi
  "$here/bake.py" --root "$root" --envd "$envd" --init "$init" "${options[@]}"

  say "packing"
  pack_tree "$root" >"$work/rootfs.tar"
  # One input has one identity: its UUID and the seed of its directory hashes.
  uuid=${key:0:8}-${key:8:4}-4${key:13:3}-8${key:17:3}-${key:20:12}
  mke2fs -q -F -t ext4 -L rootfs -U "$uuid" -O has_journal -m 0 \
    -E "hash_seed=$uuid,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0" \
    -d "$root" "$work/rootfs.ext4" "$size" >&2 ||
    fail "mke2fs failed; is --size $size enough for $(du -sh "$root" | cut -f 1)?"
  cat >"$work/Dockerfile" <<'DOCKERFILE'
FROM scratch
ADD rootfs.tar /
EXPOSE 49983
ENTRYPOINT ["/usr/bin/envd", "init"]
CMD ["-isnotfc", "--default-user", "user"]
DOCKERFILE
  deliver rootfs.ext4 "$key"
  deliver rootfs.tar "$key"
  deliver Dockerfile "$key"
  rm -rf "$root"
}

# --------------------------------------------------------------------------- kernel and initramfs

# Prints the directory of the kernel: vmlinux, and its modules below lib/modules.
kernel() {
  local package version key directory
  package=$(apt-cache depends "$KERNEL" | awk '$1 == "Depends:" { print $2; exit }')
  if [ -z "$package" ]; then
    apt-get update -q >&2
    package=$(apt-cache depends "$KERNEL" | awk '$1 == "Depends:" { print $2; exit }')
  fi
  [ -n "$package" ] || fail "apt knows no package $KERNEL"
  version=$(apt-cache show --no-all-versions "$package" | awk '$1 == "Version:" { print $2 }')
  key=$(key_of "$package" "$version" "$(hash_of "$here/extract-vmlinux.py")")
  directory=$cache/kernel-${key:0:16}
  if [ ! -d "$directory" ]; then
    say "fetching the kernel $package $version"
    mkdir "$work/kernel"
    (cd "$work" && apt-get download -q -o APT::Sandbox::User=root "$package=$version" >&2)
    dpkg-deb -x "$work/$package"_*.deb "$work/kernel"
    depmod -b "$work/kernel" "$(ls "$work/kernel/lib/modules")"
    "$here/extract-vmlinux.py" "$work/kernel/boot"/vmlinuz-* "$work/kernel/vmlinux"
    rm -r "$work/kernel/boot" "$work/$package"_*.deb
    mv "$work/kernel" "$directory"
  fi
  printf '%s\n' "$directory"
}

# stage_modules KERNEL ROOT: puts the modules into ROOT/lib/modules, and their names, in the order
# in which they have to be loaded, into ROOT/etc/envd/modules.
stage_modules() {
  local kernel=$1 root=$2 module word path file plan=''
  mkdir -p "$root/lib/modules" "$root/etc/envd"
  for module in "${MODULES[@]}"; do
    plan+=$(modprobe -d "$kernel" -S "$(ls "$kernel/lib/modules")" --show-depends "$module")$'\n'
  done
  while read -r word path _; do
    case $word in
    insmod) ;;
    builtin | '') continue ;;
    *) fail "modprobe says '$word $path'" ;;
    esac
    file=$(basename "$path")
    file=${file%.xz}
    file=${file%.zst}
    if [ -e "$root/lib/modules/$file" ]; then continue; fi
    case $path in
    *.xz) xz -d -c "$path" >"$root/lib/modules/$file" ;;
    *.zst) zstd -q -d -c "$path" >"$root/lib/modules/$file" ;;
    *) cp "$path" "$root/lib/modules/$file" ;;
    esac
    printf '%s\n' "$file" >>"$root/etc/envd/modules"
  done <<<"$plan"
}

# pack ROOT FILE: the directory as an initramfs, with nothing in it that differs between runs.
pack() {
  find "$1" -exec touch -h -d @0 {} +
  (cd "$1" && find . -print0 | LC_ALL=C sort -z |
    cpio --null --create --format=newc --reproducible --owner=0:0 --quiet) >"$2"
}

stage_initramfs() {
  mkdir -p "$2"/{dev,proc,sys,run,newroot,etc/envd}
  install -m 0755 "$envd" "$2/init"
  stage_modules "$1" "$2"
}

build_initramfs() {
  local kernel key applet
  kernel=$(kernel)
  key=$(key_of "$own_key" "$kernel")
  if is_current vmlinux "$key"; then
    say "the kernel is up to date"
  else
    cp "$kernel/vmlinux" "$work/vmlinux"
    deliver vmlinux "$key"
  fi

  key=$(key_of "$own_key" "$kernel" "$envd_key")
  if is_current initrd.cpio "$key"; then
    say "the initramfs is up to date"
  else
    stage_initramfs "$kernel" "$work/initrd"
    pack "$work/initrd" "$work/initrd.cpio"
    deliver initrd.cpio "$key"
  fi

  local busybox
  busybox=$(command -v busybox)
  key=$(key_of "$own_key" "$kernel" "$envd_key" "$(hash_of "$busybox")" "$applets")
  if is_current minimal.cpio "$key"; then
    say "the smallest case is up to date"
    return
  fi
  if readelf -lW "$busybox" | grep -q '^ *INTERP'; then
    fail "$busybox is not static; install the package busybox-static"
  fi
  stage_initramfs "$kernel" "$work/minimal"
  mkdir -p "$work/minimal"/{bin,root,tmp}
  chmod 1777 "$work/minimal/tmp"
  install -m 0755 "$busybox" "$work/minimal/bin/busybox"
  for applet in $applets; do
    ln -s busybox "$work/minimal/bin/$applet"
  done
  printf 'root:x:0:0:root:/root:/bin/sh\n' >"$work/minimal/etc/passwd"
  printf 'root:x:0:\n' >"$work/minimal/etc/group"
  printf '%s\n' --listen tcp://0.0.0.0:49983 --listen 'vsock://49983?optional' \
    --ready 'vsock://2:1024?optional' >"$work/minimal/etc/envd/init.args"
  pack "$work/minimal" "$work/minimal.cpio"
  deliver minimal.cpio "$key"
}

if [ -n "$fetch_only" ]; then
  [ "$base" != debian ] || debian_base
  kernel
  exit 0
fi
envd_key=$(hash_of "$envd")
build_rootfs
build_initramfs
say "the images are in $output"
