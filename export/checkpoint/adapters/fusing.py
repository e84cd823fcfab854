"""Adapters, merged into the weights when these are read.

The names in a file can be those of any tool (names.py), the kind can be any of those here, and its strength is where
its tool writes it (settings.py). An adapter for a fused weight (`qkv`, `linear1`) is computed for the fused weight and
cut along its rows in the same way as the weight itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.names import Index, Target, index
from ditforge.export.checkpoint.adapters.reading import OTHER_MODEL, Use, read_uses
from ditforge.export.checkpoint.conversion import Tensors
from ditforge.export.checkpoint.layout import Layout
from ditforge.export.checkpoint.lazy_tensors import Lazy, joined
from ditforge.export.checkpoint.load_report import LoadReport, shown

SAME = 0.01  # of the largest number: two spellings of a LoRA can be rounded to different dtypes

Components = dict[str, dict[str, Lazy]]


def fuse(
    components: Mapping[str, Tensors],
    loras: Sequence[tuple[Path, float]],
    layout: Layout | None,
    report: LoadReport | None = None,
) -> Components:
    """Return the components with adapters merged. The sums are computed in float32 when a tensor is read.

    components: the DiT (`transformer`) and the text encoders, each with its tensors by diffusers' names. Tensors that
        no adapter changes stay as they are.
    loras: the adapters' files, each with its strength. They are merged in this order, each into what the earlier ones
        left, as ComfyUI, LyCORIS and PEFT's merge() do. The order matters only for kinds that do more than add.
    layout: has the names that the authors of the DiT's family use; if it is None, only diffusers' names are known.
    report: gets what is in the files and is not merged.

    Raises UserError for a file of a kind that cannot be merged, or that has keys or shapes that do not fit this model,
    lacks a part of an adapter, says different things about its strength, or changes a weight twice.
    """
    names, report = index(components, layout), report or LoadReport()
    fused = {component: dict(tensors) for component, tensors in components.items()}
    for file, strength in loras:
        merge(file, strength, names, components, fused, report)
    return fused


def merge(
    file: Path,
    strength: float,
    names: Index,
    components: Mapping[str, Tensors],
    fused: Components,
    report: LoadReport,
) -> None:
    """Merge one file into `fused`, whose tensors are replaced. Raises UserError as fuse() does.

    `components` are the checkpoint's own tensors.
    """
    changed: dict[tuple[str, str], tuple[Use, tuple[Lazy, Lazy | None]]] = {}
    twice = []
    for use in read_uses(file, strength, names, report):
        targets = use.module.targets.get(use.parameter, [])
        if not targets:
            problem = f"{file} changes the {use.parameter} of {use.written}, which has none in this checkpoint"
            raise UserError(problem, OTHER_MODEL)
        current = gathered(targets, fused)
        check_fit(file, use, current, fused[targets[0].component][targets[0].name], targets[0].name)
        merged = use.change.apply(current, gathered(targets, components), strength)
        for target in targets:
            source = target.recipe.pieces[0].name
            new = target.recipe.of({source: merged})
            delta = target.recipe.of({source: use.change.delta}) if use.change.delta else None
            key = target.component, target.name
            if key not in changed:
                changed[key] = use, (new, delta)
                continue
            other, known = changed[key]
            if not same(fused[target.component][target.name], (new, delta), known):
                problem = f"{file} changes {target.name} twice and differently, as {other.written} and as {use.written}"
                raise UserError(problem, "take one of the two out of the file")
            twice.append(use.written)
    if twice:
        report.add(f"{shown(dict.fromkeys(twice))} in {file}", "the same is there under other names; it is merged once")
    for (component, name), (_, (new, _)) in changed.items():
        fused[component][name] = new


def same(before: Lazy, one: tuple[Lazy, Lazy | None], other: tuple[Lazy, Lazy | None]) -> bool:
    """Return whether two changes of the weight `before` are the same up to rounding.

    Each is the weight with the change, and what is added to it if that is known; then the weight is not read.
    """
    if one[1] is not None and other[1] is not None:
        first, second = one[1].read().flatten(), other[1].read().flatten()
    else:
        start = before.read().float().flatten()
        first, second = (changed.read().flatten() - start for changed, _ in (one, other))
    return bool((first - second).abs().max() <= SAME * first.abs().max())


def gathered(targets: Sequence[Target], components: Mapping[str, Tensors]) -> Lazy:
    """Return a module's weight in the layout from which its targets are cut: the inverse of their recipes."""
    rows = []
    for target in targets:
        tensor, first = components[target.component][target.name], 0
        shares = [piece.stop - piece.start for piece in target.recipe.pieces]
        for piece, share in zip(target.recipe.pieces, shares, strict=True):
            stop = first + int(tensor.length * share / sum(shares))
            rows.append((piece.start, tensor.rows(first, stop)))
            first = stop
    return joined(part for _, part in sorted(rows, key=lambda row: row[0]))


def check_fit(file: Path, use: Use, weight: Lazy, part: Lazy, name: str) -> None:
    """Raise UserError if the change has not the shape of the module's weight, of which `part` is the first target."""
    change, numbers = use.change, prod(weight.shape[1:])
    if change.rows in (-1, weight.length) and change.row in (None, numbers):
        return
    found = f"{file}: {use.written} is {change.sizes}, and {name} is {list(part.shape)}"
    if change.rows == weight.length and change.row and change.row > numbers and change.row % numbers == 0:
        problem = f"{found}: made for a model with a wider input here, as control LoRAs and those of Fill are"
        raise UserError(problem, "leave it out: an export has no input for their pictures")
    raise UserError(f"{found}: a LoRA of another model", OTHER_MODEL)
