#!/usr/bin/env python3
"""Bakes envd into the root file system in a directory:

    bake.py --root DIR --envd PATH --init systemd|openrc|envd [--debian]

No program of that file system is run, so it may be of any distribution, of another architecture,
or empty. Its symbolic links are followed inside of it: an absolute one never leads out to the
machine that builds.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
USER = "user"
UID = 1000

# Early and without waiting is what a sandbox wants: no console to log in at, no maintenance that
# wakes up an idle machine, no one who waits for the network to be complete.
MASKED = [
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "systemd-networkd-wait-online.service",
]

# What only the builder's own base can do without: it has no kernel modules to load, keeps its log
# in memory and has no seats and no login records.
MASKED_IN_DEBIAN = [
    "dev-hugepages.mount",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-journal-flush.service",
    "systemd-logind.service",
    "systemd-modules-load.service",
    "systemd-random-seed.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
]

# Generators run before anything else does, and these find nothing there.
NO_GENERATORS_IN_DEBIAN = [
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-system-update-generator",
    "systemd-veritysetup-generator",
]

# Drop-ins for the same base.
DEBIAN_CONFIG = {
    "/etc/systemd/journald.conf.d/60-envd.conf": "[Journal]\nStorage=volatile\nAudit=no\n",
    # Of the devices that were there before udev, these have names, modes or drivers to get from
    # it; the rest are a hundred events that end in nothing.
    "/etc/systemd/system/systemd-udev-trigger.service.d/60-envd.conf": """\
[Service]
ExecStart=
ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=net --subsystem-match=misc
""",
    # Neither is needed to answer, and both are heavy; envd goes first.
    "/etc/systemd/system/systemd-networkd.service.d/60-envd.conf": "[Unit]\nAfter=envd.service\n",
    "/etc/systemd/system/systemd-resolved.service.d/60-envd.conf": "[Unit]\nAfter=envd.service\n",
}

# For the same base with OpenRC. It is Debian's own scripts that OpenRC runs there, so the network is
# ifupdown's business, which has no cards but those that are named: the kernel's names, without udev.
DEBIAN_OPENRC_CONFIG = {
    "/etc/network/interfaces": """\
auto lo
iface lo inet loopback

auto /eth*=eth
iface eth inet dhcp
""",
}

# They wait for clocks, screens and keys that a sandbox has not, or look at file systems that the
# kernel has mounted already.
NOT_STARTED_IN_DEBIAN = ["brightness", "checkfs.sh", "hwclock.sh", "mount-configfs"]

ENVD_ARGS = [
    "--default-user", USER,
    "--listen", "tcp://0.0.0.0:49983",
    "--listen", "vsock://49983?optional",
    "--ready", "vsock://2:1024?optional",
]  # fmt: skip


class Root:
    """A directory as the root that its own symbolic links believe in."""

    def __init__(self, directory: str):
        self.directory = os.path.realpath(directory)

    def at(self, path: str, follow_last: bool = True) -> Path:
        """Where `path` is, as seen by a process whose root this is."""
        parts = [part for part in path.split("/") if part]
        done: list[str] = []
        links = 0
        while parts:
            part = parts.pop(0)
            if part == ".":
                continue
            if part == "..":
                del done[-1:]
                continue
            here = os.path.join(self.directory, *done, part)
            if os.path.islink(here) and (parts or follow_last):
                links += 1
                if links > 40:
                    sys.exit(f"{path}: too many symbolic links")
                target = os.readlink(here)
                if target.startswith("/"):
                    done = []
                parts = [name for name in target.split("/") if name] + parts
                continue
            done.append(part)
        return Path(self.directory, *done)

    def exists(self, path: str) -> bool:
        return self.at(path).exists()

    def read(self, path: str) -> str:
        place = self.at(path)
        return place.read_text(errors="surrogateescape") if place.exists() else ""

    def directories(self, path: str, mode: int = 0o755) -> Path:
        place = self.at(path)
        if not place.is_dir():
            parent = os.path.dirname(path.rstrip("/"))
            if parent not in ("", "/"):
                self.directories(parent)
            place.mkdir()
            place.chmod(mode)
        return place

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Writes a file; one that exists keeps its mode and owner."""
        self.directories(os.path.dirname(path))
        place = self.at(path)
        existed = place.exists()
        place.write_text(text, errors="surrogateescape")
        if not existed:
            place.chmod(mode)

    def install(self, source: Path, path: str, mode: int) -> None:
        self.directories(os.path.dirname(path))
        place = self.at(path, follow_last=False)
        if place.is_symlink() or place.exists():
            place.unlink()
        shutil.copyfile(source, place)
        place.chmod(mode)

    def link(self, path: str, target: str) -> None:
        self.directories(os.path.dirname(path))
        place = self.at(path, follow_last=False)
        if place.is_symlink() or place.exists():
            place.unlink()
        place.symlink_to(target)


