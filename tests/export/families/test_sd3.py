"""Stable Diffusion 3.5's graphs compute what PyTorch's modules compute, in several batch sizes and resolutions."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import random_sd3
import single_files
import torch
from calibrations import assert_same
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from onnx import TensorProto
from safetensors.torch import save_file

from ditforge import manifest
from ditforge.client.schedules import flow_sigmas
from ditforge.engines.verify import compare
from ditforge.errors import UserError
from ditforge.export.checkpoint.consistency import check_weights
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.families import read_networks
from ditforge.export.onnx_export import export_checkpoint
from ditforge.export.quantisation.calibration import calibrate
from ditforge.export.quantisation.precision import parse_precision

PROMPTS = ["a large red circle", "", "small green square above a blue one"]
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@cache
def pipeline(checkpoint: Path, t5: bool) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(checkpoint, dtype=torch.float32, **({} if t5 else WITHOUT_T5))


def run(folder: Path, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(folder / f"{component}.onnx", providers=["CPUExecutionProvider"])
    taken = {port.name: inputs[port.name] for port in session.get_inputs()}
    return dict(zip([port.name for port in session.get_outputs()], session.run(None, taken), strict=True))


def assert_equal(actual: np.ndarray, expected: torch.Tensor) -> None:
    assert actual.shape == tuple(expected.shape)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "sd3_turbo"])
def test_graphs_are_valid(request: pytest.FixtureRequest, name: str) -> None:
    folder = request.getfixturevalue(name).onnx
    graphs = list(folder.glob("*.onnx"))
    assert {graph.stem for graph in graphs} == set(manifest.read(folder, "onnx").components) - {"tokenizer"}
    for graph in graphs:
        onnx.checker.check_model(graph, full_check=True)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "t5", "join"),
    [
        ("sd3", True, "join"),
        ("sd3", False, "join_clip"),
        ("sd3_turbo", True, "join"),
        ("sd3_turbo", False, "join_clip"),
    ],
)
@torch.no_grad()
def test_text_encoders(request: pytest.FixtureRequest, name: str, t5: bool, join: str, batch: int) -> None:
    stages = request.getfixturevalue(name)
    reference, tokens = pipeline(stages.checkpoint, t5), manifest.read(stages.onnx, "onnx").model.max_tokens
    prompts = PROMPTS[:batch]
    embeds, _, pooled, _ = reference.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens["t5"]
    )
    tokenizers = {"clip_l": reference.tokenizer, "clip_g": reference.tokenizer_2, "t5": reference.tokenizer_3}
    tensors: dict[str, np.ndarray] = {}
    for encoder in ("clip_l", "clip_g", "t5") if t5 else ("clip_l", "clip_g"):
        options = {"padding": "max_length", "truncation": True, "max_length": tokens[encoder], "return_tensors": "np"}
        ids = tokenizers[encoder](prompts, **options).input_ids.astype(np.int32)
        tensors |= run(stages.onnx, encoder, {f"{encoder}_ids": ids})
    joined = run(stages.onnx, join, tensors)
    assert_equal(joined["prompt_embeds"], embeds)
    assert_equal(joined["pooled_embeds"], pooled)


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 4, 4), (3, 6, 10), (2, 20, 1)])
@pytest.mark.parametrize("name", ["sd3", "sd3_turbo"])
@torch.no_grad()
def test_dit(request: pytest.FixtureRequest, name: str, batch: int, rows: int, columns: int) -> None:
    """Each sample with a noise level of its own, and without blocks of its own; up to the end of the position table."""
    stages = request.getfixturevalue(name)
    transformer = pipeline(stages.checkpoint, t5=True).transformer
    described = manifest.read(stages.onnx, "onnx").components["dit"].inputs
    generator = torch.Generator().manual_seed(batch)
    inputs = {
        "latents": torch.randn(batch, 16, 2 * rows, 2 * columns, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "prompt_embeds": torch.randn(batch, *described["prompt_embeds"].shape[1:], generator=generator),
        "pooled_embeds": torch.randn(batch, *described["pooled_embeds"].shape[1:], generator=generator),
    }
    assert ("skip_layers" in described) == (name == "sd3")
    blocks = len(transformer.transformer_blocks)
    inputs["skip_layers"] = (torch.rand(batch, blocks, generator=generator) > 0.6).float()
    if name == "sd3":
        assert described["skip_layers"].shape[1] == blocks
        inputs["skip_layers"][0] = 0
    else:
        inputs["skip_layers"][:] = 0
    expected = [
        transformer(
            hidden_states=inputs["latents"][[i]],
            timestep=inputs["timestep"][[i]] * 1000,
            encoder_hidden_states=inputs["prompt_embeds"][[i]],
            pooled_projections=inputs["pooled_embeds"][[i]],
            skip_layers=inputs["skip_layers"][i].nonzero().flatten().tolist(),
        ).sample
        for i in range(batch)
    ]
    velocity = run(stages.onnx, "dit", {key: value.numpy() for key, value in inputs.items()})["velocity"]
    assert_equal(velocity, torch.cat(expected))


def test_norms_and_attention_are_an_operator_each(sd3) -> None:
    """And leaving out blocks costs no operation on tokens."""
    nodes = onnx.load(sd3.onnx / "dit.onnx", load_external_data=False).graph.node
    found = Counter(node.op_type for node in nodes)
    blocks, second = 6, 2
    assert found["Attention"] == blocks + second
    assert found["RMSNormalization"] == 4 * blocks + 2 * second  # query and key of image and text, and of the second
    assert found["LayerNormalization"] == 4 * blocks - 1 + 1  # the last block ends with the image's; and the final one
    assert not found.keys() & {"Softmax", "ReduceMean", "Pow", "Where", "Einsum"}
    assert len(nodes) < 110 * blocks


def test_what_a_client_must_know(sd3, sd3_turbo) -> None:
    medium, turbo = (manifest.read(stages.onnx, "onnx").model for stages in (sd3, sd3_turbo))
    assert medium.guidance == turbo.guidance == "classifier-free"
    assert (medium.default_steps, medium.default_guidance, medium.t5) == (40, 4.5, "optional")
    assert (turbo.default_steps, turbo.default_guidance, turbo.t5) == (4, 1.0, "optional")
    assert medium.max_tokens == {"clip_l": 24, "clip_g": 24, "t5": 64}
    assert turbo.max_tokens == {"clip_l": 33, "clip_g": 33, "t5": 48}
    assert (medium.default_size, medium.max_size) == (128, 384)  # 24 patches are as far as the table goes
    assert (turbo.default_size, turbo.max_size, turbo.size_multiple) == (24, 80, 4)
    assert medium.skip_layers and medium.skip_layers.layers == (1, 2)
    assert turbo.skip_layers is None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    np.testing.assert_array_equal(flow_sigmas(28, medium.schedule, 12, 12), scheduler.sigmas.numpy())


# Left out: T5


def test_export_without_t5(sd3_turbo, sd3_clip, tmp_path: Path) -> None:
    """Whose files need not be there. There are as many zeros as diffusers' pipeline takes by default."""
    exported = manifest.read(sd3_clip.onnx, "onnx")
    assert list(exported.components) == [
        "tokenizer", "clip_l", "clip_g", "join_clip", "dit", "vae_decoder", "vae_encoder",
    ]  # fmt: skip
    assert exported.model.t5 == "absent"
    assert exported.model.max_tokens == {"clip_l": 33, "clip_g": 33}
    assert exported.components["dit"].inputs["prompt_embeds"].shape[1:] == (33 + 256, random_sd3.T5_WIDTH)
    assert set(exported.components["tokenizer"].outputs) == {"clip_l_ids", "clip_g_ids", "prompt_tokens"}
    assert not list(sd3_clip.repository.glob("t5*"))
    assert not (sd3_clip.repository / "text_encoders_clip").exists()
    shutil.copytree(sd3_clip.onnx, tmp_path / "onnx")
    assert export_checkpoint(CheckpointSource(sd3_clip.checkpoint, text_encoders="clip"), tmp_path / "onnx").fresh
    with pytest.raises(UserError, match=r"lacks text_encoder_3 and tokenizer_3(?s:.*)text_encoders=.clip"):
        export_checkpoint(CheckpointSource(sd3_clip.checkpoint), tmp_path / "onnx")
    assert not export_checkpoint(CheckpointSource(sd3_turbo.checkpoint), tmp_path / "onnx").fresh
    assert "t5" in manifest.read(tmp_path / "onnx", "onnx").components


