"""The DiT of Stable Diffusion 3.5: diffusers' modules, called in a way that makes a small graph.

The graph includes cutting latents into patches, and the table of their positions. Source: Esser et al. 2024
(arXiv:2403.03206), Stability-AI/sd3.5 (mmditx.py) and diffusers' SD3Transformer2DModel.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import silu

from ditforge.export.dit_blocks import added_inputs, attention, attention_inputs, joined, modulated, modulation
from ditforge.export.region import region

TIMESTEPS = 1000  # the module takes timesteps from 0 to 1000, the contract's are from 0 to 1


class PositionTable(nn.Module):
    """Embed patches, and add their positions from the middle of the checkpoint's table [1, M * M, D].

    Latents [B, C, h, w] become tokens [B, tokens, D]. This replaces diffusers' PatchEmbed, which slices the table at
    positions that depend on the input's size; tracing that would limit the sizes.
    """

    def __init__(self, proj: nn.Conv2d, table: Tensor, size: int) -> None:
        super().__init__()
        self.proj = proj
        # diffusers has a buffer here. In this package, all weights of a checkpoint are parameters.
        self.pos_embed = nn.Parameter(table.to(proj.weight.dtype), requires_grad=False)
        self.size = size

    def forward(self, latents: Tensor) -> Tensor:
        patches = self.proj(latents)
        rows, columns = patches.shape[2:]
        row = torch.arange(rows) + (self.size - rows) // 2
        column = torch.arange(columns) + (self.size - columns) // 2
        places = (row[:, None] * self.size + column[None, :]).reshape(-1)
        result: Tensor = patches.flatten(2).transpose(1, 2) + self.pos_embed[0].index_select(0, places)[None]
        return result


class StableDiffusion3Velocity(nn.Module):
    """The contract's `dit`: latents [B, C, h, w], timestep [B], … → velocity float32 [B, C, h, w].

    skip_layers [B, blocks] is 1 where a block must be skipped for a sample: the block's gates are then 0, so it adds
    nothing. The `forward` of diffusers' module can skip blocks only for a whole batch.
    """

    def __init__(self, module: SD3Transformer2DModel) -> None:
        super().__init__()
        patches = module.pos_embed
        module.pos_embed = PositionTable(patches.proj, patches.pos_embed, patches.pos_embed_max_size)
        self.module = module

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled_embeds: Tensor,
        skip_layers: Tensor | None = None,
    ) -> Tensor:
        module = self.module
        text, image, signal, *opened = begin(module, latents, timestep, prompt_embeds, pooled_embeds, skip_layers)
        for index, block in enumerate(module.transformer_blocks):
            text, image = joint_block(block, text, image, signal, opened[index] if opened else None)
        return finish(module, image, signal, latents)


@region
def begin(
    module: SD3Transformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    pooled_embeds: Tensor,
    skip_layers: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return what all blocks read: text and image [B, tokens, D], the signal [B, D], and the gate of each block.

    A block's gate [B, 1, 1] is 0 where it is skipped for a sample, else 1. There are none without `skip_layers`.
    """
    dtype = module.dtype
    image = module.pos_embed(latents.to(dtype))
    text = module.context_embedder(prompt_embeds.to(dtype))
    signal = silu(module.time_text_embed(timestep * TIMESTEPS, pooled_embeds.to(dtype)))
    opened = () if skip_layers is None else (skip_layers < 0.5).to(dtype)[:, :, None, None].unbind(1)
    return text, image, signal, *opened


@region
def finish(module: SD3Transformer2DModel, image: Tensor, signal: Tensor, latents: Tensor) -> Tensor:
    """Return the velocity, float32 and in the shape of the latents, from the image's tokens."""
    scale, shift = modulation(module.norm_out.linear, signal, 2)
    patches = module.proj_out(modulated(image, shift, scale)).float()
    patch, channels = module.config.patch_size, module.out_channels
    batch, rows, columns = latents.shape[0], latents.shape[2] // patch, latents.shape[3] // patch
    patches = patches.reshape(batch, rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    result: Tensor = patches.reshape(batch, channels, rows * patch, columns * patch)
    return result


@region
def joint_block(
    block: JointTransformerBlock, text: Tensor, image: Tensor, signal: Tensor, opened: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Apply a block, and return text and image [B, tokens, D].

    Each has weights of its own, but one attention is over the tokens of both. The last block returns the text
    unchanged. Where `opened` [B, 1, 1] is 0, the block adds nothing to the sample.
    """
    of_image = modulation(block.norm1.linear, signal, 9 if block.use_dual_attention else 6, opened)
    if block.context_pre_only:
        of_text = modulation(block.norm1_context.linear, signal, 2)[::-1]  # this module gives the scale first
    else:
        of_text = modulation(block.norm1_context.linear, signal, 6, opened)
    text, image = with_attention(block, text, image, of_text, of_image)
    image = with_mlp(image, block.ff, *of_image[3:6])
    if not block.context_pre_only:
        text = with_mlp(text, block.ff_context, *of_text[3:6])
    return text, image


def with_attention(
    block: JointTransformerBlock, text: Tensor, image: Tensor, of_text: tuple[Tensor, ...], of_image: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Add the attention to text and image [B, tokens, D]. Some blocks have a second attention for the image alone."""
    attn, tokens = block.attn, image.shape[1]
    normed, text_normed = modulated(image, *of_image[:2]), modulated(text, *of_text[:2])
    attended = attention(joined(attention_inputs(normed, attn), added_inputs(text_normed, attn)))
    after = image + of_image[2] * attn.to_out[0](attended[:, :tokens])
    if block.use_dual_attention:
        shift, scale, gate = of_image[6:]
        second = attention_inputs(modulated(image, shift, scale), block.attn2)
        after = after + gate * block.attn2.to_out[0](attention(second))
    if not block.context_pre_only:
        text = text + of_text[2] * attn.to_add_out(attended[:, tokens:])
    return text, after


def with_mlp(x: Tensor, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """Add the modulated MLP to the stream x [B, tokens, D]."""
    result: Tensor = x + gate * mlp(modulated(x, shift, scale))
    return result
