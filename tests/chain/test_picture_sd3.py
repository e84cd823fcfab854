"""The whole chain against stock diffusers, for the family with classifier-free guidance: the same pictures."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import assert_error, ditforge, settled_calls
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from ditforge import manifest
from ditforge.client import AsyncClient, Client
from ditforge.client.picture_file import read_info, read_parameters
from ditforge.client.samplers import SAMPLERS
from ditforge.errors import DitforgeWarning, UserError
from ditforge.triton_repo.config import tensorrt_model

PROMPT, NEGATIVE = "a large red circle above a small blue square", "green, 3 triangles"
STEPS = 12
LARGEST_DIFFERENCE = 2  # of 255, at every pixel


@cache
def reference(checkpoint: Path, t5: bool) -> StableDiffusion3Pipeline:
    """Stock diffusers on the CPU in fp32, with or without T5."""
    without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(checkpoint, dtype=torch.float32, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_picture(checkpoint: Path, t5: bool, prompt: str, height: int, width: int, **options: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(3)
    if "max_sequence_length" not in options:
        options["max_sequence_length"] = reference(checkpoint, True).tokenizer_3.model_max_length
    options = {"num_inference_steps": STEPS, "generator": generator, **options}
    return np.asarray(reference(checkpoint, t5)(prompt, height=height, width=width, **options).images[0], np.int16)


def picture(client: Client, prompt: str = PROMPT, height: int = 96, width: int = 96, **options: Any) -> np.ndarray:
    return np.asarray(client.generate(prompt, seed=3, steps=STEPS, height=height, width=width, **options), np.int16)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 5, "a picture of one colour would prove nothing"
    assert np.abs(ours - theirs).max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 160), (384, 16)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"guidance": 1.0}, {"guidance_scale": 1.0}),
        ({}, {"guidance_scale": 4.5}),
        ({"guidance": 7.0, "negative_prompt": NEGATIVE}, {"guidance_scale": 7.0, "negative_prompt": NEGATIVE}),
        (
            {"guidance": 3.0, "negative_prompt": NEGATIVE, "skip_layer_guidance": 2.8},
            {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, "skip_guidance_layers": [1, 2]},
        ),
        ({"guidance": 7.0, "t5": "never"}, {"guidance_scale": 7.0, "t5": False}),
    ],
    ids=["no guidance", "guidance by default", "negative prompt", "skip-layer guidance", "without T5"],
)
def test_the_same_picture(sd3, sd3_server, height: int, width: int, ours: Any, theirs: Any) -> None:
    with Client(sd3_server.url) as client:
        picture_here = picture(client, height=height, width=width, **ours)
    t5, options = theirs.get("t5", True), {key: value for key, value in theirs.items() if key != "t5"}
    assert_same(picture_here, diffusers_picture(sd3.checkpoint, t5, PROMPT, height, width, **options))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_an_export_without_t5(sd3_clip, sd3_clip_server, guidance: float) -> None:
    with Client(sd3_clip_server.url) as client:
        ours = picture(client, height=48, width=80, guidance=guidance)
    options = {"guidance_scale": guidance, "max_sequence_length": 256}  # diffusers' default, of zeros
    assert_same(ours, diffusers_picture(sd3_clip.checkpoint, False, PROMPT, 48, 80, **options))


@pytest.mark.parametrize("t5", ["always", "never"])
@pytest.mark.parametrize("guidance", [None, 5.0])
def test_a_checkpoint_of_other_sizes(sd3_turbo, sd3_turbo_server, guidance: float | None, t5: str) -> None:
    """By default, turbo takes no guidance; it can have it all the same."""
    with Client(sd3_turbo_server.url) as client:
        assert (client.model.default_steps, client.model.default_guidance, client.model.vae_factor) == (4, 1.0, 2)
        ours = picture(client, height=80, width=48, guidance=guidance, negative_prompt=NEGATIVE, t5=t5)
        options = {"guidance_scale": guidance or 0.0, "negative_prompt": NEGATIVE}
        assert_same(ours, diffusers_picture(sd3_turbo.checkpoint, t5 == "always", PROMPT, 80, 48, **options))


def test_every_option_changes_the_picture(sd3_server) -> None:
    with Client(sd3_server.url) as client:
        options: list[dict[str, Any]] = [
            {},
            {"guidance": 1.0},
            {"guidance": 9.0},
            {"negative_prompt": NEGATIVE},
            {"skip_layer_guidance": 6.0},
            {"t5": "never"},
        ]
        pictures = [picture(client, **each) for each in options]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b).max() > 2 * LARGEST_DIFFERENCE


def test_one_call_of_the_dit_an_evaluation(sd3_server) -> None:
    """Also with guidance, and with skip-layer guidance on top."""
    with Client(sd3_server.url) as client:
        for options in ({"guidance": 1.0}, {}, {"skip_layer_guidance": 2.8}):
            before = settled_calls(sd3_server.url)
            picture(client, **options)
            assert settled_calls(sd3_server.url) - before == STEPS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_is_what_its_pictures_are_alone(sd3_server, sampler: str) -> None:
    """With T5 for some and not for others, and in parts: three parts of four are more than the server takes at once."""
    prompts = ["a red circle", PROMPT, "a red circle", 'a sign that says "a"']
    options: Any = {"steps": 10, "sampler": sampler, "t5": "auto", "skip_layer_guidance": 2.8, "height": 32}
    with Client(sd3_server.url) as client:
        together = client.generate(prompts, seed=5, width=48, **options)
        assert [read_info(image)["t5"] for image in together] == ["never", "always", "never", "always"]
        for i, prompt in enumerate(prompts):
            alone = client.generate(prompt, seed=5 + i, width=48, **options)
            assert np.abs(np.asarray(alone, np.int16) - np.asarray(together[i], np.int16)).max() <= 1


def test_the_picture_says_how_to_make_it_again(sd3_server, tmp_path: Path) -> None:
    options = ["--negative-prompt", NEGATIVE, "--skip-layer-guidance", "2.8", "--t5", "auto", "--guidance", "3"]
    args = ["generate", "a red circle", "--url", sd3_server.url, "--steps", "10", "--seed", "1", *options]
    made = ditforge(*args, "--out", "a.png", cwd=tmp_path)
    assert (made.code, made.out) == (0, "a.png\n"), made.err
    shown = ditforge("inspect", "a.png", cwd=tmp_path).out
    for key, value in {"negative_prompt": NEGATIVE, "skip_layer_guidance": "2.8", "guidance": "3.0"}.items():
        assert any(key in line and value in line for line in shown.splitlines()), shown
    parameters = read_parameters(tmp_path / "a.png")
    assert parameters["t5"] == "never"  # the prompt decides for both
    assert parameters.pop("model") == "sd35-tiny"
    with Client(sd3_server.url) as client, Image.open(tmp_path / "a.png") as first:
        again = client.generate(parameters.pop("prompt"), **parameters)
        assert np.abs(np.asarray(again, np.int16) - np.asarray(first, np.int16)).max() <= 1
        assert f"Negative prompt: {NEGATIVE}" in first.info["parameters"]


def test_wrong_options_are_refused(
    sd3_server, sd3_clip_server, sd3_turbo_server, schnell_server, tmp_path: Path
) -> None:
    def ask(url: str, *options: str) -> Any:
        return ditforge("generate", "a", "--url", url, "--steps", "1", *options, cwd=tmp_path)

    assert_error(ask(sd3_server.url, "--true-cfg", "3"), "classifier-free guidance already", "--guidance 3")
    assert_error(ask(sd3_server.url, "--t5", "perhaps"), "auto, always, never", "perhaps")
    assert_error(ask(sd3_turbo_server.url, "--skip-layer-guidance", "2"), "random-sd3-turbo has no skip-layer guidance")
    assert_error(ask(sd3_clip_server.url, "--t5", "always"), "without T5", "--text-encoders all")
    assert_error(ask(schnell_server.url, "--t5", "never"), "cannot do without T5")
    assert_error(ask(sd3_server.url, "--guidance", "1", "--skip-layer-guidance", "2"), "--guidance 4.5")
    assert list(tmp_path.iterdir()) == []


def test_async_takes_them_too(sd3_server) -> None:
    options: Any = {"negative_prompt": NEGATIVE, "t5": "never"}

    async def main() -> Any:
        async with AsyncClient(sd3_server.url) as client:
            return await client.generate(PROMPT, seed=3, steps=STEPS, height=96, width=96, **options)

    with Client(sd3_server.url) as client:
        ours = picture(client, **options)
    assert np.abs(np.asarray(asyncio.run(main()), np.int16) - ours).max() <= 1


def test_two_ways_through_the_text_encoders(sd3, sd3_clip) -> None:
    def steps(repository: Path, name: str) -> list[str]:
        text = (repository / name / "config.pbtxt").read_text()
        config = text_format.Parse(text, pb.ModelConfig())
        assert [tensor.name for tensor in config.input] == ["prompt"]
        assert {tensor.name for tensor in config.output} == {"prompt_embeds", "pooled_embeds", "prompt_tokens"}
        return [step.model_name for step in config.ensemble_scheduling.step]

    assert steps(sd3.repository, "text_encoders") == ["tokenizer", "clip_l", "clip_g", "t5", "join"]
    assert steps(sd3.repository, "text_encoders_clip") == ["tokenizer", "clip_l", "clip_g", "join_clip"]
    assert steps(sd3_clip.repository, "text_encoders") == ["tokenizer", "clip_l", "clip_g", "join_clip"]


def test_tensorrts_graphs_are_for_pairs(sd3) -> None:
    """A step with guidance is a batch of two, so that is what Triton's TensorRT backend captures too."""
    source = manifest.read(sd3.onnx, "onnx")
    model = source.model.model_copy(update={"sizes": ((96, 96), (64, 128))})

    def batches(name: str, max_batch: int) -> list[int]:
        config = tensorrt_model(name, source.components[name], max_batch, {}, "a.plan", model)
        warm = [warmup.batch_size for warmup in config.model_warmup]
        assert warm == [spec.batch_size for spec in config.optimization.cuda.graph_spec]
        assert len({warmup.name for warmup in config.model_warmup}) == len(warm)
        return warm

    assert batches("dit", 4) == [1, 2, 1, 2]
    assert batches("dit", 1) == batches("vae_decoder", 4) == [1, 1]


