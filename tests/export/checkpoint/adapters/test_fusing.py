"""LoRA files in the styles that people have, added to weights as these are read: the formula, and PEFT's own sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import random_flux
import random_sd3
import single_files
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.checkpoint.diffusers_folder import CONFIGS, open_checkpoint
from ditforge.export.checkpoint.layouts import open_single_file
from ditforge.export.checkpoint.lazy_tensors import Lazy, folder_tensors, open_tensors
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.source import CheckpointSource, open_files, parse_lora
from ditforge.export.families.flux_layout import LAYOUT as FLUX
from ditforge.export.families.sd3_layout import LAYOUT as SD3

RANK = 4
LAYOUTS = {"flux": FLUX, "sd3": SD3}
FLUX_LINEARS = (  # as diffusers calls them, with the rows that BFL's fused module has of each
    ("transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv"),
    ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv"),
    ("transformer_blocks.0.attn.to_v", "double_blocks.0.img_attn.qkv"),
    ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2"),
    ("single_transformer_blocks.1.attn.to_q", "single_blocks.1.linear1"),
    ("single_transformer_blocks.1.attn.to_k", "single_blocks.1.linear1"),
    ("single_transformer_blocks.1.attn.to_v", "single_blocks.1.linear1"),
    ("single_transformer_blocks.1.proj_mlp", "single_blocks.1.linear1"),
    ("single_transformer_blocks.2.proj_out", "single_blocks.2.linear2"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
)
SD3_LINEARS = (
    ("transformer_blocks.1.attn2.to_q", "joint_blocks.1.x_block.attn2.qkv"),
    ("transformer_blocks.1.attn2.to_k", "joint_blocks.1.x_block.attn2.qkv"),
    ("transformer_blocks.1.attn2.to_v", "joint_blocks.1.x_block.attn2.qkv"),
    ("transformer_blocks.3.norm1_context.linear", "joint_blocks.3.context_block.adaLN_modulation.1"),
    ("transformer_blocks.2.norm1_context.linear", "joint_blocks.2.context_block.adaLN_modulation.1"),
    ("context_embedder", "context_embedder"),
)
# diffusers has scale and shift, the authors shift and scale.
SWAPPED = ("norm_out.linear", "transformer_blocks.3.norm1_context.linear")
Linears = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module")
def flux() -> DiffusionPipeline:
    return random_flux.schnell()


@pytest.fixture(scope="module")
def sd3() -> DiffusionPipeline:
    return random_sd3.medium()


def lazily(module: nn.Module, folder: Path) -> dict[str, Lazy]:
    """The module's tensors in a file."""
    save_file({name: t.clone().contiguous() for name, t in module.state_dict().items()}, folder / "module.safetensors")
    return open_tensors(folder / "module.safetensors")


def matrices(inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random down [rank, in] and up [out, rank]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, inputs, generator=generator), torch.randn(outputs, RANK, generator=generator)


