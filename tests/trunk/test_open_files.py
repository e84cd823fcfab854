"""A limit of open files that is too low: what is said of it, whoever runs into it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from ditforge import open_files
from ditforge.errors import UserError


def test_a_command_says_what_to_raise(tiny) -> None:
    """A server needs more than eight by far."""
    command = ["ditforge", "serve", str(tiny.repository), "--port", "0"]
    limited = ["prlimit", "--nofile=8", sys.executable, "-m", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"fix:   {open_files.FIX}"


@pytest.mark.parametrize(
    ("error", "are"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), True),
        (OSError(errno.ENFILE, os.strerror(errno.ENFILE)), True),
        (ImportError("libcublas.so.12: cannot open shared object file: Too many open files"), True),
        (UserError("no gRPC server answers at localhost:1: INTERNAL: socket: Too many open files"), True),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), False),
        (UserError("there is no such thing"), False),
    ],
)
def test_what_says_so(error: Exception, are: bool) -> None:
    assert open_files.are_too_many(error) is are

    def fail() -> None:
        try:
            raise error
        except Exception:
            raise UserError("cannot read it", "make it readable") from None

    with pytest.raises(UserError) as other:
        fail()
    assert open_files.are_too_many(other.value) is are
