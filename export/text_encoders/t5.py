"""T5's encoder as a network: token ids in, hidden states out.

In fp16 its residual stream and its feed-forward products exceed 65504 and turn into NaN. For that reason transformers
clamps the stream and keeps `wo` in float32 (modeling_t5.py). Here, both are held at a fraction of their size instead,
which costs nothing: only norms read the stream, and they restore its size in float32. The fraction is a power of two,
so every number is rounded as it would be at full size.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

from ditforge.export.network import BATCH, OF_THE_EXPORT, Network, Port
from ditforge.export.quantisation.precision import Precision, network_dtype, text_dtype
from ditforge.export.region import region

# The fraction at which the residual stream is held in fp16. Values up to 65504 * 2^8 = 1.7e7 then fit. In t5-base,
# 66246 has been seen (huggingface/transformers issue 5651), and larger models are said to reach 1e6. The rounding error
# of the smallest fp16 numbers is 2^-25, which is 2^-17 at full size: less than the rounding error of any number above
# 2^-6, and embeddings are about 1.
STREAM = 2.0**-8
# Two linears in a row lead to the stream, and the weights of each are multiplied by the square root of that factor.
# What lies between them is therefore smaller too, with room for 1e6. The weights (about 2^-6 in the largest model, so
# 2^-10 when scaled) stay above 2^-14, below which fp16 loses digits.
HALF = STREAM**0.5
# All linears. The embeddings, which are looked up, and the table of relative positions are not linears.
LINEARS = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight")
UNREAD = {
    re.compile(r"decoder\..*|lm_head\.weight"): "only T5's encoder is used",
    re.compile(r"logit_scale|spiece_model"): "they are no part of T5's encoder",
}


class HiddenStates(nn.Module):
    """`t5_ids` int32 [B, T] → `prompt_embeds` [B, T, D]. Padding is not masked, as in the diffusion pipelines."""

    def __init__(self, module: T5EncoderModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, t5_ids: Tensor) -> Tensor:
        states, bias = begin(self.module.encoder, t5_ids)
        for block in self.module.encoder.block:
            states = encoder_block(block, states, bias)
        return finish(self, states)


@region
def begin(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings [B, T, D] by a T5Stack, and the bias [1, heads, T, T] of relative positions.

    All blocks share the bias.
    """
    tokens = ids.shape[1]
    return encoder.embed_tokens(ids), encoder.block[0].layer[0].SelfAttention.compute_bias(tokens, tokens)


@region
def encoder_block(block: Any, states: Tensor, bias: Tensor) -> Tensor:
    """Apply a T5Block to the states [B, T, D]."""
    result: Tensor = block(states, position_bias=bias)[0]
    return result


@region
def finish(network: HiddenStates, states: Tensor) -> Tensor:
    """Return the normed states in the dtype of `prompt_embeds`."""
    result: Tensor = network.module.encoder.final_layer_norm(states).to(network.dtype)
    return result


def t5_hidden_states(config: dict[str, Any], weights: str, tokens: int, precision: Precision) -> Network:
    """Describe T5 with the configuration `config` (transformers' T5Config). It reads `tokens` tokens per prompt."""
    dtype, reason = network_dtype(precision.t5 or precision), "chosen for T5 alone" if precision.t5 else OF_THE_EXPORT
    out = text_dtype(precision)
    settings = T5Config.from_dict(config)
    settings._attn_implementation = "eager"  # with fake tensors, the strides of the other one break the exporter
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
        unread=UNREAD,
        factors=small_stream_factors(settings.is_gated_act) if narrow else {},
    )


def small_stream_factors(gated: bool) -> dict[re.Pattern[str], float]:
    """Return the factors of the weights, by pattern of names, that make the residual stream STREAM times as large.

    In a gated feed-forward layer, no activation function follows `wi_1`, so its factor reaches the output. A layer
    without a gate has no such weight, so `wo` gets the whole factor.
    """
    feed_forward = {r".*\.DenseReluDense\.(wi_1|wo)": HALF} if gated else {r".*\.DenseReluDense\.wo": STREAM}
    layers = {"shared": STREAM, r".*\.SelfAttention\.(v|o)": HALF, **feed_forward}
    return {re.compile(rf"{layer}\.weight"): factor for layer, factor in layers.items()}


def with_small_stream(module: T5EncoderModel) -> T5EncoderModel:
    """Make every norm of `module` divide its input by STREAM, in float32, to restore the size of the residual stream.

    A smaller epsilon in the norms would have the same effect, but it would be 1e-11, which ONNX's optimiser takes for
    zero and removes.
    """
    for norm in module.modules():
        if isinstance(norm, T5LayerNorm):
            norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].float() / STREAM,))
    return module
