"""Weights in safetensors files, found by name and read one at a time.

The files are read by the safetensors library, which validates the header. Its `pread` backend is used, which reads a
tensor into memory of the tensor's size: the pages of a mapped file would stay and count as memory in use.
Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.refused_formats import START_BYTES, check_packing, check_start
from ditforge.small_files import read_bytes

if TYPE_CHECKING:
    import torch

SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# PyTorch's names of safetensors' element types.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}

Read = Callable[[], "torch.Tensor"]


@dataclass(frozen=True)
class Weights:
    """The tensors of one network. None of them is in memory.

    folder: the folder that error messages name.
    shards: the file that holds each tensor, by the tensor's name.
    shapes: the shape of each tensor, by name.
    reads: a function for each tensor, by name, that reads or computes it anew with each call, in its own dtype.
    """

    folder: Path
    shards: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    reads: dict[str, Read]

    def find(self, names: Iterable[str], prefixes: Iterable[str] = ()) -> str | None:
        """Return the first key that exists of all `names`, without and with the prefixes; None if none exists."""
        prefixes = ("", *prefixes)
        return next((p + name for name in names for p in prefixes if p + name in self.shards), None)

    def read(self, name: str, factor: float = 1.0) -> torch.Tensor:
        """Read the tensor `name`, in its own dtype if `factor` is 1.

        Otherwise it is multiplied by `factor` in float32, where a power of two loses no digit. Raises UserError if the
        tensor's file cannot be read or has changed since it was opened.
        """
        tensor = self.reads[name]()
        return tensor if factor == 1 else tensor.float() * factor


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name, its dtype as safetensors names it (a key of DTYPES), and its shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """Read the whole tensor. Raises UserError if the file cannot be read or has changed since it was opened."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the rows from `start` to `stop`; a scalar has one row. Raises UserError as read() does.

        safetensors reads the whole tensor for this, and frees the memory of the other rows.
        """
        with safetensors_file(self.file, "pt") as opened:
            part = opened.get_slice(self.name)
            if (part.get_dtype(), tuple(part.get_shape())) != (self.dtype, self.shape):
                raise UserError(f"{self.file} has changed while it was read: {self.name} is another", "start again")
            whole = not self.shape or (start, stop) == (0, self.shape[0])
            tensor: torch.Tensor = opened.get_tensor(self.name) if whole else part[start:stop]
            return tensor


def open_weights(folder: Path) -> Weights:
    """Open the weights in `folder`, which are one safetensors file, or shards with an index. No tensor is read.

    Raises UserError if a file is missing, truncated or damaged, or if there are only pickled weights.
    """
    single = [folder / name for name in SINGLE_FILES if (folder / name).is_file()]
    return open_files(folder, single) if single else _open_shards(folder)


def open_files(folder: Path, files: Iterable[Path]) -> Weights:
    """Open the tensors of all `files`. Raises UserError for a file that is not a whole safetensors file."""
    weights = Weights(folder, {}, {}, {})
    for file in files:
        for name, stored in read_header(file).items():
            weights.shards[name], weights.shapes[name], weights.reads[name] = file, stored.shape, stored.read
    return weights


def read_header(file: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name, without reading them.

    Raises UserError for files of other formats, for packed weights, for element types that PyTorch lacks, and for
    everything that safetensors refuses: an impossible header length, a header that is not JSON, sizes that do not fit,
    and bytes that belong to no tensor or to two.
    """
    try:
        with file.open("rb") as opened:
            check_start(file, opened.read(START_BYTES))
    except OSError as error:
        raise unreadable(file, error) from error
    with safetensors_file(file, "np") as opened:
        names = list(opened.keys())
        check_packing(file, names)
        parts = {name: opened.get_slice(name) for name in names}
        entries = {name: Stored(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    for name, stored in entries.items():
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{file}: {name} has type {stored.dtype}, known are {', '.join(DTYPES)}", "use another file"
            )
    return entries


@contextmanager
def safetensors_file(file: Path, framework: str) -> Iterator[Any]:
    """Open the file with safetensors, for tensors of PyTorch (`framework` "pt") or NumPy ("np").

    Raises UserError if the file cannot be read or is damaged.
    """
    from safetensors import SafetensorError, safe_open  # here, since a plan for an export reads no checkpoint

    try:
        with safe_open(file, framework=framework, backend="pread") as opened:
            yield opened
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        size = file.stat().st_size if file.is_file() else 0
        problem = f"{file} ({size} bytes) is truncated or damaged: {_short(error)}"
        raise UserError(problem, "copy the file again") from error


def unreadable(file: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be read."""
    reason = error.strerror or _short(error)
    return UserError(f"cannot read {file}: {reason}", "check the file and its permissions")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _open_shards(folder: Path) -> Weights:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        pickled = next((path for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern)), None)
        found = f"only {pickled.name}, which is pickled and can run code when opened" if pickled else "no weights"
        raise UserError(f"{folder} has {found}", f"copy {SINGLE_FILES[0]} or {SINGLE_FILES[1]} into it")
    try:
        weight_map = json.loads(read_bytes(indices[0]))["weight_map"]
        files = sorted(set(weight_map.values()))
        foreign = next((name for name in files if Path(name).name != name), None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{indices[0]} is damaged: {_short(error)!r}", "copy it again") from error
    if foreign is not None:
        raise UserError(f"{indices[0]} names {foreign!r}, which is no file beside it", "copy it again")
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {indices[0].name} names it", "copy the shard again")
    weights = open_files(folder, [folder / name for name in files])
    for name, file in weight_map.items():
        if weights.shards.get(name) != folder / file:
            raise UserError(f"{folder / file} lacks {name}, which {indices[0].name} says it holds", "copy both again")
    return weights
