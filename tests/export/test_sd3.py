"""Stable Diffusion 3.5's graphs compute what PyTorch's modules compute, in several batch sizes and resolutions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from exports import traced_once

from ditforge import manifest
from ditforge.client.sampling import flow_sigmas
from ditforge.engines.build import build
from ditforge.engines.verify import compare
from ditforge.errors import UserError
from ditforge.export import onnx_export, sd3 as family
from ditforge.export.calibration import calibrate, read_ranges
from ditforge.export.checkpoint import Checkpoint, open_checkpoint
from ditforge.export.network import Network
from ditforge.export.onnx_export import export_checkpoint, export_network
from ditforge.export.precision import parse_precision
from ditforge.manifest import Component, Manifest
from ditforge.triton_repo.repository import write_repository

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
    ("name", "t5", "join"), [("sd3", True, "join"), ("sd3", False, "join_clip"), ("sd3_turbo", False, "join_clip")]
)
@torch.no_grad()
def test_text_encoders(request: pytest.FixtureRequest, name: str, t5: bool, join: str, batch: int) -> None:
    stages = request.getfixturevalue(name)
    reference, tokens = pipeline(stages.checkpoint, t5), manifest.read(stages.onnx, "onnx").model.max_tokens
    zeros = tokens.get("t5", 256)
    prompts = PROMPTS[:batch]
    embeds, _, pooled, _ = reference.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros
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
    transformer = pipeline(stages.checkpoint, t5=name == "sd3").transformer
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


def test_what_a_client_must_know(sd3, sd3_turbo) -> None:
    medium, turbo = (manifest.read(stages.onnx, "onnx").model for stages in (sd3, sd3_turbo))
    assert medium.guidance == turbo.guidance == "classifier-free"
    assert (medium.default_steps, medium.default_guidance, medium.t5) == (40, 4.5, "optional")
    assert (turbo.default_steps, turbo.default_guidance, turbo.t5) == (4, 0.0, "absent")
    assert medium.max_tokens == {"clip_l": 33, "clip_g": 33, "t5": 48}
    assert turbo.max_tokens == {"clip_l": 33, "clip_g": 33}
    assert (medium.default_size, medium.max_size) == (96, 384)  # 24 patches are as far as the table goes
    assert (turbo.default_size, turbo.max_size, turbo.size_multiple) == (24, 80, 4)
    assert medium.skip_layers and medium.skip_layers.layers == (1,)
    assert turbo.skip_layers is None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    np.testing.assert_array_equal(flow_sigmas(28, medium.schedule, 12, 12), scheduler.sigmas.numpy())


# Left out: T5


@pytest.fixture
def no_tracing(sd3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are not traced again, but taken from the whole export."""

    def copied(network: Network, checkpoint: Checkpoint, folder: Path, *options: object) -> Component:
        component = manifest.read(sd3.onnx, "onnx").components[network.name]
        for name in component.files:
            shutil.copyfile(sd3.onnx / name, folder / name)
        return component

    monkeypatch.setattr(onnx_export, "export_network", copied)


def test_export_without_t5(sd3, tmp_path: Path, no_tracing: None) -> None:
    exported = export_checkpoint(sd3.checkpoint, tmp_path / "onnx", text_encoders="clip").manifest
    assert list(exported.components) == [
        "tokenizer", "clip_l", "clip_g", "join_clip", "dit", "vae_decoder", "vae_encoder",
    ]  # fmt: skip
    assert exported.model.t5 == "absent"
    assert exported.model.max_tokens == {"clip_l": 33, "clip_g": 33}
    assert set(exported.components["tokenizer"].outputs) == {"clip_l_ids", "clip_g_ids", "prompt_tokens"}
    build(tmp_path / "onnx", tmp_path / "engines", "cpu")
    write_repository(tmp_path / "engines", tmp_path / "repo")
    assert not list((tmp_path / "repo").glob("t5*"))
    assert not (tmp_path / "repo" / "text_encoders_clip").exists()
    assert export_checkpoint(sd3.checkpoint, tmp_path / "onnx", text_encoders="clip").fresh
    assert not export_checkpoint(sd3.checkpoint, tmp_path / "onnx").fresh
    assert "t5" in manifest.read(tmp_path / "onnx", "onnx").components


def test_flux_needs_t5(random_schnell: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="random-schnell cannot do without T5"):
        export_checkpoint(random_schnell, tmp_path / "onnx", text_encoders="clip")
    with pytest.raises(UserError, match=r"unknown text encoders 't5'(?s:.*)all or clip"):
        export_checkpoint(random_schnell, tmp_path / "onnx", text_encoders="t5")
    assert not list(tmp_path.iterdir())


