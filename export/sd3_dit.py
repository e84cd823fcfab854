"""The DiT of Stable Diffusion 3.5: diffusers' modules, called in a way that makes a small graph.

Patches and the table of their positions are in the graph. Source: Esser et al. 2024 (arXiv:2403.03206),
Stability-AI/sd3.5 (mmditx.py) and diffusers' SD3Transformer2DModel.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import silu

from ditforge.export.blocks import added_inputs, attention, attention_inputs, joined, modulated, modulation

TIMESTEPS = 1000  # the module counts noise levels from 0 to 1000


class PositionTable(nn.Module):
    """Patches and their positions: the checkpoint's table [1, M * M, D], of which the middle is taken.

    Takes the place of diffusers' PatchEmbed, which slices the table at symbolic places: tracing would limit the sizes.
    """

    def __init__(self, proj: nn.Conv2d, table: Tensor, size: int) -> None:
        super().__init__()
        self.proj = proj
        self.pos_embed = nn.Parameter(table.to(proj.weight.dtype), requires_grad=False)  # weights are parameters here
        self.size = size

    def forward(self, latents: Tensor) -> Tensor:
        patches = self.proj(latents)
        rows, columns = patches.shape[2:]
        row = torch.arange(rows) + (self.size - rows) // 2
        column = torch.arange(columns) + (self.size - columns) // 2
        places = (row[:, None] * self.size + column[None, :]).reshape(-1)
        return patches.flatten(2).transpose(1, 2) + self.pos_embed[0].index_select(0, places)[None]


class StableDiffusion3Velocity(nn.Module):
    """The contract's `dit`: latents [B, C, h, w], timestep [B], … → velocity float32 [B, C, h, w].

    skip_layers [B, blocks]: where there is a 1, a block leaves a sample as it is, since its gates are closed. The
    module's own `forward` leaves blocks out for a whole batch.
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
        module, dtype = self.module, self.module.dtype
        image = module.pos_embed(latents.to(dtype))
        text = module.context_embedder(prompt_embeds.to(dtype))
        signal = silu(module.time_text_embed(timestep * TIMESTEPS, pooled_embeds.to(dtype)))
        opened = None if skip_layers is None else (skip_layers < 0.5).to(dtype)[:, :, None, None].unbind(1)
        for index, block in enumerate(module.transformer_blocks):
            text, image = joint_block(block, text, image, signal, opened[index] if opened else None)
        scale, shift = modulation(module.norm_out.linear, signal, 2)
        patches = module.proj_out(modulated(image, shift, scale)).float()
        patch, channels = module.config.patch_size, module.out_channels
        batch, rows, columns = latents.shape[0], latents.shape[2] // patch, latents.shape[3] // patch
        patches = patches.reshape(batch, rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(batch, channels, rows * patch, columns * patch)


def joint_block(
    block: JointTransformerBlock, text: Tensor, image: Tensor, signal: Tensor, opened: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Text and image [B, tokens, D] with weights of their own, but in one attention.

    Some blocks have a second attention for the image alone. The last block leaves the text as it is. Where `opened`
    [B, 1, 1] is 0, the block adds nothing.
    """

    second = block.use_dual_attention
    shift, scale, gate, *image_mlp = modulation(block.norm1.linear, signal, 9 if second else 6, opened)
    if block.context_pre_only:
        text_scale, text_shift = modulation(block.norm1_context.linear, signal, 2)
    else:
        text_shift, text_scale, text_gate, *text_mlp = modulation(block.norm1_context.linear, signal, 6, opened)
    attn, tokens = block.attn, image.shape[1]
    of_image = attention_inputs(modulated(image, shift, scale), attn)
    of_text = added_inputs(modulated(text, text_shift, text_scale), attn)
    attended = attention(joined(of_image, of_text))
    before, image = image, image + gate * attn.to_out[0](attended[:, :tokens])
    if second:
        shift, scale, gate = image_mlp[3:]
        inputs = attention_inputs(modulated(before, shift, scale), block.attn2)
        image = image + gate * block.attn2.to_out[0](attention(inputs))
    shift, scale, gate = image_mlp[:3]
    image = image + gate * block.ff(modulated(image, shift, scale))
    if block.context_pre_only:
        return text, image
    text = text + text_gate * attn.to_add_out(attended[:, tokens:])
    shift, scale, gate = text_mlp
    return text + gate * block.ff_context(modulated(text, shift, scale)), image
