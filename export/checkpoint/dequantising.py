"""Dequantise the weights that a checkpoint stores in 8 or 4 bits with scales beside them.

What is read, each with its source:
- float8 with one scale for a weight, or one for each of its rows: ComfyUI (comfy/ops.py), fbgemm and ModelOpt;
- float8 with one scale for each block: 128 x 128 as DeepSeek writes it, 1 x 32 with powers of two (MXFP8, OCP's
  Microscaling Formats 1.0);
- NVFP4, numbers of 4 bits in blocks of 16, in the layout of ModelOpt (diffusers: quantizers/bfl/utils.py) and of
  compressed-tensors, and in that of ComfyUI (comfy-kitchen: float_utils.py), which lays the scales out for cuBLAS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.conversion import Tensors
from ditforge.export.checkpoint.lazy_tensors import Lazy
from ditforge.export.checkpoint.load_report import LoadReport, shown
from ditforge.export.checkpoint.refused_formats import FULL, check_method, packed_integers
from ditforge.export.checkpoint.weights import read_metadata

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EXPONENTS = torch.float8_e8m0fnu
POWER_DTYPES = (EXPONENTS, torch.uint8)  # how the exponents of scales that are powers of two are stored
# The names of scales beside the tensor P.weight: P.weight_scale, P.scale_weight (ComfyUI, older), P.weight_scale_inv
# (DeepSeek; it is a factor in spite of its name), P.weight_scale_2 (NVFP4's second scale), P.weight_global_scale
# (compressed-tensors' second scale, a divisor).
SCALE = re.compile(
    r"(?P<module>(?:.*\.)?)(?:scale_(?P<older>\w+)|(?P<name>\w+?)_(?P<kind>scale(?:_inv|_2)?|global_scale))"
)
# What a runtime multiplies activations with. The export computes with activations in 16 bits, and needs none of it.
RUNTIME_KEYS = re.compile(
    r"(.*\.)?(scaled_fp8|scale_(input|output)|(input|output|input_activation|k|v)_(global_)?scale|comfy_quant)"
)
PACKED = "weight_packed"  # compressed-tensors' name of a weight in 4 bits
SMOOTHING = ".pre_quant_scale"  # ModelOpt's and ComfyUI's factor of the activations, by which the weight was divided
COMFY_BLOCKS = {"mxfp8", "nvfp4"}  # the formats whose scales ComfyUI lays out for cuBLAS
FOUR_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1's numbers; the fourth bit is the sign
NVFP4_BLOCK = 16
DEEPSEEK_BLOCK = 128
ONE_SCALE = "use a file with one scale for each weight, for each of its rows, or for each block of it"


@dataclass
class Scales:
    """The scales of one tensor, each None if there is none, and ComfyUI's settings of its layer."""

    first: Lazy | None = None
    second: Lazy | None = None
    divisor: Lazy | None = None
    keys: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)


def dequantised(
    tensors: Tensors,
    report: LoadReport | None = None,
    config: Mapping[str, Any] | None = None,
    where: Path | None = None,
) -> dict[str, Lazy]:
    """Return the tensors with all weights in 8 or 4 bits dequantised, unread.

    A weight with scales becomes float32. A float8 weight without a scale becomes bfloat16, which represents every
    float8 number exactly. `config` is the `quantization_config` of the component in the folder `where`, if it has one.
    What a runtime needs and an export does not is added to `report`, and so is a scale without a weight. Raises
    UserError for weights in a format that is not known, and for scales of another shape.
    """
    report = report or LoadReport()
    quantised = any(not is_plain(key, tensor) for key, tensor in tensors.items())
    if config is not None and where is not None:
        check_method(config, quantised, where, report)
    if not quantised and not any(SCALE.fullmatch(key) for key in tensors):
        return dict(tensors)
    runtime = [key for key in tensors if RUNTIME_KEYS.fullmatch(key)]
    if runtime:
        report.add(shown(runtime), "a runtime's settings for activations, which the export computes in full", True)
    scales = find_scales(tensors)
    found, taken = dict[str, Lazy](), {key for parts in scales.values() for key in parts.keys}
    for key, tensor in tensors.items():
        if key in taken or key in runtime:
            continue
        if key.endswith(SMOOTHING):
            problem = f"{tensor.file}: {key} belongs to weights that were divided by factors of their inputs"
            raise UserError(problem, FULL)
        name = key.removesuffix(PACKED) + "weight" if key.endswith(f".{PACKED}") else key
        found[name] = one_dequantised(name, tensor, scales.pop(name, Scales()), report, config or {})
    for name, parts in scales.items():
        report.add(shown(parts.keys), f"scales of {name}, which is not there")
    return found


def is_plain(key: str, tensor: Lazy) -> bool:
    """Whether a tensor is no weight in fewer than 16 bits."""
    if tensor.dtype in FLOAT8:
        return False
    return tensor.dtype.is_floating_point or not key.endswith((".weight", PACKED))


