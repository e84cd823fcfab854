"""What a model is: from configurations, shapes and what its files say; the user is asked where they leave it open."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_flux
import random_sd3
import single_files
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file

from ditforge.client.guidance import guided
from ditforge.client.options import GenerateOptions
from ditforge.client.request import make_request
from ditforge.client.samplers.euler import sample_euler
from ditforge.client.schedules import flow_sigmas
from ditforge.errors import UserError
from ditforge.export.checkpoint.random_weights import random_checkpoint
from ditforge.export.checkpoint.source import CheckpointSource, open_files, opened
from ditforge.export.families import family_of, sd3
from ditforge.model import Model

HASH = "0123456789abcdef0123456789abcdef01234567"
OPEN_LARGE = r'large or Stable Diffusion 3.5 large-turbo: [\s\S]*variant="large" for[\s\S]*variant="large-turbo" for'
OPEN_FLUX = r'schnell or FLUX.1-dev without[\s\S]*variant="schnell" for[\s\S]*variant="dev" for'


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def model_of(source: CheckpointSource | Path) -> Model:
    checkpoint = open_files(source if isinstance(source, CheckpointSource) else CheckpointSource(source))
    return family_of(checkpoint).model(checkpoint)


def save(tensors: dict[str, torch.Tensor], file: Path, **metadata: str) -> Path:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file, metadata or None)
    return file


@pytest.fixture(scope="module")
def saved_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_sd3.save_large_turbo(tmp_path_factory.mktemp("large"), with_t5=True)
    (folder / "ditforge.json").unlink()
    return folder


@pytest.fixture
def large(saved_large: Path, tmp_path: Path) -> Path:
    """A folder like SD3.5 large, or large-turbo: nothing in it says which. The folder's name does not count."""
    return Path(shutil.copytree(saved_large, tmp_path / "sd3.5-large-turbo"))


@pytest.fixture
def schnell(random_schnell: Path, tmp_path: Path) -> Path:
    """A folder like FLUX.1-schnell without a ditforge.json."""
    return Path(shutil.copytree(random_schnell, tmp_path / "dev", ignore=shutil.ignore_patterns("ditforge.json")))


def test_large_and_turbo_are_asked_for(large: Path) -> None:
    with pytest.raises(UserError, match=OPEN_LARGE):
        model_of(large)
    for variant, steps, guidance in (("large", 28, 3.5), ("large-turbo", 4, 1.0)):
        model = model_of(CheckpointSource(large, variant=(variant,)))
        assert (model.default_steps, model.default_guidance, model.max_tokens["t5"]) == (steps, guidance, 256)
    with pytest.raises(
        UserError, match=r'not those of the variant .medium.\n[\s\S]*variant="large" or variant="large-'
    ):
        model_of(CheckpointSource(large, variant=("medium",)))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("stabilityai--stable-diffusion-3.5-large-turbo", 4),
        ("stabilityai--stable-diffusion-3.5-large", 28),
        ("someone--sd35_large_anime", 28),
        ("someone--turbo-pictures", None),
    ],
)
def test_the_repository_of_the_hubs_cache_says(large: Path, tmp_path: Path, name: str, steps: int | None) -> None:
    snapshot = tmp_path / f"models--{name}" / "snapshots" / HASH
    shutil.copytree(large, snapshot)
    if steps is None:
        with pytest.raises(UserError, match=OPEN_LARGE):
            model_of(snapshot)
        return
    assert model_of(snapshot).default_steps == steps
    with opened(CheckpointSource(snapshot, random_weights=True)) as checkpoint:
        assert sd3.model(checkpoint).default_steps == steps


def test_what_the_configurations_say(large: Path) -> None:
    edit(large / "transformer" / "config.json", _name_or_path="stabilityai/stable-diffusion-3.5-large")
    assert model_of(large).default_steps == 28
    edit(large / "model_index.json", _name_or_path="/cache/models--stabilityai--stable-diffusion-3.5-large-turbo")
    assert model_of(large).default_steps == 4  # it may have been made from the one that the transformer's names
    (large / "ditforge.json").write_text('{"variant": "large", "steps": 12, "guidance": 2}')
    model = model_of(large)
    assert (model.default_steps, model.default_guidance) == (12, 2)


