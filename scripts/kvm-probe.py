#!/usr/bin/env python3
"""Tells whether KVM here runs guests on the processor itself: exit 0 if so, 1 if not.

That /dev/kvm can be opened says little: behind it may be a hypervisor that emulates, under which
an ordinary kernel takes minutes to boot. So a loop of 200,000 rounds is run in a virtual machine
of one page: a processor needs about a millisecond for it, an emulation a few hundred.

The interface is that of the kernel's Documentation/virt/kvm/api.rst.
"""

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time

KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_HLT = 5

# In real mode: mov ecx, 200000 / dec ecx / jnz to the dec / hlt
LOOP = bytes.fromhex("66b9400d0300") + bytes.fromhex("6649") + bytes.fromhex("75fc") + b"\xf4"
SREGS_BYTES = 0x138
NATIVE_SECONDS = 0.05


def measure() -> float:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, 4096)
    memory[: len(LOOP)] = LOOP
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(
        machine, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, 4096, address)
    )
    processor = fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
    size = fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)
    state = mmap.mmap(processor, size)

    sregs = bytearray(SREGS_BYTES)
    fcntl.ioctl(processor, KVM_GET_SREGS, sregs)
    # The code segment comes first: its base (8 bytes) and selector (at 12) become 0.
    sregs[0:8] = bytes(8)
    sregs[12:14] = bytes(2)
    fcntl.ioctl(processor, KVM_SET_SREGS, bytes(sregs))
    # Sixteen general registers, then rip and rflags, of which bit 1 is always set.
    fcntl.ioctl(processor, KVM_SET_REGS, struct.pack("=18Q", *[0] * 16, 0, 2))

    start = time.monotonic()
    fcntl.ioctl(processor, KVM_RUN, 0)
    took = time.monotonic() - start
    (reason,) = struct.unpack_from("=I", state, 8)
    if reason != KVM_EXIT_HLT:
        raise OSError(f"the loop ended with exit reason {reason}")
    return took


def main() -> int:
    try:
        took = measure()
    except OSError as error:
        print(f"no KVM: {error}")
        return 1
    native = took < NATIVE_SECONDS
    print(f"KVM is {'native' if native else 'emulated'}: the loop took {took * 1000:.1f} ms")
    return 0 if native else 1


if __name__ == "__main__":
    sys.exit(main())
