"""The autoencoder as two networks: latents to 8-bit pixels, and back. Scaling and shift are inside the graphs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ditforge.export.checkpoint import Checkpoint, with_defaults
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.precision import Precision, network_dtype

WEIGHTS = "vae"


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
        return pixels.to(torch.uint8)  # last: TensorRT has uint8 at an engine's ports only


class Encoder(nn.Module):
    """`image` uint8 [B, H, W, 3] → `latents` float32 [B, C, h, w]: the mode of the posterior, scaled."""

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        config = self.module.config
        pixels = (image.float().permute(0, 3, 1, 2) / 127.5 - 1).to(self.module.dtype)
        latents = self.module.encode(pixels, return_dict=False)[0].mode().float()
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The autoencoder's configuration."""
    return with_defaults(AutoencoderKL, checkpoint.config(WEIGHTS))


def factor(config: dict[str, Any]) -> int:
    """How many pixels a latent is wide: each level of the autoencoder but the last one halves the picture."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def vae(config: dict[str, Any], precision: Precision) -> tuple[Network, Network]:
    """Decoder and encoder of the AutoencoderKL with diffusers' configuration `config`."""
    dtype, reason = network_dtype(precision, "wide")
    channels, pixels = config["latent_channels"], factor(config)
    latents = Port(torch.float32, (BATCH, channels, Dim("latent_height"), Dim("latent_width")))
    image = Port(torch.uint8, (BATCH, Dim("height", pixels), Dim("width", pixels), config["out_channels"]))

    def network(name: str, wrapper: type[nn.Module], inputs: dict[str, Port], outputs: dict[str, Port]) -> Network:
        return Network(
            name=name,
            build=lambda: wrapper(AutoencoderKL.from_config(config)),
            inputs=inputs,
            outputs=outputs,
            weights=WEIGHTS,
            dtype=dtype,
            reason=reason,
        )

    return (
        network("vae_decoder", Decoder, {"latents": latents}, {"image": image}),
        network("vae_encoder", Encoder, {"image": image}, {"latents": latents}),
    )
