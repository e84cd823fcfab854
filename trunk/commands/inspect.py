"""`ditforge inspect`: tells what a file or folder is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditforge import terminal
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.contents import CheckpointFolder, Contents, Part, StageFolder
    from ditforge.export.checkpoint.description import Adapter, TensorFile


def inspect(
    path: Annotated[
        Path, typer.Argument(help="A folder that a stage wrote, a checkpoint, a file of tensors, or a picture.")
    ],
    as_json: Json = False,
) -> None:
    """What a folder or file is, and what is in it.

    It can be what a stage wrote, a checkpoint, a .safetensors or .gguf file with a checkpoint, a LoRA or anything else,
    or a picture, which says what made it. Only headers are read.

    Example: ditforge inspect picture.png
    """
    from ditforge.contents import look_into

    show(look_into(path), say, as_json)


def say(found: Contents) -> None:
    """Print what was found in the file or folder."""
    from ditforge import contents

    if isinstance(found, contents.Picture):
        say_picture(found.parameters)
    elif isinstance(found, contents.StageFolder):
        say_stage(found)
    elif isinstance(found, contents.CheckpointFolder):
        say_checkpoint(found)
    else:
        say_tensors(found)


def say_picture(parameters: Mapping[str, Any]) -> None:
    """Print the parameters of a picture; for a grid, those that all of its pictures share, and then the others."""
    rows, cells = dict(parameters), parameters.get("pictures")
    if isinstance(cells, list) and cells and all(isinstance(cell, dict) for cell in cells):
        names = list(dict.fromkeys(name for cell in cells for name in cell))
        alike = [name for name in names if all(name in cell and cell[name] == cells[0][name] for cell in cells)]
        rows |= {"pictures": len(cells), **{name: cells[0][name] for name in alike}}
        own = [name for name in names if name not in alike]
    else:
        cells, own = [], []
    terminal.table(("parameter", "value"), [(name, in_words(value)) for name, value in rows.items()])
    if own:
        terminal.say("")
        terminal.table(
            ("picture", *own),
            [(str(number), *(in_words(cell.get(name)) for name in own)) for number, cell in enumerate(cells, 1)],
        )


def in_words(value: object) -> str:
    """A parameter as text: lists with commas, and the rest as in JSON, but strings without their quotation marks."""
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        return ", ".join(map(in_words, value))
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def say_stage(found: StageFolder) -> None:
    """Print what is in a folder that `export`, `build` or `repo` wrote."""
    from ditforge.contents import sizes_in_words

    terminal.say(f"{found.path}: {found.kind} of {found.model}, written by ditforge {found.ditforge}")
    facts = [
        ("size", f"{amount(found.size)}, sha256 {found.sha256[:16]}…"),
        ("pictures", sizes_in_words(found.pictures)),
        ("batch", "any" if found.max_batch is None else f"up to {found.max_batch}"),
    ]
    facts += [(key.replace("_", " "), shortened(value)) for key, value in found.origin.items()]
    say_facts(facts)
    built = any(part.target for part in found.parts)
    headings = ("component", "precision", "size", *(("where", "segments", "engine") if built else ("why",)))
    terminal.say("")
    terminal.table(headings, [part_row(part, built) for part in found.parts])
    ports = [
        (part.name, direction, port.name, port.dtype, f"[{', '.join(map(str, port.shape))}]")
        for part in found.parts
        for direction, side in (("in", part.inputs), ("out", part.outputs))
        for port in side
    ]
    terminal.say("")
    terminal.table(("component", "", "tensor", "dtype", "shape"), ports)
    if layers := [(p.name, f"{one.count} x {one.name}", one.precision) for p in found.parts for one in p.layers]:
        terminal.say("")
        terminal.table(("component", "layers", "precision"), layers)


def part_row(part: Part, built: bool) -> tuple[str, ...]:
    """A row for a component: with its engine if engines were built, or else with the reason for its precision."""
    known = part.name, part.precision, amount(part.size)
    if not built:
        return *known, part.reason
    engine = f"{part.compiler} {part.compiler_version} for {part.target}" if part.target else ""
    return *known, part.residency, str(part.segments) if part.target else "", engine


def say_checkpoint(found: CheckpointFolder) -> None:
    """Print what is in a checkpoint."""
    named = found.pipeline or ("of no named class" if found.kind == "checkpoint" else "without model_index.json")
    terminal.say(f"{found.path}: a {found.kind} in diffusers' layout, {named}")
    facts = [("family", found.family)] if found.family else []
    facts += [("model", found.variant)] if found.variant else []
    facts += [("weights", amount(found.weights))]
    facts += [("noted", one) for one in found.noted]
    facts += [("export", found.export)] if found.export else []
    facts += [("problem", found.problem), ("fix", found.fix)] if found.problem else []
    say_facts(facts)
    terminal.say("")
    rows = [
        (
            part.name,
            part.class_name,
            amount(part.weights) if part.weights else "",
            ", ".join(filter(None, (", ".join(part.dtypes), part.quantisation))),
            part.files[0] if len(part.files) == 1 else f"{len(part.files)} files" if part.files else "",
            ", ".join(part.variants),
        )
        for part in found.parts
    ]
    headings = ("component", "class", "weights", "dtypes", "read", "variants")
    terminal.table(headings, rows)


def say_tensors(found: TensorFile) -> None:
    """Print what is in a file of tensors."""
    terminal.say(f"{found.path}: {found.what}")
    facts = [("format", found.format), ("size", f"{amount(found.size)}, {found.tensors} tensors")]
    facts += [("parameters", f"{found.parameters:,}"), ("dtypes", sizes(found.dtypes))]
    facts += [("layout", found.layout)] if found.layout else []
    facts += adapter_rows(found.adapter) if found.adapter else []
    facts += [("ignored", one) for one in found.ignored]
    facts += [("export", found.export)] if found.export else []
    facts += [("problem", found.problem), ("fix", found.fix)] if found.problem else []
    say_facts(facts)
    if found.parts:
        terminal.say("")
        rows = [(one.name, str(one.tensors), f"{one.parameters:,}", sizes(one.dtypes)) for one in found.parts]
        terminal.table(("component", "tensors", "parameters", "dtypes"), rows)
    if found.adapter:
        say_fits(found.adapter)
    if found.metadata:
        terminal.say("")
        terminal.table(("metadata", ""), [(key, shortened(value)) for key, value in found.metadata.items()])


def adapter_rows(adapter: Adapter) -> list[tuple[str, str]]:
    """What is said of an adapter, as names and values."""
    modules = ", ".join(f"{count} of {name}" for name, count in adapter.modules.items())
    rows = [("modules", modules), ("names of", adapter.tool), ("kinds", counts(adapter.kinds))]
    rows += [("rank", counts(adapter.ranks))] if adapter.ranks else []
    rows += [("alpha", counts(adapter.alphas) if adapter.alphas else "not written, so it is the rank")]
    rows += [("unknown", ", ".join(adapter.strange[:3]))] if adapter.strange else []
    return rows


def say_fits(adapter: Adapter) -> None:
    """Print how the adapter fits each published model, and what modules of the best one its own are most like."""
    terminal.say("")
    rows = [
        (fit.model, str(fit.matched), str(len(fit.lacking)), str(len(fit.unmatched)), str(len(fit.misfits)))
        for fit in adapter.fits
    ]
    terminal.table(("model", "modules that fit", "not needed", "unmatched", "of other shapes"), rows)
    best = next((fit for fit in adapter.fits if fit.matched), None)
    for name, nearest in best.nearest.items() if best else ():
        terminal.say(f"  {name} is no module of {best.model if best else ''}; the nearest is {nearest}")


def counts(found: dict[str, int]) -> str:
    """Values and how often there are, the only one without its count."""
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{value} ({count} times)" for value, count in found.items())


def sizes(dtypes: dict[str, int]) -> str:
    """Dtypes and their bytes."""
    return ", ".join(f"{name} {amount(size)}" for name, size in dtypes.items())


def say_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one a line."""
    facts = list(facts)
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        terminal.say(f"  {name:{width}}  {value}")


def shortened(value: str) -> str:
    """A value, cut if it is too long for a line."""
    return value if len(value) <= 100 else f"{value[:100]}…"


def amount(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
