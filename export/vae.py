"""The autoencoder as two networks: latents to 8-bit pixels, and back. Scaling and shift are inside the graphs.

In fp16 its residual streams can go beyond 65504 and turn into NaN (diffusers sets `force_upcast` for that reason; the
model card of madebyollin/sdxl-vae-fp16-fix shows magnitudes). So they are held at a fraction of their size: every
GroupNorm divides by the size of what it reads, and what else reads a stream is linear. The fraction is a power of two,
so numbers are rounded as they would be anyway.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ditforge.contract import VAE_DECODER, VAE_ENCODER
from ditforge.export.checkpoint.diffusers_folder import Checkpoint, with_defaults
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.quantisation.precision import Precision, network_dtype

WEIGHTS = "vae"
# The residual streams' size in fp16, and that of what the first convolution of a residual block writes to the second
# norm: there is room up to 2^22. What fp16 rounds off at the small end is at most 2^-25, which is 2^-19 in a stream's
# own numbers: less than it rounds off a number of 2^-8 anyway. The weights (about 2^-7 in the widest layers, 2^-13 now)
# just stay above 2^-14, where fp16 loses digits, so no smaller.
STREAM = 2.0**-6
# Layers that read a norm's output, latents or pixels write weight and bias to a stream; those that read a stream,
# which is smaller already, add their bias.
FACTORS = {
    re.compile(
        r".*(\.conv[12]|coder\.conv_in|\.to_out\.0)\.(weight|bias)"
        r"|.*(\.conv_shortcut|samplers\.\d+\.conv)\.bias"
    ): STREAM
}


class Decoder(nn.Module):
    """`latents` float32 [B, C, h, w] → `image` uint8 [B, H, W, 3], as diffusers' VaeImageProcessor rounds it."""

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: Tensor) -> Tensor:
        config = self.module.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0.0)
        image = self.module.decode(unscaled.to(self.module.dtype), return_dict=False)[0].float()
        pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
        result: Tensor = pixels.to(torch.uint8)
        return result


class Encoder(nn.Module):
    """`image` uint8 [B, H, W, 3] → `latents` float32 [B, C, h, w]: the mode of the posterior, scaled."""

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        config = self.module.config
        pixels = (image.float().permute(0, 3, 1, 2) / 127.5 - 1).to(self.module.dtype)
        latents = self.module.encode(pixels, return_dict=False)[0].mode().float()
        result: Tensor = (latents - (config.shift_factor or 0.0)) * config.scaling_factor
        return result


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The autoencoder's configuration."""
    return with_defaults(AutoencoderKL, checkpoint.config(WEIGHTS))


def factor(config: dict[str, Any]) -> int:
    """How many pixels a latent is wide: each level of the autoencoder but the last one halves the picture."""
    result: int = 2 ** (len(config["block_out_channels"]) - 1)
    return result


def vae(config: dict[str, Any], precision: Precision) -> tuple[Network, Network]:
    """Decoder and encoder of the AutoencoderKL with diffusers' configuration `config`."""
    dtype, reason = network_dtype(precision), "as asked for"
    narrow = dtype == torch.float16
    if narrow:
        reason += f"; its residual streams are held at 1/{1 / STREAM:.0f} of their size, which can overflow fp16"
    channels, pixels = config["latent_channels"], factor(config)
    latents = Port(torch.float32, (BATCH, channels, Dim("latent_height"), Dim("latent_width")))
    image = Port(torch.uint8, (BATCH, Dim("height", pixels), Dim("width", pixels), config["out_channels"]))

    def network(name: str, wrapper: type[nn.Module], inputs: dict[str, Port], outputs: dict[str, Port]) -> Network:
        return Network(
            name=name,
            build=lambda: wrapper(autoencoder(config, STREAM if narrow else 1.0)),
            inputs=inputs,
            outputs=outputs,
            weights=WEIGHTS,
            dtype=dtype,
            reason=reason,
            factors=FACTORS if narrow else {},
        )

    return (
        network(VAE_DECODER, Decoder, {"latents": latents}, {"image": image}),
        network(VAE_ENCODER, Encoder, {"image": image}, {"latents": latents}),
    )


def autoencoder(config: dict[str, Any], stream: float) -> AutoencoderKL:
    """The module, its norms made for streams that are `stream` times as large as the checkpoint's weights make them."""
    module = AutoencoderKL.from_config(config)
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.eps *= stream**2
    return module
