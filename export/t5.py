"""T5's encoder as a network: token ids in, hidden states out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from ditforge.export.network import BATCH, Network, Port
from ditforge.export.precision import Precision, network_dtype, text_dtype


class HiddenStates(nn.Module):
    """`t5_ids` int32 [B, T] → `prompt_embeds` [B, T, D]. Padding is attended to, as the diffusion pipelines do."""

    def __init__(self, module: T5EncoderModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, t5_ids: Tensor) -> Tensor:
        return self.module(input_ids=t5_ids).last_hidden_state.to(self.dtype)


def t5_hidden_states(config: dict[str, Any], weights: str, tokens: int, precision: Precision) -> Network:
    """T5 with the configuration `config` (transformers' T5Config), reading `tokens` tokens a prompt."""
    dtype, reason = network_dtype(precision, "wide")
    out = text_dtype(precision)
    settings = T5Config.from_dict(config)
    settings._attn_implementation = "eager"  # under fake tensors, the other one's strides break the exporter
    return Network(
        name="t5",
        build=lambda: HiddenStates(T5EncoderModel(settings), out),
        inputs={"t5_ids": Port(torch.int32, (BATCH, tokens))},
        outputs={"prompt_embeds": Port(out, (BATCH, tokens, settings.d_model))},
        weights=weights,
        dtype=dtype,
        reason=reason,
    )
