#!/usr/bin/env python3
"""Takes the ELF kernel out of a bzImage: extract-vmlinux.py VMLINUZ VMLINUX

Virtual machine monitors that boot by PVH (QEMU, Cloud Hypervisor) or as Linux 64-bit ELF
(Firecracker) need no decompressor in the guest. Where the compressed kernel lies in the file is
in its setup header: Documentation/arch/x86/boot.rst, protocol 2.08 and later.
"""

import os
import struct
import subprocess
import sys

# What the payload begins with, and the program that reads it. The kernel's build appends the
# uncompressed size to it, which all of them see as trailing garbage; that is no error as long as
# the kernel itself came out whole.
FORMATS = [
    (b"\x02\x21\x4c\x18", ["lz4", "-d", "-c"]),
    (b"\x28\xb5\x2f\xfd", ["zstd", "-d", "-c", "-q"]),
    (b"\xfd7zXZ\x00", ["xz", "-d", "-c", "--single-stream"]),
    (b"\x1f\x8b\x08", ["gzip", "-d", "-c", "-q"]),
]


def payload(image: bytes) -> bytes:
    if image[0x202:0x206] != b"HdrS":
        sys.exit("there is no Linux setup header in the file")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x0208:
        sys.exit(f"boot protocol {version >> 8}.{version & 255:02d} does not say where the payload is")
    # 0 means 4, for reasons of history.
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    if start + length > len(image):
        sys.exit("the payload goes beyond the end of the file")
    return image[start : start + length]


def whole_elf_size(elf: bytes) -> int:
    """Where the last section header ends: in vmlinux they come last."""
    if elf[:6] != b"\x7fELF\x02\x01":
        sys.exit("what came out is not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries = struct.unpack_from("<HH", elf, 0x3A)
    return table + entry_size * entries


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} VMLINUZ VMLINUX")
    source, destination = sys.argv[1:]
    with open(source, "rb") as file:
        packed = payload(file.read())
    for magic, command in FORMATS:
        if packed.startswith(magic):
            break
    else:
        sys.exit(f"{source}: a compression that is not known: {packed[:6].hex()}")
    result = subprocess.run(command, input=packed, capture_output=True, check=False)
    elf = result.stdout
    # Whether it is whole decides, not the status: see FORMATS.
    if len(elf) < 64 or len(elf) < whole_elf_size(elf):
        sys.exit(f"{source}: {command[0]} gave {len(elf)} bytes: {result.stderr.decode(errors='replace')}")
    temporary = f"{destination}.new.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(elf)
    os.rename(temporary, destination)


main()