def sums(dit: nn.Module, linears: Linears) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A LoRA by the authors' modules, (down, up) each, and up @ down by diffusers' names."""
    groups: dict[str, list[str]] = {}
    for ours, theirs in linears:
        groups.setdefault(theirs, []).append(ours)
    written, products = {}, {}
    for seed, (theirs, parts) in enumerate(groups.items()):
        weights = [dit.get_submodule(part).weight for part in parts]
        down, up = matrices(weights[0].shape[1], sum(weight.shape[0] for weight in weights), seed)
        written[theirs] = down, up
        for part, rows in zip(parts, (up @ down).split([weight.shape[0] for weight in weights]), strict=True):
            products[part] = torch.cat(rows.chunk(2)[::-1]) if part in SWAPPED else rows
    return written, products


def kohya(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    name = f"lora_unet_{module.replace('.', '_')}"
    alpha = torch.tensor(RANK / 2)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}


def bfl(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def ai_toolkit(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}


Style = Callable[[str, Tensor, Tensor], dict[str, Tensor]]
STYLES = [
    pytest.param(kohya, 0.5, id="kohya"),
    pytest.param(bfl, 1.0, id="bfl"),
    pytest.param(ai_toolkit, 1.0, id="ai-toolkit"),
]


def write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    file = folder / "lora.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


def assert_added(fused: dict[str, Lazy], before: nn.Module, products: dict[str, Tensor], factor: float) -> None:
    """The products times the factor are added to those weights, and all others are as they were."""
    for name, weight in before.state_dict().items():
        module = name.removesuffix(".weight")
        value = fused[name].read()
        assert value.shape == weight.shape
        if name.endswith(".weight") and module in products:
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, weight + factor * products[module], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(value, weight, atol=1e-2)
        else:
            assert torch.equal(value, weight), name


@pytest.mark.parametrize(("style", "scale"), STYLES)
@pytest.mark.parametrize(("model", "linears"), [("flux", FLUX_LINEARS), ("sd3", SD3_LINEARS)])
def test_authors_names(
    style: Style, scale: float, model: str, linears: Linears, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Fused modules are cut, and modulation is turned round, as the weights are."""
    dit = request.getfixturevalue(model).transformer
    written, products = sums(dit, linears)
    tensors = {k: t for module, (down, up) in written.items() for k, t in style(module, down, up).items()}
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(write(tmp_path, tensors), 0.8)], LAYOUTS[model])
    assert_added(fused["transformer"], dit, products, 0.8 * scale)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_diffusers_names(flux: DiffusionPipeline, prefix: str, names: tuple[str, str], tmp_path: Path) -> None:
    dit, tensors, products = flux.transformer, {}, {}
    for seed, (name, _) in enumerate(FLUX_LINEARS):
        down, up = matrices(*reversed(dit.get_submodule(name).weight.shape), seed)
        tensors |= {f"{prefix}{name}.{names[0]}.weight": down, f"{prefix}{name}.{names[1]}.weight": up}
        products[name] = up @ down
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(write(tmp_path, tensors), -1.5)], FLUX)
    assert_added(fused["transformer"], dit, products, -1.5)


def test_text_encoders_by_all_their_names(flux: DiffusionPipeline, sd3: DiffusionPipeline, tmp_path: Path) -> None:
    """Kohya's scripts call T5 the third encoder even where it is the second."""
    clip, t5 = "encoder.layers.1.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
    cases = [
        (flux, "text_encoder", clip, f"text_encoder.text_model.{clip}", "lora_A", "lora_B"),
        (flux, "text_encoder", clip, f"lora_te1_text_model_{clip.replace('.', '_')}", "lora_down", "lora_up"),
        (flux, "text_encoder_2", t5, f"lora_te3_{t5.replace('.', '_')}", "lora_down", "lora_up"),
        (sd3, "text_encoder_2", clip, f"lora_te2_text_model_{clip.replace('.', '_')}", "lora_down", "lora_up"),
        (sd3, "text_encoder_3", t5, f"lora_te3_{t5.replace('.', '_')}", "lora_down", "lora_up"),
    ]
    for pipeline, component, module, written, first, second in cases:
        encoders = {
            name: lazily(getattr(pipeline, name), folder)
            for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
            if getattr(pipeline, name, None) is not None
            if (folder := tmp_path / f"{id(pipeline)}-{name}").mkdir(exist_ok=True) is None
        }
        name = next(key for key in encoders[component] if key.removeprefix("text_model.") == f"{module}.weight")
        before = encoders[component][name].read()
        down, up = matrices(before.shape[1], before.shape[0], 0)
        file = write(tmp_path, {f"{written}.{first}.weight": down, f"{written}.{second}.weight": up})
        fused = fuse(encoders, [(file, 1.0)], FLUX if pipeline is flux else SD3)
        torch.testing.assert_close(fused[component][name].read(), before + up @ down)
        changed = [(c, n) for c, tensors in fused.items() for n in tensors if tensors[n] is not encoders[c][n]]
        assert changed == [(component, name)]


def test_several_at_once_add_up_whatever_their_style(flux: DiffusionPipeline, tmp_path: Path) -> None:
    dit, name = flux.transformer, "transformer_blocks.0.ff_context.net.2"
    files, expected = [], dit.get_submodule(name).weight.detach().clone()
    for seed, (style, scale, module) in enumerate(((kohya, 0.5, "double_blocks.0.txt_mlp.2"), (bfl, 1.0, name))):
        down, up = matrices(*reversed(expected.shape), seed)
        (tmp_path / str(seed)).mkdir()
        files.append((write(tmp_path / str(seed), style(module, down, up)), 0.3 + seed))
        expected += (0.3 + seed) * scale * up @ down
    fused = fuse({"transformer": lazily(dit, tmp_path)}, files, FLUX)["transformer"]
    torch.testing.assert_close(fused[f"{name}.weight"].read(), expected)


