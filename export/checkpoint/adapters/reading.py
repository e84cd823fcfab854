"""What an adapter's file changes: its modules, matched with those of a checkpoint, and the change of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters import difference, dora, keys, loha, lokr, lora, oft
from ditforge.export.checkpoint.adapters.changes import Change, Parts, addition, shapes
from ditforge.export.checkpoint.adapters.description import network_of
from ditforge.export.checkpoint.adapters.names import Index, Module
from ditforge.export.checkpoint.adapters.settings import Settings, read_settings
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors
from ditforge.export.checkpoint.load_report import LoadReport, shown
from ditforge.option import option

ALPHA = re.compile(r"(.*\.)?((ss_)?network_|lora_)?alpha")  # what metadata call an alpha
OTHER_MODEL = "use a LoRA that was made for this model, or leave it out"


@dataclass(frozen=True)
class Use:
    """A module in an adapter's file: the name there, what it means, and the change of one of its parameters."""

    written: str
    module: Module
    parameter: str
    change: Change


def read_uses(file: Path, strength: float, names: Index, report: LoadReport) -> list[Use]:
    """Return what the file changes. Raises UserError if a part of it fits nothing in the checkpoint.

    What a checkpoint can do without is added to `report`.
    """
    modules, strange = keys.grouped(file, open_tensors(file))
    settings = read_settings(file)
    found: dict[str, Module] = {}
    skipped: dict[str, list[str]] = {}
    for key in [key for key in strange if keys.left_out(key)]:
        strange.remove(key)
        skipped.setdefault(keys.left_out(key) or "", []).append(key)
    for written in modules:
        if module := names.find(written):
            found[written] = module
        elif why := names.lacking(written):
            skipped.setdefault(why, []).append(written)
        else:
            strange.append(written)
    if strange:
        raise unmatched(file, sorted(strange), names, None if found else network_of(modules))
    if not found:
        reasons = "; ".join(f"{shown(group)}: {why}" for why, group in skipped.items())
        raise UserError(f"nothing in {file} has an effect on this export ({reasons})", "leave it out")
    for why, group in skipped.items():
        report.add(f"{shown(group)} in {file}", why)
    uses = []
    for written, module in found.items():
        parts = dict(modules[written])
        check_dtypes(file, written, parts)
        if parts.keys() <= {"alpha"}:
            raise UserError(f"{file}: {written} has an alpha and no matrices", "copy the file again")
        for parameter, change in changes(file, written, module, parts, settings).items():
            uses.append(Use(written, module, parameter, change))
    note_ineffective(file, {written: modules[written] for written in found}, strength, report)
    note_metadata(file, modules, settings, report)
    return uses


def check_dtypes(file: Path, written: str, parts: Parts) -> None:
    """Raise UserError if a tensor other than an alpha consists of integers, which pack weights in an unknown way."""
    for name, tensor in parts.items():
        if name != "alpha" and not tensor.dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.")
            problem = f"{file}: {name} of {written} is {kind}, numbers that are packed in a way that is not known"
            raise UserError(problem, "use a file with numbers in 16 or 32 bits")


def changes(file: Path, written: str, module: Module, parts: Parts, settings: Settings) -> dict[str, Change]:
    """Return the changes of a module's weight and bias, and take what they use out of `parts`.

    Raises UserError if parts are missing, are left over, or belong to two kinds of adapters.
    """
    found: dict[str, list[Change]] = {"weight": [], "bias": []}
    for kind in (of_products, of_rotation, of_differences):
        for parameter, change in kind(written, module, parts, settings):
            found[parameter].append(change)
    parts.pop("alpha", None)
    if parts or any(len(several) > 1 for several in found.values()):
        left = ", ".join(parts) or "two kinds of adapters"
        raise UserError(f"{file}: {written} has {left}, and it is not known what that means", OTHER_MODEL)
    return {parameter: several[0] for parameter, several in found.items() if several}


def of_products(written: str, module: Module, parts: Parts, settings: Settings) -> list[tuple[str, Change]]:
    """Return the changes of a LoRA, LoHa or LoKr, with the magnitudes of a DoRA; none if there is no such part."""
    for own, kind in ((keys.LORA_PARTS, lora), (keys.LOHA_PARTS, loha), (keys.LOKR_PARTS, lokr)):
        if not own & parts.keys():
            continue
        rank: int | None = kind.rank(parts, written)
        scale = settings.scale(module.component, module.name, rank, parts.get("alpha"))
        delta, sizes = kind.delta(dict(parts), written, scale)  # a copy, since the matrices are read later
        magnitude, dora_scale = parts.pop("lora_magnitude_vector", None), parts.pop("dora_scale", None)
        bias = parts.pop("lora_up_bias", None)
        for part in own:
            parts.pop(part, None)
        if magnitude is None and dora_scale is None and settings.config(module.component).get("use_dora"):
            problem = f"{settings.file}: {settings.origin} has use_dora, and {written} has no magnitudes"
            raise UserError(problem, "use the configuration that belongs to this file")
        if magnitude is not None:
            changed = dora.of_peft(delta, sizes, magnitude, written)
        elif dora_scale is not None:
            changed = dora.of_lycoris(delta, sizes, dora_scale, written)
        else:
            changed = addition(delta, sizes)
        found = [("weight", changed)]
        return found if bias is None else [*found, ("bias", addition(lora.bias_delta(bias, scale), shapes(bias)))]
    return []


