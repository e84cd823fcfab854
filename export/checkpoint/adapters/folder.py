"""Find the file of an adapter in a folder, such as one that PEFT's save_pretrained() wrote, or in a repository."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.settings import CONFIG

SUFFIX = ".safetensors"
# What PEFT and diffusers call an adapter's file. The first one that is there is taken, whatever else is there.
USUAL = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PICKLED = (".bin", ".pt", ".ckpt", ".pth")


def chosen(names: Iterable[str]) -> list[str]:
    """Return the files among `names` that can be meant as a repository's or a folder's adapter, with subfolders.

    The usual name wins. Files in subfolders, such as checkpoints of a training, count only if there is no other file.
    """
    found = sorted(name for name in names if name.endswith(SUFFIX))
    for level in ([name for name in found if "/" not in name], found):
        for usual in USUAL:
            if usual in level:
                return [usual]
        if level:
            return level
    return []


def with_config(file: str, names: Collection[str]) -> list[str]:
    """Return the file of an adapter and, if it is among `names`, the configuration of PEFT in the same folder."""
    folder, slash, _ = file.rpartition("/")
    config = f"{folder}{slash}{CONFIG}"
    return [file, config] if config in names else [file]


def adapter_file(path: Path) -> Path:
    """Return the adapter's file in the folder `path`. A path that is no folder is returned unchanged.

    Raises UserError if the folder has no such file, or several of which none has a usual name.
    """
    if not path.is_dir():
        return path
    files = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    found = chosen(name.replace("\\", "/") for name in files)
    if len(found) == 1:
        return path / found[0]
    if found:
        names = ", ".join(found[:3])
        raise UserError(f"{path} has {len(found)} {SUFFIX} files: {names}", f"name one: {path / found[0]}")
    pickled = next((name for name in sorted(files) if name.endswith(PICKLED)), None)
    if pickled:
        problem = f"{path} has no {SUFFIX} file, only {pickled}, which is pickled and can run code when opened"
        raise UserError(problem, f"save the adapter as {USUAL[0]}, which PEFT does by itself since 0.6")
    raise UserError(f"{path} has no {SUFFIX} file, and so no LoRA", f"give a {SUFFIX} file, or a folder of PEFT")


def name_of(file: Path) -> str:
    """Return the name of an adapter's file for people to read: with its folder, if the file has a usual name."""
    return f"{file.parent.name}/{file.name}" if file.name in USUAL and file.parent.name else file.name
