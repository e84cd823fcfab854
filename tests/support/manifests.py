"""Folders of all stages for a model that nobody has: real manifests, and files that only look like graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
from tokenizers import Tokenizer, models

from ditforge import manifest
from ditforge.footprint import Footprint
from ditforge.manifest import Component, Engine, Manifest, Tensor
from ditforge.model import Schedule

MODEL = published.MODEL.model_copy(
    update={
        "name": "none",
        "default_size": 128,
        "max_size": 512,
        "default_steps": 4,
        "guidance": "none",
        "default_guidance": 0.0,
        "schedule": Schedule(kind="dynamic"),
        "max_tokens": {"clip": 8},
    }
)
LATENTS = Tensor(dtype="FP32", shape=("batch", 16, "latent_height", "latent_width"))
IMAGE = Tensor(dtype="UINT8", shape=("batch", "height", "width", 3))
IDS, COUNTS = Tensor(dtype="INT32", shape=("batch", 8)), Tensor(dtype="INT32", shape=("batch", 1))
EMBEDS = Tensor(dtype="FP32", shape=("batch", 8, 32))
PORTS = {
    "tokenizer": (
        {"prompt": Tensor(dtype="BYTES", shape=("batch", 1))},
        {"clip_ids": IDS, "prompt_tokens": COUNTS},
    ),
    "clip": ({"clip_ids": IDS}, {"prompt_embeds": EMBEDS}),
    "dit": (
        {"latents": LATENTS, "timestep": Tensor(dtype="FP32", shape=("batch",)), "prompt_embeds": EMBEDS},
        {"velocity": LATENTS},
    ),
    "vae_decoder": ({"latents": LATENTS}, {"image": IMAGE}),
}


def write_stage(folder: Path, kind: manifest.Kind, precision: str = "bf16") -> dict[str, Any]:
    """Write a folder of a stage, and return its manifest as JSON holds it."""
    folder.mkdir()
    (folder / "clip.json").write_text(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str())
    components, engines = {}, {}
    for name, (inputs, outputs) in PORTS.items():
        file = folder / ("clip.json" if name == "tokenizer" else f"{name}.onnx")
        if name != "tokenizer":
            file.write_text(f"the graph of {name}")
            made = {"compiler": "onnxruntime", "compiler_version": "1", "target": "cpu"}
            engines[name] = Engine(**made, cache_key={**made, "precision": precision})
        components[name] = Component(
            files={file.name: manifest.describe(file)},
            precision="none" if name == "tokenizer" else precision,
            dtype="" if name == "tokenizer" else precision,
            reason="as asked for",
            inputs=inputs,
            outputs=outputs,
            footprint=None
            if name == "tokenizer"
            else Footprint(weights=10**9, largest_block=10**8, activations={64: 10**6, 128: 10**7}, flops={64: 10**9}),
        )
    made = {} if kind == "onnx" else engines
    manifest.write(Manifest(kind=kind, model=MODEL, components=components, engines=made, origin={"a": "b"}), folder)
    content: dict[str, Any] = json.loads((folder / manifest.FILE_NAME).read_text())
    return content
