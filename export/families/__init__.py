"""The interface between families of models and the rest of the export, and the families that are installed.

A family is one file, here or in another package, that ends with an object of the class Family. Its DiT and its layout
may be in files of their own. An entry point of the group `ditforge.families` names the object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge import entry_points
from ditforge.errors import DitforgeError, UserError
from ditforge.export.checkpoint.diffusers_folder import INDEX, Checkpoint, t5_parts, unknown_pipeline
from ditforge.export.checkpoint.variants import Variant
from ditforge.export.network import Network
from ditforge.export.quantisation.precision import Precision
from ditforge.export.text_encoders.tokenizers import Tokenizer
from ditforge.model import Model
from ditforge.option import option, setting

if TYPE_CHECKING:
    from ditforge.export.checkpoint.layout import Layout


@dataclass(frozen=True)
class Family:
    """A family of models. It contains everything that differs from one family to another.

    name: its name, which is that of the entry point.
    title: the name that people use for its models.
    pipeline: the class that its model_index.json names, for example FluxPipeline.
    model: returns what a client must know of a checkpoint: sizes, steps, guidance, noise levels.
    read_tokenizers: returns a checkpoint's tokenizers.
    networks: returns the networks that become ONNX graphs, in the order in which data flows.
    read_config: returns the DiT's configuration. A calibration fits all models with the same configuration.
    linears: a pattern of the names of the DiT's weights that may be quantised to 8 bits.
    load_pipeline: loads diffusers' pipeline of the family, which calibration runs.
    run_pipeline: takes the loaded pipeline, the model, a prompt, the number of steps and a seed, and runs all steps of
        a picture without decoding it.
    layout: how the authors write the DiT into one file, and the names in LoRA files. If it is None, only diffusers
        folders can be read.
    published: for each published model, by name, a folder with its configurations, without weights.
    variants: its models, with what is recommended for each; () if there is only one. See variants.py.
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
    variants: tuple[Variant, ...] = ()


def families() -> list[Family]:
    """Return all installed families. Raises UserError for an entry point that does not name a Family."""
    return entry_points.load_all(entry_points.FAMILIES, Family)


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family of the checkpoint. Raises UserError if no family has the checkpoint's pipeline."""
    known = {family.pipeline: family for family in families()}
    if checkpoint.pipeline not in known:
        raise unknown_pipeline(checkpoint.folder, checkpoint.pipeline, known)
    return known[checkpoint.pipeline]


def published_models() -> dict[str, Path]:
    """Return the folders with the configurations of the published models of all families, by the model's name."""
    return {name: folder for family in families() for name, folder in family.published.items()}


def find_published(name: str) -> Path | None:
    """Return the folder with the configurations of a published model; None if there is no such model.

    `name` is the model's name in upper or lower case, or its repository: `FLUX.1-dev`, `flux.1-dev` and
    `black-forest-labs/FLUX.1-dev` are the same model.
    """
    return published_models().get(name.rpartition("/")[2].lower().replace("stable-diffusion-", "sd"))


def read_networks(checkpoint: Checkpoint, precision: Precision) -> tuple[Model, list[Tokenizer], list[Network]]:
    """Return what a client must know of the checkpoint, its tokenizers, and its networks.

    Raises UserError if a configuration cannot be used, or if the model needs T5 and the checkpoint's index names none.
    """
    family = family_of(checkpoint)
    try:
        model = family.model(checkpoint)
        if checkpoint.text_length is not None and (model.t5 == "absent" or not family.variants):
            raise UserError(f"{model.name} is exported without T5", f"leave out {option('text_length')}")
        if model.t5 == "required" and not t5_parts(checkpoint.config("", INDEX)):
            raise UserError(f"{model.name} cannot do without T5", setting("text_encoders", "all"))
        return model, family.read_tokenizers(checkpoint), family.networks(checkpoint, precision)
    except DitforgeError:
        raise
    except Exception as error:  # the libraries' configuration classes raise many types of errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problem = f"a configuration in {checkpoint.folder} cannot be used: {reason}"
        raise UserError(problem, "copy the checkpoint's folder again") from error
