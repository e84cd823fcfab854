"""The folder that a stage writes: what it may replace, and how it appears at its place, complete or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path, PurePath
from shlex import quote

from ditforge import write_errors
from ditforge.errors import UserError
from ditforge.manifest import FILE_NAME, Kind, parse
from ditforge.option import option, setting
from ditforge.real_path import current_folder, real_path
from ditforge.unfinished_folder import SUFFIX, partial_folder

OTHER_OUT = option("choose another out, or remove it first", "choose another --out, or remove it first")


def called(name: str, origin: Mapping[str, str]) -> str:
    """Describe a model in words that distinguish it from others: its name, its LoRAs, and whether it is random."""
    loras = f" with {origin['loras']}" if origin.get("loras") else ""
    return f"{name}{loras}{' of random weights' if origin.get('weights') == 'random' else ''}"


def check_early(target: Path, kind: Kind) -> None:
    """Raise UserError if `target` cannot become a folder of `kind`. It is called before anything slow is done.

    Some things are not known yet and are left to `check_replaceable`: which files beside those in the manifest belong
    to the stage, and, if `target` is a folder of `kind` already, whether anything has to be written.
    """
    target = real_path(target)
    check_outside(target)
    if os.path.isfile(target / FILE_NAME):
        check_kind(target, kind)
    else:
        check_replaceable(target, kind, ())


def check_replaceable(target: Path, kind: Kind, own: Iterable[str], model: str = "") -> None:
    """Raise UserError if a folder of `kind` cannot replace `target`, or if something would be lost by that.

    Only files that the manifest in `target` lists, and those whose path in it fits a pattern of `own`, as of a shell,
    may be replaced. If `model` is not empty, the folder must hold that model, in the words of `called`.
    """
    target = real_path(target)
    check_outside(target)
    if target.is_file():
        raise UserError(f"{target} is a file", OTHER_OUT)
    try:
        names = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", OTHER_OUT) from error
    if os.path.ismount(target):
        raise UserError(f"{target} is a mount point, which cannot be replaced", setting("out", str(target / kind)))
    if names:
        check_content(target, kind, names, own, model)
    check_place(target)


def check_outside(target: Path) -> None:
    """Raise UserError if `target` would lose, or spoil, a folder that it is not.

    If the current folder is `target`, or inside, a shell there would be left in a removed folder. If `target` is inside
    of a stage's folder, that one would hold files that its stage did not write, and could not be replaced any more.
    """
    here = current_folder()
    if target in (here, *here.parents) and target.parent != target:
        raise UserError(
            f"{target} is the current folder, or has it inside, and a new folder takes its place",
            f"cd {quote(str(target.parent))}, and {setting('out', target.name)}",
        )
    for parent in target.parents:
        if (kind := kind_of(parent)) is not None:
            problem = f"{target} is inside of {parent}, which holds {kind}, and could not be made again with it in it"
            raise UserError(problem, setting("out", str(parent.with_name(target.name))))


def kind_of(folder: Path) -> Kind | None:
    """What a stage wrote into `folder`; None if no stage did, or if its manifest cannot be read."""
    if not os.path.isfile(folder / FILE_NAME):
        return None
    try:
        return parse(folder / FILE_NAME).kind
    except UserError:
        return None


def check_content(target: Path, kind: Kind, names: list[str], own: Iterable[str], model: str) -> None:
    """Do the part of `check_replaceable` for a folder with content; `names` are the names in it."""
    if FILE_NAME not in names:
        raise UserError(f"{target} holds {names[0]}, and was not made by ditforge", OTHER_OUT)
    check_kind(target, kind)
    before = parse(target / FILE_NAME)
    made = {FILE_NAME, *(name for component in before.components.values() for name in component.files)}
    foreign = (name for name in files_in(target) if name not in made and not any(fits(name, one) for one in own))
    if (name := min(foreign, default=None)) is not None:
        raise UserError(f"{target} holds {name}, which ditforge did not write", OTHER_OUT)
    held = called(before.model.name, before.origin)
    if model and held != model and (before.origin or before.model.name != model):
        raise UserError(
            f"{target} holds {kind} of {held}, and this is {model}",
            f"choose another {option('out')}, or add {setting('force', True)}, which replaces it",
        )


def fits(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern as of a shell, in which no * stands for a slash."""
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch, names, patterns))


def files_in(folder: Path) -> Iterator[str]:
    """The paths in `folder` of all files, links, pipes, … in it, at any depth, and of empty folders."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        itself = [] if folders or files else [""]
        yield from (PurePath(place, name).relative_to(folder).as_posix() for name in (*files, *links, *itself))


def check_kind(target: Path, kind: Kind) -> None:
    """Raise UserError if the manifest in the folder `target` is of another kind, or cannot be read."""
    try:
        before = parse(target / FILE_NAME)
    except UserError as error:
        raise UserError(f"{target} cannot be replaced: {error.problem}", OTHER_OUT) from error
    if before.kind != kind:
        raise UserError(f"{target} holds {before.kind}, which would be lost", OTHER_OUT)


def check_place(target: Path) -> None:
    """Raise UserError if no folder can be made beside `target`, whose parents need not exist."""
    there = next(path for path in target.parents if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write {target}: {there} is a file", OTHER_OUT)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{target.name}."):
            pass
    except OSError as error:
        raise UserError(f"cannot write {target}: {there}: {error.strerror}", OTHER_OUT) from error


def put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`. The earlier content of `target` is removed only after that. Raises OSError.

    If several processes do this at the same time, the folder of the last one stays, complete.
    """
    while True:
        before = folder.with_name(f".{target.name}.{secrets.token_hex(8)}{SUFFIX}")
        with suppress(FileNotFoundError):
            target.rename(before)
        try:
            folder.rename(target)
        except BaseException as error:
            if before.exists():
                with suppress(OSError):
                    before.rename(target)
            if getattr(error, "errno", None) not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        finally:
            shutil.rmtree(before, ignore_errors=True)


@contextmanager
def written_whole(target: Path, kind: Kind, own: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, for the block to fill.

    When the block ends, the folder takes the place of `target`; if the block fails, it is removed. Folders that a
    killed process has left behind are removed too (unfinished_folder.py).

    An existing `target` is replaced only if it is empty, or if it is a folder of the same kind with nothing in it but
    the files that its manifest lists and those that fit a pattern of `own`. No other files are ever deleted. Raises
    UserError if `target` cannot be replaced or written.
    """
    target = real_path(target)
    try:
        check_replaceable(target, kind, own)
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", OTHER_OUT) from error
    try:
        with partial_folder(target) as temporary:
            yield temporary
            temporary.chmod(0o755)
            put_in_place(temporary, target)
    except OSError as error:
        fix = write_errors.fix(error, f"choose another {option('out')}")
        raise UserError(f"cannot write {target}: {write_errors.reason(error)}", fix) from error
