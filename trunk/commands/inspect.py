"""`ditforge inspect`: what a folder holds, or what made a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.errors import UserError

if TYPE_CHECKING:
    from ditforge.manifest import Engine


def inspect(path: Annotated[Path, typer.Argument(help="A folder that a stage wrote, or a picture.")]) -> None:
    """What a folder holds, or what made a picture.

    Example: ditforge inspect picture.png
    """
    if path.is_dir():
        show_folder(path)
    elif path.is_file():
        from ditforge.client.picture_file import read_parameters

        terminal.table(("parameter", "value"), [(key, str(value)) for key, value in read_parameters(path).items()])
    else:
        raise UserError(f"{path} does not exist", "give a folder that a stage wrote, or a picture that ditforge made")


def show_folder(folder: Path) -> None:
    """Print what is in a folder that `export`, `build` or `repo` wrote."""
    from ditforge import manifest

    found = manifest.read_any(folder)
    terminal.say(f"{folder}: {found.kind} of {found.model.name}, written by ditforge {found.ditforge}")
    rows, ports = [], []
    for name, component in found.components.items():
        engine = found.engines.get(name)
        made = describe(engine) if engine else ""
        size = sum(file.size for file in component.files.values())
        rows.append((name, component.precision, component.reason, f"{size / 1e6:.1f} MB", made))
        for direction, tensors in (("in", component.inputs), ("out", component.outputs)):
            ports += [(name, direction, key, t.dtype, str(list(t.shape))) for key, t in tensors.items()]
    headings = ("component", "precision", "why", "size", *(("engine",) if found.engines else ()))
    terminal.table(headings, [row[: len(headings)] for row in rows])
    terminal.say("")
    terminal.table(("component", "", "tensor", "dtype", "shape"), ports)
    layers = [(name, layer, p) for name, component in found.components.items() for layer, p in component.layers.items()]
    if layers:
        terminal.say("")
        terminal.table(("component", "layer", "precision"), layers)


def describe(engine: Engine) -> str:
    """What made an engine, in how many segments if it is not whole, and how it is loaded if not for good."""
    made = f"{engine.compiler} {engine.compiler_version} for {engine.target}"
    segments = f", {len(engine.segments)} segments" if engine.segments else ""
    parts = max(len(engine.segments), 1)
    some = f", {engine.on_demand} on demand" if engine.on_demand < parts else ", on demand"
    return made + segments + (some if engine.on_demand else "")
