"""CLIP's text encoder as a network: token ids in; the pooled embedding out, and hidden states if they are needed."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ditforge.export.network import BATCH, Network, Port
from ditforge.export.quantisation.precision import Precision, network_dtype, text_dtype

KEY_PREFIXES = ("text_model.",)  # transformers 4 wrote this before the keys, transformers 5 does not
# What a checkpoint of CLIP holds besides.
UNREAD = {
    re.compile(r"vision_model\..*|visual_projection\..*|logit_scale"): "they are for CLIP's half that reads pictures",
    re.compile(r"embeddings\.position_ids"): "the positions count from 0 in any case",
}
UNPROJECTED = {re.compile(r"text_projection(\.weight)?"): "the model takes CLIP's output without a projection"}


class PooledText(nn.Module):
    """`clip_ids` int32 [B, T] → `pooled_embeds` [B, P]: the last layer's state at the end-of-text token."""

    def __init__(self, module: CLIPTextModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, clip_ids: Tensor) -> Tensor:
        result: Tensor = self.module(input_ids=clip_ids, position_ids=positions(clip_ids)).pooler_output.to(self.dtype)
        return result


class PenultimateText(nn.Module):
    """Token ids int32 [B, T] → states [B, T, D], which are the last layer's input, and the projected pooled [B, P].

    The tracer takes the names of inputs from the arguments of `forward`, so each encoder has a class of its own.
    """

    def __init__(self, module: CLIPTextModelWithProjection, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.module(input_ids=ids, position_ids=positions(ids), output_hidden_states=True)
        return output.hidden_states[-2].to(self.dtype), output.text_embeds.to(self.dtype)


class ClipL(PenultimateText):
    """OpenAI's ViT-L/14."""

    def forward(self, clip_l_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(clip_l_ids)


class ClipG(PenultimateText):
    """OpenCLIP's ViT-bigG/14."""

    def forward(self, clip_g_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(clip_g_ids)


PENULTIMATE: dict[str, type[PenultimateText]] = {"clip_l": ClipL, "clip_g": ClipG}


def positions(ids: Tensor) -> Tensor:
    """Return position ids [1, T]. The module's own cannot be used: they are a buffer, which the checkpoint lacks."""
    return torch.arange(ids.shape[1])[None]


def read_settings(config: dict[str, Any]) -> CLIPTextConfig:
    """Return the configuration without the checkpoint's dtype, which would override that of the network.

    The configuration of a whole CLIP has that of the text encoder in a field of its own.
    """
    config = config.get("text_config") or config
    return CLIPTextConfig.from_dict(
        {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    )


def positions_of(config: dict[str, Any]) -> int:
    """Return the most tokens of a prompt that CLIP with the configuration `config` can read."""
    result: int = read_settings(config).max_position_embeddings
    return result


def clip_pooled(config: dict[str, Any], weights: str, tokens: int, precision: Precision) -> Network:
    """Describe CLIP with a pooled output only. It reads `tokens` tokens per prompt.

    `config` is the configuration of transformers' CLIPTextModel, and `weights` the checkpoint's folder.
    """
    out = text_dtype(precision)
    settings = read_settings(config)
    return Network(
        name="clip",
        build=lambda: PooledText(CLIPTextModel(settings), out),
        inputs={"clip_ids": Port(torch.int32, (BATCH, tokens))},
        outputs={"pooled_embeds": Port(out, (BATCH, settings.hidden_size))},
        weights=weights,
        dtype=network_dtype(precision),
        key_prefixes=KEY_PREFIXES,
        unread=UNREAD | UNPROJECTED,
    )


def clip_penultimate(name: str, config: dict[str, Any], weights: str, tokens: int, precision: Precision) -> Network:
    """Describe CLIP with hidden states, to which the DiT attends, and a projected pooled output, which modulates it.

    `name` is a key of PENULTIMATE. The other arguments are those of clip_pooled(). Raises ValueError if the
    configuration has no projection_dim.
    """
    out = text_dtype(precision)
    settings = read_settings(config)
    if settings.projection_dim is None:
        raise ValueError(f"{weights} has no projection_dim")
    return Network(
        name=name,
        build=lambda: PENULTIMATE[name](CLIPTextModelWithProjection(settings), out),
        inputs={f"{name}_ids": Port(torch.int32, (BATCH, tokens))},
        outputs={
            f"{name}_states": Port(out, (BATCH, tokens, settings.hidden_size)),
            f"{name}_pooled": Port(out, (BATCH, settings.projection_dim)),
        },
        weights=weights,
        dtype=network_dtype(precision),
        key_prefixes=KEY_PREFIXES,
        unread=UNREAD,
    )