def test_alpha_in_the_metadata_that_diffusers_writes(flux: DiffusionPipeline, tmp_path: Path) -> None:
    dit, name = flux.transformer, "transformer_blocks.0.attn.to_q"
    weight = dit.get_submodule(name).weight.detach()
    down, up = matrices(*reversed(weight.shape), 0)
    cases = [
        ({"lora_alpha": 8}, 8 / RANK),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / RANK**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 3}}, 3 / RANK),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 3}}, 8 / RANK),
    ]
    for settings, scale in cases:
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
        file = write(tmp_path, bfl(f"transformer.{name}", down, up), metadata)
        fused = fuse({"transformer": lazily(dit, tmp_path)}, [(file, 1.0)], FLUX)["transformer"]
        torch.testing.assert_close(fused[f"{name}.weight"].read(), weight + scale * up @ down)


def test_two_scales_are_one_too_many(flux: DiffusionPipeline, tmp_path: Path) -> None:
    """diffusers loads no file that has both an alpha and PEFT's configuration. Here it depends on use_rslora alone."""
    dit, name = flux.transformer, "transformer_blocks.0.attn.to_q"
    weight = dit.get_submodule(name).weight.detach()
    down, up = matrices(*reversed(weight.shape), 0)
    tensors = bfl(f"transformer.{name}", down, up) | {f"transformer.{name}.alpha": torch.tensor(2.0)}
    for rslora in (False, True):
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": rslora})}
        file = write(tmp_path, tensors, metadata)
        if rslora:
            with pytest.raises(UserError, match=r"to_q has an alpha, and .* has use_rslora"):
                fuse({"transformer": lazily(dit, tmp_path)}, [(file, 1.0)], FLUX)
        else:
            fused = fuse({"transformer": lazily(dit, tmp_path)}, [(file, 1.0)], FLUX)["transformer"]
            torch.testing.assert_close(fused[f"{name}.weight"].read(), weight + 2.0 / RANK * up @ down)


def test_on_top_of_a_single_file_in_float8(flux: DiffusionPipeline, tmp_path: Path) -> None:
    """The names are diffusers' by then, so any style fits any layout; rows are read alone."""
    dit = random_flux.schnell().transformer
    single_files.make_float8(dit)
    save_file(single_files.in_float8(single_files.flux_dit(dit.state_dict())), tmp_path / "dit.safetensors")
    written, products = sums(dit, FLUX_LINEARS)
    tensors = {k: t for module, (down, up) in written.items() for k, t in kohya(module, down, up).items()}
    components = open_single_file(tmp_path / "dit.safetensors").components
    fused = fuse(components, [(write(tmp_path, tensors), 1.0)], FLUX)["transformer"]
    assert_added(fused, dit, products, 0.5)
    weight = fused["single_transformer_blocks.1.proj_mlp.weight"]
    torch.testing.assert_close(weight.rows(5, 9).read(), weight.read()[5:9])


def test_convolutions(sd3: DiffusionPipeline, tmp_path: Path) -> None:
    dit = sd3.transformer
    weight = dit.pos_embed.proj.weight.detach()
    down, up = torch.randn(RANK, *weight.shape[1:]), torch.randn(weight.shape[0], RANK, 1, 1)
    fused = fuse(
        {"transformer": lazily(dit, tmp_path)}, [(write(tmp_path, bfl("pos_embed.proj", down, up)), 1.0)], SD3
    )["transformer"]
    expected = weight + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(fused["pos_embed.proj.weight"].read(), expected)


