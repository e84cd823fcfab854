"""The precisions that a user can ask for, and the number formats that each network then gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ditforge.errors import UserError
from ditforge.option import option

if TYPE_CHECKING:
    import torch

FULL = ("fp32", "fp16", "bf16")
EIGHT_BIT = ("fp8", "fp8-weights", "int8-weights")
PRECISIONS = (*FULL, *EIGHT_BIT)
ACTIVATIONS = ("bf16", "fp16", "fp32")
T5_PRECISIONS = (*FULL, "fp8-weights", "int8-weights")  # without fp8, because only the DiT is calibrated


@dataclass(frozen=True)
class Precision:
    """A precision as the user asked for it.

    base: fp32, fp16 or bf16.
    scheme: the 8-bit format of the DiT's linears; None if they are not quantised.
    t5: the precision of T5, if it has its own; None if it has `base`. Its `scheme` is the format of T5's linears.
    """

    base: str
    scheme: str | None = None
    t5: Precision | None = None

    @property
    def name(self) -> str:
        """The precision's name on the command line."""
        return self.scheme or self.base


FP32 = Precision("fp32")


def parse_precision(name: str, activations: str = "bf16") -> Precision:
    """Return the precision called `name`. `activations` is the precision of everything but the 8-bit weights.

    Raises UserError for an unknown name.
    """
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}", f"use one of: {', '.join(PRECISIONS)}")
    if activations not in ACTIVATIONS:
        raise UserError(f"unknown type of activations {activations!r}", f"use one of: {', '.join(ACTIVATIONS)}")
    return Precision(activations, name) if name in EIGHT_BIT else Precision(name)


def with_t5(precision: Precision, name: str | None) -> Precision:
    """Return the precision with T5 in the precision called `name`; unchanged if `name` is None.

    Raises UserError for an unknown name.
    """
    if name is None:
        return precision
    if name not in T5_PRECISIONS:
        raise UserError(
            f"T5 cannot be exported in {name!r}", f"{option('t5_precision')} with one of: {', '.join(T5_PRECISIONS)}"
        )
    return replace(precision, t5=parse_precision(name, precision.base))


def network_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of a network's weights and computations, except those in 8 bits."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision.base]


def text_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of `prompt_embeds` and `pooled_embeds`: fp32 in an fp32 export, else fp16."""
    import torch

    return torch.float32 if precision.base == "fp32" else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name: `fp32`, `fp16` or `bf16`."""
    import torch

    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
