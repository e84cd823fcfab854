"""What Python 3.11 added that ditforge calls, for Python 3.10, for which alone TensorRT 8.6 has bindings.

Python imports it at its start if its folder is in PYTHONPATH.
"""

import hashlib
import os
import subprocess

BLOCK = 1 << 20  # bytes that are read at a time


def file_digest(file, name):
    """hashlib.file_digest of an open file."""
    digest = hashlib.new(name)
    while block := file.read(BLOCK):
        digest.update(block)
    return digest


class Popen(subprocess.Popen):
    """subprocess.Popen, with its argument `process_group`."""

    def __init__(self, *args, process_group=None, **kwargs):
        if process_group is not None:
            kwargs["preexec_fn"] = lambda: os.setpgid(0, process_group)
        super().__init__(*args, **kwargs)


if not hasattr(hashlib, "file_digest"):
    hashlib.file_digest = file_digest
    subprocess.Popen = Popen
