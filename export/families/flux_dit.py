"""The DiT of FLUX.1: diffusers' modules, called in a way that makes a small graph.

A rotation, an RMS norm and an attention each become one ONNX operator (opset 23). Made of simpler operators, a rotation
alone would copy its input ten times. The single blocks keep text and image in one tensor, while diffusers separates and
joins them in each block. Source: black-forest-labs/flux (model.py, layers.py, math.py) and diffusers'
transformer_flux.py.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.onnx.ops import rotary_embedding

from ditforge.export.dit_blocks import added_inputs, attention, attention_inputs, joined, modulated, modulation
from ditforge.export.region import region

PATCH = 2  # a token is a patch of 2 by 2 latents
EMBEDDING_SCALE = 1000  # timestep and guidance are multiplied by this before they are embedded


class FluxVelocity(nn.Module):
    """The contract's `dit`: latents [B, C, h, w], timestep [B], … → velocity float32 [B, C, h, w].

    Raises ValueError if the rotary channels of all axes do not add up to the channels of a head.
    """

    def __init__(self, module: FluxTransformer2DModel) -> None:
        super().__init__()
        rotated, head = module.pos_embed.axes_dim, module.config.attention_head_dim
        if sum(rotated) != head:  # the operator would accept fewer, and not rotate the other channels
            raise ValueError(f"axes_dims_rope {list(rotated)} add up to {sum(rotated)}, attention_head_dim is {head}")
        self.module = module

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled_embeds: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        module = self.module
        text, image, signal, cos, sin = begin(module, latents, timestep, prompt_embeds, pooled_embeds, guidance)
        for block in module.transformer_blocks:
            text, image = double_block(block, text, image, signal, cos, sin)
        stream = join(None, text, image)
        for block in module.single_transformer_blocks:
            stream = single_block(block, stream, signal, cos, sin)
        return finish(module, stream, signal, latents)


@region
def begin(
    module: FluxTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    pooled_embeds: Tensor,
    guidance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what all blocks read: text and image [B, tokens, D], the signal [B, D], and the rotary tables."""
    dtype = module.dtype
    batch, channels, height, width = latents.shape
    rows, columns = height // PATCH, width // PATCH
    patches = latents.reshape(batch, channels, rows, PATCH, columns, PATCH)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * PATCH * PATCH)
    image, text = module.x_embedder(patches.to(dtype)), module.context_embedder(prompt_embeds.to(dtype))
    conditions = [EMBEDDING_SCALE * number.to(dtype) for number in (timestep, guidance) if number is not None]
    signal = silu(module.time_text_embed(*conditions, pooled_embeds.to(dtype)))
    ids, embed = positions(text.shape[1], rows, columns), module.pos_embed
    cos, sin = rotary_tables(ids, embed.theta, embed.axes_dim)
    return text, image, signal, cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)


@region
def join(module: None, text: Tensor, image: Tensor) -> Tensor:
    """Return the stream [B, tokens, D] of the single blocks: the tokens of the text, and then those of the image."""
    return torch.cat((text, image), dim=1)


@region
def finish(module: FluxTransformer2DModel, stream: Tensor, signal: Tensor, latents: Tensor) -> Tensor:
    """Return the velocity, float32 and in the shape of the latents, from the image's tokens of the stream."""
    batch, channels, height, width = latents.shape
    rows, columns = height // PATCH, width // PATCH
    image = stream[:, stream.shape[1] - rows * columns :]
    scale, shift = modulation(module.norm_out.linear, signal, 2)
    velocity = module.proj_out(modulated(image, shift, scale)).float()
    patches = velocity.reshape(batch, rows, columns, channels, PATCH, PATCH)
    result: Tensor = patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
    return result


@region
def double_block(
    block: FluxTransformerBlock, text: Tensor, image: Tensor, signal: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a double block, and return text and image [B, tokens, D].

    Each has weights of its own, but one attention is over the tokens of both.
    """
    shift, scale, gate, *image_mlp = modulation(block.norm1.linear, signal, 6)
    text_shift, text_scale, text_gate, *text_mlp = modulation(block.norm1_context.linear, signal, 6)
    attn = block.attn
    text_normed, normed = modulated(text, text_shift, text_scale), modulated(image, shift, scale)
    of_text, of_image = added_inputs(text_normed, attn), attention_inputs(normed, attn)
    inputs = joined(of_text, of_image)
    attended = attention(inputs, partial(rotated, cos=cos, sin=sin))
    tokens = text.shape[1]
    image = image + gate * attn.to_out[0](attended[:, tokens:])
    text = text + text_gate * attn.to_add_out(attended[:, :tokens])
    shift, scale, gate = image_mlp
    image = image + gate * block.ff(modulated(image, shift, scale))
    shift, scale, gate = text_mlp
    text = text + gate * block.ff_context(modulated(text, shift, scale))
    return clamped(text), image


@region
def single_block(block: FluxSingleTransformerBlock, stream: Tensor, signal: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a single block to the stream [B, tokens, D], which has the tokens of the text and then of the image.

    Attention and MLP are computed in parallel, from the same input.
    """
    shift, scale, gate = modulation(block.norm.linear, signal, 3)
    normed = modulated(stream, shift, scale)
    attended = attention(attention_inputs(normed, block.attn), partial(rotated, cos=cos, sin=sin))
    both = torch.cat((attended, block.act_mlp(block.proj_mlp(normed))), dim=2)
    return clamped(stream + gate * block.proj_out(both))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of x [B, heads, tokens, head_dim], in float32 (Su et al. 2021, arXiv:2104.09864).

    Cosine and sine are float32 [B, tokens, head_dim / 2], one for each token and pair of channels.
    """
    return rotary_embedding(x.float(), cos, sin, interleaved=True).to(x.dtype)


def rotary_tables(ids: Tensor, theta: float, axes_dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float32 [tokens, head_dim / 2], for position ids [tokens, axes].

    diffusers computes them in float64, which TensorRT lacks. Here, the frequencies are computed in double precision
    while the graph is traced. The graph multiplies them by the positions in float32.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = torch.tensor([theta ** (-i / dim) for i in range(0, dim, 2)], dtype=torch.float32)
        angles.append(ids[:, axis, None] * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()


def positions(tokens: int, rows: int, columns: int) -> Tensor:
    """Return position ids, float32 [tokens + rows * columns, 3]: zeros for the text, then (0, row, column)."""
    row = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, columns)
    column = torch.arange(columns, dtype=torch.float32)[None, :].expand(rows, columns)
    image = torch.stack((torch.zeros(rows, columns), row, column), dim=-1).reshape(rows * columns, 3)
    return torch.cat((torch.zeros(tokens, 3), image))


def clamped(x: Tensor) -> Tensor:
    """Clamp a residual stream to the range of fp16, if that is its dtype. diffusers does so in the same places."""
    limit = torch.finfo(torch.float16).max
    return x.clip(-limit, limit) if x.dtype == torch.float16 else x
