"""What is said of a file that could not be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditforge import write_errors

PROGRAM = """
import errno, os, sys
from pathlib import Path
from ditforge import write_errors
from ditforge.errors import UserError
from ditforge.stage_folder import written_whole
try:
    with written_whole(Path(sys.argv[1]), "onnx") as folder:
        (folder / "weights").write_bytes(bytes(5000))
except UserError as error:
    print(error)
try:
    write_errors.check_room(Path.cwd(), 5000)
except OSError as error:
    print(errno.errorcode[error.errno])
write_errors.check_room(Path.cwd(), 1000)
"""


def test_the_limit_of_a_files_size(tmp_path: Path) -> None:
    command = ["prlimit", "--fsize=4000", sys.executable, "-c", PROGRAM, tmp_path / "onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    problem, fix, room = done.stdout.splitlines()
    assert problem.endswith("File too large: no file of this process may have more than 4,000 bytes (ulimit -f)")
    assert fix == "fix:   ulimit -f unlimited   before the command"
    assert room == "EFBIG"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space, or go elsewhere"),
        (errno.EDQUOT, "free some space, or go elsewhere"),
        (errno.EFBIG, "go elsewhere"),  # a limit of the file system, where the process has none
        (errno.EROFS, "go elsewhere"),
        (errno.EACCES, "go elsewhere"),
    ],
)
def test_what_to_do(number: int, fix: str) -> None:
    error = OSError(number, os.strerror(number))
    assert (write_errors.reason(error), write_errors.fix(error, "go elsewhere")) == (os.strerror(number), fix)
