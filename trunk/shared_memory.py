"""What the two sides of the wire agree on where tensors travel in /dev/shm, and not in messages.

A server has a folder there which only its user can open. A client that runs on the same machine, as the same user,
makes a file in it for each of its calls, writes large inputs into the file, and reads large outputs from it. The
request says where they are by the parameters that Triton has for system shared memory; the region is the file's name.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

SHM = Path("/dev/shm")
FOLDER = re.compile(r"ditforge-[a-z0-9_+-]{1,100}")  # the name of a server's folder
FILE = re.compile(r"[0-9a-f]{32}")  # the name of a client's file

REGION, OFFSET, BYTES = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"  # of a tensor
ALIGNMENT = 64  # bytes
LARGE = 64 << 10  # bytes of a tensor from which on it travels so: smaller ones are sent as fast
SPARED = 256 << 20  # bytes of the file system that stay free, because Triton needs them for tensors of its own


def aligned(size: int) -> int:
    """The number of bytes rounded up, so that what follows begins at an aligned address."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def refer(parameters: MutableMapping[str, Any], region: str, start: int, size: int) -> None:
    """Have a tensor's parameters say that its `size` bytes are in the region, from `start` on."""
    parameters[REGION].string_param = region
    parameters[OFFSET].int64_param = start
    parameters[BYTES].int64_param = size


def extend(descriptor: int, size: int, end: int) -> bool:
    """Give memory to an open file of `size` bytes up to `end`. Without it, writing to a full /dev/shm ends a process.

    Returns whether there is so much, beside what is spared.
    """
    found = os.fstatvfs(descriptor)
    if found.f_bavail * found.f_frsize - (end - size) < SPARED:
        return False
    try:
        os.posix_fallocate(descriptor, size, end - size)
    except OSError:
        return False
    return True