def test_what_fits_nothing_is_refused(flux: DiffusionPipeline, sd3: DiffusionPipeline, tmp_path: Path) -> None:
    dit = {"transformer": lazily(flux.transformer, tmp_path)}
    name = "double_blocks.0.img_attn.qkv"
    width = flux.transformer.config.num_attention_heads * flux.transformer.config.attention_head_dim
    down, up = matrices(width, width * 3, 0)
    good = bfl(name, down, up)
    cases: dict[str, dict[str, Tensor]] = {
        r"double_blocks\.9\.img_attn\.qkv fit nothing": {**good, **bfl("double_blocks.9.img_attn.qkv", down, up)},
        r"has shape \[3\], for 216 lengths": {**good, f"{name}.dora_scale": torch.ones(3)},
        r"has lora_magnitude_vector, and it is not": {
            f"transformer.{name}.lora_magnitude_vector": torch.ones(3),
            **good,
        },
        r"fit nothing .* are those of Stable Diffusion 1, 2 or XL": kohya("input_blocks.4.1.proj_in", down, up),
        r"lora_unet_x fit nothing": {"lora_unet_x.hada_w1_a": torch.ones(2, 2)},
        r"img_in has no hada_w1_b": {"lora_unet_img_in.hada_w1_a": torch.ones(2, 2)},
        r"img_in has both lokr_w1 and": {
            "lycoris_img_in.lokr_w1": torch.ones(2, 2),
            "lycoris_img_in.lokr_w1_a": torch.ones(2, 2),
        },
        r"img_in is \[2, 2\], which do not fit": {"lora_unet_img_in.oft_blocks": torch.ones(2, 2)},
        r"is a GLoRA: it holds": {"lycoris_img_in.a1.weight": torch.ones(2, 2)},
        r"is a T-LoRA": {"lycoris_img_in.lambda_layer": torch.ones(2, 2)},
        r"is an IP-Adapter": {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.ones(2, 2)},
        r"is a ControlNet": {"controlnet_blocks.0.weight": torch.ones(2, 2)},
        r"is a textual inversion": {"clip_l": torch.ones(2, 2)},
        r"img_in is \[3\], and x_embedder.bias is \[72\]": {**good, "diffusion_model.img_in.diff_b": torch.ones(3)},
        r"qkv is \[3\], and .*to_q.bias is \[72\]": {**good, f"{name}.lora_B.bias": torch.ones(3)},
        r"a wider input here, as control LoRAs": bfl("img_in", torch.zeros(4, 128), torch.zeros(72, 4)),
        r"holds whole weights, .* and no adapter": {"img_in.weight": torch.ones(2, 2)},
        r"the alpha of .* is nan": {**good, f"{name}.alpha": torch.tensor(float("nan"))},
        r"several adapters of PEFT: a, b": {f"{name}.lora_A.a.weight": down, f"{name}.lora_A.b.weight": down},
        r"the alpha of .* is 0, which Kohya's": {**good, f"{name}.alpha": torch.tensor(0.0)},
        r"lora_up of .* is int8, numbers that are packed": {**good, f"{name}.lora_B.weight": up.to(torch.int8)},
        r"has an alpha and no matrices": {**good, "img_in.alpha": torch.tensor(1.0)},
        "holds no tensors, and so no LoRA": {},
        r"a rank of 0": bfl(name, torch.zeros(0, 72), torch.zeros(216, 0)),
        r"not one alpha": {**good, f"{name}.alpha": torch.zeros(0)},
        r"no up matrix": {f"{name}.lora_A.weight": down},
        r"no down matrix": {f"{name}.lora_B.weight": up},
        r"\[216, 4\] times \[4, 71\], and .*to_q.weight is \[72, 72\]: a LoRA of another": bfl(name, down[:, 1:], up),
        r"\[210, 4\] times": bfl(name, down, up[:210]),
        r"\[216, 3\] times": bfl(name, down, up[:, :3]),
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            fuse(dit, [(write(tmp_path, tensors), 1.0)], FLUX)
    (tmp_path / "sd3").mkdir()
    with pytest.raises(UserError, match=r"fit nothing in this checkpoint: .* names are those of FLUX.1, or"):
        fuse({"transformer": lazily(sd3.transformer, tmp_path / "sd3")}, [(write(tmp_path, good), 1.0)], SD3)
    with pytest.raises(UserError, match="holds no tensors, and so no LoRA"):
        fuse(dit, [(write(tmp_path, {}), 1.0)], FLUX)
    with pytest.raises(UserError, match="lora_adapter_metadata in its header is damaged"):
        fuse(dit, [(write(tmp_path, good, {"lora_adapter_metadata": "{"}), 1.0)], FLUX)


def test_options(tmp_path: Path) -> None:
    assert parse_lora("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    assert parse_lora("a/b.safetensors:-2") == (Path("a/b.safetensors"), -2.0)
    assert parse_lora("b.safetensors") == (Path("b.safetensors"), 1.0)
    odd = tmp_path / "a:1"
    odd.touch()
    assert parse_lora(str(odd)) == (odd, 1.0)
    for wrong in ("b.safetensors:strong", "b.safetensors:", "b.safetensors:nan", ":1", ""):
        with pytest.raises(UserError, match=r"style\.safetensors.*0\.8"):
            parse_lora(wrong)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_against_diffusers_and_peft(flux: DiffusionPipeline, style: str, tmp_path: Path) -> None:
    """diffusers reads the same file, and PEFT adds it to the weights."""
    pipeline = random_flux.schnell()
    dit, tensors = flux.transformer, {}
    for seed, (name, theirs) in enumerate(FLUX_LINEARS):
        joint = any(part in theirs for part in ("linear1", "qkv", "final_layer"))
        if style == "kohya" and joint:
            continue  # diffusers has the published widths built in
        down, up = matrices(*reversed(dit.get_submodule(name).weight.shape), seed)
        if style == "kohya":
            tensors |= kohya(theirs, down, up)
        else:
            tensors |= bfl(f"transformer.{name}", down, up)
    file = write(tmp_path, tensors)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(file, 0.7)], FLUX)["transformer"]
    for name, weight in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(fused[name].read(), weight, rtol=1e-5, atol=1e-5)
    changed = [
        name for name, weight in pipeline.transformer.state_dict().items() if not weight.equal(dit.state_dict()[name])
    ]
    assert len(changed) == len({key.split(".lora_")[0] for key in tensors if ".lora_" in key})


