"""How many processors this process may use: those of its affinity, or less if its control groups limit their time.

Sources: sched_setaffinity(2), and "CPU Interface Files" of the kernel's "Control Group v2".
"""

from __future__ import annotations

import os

from ditforge.machine_memory import groups


def count_processors() -> float:
    """The processors that this process may use at a time, more than 0. The limits of control groups v1 are not read."""
    limits = [float(len(os.sched_getaffinity(0)))]
    for folder, _ in groups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            limits.append(int(quota) / int(period))
        except (OSError, ValueError):  # a group of v1, the root group, or one without a limit ("max")
            continue
    return min(limits)
