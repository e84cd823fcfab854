"""The SHA-256 of files. Large files that have not changed are read once, and not by each stage anew.

What a file's digest was is kept in the folder `digests` of the cache, by the file's device and inode, so a hard link in
another folder is the same file. As git does it with its index, a file counts as unchanged if its size and the time of
its last change are what they were. What changes a file without its time, such as a failing disk, only `ditforge verify`
finds, which reads everything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path

from ditforge import small_files
from ditforge.cache import default_cache, forget_oldest
from ditforge.errors import UserError

LARGE = 64 << 20  # bytes; smaller files are always read
MOST = 1000  # files that are remembered
TICK = (
    50_000_000  # ns; after it, whoever changes a file changes its time too. Kernels' clocks for files take 1 to 10 ms
)
log = logging.getLogger(__name__)


def sha256_of(path: Path, anew: bool = False) -> str:
    """The SHA-256 of a file, in hexadecimal. `anew` reads it whatever is remembered. Raises OSError."""
    before = path.stat()
    if before.st_size < LARGE:
        return read(path)
    kept = default_cache() / "digests" / f"{before.st_dev:x}-{before.st_ino:x}"
    if not anew and (known := remembered(kept, before)):
        log.debug("%s has not changed since it was read", path)
        return known
    if 0 <= (age := time.time_ns() - before.st_mtime_ns) < TICK:
        time.sleep((TICK - age) / 1e9)
    begun = time.time_ns()
    digest = read(path)
    if state(path.stat()) == state(before) and begun - before.st_mtime_ns >= TICK:
        remember(kept, f"{state(before)} {digest}")
    return digest


def read(path: Path) -> str:
    """Read a file, and return its SHA-256."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state(found: os.stat_result) -> str:
    """What tells whether a file has changed."""
    return f"{found.st_size} {found.st_mtime_ns}"


def remembered(kept: Path, now: os.stat_result) -> str:
    """The digest that is kept, if the file is as it was then; else empty."""
    try:
        *then, digest = kept.read_text().split()
    except (OSError, ValueError):
        return ""
    return digest if " ".join(then) == state(now) and len(digest) == 64 else ""


def remember(kept: Path, text: str) -> None:
    """Keep a digest. If that fails, the file will be read again."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with small_files.written_whole(kept) as temporary:
            temporary.write_text(text)
        forget_oldest(kept.parent.glob("[!.]*"), MOST)
    except (OSError, UserError) as error:
        log.info("the digest %s is not kept: %s", kept.name, error)
