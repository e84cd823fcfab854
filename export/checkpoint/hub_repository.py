"""A repository of the Hub at one commit: what it holds, and its files brought into the Hub's cache.

huggingface_hub keeps whole files, and goes on within a file only while the process lives. Files of gigabytes are
therefore written here to `blobs/DIGEST.incomplete`, as its earlier versions did, under the library's lock, and by its
http_get, which asks for what is missing (Range). The library then finds the blob and puts it into the snapshot.
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
SPARE = 10**8  # bytes that a disk keeps free


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub describes it: its size in bytes, the name of its blob in the cache, and whether that is the
    SHA-256 of its content, as it is for all large files.
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
        """Its folder in the Hub's cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model")

    def missing(self, name: str) -> int:
        """How many bytes of the file are not in the cache yet."""
        file = self.files[name]
        if (self.cache / "snapshots" / self.commit / name).exists() or self.blob(name).exists():
            return 0
        partial = self.partial(name)
        return file.size - min(partial.stat().st_size if file.large and partial.exists() else 0, file.size)

    def blob(self, name: str) -> Path:
        """Where the cache keeps the file's content."""
        return self.cache / "blobs" / self.files[name].blob

    def partial(self, name: str) -> Path:
        """Where it is while it is not whole."""
        return self.cache / "blobs" / f"{self.files[name].blob}.incomplete"


class Meter:
    """Counts the bytes of several files, and reports them; what huggingface_hub takes for a progress bar feeds it."""

    def __init__(self, report: Progress | None) -> None:
        self.report = report or (lambda doing, done, total: None)
        self.name, self.done, self.total = "", 0, 0

    def expect(self, size: int) -> None:
        """So many bytes more will come."""
        self.total += size

    def count(self, size: float | None) -> None:
        """So many have come, of what is called `name`: a component, or a file."""
        self.done = min(self.done + int(size or 0), self.total)
        self.report(self.name, self.done, self.total)

    def finish(self) -> None:
        """No more will come."""
        if self.total:
            self.report("done", self.total, self.total)

    def bar(self) -> Any:
        """A class like tqdm's, as far as the library uses it, that shows nothing itself."""
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
    """What the repository holds at the revision, and which commit that is; one request."""
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
    """Raise UserError if the disk of the cache has no room for what is missing of the files."""
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
    """Put files into the snapshot, and return the last one's path there.

    A `revision` is noted in the cache, for when the Hub cannot be reached; by default it is the commit.
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
    """Download a large file to where the cache keeps its content, from where an earlier download of it stopped."""
    file, blob, partial = repository.files[name], repository.blob(name), repository.partial(name)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / repository.cache.name / f"{file.blob}.lock"
    for folder in (lock.parent, blob.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # another process may be at it, and may have it by then
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
