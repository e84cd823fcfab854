"""Weights in formats that are not read here, refused by name: how a file begins, and what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ditforge.errors import UserError

PICKLED = "a pickled checkpoint, which can run code when opened"
SAFETENSORS = "use the model's .safetensors file"
FULL = "use the file with weights in bf16, fp16, fp32 or float8; ditforge export quantises it itself"
START_BYTES = 8  # of a file, which tell a format
# How files begin, what they are, and the way out. As lengths of a header, all of these would be too large, but a zip's.
STARTS = (
    (rb"PK\x03\x04", PICKLED, SAFETENSORS),
    (rb"(?s)\x80[\x02-\x05]..(?!\0{4})", PICKLED, SAFETENSORS),
    (rb"GGUF", "a GGUF file, whose weights are packed", FULL),
    (rb"version ", "a pointer of Git LFS, not the file that it stands for", "git lfs pull, or download the file"),
    (rb"(?i)\s*<(!doc|html|\?xml)", "a web page", "log in where the file came from, and download it again"),
)
# What packers call the tensors that they put beside the packed ones.
PACKERS = (
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", "bitsandbytes in 4 bits (nf4, fp4)"),
    (r"\.SCB", "bitsandbytes in 8 bits"),
    (r"\.(wscales|wtscale|smooth_factor|smooth_factor_orig)", "Nunchaku (SVDQuant)"),
    (r"\.(qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r"\.weight_scale_2", "ModelOpt (nvfp4)"),
    (r"\.weight\._(data|scale)", "Quanto"),
)


def check_start(file: Path, start: bytes) -> None:
    """Raise UserError if the file, which begins with `start` (8 bytes do), is known to be of another format."""
    for pattern, kind, fix in STARTS:
        if re.match(pattern, start):
            raise UserError(f"{file} is {kind}", fix)


def check_packing(file: Path, names: Iterable[str]) -> None:
    """Raise UserError if tensors of these names tell that the file's weights are packed."""
    for name in names:
        for pattern, packer in PACKERS:
            if re.search(pattern + "$", name):
                raise UserError(f"{file} has weights packed by {packer}: it holds {name}", FULL)
