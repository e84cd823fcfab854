"""The families that can be exported. A new one is a module like `flux` and a line here."""

from __future__ import annotations

from types import ModuleType

from ditforge.errors import UserError
from ditforge.export.checkpoint import Checkpoint


def family_of(checkpoint: Checkpoint) -> ModuleType:
    """The module that knows the networks of this checkpoint. Raises UserError for a pipeline that none knows."""
    from ditforge.export import flux, sd3

    families = {module.PIPELINE: module for module in (flux, sd3)}
    if checkpoint.pipeline not in families:
        raise UserError(
            f"{checkpoint.folder} is a {checkpoint.pipeline or 'model of no named class'}, which cannot be exported",
            f"use a checkpoint of one of: {', '.join(families)}",
        )
    return families[checkpoint.pipeline]
