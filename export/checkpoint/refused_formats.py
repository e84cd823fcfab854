"""Recognise files and weights in formats that cannot be read.

What tells is the first bytes of a file, the names of its tensors, and the `quantization_config` of a configuration. The
errors name the format and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.load_report import LoadReport

PICKLED = "a pickled checkpoint, which can run code when opened"
SAFETENSORS = "use the model's .safetensors file"
AGAIN = "download the file again"
FULL = (
    "use the model's original repository (such as black-forest-labs/FLUX.1-dev), or a file with weights in bf16, fp16, "
    "fp32, float8 or GGUF; ditforge export quantises it itself"
)
OTHER_FILE = f"{SAFETENSORS}, or its folder in diffusers' layout"
START_BYTES = 512  # how many bytes at the start of a file tell its format
SHARD = re.compile(r".*-(?P<number>\d{5})-of-(?P<total>\d{5})\.(safetensors|sft|gguf)", re.IGNORECASE)
# How a file begins, its format, and what to do. A safetensors file begins with the length of its header and a brace.
STARTS = (
    (rb"PK\x03\x04[\s\S]{26}[^/]+/(data\.pkl|\.format_version|\.data)", PICKLED, SAFETENSORS),
    (rb"\x80[\x02-\x05]", PICKLED, SAFETENSORS),
    (
        rb"PK\x03\x04|PK\x05\x06",
        "a zip archive or a pickled checkpoint in one, which can run code when opened",
        SAFETENSORS,
    ),
    (rb"GGUF", "a GGUF file", "give it the suffix .gguf"),
    (
        rb"version https?://",
        "a pointer of Git LFS, not the file that it stands for",
        "git lfs pull, or download the file",
    ),
    (rb"(?i)\s*<(!doc|html|\?xml|head|body)", "a web page", "log in where the file came from, and download it again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed archive", "unpack it first"),
    (rb"[\s\S]{257}ustar", "a tar archive", "unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "a picture", OTHER_FILE),
    (rb"%PDF", "a PDF document", OTHER_FILE),
    (rb"\x89HDF", "an HDF5 file of Keras", SAFETENSORS),
    (rb"\x93NUMPY", "an array of NumPy", SAFETENSORS),
    (rb"[fpv]trt", "an engine of TensorRT, which is compiled already", OTHER_FILE),
    (rb"\x08[\x01-\x20](\x12|:|B)", "an ONNX file", OTHER_FILE),
    (rb"\x7fELF|MZ", "a program", OTHER_FILE),
    (rb"\0{16}", "empty in its first bytes, which are zeros: a download that was interrupted", AGAIN),
    (rb"\s*[{\[]\s*[\"{\[]", "a JSON file", OTHER_FILE),
    (rb"[\x09\x0a\x0d\x20-\x7e]{9,}\Z", "a text file", OTHER_FILE),
)
# The names of the tensors that tools store beside packed weights, and the tools. The order is that of precedence.
PACKERS = (
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", "bitsandbytes in 4 bits (nf4, fp4)"),
    (r"\.(SCB|weight_format)", "bitsandbytes in 8 bits"),
    (r"\.(wscales|wtscale|wcscales|smooth_factor|smooth_factor_orig|smooth_orig)", "Nunchaku (SVDQuant)"),
    (r"\.(qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r"\.weight\._(data|scale|shift)", "Quanto"),
    (r"(:|\._weight_)(qdata|tensor_data|int_data|packed_weight|zero_point)", "torchao"),
    (r"\.weight_(shape|zero_point|g_idx)", "compressed-tensors in integers"),
    (r"\.(encoded_exponent|sign_mantissa|split_positions|output_positions)", "DFloat11"),
    (r"\.(svd_up|svd_down)", "SDNQ"),
    (r"\.(W_q|meta\.nbits)", "HQQ"),
    (r"\.(codebooks|codes)", "AQLM"),
    (r"\.biases", "MLX"),
)
# The methods that a `quantization_config` names, whose weights can be read: the keys of the tensors tell the rest.
READ_METHODS = {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "bfl", "mxfp8", "nvfp4"}
METHODS = {
    "bitsandbytes": "bitsandbytes (4 or 8 bits)",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "gguf": "GGUF in a folder",
    "quanto": "Quanto",
    "torchao": "torchao",
    "svdquant": "Nunchaku (SVDQuant)",
    "nunchaku_lite": "Nunchaku (SVDQuant)",
    "sdnq": "SDNQ",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "dfloat11": "DFloat11",
}


def check_start(file: Path, start: bytes) -> None:
    """Raise UserError if `start`, the first START_BYTES bytes of the file, shows that it has another format."""
    if not start:
        raise UserError(f"{file} is empty", AGAIN)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return
    for pattern, kind, fix in STARTS:
        if re.match(pattern, start):
            told = f": {start[:60].decode(errors='replace').strip()!r}" if kind == "a text file" else ""
            raise UserError(f"{file} is {kind}{told}", fix)


def check_shard(file: Path) -> None:
    """Raise UserError if the file's name says that it is one of several files of a model."""
    match = SHARD.fullmatch(file.name)
    if match and int(match["total"]) > 1:
        number, total = int(match["number"]), int(match["total"])
        fix = "give the folder that has model_index.json and all of them, or the model in one file"
        raise UserError(f"{file} is part {number} of {total} of a model", fix)


def check_packing(file: Path, names: Iterable[str]) -> None:
    """Raise UserError if the names of the file's tensors show that its weights are packed."""
    names = list(names)
    for pattern, packer in PACKERS:
        for name in names:
            if re.search(pattern + "$", name):
                raise UserError(f"{file} has weights packed by {packer}: it holds {name}", FULL)


def method_of(config: Mapping[str, Any]) -> str:
    """Return the method that a `quantization_config` names, in lower case; "" if it names none."""
    method = config.get("quant_method") or config.get("quant_type") or ""
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method).rpartition(".")[2].lower().replace("bits_and_bytes", "bitsandbytes")


def check_method(config: Mapping[str, Any], quantised: bool, folder: Path, report: LoadReport) -> None:
    """Raise UserError if the weights in `folder` are quantised in a way that cannot be read.

    `config` is the `quantization_config`, and `quantised` says whether there are weights in 8 bits or less. If there
    are none, the configuration has no effect, which is added to `report`.
    """
    method = method_of(config)
    if method in READ_METHODS:
        return
    name = METHODS.get(method, method or "a method without a name")
    if quantised:
        raise UserError(f"{folder} has weights packed by {name}, as its config.json says", FULL)
    report.add(f"quantization_config in {folder}/config.json", f"it names {name}, but the weights are not packed")


def packed_integers(name: str, file: Path, dtype: str, config: Mapping[str, Any]) -> UserError:
    """Return the error for a weight that consists of integers, which no scale beside it explains."""
    method = METHODS.get(method_of(config), method_of(config))
    how = f"by {method}" if method else "in a way that is not known"
    return UserError(f"{file}: {name} is {dtype}, weights packed {how}", FULL)
