"""A command whose temporary files are on a file system of their own, which is small or cannot be written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import PATIENCE, Result

ISOLATED = ["unshare", "--user", "--map-root-user", "--mount"]


def in_tmpfs(folder: Path, options: str, *command: str | Path, cwd: Path) -> Result:
    """Run a command with a tmpfs at `folder`, which TMPDIR names, mounted with these options of mount(8)."""
    if shutil.which("unshare") is None or subprocess.run([*ISOLATED, "true"]).returncode:
        pytest.skip("this machine lets nobody mount")
    script = 'mount -t tmpfs -o "$0" none "$1" && export TMPDIR="$1" && shift && exec "$@"'
    shell = [*ISOLATED, "sh", "-c", script, options, folder, *command]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=cwd, timeout=PATIENCE)
    return Result(done.returncode, done.stdout, done.stderr)