def of_rotation(written: str, module: Module, parts: Parts, settings: Settings) -> list[tuple[str, Change]]:
    """Return the change of an OFT; none if there is no part of one."""
    if "oft_R" in parts:
        change = oft.of_peft(parts, written, settings.config(module.component))
        parts.pop("oft_R")
        return [("weight", change)]
    if "oft_blocks" in parts:
        alpha = parts.get("alpha")
        constraint = settings.alpha(alpha, written) if alpha is not None else 0.0
        change = oft.of_lycoris(parts, written, constraint)
        for part in ("oft_blocks", "rescale"):
            parts.pop(part, None)
        return [("weight", change)]
    return []


def of_differences(written: str, module: Module, parts: Parts, settings: Settings) -> list[tuple[str, Change]]:
    """Return the changes of whole weights and biases; none if there are no such parts."""
    kinds: tuple[tuple[str, str, Callable[[Lazy], Change]], ...] = (
        ("diff", "weight", difference.difference),
        ("w_norm", "weight", difference.difference),
        ("diff_b", "bias", difference.difference),
        ("b_norm", "bias", difference.difference),
        ("set_weight", "weight", difference.replacement),
        ("weight", "weight", difference.replacement),
        ("bias", "bias", difference.replacement),
    )
    return [(parameter, change(parts.pop(part))) for part, parameter, change in kinds if part in parts]


def unmatched(file: Path, names: Sequence[str], known: Index, network: str | None) -> UserError:
    """Return the error for modules that fit nothing in the checkpoint, with those that they are most like.

    `network` says whose names they are, if that is known.
    """
    near = {name: known.nearest(name) for name in names[:3]}
    like = ", ".join(f"{name} is most like {other}" for name, other in near.items() if other)
    problem = f"{file}: {shown(names)} fit nothing in this checkpoint: a LoRA of another model, or none"
    problem += f"; the names are those of {network}" if network else ""
    return UserError(problem + (f" ({like})" if like else ""), OTHER_MODEL)


def note_ineffective(file: Path, modules: Mapping[str, Parts], strength: float, report: LoadReport) -> None:
    """Add to the report what has no effect: alphas of kinds without a scale, and a strength beside a whole weight."""
    scaled = keys.LORA_PARTS | keys.LOHA_PARTS | keys.LOKR_PARTS | {"oft_blocks"}
    alphas = {written: parts for written, parts in modules.items() if "alpha" in parts}
    whole = [w for w, parts in alphas.items() if {"lokr_w1", "lokr_w2"} <= parts.keys()]
    unscaled = [written for written, parts in alphas.items() if not scaled & parts.keys()]
    replaced = [written for written, parts in modules.items() if {"set_weight", *keys.WHOLE} & parts.keys()]
    if whole:  # LyCORIS writes an alpha beside them all the same
        report.add(f"the alpha of {shown(whole)} in {file}", "a LoKr of two whole matrices has no rank", expected=True)
    if unscaled:
        report.add(f"the alpha of {shown(unscaled)} in {file}", "this kind of adapter is not scaled by an alpha")
    if replaced and strength != 1:
        report.add(
            f"the strength {strength:g} of {shown(replaced)} in {file}", "whole weights are replaced all the same"
        )


def note_metadata(file: Path, modules: Mapping[str, Parts], settings: Settings, report: LoadReport) -> None:
    """Add to the report an alpha in the metadata that has no effect, because the tensors have none.

    Kohya's scripts and others write it for people to read. All tools then take the rank for alpha.
    """
    if settings.configs or any("alpha" in parts for parts in modules.values()):
        return
    downs = [parts["lora_down"] for parts in modules.values() if "lora_down" in parts]
    ranks = {down.length for down in downs}
    for name, alpha in alphas_in(settings.metadata):
        if alpha is None or ranks != {alpha}:
            why = "the tools that write it read alpha only from tensors, and take the rank for it; "
            why += f"{option('loras', '--lora')} FILE:STRENGTH can set it"
            ranks_in_words = f" of rank {', '.join(map(str, sorted(ranks)))}" if ranks else ""
            report.add(f"{name}{f' {alpha:g}' if alpha else ''}{ranks_in_words} in the metadata of {file}", why)


def alphas_in(metadata: Mapping[str, str]) -> Iterator[tuple[str, float | None]]:
    """Return the places in a file's metadata that give an alpha, each with the number; None if it is no number."""
    for name, text in metadata.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        found = value if isinstance(value, dict) else {name: value}
        for key, number in found.items():
            if ALPHA.fullmatch(key) and number is not None:
                place = name if key == name else f"{key} of {name}"
                yield place, float(number) if is_number(number) else None


def is_number(value: object) -> bool:
    """Return whether the value of a JSON document is a number, or the text of one."""
    if isinstance(value, str):
        return re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)