def rows(text: str) -> list[list[str]]:
    return [line.split(":") for line in text.splitlines() if line and not line.startswith("#")]


def with_line(text: str, line: str) -> str:
    return text + ("" if text.endswith("\n") or not text else "\n") + line + "\n"


def free_id(taken: list[list[str]], wanted: int) -> int:
    ids = {row[2] for row in taken if len(row) > 2}
    while str(wanted) in ids:
        wanted += 1
    return wanted


def add_user(root: Root) -> None:
    passwd, group = root.read("/etc/passwd"), root.read("/etc/group")
    if not any(row[0] == "root" for row in rows(passwd)):
        passwd = f"root:x:0:0:root:/root:{shell(root)}\n{passwd}"
        root.directories("/root", 0o700)
    if not any(row[0] == "root" for row in rows(group)):
        group = "root:x:0:\n" + group

    mine = next((row for row in rows(passwd) if row[0] == USER and len(row) > 5), None)
    if mine:
        print(f"bake: the image has a user '{USER}' with id {mine[2]} already", file=sys.stderr)
        uid, gid, home = int(mine[2]), int(mine[3]), mine[5]
    else:
        uid, home = free_id(rows(passwd), UID), f"/home/{USER}"
        if uid != UID:
            print(f"bake: id {UID} is taken in the image; '{USER}' gets {uid}", file=sys.stderr)
        theirs = next((row for row in rows(group) if row[0] == USER and len(row) > 2), None)
        gid = int(theirs[2]) if theirs else free_id(rows(group), uid)
        if not theirs:
            group = with_line(group, f"{USER}:x:{gid}:")
        passwd = with_line(passwd, f"{USER}:x:{uid}:{gid}::{home}:{shell(root)}")
        # No password fits '*', and unlike '!' it does not lock the account for sudo and ssh keys.
        if root.exists("/etc/shadow"):
            shadow = root.read("/etc/shadow")
            root.write("/etc/shadow", with_line(shadow, f"{USER}:*::0:99999:7:::"))
        if root.exists("/etc/gshadow"):
            root.write("/etc/gshadow", with_line(root.read("/etc/gshadow"), f"{USER}:!::"))
    root.write("/etc/passwd", passwd)
    root.write("/etc/group", group)

    place = root.at(home)
    if place.is_dir() and not mine:
        # A layer has put files there before there was anybody to own them.
        for name in [place, *place.rglob("*")]:
            if name.lstat().st_uid == 0:
                os.chown(name, uid, gid, follow_symlinks=False)
    elif not place.exists():
        root.directories(os.path.dirname(home))
        skeleton = root.at("/etc/skel")
        if skeleton.is_dir():
            shutil.copytree(skeleton, place, symlinks=True)
        else:
            place.mkdir()
        place.chmod(0o755)
        for directory, _, files in os.walk(place):
            for name in [directory, *(os.path.join(directory, file) for file in files)]:
                os.chown(name, uid, gid, follow_symlinks=False)

    root.directories("/etc/sudoers.d", 0o750)
    place = root.at(f"/etc/sudoers.d/{USER}")
    place.write_text(f"{USER} ALL=(ALL:ALL) NOPASSWD: ALL\n")
    place.chmod(0o440)


def forget_identity(root: Root) -> None:
    """Clones of one image must not be one machine; where systemd looks for an identity too."""
    if root.exists("/etc/machine-id"):
        root.write("/etc/machine-id", "")
    copy = root.at("/var/lib/dbus/machine-id", follow_last=False)
    if not copy.is_symlink():
        copy.unlink(missing_ok=True)
    root.at("/var/lib/systemd/random-seed", follow_last=False).unlink(missing_ok=True)


def shell(root: Root) -> str:
    return "/bin/bash" if root.exists("/bin/bash") else "/bin/sh"


def enable(root: Root, wants: str, unit: str, where: str = "/usr/lib/systemd/system") -> None:
    root.link(f"/etc/systemd/system/{wants}/{unit}", f"{where}/{unit}")


def mask(root: Root, unit: str) -> None:
    place = f"/etc/systemd/system/{unit}"
    # One that the image configures by itself stays as it is.
    there = root.at(place, follow_last=False)
    if not there.exists() and not there.is_symlink():
        root.link(place, "/dev/null")