# 8 bits


@pytest.fixture(scope="module")
def quantised(sd3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The DiT alone, fp32 around 8 bits, by its precision."""
    opened, out = open_checkpoint(sd3.checkpoint), tmp_path_factory.mktemp("quantised")
    calibrate(sd3.checkpoint, out / "ranges.json", ["a red circle"], steps=4)
    with traced_once():
        for name in ("fp8", "int8-weights"):
            precision = parse_precision(name, "fp32")
            network = next(n for n in family.networks(opened, precision) if n.name == "dit")
            (out / name).mkdir()
            ranges = read_ranges(out / "ranges.json" if name == "fp8" else None, opened, precision)
            component = export_network(network, opened, out / name, name, ranges)
            components = {"dit": component}
            manifest.write(Manifest(kind="onnx", model=family.model(opened), components=components), out / name)
    return {name: out / name for name in ("fp8", "int8-weights")}


@pytest.mark.parametrize(("name", "tolerance"), [("fp8", 0.12), ("int8-weights", 0.03)])
def test_8_bits(sd3, quantised: dict[str, Path], name: str, tolerance: float) -> None:
    transformer = pipeline(sd3.checkpoint, t5=True).transformer
    linears = {key for key, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    intended = {f"{key}.weight" for key in linears if key.startswith("transformer_blocks") and ".norm" not in key}
    assert len(intended) == 4 * 12 - 3 + 2 * 4  # the last block writes no text; two have a second attention
    component = manifest.read(quantised[name], "onnx").components["dit"]
    assert component.layers == dict.fromkeys(component.layers, name)
    assert set(component.layers) == intended
    (row,) = (row for row in compare(quantised[name], sd3.onnx) if row.component == "dit")
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
            {"num_layers": 5},
            r"transformer_blocks\.3\.norm1_context\.linear\.weight has shape \[120, 60\]",
        ),
        ("transformer/config.json", {"pos_embed_max_size": 30}, r"pos_embed\.pos_embed has shape \[1, 576, 60\]"),
        ("text_encoder_2/config.json", {"projection_dim": 45}, r"text_projection\.weight has shape"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "scheduler is DDIMScheduler"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusion3Pipeline"),
    ],
)
def test_what_does_not_fit_is_said(sd3, tmp_path: Path, file: str, changes: dict[str, object], problem: str) -> None:
    checkpoint = damaged(sd3.checkpoint, tmp_path / "checkpoint", file, **changes)
    with pytest.raises(UserError, match=rf"(?s){problem}"):
        export_checkpoint(checkpoint, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_missing_text_encoder_is_said(sd3, tmp_path: Path) -> None:
    shutil.copytree(sd3.checkpoint, tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint" / "text_encoder_3")
    with pytest.raises(UserError, match="text_encoder_3"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "onnx")


# GPUs


@pytest.mark.parametrize(
    ("gpu", "base", "names"),
    [("sm_75", "fp16", ("join", "dit")), ("sm_80,sm_86,sm_89,sm_120", "bf16", ("clip_g", "join_clip", "dit"))],
)
def test_tensorrt_rtx_compiles_it_for_every_capability(
    sd3, tmp_path: Path, gpu: str, base: str, names: tuple[str, ...]
) -> None:
    """What is new here; T5 and the VAE are the other family's."""
    pytest.importorskip("tensorrt_rtx")
    opened, precision, folder = open_checkpoint(sd3.checkpoint), parse_precision(base), tmp_path / "onnx"
    folder.mkdir()
    networks = [n for n in family.networks(opened, precision) if n.name in names]
    components = {"tokenizer": onnx_export.export_tokenizers(family.read_tokenizers(opened), folder)}
    components |= {network.name: export_network(network, opened, folder) for network in networks}
    for network in networks:
        graph = onnx.load(folder / f"{network.name}.onnx", load_external_data=False).graph
        weights = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1 and tensor.dims[0] > 4}
        assert weights <= {onnx.TensorProto.BFLOAT16 if base == "bf16" else onnx.TensorProto.FLOAT16}
    manifest.write(Manifest(kind="onnx", model=family.model(opened), components=components), folder)
    for row in compare(folder, sd3.onnx):
        assert row.relative < (0.05 if base == "bf16" else 0.01), row
    built = build(folder, tmp_path / "engines", gpu)
    assert set(built.rebuilt) == set(names)
    assert {engine.compiler for engine in built.manifest.engines.values()} == {"tensorrt-rtx"}
