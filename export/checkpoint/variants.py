"""Which of its family's models a checkpoint is: from its configurations and shapes, and from what its files say.

Where they leave it open, the user is asked by an error. The name of a folder or of a file on the disk decides nothing,
because people choose it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from ditforge.errors import UserError
from ditforge.option import option, setting

if TYPE_CHECKING:
    from ditforge.export.checkpoint.diffusers_folder import Checkpoint
    from ditforge.export.checkpoint.load_report import LoadReport

Config = Mapping[str, Any]
# The metadata of a safetensors file that name the model (https://github.com/Stability-AI/ModelSpec).
NAMING = ("modelspec.architecture", "modelspec.title")
NAME_OR_PATH = "_name_or_path"


@dataclass(frozen=True)
class Variant:
    """A model of a family, with what its authors recommend for it and for the models that are made from it.

    name: what `--variant` takes. Two variants may share a name if the DiT's configuration tells them apart.
    title: how messages call it.
    configs: the published model with whose configurations a single file is completed; a key of Family.published.
    guidance: what Model.guidance is.
    steps, scale: the default number of steps and the default guidance.
    text_length: the tokens of T5's input.
    fits: takes the DiT's configuration, and returns whether a DiT like this can be of the variant.
    named: a pattern that is found in the names of such models, in lower case.
    scheduled: takes the scheduler's configuration, and returns whether it is that of the variant; None if the scheduler
        does not tell.
    """

    name: str
    title: str
    configs: str
    guidance: Literal["embedded", "classifier-free", "none"]
    steps: int
    scale: float
    text_length: int
    fits: Callable[[Config], bool]
    named: re.Pattern[str]
    scheduled: Callable[[Config], bool] | None = None


@dataclass(frozen=True)
class Evidence:
    """What is known of a model whose variant is looked for.

    where: its folder or file, for messages.
    config: the DiT's configuration.
    stated: the variant that the folder's ditforge.json gives.
    names: the places in the files that name the model, and the names, the strongest first. A place may have several.
    scheduler: the configuration of its own scheduler.
    base: the variant of the folder that completes a single file.
    """

    where: object
    config: Config
    stated: str | None = None
    names: Sequence[tuple[str, str]] = ()
    scheduler: Config | None = None
    base: Variant | None = None


def variant_of(checkpoint: Checkpoint, variants: Sequence[Variant], config: Config) -> Variant:
    """Return the checkpoint's variant, which has a DiT with the configuration `config`.

    The steps, the guidance and the text length that the user or the folder's ditforge.json gives are in place of the
    variant's. Raises UserError if the files leave the variant open.
    """
    settings = checkpoint.settings
    chosen = checkpoint.chosen or choose(variants, evidence_of(checkpoint, config), checkpoint.report)
    return replace(
        chosen,
        steps=chosen.steps if settings.steps is None else settings.steps,
        scale=chosen.scale if settings.guidance is None else settings.guidance,
        text_length=checkpoint.text_length or settings.text_length or chosen.text_length,
    )


def evidence_of(checkpoint: Checkpoint, config: Config, scheduled: bool = True) -> Evidence:
    """Return what a diffusers folder says of its model; if `scheduled` is false, without its scheduler."""
    names = [("the repository on the Hub", checkpoint.repository)]
    for component, file in (("", "model_index.json"), ("transformer", "config.json")):
        path = f"{component}/{file}".lstrip("/")
        names.append((f"{NAME_OR_PATH} in {path}", str(checkpoint.config(component, file).get(NAME_OR_PATH) or "")))
    scheduler = checkpoint.config("scheduler", "scheduler_config.json") if scheduled else None
    return Evidence(checkpoint.folder, config, checkpoint.settings.variant, names, scheduler)


def names_in(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the names that the metadata of a safetensors file give to its model."""
    return [("the file's metadata", metadata[key]) for key in NAMING if key in metadata]


def choose(variants: Iterable[Variant], seen: Evidence, report: LoadReport) -> Variant:
    """Return the variant that the user asked for, or else the one that the evidence shows.

    Raises UserError if it shows none or several, or if the DiT cannot be of the variant that was asked for.
    """
    variants = list(variants)
    fitting = [variant for variant in variants if variant.fits(seen.config)]
    asked = report.choose(dict.fromkeys(variant.name for variant in variants))
    if name := asked or seen.stated:
        found = [variant for variant in fitting if variant.name == name]
        if not found:
            possible = dict.fromkeys(setting("variant", variant.name) for variant in fitting)
            by = "" if asked else ", which its ditforge.json says"
            problem = f"the shapes of the DiT in {seen.where} are not those of the variant {name!r}{by}"
            raise UserError(problem, f"{' or '.join(map(str, possible))}, or leave out {option('variant')}")
        return found[0]
    if len(fitting) == 1:
        return fitting[0]
    shown = pointers(fitting, seen)
    left = [variant for variant in fitting if all(variant in those for _, those in shown)]
    if shown and len(left) == 1:
        reason = " and ".join(place for place, _ in shown)
        report.add(f"the variant of {seen.where}", f"it is taken for {left[0].title}, as {reason} says", expected=True)
        return left[0]
    said = "; ".join(f"{place} points to {titles(those)}" for place, those in shown) or "nothing in its files says"
    choices = " or ".join(f"{setting('variant', variant.name)} for {variant.title}" for variant in fitting)
    raise UserError(f"{seen.where} can be {titles(fitting)}: {said}", choices)


def pointers(fitting: list[Variant], seen: Evidence) -> list[tuple[str, list[Variant]]]:
    """Return what points to some of the fitting variants and not to others, and to which."""
    found: list[tuple[str, list[Variant]]] = []
    for place, names in groupby(seen.names, key=lambda name: name[0]):
        texts = [text.lower() for _, text in names]
        those = [variant for variant in fitting if any(variant.named.search(text) for text in texts)]
        if those:
            # Weaker names are not asked: those in configurations may be of the model that this one was made from.
            found += [(place, [variant]) for variant in those]
            break
    if seen.scheduler is not None:
        scheduler = seen.scheduler
        those = [variant for variant in fitting if variant.scheduled and variant.scheduled(scheduler)]
        found += [("its scheduler", those)] if those else []
    if seen.base in fitting:
        found.append(("the base", [seen.base]))
    return found


def titles(variants: Iterable[Variant]) -> str:
    """Return the titles of the variants, as text."""
    return " or ".join(variant.title for variant in variants)
