"""Checkpoints on the Hugging Face Hub: a repository, as `owner/name` or `owner/name@revision`, or one file in it, as
`owner/name/file.safetensors@revision`.

They are downloaded into the Hub's own cache by huggingface_hub, which reads HF_TOKEN (or the token that `hf auth login`
keeps), HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. A path that exists on the disk is never looked for on the Hub.
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
from ditforge.export.checkpoint.diffusers_folder import components_in

SAFETENSORS = ".safetensors"
SINGLE_SUFFIXES = (SAFETENSORS, ".sft", ".gguf")
FILE_SUFFIXES = {SAFETENSORS, ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".json", ".md", ".txt", ".png", ".jpg"}
PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
REFERENCE = re.compile(rf"({PART}/{PART})(?:/([^@]+\.(?:safetensors|sft|gguf)))?(?:@([A-Za-z0-9_./-]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
# The repositories of published models, by the names that people use, in lower case.
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
    """A repository on the Hub, or one of its files.

    `file` None means the whole repository. `revision` is a branch, a tag or a commit; None means the newest commit.
    """

    repository: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file, revision = self.file and f"/{self.file}", self.revision and f"@{self.revision}"
        return self.repository + (file or "") + (revision or "")


@dataclass(frozen=True)
class Wanted:
    """Which files of a diffusers folder are needed.

    text_encoders: "all", or "clip" to leave T5 out.
    weights: whether weights are needed; if not, only configurations and tokenizers are.
    without: the components whose weights are not needed.
    variant: the variants that the user asked for.
    """

    text_encoders: str = "all"
    weights: bool = True
    without: frozenset[str] = frozenset()
    variant: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """A path in the Hub's cache: the repository, its commit, and the file in it ("" for the whole repository)."""

    repository: str
    commit: str
    file: str = ""

    def __str__(self) -> str:
        return str(Reference(self.repository, self.file or None, self.commit))


def local(path: Path, wanted: Wanted | None = None, progress: Progress | None = None) -> Path:
    """Return the local path of a checkpoint, and download it first if `path` names a repository or file on the Hub.

    A path that exists, or that cannot be the name of a repository, is returned unchanged. `wanted` None means
    everything. `progress` is called with (component or file, bytes downloaded, bytes in all).

    Raises UserError if the repository does not exist, may not be read, is not in diffusers' layout or does not fit on
    the disk, or if `path` is a published model's name without its owner, and DitforgeError if the Hub cannot be reached
    and the cache does not have everything.
    """
    wanted = wanted or Wanted()
    reference = reference_of(path)
    if reference is None:
        if wanted.weights and not path.is_absolute() and len(path.parts) == 1 and not path.exists():
            _suggest(path)
        return path
    return _fetched(reference, wanted, progress)


def local_lora(path: Path, progress: Progress | None = None) -> Path:
    """Return the local path of a LoRA's file, and download it first if `path` is on the Hub.

    For a repository without a file name, it is the repository's only safetensors file, or that with an adapter's usual
    name. PEFT's adapter_config.json beside the file is downloaded too. Raises the same errors as local(), and UserError
    if the repository has several files that can be meant.
    """
    reference = reference_of(path)
    if reference is None:
        if not path.exists():
            problem = f"the LoRA {path} does not exist"
            raise UserError(
                problem, "check the path; on the Hugging Face Hub it is OWNER/NAME or OWNER/NAME/FILE.safetensors"
            )
        return path
    return _fetched(reference, None, progress)


def reference_of(path: Path) -> Reference | None:
    """Return the repository or file on the Hub that `path` names; None if `path` exists, or names no repository.

    Raises UserError if `path` does not exist but its folder does: that is a mistake in a path, and not a repository.
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
    """Return what `path` is in the Hub's cache (models--OWNER--NAME/snapshots/COMMIT/…); None if it is elsewhere."""
    parts = (path.resolve() if path.is_dir() else path.absolute()).parts
    for number, part in enumerate(parts[:-2]):
        owner_name = part.removeprefix("models--").split("--")
        if part.startswith("models--") and parts[number + 1] == "snapshots" and COMMIT.fullmatch(parts[number + 2]):
            return Snapshot("/".join(owner_name), parts[number + 2], "/".join(parts[number + 3 :]))
    return None


def title(folder: Path) -> str | None:
    """Return the name of the model in a folder of the Hub's cache; None for other folders.

    The folder's own name does not tell it, because that is the commit.
    """
    snapshot = snapshot_of(folder)
    return snapshot.repository.split("/")[-1] if snapshot else None


def name_of(path: Path) -> str:
    """Return the repository of a path in the Hub's cache, and its file there, without the commit; "" if elsewhere."""
    snapshot = snapshot_of(path)
    return "/".join(filter(None, (snapshot.repository, snapshot.file))) if snapshot else ""


def held_components(path: Path) -> frozenset[str]:
    """Return the components whose weights are surely in `path`, a single file or a folder with some networks.

    Which of a base's text encoders a file without a DiT holds is known only with the base.
    """
    if path.is_dir():
        return frozenset(components_in(path))
    if not path.is_file():
        return frozenset()
    from ditforge.export.checkpoint.layouts import open_single_file

    single = open_single_file(path)
    if single.family is None:  # then only the base tells which of its folders a text encoder replaces
        return frozenset(single.components) & {"vae"}
    return frozenset(single.components)


def _suggest(path: Path) -> None:
    """Raise UserError, with the repository's name, if `path` is nearly the name of a published model."""
    if found := nearest_repository(path.name):
        raise UserError(f"{path} is not a folder", f"{found}   is the repository of that name")


def nearest_repository(name: str) -> str | None:
    """Return the repository of the published model with the nearest name; None if none is near."""
    near = get_close_matches(NICKNAME.sub("stable-diffusion-", name.lower()), PUBLISHED, n=1, cutoff=0.85)
    return PUBLISHED[near[0]] if near else None


def _fetched(reference: Reference, wanted: Wanted | None, progress: Progress | None) -> Path:
    """Return the local path of `reference`, downloaded or from the cache. `wanted` None means a LoRA's file."""
    from huggingface_hub import constants

    from ditforge.export.checkpoint import hub_fetch
    from ditforge.export.checkpoint.hub_errors import Unreachable

    if constants.HF_HUB_OFFLINE:
        return hub_fetch.cached(reference, wanted)
    # A commit never changes, so its files in the cache are current. Weights are downloaded last: if they are there,
    # everything else is there too.
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