def test_a_checkpoint_that_comes_without_t5(sd3_clip, tmp_path: Path) -> None:
    """Its index says so, and the export is the same."""
    opened = open_checkpoint(random_sd3.save_large_turbo(tmp_path))
    model, tokenizers, networks = read_networks(opened, parse_precision("fp32"))
    asked = manifest.read(sd3_clip.onnx, "onnx")
    assert model == asked.model
    assert {tokenizer.name: tokenizer.max_tokens for tokenizer in tokenizers} == model.max_tokens
    for network in networks:
        described = asked.components[network.name]
        assert {name: port.names() for name, port in network.inputs.items()} == {
            name: tensor.shape for name, tensor in described.inputs.items()
        }


def test_a_single_file_on_a_base_without_t5(sd3_clip, tmp_path: Path) -> None:
    pipeline, base = random_sd3.large(seed=7, with_t5=True), sd3_clip.checkpoint
    tensors = single_files.sd3_dit(pipeline.transformer.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "sd3_turbo.safetensors")
    linear = "transformer_blocks.0.attn.to_q"
    down, up = torch.ones(1, 56), torch.ones(56, 1)
    save_file({f"{linear}.lora_A.weight": down, f"{linear}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="text_encoder_3, tokenizer_3 missing"):
        open_files(CheckpointSource(tmp_path / "sd3_turbo.safetensors", base))
    loras = ((tmp_path / "lora.safetensors", 1.0),)
    opened = open_files(CheckpointSource(tmp_path / "sd3_turbo.safetensors", base, loras, text_encoders="clip"))
    for network in read_networks(opened, parse_precision("fp32"))[2]:
        check_weights(network, opened.weights(network.weights))
    assert torch.equal(
        opened.weights("transformer").read(f"{linear}.weight"),
        pipeline.transformer.state_dict()[f"{linear}.weight"] + up @ down,
    )


def test_calibration_without_t5(sd3_clip, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks text_encoder_3"):
        calibrate(CheckpointSource(sd3_clip.checkpoint), tmp_path / "ranges.json", ["a"], 1)
    whole = random_sd3.save_large_turbo(tmp_path)
    ranges = calibrate(CheckpointSource(sd3_clip.checkpoint, text_encoders="clip"), tmp_path / "ranges.json", ["a"], 1)
    assert_same(ranges, calibrate(CheckpointSource(whole), tmp_path / "ranges.json", ["a"], 1))


def test_flux_needs_t5(random_schnell: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="random-schnell cannot do without T5"):
        export_checkpoint(CheckpointSource(random_schnell, text_encoders="clip"), tmp_path / "onnx")
    with pytest.raises(UserError, match=r"unknown text encoders 't5'(?s:.*)all, clip"):
        export_checkpoint(CheckpointSource(random_schnell, text_encoders="t5"), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


# Precisions


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_16_bits(sd3, sd3_exports, base: str) -> None:
    """Every network of its own; bf16 as its fp32 twin, whose weights, stored in bf16, are the same."""
    folder, dtype = sd3_exports(base, base), {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[base]
    for graph in folder.glob("*.onnx"):
        initializers = onnx.load(graph, load_external_data=False).graph.initializer
        assert {tensor.data_type for tensor in initializers if len(tensor.dims) > 1 and tensor.dims[0] > 4} <= {dtype}
    rows = compare(folder, sd3.onnx)
    assert {row.component for row in rows} == set(manifest.read(folder, "onnx").components) - {"tokenizer"}
    assert max(row.relative for row in rows) < 0.01, rows


@pytest.mark.parametrize(("name", "tolerance"), [("fp8", 0.06), ("fp8-weights", 0.04), ("int8-weights", 0.015)])
def test_8_bits(sd3, sd3_exports, name: str, tolerance: float) -> None:
    transformer = pipeline(sd3.checkpoint, t5=True).transformer
    linears = {key for key, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    intended = {f"{key}.weight" for key in linears if key.startswith("transformer_blocks") and ".norm" not in key}
    assert len(intended) == 6 * 12 - 3 + 2 * 4  # the last block writes no text; two have a second attention
    component = manifest.read(sd3_exports(name, "bf16"), "onnx").components["dit"]
    assert component.layers == dict.fromkeys(component.layers, name)
    assert set(component.layers) == intended
    (row,) = (row for row in compare(sd3_exports(name, "bf16"), sd3.onnx) if row.component == "dit")
    assert 1e-4 < row.relative < tolerance


# Checkpoints that cannot be exported


def damaged(checkpoint: Path, out: Path, file: str, **changes: object) -> Path:
    """A copy whose configuration `file` has other values."""
    shutil.copytree(checkpoint, out)
    config = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps(config | changes))
    return out


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        (
            "transformer/config.json",
            {"num_layers": 7},
            r"transformer_blocks\.5\.norm1_context\.linear\.weight has shape \[320, 160\]",
        ),
        ("transformer/config.json", {"pos_embed_max_size": 30}, r"pos_embed\.pos_embed has shape \[1, 576, 160\]"),
        ("text_encoder_2/config.json", {"projection_dim": 45}, r"text_projection\.weight has shape"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "scheduler is DDIMScheduler"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusion3Pipeline"),
    ],
)
def test_what_does_not_fit_is_said(sd3, tmp_path: Path, file: str, changes: dict[str, object], problem: str) -> None:
    checkpoint = damaged(sd3.checkpoint, tmp_path / "checkpoint", file, **changes)
    with pytest.raises(UserError, match=rf"(?s){problem}"):
        export_checkpoint(CheckpointSource(checkpoint), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_missing_text_encoder_is_said(sd3, tmp_path: Path) -> None:
    shutil.copytree(sd3.checkpoint, tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint" / "text_encoder_3")
    with pytest.raises(UserError, match="text_encoder_3"):
        export_checkpoint(CheckpointSource(tmp_path / "checkpoint"), tmp_path / "onnx")
