"""What a family of models is to the rest of the export, and which families there are.

A family is one file here, or in a package of somebody else's, that ends with an object of the class Family; its DiT and
its layout may have files of their own beside it. An entry point of the group `ditforge.families` names the object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge import entry_points
from ditforge.errors import DitforgeError, UserError
from ditforge.export.checkpoint.diffusers_folder import INDEX, Checkpoint, t5_parts
from ditforge.export.network import Network
from ditforge.export.quantisation.precision import Precision
from ditforge.export.text_encoders.tokenizers import Tokenizer
from ditforge.model import Model
from ditforge.option import setting

if TYPE_CHECKING:
    from ditforge.export.checkpoint.layouts import Layout


@dataclass(frozen=True)
class Family:
    """A family of models: all that differs from one to another is in here.

    name: as the entry point has it.
    title: how people call its models.
    pipeline: the class that its model_index.json names, e.g. FluxPipeline.
    model: what a client must know of a checkpoint: sizes, steps, guidance, noise levels.
    read_tokenizers: its tokenizers.
    networks: what becomes ONNX graphs, in the order in which data flows.
    read_config: the DiT's configuration, by which calibrations know the model.
    linears: the names of the DiT's weights that may bear 8 bits.
    load_pipeline, run_pipeline: the family's own pipeline, which calibration runs. The latter takes the loaded one, the
        model, a prompt, the number of steps and a seed, and makes all steps of a picture without decoding it.
    layout: how its authors write the DiT into one file, and the names in LoRA files; None: only folders are read.
    published: folders of the configurations of published models, without weights, by name.
    """

    name: str
    title: str
    pipeline: str
    model: Callable[[Checkpoint], Model]
    read_tokenizers: Callable[[Checkpoint], list[Tokenizer]]
    networks: Callable[[Checkpoint, Precision], list[Network]]
    read_config: Callable[[Checkpoint], dict[str, Any]]
    linears: re.Pattern[str]
    load_pipeline: Callable[[Checkpoint], Any]
    run_pipeline: Callable[[Any, Model, str, int, int], None]
    layout: Layout | None = None
    published: Mapping[str, Path] = field(default_factory=dict)


def families() -> list[Family]:
    """All families that are installed."""
    found = []
    for name in entry_points.installed(entry_points.FAMILIES):
        family = entry_points.load(entry_points.FAMILIES, name)
        if not isinstance(family, Family):
            raise UserError(f"what is installed as the family {name!r} is a {type(family).__name__}", "uninstall it")
        found.append(family)
    return found


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of this checkpoint. Raises UserError for a pipeline that none knows."""
    known = {family.pipeline: family for family in families()}
    if checkpoint.pipeline not in known:
        raise UserError(
            f"{checkpoint.folder} is a {checkpoint.pipeline or 'model of no named class'}, which cannot be exported",
            f"use a checkpoint of one of: {', '.join(known)}",
        )
    return known[checkpoint.pipeline]


def published_models() -> dict[str, Path]:
    """The folders of published models' configurations, of all families, by name."""
    return {name: folder for family in families() for name, folder in family.published.items()}


def find_published(name: str) -> Path | None:
    """The configurations of the published model of that name, in any case, or of its repository; None if none has it.

    `FLUX.1-dev`, `flux.1-dev` and `black-forest-labs/FLUX.1-dev` are the same.
    """
    return published_models().get(name.rpartition("/")[2].lower().replace("stable-diffusion-", "sd"))


def read_networks(checkpoint: Checkpoint, precision: Precision) -> tuple[Model, list[Tokenizer], list[Network]]:
    """What a client must know of the checkpoint, its tokenizers and its networks.

    Raises UserError if one of its configurations cannot be used, or if it needs T5 and its index names none.
    """
    family = family_of(checkpoint)
    try:
        model = family.model(checkpoint)
        if model.t5 == "required" and not t5_parts(checkpoint.config("", INDEX)):
            raise UserError(f"{model.name} cannot do without T5", setting("text_encoders", "all"))
        return model, family.read_tokenizers(checkpoint), family.networks(checkpoint, precision)
    except DitforgeError:
        raise
    except Exception as error:  # the libraries' configuration classes raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problem = f"a configuration in {checkpoint.folder} cannot be used: {reason}"
        raise UserError(problem, "copy the checkpoint's folder again") from error
