"""CLIP's text encoder as a network: token ids in, the pooled embedding out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ditforge.export.network import BATCH, Network, Port
from ditforge.export.precision import Precision, network_dtype, text_dtype


class PooledText(nn.Module):
    """`clip_ids` int32 [B, T] → `pooled_embeds` [B, P]: the last layer's state at the end-of-text token."""

    def __init__(self, module: CLIPTextModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, clip_ids: Tensor) -> Tensor:
        positions = torch.arange(clip_ids.shape[1])[None]  # the module's own are a buffer, which the checkpoint lacks
        return self.module(input_ids=clip_ids, position_ids=positions).pooler_output.to(self.dtype)


def clip_pooled(config: dict[str, Any], weights: str, tokens: int, precision: Precision) -> Network:
    """CLIP with the configuration `config` (transformers' CLIPTextConfig), reading `tokens` tokens a prompt."""
    dtype, reason = network_dtype(precision, "narrow")
    out = text_dtype(precision)
    settings = CLIPTextConfig.from_dict(config)
    return Network(
        name="clip",
        build=lambda: PooledText(CLIPTextModel(settings), out),
        inputs={"clip_ids": Port(torch.int32, (BATCH, tokens))},
        outputs={"pooled_embeds": Port(out, (BATCH, settings.hidden_size))},
        weights=weights,
        dtype=dtype,
        reason=reason,
        key_prefixes=("text_model.",),  # transformers 4 wrote them, transformers 5 does not
    )
