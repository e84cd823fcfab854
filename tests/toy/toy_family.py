"""A family of models in one file, as a package of somebody else's brings it: the least that a family has.

A checkpoint of it is a folder with a model_index.json that names the class ToyPipeline, a `transformer` (ToyDiT), a
`text_encoder` (ToyText), a `tokenizer` and a `vae`, diffusers' AutoencoderKL.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

from ditforge.contract import DIT
from ditforge.export import vae
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.families import Family
from ditforge.export.network import BATCH, Dim, Network, Port
from ditforge.export.quantisation.precision import Precision, network_dtype, text_dtype
from ditforge.export.text_encoders.tokenizers import Tokenizer, read_tokenizer
from ditforge.model import Model, Schedule

TOKENS = 16  # of a prompt


class ToyText(nn.Module):
    """Token ids int32 [B, T] → hidden states [B, T, D]: a vector for each token, and one linear layer."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.linear = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embedding(ids))


class ToyDiT(nn.Module):
    """Latents [B, C, h, w], timestep [B], hidden states [B, T, D] → velocity [B, C, h, w]."""

    def __init__(self, channels: int, width: int, text_width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.text = nn.Linear(text_width, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, latents: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        signal = self.time(timestep[:, None]) + self.text(states).mean(dim=1)
        return self.last(silu(self.first(latents) + signal[:, :, None, None]))


class TextGraph(nn.Module):
    """The graph of ToyText: its arguments and outputs have the contract's names."""

    def __init__(self, module: ToyText, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, toy_ids: Tensor) -> Tensor:
        return self.module(toy_ids).to(self.dtype)


class VelocityGraph(nn.Module):
    """The graph of ToyDiT: float32 outside, the network's dtype inside."""

    def __init__(self, module: ToyDiT) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        dtype = self.module.text.weight.dtype
        return self.module(latents.to(dtype), timestep.to(dtype), prompt_embeds.to(dtype)).float()


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The DiT's configuration."""
    return checkpoint.config("transformer")


def read_tokenizers(checkpoint: Checkpoint) -> list[Tokenizer]:
    """The one tokenizer."""
    return [read_tokenizer(checkpoint, "tokenizer", "toy", length=TOKENS)]


def networks(checkpoint: Checkpoint, precision: Precision) -> list[Network]:
    """All networks, in the order in which data flows."""
    config, text = read_config(checkpoint), checkpoint.config("text_encoder")
    dtype, between = network_dtype(precision), text_dtype(precision)
    latents = Port(torch.float32, (BATCH, config["channels"], Dim("latent_height"), Dim("latent_width")))
    embeds = Port(between, (BATCH, TOKENS, config["text_width"]))
    return [
        Network(
            name="toy",
            build=lambda: TextGraph(ToyText(text["vocabulary"], text["width"]), between),
            inputs={"toy_ids": Port(torch.int32, (BATCH, TOKENS))},
            outputs={"prompt_embeds": embeds},
            weights="text_encoder",
            dtype=dtype,
        ),
        Network(
            name=DIT,
            build=lambda: VelocityGraph(ToyDiT(**config)),
            inputs={"latents": latents, "timestep": Port(torch.float32, (BATCH,)), "prompt_embeds": embeds},
            outputs={"velocity": latents},
            weights="transformer",
            dtype=dtype,
            linears=LINEARS,
        ),
        *vae.vae(vae.read_config(checkpoint), precision),
    ]


def model(checkpoint: Checkpoint) -> Model:
    """What a client must know."""
    autoencoder = vae.read_config(checkpoint)
    pixels = vae.factor(autoencoder)
    return Model(
        name=checkpoint.name,
        latent_channels=autoencoder["latent_channels"],
        vae_factor=pixels,
        size_multiple=pixels,
        default_size=64,
        max_size=256,
        default_steps=4,
        guidance="none",
        default_guidance=0.0,
        schedule=Schedule(kind="fixed", shift=1.0),
        max_tokens={"toy": TOKENS},
        t5="absent",
    )


def load_pipeline(checkpoint: Checkpoint) -> SimpleNamespace:
    """The DiT with its weights, which is all that calibration runs."""
    transformer = ToyDiT(**read_config(checkpoint))
    transformer.load_state_dict(load_file(checkpoint.folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return SimpleNamespace(transformer=transformer)


def run_pipeline(loaded: SimpleNamespace, model: Model, prompt: str, steps: int, seed: int) -> None:
    """All steps, each of random latents and text."""
    generator, dit = torch.Generator().manual_seed(seed), loaded.transformer
    side = model.default_size // model.vae_factor
    for step in range(steps):
        latents = torch.randn(1, model.latent_channels, side, side, generator=generator)
        states = torch.randn(1, TOKENS, dit.text.in_features, generator=generator)
        dit(latents, torch.tensor([1 - step / steps]), states)


LINEARS = re.compile(r"text\.weight")
FAMILY = Family(
    name="toy",
    title="Toy",
    pipeline="ToyPipeline",
    model=model,
    read_tokenizers=read_tokenizers,
    networks=networks,
    read_config=read_config,
    linears=LINEARS,
    load_pipeline=load_pipeline,
    run_pipeline=run_pipeline,
)


def reference(checkpoint: Checkpoint) -> tuple[ToyText, ToyDiT]:
    """The modules with their weights, to make the same picture by hand. Not a part of a family."""
    text = ToyText(**checkpoint.config("text_encoder"))
    text.load_state_dict(load_file(checkpoint.folder / "text_encoder" / "model.safetensors"))
    return text, load_pipeline(checkpoint).transformer