@pytest.mark.parametrize(
    ("metadata", "steps"),
    [
        ({"modelspec.architecture": "stable-diffusion-3-5-large"}, 28),
        ({"modelspec.title": "Stable Diffusion 3.5 Large Turbo"}, 4),
        ({"modelspec.architecture": "stable-diffusion-3-5-large", "modelspec.title": "SD3.5 Large Turbo"}, None),
        ({"modelspec.title": "A fast turbo"}, None),
    ],
)
def test_what_the_metadata_of_a_file_say(
    large: Path, tmp_path: Path, metadata: dict[str, str], steps: int | None
) -> None:
    dit = single_files.sd3_dit(random_sd3.large(seed=3).transformer.state_dict())
    file = save(dit, tmp_path / "sd3.5_large_turbo.safetensors", **metadata)
    if steps is None:
        with pytest.raises(UserError, match=OPEN_LARGE):
            model_of(CheckpointSource(file, large))
    else:
        assert model_of(CheckpointSource(file, large)).default_steps == steps


def test_shapes_tell_the_mediums(tmp_path: Path) -> None:
    medium = model_of(random_sd3.save_medium(tmp_path))
    assert (medium.default_steps, medium.default_guidance) == (40, 4.5)
    pipeline = random_sd3.large(with_t5=True)
    config = dict(pipeline.transformer.config) | {"qk_norm": None}
    pipeline.transformer = SD3Transformer2DModel.from_config(config)
    pipeline.save_pretrained(tmp_path / "sd3")
    sd3_medium = model_of(tmp_path / "sd3")
    assert (sd3_medium.default_steps, sd3_medium.default_guidance) == (28, 7.0)


def test_published_models_are_themselves() -> None:
    expected = {"flux.1-dev": (28, 3.5, 512), "flux.1-schnell": (4, 0, 256), "sd3.5-medium": (40, 4.5, 256)}
    expected |= {"sd3.5-large": (28, 3.5, 256), "sd3.5-large-turbo": (4, 1, 256)}
    for name, values in expected.items():
        with random_checkpoint(Path(name)) as checkpoint:
            model = family_of(checkpoint).model(checkpoint)
            assert (model.default_steps, model.default_guidance, model.max_tokens["t5"]) == values


# FLUX.1 without a guidance embedder


