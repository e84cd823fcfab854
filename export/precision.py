"""Which number format each network gets when the user asks for a precision, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "bf16")
Range = Literal["narrow", "wide"]


def network_dtype(precision: str, activations: Range) -> tuple[torch.dtype, str]:
    """The dtype of a network whose activations have a `narrow` range (they fit fp16) or a `wide` one, and the reason.

    fp16 ends at 65504: T5's feed-forward layers and the VAE decoder go beyond it and turn into NaN, so they stay in
    fp32 where bf16 is not asked for.
    """
    import torch

    if precision == "fp32":
        return torch.float32, "as asked for"
    if precision == "bf16":
        return torch.bfloat16, "as asked for"
    if activations == "narrow":
        return torch.float16, "as asked for"
    return torch.float32, "its activations overflow fp16 (beyond 65504), and bf16 was not asked for"


def text_dtype(precision: str) -> torch.dtype:
    """The dtype of `prompt_embeds` and `pooled_embeds` between encoders and DiT: fp32 in an fp32 export, else fp16."""
    import torch

    return torch.float32 if precision == "fp32" else torch.float16


def precision_name(dtype: torch.dtype) -> str:
    """`fp32`, `fp16` or `bf16`."""
    import torch

    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
