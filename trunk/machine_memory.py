"""How much memory this process may have: that of the machine, or less if its control groups limit it.

Sources: proc_meminfo(5), cgroups(7), and the kernel's "Control Group v2" and "Memory Resource Controller" (v1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# The files of a memory group: its limit, what is used, and the entry of memory.stat for pages that can be dropped.
V2 = "memory.max", "memory.current", "inactive_file"
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


@dataclass(frozen=True)
class Memory:
    """The bytes of the machine's memory, and how many of them another process could have.

    `limit` is the lowest limit of the control group and its parents, or None if there is none below the machine's
    memory.
    """

    total: int
    available: int
    limit: int | None = None


def read_memory() -> Memory | None:
    """The memory that this process may have, or None if the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    limit = None
    for folder, (maximum, used, inactive) in groups():
        try:
            most, taken = (int((folder / name).read_text()) for name in (maximum, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left = most - taken + int(stat[inactive])
        except (OSError, KeyError, ValueError):  # the root group, or a group without a limit ("max")
            continue
        if most < total:
            limit = min(most, limit or most)
            available = min(available, max(left, 0))
    return Memory(total, available, limit)


def groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's memory groups, and of all their parents, with the names of their files.

    In a container without a cgroup namespace of its own, the paths are those of the host, and only the topmost is
    found.
    """
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            roots, names = (CGROUPS, CGROUPS / "unified"), V2
        elif "memory" in controllers.split(","):
            roots, names = (CGROUPS / controllers, CGROUPS / "memory"), V1
        else:
            continue
        for root in dict.fromkeys(roots):
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                if not folder.is_relative_to(root):
                    break
                yield folder, names
