"""A repository of the Hub at one commit: list its files, and download them into the Hub's cache.

When a process ends, huggingface_hub keeps only the files that it has downloaded completely. Large files are therefore
downloaded here, so that the next process can continue within a file. They are written to `blobs/DIGEST.incomplete`, as
earlier versions of the library did, under the library's lock, and by its http_get, which requests only the missing
bytes (Range). The library then finds the finished blob and links it into the snapshot.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from ditforge import __version__
from ditforge.errors import DitforgeError, UserError
from ditforge.export.checkpoint.hub import Progress, Reference
from ditforge.export.checkpoint.hub_errors import AGAIN

LIBRARY: dict[str, Any] = {"library_name": "ditforge", "library_version": __version__}
SPARE = 10**8  # bytes that must stay free on the disk


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub describes it.

    size: its size in bytes.
    blob: the name of its content in the cache's folder `blobs`.
    large: whether it is stored as a large file (LFS); `blob` is then the SHA-256 of its content.
    """

    size: int
    blob: str
    large: bool


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, and its files by name."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def cache(self) -> Path:
        """The repository's folder in the Hub's cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model")

    def missing(self, name: str) -> int:
        """Return how many bytes of the file are not in the cache yet."""
        file = self.files[name]
        if (self.cache / "snapshots" / self.commit / name).exists() or self.blob(name).exists():
            return 0
        partial = self.partial(name)
        return file.size - min(partial.stat().st_size if file.large and partial.exists() else 0, file.size)

    def blob(self, name: str) -> Path:
        """Return the path at which the cache keeps the file's content."""
        return self.cache / "blobs" / self.files[name].blob

    def partial(self, name: str) -> Path:
        """Return the path of the file's content while its download is incomplete."""
        return self.cache / "blobs" / f"{self.files[name].blob}.incomplete"


class Meter:
    """Counts the downloaded bytes of several files and reports them. bar() makes huggingface_hub feed it."""

    def __init__(self, report: Progress | None) -> None:
        self.report = report or (lambda doing, done, total: None)
        self.name, self.done, self.total = "", 0, 0

    def expect(self, size: int) -> None:
        """Add `size` bytes to the total that will be downloaded."""
        self.total += size

    def count(self, size: float | None) -> None:
        """Count `size` more bytes as downloaded, and report them under the current `name`: a component or a file."""
        self.done = min(self.done + int(size or 0), self.total)
        self.report(self.name, self.done, self.total)

    def finish(self) -> None:
        """Report that everything is downloaded."""
        if self.total:
            self.report("done", self.total, self.total)

    def bar(self) -> Any:
        """Return a class that huggingface_hub can use in place of tqdm. It counts bytes here and displays nothing."""
        meter = self

        class Bar:
            def __init__(self, *args: object, **options: object) -> None:
                pass

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *args: object) -> None:
                pass

            def update(self, size: float | None = 1) -> None:
                meter.count(size)

        return Bar


def describe(reference: Reference) -> Repository:
    """Ask the Hub, in one request, for the files of the repository at the revision, and for the revision's commit.

    Raises huggingface_hub's errors, and DitforgeError if the answer names no commit.
    """
    info = HfApi(**LIBRARY).model_info(
        reference.repository, revision=reference.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    if info.sha is None:
        raise DitforgeError(f"{constants.ENDPOINT} does not say which commit {reference} is", "check HF_ENDPOINT")
    files = {
        file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "", bool(file.lfs))
        for file in info.siblings or ()
    }
    return Repository(reference.repository, info.sha, files)


def check_space(reference: Reference, repository: Repository, names: Collection[str]) -> None:
    """Raise UserError if the disk of the cache has no room for the bytes of the files that are missing there."""
    size = sum(repository.missing(name) for name in names)
    parent = repository.cache
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if size and free < size + SPARE:
        lacking = (size + SPARE - free) / 1e9
        held = f"{constants.HF_HUB_CACHE} has {free / 1e9:.2f} GB free"
        problem = f"{reference} takes {size / 1e9:.2f} GB to download, and {held}: {lacking:.2f} GB are missing"
        raise UserError(problem, "free some space, or have HF_HOME=DIR name a folder on a larger disk")


def download(repository: Repository, names: Collection[str], meter: Meter, revision: str | None = None) -> Path:
    """Download the files `names` into the snapshot, and return the last one's path there.

    The cache records the commit of a given `revision` (by default: the commit itself), so that it can be found when the
    Hub cannot be reached.
    """
    meter.expect(sum(repository.missing(name) for name in names))
    at, path = revision or repository.commit, ""
    for name in names:
        file, meter.name = repository.files[name], name.split("/")[0]
        if file.large and repository.missing(name) and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _write_blob(repository, name, meter)
        path = hf_hub_download(repository.name, name, revision=at, tqdm_class=meter.bar(), **LIBRARY)
    return Path(path)


def _write_blob(repository: Repository, name: str, meter: Meter) -> None:
    """Download a large file to its blob in the cache. Continue where an earlier download of it stopped.

    Raises DitforgeError if the earlier part turns out to be of another content.
    """
    file, blob, partial = repository.files[name], repository.blob(name), repository.partial(name)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / repository.cache.name / f"{file.blob}.lock"
    for folder in (lock.parent, blob.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # another process may be downloading the same file, and finish while this one waits
        if blob.exists():
            meter.count(file.size)
            return
        if partial.exists() and partial.stat().st_size > file.size:
            partial.unlink()
        with partial.open("ab") as opened:
            start = opened.tell()
            http_get(
                hf_hub_url(repository.name, name, revision=repository.commit),
                opened,
                resume_size=start,
                headers=build_hf_headers(**LIBRARY),
                expected_size=file.size,
                displayed_filename=name,
                tqdm_class=meter.bar(),
            )
        if start and _sha256(partial, lambda: meter.count(0)) != file.blob:
            partial.unlink()
            raise DitforgeError(f"{name} is damaged: an earlier part of it was of something else", AGAIN)
        partial.replace(blob)


def _sha256(path: Path, report: Callable[[], None]) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
            report()
    return digest.hexdigest()
