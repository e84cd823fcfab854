"""What `ditforge inspect FILE` says of files as people have them; the names are written down in tests/support."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import random_flux
import random_sd3
import single_files
import torch
from command_line import PATIENCE
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file

from ditforge.commands.inspect import say
from ditforge.contents import look_into
from ditforge.errors import UserError
from ditforge.export.checkpoint.description import TensorFile
from ditforge.export.checkpoint.diffusers_folder import CONFIGS
from ditforge.export.checkpoint.layout import layouts
from ditforge.export.checkpoint.layouts import open_single_file

COMFY = "model.diffusion_model."


def write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata)
    return file


def described(file: Path) -> TensorFile:
    found = look_into(file)
    assert isinstance(found, TensorFile)
    return found


@pytest.fixture(scope="module")
def schnell() -> DiffusionPipeline:
    return random_flux.schnell()


@pytest.fixture(scope="module")
def large() -> DiffusionPipeline:
    return random_sd3.large(with_t5=True)


def published_dit(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a published DiT as its authors write them, without values."""
    config = json.loads((CONFIGS / name / "transformer" / "config.json").read_text())
    classes = {cls.__name__: cls for cls in (FluxTransformer2DModel, SD3Transformer2DModel)}
    with torch.device("meta"):
        dit = classes[config["_class_name"]].from_config(config).to(torch.bfloat16)
    written = single_files.flux_dit if "flux" in name else single_files.sd3_dit
    return single_files.prefixed(prefix, written(dit.to("meta").state_dict()))


@pytest.mark.parametrize(
    ("name", "prefix", "variant", "missing"),
    [
        ("flux.1-dev", "", "FLUX.1-dev", "text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae"),
        ("flux.1-dev", COMFY, "FLUX.1-dev", "text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae"),
        ("sd3.5-medium", COMFY, "Stable Diffusion 3.5 medium", "text_encoder, text_encoder_2, text_encoder_3"),
    ],
)
def test_a_dit_of_the_published_size(name: str, prefix: str, variant: str, missing: str, tmp_path: Path) -> None:
    single_files.write_holes(published_dit(name, prefix), tmp_path / "dit.safetensors")
    found = described(tmp_path / "dit.safetensors")
    assert (found.kind, found.variant, found.problem) == ("checkpoint file", variant, "")
    assert found.size > 4e9 and [part.name for part in found.parts] == ["transformer"]
    assert found.dtypes == {"BF16": 2 * found.parameters}
    assert "--base FOLDER" in found.export and missing in found.export
    assert (prefix in found.layout) and not found.ignored


@pytest.mark.parametrize(("name", "choices"), [("flux.1-schnell", "schnell dev"), ("sd3.5-large", "large large-turbo")])
def test_what_leaves_the_model_open_says_so(name: str, choices: str, tmp_path: Path) -> None:
    single_files.write_holes(published_dit(name), tmp_path / "dit.safetensors")
    found = described(tmp_path / "dit.safetensors")
    assert " or " in found.variant and "nothing in its files says" in found.problem
    assert all(f"--variant {choice}" in found.fix or f'"{choice}"' in found.fix for choice in choices.split())


@pytest.mark.parametrize("name", ["flux.1-dev", "flux.1-schnell", "sd3.5-medium", "sd3.5-large"])
def test_the_names_of_a_layout_are_those_that_are_written(name: str) -> None:
    written = published_dit(name)
    (layout,) = [layout for layout in layouts() if layout.key in written]
    assert sorted(layout.names(layout.config(written))) == sorted(written)


