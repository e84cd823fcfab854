"""A family and a compiler that other packages bring go through every stage: nothing in ditforge knows their names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer

from ditforge import manifest
from ditforge.client import Client
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.triton_repo.server import start

TOY = Path(__file__).parent
PROMPT, SEED, STEPS = "a large red circle", 7, 4
STAGES = (
    "calibrate toy-model --out ranges.json --steps 2",
    "export toy-model --out onnx",
    "export toy-model --out onnx-int8 --precision int8-weights --activations fp32",
    "build onnx --compiler toy --out engines",
    "verify engines --against onnx",
    "verify onnx-int8 --against onnx",
    "plan onnx --gpu rtx4090",
    "repo engines --out repo",
)
# Every process imports PyTorch for seconds, so there is one for all commands.
ALL_IN_ONE_PROCESS = """
import json, sys
from ditforge import cli
for command in json.loads(sys.argv[1]):
    sys.argv = ["ditforge", *command.split()]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{command}: exit code {ended.code}")
"""


def toys() -> ModuleType:
    """The toy family's module, in a process in which its package is not installed."""
    spec = spec_from_file_location("toy_family", TOY / "toy_family.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed(shared_traces: None) -> dict[str, str]:
    """The environment of a process in which the toy package is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOY), os.environ["PYTHONPATH"]])}


def save_checkpoint(flux_tiny: Path, folder: Path) -> None:
    """Save a toy checkpoint of random weights, with the tokenizer and autoencoder of a trained model."""
    toy_family = toys()
    shutil.copytree(flux_tiny / "tokenizer", folder / "tokenizer")
    shutil.copytree(flux_tiny / "vae", folder / "vae")
    vocabulary = Tokenizer.from_file(str(flux_tiny / "tokenizer" / "tokenizer.json")).get_vocab_size()
    channels = json.loads((folder / "vae" / "config.json").read_text())["latent_channels"]
    torch.manual_seed(0)
    text = {"vocabulary": vocabulary, "width": 24}
    dit = {"channels": channels, "width": 32, "text_width": 24}
    for name, config, module, file in (
        ("text_encoder", text, toy_family.ToyText(**text), "model.safetensors"),
        ("transformer", dit, toy_family.ToyDiT(**dit), "diffusion_pytorch_model.safetensors"),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(module.state_dict(), folder / name / file)
    index = {
        "_class_name": "ToyPipeline",
        "transformer": ["toy", "ToyDiT"],
        "text_encoder": ["toy", "ToyText"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def folder(shared: Callable[[str, Callable[[Path], None]], Path], flux_tiny: Path, installed: dict[str, str]) -> Path:
    """A checkpoint, and what the command line makes of it: an export, engines and a repository."""

    def make(out: Path) -> None:
        save_checkpoint(flux_tiny, out / "toy-model")
        command = [sys.executable, "-c", ALL_IN_ONE_PROCESS, json.dumps(STAGES)]
        done = subprocess.run(command, cwd=out, env=installed, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return shared("toy", make)


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    return folder / "toy-model"


def by_hand(checkpoint: Path, out: Path) -> np.ndarray:
    """The same picture by PyTorch and diffusers: [H, W, 3] uint8."""
    toy_family = toys()
    opened = open_checkpoint(checkpoint)
    text, dit = toy_family.reference(opened)
    (tokenizer,) = toy_family.read_tokenizers(opened)
    tokenizer.save(out / "toy.json")
    ids = Tokenizer.from_file(str(out / "toy.json")).encode(PROMPT).ids
    side = 64 // toy_family.vae.factor(toy_family.vae.read_config(opened))
    latents = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(SEED))
    sigmas = [*torch.linspace(1, 1 / STEPS, STEPS).tolist(), 0.0]
    with torch.no_grad():
        states = text(torch.tensor([ids]))
        for sigma, following in pairwise(sigmas):
            latents = latents + (following - sigma) * dit(latents, torch.tensor([sigma]), states)
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        image = vae.decode(latents).sample[0].permute(1, 2, 0)
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def test_the_same_picture_as_by_hand(
    folder: Path, checkpoint: Path, installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", installed["PYTHONPATH"])
    with start(folder / "repo", port=0) as server, Client(server.url) as client:
        picture = client.generate(PROMPT, seed=SEED)
    assert isinstance(picture, Image.Image)
    assert np.abs(np.asarray(picture, int) - by_hand(checkpoint, tmp_path).astype(int)).max() <= 1


def test_what_the_toys_declare_is_what_is_made(folder: Path) -> None:
    built = manifest.read(folder / "engines", "engines")
    assert {engine.compiler for engine in built.engines.values()} == {"toy"}
    assert built.components.keys() == {"tokenizer", "toy", "dit", "vae_decoder", "vae_encoder"}
    quantised = manifest.read(folder / "onnx-int8", "onnx").components["dit"].layers
    assert quantised == {"text.weight": "int8-weights"}
    ranges = json.loads((folder / "ranges.json").read_text())
    assert ranges["amax"].keys() == {"text.weight"}


def test_without_the_package_its_name_is_unknown(folder: Path) -> None:
    command = [sys.executable, "-m", "ditforge", "build", "onnx", "--compiler", "toy", "--out", "other"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown compiler 'toy'" in done.stderr
    assert "onnxruntime" in done.stderr


def test_a_package_that_cannot_be_loaded_is_named(folder: Path, tmp_path: Path, installed: dict[str, str]) -> None:
    broken = tmp_path / "ditforge_broken-3.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: ditforge-broken\nVersion: 3.0\n")
    (broken / "entry_points.txt").write_text("[ditforge.compilers]\nbroken = no_such_module:COMPILER\n")
    command = [sys.executable, "-m", "ditforge", "build", "onnx", "--compiler", "broken", "--out", "other"]
    environment = {**installed, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ditforge-broken 3.0" in done.stderr
    assert "no_such_module" in done.stderr
