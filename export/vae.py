"""The autoencoder as two networks: latents to 8-bit pixels, and back. Scaling and shift are inside the graphs.

In fp16 its residual streams can exceed 65504 and turn into NaN (diffusers sets `force_upcast` for that reason; the
model card of madebyollin/sdxl-vae-fp16-fix shows magnitudes). They are therefore held at a fraction of their size. This
does not change the result: every GroupNorm divides by the size of its input, and all other layers that read a stream
are linear. The fraction is a power of two, so numbers are rounded as they would be at full size.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ditforge.contract import VAE_DECODER, VAE_ENCODER
from ditforge.export.checkpoint.diffusers_folder import Checkpoint, with_defaults
from ditforge.export.network import BATCH, OF_THE_EXPORT, Dim, Network, Port
from ditforge.export.quantisation.precision import Precision, network_dtype

WEIGHTS = "vae"
# The fraction at which the residual streams are held in fp16, and with them the output of a residual block's first
# convolution, which the second norm reads. Values up to 2^22 then fit. The rounding error of the smallest fp16 numbers
# is at most 2^-25, which is 2^-19 at full size: less than the rounding error of any number above 2^-8. The fraction
# cannot be smaller, because the weights (about 2^-7 in the widest layers, so 2^-13 when scaled) must stay above 2^-14,
# below which fp16 loses digits.
STREAM = 2.0**-6
# What the file of an autoencoder may hold besides.
UNREAD = {re.compile(r"loss\..*|(.*\.)?model_ema\..*"): "they are of the autoencoder's training"}
# A layer that reads a norm's output, latents or pixels and writes to a stream has its weight and bias scaled. A layer
# that reads a stream, which is scaled already, has only its bias scaled.
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
    """Return the autoencoder's configuration, with diffusers' defaults for keys that the file leaves out."""
    return with_defaults(AutoencoderKL, checkpoint.config(WEIGHTS))


def factor(config: dict[str, Any]) -> int:
    """Return how many pixels wide one latent is: each level of the autoencoder but the last halves the picture."""
    result: int = 2 ** (len(config["block_out_channels"]) - 1)
    return result


def vae(config: dict[str, Any], precision: Precision) -> tuple[Network, Network]:
    """Return the decoder and the encoder of the AutoencoderKL with diffusers' configuration `config`."""
    dtype, reason = network_dtype(precision), OF_THE_EXPORT
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
            unread=UNREAD,
        )

    return (
        network(VAE_DECODER, Decoder, {"latents": latents}, {"image": image}),
        network(VAE_ENCODER, Encoder, {"image": image}, {"latents": latents}),
    )


def autoencoder(config: dict[str, Any], stream: float) -> AutoencoderKL:
    """Make diffusers' module, with norms adapted to residual streams that are scaled by `stream` (see the top)."""
    module = AutoencoderKL.from_config(config)
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.eps *= stream**2
    return module