def systemd(root: Root, debian: bool) -> None:
    if not root.exists("/lib/systemd/systemd"):
        sys.exit("there is no systemd in the image; give --init openrc or --init envd")
    root.install(HERE / "systemd/envd.service", "/etc/systemd/system/envd.service", 0o644)
    enable(root, "multi-user.target.wants", "envd.service", "/etc/systemd/system")
    if root.exists("/lib/systemd/system/systemd-networkd.service"):
        root.install(
            HERE / "systemd/80-envd.network", "/etc/systemd/network/80-envd.network", 0o644
        )
        enable(root, "multi-user.target.wants", "systemd-networkd.service")
        enable(root, "sockets.target.wants", "systemd-networkd.socket")
    for unit in MASKED:
        mask(root, unit)
    if debian:
        for unit in MASKED_IN_DEBIAN:
            mask(root, unit)
        for generator in NO_GENERATORS_IN_DEBIAN:
            root.link(f"/etc/systemd/system-generators/{generator}", "/dev/null")
        # It has only a comment in it, for which a service would remount the root.
        root.at("/etc/fstab").unlink(missing_ok=True)
        for path, text in DEBIAN_CONFIG.items():
            root.write(path, text)
    # Empty, the machine gets an identity at each first boot without the questions of one.
    root.write("/etc/machine-id", "")
    # Newer than /usr, they say that nothing of an update is left to do at the first boot.
    if debian:
        root.write("/etc/.updated", "")
        root.write("/var/.updated", "")


def openrc(root: Root, debian: bool) -> None:
    if not root.exists("/sbin/openrc-run"):
        sys.exit("there is no OpenRC in the image; give --init systemd or --init envd")
    root.install(HERE / "openrc/envd", "/etc/init.d/envd", 0o755)
    root.link("/etc/runlevels/default/envd", "/etc/init.d/envd")
    if not debian:
        return
    # Version 1 of control groups, or both, is what OpenRC mounts by default.
    root.write("/etc/rc.conf", with_line(root.read("/etc/rc.conf"), 'rc_cgroup_mode="unified"'))
    for path, text in DEBIAN_OPENRC_CONFIG.items():
        root.write(path, text)
    for script in NOT_STARTED_IN_DEBIAN:
        for level in root.at("/etc/runlevels").iterdir():
            (level / script).unlink(missing_ok=True)
    # No console to log in at, and no terminal for one.
    lines = root.read("/etc/inittab").splitlines(keepends=True)
    root.write("/etc/inittab", "".join(line for line in lines if "getty" not in line))


def envd_as_init(root: Root, _debian: bool) -> None:
    root.link("/sbin/init", "/usr/bin/envd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--envd", required=True, type=Path)
    parser.add_argument("--init", required=True, choices=["systemd", "openrc", "envd"])
    parser.add_argument("--debian", action="store_true", help="the builder's own base")
    options = parser.parse_args()
    os.umask(0o022)
    root = Root(options.root)

    for directory in ["/dev", "/proc", "/sys", "/run", "/etc", "/usr/bin"]:
        root.directories(directory)
    for directory in ["/tmp", "/var/tmp"]:
        root.directories(directory).chmod(0o1777)
    root.install(options.envd, "/usr/bin/envd", 0o755)
    # By this name it is the init that `envd.init=` can ask for, whatever /sbin/init is.
    root.link("/usr/lib/envd/init", "/usr/bin/envd")
    root.directories("/etc/envd")
    root.write("/etc/envd/init.args", "".join(f"{arg}\n" for arg in ENVD_ARGS))
    add_user(root)
    forget_identity(root)
    root.write(
        "/etc/sysctl.d/60-envd.conf",
        "# Watches on large trees, as E2B's templates have it.\nfs.inotify.max_user_watches = 65536\n",
    )
    # What mmdebstrap leaves there is the machine's that builds.
    if options.debian or not root.exists("/etc/hostname"):
        root.write("/etc/hostname", "sandbox\n")
        root.at("/etc/hostname").chmod(0o644)
    if options.debian or not root.exists("/etc/hosts"):
        root.write(
            "/etc/hosts",
            "127.0.0.1 localhost\n127.0.1.1 sandbox\n::1 localhost ip6-localhost ip6-loopback\n",
        )
    # With systemd it is a link to what its resolver has learnt.
    if options.debian and not root.at("/etc/resolv.conf", follow_last=False).is_symlink():
        root.write("/etc/resolv.conf", "# The host knows the name server: nameserver ADDRESS\n")
    {"systemd": systemd, "openrc": openrc, "envd": envd_as_init}[options.init](root, options.debian)


main()
