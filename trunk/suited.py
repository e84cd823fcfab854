"""Chooses the precision of an export if the user names none: the one that suits the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ditforge.contract import DIT
from ditforge.engines import gpus
from ditforge.engines.gpus import Target
from ditforge.option import setting

if TYPE_CHECKING:
    from ditforge.export.onnx_export import ExportOptions


def suited(options: ExportOptions, target: Target | None) -> tuple[ExportOptions, str]:
    """Choose the precision and the activations that suit `target`. Returns the options, and the precision's reason.

    Only options that are None are chosen, and activations only beside 8-bit weights. If there is a calibration, the
    precision is fp8. Otherwise, without a target, the precision stays None, which means fp32. Raises UserError for a
    precision that the target lacks.
    """
    from ditforge.export.quantisation.precision import EIGHT_BIT

    precision, activations, reason = options.precision, options.activations, "as asked for"
    if precision is None and options.calibration:
        precision, reason = "fp8", "a calibration is given"
    elif precision is None and target:
        precision, reason = gpus.default_precision(target)
    elif precision is None:
        reason = f"for the CPU; for a GPU, say {setting('gpu', 'GPU')} here (ditforge gpus lists them)"
    if target and precision in EIGHT_BIT and activations is None:
        activations = gpus.default_activations(target)
    if target and precision:
        checked_around(precision, activations, target)
    return replace(options, precision=precision, activations=activations), reason


def checked_around(precision: str, activations: str | None, target: Target) -> str:
    """The dtype of the layers around the quantised ones: `activations` beside 8-bit weights, or else the precision.

    Raises UserError if a GPU of the target cannot compute the DiT so.
    """
    from ditforge.export.quantisation.precision import EIGHT_BIT

    around = activations if activations and precision in EIGHT_BIT else precision
    gpus.check_precision(DIT, precision, around, target)
    return around