def test_the_scheduler_tells_schnell_from_an_undistilled_dev(schnell: Path) -> None:
    model = model_of(schnell)
    assert (model.default_steps, model.guidance, model.max_tokens["t5"]) == (4, "none", 256)
    edit(schnell / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    model = model_of(schnell)
    assert (model.default_steps, model.guidance, model.default_guidance) == (28, "classifier-free", 3.5)
    assert (model.max_tokens["t5"], model.schedule.kind) == (512, "dynamic")
    edit(schnell / "transformer" / "config.json", _name_or_path="black-forest-labs/FLUX.1-schnell")
    with pytest.raises(UserError, match=OPEN_FLUX):  # two that contradict each other
        model_of(schnell)
    assert model_of(CheckpointSource(schnell, variant=("schnell",))).guidance == "none"


@pytest.fixture
def dev_base(schnell: Path, tmp_path: Path) -> Path:
    """A folder like FLUX.1-dev."""
    base = Path(shutil.copytree(schnell, tmp_path / "base"))
    config = dict(random_flux.schnell().transformer.config) | {"guidance_embeds": True}
    shutil.rmtree(base / "transformer")
    FluxTransformer2DModel.from_config(config).save_pretrained(base / "transformer")
    edit(base / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True, shift=3.0)
    return base


def test_a_file_without_a_guidance_embedder_on_a_base_of_dev(dev_base: Path, tmp_path: Path) -> None:
    """It may be schnell, whose people take dev's text encoders, or an undistilled dev."""
    dit = single_files.flux_dit(random_flux.schnell(seed=3).transformer.state_dict())
    file = save(dit, tmp_path / "flux1-schnell.safetensors")
    with pytest.raises(UserError, match=OPEN_FLUX):
        model_of(CheckpointSource(file, dev_base))
    source = CheckpointSource(file, dev_base, variant=("schnell",))
    assert (model_of(source).default_steps, model_of(source).schedule.kind) == (4, "fixed")
    (note,) = open_files(source).report.unexpected
    assert "are of FLUX.1-dev" in note.why
    assert "those of flux.1-schnell are taken" in note.why
    model = model_of(replace(source, variant=("dev",)))
    assert (model.guidance, model.schedule.kind, model.max_tokens["t5"]) == ("classifier-free", "dynamic", 512)
    named = save(dit, tmp_path / "file.safetensors", **{"modelspec.architecture": "flux-1-schnell"})
    assert model_of(CheckpointSource(named, dev_base)).guidance == "none"


def test_a_file_of_dev_on_a_base_of_schnell(schnell: Path, dev_base: Path, tmp_path: Path) -> None:
    """Its scheduler is dev's, and that is said."""
    dit = FluxTransformer2DModel.from_pretrained(dev_base / "transformer")
    source = CheckpointSource(save(single_files.flux_dit(dit.state_dict()), tmp_path / "a.safetensors"), schnell)
    model = model_of(source)
    assert (model.default_steps, model.guidance, model.schedule.kind) == (28, "embedded", "dynamic")
    (note,) = open_files(source).report.unexpected
    assert "FLUX.1-schnell, and" in note.why


def test_classifier_free_guidance_is_that_of_diffusers(schnell: Path) -> None:
    """An undistilled dev: the client's loop over diffusers' transformer against its pipeline with true_cfg_scale."""
    edit(schnell / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    model = model_of(CheckpointSource(schnell, text_length=40))
    pipeline = FluxPipeline.from_pretrained(schnell)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size, steps = 96, 3
    side = size // model.vae_factor
    noise = torch.randn(1, 16, side, side, generator=generator)
    expected = pipeline(
        "a red circle",
        negative_prompt="a square",
        true_cfg_scale=3.5,
        height=size,
        width=size,
        num_inference_steps=steps,
        max_sequence_length=40,
        latents=FluxPipeline._pack_latents(noise, 1, 16, side, side),
        output_type="latent",
    ).images
    expected = FluxPipeline._unpack_latents(expected, size, size, pipeline.vae_scale_factor)

    def text(prompt: str) -> dict[str, np.ndarray]:
        embeds, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=40)
        return {"prompt_embeds": embeds.detach().numpy(), "pooled_embeds": pooled.detach().numpy()}

    @torch.no_grad()
    def evaluate(inputs: Any) -> np.ndarray:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        batch = len(given["latents"])
        assert "guidance" not in given
        velocity = pipeline.transformer(
            hidden_states=FluxPipeline._pack_latents(given["latents"], batch, 16, side, side),
            timestep=given["timestep"],
            pooled_projections=given["pooled_embeds"],
            encoder_hidden_states=given["prompt_embeds"],
            txt_ids=torch.zeros(40, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, side // 2, side // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(velocity, size, size, pipeline.vae_scale_factor).numpy()

    request = make_request(
        model, ["a red circle"], GenerateOptions(negative_prompt="a square", height=size, width=size)
    )
    sigmas = flow_sigmas(steps, model.schedule, side, side)
    denoise = guided(evaluate, model, request, sigmas, text("a red circle"), text("a square"))
    latents = sample_euler(denoise, noise.numpy(), sigmas, noise=None)
    np.testing.assert_allclose(latents, expected.detach().numpy(), rtol=0, atol=1e-4)
