"""Checkpoints in one file: every tensor that diffusers' module has, bit for bit, from every layout that people have."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import random_flux
import random_sd3
import single_files
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ditforge.errors import DitforgeWarning, UserError
from ditforge.export.checkpoint.diffusers_folder import CONFIGS
from ditforge.export.checkpoint.layouts import SingleFile, open_single_file, require
from ditforge.export.checkpoint.lazy_tensors import Lazy, as_weights, folder_tensors, open_tensors
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.weights import open_weights

COMFY = "model.diffusion_model."


@pytest.fixture(scope="module")
def flux() -> DiffusionPipeline:
    """FLUX.1 with a guidance embedding, as dev has it, in sizes of its own."""
    pipeline = random_flux.schnell()
    config = dict(pipeline.transformer.config) | {"guidance_embeds": True, "num_layers": 2}
    torch.manual_seed(1)
    pipeline.transformer = FluxTransformer2DModel.from_config(config)
    return pipeline


@pytest.fixture(scope="module")
def schnell() -> DiffusionPipeline:
    return random_flux.schnell()


@pytest.fixture(scope="module")
def medium() -> DiffusionPipeline:
    return random_sd3.medium()


@pytest.fixture(scope="module")
def large() -> DiffusionPipeline:
    return random_sd3.large()


def write(folder: Path, tensors: dict[str, Tensor], name: str = "some name.safetensors") -> Path:
    """Save the tensors; the name says nothing of what they are."""
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def assert_equal(found: dict[str, Lazy], module: nn.Module) -> None:
    """All of the module's tensors are there, by transformers' and diffusers' names, equal bit for bit."""
    expected = module.state_dict()
    found = {
        name: tensor for name, tensor in found.items() if name in expected or not name.startswith("text_model.")
    } | {
        bare: tensor
        for name, tensor in found.items()
        if name not in expected and (bare := name.removeprefix("text_model.")) != name
    }
    aliases = {"encoder.embed_tokens.weight"}  # T5's second name for `shared`
    assert set(found) - aliases == set(expected) - aliases
    for name, tensor in found.items():
        assert tensor.shape == tuple(expected[name].shape), name
        value = tensor.read()
        assert value.dtype == tensor.dtype
        assert torch.equal(value.float(), expected[name].float()), name


