"""GGUF files: gguf's own writer and reader, and diffusers' loader, say what is in them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import random_flux
import random_sd3
import single_files
import torch
from command_line import PATIENCE
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf import GGMLQuantizationType as Kind, quants
from torch import Tensor

from ditforge.errors import UserError
from ditforge.export.checkpoint import consistency
from ditforge.export.checkpoint.gguf_file import open_gguf
from ditforge.export.checkpoint.layouts import open_single_file
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.checkpoint.weights import open_weights
from ditforge.export.families import family_of
from ditforge.export.quantisation.precision import Precision

PLAIN = [Kind.F32, Kind.F16, Kind.BF16]
PACKED = [kind for kind in Kind if kind in quants._type_traits and kind != Kind.BF16]


def random_blocks(kind: Kind, shape: tuple[int, ...], seed: int = 0) -> numpy.ndarray:
    """Blocks of any bytes whose numbers are finite: gguf cannot quantise to every type."""
    block, item = gguf.GGML_QUANT_SIZES[kind]
    rng = numpy.random.default_rng(seed)
    count = int(numpy.prod(shape)) // block
    found = rng.integers(0, 256, (count, item), dtype=numpy.uint8)
    while True:
        with numpy.errstate(all="ignore"):
            bad = ~numpy.isfinite(quants.dequantize(found, kind)).all(axis=1)
        if not bad.any():
            return found.reshape(*shape[:-1], shape[-1] // block * item)
        found[bad] = rng.integers(0, 256, (int(bad.sum()), item), dtype=numpy.uint8)


def write(
    file: Path, tensors: dict[str, Tensor], kinds: dict[str, Kind] | Kind, architecture: str | None = "flux"
) -> Path:
    """Write the tensors as city96's converter does: those of few numbers, and those that fit no block, in F32."""
    writer = gguf.GGUFWriter(file, architecture or "")
    for name, tensor in tensors.items():
        kind = kinds if isinstance(kinds, Kind) else kinds.get(name, Kind.F32)
        values = tensor.detach().float().contiguous().numpy()
        fits = tensor.ndim == 2 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        kind = kind if fits or kind in PLAIN else Kind.F32
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)
    return file


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [*PLAIN, *PACKED], ids=lambda kind: kind.name)
def test_every_type_that_gguf_dequantises(kind: Kind, tmp_path: Path) -> None:
    shape = 6, 512
    blocks = (
        random_blocks(kind, shape)
        if kind in PACKED
        else quants.quantize(numpy.random.default_rng(0).standard_normal(shape, dtype=numpy.float32), kind)
    )
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_tensor("before", numpy.ones(3, numpy.float32))
    writer.add_tensor("a.weight", blocks, raw_dtype=kind)
    finish(writer)
    tensor = open_gguf(tmp_path / "a.gguf").tensors["a.weight"]
    value = tensor.read()
    assert (tensor.shape, value.dtype) == (shape, tensor.dtype)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    expected = torch.from_numpy(quants.dequantize(reader.get_tensor(1).data, kind).copy())
    assert torch.equal(value.float(), expected.reshape(shape))
    assert torch.equal(tensor.read_rows(2, 5), value[2:5])
    if kind in dequantize_functions and kind not in PLAIN:
        block, item = gguf.GGML_QUANT_SIZES[kind]
        theirs = dequantize_functions[kind](torch.from_numpy(blocks).reshape(-1, item), block, item, torch.float32)
        assert torch.allclose(value, theirs.reshape(shape), rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux(prefix: str, random_schnell: Path, tmp_path: Path) -> None:
    pipeline = random_flux.schnell()
    tensors = single_files.prefixed(prefix, single_files.flux_dit(pipeline.transformer.state_dict()))
    file = write(tmp_path / "flux1-schnell-Q8_0.gguf", tensors, Kind.BF16)
    checkpoint = open_files(CheckpointSource(file, random_schnell))
    weights = checkpoint.weights("transformer")
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(weights.read(name), tensor.to(torch.bfloat16)), name
    (dit,) = [n for n in family_of(checkpoint).networks(checkpoint, Precision("fp32")) if n.name == "dit"]
    consistency.check_weights(dit, weights)
    assert not checkpoint.report.unexpected


def test_a_fused_linear_in_blocks_is_cut(tmp_path: Path) -> None:
    tensors = single_files.flux_dit(random_flux.schnell().transformer.state_dict())
    key = "double_blocks.0.img_attn.qkv.weight"
    wide = torch.randn(tensors[key].shape[0], 256)
    file = write(tmp_path / "a.gguf", {**tensors, key: wide}, {key: Kind.Q8_0})
    expected = torch.from_numpy(quants.dequantize(quants.quantize(wide.numpy(), Kind.Q8_0), Kind.Q8_0))
    found = open_single_file(file).components["transformer"]
    for name, part in zip("qkv", expected.chunk(3), strict=True):
        assert torch.equal(found[f"transformer_blocks.0.attn.to_{name}.weight"].read(), part)


def test_sd3(tmp_path: Path) -> None:
    """The table of positions has lost its first dimension, as in files that llama-quantize has written."""
    pipeline = random_sd3.medium()
    tensors = single_files.sd3_dit(pipeline.transformer.state_dict())
    tensors["pos_embed"] = tensors["pos_embed"][0]
    single = open_single_file(write(tmp_path / "sd3.5_medium.gguf", tensors, Kind.F16, "sd3"))
    assert single.family and single.family.pipeline == "StableDiffusion3Pipeline"
    for name, tensor in pipeline.transformer.state_dict().items():
        lazy = single.components["transformer"][name]
        assert lazy.shape == tuple(tensor.shape)
        assert torch.equal(lazy.read().half(), tensor.half()), name


def test_the_shape_that_a_rearranged_tensor_had(tmp_path: Path) -> None:
    """Rows that fit into no block are joined, and the true shape is in the metadata."""
    values = torch.randn(8, 24, 2, 2)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_array("comfy.gguf.orig_shape.a.weight", tuple(values.shape))
    writer.add_tensor("a.weight", quants.quantize(values.reshape(-1, 256).numpy(), Kind.Q8_0), raw_dtype=Kind.Q8_0)
    finish(writer)
    tensor = open_gguf(tmp_path / "a.gguf").tensors["a.weight"]
    assert tensor.shape == (8, 24, 2, 2)
    assert torch.allclose(tensor.read(), values, atol=0.05)
    assert torch.equal(tensor.read_rows(3, 5), tensor.read()[3:5])


def t5_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """T5's tensors by llama.cpp's names, as gguf knows them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 64)
    return {
        str(names.get_name(key, (".weight",))): tensor for key, tensor in state.items() if "embed_tokens" not in key
    }


@pytest.mark.parametrize("component", ["text_encoder_2", "text_encoder_3"])
def test_t5(component: str, tmp_path: Path) -> None:
    """t5-v1_1-xxl-encoder in GGUF; the base tells which of its encoders it is."""
    flux = component == "text_encoder_2"
    pipeline = random_flux.schnell() if flux else random_sd3.large(with_t5=True)
    base = random_flux.save_schnell(tmp_path) if flux else random_sd3.save_large_turbo(tmp_path, with_t5=True)
    encoder = getattr(pipeline, component)
    file = write(tmp_path / "t5.gguf", t5_names(encoder.state_dict()), Kind.F16, "t5encoder")
    weights = open_files(CheckpointSource(file, base)).weights(component)
    expected = {name: tensor for name, tensor in encoder.state_dict().items() if "embed_tokens" not in name}
    assert set(weights.shapes) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name).half(), tensor.half()), name


@pytest.mark.parametrize(
    ("architecture", "key", "name"),
    [
        ("wan", "blocks.0.self_attn.q.weight", "Wan"),
        ("qwen_image", "transformer_blocks.0.x.weight", "Qwen-Image"),
        ("sdxl", "input_blocks.0.0.weight", "Stable Diffusion XL"),
        ("flux", "distilled_guidance_layer.in_proj.weight", "Chroma"),
        ("llama", "blk.0.attn_q.weight", "architecture 'llama'"),
    ],
)
def test_other_models(architecture: str, key: str, name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", {key: torch.zeros(2, 2)}, Kind.F32, architecture)
    with pytest.raises(UserError, match=name):
        open_single_file(file)


def test_a_folder_does_not_take_it(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a.weight": torch.zeros(2, 2)}, Kind.F32)
    with pytest.raises(UserError, match="is a GGUF file"):
        open_weights(tmp_path)


def test_truncated_and_damaged(tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", {"a.weight": torch.zeros(64, 64)}, Kind.Q8_0)
    content = file.read_bytes()
    for length in (5, 20, 60, 200, len(content) - 40):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            open_gguf(file)
    file.write_bytes(content)
    tensor = open_gguf(file).tensors["a.weight"]
    file.write_bytes(content[:-40])
    with pytest.raises(UserError, match=r"a\.weight ends behind its end"):
        tensor.read()


@pytest.mark.parametrize(("version", "problem"), [(1, "version 1"), (3 << 24, "big-endian"), (9, "version 9")])
def test_versions(version: int, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + version.to_bytes(4, "little") + bytes(16))
    with pytest.raises(UserError, match=problem):
        open_gguf(file)


MEMORY = """
import sys
from pathlib import Path
from ditforge.export.checkpoint.gguf_file import open_gguf
tensors = open_gguf(Path(sys.argv[1])).tensors
first = tensors["0"].read()
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
for name in tensors:
    tensors[name].read()
print(peak() - before)
"""


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    tensor = numpy.zeros((2048, 1024 // 32 * 34), numpy.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    for number in range(30):
        writer.add_tensor(str(number), tensor, raw_dtype=Kind.Q8_0)
    finish(writer)
    assert (tmp_path / "a.gguf").stat().st_size > 60e6
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "a.gguf"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 25_000 + resource.getpagesize() // 1024  # kB; a tensor takes 8 MB and its blocks 2 MB
