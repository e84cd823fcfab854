"""Recognise weights in formats that cannot be read, by the first bytes of a file and the names of its tensors.

The errors name the format and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ditforge.errors import UserError

PICKLED = "a pickled checkpoint, which can run code when opened"
SAFETENSORS = "use the model's .safetensors file"
FULL = "use the file with weights in bf16, fp16, fp32 or float8; ditforge export quantises it itself"
START_BYTES = 8  # how many bytes at the start of a file tell its format
# How a file begins, its format, and what to do. A safetensors file begins with the length of its header instead. Read
# as such a length, all these beginnings are too large, except that of a zip file.
STARTS = (
    (rb"PK\x03\x04", PICKLED, SAFETENSORS),
    (rb"(?s)\x80[\x02-\x05]..(?!\0{4})", PICKLED, SAFETENSORS),
    (rb"GGUF", "a GGUF file, whose weights are packed", FULL),
    (rb"version ", "a pointer of Git LFS, not the file that it stands for", "git lfs pull, or download the file"),
    (rb"(?i)\s*<(!doc|html|\?xml)", "a web page", "log in where the file came from, and download it again"),
)
# The names of the tensors that tools store beside packed weights, and the tools.
PACKERS = (
    (r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", "bitsandbytes in 4 bits (nf4, fp4)"),
    (r"\.SCB", "bitsandbytes in 8 bits"),
    (r"\.(wscales|wtscale|smooth_factor|smooth_factor_orig)", "Nunchaku (SVDQuant)"),
    (r"\.(qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r"\.weight_scale_2", "ModelOpt (nvfp4)"),
    (r"\.weight\._(data|scale)", "Quanto"),
)


def check_start(file: Path, start: bytes) -> None:
    """Raise UserError if `start`, the first START_BYTES bytes of the file, shows that it has another format."""
    for pattern, kind, fix in STARTS:
        if re.match(pattern, start):
            raise UserError(f"{file} is {kind}", fix)


def check_packing(file: Path, names: Iterable[str]) -> None:
    """Raise UserError if the names of the file's tensors show that its weights are packed."""
    for name in names:
        for pattern, packer in PACKERS:
            if re.search(pattern + "$", name):
                raise UserError(f"{file} has weights packed by {packer}: it holds {name}", FULL)