def own_config(single: SingleFile, module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Where what the shapes say differs from the module's configuration."""
    known = module.config
    said = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return {
        key: (value, said.get(key))
        for key, value in single.config.items()
        if key != "_class_name" and said.get(key) != value
    }


@pytest.mark.parametrize("model", ["flux", "schnell"])
@pytest.mark.parametrize("prefix", ["", COMFY, "diffusion_model.", "net.", "_orig_mod.", "module.transformer."])
def test_flux_dit(model: str, prefix: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """flux1-dev.safetensors, flux1-schnell, fine-tunes in that layout; ComfyUI's prefix."""
    dit = request.getfixturevalue(model).transformer
    file = write(tmp_path, single_files.prefixed(prefix, single_files.flux_dit(dit.state_dict())))
    single = open_single_file(file)
    assert single.family and single.family.pipeline == "FluxPipeline"
    assert list(single.components) == ["transformer"]
    assert_equal(single.components["transformer"], dit)
    assert not own_config(single, dit)


@pytest.mark.parametrize("model", ["medium", "large"])
def test_stability_single_file(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """sd3.5_medium.safetensors and sd3.5_large.safetensors, and those with the text encoders inside."""
    pipeline = request.getfixturevalue(model)
    tensors = single_files.prefixed(COMFY, single_files.sd3_dit(pipeline.transformer.state_dict()))
    tensors |= single_files.prefixed("first_stage_model.", single_files.autoencoder(pipeline.vae.state_dict()))
    components = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    for name, folder in {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}.items():
        encoder = getattr(pipeline, folder)
        if encoder is not None:
            components[folder] = encoder
            state = encoder.state_dict() if name == "t5xxl" else single_files.text_model(encoder.state_dict())
            tensors |= single_files.prefixed(f"text_encoders.{name}.transformer.", state)
    single = open_single_file(write(tmp_path, tensors))
    assert single.family and single.family.pipeline == "StableDiffusion3Pipeline"
    assert set(single.components) == set(components)
    for name, module in components.items():
        assert_equal(single.components[name], module)
    assert not own_config(single, pipeline.transformer)


def all_in_one(pipeline: DiffusionPipeline, **float8: Any) -> dict[str, Tensor]:
    """ComfyUI's file, such as flux1-dev-fp8.safetensors; the VAE stays as it is."""
    tensors = single_files.prefixed(COMFY, single_files.flux_dit(pipeline.transformer.state_dict()))
    clip, t5 = single_files.text_model(pipeline.text_encoder.state_dict()), pipeline.text_encoder_2.state_dict()
    tensors |= single_files.prefixed("text_encoders.clip_l.transformer.", clip)
    tensors |= single_files.prefixed("text_encoders.t5xxl.transformer.", t5)
    tensors = single_files.in_float8(tensors, **float8)
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    return tensors | single_files.prefixed("vae.", single_files.autoencoder(pipeline.vae.state_dict()))


@pytest.mark.parametrize(
    ("scale", "name", "marks"),
    [
        (1.0, "", {}),
        (
            single_files.SCALE,
            "scale_weight",
            {
                f"{COMFY}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
                f"{COMFY}double_blocks.0.img_attn.qkv.scale_input": torch.tensor(1.0),
            },
        ),
        (
            single_files.SCALE,
            "weight_scale",
            {f"{COMFY}double_blocks.0.img_attn.qkv.comfy_quant": torch.zeros(30, dtype=torch.uint8)},
        ),
    ],
    ids=["plain", "scaled", "scaled, newer names"],
)
def test_comfyui_all_in_one_in_float8(scale: float, name: str, marks: dict[str, Tensor], tmp_path: Path) -> None:
    pipeline = random_flux.schnell()
    parts = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    parts |= {"text_encoder_2": pipeline.text_encoder_2}
    for module in parts.values():
        single_files.make_float8(module, scale)
    single = open_single_file(write(tmp_path, all_in_one(pipeline, scale=scale, scale_name=name) | marks))
    assert set(single.components) == {*parts, "vae"}
    for component, module in {**parts, "vae": pipeline.vae}.items():
        assert_equal(single.components[component], module)
    linear = single.components["transformer"]["transformer_blocks.0.attn.to_q.weight"]
    assert linear.dtype == (torch.bfloat16 if scale == 1 else torch.float32)


def test_a_scale_for_each_row_is_cut_as_the_weight_is(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = single_files.flux_dit(schnell.transformer.state_dict())
    key = "double_blocks.0.img_attn.qkv"
    rows = tensors[f"{key}.weight"].shape[0]
    scale = torch.rand(rows, 1) + 0.5
    tensors[f"{key}.weight"] = (tensors[f"{key}.weight"] / scale).to(torch.float8_e4m3fn)
    expected = tensors[f"{key}.weight"].float() * scale
    found = open_single_file(write(tmp_path, {**tensors, f"{key}.scale_weight": scale})).components["transformer"]
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(found[f"transformer_blocks.0.attn.{name}.weight"].read(), expected.chunk(3)[i])
    with pytest.raises(UserError, match=r"scale of double_blocks.0.img_attn.qkv.weight has shape \[7\]"):
        open_single_file(write(tmp_path, {**tensors, f"{key}.scale_weight": torch.ones(7)}))


def test_autoencoder_alone(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    """ae.safetensors: its family is not told, so none is said."""
    single = open_single_file(write(tmp_path, single_files.autoencoder(schnell.vae.state_dict())))
    assert list(single.components) == ["vae"]
    assert (single.family, single.config) == (None, {})
    assert_equal(single.components["vae"], schnell.vae)


def bytes_read() -> int:
    """By this process, from anywhere."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.parametrize("name", ["flux.1-dev", "flux.1-schnell", "sd3.5-medium", "sd3.5-large"])
def test_published_sizes(name: str, tmp_path: Path) -> None:
    """A file of the published size: recognised by its header, all shapes as diffusers', configuration as published."""
    published = json.loads((CONFIGS / name / "transformer" / "config.json").read_text())
    classes = {cls.__name__: cls for cls in (FluxTransformer2DModel, SD3Transformer2DModel)}
    with torch.device("meta"):
        dit = classes[published["_class_name"]].from_config(published).to(torch.bfloat16)
    written = single_files.flux_dit if "flux" in name else single_files.sd3_dit
    file = tmp_path / "dit.safetensors"
    single_files.write_holes(written(dit.to("meta").state_dict()), file)
    started, before = time.process_time(), bytes_read()
    single = open_single_file(file)
    assert bytes_read() - before < 1e6 < file.stat().st_size / 1000
    assert time.process_time() - started < 5  # of this process's own, a hundred times what it takes
    shapes = {key: tuple(tensor.shape) for key, tensor in dit.state_dict().items()}
    assert {key: tensor.shape for key, tensor in single.components["transformer"].items()} == shapes
    config = single.transformer_config(CONFIGS / name)
    assert {key: config[key] for key in published} == published


def test_a_part_of_a_fused_weight_is_read_without_other_weights(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    """safetensors reads the fused weight whole, and gives the part."""
    tensors = single_files.flux_dit(schnell.transformer.state_dict())
    file = write(tmp_path, tensors)
    found = open_single_file(file).components["transformer"]
    before = bytes_read()
    part = found["single_transformer_blocks.2.attn.to_k.weight"].read()
    read, header = bytes_read() - before, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    fused = tensors["single_blocks.2.linear1.weight"].nbytes
    assert read <= fused + 2 * header < file.stat().st_size / 2
    assert part.untyped_storage().nbytes() < fused / 6


def test_configuration_of_another_size_needs_a_base(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    """The rotary axes are in no shape: for heads of another size than published, the base says them."""
    single = open_single_file(write(tmp_path, single_files.flux_dit(schnell.transformer.state_dict())))
    with pytest.raises(UserError, match=r"heads of 24, flux.1-schnell of 128[\s\S]*base=.FOLDER"):
        single.transformer_config(CONFIGS / "flux.1-schnell")
    base = dict(schnell.transformer.config) | {"num_layers": 7}
    config = single.transformer_config(CONFIGS / "flux.1-schnell", base)
    assert (config["axes_dims_rope"], config["num_layers"]) == (base["axes_dims_rope"], 1)


def test_what_is_missing_is_named(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    single = open_single_file(write(tmp_path, single_files.flux_dit(schnell.transformer.state_dict())))
    needed = ["transformer", "vae", "text_encoder", "tokenizer"]
    with pytest.raises(UserError, match=r"vae, text_encoder, tokenizer missing[\s\S]*base=.FOLDER"):
        require(single, needed, None)
    base = tmp_path / "base"
    for name in ("vae", "tokenizer"):
        (base / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"^text_encoder missing"):
        require(single, needed, base)
    (base / "text_encoder").mkdir()
    require(single, needed, base)


@pytest.mark.parametrize("model", ["flux", "schnell", "medium", "large"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_of_diffusers(model: str, prefix: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A DiT as diffusers saves it, taken out of its folder, and one inside of a pipeline's state."""
    dit = request.getfixturevalue(model).transformer
    single = open_single_file(write(tmp_path, single_files.prefixed(prefix, dit.state_dict())))
    assert single.family
    assert single.config["_class_name"] == type(dit).__name__
    assert_equal(single.components["transformer"], dit)
    assert not own_config(single, dit)


def test_other_components_with_names_of_diffusers(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    """An autoencoder, and CLIP as transformers 5 writes it."""
    for name, module in {"vae": schnell.vae, "text_encoder": schnell.text_encoder}.items():
        single = open_single_file(write(tmp_path, module.state_dict()))
        assert single.family is None and list(single.components) == [name]
        assert_equal(single.components[name], module)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model-00002-of-00003.safetensors", "a-00001-of-00002.sft"])
def test_a_shard_is_no_model(name: str, schnell: DiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is part \d of \d of a model[\s\S]*folder"):
        open_single_file(write(tmp_path, schnell.transformer.state_dict(), name))
    single = open_single_file(write(tmp_path, schnell.transformer.state_dict(), "a-00001-of-00001.safetensors"))
    assert single.family


def test_wrong_files_are_refused_in_plain_words(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    good = single_files.flux_dit(schnell.transformer.state_dict())
    key = "double_blocks.0.img_mod.lin.weight"
    cases: dict[str, dict[str, Tensor]] = {
        f"lacks the tensor {key}": {k: t for k, t in good.items() if k != key},
        "lacks blocks with numbers": {k: t for k, t in good.items() if not k.startswith("single_blocks")},
        r"built otherwise: distilled\.weight": {**good, "distilled.weight": torch.zeros(2, 2)},
        f"{key} is uint8, weights packed": {**good, key: torch.zeros(8, 8, dtype=torch.uint8)},
        "shapes in .* are not those": {**good, "img_in.weight": torch.zeros(72)},
        r"\[5, 3\] should be 1": single_files.autoencoder(schnell.vae.state_dict())
        | {"decoder.mid.attn_1.q.weight": torch.zeros(24, 24, 5, 3)},
        "lacks the tensor decoder.up.1.upsample.conv.bias of the autoencoder": {
            k: t
            for k, t in single_files.autoencoder(schnell.vae.state_dict()).items()
            if k != "decoder.up.1.upsample.conv.bias"
        },
        "autoencoder that is built otherwise: decoder.extra": single_files.autoencoder(schnell.vae.state_dict())
        | {"decoder.extra": torch.zeros(2)},
        "cannot be divided": {**good, "double_blocks.0.img_attn.qkv.weight": torch.zeros(7, 72)},
        r"is a LoRA[\s\S]*loras=": {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)},
        "no known layout: it has some.weight": {"some.weight": torch.zeros(2, 2)},
        "no known layout: it has no tensors": {},
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            open_single_file(write(tmp_path, tensors))


def test_damaged_files_are_refused_in_plain_words(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    file = write(tmp_path, single_files.flux_dit(schnell.transformer.state_dict()))
    content = file.read_bytes()
    for damaged in (content[:-1], content[:100]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"\({len(damaged)} bytes\) is truncated or damaged"):
            open_single_file(file)
    for start, kind in ((b"PK\x03\x04", "a zip archive"), (b"\x80\x02", "a pickled checkpoint")):
        file.write_bytes(start + bytes(100))
        with pytest.raises(UserError, match=f"is {kind}"):
            open_single_file(file)
    with pytest.raises(UserError, match="cannot read"):
        open_single_file(tmp_path / "none.safetensors")


def test_tensors_of_no_use_are_said(schnell: DiffusionPipeline, tmp_path: Path) -> None:
    tensors = single_files.prefixed(COMFY, single_files.flux_dit(schnell.transformer.state_dict()))
    report = LoadReport(strict=True)
    open_single_file(write(tmp_path, {**tensors, "controlnet.weight": torch.zeros(2, 2)}), report)
    (note,) = report.unexpected
    assert note.what.startswith("controlnet.weight in ")
    with pytest.raises(UserError, match=r"controlnet\.weight in .* ignored"):
        report.conclude()
    report.strict = False
    with pytest.warns(DitforgeWarning, match=r"controlnet\.weight in .* ignored"):
        report.conclude()


def test_weights_of_a_folder_are_the_same_lazily(random_schnell: Path) -> None:
    """A diffusers folder's tensors behind the same interface, and what the rest of the export asks of weights."""
    weights = open_weights(random_schnell / "transformer")
    lazy = as_weights(weights.folder, folder_tensors(weights))
    assert (lazy.shards, lazy.shapes) == (weights.shards, weights.shapes)
    for name in weights.shards:
        assert torch.equal(lazy.read(name), weights.read(name))
        assert torch.equal(lazy.read(name, 0.25), weights.read(name, 0.25))


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.arange(-3, 9).reshape(3, 2, 2).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "e5m2": torch.ones(2).to(torch.float8_e5m2)}
    for name, tensor in open_tensors(write(tmp_path, tensors)).items():
        value = tensor.read()
        assert value.dtype == tensors[name].dtype == tensor.dtype
        assert value.shape == tensors[name].shape
        assert torch.equal(value.float(), tensors[name].float())
        if len(tensor.shape) == 3:
            assert torch.equal(tensor.rows(1, 3).rows(1, 2).read(), tensors[name][2:3])