def test_kohya_against_diffusers_converter_at_the_published_width(tmp_path: Path) -> None:
    """diffusers' own conversion of the same file, for the width that it has built in; the weights are zeros."""
    config = json.loads((CONFIGS / "flux.1-dev" / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        dit = FluxTransformer2DModel.from_config(config | {"num_layers": 1, "num_single_layers": 1})
    single_files.write_holes(dit.state_dict(), tmp_path / "dit.safetensors")
    tensors: dict[str, Tensor] = {}
    modules = {
        "double_blocks.0.img_attn.qkv": (3072, 9216),
        "double_blocks.0.txt_mlp.0": (3072, 12288),
        "double_blocks.0.img_mod.lin": (3072, 18432),
        "single_blocks.0.linear1": (3072, 21504),
        "single_blocks.0.linear2": (15360, 3072),
    }
    for seed, (module, sizes) in enumerate(modules.items()):
        tensors |= kohya(module, *matrices(*sizes, seed))
    fused = fuse({"transformer": open_tensors(tmp_path / "dit.safetensors")}, [(write(tmp_path, tensors), 1.0)], FLUX)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    names = [key.split(".", 1)[1].removesuffix(".lora_A.weight") for key in theirs if key.endswith("lora_A.weight")]
    assert len(names) == 10
    for name in names:
        down, up = (theirs[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        found = fused["transformer"][f"{name}.weight"].rows(0, 1000).read()
        torch.testing.assert_close(found, up[:1000] @ down, rtol=1e-5, atol=1e-5)


def test_one_lora_in_two_spellings_is_merged_once(flux: DiffusionPipeline, tmp_path: Path) -> None:
    """Those of the authors and of diffusers, as mixed files have them; the second one is rounded to 16 bits."""
    dit, fused_name = flux.transformer, "double_blocks.0.img_attn.qkv"
    down, up = matrices(72, 216, 0)
    parts = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    both = kohya(fused_name, down, up)
    for part, rows in zip(parts, up.chunk(3), strict=True):
        both |= bfl(part, (down / 2).bfloat16(), rows.bfloat16())
    once = fuse({"transformer": lazily(dit, tmp_path)}, [(write(tmp_path, kohya(fused_name, down, up)), 0.8)], FLUX)
    values = {name: tensor.read() for name, tensor in once["transformer"].items()}
    report = LoadReport()
    twice = fuse({"transformer": lazily(dit, tmp_path)}, [(write(tmp_path, both), 0.8)], FLUX, report)
    for name, value in values.items():
        torch.testing.assert_close(twice["transformer"][name].read(), value, rtol=0.02, atol=0.02)
    (note,) = report.unexpected
    assert "the same is there under other names; it is merged once" in note.why
    both[f"{parts[1]}.lora_B.weight"] = -both[f"{parts[1]}.lora_B.weight"]
    with pytest.raises(UserError, match=r"changes transformer_blocks.0.attn.to_k.weight twice and differently, as"):
        fuse({"transformer": lazily(dit, tmp_path)}, [(write(tmp_path, both), 0.8)], FLUX)
    file = write(tmp_path, kohya(fused_name, down, up))
    given_twice = fuse({"transformer": lazily(dit, tmp_path)}, [(file, 0.8), (file, 0.8)], FLUX)["transformer"]
    name = "transformer_blocks.0.attn.to_q.weight"
    before = dit.state_dict()[name]
    torch.testing.assert_close(given_twice[name].read() - before, 2 * (values[name] - before), rtol=1e-4, atol=1e-4)


def test_what_a_checkpoint_can_do_without_is_said(flux: DiffusionPipeline, tmp_path: Path) -> None:
    """A LoRA of FLUX.1-dev on schnell, which has no guidance embedder, without T5; and embeddings of OneTrainer."""
    dit, name = flux.transformer, "double_blocks.0.txt_mlp.2"
    down, up = matrices(288, 72, 0)
    others = {
        **kohya("guidance_in.in_layer", *matrices(256, 72, 1)),
        **{
            f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.{part}.weight": torch.ones(2, 2) for part in ("lora_up",)
        },
        "bundle_emb.word.t5_out": torch.ones(2, 2),
    }
    file, report = write(tmp_path, kohya(name, down, up) | others), LoadReport()
    fused = fuse({"transformer": lazily(dit, tmp_path)}, [(file, 1.0)], FLUX, report)["transformer"]
    assert_added(fused, dit, {"transformer_blocks.0.ff_context.net.2": up @ down}, 0.5)
    said = " ".join(map(str, report.unexpected))
    assert len(report.unexpected) == 3
    for part in ("no guidance embedder", "text_encoder_2 is left out of this export", "bundle_emb.word.t5_out"):
        assert part in said
    strict = LoadReport(strict=True)
    fuse({"transformer": lazily(dit, tmp_path)}, [(file, 1.0)], FLUX, strict)
    with pytest.raises(UserError, match="no guidance embedder"):
        strict.conclude()
    with pytest.raises(UserError, match=r"nothing in .* has an effect on this export"):
        fuse({"transformer": lazily(dit, tmp_path)}, [(write(tmp_path, others), 1.0)], FLUX)


def test_modules_that_are_most_like_those_of_the_file(flux: DiffusionPipeline, tmp_path: Path) -> None:
    dit = {"transformer": lazily(flux.transformer, tmp_path)}
    file = write(tmp_path, bfl("transformer.transformer_blocks.7.attn.to_q", *matrices(72, 72, 0)))
    with pytest.raises(UserError, match=r"attn.to_q is most like transformer_blocks.0.attn.to_q\)"):
        fuse(dit, [(file, 1.0)], FLUX)


def test_a_folder_of_peft_without_t5(random_schnell: Path, tmp_path: Path) -> None:
    """As the command line takes it: the folder, and a checkpoint of which T5 is left out."""
    tensors = bfl("transformer.transformer_blocks.0.attn.to_q", *matrices(72, 72, 0))
    tensors |= bfl("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", *matrices(56, 60, 0))
    (tmp_path / "style").mkdir()
    write(tmp_path / "style", tensors).rename(tmp_path / "style" / "adapter_model.safetensors")
    (tmp_path / "style" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    values = {}
    for encoders, said in (("all", 0), ("clip", 1)):
        source = CheckpointSource(random_schnell, loras=((tmp_path / "style", 0.5),), text_encoders=encoders)
        checkpoint = open_files(source)
        assert checkpoint.loras == ("style/adapter_model.safetensors:0.5",)
        values[encoders] = checkpoint.tensors["transformer"]["transformer_blocks.0.attn.to_q.weight"].read()
        assert len(checkpoint.report.unexpected) == said
    assert torch.equal(values["all"], values["clip"])
    before = folder_tensors(open_checkpoint(random_schnell).weights("transformer"))
    down, up = matrices(72, 72, 0)
    expected = before["transformer_blocks.0.attn.to_q.weight"].read() + 0.5 * 4 * up @ down
    torch.testing.assert_close(values["all"], expected)
