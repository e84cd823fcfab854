"""Which number formats each network gets when the user asks for a precision, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ditforge.errors import UserError

if TYPE_CHECKING:
    import torch

FULL = ("fp32", "fp16", "bf16")
EIGHT_BIT = ("fp8", "fp8-weights", "int8-weights")
PRECISIONS = (*FULL, *EIGHT_BIT)
ACTIVATIONS = ("bf16", "fp16", "fp32")
Range = Literal["narrow", "wide"]


@dataclass(frozen=True)
class Precision:
    """What the user asked for: `base` is fp32, fp16 or bf16; `scheme` the 8-bit format of the DiT's linears, if any."""

    base: str
    scheme: str | None = None

    @property
    def name(self) -> str:
        """The name under which users know it."""
        return self.scheme or self.base


def parse_precision(name: str, activations: str = "bf16") -> Precision:
    """The precision called `name`; `activations` is what surrounds 8-bit weights. Raises UserError for another name."""
    if name not in PRECISIONS:
        raise UserError(f"unknown precision {name!r}", f"use one of: {', '.join(PRECISIONS)}")
    if activations not in ACTIVATIONS:
        raise UserError(f"unknown type of activations {activations!r}", f"use one of: {', '.join(ACTIVATIONS)}")
    return Precision(activations, name) if name in EIGHT_BIT else Precision(name)


def network_dtype(precision: Precision, activations: Range) -> tuple[torch.dtype, str]:
    """The dtype of a network whose activations have a `narrow` range (they fit fp16) or a `wide` one, and the reason.

    fp16 ends at 65504: T5's feed-forward layers and the VAE decoder go beyond it and turn into NaN, so they stay in
    fp32 where bf16 is not asked for.
    """
    import torch

    if precision.base == "fp32":
        return torch.float32, "as asked for"
    if precision.base == "bf16":
        return torch.bfloat16, "as asked for"
    if activations == "narrow":
        return torch.float16, "as asked for"
    return torch.float32, "its activations overflow fp16 (beyond 65504), and bf16 was not asked for"


def text_dtype(precision: Precision) -> torch.dtype:
    """The dtype of `prompt_embeds` and `pooled_embeds` between encoders and DiT: fp32 in an fp32 export, else fp16."""
    import torch

    return torch.float32 if precision.base == "fp32" else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """`fp32`, `fp16` or `bf16`."""
    import torch

    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
