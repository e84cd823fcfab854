"""The published models in their full size, with no weights: what their graphs take and give, and how large they are."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from random_flux import character_clip_tokenizer, word_t5_tokenizer
from random_sd3 import padded_with_exclamation_marks

from ditforge.export import families
from ditforge.export.checkpoint.consistency import check_ports
from ditforge.export.checkpoint.diffusers_folder import CONFIGS, Checkpoint, open_checkpoint
from ditforge.export.graph.tracing import dry_run, fake, trace
from ditforge.export.network import Dim, Network, Port
from ditforge.export.quantisation.precision import parse_precision
from ditforge.model import Model

BF16 = parse_precision("bf16")
# Parameters of the DiT as its authors publish them, and what a client must know.
PUBLISHED: dict[str, tuple[float, dict[str, Any]]] = {
    "flux.1-dev": (12e9, {"guidance": "embedded", "default_steps": 28, "default_guidance": 3.5, "t5": "required"}),
    "flux.1-schnell": (12e9, {"guidance": "none", "default_steps": 4, "default_guidance": 0.0, "t5": "required"}),
    "sd3.5-medium": (2.5e9, {"guidance": "classifier-free", "default_steps": 40, "default_guidance": 4.5}),
    "sd3.5-large": (8.1e9, {"guidance": "classifier-free", "default_steps": 28, "default_guidance": 3.5}),
}
# Of the others: T5 v1.1 XXL's encoder, OpenAI's CLIP ViT-L/14 (with a projection: clip_l), OpenCLIP's bigG, the VAE.
OTHERS = {"t5": 4.76e9, "clip": 0.123e9, "clip_l": 0.124e9, "clip_g": 0.695e9, "vae_decoder": 0.0838e9}
SIZES = {"batch": 3, "latent_height": 48, "latent_width": 80, "height": 48, "width": 80}  # not square


def checkpoint(name: str, folder: Path, **transformer: Any) -> Checkpoint:
    """The configurations NAME with tokenizers of the real lengths, and without weights."""
    shutil.copytree(CONFIGS / name, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | transformer))
    clip = character_clip_tokenizer()
    clip.model_max_length = 77
    made = {"CLIPTokenizer": [clip, padded_with_exclamation_marks(clip)], "T5TokenizerFast": [word_t5_tokenizer(512)]}
    for component, (_, kind, *_) in sorted(json.loads((folder / "model_index.json").read_text()).items()):
        if component.startswith("tokenizer"):
            made[kind].pop(0).save_pretrained(folder / component)
    return open_checkpoint(folder)


def shape(port: Port) -> tuple[int, ...]:
    """The port's shape in SIZES, each as many times as the dimension is a multiple."""
    return tuple(dim.multiple * SIZES[dim.name] if isinstance(dim, Dim) else dim for dim in port.shape)


def outputs(network: Network) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What the network makes of inputs in SIZES, by fake tensors."""
    with fake(network):
        module = network.build().eval()
        made = module(**{name: torch.zeros(shape(port), dtype=port.dtype) for name, port in network.inputs.items()})
    return [(tuple(t.shape), t.dtype) for t in (made if isinstance(made, tuple) else (made,))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_network_has_its_published_size_and_the_contracts_shapes(name: str, tmp_path: Path) -> None:
    opened = checkpoint(name, tmp_path / name)
    family = families.family_of(opened)
    networks, model = family.networks(opened, BF16), family.model(opened)
    check_ports(networks)
    for network in networks:
        expected = [(shape(port), port.dtype) for port in network.outputs.values()]
        assert outputs(network) == expected, network.name
        parameters = sum(math.prod(size) for _, size in dry_run(network))
        published = PUBLISHED[name][0] if network.name == "dit" else OTHERS.get(network.name)
        if published:
            assert parameters == pytest.approx(published, rel=0.02), network.name
    dit = next(network for network in networks if network.name == "dit")
    tokens = {"flux.1-dev": 512, "flux.1-schnell": 256}.get(name, 77 + 256)
    assert shape(dit.inputs["prompt_embeds"]) == (3, tokens, 4096)
    assert shape(dit.inputs["pooled_embeds"]) == (3, 768 if "flux" in name else 2048)
    assert shape(dit.inputs["latents"]) == shape(dit.outputs["velocity"]) == (3, 16, 96, 160)
    assert ("guidance" in dit.inputs) == (name == "flux.1-dev")
    assert ("skip_layers" in dit.inputs) == (name == "sd3.5-medium")
    check_model(model, name)


def check_model(model: Model, name: str) -> None:
    """What a client must know of it."""
    for key, value in PUBLISHED[name][1].items():
        assert getattr(model, key) == value
    assert (model.latent_channels, model.vae_factor, model.size_multiple, model.default_size) == (16, 8, 16, 1024)
    assert model.schedule.kind == ("dynamic" if name == "flux.1-dev" else "fixed")
    if name == "sd3.5-medium":
        assert model.skip_layers
        assert (model.skip_layers.layers, model.skip_layers.scale) == ((7, 8, 9), 2.8)
    assert model.t5 == ("required" if "flux" in name else "optional")


@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large"])
def test_the_graph_of_two_blocks_in_full_width(name: str, tmp_path: Path) -> None:
    """Tracing takes a minute at full depth; blocks of one kind are all alike. FLUX.1 is in tests/chain."""
    depth: dict[str, Any] = {"num_layers": 2}
    depth |= {"dual_attention_layers": [0]} if name == "sd3.5-medium" else {}
    opened = checkpoint(name, tmp_path / name, **depth)
    family = families.family_of(opened)
    dit = next(network for network in family.networks(opened, BF16) if network.name == "dit")
    traced = trace(dit)
    model = traced.model
    assert [value.name for value in model.graph.inputs] == list(dit.inputs)
    assert [value.name for value in model.graph.outputs] == ["velocity"]
    (velocity,) = model.graph.outputs
    assert velocity.shape is not None and [velocity.shape[0], velocity.shape[1]] == [model.graph.inputs[0].shape[0], 16]
    assert set(traced.aliases) == {names[0] for names, _ in dry_run(dit)}