def test_what_a_dit_lacks_or_has_beside_others(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = single_files.flux_dit(schnell.transformer.state_dict())
    metadata = {"modelspec.architecture": "flux-1-schnell"}
    more = {**tensors, "single_blocks.0.lora.weight": torch.zeros(2, 2), "scaled_fp8": torch.zeros(2)}
    del tensors["single_blocks.1.linear2.bias"]
    for each, said in (
        (tensors, "lacks single_blocks.1.linear2.bias"),
        (more, "has single_blocks.0.lora.weight, which"),
    ):
        found = described(write(tmp_path / "a.safetensors", each, metadata))
        assert said in found.problem and not found.export and found.variant
        with pytest.raises(UserError):
            open_single_file(tmp_path / "a.safetensors")


def test_the_metadata_tell_the_model(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = single_files.flux_dit(schnell.transformer.state_dict())
    found = described(write(tmp_path / "a.safetensors", tensors, {"modelspec.architecture": "flux-1-schnell"}))
    assert (found.variant, found.problem) == ("FLUX.1-schnell", "")


def all_in_one(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    tensors = single_files.prefixed(COMFY, single_files.sd3_dit(pipeline.transformer.state_dict()))
    tensors |= single_files.prefixed("first_stage_model.", single_files.autoencoder(pipeline.vae.state_dict()))
    for name, folder in {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}.items():
        state = getattr(pipeline, folder).state_dict()
        state = single_files.text_model(state) if "clip" in name else state
        tensors |= single_files.prefixed(f"text_encoders.{name}.transformer.", state)
    return tensors


def test_an_all_in_one_file(large: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = {
        **all_in_one(large),
        "text_encoders.clip_l.logit_scale": torch.tensor(1.0),
        "model_ema.decay": torch.tensor(1.0),
        "mystery.weight": torch.zeros(2, 2),
    }
    metadata = {"modelspec.title": "stable-diffusion-3.5-large-turbo"}
    found = described(write(tmp_path / "all.safetensors", tensors, metadata))
    assert found.variant == "Stable Diffusion 3.5 large-turbo"
    names = [part.name for part in found.parts]
    assert names == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
    assert sum(part.tensors for part in found.parts) == len(tensors) - 3
    assert any(one.startswith("mystery.weight: no component") for one in found.ignored)
    assert any("logit_scale" in one and "training" in one for one in found.ignored)
    assert "a diffusers folder with tokenizer, tokenizer_2, tokenizer_3" in found.export


def test_a_component_alone(schnell: DiffusionPipeline, large: DiffusionPipeline, tmp_path: Path) -> None:
    cases: dict[str, dict[str, torch.Tensor]] = {
        "t5xxl": schnell.text_encoder_2.state_dict(),
        "clip": single_files.text_model(large.text_encoder.state_dict()),
        "vae": single_files.autoencoder(schnell.vae.state_dict()),
    }
    own = {"clip": schnell.text_encoder.state_dict(), "vae": schnell.vae.state_dict()}
    for name, state in [*cases.items(), *own.items()]:
        found = described(write(tmp_path / f"{name}.safetensors", state))
        assert (found.kind, [part.name for part in found.parts]) == ("checkpoint file", [name])
        assert "--base FOLDER" in found.export and not found.problem


def test_gguf(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "dit.gguf", "flux")
    for name, tensor in single_files.flux_dit(schnell.transformer.state_dict()).items():
        values = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 and values.shape[1] % 32 == 0 else None
        kind = kind or gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = described(tmp_path / "dit.gguf")
    assert (found.format, found.family) == ("GGUF", "FLUX.1")
    assert set(found.dtypes) == {"Q8_0", "F32"} and found.metadata["general.architecture"] == "flux"
    assert 0.9 * found.size < sum(found.dtypes.values()) < found.size


def test_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {}
    for block in range(2):
        module = f"transformer.transformer_blocks.{block}.attn.to_q"
        tensors |= {
            f"{module}.lora_A.weight": torch.zeros(16, 3072),
            f"{module}.lora_B.weight": torch.zeros(3072, 16),
            f"{module}.alpha": torch.tensor(8.0),
        }
    tensors |= {
        "transformer.time_text_embed.guidance_embedder.linear_1.lora_A.weight": torch.zeros(16, 256),
        "transformer.time_text_embed.guidance_embedder.linear_1.lora_B.weight": torch.zeros(3072, 16),
        "transformer.transformer_blocks.0.attn.to_z.lora_A.weight": torch.zeros(16, 3072),
        "transformer.transformer_blocks.0.attn.to_z.lora_B.weight": torch.zeros(3072, 16),
    }
    found = described(write(tmp_path / "style.safetensors", tensors))
    assert found.kind == "adapter" and found.adapter and found.problem
    assert (found.adapter.ranks, found.adapter.alphas) == ({"16": 4}, {"8": 2})
    fits = {fit.model: fit for fit in found.adapter.fits}
    unmatched = "transformer.transformer_blocks.0.attn.to_z"
    assert (fits["flux.1-dev"].matched, fits["flux.1-dev"].unmatched) == (3, (unmatched,))
    assert len(fits["flux.1-schnell"].lacking) == 1 and fits["sd3.5-large"].matched == 0
    say(found)
    said = capsys.readouterr().out
    assert "diffusers" in said and f"{unmatched} is no module of flux.1-dev; the nearest is" in said
    whole = described(write(tmp_path / "b.safetensors", {k: v for k, v in tensors.items() if "to_z" not in k}))
    assert not whole.problem and "--lora" in whole.export and "style" not in whole.export


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"distilled_guidance_layer.in_proj.weight": (2, 2), "double_blocks.0.img_attn.qkv.weight": (6, 2)}, "Chroma"),
        (
            {"conditioner.embedders.0.a": (2,), f"{COMFY}input_blocks.0.0.weight": (2, 2)},
            "Stable Diffusion XL",
        ),
        ({"redux_up.weight": (2, 2)}, "Redux"),
    ],
)
def test_other_architectures(tensors: dict[str, tuple[int, ...]], named: str, tmp_path: Path) -> None:
    found = described(write(tmp_path / "a.safetensors", {name: torch.zeros(shape) for name, shape in tensors.items()}))
    assert named in found.what and "cannot be exported" in found.problem and "FLUX.1" in found.fix


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["lora_unet_double_blocks_0_img_attn_proj.a1.weight"], "a GLoRA"),
        (["base_model.model.transformer_blocks.0.attn.to_q.vera_lambda_b"], "a VeRA adapter"),
        (["clip_l", "t5xxl"], "a textual inversion"),
        (["transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up"], "for Nunchaku"),
        (["base_model.model.proj_out.base_layer.weight", "base_model.model.proj_out.lora_A.default.weight"], "inside"),
    ],
)
def test_adapters_that_cannot_be_merged(keys: list[str], named: str, tmp_path: Path) -> None:
    found = described(write(tmp_path / "a.safetensors", {name: torch.zeros(2, 2) for name in keys}))
    assert found.kind == "adapter" and named in found.what + found.problem
    assert found.fix and not found.export


