"""The families that can be exported. A new one is a module like `flux` and a line here."""

from __future__ import annotations

from types import ModuleType

from ditforge.errors import DitforgeError, UserError
from ditforge.export.checkpoint.diffusers_folder import INDEX, Checkpoint, t5_parts
from ditforge.export.network import Network
from ditforge.export.quantisation.precision import Precision
from ditforge.export.text_encoders.tokenizers import Tokenizer
from ditforge.model import Model


def family_of(checkpoint: Checkpoint) -> ModuleType:
    """The module that knows the networks of this checkpoint. Raises UserError for a pipeline that none knows."""
    from ditforge.export.families import flux, sd3

    families = {module.PIPELINE: module for module in (flux, sd3)}
    if checkpoint.pipeline not in families:
        raise UserError(
            f"{checkpoint.folder} is a {checkpoint.pipeline or 'model of no named class'}, which cannot be exported",
            f"use a checkpoint of one of: {', '.join(families)}",
        )
    return families[checkpoint.pipeline]


def read_networks(checkpoint: Checkpoint, precision: Precision) -> tuple[Model, list[Tokenizer], list[Network]]:
    """What a client must know of the checkpoint, its tokenizers and its networks.

    Raises UserError if one of its configurations cannot be used, or if it needs T5 and its index names none.
    """
    family = family_of(checkpoint)
    try:
        model = family.model(checkpoint)
        if model.t5 == "required" and not t5_parts(checkpoint.config("", INDEX)):
            raise UserError(f"{model.name} cannot do without T5", "--text-encoders all")
        return model, family.read_tokenizers(checkpoint), family.networks(checkpoint, precision)
    except DitforgeError:
        raise
    except Exception as error:  # the libraries' configuration classes raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problem = f"a configuration in {checkpoint.folder} cannot be used: {reason}"
        raise UserError(problem, "copy the checkpoint's folder again") from error
