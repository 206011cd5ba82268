"""What NVIDIA's binary of a kernel says of it: its stack, and its parameters as the driver copies them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_NV_INFO = 0x70000000  # the type of an ELF section with a kernel's attributes
_SIZED = 0x04  # the format of an attribute that says its size
_PARAMETER, _FRAME_SIZE = 0x17, 0x11  # EIATTR_KPARAM_INFO, EIATTR_FRAME_SIZE


def stack_bytes(cubin: bytes) -> int:
    """The kernel's stack frame, where spilled registers lie."""
    return max((struct.unpack_from("<I", value, 4)[0] for value in _attributes(cubin, _FRAME_SIZE)), default=0)


def parameter_sizes(cubin: bytes) -> list[int]:
    """Bytes of each of the kernel's parameters, in order."""
    found: dict[int, int] = {}
    for value in _attributes(cubin, _PARAMETER):
        _, ordinal, _, bits = struct.unpack("<IHHI", value)
        found[ordinal] = bits >> 18
    return [found[i] for i in sorted(found)]


def _attributes(cubin: bytes, wanted: int) -> Iterator[bytes]:
    """The values of all attributes of one kind in the binary's .nv.info sections."""
    table, size, count = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HH", cubin, 0x3A)
    for header in range(table, table + size * count, size):
        (kind,) = struct.unpack_from("<I", cubin, header + 4)
        if kind != _NV_INFO:
            continue
        at, length = struct.unpack_from("<QQ", cubin, header + 24)
        end = at + length
        while at < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == _SIZED:
                if attribute == wanted:
                    yield cubin[at : at + value]
                at += value
