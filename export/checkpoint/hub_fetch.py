"""Get the needed files of a repository from the Hub, or from its cache alone, with errors for what is not there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from ditforge.errors import UserError
from ditforge.export.checkpoint import folder_settings, hub_files
from ditforge.export.checkpoint.adapters.folder import chosen, with_config
from ditforge.export.checkpoint.diffusers_folder import INDEX, Checkpoint, read_json
from ditforge.export.checkpoint.hub import SAFETENSORS, SINGLE_SUFFIXES, Progress, Reference, Wanted
from ditforge.export.checkpoint.hub_errors import explained
from ditforge.export.checkpoint.hub_repository import Meter, Repository, check_space, describe, download

LISTED = 12  # how many files of a repository an error lists


def fetch(reference: Reference, wanted: Wanted | None, progress: Progress | None) -> Path:
    """Download what the cache lacks of `reference`, and return its local path.

    Of a folder, only the `wanted` files are downloaded; `wanted` None means a LoRA, which is one file, with PEFT's
    configuration if that is beside it. Raises the same errors as hub.local().
    """
    meter = Meter(progress)
    with explained(reference):
        repository = describe(reference)
        file = reference.file or (only_file(reference, repository.files) if wanted is None else None)
        if file:
            known = _known(reference, file, repository.files)
            files = with_config(known, repository.files) if wanted is None else [known]
            path = _files(reference, repository, files, meter)
        else:
            path = _folder(reference, repository, wanted, meter)
        meter.finish()
    return path


def cached(reference: Reference, wanted: Wanted | None) -> Path:
    """Return the local path of `reference` from the cache alone. Raises UserError if a wanted file is not there."""
    fix = "run it where the Hub can be reached, with HF_HUB_OFFLINE unset: what is missing is downloaded"
    try:  # allow_patterns=[] asks for no file: this only finds the folder of the revision
        found = snapshot_download(
            reference.repository, revision=reference.revision, local_files_only=True, allow_patterns=[]
        )
    except (EntryNotFoundError, OSError) as error:
        problem = f"{reference} is no file or folder here, and offline: {constants.HF_HUB_CACHE} does not have it"
        raise UserError(problem, fix) from error
    folder = Path(found)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    try:
        if reference.file or wanted is None:
            return folder / _known(reference, reference.file or only_file(reference, names), names)
        parts = hub_files.components(read_json(folder / INDEX), wanted.text_encoders)
        if bare := [part for part in parts if not hub_files.descriptions(names, [part], wanted.variant)]:
            raise UserError(f"{bare[0]} is not there")
        if wanted.weights:
            hub_files.weights(folder, names, [part for part in parts if part not in wanted.without], wanted.variant)
    except UserError as error:
        problem = f"{reference} is only in part in {constants.HF_HUB_CACHE}, and offline: {error.problem}"
        raise UserError(problem, fix) from error
    return folder


def only_file(reference: Reference, names: Collection[str]) -> str:
    """Return the only safetensors file of a repository, or that with an adapter's usual name (see adapters/folder.py).

    Files in subfolders count only if there is no other. Raises UserError if there is none, or if there are several.
    """
    found = chosen(names)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{reference} has no {SAFETENSORS} file", "take another repository")
    problem = f"{reference} has {len(found)} {SAFETENSORS} files: {_listed(found)}"
    raise UserError(problem, f"name one: {replace(reference, file=found[0])}")


def _files(reference: Reference, repository: Repository, files: list[str], meter: Meter) -> Path:
    """Download the files, and return the path of the first one."""
    check_space(reference, repository, files)
    folder = download(repository, files[:1], meter, reference.revision or constants.DEFAULT_REVISION)
    if files[1:]:
        download(repository, files[1:], meter, reference.revision or constants.DEFAULT_REVISION)
    return folder


def _folder(reference: Reference, repository: Repository, wanted: Wanted | None, meter: Meter) -> Path:
    """Download the configurations and tokenizers first, which say what else is needed, and then the weights."""
    assert wanted is not None, "a folder is no LoRA"
    if INDEX not in repository.files:
        raise _no_folder(reference, repository.files)
    folder = download(repository, [INDEX], meter, reference.revision or constants.DEFAULT_REVISION).parent
    if folder.name != repository.commit:  # the branch got a new commit in the meantime
        repository = describe(replace(reference, revision=folder.name))
    parts = hub_files.components(read_json(folder / INDEX), wanted.text_encoders)
    own = [folder_settings.FILE] if folder_settings.FILE in repository.files else []
    download(repository, [*own, *hub_files.descriptions(repository.files, parts, wanted.variant)], meter)
    _check_family(reference, folder)
    if wanted.weights:
        needed = [part for part in parts if part not in wanted.without]
        names = hub_files.weights(folder, repository.files, needed, wanted.variant)
        check_space(reference, repository, names)
        download(repository, names, meter)
    return folder


def _check_family(reference: Reference, folder: Path) -> None:
    """Raise UserError, before gigabytes are downloaded, if the model is of a family that cannot be exported."""
    from ditforge.export.families import family_of

    pipeline = str(read_json(folder / INDEX).get("_class_name", ""))
    try:
        family_of(Checkpoint(folder, pipeline))
    except UserError as error:
        raise UserError(error.problem.replace(str(folder), str(reference)), error.fix) from error


def _known(reference: Reference, file: str, names: Collection[str]) -> str:
    """Return `file` if it is among `names`. Otherwise raises UserError, which lists the safetensors files."""
    if file in names:
        return file
    others = sorted(name for name in names if name.endswith(SINGLE_SUFFIXES))
    where = replace(reference, file=None)
    fix = f"one that it has: {replace(reference, file=others[0])}" if others else "take another repository"
    raise UserError(f"{where} has no {file}; it has {_listed(others) or f'no {SAFETENSORS} file'}", fix)


def _no_folder(reference: Reference, names: Collection[str]) -> UserError:
    """Return the error for a repository that is no checkpoint in diffusers' layout."""
    files = sorted(name for name in names if name.endswith(SINGLE_SUFFIXES))
    if not files:
        return UserError(f"{reference} has no {INDEX}, and no {SAFETENSORS} file", "take another repository")
    problem = f"{reference} has no {INDEX}, so it is no checkpoint in diffusers' layout; it has {_listed(files)}"
    return UserError(problem, f"name a file that is one: {replace(reference, file=files[0])}")


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(list(names)[:LISTED]) + more