# FLUX.1 with a negative prompt


def flux_picture(checkpoint: Path, tokens: int, guidance: float, **options: Any) -> np.ndarray:
    pipeline = FluxPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 96, "width": 96, "num_inference_steps": 6, "max_sequence_length": tokens, **options}
    generator = torch.Generator("cpu").manual_seed(3)
    return np.asarray(pipeline(PROMPT, guidance_scale=guidance, generator=generator, **options).images[0], np.int16)


@pytest.mark.parametrize("model", ["schnell", "tiny"])
def test_true_classifier_free_guidance(request: pytest.FixtureRequest, model: str) -> None:
    stages, server = request.getfixturevalue(model), request.getfixturevalue(f"{model}_server")
    with Client(server.url) as client:
        guidance = client.model.default_guidance
        options: Any = {"seed": 3, "steps": 6, "height": 96, "width": 96}
        off = np.asarray(client.generate(PROMPT, **options), np.int16)
        image = client.generate(PROMPT, negative_prompt=NEGATIVE, true_cfg=3.0, **options)
        ours, tokens = np.asarray(image, np.int16), client.model.max_tokens["t5"]
        assert read_info(image)["true_cfg"] == 3.0
        with pytest.warns(DitforgeWarning, match=r"ignored without true_cfg=4"):
            ignored = client.generate(PROMPT, negative_prompt=NEGATIVE, **options)
        assert np.abs(np.asarray(ignored, np.int16) - off).max() <= 1
        with pytest.raises(UserError, match="true_cfg must be"):
            client.generate(PROMPT, true_cfg=-1, **options)
    assert np.abs(ours - off).max() > 2 * LARGEST_DIFFERENCE
    assert_same(ours, flux_picture(stages.checkpoint, tokens, guidance, negative_prompt=NEGATIVE, true_cfg_scale=3.0))