def test_a_shard(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    found = described(write(tmp_path / "model-00001-of-00002.safetensors", schnell.transformer.state_dict()))
    assert found.what == "part 1 of 2 of a model" and "folder" in found.fix and not found.export


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_of_diffusers(prefix: str, large: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = single_files.prefixed(prefix, large.transformer.state_dict())
    found = described(write(tmp_path / "a.safetensors", tensors, {"modelspec.title": "SD 3.5 large"}))
    assert found.layout.startswith("diffusers' names") and found.variant == "Stable Diffusion 3.5 large"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda file: torch.save({"a": torch.zeros(2)}, file), "pickled checkpoint"),
        (lambda file: file.write_bytes(b"<!doctype html><html>"), "a web page"),
        (lambda file: file.write_bytes(b"\0" * 64), "zeros"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes((1 << 40).to_bytes(8, "little") + b"{"), "truncated or damaged"),
    ],
)
def test_what_cannot_be_read_is_named(make: Callable[[Path], object], named: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    make(file)
    with pytest.raises(UserError, match=named) as caught:
        look_into(file)
    assert caught.value.fix


def test_no_weight_and_no_pytorch_is_needed_for_a_checkpoint(tmp_path: Path) -> None:
    """A file of 24 GB is described by what its header says, before PyTorch would have been imported."""
    single_files.write_holes(published_dit("flux.1-dev"), tmp_path / "flux1-dev.safetensors")
    program = """
import json, sys
from pathlib import Path
from ditforge.contents import look_into
found = look_into(Path(sys.argv[1]))
read = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"]
imported = [name for name in ("torch", "diffusers") if name in sys.modules]
print(json.dumps([found.variant, found.size, int(read), imported]))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "flux1-dev.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    variant, size, read, imported = json.loads(done.stdout)
    assert (variant, imported) == ("FLUX.1-dev", [])
    assert size > 23e9 and read < 50e6  # of which nearly all are Python's modules


def test_a_shape_that_no_such_model_has(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = single_files.flux_dit(schnell.transformer.state_dict())
    tensors["img_in.weight"] = torch.from_numpy(np.zeros(3, np.float32))
    found = described(write(tmp_path / "a.safetensors", tensors))
    assert "incomplete or built otherwise" in found.problem and found.fix
