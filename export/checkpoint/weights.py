"""Weights in safetensors files, found by name and read one at a time.

The files are read by the safetensors library, which validates the header. Its `pread` backend is used, which reads a
tensor into memory of the tensor's size: the pages of a mapped file would stay and count as memory in use.
Format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.component_files import DIFFUSERS, TRANSFORMERS, choose
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.refused_formats import FULL, START_BYTES, check_packing, check_start
from ditforge.option import setting
from ditforge.small_files import read_bytes

if TYPE_CHECKING:
    import torch

SAFETENSORS = ".safetensors"
SINGLE_FILES = (f"{DIFFUSERS}{SAFETENSORS}", f"{TRANSFORMERS}{SAFETENSORS}")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (SAFETENSORS, ".sft", ".gguf", *PICKLED_SUFFIXES, ".msgpack", ".onnx", ".h5")
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
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}

# safetensors' element types that PyTorch has no numbers for, and what they are.
NAMED_DTYPES = {
    "F4": "numbers of 4 bits (MXFP4 or NVFP4)",
    "F6_E2M3": "numbers of 6 bits (MXFP6)",
    "F6_E3M2": "numbers of 6 bits (MXFP6)",
    "F8_E4M3FNUZ": "float8 of AMD's GPUs",
    "F8_E5M2FNUZ": "float8 of AMD's GPUs",
    "C64": "complex numbers",
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
        tensor's file cannot be read or has changed since it was opened, and if a number is infinite or none.
        """
        tensor = self.reads[name]()
        check_finite(name, self.shards[name], tensor)
        return tensor if factor == 1 else tensor.float() * factor


def check_finite(name: str, file: Path, tensor: torch.Tensor) -> None:
    """Raise UserError if the tensor holds NaN or an infinity, with which every picture would be black.

    It takes a pass over the tensor: 0.4 ms for a million numbers in float16 or bfloat16.
    """
    if not tensor.numel() or not tensor.is_floating_point() or tensor.element_size() == 1:
        return
    least, most = (float(value) for value in tensor.aminmax())
    if not (isfinite(least) and isfinite(most)):
        kind = "NaN" if isnan(least) else "infinite numbers"
        problem = f"{file}: {name} holds {kind}, which make every picture black"
        raise UserError(problem, "download the file again; if it stays so, use another version of the model")


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


def open_weights(folder: Path, report: LoadReport | None = None) -> Weights:
    """Open the weights in `folder`, which are one safetensors file, or shards with an index. No tensor is read.

    What is there and not read is added to `report`. Raises UserError if a file is missing, truncated or damaged, or if
    there are only weights in other formats.
    """
    return open_files(folder, component_files(folder, report))


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
    check_duplicates(file)
    for name, stored in entries.items():
        if stored.dtype not in DTYPES:
            named = NAMED_DTYPES.get(stored.dtype, f"known are {', '.join(DTYPES)}")
            raise UserError(f"{file}: {name} has type {stored.dtype}, {named}", FULL)
    return entries


def check_duplicates(file: Path) -> None:
    """Raise UserError if the header has a name twice: the safetensors library reads the last one without a word."""
    with file.open("rb") as opened:
        header = opened.read(int.from_bytes(opened.read(8), "little"))
    if twice := _first_duplicate(header):
        raise UserError(f"{file} is damaged: its header has {twice!r} twice", "copy the file again")


def _first_duplicate(header: bytes) -> str | None:
    found: list[str] = []

    def read_pairs(pairs: list[tuple[str, object]]) -> None:
        if len(dict(pairs)) < len(pairs):
            found.append(Counter(name for name, _ in pairs).most_common(1)[0][0])

    json.loads(header, object_pairs_hook=read_pairs)
    return found[0] if found else None


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file; none for a file of another format."""
    with file.open("rb") as opened:
        if opened.read(4) == b"GGUF":
            return {}
    with safetensors_file(file, "np") as opened:
        return dict(opened.metadata() or {})


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


def component_files(folder: Path, report: LoadReport | None = None) -> list[Path]:
    """Return the files in `folder` that hold the weights of a component, which are one file or shards.

    What is there and not read, such as another variant, is added to `report`. Raises UserError as open_weights().
    """
    report = report or LoadReport()
    names = file_names(folder)
    indices: dict[str, dict[str, str]] = {}

    def read_index(name: str) -> list[str]:
        indices[name] = _read_index(folder / name)
        return list(indices[name].values())

    chosen = choose(str(folder), names, read_index, report)
    if chosen is None:
        raise no_weights(folder, names)
    files = [folder / name for name in chosen.files]
    if chosen.index:
        held = {file.name: read_header(file) for file in files}
        for name, file in indices[chosen.index].items():
            if name not in held[file]:
                problem = f"{folder / file} lacks {name}, which {chosen.index} says it holds"
                raise UserError(problem, "copy both again")
    return files


def file_names(folder: Path) -> list[str]:
    """Return the names of the files in a folder; none if it is no folder."""
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def no_weights(folder: Path, names: Collection[str]) -> UserError:
    """Return the error for a component's folder without weights that can be read: it says what is there instead."""
    fix = f"copy {SINGLE_FILES[0]} or {SINGLE_FILES[1]} into it"
    others = sorted(name for name in names if name.endswith(OTHER_WEIGHTS))
    if not others:
        return UserError(f"{folder} has no weights", fix)
    name = others[0]
    if name.endswith(PICKLED_SUFFIXES):
        return UserError(f"{folder} has only {name}, which is pickled and can run code when opened", fix)
    if name.endswith(".gguf"):
        use = f"give {folder / name} itself, and {setting('base', str(folder.parent))}"
        return UserError(f"{folder} has its weights as GGUF, {name}, which no diffusers folder has", use)
    if name.endswith(SAFETENSORS):
        fix = f"rename it to {SINGLE_FILES[folder.name.startswith('text')]} if it has the names of diffusers; if not, "
        fix += f"give the file itself, and {setting('base', str(folder.parent))}"
    return UserError(f"{folder} has no weights that can be read, only {', '.join(others[:3])}", fix)


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor that an index of shards names."""
    try:
        weight_map = json.loads(read_bytes(index))["weight_map"]
        files = sorted(set(weight_map.values()))
        foreign = next((name for name in files if Path(name).name != name), None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is damaged: {_short(error)!r}", "copy it again") from error
    if foreign is not None:
        raise UserError(f"{index} names {foreign!r}, which is no file beside it", "copy it again")
    return dict(weight_map)
