"""The C++ compiler with which PyTorch's Inductor compiles: the one that CXX names, or g++."""

from __future__ import annotations

import os
import subprocess

DEFAULT = "g++"


def name() -> str:
    """What is run as the compiler."""
    return os.environ.get("CXX") or DEFAULT


def works() -> bool:
    """Whether it is there, and answers."""
    try:
        asked = subprocess.run([name(), "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def fix() -> str:
    """What to do where it does not."""
    return f"apt install {DEFAULT}" if name() == DEFAULT else f"leave CXX out of the environment, or CXX={DEFAULT}"