def find_scales(tensors: Tensors) -> dict[str, Scales]:
    """Return the scales among the tensors, by the name of the tensor that they belong to.

    What is called like a scale and is a tensor of the model itself (CLIP's `logit_scale`) belongs to none.
    """
    found: dict[str, Scales] = {}
    for key, tensor in tensors.items():
        match = SCALE.fullmatch(key)
        if match is None or RUNTIME_KEYS.fullmatch(key) or key.endswith(SMOOTHING):
            continue
        name, kind = match["name"] or match["older"], match["kind"] or "scale"
        owner = match["module"] + name
        if name != "weight" and owner not in tensors:
            continue
        scales = found.setdefault(owner, Scales())
        scales.keys.append(key)
        if kind == "scale_2":
            scales.second = tensor
        elif kind == "global_scale":
            scales.divisor = tensor
        elif scales.first is not None:
            raise UserError(f"{tensor.file}: {owner} has two scales, {scales.keys[0]} and {key}", ONE_SCALE)
        else:
            scales.first = tensor
    settings = comfy_settings(tensors)
    for owner, scales in found.items():
        scales.settings = settings.get(owner.rpartition(".")[0], {})
    return found


def comfy_settings(tensors: Tensors) -> dict[str, Mapping[str, Any]]:
    """Return ComfyUI's settings of the layers, by the layer's name: from tensors `LAYER.comfy_quant` and the metadata.

    Raises UserError for settings that are no JSON object.
    """
    found: dict[str, Any] = {}
    for file in {tensor.file for tensor in tensors.values()}:
        text = read_metadata(file).get("_quantization_metadata")
        if text:
            layers = parsed(text, f"{file}: _quantization_metadata").get("layers", {})
            found |= layers if isinstance(layers, dict) else {}
    for key, tensor in tensors.items():
        layer, _, last = key.rpartition(".")
        if last != "comfy_quant" or tensor.dtype != torch.uint8:
            continue
        if content := bytes(tensor.read().tolist()).strip(b"\0"):
            found[layer] = parsed(content, f"{tensor.file}: {key}")
    return {name: layer for name, layer in found.items() if isinstance(layer, dict)}


