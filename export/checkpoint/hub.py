"""Checkpoints that are given as repositories of the Hugging Face Hub: `owner/name`, `owner/name@revision`, and one file
in a repository, `owner/name/file.safetensors@revision`.

They are downloaded into the Hub's own cache, through huggingface_hub, which reads HF_TOKEN (or what `hf auth login`
keeps), HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. What is on the disk by that name is never looked for on the Hub.
Source: https://huggingface.co/docs/huggingface_hub, "Understand caching" and "Environment variables".
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ditforge.errors import DitforgeWarning, UserError

SAFETENSORS = ".safetensors"
FILE_SUFFIXES = {SAFETENSORS, ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".md", ".txt", ".png", ".jpg"}
PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
REFERENCE = re.compile(rf"({PART}/{PART})(?:/([^@]+\{SAFETENSORS}))?(?:@([A-Za-z0-9_./-]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
# By the names that people give them; lower case.
PUBLISHED = {
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "flux.1-schnell": "black-forest-labs/FLUX.1-schnell",
    "stable-diffusion-3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "stable-diffusion-3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "stable-diffusion-3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
}
NICKNAME = re.compile(r"sd-?(?=3\.5)")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reference:
    """What is meant on the Hub: a repository, one of its files or all of it (None), at a revision or the newest (None).

    A revision is a branch, a tag, or a commit.
    """

    repository: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file, revision = self.file and f"/{self.file}", self.revision and f"@{self.revision}"
        return self.repository + (file or "") + (revision or "")


@dataclass(frozen=True)
class Wanted:
    """What of a diffusers folder is needed: "all" text encoders, or "clip" without T5; the weights, but for those of
    the components in `without`, or only configurations and tokenizers.
    """

    text_encoders: str = "all"
    weights: bool = True
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Snapshot:
    """What a path in the Hub's cache is: a repository at a commit, and a file in it ("" for all of it)."""

    repository: str
    commit: str
    file: str = ""

    def __str__(self) -> str:
        return str(Reference(self.repository, self.file or None, self.commit))


def local(path: Path, wanted: Wanted | None = None, progress: Progress | None = None) -> Path:
    """The folder or file `path` on this machine; where it is none and names a repository, what is downloaded of that.

    Raises UserError where neither is there, where the repository may not be read, is no diffusers folder or does not
    fit on the disk, and DitforgeError where the Hub cannot be reached and the cache lacks something.
    """
    wanted = wanted or Wanted()
    reference = reference_of(path)
    if reference is None:
        if wanted.weights and not path.is_absolute() and len(path.parts) == 1 and not path.exists():
            _suggest(path)
        return path
    return _fetched(reference, wanted, progress)


def local_lora(path: Path, progress: Progress | None = None) -> Path:
    """The LoRA's file `path` on this machine; of a repository, the file that is named, or the only one that it has.

    Raises as local() does, and UserError for a repository of several files.
    """
    reference = reference_of(path)
    if reference is None:
        return path
    return _fetched(reference, None, progress)


def reference_of(path: Path) -> Reference | None:
    """What `path` means on the Hub; None where it is on this machine, or names no repository.

    Raises UserError for a path that is not there in a folder that is, which is a mistake rather than a repository.
    """
    match = REFERENCE.fullmatch(str(path))
    if match is None or path.exists():
        return None
    repository, file, revision = match.groups()
    owner, name = repository.split("/")
    if Path(name).suffix.lower() in FILE_SUFFIXES:
        return None
    if Path(owner).is_dir():
        problem = f"{path} does not exist; it is taken for a path, and not for a repository, since {owner}/ is here"
        near = get_close_matches(name, [entry.name for entry in Path(owner).iterdir()], n=1)
        elsewhere = "check the path; for the repository of that name, run the command in another folder"
        raise UserError(problem, f"{Path(owner, near[0])}   is there" if near else elsewhere)
    return Reference(repository, file, revision)


def snapshot_of(path: Path) -> Snapshot | None:
    """What `path` is of the Hub's cache: models--OWNER--NAME/snapshots/COMMIT/…; None where it is elsewhere."""
    parts = (path.resolve() if path.is_dir() else path.absolute()).parts
    for number, part in enumerate(parts[:-2]):
        owner_name = part.removeprefix("models--").split("--")
        if part.startswith("models--") and parts[number + 1] == "snapshots" and COMMIT.fullmatch(parts[number + 2]):
            return Snapshot("/".join(owner_name), parts[number + 2], "/".join(parts[number + 3 :]))
    return None


def title(folder: Path) -> str | None:
    """The name of the model in a folder of the cache, which is itself called by a commit; None for other folders."""
    snapshot = snapshot_of(folder)
    return snapshot.repository.split("/")[-1] if snapshot else None


def held_components(path: Path) -> frozenset[str]:
    """The components whose weights are in the single file `path`."""
    if not path.is_file():
        return frozenset()
    from ditforge.export.checkpoint.layouts import open_single_file

    return frozenset(open_single_file(path).components)


def _suggest(path: Path) -> None:
    """Raise UserError where a name without an owner is nearly that of a published model."""
    if found := published(path.name):
        raise UserError(f"{path} is not a folder", f"{found}   is the repository of that name")


def published(name: str) -> str | None:
    """The repository of the published model that is called nearly so."""
    near = get_close_matches(NICKNAME.sub("stable-diffusion-", name.lower()), PUBLISHED, n=1, cutoff=0.85)
    return PUBLISHED[near[0]] if near else None


def _fetched(reference: Reference, wanted: Wanted | None, progress: Progress | None) -> Path:
    """The folder or file that `reference` means, downloaded or from the cache; `wanted` None means a LoRA's file."""
    from huggingface_hub import constants

    from ditforge.export.checkpoint import hub_fetch
    from ditforge.export.checkpoint.hub_errors import Unreachable

    if constants.HF_HUB_OFFLINE:
        return hub_fetch.cached(reference, wanted)
    # What a commit is never changes. Weights come last: where they are, the rest is.
    if reference.revision and COMMIT.fullmatch(reference.revision) and (wanted is None or wanted.weights):
        with suppress(UserError):
            return hub_fetch.cached(reference, wanted)
    try:
        return hub_fetch.fetch(reference, wanted, progress)
    except Unreachable as error:
        try:
            path = hub_fetch.cached(reference, wanted)
        except UserError:
            raise error from None
        commit = snapshot.commit if (snapshot := snapshot_of(path)) else ""
        warnings.warn(f"{error.problem}; {reference} is taken from the cache: {commit}", DitforgeWarning, stacklevel=2)
        return path
    except (KeyboardInterrupt, SystemExit):
        remark = f"what was downloaded of {reference} stays in {constants.HF_HUB_CACHE}, for the same command again"
        warnings.warn(remark, DitforgeWarning, stacklevel=2)
        raise
