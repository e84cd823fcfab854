"""T5's encoder as a network: token ids in, hidden states out.

In fp16 its residual stream and its feed-forward products go beyond 65504 and turn into NaN: transformers clamps the one
and keeps `wo` in float32 (modeling_t5.py). So they are held at a fraction of their size here, which costs nothing: only
norms read the stream, in float32, and there they give it its size back. The fraction is a power of two, so every number
is rounded as it would be at full size.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

from ditforge.export.network import BATCH, Network, Port
from ditforge.export.quantisation.precision import Precision, network_dtype, text_dtype

# The residual stream's size in fp16. It has room for 65504 * 2^8, 1.7e7: in t5-base, 66246 has been seen
# (huggingface/transformers issue 5651), and larger models are said to come to 1e6. At the small end fp16 rounds off
# 2^-25, which is 2^-17 at full size: less than it rounds off any number above 2^-6 anyway, and embeddings are about 1.
STREAM = 2.0**-8
# Two linears in a row write to the stream, and each gets half of that factor. So what lies between them is smaller too,
# with room for 1e6, and weights (about 2^-6 in the largest model, now 2^-10) stay above 2^-14, where fp16 loses digits.
HALF = STREAM**0.5
# All linears; the embeddings, which are looked up, and the table of relative positions are none.
LINEARS = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight")


class HiddenStates(nn.Module):
    """`t5_ids` int32 [B, T] → `prompt_embeds` [B, T, D]. Padding is attended to, as the diffusion pipelines do."""

    def __init__(self, module: T5EncoderModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, t5_ids: Tensor) -> Tensor:
        result: Tensor = self.module(input_ids=t5_ids).last_hidden_state.to(self.dtype)
        return result


def t5_hidden_states(config: dict[str, Any], weights: str, tokens: int, precision: Precision) -> Network:
    """T5 with the configuration `config` (transformers' T5Config), reading `tokens` tokens a prompt."""
    dtype, reason = network_dtype(precision.t5 or precision), "as asked for"
    out = text_dtype(precision)
    settings = T5Config.from_dict(config)
    settings._attn_implementation = "eager"  # under fake tensors, the other one's strides break the exporter
    narrow = dtype == torch.float16
    if narrow:
        reason += f"; its residual stream, which would overflow, is held at 1/{1 / STREAM:.0f} of its size"

    def build() -> HiddenStates:
        module = T5EncoderModel(settings)
        return HiddenStates(with_small_stream(module) if narrow else module, out)

    return Network(
        name="t5",
        build=build,
        inputs={"t5_ids": Port(torch.int32, (BATCH, tokens))},
        outputs={"prompt_embeds": Port(out, (BATCH, tokens, settings.d_model))},
        weights=weights,
        dtype=dtype,
        reason=reason,
        linears=LINEARS,
        factors=small_stream_factors(settings.is_gated_act) if narrow else {},
    )


def small_stream_factors(gated: bool) -> dict[re.Pattern[str], float]:
    """What to multiply weights by, so that the residual stream is STREAM times as large.

    Of a gated feed-forward layer's inputs, `wi_1` is the one that no activation function follows, so a factor passes
    through. Where there is none, `wo` gets all of it.
    """
    feed_forward = {r".*\.DenseReluDense\.(wi_1|wo)": HALF} if gated else {r".*\.DenseReluDense\.wo": STREAM}
    layers = {"shared": STREAM, r".*\.SelfAttention\.(v|o)": HALF, **feed_forward}
    return {re.compile(rf"{layer}\.weight"): factor for layer, factor in layers.items()}


def with_small_stream(module: T5EncoderModel) -> T5EncoderModel:
    """Make every norm of `module` read a residual stream that is STREAM times as large, in float32.

    A smaller epsilon in the norms would do the same, but ONNX's optimiser takes one of 1e-11 for zero and drops it.
    """
    for norm in module.modules():
        if isinstance(norm, T5LayerNorm):
            norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].float() / STREAM,))
    return module