def parsed(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `text`. Raises UserError if it holds none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{where} is not a JSON object", "download the file again")
    return found


def one_dequantised(name: str, tensor: Lazy, scales: Scales, report: LoadReport, config: Mapping[str, Any]) -> Lazy:
    """Return one tensor, multiplied by its scales, in the format that its dtype and theirs tell."""
    kind = str(scales.settings.get("format", ""))
    if scales.settings and not kind.startswith(("float8_e4m3fn", "float8_e5m2", *COMFY_BLOCKS)):
        raise UserError(
            f"{tensor.file}: {name} is in ComfyUI's format {kind or 'of no name'}, which is not known", FULL
        )
    if tensor.dtype == torch.uint8 and scales.first is not None and scales.first.dtype == torch.float8_e4m3fn:
        return nvfp4(name, tensor, scales)
    if name.endswith(".weight") and not tensor.dtype.is_floating_point:
        raise packed_integers(name, tensor.file, str(tensor.dtype).removeprefix("torch."), config)
    if scales.first is None:
        if scales.keys:
            raise UserError(f"{tensor.file}: {name} has {shown(scales.keys)}, and no first scale", ONE_SCALE)
        return tensor.each_row(_in_bfloat16(tensor), torch.bfloat16) if tensor.dtype in FLOAT8 else tensor
    if scales.second is not None or scales.divisor is not None:
        raise UserError(f"{tensor.file}: {name} is {tensor.dtype} and has two scales, {shown(scales.keys)}", FULL)
    if tensor.dtype not in FLOAT8:
        report.add(
            f"{scales.keys[0]} in {tensor.file}", f"{name} is not float8; it is multiplied by this scale all the same"
        )
    return scaled(name, tensor, scales, config)


def scaled(name: str, tensor: Lazy, scales: Scales, config: Mapping[str, Any]) -> Lazy:
    """Return the weight times its scale, in float32, unread.

    Raises UserError if the scale is neither a single number nor one number for each row or block.
    """
    scale = scales.first
    assert scale is not None, "the caller has seen it"
    numbers = prod(scale.shape)
    if numbers != 1 and (scale.shape[0] != numbers or numbers != tensor.length):
        return scaled_by_blocks(name, tensor, scale, scales.settings, config)

    def read(start: int, stop: int) -> torch.Tensor:
        values = factors(scale.read() if numbers == 1 else scale.read_rows(start, stop)).reshape(-1)
        return tensor.read_rows(start, stop).float() * values.reshape(-1, *(1,) * (len(tensor.shape) - 1))

    return tensor.each_row(read, torch.float32)


def scaled_by_blocks(
    name: str, tensor: Lazy, scale: Lazy, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> Lazy:
    """Return the matrix times the scales of its blocks, in float32, unread."""
    problem = f"{tensor.file}: the scale of {name} has shape {list(scale.shape)}, the weight {list(tensor.shape)}"
    if len(tensor.shape) != 2 or len(scale.shape) != 2:
        raise UserError(problem, ONE_SCALE)
    if settings.get("format") in COMFY_BLOCKS:
        grid = for_cublas(name, scale, tensor.length, ceil(tensor.shape[1] / 32))
        height, width = 1, 32
    else:
        block = block_size(tensor.shape, scale.shape, settings.get("block_size") or config.get("weight_block_size"))
        if block is None:
            raise UserError(problem, ONE_SCALE)
        (height, width), grid = block, scale

    def read(start: int, stop: int) -> torch.Tensor:
        first = start // height
        values = factors(grid.read_rows(first, ceil(stop / height)))
        rows = values.repeat_interleave(height, 0)[start - first * height : stop - first * height]
        return tensor.read_rows(start, stop).float() * rows.repeat_interleave(width, 1)[:, : tensor.shape[1]]

    return tensor.each_row(read, torch.float32)


def block_size(shape: tuple[int, ...], scale: tuple[int, ...], told: object) -> tuple[int, int] | None:
    """Return the height and width of the blocks of a matrix that has a scale for each; None if no size fits.

    It is what the checkpoint tells, or else 128 x 128, or else what divides the matrix.
    """
    pairs: list[Any] = []
    if told:
        pairs = [(told, told) if isinstance(told, int) else told]
    else:
        pairs = [(DEEPSEEK_BLOCK, DEEPSEEK_BLOCK)]
        if scale[0] and scale[1] and shape[0] % scale[0] == 0 and shape[1] % scale[1] == 0:
            pairs.append((shape[0] // scale[0], shape[1] // scale[1]))
    for pair in pairs:
        if (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(size, int) and size > 0 for size in pair)
        ):
            height, width = pair
            if (ceil(shape[0] / height), ceil(shape[1] / width)) == scale:
                return height, width
    return None


def nvfp4(name: str, tensor: Lazy, scales: Scales) -> Lazy:
    """Return a matrix in NVFP4, in float32, unread.

    Two numbers are in a byte. ComfyUI has the first one in the upper half of it, all others in the lower.
    """
    first, comfy = scales.first, scales.settings.get("format") == "nvfp4"
    assert first is not None, "the caller has seen it"
    if len(tensor.shape) != 2 or len(first.shape) != 2 or any(prod(s.shape) != 1 for s in _single(scales)):
        raise UserError(f"{tensor.file}: {name} has scales of shapes that no NVFP4 weight has", FULL)
    rows, columns = tensor.shape[0], tensor.shape[1] * 2
    blocks = columns // NVFP4_BLOCK
    grid = for_cublas(name, first, rows, blocks) if comfy else first
    if columns % NVFP4_BLOCK or grid.shape != (rows, blocks):
        problem = f"{tensor.file}: the scale of {name} has shape {list(first.shape)}, the weight {[rows, columns]}"
        raise UserError(problem, FULL)
    numbers = torch.tensor(FOUR_BITS)
    numbers = torch.cat((numbers, -numbers))

    def read(start: int, stop: int) -> torch.Tensor:
        packed = tensor.read_rows(start, stop)
        halves = (packed >> 4, packed & 15) if comfy else (packed & 15, packed >> 4)
        values = numbers[torch.stack(halves, dim=-1).reshape(stop - start, blocks, NVFP4_BLOCK).int()]
        factor = grid.read_rows(start, stop).float()
        if scales.second is not None:
            factor = factor * scales.second.read().float()
        if scales.divisor is not None:
            factor = factor / scales.divisor.read().float()
        return (values * factor[:, :, None]).reshape(stop - start, columns)

    return Lazy((rows, columns), torch.float32, tensor.file, read)


def _single(scales: Scales) -> list[Lazy]:
    return [scale for scale in (scales.second, scales.divisor) if scale is not None]


def for_cublas(name: str, scale: Lazy, rows: int, columns: int) -> Lazy:
    """Return the scales of a matrix as a grid of rows and columns, where the file has them laid out for cuBLAS.

    There, the grid is padded to a multiple of 128 x 4 and cut into such tiles; in a tile, the rows r, r + 32, r + 64
    and r + 96 stand side by side. Source: cuBLAS, "1D Block Scaling Factors Layout". Raises UserError for a grid of
    another size.
    """
    down, across = ceil(rows / 128), ceil(columns / 4)
    if prod(scale.shape) != down * 128 * across * 4:
        problem = f"{scale.file}: the scale of {name} has shape {list(scale.shape)}, for {rows} x {columns} blocks"
        raise UserError(problem, FULL)

    def read(start: int, stop: int) -> torch.Tensor:
        stored = scale.read()
        tiles = stored.view(torch.uint8).reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
        return tiles.reshape(down * 128, across * 4)[start:stop, :columns].contiguous().view(stored.dtype)

    return Lazy((rows, columns), scale.dtype, scale.file, read)


def factors(scale: torch.Tensor) -> torch.Tensor:
    """Return scales in float32. Those stored as exponents (E8M0) are powers of two: 2^(e - 127)."""
    if scale.dtype in POWER_DTYPES:
        return scale.view(EXPONENTS).float()
    return scale.float()


def _in_bfloat16(tensor: Lazy) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: tensor.read_rows(start, stop).to(torch.bfloat16)
