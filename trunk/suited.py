"""In which precision a checkpoint is exported where the user names none: what suits the GPU it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ditforge.contract import DIT
from ditforge.engines import gpus
from ditforge.engines.gpus import Target
from ditforge.option import setting

if TYPE_CHECKING:
    from ditforge.export.onnx_export import ExportOptions


@dataclass(frozen=True)
class For:
    """What an export is for: a GPU, as ditforge.engines.gpus.find_target takes it; None: nobody said."""

    gpu: str | None = None


def suited(options: ExportOptions, target: Target | None) -> tuple[ExportOptions, str]:
    """The options with the precision and activations that suit `target`, and the reason for the precision.

    Only what the options leave open (None) is chosen. A calibration is for fp8. Without a target, the precision stays
    open, which is fp32, unless there is a calibration. Raises UserError for a precision that the target lacks.
    """
    from ditforge.export.quantisation.precision import EIGHT_BIT

    precision, activations, reason = options.precision, options.activations, "as asked for"
    if precision is None and options.calibration:
        precision, reason = "fp8", "a calibration is given"
    elif precision is None and target:
        precision, reason = gpus.default_precision(target)
    elif precision is None:
        reason = f"for the CPU; for a GPU, say {setting('gpu', 'GPU')} here (ditforge gpus lists them)"
    if target:
        activations = activations or gpus.default_activations(target)
        if target.capabilities and precision:
            gpus.check_precision(DIT, precision, activations if precision in EIGHT_BIT else precision, target)
    return replace(options, precision=precision, activations=activations), reason
